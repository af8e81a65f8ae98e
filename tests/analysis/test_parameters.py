"""Tests of lookup_vit/analysis/parameters.py."""

import jax
import numpy as np
import pytest

from lookup_vit.analysis import parameters
from lookup_vit.models import lookup_vit
from tests.programs import Program


@pytest.fixture(scope="module")
def params():
  model = lookup_vit.Model(10, "mu/8", depth=3, grid=(2, 2))
  images = np.zeros((1, 32, 32, 3), np.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def _cells(text):
  return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_rows_add_up(depth, params):
  leaves = jax.tree.leaves(params)
  rows = parameters.rows(params, depth)
  assert sum(row.parameters for row in rows) == sum(x.size for x in leaves)
  assert sum(row.arrays for row in rows) == len(leaves)
  assert all(row.path.count("/") < depth for row in rows)
  assert len({row.path for row in rows}) == len(rows)


def test_modules_that_are_alike_are_a_row(params):
  rows = {row.path: row for row in parameters.rows(params, 2)}
  mlp = rows["encoderblock_0..2/lookup_mlp"]
  hidden = 32 // 2
  assert mlp.parameters == 3 * (2 * 32 * hidden + hidden + 32)
  assert (mlp.arrays, mlp.shape) == (3 * 4, None)
  assert rows["pos_embedding"] == parameters.Row(
    "pos_embedding", 1, (4, 4, 32), 4 * 4 * 32
  )
  every = {row.path: row for row in parameters.rows(params, 9)}
  kernel = every["encoderblock_0..2/mhbc/query/kernel"]
  assert (kernel.arrays, kernel.shape) == (3, (32, 32))


def test_modules_of_other_shapes_or_numbers_stay_apart():
  def array(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)

  tree = {
    "conv_0": {"kernel": array(3, 4)},
    "conv_1": {"kernel": array(4, 4)},
    "conv_2": {"kernel": array(4, 4)},
    "odd_1": array(2),
    "odd_3": array(2),
    "only_0": array(),
  }
  rows = {row.path: row for row in parameters.rows(tree, 1)}
  assert {path: row.parameters for path, row in rows.items()} == {
    "conv_0": 12,
    "conv_1..2": 32,
    "odd_1": 2,
    "odd_3": 2,
    "only_0": 1,
  }
  assert rows["only_0"].shape == ()


def test_table(params):
  text = parameters.table(params, 1)
  found = {row[0]: row[1:] for row in _cells(text)}
  total = sum(x.size for x in jax.tree.leaves(params))
  assert found["all"] == [
    str(len(jax.tree.leaves(params))),
    "-",
    f"{total:,}",
    "100.0",
  ]
  assert found["pos_embedding"][:3] == ["1", "4x4x32", "512"]
  shares = [float(row[-1]) for name, row in found.items() if name != "all"]
  assert sum(shares) == pytest.approx(100, abs=0.3)


def test_depth_of_none(params):
  with pytest.raises(ValueError, match="depth=0: want an integer >= 1"):
    parameters.table(params, 0)


def test_program():
  process = Program(
    *("-m", "lookup_vit.analysis.parameters", "--depth=1"),
    # For eight chips, of which none is here.
    "--config=configs/in1k_lookup_b.py:variant=H/14",
  )
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  found = {row[0]: row[1:] for row in _cells(out)}
  assert found["pos_embedding"][1] == "16x16x1280"
  assert "encoderblock" in found and "head_lookup" in found
