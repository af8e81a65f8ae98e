"""Images and videos of any files, preprocessed as those of a run are."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lookup_vit import (
  config_utils,
  damage,
  odd_images,
  quiet_tensorflow,  # noqa: F401
  video_frames,
)

# isort: split
import tensorflow as tf

from lookup_vit.preprocess import get_preprocess_fn, registry

# Nothing in evaluation is random.
_SEED = tf.zeros(2, tf.int32)


class Reader:
  """Reads images, or videos, by an op-string, from files or decoded.

  Of a JPEG or PNG it makes what evaluation makes of it; see `odd_images` for
  what else is read, and how. Videos are read where the op-string decodes clips.
  There are no labels or captions: ops on those are left out.

  Args:
    pp: op-string, which decodes.
    image_size: (rows, columns) of the model, or (time, rows, columns).
    views: of each example, that the op-string makes.
    frame_options: of `video_frames.read_frames`.

  Attributes:
    extensions: that files it reads usually have.

  Raises:
    ValueError: the op-string is wrong.
  """

  def __init__(
    self,
    pp: str,
    image_size: Sequence[int],
    views: int = 1,
    frame_options: Mapping[str, Any] | None = None,
  ):
    self._preprocess = get_preprocess_fn(pp, skip_missing=True)
    self._decode = get_preprocess_fn("decode")
    self._pp = pp
    self._views = () if views == 1 else (views,)
    self._size = tuple(image_size)
    self._frame_options = dict(frame_options or {})
    is_of_videos = bool(registry.calls(pp, "decode_clip"))
    self._key = "video" if is_of_videos else "image"
    self.extensions = odd_images.EXTENSIONS
    if is_of_videos:
      self.extensions = video_frames.EXTENSIONS

  def __call__(self, image: str | os.PathLike | np.ndarray) -> np.ndarray:
    """An image, or a clip of a video, as the op-string makes it.

    Args:
      image: path of a file, here or on `gs://`; or uint8 `[height, width, 3]`,
        of a video `[time, height, width, 3]`.

    Returns:
      `[rows, columns, 3]` or `[time, rows, columns, 3]`, float32; `[views,
      ...]` where there are several.

    Raises:
      ValueError: it is missing, no image or a broken one, or of another size
        after preprocessing: it is named.
      FileNotFoundError: a video, and there is no ffmpeg.
    """
    is_path = isinstance(image, str | os.PathLike)
    name = os.fspath(image) if is_path else "image"
    try:
      with config_utils.at_fault(name):
        if is_path:
          image = self._read(os.path.expanduser(name))
        data = {self._key: tf.convert_to_tensor(image)}
        found = self._preprocess(data, _SEED)
    except tf.errors.OpError as e:
      raise ValueError(f"{name}: {damage.reason(e)}") from e
    return self._check(name, found.get("image"))

  def _read(self, path):
    """What ops decode: the content of a file, or frames; or pixels."""
    if self._key == "video":
      return video_frames.read_frames(path, **self._frame_options)
    if path.lower().endswith(video_frames.EXTENSIONS):
      raise ValueError("a video by its name, but the model is of images")
    content = tf.io.read_file(path)
    image = odd_images.open_image(content.numpy())
    if not odd_images.is_plain(image):
      return odd_images.decode(image)
    turned = odd_images.orientation(image)
    if turned == 1:
      return content
    pixels = self._decode({"image": content}, _SEED)["image"]
    return odd_images.upright(pixels.numpy(), turned)

  def _check(self, name, image):
    want = (*self._views, *self._size, 3)
    if image is None or image.dtype != tf.float32 or image.shape != want:
      made = "no image"
      if image is not None:
        made = f"{image.dtype.name} of shape {tuple(image.shape)}"
      hint = "."
      if self._key == "image" and len(self._size) == 2:
        hint = f": --pp='decode|resize({self._size})|value_range(-1,1)'."
      raise ValueError(
        f"{name}: {self._pp!r} makes {made}, the model wants float32 of shape "
        f"{want}{hint}"
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
