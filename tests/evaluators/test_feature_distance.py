"""Tests of lookup_vit/evaluators/feature_distance.py, on real digits."""

import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data.digits import Builder
from lookup_vit import config_utils, train_step
from lookup_vit.evaluators import feature_distance
from lookup_vit.preprocess.corruptions import corrupt_image
from tests.models import common

COUNT = 9
FIELDS = dict(
  data=dict(module="data.digits", split=f"test[:{COUNT}]"),
  pp_fn="decode|value_range(-1,1)|keep('image','label')",
  corruptions=["contrast", "brightness"],
  severities=[1, 4],
)


@pytest.fixture(scope="module")
def program():
  config = dict(
    model_name="lookup_vit",
    num_classes=10,
    model=dict(variant="mu/8", depth=1, grid=(2, 2)),
    grids=[(2, 2), (1, 3)],
    input=dict(
      data=FIELDS["data"],
      pp=FIELDS["pp_fn"],
      image_size=(32, 32),
      batch_size=4,
    ),
    lr=1e-3,
    total_steps=2,
  )
  return train_step.Program(config_utils.resolve(config), 2)


@pytest.fixture(scope="module")
def params(program):
  return common.random_like(program.state_shapes.params, seed=0)


def test_distances_by_all_pairs():
  rng = np.random.default_rng(0)
  clean, other = rng.normal(2, 3, (2, 6, 5)).astype(np.float32)
  x = clean.astype(np.float64)
  pairs = [np.sum((a - b) ** 2) for a in x for b in x if a is not b]
  pairs = np.sum(pairs) / (6 * 5)
  want = np.linalg.norm(other - x, axis=-1) / np.sqrt(pairs)
  got = feature_distance.distances(clean, other)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_against_single_images(program, params, tmp_path):
  evaluator = feature_distance.Evaluator(program, "moved", **FIELDS)
  got = dict(evaluator.run(params, workdir=str(tmp_path)))
  builder = Builder()
  builder.download_and_prepare()
  examples = list(tfds.as_numpy(builder.as_dataset(split="test")))[:COUNT]
  images = [e["image"] for e in examples]
  histograms = json.loads(
    (tmp_path / "feature_distance_moved.json").read_text()
  )
  assert len(histograms) == 4
  for grid, text in (((2, 2), "2x2"), ((1, 3), "1x3")):

    @jax.jit
    def one(image, grid=grid):
      _, out = program.model.apply({"params": params}, image[None], grid=grid)
      return out["pre_logits_compressed"][0]

    def features(images, one=one):
      scaled = [x.astype(np.float32) / 127.5 - 1 for x in images]
      return np.stack([np.asarray(one(x)) for x in scaled])

    clean, means = features(images), []
    for severity in (1, 4):
      values = []
      # These draw nothing.
      for name in ("brightness", "contrast"):
        moved = [corrupt_image(x, name, severity, 0) for x in images]
        values.append(feature_distance.distances(clean, features(moved)))
      values = np.concatenate(values)
      means.append(values.mean())
      assert got[f"moved/{text}/severity_{severity}"] == pytest.approx(
        means[-1], rel=1e-3
      )
      [shares] = [
        h["shares"]
        for h in histograms
        if (h["grid"], h["severity"]) == (text, severity)
      ]
      assert sum(shares) == pytest.approx(1)
      middles = (feature_distance.BINS[1:] + feature_distance.BINS[:-1]) / 2
      assert middles @ shares == pytest.approx(
        np.minimum(values, 2).mean(), abs=0.011
      )
    assert got[f"moved/{text}/distance"] == pytest.approx(
      np.mean(means), rel=1e-3
    )
    assert means[0] < means[1]


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(severities=[6]), "moved.severities=[6]: want a list of some of 1"),
    (dict(corruptions=["rain"]), "moved.corruptions=['rain']"),
    (dict(pp_fn="decode|keep('image','label')"), "config.evals.moved"),
    (
      dict(data=dict(module="data.digits", split="test[:1]")),
      "moved.data has one example",
    ),
  ],
)
def test_what_cannot_work_is_said_first(program, fields, words):
  with pytest.raises(ValueError) as e:
    feature_distance.Evaluator(program, "moved", **FIELDS | fields)
  assert words in str(e.value)
