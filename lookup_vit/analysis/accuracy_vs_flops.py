r"""Accuracy against compute, for one or several runs.

    python -m lookup_vit.analysis.accuracy_vs_flops \
        --workdirs=workdirs/digits_lookup,workdirs/digits_vit \
        --output=workdirs/accuracy_vs_flops.png

It prints the table, and draws the picture, that each run has of its own.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from etils import epath

from lookup_vit import cli, config_utils
from lookup_vit.analysis import corruption_error

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAGS = flags.FLAGS

_NAMES = {
  "vit": "ViT",
  "lookup_vit": "LookupViT",
  "factorised": "Factorised encoder",
}
# What a run is judged by, and its unit in tables and pictures.
METRICS = {"top1": "top-1 (%)", "CIDEr": "CIDEr x 100"}

# Fields of a row that are no metrics.
_ABOUT = (
  *("model", "variant", "grid", "trained_grids", "split", "type"),
  *("parameters", "gflops", "views", "tokens", "probe"),
)

# Types of evaluators that have a top-1 beside what they are for.
_OTHERS = ("linear_probe", "robustness")

Row = Mapping[str, Any]


def read(workdir: str) -> list[Row]:
  """The rows of a run's `results.json`.

  Raises:
    ValueError: the run has not come to its end, or is no run.
  """
  path = config_utils.workdir_path(workdir) / "results.json"
  if not path.exists():
    raise ValueError(f"{workdir} has no results.json: no finished run.")
  return config_utils.read_json(path)


def table(rows: Sequence[Row]) -> str:
  """Rows of results as a table, in Markdown; captions have one of their own.

  So have probes and the like: a row for each of their metrics, as it is.

  GFLOPs count a multiply-add as two; LookupViT's `compressed` and `lookup`
  are the top-1 of its heads, `top-1` that of their mean. A model that was
  trained at a single grid says so. Of captions, GFLOPs and parameters are the
  image encoder's, `tokens` is how many of its tokens the decoder reads, and
  scores are times 100, as papers print them.
  """
  captions = [r for r in rows if "tokens" in r]
  others = [r for r in rows if "tokens" not in r]
  probes = [r for r in others if not _is_accuracy(r)]
  others = [r for r in others if _is_accuracy(r)]
  parts = []
  if others or not rows:
    names = {
      "top1": "top-1 (%)",
      "top1_compressed": "compressed (%)",
      "top1_lookup": "lookup (%)",
    }
    parts.append(_table(others, names, 2))
  if captions:
    scores = {
      "CIDEr": "CIDEr",
      "Bleu_4": "BLEU-4",
      "METEOR": "METEOR",
      "ROUGE_L": "ROUGE-L",
      "SPICE": "SPICE",
    }
    names = {k: v for k, v in scores.items() if any(k in r for r in captions)}
    parts.append(_table(captions, names, 1))
  if probes:
    parts.append(_metrics_table(probes))
  return "\n\n".join(parts)


def _is_accuracy(row):
  """Whether a row has accuracy and loss alone."""
  names = {name.split("_")[0] for name in row if name not in _ABOUT}
  return names <= {"top1", "top5", "loss"}


def _metrics_table(rows):
  """Metrics below one another, grids side by side, values as they are.

  Of a corruption's severities, and of runs of the same model, the mean.
  """
  grids = list(dict.fromkeys(r["grid"] for r in rows))
  found = {}
  for r in rows:
    each = {}
    for name in [k for k in r if k not in _ABOUT]:
      stem, _, severity = name.rpartition("_")
      of_corruption = stem in corruption_error.ALEXNET and severity.isdigit()
      each.setdefault(stem if of_corruption else name, []).append(r[name])
    for name, values in each.items():
      row = found.setdefault((model_name(r), r["split"], name), {})
      row.setdefault(r["grid"], []).append(np.mean(values))
  head = ["model", "evaluation", "metric", *(grid or "-" for grid in grids)]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for key, values in found.items():
    cells = [f"{np.mean(values[g]):.4g}" if g in values else "-" for g in grids]
    lines.append(f"| {' | '.join([*key, *cells])} |")
  return "\n".join(lines)


def _table(rows, metrics, digits):
  """Of rows of a kind; metrics by name are told times 100."""
  has_tokens = any("tokens" in r for r in rows)
  head = ["model", "grid", "split", "GFLOPs", "parameters (M)"]
  head += ["tokens"] * has_tokens + [*metrics.values()]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for r in rows:
    cells = [model_name(r), r["grid"] or "-", r["split"], _gflops(r)]
    cells.append(f"{r['parameters'] / 1e6:.2f}")
    cells += [str(r["tokens"])] if has_tokens else []
    cells += [
      f"{100 * r[name]:.{digits}f}" if name in r else "-" for name in metrics
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _metric(rows):
  """What the rows are judged by: the first of `METRICS` that one has."""
  found = [name for name in METRICS if any(name in r for r in rows)]
  return (found or [*METRICS])[0]


def model_name(row: Row) -> str:
  """Of the model: its kind, variant, and whether it saw one grid alone.

  A linear probe trained by SGD says so.
  """
  name = f"{_NAMES.get(row['model'], row['model'])} {row['variant']}"
  name += ", linear probe by SGD" * bool(row.get("probe"))
  return name + ", one grid" * (len(row.get("trained_grids", ())) == 1)


def _gflops(row):
  """Of a view, times the views where an example has several."""
  gflops, views = row["gflops"], row.get("views", 1)
  text = f"{gflops:.3f}" if gflops >= 1 else f"{gflops:.3g}"
  return text if views == 1 else f"{text} x {views}"


def over_seeds(rows: Sequence[Row]) -> str:
  """A table of mean and spread over runs that differ in their seed.

  Rows of the same model, grids of training, grid and split are one row: mean
  of the top-1 (of captions, the CIDEr), its standard deviation (of a sample:
  over n - 1), lowest and highest. Evaluators of something else are left out.
  """
  groups: dict[tuple[Any, ...], list[Row]] = {}
  metric = _metric(rows)
  rows = [r for r in rows if metric in r and r.get("type") not in _OTHERS]
  for r in rows:
    trained = tuple(r.get("trained_grids", ()))
    key = (model_name(r), trained, r["grid"], r["split"])
    groups.setdefault(key, []).append(r)
  splits = {r["split"] for r in rows}
  lines = [
    "| model | grid | GFLOPs | parameters (M) | runs | "
    f"{METRICS[metric]}, mean | std | range |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for (name, _, grid, split), group in groups.items():
    name += f", {split}" * (len(splits) > 1)
    found = 100 * np.array([r[metric] for r in group])
    std = f"{found.std(ddof=1):.2f}" if len(found) > 1 else "-"
    lines.append(
      f"| {name} | {grid or '-'} | "
      f"{_gflops(group[0])} | {group[0]['parameters'] / 1e6:.2f} | "
      f"{len(found)} | {found.mean():.2f} | {std} | "
      f"{found.min():.2f} to {found.max():.2f} |"
    )
  return "\n".join(lines)


def plot(rows: Sequence[Row], path: str) -> None:
  """Writes what `draw` makes."""
  epath.Path(path).write_bytes(draw(rows))


def draw(rows: Sequence[Row]) -> bytes:
  """Draws top-1, or the CIDEr of captions, over GFLOPs; returns a PNG.

  A line for each model and split; runs that were trained at a single grid each
  are a dashed one, of what they reach at that grid.
  """
  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  series: dict[str, list[Row]] = {}
  metric = _metric(rows)
  for r in rows:
    trained = r.get("trained_grids", ())
    if metric in r and (len(trained) != 1 or r["grid"] in trained):
      series.setdefault(f"{model_name(r)}, {r['split']}", []).append(r)
  for label, points in series.items():
    points = sorted(points, key=lambda r: r["gflops"])
    single = len(points[0].get("trained_grids", ())) == 1
    x = [r["gflops"] for r in points]
    y = [100 * r[metric] for r in points]
    style = "s--" if single else "o-"
    axes.plot(x, y, style if len(x) > 1 else "s", label=label)
    for r, a, b in zip(points, x, y, strict=True):
      if r["grid"]:
        axes.annotate(
          r["grid"], (a, b), (0, 6), textcoords="offset points", ha="center"
        )
  axes.set_xlabel("GFLOPs for an image or clip (multiply-add = 2)")
  axes.set_ylabel(METRICS[metric])
  axes.set_xlim(left=0)
  axes.margins(y=0.2)
  axes.grid(alpha=0.3)
  axes.legend()
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=150, format="png")
  plt.close(figure)
  return buffer.getvalue()


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
