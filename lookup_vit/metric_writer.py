"""Metrics to `metrics.jsonl` and to TensorBoard."""

import json
from collections.abc import Mapping

from lookup_vit import config_utils, quiet_tensorflow  # noqa: F401

# isort: split
from clu import metric_writers

_FILE = "metrics.jsonl"


class MetricWriter:
  """Writes metrics of a run; only process 0 should have one.

  `metrics.jsonl` has one JSON object a line: `step` and values by name. A run
  that is taken up again continues the file.

  Args:
    workdir: where to write.
    start_step: lines of later steps, from a run that was cut off, are removed.
  """

  def __init__(self, workdir: str, start_step: int):
    path = config_utils.workdir_path(workdir) / _FILE
    if path.exists():
      kept = [r for r in read(workdir) if r["step"] <= start_step]
      part = path.with_suffix(".tmp")
      part.write_text("".join(json.dumps(r) + "\n" for r in kept))
      part.replace(path)
    self._path = path
    self._summaries = metric_writers.SummaryWriter(str(path.parent))

  def write(self, step: int, values: Mapping[str, float | str]) -> None:
    """Writes values of one step; text goes to `metrics.jsonl` alone."""
    with self._path.open(
      "a"
    ) as file:  # In a bucket, it is written when closed.
      file.write(json.dumps({"step": step, **values}) + "\n")
    numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
    self._summaries.write_scalars(step, numbers)

  def close(self) -> None:
    """Flushes and closes."""
    self._summaries.close()


def names(workdir: str, step: int) -> set[str]:
  """Names of the values that a work directory has of a step."""
  if not (config_utils.workdir_path(workdir) / _FILE).exists():
    return set()
  return {name for row in read(workdir) if row["step"] == step for name in row}


def read(workdir: str) -> list[dict[str, float | str]]:
  """The lines of `metrics.jsonl`; a last line cut off in writing is dropped."""
  rows = []
  path = config_utils.workdir_path(workdir) / _FILE
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows
