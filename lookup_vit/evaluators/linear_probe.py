"""A linear classifier on a frozen backbone's features, by CLIP's protocol."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from lookup_vit import config_utils
from lookup_vit.analysis import logistic_regression
from lookup_vit.evaluators import shared
from lookup_vit.evaluators.features import Probe, Split
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")


class Evaluator(Probe):
  """Multinomial logistic regression on features (arXiv:2103.00020, A.3).

  L-BFGS on all training examples at once; the penalty's strength is the best
  one on examples held out from them, of equal ones the middle one, and the fit
  is then repeated on all.

  Yields `NAME/METRIC`, for LookupViT `NAME/GRID/METRIC`: `top1` on the test
  set, and `C`, the inverse strength of the penalty, as scikit-learn has it.

  Args:
    program: of the backbone.
    name: prefix of the metrics.
    hold_out: share of the training examples, drawn by `seed`.
    C: of the penalty; chosen where none is given.
    max_steps: most steps of L-BFGS.
    seed: see `hold_out`.
    **fields: those of `features.Probe`.

  Raises:
    ValueError: a field or data that cannot work.
  """

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    hold_out: float = 0.1,
    C: float | None = None,  # noqa: N803
    max_steps: int = 1000,
    seed: int = 0,
    **fields: Any,
  ):
    where = f"config.evals.{name}"
    if not isinstance(hold_out, float) or not 0 < hold_out < 1:
      raise ValueError(f"{where}.hold_out={hold_out!r}: want 0 < share < 1.")
    if C is not None and (not isinstance(C, int | float) or not C > 0):
      raise ValueError(f"{where}.C={C!r}: want a number > 0, or None.")
    self.max_steps = shared.positive(f"{where}.max_steps", max_steps)
    self.hold_out, self.c, self.seed = hold_out, C, seed
    self.mesh = program.mesh
    super().__init__(program, name, **fields)

  def classify(
    self, train: Split, test: Split, check: Callable[[], None]
  ) -> Iterator[tuple[str, float]]:
    """See `Probe`."""
    c = self._choose(train, check) if self.c is None else self.c
    check()
    found = self._fit(self._put(train.x, train.label), c)
    examples = self._put(test.x, test.label)
    yield "top1", logistic_regression.accuracy(found, examples)
    yield "C", float(c)

  def _put(self, x, label):
    return logistic_regression.put(x, label, self.mesh)

  def _fit(self, examples, c):
    return logistic_regression.fit(examples, self.classes, c, self.max_steps)

  def _choose(self, train, check):
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
      return logistic_regression.accuracy(self._fit(examples, c), others)

    c, scores = logistic_regression.search(score)
    log.info(
      "%s: C=%.3g, of %d tried: %.2f%% on %d held out (%.0f s).",
      *(self.name, c, len(scores), 100 * max(scores.values()), len(held)),
      time.monotonic() - start,
    )
    return c
