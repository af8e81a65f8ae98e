"""Tests of lookup_vit/analysis/accuracy_vs_flops.py."""

import json

import numpy as np
import pytest
from PIL import Image

from lookup_vit.analysis import accuracy_vs_flops
from tests import programs


def row(model, grid, gflops, top1, split="test", **values):
  return dict(
    model=model,
    variant="Ti/4",
    grid=grid,
    split=split,
    parameters=5_717_416,
    gflops=gflops,
    top1=top1,
    **values,
  )


ROWS = [
  row("lookup_vit", "5x5", 2.5, 0.81, top1_compressed=0.8, top1_lookup=0.79),
  row("lookup_vit", "3x3", 1.25, 0.7, top1_compressed=0.65, top1_lookup=0.61),
  row("vit", None, 4.0, 0.805),
  row("lookup_vit", "3x3", 1.25, 0.2, split="corrupted"),
]


def cells(line):
  assert line.startswith("| ") and line.endswith(" |")
  return [c.strip() for c in line[1:-1].split("|")]


def test_table():
  lines = accuracy_vs_flops.table(ROWS).splitlines()
  assert len(lines) == 2 + len(ROWS)
  assert lines[1] == "|" + "---|" * len(cells(lines[0]))
  name = "LookupViT Ti/4"
  assert [cells(line) for line in lines[2:]] == [
    [name, "5x5", "test", "2.500", "5.72", "81.00", "80.00", "79.00"],
    [name, "3x3", "test", "1.250", "5.72", "70.00", "65.00", "61.00"],
    ["ViT Ti/4", "-", "test", "4.000", "5.72", "80.50", "-", "-"],
    [name, "3x3", "corrupted", "1.250", "5.72", "20.00", "-", "-"],
  ]


def test_plot(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(accuracy_vs_flops.plt, "close", figures.append)
  path = tmp_path / "plot.png"
  accuracy_vs_flops.plot([*ROWS, dict(loss=1.0)], str(path))
  monkeypatch.undo()
  (figure,) = figures
  (axes,) = figure.axes
  lines = {
    line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
    for line in axes.lines
  }
  # A line for each model and split, from the cheapest grid to the dearest.
  assert lines == {
    "LookupViT Ti/4, test": ([1.25, 2.5], [70.0, 81.0]),
    "ViT Ti/4, test": ([4.0], [80.5]),
    "LookupViT Ti/4, corrupted": ([1.25], [20.0]),
  }
  assert [(t.get_text(), t.xy) for t in axes.texts] == [
    ("3x3", (1.25, 70.0)),
    ("5x5", (2.5, 81.0)),
    ("3x3", (1.25, 20.0)),
  ]
  assert axes.get_xlim()[0] == 0
  accuracy_vs_flops.plt.close(figure)

  image = np.asarray(Image.open(path).convert("RGB"))
  assert image.shape == (600, 900, 3)
  colours = np.unique(image.reshape(-1, 3), axis=0)
  assert len(colours) > 50 and np.mean(image) > 200


def test_plot_of_single_runs(tmp_path, monkeypatch):
  """Those of one grid each are a line of their own, beside the run of many."""
  figures = []
  monkeypatch.setattr(accuracy_vs_flops.plt, "close", figures.append)
  many = [dict(r, trained_grids=["3x3", "5x5"]) for r in ROWS[:2]]
  alone = [dict(r, trained_grids=[r["grid"]], top1=0.75) for r in ROWS[:2]]
  path = str(tmp_path / "plot.png")
  accuracy_vs_flops.plot([*alone, *many], path)
  monkeypatch.undo()
  lines = {
    line.get_label(): (line.get_linestyle(), list(line.get_ydata()))
    for line in figures[0].axes[0].lines
  }
  assert lines == {
    "LookupViT Ti/4, test": ("-", [70.0, 81.0]),
    "LookupViT Ti/4, one grid, test": ("--", [75.0, 75.0]),
  }
  accuracy_vs_flops.plt.close(figures[0])
  # Nor are they averaged with it.
  text = accuracy_vs_flops.over_seeds([*alone, *many])
  assert text.count("| 1 |") == 4
  assert "Ti/4, one grid |" in accuracy_vs_flops.table(alone)


def test_read(tmp_path):
  path = tmp_path / "results.json"
  with pytest.raises(ValueError, match="no results.json") as e:
    accuracy_vs_flops.read(str(tmp_path))
  assert str(tmp_path) in str(e.value)
  path.write_text(json.dumps(ROWS))
  assert accuracy_vs_flops.read(str(tmp_path)) == ROWS


def test_program(tmp_path):
  for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:])):
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(json.dumps(rows))

  def start(*names):
    return programs.Program(
      "-m",
      "lookup_vit.analysis.accuracy_vs_flops",
      "--workdirs=" + ",".join(str(tmp_path / n) for n in names),
      f"--output={tmp_path}/{'_'.join(names)}.png",
    )

  good, bad = start("a", "b"), start("a", "c")
  out, err = good.communicate(timeout=60)
  assert good.returncode == 0, err
  assert accuracy_vs_flops.table(ROWS) in out
  assert (tmp_path / "a_b.png").stat().st_size > 1000

  _, err = bad.communicate(timeout=60)
  assert bad.returncode == 1
  assert err.startswith("error: ") and err.count("\n") == 1
  assert str(tmp_path / "c") in err
  assert not (tmp_path / "a_c.png").exists()


def test_over_seeds_against_numpy():
  tops = [0.91, 0.97, 0.94]
  base = dict(model="vit", variant="S/4", grid=None, split="test", gflops=1.25)
  rows = [dict(base, parameters=2_000_000, top1=t) for t in tops]
  rows.append(dict(rows[0], model="lookup_vit", grid="2x2", top1=0.5))
  lines = accuracy_vs_flops.over_seeds(rows).splitlines()
  assert lines[2] == (
    "| ViT S/4 | - | 1.250 | 2.00 | 3 | 94.00 | 3.00 | 91.00 to 97.00 |"
  )
  assert lines[3].endswith("| 1 | 50.00 | - | 50.00 to 50.00 |")


def test_over_seeds_of_several_evaluators():
  about = dict(model="vit", variant="S/4", grid=None, gflops=1, parameters=1)
  each = [
    dict(type="classification", split="test", top1=0.5),
    dict(type="classification", split="v2", top1=0.25),
    dict(type="knn", split="knn", **{"20_nn": 0.5}),
    dict(type="linear_probe", split="linear_probe", top1=0.9, C=1.0),
  ]
  rows = [about | row for row in each] + [
    about | each[0] | dict(top1=0.9, probe=True)
  ]
  lines = accuracy_vs_flops.over_seeds(rows).splitlines()[2:]
  names = [line.split("|")[1].strip() for line in lines]
  assert names == [
    "ViT S/4, test",
    "ViT S/4, v2",
    "ViT S/4, linear probe by SGD, test",
  ]
  assert [line.split("|")[6].strip() for line in lines] == [
    "50.00",
    "25.00",
    "90.00",
  ]


def test_probes_of_several_seeds_are_averaged():
  about = dict(model="vit", variant="S/4", grid=None, gflops=1, parameters=1)
  rows = [about | dict(split="few_shot", **{"10_shot": x}) for x in (0.9, 0.1)]
  assert accuracy_vs_flops.table(rows).splitlines()[-1].endswith("| 0.5 |")
