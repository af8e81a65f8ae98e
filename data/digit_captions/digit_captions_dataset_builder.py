"""Digit captions: scenes of handwritten digits, described in sentences.

An embedded data set for captioning, as `data/digits` is for classification: it
needs no network and no manual files. One or two real handwritten digits, of two
sizes, lie in the quarters of a canvas; five references say which, and where.
Whether a caption is true is a matter of rules (`grammar.check`). Names and
structure of the features are those of TFDS's `coco_captions`. README.md says
more.

Build it from the root of the repository with

    tfds build data/digit_captions

or name it in a config as `module="data.digit_captions"`, which builds it on
first use.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

try:
  from data.digits import digits_dataset_builder as still
except ModuleNotFoundError:
  # `tfds build` imports this file alone, without the repository's root.
  sys.path.append(os.fspath(pathlib.Path(__file__).resolve().parents[2]))
  from data.digits import digits_dataset_builder as still
from data.digit_captions import grammar

_DESCRIPTION = """\
One or two handwritten digits of scikit-learn (see the data set `digits`), small
or large, each in another quarter of a canvas of 32x32 pixels.
`captions` are five different sentences that name all digits and say where they
are, by places or by relations. `parts` says which digit of which size is in
which quarter, as classes; `digits` says it in numbers, in reading order. The
digits of `test` are none of those of `train`.
"""

SPLITS = {"train": 36_000, "test": 1_000}
CELL = 16
# Pixels of a digit, by the index in grammar.SIZES.
PIXELS = (12, 16)
PARTS = tuple(
  f"{size} {name} {row} {column}"
  for row in grammar.ROWS
  for column in grammar.COLUMNS
  for size in grammar.SIZES
  for name in grammar.NAMES
)

_load = functools.cache(still.load)
_upsample = functools.cache(
  lambda i, size: still.upsample(_load()[0].images[i], size)
)


def part(digit: grammar.Digit) -> int:
  """The class of a digit: its index in `PARTS`."""
  cell = len(grammar.COLUMNS) * digit.row + digit.column
  cell_and_size = len(grammar.SIZES) * cell + digit.size
  return len(grammar.NAMES) * cell_and_size + digit.digit


def render(
  glyphs: Sequence[np.ndarray], corners: Sequence[tuple[int, int]]
) -> np.ndarray:
  """Puts digits on a black canvas.

  Args:
    glyphs: each `[height, width, 3]`.
    corners: for each, row and column of its upper left corner.

  Returns:
    uint8 `[2 * CELL, 2 * CELL, 3]`.
  """
  canvas = np.zeros((2 * CELL, 2 * CELL, 3), np.uint8)
  for glyph, (row, column) in zip(glyphs, corners, strict=True):
    height, width, _ = glyph.shape
    canvas[row : row + height, column : column + width] = glyph
  return canvas


def example(split: str, index: int) -> dict[str, Any]:
  """A scene and its references.

  Args:
    split: of `SPLITS`.
    index: in the split.

  Returns:
    The features as the builder takes them; each of `digits` is a dict of the
    fields of `grammar.Digit`.
  """
  # NumPy promises that this generator's numbers never change.
  rng = np.random.RandomState([list(SPLITS).index(split), index])
  source, ids = _load()
  count = rng.randint(1, 3)
  cells = np.sort(rng.permutation(4)[:count])
  digits, glyphs, corners = [], [], []
  for cell in cells.tolist():
    row, column = divmod(cell, 2)
    i = int(rng.choice(ids[split]))
    size = int(rng.randint(2))
    digits.append(grammar.Digit(int(source.target[i]), size, row, column))
    glyphs.append(_upsample(i, PIXELS[size]))
    corners.append((CELL * row, CELL * column))
  number = index + (SPLITS["train"] if split == "test" else 0)
  return {
    "image": render(glyphs, corners),
    "image/id": number,
    "captions": [
      {"id": grammar.REFERENCES * number + i, "text": text}
      for i, text in enumerate(grammar.describe(digits, rng))
    ],
    "parts": [part(d) for d in digits],
    "digits": [d._asdict() for d in digits],
  }


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builds the scenes: 36,000 for training, 1,000 for testing."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(2 * CELL, 2 * CELL, 3), encoding_format="png"
          ),
          "image/id": np.int64,
          "captions": tfds.features.Sequence(
            {"id": np.int64, "text": tfds.features.Text()}
          ),
          "parts": tfds.features.Sequence(
            tfds.features.ClassLabel(names=PARTS)
          ),
          "digits": tfds.features.Sequence(
            {
              "digit": np.int64,
              "size": tfds.features.ClassLabel(names=grammar.SIZES),
              "row": np.int64,
              "column": np.int64,
            }
          ),
        }
      ),
      homepage=still.HOMEPAGE,
      citation=still.CITATION,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(
    self, split: str
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(SPLITS[split]):
      yield index, example(split, index)
