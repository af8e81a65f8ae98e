"""Images as people see them, of files that TensorFlow decodes otherwise.

It leaves out the orientation that a camera has noted, drops alpha channels
rather than the colours behind them, and knows neither WebP's animations nor
TIFF. Pillow reads these; JPEGs and PNGs without such things stay with
TensorFlow, so that they have the pixels that training and evaluation see.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (
  *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"),
  # Found in folders, to be told of: they cannot be read.
  *(".heic", ".heif", ".avif"),
)

# Others, such as EPS, may start programs.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
_WANTED = "want JPEG, PNG, GIF, BMP, WebP or TIFF"

# Pillow's own bound; of half as many it would warn, and of damaged EXIF.
_MOST_PIXELS = 178_956_970
warnings.filterwarnings("ignore", module=r"PIL\.")

_ORIENTATION = 0x0112
# ISO media files say what they are behind "ftyp".
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")


def open_image(content: bytes) -> Image.Image:
  """Opens an image; its pixels are not decoded yet.

  Raises:
    ValueError: it is none, of another format, or has too many pixels.
  """
  if not content:
    raise ValueError("the file is empty")
  if content[4:8] == b"ftyp" and content[8:12] in _HEIF + _AVIF:
    kind = "AVIF" if content[8:12] in _AVIF else "HEIC"
    raise ValueError(f"{kind} is not read here: convert it to JPEG or PNG")
  try:
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
  except Image.UnidentifiedImageError:
    raise ValueError(f"no image, or a damaged one; {_WANTED}") from None
  except MemoryError:
    raise
  except Image.DecompressionBombError:
    raise ValueError(
      f"more than {_MOST_PIXELS:,} pixels are too many"
    ) from None
  except Exception as e:  # Damage makes Pillow raise many kinds.
    raise ValueError(f"the image is damaged: {_line(e)}") from e
  width, height = image.size
  if width * height > _MOST_PIXELS:
    raise ValueError(f"{width}x{height} are more than {_MOST_PIXELS:,} pixels")
  return image


def is_plain(image: Image.Image) -> bool:
  """Whether TensorFlow decodes it as people see it, but for its orientation."""
  if image.format in ("JPEG", "MPO"):  # MPO has further JPEGs behind it.
    return True
  return image.format == "PNG" and not image.has_transparency_data


def orientation(image: Image.Image) -> int:
  """By EXIF, from 1, upright, to 8."""
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # Damaged EXIF, of many kinds, is none.
    return 1


def upright(pixels: np.ndarray, turned: int) -> np.ndarray:
  """Pixels `[height, width, 3]`, uint8, turned or mirrored by `orientation`."""
  image = Image.fromarray(pixels)
  image.getexif()[_ORIENTATION] = turned
  return np.asarray(ImageOps.exif_transpose(image))


def decode(image: Image.Image) -> np.ndarray:
  """The pixels of an image, upright, what is transparent on white.

  Of an animation, the first frame; of 16 bits, the upper eight, as TensorFlow
  takes of a PNG.

  Args:
    image: of `open_image`.

  Returns:
    `[height, width, 3]`, uint8.

  Raises:
    ValueError: it is damaged, or of pixels that have no colour.
  """
  try:
    image.load()
    if image.mode in ("I", "F"):
      raise ValueError(
        f"pixels of 32 bits (mode {image.mode}) have no fixed range: convert "
        "them to 8 or 16"
      )
    # Pillow turns a TIFF when it is loaded, others it does not.
    turned = orientation(image)
    pixels = _colours(image)
    return pixels if turned == 1 else upright(pixels, turned)
  except (MemoryError, ValueError):
    raise
  except Exception as e:  # Damage makes Pillow raise many kinds.
    raise ValueError(f"the image is damaged: {_line(e)}") from e


def _colours(image):
  if image.mode.startswith("I;16"):
    deep = np.asarray(image)
    grey = (deep >> 8).astype(np.uint8)
    if "transparency" in image.info:
      grey[deep == image.info["transparency"]] = 255
    return np.repeat(grey[..., None], 3, axis=-1)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return np.asarray(image.convert("RGB"))


def _line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
