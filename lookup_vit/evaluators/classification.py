"""Top-1, top-5 and loss over a whole split, at every compressed grid."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lookup_vit import datasets, loops
from lookup_vit.evaluators import shared
from lookup_vit.train_step import Program


class Evaluator:
  """Classification metrics, each example counted exactly once.

  Yields `NAME/METRIC`, for LookupViT `NAME/GRID/METRIC`: `top1`, `top5`,
  `loss` of the default prediction, and `_compressed` and `_lookup` of each
  head's.

  Args:
    program: the model and its compiled evaluation step.
    name: prefix of the metrics.
    data: the data set, as `config.input.data`.
    pp_fn: op-string of the preprocessing. It makes an image of each example,
      or `[views, *image_size, 3]` where there are several views.
    views: of each example, such as clips of a video and crops of these; the
      logits of each head are averaged over them (ViViT, arXiv:2103.15691,
      section 4.1).
    batch_size: global; that of training where none is given.
    grids: compressed grids; those of training where none are given.
    classes: that are told apart, the model's by default; a list, or "present"
      for those that occur as `label` in the split (of ImageNet-A and -R, 200 of
      the 1000). The logits of others are left out before all metrics, and
      examples of others do not count.

  Raises:
    ValueError: data, grids, classes or batch size that cannot work.
  """

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    data: Mapping[str, Any],
    pp_fn: str,
    views: int = 1,
    batch_size: int | None = None,
    grids: list[Any] | None = None,
    classes: str | Sequence[int] | None = None,
  ):
    config = program.config
    self.program = program
    self.name = name
    field = f"config.evals.{name}.views"
    self.views = shared.positive(field, views)
    self.examples = datasets.num_examples(data)
    self.dataset, self.count, _ = shared.make_batches(
      program, name, data, pp_fn, batch_size
    )
    program.check_input(
      self.dataset.element_spec,
      f"config.evals.{name}.pp_fn",
      (field, views) if views > 1 else None,
    )
    count = datasets.num_classes(data)
    is_label = "labels" not in self.dataset.element_spec
    if is_label and count is not None and count > config.num_classes:
      raise ValueError(
        f"config.evals.{name}.data has {count} classes, config.num_classes "
        f"is {config.num_classes}."
      )
    self.grids = shared.check_grids(program, name, grids)
    self.classes = shared.check_classes(program, name, data, classes)

  def batches(self) -> Iterator[dict[str, Any]]:
    """This process's batches of NumPy arrays, padding marked in `_mask`."""
    return iter(self.dataset)

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
    totals = {grid: {} for grid in self.grids}
    for batch in loops.progress(self.batches(), self.count, self.name):
      check()
      shared.add_sums(totals, self.program, params, batch, self.classes)
    for grid, total in totals.items():
      prefix = shared.metric_prefix(self.name, grid)
      for metric, value in shared.means(
        total, self.examples, self.name
      ).items():
        yield prefix + metric, value
