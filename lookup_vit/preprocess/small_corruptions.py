"""ImageNet-C's corruptions as CIFAR-10-C has them, for images of a few pixels.

They are milder than those of ImageNet-C: the constants are those of the
published `ImageNet-C/create_c/make_cifar_c.py` of
https://github.com/hendrycks/robustness, for 32 x 32 pixels. Motion blur, also
that of snow, is imagecorruptions' rather than ImageMagick's; what the published
code measures in images (the elastic transform, the map of fog) follows the
image's size; and values are rounded, not cut off.

A function maps an image `[h, w, 3]`, float64 in [0, 1], and the constants of a
severity to one of the same shape, not clipped. What is random is drawn from
NumPy's global state.
"""

import functools
import io
import pathlib

import cv2
import imagecorruptions
import numpy as np
import scipy.ndimage
import skimage
from imagecorruptions import corruptions as others
from jaxtyping import Float, UInt8
from PIL import Image
from tensorflow_datasets.image_classification import corruptions as tfds_own

Pixels = Float[np.ndarray, "h w 3"]


def corrupt(
  image: UInt8[np.ndarray, "h w 3"], name: str, severity: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Corrupts an image by a corruption of `TABLE` at a severity of 1 to 5."""
  function, constants = TABLE[name]
  corrupted = function(image / 255.0, *constants[severity - 1])
  return _to_bytes(np.clip(corrupted, 0, 1))


def _to_bytes(x):
  return np.around(x * 255).astype(np.uint8)


def gaussian_noise(x: Pixels, scale: float) -> Pixels:
  """Adds noise of a standard deviation."""
  return x + np.random.normal(size=x.shape, scale=scale)


def shot_noise(x: Pixels, photons: float) -> Pixels:
  """Draws the light of each pixel from a Poisson distribution."""
  return np.random.poisson(x * photons) / photons


def impulse_noise(x: Pixels, amount: float) -> Pixels:
  """Sets a share of the values to 0 or 1."""
  # scikit-image has no part in NumPy's global state.
  rng = np.random.default_rng(np.random.randint(2**31))
  return skimage.util.random_noise(x, "s&p", rng=rng, amount=amount)


def defocus_blur(x: Pixels, radius: float, alias_blur: float) -> Pixels:
  """Averages over a disk with soft edges."""
  return cv2.filter2D(x, -1, tfds_own.disk(radius, alias_blur))


def glass_blur(x: Pixels, sigma: float, reach: int, times: int) -> Pixels:
  """Blurs, takes each pixel from its neighbourhood, and blurs."""
  blur = functools.partial(
    skimage.filters.gaussian, sigma=sigma, channel_axis=2
  )
  x = np.uint8(blur(x) * 255)
  height, width, _ = x.shape
  for _ in range(times):
    for row in range(height - reach, reach, -1):
      for column in range(width - reach, reach, -1):
        right, down = np.random.randint(-reach, reach, size=2)
        # The published code means to swap the two, and writes this one alone.
        x[row, column] = x[row + down, column + right]
  return blur(x / 255.0)


def motion_blur(x: Pixels, radius: int, sigma: float) -> Pixels:
  """Blurs along a line of an angle within 45 degrees."""
  angle = np.random.uniform(-45, 45)
  return others._motion_blur(x, radius, sigma, angle)


def zoom_blur(x: Pixels, end: float) -> Pixels:
  """Averages over zooms from 1 on in steps of 0.01, to less than `end`."""
  x = x.astype(np.float32)
  zoomed = [tfds_own.clipped_zoom(x, z) for z in np.arange(1, end, 0.01)]
  return np.mean([x, *zoomed], axis=0)


def snow(
  x: Pixels,
  mean: float,
  scale: float,
  zoom: float,
  threshold: float,
  radius: int,
  sigma: float,
  kept: float,
) -> Pixels:
  """Whitens, and adds flakes that fall, and the same from below."""
  height, width, _ = x.shape
  flakes = np.random.normal(size=(height, width), loc=mean, scale=scale)
  flakes = others.clipped_zoom(flakes[..., np.newaxis], zoom)
  flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
  angle = np.random.uniform(-135, -45)
  flakes = others._motion_blur(flakes[..., 0], radius, sigma, angle)
  flakes = np.round(flakes[:height, :width, np.newaxis] * 255) / 255
  grey = cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2GRAY)[..., np.newaxis]
  x = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
  return x + flakes + flakes[::-1, ::-1]


@functools.cache
def _frost(number):
  """A photograph of frost, RGB in [0, 255]; the published code uses five."""
  kind = "png" if number < 3 else "jpg"
  folder = pathlib.Path(imagecorruptions.__file__).parent / "frost"
  image = cv2.imread(str(folder / f"frost{number + 1}.{kind}"))
  return image[..., ::-1]


def frost(x: Pixels, kept: float, share: float) -> Pixels:
  """Adds a crop of a photograph of frost, which is a fifth of its size."""
  image = _frost(np.random.randint(5))
  size = np.array(x.shape[:2])
  scale = max(0.2, *(size + 1) / image.shape[:2])
  image = cv2.resize(image, (0, 0), fx=scale, fy=scale)
  top, left = np.random.randint(0, np.array(image.shape[:2]) - size)
  crop = image[top : top + size[0], left : left + size[1]]
  return kept * x + share * crop / 255


def fog(x: Pixels, amount: float, decay: float) -> Pixels:
  """Adds clouds, and takes the greatest value back to what it was."""
  height, width, _ = x.shape
  side = 2 ** int(np.ceil(np.log2(max(height, width, 2))))
  clouds = tfds_own.plasma_fractal(mapsize=side, wibbledecay=decay)
  most = x.max()
  x = x + amount * clouds[:height, :width, np.newaxis]
  return x * most / (most + amount)


def brightness(x: Pixels, more: float) -> Pixels:
  """Adds to the value of HSV."""
  x = skimage.color.rgb2hsv(x)
  x[..., 2] = np.clip(x[..., 2] + more, 0, 1)
  return skimage.color.hsv2rgb(x)


def contrast(x: Pixels, kept: float) -> Pixels:
  """Moves each channel towards its mean."""
  mean = x.mean(axis=(0, 1))
  return (x - mean) * kept + mean


def elastic_transform(
  x: Pixels, strength: float, sigma: float, reach: float
) -> Pixels:
  """Moves pixels, by an affine map and then smoothly; in shorter sides."""
  height, width, _ = x.shape
  side = min(height, width)
  centre, third = np.array([width // 2, height // 2]), side // 3
  corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
  moves = np.random.uniform(-reach * side, reach * side, size=(3, 2))
  moved = np.float32(corners) + np.float32(moves)
  affine = cv2.getAffineTransform(np.float32(corners), moved)
  x = cv2.warpAffine(
    x.astype(np.float32),
    affine,
    (width, height),
    borderMode=cv2.BORDER_REFLECT_101,
  )

  def smooth():
    noise = np.random.uniform(-1, 1, size=(height, width))
    smoothed = scipy.ndimage.gaussian_filter(
      noise, sigma * side, mode="reflect", truncate=3
    )
    return (smoothed * strength * side).astype(np.float32)

  right, down = smooth(), smooth()
  rows, columns = np.mgrid[:height, :width]
  places = [rows + down, columns + right]
  channels = [
    scipy.ndimage.map_coordinates(c, places, order=1, mode="reflect")
    for c in np.moveaxis(x, -1, 0)
  ]
  return np.stack(channels, axis=-1)


def pixelate(x: Pixels, scale: float) -> Pixels:
  """Averages over boxes."""
  height, width, _ = x.shape
  image = Image.fromarray(_to_bytes(x))
  small = int(width * scale), int(height * scale)
  image = image.resize(small, Image.Resampling.BOX)
  return np.asarray(image.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(x: Pixels, quality: int) -> Pixels:
  """Writes and reads a JPEG."""
  file = io.BytesIO()
  Image.fromarray(_to_bytes(x)).save(file, "JPEG", quality=quality)
  return np.asarray(Image.open(file)) / 255


def _of(function, *constants):
  """A corruption with the constants of its five severities."""
  return function, [c if isinstance(c, tuple) else (c,) for c in constants]


TABLE = {
  "gaussian_noise": _of(gaussian_noise, 0.04, 0.06, 0.08, 0.09, 0.10),
  "shot_noise": _of(shot_noise, 500, 250, 100, 75, 50),
  "impulse_noise": _of(impulse_noise, 0.01, 0.02, 0.03, 0.05, 0.07),
  "defocus_blur": _of(
    defocus_blur, (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)
  ),
  "glass_blur": _of(
    glass_blur,
    (0.05, 1, 1),
    (0.25, 1, 1),
    (0.4, 1, 1),
    (0.25, 1, 2),
    (0.4, 1, 2),
  ),
  "motion_blur": _of(motion_blur, (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
  "zoom_blur": _of(zoom_blur, 1.06, 1.11, 1.16, 1.21, 1.26),
  "snow": _of(
    snow,
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
  ),
  "frost": _of(
    frost, (1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)
  ),
  "fog": _of(fog, (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
  "brightness": _of(brightness, 0.05, 0.1, 0.15, 0.2, 0.3),
  "contrast": _of(contrast, 0.75, 0.5, 0.4, 0.3, 0.15),
  "elastic_transform": _of(
    elastic_transform,
    (0, 0, 0.08),
    (0.05, 0.2, 0.07),
    (0.08, 0.06, 0.06),
    (0.1, 0.04, 0.05),
    (0.1, 0.03, 0.03),
  ),
  "pixelate": _of(pixelate, 0.95, 0.9, 0.85, 0.75, 0.65),
  "jpeg_compression": _of(jpeg_compression, 80, 65, 58, 50, 40),
}
