"""Tests of lookup_vit/dryrun.py and the steps it compiles: small models."""

import importlib.util
import inspect
import json
import os
import re

import jax
import pytest

from lookup_vit import config_utils, dryrun, progress, train
from lookup_vit.analysis import hlo, steps
from tests import programs, small

SMALL = """
import json, sys
from lookup_vit.analysis import chips, hlo, steps
from tests import small

def config(**fields):
  fields = dict(input__batch_size=32, model__variant="mu/8", **fields)
  # "direct" reads all parameters: the bias of keys too.
  fields["model__mhbc_impl"] = "direct"
  c = small.config(model__scan=True, model__dropout=0.0, **fields)
  c.grids = [(2, 2)]
  return steps.prepare(c, None)
"""

EIGHT = (
  SMALL
  + """
chips.use_cpu(8)
devices = chips.devices("cpu:8")

def look(kind, **fields):
  c = config(**fields)
  program = steps.make_program(c, devices)
  step = steps.measure(program, kind, (2, 2))
  held = steps.held_bytes(program, kind)
  return dict(
    name=step.name,
    examples=step.batch_size,
    memory=step.memory.parts,
    total=step.memory.total,
    largest=step.memory.largest,
    held={k: sum(v.values()) for k, v in held.items()},
    collectives={
      k: [x.count, x.bytes, x.sent] for k, x in step.collectives.items()
    },
  )

def whole(depth, accum=1, **fields):
  c = config(model__depth=depth, **fields)
  c.model.scan = False
  if accum > 1:
    # Micro-batches as a loop of Python.
    c.grad_accum_steps = accum
    import jax, jax.numpy as jnp
    def scan(body, total, xs):
      each = []
      for i in range(accum):
        total, y = body(total, jax.tree.map(lambda x: x[i], xs))
        each.append(y)
      return total, jax.tree.map(lambda *x: jnp.stack(x), *each)
    jax.lax.scan = scan
  program = steps.make_program(c, devices)
  lowered = steps.lower(program, "train", (2, 2))
  compiled = lowered.compile()
  return dict(
    {k: compiled.cost_analysis()[k] for k in ("flops", "bytes accessed")},
    all_reduce=hlo.collectives(compiled.as_text())["all-reduce"].bytes,
  )

fsdp = dict(mesh=[("fsdp", 8)], sharding="fsdp")
views = dict(evals__test__views=3, evals__test__batch_size=16)
print(json.dumps(dict(
  replicated=look("train", model__depth=2),
  fsdp=look("train", model__depth=2, **fsdp),
  evaluation=look("evaluation", model__depth=2),
  views=look("evaluation", model__depth=2, **views),
  counted_evaluation=steps.count(config(), devices, "evaluation", (2, 2)),
  counted_views=steps.count(config(**views), devices, "evaluation", (2, 2)),
  counted=steps.count(config(model__depth=2), devices, "train", (2, 2)),
  accumulated=steps.count(
    config(model__depth=2, grad_accum_steps=2), devices, "train", (2, 2)
  ),
  whole=whole(2),
  unrolled=whole(2, 2),
)))
"""
)

# A chip, of a topology that is not here.
TPU = (
  SMALL
  + """
chips.use_cpu(1)
import jax
jax.config.update("jax_enable_compilation_cache", False)
devices = chips.devices("v5e:4x4")
c = config(model__dtype="bfloat16", mesh=[("data", -1), ("fsdp", 4)])
c.sharding = "fsdp"
program = steps.make_program(c, devices)
step = steps.measure(program, "evaluation", (2, 2))
print(json.dumps(dict(
  kind=devices[0].device_kind,
  hosts=len({d.process_index for d in devices}),
  v4=len(chips.devices("v4:2x2x1")),
  v6e=len({d.process_index for d in chips.devices("v6e:2x4")}),
  total=step.memory.total,
  collectives=list(step.collectives),
)))
try:
  chips.devices("v5e:3x5")
except ValueError as e:
  print(e)
"""
)


def start(*args):
  return programs.Program(*args)


def finish(process):
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


@pytest.fixture(scope="module")
def eight():
  status, out, err = finish(start("-c", EIGHT))
  assert status == 0, err
  return json.loads(out)


