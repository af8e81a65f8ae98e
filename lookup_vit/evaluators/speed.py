"""Measured time of inference, at every compressed grid."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lookup_vit import parallel
from lookup_vit.evaluators import shared
from lookup_vit.train_step import Program


class Evaluator:
  """Milliseconds for an image or clip, in batches, on the devices there are.

  Of the compiled forward pass, its batch on the devices already. The grids are
  measured in turn in each round, so that they meet the same disturbances; to
  compare models, `benchmarks/` measures them in turn too.

  Yields `NAME/METRIC`, for LookupViT `NAME/GRID/METRIC`: `ms`, the median over
  rounds of a batch's time divided by its size, `ms_min` and `ms_max`.

  Args:
    program: of a model that classifies.
    name: prefix of the metrics.
    data: not read: images are zeros.
    pp_fn: not used.
    batch_size: global; that of training where none is given.
    grids: compressed grids; those of training where none are given.
    rounds: how often each is measured.

  Raises:
    ValueError: a field that cannot work.
  """

  views = 1

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    data: Mapping[str, Any] | None = None,
    pp_fn: str | None = None,
    batch_size: int | None = None,
    grids: list[Any] | None = None,
    rounds: int = 20,
  ):
    del data, pp_fn
    where = f"config.evals.{name}"
    self.program = program
    self.name = name
    self.grids = shared.check_grids(program, name, grids)
    self.rounds = shared.positive(f"{where}.rounds", rounds)
    self.batch_size = batch_size or program.config.input.batch_size
    parallel.check_batch(f"{where}.batch_size", self.batch_size, program.mesh)

    def forward(params, batch, grid):
      return program.apply(params, batch, grid)[0]

    self._forward = program.compile(
      forward, parallel.batch_sharding(program.mesh), static_argnums=2
    )

  def batches(self) -> Iterator[dict[str, Any]]:
    """None: it reads no data."""
    return iter(())

  def run(
    self,
    params: Any,
    check: Callable[[], None] = lambda: None,
    workdir: str | None = None,
  ) -> Iterator[tuple[str, float]]:
    """Measures with parameters.

    Args:
      params: of the model.
      check: called in each round; what it raises ends the measurement.
      workdir: nothing is written there.

    Yields:
      Names and values.
    """
    del workdir
    local = self.batch_size // jax.process_count()
    shapes = self.program.task.batch_shapes(local)
    zeros = {k: np.zeros(x.shape, x.dtype) for k, x in shapes.items()}
    batch = parallel.put_batch(zeros, self.program.mesh)
    seconds = {grid: [] for grid in self.grids}
    for _ in range(self.rounds + 1):
      check()
      for grid, found in seconds.items():
        start = time.perf_counter()
        jax.block_until_ready(self._forward(params, batch, grid))
        found.append(time.perf_counter() - start)
    for grid, found in seconds.items():
      where = shared.metric_prefix(self.name, grid)
      ms = 1000 * np.array(found[1:]) / self.batch_size  # The first compiles.
      yield f"{where}ms", float(np.median(ms))
      yield f"{where}ms_min", float(ms.min())
      yield f"{where}ms_max", float(ms.max())
