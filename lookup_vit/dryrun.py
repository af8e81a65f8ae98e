r"""Compiles a config for devices that are not here: does it fit, how fast.

    python -m lookup_vit.dryrun --topology=v5e:16x16 \
        --config=configs/in21k_lookup_b.py:variant=L/16 --grid=5x5

Topologies are `cpu:8` (virtual CPU devices), `v4:4x4x4`, `v5e:16x16`,
`v5p:4x4x4`, `v6e:16x16` and so on; TPUs want libtpu (`pip install '.[tpu]'`),
but neither a TPU nor data. `--all` makes a table of all configs, each for the
topologies that its docstring names.

Memory and collectives are those of the very steps that training runs; only what
is about, of the smaller grids, is of a quicker compilation. FLOPs and bytes are
counted by XLA, which sees the body of a loop once, so they come from the
difference of two models of small depth without loops.

Exit codes: 0 where everything fits, 3 where it does not, 1 for an error.
"""

import glob
import logging
import math
import re
import sys
import time
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import config_flags

from lookup_vit import cli, config_utils, parallel, train_step
from lookup_vit.analysis import chips, fit, steps

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")

DOES_NOT_FIT = 3

# Share of the memory from which on a quick compilation does not decide.
_NEARLY = 0.8


class Roofline(NamedTuple):
  """A bound of a step's speed.

  Attributes:
    parts: seconds by each of the chip's peaks.
    bound: the name of the longest.
    seconds: of a step, the longest.
    rate: examples a second, on all chips.
    epochs: a day; None where the examples of an epoch are not known.
  """

  parts: dict[str, float]
  bound: str
  seconds: float
  rate: float
  epochs: float | None


def roofline(
  step: steps.Step, chip: chips.Chip, config: Any
) -> Roofline | None:
  """None where the peaks or the step's cost are not known."""
  if chip.flops is None or step.cost is None:
    return None
  parts = {
    "FLOPs": step.cost["flops"] / chip.flops,
    "HBM": step.cost["bytes accessed"] / chip.hbm,
    "ICI": sum(c.sent for c in step.collectives.values()) / chip.ici,
  }
  bound = max(parts, key=parts.get)
  rate = step.batch_size / parts[bound]
  examples = steps.num_examples(config)
  epochs = 86400 * rate / examples if examples else None
  return Roofline(parts, bound, parts[bound], rate, epochs)


# What is printed.


def size_text(size: float) -> str:
  """Bytes as people read them."""
  for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if size >= unit:
      return f"{size / unit:.2f} {name}"
  return f"{size:.0f} B"


def report(
  step: steps.Step, program: train_step.Program, chip: chips.Chip, room: float
) -> str:
  """A step's part of the print."""
  memory = step.memory
  verdict = "fits" if memory.total <= room else "DOES NOT FIT"
  local = step.batch_size / (
    program.mesh.shape["data"] * program.mesh.shape["fsdp"]
  )
  lines = [
    f"{step.name}, {step.batch_size} examples, {local:g} a chip",
    f"  memory       {'about ' * memory.quick}{size_text(memory.total)} of "
    f"{size_text(room)}: {verdict}"
    + (" (by the compiler, which refuses it)" if memory.refused else ""),
  ]
  lines += [f"    {size_text(v):>10}  {k}" for k, v in memory.parts.items()]
  lines += ["  largest buffers"]
  lines += [f"    {size_text(v):>10}  {k}" for v, k in memory.largest]
  if step.cost:
    lines.append(
      f"  cost         {step.cost['flops'] / 1e12:.4g} TFLOP, "
      f"{step.cost['bytes accessed'] / 1e9:.4g} GB from and to memory"
    )
  if step.collectives or step.cost:
    each = [
      f"{c.count:g} {kind} of {size_text(c.bytes)} (sends {size_text(c.sent)})"
      for kind, c in sorted(step.collectives.items())
    ]
    lines.append("  collectives  " + ("; ".join(each) or "none"))
  best = roofline(step, chip, program.config)
  if best:
    parts = ", ".join(f"{k} {v * 1e3:.4g} ms" for k, v in best.parts.items())
    lines.append(
      f"  roofline     {best.seconds * 1e3:.4g} ms a step, bound by "
      f"{best.bound} ({parts})"
    )
    text = f"               {best.rate:,.0f} examples/s"
    if step.kind == "train":
      text += f", {86400 / best.seconds:,.0f} steps a day"
      if best.epochs:
        text += f", {best.epochs:,.1f} epochs a day"
    lines.append(text)
  return "\n".join(lines)