def test_arguments_are_the_state_and_a_share_of_the_batch(eight):
  one, many = eight["replicated"], eight["fsdp"]
  state = sum(one["held"][k] for k in ("params", "opt_state", "ema"))
  batch = 32 * (32 * 32 * 3 * 4 + 4)
  assert one["held"]["batch"] == batch / 8
  step = 4
  assert one["memory"]["arguments"] == state + step + batch / 8
  assert many["held"]["batch"] == batch / 8
  split = many["memory"]["arguments"] - batch / 8
  assert state / 8 <= split <= state / 8 * 1.02
  for got in one, many:
    assert got["total"] == sum(got["memory"].values())
    assert got["memory"]["batches of other steps"] == (2 + 8) * batch / 8
    assert got["memory"]["temporaries"] > 0
    sizes = [size for size, _ in got["largest"]]
    assert sizes == sorted(sizes, reverse=True)
  names = [name for _, name in one["largest"]]
  assert "params/encoderblock/refinement/mlp/dense_in/kernel" in names


def test_evaluation_has_the_rest_of_the_state_beside_it(eight):
  got, held = eight["evaluation"], eight["replicated"]["held"]
  mask = 4 * 4
  arguments = held["params"] + held["batch"] + mask
  assert got["memory"]["arguments"] == arguments
  (beside,) = (v for k, v in got["memory"].items() if "rest of" in k)
  assert beside == held["opt_state"] + held["ema"] + 2 * held["batch"]


def test_views_are_in_the_batch_and_in_the_model_one_after_another(eight):
  got, one = eight["views"], eight["evaluation"]
  assert got["name"] == "evaluation step, grid 2x2, 3 views of each"
  assert (got["examples"], one["examples"]) == (16, 32)
  image = 32 * 32 * 3 * 4
  assert one["held"]["batch"] == 32 * (image + 4) / 8
  assert got["held"]["batch"] == 16 * (3 * image + 4) / 8
  mask = 16 * 4 / 8
  arguments = got["held"]["params"] + got["held"]["batch"] + mask
  assert got["memory"]["arguments"] == arguments
  # Those of training wait.
  (beside,) = (v for k, v in got["memory"].items() if "rest of" in k)
  rest = got["held"]["opt_state"] + got["held"]["ema"]
  assert beside == rest + 2 * one["held"]["batch"]
  # Two examples a chip, however many views, against four.
  assert got["memory"]["temporaries"] < one["memory"]["temporaries"]
  for name, of_one in eight["counted_evaluation"].items():
    of_all = eight["counted_views"][name]
    if name == "flops":
      # Half of the examples, three times.
      assert of_all == pytest.approx(1.5 * of_one, rel=0.01)
    else:
      assert of_one < of_all < 3 * of_one


def test_cost_is_that_of_the_whole(eight):
  for name in "flops", "bytes accessed":
    assert eight["counted"][name] == pytest.approx(eight["whole"][name], 0.01)
  # Micro-batches too, against a loop that is unrolled; it has the sums of the
  # gradients besides, which are much of so small a model.
  for name in "flops", "bytes accessed":
    want = eight["unrolled"][name]
    assert eight["accumulated"][name] == pytest.approx(want, 0.06)


def test_cost_of_a_captioner_is_that_of_the_whole():
  c = config_utils.load("configs/coco_caption_lookup_b.py:runlocal")
  c.model.encoder.depth, c.model.encoder.scan = 4, True
  c = steps.prepare(c, None)
  args = jax.devices(), "evaluation", (3, 3)
  got = steps.count(c, *args)
  c.model.encoder.scan = False
  program = steps.make_program(c, jax.devices())
  compiled = steps.lower(program, *args[1:]).compile()
  whole = compiled.cost_analysis()
  for name in ("flops", "bytes accessed"):
    assert got[name] == pytest.approx(whole[name], 0.01)
  in_main = hlo.main_memory_bytes(compiled.as_text())
  assert got["main memory"] == pytest.approx(in_main, 0.01)


