r"""One page on any runs: tables, figures, and what is missing.

python -m lookup_vit.analysis.report --output=report.html \
        --workdirs=workdirs/lookup_0,workdirs/lookup_1,workdirs/vit_0

The page is self-contained: HTML, or Markdown where the output ends in `.md`.
Runs that differ in their seed alone are a row, with mean and standard deviation
(over n - 1). What was evaluated after training counts too
(`evaluation_STEP.json`), of the last step alone; of a run that has not come to
its end, of the newest.
"""

import base64
import dataclasses
import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import markdown
import matplotlib
import numpy as np
from absl import flags
from etils import epath

from lookup_vit import cli, config_utils
from lookup_vit.analysis import ablations, accuracy_vs_flops, corruption_error

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAGS = flags.FLAGS

# Columns of the main table: title, types of evaluators, metric, and by what it
# is multiplied. An evaluator of the first type that a run has counts.
COLUMNS = (
  ("top-1 (%)", "classification", "top1", 100),
  ("linear probe (%)", "linear_probe", "top1", 100),
  ("10-shot (%)", "few_shot", "10_shot", 100),
  ("20-NN (%)", "knn", "20_nn", 100),
  ("mean corruption error (%)", "robustness", "mce", 100),
  ("feature distance", "feature_distance", "distance", 1),
  ("ms an image", "speed", "ms", 1),
)

# Fields of a model that its name tells.
_OF_SIZE = ("width", "depth", "num_heads", "spatial")

_NOTE = (
  "Mean and standard deviation over seeds. The corruption error is over the "
  "corruptions and severities of a run's evaluator, and AlexNet's where its "
  "`reference` says so: compare rows of the same."
)

