"""RandAugment's ops against PIL and NumPy, and the draws."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from lookup_vit.preprocess import get_preprocess_fn
from lookup_vit.preprocess import randaugment as ra

SEED = tf.constant([1, 2])
PHOTO = np.ascontiguousarray(load_sample_images().images[0][100:147, 300:361])
NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
DARK = PHOTO // 3 + 20
FLAT = np.full((20, 30, 3), 77, np.uint8)
# A channel of one value, one of two and one of many.
MIXED = np.stack([FLAT[..., 0], FLAT[..., 0], NOISE[:20, :30, 0]], axis=-1)
MIXED[3, :, 1] = 200
IMAGES = [PHOTO, NOISE, DARK, FLAT, MIXED]
MAGNITUDES = [0, 1, 5, 10, 15, 20]


def run(name, magnitude, image, seed=SEED):
  out = ra.ops_at(magnitude)[name](tf.constant(image), seed).numpy()
  assert out.dtype == np.uint8
  assert out.shape == image.shape
  return out.astype(int)


def gap(got, pil_image):
  return np.abs(got - np.asarray(pil_image).astype(int)).max()


@pytest.mark.parametrize("image", IMAGES)
def test_ops_without_magnitude_equal_pil(image):
  pil = Image.fromarray(image)
  assert gap(run("Invert", 10, image), ImageOps.invert(pil)) == 0
  assert gap(run("Equalize", 10, image), ImageOps.equalize(pil)) == 0
  # Of a product, float32 here and float64 there, the fraction is cut off.
  assert gap(run("AutoContrast", 10, image), ImageOps.autocontrast(pil)) <= 1


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_bits_and_thresholds_equal_pil(image, magnitude):
  pil = Image.fromarray(image)
  # PIL keeps nothing at 0 bits; the original keeps 1.
  bits = {0: 1, 1: 1, 5: 2, 10: 4, 15: 6, 20: 8}[magnitude]
  got = run("Posterize", magnitude, image)
  assert gap(got, ImageOps.posterize(pil, bits)) == 0
  # The original's threshold wraps at 256.
  threshold = {0: 0, 1: 25, 5: 128, 10: 0, 15: 128, 20: 0}[magnitude]
  got = run("Solarize", magnitude, image)
  assert gap(got, ImageOps.solarize(pil, threshold)) == 0
  wide = image.astype(int)
  added = np.clip(wide + int(11 * magnitude), 0, 255)
  want = np.where(wide < 128, added, wide)
  np.testing.assert_array_equal(run("SolarizeAdd", magnitude, image), want)


def test_posterize_past_8_bits_keeps_1():
  got = run("Posterize", 23, NOISE)
  assert gap(got, ImageOps.posterize(Image.fromarray(NOISE), 1)) == 0


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_enhancements_equal_pil(image, magnitude):
  pil = Image.fromarray(image)
  factor = 0.18 * magnitude + 0.1
  # 1 for the fraction cut off; 1 more times |1 - factor| where the image
  # blended with may itself differ by 1.
  loose = 1 + np.ceil(abs(1 - factor))
  got = run("Brightness", magnitude, image)
  assert gap(got, ImageEnhance.Brightness(pil).enhance(factor)) <= 1
  got = run("Color", magnitude, image)
  assert gap(got, ImageEnhance.Color(pil).enhance(factor)) <= loose
  got = run("Sharpness", magnitude, image)
  assert gap(got, ImageEnhance.Sharpness(pil).enhance(factor)) <= loose
  # Not PIL's mean grey: see the module's docstring.
  level = min(image.shape[0] * image.shape[1] // 256, 255)
  grey = Image.new("RGB", pil.size, (level,) * 3)
  got = run("Contrast", magnitude, image)
  assert gap(got, Image.blend(grey, pil, factor)) <= 1


def test_contrast_at_224_blends_with_196():
  black = np.zeros((224, 224, 3), np.uint8)
  assert set(run("Contrast", 0, black).flat) == {int(0.9 * 196)}


def shifted(image, rows, columns):
  """NumPy's version of moving the content up and left, grey coming in."""
  out = np.full_like(image, 128)
  height, width = image.shape[:2]
  for y in range(height):
    for x in range(width):
      if 0 <= y + rows < height and 0 <= x + columns < width:
        out[y, x] = image[y + rows, x + columns]
  return out


def test_translate_goes_both_ways_by_pixels():
  for magnitude, pixels in ((1, 10), (2, 20), (20, 200)):
    for name, axis in (("TranslateX", (0, 1)), ("TranslateY", (1, 0))):
      wants = [
        shifted(NOISE, axis[0] * n, axis[1] * n) for n in (pixels, -pixels)
      ]
      seen = set()
      for s in range(12):
        got = run(name, magnitude, NOISE, [s, 0])
        match = [np.array_equal(got, want) for want in wants]
        assert any(match)
        seen.add(match.index(True))
      assert seen == ({0, 1} if pixels < 37 else {0})


