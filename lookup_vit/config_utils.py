"""Configs: loading, completing, checking and comparing them.

A config file defines `get_config(arg=None) -> ml_collections.ConfigDict`.
Fields are named as in big_vision wherever big_vision has the field.
"""

import contextlib
import difflib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections
from etils import epath

CONFIG_FILE = "config.json"

# Every field a config may have, and what it is where a config does not say.
# A value of `{}` is checked by the part that it configures. Modules of your own
# are named with a dot, "my_package.my_model": see docs/extending.md.
DEFAULTS = dict(
  seed=0,
  # One of the two.
  total_steps=None,
  total_epochs=None,
  # Model: a module of lookup_vit/models, and fields of its `Model`.
  model_name=None,
  model={},
  num_classes=None,
  # To start from: WORKDIR, WORKDIR:STEP, or a file of a published ViT.
  model_init=None,
  # Of a video model from an image model: "central" or "average".
  model_init_inflation="central",
  # Of a LookupViT from a ViT: see models/warm_start.py.
  model_init_mapping=dict(
    gathering="half", contextualisation="mean", small_mlp="fit"
  ),
  grids=None,  # compressed grids to train on; None: the model's own
  # Task: a module of lookup_vit/tasks.
  task="classification",
  loss="softmax_xent",  # or "sigmoid_xent"
  tokenizer=None,  # of captions: path of a SentencePiece model
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
  # Devices: axes of the mesh (data, fsdp, tensor) and their sizes, -1 fills;
  # and how parameters lie on it: a name of parallel.STRATEGIES.
  mesh=[("data", -1)],
  sharding="replicated",
  # What is written, and when.
  log_training_steps=50,
  log_attention_logit=False,
  ckpt_steps=1000,
  ckpt_keep=2,  # newest checkpoints to keep
  ckpt_keep_every=None,  # steps whose multiples are kept for ever
)


def _is_int(x):
  return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x):
  return (_is_int(x) or isinstance(x, float)) and math.isfinite(x)


def _list_of(fits):
  return lambda x: isinstance(x, list) and all(map(fits, x))


def _pair(second):
  return lambda x: (
    isinstance(x, list)
    and len(x) == 2
    and isinstance(x[0], str)
    and second(x[1])
  )


def _optional(wanted):
  fits, want = wanted
  return (lambda x: x is None or fits(x)), f"{want}, or None"


def _one_of(*values):
  *most, last = map(repr, values)
  return (lambda x: x in values), f"{', '.join(most)} or {last}"


_GRID_OF_INTS = _list_of(lambda n: _is_int(n) and n >= 1)
_TEXT = (lambda x: isinstance(x, str) and x != ""), "text"
_COUNT = (lambda x: _is_int(x) and x >= 1), "an integer >= 1"
_POSITIVE = (lambda x: _is_number(x) and x > 0), "a number > 0"
_NOT_NEGATIVE = (lambda x: _is_number(x) and x >= 0), "a number >= 0"
_MULTS = _list_of(_pair(_is_number)), "a list of (regex, number)"

# What the value of a field must be: a test, and the same in words.
_WANTED = {
  "seed": ((lambda x: _is_int(x) and 0 <= x < 2**63), "an integer >= 0"),
  "total_steps": _optional(_COUNT),
  "total_epochs": _optional(_POSITIVE),
  "model_name": _TEXT,
  "num_classes": _optional(_COUNT),
  "model_init": _optional(_TEXT),
  "model_init_inflation": _one_of("central", "average"),
  "model_init_mapping.gathering": _one_of(
    "half", "whole", "gathering", "refinement"
  ),
  "model_init_mapping.contextualisation": _one_of("mean", "sum", "none"),
  "model_init_mapping.small_mlp": _one_of("fit", "slice", "none"),
  "grids": _optional(
    (
      (lambda x: _list_of(_GRID_OF_INTS)(x) and x),
      "a list of grids such as (5, 5), at least one",
    )
  ),
  "task": _TEXT,
  "loss": _TEXT,
  "tokenizer": _optional(_TEXT),
  "label_smoothing": (
    (lambda x: _is_number(x) and 0 <= x < 1),
    "a number in [0, 1)",
  ),
  "mixup.p": _NOT_NEGATIVE,
  "cutmix.p": _NOT_NEGATIVE,
  "input.pp": ((lambda x: isinstance(x, str)), "text"),
  "input.image_size": (
    (lambda x: _GRID_OF_INTS(x) and len(x) in (2, 3)),
    "(rows, columns) or (time, rows, columns)",
  ),
  "input.batch_size": _COUNT,
  "input.shuffle_buffer_size": _COUNT,
  "optax_name": _TEXT,
  "lr": _NOT_NEGATIVE,
  "wd": _NOT_NEGATIVE,
  "lr_mults": _MULTS,
  "wd_mults": _MULTS,
  "frozen": (_list_of(lambda x: isinstance(x, str)), "a list of regexes"),
  "grad_clip_norm": _optional(_POSITIVE),
  "grad_accum_steps": _COUNT,
  "ema_decay": _optional(
    ((lambda x: _is_number(x) and 0 < x < 1), "a number in (0, 1)")
  ),
  "mesh": (_list_of(_pair(_is_int)), "a list of (axis, size)"),
  "sharding": _TEXT,
  "log_training_steps": _COUNT,
  "log_attention_logit": ((lambda x: isinstance(x, bool)), "True or False"),
  "ckpt_steps": _COUNT,
  "ckpt_keep": _optional(_COUNT),
  "ckpt_keep_every": _optional(_COUNT),
}

