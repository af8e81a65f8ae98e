"""COCO's files of captions: results of a model, and annotations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath


def write_results(path: str, captions: Mapping[int, str]) -> None:
  """Writes captions as COCO's results: `[{"image_id": 1, "caption": "a"}]`."""
  rows = [
    {"image_id": int(i), "caption": captions[i]} for i in sorted(captions)
  ]
  epath.Path(path).write_text(json.dumps(rows))


def read_results(path: str) -> dict[int, str]:
  """Captions of a file of COCO's results, by image.

  Raises:
    ValueError: it is no such file, or has two captions for an image.
  """
  rows = _read_json(path)
  captions = {}
  for i, caption in _sentences(path, rows, "COCO's results, a list"):
    if i in captions:
      raise ValueError(f"{path}: two captions for image {i}.")
    captions[i] = caption
  return captions


def write_references(
  path: str, references: Mapping[int, Sequence[str]]
) -> None:
  """Writes references as COCO's annotations, without the images' files."""
  images = [{"id": int(i)} for i in sorted(references)]
  rows = [(i, text) for i in sorted(references) for text in references[i]]
  annotations = [
    {"id": n, "image_id": int(i), "caption": text}
    for n, (i, text) in enumerate(rows)
  ]
  data = {"images": images, "annotations": annotations}
  epath.Path(path).write_text(json.dumps(data))


def read_references(path: str) -> dict[int, list[str]]:
  """References of a file of COCO's annotations, by image, in its order.

  Raises:
    ValueError: it is no such file, or has a caption of an image that it lacks.
  """
  references: dict[int, list[str]] = {i: [] for i in read_images(path)}
  rows = _read_json(path).get("annotations")
  want = "COCO's annotations, with a list `annotations`"
  for i, caption in _sentences(path, rows, want):
    if i not in references:
      raise ValueError(f"{path}: a caption of image {i}, which it lacks.")
    references[i].append(caption)
  return references


def read_images(path: str) -> dict[int, Mapping[str, Any]]:
  """Entries of the images in a file of COCO's annotations, by id.

  Raises:
    ValueError: it is no such file.
  """
  data = _read_json(path)
  rows = data.get("images") if isinstance(data, dict) else None
  if not isinstance(rows, list):
    raise ValueError(f"{path}: want COCO's annotations, with a list `images`.")
  for row in rows:
    if not isinstance(row, dict) or type(row.get("id")) is not int:
      raise ValueError(f"{path}: {_short(row)} in images: want an integer id.")
  return {row["id"]: row for row in rows}


def _read_json(path):
  try:
    return json.loads(epath.Path(path).read_bytes())
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path} is no JSON: {e}") from None


def _sentences(path, rows, want) -> Iterator[tuple[int, str]]:
  if not isinstance(rows, list):
    raise ValueError(f"{path}: want {want}.")
  for row in rows:
    if (
      not isinstance(row, dict)
      or type(row.get("image_id")) is not int
      or not isinstance(row.get("caption"), str)
    ):
      raise ValueError(
        f"{path}: {_short(row)}: want an integer image_id and a caption."
      )
    yield row["image_id"], row["caption"]


def _short(row):
  text = json.dumps(row)
  return text if len(text) <= 80 else f"{text[:77]}..."
