"""A linear classifier on a frozen backbone's features, by CLIP's protocol."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lookup_vit import config_utils
from lookup_vit.analysis import logistic_regression
from lookup_vit.evaluators import shared
from lookup_vit.evaluators.features import Probe
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")


class Evaluator:
  """Multinomial logistic regression on features (arXiv:2103.00020, A.3).

  L-BFGS on all training examples at once; the penalty's strength is the best
  one on examples held out from them, and the fit is then repeated on all.

  Yields `NAME/METRIC`, for LookupViT `NAME/GRID/METRIC`: `top1` on `data`, and
  `C`, the inverse strength of the penalty, as scikit-learn has it.

  Args:
    program: of the backbone.
    name: prefix of the metrics.
    data: the data set to classify, as `config.input.data`.
    pp_fn: op-string, for both data sets; nothing in it is random.
    train: the data set to fit on; `config.input.data` where none is given.
    batch_size: global; that of training where none is given.
    grids: compressed grids; those of training where none are given.
    features: of LookupViT, "compressed" (where none are given), "lookup" or
      "both".
    block: whose tokens are averaged; None for the pre-logits.
    hold_out: share of the training examples, drawn by `seed`.
    C: of the penalty; chosen where none is given.
    max_steps: most steps of L-BFGS.
    seed: see `hold_out`.

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
    hold_out: float = 0.1,
    C: float | None = None,  # noqa: N803
    max_steps: int = 1000,
    seed: int = 0,
  ):
    where = f"config.evals.{name}"
    if not isinstance(hold_out, float) or not 0 < hold_out < 1:
      raise ValueError(f"{where}.hold_out={hold_out!r}: want 0 < share < 1.")
    if C is not None and (not isinstance(C, int | float) or not C > 0):
      raise ValueError(f"{where}.C={C!r}: want a number > 0, or None.")
    self.max_steps = shared.positive(f"{where}.max_steps", max_steps)
    self.hold_out, self.c, self.seed = hold_out, C, seed
    self.mesh = program.mesh
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
    """
    classes = self.probe.classes
    for where, train, test in self.probe.extract(params, check, workdir):
      c = self.c if self.c is not None else self._choose(where, train, check)
      check()
      examples = self._put(train.x, train.label)
      found = logistic_regression.fit(examples, classes, c, self.max_steps)
      examples = self._put(test.x, test.label)
      yield f"{where}top1", logistic_regression.accuracy(found, examples)
      yield f"{where}C", float(c)

  def _put(self, x, label):
    return logistic_regression.put(x, label, self.mesh)

  def _choose(self, where, train, check):
    """The best C on examples that are held out."""
    with config_utils.at_fault(f"{self.where}.hold_out"):
      rest, held = logistic_regression.hold_out(
        len(train.label), self.hold_out, self.seed
      )
    examples = self._put(train.x[rest], train.label[rest])
    others = self._put(train.x[held], train.label[held])
    start = time.monotonic()

    def score(c):
      check()
      classes = self.probe.classes
      found = logistic_regression.fit(examples, classes, c, self.max_steps)
      return logistic_regression.accuracy(found, others)

    c, scores = logistic_regression.search(score)
    log.info(
      "%s C=%.3g, of %d tried: %.2f%% on %d held out (%.0f s).",
      *(where, c, len(scores), 100 * max(scores.values()), len(held)),
      time.monotonic() - start,
    )
    return c
