"""Tests of lookup_vit/analysis/fit.py, against rules of what would fit."""

import inspect
import math

import ml_collections
import pytest

from lookup_vit import config_utils, train_step
from lookup_vit.analysis import fit
from tests import small


def config(**fields):
  fields = dict(input__batch_size=64, **fields)
  return config_utils.resolve(small.config(**fields))


def axes_of(c, devices=8):
  """Sizes of the mesh's axes, -1 filled."""
  axes = dict(data=1, fsdp=1, tensor=1) | dict(map(tuple, c.mesh))
  rest = devices // abs(math.prod(axes.values()))
  return {name: rest if n == -1 else n for name, n in axes.items()}


def find(c, fits, kinds=("train",)):
  """By a rule of what fits: `fits(config)`, or `fits(config, kind)`."""
  tried = []
  takes_kind = len(inspect.signature(fits).parameters) > 1

  def memory(c, kind, quick):
    if quick:
      tried.append(c)
    good = fits(c, kind) if takes_kind else fits(c)
    return 1.0 if good else 2.0

  return fit.find_change(c, axes_of(c), kinds, memory, 1.5), tried


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
  ladders = fit.ladders(c, axes_of(c), "train")
  changes = [change for one in ladders for change in one]
  assert not any("model.remat_policy" in change for change in changes)
  assert {m["sharding"] for m in changes if "mesh" in m} == {"fsdp_tensor"}
  assert [m["mesh"] for m in changes if "mesh" in m][0] == [
    ("data", -1),
    ("fsdp", 4),
    ("tensor", 2),
  ]
  assert {m.get("grad_accum_steps") for m in changes} == {None, 4, 8, 16}


def test_of_a_captioner_the_encoder_keeps_less_where_it_is_trained():
  spec = "configs/coco_caption_lookup_b.py:runlocal,frozen="
  for frozen, want in ("true", set()), ("false", {"nothing_saveable"}):
    c = config_utils.resolve(config_utils.load(spec + frozen))
    c.num_classes = 99
    policy = "dots_with_no_batch_dims_saveable"
    c.model.encoder.remat_policy = policy
    ladders = fit.ladders(c, axes_of(c), "train")
    changes = [change for one in ladders for change in one]
    assert changes and not any("model.remat_policy" in x for x in changes)
    field = "model.encoder.remat_policy"
    assert {x[field] for x in changes if field in x} == want
    for change in changes:
      train_step.build_model(fit.changed(c, change))


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


def find_by_memory(memory, room=100.0):
  c = config()
  return fit.find_change(c, axes_of(c), ["train"], memory, room)


def test_what_only_seemed_to_fit_gives_way_to_more():
  def memory(c, kind, quick):
    return 90.0 if c.grad_accum_steps >= (2 if quick else 4) else 150.0

  assert find_by_memory(memory) == {"grad_accum_steps": 4}


def test_a_guess_may_be_above():
  """What it wants for certain decides, unless the guess is hopeless."""
  sizes = {
    "dots_with_no_batch_dims_saveable": (105.0, 99.0),
    "nothing_saveable": (90.0, 85.0),
  }

  def memory(c, kind, quick):
    guess, size = sizes.get(c.model.get("remat_policy"), (300.0, 300.0))
    return guess if quick else size

  weak, strong = sizes
  assert find_by_memory(memory) == {"model.remat_policy": weak}
  assert find_by_memory(memory, 87.0) == {"model.remat_policy": strong}
  assert find_by_memory(memory, 84.0) is None


def test_both_kinds_of_steps():
  """A change for each, unless one serves both."""

  def apart(c, kind):
    if kind == "train":
      return c.grad_accum_steps >= 2
    return (c.evals.test.get("batch_size") or 64) <= 32

  both = ("train", "evaluation")
  change, _ = find(config(), apart, both)
  assert change == {"grad_accum_steps": 2, "evals.test.batch_size": 32}
  change, _ = find(config(), lambda c: c.sharding == "fsdp", both)
  assert change == {"mesh": [("data", -1), ("fsdp", 2)], "sharding": "fsdp"}


@pytest.mark.parametrize(
  "mesh, sharding, first",
  [
    ([("tensor", -1)], "tensor", None),
    ([("data", 2), ("fsdp", -1)], "replicated", [("data", -1), ("fsdp", 2)]),
    ([("data", 2), ("fsdp", -1)], "fsdp", [("data", -1), ("fsdp", 8)]),
    (
      [("tensor", 2), ("data", -1)],
      "tensor",
      [("data", -1), ("fsdp", 2), ("tensor", 2)],
    ),
  ],
)
def test_meshes_are_those_there_can_be(mesh, sharding, first):
  c = config(mesh=mesh, sharding=sharding)
  _, fsdp, *_ = fit.ladders(c, axes_of(c), "train")
  assert [change["mesh"] for change in fsdp][:1] == ([first] if first else [])
  assert all(
    change["sharding"] == ("fsdp_tensor" if "tensor" in sharding else "fsdp")
    for change in fsdp
  )


def test_only_larger_batches_of_evaluation_are_made_smaller():
  c = config(evals__test__batch_size=64)
  c.evals.other = {**c.evals.test, "batch_size": 24}
  ladder, _ = fit.ladders(c, axes_of(c), "evaluation")
  assert ladder == [
    {"evals.test.batch_size": 32},
    {"evals.test.batch_size": 16, "evals.other.batch_size": 16},
    {"evals.test.batch_size": 8, "evals.other.batch_size": 8},
  ]


def test_evaluation_has_a_batch_of_its_own():
  change, _ = find(
    config(),
    lambda c: (c.evals.test.get("batch_size") or 64) <= 16,
    ("evaluation",),
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
