"""What evaluators share: batches, grids, classes and sums."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lookup_vit import config_utils, datasets, input_pipeline, parallel
from lookup_vit.models import tokens
from lookup_vit.train_step import Program


def make_batches(
  program: Program,
  name: str,
  data: Mapping[str, Any],
  pp_fn: str,
  batch_size: int | None,
) -> tuple[input_pipeline.Batches, int, int]:
  """This process's batches of a split, their number, and the global size.

  Args:
    program: of the model.
    name: of the evaluator.
    data: the data set, as `config.input.data`.
    pp_fn: op-string.
    batch_size: global; that of training where none is given.

  Raises:
    ValueError: data or batch size that cannot work.
  """
  if batch_size is None:
    batch_size = program.config.input.batch_size
  parallel.check_batch(
    f"config.evals.{name}.batch_size", batch_size, program.mesh
  )
  batches, count = input_pipeline.make_eval(
    data,
    pp=pp_fn,
    batch_size=batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  return batches, count, batch_size


def check_classes(
  program: Program,
  name: str,
  data: Mapping[str, Any],
  classes: str | Sequence[int] | None,
) -> tuple[int, ...] | None:
  """The classes that an evaluation is restricted to, in order; None: to none.

  Args:
    program: of the model.
    name: of the evaluator.
    data: the data set that has the classes.
    classes: None; a list; or "present", for those of the feature `label` that
      occur in the split, which is read for it.

  Raises:
    ValueError: classes that the model does not have, or that are given twice;
      "present" for data whose `label` is no class.
  """
  field = f"config.evals.{name}.classes={classes!r}"
  if classes is None:
    return None
  if classes == "present":
    if datasets.num_classes(data) is None:
      raise ValueError(f"{field}: the data have no classes as 'label'.")
    labels = input_pipeline.examples(data, pp="keep('label')")
    classes = {int(example["label"]) for example in labels}
  elif not isinstance(classes, list | tuple) or any(
    type(c) is not int for c in classes
  ):
    raise ValueError(f"{field}: want 'present' or a list of integers.")
  found, count = sorted(classes), program.config.num_classes
  if not found or len(set(found)) < len(found):
    raise ValueError(f"{field}: want one or more classes, each of them once.")
  if found[0] < 0 or found[-1] >= count:
    raise ValueError(
      f"{field}: classes are {found[0]} to {found[-1]}, config.num_classes is "
      f"{count}."
    )
  return tuple(found)


def check_grids(
  program: Program, name: str, grids: list[Any] | None
) -> list[Any]:
  """The grids to evaluate at: those of training where none are given.

  Raises:
    ValueError: there are none, or they do not fit the model.
  """
  if grids is None:
    return program.grids
  field = f"config.evals.{name}.grids"
  if not grids:
    raise ValueError(f"{field} is empty.")
  model = program.model
  if not hasattr(model, "grid"):
    raise ValueError(f"{field}: the model has no compressed grid.")
  lookup_grid = model.lookup_grid(program.config.input.image_size)
  for grid in grids:
    try:
      tokens.check_grid(grid, lookup_grid)
    except ValueError as e:
      raise ValueError(f"{field}: {e}") from None
  grids = [tuple(grid) for grid in grids]
  if len(set(grids)) < len(grids):
    given = ", ".join(map(config_utils.format_grid, grids))
    raise ValueError(f"{field}: {given} names one twice.")
  return grids


def positive(field: str, value: Any) -> int:
  """The value.

  Raises:
    ValueError: it is no integer of at least 1; `field` is named.
  """
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{field}={value!r}: want an integer >= 1.")
  return value


def some(
  field: str, given: Sequence[Any] | None, there: Sequence[Any]
) -> tuple[Any, ...]:
  """Those that are given, in the order of those that there are; or all.

  Raises:
    ValueError: none, one that there is not, or one twice; `field` is named.
  """
  if given is None:
    return tuple(there)
  if (
    isinstance(given, str)
    or not given
    or any(isinstance(x, bool) or x not in there for x in given)
    or len(set(given)) < len(given)
  ):
    raise ValueError(
      f"{field}={given!r}: want a list of some of {', '.join(map(str, there))}."
    )
  return tuple(x for x in there if x in given)


def metric_prefix(name: str, grid: Any) -> str:
  """What the names of a grid's metrics begin with: `NAME/GRID/`, or `NAME/`."""
  if grid is None:
    return f"{name}/"
  return f"{name}/{config_utils.format_grid(grid)}/"


def add_sums(
  totals: dict[Any, dict[str, float]],
  program: Program,
  params: Any,
  batch: Mapping[str, Any],
  classes: tuple[int, ...] | None = None,
) -> None:
  """Adds to each grid's sums those of the evaluation step over a batch.

  Args:
    totals: by grid, the sums by name.
    program: of the model.
    params: of the model.
    batch: this process's slice of it.
    classes: that are evaluated, see `Program.evaluation_step`.
  """
  batch = parallel.put_batch(batch, program.mesh)
  for grid, total in totals.items():
    sums = program.evaluation_step(params, batch, grid, classes)
    for metric, value in jax.device_get(sums).items():
      total[metric] = total.get(metric, 0.0) + float(value)


def means(total: Mapping[str, float], size: int, name: str) -> dict[str, float]:
  """Metrics of a split, from the sums over all of its batches.

  Args:
    total: the sums by name.
    size: of the split.
    name: of the evaluator, for messages.

  Raises:
    RuntimeError: examples were left out or came twice, or none counts.
  """
  examples, seen = total["examples"], total["seen"]
  if seen != size:
    raise RuntimeError(f"{name}: saw {seen:.0f} of {size} examples.")
  if not examples:
    raise RuntimeError(f"{name}: no example has one of the classes.")
  return {
    metric: value / examples
    for metric, value in total.items()
    if metric not in ("examples", "seen")
  }
