"""Configs: reading, checking, completing and comparing them.

A config file defines `get_config(arg=None) -> ml_collections.ConfigDict`.
Fields are named as in big_vision wherever big_vision has the field.
"""

import contextlib
import difflib
import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import absl.logging
import ml_collections
from absl import app, flags
from etils import epath

CONFIG_FILE = "config.json"

# Every field a config may have, and what it is where a config does not say.
# A value of `{}` is checked by the part that it configures.
DEFAULTS = dict(
  seed=0,
  # One of the two.
  total_steps=None,
  total_epochs=None,
  # Model: a module of lookup_vit/models, and fields of its `Model`.
  model_name=None,
  model={},
  num_classes=None,
  model_init=None,  # work directory to start from, or WORKDIR:STEP
  grids=None,  # compressed grids to train on; None: the model's own
  # Task: a module of lookup_vit/tasks.
  task="classification",
  loss="softmax_xent",  # or "sigmoid_xent"
  label_smoothing=0.0,
  mixup=dict(p=0.0),  # p of the Beta(p, p) that the mixing weight is drawn from
  cutmix=dict(p=0.0),
  # Input.
  input=dict(
    data={},
    pp=None,
    image_size=None,  # (rows, columns) or (time, rows, columns) after `pp`
    batch_size=None,
    shuffle_buffer_size=10_000,
  ),
  # Optimizer: see optim.py.
  optax_name="adamw",
  optax={},
  lr=None,
  wd=0.0,
  schedule={},
  lr_mults=[],
  wd_mults=[(r".*/kernel$", 1.0)],
  frozen=[],
  grad_clip_norm=None,
  grad_accum_steps=1,
  ema_decay=None,
  # Evaluators by name: each has a `type`, a module of lookup_vit/evaluators.
  evals={},
  # Devices: axes of the mesh and their sizes, -1 fills.
  mesh=[("data", -1)],
  # What is written, and when.
  log_training_steps=50,
  log_attention_logit=False,
  ckpt_steps=1000,
  ckpt_keep=2,  # newest checkpoints to keep
  ckpt_keep_every=None,  # steps whose multiples are kept for ever
)

# Fields that may differ when a work directory is taken up again: none of them
# changes what is learned.
_FREE = (
  "evals",
  "mesh",
  "log_training_steps",
  "log_attention_logit",
  "ckpt_steps",
  "ckpt_keep",
  "ckpt_keep_every",
)


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
  """Reads `"variant=L/16,res=384,runlocal"` as big_vision's configs do.

  Args:
    arg: what stands behind the colon of `--config=FILE:ARG`.
    **defaults: the arguments there are; each is read as its default's type.

  Raises:
    ValueError: an unknown argument, or a value of another type.
  """
  values = dict(defaults)
  for item in (arg or "").split(","):
    name, eq, text = (part.strip() for part in item.partition("="))
    if not name:
      continue
    if name not in defaults:
      raise ValueError(
        f"Unknown config argument {name!r}; there are {', '.join(defaults)}."
      )
    kind = type(defaults[name])
    try:
      if kind is bool:
        values[name] = dict(true=True, false=False)[(text or "true").lower()]
      else:
        values[name] = kind(text)
    except (KeyError, ValueError):
      raise ValueError(
        f"Config argument {name}={text!r}: want a value of type "
        f"{kind.__name__}, such as {name}={defaults[name]}."
      ) from None
    if kind is not bool and not eq:
      raise ValueError(f"Config argument {name} wants a value: {name}=...")
  return ml_collections.ConfigDict(values)


@contextlib.contextmanager
def at_fault(field: str) -> Iterator[None]:
  """Prefixes a ValueError with the config field that it is about."""
  try:
    yield
  except ValueError as e:
    if field in str(e):
      raise
    raise ValueError(f"{field}: {e}") from e


def load(spec: str) -> ml_collections.ConfigDict:
  """Loads `"configs/NAME.py"` or `"configs/NAME.py:key=value,..."`.

  Raises:
    ValueError: no such file, it has no `get_config`, or a bad argument.
  """
  path, _, arg = spec.partition(":")
  if not os.path.isfile(path):
    raise ValueError(f"No config file {path!r}.")
  module_spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"{path} does not define get_config(arg).")
  return module.get_config(arg or None)


