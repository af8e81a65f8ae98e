"""Tests of lookup_vit/analysis/attention_clips.py."""

import numpy as np
import pytest
from PIL import Image

from lookup_vit import config_utils, train_step
from lookup_vit.analysis import attention_clips, cross_attention
from tests.models import common

GRID = (2, 3)

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
  params = common.random_like(program.state_shapes.params)
  return program, params, rng.uniform(-1, 1, (2, *CLIP, 3)).astype(np.float32)


def test_attention_over_time(of_clips):
  program, params, clips = of_clips
  maps = cross_attention.maps(program, params, clips, CLIP_GRID)
  assert maps.shape == (2, 1, 1, 12, 3, 4, 6)
  _, out = program.model.apply(
    {"params": params}, clips, grid=CLIP_GRID, capture=("attention",)
  )
  want = np.asarray(out["attention"], np.float64)[-1].mean(1)
  np.testing.assert_allclose(maps.reshape(2, 12, 72), want, 1e-4, 1e-6)


def test_write_clips(of_clips, tmp_path, monkeypatch):
  """Maps that are known come out at the place and time where they are."""
  program, params, clips = of_clips
  maps = np.zeros((2, 1, 1, 12, 3, 4, 6), np.float32)
  # The first token reads one lookup token of the second slice.
  maps[:, 0, 0, 0, 1, 3, 5] = 1
  maps[:, 0, 0, 1:] = 1 / 72
  monkeypatch.setattr(cross_attention, "maps", lambda *args: maps)
  drawn = []
  monkeypatch.setattr(
    attention_clips.plt.Axes,
    "imshow",
    lambda self, x, **kwargs: drawn.append((np.asarray(x), kwargs)),
  )
  path = str(tmp_path / "clips.png")
  chosen = [(0, 0, 0), (1, 1, 2)]
  attention_clips.write(path, program, params, clips, CLIP_GRID, chosen)
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
  params = common.random_like(program.state_shapes.params)
  clips = rng.uniform(-1, 1, (2, *CLIP, 3)).astype(np.float32)
  maps = cross_attention.maps(program, params, clips, GRID, heads=[1, 0])
  assert maps.shape == (2, 1, 2, 6, 3, 4, 6)
  np.testing.assert_allclose(maps.sum((5, 6)), 1, 1e-5)
  _, out = program.model.apply(
    {"params": params}, clips, grid=GRID, capture=("attention",)
  )
  want = np.asarray(out["attention"])[-1]  # `[batch, slices, heads, m, n]`
  for t in range(3):
    for h in range(2):
      got = maps[:, 0, h, :, t].reshape(2, 6, 24)
      np.testing.assert_allclose(got, want[:, t, 1 - h], 1e-4, 1e-6)
  path = tmp_path / "clips.png"
  attention_clips.write(str(path), program, params, clips, GRID)
  assert path.stat().st_size > 1000


def test_chosen_tokens(of_clips, tmp_path):
  program, params, clips = of_clips
  path = str(tmp_path / "clips.png")
  attention_clips.write(path, program, params, clips[:1], CLIP_GRID)
  picture = np.asarray(Image.open(path).convert("RGB"))
  assert np.mean(np.ptp(picture, axis=2) > 0) > 0.1
  for place in [(2, 0, 0), (0, 0), (0, -1, 0)]:
    with pytest.raises(ValueError, match="no compressed token"):
      attention_clips.write(path, program, params, clips, CLIP_GRID, [place])
