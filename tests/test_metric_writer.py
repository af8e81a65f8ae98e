"""Tests of lookup_vit/metric_writer.py."""

import json
import os

import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from lookup_vit import metric_writer
from tests import fake_bucket, programs


def write(workdir, start_step, rows):
  writer = metric_writer.MetricWriter(str(workdir), start_step)
  for step, values in rows:
    writer.write(step, values)
  writer.close()


def test_lines_and_summaries(tmp_path):
  rows = [
    (2, {"loss": 1.5, "grid": "3x3"}),
    (4, {"loss": 0.1 + 0.2, "grid": "5x5", "lr": 1e-30}),
    (4, {"test/5x5/top1": 0.25}),
  ]
  write(tmp_path, 0, rows)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  want = [{"step": step, **values} for step, values in rows]
  assert [json.loads(line) for line in lines] == want
  assert metric_writer.read(str(tmp_path)) == want

  events = event_accumulator.EventAccumulator(
    str(tmp_path), size_guidance={event_accumulator.TENSORS: 0}
  )
  events.Reload()
  got = {}
  for tag in events.Tags()["tensors"]:
    for e in events.Tensors(tag):
      value = tensor_util.make_ndarray(e.tensor_proto)
      got[tag, e.step] = float(value)
  # Text is in metrics.jsonl alone.
  assert got == {
    ("loss", 2): 1.5,
    ("loss", 4): pytest.approx(0.3, rel=1e-6),
    ("lr", 4): pytest.approx(1e-30, rel=1e-6),
    ("test/5x5/top1", 4): 0.25,
  }


def test_lines_are_there_before_the_writer_is_closed(tmp_path):
  writer = metric_writer.MetricWriter(str(tmp_path), 0)
  writer.write(1, {"loss": 2.0})
  assert metric_writer.read(str(tmp_path)) == [{"step": 1, "loss": 2.0}]
  writer.close()


@pytest.mark.parametrize("start, kept", [(0, 0), (3, 2), (4, 4), (9, 5)])
def test_a_run_that_goes_on_replaces_what_was_written_later(
  tmp_path, start, kept
):
  steps = [2, 3, 4, 4, 6]
  write(tmp_path, 0, [(s, {"loss": float(i)}) for i, s in enumerate(steps)])
  write(tmp_path, start, [(start + 1, {"loss": -1.0})])
  got = metric_writer.read(str(tmp_path))
  want = [{"step": s, "loss": float(i)} for i, s in enumerate(steps[:kept])]
  assert got == [*want, {"step": start + 1, "loss": -1.0}]
  assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
  write(tmp_path, 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
  path = tmp_path / "metrics.jsonl"
  whole = path.read_text()
  # At every place, from the line break to the first character.
  for cut in range(1, len('{"step": 2, "loss": 2.0}\n') + 1):
    path.write_text(whole[:-cut])
    count = 2 if cut == 1 else 1
    assert len(metric_writer.read(str(tmp_path))) == count
    if cut in (1, 2, 10):
      write(tmp_path, 5, [(6, {"loss": 6.0})])
      got = [r["step"] for r in metric_writer.read(str(tmp_path))]
      assert got == [1, 2][:count] + [6]
      assert path.read_text().count("\n") == len(got)


def test_read_without_a_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
    metric_writer.read(str(tmp_path))


def test_in_a_bucket(tmp_path):
  """Metrics and features: a file there is written whole, and has no places."""
  code = """
from lookup_vit import config_utils, metric_writer
from lookup_vit.evaluators import features
import numpy as np

for start in (0, 2):
  writer = metric_writer.MetricWriter("gs://bucket/run", start)
  writer.write(start + 1, {"loss": 1.5})
  writer.write(start + 2, {"loss": 2.5})
  writer.close()
print([row["step"] for row in metric_writer.read("gs://bucket/run")])
path = config_utils.workdir_path("gs://bucket/run") / "features" / "x.npz"
features.save(path, "key", [np.arange(5), np.ones((2, 3))])
print([x.tolist() for x in features.load(path, "key")])
print(features.load(path, "other"))
"""
  root = tmp_path / "root"
  root.mkdir()
  with fake_bucket.serve(root, tmp_path) as (_, env):
    done = programs.Program("-c", code, env={**os.environ, **env})
    out, err = done.communicate(timeout=120)
  assert done.returncode == 0, err
  assert out.splitlines() == [
    "[1, 2, 3, 4]",
    "[[0, 1, 2, 3, 4], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]",
    "None",
  ]
  assert (root / "run" / "metrics.jsonl").read_text().count("\n") == 4
