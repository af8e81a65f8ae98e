"""benchmarks/resolution.py: tiny runs, for what they report, not for speed."""

import json
import statistics

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import resolution as benchmark
from benchmarks import timing
from lookup_vit.analysis import flops
from lookup_vit.models import lookup_vit, vit

SMALL = dict(variant="mu/8", sizes=[24, 16], grids=[(1, 2), (2, 2)])
NUMBERS = dict(batch=3, rounds=3)


pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def result():
  return benchmark.benchmark(**SMALL, **NUMBERS)


def test_a_row_for_each_size_and_model(result):
  rows = result["rows"]
  assert [(r["image_size"], r["grid"]) for r in rows] == [
    (size, grid) for size in (24, 16) for grid in (None, "1x2", "2x2")
  ]
  for row in rows:
    size = (row["image_size"],) * 2
    like = rows[0] if size == (24, 24) else rows[3]
    assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
    pairs = zip(row["seconds"], like["seconds"], strict=True)
    assert row["ratios"] == pytest.approx([a / b for a, b in pairs])
    model = vit.Model(1000, "mu/8")
    if row["grid"]:
      grid = tuple(map(int, row["grid"].split("x")))
      model = lookup_vit.Model(1000, "mu/8", grid=grid)
    cost = flops.cost(model, size)
    assert row["gflops"] == cost.xla_flops / 1e9
    # Parameters, images and logits are float32; the rest are temporaries.
    known = 4 * (cost.params + 3 * 3 * size[0] ** 2 + 3 * 1000)
    assert known < row["bytes"] < 4 * known


def test_memory_is_what_the_program_holds():
  """Of a function without temporaries, its arguments and its result."""
  x = jax.numpy.ones((50, 70))
  compiled = jax.jit(lambda x: x + 1).lower(x).compile()
  assert timing.program_bytes(compiled) == 2 * 4 * 50 * 70


def test_models_are_those_that_are_named(result):
  """The parameters of one size serve another, but for the positions."""
  model = lookup_vit.Model(5, "mu/8", grid=(2, 2))
  params = benchmark._params(model, [16, 32])
  for size in (16, 32):
    images = np.ones((2, size, size, 3), np.float32)
    grid = size // 8
    assert params[size]["pos_embedding"].shape == (grid, grid, 32)
    compiled = benchmark._compile(model, params[size], images)
    want, _ = jax.jit(model.apply)({"params": params[size]}, images)
    np.testing.assert_allclose(
      compiled(params[size], images), want, rtol=1e-4, atol=1e-6
    )
  small, large = (params[size]["encoderblock_0"] for size in (16, 32))
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, small, large))


def test_table_and_files(result, tmp_path):
  folder = tmp_path / "made" / "here"
  timing.write(
    *(result, str(folder), "resolution", benchmark.table, benchmark.plot)
  )
  assert json.loads((folder / "resolution.json").read_text()) == result
  text = (folder / "resolution.md").read_text()
  assert text == benchmark.table(result) + "\n"
  assert text.startswith("mu/8, batches of 3 on cpu")
  lines = [line for line in text.splitlines() if line.startswith("| ")]
  assert len(lines) == 1 + 6
  assert {line.count("|") for line in lines} == {9}
  row = result["rows"][2]
  cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
  assert cells[:2] == ["24", "LookupViT 2x2"]
  of_vit = row["gflops"] / result["rows"][0]["gflops"]
  assert cells[3] == f"{of_vit:.2f}"
  ms = 1e3 * statistics.median(row["seconds"]) / 3
  assert float(cells[4]) == pytest.approx(ms, rel=0.01)
  assert cells[5].startswith(f"{statistics.median(row['ratios']):.2f} (")
  assert cells[7] == f"{row['bytes'] / result['rows'][0]['bytes']:.2f}"
  assert "held" not in text
  assert Image.open(folder / "resolution.png").size == (1800, 570)


def test_plot_of_what_was_measured(result, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(
    benchmark.plt.Axes,
    "plot",
    lambda self, x, y, *args, label, **kwargs: drawn.append((label, x, y)),
  )
  monkeypatch.setattr(benchmark.plt.Axes, "legend", lambda *a, **k: None)
  benchmark.plot(result, str(tmp_path / "plot.png"))
  names = ["ViT", "LookupViT 1x2", "LookupViT 2x2"]
  assert [name for name, _, _ in drawn] == names * 3
  assert all(x == [16, 24] for _, x, _ in drawn)
  rows = result["rows"]
  assert drawn[0][2] == [rows[3]["gflops"], rows[0]["gflops"]]
  assert drawn[8][2] == [rows[i]["bytes"] / 2**20 for i in (5, 2)]


def test_a_device_that_counts_and_a_plan_that_is_not_told(result, tmp_path):
  rows = [row | dict(bytes=None) for row in result["rows"]]
  other = result | dict(rows=rows, device_peak_bytes=3 * 2**20)
  text = benchmark.table(other)
  assert text.endswith("The device held 3 MiB at most.")
  assert "| - | - |" in text
  benchmark.plot(other, str(tmp_path / "plot.png"))


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(batch=0), "batch=0: want at least 1"),
    (dict(rounds=0), "rounds=0: want at least 1"),
    (dict(sizes=[]), "at least one image size"),
    (dict(sizes=[16, 20]), "does not divide the input .20, 20."),
    (dict(grids=[(1, 1), (2, 3)]), "grid .2, 3. does not fit"),
    (dict(variant="mu/2x8"), "wants a video"),
    (dict(variant="tiny"), "Unknown variant 'tiny'"),
    (dict(dtype="float8"), "dtype='float8'"),
  ],
)
def test_what_does_not_work_is_said_first(fields, words, monkeypatch):
  monkeypatch.delattr(benchmark, "_compile")
  with pytest.raises(ValueError, match=words):
    benchmark.benchmark(**(SMALL | NUMBERS | fields))
