"""Work directories of runs that are made up, for the tests of reports."""

import io
import json

import numpy as np
from PIL import Image

from lookup_vit import config_utils
from lookup_vit.analysis import corruption_error
from tests import small

RNG = np.random.default_rng(0)


def write_run(folder, model, grids, seed, rows, evaluated=(), distances=()):
  """A work directory as training and evaluations leave it."""
  fields = dict(seed=seed, model_name=model, grids=grids, model__dropout=0.0)
  if model == "vit":
    fields |= dict(model=dict(variant="mu/8"), grids=None)
  config = config_utils.resolve(small.config(**fields))
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  about = dict(
    model=model,
    variant="mu/8",
    trained_grids=[config_utils.format_grid(g) for g in grids or ()],
    parameters=1000,
    views=1,
  )
  complete = [about | dict(gflops=1.5) | row for row in rows]
  if rows:
    (folder / "results.json").write_text(json.dumps(complete))
  for step, some in dict(evaluated).items():
    complete = [about | dict(gflops=1.5) | row for row in some]
    (folder / f"evaluation_{step}.json").write_text(json.dumps(complete))
  if distances:
    text = json.dumps(list(distances))
    (folder / "feature_distance_x.json").write_text(text)
  return str(folder)


def row(kind, grid, split=None, **metrics):
  return dict(type=kind, split=split or kind, grid=grid, **metrics)


def write_all(root):
  """Runs of two models, at several grids and at one, evaluated in part."""
  found = {}
  for seed, shift in ((0, 0.0), (1, 0.02)):
    rows = [
      row("classification", "2x2", "test", top1=0.9 + shift, loss=1.0),
      row("classification", "3x3", "test", top1=0.95 + shift, loss=1.0),
    ]
    corrupted = {
      f"{c}_{s}": 0.9 - 0.1 * s + shift
      for c in corruption_error.ALEXNET
      for s in range(1, 6)
    }
    newest = [
      row("linear_probe", "2x2", top1=0.8 + shift, C=1.0),
      row("robustness", "2x2", mce=0.4 - shift, top1=0.9, **corrupted),
      row("feature_distance", "2x2", "x", distance=0.3, severity_1=0.3 + shift),
    ]
    shares = RNG.dirichlet(np.ones(100)).tolist()
    found["lookup", seed] = write_run(
      *(root / f"lookup_{seed}", "lookup_vit", [(2, 2), (3, 3)], seed, rows),
      evaluated={
        9: [row("linear_probe", "2x2", top1=0.1, C=1.0)],
        12: newest,
      },
      distances=[
        dict(grid="2x2", severity=1, mean=0.3 + shift, shares=shares),
        # Of another checkpoint.
        dict(grid="3x3", severity=1, mean=0.7, shares=shares),
      ],
    )
  for grid in ("2x2", "3x3"):
    rows = [row("classification", grid, "test", top1=0.9125, loss=1.0)]
    shape = config_utils.parse_grid(grid)
    found["single", grid] = write_run(
      root / f"single_{grid}", "lookup_vit", [shape], 0, rows
    )
  rows = [row("classification", None, "test", top1=0.97, loss=1.0)]
  found["vit"] = write_run(root / "vit", "vit", None, 0, rows)
  found["young"] = write_run(root / "young", "vit", None, 1, [])
  picture = io.BytesIO()
  Image.new("RGB", (3, 2)).save(picture, "png")
  (root / "vit" / "attention_maps.png").write_bytes(picture.getvalue())
  return found


def cells(text):
  """Of a table in Markdown, by rows."""
  return [
    [c.strip() for c in line[1:-1].split("|")] for line in text.splitlines()
  ]
