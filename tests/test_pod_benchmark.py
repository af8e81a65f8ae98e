"""benchmarks/pod.py: what it finds is what dryrun.py finds."""

import importlib.util
import json

import pytest

from benchmarks import cases
from benchmarks import pod as benchmark
from tests import programs

pytestmark = pytest.mark.full

SMALL = dict(
  topology="cpu:1",
  variant="mu/8",
  image_sizes=[(24, 24)],
  grids=[(1, 2)],
  kinds=["train", "inference"],
  batches=[4],
  dtypes=["float32"],
)


def test_steps_of_a_machine_without_peaks(tmp_path):
  result = benchmark.benchmark(**SMALL, depth=3)
  rows = result["rows"]
  assert [(row["kind"], row["model"]) for row in rows] == [
    (kind, model)
    for kind in SMALL["kinds"]
    for model in ("ViT, auto", "LookupViT 1x2, auto")
  ]
  for vit, lookup in (rows[:2], rows[2:]):
    for name in ("flops", "bytes", "full_bytes", "main_bytes", "temporaries"):
      assert vit["of_vit"][name] == 1
      assert lookup["of_vit"][name] == lookup[name] / vit[name]
    assert lookup["seconds"] is None and lookup["of_vit"]["seconds"] is None
  assert rows[0]["flops"] > 2.5 * rows[2]["flops"]
  lines = benchmark.table(result).splitlines()
  assert lines[0].startswith("mu/8, depth 3, compiled for cpu:1 ")
  cells = [cell.strip() for cell in lines[5].strip("|").split("|")]
  assert cells[:5] == ["train", "24", "4", "float32", "LookupViT 1x2, auto"]
  ratio = rows[1]["flops"] / rows[0]["flops"]
  assert cells[5] == f"{rows[1]['flops'] / 4e9:.4g} ({ratio:.2f})"
  assert (cells[-3], cells[-1]) == ("-", "-")  # The roofline.
  taken = [row["compilation"] for row in rows]
  assert min(taken) > 0
  assert cells[-2] == f"{taken[1]:.4g} ({taken[1] / taken[0]:.2f})"
  json.dumps(result)


def test_the_program_for_tpus(tmp_path):
  if importlib.util.find_spec("libtpu") is None:  # Not on every platform.
    pytest.skip("no libtpu here")
  program = programs.Program(
    *("-m", "benchmarks.pod", "--topology=v5e:2x2", "--variant=mu/8"),
    *("--sizes=24", "--grids=1x2", "--batch_sizes=8", f"--output={tmp_path}"),
    "--depth=2",
  )
  out, err = program.communicate(timeout=300)
  assert program.returncode == 0, err
  assert out.strip() == (tmp_path / "pod.md").read_text().strip()
  result = json.loads((tmp_path / "pod.json").read_text())
  for row in result["rows"]:
    # Of a v5e: 197 TFLOP/s and 819 GB/s.
    parts = row["flops"] / 197e12, row["bytes"] / 819e9
    assert row["seconds"] == pytest.approx(max(parts))
    assert row["bound"] == ("FLOPs", "HBM")[parts.index(max(parts))]


# Bytes an image of B/16 at 224 pixels, with the compiler at low effort.
BYTES = """
import json
import jax
from benchmarks import cases
from lookup_vit.analysis import chips, steps

chips.use_cpu(1)
jax.config.update("jax_enable_compilation_cache", False)
devices = chips.devices("v5e:2x2")
fields = dict(remat_policy="none", scan=False)
found = {}
for kind, step, batch in (("train", "train", 64), ("inference", "evaluation", 128)):
  place = cases.Place(kind, (224, 224), batch * len(devices), "bfloat16")
  found[kind] = {}
  for grid, impl in ((None, "fused"), ((3, 3), "auto"), ((5, 5), "auto")):
    way = cases.Way(grid, impl)
    config = steps.prepare(cases.config(place, way, "B/16", fields), None)
    config.evals = {}
    count = steps.count(config, devices, step, grid)
    found[kind][str(grid)] = count["bytes accessed"]
print(json.dumps(found))
"""  # noqa: E501


def test_lookup_tokens_are_seldom_in_memory():
  """Of ViT's traffic on a v5e, with attention in a kernel there too."""
  if importlib.util.find_spec("libtpu") is None:  # Not on every platform.
    pytest.skip("no libtpu here")
  program = programs.Program("-c", BYTES)
  out, err = program.communicate(timeout=900)
  assert program.returncode == 0, err
  for kind, found in json.loads(out).items():
    of_vit = found["None"]
    most = {"train": (0.4, 0.6), "inference": (0.3, 0.5)}[kind]
    for grid, limit in zip(("(3, 3)", "(5, 5)"), most, strict=True):
      assert found[grid] <= limit * of_vit, (kind, grid)


def test_what_does_not_work_is_said_first(monkeypatch):
  monkeypatch.delattr(benchmark.steps, "measure")
  for fields, words in (
    (dict(topology="v5e"), "--topology=v5e: want CHIP:SIZE"),
    (dict(grids=[(4, 1)]), "grid .4, 1. does not fit"),
    (dict(kinds=["test"]), "kind 'test'"),
    (dict(attention=["auto", "chunked"]), "--attention=chunked"),
  ):
    with pytest.raises(ValueError, match=words):
      benchmark.benchmark(**(SMALL | fields))


def test_way_names():
  assert str(cases.Way(None, "fused")) == "ViT, fused"
  assert cases.Way((2, 3), "auto").names() == dict(
    model="LookupViT 2x3, auto", grid="2x3", impl="auto"
  )
  assert cases.size_text((32, 24, 24)) == "32x24x24"
