"""Top-1 under ImageNet-C's corruptions, and mean corruption errors."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lookup_vit import config_utils, datasets, loops
from lookup_vit.analysis import corruption_error
from lookup_vit.evaluators import classification, shared
from lookup_vit.preprocess import corruptions as ops
from lookup_vit.preprocess import registry
from lookup_vit.train_step import Program


class Evaluator:
  """Classifies a split as it is, and under each corruption and severity.

  Yields `NAME/METRIC`, for LookupViT `NAME/GRID/METRIC`, of the default
  prediction: `top1` of the images as they are, `CORRUPTION_SEVERITY` the top-1
  of the corrupted ones, `top1_corrupted` the mean of these, `mce` and
  `relative_mce` (`analysis/corruption_error.py`). Without a reference, `mce` is
  the mean of the errors, not normalised, and `relative_mce` what that is above
  the error on the images as they are.

  Args:
    program: the model and its compiled evaluation step.
    name: prefix of the metrics.
    data: the data set, as `config.input.data`.
    pp_fn: op-string of the preprocessing.
    batch_size: global; that of training where none is given.
    grids: compressed grids; those of training where none are given.
    corrupted: name of prepared corrupted sets, which takes the place of that of
      `data`: "imagenet2012_corrupted/{corruption}_{severity}". Where none is
      given, the op `corrupt` is put before `value_range`.
    corrupted_pp_fn: op-string for the corrupted sets, which may be cropped
      already; `pp_fn` where none is given.
    corruptions: by name; all of `preprocess.corruptions` where none are given.
    severities: of 1 to 5; all of them where none are given.
    reference: "alexnet" for errors relative to AlexNet's on ImageNet-C, which
      are published for all corruptions and severities and 1000 classes; None.

  Raises:
    ValueError: a field or data that cannot work; of the prepared sets, all are
      looked for.
  """

  views = 1

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    data: Mapping[str, Any],
    pp_fn: str,
    batch_size: int | None = None,
    grids: list[Any] | None = None,
    corrupted: str | None = None,
    corrupted_pp_fn: str | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    reference: str | None = None,
  ):
    where = f"config.evals.{name}"
    self.program = program
    self.name = name
    self.corruptions = shared.some(
      f"{where}.corruptions", corruptions, ops.NAMES
    )
    self.severities = shared.some(
      f"{where}.severities", severities, ops.SEVERITIES
    )
    self.reference = self._check_reference(f"{where}.reference", reference)
    # It checks what does not depend on the corruption.
    self._clean = classification.Evaluator(
      program, name, data=data, pp_fn=pp_fn, batch_size=batch_size, grids=grids
    )
    self.grids = self._clean.grids
    self.batch_size = batch_size or program.config.input.batch_size
    if corrupted is None and corrupted_pp_fn is not None:
      raise ValueError(f"{where}.corrupted_pp_fn is set, but not .corrupted.")
    if corrupted is not None:
      _check_template(f"{where}.corrupted", corrupted)
    # By corruption and severity: data description, op-string and size.
    self.splits = {}
    for key in itertools.product(self.corruptions, self.severities):
      if corrupted is None:
        with config_utils.at_fault(f"{where}.pp_fn"):
          pp = registry.insert_before(pp_fn, "value_range", f"corrupt{key}")
        self.splits[key] = data, pp, self._clean.examples
        continue
      full = corrupted.replace("{corruption}", key[0])
      prepared = dict(data) | {"name": full.replace("{severity}", str(key[1]))}
      with config_utils.at_fault(f"{where}.corrupted={corrupted!r}"):
        size = datasets.num_examples(prepared)
      self.splits[key] = prepared, corrupted_pp_fn or pp_fn, size
    # They differ in what is corrupted alone: one stands for all.
    field = "pp_fn" if corrupted_pp_fn is None else "corrupted_pp_fn"
    spec = self._open(next(iter(self.splits))).element_spec
    program.check_input(spec, f"{where}.{field}")

  def _check_reference(self, field, reference):
    """Errors of the reference on the corruptions and on clean images."""
    if reference is None:
      return {}
    if reference != "alexnet":
      raise ValueError(f"{field}={reference!r}: want 'alexnet' or None.")
    classes = self.program.config.num_classes
    whole = (self.corruptions, self.severities) == (ops.NAMES, ops.SEVERITIES)
    if classes != 1000 or not whole:
      raise ValueError(
        f"{field}={reference!r} wants 1000 classes, all {len(ops.NAMES)} "
        f"corruptions and all severities; config.num_classes is {classes}, "
        f"the corruptions are {', '.join(self.corruptions)}, the severities "
        f"{', '.join(map(str, self.severities))}."
      )
    errors = [corruption_error.ALEXNET[c] for c in self.corruptions]
    return dict(errors=errors, clean=corruption_error.ALEXNET_CLEAN)

  def _open(self, key):
    """Batches of a corruption and severity."""
    data, pp, _ = self.splits[key]
    return shared.make_batches(
      self.program, self.name, data, pp, self.batch_size
    )[0]

  def batches(self) -> Iterator[dict[str, Any]]:
    """This process's batches of what is not corrupted."""
    return self._clean.batches()

  def _all_batches(self):
    """Pairs of a split, None where it is not corrupted, and a batch."""
    for batch in self.batches():
      yield None, batch
    for key in self.splits:
      for batch in self._open(key):
        yield key, batch

  def run(
    self,
    params: Any,
    check: Callable[[], None] = lambda: None,
    workdir: str | None = None,
  ) -> Iterator[tuple[str, float]]:
    """Evaluates parameters.

    Args:
      params: of the model.
      check: called for each batch; what it raises ends the evaluation.
      workdir: nothing is written there.

    Yields:
      Names and values.
    """
    del workdir
    sizes = {None: self._clean.examples}
    sizes |= {key: size for key, (_, _, size) in self.splits.items()}
    count = sum(-(-size // self.batch_size) for size in sizes.values())
    totals = {key: {grid: {} for grid in self.grids} for key in sizes}
    batches = loops.progress(self._all_batches(), count, self.name)
    for key, batch in batches:
      check()
      shared.add_sums(totals[key], self.program, params, batch)
    for grid in self.grids:
      top1 = {
        key: shared.means(totals[key][grid], size, self.name)["top1"]
        for key, size in sizes.items()
      }
      prefix = shared.metric_prefix(self.name, grid)
      for metric, value in self._metrics(top1).items():
        yield prefix + metric, value

  def _metrics(self, top1):
    """Metrics by name, of top-1 by split."""
    clean = top1[None]
    errors = [
      [1 - top1[corruption, severity] for severity in self.severities]
      for corruption in self.corruptions
    ]
    reference = self.reference
    return {
      "top1": clean,
      **{f"{c}_{s}": top1[c, s] for c, s in self.splits},
      "top1_corrupted": 1 - corruption_error.mean_corruption_error(errors),
      "mce": corruption_error.mean_corruption_error(
        errors, reference.get("errors")
      ),
      "relative_mce": corruption_error.relative_mean_corruption_error(
        errors, 1 - clean, reference.get("errors"), reference.get("clean")
      ),
    }


def _check_template(field, corrupted):
  found = sorted(re.findall("{[^}]*}", corrupted))
  if found != ["{corruption}", "{severity}"]:
    raise ValueError(
      f"{field}={corrupted!r}: want a name with {{corruption}} and "
      "{severity} in it."
    )