def header(program: train_step.Program, topology: str, chip: Any) -> str:
  """What is compiled for what."""
  mesh, config = program.mesh, program.config
  sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  hosts = len({d.process_index for d in mesh.devices.flat})
  model = config.model.get("encoder", config.model)
  text = (
    f"{config.model_name} {model.get('variant', 'B/16')}, input "
    f"{tuple(config.input.image_size)}, on {topology}: {mesh.size} chips of "
    f"{hosts} host(s)\nmesh {sizes}; {config.sharding}; remat "
    f"{model.get('remat_policy', 'none')}; {config.grad_accum_steps} "
    "micro-batch(es) a step\n"
  )
  if chip.flops is None:
    return text + "no peak numbers of this machine: no roofline"
  return text + (
    f"peaks of a chip: {chip.flops / 1e12:g} TFLOP/s in bfloat16, "
    f"{chip.hbm / 1e9:g} GB/s HBM, {chip.ici / 1e9:g} GB/s sent over ICI "
    f"({chip.source})\nbytes are XLA's count at low effort; at full effort it "
    "counts up to twice as many (docs/pods.md)"
  )


# The program.


def run(config: Any, topology: str, grids: Any, room: float) -> bool:
  """Prints the plan of a config for a topology; returns whether it fits."""
  start = time.monotonic()
  chip = chips.chip(topology)
  devices = chips.devices(topology)
  config = steps.prepare(config, grids)
  program = steps.make_program(config, devices)
  print(header(program, topology, chip), flush=True)
  largest = max(program.grids, key=tokens_of)
  found = []
  for kind, grid in steps.cases(program):
    log.info("Compiling the %s step, grid %s", kind, grid)
    step = look(program, kind, grid, room, sure=grid == largest)
    log.info("Counting its FLOPs (%.0f s)", time.monotonic() - start)
    try:
      step.cost = steps.count(config, devices, kind, grid)
    except jax.errors.JaxRuntimeError:
      if not step.memory.refused:
        raise
    print("\n" + report(step, program, chip, room), flush=True)
    found.append(step)
  worst = {}
  for step in sorted(found, key=lambda step: step.memory.total):
    if step.memory.total > room:
      worst[step.kind] = step.grid
  if not worst:
    print(f"\nfits ({time.monotonic() - start:.0f} s)")
    return True
  print("\ndoes not fit", flush=True)

  def memory(changed, kind, quick):
    changed = steps.make_program(changed, devices)
    grid = worst[kind]
    if quick:
      return steps.measure(changed, kind, grid, quick=True).memory.total
    return look(changed, kind, grid, room, sure=True).memory.total

  kinds = sorted(worst, key=steps.KINDS.index)
  change = fit.find_change(config, program.mesh.shape, kinds, memory, room)
  if change is None:
    print("Nothing that was tried makes it fit: take more or larger chips.")
    return False
  print("The first change that makes it fit, checked by compiling:")
  print("\n".join(f"  {line}" for line in fit.as_lines(change)))
  return False


def tokens_of(grid: Any) -> int:
  """How many compressed tokens a grid has; 1 for a model without one."""
  return math.prod(grid or (1,))


def look(
  program: Any, kind: str, grid: Any, room: float, sure: bool
) -> steps.Step:
  """A step, compiled as for a run where much depends on it.

  That is for training where `sure`, and wherever it is nearly too large.
  """
  if not sure or kind != "train":
    step = steps.measure(program, kind, grid, quick=True)
    if step.memory.total < _NEARLY * room:
      return step
  return steps.measure(program, kind, grid)


def stated() -> list[tuple[str, str]]:
  """Pairs of config and topology that the docstrings of configs/ name.

  Raises:
    ValueError: there are none.
  """
  pairs = []
  for path in sorted(glob.glob("configs/*.py")):
    with open(path) as f:
      text = f.read().replace("\\\n", " ")
    found = re.findall(
      r"python -m lookup_vit\.dryrun\s+--topology=(\S+)\s+--config=(\S+)", text
    )
    pairs += [(config, topology) for topology, config in found]
  if not pairs:
    raise ValueError(
      "--all: no configs/ here that name a topology; start at the root of the "
      "repository."
    )
  return pairs