def test_collectives_of_a_step(eight):
  one, many = eight["replicated"], eight["fsdp"]
  # Gradients and a few scalars, once over, whether scanned or not.
  ((kind, (_, size, sent)),) = one["collectives"].items()
  assert kind == "all-reduce"
  assert one["held"]["params"] <= size <= one["held"]["params"] * 1.01
  assert sent == size * 2 * 7 / 8
  assert size == pytest.approx(eight["whole"]["all_reduce"], rel=0.01)
  # Kernels are gathered for the forward and for the backward pass.
  _, gathered, _ = many["collectives"]["all-gather"]
  assert gathered > one["held"]["params"]


def test_tpu_topology():
  status, out, err = finish(start("-c", TPU))
  if importlib.util.find_spec("libtpu") is None:  # Not on every platform.
    assert "v5e:4x4 wants libtpu: pip install" in err
    return
  assert status == 0, err
  line, error = out.splitlines()
  got = json.loads(line)
  assert got["kind"] == "TPU v5 lite"
  assert (got["hosts"], got["v4"], got["v6e"]) == (4, 4, 1)
  assert 0 < got["total"] < 2**30
  assert "all-gather" in got["collectives"]
  assert "v5e:3x5: libtpu has no such slice" in error


DIGITS = "--config=configs/digits_lookup.py"
VIT = "--config=configs/digits_vit.py"


def test_programs():
  """All at once: most of their time is that of importing."""
  program = ("-m", "lookup_vit.dryrun")
  small_one = f"{DIGITS}:runlocal"
  cpu = "--topology=cpu:4"
  runs = {
    "fits": (small_one, cpu, "--grid=3x3"),
    "misfit": (f"{VIT}:runlocal", cpu, "--memory_gib=0.0017"),
    "none": (),
    "no topology": (DIGITS,),
    "malformed": (DIGITS, "--topology=v5e"),
    "batch": (small_one, "--topology=cpu:3"),
    "grid": (DIGITS, cpu, "--grid=9x9"),
    "mesh": ("--config=configs/in21k_lookup_b.py:variant=g/16", cpu),
    "vit": (VIT, cpu, "--grid=3x3"),
    "file": ("--config=configs/nothing.py", cpu),
    "grid text": (DIGITS, cpu, "--grid=9y9"),
    "memory": (DIGITS, cpu, "--memory_gib=-1"),
    "all": ("--all", "--grid=3x3"),
  }
  running = {name: start(*program, *args) for name, args in runs.items()}
  done = {name: finish(process) for name, process in running.items()}

  status, out, err = done.pop("fits")
  assert status == 0, err
  assert out.splitlines()[-1].startswith("fits")
  for words in ("train step, grid 3x3", "evaluation step, grid 3x3"):
    assert words in out
  for words in ("temporaries", "TFLOP", "collectives  1 all-reduce"):
    assert words in out
  assert "Compiling the train step" in err

  status, out, err = done.pop("misfit")
  assert status == dryrun.DOES_NOT_FIT, err
  assert "DOES NOT FIT" in out
  change = out.split("checked by compiling:\n")[1]
  assert re.match(r"  config\.\S+ = ", change)
  check_change(change, 0.0017 * 2**30)

  wanted = {
    "none": "Set one of --config and --all",
    "no topology": "--topology is not set",
    "malformed": "--topology=v5e: want CHIP:SIZE",
    "batch": "batch_size=8 does not divide over 3 device",
    "grid": "(9, 9)",
    "mesh": "('fsdp', 8)] does not fit 4 device",
    "vit": "--grid: model 'vit' has no compressed grid",
    "file": "nothing.py",
    "grid text": "--grid: A grid is written 5x5",
    "memory": "--memory_gib=-1: want more than 0",
    "all": "--grid is of one config, not of --all",
  }
  assert wanted.keys() == done.keys()
  for name, (status, out, err) in done.items():
    assert status == 1 and out == "", (name, out)
    assert "Traceback" not in err
    (line,) = (x for x in err.splitlines() if x.startswith("error: "))
    assert wanted[name] in line


