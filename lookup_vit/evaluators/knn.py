"""k nearest neighbours of a frozen backbone's features."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn import neighbors

from lookup_vit.evaluators import shared
from lookup_vit.evaluators.features import Probe
from lookup_vit.train_step import Program

_METRICS = ("cosine", "euclidean")


class Evaluator:
  """The most frequent class among the nearest training examples.

  By scikit-learn's `KNeighborsClassifier`, each neighbour with one vote.

  Yields `NAME/K_nn`, for LookupViT `NAME/GRID/K_nn`: top-1.

  Args:
    program: of the backbone.
    name: prefix of the metrics.
    data: the data set to classify, as `config.input.data`.
    pp_fn: see `linear_probe.Evaluator`.
    train: the neighbours; `config.input.data` where none is given.
    batch_size: see `linear_probe.Evaluator`.
    grids: see there.
    features: see there.
    block: see there.
    k: numbers of neighbours.
    metric: of the distance, "cosine" or "euclidean".

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
    k: Sequence[int] = (1, 5, 20),
    metric: str = "cosine",
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
    self.probe = Probe(
      *(program, name, data, pp_fn, train, batch_size, grids, features, block)
    )
    if max(self.k) > self.probe.train.size:
      raise ValueError(
        f"{where}.k={max(self.k)}: there are {self.probe.train.size} training "
        "examples."
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
    """Classifies by the features of parameters.

    Args:
      params: of the model.
      check: called for each batch; what it raises ends the evaluation.
      workdir: where features are kept; nowhere if None.

    Yields:
      Names and values.
    """
    for where, train, test in self.probe.extract(params, check, workdir):
      for k in self.k:
        check()
        model = neighbors.KNeighborsClassifier(k, metric=self.metric)
        best = model.fit(train.x, train.label).predict(test.x)
        yield f"{where}{k}_nn", float(np.mean(best == test.label))
