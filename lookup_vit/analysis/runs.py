"""What runs have left in their work directories, those of one kind together."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lookup_vit import config_utils
from lookup_vit.analysis import ablations, accuracy_vs_flops

# Fields of a model that its name tells.
_OF_SIZE = ("width", "depth", "num_heads", "spatial")


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
    evals: types of the evaluators of its config, by name.
    image_size: of its input.
  """

  workdir: str
  settings: dict[str, Any]
  changes: dict[str, Any]
  rows: list[dict[str, Any]]
  distances: list[dict[str, Any]]
  pictures: dict[str, bytes]
  evals: dict[str, str]
  image_size: tuple[int, ...]

  @property
  def trained(self) -> list[str]:
    """The grids of training; none of what has no compressed grid."""
    return self.rows[0].get("trained_grids", []) if self.rows else []

  @property
  def is_probe(self) -> bool:
    """Whether it is a linear classifier on another run's encoder."""
    return bool(self.rows and self.rows[0].get("probe"))

  @property
  def data(self) -> str:
    """What it was trained on, in words."""
    names = [
      str(value)
      for name, value in self.settings.items()
      if re.fullmatch(r"input\.data\.(name|module|folder)", name)
    ]
    return ", ".join(names) or "several data sets"

  def same_but_grids(self, other: "Run") -> bool:
    """Whether they differ in nothing but their grids and their seed."""
    a, b = dict(self.settings), dict(other.settings)
    return {**a, "grids": None} == {**b, "grids": None}

  def of_type(self, kind: str) -> list[dict[str, Any]]:
    """Rows of one evaluator of a type, that which the run is judged by."""
    rows = [row for row in self.rows if row["type"] == kind]
    names = {row["split"] for row in rows}
    # Those of its training count before those of other files.
    names = config_utils.evals_in_order(names & set(self.evals) or names)
    return [row for row in rows if row["split"] == names[0]]


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
  path = folder / "attention_maps.png"
  pictures = {workdir: path.read_bytes()} if path.exists() else {}
  evals = {name: fields["type"] for name, fields in config.evals.items()}
  run = Run(
    *(workdir, *ablations.settings(config), list(found.values())),
    *([], pictures, evals, tuple(config.input.image_size)),
  )
  rows = run.of_type("feature_distance")
  return dataclasses.replace(run, distances=_distances(folder, rows))


def _distances(folder, rows):
  """Histograms of one evaluator, as far as they are of its rows."""
  if not rows:
    return []
  path = folder / f"feature_distance_{rows[0]['split']}.json"
  means = {
    (row["grid"], value)
    for row in rows
    for name, value in row.items()
    if name.startswith("severity_")
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
    new = ", ".join(words), ", ".join(run.trained), []
    found.setdefault(repr(sorted(run.settings.items())), new)[2].append(run)
  return list(found.values())


def grids(runs: Sequence[Run]) -> list[str | None]:
  """Grids that one of the runs was evaluated at, the smallest first."""
  found = dict.fromkeys(row["grid"] for run in runs for row in run.rows)
  return sorted(found, key=grid_size)


def grid_size(grid: str | None) -> int:
  """Compressed tokens; 0 of a model that has none."""
  return math.prod(config_utils.parse_grid(grid)) if grid else 0


def values(
  runs: Sequence[Run], grid: str | None, kind: str, metric: str
) -> np.ndarray:
  """A metric of each run that has it, by its evaluator of a type."""
  found = []
  for run in runs:
    for row in run.of_type(kind):
      if row["grid"] == grid and metric in row:
        found.append(row[metric])
  return np.array(found)