def resolve(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Completes a config with the defaults and checks it.

  Returns:
    A new config of plain JSON types (tuples have become lists), so that it
    equals itself read back from a work directory.

  Raises:
    ValueError: a field is unknown or missing, or of the wrong kind; it is
      named.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  full = _complete(DEFAULTS, config, "config")
  try:
    full = json.loads(json.dumps(full))
  except TypeError as e:
    raise ValueError(f"A config holds plain values only: {e}.") from None
  for name in ("model_name", "lr"):
    if full[name] is None:
      raise ValueError(f"config.{name} is not set.")
  for name in ("pp", "image_size", "batch_size"):
    if full["input"][name] is None:
      raise ValueError(f"config.input.{name} is not set.")
  if (full["total_steps"] is None) == (full["total_epochs"] is None):
    raise ValueError(
      "Set one of config.total_steps and config.total_epochs, not "
      + ("both." if full["total_steps"] is not None else "neither.")
    )
  for name in ("log_training_steps", "ckpt_steps", "grad_accum_steps"):
    if not isinstance(full[name], int) or full[name] < 1:
      raise ValueError(f"config.{name}={full[name]!r}: want an integer >= 1.")
  batch, accum = full["input"]["batch_size"], full["grad_accum_steps"]
  if not isinstance(batch, int) or batch < 1 or batch % accum:
    raise ValueError(
      f"config.input.batch_size={batch!r}: want a positive integer, a multiple "
      f"of config.grad_accum_steps={accum}."
    )
  return ml_collections.ConfigDict(full)


def _complete(defaults, given, where):
  full = dict(defaults)
  for name, value in given.items():
    if name not in defaults:
      close = difflib.get_close_matches(name, defaults, 1)
      hint = f" Did you mean {where}.{close[0]}?" if close else ""
      raise ValueError(
        f"Unknown config field {where}.{name}.{hint} "
        f"{where} has {', '.join(sorted(defaults))}."
      )
    default = defaults[name]
    if isinstance(default, dict):
      if not isinstance(value, Mapping):
        raise ValueError(f"{where}.{name}={value!r}: want a dict.")
      if default:
        value = _complete(default, value, f"{where}.{name}")
    full[name] = value
  return full


def read_workdir(workdir: str) -> ml_collections.ConfigDict:
  """The resolved config of a work directory.

  Raises:
    ValueError: there is none, or it cannot be read.
  """
  path = epath.Path(workdir) / CONFIG_FILE
  if not path.exists():
    raise ValueError(f"{workdir} is no work directory: no {CONFIG_FILE} there.")
  try:
    config = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f"{path} is damaged: {e}.") from None
  if not isinstance(config, dict):
    raise ValueError(f"{path} is damaged: it holds no object.")
  return resolve(config)


def run_local(config: ml_collections.ConfigDict) -> None:
  """Makes a config's run a matter of seconds: few steps on the digits.

  Model and image size are for the config itself to make small.
  """
  config.num_classes = 10
  config.input.data = dict(module="data.digits", split="train[:64]")
  config.input.batch_size = 8
  config.input.shuffle_buffer_size = 64
  for evaluator in config.evals.values():
    evaluator.data = dict(module="data.digits", split="test[:20]")
    evaluator.log_steps = None
  config.total_steps = 6
  config.total_epochs = None
  config.schedule = dict(warmup_steps=2, decay_type="cosine")
  config.log_training_steps = 2
  config.ckpt_steps = 3


