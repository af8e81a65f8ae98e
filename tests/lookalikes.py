"""Tiny look-alikes of the data sets whose builders are TFDS's own.

TFDS's real builders make them, with only the source of the examples replaced:
features, configs, versions and the layout on disk are the real ones, so that
`tfds.builder(NAME, data_dir=...)` reads them as it would read the real sets.

    lookalikes.build("imagenet_r", data_dir)
    data = {"name": "imagenet_r", "split": "test", "data_dir": data_dir}
"""

import io
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from lookup_vit import datasets  # noqa: F401  # Keeps TFDS off the network.

# isort: split
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# The splits of each set, and how many examples they have here unless told. One
# percent of ImageNet's training split, which the configs hold out, is one.
SPLITS = {
  "imagenet2012": {"train": 100, "validation": 13},
  "imagenet2012_corrupted": {"validation": 7},
  "imagenet2012_real": {"validation": 11},
  "imagenet_a": {"test": 11},
  "imagenet_r": {"test": 11},
  "imagenet_sketch": {"test": 11},
  "imagenet_v2": {"test": 11},
  "coco_captions": {"train": 11, "val": 7, "test": 7, "restval": 7},
}

# Some of the 200 classes of the sets that have not all 1000, from eval.py of
# https://github.com/hendrycks/natural-adv-examples and /imagenet-r.
_CLASSES = {
  "imagenet_a": (6, 11, 13, 47, 301, 951, 972, 988),
  "imagenet_r": (1, 2, 4, 6, 8, 288, 340, 957),
}


def examples(
  name: str, split: str, count: int | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
  """Yields the examples of a split, in the order that they are written from.

  Images are JPEGs of smooth colours with sides of 40 to 90 pixels, the first of
  a split in greyscale; imagenet2012_corrupted's are all 224 pixels and RGB.

  Args:
    name: the data set, without its config.
    split: a split of `SPLITS[name]`.
    count: number of examples, by default that of `SPLITS`.
    seed: of images and labels; splits differ from each other in any case.

  Yields:
    What the real builder would: encoded images, labels as integers.
  """
  count = SPLITS[name][split] if count is None else count
  rng = np.random.default_rng([seed, zlib.crc32(f"{name}/{split}".encode())])
  for i in range(count):
    if name == "coco_captions":
      yield _captioned(rng, i)
    else:
      yield {"file_name": f"{split}_{i}.JPEG", **_classified(rng, i, name)}


def _jpeg(rng, grey=False, size=None):
  height, width = size or rng.integers(40, 91, 2).tolist()
  # A few random colours, with smooth transitions.
  shape = (5, 4) if grey else (5, 4, 3)
  colours = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
  image = colours.resize((width, height), Image.Resampling.BICUBIC)
  content = io.BytesIO()
  image.save(content, "JPEG", quality=90)
  return content.getvalue()


def _classified(rng, i, name):
  if name == "imagenet2012_corrupted":
    image = _jpeg(rng, size=(224, 224))
  else:
    image = _jpeg(rng, grey=i == 0)
  label = int(rng.choice(_CLASSES.get(name, 1000)))
  if name != "imagenet2012_real":
    return {"image": image, "label": label}
  # ReaL gives an image no, one or several labels, and may not agree.
  real = [label] if i % 4 == 1 else rng.choice(1000, i % 4, replace=False)
  return {
    "image": image,
    "original_label": label,
    "real_label": [int(label) for label in real],
  }


def _captioned(rng, i):
  words = ["A", "man", "riding", "a", "wave", "on", "top", "of", "his", "dog"]
  # Five captions and sometimes more; raw, with what annotators leave behind.
  captions = [
    {
      "id": 100 * i + k,
      "text": " ".join(rng.permutation(words)) + (".", " ", ".\n", "")[k % 4],
    }
    for k in range(5 + i % 2)
  ]
  objects = []
  for k in range(i % 3):  # Some images have none.
    top, bottom, left, right = rng.uniform(size=4).tolist()
    box = tfds.features.BBox(
      ymin=min(top, bottom),
      xmin=min(left, right),
      ymax=max(top, bottom),
      xmax=max(left, right),
    )
    objects.append(
      {
        "id": 10 * i + k,
        "area": int(rng.integers(1, 1000)),
        "bbox": box,
        "label": int(rng.integers(80)),
        "is_crowd": k == 1,
      }
    )
  return {
    "image": _jpeg(rng, grey=i == 0),
    "image/filename": f"COCO_val2014_{i:012}.jpg",
    "image/id": i,
    "objects": objects,
    "captions": captions,
  }


def build(
  name: str,
  data_dir: str | os.PathLike[str],
  *,
  splits: Mapping[str, int] | None = None,
  shards: int = 1,
  seed: int = 0,
  file_format: str | None = None,
) -> tfds.core.DatasetBuilder:
  """Prepares the look-alike of a data set.

  Args:
    name: a name of `SPLITS`, with or without a config of the real set:
      "imagenet2012_corrupted/fog_3".
    data_dir: the root, as the `data_dir` of a data description.
    splits: numbers of examples of the splits to have, by default `SPLITS`.
    shards: number of files of every split, not more than it has examples.
    seed: see `examples`.
    file_format: "tfrecord" (TFDS's default) or "array_record".

  Returns:
    The builder that prepared it.

  Raises:
    AssertionError: (TFDS's) more shards than examples.
    ValueError: no such set, split or config.
  """
  set_name, _, config = name.partition("/")
  if set_name not in SPLITS:
    raise ValueError(f"no look-alike of {name!r}; there are {list(SPLITS)}")
  counts = dict(splits or SPLITS[set_name])
  if unknown := counts.keys() - SPLITS[set_name].keys():
    raise ValueError(
      f"{name} has no splits {sorted(unknown)}; it has {list(SPLITS[set_name])}"
    )
  real = tfds.builder_cls(set_name)

  # Registered, it would take the place of the real class.
  with tfds.core.registered.skip_registration():

    class LookAlike(real):
      name = set_name
      pkg_dir_path = real._get_pkg_dir_path()  # Citation and description.

      def _split_generators(self, dl_manager):
        return {
          split: enumerate(examples(set_name, split, count, seed))
          for split, count in counts.items()
        }

  builder = LookAlike(
    data_dir=data_dir, config=config or None, file_format=file_format
  )
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      num_shards=shards, try_download_gcs=False
    )
  )
  return builder
