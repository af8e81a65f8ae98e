"""benchmarks/throughput.py: a tiny run, for what it reports, not for speed."""

import json
import statistics

import jax
import pytest
from PIL import Image

from benchmarks import cases, timing
from benchmarks import throughput as benchmark
from lookup_vit.analysis import flops
from lookup_vit.models import lookup_vit, vit
from tests import programs

pytestmark = pytest.mark.full

SMALL = dict(
  variant="mu/8",
  image_sizes=[(24, 24), (16, 24)],
  grids=[(1, 2)],
  kinds=["train", "inference"],
  batches=[3],
  attention=["direct", "chunked"],
  mhbc=["direct", "absorbed"],
)


@pytest.fixture(scope="module")
def result():
  return benchmark.benchmark(**SMALL, rounds=3, depth=1)


def rows_of(result, **fields):
  return [
    row
    for row in result["rows"]
    if all(row[name] == value for name, value in fields.items())
  ]


def test_a_row_for_each_combination(result):
  models = ["ViT, direct", "ViT, chunked"]
  models += ["LookupViT 1x2, direct", "LookupViT 1x2, absorbed"]
  assert [
    (r["kind"], tuple(r["image_size"]), r["model"]) for r in result["rows"]
  ] == [
    (kind, size, model)
    for kind in SMALL["kinds"]
    for size in SMALL["image_sizes"]
    for model in models
  ]
  for row in result["rows"]:
    assert (row["batch"], row["dtype"]) == (3, "float32")
    assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
    assert row["first"] > row["compilation"] > 0


def test_speedups_are_over_the_fastest_vit(result):
  for kind in SMALL["kinds"]:
    for size in SMALL["image_sizes"]:
      rows = rows_of(result, kind=kind, image_size=size)
      fastest = min(rows[:2], key=lambda r: statistics.median(r["seconds"]))
      assert fastest["speedups"] == [1, 1, 1]
      for row in rows:
        pairs = zip(fastest["seconds"], row["seconds"], strict=True)
        assert row["speedups"] == pytest.approx([a / b for a, b in pairs])


def test_flops_and_share_of_peak(result):
  for row in result["rows"]:
    make = dict(attention=row["impl"])
    model = vit.Model(1000, "mu/8", depth=1, **make)
    if row["grid"]:
      make = dict(grid=(1, 2), mhbc_impl=row["impl"])
      model = lookup_vit.Model(1000, "mu/8", depth=1, **make)
    cost = flops.cost(model, row["image_size"])
    times = 3 if row["kind"] == "train" else 1
    assert row["gflops"] == pytest.approx(times * cost.xla_flops / 1e9)
    executed = times * cost.executed_xla_flops
    assert row["executed_gflops"] == pytest.approx(executed / 1e9)
    for share, seconds, peak in zip(
      row["of_peak"], row["seconds"], result["peaks"]["float32"], strict=True
    ):
      assert share == pytest.approx(3 * executed / seconds / peak)
  direct, absorbed = rows_of(result, kind="inference", grid="1x2")[:2]
  assert direct["gflops"] == absorbed["gflops"]
  assert direct["executed_gflops"] != absorbed["executed_gflops"]


def test_a_training_step_is_one():
  """The state that a step leaves is that of the next."""
  place = cases.Place("train", (24, 24), 2, "float32")
  way = cases.Way((1, 2), "auto")
  models = benchmark._Models("mu/8", dict(depth=1))
  step, *_ = models.compile(place, way)
  losses = [float(step()["loss"]) for _ in range(3)]
  (state,) = models._states.values()
  assert int(state.step) == 3 and len(set(losses)) > 1
  want = models.program(place, way)
  assert jax.tree.structure(state) == jax.tree.structure(want.state_shapes)


def test_table_and_files(result, tmp_path):
  folder = tmp_path / "made" / "here"
  timing.write(
    *(result, str(folder), "throughput", benchmark.table, benchmark.plot)
  )
  kept = json.loads((folder / "throughput.json").read_text())
  assert kept == json.loads(json.dumps(result))
  text = (folder / "throughput.md").read_text()
  assert text == benchmark.table(result) + "\n"
  assert text.startswith("mu/8, depth 1 on 1 cpu")
  lines = [line for line in text.splitlines() if line.startswith("| ")]
  assert len(lines) == 1 + 16
  assert {line.count("|") for line in lines} == {14}
  row = result["rows"][7]
  cells = [cell.strip() for cell in lines[8].strip("|").split("|")]
  assert cells[:4] == ["train", "16x24", "3", "float32"]
  assert cells[4] == "LookupViT 1x2, absorbed"
  middle = statistics.median(row["seconds"])
  assert float(cells[7]) == pytest.approx(1e3 * middle / 3, rel=0.01)
  assert float(cells[8]) == pytest.approx(3 / middle, rel=0.01)
  assert cells[9] == timing.spread(row["speedups"])
  # Two panels.
  assert Image.open(folder / "throughput.png").size == (1350, 570)


