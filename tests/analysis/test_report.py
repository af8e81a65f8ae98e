"""Tests of lookup_vit/analysis/report.py, on runs that are made up."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from lookup_vit.analysis import report, runs
from tests.analysis.made_up_runs import row, write_run


def test_curves(found):
  figure, axes = report.plt.subplots()
  assert report.severity_curves(found, axes)
  [line] = axes.lines
  np.testing.assert_allclose(line.get_ydata(), [90, 81, 71, 61, 51, 41])
  report.plt.close(figure)
  figure, axes = report.plt.subplots()
  assert not report.distance_curves(found, axes, 2)
  assert report.distance_curves(found, axes, 1)
  [line] = axes.lines
  x, y = line.get_xdata(), line.get_ydata()
  assert np.sum(y) * (x[1] - x[0]) == pytest.approx(1)  # A density.
  want = np.mean([r.distances[0]["shares"] for r in found[:2]], axis=0)
  np.testing.assert_allclose(y * (x[1] - x[0]), want)
  report.plt.close(figure)


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
def test_page(found, tmp_path, suffix):
  folder = tmp_path / "benchmark"
  folder.mkdir()
  (folder / "resolution.md").write_text("| size |\n| --- |\n| 224 |")
  path = tmp_path / f"report.{suffix}"
  report.write(str(path), report.page(found, [str(folder)]))
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
    rows = [row("classification", grid, "val", top1=lr, probe=True)]
    path = write_run(tmp_path / str(lr), "probe", grids, 0, rows)
    config = json.loads((tmp_path / str(lr) / "config.json").read_text())
    config |= dict(model=dict(encoder=encoder), lr=lr)
    (tmp_path / str(lr) / "config.json").write_text(json.dumps(config))
    folders.append(path)
  found = [runs.read(path) for path in folders]
  assert len(runs.groups(found)) == 2
  assert found[0].settings["encoder.width"] == 32
  text = report.page(found)
  assert "20.00" in text and "## Missing" in text
  # They are no trainings of a backbone, and lack nothing.
  lines = [
    line for line in text.splitlines() if ", linear probe by SGD" in line
  ]
  assert len(lines) == 2
  assert "lookup_vit.evaluate --workdir" not in text


def test_a_run_without_top1_in_its_results(tmp_path):
  rows = [row("knn", "2x2", **{"20_nn": 0.5})]
  top1 = [row("classification", "2x2", "v2", top1=0.25)]
  path = write_run(
    tmp_path / "run", "lookup_vit", [(2, 2)], 0, rows, evaluated={12: top1}
  )
  text = report.page([runs.read(path)])
  assert "25.00" in text and "50.00" in text


def test_says_what_is_missing_altogether(workdirs):
  text = report.page([runs.read(workdirs["vit"])])
  for title in ("One model at many", "Feature distance", "Resolution"):
    assert f"## {title}" not in text and f"- {title}" in text
