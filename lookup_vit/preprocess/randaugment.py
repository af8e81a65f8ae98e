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

A clip, [height, width, frames * 3], is augmented as ViViT's are
(`distort_image_with_randaugment` in scenic's scenic/dataset_lib/video_ops.py):
all frames draw the same, and what an op looks up in an image, it looks up in
all frames together: AutoContrast the darkest and the brightest value, Equalize
the histogram, Contrast the area. Sharpness treats each frame by itself, where
the code there blurs the last rows of one with the first ones of the next.
"""

import functools
import math
from collections.abc import Callable

import tensorflow as tf

from lookup_vit.preprocess.registry import image_op, register
from lookup_vit.preprocess.shared import check_clip

_MAX_LEVEL = 10
_ROTATE_DEGREES = 30
_SHEAR = 0.3
_TRANSLATE_PIXELS = 100
_CUTOUT_PIXELS = 40
_GREY = 128
_GEOMETRIC = ("Rotate", "Shear", "Translate")

ImageFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def blend(degenerate: tf.Tensor, image: tf.Tensor, factor: float) -> tf.Tensor:
  """Goes from `degenerate` (0) to `image` (1) and beyond, cutting fractions."""
  degenerate = tf.cast(degenerate, tf.float32)
  mixed = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
  return tf.cast(tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


def _rows(image):
  """Views [h, w, c] as [h, c w]; with `_row`, much the faster to broadcast."""
  return tf.reshape(image, [tf.shape(image)[0], -1])


def _row(colors, image):
  """Repeats a value for each of three colours along a row of `_rows(image)`."""
  return tf.tile(colors, [tf.shape(image)[1] * (image.shape[-1] // 3)])


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
  """Stretches each colour to [0, 255]; one of a single value stays."""
  pixels = tf.cast(_rows(image), tf.float32)
  low = tf.reduce_min(tf.reshape(tf.reduce_min(pixels, 0), [-1, 3]), 0)
  high = tf.reduce_max(tf.reshape(tf.reduce_max(pixels, 0), [-1, 3]), 0)
  scale = tf.where(high > low, tf.math.divide_no_nan(255.0, high - low), 1.0)
  shift = tf.where(high > low, low * scale, 0.0)
  # No less than 0, and past 255 by rounding only, which the cast cuts off.
  stretched = pixels * _row(scale, image) - _row(shift, image)
  return tf.reshape(tf.cast(stretched, tf.uint8), tf.shape(image))


def equalize(image: tf.Tensor) -> tf.Tensor:
  """Flattens the histogram of each colour, as PIL does."""
  # Colours one after another in one histogram, and one table.
  offsets = _row(tf.constant([0, 256, 512]), image)
  index = tf.reshape(tf.cast(_rows(image), tf.int32) + offsets, [-1])
  counts = tf.raw_ops.DenseBincount(
    input=index, size=3 * 256, weights=tf.zeros([0], tf.int32)
  )
  counts = tf.reshape(counts, [3, 256])
  # The step leaves out the pixels of the colour's brightest value.
  brightest = tf.reduce_max(tf.where(counts > 0, tf.range(256), 0), axis=1)
  last = tf.gather(counts, brightest, axis=1, batch_dims=1)
  step = (tf.reduce_sum(counts, axis=1) - last)[:, None] // 255
  below = tf.cumsum(counts, axis=1, exclusive=True)
  table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
  # Too few pixels for a step: the colour stays.
  table = tf.where(step == 0, tf.range(256), table)
  table = tf.reshape(tf.cast(table, tf.uint8), [-1])
  return tf.reshape(tf.gather(table, index), tf.shape(image))


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
  """Keeps the highest `bits` of 8 bits; 0 or more than 8 keep 1."""
  # What the original's uint8 shift comes to, which wraps below 0 and which
  # TensorFlow's kernels limit to 7.
  shift = min((8 - bits) % 256, 7)
  return tf.bitwise.bitwise_and(
    image, tf.constant(255 >> shift << shift, tf.uint8)
  )


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
  """Inverts the values from `threshold`, in [0, 255], up."""
  # Of bytes, tf.where takes ten times as long as arithmetic.
  inverted = 255 * tf.cast(image >= threshold, tf.uint8)
  return tf.bitwise.bitwise_xor(image, inverted)


def solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
  """Brightens the values below 128 by `addition`."""
  added = tf.minimum(255 - image, min(addition, 255))
  return image + added * tf.cast(image < 128, tf.uint8)


def color(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blends with the greyscale image."""
  # tf.image.rgb_to_grayscale, but with the grey in three channels: to broadcast
  # one takes longer than all the rest.
  weights = tf.tile([[0.2989], [0.5870], [0.1140]], [1, 3])
  pixels = tf.reshape(tf.image.convert_image_dtype(image, tf.float32), [-1, 3])
  grey = tf.image.convert_image_dtype(pixels @ weights, tf.uint8)
  return blend(tf.reshape(grey, tf.shape(image)), image, factor)


def contrast(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blends with a grey that depends on the image's area alone (see above)."""
  area = tf.cast(tf.size(image) // 3, tf.float32)
  grey = tf.floor(tf.minimum(area / 256, 255.0))
  return blend(grey, image, factor)


def brightness(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blends with black."""
  return blend(0.0, image, factor)


def sharpness(image: tf.Tensor, factor: float) -> tf.Tensor:
  """Blends with a 3x3 blur; the pixels at the border stay."""
  # Rows of c w numbers: the next pixel is c further.
  pixels = tf.cast(_rows(image), tf.float32)
  c = image.shape[-1]
  total = pixels[:-2] + pixels[1:-1] + pixels[2:]
  total = total[:, : -2 * c] + total[:, c:-c] + total[:, 2 * c :]
  total += 4 * pixels[1:-1, c:-c]
  # Whole numbers up to here, so that equal pixels give exactly their value.
  inner = image[1:-1, 1:-1]
  blurred = tf.reshape(tf.floor(total / 13), tf.shape(inner))
  inner = blend(blurred, inner, factor)
  middle = image[1:-1]
  middle = tf.concat([middle[:, :1], inner, middle[:, 1:][:, -1:]], axis=1)
  return tf.concat([image[:1], middle, image[1:][-1:]], axis=0)


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


# Of whole rows or columns, these are 2.5 and 20 times as fast as `project`.


def shear(image: tf.Tensor, amount: tf.Tensor, axis: int) -> tf.Tensor:
  """Moves row y to the left (axis 1), or column y up (axis 0), by amount * y.

  Args:
    image: uint8 [height, width, channels].
    amount: pixels from one row or column to the next, of either sign.
    axis: 0 or 1.

  Returns:
    An image of the same shape and dtype, grey where none moved to.
  """
  height, width = tf.unstack(tf.shape(image)[:2])
  row, column = tf.range(height)[:, None], tf.range(width)
  moved, across = (column, row) if axis else (row, column)
  shift = tf.floor(amount * tf.cast(across, tf.float32) + 0.5)
  moved += tf.cast(shift, tf.int32)
  inside = (moved >= 0) & (moved < tf.shape(image)[axis])
  index = row * width + moved if axis else moved * width + column
  # The pixel after the last is the grey one.
  index = tf.where(inside, index, height * width)
  channels = image.shape[-1]
  grey = tf.constant(_GREY, tf.uint8, [1, channels])
  pixels = tf.concat([tf.reshape(image, [-1, channels]), grey], axis=0)
  return tf.gather(pixels, index)


def translate(image: tf.Tensor, pixels: tf.Tensor, axis: int) -> tf.Tensor:
  """Moves the content up (axis 0) or left (axis 1), grey coming in."""
  size = tf.shape(image)[axis]
  shift = tf.cast(tf.floor(pixels + 0.5), tf.int32)
  shift = tf.clip_by_value(shift, -size, size)
  before, after = tf.maximum(-shift, 0), tf.maximum(shift, 0)
  kept = slice(after, size - before)
  image = image[:, kept] if axis else image[kept]

  def grey(count):
    height, width, channels = tf.unstack(tf.shape(image))
    shape = [height, count] if axis else [count, width]
    return tf.fill([*shape, channels], tf.constant(_GREY, tf.uint8))

  return tf.concat([grey(before), image, grey(after)], axis)


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
  top, left = tf.unstack(tf.maximum(centre - half, 0))
  bottom, right = tf.unstack(tf.minimum(centre + half, size))
  rows = image[top:bottom]
  shape = [bottom - top, right - left, image.shape[-1]]
  grey = tf.fill(shape, tf.constant(_GREY, tf.uint8))
  rows = tf.concat([rows[:, :left], grey, rows[:, right:]], axis=1)
  return tf.concat([image[:top], rows, image[bottom:]], axis=0)


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
    Functions from (uint8 [h, w, frames * 3], seed) to the same shape and
    dtype, by name, in the original's order.
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
    "ShearX": lambda image, seed: shear(
      image, signed(_SHEAR * level, seed), axis=1
    ),
    "ShearY": lambda image, seed: shear(
      image, signed(_SHEAR * level, seed), axis=0
    ),
    "TranslateX": lambda image, seed: translate(
      image, signed(_TRANSLATE_PIXELS * level, seed), axis=1
    ),
    "TranslateY": lambda image, seed: translate(
      image, signed(_TRANSLATE_PIXELS * level, seed), axis=0
    ),
    "Cutout": lambda image, seed: cutout(
      image, int(_CUTOUT_PIXELS * level), seed
    ),
    "SolarizeAdd": lambda image, seed: solarize_add(image, int(110 * level)),
  }


@register("randaug")
@image_op
def randaug(
  num_layers: int = 2, magnitude: float = 10, geometric: bool = True
) -> ImageFn:
  """Applies `num_layers` random ops in turn, each at the same magnitude.

  Args:
    num_layers: N in the paper.
    magnitude: M in the paper. See `ops_at`.
    geometric: whether Rotate, ShearX, ShearY, TranslateX and TranslateY are
      among the ops. If not, one that does nothing is: ViViT's choice of ops.

  Returns:
    An op from a uint8 image [height, width, 3], or clip [height, width,
    frames * 3], to the same shape and dtype. It raises ValueError for another
    dtype or number of channels.

  Raises:
    ValueError: if an argument is negative or not a number.
  """
  if not isinstance(num_layers, int) or num_layers < 0:
    raise ValueError(f"wanted num_layers of at least 0, got {num_layers!r}")
  if not isinstance(magnitude, int | float) or magnitude < 0:
    raise ValueError(f"wanted a magnitude of at least 0, got {magnitude!r}")
  ops = ops_at(magnitude)
  if not geometric:
    ops = {k: v for k, v in ops.items() if not k.startswith(_GEOMETRIC)}
    ops["Identity"] = lambda image, seed: image
  ops = list(ops.values())

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    check_clip(image, "randaug")
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
