"""Tests of lookup_vit/predict.py, from checkpoints of small runs."""

import numpy as np
import pytest

import lookup_vit
from lookup_vit import checkpoints, config_utils, input_pipeline, train
from lookup_vit.train_step import build_model
from tests import small

GRID = (2, 2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  config = small.config(total_steps=2, evals__test__data__split="test[:5]")
  train.train_and_evaluate(config, workdir)
  return workdir


@pytest.fixture(scope="module")
def predictor(workdir):
  return lookup_vit.load(workdir, batch_size=4)


@pytest.fixture(scope="module")
def apply(workdir):
  """The model itself: logits and what else it returns."""
  params, _, config = checkpoints.load_params(workdir)
  model = build_model(config)

  def apply(images, **fields):
    return model.apply({"params": params}, images, **fields)

  return apply


@pytest.fixture(scope="module")
def evaluated(workdir):
  """The images as the run's evaluator sees them."""
  fields = config_utils.read_workdir(workdir).evals.test
  examples = input_pipeline.examples(fields.data.to_dict(), pp=fields.pp_fn)
  return np.stack([np.asarray(example["image"]) for example in examples])


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_predictions_of_arrays(predictor, apply, evaluated):
  for grid in (None, (2, 2), (1, 3), (3, 1)):
    found = predictor.predict(evaluated, grid)
    logits, _ = apply(evaluated, grid=grid or GRID)
    want = softmax(np.asarray(logits, np.float64))
    np.testing.assert_allclose(found.probabilities, want, 1e-4, 1e-6)
    assert found.grid == (grid or GRID) and found.captions is None
