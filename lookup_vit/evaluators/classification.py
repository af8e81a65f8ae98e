"""Top-1, top-5 and loss over a whole split, at every compressed grid."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lookup_vit import config_utils, datasets, parallel
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

  Raises:
    ValueError: data, grids or batch size that cannot work.
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
    classes = datasets.num_classes(data)
    is_label = "labels" not in self.dataset.element_spec
    if is_label and classes is not None and classes > config.num_classes:
      raise ValueError(
        f"config.evals.{name}.data has {classes} classes, config.num_classes "
        f"is {config.num_classes}."
      )
    self.grids = shared.check_grids(program, name, grids)

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
    for batch in shared.progress(self.batches(), self.count, self.name):
      check()
      batch = parallel.put_batch(batch, self.program.mesh)
      for grid, total in totals.items():
        sums = jax.device_get(self.program.evaluation_step(params, batch, grid))
        for metric, value in sums.items():
          total[metric] = total.get(metric, 0.0) + float(value)
    for grid, total in totals.items():
      examples, seen = total.pop("examples"), total.pop("seen")
      if seen != self.examples:
        raise RuntimeError(
          f"{self.name}: saw {seen:.0f} of {self.examples} examples."
        )
      where = self.name
      if grid is not None:
        where += "/" + config_utils.format_grid(grid)
      for metric, value in total.items():
        yield f"{where}/{metric}", value / examples
