"""Your own images with captions, annotated as COCO's are.

    FOLDER/SPLIT.json
    FOLDER/SPLIT/*.jpg (or .png)

    {
      "images": [{"id": 7, "file_name": "a.jpg"}, ...],
      "annotations": [{"id": 1, "image_id": 7, "caption": "A dog."}, ...]
    }

`file_name` is a path below FOLDER/SPLIT; other fields are ignored. Name the
folder in a config as `dict(module="data.caption_folder", folder=FOLDER,
split=SPLIT)`: it is built on first use, and again when the folder has changed.
The features are those of TFDS's `coco_captions`, but for its `objects`.
"""

import csv
import functools
import io
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from data import folders, video_builder
from lookup_vit import damage, loops

_DESCRIPTION = """\
Images of a folder, each with captions. Files are stored as they are.
`image/filename` is the image's path below the folder of its split.
`missing_images.tsv`, beside the data, lists the images that could not be read.
"""

REPORT = "missing_images.tsv"

_WANTED = "wanted the layout FOLDER/SPLIT.json, FOLDER/SPLIT/*.jpg (.png)"


class Image(NamedTuple):
  """An annotated image.

  Attributes:
    id: unique in its split.
    name: its path below the folder of its split.
    captions: id and text of each.
  """

  id: int
  name: str
  captions: tuple[tuple[int, str], ...]


def read_annotations(path: str) -> tuple[Image, ...]:
  """Reads a file of COCO's format for captions.

  Raises:
    ValueError: it is none, two images have one id, an image has no captions or
      lies elsewhere, a caption is blank or of an image that the file has not.
  """
  wanted = "COCO's annotations of captions, in JSON"
  text = video_builder.read_text(epath.Path(path), wanted)
  try:
    content = json.loads(text)
  except (json.JSONDecodeError, RecursionError) as e:
    raise ValueError(f"{path} is no JSON ({e}); wanted {wanted}") from e
  images = _rows(path, content, "images", id=int, file_name=str)
  fields = dict(id=int, image_id=int, caption=str)
  annotations = _rows(path, content, "annotations", **fields)
  if not images:
    raise ValueError(f"{path} has no images")
  names, captions = {}, {}
  for i, name in images:
    if i in names:
      raise ValueError(
        f"{path}: two images have the id {i}, {names[i]!r} and {name!r}"
      )
    if not _is_below(name):
      raise ValueError(
        f"{path}: image {i} has file_name={name!r}; wanted a path below the "
        "folder of the split"
      )
    names[i], captions[i] = name, []
  for number, i, caption in annotations:
    if i not in names:
      raise ValueError(
        f"{path}: annotation {number} is of image {i}, which is none of its "
        f"{len(names)} images"
      )
    if not caption.strip():
      raise ValueError(
        f"{path}: annotation {number}, of image {i} ({names[i]}), is a caption "
        "without a word"
      )
    captions[i].append((number, caption))
  without = [f"{i} ({names[i]})" for i, of in captions.items() if not of]
  if without:
    more = ", ..." if len(without) > 5 else ""
    raise ValueError(
      f"{path}: {len(without)} of its {len(names)} images have no captions: "
      f"{', '.join(without[:5])}{more}"
    )
  return tuple(Image(i, names[i], tuple(of)) for i, of in captions.items())


def _rows(path, content, key, **fields):
  """The fields of each row of a list; what else the rows have is ignored."""
  rows = content.get(key) if isinstance(content, dict) else None
  example = ", ".join(f'"{k}": {t.__name__}' for k, t in fields.items())
  wanted = f'wanted {{"{key}": [{{{example}}}, ...], ...}}, as COCO has it'
  if not isinstance(rows, list):
    raise ValueError(f"{path} has no list {key!r}; {wanted}")
  found = []
  for number, row in enumerate(rows):
    values = [row.get(k) for k in fields] if isinstance(row, dict) else [None]
    # A boolean is an int to Python, and TFDS has 64 bits.
    if not all(
      type(v) is t and (_is_utf8(v) if t is str else abs(v) < 2**63)
      for v, t in zip(values, fields.values(), strict=False)
    ):
      shown = repr(row)
      shown = f"{shown[:100]}..." if len(shown) > 100 else shown
      raise ValueError(f"{path}: {key}[{number}] is {shown}; {wanted}")
    found.append(values)
  return found


