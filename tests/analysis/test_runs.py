"""Tests of lookup_vit/analysis/runs.py, on runs that are made up."""

import pytest

from lookup_vit.analysis import runs
from tests.analysis.made_up_runs import row, write_run


def test_results_of_an_earlier_checkpoint_do_not_count(tmp_path):
  about = dict(evaluated={6: [row("classification", None, "test", top1=0.25)]})
  rows = [row("classification", None, "test", top1=0.5)]
  run = runs.read(write_run(tmp_path / "done", "vit", None, 0, rows, **about))
  assert runs.values([run], None, "classification", "top1") == [0.5]
  # Of a run that is not at its end there is nothing newer.
  run = runs.read(write_run(tmp_path / "young", "vit", None, 0, [], **about))
  assert runs.values([run], None, "classification", "top1") == [0.25]


def test_rows_that_do_not_say_their_type(tmp_path):
  rows = [
    dict(split="test", grid=None, top1=0.5, loss=1.0),
    dict(split="knn", grid=None, **{"20_nn": 0.25}),
  ]
  run = runs.read(write_run(tmp_path / "run", "vit", None, 0, rows))
  assert runs.values([run], None, "classification", "top1") == [0.5]
  assert runs.values([run], None, "knn", "20_nn") == [0.25]


def test_errors(tmp_path):
  with pytest.raises(ValueError, match="is no work directory"):
    runs.read(str(tmp_path))
  folder = tmp_path / "run"
  path = write_run(folder, "vit", None, 0, [row("classification", None)])
  (folder / "results.json").write_text("[")
  with pytest.raises(ValueError, match="results.json is damaged"):
    runs.read(path)