def test_plot_of_what_was_measured(result, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(
    benchmark.plt.Axes,
    "plot",
    lambda self, x, y, *args, label, **kwargs: drawn.append((label, x, y)),
  )
  monkeypatch.setattr(benchmark.plt.Axes, "legend", lambda *a, **k: None)
  benchmark.plot(result, str(tmp_path / "plot.png"))
  names = ["LookupViT 1x2, direct", "1x2, FLOPs in the paper"]
  names.append("LookupViT 1x2, absorbed")
  assert [name for name, _, _ in drawn] == names * 2
  direct = rows_of(result, kind="train", model=names[0])
  direct = sorted(direct, key=lambda row: row["image_size"])
  want = [statistics.median(row["speedups"]) for row in direct]
  assert drawn[0][2] == want
  of_vit = rows_of(result, kind="train", model="ViT, direct")
  of_vit = sorted(of_vit, key=lambda row: row["image_size"])
  pairs = zip(of_vit, direct, strict=True)
  assert drawn[1][2] == [a["gflops"] / b["gflops"] for a, b in pairs]


def test_clips():
  result = benchmark.benchmark(
    *("mu/2x8", [(4, 16, 16)], [(2, 1, 2)]), batches=[1], rounds=1, depth=1
  )
  assert [row["model"] for row in result["rows"]] == [
    "ViT, auto",
    "LookupViT 2x1x2, auto",
  ]
  assert "| 4x16x16 |" in benchmark.table(result)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(batches=[0]), "batch_sizes=0: want at least 1"),
    (dict(rounds=0), "rounds=0: want at least 1"),
    (dict(image_sizes=[]), "--sizes: want at least one"),
    (dict(attention=[]), "--attention: want at least one"),
    (dict(grids=[]), "--grids: want at least one"),
    (dict(mhbc=[]), "--mhbc: want at least one"),
    (dict(kinds=["test"]), "kind 'test': want one of inference, train"),
    (dict(image_sizes=[(20, 24)]), "does not divide the input .20, 24."),
    (dict(grids=[(4, 1)]), "grid .4, 1. does not fit"),
    (dict(variant="tiny"), "Unknown variant 'tiny'"),
    (dict(dtypes=["float8"]), "dtype='float8'"),
    (dict(mhbc=["fast"]), "mhbc_impl='fast'"),
    (dict(attention=["fast"]), "attention='fast'"),
  ],
)
def test_what_does_not_work_is_said_first(fields, words, monkeypatch):
  monkeypatch.delattr(benchmark._Models, "compile")
  with pytest.raises(ValueError, match=words):
    benchmark.benchmark(**(SMALL | dict(rounds=1) | fields))


# A batch is split over all devices, and the peak is of one.
SEVERAL = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 4)
from benchmarks import throughput as benchmark

batches = []
put = benchmark.parallel.put_batch

def kept(*args):
  batches.append(put(*args))
  return batches[-1]

benchmark.parallel.put_batch = kept
result = benchmark.benchmark(
  "mu/8", [(16, 16)], [(1, 2)], batches=[8], rounds=2, depth=1
)
result["shards"] = [
  [shard.data.shape[0] for shard in batch["image"].addressable_shards]
  for batch in batches
]
print(json.dumps(result))
"""


def test_several_devices():
  program = programs.Program("-c", SEVERAL)
  out, err = program.communicate(timeout=300)
  assert program.returncode == 0, err
  result = json.loads(out)
  assert result["devices"] == 4
  assert result["shards"] and all(s == [2] * 4 for s in result["shards"])
  for row in result["rows"]:
    executed = 1e9 * row["executed_gflops"] * 8
    for share, seconds, peak in zip(
      row["of_peak"], row["seconds"], result["peaks"]["float32"], strict=True
    ):
      assert share == pytest.approx(executed / seconds / (4 * peak))


# Timing itself.


def test_in_turn_begins_each_round_with_another():
  calls = []
  run = {name: lambda name=name: calls.append(name) for name in "abc"}
  seconds = timing.in_turn(run, 3)
  assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
  assert {len(s) for s in seconds.values()} == {3} and list(seconds) == [*"abc"]


def test_a_product_has_its_flops():
  multiply, count = timing.matmul("float32")
  size = multiply().shape[0]
  assert multiply().shape == (size, size) and count == 2 * size**3


def test_output_that_cannot_be(tmp_path):
  file = tmp_path / "file"
  file.touch()
  for folder in (file, file / "below"):
    with pytest.raises(ValueError, match=f"--output={folder}: "):
      timing.check_output(str(folder))
  timing.check_output(str(tmp_path / "a" / "b"))
  assert (tmp_path / "a" / "b").is_dir()
  timing.check_output(None)
