"""Digits: 1,797 real handwritten digits that every scikit-learn ships.

An embedded data set: it trains a small model in minutes, and needs no network
and no manual files. The originals are 8x8 pixels with values 0..16 (counts of
ink in 4x4 blocks of the scans); here they are 32x32 RGB images.

Build it from the root of the repository with

    tfds build data/digits

or name it in a config as `module="data.digits"`, which builds it on first use.
"""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_DESCRIPTION = """\
1,797 handwritten digits from the test set of "Optical Recognition of
Handwritten Digits" (UCI), as scikit-learn ships them, resized from 8x8 to 32x32
pixels. `id` is the index in scikit-learn's array. The split is random and
stratified by class, with a fixed seed. It is not by writer, whom the data do
not name: test digits may be in the hand of a training digit.
"""

CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""


HOMEPAGE = (
  "https://scikit-learn.org/stable/modules/generated/"
  "sklearn.datasets.load_digits.html"
)


def load() -> tuple[Any, dict[str, np.ndarray]]:
  """Loads scikit-learn's digits, and splits them.

  Returns:
    What scikit-learn returns, with `images` `[1797, 8, 8]` and `target`
    `[1797]`; and for each split the indices of its digits, in rising order.
  """
  # scikit-learn is needed to build the set, not to read it.
  from sklearn import datasets, model_selection

  digits = datasets.load_digits()
  train, test = model_selection.train_test_split(
    np.arange(len(digits.target)),
    test_size=360,
    stratify=digits.target,
    random_state=0,
  )
  return digits, {"train": np.sort(train), "test": np.sort(test)}


def upsample(digit: np.ndarray, size: int = 32) -> np.ndarray:
  """Resizes a digit, bilinearly, to an RGB image.

  Args:
    digit: `[8, 8]`, values 0..16.
    size: height and width of the result.

  Returns:
    uint8 `[size, size, 3]`, the same grey in every channel.
  """
  # Bilinear, because bicubic leaves halos around the strokes. Resized as
  # floats, so that the values are rounded once.
  image = Image.fromarray(digit.astype(np.float32) * np.float32(255 / 16))
  grey = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
  return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=-1)


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builds the digits: 1,437 for training, 360 for testing."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(32, 32, 3), encoding_format="png"
          ),
          "label": tfds.features.ClassLabel(num_classes=10),
          "id": np.int64,
        }
      ),
      supervised_keys=("image", "label"),
      homepage=HOMEPAGE,
      citation=CITATION,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    digits, splits = load()
    return {
      split: self._generate_examples(digits, ids)
      for split, ids in splits.items()
    }

  def _generate_examples(self, digits, ids: np.ndarray):
    for i in ids.tolist():
      yield (
        i,
        {
          "image": upsample(digits.images[i]),
          "label": int(digits.target[i]),
          "id": i,
        },
      )
