"""Tests of lookup_vit/analysis/ablations.py, on work directories made up."""

import json
import math
import statistics

import pytest

from configs import ablation, digits_vit
from lookup_vit import config_utils
from lookup_vit.analysis import ablations
from tests import programs

GRIDS = ("2x2", "3x3", "5x5")


def write(path, config, results=None, metrics=()):
  """A work directory; returns its path as text."""
  config.total_steps, config.total_epochs = 100, None
  path.mkdir()
  config = config_utils.resolve(config)
  (path / "config.json").write_text(json.dumps(config.to_dict()))
  lines = [json.dumps(row) + "\n" for row in metrics]
  if lines:
    (path / "metrics.jsonl").write_text("".join(lines))
  if results is not None:
    (path / "results.json").write_text(json.dumps(results))
  return str(path)


def rows(*tops, grids=GRIDS, split="test", heads=("compressed", "lookup")):
  """Of `results.json`: a top-1 for each grid, that of the heads beside it."""
  return [
    dict(
      grid=grid,
      split=split,
      gflops=0.01,
      parameters=330_000,
      top1=top,
      **{f"top1_{name}": top - 0.01 * i for i, name in enumerate(heads, 1)},
    )
    for grid, top in zip(grids, tops, strict=True)
  ]


def cells(line):
  assert line.startswith("| ") and line.endswith(" |")
  return [c.strip() for c in line[1:-1].split("|")]


def tables(text):
  """Of a report, each table as dicts by its titles; and the lines below."""
  found, rest = [], []
  for part in text.strip().split("\n\n"):
    if part.startswith("|"):
      titles, ruler, *lines = part.splitlines()
      assert ruler == "|" + "---|" * len(cells(titles))
      found.append(
        [dict(zip(cells(titles), cells(x), strict=True)) for x in lines]
      )
    else:
      rest += part.splitlines()
  return found, rest