def sheared(image, amount):
  """Row y comes from amount * y to the right, nearest pixel."""
  out = np.full_like(image, 128)
  height, width = image.shape[:2]
  for y in range(height):
    for x in range(width):
      source = round(x + amount * y)
      if 0 <= source < width:
        out[y, x] = image[y, source]
  return out


@pytest.mark.parametrize("magnitude", [3, 10, 20])
def test_shear(magnitude):
  amount = 0.03 * magnitude
  for name in ("ShearX", "ShearY"):
    swap = (0, 1, 2) if name == "ShearX" else (1, 0, 2)
    wants = [
      sheared(NOISE.transpose(swap), a).transpose(swap)
      for a in (amount, -amount)
    ]
    seen = set()
    for s in range(12):
      got = run(name, magnitude, NOISE, [s, 0])
      # A source half way between two pixels may round either way.
      same = [(got == want).all(-1).mean() for want in wants]
      assert max(same) > 0.95
      seen.add(int(np.argmax(same)))
    assert seen == {0, 1}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(37, 53), (1, 9), (8, 1), (64, 64)])
def test_shear_is_the_affine_map(shape, axis):
  image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
  image = tf.constant(image)
  # No source is half way between two pixels, where either would do.
  for amount in (0.0, 0.2937, -0.2937, 0.4531, -0.4531, 1.7123, -1.7123):
    matrix = [1, 0, 0, 0, 1, 0]
    matrix[1 if axis == 1 else 3] = amount
    want = ra.project(image, matrix)
    got = ra.shear(image, amount, axis)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pixels", [0.0, 0.3, -0.3, 12.7, -12.7, 99.0, -99.0])
def test_translate_by_part_of_a_pixel_takes_the_nearest(axis, pixels):
  matrix = [1, 0, 0, 0, 1, 0]
  matrix[5 if axis == 0 else 2] = pixels
  want = ra.project(tf.constant(NOISE), matrix)
  got = ra.translate(tf.constant(NOISE), pixels, axis)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (5, 2), (3, 3)])
def test_ops_on_tiny_images(shape):
  image = np.random.default_rng(3).integers(0, 256, (*shape, 3), np.uint8)
  for magnitude in (0, 15):
    for name in ra.ops_at(magnitude):
      for s in range(4):
        run(name, magnitude, image, [s, 0])  # It checks shape and dtype.
  if min(shape) < 3:  # All border.
    np.testing.assert_array_equal(run("Sharpness", 15, image), image)


def test_rotate():
  # Magnitude 30 is a quarter turn, of a square of odd side onto itself.
  square = NOISE[:37, :37]
  wants = [np.rot90(square, k).astype(int) for k in (1, -1)]
  seen = set()
  for s in range(12):
    got = run("Rotate", 30, square, [s, 0])
    same = [(got == want).all(-1).mean() for want in wants]
    assert max(same) > 0.99
    seen.add(int(np.argmax(same)))
  assert seen == {0, 1}
  np.testing.assert_array_equal(run("Rotate", 0, NOISE), NOISE)
  # At 45 degrees the corners have no source and the centre stays.
  got = run("Rotate", 15, square)
  assert (got[[0, 0, -1, -1], [0, -1, 0, -1]] == 128).all()
  np.testing.assert_array_equal(got[18, 18], square[18, 18])


