"""Preprocessing ops on `data["image"]`, [height, width, channels] or bytes.

Names, arguments and defaults follow big_vision's `pp/ops_image.py`
(https://github.com/google-research/big_vision), so that its preprocessing
strings mean the same here. Unlike there, randomness is a function of the seed
and a JPEG is always decoded with the accurate integer DCT, whose pixels do
not depend on the machine.
"""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from lookup_vit.preprocess.registry import image_op, register
from lookup_vit.preprocess.shared import (
  Size,
  assert_fits,
  check_method,
  height_width,
  resize_to,
)

ImageFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

# Exact, and hardly slower than the others, which decoders vectorise too.
_DCT = "INTEGER_ACCURATE"


def _decode(content, channels):
  image = tf.cond(
    tf.io.is_jpeg(content),
    lambda: tf.io.decode_jpeg(content, channels, dct_method=_DCT),
    lambda: tf.io.decode_image(content, channels, expand_animations=False),
  )
  return tf.ensure_shape(image, [None, None, channels])


@register("decode")
@image_op
def decode(channels: int = 3) -> ImageFn:
  """Decodes a JPEG, PNG, BMP or GIF.

  An image that is decoded already stays as it is, except that greyscale
  becomes 3 channels where 3 are wanted. Of an animated GIF the first frame
  counts. TensorFlow reads the indices of a BMP with a palette as greys.

  Args:
    channels: 3, or 1 for greyscale.

  Returns:
    An op from a string tensor to a uint8 image [height, width, channels]. It
    raises ValueError for a tensor that is neither.

  Raises:
    ValueError: if `channels` is neither 1 nor 3.
  """
  if channels not in (1, 3):
    raise ValueError(f"wanted 1 or 3 channels, got {channels!r}")

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    del seed
    if image.dtype == tf.string:
      return _decode(image, channels)
    if image.dtype != tf.uint8 or image.shape.rank != 3:
      raise ValueError(
        "decode wants encoded bytes or a uint8 image of rank 3, got "
        f"{image.dtype.name} of shape {image.shape}"
      )
    if image.shape[-1] == 1 and channels == 3:
      return tf.image.grayscale_to_rgb(image)
    return image

  return fn


@register("resize")
@image_op
def resize(
  size: Size, method: str = "bilinear", antialias: bool = False
) -> ImageFn:
  """Resizes to `size` whatever the aspect ratio.

  Args:
    size: side of a square, or (height, width).
    method: see `tf.image.resize`.
    antialias: see `tf.image.resize`; matters where an image shrinks.

  Returns:
    An op from [h, w, c] to [height, width, c] of the same dtype.
  """
  size = height_width(size)
  check_method(method)
  return lambda image, seed: resize_to(image, size, method, antialias)


@register("resize_small")
@image_op
def resize_small(
  smaller_size: int, method: str = "area", antialias: bool = False
) -> ImageFn:
  """Resizes the smaller side to `smaller_size`, keeping the aspect ratio.

  Args:
    smaller_size: height or width, whichever is less, of the result.
    method: see `tf.image.resize`.
    antialias: see `tf.image.resize`.

  Returns:
    An op from [h, w, c] to an image of the same dtype.
  """
  height_width(smaller_size)
  check_method(method)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    del seed
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    size = tf.round(size * (smaller_size / tf.reduce_min(size)))
    return resize_to(image, tf.cast(size, tf.int32), method, antialias)

  return fn


def _sample_crop(size, seed, area_min, area_max, ratio_min, ratio_max):
  """Draws a crop of an image of [height, width]: top, left, height, width."""
  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    tf.concat([size, [3]], axis=0),
    tf.zeros([0, 0, 4], tf.float32),
    seed,
    min_object_covered=0.0,
    aspect_ratio_range=(ratio_min, ratio_max),
    area_range=(area_min / 100, area_max / 100),
    use_image_if_no_bounding_boxes=True,
  )
  return tf.concat([begin[:2], extent[:2]], axis=0)


def _check_inception_crop(area_min, area_max, ratio_min, ratio_max, method):
  check_method(method)
  if not 0 < area_min <= area_max <= 100:
    raise ValueError(
      "wanted 0 < area_min <= area_max <= 100 (percent), got "
      f"{area_min!r} and {area_max!r}"
    )
  if not 0 < ratio_min <= ratio_max:
    raise ValueError(
      f"wanted 0 < ratio_min <= ratio_max, got {ratio_min!r} and {ratio_max!r}"
    )


@register("inception_crop")
@image_op
def inception_crop(
  size: Size | None = None,
  area_min: float = 5,
  area_max: float = 100,
  ratio_min: float = 3 / 4,
  ratio_max: float = 4 / 3,
  resize_method: str = "bilinear",
  antialias: bool = False,
) -> ImageFn:
  """Crops a random area of random aspect ratio (arXiv:1409.4842).

  An image too long for any such crop is taken whole.

  Args:
    size: side of a square, or (height, width), to resize to; None for none.
    area_min: least area of the crop in percent of the image.
    area_max: greatest area of the crop in percent of the image.
    ratio_min: least width by height.
    ratio_max: greatest width by height.
    resize_method: see `tf.image.resize`.
    antialias: see `tf.image.resize`.

  Returns:
    An op from [h, w, c] to [height, width, c] of the same dtype.
  """
  bounds = (area_min, area_max, ratio_min, ratio_max)
  _check_inception_crop(*bounds, resize_method)
  size = None if size is None else height_width(size)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    top, left, height, width = tf.unstack(
      _sample_crop(tf.shape(image)[:2], seed, *bounds)
    )
    crop = image[top : top + height, left : left + width]
    return (
      crop if size is None else resize_to(crop, size, resize_method, antialias)
    )

  return fn


