"""Tests of lookup_vit/evaluators/speed.py, with a clock that is made up."""

import types

import numpy as np
import pytest

from lookup_vit import config_utils, train_step
from lookup_vit.evaluators import speed
from tests.models import common

CONFIG = dict(
  model_name="lookup_vit",
  num_classes=3,
  model=dict(variant="mu/8", depth=1, grid=(2, 2)),
  grids=[(2, 2), (1, 2)],
  input=dict(pp="", image_size=(16, 24), batch_size=4),
  lr=1e-3,
  total_steps=2,
)


@pytest.fixture(scope="module")
def program():
  return train_step.Program(config_utils.resolve(CONFIG), 2)


def test_milliseconds_for_an_image(program, monkeypatch):
  params = common.random_like(program.state_shapes.params, seed=0)
  # Seconds that each call takes: the first of each grid is left out.
  took = [9.0, 9.0, 0.4, 0.04, 0.8, 0.08, 0.6, 0.06]
  ticks = [t for second, t in enumerate(took) for t in (second, second + t)]
  clock = types.SimpleNamespace(perf_counter=iter(ticks).__next__)
  monkeypatch.setattr(speed, "time", clock)
  seen = []
  evaluator = speed.Evaluator(program, "speed", rounds=3, batch_size=2)
  got = dict(evaluator.run(params, check=lambda: seen.append(1)))
  want = {"2x2": [0.4, 0.8, 0.6], "1x2": [0.04, 0.08, 0.06]}
  for grid, seconds in want.items():
    ms = 1000 * np.array(seconds) / 2
    assert got.pop(f"speed/{grid}/ms") == pytest.approx(np.median(ms))
    assert got.pop(f"speed/{grid}/ms_min") == pytest.approx(ms.min())
    assert got.pop(f"speed/{grid}/ms_max") == pytest.approx(ms.max())
  assert not got and len(seen) == 4
  assert not list(evaluator.batches())  # No images to look at.


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(rounds=0), "config.evals.speed.rounds=0"),
    (dict(batch_size=-1), "config.evals.speed.batch_size=-1"),
    (dict(grids=[(5, 5)]), "config.evals.speed.grids"),
  ],
)
def test_what_cannot_work_is_said_first(program, fields, words):
  with pytest.raises(ValueError) as e:
    speed.Evaluator(program, "speed", **fields)
  assert words in str(e.value)