def _is_utf8(text):
  """Whether it is without lone surrogates, which JSON may have."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _is_below(name):
  path = posixpath.normpath(name)
  return not (
    path.startswith("/")
    or path in (".", "..")
    or path.startswith("../")
    or "\0" in path
  )


# Of the same file the same, as a run makes several builders.
@functools.lru_cache(maxsize=8)
def _read_once(path, size, changed):
  del size, changed
  return read_annotations(path)


def list_folder(folder: str) -> dict[str, tuple[Image, ...]]:
  """The annotated images of each split FOLDER/SPLIT.json.

  Names that begin with a dot are ignored.

  Raises:
    ValueError: there is no folder, no annotations in it, annotations that are
      not as wanted or without a folder of images, or a split that TFDS could
      not name.
  """
  root = epath.Path(os.path.expanduser(folder))
  if not folder or not root.is_dir():
    raise ValueError(f"{folder!r} is no directory; {_WANTED}")
  names = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
  splits = [n.removesuffix(".json") for n in names if n.endswith(".json")]
  if not splits:
    more = ", ..." if len(names) > 10 else ""
    raise ValueError(
      f"{folder} holds no annotations; {_WANTED}; found "
      f"{', '.join(names[:10]) or 'nothing'}{more}"
    )
  folders.check_splits(folder, splits)
  found = {}
  for split in splits:
    path = root / f"{split}.json"
    if not (root / split).is_dir():
      raise ValueError(
        f"{path} has no folder of images beside it, {split}; {_WANTED}"
      )
    found[split] = _read_once(os.fspath(path), *folders.stat(path))
  return found


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Builds the set of a folder, under a name that its files decide.

  Args:
    folder: FOLDER of FOLDER/SPLIT.json and FOLDER/SPLIT/*.jpg.
    **kwargs: `data_dir` and `version`, of all builders.

  Raises:
    ValueError: see `list_folder`; or a config was asked for.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}

  def __init__(self, *, folder: str, **kwargs):
    if kwargs.get("config"):
      raise ValueError(f"no config {kwargs['config']!r}; there are none")
    self._images = list_folder(folder)
    self._root = folders.whole_path(folder)
    root = epath.Path(self._root)
    listing = []
    for split, images in self._images.items():
      listing.append((split, *folders.stat(root / f"{split}.json")))
      names = sorted({image.name for image in images})
      listing += [(n, *folders.stat(root / split / n)) for n in names]
    name = folders.config_name(self._root, listing)
    config = tfds.core.BuilderConfig(name=name)
    super().__init__(**{**kwargs, "config": config})

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(),
          "image/filename": tfds.features.Text(),
          "image/id": np.int64,
          "captions": tfds.features.Sequence(
            {"id": np.int64, "text": tfds.features.Text()}
          ),
        }
      ),
    )

  def _download_and_prepare(self, dl_manager, download_config):
    self._lost = []
    super()._download_and_prepare(dl_manager, download_config)
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([("split", "file", "reason"), *sorted(self._lost)])
    (self.data_path / REPORT).write_text(text.getvalue())

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    return {
      split: self._generate_examples(split, images)
      for split, images in self._images.items()
    }

  def _generate_examples(
    self, split: str, images: Sequence[Image]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    root = epath.Path(self._root) / split

    def read(image):
      path = os.fspath(root / image.name)
      return image, path, *damage.read_image(path)

    results = loops.in_threads(read, images)
    results = damage.with_progress(results, len(images), f"images of {split}")
    lost = []
    for image, path, content, error in results:
      if error is not None:
        reason = " ".join(error.removeprefix(f"{path}; ").split())
        lost.append((split, path, f"image {image.id}: {reason}"))
        continue
      yield (
        image.id,
        {
          "image": content,
          "image/filename": image.name,
          "image/id": image.id,
          "captions": [{"id": i, "text": text} for i, text in image.captions],
        },
      )
    if len(lost) == len(images):
      raise ValueError(
        f"none of the {len(images)} images of split {split!r} can be read. The "
        f"first: {lost[0][1]}: {lost[0][2]}"
      )
    self._lost += lost

  def lost(self, split: str) -> dict[str, str]:
    """Returns why images of a split are not in the data, by their paths."""
    report = (self.data_path / REPORT).read_text()
    rows = csv.DictReader(report.splitlines(), delimiter="\t")
    return {r["file"]: r["reason"] for r in rows if r["split"] == split}
