"""Tests of lookup_vit/analysis/attention_maps.py."""

import jax
import numpy as np
import pytest
from PIL import Image

from lookup_vit import config_utils, train_step
from lookup_vit.analysis import attention_maps

# Neither the images nor the lookup grid (4, 6) are square.
SIZE, GRID = (16, 24), (2, 3)


@pytest.fixture(scope="module")
def program():
  return train_step.Program(
    config_utils.resolve(
      dict(
        model_name="lookup_vit",
        num_classes=3,
        model=dict(variant="mu/4", depth=2, grid=GRID, scan=True),
        input=dict(pp="", image_size=SIZE, batch_size=4),
        lr=1e-3,
        total_steps=2,
      )
    ),
    2,
  )


@pytest.fixture(scope="module")
def params(program):
  """Random parameters whose attention is far from uniform."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (rng.standard_normal(x.shape) * 0.4).astype(np.float32),
    program.state_shapes.params,
  )


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (3, *SIZE, 3)).astype(np.float32)


def test_attention(program, params, images):
  maps = attention_maps.attention(program, params, images, GRID)
  assert maps.shape == (3, 6, 4, 6)
  assert maps.min() >= 0
  np.testing.assert_allclose(maps.sum((2, 3)), 1, 1e-5)
  # Not uniform, and another for each image and compressed token.
  assert maps.max() > 3 / 24
  flat = maps.reshape(18, 24)
  assert len(np.unique(np.round(flat, 4), axis=0)) == 18

  # The last of two blocks, the mean over heads, in the order of the tokens.
  _, out = program.model.apply(
    {"params": params}, images, grid=GRID, capture=("attention",)
  )
  attention = np.asarray(out["attention"], np.float64)
  assert attention.shape == (2, 3, 2, 6, 24)
  for b in range(3):
    for m in range(6):
      for r in range(4):
        for c in range(6):
          want = attention[1, b, :, m, 6 * r + c].mean()
          np.testing.assert_allclose(maps[b, m, r, c], want, 1e-4, 1e-6)


def test_write(program, params, images, tmp_path):
  path = str(tmp_path / "maps.png")
  attention_maps.write(path, program, params, images, GRID)
  picture = np.asarray(Image.open(path).convert("RGB"), np.float64)
  # 1.2 x 1.25 inches for each of 3 x 7 panels, half an inch for the title.
  assert picture.shape == (
    pytest.approx(150 * (1.25 * 3 + 0.5), abs=1),
    pytest.approx(150 * 1.2 * 7, abs=1),
    3,
  )
  # Each of the panels has something other than white in it.
  for rows in np.array_split(picture[75:], 3):
    for panel in np.array_split(rows, 7, axis=1):
      assert np.mean(np.ptp(panel, axis=2) > 0) > 0.1

  # Other parameters make another picture of the same inputs.
  other = str(tmp_path / "other.png")
  flipped = jax.tree.map(lambda x: -x, params)
  attention_maps.write(other, program, flipped, images, GRID)
  changed = np.asarray(Image.open(other).convert("RGB")) != picture
  assert not changed[90:, : 1260 // 7 - 20].any()
  assert changed[90:, 1260 // 7 :].any()


def test_another_grid_than_the_model_s_own(program, params, images):
  maps = attention_maps.attention(program, params, images[:1], (1, 1))
  assert maps.shape == (1, 1, 4, 6)
  np.testing.assert_allclose(maps.sum(), 1, 1e-5)


# Clips: 6 frames in tubelets of 2, a lookup grid of (3, 4, 6).
CLIP, CLIP_GRID = (6, 16, 24), (2, 2, 3)


@pytest.fixture(scope="module")
def of_clips():
  """A program, random parameters, and two clips."""
  program = train_step.Program(
    config_utils.resolve(
      dict(
        model_name="lookup_vit",
        num_classes=3,
        model=dict(variant="mu/2x4", depth=1, grid=CLIP_GRID),
        input=dict(pp="", image_size=CLIP, batch_size=4),
        lr=1e-3,
        total_steps=2,
      )
    ),
    2,
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (rng.standard_normal(x.shape) * 0.4).astype(np.float32),
    program.state_shapes.params,
  )
  return program, params, rng.uniform(-1, 1, (2, *CLIP, 3)).astype(np.float32)


def test_attention_over_time(of_clips):
  program, params, clips = of_clips
  maps = attention_maps.attention(program, params, clips, CLIP_GRID)
  assert maps.shape == (2, 12, 3, 4, 6)
  _, out = program.model.apply(
    {"params": params}, clips, grid=CLIP_GRID, capture=("attention",)
  )
  want = np.asarray(out["attention"], np.float64)[-1].mean(1)
  np.testing.assert_allclose(maps.reshape(2, 12, 72), want, 1e-4, 1e-6)


def test_write_clips(of_clips, tmp_path, monkeypatch):
  """Maps that are known come out at the place and time where they are."""
  program, params, clips = of_clips
  maps = np.zeros((2, 12, 3, 4, 6), np.float32)
  # The first token reads one lookup token of the second slice.
  maps[:, 0, 1, 3, 5] = 1
  maps[:, 1:] = 1 / 72
  monkeypatch.setattr(attention_maps, "attention", lambda *args: maps)
  drawn = []
  monkeypatch.setattr(
    attention_maps.plt.Axes,
    "imshow",
    lambda self, x, **kwargs: drawn.append((np.asarray(x), kwargs)),
  )
  path = str(tmp_path / "clips.png")
  chosen = [(0, 0, 0), (1, 1, 2)]
  attention_maps.write_clips(path, program, params, clips, CLIP_GRID, chosen)
  # For each clip three frames, and for each token and slice a frame and a map.
  assert len(drawn) == 2 * (3 + 2 * 3 * 2)
  for t in range(3):  # Frames in the middle of the tubelets.
    want = (clips[0, 2 * t + 1] + 1) / 2
    np.testing.assert_allclose(drawn[t][0], want, atol=1e-6)
  of_token = drawn[3:9]
  for t, (one, kwargs) in enumerate(of_token[1::2]):
    assert one.shape == (4, 6) and kwargs["vmax"] == 1
    assert one.sum() == (t == 1)
  assert Image.open(path).size[0] == pytest.approx(150 * 3.3, abs=1)


def test_clips_of_a_factorised_encoder(tmp_path):
  """Each slice has maps of its own."""
  program = train_step.Program(
    config_utils.resolve(
      dict(
        model_name="factorised",
        num_classes=3,
        model=dict(
          variant="mu/2x4",
          spatial="lookup_vit",
          depth=1,
          temporal_depth=1,
          grid=GRID,
        ),
        input=dict(pp="", image_size=CLIP, batch_size=4),
        lr=1e-3,
        total_steps=2,
      )
    ),
    2,
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (rng.standard_normal(x.shape) * 0.4).astype(np.float32),
    program.state_shapes.params,
  )
  clips = rng.uniform(-1, 1, (2, *CLIP, 3)).astype(np.float32)
  maps = attention_maps.attention(program, params, clips, GRID)
  assert maps.shape == (2, 6, 3, 4, 6)
  np.testing.assert_allclose(maps.sum((3, 4)), 1, 1e-5)
  _, out = program.model.apply(
    {"params": params}, clips, grid=GRID, capture=("attention",)
  )
  want = np.asarray(out["attention"], np.float64)[-1].mean(2)
  for t in range(3):
    np.testing.assert_allclose(
      maps[:, :, t].reshape(2, 6, 24), want[:, t], 1e-4, 1e-6
    )
  path = tmp_path / "clips.png"
  attention_maps.write_clips(str(path), program, params, clips, GRID)
  assert path.stat().st_size > 1000


def test_chosen_tokens(of_clips, tmp_path):
  program, params, clips = of_clips
  path = str(tmp_path / "clips.png")
  attention_maps.write_clips(path, program, params, clips[:1], CLIP_GRID)
  picture = np.asarray(Image.open(path).convert("RGB"))
  assert np.mean(np.ptp(picture, axis=2) > 0) > 0.1
  for grid in [(2, 2, 3), (1, 1, 1), (4, 5, 5)]:
    places = attention_maps.evenly_spaced(grid, 4)
    assert len(set(places)) == len(places) == min(4, np.prod(grid))
    assert places == sorted(places)
    assert np.all(np.asarray(places) < grid)
  for grid in [(4, 2, 2), (8, 7, 7), (5, 5)]:
    # Along every axis, in more places than one.
    places = np.array(attention_maps.evenly_spaced(grid, 4))
    assert np.all(places.std(0) > 0)
  assert len(set(places[:, 0])) == len(set(places[:, 1])) == 4
  assert attention_maps.evenly_spaced((4, 1, 1), 4) == [
    (t, 0, 0) for t in range(4)
  ]
  for place in [(2, 0, 0), (0, 0), (0, -1, 0)]:
    with pytest.raises(ValueError, match="no compressed token"):
      attention_maps.write_clips(
        path, program, params, clips, CLIP_GRID, [place]
      )