def total_steps(config: ml_collections.ConfigDict, num_examples: int) -> int:
  """Number of update steps: `total_steps`, or that of `total_epochs`."""
  if config.total_steps is not None:
    steps = config.total_steps
  else:
    steps = config.total_epochs * num_examples / config.input.batch_size
  if steps < 1:
    raise ValueError(
      f"config.total_steps={config.total_steps}, total_epochs="
      f"{config.total_epochs} over {num_examples} examples: less than a step."
    )
  # Not of 11.000000000000002, which 1.1 epochs of 100 in tens are.
  return math.ceil(round(steps, 6))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """Lines `field: a's value, b's value` where two configs would learn apart."""
  lines = []

  def compare(x, y, where):
    if isinstance(x, dict) and isinstance(y, dict):
      for name in sorted({*x, *y}):
        if where or name not in _FREE:
          path = f"{where}.{name}" if where else name
          compare(x.get(name), y.get(name), path)
    elif x != y:
      lines.append(f"{where}: {x!r}, now {y!r}")

  compare(json.loads(json.dumps(a)), json.loads(json.dumps(b)), "")
  return lines


def parse_grid(text: str) -> tuple[int, ...]:
  """`"5x5"` to `(5, 5)`.

  Raises:
    ValueError: the text is not of that form.
  """
  try:
    grid = tuple(int(g) for g in text.split("x"))
  except ValueError:
    grid = ()
  if not grid or min(grid) < 1:
    raise ValueError(f"A grid is written 5x5 or 4x5x5, not {text!r}.")
  return grid


def format_grid(grid) -> str:
  """`(5, 5)` to `"5x5"`."""
  return "x".join(str(g) for g in grid)


def run(main: Callable[[Any], Any]) -> None:
  """Runs a program's `main` under absl, with readable logs and errors.

  A ValueError, FileNotFoundError or FloatingPointError is the user's to mend:
  its message alone is printed, and the exit code is 1. `--verbosity=1` shows
  the traceback.
  """

  def debug():
    return absl.logging.get_verbosity() >= absl.logging.DEBUG

  def guarded(function):
    def call(argv):
      try:
        return function(argv)
      except (ValueError, FileNotFoundError, FloatingPointError) as e:
        if debug():
          raise
        sys.exit(f"error: {e}")
      except OSError as e:
        # config_flags raises this where a config that it could not read is
        # used; the last line names the file.
        if debug() or "Configuration is not available" not in str(e):
          raise
        sys.exit(f"error: {str(e).strip().splitlines()[-1].strip()}")

    return call

  def logged(argv):
    setup_logging(debug())
    main(argv)

  def parse(argv):
    # This calls the config's get_config, whose errors come with a traceback.
    try:
      return flags.FLAGS(argv)
    except flags.Error as e:
      text = str(e).strip()
      if debug() or "Traceback" not in text:
        sys.exit(f"error: {text}\nTry --help.")
      text = text.splitlines()[-1].strip()
      sys.exit(f"error: {text.removeprefix('ValueError: ')}")
    except AttributeError as e:
      if debug():
        raise
      sys.exit(
        f"error: the config has no field {e} to override; add it to the file."
      )

  app.run(guarded(logged), flags_parser=parse)


def setup_logging(debug: bool = False) -> None:
  """Sends this package's log to stderr; of other packages, errors only."""
  log = logging.getLogger("lookup_vit")
  log.setLevel(logging.DEBUG if debug else logging.INFO)
  log.propagate = False
  if not log.handlers:
    handler = logging.StreamHandler()
    handler.setFormatter(
      logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    )
    log.addHandler(handler)
  if not debug:
    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)


# RandAugment and mixup of AugReg's presets (arXiv:2106.10270, figure 4, by
# big_vision's configs/vit_i21k.py).
_AUGREG = {
  "none": ("", 0.0),
  "light1": ("randaug(2,0)", 0.0),
  "light2": ("randaug(2,10)", 0.2),
  "medium1": ("randaug(2,15)", 0.2),
  "medium2": ("randaug(2,15)", 0.5),
  "strong1": ("randaug(2,20)", 0.5),
  "strong2": ("randaug(2,20)", 0.8),
}


def augreg(name: str) -> tuple[str, dict[str, float]]:
  """The op-string and the `config.mixup` of an AugReg preset.

  Raises:
    ValueError: there is no such preset.
  """
  if name not in _AUGREG:
    raise ValueError(f"AugReg preset {name!r}: want one of {list(_AUGREG)}.")
  randaug, p = _AUGREG[name]
  return randaug, dict(p=p)