_STYLE = (
  "body{font-family:sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
  "table{border-collapse:collapse;margin:1em 0}"
  "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}"
  "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What a work directory holds.

  Attributes:
    workdir: the directory.
    settings: what it learns by but for its seed (`ablations.settings`).
    changes: those fields of its model that are not as they are by default.
    rows: of results, as `summary.results` makes them, newer ones in place of
      older.
    distances: histograms of `evaluators/feature_distance.py`.
    pictures: of attention, by title: PNGs.
  """

  workdir: str
  settings: dict[str, Any]
  changes: dict[str, Any]
  rows: list[dict[str, Any]]
  distances: list[dict[str, Any]]
  pictures: dict[str, bytes]


def read(workdir: str) -> Run:
  """Reads what a run, and evaluations after it, have left.

  Raises:
    ValueError: it is no work directory, or a file of results is damaged.
  """
  config = config_utils.read_workdir(workdir)
  folder = config_utils.workdir_path(workdir)
  found: dict[tuple[str, str | None], dict[str, Any]] = {}
  evaluations = {
    int(path.stem.rpartition("_")[2]): path
    for path in folder.glob("evaluation_*.json")
  }
  paths = [folder / "results.json"]
  if paths[0].exists():
    paths += [
      path for s, path in evaluations.items() if s == config.total_steps
    ]
  elif evaluations:
    paths = [evaluations[max(evaluations)]]
  for path in paths:
    if path.exists():
      for row in config_utils.read_json(path):
        own = config.evals.get(row["split"], {"type": row["split"]})
        row.setdefault("type", own["type"])  # Of runs that do not say.
        found[row["split"], row["grid"]] = row
  distances = _distances(folder, found.values())
  path = folder / "attention_maps.png"
  pictures = {workdir: path.read_bytes()} if path.exists() else {}
  settings = ablations.settings(config)
  return Run(workdir, *settings, list(found.values()), distances, pictures)


def _distances(folder, rows):
  """Histograms of the first evaluator of them, as far as they are of rows."""
  rows = [row for row in rows if row["type"] == "feature_distance"]
  if not rows:
    return []
  path = folder / f"feature_distance_{rows[0]['split']}.json"
  means = {
    (row["grid"], value)
    for row in rows
    for name, value in row.items()
    if row["split"] == rows[0]["split"] and name.startswith("severity_")
  }
  histograms = config_utils.read_json(path) if path.exists() else []
  return [h for h in histograms if (h["grid"], h.get("mean")) in means]


def groups(runs: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
  """Runs that differ in their seed alone together, those that have results.

  Returns:
    For each group its model, by name and by what is changed in it, the grids of
    training, and the runs.
  """
  found: dict[str, tuple[str, str, list[Run]]] = {}
  for run in runs:
    if not run.rows:
      continue
    row = run.rows[0]
    told = [*_OF_SIZE, *re.findall(r"[(,] ?(\w+) ", row["variant"])]
    changes = {k: v for k, v in run.changes.items() if k not in told}
    words = [accuracy_vs_flops.model_name(row)]
    words += [f"{name} {value}" for name, value in changes.items()]
    trained = ", ".join(row.get("trained_grids", ()))
    new = ", ".join(words), trained, []
    found.setdefault(repr(sorted(run.settings.items())), new)[2].append(run)
  return list(found.values())


def _grids(runs):
  """Grids that one of the runs was evaluated at, the smallest first."""
  found = dict.fromkeys(row["grid"] for run in runs for row in run.rows)
  size = lambda grid: math.prod(config_utils.parse_grid(grid))  # noqa: E731
  return sorted(found, key=lambda grid: size(grid) if grid else 0)


def values(
  runs: Sequence[Run], grid: str | None, kind: str, metric: str
) -> np.ndarray:
  """A metric of each run that has it, of its first evaluator of a type."""
  found = []
  for run in runs:
    there = [
      row[metric]
      for row in run.rows
      if (row.get("type"), row["grid"]) == (kind, grid) and metric in row
    ]
    found += there[:1]
  return np.array(found)


def _mean(x, factor=1.0, digits=2):
  """Mean, with the standard deviation where there are several."""
  if not len(x):
    return "-"
  text = f"{factor * x.mean():.{digits}f}"
  if len(x) > 1:
    text += f" ± {factor * x.std(ddof=1):.{digits}f}"
  return text


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  rows = [head, ["---"] * len(head), *lines]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Sections: each gives the lines of Markdown of what there is, or none.


def main_table(runs: Sequence[Run]) -> str:
  """A row for each model and grid; GFLOPs count a multiply-add as two."""
  head = ["model", "trained at", "grid", "runs", "GFLOPs"]
  lines = []
  for name, trained, members in groups(runs):
    for grid in _grids(members):
      gflops = next(
        row["gflops"]
        for run in members
        for row in run.rows
        if row["grid"] == grid
      )
      cells = [name, trained or "-", grid or "-", str(len(members))]
      cells.append(f"{gflops:.3g}")
      for _, kind, metric, factor in COLUMNS:
        digits = 2 if factor == 100 else 3
        cells.append(_mean(values(members, grid, kind, metric), factor, digits))
      lines.append(cells)
  return _table([*head, *(title for title, *_ in COLUMNS)], lines)


def missing(runs: Sequence[Run]) -> str:
  """What the main table lacks, and the commands that make it."""
  lines = []
  for run in runs:
    if not run.rows:
      lines.append(
        f"- `{run.workdir}`: no results yet. Train it to its end: "
        "`python -m lookup_vit.train` with its config."
      )
      continue
    lacking: dict[tuple[str | None, ...], list[str]] = {}
    for _, kind, metric, _ in COLUMNS:
      grids = tuple(
        grid
        for grid in _wanted_grids(run, kind, runs)
        if not len(values([run], grid, kind, metric))
      )
      if grids:
        lacking.setdefault(grids, []).append(kind)
    for grids, kinds in lacking.items():
      at = ",".join(filter(None, grids))
      what = ", ".join(kinds) + (f" at {at}" if at else "")
      command = (
        f"python -m lookup_vit.evaluate --workdir={run.workdir} "
        f"--evals={','.join(_names(run, kinds))}"
      )
      command += f" --grid={at}" if at else ""
      lines.append(f"- `{run.workdir}`: {what}. `{command}`")
  return "\n".join(lines) or "Nothing of the tables."


def _wanted_grids(run, kind, runs):
  """Those of its training; of top-1, those of models trained at several too."""
  trained = run.rows[0].get("trained_grids") or [None]
  if kind != "classification" or trained == [None]:
    return trained
  others = [r.rows[0].get("trained_grids", ()) for r in runs if r.rows]
  several = [grid for grids in others if len(grids) > 1 for grid in grids]
  return list(dict.fromkeys([*trained, *several]))


def _names(run, kinds):
  """What to evaluate: a classification evaluator by its own name."""
  own = {row.get("type"): row["split"] for row in reversed(run.rows)}
  return [own[k] if k == "classification" and k in own else k for k in kinds]


def corruption_table(runs: Sequence[Run]) -> str:
  """Top-1 under each corruption, mean over severities (and seeds)."""
  head, columns = ["corruption"], []
  for name, trained, members in groups(runs):
    for grid in _grids(members):
      if len(values(members, grid, "robustness", "mce")):
        head.append(" ".join(filter(None, [name, trained and grid])))
        columns.append((members, grid))
  lines = []
  for corruption in corruption_error.ALEXNET:
    cells = []
    for members, grid in columns:
      each = [
        values(members, grid, "robustness", f"{corruption}_{s}").mean()
        for s in range(1, 6)
        if len(values(members, grid, "robustness", f"{corruption}_{s}"))
      ]
      cells.append(f"{100 * np.mean(each):.2f}" if each else "-")
    if any(cell != "-" for cell in cells):
      lines.append([corruption, *cells])
  return _table(head, lines) if lines else ""


def severity_curves(runs: Sequence[Run], axes: Any) -> bool:
  """Top-1 over severity, mean over corruptions and seeds."""
  drawn = False
  for name, trained, members in groups(runs):
    for grid in _grids(members):
      y = []
      for s in range(1, 6):
        each = [
          values(members, grid, "robustness", f"{c}_{s}")
          for c in corruption_error.ALEXNET
        ]
        each = np.concatenate([np.zeros(0), *each])
        y.append(100 * each.mean() if len(each) else np.nan)
      if not np.all(np.isnan(y)):
        label = " ".join(filter(None, [name, trained and grid]))
        clean = values(members, grid, "robustness", "top1")
        axes.plot(range(6), [100 * clean.mean(), *y], "o-", label=label)
        drawn = True
  axes.set_xlabel("severity (0: as they are)")
  axes.set_ylabel("top-1 (%)")
  return drawn


def distance_table(runs: Sequence[Run]) -> str:
  """Mean distance of features at each severity, mean over seeds."""
  kind, head, columns = "feature_distance", ["severity"], []
  for name, trained, members in groups(runs):
    for grid in _grids(members):
      if len(values(members, grid, kind, "distance")):
        head.append(" ".join(filter(None, [name, trained and grid])))
        columns.append((members, grid))
  lines = []
  for s in range(1, 6):
    each = [values(*column, kind, f"severity_{s}") for column in columns]
    if any(len(x) for x in each):
      lines.append([str(s), *(_mean(x, 1, 3) for x in each)])
  return _table(head, lines) if lines else ""


def distance_curves(runs: Sequence[Run], axes: Any, severity: int) -> bool:
  """Distribution of the features' distances at a severity, over seeds."""
  drawn = False
  for name, trained, members in groups(runs):
    found: dict[str | None, list[list[float]]] = {}
    for run in members:
      for histogram in run.distances:
        if histogram["severity"] == severity:
          found.setdefault(histogram["grid"], []).append(histogram["shares"])
    for grid, shares in found.items():
      mean = np.mean(shares, axis=0)
      middles = (np.arange(len(mean)) + 0.5) * 2 / len(mean)
      label = " ".join(filter(None, [name, trained and grid]))
      axes.plot(middles, mean * len(mean) / 2, label=label)
      drawn = True
  axes.set_title(f"severity {severity}")
  axes.set_xlabel("distance (1: another image)")
  axes.set_ylabel("density")
  return drawn


def multi_resolution(runs: Sequence[Run]) -> str:
  """Top-1 of one model at all grids beside those trained at one grid each."""
  found = groups(runs)
  is_single = [bool(at) and "," not in at for _, at, _ in found]
  lines, head = [], []
  for name, trained, members in found:
    if "," not in trained or not any(is_single):
      continue
    grids = _grids(members)
    head = ["trained at", *(grid or "-" for grid in grids)]
    for other, at, some in found:
      if other.replace(", one grid", "") == name and at:
        cells = [
          _mean(values(some, grid, "classification", "top1"), 100)
          for grid in grids
        ]
        lines.append([at, *cells])
  return _table(head, lines) if lines else ""


def _figure(draws: Sequence[Callable[..., bool]], runs) -> bytes | None:
  """A panel for each of what there is."""
  figure, panels = plt.subplots(
    *(1, len(draws)),
    figsize=(6, 4) if len(draws) == 1 else (3.5 * len(draws), 3.5),
    layout="constrained",
    squeeze=False,
  )
  try:
    drawn = []
    for draw, axes in zip(draws, panels[0], strict=True):
      if draw(runs, axes):
        axes.grid(alpha=0.3)
        drawn.append(axes)
      else:
        axes.remove()
    if not drawn:
      return None
    drawn[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()
  finally:
    plt.close(figure)


def _accuracy_figure(runs):
  """Means over seeds."""
  rows = []
  for _, _, members in groups(runs):
    found: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in (row for run in members for row in run.rows):
      if row.get("type") == "classification":
        found.setdefault((row["split"], row["grid"]), []).append(row)
    for same in found.values():
      rows.append(same[0] | {"top1": np.mean([row["top1"] for row in same])})
  return accuracy_vs_flops.draw(rows) if rows else None


def _ablations(runs):
  """Tables of `ablations.py`, where runs differ in more than seed and kind."""
  some = [
    run
    for run in runs
    if any(
      row.get("trained_grids") and row.get("type") == "classification"
      for row in run.rows
    )
  ]
  found = [ablations.read(run.workdir) for run in some]
  if not found or len(ablations.group(found)) == 1:
    return ""
  return ablations.report(found)


def page(runs: Sequence[Run], folders: Sequence[str] = ()) -> str:
  """The page in Markdown, pictures within.

  Args:
    runs: at least one.
    folders: of benchmarks' output, whose tables and plots are taken over.
  """
  parts = ["# LookupViT: report", main_table(runs), _NOTE]
  absent = []

  def add(title, content, how):
    if not content:
      absent.append(f"- {title}: {how}")
      return
    if isinstance(content, bytes):
      content = _embed(title, content)
    parts.extend([f"## {title}", content])

  evaluated = "`python -m lookup_vit.evaluate --evals={}`"
  add(
    "Accuracy against FLOPs",
    _accuracy_figure(runs),
    evaluated.format("NAME") + " of a classification evaluator",
  )
  add(
    "One model at many budgets",
    multi_resolution(runs),
    "give a run at several grids, and runs at one grid each",
  )
  how = evaluated.format("robustness")
  add("Top-1 under corruption (%)", corruption_table(runs), how)
  add("Top-1 over severity", _figure([severity_curves], runs), how)
  how = evaluated.format("feature_distance")
  add("Feature distance", distance_table(runs), how)
  curves = [functools.partial(distance_curves, severity=s) for s in range(1, 6)]
  add("Distribution of feature distances", _figure(curves, runs), how)
  tables = _ablations(runs)
  add("Ablations and stability", tables, "`bash launch/ablations.sh`")
  content = [
    _embed(title, picture)
    for run in runs
    for title, picture in run.pictures.items()
  ]
  how = "`python -m lookup_vit.analysis.attention_maps`"
  add("Attention maps", "\n\n".join(content), how)
  content = []
  for folder in folders:
    for path in sorted(epath.Path(folder).glob("*.md")):
      content.append(path.read_text())
    for path in sorted(epath.Path(folder).glob("*.png")):
      content.append(_embed(path.stem, path.read_bytes()))
  how = "`python -m benchmarks.resolution --output=DIR`, and `--benchmarks=DIR`"
  add("Resolution", "\n\n".join(content), how)
  parts += ["## Missing", "\n".join([missing(runs), *absent])]
  return "\n\n".join(parts) + "\n"


def _embed(title, picture):
  data = base64.b64encode(picture).decode()
  return f"![{title}](data:image/png;base64,{data})\n\n{title}"


def write(path: str, text: str) -> None:
  """Writes a page, as HTML unless the path ends in `.md`."""
  path = epath.Path(path)
  if path.suffix != ".md":
    body = markdown.markdown(text, extensions=["tables", "sane_lists"])
    text = (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      f"<title>LookupViT: report</title><style>{_STYLE}</style></head>\n"
      f"<body>\n{body}\n</body></html>\n"
    )
  path.write_text(text)


def main(argv):
  """Writes the page of the runs that the flags name."""
  del argv
  folders = FLAGS.benchmarks
  for folder in folders:
    if not epath.Path(folder).is_dir():
      raise ValueError(f"--benchmarks: {folder} is no directory.")
  runs = [read(workdir) for workdir in FLAGS.workdirs]
  if not any(run.rows for run in runs):
    raise ValueError("--workdirs: none has results yet.")
  write(FLAGS.output, page(runs, folders))
  print(f"Written: {FLAGS.output}")


if __name__ == "__main__":
  flags.DEFINE_list("workdirs", None, "Work directories.", required=True)
  flags.DEFINE_list("benchmarks", [], "Output of benchmarks.resolution.")
  flags.DEFINE_string("output", "report.html", "The page, .html or .md.")
  cli.run(main)
