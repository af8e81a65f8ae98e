"""Tests of lookup_vit/image_files.py."""

import io
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from lookup_vit import image_files
from tests import video_files

PP = "decode|resize((6, 8))|value_range(-1,1)|keep('image','label')"


@pytest.fixture
def photo():
  """`[12, 16, 3]`, smooth, so that JPEG changes little."""
  rows, columns = np.mgrid[:12, :16]
  channels = [16 * rows, 15 * columns, 255 - 8 * (rows + columns)]
  return np.stack(channels, axis=-1).astype(np.uint8)


def save(path, image, **options):
  image.save(path, **options)
  return str(path)


def test_values_are_those_of_the_ops(photo, tmp_path):
  paths = [
    save(tmp_path / "a.png", Image.fromarray(photo)),
    save(tmp_path / "b.png", Image.fromarray(photo[::-1])),
  ]
  images = image_files.read(paths, "decode|value_range(-1,1)", (12, 16))
  assert images.shape == (2, 12, 16, 3) and images.dtype == np.float32
  want = photo.astype(np.float64) / 127.5 - 1
  np.testing.assert_allclose(images, [want, want[::-1]], atol=1e-6)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.gif"])
def test_kinds_of_files(name, photo, tmp_path):
  path = save(tmp_path / name, Image.fromarray(photo))
  [image] = image_files.read([path], PP, (6, 8))
  want = photo.reshape(6, 2, 8, 2, 3).mean((1, 3)) / 127.5 - 1
  assert np.abs(image - want).mean() < 0.06


def test_grey_alpha_16_bits_and_cmyk(photo, tmp_path):
  """Much the same image, whatever it is kept as."""
  rgb = Image.fromarray(photo)
  grey = rgb.convert("L")
  alpha = rgb.convert("RGBA")
  deep = np.asarray(grey, np.uint16) * 257
  paths = [
    save(tmp_path / "grey.png", grey),
    save(tmp_path / "deep.png", Image.fromarray(deep)),
    save(tmp_path / "grey.jpg", grey, quality=95),
    save(tmp_path / "alpha.png", alpha),
    save(tmp_path / "cmyk.jpg", rgb.convert("CMYK"), quality=95),
  ]
  images = image_files.read(paths, PP, (6, 8))
  grey = np.asarray(grey).reshape(6, 2, 8, 2).mean((1, 3)) / 127.5 - 1
  rgb = photo.reshape(6, 2, 8, 2, 3).mean((1, 3)) / 127.5 - 1
  for image in images[:3]:
    assert np.abs(image - grey[..., None]).max() < 0.05
  assert np.abs(images[3] - rgb).max() < 0.02
  assert np.abs(images[4] - rgb).mean() < 0.1


def test_ops_on_what_a_file_has_not_are_left_out(photo, tmp_path):
  path = save(tmp_path / "a.png", Image.fromarray(photo))
  pp = "onehot(80,'parts','labels')|decode|copy('text','x')|" + PP[7:]
  want = image_files.read([path], PP, (6, 8))
  found = image_files.read([path], pp, (6, 8))
  np.testing.assert_array_equal(found, want)


def test_what_is_odd_is_upright_and_on_white(photo, tmp_path):
  pp, size = "decode|value_range(0,255)", (16, 12)
  exif = Image.Exif()
  exif[0x0112] = 6  # To be turned clockwise.
  turned = [
    save(tmp_path / name, Image.fromarray(photo), exif=exif, **options)
    for name, options in (
      ("a.jpg", {}),
      ("a.png", {}),
      ("a.webp", dict(lossless=True)),
    )
  ]
  images = image_files.read(turned, pp, size)
  # The very pixels that evaluation has, before they are turned.
  content = pathlib.Path(turned[0]).read_bytes()
  jpeg = tf.io.decode_jpeg(content, 3, dct_method="INTEGER_ACCURATE").numpy()
  for image, want in zip(images, (jpeg, photo, photo), strict=True):
    np.testing.assert_array_equal(image, want[::-1].swapaxes(0, 1))

  alpha = Image.fromarray(photo)
  alpha.putalpha(Image.fromarray((photo[..., 0] > 60).astype(np.uint8) * 255))
  path = save(tmp_path / "alpha.png", alpha)
  [image] = image_files.read([path], pp, photo.shape[:2])
  want = np.where(photo[..., :1] > 60, photo, 255)
  np.testing.assert_array_equal(image, want)


def test_decoded_images(photo, tmp_path):
  path = save(tmp_path / "a.png", Image.fromarray(photo))
  reader = image_files.Reader(PP, (6, 8))
  np.testing.assert_array_equal(reader(photo), reader(path))
  with pytest.raises(ValueError, match="decode wants an image"):
    reader(np.stack([photo] * 3))


def test_videos(tmp_path):
  pp = "central_clip(2)|decode_clip|unfold_clip(2)|value_range(0,255)"
  frames = video_files.pattern(6, 16, 24)
  path = tmp_path / "a.mp4"
  video_files.write_video(path, frames)
  reader = image_files.Reader(pp, (2, 16, 24))
  clip = reader(str(path))
  np.testing.assert_allclose(
    video_files.greys(clip), video_files.greys(frames[2:4]), atol=4
  )
  np.testing.assert_array_equal(reader(frames), frames[2:4])
  # Every second frame of the six.
  reader = image_files.Reader(pp, (2, 16, 24), frame_options=dict(fps=12.5))
  greys = video_files.greys(reader(str(path)))
  assert greys[1] - greys[0] > 1.5 * np.diff(video_files.greys(clip))[0]
  with pytest.raises(ValueError, match=f"{path}: a video by its name"):
    image_files.Reader(PP, (6, 8))(str(path))
  other = save(tmp_path / "a.png", Image.fromarray(frames[0]))
  with pytest.raises(ValueError, match=f"{other}: ffmpeg failed"):
    reader(other)


@pytest.mark.parametrize(
  ("pp", "words"),
  [
    (
      "decode|value_range(-1,1)",
      ["(12, 16, 3)", "(6, 8, 3)", "resize((6, 8))"],
    ),
    ("decode|resize((6, 8))", ["uint8", "float32"]),
    ("decode|keep('label')", ["no image"]),
    ("keep('image')", ["string"]),
    ("decode|resise(3)", ["'resise'", "'resize'"]),
    ("decode|central_crop(14)", ["central_crop", "less than the crop's"]),
  ],
)
def test_what_is_not_as_the_model_wants(pp, words, photo, tmp_path):
  path = save(tmp_path / "a.png", Image.fromarray(photo))
  with pytest.raises(ValueError) as e:
    image_files.read([path], pp, (6, 8))
  for word in words + ["a.png"] * ("resise" not in pp):
    assert word in str(e.value)


def test_files_that_cannot_be_read(photo, tmp_path):
  good = save(tmp_path / "good.png", Image.fromarray(photo))
  buffer = io.BytesIO()
  Image.fromarray(photo).resize((320, 240)).save(buffer, "JPEG")
  content = buffer.getvalue()
  contents = {
    "cut.jpg": content[: len(content) // 2],
    "empty.jpg": b"",
    "text.png": b"no image at all",
    "missing.png": None,
  }
  for name, content in contents.items():
    path = tmp_path / name
    if content is not None:
      path.write_bytes(content)
    with pytest.raises(ValueError) as e:
      image_files.read([good, str(path)], PP, (6, 8))
    assert str(e.value).startswith(f"{path}: "), name
    assert "\n" not in str(e.value)
  with pytest.raises(ValueError, match=f"{tmp_path}: "):
    image_files.read([str(tmp_path)], PP, (6, 8))