def report(*workdirs):
  return tables(ablations.report([ablations.read(w) for w in workdirs]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Work directories whose names say nothing, or worse, the wrong thing."""
  folder = tmp_path_factory.mktemp("runs")

  def make(name, arg, *args, **kwargs):
    return write(folder / name, ablation.get_config(arg), *args, **kwargs)

  end = [dict(step=100)]
  broken = [dict(step=10), {"step": 31, "train/diverged": "loss nan"}]
  one = dict(grids=["3x3"])
  logit = "train/attention_logit_max"
  return dict(
    none_0=make("c", "name=reuse_none", rows(0.9, 0.8, 0.7), end),
    none_1=make("default", "name=reuse_none,seed=1", rows(0.8, 0.8, 0.8)),
    default_0=make("z", "", rows(0.5, 0.6, 0.75)),
    default_1=make("reuse", "seed=1", rows(0.7, 0.6, 0.65)),
    default_2=make("y", "seed=2", rows(0.6, 0.9, 0.70)),
    single=make("b", "name=grid_3x3", rows(0.65, **one)),
    head=make("h", "name=heads_lookup", rows(0.1, 0.2, 0.3, heads=["lookup"])),
    broken=make("n", "name=reuse_none,seed=2", None, broken),
    begun=make("i", "name=init_learned", None, [dict(step=50)]),
    fresh=make("m", "name=mhbc_heads_1"),
    same=make("s", "name=mhbc_heads_4"),
    fast=make("f", "lr=0.1,clip=0", None, [{"step": 5, logit: 80.0}, *broken]),
    fast_1=make(
      "g", "lr=0.1,clip=0,seed=1", rows(0.1, 0.1, 0.4), [{"step": 1, logit: 7}]
    ),
    large=make(
      "l",
      "size=large,qk_norm",
      [*rows(0.4, 0.5, 0.9), *rows(0, 0, 0, split="other")],
    ),
  )


VARIATIONS = ("none_1", "default_2", "none_0", "default_0", "default_1")


def test_means_and_differences(runs):
  ((*lines,),), rest = report(*(runs[name] for name in VARIATIONS))
  assert not rest
  # The default first, whatever the order and the names of the directories.
  labels = ["default"] * 3 + ["reuse none"] * 3
  assert [line["changed"] for line in lines] == labels
  assert [line["grid"] for line in lines] == [*GRIDS, *GRIDS]
  default = [(50, 70, 60), (60, 60, 90), (75, 65, 70)]
  none = [(80, 90), (80, 80), (80, 70)]
  for line, tops in zip(lines, default + none, strict=True):
    assert line["runs"] == str(len(tops))
    mean = statistics.mean(tops)
    assert line["top-1 (%), mean"] == f"{mean:.2f}"
    assert line["std"] == f"{statistics.stdev(tops):.2f}"
    assert line["compressed (%)"] == f"{mean - 1:.2f}"
    assert line["lookup (%)"] == f"{mean - 2:.2f}"
    assert (line["GFLOPs"], line["parameters (M)"]) == ("0.01", "0.33")
    assert line["split"] == "test"
  for line in lines[:3]:
    assert line["difference"] == line["its error"] == "-"
  for line, x, y in zip(lines[3:], none, default, strict=True):
    difference = statistics.mean(x) - statistics.mean(y)
    assert line["difference"] == f"{difference:+.2f}"
    error = math.sqrt(statistics.variance(x) / 2 + statistics.variance(y) / 3)
    assert line["its error"] == f"{error:.2f}"


def test_single_grids_and_heads(runs):
  names = ("single", "head", "default_0")
  ((*lines,),), _ = report(*(runs[name] for name in names))
  lines = {(line["changed"], line["grid"]): line for line in lines}
  assert len(lines) == 7
  single = lines["grids 3x3", "3x3"]
  # To the default at the same grid; of single runs, no spread is known.
  assert (single["difference"], single["its error"]) == ("+5.00", "-")
  assert single["std"] == "-"
  head = lines["heads lookup", "5x5"]
  assert (head["compressed (%)"], head["lookup (%)"]) == ("-", "29.00")
  assert head["difference"] == "-45.00"


def test_what_has_not_come_to_its_end_is_named(runs):
  names = ("begun", "broken", "none_0", "none_1", "fresh", "default_0")
  ((*lines,),), rest = report(*(runs[name] for name in names))
  found = {line["changed"]: line for line in lines}
  assert found["reuse none"]["runs"] == "2 of 3"
  assert found["reuse none"]["top-1 (%), mean"] == "75.00"  # At 5x5.
  for label in ("compressed_init learned", "mhbc_heads 1"):
    line = found[label]
    assert line["runs"] == "0 of 1"
    assert line["top-1 (%), mean"] == "unfinished"
    assert line["grid"] == "2x2, 3x3, 5x5"
  assert rest == [
    "Not in the means:",
    f"- {runs['begun']}: unfinished, step 50 of 100",
    f"- {runs['broken']}: diverged at update 31 of 100",
    f"- {runs['fresh']}: unfinished, step 0 of 100",
  ]
  # None of them at all.
  ((*lines,),), _ = report(runs["broken"], runs["default_0"])
  assert lines[-1]["top-1 (%), mean"] == "diverged"


def test_stability(runs):
  names = ("fast", "large", "fast_1", "none_0", "default_0", "default_1")
  (variations, lines), rest = report(*(runs[name] for name in names))
  assert [line["changed"] for line in variations] == (
    ["default"] * 3 + ["reuse none"] * 3
  )
  columns = (
    *("size", "qk-norm", "clipping", "learning rate", "runs", "diverged"),
    *("unfinished", "top-1 (%), mean", "std", "largest attention logit"),
  )
  small, large = "width 64, depth 4", "width 128, depth 6"
  assert [tuple(line[c] for c in columns) for line in lines] == [
    # The logit of the run that diverged too.
    (small, "no", "none", "0.1", "2", "1", "0", "20.00", "-", "80"),
    # The mean over the grids, then over the runs: 61.67 and 65.
    (small, "no", "1", "0.003", "2", "0", "0", "63.33", "2.36", "-"),
    # Of its first split.
    (large, "yes", "1", "0.003", "1", "0", "0", "60.00", "-", "-"),
  ]
  assert rest[1:] == [f"- {runs['fast']}: diverged at update 31 of 100"]


def test_stability_alone(runs):
  (lines,), _ = report(runs["fast"], runs["large"])
  assert [line["top-1 (%), mean"] for line in lines] == ["diverged", "60.00"]


def test_settings_are_what_is_learned_by(tmp_path):
  """Not how it is computed, logged or laid out, and not the seed."""
  first = write(tmp_path / "a", ablation.get_config())
  config = ablation.get_config("seed=3")
  config.model.update(scan=True, mhbc_heads=2, attention="chunked")
  config.model.heads, config.model.mlp_ratio = "both", 4.0
  config.ckpt_steps, config.mesh = 7, [("fsdp", -1)]
  config.evals.test.log_steps = 1
  second = write(tmp_path / "b", config)
  ((line,),), _ = report(first, second)
  assert line["runs"] == "0 of 2"
  # All else that a config says is.
  config.wd, config.input.batch_size = 0.5, 32
  config.model.dropout = 0.25
  third = write(tmp_path / "c", config)
  ((default, line),), _ = report(third, first)
  assert default["changed"] == "default"
  assert line["changed"] == "dropout 0.25, input.batch_size 32, wd 0.5"


def test_another_kind_of_model(tmp_path, runs):
  """A ViT beside: fields that only one of them has are no differences."""
  vit = write(tmp_path / "a", digits_vit.get_config(), rows(0.5, grids=[None]))
  ((*lines,),), _ = report(vit, runs["default_0"], runs["default_1"])
  assert [line["changed"] for line in lines[:3]] == ["default"] * 3
  assert lines[3]["changed"] == "model_name vit"
  assert lines[3]["grid"] == lines[3]["difference"] == "-"


def test_without_the_default(runs):
  """What is nearest to it is first, and says what it is."""
  ((*lines,),), _ = report(runs["none_0"], runs["head"])
  labels = [line["changed"] for line in lines]
  assert labels == ["default (reuse none)"] * 3 + (
    ["heads lookup, reuse weights"] * 3
  )
  ((*lines,),), _ = report(runs["none_0"], runs["single"])
  labels = [(line["changed"], line["grid"]) for line in lines]
  assert labels[0] == ("default", "3x3")
  other = "reuse none, grids 2x2, 3x3, 5x5"
  assert labels[1:] == [(other, grid) for grid in GRIDS]


def test_what_cannot_be_read(tmp_path, runs):
  with pytest.raises(ValueError, match="is no work directory"):
    ablations.read(str(tmp_path / "none"))
  path = write(tmp_path / "a", ablation.get_config(), [dict(CIDEr=1.0)])
  with pytest.raises(ValueError, match="a: its results.json has no top-1"):
    ablations.report([ablations.read(path)])
  with pytest.raises(ValueError, match="--workdirs: no work directories"):
    ablations.report([])


def test_program(tmp_path, runs):
  module = ("-m", "lookup_vit.analysis.ablations")
  output = tmp_path / "ablations.md"
  workdirs = [runs[name] for name in VARIATIONS]
  good = programs.Program(
    *module, f"--workdirs={','.join(workdirs)}", f"--output={output}"
  )
  bad = programs.Program(*module, f"--workdirs={workdirs[0]},{tmp_path}")
  out, err = good.communicate(timeout=120)
  assert good.returncode == 0, err
  want = ablations.report([ablations.read(w) for w in workdirs])
  assert out == output.read_text() == want
  out, err = bad.communicate(timeout=120)
  assert bad.returncode == 1 and not out
  assert err.startswith("error: ") and "config.json" in err
