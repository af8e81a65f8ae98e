"""Parameters as safetensors files, which hold numbers and no code."""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from lookup_vit import checksums, config_utils

FILE = "params.safetensors"


def write(folder: str, params: Any, step: int) -> None:
  """Writes parameters as `params.safetensors`.

  Arrays have their names in the tree, with slashes; the file's metadata have
  the step, and checksums in the order of the names.

  Args:
    folder: a directory there is.
    params: nested, or by name.
    step: of the training.
  """
  from safetensors import numpy as safetensors

  flat = traverse_util.flatten_dict(params, sep="/")
  flat = {name: np.ascontiguousarray(x) for name, x in sorted(flat.items())}
  meta = {"step": step, "checksums": checksums.of(flat)}
  meta = {name: json.dumps(value) for name, value in meta.items()}
  # Its own `save_file` lets nobody else read what it makes.
  (pathlib.Path(folder) / FILE).write_bytes(safetensors.save(flat, meta))


def read(folder: str) -> tuple[dict[str, np.ndarray], int]:
  """The parameters that `write` wrote, by name, and the step.

  Raises:
    ValueError: there is no such file, it is not one of `write`, or a damaged
      one.
  """
  import safetensors

  path = config_utils.workdir_path(folder) / FILE
  if not path.exists():
    raise ValueError(f"{folder}: no {FILE} there.")
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      meta = file.metadata() or {}
      flat = {name: file.get_tensor(name) for name in sorted(file.keys())}
  except safetensors.SafetensorError as e:
    raise ValueError(f"{path} is damaged: {e}.") from None
  if not {"step", "checksums"} <= meta.keys():
    raise ValueError(f"{path} was not written by lookup_vit.export.")
  try:
    step, sums = (json.loads(meta[name]) for name in ("step", "checksums"))
  except json.JSONDecodeError as e:
    raise ValueError(f"{path} is damaged: {e}.") from None
  if checksums.of(flat) != sums:
    raise ValueError(f"{path} is damaged: the checksums differ.")
  return flat, step


def load(folder: str) -> tuple[Any, int, ml_collections.ConfigDict]:
  """As `checkpoints.load_params`, of a directory of `--format=safetensors`.

  Returns:
    The parameters, the step, and the resolved config.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  config = config_utils.read_workdir(folder)
  flat, step = read(folder)
  return traverse_util.unflatten_dict(flat, sep="/"), step, config


def same(one: Any, other: Any) -> bool:
  """Whether two trees have the same names, dtypes and bits."""
  if jax.tree.structure(one) != jax.tree.structure(other):
    return False

  def bits(x):
    x = np.asarray(x)
    return x.shape, x.dtype, x.tobytes()

  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return all(bits(a) == bits(b) for a, b in pairs)
