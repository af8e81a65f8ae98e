"""The compiled steps of a config over any devices: memory, cost, collectives.

Nothing is computed, and no data are read. Memory and collectives are those of
the very steps that training runs. FLOPs and bytes are counted by XLA, which
sees the body of a loop once, so they come from the difference of two models of
small depth without loops. Nor does it see into a kernel, nor does that of
attention say what it computes: FLOPs are those of attention="direct". A
kernel's bytes are its arguments and results, each once.
"""

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import glob
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from lookup_vit import config_utils, parallel, tokenizer, train_step
from lookup_vit.analysis import hlo

# Batches on the devices beside that of a step: those that training puts there
# ahead of their use, and those of the steps that it starts before one is done.
BATCHES_AHEAD = 2
STEPS_IN_FLIGHT = 8

KINDS = ("train", "evaluation")

# Depths of the models whose difference is the cost of a block.
_DEPTHS = (1, 2)

# Of the compiler, for what it counts: FLOPs are the same.
_LITTLE = -1.0

# Examples of training splits; of Kinetics as many as its copies list.
EXAMPLES = {
  "imagenet2012": 1_281_167,
  "data.imagenet21k/winter21": 13_151_276,
  "data.imagenet21k/fall11": 14_197_122,
  "data.kinetics400": 246_534,
  "data.something_something_v2": 168_913,
  "data.digits": 1_437,
  "data.moving_digits/motion": 11_496,
  "data.moving_digits/glyph": 11_496,
  "data.digit_captions": 36_000,
}


@dataclasses.dataclass
class Memory:
  """Bytes of a chip's memory that a step wants.

  Attributes:
    parts: bytes by name; they add up to what is wanted.
    largest: pairs of bytes and name of the largest buffers.
    total: bytes in all. Where the compiler refused, its own sum.
    refused: whether it did.
    quick: whether this is of a quick compilation, and so about right.
  """

  parts: dict[str, float]
  largest: list[tuple[float, str]]
  total: float
  refused: bool = False
  quick: bool = False


@dataclasses.dataclass
class Step:
  """A compiled step, of a chip; `cost` is None where it was not counted."""

  kind: str
  grid: Any
  batch_size: int
  memory: Memory
  collectives: dict[str, hlo.Collectives]
  cost: dict[str, float] | None = None
  views: int = 1

  @property
  def name(self) -> str:
    """For people."""
    parts = [f"{self.kind} step"]
    if self.grid is not None:
      parts.append(f"grid {config_utils.format_grid(self.grid)}")
    if self.views > 1:
      parts.append(f"{self.views} views of each")
    return ", ".join(parts)


def num_examples(config: ml_collections.ConfigDict) -> float | None:
  """Examples of the training split; None where they are not known here."""
  data = config.input.data
  total = EXAMPLES.get(data.get("module") or data.get("name"))
  split = data.get("split") or ""
  if not isinstance(split, str):
    raise ValueError(f"config.input.data.split={split!r}: want text.")
  match = re.fullmatch(r"\w+(?:\[(\d*%?):(\d*%?)\])?", split)
  if total is None or not match:
    return None

  def place(text, default):
    if not text:
      return default
    return total * int(text[:-1]) / 100 if text[-1] == "%" else int(text)

  return min(place(match[2], total), total) - place(match[1], 0)


def prepare(config: Any, grids: Sequence[Any] | None) -> Any:
  """A resolved config for a dry run; data need not be here.

  Raises:
    ValueError: a field is wrong, or grids for a model that has none.
  """
  config = config_utils.resolve(config)
  path = config.tokenizer
  if config.num_classes is None and path and epath.Path(path).is_file():
    tokenizer.of_config(config)
  if config.num_classes is None:  # To be read off the data.
    config.num_classes = 1000
  for name, fields in config.evals.items():
    kind = fields.get("type")
    module = train_step.module_of("evaluators", kind)
    try:
      found = all(map(str.isidentifier, module.split(".")))
      found = found and importlib.util.find_spec(module)
    except ModuleNotFoundError:  # Of the package that it would be in.
      found = None
    if not found:
      raise ValueError(f"config.evals.{name}.type={kind!r}: there is none.")
    for field in ("batch_size", "views"):
      value = fields.get(field)
      if value is not None and not (type(value) is int and value > 0):
        raise ValueError(
          f"config.evals.{name}.{field}={value!r}: want an integer > 0."
        )
  if grids:
    if config.grids is None and "grid" not in config.model:
      model = train_step.build_model(config)
      if not hasattr(model, "grid"):
        raise ValueError(
          f"--grid: model {config.model_name!r} has no compressed grid."
        )
    config.grids = [list(grid) for grid in grids]
    for fields in config.evals.values():
      fields.grids = None
  return config


def make_program(config: Any, devices: Sequence[Any]) -> train_step.Program:
  """The program of a prepared config over devices.

  Raises:
    ValueError: the config cannot work, or not on so many devices.
  """
  examples = None
  if not config.input.data.get("mixture"):
    # A million where it is not known: the schedule's length costs nothing.
    examples = round(num_examples(config) or 1_000_000)
  steps = config_utils.total_steps(config, examples)
  program = train_step.Program(config, steps, devices)
  for name, fields in config.evals.items():
    parallel.check_batch(
      f"config.evals.{name}.batch_size",
      fields.get("batch_size") or config.input.batch_size,
      program.mesh,
    )
  return program