def table_row(config: Any, topology: str) -> tuple[list[str], bool]:
  """A row of the table over all configs: at the largest grid."""
  chip = chips.chip(topology)
  devices = chips.devices(topology)
  config = steps.prepare(config, None)
  program = steps.make_program(config, devices)
  grid = max(program.grids, key=tokens_of)
  both = [steps.measure(program, kind, grid) for kind in steps.KINDS]
  step = both[0]
  step.cost = steps.count(config, devices, "train", grid)
  memory = max(s.memory.total for s in both)
  best = roofline(step, chip, config)
  rest = ["-"] * 4
  if best:
    rest = [
      f"{best.seconds * 1e3:.4g}",
      best.bound,
      f"{best.rate:,.0f}",
      f"{best.epochs:,.0f}" if best.epochs else "-",
    ]
  mesh = "x".join(str(n) for n in program.mesh.shape.values())
  sent = sum(c.sent for c in step.collectives.values())
  row = [
    topology,
    "-" if grid is None else config_utils.format_grid(grid),
    f"{mesh} {config.sharding}",
    f"{memory / 2**30:.2f} of {chip.memory / 2**30:.2f}",
    f"{step.cost['flops'] / 1e12:.4g}",
    f"{step.cost['bytes accessed'] / 1e9:.4g}",
    f"{sent / 1e9:.3g}",
    *rest,
  ]
  return row, memory <= chip.memory


def run_all() -> bool:
  """Prints the table over all configs; returns whether all fit."""
  pairs = stated()
  for topology in {topology for _, topology in pairs}:
    chips.devices(topology)  # What cannot be is said before hours of others.
  titles = (
    "config|for|grid|data x fsdp x tensor|GiB|TFLOP|GB|GB sent|ms|"
    "bound|examples/s|epochs a day"
  )
  print(f"| {' | '.join(titles.split('|'))} |")
  print("|" + "---|" * (titles.count("|") + 1), flush=True)
  all_fit = True
  for spec, topology in pairs:
    log.info("%s on %s", spec, topology)
    with config_utils.at_fault(spec):
      row, fits = table_row(config_utils.load(spec), topology)
    all_fit &= fits
    name = spec.removeprefix("configs/")
    row = [f"`{name}`" + ("" if fits else " DOES NOT FIT"), *row]
    print(f"| {' | '.join(row)} |", flush=True)
  return all_fit


def main(argv):
  """Plans by the flags."""
  del argv
  cli.log_overrides()
  if FLAGS.all == (FLAGS.config is not None):
    raise ValueError("Set one of --config and --all.")
  if FLAGS.all:
    for name in ("topology", "grid", "memory_gib", "mesh", "sharding"):
      if FLAGS[name].present:
        raise ValueError(f"--{name} is of one config, not of --all.")
    topologies = [topology for _, topology in stated()]
  elif FLAGS.topology is None:
    raise ValueError("--topology is not set, such as v5e:16x16 or cpu:8.")
  else:
    topologies = [FLAGS.topology]
  parsed = [chips.parse(topology) for topology in topologies]
  chips.use_cpu(max([s[0] for kind, s in parsed if kind == "cpu"] or [1]))
  # What comes out of a cache says nothing of its memory.
  jax.config.update("jax_enable_compilation_cache", False)
  if FLAGS.all:
    fits = run_all()
  else:
    room = chips.chip(FLAGS.topology).memory
    if FLAGS.memory_gib is not None:
      if not 0 < FLAGS.memory_gib <= room / 2**30:
        raise ValueError(
          f"--memory_gib={FLAGS.memory_gib:g}: want more than 0, and at most "
          f"the chip's {room / 2**30:g}."
        )
      room = FLAGS.memory_gib * 2**30
    with config_utils.at_fault("--grid"):
      grids = [config_utils.parse_grid(g) for g in FLAGS.grid or ()]
      if FLAGS["grid"].present and not grids:
        raise ValueError("want 3x3,5x5, ...")
    parallel.lay_out_by_flags(FLAGS.config)
    fits = run(FLAGS.config, FLAGS.topology, grids, room)
  if not fits:
    sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "What to plan: configs/NAME.py[:key=value,...]."
  )
  flags.DEFINE_string("topology", None, "For what: v5e:16x16, cpu:8, ...")
  flags.DEFINE_list(
    "grid", None, "Compressed grids, as 3x3,5x5; the config's if not set."
  )
  flags.DEFINE_float(
    "memory_gib", None, "Memory of a chip, where not all of it can be used."
  )
  flags.DEFINE_bool("all", False, "A table of all configs, instead of one.")
  parallel.define_flags()
  cli.run(main)
