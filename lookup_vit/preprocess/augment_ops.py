"""Preprocessing ops that augment clips, all frames of a clip alike.

They work on `data["image"]` as image ops do, an image being a clip of one
frame: [height, width, frames * 3], see `video_ops.py`. They are those that the
recipes of ViViT (arXiv:2103.15691) want; its code is scenic's projects/vivit,
which takes them from DMVR (dmvr/processors.py of
github.com/google-deepmind/dmvr).
"""

import tensorflow as tf

from lookup_vit.preprocess.image_ops import ImageFn
from lookup_vit.preprocess.registry import (
  Data,
  PreprocessFn,
  image_op,
  register,
)
from lookup_vit.preprocess.shared import (
  check_clip,
  check_method,
  height_width,
  resize_to,
)


@register("jitter_scale")
@image_op
def jitter_scale(
  smaller_size: int,
  scale_min: float = 0.9,
  scale_max: float = 1.33,
  keep_ratio: bool = False,
  method: str = "bilinear",
  antialias: bool = False,
) -> ImageFn:
  """Resizes the smaller side to `smaller_size` times a random scale.

  Height and width draw a scale each, so that the aspect ratio changes a little:
  `scale_jitter_augm` of DMVR, with the scales of ViViT (table 7), but resized
  once. With `keep_ratio` they share one, as in SlowFast (arXiv:1812.03982),
  whose smaller side is drawn from [256, 320]: `jitter_scale(256, 1, 1.25,
  True)`. A random crop comes next.

  Args:
    smaller_size: height or width, whichever is less, at a scale of 1.
    scale_min: least scale.
    scale_max: greatest scale.
    keep_ratio: whether height and width have the same scale.
    method: see `tf.image.resize`.
    antialias: see `tf.image.resize`.

  Returns:
    An op from [h, w, c] to an image of the same dtype, whose sides are no less
    than `smaller_size * scale_min` without its fraction.

  Raises:
    ValueError: unless 0 < scale_min <= scale_max.
  """
  height_width(smaller_size)
  check_method(method)
  if not 0 < scale_min <= scale_max:
    raise ValueError(
      f"wanted 0 < scale_min <= scale_max, got {scale_min!r} and {scale_max!r}"
    )

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    count = 1 if keep_ratio else 2
    scale = tf.random.stateless_uniform([count], seed, scale_min, scale_max)
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    size = tf.round(size * (smaller_size / tf.reduce_min(size)))
    return resize_to(image, tf.cast(size * scale, tf.int32), method, antialias)

  return fn


def _pixels(image):
  """Views [h, w, frames * 3] as [h, w, frames, 3]."""
  height, width = tf.unstack(tf.shape(image)[:2])
  return tf.reshape(image, [height, width, -1, 3])


def adjust_colors(
  image: tf.Tensor,
  brightness: tf.Tensor,
  saturation: tf.Tensor,
  contrast: tf.Tensor,
  hue: tf.Tensor,
) -> tf.Tensor:
  """Changes colours by given amounts, in the order of the arguments.

  After each, colours are clipped to [0, 1], as hue and saturation are not those
  of colours beyond. (In DMVR it is at the end.)

  Args:
    image: float32 [h, w, frames * 3] in [0, 1].
    brightness: what is added.
    saturation: factor of the saturation.
    contrast: factor of the distance to the mean, of each frame and channel.
    hue: what is added to the hue, whose circle has length 1.

  Returns:
    A clip of the same shape in [0, 1].
  """
  shape = tf.shape(image)
  image = tf.clip_by_value(image + brightness, 0.0, 1.0)
  image = tf.image.adjust_saturation(_pixels(image), saturation)
  image = tf.image.adjust_contrast(tf.reshape(image, shape), contrast)
  image = tf.clip_by_value(image, 0.0, 1.0)
  image = tf.image.adjust_hue(_pixels(image), hue)
  return tf.clip_by_value(tf.reshape(image, shape), 0.0, 1.0)


def greyscale(image: tf.Tensor) -> tf.Tensor:
  """Gives all three channels of float32 [h, w, frames * 3] their luma."""
  grey = tf.image.rgb_to_grayscale(_pixels(image))
  return tf.reshape(tf.repeat(grey, 3, axis=-1), tf.shape(image))


