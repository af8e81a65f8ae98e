"""Tests of configs/evals_imagenet.py; test_lookalikes.py runs them all."""

import pytest

from configs import evals_imagenet


def test_arguments():
  evals = evals_imagenet.get_config()
  assert set(evals) == {"val", "real", "v2", "sketch", "a", "r", "c", "o"}
  for evaluator in evals.values():
    assert evaluator.batch_size is None
    assert "resize_small(256)|central_crop(224)" in evaluator.pp_fn
  assert "resize(224," in evals.c.corrupted_pp_fn
  evals = evals_imagenet.get_config("res=384,batch=64,on_the_fly")
  for evaluator in evals.values():
    assert evaluator.batch_size == 64
    assert "central_crop(384)" in evaluator.pp_fn
  assert "corrupted" not in evals.c and "corrupted_pp_fn" not in evals.c


def test_unknown_argument():
  with pytest.raises(ValueError, match="Unknown config argument 'size'"):
    evals_imagenet.get_config("size=3")
