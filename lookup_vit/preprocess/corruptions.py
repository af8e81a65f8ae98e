"""The preprocessing op `corrupt`: the corruptions of ImageNet-C, on the fly.

The 15 corruptions at 5 severities of ImageNet-C (Hendrycks and Dietterich,
arXiv:1903.12261). Where the shorter side has 64 pixels or more they are
ImageNet-C's own: TFDS's functions, and for motion blur, snow and frost, where
those want an ImageMagick binary and files that do not come with them, those of
PyPI's `imagecorruptions`. Below 64 pixels they are CIFAR-10-C's, which are
milder (`small_corruptions.py`).
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from jaxtyping import Int32, UInt8

from lookup_vit.preprocess.registry import image_op, register

NAMES = (
  "gaussian_noise",
  "shot_noise",
  "impulse_noise",
  "defocus_blur",
  "glass_blur",
  "motion_blur",
  "zoom_blur",
  "snow",
  "frost",
  "fog",
  "brightness",
  "contrast",
  "elastic_transform",
  "pixelate",
  "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
INSTALL = "pip install -c requirements.lock -e '.[robustness]'"

# Shorter sides: from which on ImageNet-C's corruptions are used, and the least.
_LARGE, _LEAST = 64, 2

# They draw no random numbers.
_FIXED = (
  "defocus_blur",
  "zoom_blur",
  "brightness",
  "contrast",
  "pixelate",
  "jpeg_compression",
)
_IMAGECORRUPTIONS = ("motion_blur", "snow", "frost")
_IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)

_LOCK = threading.Lock()


@functools.cache
def _libraries():
  """TFDS's corruptions, imagecorruptions and `small_corruptions`.

  Raises:
    ValueError: one of the packages cannot be imported.
  """
  try:
    with warnings.catch_warnings():
      # imagecorruptions imports from where SciPy and setuptools had things.
      warnings.simplefilter("ignore")
      import imagecorruptions
      from tensorflow_datasets.image_classification import corruptions

      from lookup_vit.preprocess import small_corruptions
  except ImportError as e:
    raise ValueError(
      f"corruptions want packages that cannot be imported here ({e}): "
      f"`{INSTALL}`. Where it is libGL that is missing: `pip install "
      "--force-reinstall --no-deps opencv-contrib-python-headless`."
    ) from e
  return corruptions, imagecorruptions, small_corruptions


@contextlib.contextmanager
def _seeded(seed):
  """NumPy's global state, seeded; afterwards it is what it was."""
  with _LOCK:
    state = np.random.get_state()
    np.random.seed(np.asarray(seed, np.int32).view(np.uint32))
    try:
      yield
    finally:
      np.random.set_state(state)


def corrupt_image(
  image: UInt8[np.ndarray, "h w 3"],
  name: str,
  severity: int,
  seed: Int32[np.ndarray, "2"],
) -> UInt8[np.ndarray, "h w 3"]:
  """Corrupts an image.

  The libraries draw from NumPy's global state. It is seeded under a lock and
  restored: calls may be parallel, but nobody else may draw from it meanwhile.

  Args:
    image: with a shorter side of 2 pixels or more.
    name: one of `NAMES`.
    severity: 1 to 5.
    seed: the only source of randomness.

  Returns:
    An image of the same shape.

  Raises:
    ValueError: an image too small, or packages that are missing.
  """
  _check_size(image.shape[:2])
  with contextlib.nullcontext() if name in _FIXED else _seeded(seed):
    return _corrupt(image, name, severity)


def _corrupt(image, name, severity):
  tfds_own, others, small = _libraries()
  if min(image.shape[:2]) < _LARGE:
    return small.corrupt(image, name, severity)
  if name in _IMAGECORRUPTIONS:
    return others.corrupt(image, severity, name)
  if name == "impulse_noise":
    # TFDS's is scikit-image's, which it does not let us seed.
    noisy = small.impulse_noise(image / 255.0, _IMPULSES[severity - 1])
    return tfds_own.around_and_astype(noisy * 255)
  return getattr(tfds_own, name)(image, severity)


def _check_size(size):
  known = [side for side in size if side is not None]
  if known and min(known) < _LEAST:
    raise ValueError(
      f"corrupt wants images of {_LEAST} pixels or more a side, got {size}"
    )


@register("corrupt")
@image_op
def corrupt(
  name: str, severity: int
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
  """Corrupts an image as ImageNet-C does (arXiv:1903.12261).

  Below 64 pixels, of the shorter side, the severities are CIFAR-10-C's. The
  pixels are a function of the image and the op's seed, so that in evaluation
  those of an example depend on its place in the split, and on how many ops
  stand before this one.

  Args:
    name: gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur,
      motion_blur, zoom_blur, snow, frost, fog, brightness, contrast,
      elastic_transform, pixelate or jpeg_compression.
    severity: 1 to 5.

  Returns:
    An op from a uint8 image [h, w, 3], of 2 pixels or more a side, to another.
    It raises ValueError for another tensor, or tf.errors.InvalidArgumentError
    where sides that are too short are not known in advance.

  Raises:
    ValueError: no such corruption or severity, or packages that are missing.
  """
  if name not in NAMES:
    raise ValueError(
      f"there is no corruption {name!r}; there are {', '.join(NAMES)}"
    )
  if severity not in SEVERITIES or isinstance(severity, bool):
    raise ValueError(f"wanted a severity of 1 to 5, got {severity!r}")
  _libraries()

  def run(image, seed):
    return corrupt_image(image, name, severity, seed)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    shape = image.shape
    if image.dtype != tf.uint8 or shape.rank != 3 or shape[-1] != 3:
      raise ValueError(
        f"corrupt wants a uint8 image [height, width, 3], got "
        f"{image.dtype.name} of shape {shape}; put it after decode and before "
        "value_range"
      )
    _check_size(shape[:2])
    corrupted = tf.numpy_function(run, [image, seed], tf.uint8, stateful=False)
    return tf.ensure_shape(corrupted, shape)

  return fn
