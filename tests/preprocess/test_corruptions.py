"""The op `corrupt`, against the libraries that have the corruptions."""

import concurrent.futures
import itertools
import pathlib
import sys

import numpy as np
import pytest

from lookup_vit import input_pipeline
from lookup_vit.preprocess import corruptions, get_preprocess_fn

# isort: split
import cv2
import imagecorruptions
import tensorflow as tf
from PIL import Image
from tensorflow_datasets.image_classification import corruptions as tfds_own

from lookup_vit.preprocess import small_corruptions as small

DATA = dict(module="data.digits", split="test[:11]")
SEED = np.array([7, -3], np.int32)
ALL = list(itertools.product(corruptions.NAMES, corruptions.SEVERITIES))


def picture(height, width, seed=0):
  """Smooth colours with some grain, as a photograph has them."""
  rng = np.random.default_rng(seed)
  colours = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
  image = colours.resize((width, height), Image.Resampling.BICUBIC)
  grain = rng.normal(scale=12, size=(height, width, 3))
  return np.uint8(np.clip(np.asarray(image) + grain, 0, 255))


def seeded(function, *args):
  """The function's result with NumPy's global state from `SEED`."""
  state = np.random.get_state()
  np.random.seed(SEED.view(np.uint32))
  try:
    return function(*args)
  finally:
    np.random.set_state(state)


def distance(a, b):
  return np.abs(a.astype(float) - b).mean()


# Own corruptions with the constants of ImageNet-C, against the libraries.


@pytest.mark.parametrize(
  "name, severity, constants, shape",
  [
    ("gaussian_noise", 2, (0.12,), (40, 51)),
    ("shot_noise", 3, (12,), (40, 51)),
    ("defocus_blur", 1, (3, 0.1), (40, 51)),
    ("defocus_blur", 5, (10, 0.5), (40, 51)),
    ("glass_blur", 1, (0.7, 1, 2), (40, 51)),
    ("glass_blur", 4, (1.1, 3, 2), (33, 29)),
    ("zoom_blur", 2, (1.16,), (41, 50)),
    ("fog", 3, (2.5, 1.7), (20, 512)),
    ("brightness", 4, (0.4,), (40, 51)),
    ("contrast", 2, (0.3,), (40, 51)),
    ("elastic_transform", 1, (488 / 48, 170.8 / 48, 24.4 / 48), (48, 48)),
    ("elastic_transform", 4, (17.08 / 48, 2.44 / 48, 4.88 / 48), (48, 48)),
    ("jpeg_compression", 5, (7,), (40, 51)),
  ],
)
def test_own_corruptions_are_those_of_tfds(name, severity, constants, shape):
  image = picture(*shape)
  want = seeded(getattr(tfds_own, name), image, severity)
  got = seeded(getattr(small, name), image / 255, *constants)
  got = np.around(np.clip(got, 0, 1) * 255)
  assert np.abs(got - want).max() <= 1
  assert (got != want).mean() < 1e-3
  assert distance(want, image) > 0.3


@pytest.mark.parametrize(
  "name, severity, constants",
  [
    ("motion_blur", 2, (15, 5)),
    ("snow", 1, (0.1, 0.3, 3, 0.5, 10, 4, 0.8)),
    ("snow", 4, (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65)),
  ],
)
def test_own_corruptions_are_those_of_imagecorruptions(
  name, severity, constants
):
  image = picture(41, 52)
  want = seeded(imagecorruptions.corrupt, image, severity, name)
  got = seeded(getattr(small, name), image / 255, *constants)
  # imagecorruptions cuts fractions off.
  got = np.clip(got, 0, 1) * 255
  assert np.abs(got - 0.5 - want).max() <= 0.51


def test_frost_is_a_crop_of_a_photograph():
  folder = pathlib.Path(imagecorruptions.__file__).parent / "frost"
  photographs = []
  for path in sorted(folder.iterdir()):
    image = cv2.imread(str(path))
    photographs.append(cv2.resize(image, (0, 0), fx=0.2, fy=0.2)[..., ::-1])
  assert len(photographs) == 6
  seen = set()
  state = np.random.get_state()
  np.random.seed(0)
  for _ in range(20):
    got = small.frost(np.zeros((32, 40, 3)), 0.5, 1.0) * 255
    # One of them, or two: frost2.png and frost3.png are the same.
    found = {
      i
      for i, photograph in enumerate(photographs)
      if cv2.matchTemplate(
        np.float32(photograph), np.float32(got), cv2.TM_SQDIFF_NORMED
      ).min()
      < 1e-6
    }
    assert found in ({0}, {1, 2}, {3}, {4})
    seen |= found
  np.random.set_state(state)
  assert seen == {0, 1, 2, 3, 4}
  image = np.full((32, 40, 3), 0.5)
  frost = seeded(small.frost, image * 0, 0.5, 1.0)
  both = seeded(small.frost, image, 0.9, 0.4)
  np.testing.assert_allclose(both, 0.45 + 0.4 * frost, rtol=1e-6)