def test_cutout():
  image = np.zeros((101, 120, 3), np.uint8)
  centres = []
  for s in range(60):
    got = run("Cutout", 3, image, [s, 0])
    assert set(got.flat) == {0, 128}
    rows = np.flatnonzero((got == 128).any((1, 2)))
    columns = np.flatnonzero((got == 128).any((0, 2)))
    assert (got[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).all()
    for found, side in ((rows, 101), (columns, 120)):
      # 24 pixels, fewer where the square leaves the image.
      inside = found[0] > 0 and found[-1] < side - 1
      assert len(found) == 24 if inside else 12 <= len(found) <= 24
    centres.append((rows.mean(), columns.mean()))
  rows, columns = np.array(centres).T
  assert rows.min() < 20
  assert rows.max() > 80
  assert columns.min() < 20
  assert columns.max() > 100
  np.testing.assert_array_equal(run("Cutout", 0, image), image)


def draws(num_layers, magnitude, image, count):
  """Yields the bytes of `count` results of randaug."""
  fn = get_preprocess_fn(f"randaug({num_layers}, {magnitude})")
  image = tf.constant(image)
  dataset = tf.data.Dataset.range(count).map(
    lambda i: fn({"image": image}, tf.stack([i, 5]))["image"]
  )
  for result in dataset.as_numpy_iterator():
    yield result.tobytes()


def versions(magnitude, image):
  """The results of all ops with all signs, without Cutout: by bytes, names."""
  known = {}
  for name, op in ra.ops_at(magnitude).items():
    if name == "Cutout":
      continue
    signed = name.startswith(("Rotate", "Shear", "Translate"))
    # Seeds 0 to 7 hold both signs.
    for s in range(8 if signed else 1):
      known[op(tf.constant(image), [s, 0]).numpy().tobytes()] = name
  return known


@pytest.mark.parametrize("magnitude", [7, 15])
def test_a_layer_draws_each_op_alike(magnitude):
  # Larger than the translation, so that no two ops give the same image.
  image = load_sample_images().images[1][100:270, 200:380]
  known = versions(magnitude, image)
  assert len(known) == 10 + 2 * 5
  counts = dict.fromkeys(ra.ops_at(magnitude), 0)
  assert len(counts) == 16
  for result in draws(1, magnitude, image, 480):
    counts[known.get(result, "Cutout")] += 1
  # 30 are expected of each; five standard deviations.
  for name, count in counts.items():
    assert 3 <= count <= 57, (name, counts)


def test_layers_compose():
  assert next(draws(0, 10, PHOTO, 1)) == PHOTO.tobytes()
  pairs = set()
  for first in versions(2, PHOTO):
    image = np.frombuffer(first, np.uint8).reshape(PHOTO.shape)
    pairs.update(versions(2, image))
  results = list(draws(2, 2, PHOTO, 100))
  # The rest is Cutout's: 12 are expected.
  assert 70 <= sum(result in pairs for result in results) < 100
  assert len(set(results)) > 60


def test_same_seed_same_bits():
  fn = get_preprocess_fn("randaug(2, 15)")
  graph = tf.function(lambda image, seed: fn({"image": image}, seed)["image"])
  for s in range(20):
    image, seed = tf.constant(PHOTO), tf.constant([s, 3])
    want = fn({"image": image}, seed)["image"]
    np.testing.assert_array_equal(fn({"image": image}, seed)["image"], want)
    np.testing.assert_array_equal(graph(image, seed), want)


# --- Clips

# Frames that differ: [frames, height, width, 3], and as an image.
FRAMES = np.stack([PHOTO, PHOTO[::-1], PHOTO // 2, 255 - PHOTO[:, ::-1]])
CLIP = FRAMES.transpose(1, 2, 0, 3).reshape(*PHOTO.shape[:2], -1)


def unfolded(clip):
  return clip.reshape(*PHOTO.shape[:2], len(FRAMES), 3).transpose(2, 0, 1, 3)


@pytest.mark.parametrize("magnitude", [3, 15, 20])
@pytest.mark.parametrize("name", ra.ops_at(0))
def test_all_frames_of_a_clip_alike(name, magnitude):
  # In these all frames count as one image, which is then as tall.
  is_of_the_clip = name in ("AutoContrast", "Equalize", "Contrast")
  for s in range(4):
    got = unfolded(run(name, magnitude, CLIP, [s, 0]))
    if is_of_the_clip:
      tall = run(name, magnitude, FRAMES.reshape(-1, *PHOTO.shape[1:]), [s, 0])
      want = tall.reshape(FRAMES.shape)
    else:
      want = [run(name, magnitude, frame, [s, 0]) for frame in FRAMES]
    np.testing.assert_array_equal(got, want)


def test_a_clip_draws_as_one_of_its_frames_does():
  fn = get_preprocess_fn("randaug(2, 15)")
  same = 0
  for s in range(12):
    got = fn({"image": tf.constant(CLIP)}, [s, 3])["image"]
    assert got.shape == CLIP.shape
    frames = [fn({"image": tf.constant(f)}, [s, 3])["image"] for f in FRAMES]
    same += np.array_equal(unfolded(got.numpy()), frames)
  # All but those in which AutoContrast, Equalize or Contrast was drawn.
  assert 4 <= same < 12


def test_ops_of_vivit():
  image = load_sample_images().images[1][100:270, 200:380]
  known = versions(7, image)
  names = {n for n in known.values() if n.startswith(("Rot", "Sh", "Tr"))}
  names.remove("Sharpness")
  assert len(names) == 5
  known[image.tobytes()] = "Identity"
  counts = dict.fromkeys([*ra.ops_at(7), "Identity"], 0)
  fn = get_preprocess_fn("randaug(1, 7, geometric=False)")
  dataset = tf.data.Dataset.range(360).map(
    lambda i: fn({"image": tf.constant(image)}, tf.stack([i, 5]))["image"]
  )
  for result in dataset.as_numpy_iterator():
    counts[known.get(result.tobytes(), "Cutout")] += 1
  # 30 are expected of each of the twelve.
  for name, count in counts.items():
    assert count == 0 if name in names else 3 <= count <= 57, (name, counts)


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((4, 4, 3), np.float32),
    np.zeros((4, 4, 1), np.uint8),
    np.zeros((4, 4, 4), np.uint8),
    np.zeros((2, 4, 4, 3), np.uint8),
  ],
)
def test_wants_uint8_with_3_channels(image):
  with pytest.raises(ValueError, match="randaug wants an? .*image"):
    get_preprocess_fn("randaug(2, 10)")({"image": tf.constant(image)}, SEED)
