"""Tests of lookup_vit/analysis/report.py, on runs that are made up."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from lookup_vit import config_utils
from lookup_vit.analysis import corruption_error, report
from tests import small

RNG = np.random.default_rng(0)


def write_run(folder, model, grids, seed, rows, evaluated=(), distances=()):
  """A work directory as training and evaluations leave it."""
  fields = dict(seed=seed, model_name=model, grids=grids, model__dropout=0.0)
  if model == "vit":
    fields |= dict(model=dict(variant="mu/8"), grids=None)
  config = config_utils.resolve(small.config(**fields))
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  about = dict(
    model=model,
    variant="mu/8",
    trained_grids=[config_utils.format_grid(g) for g in grids or ()],
    parameters=1000,
    views=1,
  )
  complete = [about | dict(gflops=1.5) | row for row in rows]
  if rows:
    (folder / "results.json").write_text(json.dumps(complete))
  for step, some in dict(evaluated).items():
    complete = [about | dict(gflops=1.5) | row for row in some]
    (folder / f"evaluation_{step}.json").write_text(json.dumps(complete))
  if distances:
    text = json.dumps(list(distances))
    (folder / "feature_distance_x.json").write_text(text)
  return str(folder)


def row(kind, grid, split=None, **metrics):
  return dict(type=kind, split=split or kind, grid=grid, **metrics)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  found = {}
  for seed, shift in ((0, 0.0), (1, 0.02)):
    rows = [
      row("classification", "2x2", "test", top1=0.9 + shift, loss=1.0),
      row("classification", "3x3", "test", top1=0.95 + shift, loss=1.0),
    ]
    corrupted = {
      f"{c}_{s}": 0.9 - 0.1 * s + shift
      for c in corruption_error.ALEXNET
      for s in range(1, 6)
    }
    newest = [
      row("linear_probe", "2x2", top1=0.8 + shift, C=1.0),
      row("robustness", "2x2", mce=0.4 - shift, top1=0.9, **corrupted),
      row("feature_distance", "2x2", "x", distance=0.3, severity_1=0.3 + shift),
    ]
    shares = RNG.dirichlet(np.ones(100)).tolist()
    found["lookup", seed] = write_run(
      *(root / f"lookup_{seed}", "lookup_vit", [(2, 2), (3, 3)], seed, rows),
      evaluated={
        9: [row("linear_probe", "2x2", top1=0.1, C=1.0)],
        12: newest,
      },
      distances=[
        dict(grid="2x2", severity=1, mean=0.3 + shift, shares=shares),
        # Of another checkpoint.
        dict(grid="3x3", severity=1, mean=0.7, shares=shares),
      ],
    )
  for grid in ("2x2", "3x3"):
    rows = [row("classification", grid, "test", top1=0.9125, loss=1.0)]
    shape = config_utils.parse_grid(grid)
    found["single", grid] = write_run(
      root / f"single_{grid}", "lookup_vit", [shape], 0, rows
    )
  rows = [row("classification", None, "test", top1=0.97, loss=1.0)]
  found["vit"] = write_run(root / "vit", "vit", None, 0, rows)
  found["young"] = write_run(root / "young", "vit", None, 1, [])
  picture = io.BytesIO()
  Image.new("RGB", (3, 2)).save(picture, "png")
  (root / "vit" / "attention_maps.png").write_bytes(picture.getvalue())
  return found


@pytest.fixture(scope="module")
def runs(workdirs):
  return [report.read(workdir) for workdir in workdirs.values()]


def cells(text):
  return [
    [c.strip() for c in line[1:-1].split("|")] for line in text.splitlines()
  ]


def test_main_table(runs):
  head, _, *lines = cells(report.main_table(runs))
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


def test_multi_resolution(runs):
  head, _, *lines = cells(report.multi_resolution(runs))
  assert head == ["trained at", "2x2", "3x3"]
  assert sorted(lines) == [
    ["2x2", "91.25", "-"],
    ["2x2, 3x3", "91.00 ± 1.41", "96.00 ± 1.41"],
    ["3x3", "-", "91.25"],
  ]


def test_corruptions(runs):
  head, _, *lines = cells(report.corruption_table(runs))
  assert head == ["corruption", "LookupViT mu/8 2x2"]
  assert [line[0] for line in lines] == list(corruption_error.ALEXNET)
  # The mean of 0.8 to 0.4, and of the same with 0.02 more.
  assert all(line[1] == "61.00" for line in lines)
  figure, axes = report.plt.subplots()
  assert report.severity_curves(runs, axes)
  [line] = axes.lines
  np.testing.assert_allclose(line.get_ydata(), [90, 81, 71, 61, 51, 41])
  report.plt.close(figure)


def test_distances(runs):
  figure, axes = report.plt.subplots()
  assert not report.distance_curves(runs, axes, 2)
  assert report.distance_curves(runs, axes, 1)
  [line] = axes.lines
  x, y = line.get_xdata(), line.get_ydata()
  assert np.sum(y) * (x[1] - x[0]) == pytest.approx(1)  # A density.
  want = np.mean([r.distances[0]["shares"] for r in runs[:2]], axis=0)
  np.testing.assert_allclose(y * (x[1] - x[0]), want)
  report.plt.close(figure)
  head, _, line = cells(report.distance_table(runs))
  assert head == ["severity", "LookupViT mu/8 2x2"]
  assert line == ["1", "0.310 ± 0.014"]


def test_missing(runs, workdirs):
  text = report.missing(runs)
  lines = text.splitlines()
  lookup = [line for line in lines if workdirs["lookup", 0] in line]
  assert len(lookup) == 2
  few, rest = sorted(lookup, key=lambda line: "few_shot" in line)
  evals = "linear_probe,robustness,feature_distance"
  assert f"--evals={evals} --grid=3x3`" in few
  assert "--evals=few_shot,knn,speed --grid=2x2,3x3`" in rest
  # Those of one grid are to be evaluated at all of the other's.
  single = [line for line in lines if workdirs["single", "3x3"] in line]
  assert any("--evals=test --grid=2x2`" in line for line in single)
  [young] = [line for line in lines if workdirs["young"] in line]
  assert "no results yet" in young


class Images(html.parser.HTMLParser):
  """Pictures, tables and headings of a page."""

  def __init__(self):
    super().__init__()
    self.found, self.tags = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag == "img":
      self.found.append(dict(attrs)["src"])


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_page(runs, tmp_path, suffix):
  folder = tmp_path / "benchmark"
  folder.mkdir()
  (folder / "resolution.md").write_text("| size |\n| --- |\n| 224 |")
  path = tmp_path / f"report.{suffix}"
  report.write(str(path), report.page(runs, [str(folder)]))
  text = path.read_text()
  if suffix == "html":
    parser = Images()
    parser.feed(text)
    pictures = parser.found
    assert parser.tags.count("table") >= 5 and parser.tags.count("h1") == 1
  else:
    pictures = re.findall(r"\]\((data:[^)]+)\)", text)
  # Self-contained: accuracy, severity, distances, attention.
  assert len(pictures) == 4
  for source in pictures:
    start, _, data = source.partition(",")
    assert start == "data:image/png;base64"
    Image.open(io.BytesIO(base64.b64decode(data))).verify()
  for words in ("One model at many budgets", "Ablations", "224", "Missing"):
    assert words in text


def test_results_of_an_earlier_checkpoint_do_not_count(tmp_path):
  about = dict(evaluated={6: [row("classification", None, "test", top1=0.25)]})
  rows = [row("classification", None, "test", top1=0.5)]
  run = report.read(write_run(tmp_path / "done", "vit", None, 0, rows, **about))
  assert report.values([run], None, "classification", "top1") == [0.5]
  # Of a run that is not at its end there is nothing newer.
  run = report.read(write_run(tmp_path / "young", "vit", None, 0, [], **about))
  assert report.values([run], None, "classification", "top1") == [0.25]


@pytest.mark.parametrize("grids", [None, [(2, 2)]])
def test_linear_probes_by_sgd(tmp_path, grids):
  """Runs whose model has an encoder."""
  folders = []
  for lr in (0.1, 0.2):
    backbone = "lookup_vit" if grids else "vit"
    encoder = dict(model_name=backbone, variant="mu/8")
    if grids:
      encoder["grid"] = (2, 2)
    grid = grids and "2x2"
    rows = [row("classification", grid, "val", top1=lr)]
    path = write_run(tmp_path / str(lr), "probe", grids, 0, rows)
    config = json.loads((tmp_path / str(lr) / "config.json").read_text())
    config |= dict(model=dict(encoder=encoder), lr=lr)
    (tmp_path / str(lr) / "config.json").write_text(json.dumps(config))
    folders.append(path)
  runs = [report.read(path) for path in folders]
  assert len(report.groups(runs)) == 2
  assert runs[0].settings["encoder.width"] == 32
  text = report.page(runs)
  assert "20.00" in text and "## Missing" in text


def test_says_what_is_missing_altogether(workdirs):
  text = report.page([report.read(workdirs["vit"])])
  for title in ("One model at many", "Feature distance", "Resolution"):
    assert f"## {title}" not in text and f"- {title}" in text


def test_rows_that_do_not_say_their_type(tmp_path):
  rows = [
    dict(split="test", grid=None, top1=0.5, loss=1.0),
    dict(split="knn", grid=None, **{"20_nn": 0.25}),
  ]
  run = report.read(write_run(tmp_path / "run", "vit", None, 0, rows))
  assert report.values([run], None, "classification", "top1") == [0.5]
  assert report.values([run], None, "knn", "20_nn") == [0.25]


def test_errors(workdirs, tmp_path):
  with pytest.raises(ValueError, match="is no work directory"):
    report.read(str(tmp_path))
  folder = tmp_path / "run"
  path = write_run(folder, "vit", None, 0, [row("classification", None)])
  (folder / "results.json").write_text("[")
  with pytest.raises(ValueError, match="results.json is damaged"):
    report.read(path)
