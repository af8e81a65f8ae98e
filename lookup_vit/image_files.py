"""Images of any files, preprocessed as those of a run are."""

import os
from collections.abc import Sequence

import numpy as np

from lookup_vit import damage, quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf

from lookup_vit.preprocess import get_preprocess_fn


class Reader:
  """Reads images by an op-string, from files or decoded.

  There are no labels or captions: ops on those are left out.

  Args:
    pp: op-string, which decodes.
    image_size: (rows, columns) of the model, or (time, rows, columns).
    views: of each example, that the op-string makes.

  Raises:
    ValueError: the op-string is wrong.
  """

  def __init__(self, pp: str, image_size: Sequence[int], views: int = 1):
    self._preprocess = get_preprocess_fn(pp, skip_missing=True)
    self._pp = pp
    self._views = () if views == 1 else (views,)
    self._size = tuple(image_size)

  def __call__(self, image: str | os.PathLike | np.ndarray) -> np.ndarray:
    """An image as the op-string makes it.

    Args:
      image: path of a file, here or on `gs://`; or uint8 `[height, width, 3]`.

    Returns:
      `[rows, columns, 3]`, float32; `[views, ...]` where there are several.

    Raises:
      ValueError: it is missing, no image or a broken one, or of another size
        after preprocessing: it is named.
    """
    is_path = isinstance(image, str | os.PathLike)
    name = os.fspath(image) if is_path else "image"
    try:
      if is_path:
        image = tf.io.read_file(os.path.expanduser(name))
      found = self._preprocess({"image": image}, tf.zeros(2, tf.int32))
    except tf.errors.OpError as e:
      raise ValueError(f"{name}: {damage.reason(e)}") from e
    return self._check(name, found.get("image"))

  def _check(self, name, image):
    want = (*self._views, *self._size, 3)
    if image is None or image.dtype != tf.float32 or image.shape != want:
      made = "no image"
      if image is not None:
        made = f"{image.dtype.name} of shape {tuple(image.shape)}"
      raise ValueError(
        f"{name}: {self._pp!r} makes {made}, the model wants float32 of shape "
        f"{want}: --pp='decode|resize({self._size})|value_range(-1,1)'."
      )
    return image.numpy()


def read(
  paths: Sequence[str], pp: str, image_size: Sequence[int]
) -> np.ndarray:
  """Reads image files by an op-string, as `Reader`.

  Args:
    paths: of files, here or on `gs://`.
    pp: op-string, which decodes.
    image_size: (rows, columns) of the model.

  Returns:
    `[files, rows, columns, 3]`, float32 as the op-string scales them.

  Raises:
    ValueError: the op-string is wrong, or a file cannot be read: it is named.
  """
  reader = Reader(pp, image_size)
  return np.stack([reader(path) for path in paths])
