"""Moving digits: clips that only their motion tells apart.

An embedded data set of video, as `data/digits` is of images: it needs no
network and no manual files. A real handwritten digit moves over a canvas that
ends nowhere: what leaves at one side comes back at the other. The class is the
motion, and in each single frame digit and place have the same distribution in
every class, so a frame tells nothing about it. README.md says more.

Build it from the root of the repository with

    tfds build data/moving_digits

or name it in a config as `module="data.moving_digits"`, which builds it on
first use, or `module="data.moving_digits/glyph"` for the digit as the label.
"""

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

try:
  from data.digits import digits_dataset_builder as still
except ModuleNotFoundError:
  # `tfds build` imports this file alone, without the repository's root.
  sys.path.append(os.fspath(pathlib.Path(__file__).resolve().parents[2]))
  from data.digits import digits_dataset_builder as still

_DESCRIPTION = """\
A handwritten digit of scikit-learn (see the data set `digits`), 16x16 pixels,
moves over a canvas of 32x32 that wraps around, for 16 frames: in one of four
directions, straight on or turning back once. `motion` is which of these eight,
`glyph` is which digit; `label` is the one or the other by the builder's config.
Every digit is shown in every motion, once, from a random place at a random
speed. `id` is the index in scikit-learn's array; the digits of `test` are none
of those of `train`.
"""

FRAMES, SIZE = 16, 32
_GLYPH_SIZE = 16
# Pixels a frame: whole, so that nothing is resampled.
SPEEDS = (1, 2, 3)
# The frame from which a digit turns back, in the middle half of the clip.
TURNS = tuple(range(4, 12))
# Rows and columns a step, by the name of the motion.
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
MOTIONS = (*DIRECTIONS, *(f"{name}_and_back" for name in DIRECTIONS))


def path(
  motion: int, start: tuple[int, int], speed: int, turn: int
) -> np.ndarray:
  """Where a digit is.

  Args:
    motion: index in `MOTIONS`.
    start: row and column in the first frame.
    speed: pixels a frame.
    turn: the frame from which it moves back, if the motion does.

  Returns:
    `[FRAMES, 2]`, rows and columns, not wrapped.
  """
  ahead = np.arange(FRAMES)
  if motion >= len(DIRECTIONS):
    ahead = turn - np.abs(ahead - turn)
  direction = list(DIRECTIONS.values())[motion % len(DIRECTIONS)]
  return np.array(start) + speed * ahead[:, None] * np.array(direction)


def render(glyph: np.ndarray, places: np.ndarray) -> np.ndarray:
  """Shows a digit in places on a canvas that wraps around.

  Args:
    glyph: `[height, width, 3]`.
    places: `[frames, 2]`, row and column of its upper left corner.

  Returns:
    `[frames, SIZE, SIZE, 3]`.
  """
  height, width, _ = glyph.shape
  canvas = np.zeros((SIZE, SIZE, 3), glyph.dtype)
  canvas[:height, :width] = glyph
  rows, columns = (
    (np.arange(SIZE) - places[:, axis, None]) % SIZE for axis in (0, 1)
  )
  return canvas[rows[:, :, None], columns[:, None, :]]


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builds the clips: 11,496 for training, 2,880 for testing."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="motion", description="label is the motion."),
    tfds.core.BuilderConfig(name="glyph", description="label is the digit."),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    labels = {
      "motion": tfds.features.ClassLabel(names=MOTIONS),
      "glyph": tfds.features.ClassLabel(num_classes=10),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "video": tfds.features.Tensor(
            shape=(FRAMES, SIZE, SIZE, 3), dtype=np.uint8, encoding="zlib"
          ),
          "label": labels[self.builder_config.name],
          **labels,
          "id": np.int64,
        }
      ),
      supervised_keys=("video", "label"),
      homepage=still.HOMEPAGE,
      citation=still.CITATION,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    digits, splits = still.load()
    return {
      split: self._generate_examples(digits, ids)
      for split, ids in splits.items()
    }

  def _generate_examples(
    self, digits: Any, ids: np.ndarray
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for i in ids.tolist():
      glyph = still.upsample(digits.images[i], _GLYPH_SIZE)
      for motion in range(len(MOTIONS)):
        # NumPy promises that this generator's numbers never change. The same
        # numbers are drawn in every class, so their distributions agree.
        rng = np.random.RandomState([i, motion])
        start = rng.randint(SIZE, size=2)
        speed, turn = rng.choice(SPEEDS), rng.choice(TURNS)
        labels = {"motion": motion, "glyph": int(digits.target[i])}
        yield (
          f"{i}_{MOTIONS[motion]}",
          {
            "video": render(glyph, path(motion, start, speed, turn)),
            "label": labels[self.builder_config.name],
            **labels,
            "id": i,
          },
        )
