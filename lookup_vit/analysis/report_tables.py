"""The report's tables, in Markdown: each says what there is, or nothing."""

from collections.abc import Sequence

import numpy as np

from lookup_vit import config_utils
from lookup_vit.analysis import corruption_error
from lookup_vit.analysis.runs import Run, grid_size, grids, groups, values

# Columns of the main table: title, type of evaluators, metric, and by what it
# is multiplied. Of several evaluators of a type, the first by `evals_in_order`.
COLUMNS = (
  ("top-1 (%)", "classification", "top1", 100),
  ("linear probe (%)", "linear_probe", "top1", 100),
  ("10-shot (%)", "few_shot", "10_shot", 100),
  ("20-NN (%)", "knn", "20_nn", 100),
  ("mean corruption error (%)", "robustness", "mce", 100),
  ("feature distance", "feature_distance", "distance", 1),
  ("ms an image", "speed", "ms", 1),
)

_ERRORS = {
  "mce": "mean corruption error",
  "relative_mce": "relative mean corruption error",
}


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


def main_table(runs: Sequence[Run]) -> str:
  """A row for each model and grid; GFLOPs count a multiply-add as two."""
  head = ["model", "trained at", "grid", "runs", "GFLOPs"]
  lines = []
  for name, trained, members in groups(runs):
    for grid in grids(members):
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
      if run.is_probe and kind != "classification":
        continue
      at = tuple(
        grid
        for grid in _wanted_grids(run, kind, runs)
        if not len(values([run], grid, kind, metric))
      )
      if at:
        lacking.setdefault(at, []).append(kind)
    maps = run.trained and len(run.image_size) == 2 and not run.is_probe
    if maps and not run.pictures:
      command = (
        f"python -m lookup_vit.analysis.attention_maps --workdir={run.workdir} "
        f"--images=FILE --output={run.workdir}/attention_maps.png"
      )
      lines.append(f"- `{run.workdir}`: attention maps. `{command}`")
    for where, kinds in lacking.items():
      at = ",".join(filter(None, where))
      what = ", ".join(kinds) + (f" at {at}" if at else "")
      command = (
        f"python -m lookup_vit.evaluate --workdir={run.workdir} "
        f"--evals={','.join(_names(run, kinds))}"
      )
      command += f" --grid={at}" if at else ""
      lines.append(f"- `{run.workdir}`: {what}. `{command}`")
  return "\n".join(lines) or "Nothing of the tables."


def _wanted_grids(run, kind, runs):
  """Those of its training; of top-1, those of a run at several grids too.

  Where that run differs from it in nothing else.
  """
  trained = run.trained or [None]
  if kind != "classification" or trained == [None]:
    return trained
  several = [
    grid
    for other in runs
    if len(other.trained) > 1 and run.same_but_grids(other)
    for grid in other.trained
  ]
  return list(dict.fromkeys([*trained, *several]))


def _names(run, kinds):
  """What to evaluate: a classification evaluator by its own name."""
  own = [name for name, kind in run.evals.items() if kind == "classification"]
  own = config_utils.evals_in_order(own)[:1] or ["classification"]
  return [own[0] if kind == "classification" else kind for kind in kinds]


def others_table(runs: Sequence[Run]) -> str:
  """Other test sets, and corruption errors, of each model and grid.

  Top-1 of all classification evaluators but that of the main table; mean
  corruption errors; AUPR of out-of-distribution detection.
  """
  # By title: of which rows, and which metric.
  columns: dict[str, tuple[str | None, str, str]] = {}
  for run in runs:
    main = run.of_type("classification")
    for row in run.rows:
      if row["type"] == "classification" and row not in main:
        key = row["split"], "classification", "top1"
        columns[f"{row['split']}: top-1 (%)"] = key
      for metric, title in _ERRORS.items():
        if metric in row:
          columns[f"{title} (%)"] = None, row["type"], metric
      if "aupr" in row:
        columns["AUPR (%)"] = None, row["type"], "aupr"
  lines = []
  for name, trained, members in groups(runs):
    for grid in grids(members):
      cells = []
      for split, kind, metric in columns.values():
        if split is None:
          found = values(members, grid, kind, metric)
        else:
          found = np.array(
            [
              row[metric]
              for run in members
              for row in run.rows
              if (row["split"], row["grid"]) == (split, grid) and metric in row
            ]
          )
        cells.append(_mean(found, 100))
      if any(cell != "-" for cell in cells):
        lines.append([name, trained or "-", grid or "-", *cells])
  if not lines:
    return ""
  return _table(["model", "trained at", "grid", *columns], lines)


def corruption_table(runs: Sequence[Run]) -> str:
  """Top-1 under each corruption, mean over severities (and seeds)."""
  head, columns = ["corruption"], []
  for name, trained, members in groups(runs):
    for grid in grids(members):
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


def _by_severity(members, grid):
  y = [100 * values(members, grid, "robustness", "top1").mean()]
  for s in range(1, 6):
    each = [
      values(members, grid, "robustness", f"{c}_{s}")
      for c in corruption_error.ALEXNET
    ]
    each = np.concatenate([np.zeros(0), *each])
    y.append(100 * each.mean() if len(each) else np.nan)
  return y


def severities(runs: Sequence[Run]) -> list[tuple[str, list[float]]]:
  """Of each model and grid under corruption, a label and top-1 (%).

  At severities 0 to 5, means over corruptions and seeds.
  """
  return [
    (" ".join(filter(None, [name, trained and grid])), _by_severity(some, grid))
    for name, trained, some in groups(runs)
    for grid in grids(some)
    if len(values(some, grid, "robustness", "top1"))
  ]


def severity_table(runs: Sequence[Run]) -> str:
  """Top-1 at each severity, mean over corruptions and seeds."""
  found = severities(runs)
  if not found:
    return ""
  head = ["severity", *(label for label, _ in found)]
  lines = []
  for s in range(6):
    cells = [f"{y[s]:.2f}" if np.isfinite(y[s]) else "-" for _, y in found]
    lines.append([str(s) if s else "none", *cells])
  return _table(head, lines)


def distance_table(runs: Sequence[Run]) -> str:
  """Mean distance of features at each severity, mean over seeds."""
  kind, head, columns = "feature_distance", ["severity"], []
  for name, trained, members in groups(runs):
    for grid in grids(members):
      if len(values(members, grid, kind, "distance")):
        head.append(" ".join(filter(None, [name, trained and grid])))
        columns.append((members, grid))
  lines = []
  for s in range(1, 6):
    each = [values(*column, kind, f"severity_{s}") for column in columns]
    if any(len(x) for x in each):
      lines.append([str(s), *(_mean(x, 1, 3) for x in each)])
  return _table(head, lines) if lines else ""


def multi_resolution(runs: Sequence[Run]) -> str:
  """Top-1 of one model at all grids beside those trained at one grid each.

  A table for each model that was trained at several grids, with those that
  differ from it in nothing else.
  """
  found, tables = groups(runs), []
  for name, trained, members in found:
    like = [
      (at, some)
      for _, at, some in found
      if at and members[0].same_but_grids(some[0])
    ]
    if "," not in trained or all("," in at for at, _ in like):
      continue
    at_all = sorted(members[0].trained, key=grid_size)
    lines = []
    for at, some in sorted(like, key=lambda pair: "," in pair[0]):
      tops = [values(some, grid, "classification", "top1") for grid in at_all]
      lines.append([at, *(_mean(x, 100) for x in tops)])
    table = _table(["trained at", *at_all], lines)
    tables.append(f"{name}, {members[0].data}:\n\n{table}")
  return "\n\n".join(tables)
