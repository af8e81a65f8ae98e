"""What a run leaves for people: a table of results and pictures."""

import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lookup_vit import config_utils
from lookup_vit.analysis import (
  accuracy_vs_flops,
  attention_clips,
  attention_maps,
  cross_attention,
  flops,
)
from lookup_vit.models import probe
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")

# Fields of a model that make another of it, beside the variant and the grid.
_PARTS = (
  *("spatial", "width", "depth", "stem", "pool", "positions", "qk_norm"),
  *("mlp_ratio", "lookup_mlp_ratio", "mhbc_heads", "heads", "reuse"),
  *("reuse_scale", "compressed_init"),
)


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
  if any(accuracy_vs_flops.METRICS.keys() & row for row in rows):
    print(accuracy_vs_flops.table(rows), flush=True)
    accuracy_vs_flops.plot(rows, folder / "accuracy_vs_flops.png")
  if hasattr(program.model, "encoder"):
    return  # Captions have a page of their own, encoders their runs' pictures.
  # Only one process is here: it computes by itself.
  params = jax.device_get(params)
  if program.grids[0] is not None and images is not None:
    path = folder / "attention_maps.png"
    grid = min(program.grids, key=np.prod)
    if images.ndim == 4:
      # All of a small grid.
      places = cross_attention.evenly_spaced(grid, 25)
      rows = attention_maps.token_rows(
        program, params, images, [grid], places=places
      )
      attention_maps.draw(path, rows)
    else:
      attention_clips.write(path, program, params, images[:2], grid=grid)


def results(
  program: Program, metrics: Mapping[str, float]
) -> list[dict[str, Any]]:
  """A row for each evaluator and grid: cost, and its metrics by name.

  The cost is that of one view, `views` how many an example has. Of a captioner,
  it is that of the image encoder, whose are model and variant too; `tokens` is
  how many of an image's tokens the decoder reads. Of a linear classifier on a
  frozen encoder, model and variant are the encoder's, and `probe` is True.
  """
  config = program.config
  fields, more, more_of_all = config.model, {}, {}
  kind = config.model_name
  if "encoder" in fields:
    fields = fields.encoder
    kind = fields.get("model_name", "lookup_vit")
  if isinstance(program.model, probe.Probe):
    more_of_all["probe"] = True
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
      more[grid] = _tokens_read(program, shape)
    rows.append(
      {
        "model": kind,
        "variant": _variant(fields),
        "grid": grid,
        "trained_grids": trained,
        "split": evaluator,
        "type": config.evals.get(evaluator, {}).get("type"),
        "parameters": costs[grid].params,
        "gflops": costs[grid].xla_flops / 1e9,
        "views": config.evals.get(evaluator, {}).get("views") or 1,
        **more_of_all,
        **more[grid],
        **values,
      }
    )
  return rows


def _tokens_read(program, grid):
  """`tokens`, of a captioner."""
  if not hasattr(program.model, "start"):
    return {}
  batch = program.task.batch_shapes(1)
  apply = functools.partial(program.apply, grid=grid)
  _, out = jax.eval_shape(apply, program.state_shapes.params, batch)
  return {"tokens": out["memory"].shape[1]}


def _variant(fields):
  """The variant, with what a config changes of its parts and size."""
  changed = [f"{k} {fields[k]}" for k in _PARTS if k in fields]
  variant = fields.get("variant", "B/16")
  return f"{variant} ({', '.join(changed)})" if changed else variant
