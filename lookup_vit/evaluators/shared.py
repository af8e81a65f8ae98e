"""What evaluators share: their batches, grids, and word of how far they are."""

import datetime
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from lookup_vit import input_pipeline, parallel
from lookup_vit.models import tokens
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")

# Seconds between two lines.
_EVERY = 20.0


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
  return [tuple(grid) for grid in grids]


def positive(field: str, value: Any) -> int:
  """The value.

  Raises:
    ValueError: it is no integer of at least 1; `field` is named.
  """
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{field}={value!r}: want an integer >= 1.")
  return value


def progress(batches: Iterable[Any], count: int, name: str) -> Iterator[Any]:
  """The batches; says now and then how many there were, and what is left."""
  start = said = time.monotonic()
  for done, batch in enumerate(batches):
    now = time.monotonic()
    if done and now - said > _EVERY:
      said = now
      left = round((now - start) / done * (count - done))
      log.info(
        "%s: batch %d/%d  ETA %s",
        name,
        done,
        count,
        datetime.timedelta(seconds=left),
      )
    yield batch
