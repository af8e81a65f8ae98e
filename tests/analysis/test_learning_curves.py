"""Curves of runs, and how soon they reach a value."""

import json

import numpy as np
import pytest

from lookup_vit import checkpoints, config_utils
from lookup_vit.analysis import learning_curves
from tests import programs, small


def _run(path, values, other="train/loss"):
  checkpoints.write_config(str(path), config_utils.resolve(small.config()))
  rows = [{"step": s, "val/top1": v} for s, v in values.items()]
  rows.insert(1, {"step": 3, other: 0.5})
  lines = [json.dumps(row) + "\n" for row in rows]
  (path / "metrics.jsonl").write_text("".join(lines))
  return str(path)


def test_table_and_picture(tmp_path):
  slow = [
    _run(tmp_path / "a", {10: 0.1, 20: 0.3, 30: 0.5}),
    _run(tmp_path / "b", {10: 0.2, 20: 0.4, 25: 0.9, 30: 0.7}),
  ]
  fast = [_run(tmp_path / "c", {5: 0.1, 10: 0.6, 30: 0.8})]
  output = tmp_path / "curves.png"
  program = programs.Program(
    *("-m", "lookup_vit.analysis.learning_curves"),
    *(f"--curve=slow:{','.join(slow)}", f"--curve=fast:{fast[0]}"),
    f"--output={output}",
  )
  out, error = program.communicate(120)
  assert program.returncode == 0, error
  rows = [line.strip("| ").split(" | ") for line in out.splitlines()[2:4]]
  # The mean end of the first is 0.6: of b alone at a step that both have.
  spread = np.std([50, 70], ddof=1)
  assert rows[0] == ["slow", "2", f"60.00 ± {spread:.2f}", "never, 30", "-"]
  assert rows[1] == ["fast", "1", "80.00", "10", "-"]
  assert output.read_bytes().startswith(b"\x89PNG")
  curve = learning_curves.read("x", slow, "val/top1")
  np.testing.assert_array_equal(curve.steps, [10, 20, 30])
  text = learning_curves.table([curve, curve], 0.3)
  assert text.count("20, 20 | 1.00") == 2


def test_errors(tmp_path):
  a = _run(tmp_path / "a", {10: 0.1})
  b = _run(tmp_path / "b", {20: 0.1}, other="val/3x3/top1")
  with pytest.raises(ValueError, match="'val/2x2/top1'; .*val/3x3/top1"):
    learning_curves.read("x", [b], "val/2x2/top1")
  with pytest.raises(ValueError, match="'x' were measured at no same step"):
    learning_curves.read("x", [a, b], "val/top1")
  with pytest.raises(ValueError, match="no work directory"):
    learning_curves.read("x", [str(tmp_path)], "val/top1")
