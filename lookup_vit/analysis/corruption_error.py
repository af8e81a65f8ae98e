"""Mean corruption errors, as ImageNet-C defines them (arXiv:1903.12261).

An error is `1 - top-1`, so that all of these are fractions: the paper prints
them times 100.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

# AlexNet's top-1 errors on ImageNet-C, by severity: the authors' spreadsheet
# that https://github.com/hendrycks/robustness links to. Their means are the
# paper's, appendix C.
ALEXNET: Mapping[str, tuple[float, ...]] = {
  "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
  "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
  "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
  "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
  "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
  "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
  "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
  "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
  "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
  "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
  "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
  "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
  "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
  "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
  "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
# That on clean images: 43.5 % in the paper's table 1; with these digits in
# google-research/robustness_metrics, reports/imagenet_variants.py.
ALEXNET_CLEAN = 0.4348

Errors = Float[np.ndarray, "corruptions severities"] | Sequence[Sequence[float]]


def mean_corruption_error(
  errors: Errors, reference: Errors | None = None
) -> float:
  """mCE: of each corruption's error relative to a reference's, the mean.

  The error of a corruption is summed over the severities before it is divided
  (arXiv:1903.12261, section 4).

  Args:
    errors: of a classifier, `[corruptions, severities]`.
    reference: errors of the classifier that has the mCE 1; None for no
      division: the mean of all errors.

  Raises:
    ValueError: shapes that differ or hold nothing, or a corruption on which the
      reference makes no error.
  """
  errors, reference = _check(errors, reference)
  if reference is None:
    return float(np.mean(errors))
  return _mean_ratio(errors, reference)


def relative_mean_corruption_error(
  errors: Errors,
  clean_error: float,
  reference: Errors | None = None,
  reference_clean_error: float | None = None,
) -> float:
  """Relative mCE: as mCE, of what the errors are above those on clean images.

  Args:
    errors: of a classifier, `[corruptions, severities]`.
    clean_error: its error on clean images.
    reference: errors of the classifier that has the relative mCE 1; None for no
      division: the mean of all errors, minus the clean error.
    reference_clean_error: that of the reference, where there is one.

  Raises:
    ValueError: as for `mean_corruption_error`.
  """
  errors, reference = _check(errors, reference)
  if reference is None:
    return float(np.mean(errors) - clean_error)
  return _mean_ratio(errors - clean_error, reference - reference_clean_error)


def _check(errors, reference):
  errors = np.asarray(errors, np.float64)
  if errors.ndim != 2 or not errors.size:
    raise ValueError(
      f"want errors [corruptions, severities], got shape {errors.shape}"
    )
  if reference is None:
    return errors, None
  reference = np.asarray(reference, np.float64)
  if reference.shape != errors.shape:
    raise ValueError(
      f"the reference has errors of shape {reference.shape}, the classifier "
      f"{errors.shape}"
    )
  return errors, reference


def _mean_ratio(errors, reference):
  below = reference.sum(axis=1)
  if not np.all(below > 0):
    raise ValueError("the reference has corruptions without any error")
  return float(np.mean(errors.sum(axis=1) / below))