@register("decode_jpeg_and_inception_crop")
@image_op
def decode_jpeg_and_inception_crop(
  size: Size | None = None,
  area_min: float = 5,
  area_max: float = 100,
  ratio_min: float = 3 / 4,
  ratio_max: float = 4 / 3,
  resize_method: str = "bilinear",
  antialias: bool = False,
) -> ImageFn:
  """Does `decode|inception_crop`, decoding no more of a JPEG than the crop.

  Other formats are decoded whole, decoded images are cropped. The crop is the
  one that `inception_crop` draws from the same seed. Its pixels are the same
  too, but for the first and last column where a JPEG's colour is subsampled:
  the decoder smooths colour across columns and does not see past the crop.

  Args:
    size: as in `inception_crop`, like all other arguments.
    area_min: see there.
    area_max: see there.
    ratio_min: see there.
    ratio_max: see there.
    resize_method: see there.
    antialias: see there.

  Returns:
    An op from a string tensor, or a uint8 image, to a uint8 image [height,
    width, 3].
  """
  bounds = (area_min, area_max, ratio_min, ratio_max)
  _check_inception_crop(*bounds, resize_method)
  size = None if size is None else height_width(size)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    def crop_jpeg():
      shape = tf.io.extract_jpeg_shape(image)
      window = _sample_crop(shape[:2], seed, *bounds)
      return tf.io.decode_and_crop_jpeg(image, window, 3, dct_method=_DCT)

    def crop_other():
      decoded = _decode(image, 3) if image.dtype == tf.string else image
      window = _sample_crop(tf.shape(decoded)[:2], seed, *bounds)
      top, left, height, width = tf.unstack(window)
      return decoded[top : top + height, left : left + width]

    if image.dtype == tf.string:
      crop = tf.cond(tf.io.is_jpeg(image), crop_jpeg, crop_other)
    else:
      crop = crop_other()
    crop = tf.ensure_shape(crop, [None, None, 3])
    return (
      crop if size is None else resize_to(crop, size, resize_method, antialias)
    )

  return fn


@register("central_crop")
@image_op
def central_crop(crop_size: Size) -> ImageFn:
  """Crops the centre.

  Args:
    crop_size: side of a square, or (height, width).

  Returns:
    An op from [h, w, c] to [height, width, c]. It raises
    tf.errors.InvalidArgumentError, with both sizes, if the image is smaller.
  """
  height, width = height_width(crop_size)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    del seed
    fits = assert_fits(image, (height, width), "central_crop")
    with tf.control_dependencies([fits]):
      shape = tf.shape(image)
      top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
      crop = image[top : top + height, left : left + width]
      return tf.ensure_shape(crop, [height, width, image.shape[-1]])

  return fn


@register("random_crop")
@image_op
def random_crop(crop_size: Size) -> ImageFn:
  """Crops at a uniformly random place.

  Args:
    crop_size: side of a square, or (height, width).

  Returns:
    An op from [h, w, c] to [height, width, c]. It raises
    tf.errors.InvalidArgumentError, with both sizes, if the image is smaller.
  """
  size = height_width(crop_size)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    with tf.control_dependencies([assert_fits(image, size, "random_crop")]):
      return tf.image.stateless_random_crop(
        image, (*size, image.shape[-1]), seed
      )

  return fn


@register("pad")
@image_op
def pad(size: Size, value: int = 0) -> ImageFn:
  """Pads around the image up to `size`; a side that is longer stays.

  Args:
    size: side of a square, or (height, width).
    value: of the new pixels.

  Returns:
    An op from [h, w, c] to [max(h, height), max(w, width), c].
  """
  size = height_width(size)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    del seed
    missing = tf.maximum(size - tf.shape(image)[:2], 0)
    before = tf.concat([missing // 2, [0]], axis=0)
    after = tf.concat([missing - missing // 2, [0]], axis=0)
    paddings = tf.stack([before, after], axis=1)
    padded = tf.pad(image, paddings, constant_values=value)
    return tf.ensure_shape(padded, [None, None, image.shape[-1]])

  return fn


@register("flip_lr")
@image_op
def flip_lr() -> ImageFn:
  """Flips left to right with probability 1/2."""
  return tf.image.stateless_random_flip_left_right


@register("value_range")
@functools.partial(image_op, of_any_rank=True)
def value_range(
  vmin: float = -1,
  vmax: float = 1,
  in_min: float | tuple[float, ...] = 0,
  in_max: float | tuple[float, ...] = 255,
  clip_values: bool = False,
) -> ImageFn:
  """Maps [in_min, in_max] to [vmin, vmax] linearly.

  Args:
    vmin: result at `in_min`.
    vmax: result at `in_max`.
    in_min: a number, or one for each channel.
    in_max: a number, or one for each channel.
    clip_values: whether to clip the result to [vmin, vmax].

  Returns:
    An op from any dtype to float32.
  """
  low, high = np.array(in_min, np.float32), np.array(in_max, np.float32)
  with np.errstate(divide="ignore"):  # vmin = vmax is allowed.
    scale = (high - low) / np.float32(vmax - vmin)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    del seed
    image = tf.cast(image, tf.float32)
    # Each operation is a pass over memory.
    if np.any(low):
      image -= low
    image /= scale
    if vmin:
      image += vmin
    return tf.clip_by_value(image, vmin, vmax) if clip_values else image

  return fn
