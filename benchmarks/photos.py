"""A data set of photographs of ImageNet's sizes, made from two real ones."""

import contextlib
import functools
import io
import logging
import os
import time
from typing import Any

import numpy as np
from PIL import Image

from lookup_vit import quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow_datasets as tfds

_LOG = logging.getLogger("lookup_vit")

_NAME = "benchmark_photos"
_SHARDS = 8
# More are copies of these: making one takes longer than decoding it.
_DISTINCT = 256


def photo(index: int) -> bytes:
  """A JPEG much like those of ImageNet: about 500x375 pixels and 110 KB.

  A part of one of scikit-learn's two photographs, scaled, flipped, with other
  colours and with grain, which the photographs have lost in scaling and without
  which they would compress better than ImageNet's.

  Args:
    index: photographs of another index differ.

  Returns:
    A JPEG with the usual subsampled colour (4:2:0).
  """
  # scikit-learn is needed to make the photographs, not to read one's own.
  from sklearn.datasets import load_sample_images

  rng = np.random.default_rng(index)
  image = Image.fromarray(load_sample_images().images[index % 2])
  size = np.array([rng.integers(480, 521), rng.integers(340, 411)])
  if rng.random() < 0.25:
    size = size[::-1]
  part = size * rng.uniform(0.8, 1) * np.min(np.array(image.size) / size)
  corner = rng.uniform(0, image.size - part)
  image = image.resize(
    tuple(size.tolist()), Image.Resampling.BICUBIC, (*corner, *(corner + part))
  )
  pixels = np.asarray(image, np.float32)[:, :: rng.choice([-1, 1])]
  grain = rng.standard_normal((*pixels.shape[:2], 1), np.float32)
  pixels = pixels * rng.uniform(0.8, 1.2, 3) + grain * rng.uniform(3, 9)
  buffer = io.BytesIO()
  Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
    buffer, "JPEG", quality=95, subsampling="4:2:0"
  )
  return buffer.getvalue()


def make_photos(data_dir: str, count: int) -> dict[str, Any]:
  """Prepares a set of `count` photographs, unless `data_dir` has it.

  Args:
    data_dir: where TFDS is to keep it.
    count: number of examples.

  Returns:
    The data description.
  """
  cached_photo = functools.cache(photo)
  # TFDS would keep the class by its name, for which there are the files.
  with tfds.core.registered.skip_registration():

    class Photos(tfds.core.GeneratorBasedBuilder):
      """Photographs and random labels."""

      name = _NAME
      VERSION = tfds.core.Version("1.0.0")
      BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=str(count))]

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(
            {
              "image": tfds.features.Image(encoding_format="jpeg"),
              "label": tfds.features.ClassLabel(num_classes=1000),
            }
          ),
        )

      def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        last = time.monotonic()
        for i in range(count):
          yield i, {"image": cached_photo(i % _DISTINCT), "label": i % 1000}
          if time.monotonic() - last > 5:
            last = time.monotonic()
            _LOG.info("made %d of %d photographs", i + 1, count)

  # What TFDS would look for beside the class is not there.
  Photos.pkg_dir_path = None
  builder = Photos(data_dir=data_dir)
  if not builder.info.splits:
    _LOG.info("making %d photographs in %s", count, builder.data_dir)
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(num_shards=min(_SHARDS, count))
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints.
      builder.download_and_prepare(download_config=config)
  return {
    "name": f"{_NAME}/{count}",
    "split": "train",
    "data_dir": os.fspath(data_dir),
  }
