"""Image ops against PIL, NumPy and brute force."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from lookup_vit.preprocess import get_preprocess_fn

SEED = tf.constant([7, 11])


def picture(height=47, width=61, seed=0):
  """A smooth colour image of odd size, so that a JPEG of it is faithful."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
  return np.asarray(small.resize((width, height), Image.BICUBIC))


def positions(height, width):
  """An image whose pixels tell where they come from: (row, column, 9)."""
  row, column = np.mgrid[:height, :width]
  return np.stack([row, column, np.full_like(row, 9)], -1).astype(np.uint8)


def encode(image, kind, mode="RGB", **kwargs):
  buffer = io.BytesIO()
  Image.fromarray(image).convert(mode).save(buffer, kind, **kwargs)
  return buffer.getvalue()


def apply(pp, image, seed=SEED):
  return get_preprocess_fn(pp)({"image": tf.constant(image)}, seed)[
    "image"
  ].numpy()


# JPEG: libjpeg-turbo on both sides, but upsampling of colour may differ.
@pytest.mark.parametrize(
  ("kind", "mode", "tolerance"),
  [
    ("PNG", "RGB", 0),
    ("PNG", "L", 0),
    ("PNG", "P", 0),
    ("PNG", "RGBA", 0),
    ("BMP", "RGB", 0),
    ("BMP", "L", 0),
    ("GIF", "P", 0),
    ("JPEG", "RGB", 3),
    ("JPEG", "L", 0),
    ("JPEG", "CMYK", 3),
  ],
)
def test_decode_equals_pil(kind, mode, tolerance):
  content = encode(picture(), kind, mode)
  got = apply("decode", content)
  want = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
  assert got.dtype == np.uint8
  assert got.shape == want.shape
  assert np.abs(got.astype(int) - want).max() <= tolerance


def test_decode_takes_images_as_they_are_stored():
  exif = Image.Exif()
  exif[274] = 6  # To be shown turned by a right angle.
  marked = apply("decode", encode(picture(), "JPEG", exif=exif))
  np.testing.assert_array_equal(
    marked, apply("decode", encode(picture(), "JPEG"))
  )
  deep = np.arange(0, 47 * 61 * 20, 20, dtype=np.uint16).reshape(47, 61)
  buffer = io.BytesIO()
  Image.fromarray(deep).save(buffer, "PNG")
  got = apply("decode", buffer.getvalue())
  np.testing.assert_array_equal(got, np.repeat(deep[..., None] >> 8, 3, -1))


def test_decode_jpeg_and_inception_crop_resizes():
  for kind in ("JPEG", "PNG"):
    content = encode(picture(), kind)
    got = apply("decode_jpeg_and_inception_crop((16, 9))", content)
    assert got.shape == (16, 9, 3)
    assert got.dtype == np.uint8


def test_decode_jpeg_is_the_accurate_dct():
  content = encode(picture(), "JPEG", quality=50)
  want = tf.io.decode_jpeg(content, 3, dct_method="INTEGER_ACCURATE")
  np.testing.assert_array_equal(apply("decode", content), want)


def test_decode_to_grey():
  content = encode(picture(), "PNG", "L")
  want = np.asarray(Image.open(io.BytesIO(content)))[..., None]
  np.testing.assert_array_equal(apply("decode(channels=1)", content), want)


def test_decode_takes_the_first_frame():
  frames = [Image.fromarray(picture(seed=s)).convert("P") for s in (0, 1)]
  buffer = io.BytesIO()
  frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
  want = np.asarray(frames[0].convert("RGB"))
  np.testing.assert_array_equal(apply("decode", buffer.getvalue()), want)


def test_decode_of_a_decoded_image():
  np.testing.assert_array_equal(apply("decode", picture()), picture())
  grey = picture()[..., :1]
  np.testing.assert_array_equal(apply("decode", grey), grey.repeat(3, -1))
  with pytest.raises(ValueError, match=r"float32 of shape \(2, 2, 3\)"):
    apply("decode", np.zeros((2, 2, 3), np.float32))


def test_decode_of_garbage_fails():
  with pytest.raises(tf.errors.InvalidArgumentError):
    apply("decode", b"not an image")


@pytest.mark.parametrize(
  ("kind", "mode", "options"),
  [
    ("PNG", "RGB", {}),
    ("PNG", "L", {}),
    ("JPEG", "L", {}),
    ("JPEG", "RGB", {"subsampling": "4:4:4"}),
    ("JPEG", "RGB", {"subsampling": "4:2:0"}),
  ],
)
def test_decoding_the_crop_is_cropping_the_decoded(kind, mode, options):
  content = encode(picture(), kind, mode, **options)
  whole = apply("decode", content)
  decode_crop = get_preprocess_fn("decode_jpeg_and_inception_crop")
  crop = get_preprocess_fn("inception_crop")
  # Smoothing of subsampled colour ends at the crop's sides.
  inner = slice(1, -1) if "4:2:0" in options.values() else slice(None)
  for s in range(20):
    got = decode_crop({"image": tf.constant(content)}, [s, 0])["image"].numpy()
    want = crop({"image": tf.constant(whole)}, [s, 0])["image"].numpy()
    assert got.shape == want.shape
    np.testing.assert_array_equal(got[:, inner], want[:, inner])
    assert np.abs(got.astype(int) - want).max() <= 16