@register("color_jitter")
@image_op
def color_jitter(
  p: float = 0.8,
  p_drop: float = 0.1,
  brightness: float = 32 / 255,
  saturation: float = 0.4,
  contrast: float = 0.4,
  hue: float = 0.2,
) -> ImageFn:
  """Changes brightness, saturation, contrast and hue, and drops colour.

  `color_default_augm` of DMVR, whose ranges are the defaults here; those of the
  probabilities are ViViT's on Kinetics, in scenic's
  projects/vivit/configs/kinetics400/vivit_base_k400.py.

  Args:
    p: probability of the changes.
    p_drop: probability that the result becomes grey.
    brightness: up to this is added, or subtracted.
    saturation: its factor is between 1 - this and 1 + this.
    contrast: likewise.
    hue: up to this part of the circle of hues is added, or subtracted.

  Returns:
    An op on a uint8 clip. It raises ValueError for another dtype, or channels
    that are not a multiple of 3.

  Raises:
    ValueError: a probability outside of [0, 1], an amount less than 0, or a
      `hue` greater than 0.5.
  """
  for name, value, most in (
    ("p", p, 1),
    ("p_drop", p_drop, 1),
    ("brightness", brightness, float("inf")),
    ("saturation", saturation, 1),
    ("contrast", contrast, 1),
    ("hue", hue, 0.5),
  ):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most:
      raise ValueError(f"wanted {name} in [0, {most}], got {value!r}")
  low = tf.constant([-brightness, 1 - saturation, 1 - contrast, -hue])
  high = tf.constant([brightness, 1 + saturation, 1 + contrast, hue])

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    check_clip(image, "color_jitter")
    # Whether to, whether to drop, and four amounts.
    draws = tf.random.stateless_uniform([6], seed)
    amounts = tf.unstack(low + draws[2:] * (high - low))

    def change():
      pixels = tf.cast(image, tf.float32) / 255
      pixels = tf.cond(
        draws[0] < p, lambda: adjust_colors(pixels, *amounts), lambda: pixels
      )
      pixels = tf.cond(
        draws[1] < p_drop, lambda: greyscale(pixels), lambda: pixels
      )
      return tf.cast(tf.round(pixels * 255), tf.uint8)

    is_changed = (draws[0] < p) | (draws[1] < p_drop)
    changed = tf.cond(is_changed, change, lambda: image)
    return tf.ensure_shape(changed, image.shape)

  return fn


@register("flip_lr_swap")
def flip_lr_swap(*pairs: tuple[int, int]) -> PreprocessFn:
  """Flips left to right with probability 1/2, and labels that say so with it.

  For sets in which some classes are others, seen in a mirror: of
  Something-Something v2, (86, 87), pulling something from left to right and
  from right to left, (93, 94), the same of pushing, and (166, 167), turning the
  camera left and right, as in mmaction2's `sthv2_flip_label_map` (such as
  configs/recognition/tsm/tsm_imagenet-pretrained-r50_8xb16-1x1x16-50e_
  sthv2-rgb.py of github.com/open-mmlab/mmaction2).

  Args:
    *pairs: labels that a flip swaps.

  Returns:
    An op on `data["image"]` and the integer `data["label"]`. It raises KeyError
    if either is missing, and ValueError if the label is no integer.

  Raises:
    ValueError: no pairs, or not of two integers each, all of them different.
  """
  are_pairs = all(isinstance(p, tuple) and len(p) == 2 for p in pairs)
  labels = [label for pair in pairs for label in pair] if are_pairs else []
  are_labels = all(type(label) is int for label in labels)
  if not (labels and are_labels and len(set(labels)) == len(labels)):
    raise ValueError(
      "wanted pairs of labels, all different, such as (86, 87), (93, 94); got "
      f"{pairs!r}"
    )

  def fn(data: Data, seed: tf.Tensor) -> Data:
    for key in ("image", "label"):
      if key not in data:
        raise KeyError(f"wanted the key {key!r}, the data has {sorted(data)}")
    image, label = data["image"], data["label"]
    if not label.dtype.is_integer or label.shape.rank:
      raise ValueError(
        f"flip_lr_swap wants an integer as 'label', got {label.dtype.name} of "
        f"shape {label.shape}; put it before onehot"
      )
    swapped = label
    for pair in pairs:
      for one, other in (pair, pair[::-1]):
        swapped = tf.where(label == one, tf.cast(other, label.dtype), swapped)
    is_flipped = tf.random.stateless_uniform([], seed) < 0.5
    flipped = tf.cond(is_flipped, lambda: tf.reverse(image, [1]), lambda: image)
    return {
      **data,
      "image": tf.ensure_shape(flipped, image.shape),
      "label": tf.where(is_flipped, swapped, label),
    }

  return fn
