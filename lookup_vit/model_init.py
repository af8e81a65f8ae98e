"""Parameters that a training starts from (`config.model_init`).

Other runs, and published ViTs: `.npz` of AugReg and big_vision, `.safetensors`
of timm and Hugging Face, as files or as directories with `model.safetensors`.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from flax import traverse_util

from lookup_vit import checkpoints, config_utils
from lookup_vit.models import (
  inflation,
  layers,
  published_vit,
  tokens,
  warm_start,
)

log = logging.getLogger("lookup_vit")

_WEIGHTS = "model.safetensors"

# Hugging Face's names of activations.
_GELUS = {
  "gelu": "exact",
  "gelu_python": "exact",
  "gelu_new": "tanh",
  "gelu_pytorch_tanh": "tanh",
}

# Those of .safetensors; its own reader for NumPy has no bfloat16.
_FLOATS = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
}


class Source(NamedTuple):
  """Where parameters come from.

  Attributes:
    name: for people.
    params: by path, blocks apart.
    fields: of the model that they are of, as far as known, for those that its
      outputs depend on.
  """

  name: str
  params: dict[str, np.ndarray]
  fields: Mapping[str, Any]


def is_file(spec: str) -> bool:
  """Whether `config.model_init` is of published weights, not of a run."""
  path = epath.Path(spec).expanduser()
  is_weights = path.suffix in (".npz", ".safetensors")
  return is_weights or (path / _WEIGHTS).exists()


def read_config(spec: str) -> Any:
  """The resolved config of `config.model_init`, of a run.

  Raises:
    ValueError: no such work directory.
  """
  return config_utils.read_workdir(_split_spec(spec)[0])


def _split_spec(spec):
  """`WORKDIR` or `WORKDIR:STEP` as work directory and step, or None."""
  match = re.fullmatch(r"(.+?)(?::(\d+))?", spec)
  return match[1], match[2] and int(match[2])


def read(spec: str, sharding: Any = None) -> Source:
  """Parameters of a run or of published weights.

  Args:
    spec: `config.model_init`.
    sharding: to read a run's checkpoint with; of the first device by default.

  Raises:
    ValueError: there is none, it is damaged, or of no known layout.
  """
  if is_file(spec):
    return _read_file(epath.Path(spec).expanduser())
  workdir, step = _split_spec(spec)
  params, step, _ = checkpoints.load_params(workdir, step, sharding)
  params = jax.tree.map(np.asarray, params)
  return Source(f"{workdir}, step {step}", _flat(params), {})


def _flat(params):
  return traverse_util.flatten_dict(layers.unstack_blocks(params), sep="/")


def _read_file(path):
  """Published weights; what is beside them says how images are normalised."""
  if path.is_dir():
    path = path / _WEIGHTS
  if not path.exists():
    raise ValueError("there is no such file.")
  load = _read_npz if path.suffix == ".npz" else _read_safetensors
  arrays = load(path)
  try:
    published = published_vit.convert(arrays)
  except (IndexError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"its arrays have no shapes of a ViT's: {e}.") from e
  params, fields = published.params, dict(published.fields)
  mean, std, more = _beside(path.parent)
  fields |= more
  if (mean, std) != ([0.5] * 3, [0.5] * 3):
    params = published_vit.normalised(params, mean, std)
  for note in published.notes:
    log.warning("config.model_init=%s: %s", path, note)
  return Source(f"{path} ({published.layout})", params, fields)


def _read_npz(path):
  try:
    with path.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
      read = {name: arrays[name] for name in arrays.files}
  except (MemoryError, PermissionError):
    raise
  except Exception as e:  # A damaged one raises many kinds.
    raise ValueError(f"is no .npz of arrays: {e}") from None
  # NumPy has no bfloat16 of its own.
  return {
    k: x.view(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == "V2" else x
    for k, x in read.items()
  }


def _read_safetensors(path):
  try:
    arrays = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as e:
    raise ValueError(f"is no .safetensors: {e}") from None
  read = {}
  for name, array in arrays:
    if array["dtype"] not in _FLOATS:
      continue  # Such as counts of batches.
    flat = np.frombuffer(array["data"], _FLOATS[array["dtype"]])
    read[name] = flat.astype(np.float32).reshape(array["shape"])
  return read


def _beside(folder):
  """Mean, deviation, and fields of the model, by configs beside weights.

  Those of Hugging Face (`preprocessor_config.json`, `config.json`) and of timm
  (`config.json`).
  """
  mean, std, fields = [0.5] * 3, [0.5] * 3, {}
  of_model, of_images = {}, {}
  if (folder / "config.json").exists():
    of_model = _object(folder / "config.json")
  if (folder / "preprocessor_config.json").exists():
    of_images = _object(folder / "preprocessor_config.json")
  of_timm = _dict(of_model.get("pretrained_cfg"))
  if of_images.get("do_normalize") is False:
    mean, std = [0.0] * 3, [1.0] * 3
  elif "image_mean" in of_images:
    mean, std = of_images["image_mean"], of_images.get("image_std")
  elif "mean" in of_timm:
    mean, std = of_timm["mean"], of_timm.get("std")
  if not _are_numbers(mean) or not _are_numbers(std) or min(std) <= 0:
    raise ValueError(
      f"by the configs beside it, images are normalised by mean {mean!r} and "
      f"deviation {std!r}: want three numbers each, the latter > 0."
    )
  vision = _dict(of_model.get("vision_config", of_model))
  act = vision.get("hidden_act")
  if act is not None:
    if act not in list(_GELUS):
      raise ValueError(
        f"its activation is {act!r} by config.json; this ViT has "
        f"{', '.join(_GELUS)}."
      )
    fields["gelu"] = _GELUS[act]
  if "layer_norm_eps" in vision:
    fields["norm_eps"] = vision["layer_norm_eps"]
  if "num_attention_heads" in vision:
    fields["num_heads"] = vision["num_attention_heads"]
  return list(mean), list(std), fields


def _dict(value):
  return value if isinstance(value, dict) else {}


def _are_numbers(values):
  return (
    isinstance(values, list)
    and len(values) == 3
    and all(isinstance(x, int | float) and math.isfinite(x) for x in values)
  )


def _object(path):
  try:
    value = json.loads(path.read_text())
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path} beside the weights is damaged: {e}.") from None
  if not isinstance(value, dict):
    raise ValueError(f"{path} beside the weights holds no object.")
  return value


def init_from(
  spec: str,
  params: Any,
  model: Any,
  image_size: Any,
  *,
  sharding: Any = None,
  inflate: str = "central",
  mapping: Mapping[str, str] | None = None,
) -> Any:
  """Parameters that start from others (`config.model_init`).

  Blocks are converted between the layouts of scan and loop; positions, and
  learned compressed tokens, are resized (linearly) where the grids differ, and
  the linear layer of patches where these do (`warm_start.resample_patch`);
  heads keep their fresh values where the shapes differ. A LookupViT starts from
  a ViT by `models/warm_start.py`. For a video model, those of an image model
  are inflated (`models/inflation.py`). The encoder of a captioner or a probe
  starts from a checkpoint of the encoder alone, or of another model with an
  encoder. What was not loaded is logged.

  Args:
    spec: `WORKDIR`, `WORKDIR:STEP`, or a file or directory of a published ViT.
    params: freshly initialised parameters, of the whole model.
    model: the model, or its encoder.
    image_size: (rows, columns) or (time, rows, columns) in pixels.
    sharding: to read a checkpoint with; of the first device by default.
    inflate: `config.model_init_inflation`.
    mapping: `config.model_init_mapping`.

  Raises:
    ValueError: no such checkpoint or file, or parameters that do not fit: names
      and shapes are listed.
  """
  try:
    return _init_from(
      spec, params, model, image_size, sharding, inflate, mapping or {}
    )
  except ValueError as e:
    raise type(e)(f"config.model_init={spec!r}: {e}") from None


def _init_from(spec, params, model, image_size, sharding, inflate, mapping):
  origin = read(spec, sharding)
  _check_fields(origin, model)
  whole, part, source = params, None, origin.params
  tops = {name.split("/")[0] for name in source}
  if "encoder" in params and tops != set(layers.unstack_blocks(params)):
    part, params = "encoder", params["encoder"]
    if "encoder" in tops:
      source = _below(source, "encoder")
  target = _flat(params)
  source, left, notes = _as_model(
    source, target, model, image_size, inflate, mapping
  )
  fitted, fresh, resized = _fit(source, target)
  log.info("Started from %s.", origin.name)
  for note in notes:
    log.info("  %s", note)
  for what, names in (
    ("Resized", resized),
    ("Not loaded, freshly initialised", fresh),
    ("Not loaded, not in this model", left + list(source)),
  ):
    if names:
      log.info("  %s: %s", what, ", ".join(dict.fromkeys(names)))
  result = traverse_util.unflatten_dict(fitted, sep="/")
  if getattr(model, "scan", False):  # Of a user's own model, unknown.
    result = layers.stack_blocks(result)
  if part is None:
    return result
  log.info("  That is the %s; the rest is freshly initialised.", part)
  return {**whole, part: result}


def _below(params, name):
  return {
    path.removeprefix(f"{name}/"): x
    for path, x in params.items()
    if path.startswith(f"{name}/")
  }


def _check_fields(origin, model):
  """Whether a model can compute what its parameters are of."""
  heads = origin.fields.get("num_heads")
  if heads is None and origin.fields:
    log.info("Heads of attention are as the model's: no file says how many.")
  if heads is not None and heads != getattr(model, "num_heads", heads):
    raise ValueError(
      f"it has {heads} heads, the model has {model.num_heads}: set "
      f"config.model.num_heads={heads}."
    )
  for name in ("gelu", "norm_eps"):
    want = origin.fields.get(name)
    got = getattr(model, name, want)
    if want is not None and want != got:
      log.warning(
        "%s was trained with %s=%r, the model has %r: for the same outputs set "
        "config.model.%s=%r.",
        *(origin.name, name, want, got, name, want),
      )


def _as_model(source, target, model, image_size, inflate, mapping):
  """Parameters of another kind of model as those of this one.

  Returns:
    Parameters by path, those of the source that have no counterpart, and notes.
  """
  left, notes = [], []
  inner = _below(target, "spatial") or target
  if warm_start.applies(source, inner):
    mapping = warm_start.Mapping(**mapping)
    each = _tokens_each(source, model, image_size)
    source, left = warm_start.lookup_vit(
      source,
      inner,
      tokens_each=each,
      exact_gelu=model.gelu == "exact",
      mapping=mapping,
    )
    values = ", ".join(f"{k}={v}" for k, v in mapping._asdict().items())
    notes.append(f"A LookupViT from a ViT: {values}.")
  name = "embedding/kernel"
  if name in source and getattr(model, "stem", None) == "patch":
    patch = model.patch_size[-(source[name].ndim - 2) :]
    old = source[name].shape[:-2]
    if patch != old and len(patch) == len(old):
      source = source | {name: warm_start.resample_patch(source[name], patch)}
      notes.append(f"Patches resampled from {old} to {patch}.")
  scale = inflation.contextualisation_scale(model, image_size)
  inflated, new = inflation.inflate(source, target, inflate, scale)
  if inflated is not source:
    notes.append(
      f"Inflated from images to videos: patch kernel {inflate}, "
      f"contextualisation kernels times {scale:g}."
    )
  fresh = {name: target[name] for name in new}
  return inflated | fresh, left, notes


def _tokens_each(source, model, image_size):
  """Lookup tokens to a compressed one: `warm_start.lookup_vit`."""
  if model.reuse != "weights" or model.reuse_scale == "tokens":
    return 1.0
  rank = source["embedding/kernel"].ndim - 2
  lookup, compressed = model.lookup_grid(image_size), model.grid
  return math.prod(lookup[-rank:]) / math.prod(compressed[-rank:])


def _fit(source, target):
  """The arrays of `source` where those of `target` are; takes them from it.

  Returns:
    Parameters by path, names of those that stay as they are, and what was
    resized.

  Raises:
    ValueError: parameters that do not fit.
  """
  wrong, fresh, resized = [], [], []
  result = {}
  for name, value in target.items():
    got = source.pop(name, None)
    if got is value:  # Freshly drawn, as there is no counterpart.
      result[name] = value
      fresh.append(name.split("/")[0])
    elif got is not None and got.shape == value.shape:
      result[name] = got.astype(value.dtype)
    elif name.startswith("head"):
      result[name] = value
      fresh.append(name)
    elif (
      name.split("/")[-1] in tokens.GRIDS
      and got is not None
      and (got.ndim, got.shape[-1]) == (value.ndim, value.shape[-1])
    ):
      result[name] = jax.image.resize(got, value.shape, "linear")
      resized.append(f"{name} {got.shape} to {value.shape}")
    else:
      found = "is missing" if got is None else f"is {got.shape}"
      wrong.append(f"{name} {found}, want {value.shape}")
  left = [n for n in source if not n.startswith("head")]
  wrong += [f"{n} {source[n].shape} has no place in the model" for n in left]
  if wrong:
    pools = {"cls": "tok", "map_head/probe": "map"}
    hints = [
      f" Set config.model.pool={pool!r}."
      for name, pool in pools.items()
      if name in left
    ]
    raise ValueError(
      "does not fit the model: "
      + "; ".join(wrong[:20])
      + (f"; and {len(wrong) - 20} more." if len(wrong) > 20 else ".")
      + "".join(hints)
    )
  return result, fresh, resized
