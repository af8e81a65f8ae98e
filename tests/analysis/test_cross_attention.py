"""Tests of lookup_vit/analysis/cross_attention.py, on images."""

import jax
import numpy as np
import pytest

from lookup_vit import config_utils, train_step
from lookup_vit.analysis import cross_attention
from tests.models import common

# Neither the images nor the lookup grid (4, 6) are square.
SIZE, GRID = (16, 24), (2, 3)


def make_program(**fields):
  base = dict(
    model_name="lookup_vit",
    num_classes=3,
    input=dict(pp="", image_size=SIZE, batch_size=4),
    lr=1e-3,
    total_steps=2,
  )
  return train_step.Program(config_utils.resolve(base | fields), 2)


@pytest.fixture(scope="module")
def program():
  model = dict(variant="mu/4", depth=3, grid=GRID, scan=True)
  return make_program(model=model)


@pytest.fixture(scope="module")
def params(program):
  return common.random_like(program.state_shapes.params)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (2, *SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def captured(program, params, images):
  """What the model itself says, `[block, image, head, token, lookup token]`."""
  apply = jax.jit(
    lambda params, images: program.model.apply(
      {"params": params}, images, grid=GRID, capture=("attention",)
    )
  )
  return np.asarray(apply(params, images)[1]["attention"], np.float64)


def test_last_block_and_mean_of_heads(program, params, images, captured):
  maps = cross_attention.maps(program, params, images, GRID)
  assert maps.shape == (2, 1, 1, 6, 4, 6)
  assert maps.min() >= 0
  np.testing.assert_allclose(maps.sum((4, 5)), 1, 1e-5)
  for b in range(2):
    for m in range(6):
      for r in range(4):
        for c in range(6):
          want = captured[2, b, :, m, 6 * r + c].mean()
          np.testing.assert_allclose(maps[b, 0, 0, m, r, c], want, 1e-4)
  # Not uniform, and another for each image and compressed token.
  assert maps.max() > 1.5 / 24
  assert len(np.unique(np.round(maps.reshape(12, 24), 4), axis=0)) == 12


def test_blocks_and_heads(program, params, images, captured):
  maps = cross_attention.maps(
    program, params, images, GRID, blocks=[0, -1, 1, -3], heads=(1, 0, -1)
  )
  assert maps.shape == (2, 4, 3, 6, 4, 6)
  for i, block in enumerate([0, 2, 1, 0]):
    for j, head in enumerate([1, 0, 1]):
      want = captured[block, :, head].reshape(2, 6, 4, 6)
      np.testing.assert_allclose(maps[:, i, j], want, 1e-4)


def test_another_grid_than_the_model_s_own(program, params, images):
  maps = cross_attention.maps(program, params, images[:1], (1, 1))
  assert maps.shape == (1, 1, 1, 1, 4, 6)
  np.testing.assert_allclose(maps.sum(), 1, 1e-5)


def test_encoder_of_a_captioner(images):
  """Its encoder's maps, not the decoder's."""
  program = make_program(
    model_name="captioner",
    task="captioning",
    num_classes=11,
    model=dict(encoder=dict(variant="mu/4", grid=GRID), depth=1, max_length=5),
  )
  params = common.random_like(program.state_shapes.params)
  found = cross_attention.maps(program, params, images, GRID, heads=[1])
  _, out = program.model.encoder.apply(
    {"params": params["encoder"]}, images, grid=GRID, capture=("attention",)
  )
  want = out["attention"][0, :, 1].reshape(2, 6, 4, 6)
  np.testing.assert_allclose(found[:, 0, 0], want, 1e-4)


def test_mhbc_with_heads_of_its_own(images):
  program = make_program(model=dict(variant="mu/4", grid=GRID, mhbc_heads=4))
  params = common.random_like(program.state_shapes.params)
  maps = cross_attention.maps(program, params, images, GRID, heads=[3])
  assert maps.shape == (2, 1, 1, 6, 4, 6)
  with pytest.raises(ValueError, match="no head 4: there are 4"):
    cross_attention.maps(program, params, images, GRID, heads=[4])


def test_models_without_compressed_tokens(params, images):
  program = make_program(model_name="vit", model=dict(variant="mu/4"))
  with pytest.raises(ValueError, match="'vit'.*no compressed tokens"):
    cross_attention.maps(program, params, images, GRID)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(blocks=[3]), "no block 3: there are 3"),
    (dict(blocks=[0, -4]), "no block -4"),
    (dict(blocks=[]), "at least one block"),
    (dict(heads=[2]), "no head 2: there are 2"),
    (dict(heads=[]), "at least one head"),
    (dict(grid=(5, 1)), "grid .5, 1. does not fit the lookup grid .4, 6."),
    (dict(grid=(2, 2, 2)), "does not fit"),
  ],
)
def test_what_there_is_not(fields, words, program, params, images):
  fields = dict(grid=GRID) | fields
  with pytest.raises(ValueError, match=words):
    cross_attention.maps(program, params, images, **fields)


def test_check_places():
  cross_attention.check_places([(0, 0), (1, 2)], GRID)
  for place in [(2, 0), (0, 3), (0, -1), (0,), (0, 0, 0)]:
    with pytest.raises(ValueError, match="no compressed token"):
      cross_attention.check_places([(0, 0), place], GRID)


def test_evenly_spaced():
  for grid in [(2, 2, 3), (1, 1, 1), (4, 5, 5)]:
    places = cross_attention.evenly_spaced(grid, 4)
    assert len(set(places)) == len(places) == min(4, np.prod(grid))
    assert places == sorted(places)
    assert np.all(np.asarray(places) < grid)
  for grid in [(4, 2, 2), (8, 7, 7), (5, 5)]:
    # Along every axis, in more places than one.
    places = np.array(cross_attention.evenly_spaced(grid, 4))
    assert np.all(places.std(0) > 0)
  assert len(set(places[:, 0])) == len(set(places[:, 1])) == 4
  assert cross_attention.evenly_spaced((4, 1, 1), 4) == [
    (t, 0, 0) for t in range(4)
  ]


def test_same_place():
  """The token whose cell holds the point, found by looking at all of them."""
  for source in range(1, 8):
    for target in range(1, 8):
      for place in range(source):
        # In units of 1 / (2 * source * target).
        centre = (2 * place + 1) * target
        [want] = [
          t
          for t in range(target)
          if 2 * source * t <= centre < 2 * source * (t + 1)
        ]
        found = cross_attention.same_place((place, 0), (source, 1), (target, 1))
        assert found == (want, 0)
  assert cross_attention.same_place((1, 2), (3, 3), (3, 3)) == (1, 2)
