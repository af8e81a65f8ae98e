"""k nearest neighbours of a frozen backbone's features."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from sklearn import neighbors

from lookup_vit.evaluators import shared
from lookup_vit.evaluators.features import Probe, Split
from lookup_vit.train_step import Program

_METRICS = ("cosine", "euclidean")


class Evaluator(Probe):
  """The most frequent class among the nearest training examples.

  By scikit-learn's `KNeighborsClassifier`, each neighbour with one vote.

  Yields `NAME/K_nn`, for LookupViT `NAME/GRID/K_nn`: top-1.

  Args:
    program: of the backbone.
    name: prefix of the metrics.
    k: numbers of neighbours.
    metric: of the distance, "cosine" or "euclidean".
    **fields: those of `features.Probe`.

  Raises:
    ValueError: a field or data that cannot work.
  """

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    k: Sequence[int] = (1, 5, 20),
    metric: str = "cosine",
    **fields: Any,
  ):
    where = f"config.evals.{name}"
    if not isinstance(k, list | tuple) or not k:
      raise ValueError(f"{where}.k={k!r}: want a list of integers.")
    self.k = [shared.positive(f"{where}.k", n) for n in k]
    if metric not in _METRICS:
      raise ValueError(
        f"{where}.metric={metric!r}: want {' or '.join(_METRICS)}."
      )
    self.metric = metric
    super().__init__(program, name, **fields)
    if max(self.k) > self.train.size:
      raise ValueError(
        f"{where}.k={max(self.k)}: there are {self.train.size} training "
        "examples."
      )

  def classify(
    self, train: Split, test: Split, check: Callable[[], None]
  ) -> Iterator[tuple[str, float]]:
    """See `Probe`."""
    for k in self.k:
      check()
      model = neighbors.KNeighborsClassifier(k, metric=self.metric)
      best = model.fit(train.x, train.label).predict(test.x)
      yield f"{k}_nn", float(np.mean(best == test.label))
