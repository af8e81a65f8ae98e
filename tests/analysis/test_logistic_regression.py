"""Tests of lookup_vit/analysis/logistic_regression.py, against scikit-learn."""

import jax
import numpy as np
import pytest
from sklearn import linear_model

from lookup_vit import parallel
from lookup_vit.analysis import logistic_regression

CLASSES = 4


@pytest.fixture(scope="module")
def mesh():
  return parallel.make_mesh([("data", -1)], jax.devices()[:1])


def draw(count, seed):
  """Features of very different scales, one that is constant, and classes."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((count, 13))
  truth = np.random.default_rng(0).standard_normal((13, CLASSES))
  labels = np.argmax(x @ truth + rng.gumbel(size=(count, CLASSES)), axis=-1)
  x = x * np.geomspace(0.03, 30, 13) + np.linspace(-5, 5, 13)
  x[:, 4] = 3.0
  return x.astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize("c", [1e-4, 0.03, 2.0, 100.0])
def test_as_scikit_learn(mesh, c):
  x, labels = draw(201, 1)
  examples = logistic_regression.put(x, labels, mesh)
  kernel, bias = logistic_regression.fit(examples, CLASSES, c)
  # To a minimum that float64 and a tight tolerance make sure of.
  mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
  want = linear_model.LogisticRegression(
    C=c, solver="newton-cholesky", tol=1e-8, max_iter=1000
  )
  want.fit(x.astype(np.float64), labels)

  def objective(kernel, bias):
    z = x.astype(np.float64) @ kernel + bias
    z -= z.max(-1, keepdims=True)
    each = np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), labels]
    return each.sum() + np.square(kernel).sum() / (2 * c)

  ours = objective(np.asarray(kernel, np.float64), np.asarray(bias, np.float64))
  theirs = objective(want.coef_.T, want.intercept_)
  assert ours <= theirs * (1 + 1e-5)
  # Standard deviations of the logits' parts; scale and mean play no role.
  scale = np.where(std > 0, std, 1)[:, None]
  np.testing.assert_allclose(
    kernel * scale, want.coef_.T * scale, rtol=0.02, atol=2e-3
  )
  got = (mean @ kernel + bias) - np.mean(mean @ kernel + bias)
  there = mean @ want.coef_.T + want.intercept_
  np.testing.assert_allclose(got, there - there.mean(), rtol=0.02, atol=2e-3)
  test_x, test_labels = draw(500, 2)
  found = logistic_regression.accuracy(
    (kernel, bias), logistic_regression.put(test_x, test_labels, mesh)
  )
  assert abs(found - want.score(test_x, test_labels)) <= 0.002


@pytest.mark.parametrize("c", [1.0, 100.0, 1e4])
def test_classes_that_are_apart(mesh, c):
  """The loss has no least value but for the penalty."""
  rng = np.random.default_rng(5)
  centres = 2 * rng.standard_normal((CLASSES, 13))

  def draw_apart(count, spread):
    labels = rng.integers(CLASSES, size=count).astype(np.int32)
    x = centres[labels] + spread * rng.standard_normal((count, 13))
    return x.astype(np.float32), labels

  x, labels = draw_apart(300, 0.5)
  examples = logistic_regression.put(x, labels, mesh)
  found = logistic_regression.fit(examples, CLASSES, c)
  assert logistic_regression.accuracy(found, examples) == 1
  want = linear_model.LogisticRegression(
    C=c, solver="newton-cholesky", tol=1e-8, max_iter=1000
  )
  want.fit(x.astype(np.float64), labels)
  # Farther from the centres, where some are told wrong.
  x, labels = draw_apart(2000, 2.0)
  got = logistic_regression.accuracy(
    found, logistic_regression.put(x, labels, mesh)
  )
  assert 0.8 < want.score(x, labels) < 1
  assert abs(got - want.score(x, labels)) <= 0.002


def test_padding_does_not_count(mesh):
  x, labels = draw(60, 3)
  a = logistic_regression.put(x[:57], labels[:57], mesh)
  weights = np.ones(60, np.float32)
  weights[57:] = 0
  b = (x, labels, weights)
  for one, other in zip(
    logistic_regression.fit(a, CLASSES, 1.0),
    logistic_regression.fit(b, CLASSES, 1.0),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
  fitted = logistic_regression.fit(a, CLASSES, 1.0)
  best = np.argmax(x[:57] @ np.asarray(fitted[0]) + fitted[1], axis=-1)
  for examples in (a, b):
    got = logistic_regression.accuracy(fitted, examples)
    assert got == pytest.approx(np.mean(best == labels[:57]))


@pytest.mark.parametrize("peak", [-6.0, -3.3, 0.0, 0.7, 5.9, 6.0])
def test_search_finds_a_single_peak(peak):
  tried = []

  def score(c):
    tried.append(np.log10(c))
    return -abs(np.log10(c) - peak)

  best, scores = logistic_regression.search(score)
  assert abs(np.log10(best) - peak) <= 0.0626
  assert len(scores) == len(tried) <= 15
  assert min(tried) >= -6 and max(tried) <= 6
  assert scores[best] == max(scores.values())


@pytest.mark.parametrize(
  ("low", "high", "want"),
  [(-7, 7, 0.0), (-1, 5, 2.0), (-7, -3, -5.0), (3, 7, 5.0)],
)
def test_search_takes_the_middle_of_equal_ones(low, high, want):
  best, scores = logistic_regression.search(
    lambda c: float(low <= np.log10(c) <= high)
  )
  assert scores[best] == 1
  # Those that were tried are not evenly spread.
  assert abs(np.log10(best) - want) <= 1.1


def test_hold_out():
  rest, held = logistic_regression.hold_out(101, 0.1, 5)
  assert len(held) == 10
  assert sorted([*rest, *held]) == list(range(101))
  again = logistic_regression.hold_out(101, 0.1, 5)[1]
  other = logistic_regression.hold_out(101, 0.1, 6)[1]
  assert list(held) == list(again) != list(other)
  with pytest.raises(ValueError, match="0.01 of 7 examples"):
    logistic_regression.hold_out(7, 0.01, 0)
