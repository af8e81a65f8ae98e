"""Tests of lookup_vit/models/tokens.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import tokens
from tests.models import common, reference


@pytest.mark.parametrize(
  "source, target",
  [
    ((9,), (4,)),
    ((7, 5), (3, 3)),
    ((7, 5), (1, 1)),
    ((7, 5), (7, 2)),
    ((7, 5), (7, 5)),
    ((4, 6, 5), (2, 6, 3)),
    # Larger: positions of a checkpoint for a larger image.
    ((3, 4), (5, 9)),
    ((5, 4), (3, 7)),
  ],
)
def test_resize(source, target):
  x = np.random.default_rng(0).standard_normal((2, np.prod(source), 3))
  got = tokens.resize_grid(jnp.float32(x), source, target)
  common.check_outputs(dict(x=got), dict(x=reference.resize(x, source, target)))


def test_resize_to_one_token_is_a_weighted_mean():
  """Of a constant, the constant; and every token takes part."""
  np.testing.assert_allclose(
    tokens.resize_grid(jnp.full((1, 35, 2), 3.0), (7, 5), (1, 1)), 3, rtol=1e-6
  )
  weights = jax.grad(lambda x: tokens.resize_grid(x, (7, 5), (1, 1))[0, 0, 0])(
    jnp.zeros((1, 35, 1))
  )
  assert np.all(np.asarray(weights) > 0)


@pytest.mark.parametrize(
  "source, target",
  [
    ((9,), (4,)),
    ((7, 5), (3, 3)),
    ((7, 5), (1, 5)),
    ((6, 4), (6, 2)),
    ((4, 6, 5), (3, 6, 2)),
  ],
)
def test_pool(source, target):
  x = np.random.default_rng(0).standard_normal((2, np.prod(source), 3))
  got = tokens.pool_grid(jnp.float32(x), source, target)
  common.check_outputs(dict(x=got), dict(x=reference.pool(x, source, target)))


def test_pool_is_the_mean_of_blocks_where_the_grid_divides():
  x = np.random.default_rng(0).standard_normal((2, 6, 8, 3)).astype(np.float32)
  got = tokens.pool_grid(x.reshape(2, 48, 3), (6, 8), (2, 4))
  want = x.reshape(2, 2, 3, 4, 2, 3).mean((2, 4)).reshape(2, 8, 3)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_cells_of_a_grid_that_does_not_divide_overlap():
  """Five tokens in three cells: 0 and 1, 1 to 3, 3 and 4, as PyTorch has it."""
  got = tokens.pool_grid(jnp.eye(5)[None], (5,), (3,))[0]
  want = [
    [1 / 2, 1 / 2, 0, 0, 0],
    [0, *[1 / 3] * 3, 0],
    [0, 0, 0, *[1 / 2] * 2],
  ]
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
  "grid, width", [((5,), 7), ((3, 4), 24), ((3, 4), 26), ((2, 3, 4), 20)]
)
def test_sincos(grid, width):
  got = tokens.sincos_positions(grid, width)
  assert got.shape == (*grid, width) and got.dtype == np.float32
  np.testing.assert_allclose(
    got.reshape(-1, width), reference.sincos(grid, width), atol=1e-6
  )
