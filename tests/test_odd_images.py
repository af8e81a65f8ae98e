"""Tests of lookup_vit/odd_images.py, of files that other libraries write."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from lookup_vit import odd_images

ROWS, COLUMNS = 10, 14


@pytest.fixture(scope="module")
def photo():
  """`[10, 14, 3]`, no two places alike."""
  rows, columns = np.mgrid[:ROWS, :COLUMNS]
  channels = [25 * rows, 18 * columns, 255 - 10 * (rows + columns)]
  return np.stack(channels, axis=-1).astype(np.uint8)


def encode(image, kind, **options):
  """The content of a file that PIL writes of an image."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def decode(content):
  return odd_images.decode(odd_images.open_image(content))


def plain(content):
  return odd_images.is_plain(odd_images.open_image(content))


# What each EXIF orientation says is to be done to the pixels.
UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: x[::-1].swapaxes(0, 1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


def exif(turned):
  exif = Image.Exif()
  exif[0x0112] = turned
  return exif


@pytest.mark.parametrize("turned", [*UPRIGHT, 9])
def test_orientation(photo, turned):
  want = UPRIGHT.get(turned, UPRIGHT[1])(photo)
  for kind in ("JPEG", "PNG"):
    image = odd_images.open_image(encode(photo, kind, exif=exif(turned)))
    assert odd_images.is_plain(image)
    assert odd_images.orientation(image) == turned
  np.testing.assert_array_equal(odd_images.upright(photo, turned), want)
  # Pillow turns a TIFF by itself, and nothing else.
  for kind, options in (("WEBP", dict(lossless=True)), ("TIFF", {})):
    content = encode(photo, kind, exif=exif(turned), **options)
    assert not plain(content)
    np.testing.assert_array_equal(decode(content), want)


def test_broken_exif_is_none(photo):
  content = encode(photo, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
  assert odd_images.orientation(odd_images.open_image(content)) == 1


def over_white(colours, alpha):
  share = alpha[..., None] / 255
  return colours * share + 255 * (1 - share)


@pytest.mark.parametrize(
  ("kind", "options"),
  [("PNG", {}), ("TIFF", {}), ("WEBP", dict(lossless=True, exact=True))],
)
def test_what_is_transparent_is_on_white(photo, kind, options):
  alpha = np.linspace(0, 255, ROWS * COLUMNS).round().astype(np.uint8)
  alpha = alpha.reshape(ROWS, COLUMNS)
  content = encode(np.dstack([photo, alpha]), kind, **options)
  assert not plain(content)
  want = over_white(photo.astype(float), alpha)
  np.testing.assert_allclose(decode(content), want, atol=1)
  if kind != "WEBP":
    grey = photo[..., 0]
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    want = over_white(np.dstack([grey] * 3).astype(float), alpha)
    np.testing.assert_allclose(decode(encode(image, kind)), want, atol=1)


def test_a_transparent_colour_is_white(photo):
  chosen = photo[3, 4]
  content = encode(photo, "PNG", transparency=tuple(map(int, chosen)))
  assert not plain(content)
  want = photo.copy()
  want[3, 4] = 255
  np.testing.assert_array_equal(decode(content), want)

  grey = np.arange(ROWS * COLUMNS, dtype=np.uint8).reshape(ROWS, COLUMNS)
  for values, scale in ((grey, 1), (grey.astype(np.uint16) * 300, 256)):
    content = encode(values, "PNG", transparency=int(values[2, 2]))
    want = (values // scale).astype(np.uint8)
    want[2, 2] = 255
    np.testing.assert_array_equal(decode(content), np.dstack([want] * 3))

  palette = Image.fromarray(grey % 4).convert("P")
  palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
  want = 30 * (grey % 4)[..., None] + np.uint8([10, 20, 30])
  for kind in ("PNG", "GIF"):
    content = encode(palette, kind, transparency=2)
    found = decode(content)
    want[grey % 4 == 2] = 255
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes(photo, kind):
  image = Image.fromarray(photo).quantize(16)
  colours = np.reshape(image.getpalette(), (-1, 3))
  content = encode(image, kind)
  np.testing.assert_array_equal(decode(content), colours[np.asarray(image)])
  assert plain(content) == (kind == "PNG")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_bilevel(photo, kind):
  content = encode(Image.fromarray(photo[..., 0] > 99), kind)
  want = np.where(photo[..., :1] > 99, 255, 0).repeat(3, axis=-1)
  np.testing.assert_array_equal(decode(content), want)


def test_cmyk(photo):
  ink = np.dstack([photo, photo[::-1, :, 0] // 2])
  image = Image.fromarray(ink, "CMYK")
  left = 255.0 - ink
  want = left[..., :3] * left[..., 3:] / 255
  np.testing.assert_allclose(decode(encode(image, "TIFF")), want, atol=1)
  assert plain(encode(image, "JPEG"))  # TensorFlow knows these.


@pytest.mark.parametrize("kind", [".png", ".tif"])
def test_16_bits(photo, kind):
  deep = photo.astype(np.uint16) * 257 - photo[::-1]
  for values in (deep, deep[..., 0]):
    rgb = values[..., ::-1] if values.ndim == 3 else values  # OpenCV has BGR.
    content = cv2.imencode(kind, rgb)[1].tobytes()
    want = (values // 256).astype(np.uint8)
    want = want if want.ndim == 3 else np.dstack([want] * 3)
    np.testing.assert_array_equal(decode(content), want)
    assert plain(content) == (kind == ".png")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(photo, dtype):
  content = encode(photo[..., 0].astype(dtype), "TIFF")
  with pytest.raises(ValueError, match="pixels of 32 bits"):
    decode(content)


@pytest.mark.parametrize(
  ("kind", "options"),
  [("GIF", {}), ("WEBP", dict(lossless=True)), ("PNG", {}), ("TIFF", {})],
)
def test_first_frame(photo, kind, options):
  frames = [Image.fromarray(x) for x in (photo, photo[::-1], photo[:, ::-1])]
  if kind == "GIF":
    frames = [frame.quantize(64) for frame in frames]
  content = encode(
    frames[0], kind, save_all=True, append_images=frames[1:], **options
  )
  assert Image.open(io.BytesIO(content)).n_frames == 3
  want = np.asarray(frames[0].convert("RGB"))
  np.testing.assert_array_equal(decode(content), want)


def chunk(kind, body):
  end = struct.pack(">I", zlib.crc32(kind + body))
  return struct.pack(">I", len(body)) + kind + body + end


def png_of_size(width, height):
  """A PNG of few bytes, of one colour."""
  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  rows = zlib.compressobj()
  pixels = b"".join(rows.compress(bytes(width + 1)) for _ in range(height))
  parts = [(b"IHDR", header), (b"IDAT", pixels + rows.flush()), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_too_many_pixels(monkeypatch):
  content = png_of_size(20_000, 10_000)
  assert len(content) < 1_000_000
  with pytest.raises(ValueError, match="more than 178,956,970 pixels"):
    odd_images.open_image(content)
  # Also where a program has taken Pillow's own limit away.
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
  with pytest.raises(ValueError, match="20000x10000 are more than 178,956,970"):
    odd_images.open_image(content)


def ftyp(brand):
  return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"mif1"


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", "the file is empty"),
    (b"<html>", "no image, or a damaged one; want JPEG, PNG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no image"),
    (ftyp(b"heic"), "HEIC is not read here: convert it"),
    (ftyp(b"avif"), "AVIF is not read here: convert it"),
  ],
)
def test_what_is_not_read(content, words):
  with pytest.raises(ValueError, match=words):
    odd_images.open_image(content)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "WEBP", "TIFF", "PNG"])
def test_damage(photo, kind):
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (40, 40, 4 if kind == "PNG" else 3), np.uint8)
  content = encode(noise, kind)
  with pytest.raises(ValueError, match="damaged"):
    decode(content[: len(content) // 2])