@pytest.mark.parametrize("size", [(101, 150), (90, 64), (77, 77)])
def test_inception_crop_statistics(size):
  image = tf.constant(positions(*size))
  crop = get_preprocess_fn("inception_crop(area_min=20, area_max=80)")
  mapped = tf.data.Dataset.range(300).map(
    lambda i: crop({"image": image}, tf.stack([i, 0]))["image"]
  )
  boxes = []
  for got in mapped.as_numpy_iterator():
    top, left = got[0, 0, :2].astype(int)
    height, width = got.shape[:2]
    # A window of the image, without gaps and as it was.
    np.testing.assert_array_equal(
      got, image[top : top + height, left : left + width]
    )
    boxes.append((top, left, height, width))
  top, left, height, width = np.array(boxes, float).T
  # Sides are rounded to whole pixels: half a pixel either way.
  assert np.all((height + 0.5) * (width + 0.5) >= 0.2 * size[0] * size[1])
  assert np.all((height - 0.5) * (width - 0.5) <= 0.8 * size[0] * size[1])
  assert np.all((width + 0.5) / (height - 0.5) >= 3 / 4)
  assert np.all((width - 0.5) / (height + 0.5) <= 4 / 3)
  # Crops are spread over the bounds and over the image.
  area = height * width / (size[0] * size[1])
  assert area.min() < 0.25
  assert area.max() > 0.6
  assert top.min() == 0
  assert left.min() == 0
  assert np.any(top + height >= size[0] - 1)
  assert np.any(left + width >= size[1] - 1)
  assert len(set(boxes)) > 250


def test_inception_crop_takes_a_long_image_whole():
  image = positions(2, 100)
  np.testing.assert_array_equal(apply("inception_crop", image), image)


@pytest.mark.parametrize(
  ("pp", "shape"),
  [
    ("inception_crop(16)", (16, 16, 3)),
    ("inception_crop((16, 9), antialias=True)", (16, 9, 3)),
    ("inception_crop(16, resize_method='bicubic')", (16, 16, 3)),
    ("resize(16)", (16, 16, 3)),
    ("resize([9, 16], 'nearest')", (9, 16, 3)),
    ("resize_small(24)", (24, 31, 3)),
    ("resize_small(94)", (94, 122, 3)),
    ("central_crop(47)", (47, 47, 3)),
    ("random_crop((47, 1))", (47, 1, 3)),
    ("pad((50, 60), 128)", (50, 61, 3)),
    ("randaug(1, 10)", (47, 61, 3)),
  ],
)
def test_shapes_and_dtype(pp, shape):
  got = apply(pp, picture())
  assert got.shape == shape
  assert got.dtype == np.uint8


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 2), (3, 3)])
def test_tiny_images(shape):
  image = positions(*shape)
  for s in range(5):
    got = apply("inception_crop(8)|flip_lr|randaug(2, 10)", image, [s, 1])
    assert got.shape == (8, 8, 3)
    got = apply("randaug(2, 15)|resize_small(4)", image, [s, 1])
    assert min(got.shape[:2]) == 4


def test_resize_equals_pil_where_it_shrinks_with_antialias():
  image = picture(64, 96)
  got = apply("resize((20, 30), antialias=True)", image)
  want = Image.fromarray(image).resize((30, 20), Image.BILINEAR)
  # This cuts fractions, PIL rounds twice, once a direction.
  assert np.abs(got.astype(int) - np.asarray(want)).max() <= 2


def test_resize_small_by_area_is_the_mean():
  image = picture(40, 60)
  want = image.reshape(20, 2, 30, 2, 3).mean((1, 3)).astype(np.uint8)
  np.testing.assert_array_equal(apply("resize_small(20)", image), want)


