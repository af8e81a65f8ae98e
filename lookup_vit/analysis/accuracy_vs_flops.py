r"""Accuracy against compute, for one or several runs.

python -m lookup_vit.analysis.accuracy_vs_flops \
        --workdirs=workdirs/digits_lookup,workdirs/digits_vit \
        --output=workdirs/accuracy_vs_flops.png
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from etils import epath

from lookup_vit import cli, config_utils

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAGS = flags.FLAGS

_NAMES = {
  "vit": "ViT",
  "lookup_vit": "LookupViT",
  "factorised": "Factorised encoder",
}
Row = Mapping[str, Any]


def read(workdir: str) -> list[Row]:
  """The rows of a run's `results.json`.

  Raises:
    ValueError: the run has not come to its end, or is no run.
  """
  path = config_utils.workdir_path(workdir) / "results.json"
  if not path.exists():
    raise ValueError(f"{workdir} has no results.json: no finished run.")
  return json.loads(path.read_text())


def table(rows: Sequence[Row]) -> str:
  """Rows of results as a table, in Markdown.

  GFLOPs count a multiply-add as two; LookupViT's `compressed` and `lookup`
  are the top-1 of its heads, `top-1` that of their mean. A model that was
  trained at a single grid says so.
  """
  lines = [
    "| model | grid | split | GFLOPs | parameters (M) | top-1 (%) | "
    "compressed (%) | lookup (%) |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for r in rows:
    tops = [
      f"{100 * r[name]:.2f}" if name in r else "-"
      for name in ("top1", "top1_compressed", "top1_lookup")
    ]
    lines.append(
      f"| {_name(r)} | "
      f"{r['grid'] or '-'} | {r['split']} | {_gflops(r)} | "
      f"{r['parameters'] / 1e6:.2f} | {' | '.join(tops)} |"
    )
  return "\n".join(lines)


def _name(row):
  """Of the model: its kind, variant, and whether it saw one grid alone."""
  name = f"{_NAMES.get(row['model'], row['model'])} {row['variant']}"
  return name + ", one grid" * (len(row.get("trained_grids", ())) == 1)


def _gflops(row):
  """Of a view, times the views where an example has several."""
  gflops, views = row["gflops"], row.get("views", 1)
  text = f"{gflops:.3f}" if gflops >= 1 else f"{gflops:.3g}"
  return text if views == 1 else f"{text} x {views}"


def over_seeds(rows: Sequence[Row]) -> str:
  """A table of mean and spread over runs that differ in their seed.

  Rows of the same model, grids of training, grid and split are one row: mean
  of the top-1, its standard deviation (of a sample: over n - 1), lowest and
  highest.
  """
  groups: dict[tuple[Any, ...], list[Row]] = {}
  for r in rows:
    trained = tuple(r.get("trained_grids", ()))
    key = (_name(r), trained, r["grid"], r["split"])
    groups.setdefault(key, []).append(r)
  lines = [
    "| model | grid | GFLOPs | parameters (M) | runs | top-1 (%), mean | "
    "std | range |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for (name, _, grid, _), group in groups.items():
    top1 = 100 * np.array([r["top1"] for r in group])
    std = f"{top1.std(ddof=1):.2f}" if len(top1) > 1 else "-"
    lines.append(
      f"| {name} | {grid or '-'} | "
      f"{_gflops(group[0])} | {group[0]['parameters'] / 1e6:.2f} | "
      f"{len(top1)} | {top1.mean():.2f} | {std} | "
      f"{top1.min():.2f} to {top1.max():.2f} |"
    )
  return "\n".join(lines)


def plot(rows: Sequence[Row], path: str) -> None:
  """Draws top-1 over GFLOPs as a PNG.

  A line for each model and split; runs that were trained at a single grid each
  are a dashed one.
  """
  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  series: dict[str, list[Row]] = {}
  for r in rows:
    if "top1" in r:
      series.setdefault(f"{_name(r)}, {r['split']}", []).append(r)
  for label, points in series.items():
    points = sorted(points, key=lambda r: r["gflops"])
    single = len(points[0].get("trained_grids", ())) == 1
    x = [r["gflops"] for r in points]
    y = [100 * r["top1"] for r in points]
    style = "s--" if single else "o-"
    axes.plot(x, y, style if len(x) > 1 else "s", label=label)
    for r, a, b in zip(points, x, y, strict=True):
      if r["grid"]:
        axes.annotate(
          r["grid"], (a, b), (0, 6), textcoords="offset points", ha="center"
        )
  axes.set_xlabel("GFLOPs for an image or clip (multiply-add = 2)")
  axes.set_ylabel("top-1 (%)")
  axes.set_xlim(left=0)
  axes.margins(y=0.2)
  axes.grid(alpha=0.3)
  axes.legend()
  with epath.Path(path).open("wb") as f:
    figure.savefig(f, dpi=150, format="png")
  plt.close(figure)


def main(argv):
  """Prints the table of several runs and draws them together."""
  del argv
  rows = [row for workdir in FLAGS.workdirs for row in read(workdir)]
  if FLAGS.over_seeds:
    print(over_seeds(rows))
    return
  print(table(rows))
  plot(rows, FLAGS.output)
  print(f"Drawn: {FLAGS.output}")


if __name__ == "__main__":
  flags.DEFINE_list("workdirs", None, "Work directories.", required=True)
  flags.DEFINE_string("output", "accuracy_vs_flops.png", "The PNG to draw.")
  flags.DEFINE_bool("over_seeds", False, "Runs are of several seeds: means.")
  cli.run(main)
