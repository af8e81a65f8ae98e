"""Least-squares probes of few examples a class, by big_vision's protocol."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn import linear_model

from lookup_vit.evaluators import shared
from lookup_vit.evaluators.features import Probe
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")

# Of big_vision's evaluators/fewshot_lsr.py: the penalty, and a feature that is
# constant, and large so that the bias is hardly penalised.
_L2 = 2.0**10
_BIAS = 100.0


class Evaluator:
  """Ridge regression onto classes, of some examples of each.

  Features are standardised, targets are 1 for the class and -1 for others, and
  the penalty is 1024: big_vision's evaluators/fewshot_lsr.py, as used by ViT
  (arXiv:2010.11929, section 4.1). A seed draws as many examples of each class.

  Yields `NAME/METRIC`, for LookupViT `NAME/GRID/METRIC`: `SHOTS_shot`, the mean
  top-1 over seeds, and `SHOTS_shot_std`, its standard deviation (of a sample).

  Args:
    program: of the backbone.
    name: prefix of the metrics.
    data: the data set to classify, as `config.input.data`.
    pp_fn: see `linear_probe.Evaluator`.
    train: the data set that examples are drawn from; `config.input.data` where
      none is given.
    batch_size: see `linear_probe.Evaluator`.
    grids: see there.
    features: see there.
    block: see there.
    shots: numbers of examples of a class.
    seeds: how many draws.

  Raises:
    ValueError: a field or data that cannot work.
  """

  views = 1

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    data: Mapping[str, Any],
    pp_fn: str,
    train: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    grids: list[Any] | None = None,
    features: str | None = None,
    block: int | None = None,
    shots: Sequence[int] = (5, 10, 25),
    seeds: int = 3,
  ):
    where = f"config.evals.{name}"
    if not isinstance(shots, list | tuple) or not shots:
      raise ValueError(f"{where}.shots={shots!r}: want a list of integers.")
    self.shots = [shared.positive(f"{where}.shots", n) for n in shots]
    self.seeds = shared.positive(f"{where}.seeds", seeds)
    self.where = where
    self.probe = Probe(
      *(program, name, data, pp_fn, train, batch_size, grids, features, block)
    )

  def batches(self) -> Iterator[dict[str, Any]]:
    """This process's batches of NumPy arrays, padding marked in `_mask`."""
    return self.probe.batches()

  def run(
    self,
    params: Any,
    check: Callable[[], None] = lambda: None,
    workdir: str | None = None,
  ) -> Iterator[tuple[str, float]]:
    """Fits on the features of parameters.

    Args:
      params: of the model.
      check: called for each batch and fit; what it raises ends the evaluation.
      workdir: where features are kept; nowhere if None.

    Yields:
      Names and values.

    Raises:
      ValueError: a class has fewer examples than `shots`.
    """
    classes = self.probe.classes
    for where, train, test in self.probe.extract(params, check, workdir):
      for shots in self.shots:
        found = []
        for seed in range(self.seeds):
          check()
          try:
            places = draw(train.label, classes, shots, seed)
          except ValueError as e:
            raise ValueError(f"{self.where}.shots: {e}") from None
          x, label = train.x[places], train.label[places]
          best = predict(x, label, test.x, classes)
          found.append(np.mean(best == test.label))
        yield f"{where}{shots}_shot", float(np.mean(found))
        if self.seeds > 1:
          yield f"{where}{shots}_shot_std", float(np.std(found, ddof=1))


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