def test_resize_keeps_range_of_overshooting_methods():
  edge = np.zeros((8, 8, 3), np.uint8)
  edge[:, 4:] = 255
  got = apply("resize(32, 'bicubic')", edge)
  assert np.all(np.diff(got[0, 8:24, 0].astype(int)) >= 0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", ["area", "bilinear", "nearest", "lanczos5"])
@pytest.mark.parametrize("size", [(7, 9), (33, 50), (64, 41)])
def test_resize_is_that_of_tensorflow_within_the_range(method, size, antialias):
  rng = np.random.default_rng(0)
  for values in ([0, 255], [0, 1], [254, 255], range(256)):
    image = rng.choice(values, (29, 31, 3)).astype(np.uint8)
    got = apply(f"resize({size}, '{method}', {antialias})", image)
    want = tf.image.resize(image, size, method=method, antialias=antialias)
    want = np.clip(want, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(got, want)


def test_central_crop():
  image = positions(9, 12)
  np.testing.assert_array_equal(
    apply("central_crop((4, 6))", image), image[2:6, 3:9]
  )
  np.testing.assert_array_equal(
    apply("central_crop((9, 5))", image), image[:, 3:8]
  )


def test_random_crop_reaches_every_place():
  image = positions(6, 7)
  crop = get_preprocess_fn("random_crop(4)")
  places = set()
  for s in range(150):
    got = crop({"image": tf.constant(image)}, [s, 0])["image"].numpy()
    top, left = got[0, 0, :2]
    np.testing.assert_array_equal(got, image[top : top + 4, left : left + 4])
    places.add((int(top), int(left)))
  assert places == {(y, x) for y in range(3) for x in range(4)}


@pytest.mark.parametrize("op", ["central_crop", "random_crop"])
@pytest.mark.parametrize("known_shape", [False, True])
def test_a_crop_larger_than_the_image_states_both_sizes(op, known_shape):
  fn = get_preprocess_fn(f"{op}((224, 225))")
  image = tf.constant(positions(10, 250))
  with pytest.raises(tf.errors.InvalidArgumentError) as e:
    if known_shape:
      fn({"image": image}, SEED)
    else:
      content = encode(image.numpy(), "PNG")
      fn = get_preprocess_fn(f"decode|{op}((224, 225))")
      dataset = tf.data.Dataset.from_tensors({"image": content})
      next(iter(dataset.map(lambda data: fn(data, SEED))))
  for word in (op, "10 250", "224 225"):
    assert word in str(e.value)


def test_pad_is_centred():
  image = positions(3, 8)
  want = np.pad(image, [(1, 2), (0, 0), (0, 0)], constant_values=5)
  np.testing.assert_array_equal(apply("pad(6, 5)", image), want)


def test_flip_lr_is_fair():
  image = positions(2, 3)
  flip = get_preprocess_fn("flip_lr")
  flipped = 0
  for s in range(400):
    got = flip({"image": tf.constant(image)}, [s, 0])["image"].numpy()
    is_flipped = got[0, 0, 1] == 2
    np.testing.assert_array_equal(got, image[:, ::-1] if is_flipped else image)
    flipped += is_flipped
  # Five standard deviations.
  assert abs(flipped - 200) < 50


def test_value_range():
  image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
  got = apply("value_range(-1, 1)", image)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, image / 127.5 - 1, rtol=0, atol=1e-6)
  assert got.min() == -1
  assert got.max() == 1
  got = apply("value_range(0, 1, 50, 100, clip_values=True)", image)
  np.testing.assert_allclose(
    got, np.clip((image - 50.0) / 50, 0, 1), rtol=0, atol=1e-6
  )
  got = apply("value_range(0, 1, (0, 0, 9), (1, 2, 19))", positions(3, 3))
  np.testing.assert_allclose(got[2, 1], [2, 0.5, 0])
  got = apply("value_range(1, 1)", image)
  np.testing.assert_array_equal(got, np.ones(image.shape, np.float32))


TRAIN = (
  "decode|inception_crop(24)|flip_lr|randaug(2, 15)|value_range(-1, 1)"
  "|keep('image', 'label')"
)


def test_same_seed_same_bits_in_eager_and_parallel_map():
  contents = [
    encode(picture(40 + i, 50, seed=i), kind, mode)
    for i, (kind, mode) in enumerate(
      [("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "L"), ("PNG", "L")] * 5
    )
  ]
  seeds = [[i, 9] for i in range(len(contents))]
  fn = get_preprocess_fn(TRAIN)
  data = {"image": contents, "label": list(range(len(contents))), "id": seeds}
  dataset = tf.data.Dataset.from_tensor_slices((data, seeds))

  def run():
    mapped = dataset.map(fn, num_parallel_calls=4, deterministic=True)
    assert mapped.element_spec["image"].shape == (24, 24, 3)
    return list(mapped.as_numpy_iterator())

  first, second = run(), run()
  for i, (a, b) in enumerate(zip(first, second, strict=True)):
    assert set(a) == {"image", "label"}
    np.testing.assert_array_equal(a["image"], b["image"])
    if i < 6:
      example = {k: tf.constant(v[i]) for k, v in data.items()}
      eager = fn(example, tf.constant(seeds[i]))
      np.testing.assert_array_equal(a["image"], eager["image"])


def test_another_seed_is_another_image():
  image = picture()
  got = {
    apply("inception_crop(24)", image, [s, t]).tobytes()
    for s in range(5)
    for t in range(5)
  }
  assert len(got) == 25
