"""Least-squares probes of few examples a class, by big_vision's protocol."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn import linear_model

from lookup_vit import config_utils
from lookup_vit.evaluators import shared
from lookup_vit.evaluators.features import Probe, Split
from lookup_vit.train_step import Program

# Of big_vision's evaluators/fewshot_lsr.py: the penalty, and a feature that is
# constant, and large so that the bias is hardly penalised.
_L2 = 2.0**10
_BIAS = 100.0


class Evaluator(Probe):
  """Ridge regression onto classes, of some examples of each.

  Features are standardised, targets are 1 for the class and -1 for others, and
  the penalty is 1024: big_vision's evaluators/fewshot_lsr.py, as used by ViT
  (arXiv:2010.11929, section 4.1). A seed draws as many examples of each class.

  Yields `NAME/METRIC`, for LookupViT `NAME/GRID/METRIC`: `SHOTS_shot`, the mean
  top-1 over seeds, and `SHOTS_shot_std`, its standard deviation (of a sample).

  Args:
    program: of the backbone.
    name: prefix of the metrics.
    shots: numbers of examples of a class.
    seeds: how many draws.
    **fields: those of `features.Probe`.

  Raises:
    ValueError: a field or data that cannot work; later, a class of fewer
      examples than `shots`.
  """

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    shots: Sequence[int] = (5, 10, 25),
    seeds: int = 3,
    **fields: Any,
  ):
    where = f"config.evals.{name}"
    if not isinstance(shots, list | tuple) or not shots:
      raise ValueError(f"{where}.shots={shots!r}: want a list of integers.")
    self.shots = [shared.positive(f"{where}.shots", n) for n in shots]
    self.seeds = shared.positive(f"{where}.seeds", seeds)
    super().__init__(program, name, **fields)

  def classify(
    self, train: Split, test: Split, check: Callable[[], None]
  ) -> Iterator[tuple[str, float]]:
    """See `Probe`."""
    # What is missing is said before anything is fitted.
    with config_utils.at_fault(f"{self.where}.shots"):
      draw(train.label, self.classes, max(self.shots), 0)
    for shots in self.shots:
      found = []
      for seed in range(self.seeds):
        check()
        places = draw(train.label, self.classes, shots, seed)
        x, label = train.x[places], train.label[places]
        best = predict(x, label, test.x, self.classes)
        found.append(np.mean(best == test.label))
      yield f"{shots}_shot", float(np.mean(found))
      if self.seeds > 1:
        yield f"{shots}_shot_std", float(np.std(found, ddof=1))


def draw(
  labels: Int[np.ndarray, " n"], classes: int, shots: int, seed: int
) -> Int[np.ndarray, " m"]:
  """Places of `shots` examples of each class, drawn by a seed.

  Raises:
    ValueError: a class has fewer.
  """
  rng = np.random.default_rng([seed, shots])
  places = []
  for number in range(classes):
    [of_class] = np.nonzero(labels == number)
    if len(of_class) < shots:
      raise ValueError(
        f"class {number} has {len(of_class)} examples; want {shots}."
      )
    places.append(rng.permutation(of_class)[:shots])
  return np.concatenate(places)


def predict(
  x: Float[np.ndarray, "n D"],
  labels: Int[np.ndarray, " n"],
  test: Float[np.ndarray, "m D"],
  classes: int,
) -> Int[np.ndarray, " m"]:
  """Classes of a test set, by ridge regression in float64."""
  x, test = x.astype(np.float64), test.astype(np.float64)
  mean, std = x.mean(0), x.std(0) + 1e-5

  def prepare(x):
    return np.pad((x - mean) / std, [(0, 0), (0, 1)], constant_values=_BIAS)

  targets = 2.0 * np.eye(classes)[labels] - 1.0
  ridge = linear_model.Ridge(alpha=_L2, fit_intercept=False)
  scores = ridge.fit(prepare(x), targets).predict(prepare(test))
  return np.argmax(scores, axis=-1)