# Fields that may differ when a work directory is taken up again: none of them
# changes what is learned.
FREE = (
  "evals",
  "mesh",
  "sharding",
  "log_training_steps",
  "log_attention_logit",
  "ckpt_steps",
  "ckpt_keep",
  "ckpt_keep_every",
  "input.data.data_dir",
  "input.data.mixture.data_dir",
)


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
  for path, (fits, want) in _WANTED.items():
    value = full
    for name in path.split("."):
      value = value[name]
    if value is None and fits(None) is False:
      raise ValueError(f"config.{path} is not set; want {want}.")
    if not fits(value):
      raise ValueError(f"config.{path}={value!r}: want {want}.")
  if (full["total_steps"] is None) == (full["total_epochs"] is None):
    raise ValueError(
      "Set one of config.total_steps and config.total_epochs, not "
      + ("both." if full["total_steps"] is not None else "neither.")
    )
  batch, accum = full["input"]["batch_size"], full["grad_accum_steps"]
  if batch % accum:
    raise ValueError(
      f"config.input.batch_size={batch}: want a multiple of "
      f"config.grad_accum_steps={accum}."
    )
  with at_fault("config.evals"):
    check_evals(full["evals"])
  return ml_collections.ConfigDict(full)


def check_evals(evals: Mapping[str, Any]) -> None:
  """Raises ValueError where these are no evaluators by name."""
  for name, value in evals.items():
    is_dict = isinstance(value, Mapping | ml_collections.ConfigDict)
    if "/" in name or not is_dict:
      raise ValueError(
        f"want dicts by names without a slash, not {name!r}: {value!r}."
      )


def evals_in_order(names: Iterable[str]) -> list[str]:
  """Names of evaluators, first that which a run is judged by.

  A `ConfigDict` does not keep the order in which a config names them: "val"
  comes first, then "test", then the others by name.
  """
  return sorted(names, key=lambda name: (name != "val", name != "test", name))


def evaluation(
  config: ml_collections.ConfigDict, name: str | None = None
) -> ml_collections.ConfigDict:
  """The fields of the evaluator by whose `pp_fn` a run's files are read.

  Args:
    config: of a run, resolved.
    name: of an evaluator; that which the run is judged by where none is given.

  Raises:
    ValueError: none has, or this one has not.
  """
  names = evals_in_order(config.evals)
  having = [n for n in names if config.evals[n].get("pp_fn")]
  if name is None and not having:
    raise ValueError(
      "config.evals: no evaluator says how to read images (pp_fn)."
    )
  if name is not None and name not in having:
    raise ValueError(
      f"config.evals has no evaluator {name!r} that says how to read images "
      f"(pp_fn); {', '.join(having) or 'none'} has."
    )
  return config.evals[name or having[0]]


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


def workdir_path(workdir: str) -> epath.Path:
  """A work directory as a path, here or on `gs://`; `~` is expanded.

  Raises:
    ValueError: it is empty, or a file.
  """
  path = epath.Path(workdir).expanduser()
  if not str(workdir) or path.is_file():
    raise ValueError(f"workdir={str(workdir)!r}: want a directory.")
  return path


def read_json(path: epath.Path) -> Any:
  """What a JSON file of a work directory holds.

  Raises:
    ValueError: it is no JSON.
  """
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f"{path} is damaged: {e}.") from None


def read_workdir(workdir: str) -> ml_collections.ConfigDict:
  """The resolved config of a work directory.

  Raises:
    ValueError: there is none, or it cannot be read.
  """
  path = workdir_path(workdir) / CONFIG_FILE
  if not path.exists():
    raise ValueError(f"{workdir} is no work directory: no {CONFIG_FILE} there.")
  config = read_json(path)
  if not isinstance(config, dict):
    raise ValueError(f"{path} is damaged: it holds no object.")
  with at_fault(str(path)):
    return resolve(config)


def total_steps(
  config: ml_collections.ConfigDict, num_examples: int | None
) -> int:
  """Number of update steps: `total_steps`, or that of `total_epochs`.

  Args:
    config: a resolved config.
    num_examples: of the training data; None for a mixture of data sets.

  Raises:
    ValueError: the epochs are less than a step, or of a mixture.
  """
  if config.total_steps is not None:
    steps = config.total_steps
  elif num_examples is None:
    raise ValueError(
      "config.total_epochs: a mixture has no epochs; set config.total_steps."
    )
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

  # The data sets of a mixture.
  dicts = _list_of(lambda part: isinstance(part, dict))

  def compare(x, y, where):
    if isinstance(x, dict) and isinstance(y, dict):
      for name in sorted({*x, *y}):
        path = f"{where}.{name}" if where else name
        if path not in FREE:
          compare(x.get(name), y.get(name), path)
    elif dicts(x) and dicts(y) and len(x) == len(y):
      for one, other in zip(x, y, strict=True):
        compare(one, other, where)
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


def format_grid(grid: Iterable[int]) -> str:
  """`(5, 5)` to `"5x5"`."""
  return "x".join(str(g) for g in grid)


def parse_mesh(text: str) -> list[tuple[str, int]]:
  """`"data=-1,tensor=4"` to `[("data", -1), ("tensor", 4)]`.

  Raises:
    ValueError: the text is not of that form.
  """
  axes = []
  for part in text.split(","):
    match = re.fullmatch(r"(\w+)=(-?\d+)", part)
    if not match:
      raise ValueError(f"A mesh is written data=-1,tensor=4, not {text!r}.")
    axes.append((match[1], int(match[2])))
  return axes
