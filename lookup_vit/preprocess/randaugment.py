"""RandAugment (arXiv:1909.13719) as in the recipes of AugReg and big_vision.

The semantics are those of the EfficientNet code for TPU
(https://github.com/tensorflow/tpu), which big_vision's
`pp/archive/autoaugment.py` forks and the AugReg models (arXiv:2106.10270) were
trained with: 16 ops, each layer draws one with equal probability and always
applies it. They differ from the paper and from PIL, and are kept because
recipes tuned with them are to give the same training:

- Magnitudes live on a scale of 10, and 15 or 20 extrapolate it. See `ops_at`.
- Translation and cutout are in pixels whatever the size of the image; they
  were chosen for 224.
- Contrast blends with a grey of level min(height * width / 256, 255), where
  PIL takes the mean grey of the image.
- Pixels without a source become grey, 128; nothing is interpolated.

One thing differs from there: the blur of Sharpness is exact, where rounding
in the original can lose 1 before the blend.
"""

import functools
import math
from collections.abc import Callable

import tensorflow as tf

from lookup_vit.preprocess.registry import image_op, register

_MAX_LEVEL = 10
_ROTATE_DEGREES = 30
_SHEAR = 0.3
_TRANSLATE_PIXELS = 100
_CUTOUT_PIXELS = 40
_GREY = 128

ImageFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def blend(degenerate: tf.Tensor, image: tf.Tensor, factor: float) -> tf.Tensor:
  """Goes from `degenerate` (0) to `image` (1) and beyond, cutting fractions."""
  degenerate = tf.cast(degenerate, tf.float32)
  mixed = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
  return tf.cast(tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


def _histograms(image):
  """Counts each value of each channel: int32 [channels, 256]."""
  flat = tf.reshape(image, [-1, image.shape[-1]])
  return tf.math.bincount(
    tf.transpose(tf.cast(flat, tf.int32)), minlength=256, maxlength=256, axis=-1
  )


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
  """Stretches each channel to [0, 255]; one of a single value stays."""
  pixels = tf.cast(image, tf.float32)
  low = tf.reduce_min(pixels, axis=[0, 1])
  high = tf.reduce_max(pixels, axis=[0, 1])
  scale = tf.math.divide_no_nan(255.0, high - low)
  stretched = tf.clip_by_value(pixels * scale - low * scale, 0.0, 255.0)
  return tf.where(high > low, tf.cast(stretched, tf.uint8), image)


def equalize(image: tf.Tensor) -> tf.Tensor:
  """Flattens the histogram of each channel, as PIL does."""
  counts = _histograms(image)
  # The step leaves out the pixels of the channel's brightest value.
  brightest = tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.int32)
  last = tf.gather(counts, brightest, axis=1, batch_dims=1)
  step = (tf.reduce_sum(counts, axis=1) - last)[:, None] // 255
  below = tf.cumsum(counts, axis=1, exclusive=True)
  table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
  # Too few pixels for a step: the channel stays.
  table = tf.where(step == 0, tf.range(256), table)
  flat = tf.transpose(tf.reshape(image, [-1, image.shape[-1]]))
  equal = tf.gather(table, tf.cast(flat, tf.int32), axis=1, batch_dims=1)
  return tf.cast(tf.reshape(tf.transpose(equal), tf.shape(image)), tf.uint8)


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
  """Keeps the highest `bits` of 8 bits; 0 or more than 8 keep 1."""
  # What the original's uint8 shift comes to, which wraps below 0 and which
  # TensorFlow's kernels limit to 7.
  shift = tf.constant(min((8 - bits) % 256, 7), tf.uint8)
  return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
  """Inverts the values from `threshold`, in [0, 255], up."""
  return tf.where(image < threshold, image, 255 - image)


def solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
  """Brightens the values below 128 by `addition`."""
  added = tf.minimum(tf.cast(image, tf.int32) + addition, 255)
  return tf.where(image < 128, tf.cast(added, tf.uint8), image)


