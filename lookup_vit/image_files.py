"""Images of any files, preprocessed as those of a run are."""

import os
from collections.abc import Sequence

import ml_collections
import numpy as np

from lookup_vit import config_utils, damage, quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf

from lookup_vit.preprocess import get_preprocess_fn


def evaluation_pp(config: ml_collections.ConfigDict) -> str:
  """The op-string by which the images are read that a run is judged by.

  Raises:
    ValueError: none has.
  """
  for name in config_utils.evals_in_order(config.evals):
    if config.evals[name].get("pp_fn"):
      return config.evals[name].pp_fn
  raise ValueError(
    "config.evals: no evaluator says how to read images (pp_fn)."
  )


def read(
  paths: Sequence[str], pp: str, image_size: Sequence[int]
) -> np.ndarray:
  """Reads image files by an op-string.

  There are no labels or captions: ops on those are left out.

  Args:
    paths: of files that `decode` reads, here or on `gs://`.
    pp: op-string, which decodes.
    image_size: (rows, columns) of the model.

  Returns:
    `[files, rows, columns, 3]`, float32 as the op-string scales them.

  Raises:
    ValueError: the op-string is wrong; or a file is missing, no image or a
      broken one, or of another size after preprocessing: it is named.
  """
  preprocess = get_preprocess_fn(pp, skip_missing=True)
  return np.stack([_read(path, preprocess, pp, image_size) for path in paths])


def _read(path, preprocess, pp, image_size):
  try:
    content = tf.io.read_file(os.path.expanduser(path))
    image = preprocess({"image": content}, tf.zeros(2, tf.int32)).get("image")
  except tf.errors.OpError as e:
    raise ValueError(f"{path}: {damage.reason(e)}") from e
  want = (*image_size, 3)
  if image is None or image.dtype != tf.float32 or image.shape != want:
    made = "no image"
    if image is not None:
      made = f"{image.dtype.name} of shape {tuple(image.shape)}"
    size = tuple(image_size)
    raise ValueError(
      f"{path}: {pp!r} makes {made}, the model wants float32 of shape {want}: "
      f"--pp='decode|resize({size})|value_range(-1,1)'."
    )
  return image.numpy()
