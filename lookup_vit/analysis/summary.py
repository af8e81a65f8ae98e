"""What a run leaves for people: a table of results and pictures."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lookup_vit import config_utils
from lookup_vit.analysis import accuracy_vs_flops, attention_maps, flops
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")


def write(
  workdir: str,
  program: Program,
  metrics: Mapping[str, float],
  params: Any,
  images: np.ndarray | None,
) -> None:
  """Writes `results.json` and the pictures, and prints the table.

  Args:
    workdir: where to write.
    program: the model and its config.
    metrics: what the evaluators found, by name.
    params: the parameters that were evaluated.
    images: `[batch, height, width, 3]` or clips `[batch, time, height, width,
      3]` in [-1, 1], for the attention maps; None for no maps.
  """
  rows = results(program, metrics)
  folder = config_utils.workdir_path(workdir)
  (folder / "results.json").write_text(json.dumps(rows, indent=2))
  if any("top1" in row for row in rows):
    print(accuracy_vs_flops.table(rows), flush=True)
    accuracy_vs_flops.plot(rows, folder / "accuracy_vs_flops.png")
  # Only one process is here: it computes by itself.
  params = jax.device_get(params)
  if program.grids[0] is not None and images is not None:
    path = folder / "attention_maps.png"
    grid = min(program.grids, key=np.prod)
    if images.ndim == 4:
      attention_maps.write(path, program, params, images, grid=grid)
    else:
      attention_maps.write_clips(path, program, params, images[:2], grid=grid)


def results(
  program: Program, metrics: Mapping[str, float]
) -> list[dict[str, Any]]:
  """A row for each evaluator and grid: cost, and its metrics by name.

  The cost is that of one view, `views` how many an example has.
  """
  config = program.config
  trained = [config_utils.format_grid(g) for g in program.grids if g]
  rows = []
  grouped: dict[tuple[str, str | None], dict[str, float]] = {}
  for name, value in metrics.items():
    where, metric = name.rsplit("/", 1)
    evaluator, _, grid = where.partition("/")
    grouped.setdefault((evaluator, grid or None), {})[metric] = value
  costs = {}
  for (evaluator, grid), values in grouped.items():
    if grid not in costs:
      shape = None if grid is None else config_utils.parse_grid(grid)
      costs[grid] = flops.cost(program.model, config.input.image_size, shape)
    rows.append(
      {
        "model": config.model_name,
        "variant": _variant(config.model),
        "grid": grid,
        "trained_grids": trained,
        "split": evaluator,
        "parameters": costs[grid].params,
        "gflops": costs[grid].xla_flops / 1e9,
        "views": config.evals.get(evaluator, {}).get("views") or 1,
        **values,
      }
    )
  return rows


def _variant(fields):
  """The variant, with what a config changes of its parts and size."""
  names = ("spatial", "width", "depth")
  changed = [f"{k} {fields[k]}" for k in names if k in fields]
  variant = fields.get("variant", "B/16")
  return f"{variant} ({', '.join(changed)})" if changed else variant