def color(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blends with the greyscale image."""
  return blend(tf.image.rgb_to_grayscale(image), image, factor)


def contrast(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blends with a grey that depends on the image's area alone (see above)."""
  area = tf.cast(tf.size(image) // 3, tf.float32)
  grey = tf.floor(tf.minimum(area / 256, 255.0))
  return blend(grey, image, factor)


def brightness(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blends with black."""
  return blend(tf.zeros_like(image), image, factor)


def sharpness(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blends with a 3x3 blur; the pixels at the border stay."""
  kernel = tf.constant([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]])[:, :, None, None]
  total = tf.nn.depthwise_conv2d(
    tf.cast(image, tf.float32)[None],
    tf.tile(kernel, [1, 1, 3, 1]),
    strides=[1, 1, 1, 1],
    padding="SAME",
  )[0]
  # Whole numbers up to here, so that equal pixels give exactly their value.
  blurred = tf.cast(tf.floor(total / 13), tf.uint8)
  height, width = tf.shape(image)[0], tf.shape(image)[1]
  row, column = tf.range(height)[:, None, None], tf.range(width)[:, None]
  inner = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
  return blend(tf.where(inner, blurred, image), image, factor)


def project(image: tf.Tensor, matrix: list) -> tf.Tensor:
  """Moves pixels by an affine map, without interpolation.

  Args:
    image: uint8 [height, width, channels].
    matrix: six numbers a to f; the pixel at (x, y) of the result is the pixel
      at (a x + b y + c, d x + e y + f) of `image`, or grey if there is none.

  Returns:
    An image of the same shape and dtype.
  """
  matrix = tf.stack([tf.cast(m, tf.float32) for m in [*matrix, 0, 0]])
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=image[None],
    transforms=matrix[None],
    output_shape=tf.shape(image)[:2],
    fill_value=float(_GREY),
    interpolation="NEAREST",
    fill_mode="CONSTANT",
  )[0]


def rotate(image: tf.Tensor, degrees: tf.Tensor) -> tf.Tensor:
  """Rotates about the centre."""
  angle = degrees * (math.pi / 180)
  cos, sin = tf.cos(angle), tf.sin(angle)
  size = tf.cast(tf.shape(image)[:2] - 1, tf.float32)
  y, x = size[0], size[1]
  shift_x = (x - (cos * x - sin * y)) / 2
  shift_y = (y - (sin * x + cos * y)) / 2
  return project(image, [cos, -sin, shift_x, sin, cos, shift_y])


def cutout(image: tf.Tensor, half: int, seed: tf.Tensor) -> tf.Tensor:
  """Greys a square of side 2 * half about a random pixel (arXiv:1708.04552)."""
  size = tf.shape(image)[:2]
  place = tf.random.stateless_uniform([2], seed)
  centre = tf.cast(place * tf.cast(size, tf.float32), tf.int32)
  row, column = tf.range(size[0])[:, None, None], tf.range(size[1])[:, None]
  in_rows = (row >= centre[0] - half) & (row < centre[0] + half)
  in_columns = (column >= centre[1] - half) & (column < centre[1] + half)
  return tf.where(in_rows & in_columns, tf.constant(_GREY, tf.uint8), image)


def ops_at(magnitude: float) -> dict[str, ImageFn]:
  """The 16 ops at one magnitude.

  What grows with the magnitude, at 10, 15 and 20:

  - Rotate 30, 45, 60 degrees; ShearX, ShearY 0.3, 0.45, 0.6; TranslateX,
    TranslateY 100, 150, 200 pixels: each with a random sign.
  - Color, Contrast, Brightness, Sharpness: factors 1.9, 2.8, 3.7, clipped to
    [0, 255].
  - Cutout: squares of side 80, 120, 160.
  - SolarizeAdd: 110, 165, 220, clipped to 255.
  - Posterize keeps 4, 6, 8 bits: milder as the magnitude grows, nothing at
    20, and then 1 bit from 22.5 on.
  - Solarize inverts from 0, 128, 0 up: the threshold is 25.6 * magnitude
    modulo 256, for the original compares it as a uint8.

  Args:
    magnitude: at least 0.

  Returns:
    Functions from (uint8 [h, w, 3], seed) to the same shape and dtype, by
    name, in the original's order.
  """
  level = magnitude / _MAX_LEVEL
  factor = 1.8 * level + 0.1

  def signed(value, seed):
    return tf.where(tf.random.stateless_uniform([], seed) < 0.5, value, -value)

  return {
    "AutoContrast": lambda image, seed: auto_contrast(image),
    "Equalize": lambda image, seed: equalize(image),
    "Invert": lambda image, seed: 255 - image,
    "Rotate": lambda image, seed: rotate(
      image, signed(_ROTATE_DEGREES * level, seed)
    ),
    "Posterize": lambda image, seed: posterize(image, int(4 * level)),
    "Solarize": lambda image, seed: solarize(image, int(256 * level) % 256),
    "Color": lambda image, seed: color(image, factor),
    "Contrast": lambda image, seed: contrast(image, factor),
    "Brightness": lambda image, seed: brightness(image, factor),
    "Sharpness": lambda image, seed: sharpness(image, factor),
    "ShearX": lambda image, seed: project(
      image, [1, signed(_SHEAR * level, seed), 0, 0, 1, 0]
    ),
    "ShearY": lambda image, seed: project(
      image, [1, 0, 0, signed(_SHEAR * level, seed), 1, 0]
    ),
    "TranslateX": lambda image, seed: project(
      image, [1, 0, signed(_TRANSLATE_PIXELS * level, seed), 0, 1, 0]
    ),
    "TranslateY": lambda image, seed: project(
      image, [1, 0, 0, 0, 1, signed(_TRANSLATE_PIXELS * level, seed)]
    ),
    "Cutout": lambda image, seed: cutout(
      image, int(_CUTOUT_PIXELS * level), seed
    ),
    "SolarizeAdd": lambda image, seed: solarize_add(image, int(110 * level)),
  }


@register("randaug")
@image_op
def randaug(num_layers: int = 2, magnitude: float = 10) -> ImageFn:
  """Applies `num_layers` random ops in turn, each at the same magnitude.

  Args:
    num_layers: N in the paper.
    magnitude: M in the paper. See `ops_at`.

  Returns:
    An op from a uint8 image [height, width, 3] to the same shape and dtype.
    It raises ValueError for another dtype or number of channels.

  Raises:
    ValueError: if an argument is negative or not a number.
  """
  if not isinstance(num_layers, int) or num_layers < 0:
    raise ValueError(f"wanted num_layers of at least 0, got {num_layers!r}")
  if not isinstance(magnitude, int | float) or magnitude < 0:
    raise ValueError(f"wanted a magnitude of at least 0, got {magnitude!r}")
  ops = list(ops_at(magnitude).values())

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    if image.dtype != tf.uint8 or image.shape.rank != 3 or image.shape[-1] != 3:
      raise ValueError(
        "randaug wants a uint8 image [height, width, 3], got "
        f"{image.dtype.name} of shape {image.shape}; put it after decode and "
        "before value_range"
      )
    shape = image.shape
    for layer in range(num_layers):
      layer_seed = tf.random.experimental.stateless_fold_in(seed, layer)
      pick_seed, op_seed = tf.unstack(
        tf.random.experimental.stateless_split(layer_seed, 2)
      )
      pick = tf.random.stateless_uniform(
        [], pick_seed, 0, len(ops), dtype=tf.int32
      )
      image = tf.switch_case(
        pick, [functools.partial(op, image, op_seed) for op in ops]
      )
      image = tf.ensure_shape(image, shape)
    return image

  return fn