def check_change(lines, room):
  """The change by itself: with it, the step fits; without it, not."""
  code = (
    SMALL
    + f"""
from lookup_vit import config_utils
chips.use_cpu(4)
c = config_utils.load("configs/digits_vit.py:runlocal")
sizes = []
for lines in ("", {lines!r}):
  config = steps.prepare(c, None)
  config.unlock()
  config.model.unlock()
  exec("\\n".join(map(str.strip, lines.splitlines())))
  config = steps.prepare(config, None)
  program = steps.make_program(config, chips.devices("cpu:4"))
  sizes.append(steps.measure(program, "train", None).memory.total)
print(json.dumps(sizes))
"""
  )
  status, out, err = finish(start("-c", code))
  assert status == 0, err
  before, after = json.loads(out)
  assert after <= room < before


def test_every_config_states_its_pod():
  stated = dryrun.stated()
  names = {re.match(r"configs/(\w+)\.py", spec)[1] for spec, _ in stated}
  files = {n[:-3] for n in os.listdir("configs") if n.endswith(".py")}
  evals = {name for name in files if name.startswith("evals_")}
  assert names == files - evals - {"common"}
  assert ("configs/in21k_lookup_b.py:variant=g/16", "v5e:16x16") in stated
  video = "configs/k400_lookup_vivit_b.py:variant=L/2x16"
  assert (video, "v5e:8x8") in stated
  for spec, topology in stated:
    steps.prepare(config_utils.load(spec), None)
    dryrun.chips.parse(topology)


def test_as_many_batches_ahead_as_training():
  parameters = inspect.signature(train.prefetch).parameters
  assert parameters["ahead"].default == steps.BATCHES_AHEAD
  assert progress.IN_FLIGHT == steps.STEPS_IN_FLIGHT


WRONG_EVALS = [
  (dict(type="nonsense"), "config.evals.test.type='nonsense'"),
  (dict(type="no.such"), "config.evals.test.type='no.such'"),
  (dict(batch_size="abc"), "config.evals.test.batch_size='abc'"),
  (dict(views=0), "config.evals.test.views=0"),
]


@pytest.mark.parametrize("fields, said", WRONG_EVALS)
def test_evaluators_that_cannot_be(fields, said):
  c = small.config()
  c.evals.test.update(fields)
  with pytest.raises(ValueError, match=re.escape(said)):
    steps.prepare(c, None)


def test_what_training_refuses():
  c = steps.prepare(small.config(evals__test__batch_size=6), None)
  # A batch of any evaluator, not of the largest alone.
  c.evals.other = {**c.evals.test, "batch_size": 12}
  mesh = [("data", -1)]
  with pytest.raises(ValueError, match="config.evals.test.batch_size=6 does"):
    c.mesh = mesh
    steps.make_program(c, jax.devices() * 4)
  c = steps.prepare(small.config(total_steps=None, total_epochs=1), None)
  c.input.data = dict(mixture=[dict(module="data.digits", weight=1)])
  with pytest.raises(ValueError, match="a mixture has no epochs"):
    steps.make_program(c, jax.devices())


def test_grids_of_evaluators_are_cases_too():
  c = small.config(evals__test__grids=[(2, 2), (1, 1)], num_classes=10)
  program = steps.make_program(steps.prepare(c, None), jax.devices())
  assert steps.cases(program) == [
    ("train", (2, 2)),
    ("evaluation", (2, 2)),
    ("train", (1, 3)),
    ("evaluation", (1, 3)),
    ("evaluation", (1, 1)),
  ]
  c = steps.prepare(c, [(3, 3)])
  program = steps.make_program(c, jax.devices())
  assert {grid for _, grid in steps.cases(program)} == {(3, 3)}


def test_all_from_elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="start at the root"):
    dryrun.stated()


@pytest.mark.parametrize(
  "data, examples",
  [
    (dict(name="imagenet2012", split="train[:99%]"), 1_281_167 * 0.99),
    (dict(name="imagenet2012", split="train[10%:]"), 1_281_167 * 0.9),
    (dict(module="data.digits", split="train"), 1437),
    (dict(module="data.digits", split="train[:100]"), 100),
    (dict(module="data.imagenet21k/winter21", split="train[51200:]"), 13100076),
    (dict(module="data.digits", split="train[3shard:]"), None),
    (dict(name="unknown", split="train"), None),
    (dict(mixture=[]), None),
  ],
)
def test_num_examples(data, examples):
  config = config_utils.resolve(small.config(input__data=data))
  got = steps.num_examples(config)
  assert got == (examples and pytest.approx(examples))