def test_frost_on_a_long_image():
  image = picture(20, 900)
  got = corruptions.corrupt_image(image, "frost", 3, SEED)
  assert distance(got, image) > 10


def test_pixelate_averages_over_boxes():
  image = picture(40, 60)
  boxes = image.reshape(20, 2, 30, 2, 3).mean((1, 3))
  got = 255 * small.pixelate(image / 255, 0.5)
  want = boxes.repeat(2, axis=0).repeat(2, axis=1)
  assert np.abs(got - want).max() <= 1


def test_impulses():
  """They are salt and pepper, of the share that the severity says."""
  for side, severity, share in ((60, 5, 0.07), (128, 4, 0.17)):
    image = np.full((side, side, 3), 100, np.uint8)
    got = corruptions.corrupt_image(image, "impulse_noise", severity, SEED)
    assert set(np.unique(got)) == {0, 100, 255}
    assert np.mean(got != 100) == pytest.approx(share, rel=0.15)
    assert np.mean(got[got != 100] == 0) == pytest.approx(0.5, abs=0.06)


# Which of them an image gets.


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_from_64_pixels_on_they_are_the_libraries(name):
  image = picture(64, 75)
  got = corruptions.corrupt_image(image, name, 3, SEED)
  if name in ("motion_blur", "snow", "frost"):
    want = seeded(imagecorruptions.corrupt, image, 3, name)
  elif name == "impulse_noise":
    return  # See test_impulses: the library's cannot be seeded.
  else:
    want = seeded(getattr(tfds_own, name), image, 3)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_below_64_pixels_they_are_those_of_cifar(name):
  image = picture(63, 75)
  got = corruptions.corrupt_image(image, name, 3, SEED)
  want = seeded(small.corrupt, image, name, 3)
  np.testing.assert_array_equal(got, want)


def test_none_is_left_out():
  assert tuple(small.TABLE) == corruptions.NAMES
  assert imagecorruptions.get_corruption_names() == list(corruptions.NAMES)


@pytest.mark.parametrize(
  "size", [(2, 2), (9, 13), (32, 32), (48, 61), (96, 65)]
)
def test_sizes(size):
  image = picture(*size)
  for name, severity in ALL[:: 5 if size == (96, 65) else 2]:
    got = corruptions.corrupt_image(image, name, severity, SEED)
    assert got.shape == image.shape and got.dtype == np.uint8, name


@pytest.mark.parametrize("side", [32, 96])
def test_severity_grows(side):
  """The distance from the image does, but where published constants do not."""
  images = [picture(side, side, seed) for seed in range(3)]
  for name in corruptions.NAMES:
    if name in ("glass_blur", "frost", "fog", "elastic_transform", "snow"):
      continue
    distances = [
      np.mean(
        [
          distance(corruptions.corrupt_image(i, name, severity, SEED), i)
          for i in images
        ]
      )
      for severity in corruptions.SEVERITIES
    ]
    assert distances[0] > 0.1, name
    assert np.diff(distances).min() > -0.05 * distances[-1], (name, distances)
    assert distances[-1] > 1.15 * distances[0], (name, distances)


# Randomness.


@pytest.mark.parametrize("side", [32, 70])
def test_parallel_calls_and_the_global_state(side):
  images = [picture(side, side, seed) for seed in range(4)]
  names = [n for n in corruptions.NAMES if side == 32 or n != "glass_blur"]
  tasks = [(i, n) for n in names for i in range(len(images))]

  def run(task):
    i, name = task
    seed = np.array([i, 5], np.int32)
    return corruptions.corrupt_image(images[i], name, 2, seed)

  np.random.seed(1)
  want_next = np.random.uniform(size=3)
  np.random.seed(1)
  one_by_one = [run(task) for task in tasks]
  order = np.random.default_rng(0).permutation(len(tasks))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    parallel = list(pool.map(run, [tasks[i] for i in order]))
  for i, got in zip(order, parallel, strict=True):
    np.testing.assert_array_equal(got, one_by_one[i], tasks[i][1])
  np.testing.assert_array_equal(np.random.uniform(size=3), want_next)


def test_the_state_is_restored_after_an_error(monkeypatch):
  monkeypatch.setattr(corruptions, "_corrupt", lambda *args: 1 / 0)
  np.random.seed(1)
  before = np.random.get_state()[1].copy()
  with pytest.raises(ZeroDivisionError):
    corruptions.corrupt_image(picture(32, 32), "snow", 1, SEED)
  np.testing.assert_array_equal(np.random.get_state()[1], before)
  assert not corruptions._LOCK.locked()


