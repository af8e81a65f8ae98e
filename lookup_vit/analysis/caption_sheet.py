"""A page of images with their captions, in one HTML file."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

# Of an image on the page, in pixels.
WIDTH = 256

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Captions</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 16px; display: grid; gap: 24px 16px;
  grid-template-columns: repeat(auto-fill, minmax({width}px, 1fr)); }}
figure {{ margin: 0; overflow-wrap: anywhere; }}
img {{ width: {width}px; max-width: 100%; }}
p {{ margin: 4px 0; font-weight: bold; }}
ul {{ margin: 4px 0; padding-left: 18px; color: #555; }}
small {{ color: #555; }}
</style>
</head>
<body>
{figures}
</body>
</html>
"""

_FIGURE = """<figure>
<img src="data:image/png;base64,{png}" alt="image {id}">
<figcaption>
<small>{id}{cider}</small>
<p>{caption}</p>
<ul>
{references}
</ul>
</figcaption>
</figure>"""


class Row(NamedTuple):
  """An image and what is said of it.

  Attributes:
    image: `[height, width, 3]`: uint8, or floats in [-1, 1].
    image_id: its number.
    caption: the model's.
    references: people's.
    scores: numbers by metric, of which CIDEr is shown, times 100.
  """

  image: np.ndarray
  image_id: int
  caption: str
  references: Sequence[str]
  scores: Mapping[str, float] | None = None


def write(path: epath.PathLike, rows: Sequence[Row]) -> None:
  """Writes a page that needs no other file: the images are inside, as PNGs.

  Args:
    path: the HTML to write.
    rows: what it shows, in their order.

  Raises:
    ValueError: an image is of another shape or type than `Row`'s.
  """
  text = _PAGE.format(
    width=WIDTH, figures="\n".join(_figure(row) for row in rows)
  )
  epath.Path(path).write_bytes(text.encode(errors="replace"))


def _figure(row: Row) -> str:
  cider = (row.scores or {}).get("CIDEr")
  return _FIGURE.format(
    png=base64.b64encode(_png(row)).decode(),
    id=html.escape(str(row.image_id)),
    cider="" if cider is None else f" &middot; CIDEr {100 * cider:.1f}",
    caption=html.escape(row.caption),
    references="\n".join(f"<li>{html.escape(r)}</li>" for r in row.references),
  )


def _png(row: Row) -> bytes:
  image = np.asarray(row.image)
  said = f"image {row.image_id} is {image.dtype} {list(image.shape)}"
  if image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(f"{said}: want [height, width, 3].")
  if np.issubdtype(image.dtype, np.floating):
    # Bicubic resizing leaves the range a little.
    image = np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
  if image.dtype != np.uint8:
    raise ValueError(f"{said}: want uint8, or floats in [-1, 1].")
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()
