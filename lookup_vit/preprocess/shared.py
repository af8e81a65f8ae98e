"""What ops on images and clips share: checks, and how one resizes."""

import tensorflow as tf

Size = int | tuple[int, int]

# The methods whose results lie between the pixels that they are made from.
_WITHIN_RANGE = ("area", "bilinear", "nearest")


def height_width(size: Size) -> tuple[int, int]:
  """Returns `size` as (height, width), or raises ValueError."""
  pair = (size, size) if isinstance(size, int) else size
  if (
    not isinstance(pair, tuple | list)
    or len(pair) != 2
    or not all(isinstance(n, int) and n > 0 for n in pair)
  ):
    raise ValueError(
      f"wanted a positive integer or a pair (height, width), got {size!r}"
    )
  return tuple(pair)


def check_method(method: str) -> None:
  """Raises ValueError unless `tf.image.resize` has the method."""
  if method not in tf.image.ResizeMethod.__dict__.values():
    raise ValueError(f"tf.image.resize has no method {method!r}")


def resize_to(
  image: tf.Tensor, size: Size, method: str, antialias: bool
) -> tf.Tensor:
  """Resizes without a change of dtype; fractions are cut off, not rounded."""
  dtype = image.dtype
  image = tf.image.resize(image, size, method=method, antialias=antialias)
  if dtype != tf.uint8 or method not in _WITHIN_RANGE:
    image = tf.clip_by_value(image, dtype.min, dtype.max)
  return tf.cast(image, dtype)


def assert_fits(
  image: tf.Tensor, size: tuple[int, int], op: str
) -> tf.Operation:
  """Returns an assertion that a crop of `size` fits into the image."""
  return tf.debugging.assert_greater_equal(
    tf.shape(image)[:2],
    size,
    message=(
      f"{op}: the image's height and width, x, are less than the crop's, y; "
      "resize or pad it first"
    ),
  )


def check_clip(image: tf.Tensor, op: str) -> None:
  """Raises ValueError unless an image is uint8 [height, width, frames * 3]."""
  channels = image.shape[-1] if image.shape.rank == 3 else None
  if image.dtype != tf.uint8 or channels is None or channels % 3:
    raise ValueError(
      f"{op} wants a uint8 image [height, width, 3] or clip [height, width, "
      f"frames * 3], got {image.dtype.name} of shape {image.shape}; put it "
      "after decode or decode_clip, and before unfold_clip and value_range"
    )