def test_another_seed_is_another_noise():
  image = picture(32, 32)
  for name in corruptions.NAMES:
    one, other = (
      corruptions.corrupt_image(image, name, 3, np.array(seed, np.int32))
      for seed in ((0, 1), (1, 0))
    )
    assert (distance(one, other) > 0) == (name not in corruptions._FIXED), name


def read(pp, batch_size, process_count=1):
  parts = []
  for process in range(process_count):
    batches, _ = input_pipeline.make_eval(
      DATA,
      pp=pp,
      batch_size=batch_size,
      process_index=process,
      process_count=process_count,
    )
    for batch in batches:
      parts += [
        i for i, m in zip(batch["image"], batch["_mask"], strict=True) if m
      ]
  return np.stack(parts)


@pytest.mark.parametrize("name", ["snow", "impulse_noise", "elastic_transform"])
def test_pixels_are_a_function_of_the_place(name):
  pp = f"decode|corrupt({name!r},4)|keep('image')"
  want = read(pp, 1)
  assert want.shape == (11, 32, 32, 3) and want.dtype == np.uint8
  np.testing.assert_array_equal(read(pp, 4), want)
  np.testing.assert_array_equal(read(pp, 6, process_count=2), want)
  clean = read("decode|keep('image')", 4)
  # Each is corrupted in its own way.
  noise = want.astype(int) - clean
  assert len({n.tobytes() for n in noise}) == len(clean)
  # The first alone, by the op's own seed.
  seed = input_pipeline.fold(input_pipeline.make_seed(0), 0, 1)
  got = corruptions.corrupt_image(clean[0], name, 4, seed.numpy())
  np.testing.assert_array_equal(got, want[0])


# Errors.


@pytest.mark.parametrize(
  "args, words",
  [
    ("'rain',1", ["'rain'", "gaussian_noise, shot_noise"]),
    ("'fog',0", ["1 to 5", "got 0"]),
    ("'fog',6", ["1 to 5", "got 6"]),
    ("'fog',True", ["1 to 5", "got True"]),
    ("'fog','1'", ["1 to 5", "got '1'"]),
    ("'fog'", ["severity"]),
  ],
)
def test_arguments(args, words):
  with pytest.raises(ValueError) as e:
    get_preprocess_fn(f"decode|corrupt({args})")
  for word in words:
    assert word in str(e.value)


@pytest.mark.parametrize(
  "image, words",
  [
    (np.zeros((32, 32, 3), np.float32), "float32 of shape"),
    (np.zeros((32, 32, 1), np.uint8), r"uint8 of shape \(32, 32, 1\)"),
    (np.zeros((1, 32, 3), np.uint8), "2 pixels or more"),
    (np.zeros((2, 32, 32, 3), np.uint8), "before unfold_clip"),
  ],
)
def test_images_that_cannot_be_corrupted(image, words):
  fn = get_preprocess_fn("corrupt('contrast',1)")
  with pytest.raises(ValueError, match=words):
    fn({"image": tf.constant(image)}, tf.constant([0, 1]))


def test_a_size_that_is_not_known_in_advance():
  fn = tf.function(get_preprocess_fn("corrupt('contrast',1)"))
  image = tf.TensorSpec([None, None, 3], tf.uint8)
  fn = fn.get_concrete_function({"image": image}, tf.TensorSpec([2], tf.int32))
  seed = tf.constant([0, 1])
  good = fn({"image": tf.zeros([3, 4, 3], tf.uint8)}, seed)
  assert good["image"].shape == (3, 4, 3)
  with pytest.raises(tf.errors.InvalidArgumentError, match="2 pixels or more"):
    fn({"image": tf.zeros([1, 4, 3], tf.uint8)}, seed)


@pytest.mark.parametrize("package", ["imagecorruptions", "cv2", "skimage"])
def test_packages_that_are_missing(package, monkeypatch):
  for name in list(sys.modules):
    if name.partition(".")[0] in ("imagecorruptions", package):
      monkeypatch.delitem(sys.modules, name)
  monkeypatch.delitem(sys.modules, small.__name__)
  monkeypatch.setitem(sys.modules, package, None)
  monkeypatch.delattr("lookup_vit.preprocess.small_corruptions")
  corruptions._libraries.cache_clear()
  with pytest.raises(ValueError) as e:
    get_preprocess_fn("decode|corrupt('contrast',1)")
  corruptions._libraries.cache_clear()
  for word in (package, "pip install -c requirements.lock -e '.[robustness]'"):
    assert word in str(e.value)
