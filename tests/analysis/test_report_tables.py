"""Tests of lookup_vit/analysis/report_tables.py, on runs that are made up."""

import json

from lookup_vit import config_utils
from lookup_vit.analysis import corruption_error, report_tables, runs
from tests.analysis.made_up_runs import cells, row, write_run


def test_main_table(found):
  head, _, *lines = cells(report_tables.main_table(found))
  table = {(line[0], line[1], line[2]): line for line in lines}
  assert len(table) == len(lines) == 2 + 2 + 1
  name = "LookupViT mu/8"
  line = dict(zip(head, table[name, "2x2, 3x3", "2x2"], strict=True))
  assert line["runs"] == "2" and line["GFLOPs"] == "1.5"
  # Of two that are 0.02 apart, the standard deviation is 0.02 / sqrt(2).
  assert line["top-1 (%)"] == "91.00 ± 1.41"
  assert line["linear probe (%)"] == "81.00 ± 1.41"
  assert line["mean corruption error (%)"] == "39.00 ± 1.41"
  assert line["10-shot (%)"] == line["ms an image"] == "-"
  line = dict(zip(head, table["ViT mu/8", "-", "-"], strict=True))
  assert (line["runs"], line["top-1 (%)"]) == ("1", "97.00")


def test_multi_resolution(found):
  title, table = report_tables.multi_resolution(found).split("\n\n")
  assert title == "LookupViT mu/8, data.digits:"
  head, _, *lines = cells(table)
  assert head == ["trained at", "2x2", "3x3"]
  assert sorted(lines) == [
    ["2x2", "91.25", "-"],
    ["2x2, 3x3", "91.00 ± 1.41", "96.00 ± 1.41"],
    ["3x3", "-", "91.25"],
  ]


def test_multi_resolution_of_several_data_sets(tmp_path):
  """Each with its own grids; what has no single runs is left out."""
  folders = []
  for name, batch, grids in (
    ("a", 16, [(2, 2), (3, 3)]),
    ("a_single", 16, [(2, 2)]),
    ("b", 8, [(1, 1), (2, 3)]),
    ("b_single", 8, [(2, 3)]),
    ("c", 4, [(1, 2), (2, 2)]),
  ):
    tops = [
      row("classification", config_utils.format_grid(grid), "test", top1=0.01)
      for grid in grids
    ]
    path = write_run(tmp_path / name, "lookup_vit", grids, 0, tops)
    file = tmp_path / name / "config.json"
    config = json.loads(file.read_text())
    config["input"]["batch_size"] = batch
    file.write_text(json.dumps(config))
    folders.append(path)
  found = [runs.read(path) for path in folders]
  text = report_tables.multi_resolution(found)
  heads = [line for line in text.splitlines() if "trained at" in line]
  assert heads == [
    "| trained at | 2x2 | 3x3 |",
    "| trained at | 1x1 | 2x3 |",
  ]
  assert "1x2" not in text
  lines = report_tables.missing(found).splitlines()
  asked = [line for line in lines if "--evals=test " in line]
  assert len(asked) == 2
  assert "a_single" in asked[0] and asked[0].endswith("--grid=3x3`")
  assert "b_single" in asked[1] and asked[1].endswith("--grid=1x1`")


def test_corruptions(found):
  head, _, *lines = cells(report_tables.corruption_table(found))
  assert head == ["corruption", "LookupViT mu/8 2x2"]
  assert [line[0] for line in lines] == list(corruption_error.ALEXNET)
  # The mean of 0.8 to 0.4, and of the same with 0.02 more.
  assert all(line[1] == "61.00" for line in lines)
  head, _, *lines = cells(report_tables.severity_table(found))
  assert head == ["severity", "LookupViT mu/8 2x2"]
  want = zip(["none", *"12345"], [90, 81, 71, 61, 51, 41], strict=True)
  assert lines == [[s, f"{top1:.2f}"] for s, top1 in want]


def test_distances(found):
  head, _, line = cells(report_tables.distance_table(found))
  assert head == ["severity", "LookupViT mu/8 2x2"]
  assert line == ["1", "0.310 ± 0.014"]


def test_missing(found, workdirs):
  text = report_tables.missing(found)
  lines = text.splitlines()
  lookup = [line for line in lines if workdirs["lookup", 0] in line]
  assert len(lookup) == 3
  maps, few, rest = sorted(
    lookup, key=lambda line: ("evaluate" in line, "few_shot" in line)
  )
  folder = workdirs["lookup", 0]
  assert f"--workdir={folder} --images=FILE --output={folder}/att" in maps
  evals = "linear_probe,robustness,feature_distance"
  assert f"--evals={evals} --grid=3x3`" in few
  assert "--evals=few_shot,knn,speed --grid=2x2,3x3`" in rest
  # Those of one grid are to be evaluated at all of the other's.
  single = [line for line in lines if workdirs["single", "3x3"] in line]
  assert any("--evals=test --grid=2x2`" in line for line in single)
  [young] = [line for line in lines if workdirs["young"] in line]
  assert "no results yet" in young


def test_other_test_sets(tmp_path):
  """None of them passes for that which the run is judged by."""
  rows = [
    row("classification", None, "a", top1=0.1),
    row("classification", None, "test", top1=0.9),
    row("classification", None, "v2", top1=0.7),
    row("robustness", None, "c", mce=0.6, relative_mce=0.5, top1=0.9),
    row("out_of_distribution", None, "o", aupr=0.25),
  ]
  found = [runs.read(write_run(tmp_path / "vit", "vit", None, 0, rows))]
  head, _, line = cells(report_tables.main_table(found))
  assert dict(zip(head, line, strict=True))["top-1 (%)"] == "90.00"
  head, _, line = cells(report_tables.others_table(found))
  assert dict(zip(head, line, strict=True)) == {
    "model": "ViT mu/8",
    "trained at": "-",
    "grid": "-",
    "a: top-1 (%)": "10.00",
    "v2: top-1 (%)": "70.00",
    "mean corruption error (%)": "60.00",
    "relative mean corruption error (%)": "50.00",
    "AUPR (%)": "25.00",
  }
  # It has no name in the config of the run.
  found[0].evals.clear()
  assert "--evals=linear_probe" in report_tables.missing(found)
  found[0].rows.clear()
  assert report_tables.others_table(found) == ""
