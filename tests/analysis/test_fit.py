"""Tests of lookup_vit/analysis/fit.py, against rules of what would fit."""

import ml_collections
import pytest

from lookup_vit import config_utils
from lookup_vit.analysis import fit
from tests import small


def config(**fields):
  fields = dict(input__batch_size=64, **fields)
  return config_utils.resolve(small.config(**fields))


def find(c, fits, devices=8, kind="train"):
  tried = []

  def note(c, quick):
    if quick:
      tried.append(c)
    return fits(c)

  return fit.find_change(c, devices, kind, note), tried


def test_the_weakest_change_of_the_first_kind_that_helps():
  change, tried = find(config(), lambda c: "remat_policy" in c.model)
  policy = "dots_with_no_batch_dims_saveable"
  assert change == {"model.remat_policy": policy}
  # The stronger first: were it too weak, the weaker need not be tried.
  names = [c.model.remat_policy for c in tried]
  assert names == ["nothing_saveable", policy]

  change, tried = find(config(), lambda c: c.mesh[-1][1] >= 4)
  assert change == {"mesh": [("data", -1), ("fsdp", 4)], "sharding": "fsdp"}
  assert len(tried) == 1 + 3


def test_what_is_in_force_is_built_upon():
  c = config(
    model__remat_policy="nothing_saveable",
    mesh=[("data", -1), ("fsdp", 2), ("tensor", 2)],
    sharding="fsdp_tensor",
    grad_accum_steps=2,
  )
  changes = [change for one in fit.ladders(c, 8, "train") for change in one]
  assert not any("model.remat_policy" in change for change in changes)
  assert {m["sharding"] for m in changes if "mesh" in m} == {"fsdp_tensor"}
  assert [m["mesh"] for m in changes if "mesh" in m][0] == [
    ("data", -1),
    ("fsdp", 4),
    ("tensor", 2),
  ]
  assert {m.get("grad_accum_steps") for m in changes} == {None, 4, 8, 16}


def test_what_cannot_be_is_passed_over():
  def fits(c):
    if c.grad_accum_steps > 2:
      raise ValueError("config.input.batch_size does not divide")
    return c.grad_accum_steps == 2

  change, _ = find(config(), fits)
  assert change == {"grad_accum_steps": 2}


def test_combinations_and_nothing():
  def fits(c):
    return c.sharding == "fsdp" and c.model.get("remat_policy") is not None

  change, _ = find(config(), fits)
  assert change == {
    "model.remat_policy": "nothing_saveable",
    "mesh": [("data", -1), ("fsdp", 2)],
    "sharding": "fsdp",
  }
  before = config()
  change, tried = find(before, lambda c: False)
  assert change is None
  assert len(tried) < 12
  assert before == config()  # It is copied.


def test_what_only_seemed_to_fit_gives_way_to_more():
  def fits(c, quick):
    return c.grad_accum_steps >= (2 if quick else 4)

  change = fit.find_change(config(), 8, "train", fits)
  assert change == {"grad_accum_steps": 4}


def test_evaluation_has_a_batch_of_its_own():
  change, _ = find(
    config(),
    lambda c: (c.evals.test.get("batch_size") or 64) <= 16,
    kind="evaluation",
  )
  assert change == {"evals.test.batch_size": 16}


def test_lines_are_those_of_a_config():
  change = {"mesh": [("data", -1), ("fsdp", 4)], "model.remat_policy": "x"}
  scope = {"config": ml_collections.ConfigDict({"model": {}})}
  exec("\n".join(fit.as_lines(change)), scope)
  assert scope["config"].model.remat_policy == "x"
  assert list(scope["config"].mesh) == [("data", -1), ("fsdp", 4)]
  with pytest.raises(KeyError):
    fit.changed(config(), {"nothing.here": 1})
