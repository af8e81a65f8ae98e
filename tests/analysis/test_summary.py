"""Tests of lookup_vit/analysis/summary.py."""

import json

import numpy as np
import pytest
from PIL import Image

from lookup_vit import config_utils, train_step
from lookup_vit.analysis import (
  accuracy_vs_flops,
  attention_maps,
  flops,
  summary,
)
from tests import small


def program_of(name="lookup_vit", **fields):
  """The program of a small config, for 10 classes."""
  config = small.config(model__dropout=0.0, num_classes=10)
  if name == "vit":
    config.model_name = "vit"
    config.model = dict(variant="mu/8")
    config.grids = None
  with config.unlocked():
    config.model.update(fields)
  return train_step.Program(config_utils.resolve(config), 10)


@pytest.fixture(scope="module")
def program():
  return program_of()


METRICS = {
  "test/1x3/top1": 0.5,
  "test/2x2/top1": 0.75,
  "test/1x3/loss": 1.5,
  "corrupted/2x2/top1": 0.25,
  "test/2x2/loss": 1.25,
  "corrupted/2x2/top1_lookup": 0.125,
}


def test_results_by_evaluator_and_grid(program):
  rows = summary.results(program, METRICS)
  costs = {g: flops.cost(program.model, (32, 32), g) for g in ((1, 3), (2, 2))}
  assert costs[1, 3].xla_flops != costs[2, 2].xla_flops

  def row(split, grid, **values):
    cost = costs[config_utils.parse_grid(grid)]
    return dict(
      model="lookup_vit",
      variant="mu/8 (depth 1)",
      grid=grid,
      trained_grids=["2x2", "1x3"],
      split=split,
      type="classification" if split == "test" else None,
      parameters=cost.params,
      gflops=cost.xla_flops / 1e9,
      views=1,
      **values,
    )

  assert rows == [
    row("test", "1x3", top1=0.5, loss=1.5),
    row("test", "2x2", top1=0.75, loss=1.25),
    row("corrupted", "2x2", top1=0.25, top1_lookup=0.125),
  ]


def test_results_without_a_grid():
  program = program_of("vit")
  rows = summary.results(program, {"test/top1": 0.5, "val/top1": 0.25})
  cost = flops.cost(program.model, (32, 32))
  same = dict(
    model="vit",
    variant="mu/8",
    grid=None,
    trained_grids=[],
    parameters=cost.params,
    gflops=cost.xla_flops / 1e9,
    views=1,
  )
  assert rows == [
    dict(same, split="test", type="classification", top1=0.5),
    dict(same, split="val", type=None, top1=0.25),
  ]


@pytest.mark.parametrize(
  "fields, variant",
  [
    (dict(), "mu/8"),
    (dict(width=64), "mu/8 (width 64)"),
    (dict(depth=3), "mu/8 (depth 3)"),
    (dict(depth=3, width=64), "mu/8 (width 64, depth 3)"),
    (dict(stem="conv", width=64), "mu/8 (width 64, stem conv)"),
    (dict(pool="tok"), "mu/8 (pool tok)"),
    # No other model.
    (dict(dropout=0.1), "mu/8"),
  ],
)
def test_variant_names_what_the_config_changes(monkeypatch, fields, variant):
  monkeypatch.setattr(flops, "cost", lambda *args: flops.Cost(1, *[1.0] * 4))
  (row,) = summary.results(program_of("vit", **fields), {"test/top1": 0.5})
  assert row["variant"] == variant


def test_views_of_an_evaluator():
  program = program_of("vit")
  with program.config.unlocked():
    program.config.evals.test.views = 12
  row, other = summary.results(program, {"test/top1": 0.5, "val/top1": 0.25})
  assert (row["views"], other["views"]) == (12, 1)
  # The cost is still that of one.
  assert row["gflops"] == other["gflops"]
  lines = accuracy_vs_flops.table([row, other]).splitlines()
  cells = [line.split(" | ")[3] for line in lines[2:]]
  assert cells[0] == f"{cells[1]} x 12"


def test_no_metrics_are_no_rows(program):
  assert summary.results(program, {}) == []


# What is written.


@pytest.fixture
def write(monkeypatch, tmp_path, capsys):
  """Writes a summary; returns stdout and the names of the files."""
  costs = flops.Cost(2_000_000, *[1.5e9] * 4)
  monkeypatch.setattr(flops, "cost", lambda *args: costs)

  def run(program, metrics, images=None):
    params = program.init_state().params
    summary.write(str(tmp_path), program, metrics, params, images)
    names = {path.name for path in tmp_path.iterdir()}
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows == summary.results(program, metrics)
    return capsys.readouterr().out, names

  return run


IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3))
IMAGES = IMAGES.astype(np.float32)


def test_write(write, program, monkeypatch, tmp_path):
  drawn = []
  draw = attention_maps.draw

  def spy(path, rows):
    drawn.extend(rows)
    draw(path, rows)

  monkeypatch.setattr(attention_maps, "draw", spy)
  out, names = write(program, METRICS, IMAGES)
  pictures = {"accuracy_vs_flops.png", "attention_maps.png"}
  assert names == {"results.json", *pictures}
  for name in pictures:
    pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
    assert len(np.unique(pixels)) > 20
  rows = json.loads((tmp_path / "results.json").read_text())
  assert out == accuracy_vs_flops.table(rows) + "\n"
  # All tokens of the smallest grid, by their number.
  assert [[panel.title for panel in row.panels] for row in drawn] == [
    ["input", "(0, 0)", "(0, 1)", "(0, 2)"]
  ] * len(IMAGES)


def test_no_table_without_top1(write, program):
  out, names = write(program, {"test/2x2/loss": 1.0}, IMAGES)
  assert out == ""
  assert names == {"results.json", "attention_maps.png"}


@pytest.mark.parametrize(
  "name, images",
  [
    ("lookup_vit", None),
    # There is no grid whose maps one could draw.
    ("vit", IMAGES),
  ],
)
def test_no_attention_maps(write, program, name, images):
  if name == "vit":
    program, metrics = program_of("vit"), {"test/top1": 0.5}
  else:
    metrics = {"test/2x2/top1": 0.5}
  out, names = write(program, metrics, images)
  assert names == {"results.json", "accuracy_vs_flops.png"}
  assert " 50.00 |" in out
