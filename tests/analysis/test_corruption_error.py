"""Mean corruption errors, by hand and by what is published."""

import numpy as np
import pytest

from lookup_vit.analysis import corruption_error as ce
from lookup_vit.preprocess import corruptions

ERRORS = [[0.2, 0.4], [0.5, 0.7]]
REFERENCE = [[0.5, 0.7], [0.4, 0.4]]


def test_by_hand():
  # (0.6 / 1.2 + 1.2 / 0.8) / 2.
  assert ce.mean_corruption_error(ERRORS, REFERENCE) == pytest.approx(1.0)
  # Less the clean errors: ((0.6 - 0.2) / (1.2 - 0.6) + 1.0 / 0.2) / 2.
  got = ce.relative_mean_corruption_error(ERRORS, 0.1, REFERENCE, 0.3)
  assert got == pytest.approx((2 / 3 + 5) / 2)


def test_without_a_reference():
  assert ce.mean_corruption_error(ERRORS) == pytest.approx(0.45)
  got = ce.relative_mean_corruption_error(ERRORS, 0.1)
  assert got == pytest.approx(0.35)


def test_errors_are_summed_before_they_are_divided():
  errors, reference = [[0.1, 0.9]], [[0.1, 0.3]]
  assert ce.mean_corruption_error(errors, reference) == pytest.approx(2.5)
  # The mean of the ratios would be 2.


def alexnet():
  return np.array([ce.ALEXNET[name] for name in corruptions.NAMES])


def test_alexnet_is_one():
  errors = alexnet()
  assert errors.shape == (15, 5)
  assert ce.mean_corruption_error(errors, errors) == pytest.approx(1)
  clean = ce.ALEXNET_CLEAN
  got = ce.relative_mean_corruption_error(errors, clean, errors, clean)
  assert got == pytest.approx(1)


def test_means_of_alexnet():
  """As google-research/robustness_metrics has them from the paper."""
  want = [0.886, 0.894, 0.923, 0.820, 0.826, 0.786, 0.798, 0.867]
  want += [0.827, 0.819, 0.565, 0.853, 0.646, 0.718, 0.607]
  np.testing.assert_allclose(alexnet().mean(1), want, atol=6e-4)


@pytest.mark.parametrize(
  "errors, reference, words",
  [
    ([], None, "shape"),
    ([0.1], None, r"\(1,\)"),
    ([[0.1]], [[0.1, 0.2]], r"shape \(1, 2\), the classifier \(1, 1\)"),
    ([[0.1]], [[0.0]], "without any error"),
  ],
)
def test_what_cannot_be(errors, reference, words):
  with pytest.raises(ValueError, match=words):
    ce.mean_corruption_error(errors, reference)