def cases(program: train_step.Program) -> list[tuple[str, Any]]:
  """The kinds of steps of a run, each with its grids."""
  grids = program.grids
  own = [e.get("grids") or () for e in program.config.evals.values()]
  others = {tuple(grid) for one in own for grid in one} - {*grids}
  return [(kind, grid) for grid in grids for kind in KINDS] + [
    ("evaluation", grid) for grid in sorted(others)
  ]


def batch_shape(config: Any, kind: str) -> tuple[int, int]:
  """Examples of a batch, and views of each.

  Those of evaluation are of the evaluator whose batches have the most views in
  all; without any it is as in training.
  """
  train = config.input.batch_size, 1
  if kind == "train":
    return train
  shapes = [
    (e.get("batch_size") or train[0], e.get("views") or 1)
    for e in config.evals.values()
  ]
  return max(shapes, key=math.prod, default=train)


def batch_shapes(
  program: train_step.Program, kind: str, one_view: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch of the `train` or `evaluation` step, laid out on the mesh.

  With `one_view`, images are without the axis of views.
  """
  size, views = batch_shape(program.config, kind)
  batch = program.task.batch_shapes(size)
  if views > 1 and not one_view:
    shape = (size, views, *batch["image"].shape[1:])
    batch["image"] = jax.ShapeDtypeStruct(shape, np.float32)
  if kind == "evaluation":
    batch["_mask"] = jax.ShapeDtypeStruct((size,), np.float32)
  return parallel.placed(batch, parallel.batch_sharding(program.mesh))


def lower(
  program: train_step.Program, kind: str, grid: Any, one_view: bool = False
) -> Any:
  """The `train` or `evaluation` step for a grid, by shapes."""
  batch = batch_shapes(program, kind, one_view)
  state = parallel.placed(program.state_shapes, program.state_shardings)
  if kind == "train":
    return program.update_step.lower(state, batch, grid)
  return program.evaluation_step.lower(state.params, batch, grid)


def held_bytes(
  program: train_step.Program, kind: str = "train"
) -> dict[str, dict[str, int]]:
  """Bytes of a chip, by path, for each part of the state and for the batch.

  Args:
    program: of `make_program`.
    kind: of the step that the batch is of, "train" or "evaluation".
  """
  shapes, shardings = program.state_shapes, program.state_shardings
  held = {}
  for part in ("params", "opt_state", "ema"):
    held[part] = {}
    for (path, x), sharding in zip(
      jax.tree.leaves_with_path(getattr(shapes, part)),
      jax.tree.leaves(getattr(shardings, part)),
      strict=True,
    ):
      keys = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
      name = "/".join([part, *filter(None, keys)])
      size = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
      held[part][name] = held[part].get(name, 0) + size
  held["batch"] = {
    f"batch/{name}": math.prod(x.sharding.shard_shape(x.shape))
    * x.dtype.itemsize
    for name, x in batch_shapes(program, kind).items()
    if name != "_mask"
  }
  return held


def measure(
  program: train_step.Program, kind: str, grid: Any, quick: bool = False
) -> Step:
  """Compiles a step for its memory and its collectives.

  Args:
    program: of `make_program`.
    kind: "train" or "evaluation".
    grid: of the compressed tokens, or None.
    quick: whether the compiler may take less trouble than it does for a run,
      in a tenth of the time; its temporaries are then some percent off.
  """
  held = held_bytes(program, kind)
  sums = {part: sum(sizes.values()) for part, sizes in held.items()}
  # Beside what a step is given: input of training that waits, and in evaluation
  # the rest of the state.
  given, rest = ["params", "opt_state", "ema", "batch"], []
  size, views = batch_shape(program.config, kind)
  beside = "batches of other steps"
  waiting = BATCHES_AHEAD + STEPS_IN_FLIGHT
  if kind == "evaluation":
    given, rest = ["params", "batch"], ["opt_state", "ema"]
    beside = "training's batches and the rest of its state"
    waiting = BATCHES_AHEAD  # It begins when all steps are done.
  beside_bytes = waiting * sum(held_bytes(program)["batch"].values())
  beside_bytes += sum(sums[k] for k in rest)
  lowered = lower(program, kind, grid)
  with tempfile.TemporaryDirectory() as folder:
    refusal = None
    try:
      with _effort(_LITTLE if quick else 0.0):
        compiled = _compile(lowered, program, xla_dump_to=folder)
      text = compiled.as_text()
    except jax.errors.JaxRuntimeError as e:
      refusal = hlo.required_memory(str(e))
      text = _largest_file(folder, "*after_optimizations.txt")
    assignment = _largest_file(folder, "*buffer-assignment.txt")
  largest = [(v, k) for part in given for k, v in held[part].items()]
  largest += hlo.temporaries(assignment, text, 100)
  if refusal is not None:
    needed, named = refusal
    arguments = sum(sums[part] for part in given)
    parts = {
      "arguments": arguments,
      "temporaries, outputs and program": needed - arguments,
      beside: beside_bytes,
    }
    largest = named or largest
  else:
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = {
      "arguments": stats.argument_size_in_bytes,
      "outputs that are no arguments": outputs,
      "temporaries": stats.temp_size_in_bytes,
      "program": stats.generated_code_size_in_bytes,
      beside: beside_bytes,
    }
  total = sum(parts.values())
  counts = collections.Counter(largest)
  largest = [
    (size, f"{name}, {n} of them" if n > 1 else name)
    for (size, name), n in sorted(counts.items(), reverse=True)[:6]
  ]
  memory = Memory(parts, largest, total, refusal is not None, quick)
  collectives = hlo.collectives(text)
  return Step(kind, grid, size, memory, collectives, views=views)


def _largest_file(folder, pattern):
  """The text of the largest that there is; XLA dumps small programs too."""
  found = glob.glob(os.path.join(folder, pattern))
  if not found:
    return ""
  with open(max(found, key=os.path.getsize)) as f:
    return f.read()


@contextlib.contextmanager
def _effort(value):
  """How much trouble the compiler takes, -1 to 1; 0 where one does not say."""
  jax.config.update("jax_exec_time_optimization_effort", value)
  try:
    yield
  finally:
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


def count(
  config: Any,
  devices: Sequence[Any],
  kind: str,
  grid: Any,
  quick: bool = True,
) -> dict[str, float]:
  """FLOPs and bytes of a chip in a step, by XLA's count of small depths.

  Args:
    config: of `prepare`.
    devices: to compile for.
    kind: "train" or "evaluation".
    grid: of the compressed tokens, or None.
    quick: whether the compiler takes less trouble than it does for a run. At
      full effort it copies more to and from a chip's fast memory, which are
      bytes too.

  Returns:
    `flops`; `bytes accessed`, whatever memory they are in; and of these those
    of `main memory`, by the compiled text (`hlo.main_memory_bytes`).
  """
  config = copy.deepcopy(config)
  accum = config.grad_accum_steps if kind == "train" else 1
  if accum > 1:
    # Accumulation is a loop too: its body is counted by itself, where mixing
    # would want more examples than are left.
    config.input.batch_size //= accum
    config.grad_accum_steps = 1
    config.mixup.p = config.cutmix.p = 0.0
  model = train_step.build_model(config)
  if "encoder" in config.model and hasattr(model, "depth"):
    # Its blocks are in a loop; those of the decoder, half as many, are not.
    config.model.depth = model.depth
  encoder = getattr(model, "encoder", model)
  depth = encoder.depth

  def of_depth(n):
    small = copy.deepcopy(config)
    blocks = small.model.get("encoder", small.model)
    blocks.depth = n
    if hasattr(encoder, "scan"):
      blocks.scan = False
    if "block" in small.model:
      small.model.block = None  # It may not be among the few.
    program = make_program(small, devices)
    # The views are a loop as well.
    lowered = lower(program, kind, grid, one_view=True)
    if hasattr(encoder, "attention"):
      blocks.attention = "direct"
    if hasattr(model, "attention"):
      small.model.attention = "direct"
    direct = make_program(small, devices)
    without = lower(direct, kind, grid, one_view=True)
    found = _xla_count(_compile(without, direct))
    text = lowered.as_text()
    if "tpu_custom_call" in text and text != without.as_text():
      flops = found["flops"]
      found = _xla_count(_compile(lowered, program)) | {"flops": flops}
    return found

  with _effort(_LITTLE if quick else 0.0):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      one, two = pool.map(of_depth, _DEPTHS)
    update = _count_update(make_program(config, devices)) if accum > 1 else {}
  a, b = _DEPTHS
  total = {k: one[k] + (two[k] - one[k]) * (depth - a) / (b - a) for k in one}
  if accum > 1:
    total = {k: accum * total[k] - (accum - 1) * update[k] for k in total}
  _, views = batch_shape(config, kind)
  return {k: views * value for k, value in total.items()}


def _compile(lowered, program, **options):
  if program.mesh.devices.flat[0].platform == "cpu":
    # It will not run: no time is spent on machine code. Of what is looked at
    # here this changes nothing.
    options["xla_backend_optimization_level"] = 0
    options["xla_llvm_disable_expensive_passes"] = True
  return lowered.compile(compiler_options=options)


def _xla_count(compiled):
  analysis = compiled.cost_analysis()
  found = {k: float(analysis[k]) for k in ("flops", "bytes accessed")}
  return found | {"main memory": hlo.main_memory_bytes(compiled.as_text())}


def _count_update(program):
  """Of what an update does once, whatever the number of micro-batches."""

  def update(state, grads):
    return program.apply_gradients(state, grads, {"loss": np.float32(0)})

  state = parallel.placed(program.state_shapes, program.state_shardings)
  lowered = jax.jit(update).lower(state, state.params)
  return _xla_count(_compile(lowered, program))
