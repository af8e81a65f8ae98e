"""Ops that augment clips: draws, and colours against matplotlib."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import matplotlib.colors
import numpy as np
import pytest
import tensorflow as tf

from lookup_vit.preprocess import augment_ops, get_preprocess_fn

RNG = np.random.default_rng(0)
# Frames of odd size, in the order [height, width, frames, colours].
CLIP = RNG.integers(0, 256, (23, 31, 4, 3), dtype=np.uint8)
FOLDED = CLIP.reshape(23, 31, 12)


def results(pp, image, count, **data):
  """What an op makes of an image with each of `count` seeds."""
  fn = get_preprocess_fn(pp)
  data = {k: tf.constant(v) for k, v in dict(image=image, **data).items()}
  dataset = tf.data.Dataset.range(count).map(
    lambda i: fn(data, tf.stack([i, 9]))
  )
  return list(dataset.as_numpy_iterator())


# --- Scale


def test_scales_are_drawn_for_each_side():
  found = results(
    "jitter_scale(20, 0.5, 2)", np.zeros((23, 31, 6), np.uint8), 400
  )
  sizes = np.array([r["image"].shape[:2] for r in found])
  # At a scale of 1 it is 20 x 27.
  scales = sizes / [20, 27]
  for side in scales.T:
    assert 0.48 <= side.min() < 0.55 and 1.9 < side.max() < 2
    assert abs(side.mean() - 1.25) < 0.1
  assert abs(np.corrcoef(scales.T)[0, 1]) < 0.2


def test_scales_of_both_sides_may_be_one():
  pp = "jitter_scale(200, 1, 1.25, keep_ratio=True)"
  found = results(pp, np.zeros((62, 46, 3), np.uint8), 40)
  sizes = np.array([r["image"].shape[:2] for r in found])
  assert 200 <= sizes[:, 1].min() < 215 and 235 < sizes[:, 1].max() <= 250
  np.testing.assert_allclose(sizes[:, 0] / sizes[:, 1], 62 / 46, atol=0.01)


@pytest.mark.parametrize("size", [(23, 31), (31, 23), (20, 20), (5, 7)])
def test_a_scale_of_one_is_resize_small(size):
  image = RNG.integers(0, 256, (*size, 6), dtype=np.uint8)
  [got] = results("jitter_scale(20, 1, 1)", image, 1)
  [want] = results("resize_small(20, 'bilinear')", image, 1)
  np.testing.assert_array_equal(got["image"], want["image"])


def test_a_crop_fits_into_the_least_scale():
  for size in (32, 57, 224):
    resize = f"jitter_scale({-(-size * 8 // 7)}, 0.9, 0.9)"
    image = np.zeros((11, 13, 3), np.uint8)
    [got] = results(f"{resize}|random_crop({size})", image, 1)
    assert got["image"].shape == (size, size, 3)


# --- Colours

# Brightness, saturation, contrast, hue that change nothing.
NEUTRAL = dict(brightness=0.0, saturation=1.0, contrast=1.0, hue=0.0)
PIXELS = CLIP.astype(np.float64) / 255


def adjusted(**amounts):
  pixels = tf.constant(FOLDED, tf.float32) / 255
  got = augment_ops.adjust_colors(pixels, **NEUTRAL | amounts)
  return got.numpy().reshape(CLIP.shape)


@pytest.mark.parametrize("delta", [0.0, 0.12, -0.2])
def test_brightness(delta):
  want = np.clip(PIXELS + delta, 0, 1)
  np.testing.assert_allclose(adjusted(brightness=delta), want, atol=2e-6)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
def test_contrast_is_about_the_mean_of_each_frame(factor):
  mean = PIXELS.mean((0, 1), keepdims=True)
  want = np.clip(mean + factor * (PIXELS - mean), 0, 1)
  np.testing.assert_allclose(adjusted(contrast=factor), want, atol=2e-6)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
def test_saturation(factor):
  hsv = matplotlib.colors.rgb_to_hsv(PIXELS)
  hsv[..., 1] = np.clip(hsv[..., 1] * factor, 0, 1)
  want = matplotlib.colors.hsv_to_rgb(hsv)
  np.testing.assert_allclose(adjusted(saturation=factor), want, atol=2e-5)


@pytest.mark.parametrize("delta", [0.2, -0.07, 0.5])
def test_hue(delta):
  hsv = matplotlib.colors.rgb_to_hsv(PIXELS)
  hsv[..., 0] = (hsv[..., 0] + delta) % 1
  want = matplotlib.colors.hsv_to_rgb(hsv)
  np.testing.assert_allclose(adjusted(hue=delta), want, atol=2e-5)


def test_the_order_is_brightness_saturation_contrast_hue():
  hsv = matplotlib.colors.rgb_to_hsv(np.clip(PIXELS - 0.1, 0, 1))
  hsv[..., 1] *= 0.7
  want = matplotlib.colors.hsv_to_rgb(hsv)
  mean = want.mean((0, 1), keepdims=True)
  want = np.clip(mean + 1.4 * (want - mean), 0, 1)
  hsv = matplotlib.colors.rgb_to_hsv(want)
  hsv[..., 0] = (hsv[..., 0] + 0.1) % 1
  want = matplotlib.colors.hsv_to_rgb(hsv)
  got = adjusted(brightness=-0.1, saturation=0.7, contrast=1.4, hue=0.1)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_one_change_is_drawn_for_all_frames():
  grey = np.full((5, 6, 9), 100, np.uint8)
  pp = "color_jitter(1, 0, 0.1, 0, 0, 0)"
  values = [r["image"] for r in results(pp, grey, 200)]
  # Brightness alone: the same for all pixels, uniform in 100 +- 25.5.
  assert all(len(np.unique(v)) == 1 for v in values)
  levels = np.array([v.flat[0] for v in values], int) - 100
  assert -26 <= levels.min() < -20 and 20 < levels.max() <= 26
  assert abs(levels.mean()) < 4


def test_probabilities_of_the_changes():
  found = [r["image"] for r in results("color_jitter(0.8, 0.1)", FOLDED, 400)]
  same = np.mean([(f == FOLDED).all() for f in found])
  grey = [f.reshape(CLIP.shape) for f in found]
  grey = np.mean([(g == g[..., :1]).all() for g in grey])
  # Expected are 0.2 * 0.9 and 0.1, with deviations of 0.019 and 0.015.
  assert 0.1 < same < 0.26
  assert 0.04 < grey < 0.17
  [never] = results("color_jitter(0, 0)", FOLDED, 1)
  np.testing.assert_array_equal(never["image"], FOLDED)


def test_dropped_colours_leave_the_luma():
  [got] = results("color_jitter(p=0, p_drop=1)", FOLDED, 1)
  luma = CLIP @ np.array([0.2989, 0.587, 0.114])
  got = got["image"].reshape(CLIP.shape).astype(float)
  np.testing.assert_allclose(got, luma[..., None].repeat(3, -1), atol=0.51)


# --- Flips that swap labels


def test_flips_swap_labels():
  pp = "flip_lr_swap((3, 7), (1, 2))"
  swapped = {3: 7, 7: 3, 1: 2, 2: 1, 0: 0, 5: 5}
  for label, other in swapped.items():
    flipped = 0
    for r in results(pp, FOLDED, 60, label=label):
      if (r["image"] == FOLDED).all():
        assert r["label"] == label
      else:
        np.testing.assert_array_equal(r["image"], FOLDED[:, ::-1])
        assert r["label"] == other
        flipped += 1
    assert 15 < flipped < 45


# --- What is refused


@pytest.mark.parametrize(
  ("pp", "match"),
  [
    ("jitter_scale(0)", "positive integer"),
    ("jitter_scale(20, 0, 1)", "0 < scale_min <= scale_max, got 0 and 1"),
    ("jitter_scale(20, 2, 1)", "0 < scale_min <= scale_max, got 2 and 1"),
    ("jitter_scale(20, method='cubic')", "no method 'cubic'"),
    ("color_jitter(1.2)", r"p in \[0, 1\], got 1.2"),
    ("color_jitter(p_drop=-1)", r"p_drop in \[0, 1\], got -1"),
    ("color_jitter(hue=0.6)", r"hue in \[0, 0.5\], got 0.6"),
    ("color_jitter(contrast='a')", "contrast in .* got 'a'"),
    ("flip_lr_swap", "pairs of labels"),
    ("flip_lr_swap(1, 2)", "pairs of labels"),
    ("flip_lr_swap((1, 2, 3))", "pairs of labels"),
    ("flip_lr_swap((1, 2), (2, 3))", "all different"),
    ("flip_lr_swap((1, 'b'))", "pairs of labels"),
  ],
)
def test_wrong_arguments(pp, match):
  with pytest.raises(ValueError, match=match):
    get_preprocess_fn(pp)


def test_wrong_data():
  color = get_preprocess_fn("color_jitter")
  for image in (FOLDED.astype(np.float32), FOLDED[..., :4], CLIP):
    with pytest.raises(ValueError, match="color_jitter wants an? .*image"):
      color({"image": tf.constant(image)}, [0, 0])
  flip = get_preprocess_fn("flip_lr_swap((0, 1))")
  with pytest.raises(ValueError, match="'label'"):
    flip({"image": tf.constant(FOLDED)}, [0, 0])
  for label in (0.5, [1, 0]):
    with pytest.raises(ValueError, match="an integer as 'label'"):
      flip({"image": tf.constant(FOLDED), "label": tf.constant(label)}, [0, 0])
