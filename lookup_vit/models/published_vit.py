"""Published ViTs' weights under the names of `vit.py`.

Their layouts, each recognised by its names:

  AugReg        Flax, arrays of an `.npz`; the original ViT's too
                (google-research/vision_transformer)
  big_vision    Flax, arrays of an `.npz`, also of a tower of several, also
                with blocks stacked (google-research/big_vision, models/vit.py)
  timm          PyTorch (huggingface/pytorch-image-models, VisionTransformer)
  Hugging Face  PyTorch (transformers, ViT and the image tower of SigLIP)
  lookup_vit    this code's own

What they have that `vit.py` has not, and that can be had exactly all the same,
is multiplied in: the position of a class token, which is added to it; the
scales of updates (LayerScale, arXiv:2103.17239); and `normalised`, images that
were normalised by the mean and deviation of a data set.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from lookup_vit.models import layers

Arrays = dict[str, np.ndarray]

# The names of modules there and here; `#` is the number of a block.
_FLAX = {
  "embedding": "embedding",
  "Transformer/encoderblock_#/LayerNorm_0": "encoderblock_#/norm_attention",
  "Transformer/encoderblock_#/LayerNorm_[12]": "encoderblock_#/norm_mlp",
  "Transformer/encoderblock_#/MultiHeadDotProductAttention_[01]/(query|key|"
  "value|out)": r"encoderblock_#/attention/\2",
  "Transformer/encoderblock_#/MlpBlock_[03]/Dense_0": (
    "encoderblock_#/mlp/dense_in"
  ),
  "Transformer/encoderblock_#/MlpBlock_[03]/Dense_1": (
    "encoderblock_#/mlp/dense_out"
  ),
  "Transformer/encoder_norm": "encoder_norm",
  "MAPHead_0/MultiHeadDotProductAttention_0/(query|key|value|out)": (
    r"map_head/attention/\1"
  ),
  "MAPHead_0/LayerNorm_0": "map_head/norm_mlp",
  "MAPHead_0/MlpBlock_0/Dense_0": "map_head/mlp/dense_in",
  "MAPHead_0/MlpBlock_0/Dense_1": "map_head/mlp/dense_out",
  "head": "head",
}
_TIMM = {
  "patch_embed.proj": "embedding",
  "blocks.#.norm1": "encoderblock_#/norm_attention",
  "blocks.#.norm2": "encoderblock_#/norm_mlp",
  "blocks.#.attn.(query|key|value)": r"encoderblock_#/attention/\2",
  "blocks.#.attn.proj": "encoderblock_#/attention/out",
  "blocks.#.mlp.fc1": "encoderblock_#/mlp/dense_in",
  "blocks.#.mlp.fc2": "encoderblock_#/mlp/dense_out",
  "norm|fc_norm": "encoder_norm",
  "attn_pool.q": "map_head/attention/query",
  "attn_pool.(key|value)": r"map_head/attention/\1",
  "attn_pool.proj": "map_head/attention/out",
  "attn_pool.norm": "map_head/norm_mlp",
  "attn_pool.mlp.fc1": "map_head/mlp/dense_in",
  "attn_pool.mlp.fc2": "map_head/mlp/dense_out",
  "head": "head",
}
_HF_VIT = {
  "embeddings.patch_embeddings.projection": "embedding",
  "encoder.layer.#.layernorm_before": "encoderblock_#/norm_attention",
  "encoder.layer.#.layernorm_after": "encoderblock_#/norm_mlp",
  "encoder.layer.#.attention.attention.(query|key|value)": (
    r"encoderblock_#/attention/\2"
  ),
  "encoder.layer.#.attention.output.dense": "encoderblock_#/attention/out",
  "encoder.layer.#.intermediate.dense": "encoderblock_#/mlp/dense_in",
  "encoder.layer.#.output.dense": "encoderblock_#/mlp/dense_out",
  "layernorm": "encoder_norm",
  "classifier": "head",
}
_HF_SIGLIP = {
  "embeddings.patch_embedding": "embedding",
  "encoder.layers.#.layer_norm1": "encoderblock_#/norm_attention",
  "encoder.layers.#.layer_norm2": "encoderblock_#/norm_mlp",
  "encoder.layers.#.self_attn.q_proj": "encoderblock_#/attention/query",
  "encoder.layers.#.self_attn.k_proj": "encoderblock_#/attention/key",
  "encoder.layers.#.self_attn.v_proj": "encoderblock_#/attention/value",
  "encoder.layers.#.self_attn.out_proj": "encoderblock_#/attention/out",
  "encoder.layers.#.mlp.fc1": "encoderblock_#/mlp/dense_in",
  "encoder.layers.#.mlp.fc2": "encoderblock_#/mlp/dense_out",
  "post_layernorm": "encoder_norm",
  "head.attention.(query|key|value)": r"map_head/attention/\1",
  "head.attention.out_proj": "map_head/attention/out",
  "head.layernorm": "map_head/norm_mlp",
  "head.mlp.fc1": "map_head/mlp/dense_in",
  "head.mlp.fc2": "map_head/mlp/dense_out",
  "classifier": "head",
}
# Single arrays.
_ARRAYS = {
  r"(Transformer/(posembed_input/)?)?pos_embedding": "pos_embedding",
  r"pos_embed|embeddings\.position_embeddings": "pos_embedding",
  r"embeddings\.position_embedding\.weight": "pos_embedding",
  r"cls|cls_token|embeddings\.cls_token": "cls",
  r"MAPHead_0/probe|attn_pool\.latent|head\.probe": "map_head/probe",
}
# What no output here depends on.
_IGNORED = re.compile(
  r"pooler\.dense\..*|embeddings\.mask_token|embeddings\.position_ids"
)
# A layer between the last tokens and a classifier that is of no use without.
_REPRESENTATION = re.compile(r"(pre_logits|repr)[./].*")


class _Layout(NamedTuple):
  """How an implementation names its arrays.

  Attributes:
    name: for people.
    first: the name of the patches' kernel, which all names' prefix is before.
    modules: names there and here.
    is_torch: whether matrices are `[out, in]`.
    fields: of the model.
  """

  name: str
  first: str
  modules: Mapping[str, str]
  is_torch: bool
  fields: Mapping[str, Any]


_EXACT = dict(gelu="exact", norm_eps=1e-6)
_TANH = dict(gelu="tanh", norm_eps=1e-6)
_LAYOUTS = (
  _Layout("big_vision", "embedding/kernel", _FLAX, False, _TANH),
  _Layout("timm", "patch_embed.proj.weight", _TIMM, True, _EXACT),
  _Layout(
    *("Hugging Face's ViT", "embeddings.patch_embeddings.projection.weight"),
    *(_HF_VIT, True, dict(gelu="exact", norm_eps=1e-12)),
  ),
  _Layout(
    *("Hugging Face's SigLIP", "embeddings.patch_embedding.weight"),
    *(_HF_SIGLIP, True, _TANH),
  ),
)


class Published(NamedTuple):
  """A published ViT.

  Attributes:
    layout: whose names it had.
    params: parameters of `vit.ViT` by path, blocks apart.
    fields: those of the model that its outputs depend on and that are known
      from the layout: `gelu`, `norm_eps`, and `num_heads` where arrays show it.
    notes: for people, on what is not as it was.
  """

  layout: str
  params: Arrays
  fields: dict[str, Any]
  notes: list[str]


def convert(weights: Mapping[str, np.ndarray]) -> Published:
  """A published ViT's weights under the names of `vit.py`.

  Args:
    weights: arrays by name, of any layout above. Those of other towers, or of
      an optimizer, are left out.

  Raises:
    ValueError: no layout fits, or the model has parts that `vit.py` has not;
      they are named.
  """
  if any(re.match(r"encoderblock(_0)?/", name) for name in weights):
    tree = traverse_util.unflatten_dict(dict(weights), sep="/")
    params = traverse_util.flatten_dict(layers.unstack_blocks(tree), sep="/")
    return Published("lookup_vit", params, {}, [])
  layout, prefix = _find(weights)
  weights = {
    name.removeprefix(prefix): np.asarray(x)
    for name, x in weights.items()
    if name.startswith((prefix, "classifier."))
  }
  weights = {k: x for k, x in weights.items() if not _IGNORED.fullmatch(k)}
  notes, fields = [], dict(layout.fields)
  if any(map(_REPRESENTATION.fullmatch, weights)):
    weights = {
      name: x
      for name, x in weights.items()
      if not (_REPRESENTATION.fullmatch(name) or re.match(r"head[./]", name))
    }
    notes.append(
      "its classifier stands on a layer of its own (pre_logits), which is none "
      "of this model: both are left out."
    )
  if "classifier.weight" in weights and "head.probe" in weights:
    # SiglipForImageClassification classifies the mean of the tokens.
    weights = {k: x for k, x in weights.items() if not k.startswith("head.")}
    notes.append(
      "its classifier reads the mean of tokens: attention pooling is left out."
    )
  if "fc_norm.weight" in weights and "cls_token" in weights:
    weights = {k: x for k, x in weights.items() if not re.match(r"head\.", k)}
    notes.append(
      "its classifier reads the mean of patches beside a class token, which is "
      "none of this model: it is left out."
    )
  elif "fc_norm.weight" in weights:
    notes.append(
      "its last LayerNorm is after the mean over tokens (fc_norm), here it is "
      "before: outputs are near, not the same."
    )
  if layout.is_torch:
    weights, scales = _split(weights)
  else:
    weights, scales = _unstack(weights), {}
    heads = _flax_heads(weights)
    fields |= {"num_heads": heads} if heads else {}
  params, unknown = _rename(weights, layout)
  if unknown:
    raise ValueError(
      f"by its names a ViT of {layout.name}, but with parts that this one has "
      f"not: {_some(unknown)}."
    )
  for path, scale in scales.items():
    for leaf in ("kernel", "bias"):
      params[f"{path}/{leaf}"] = params[f"{path}/{leaf}"] * scale
  _place(params)
  return Published(layout.name, params, fields, notes)


def normalised(
  params: Arrays, mean: Sequence[float], std: Sequence[float]
) -> Arrays:
  """A model of images in [-1, 1], of one of images that were normalised.

  Args:
    params: of the model whose images are `(x - mean) / std`, `x` in [0, 1].
    mean: of each channel.
    std: likewise.

  Returns:
    `params` with another linear layer of patches, of the same outputs.
  """
  kernel = params["embedding/kernel"].astype(np.float64)
  scale = 0.5 / np.asarray(std, np.float64)
  shift = (0.5 - np.asarray(mean, np.float64)) / np.asarray(std, np.float64)
  axes = tuple(range(kernel.ndim - 2))
  bias = params["embedding/bias"] + shift @ kernel.sum(axes)
  new = {
    "embedding/kernel": kernel * scale[:, None],
    "embedding/bias": bias,
  }
  return params | {k: x.astype(params[k].dtype) for k, x in new.items()}


def _find(weights):
  """The layout of arrays, and what is before all names."""
  found = [
    (layout, name.removesuffix(layout.first))
    for layout in _LAYOUTS
    for name in weights
    if re.search(rf"(^|[./]){re.escape(layout.first)}$", name)
    # An optimizer has arrays of the same names.
    and not name.startswith("opt")
  ]
  if len(found) == 1:
    return found[0]
  if found:
    firsts = [prefix + layout.first for layout, prefix in found]
    raise ValueError(f"has several ViTs: {_some(firsts)}; want one.")
  raise ValueError(
    "is no ViT of AugReg, big_vision, timm or Hugging Face by its names: "
    f"{_some(list(weights))}."
  )


def _split(weights):
  """PyTorch's joint projections apart; and what scales updates, by path."""
  result, scales = {}, {}
  parts = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}
  outputs = {"1": "attention/out", "2": "mlp/dense_out"}
  for name, x in weights.items():
    if m := re.fullmatch(r"(.*)\.(qkv|kv)\.(weight|bias)", name):
      of = parts[m[2]]
    elif m := re.fullmatch(r"(.*)\.in_proj(_)(weight|bias)", name):
      of = parts["qkv"]
    elif m := re.fullmatch(r"blocks\.(\d+)\.ls([12])\.gamma", name):
      scales[f"encoderblock_{m[1]}/{outputs[m[2]]}"] = x
      continue
    else:
      result[name] = x
      continue
    for part, value in zip(of, np.split(x, len(of)), strict=True):
      result[f"{m[1]}.{part}.{m[3]}"] = value
  return result, scales


def _unstack(weights):
  """Flax's blocks of a scan apart; the inlined head under its later name."""
  result = {}
  for name, x in weights.items():
    if re.match(r"(probe$|LayerNorm_0|MlpBlock_0|MultiHeadDot)", name):
      name = f"MAPHead_0/{name}"
    if name.startswith("Transformer/encoderblock/"):
      for i, one in enumerate(x):
        result[name.replace("encoderblock/", f"encoderblock_{i}/")] = one
    else:
      result[name] = x
  return result


def _flax_heads(weights):
  shapes = [x.shape for k, x in weights.items() if k.endswith("query/kernel")]
  return shapes[0][1] if shapes and len(shapes[0]) == 3 else None


def _rename(weights, layout):
  """Parameters under the names here, and names that are unknown."""
  split = "." if layout.is_torch else "/"
  modules = []
  for there, here in layout.modules.items():
    if split == ".":
      there = there.replace(".", r"\.")
    there = there.replace("#", r"(\d+)")
    modules.append((re.compile(there), here.replace("#", r"\1")))
  params, unknown = {}, []
  for name, x in weights.items():
    single = [v for k, v in _ARRAYS.items() if re.fullmatch(k, name)]
    module, _, leaf = name.rpartition(split)
    found = [
      match.expand(here)
      for there, here in modules
      if (match := there.fullmatch(module))
    ]
    if single:
      params[single[0]] = x
    elif found and leaf in ("weight", "kernel", "scale", "bias"):
      path = found[0]
      as_here = _of_torch if layout.is_torch else _of_flax
      kind, x = as_here(path, leaf, x)
      params[f"{path}/{kind}"] = x
    else:
      unknown.append(name)
  return params, unknown


def _of_torch(path, leaf, x):
  if leaf == "bias" or x.ndim == 1:
    return ("bias" if leaf == "bias" else "scale"), x
  if path == "embedding" and x.ndim > 2:  # [out, in, rows, columns]
    return "kernel", np.moveaxis(x, (0, 1), (-1, -2))
  return "kernel", x.T


def _of_flax(path, leaf, x):
  """Heads are no axis here."""
  if "/attention/" in path:
    if leaf == "bias":
      x = x.reshape(-1)
    elif path.endswith("/out"):
      x = x.reshape(-1, x.shape[-1])
    else:
      x = x.reshape(len(x), -1)
  return leaf, x


def _place(params):
  """The grid of positions, the class token's, and biases that are zero."""
  width = params["embedding/kernel"].shape[-1]
  if "pos_embedding" in params:
    table = params["pos_embedding"].reshape(-1, width)
    side = math.isqrt(len(table))
    if side * side != len(table):
      side = math.isqrt(len(table) - 1)
      if side * side != len(table) - 1:
        raise ValueError(
          f"{len(table)} positions are no square grid, with or without a class "
          "token."
        )
      if "cls" in params:
        params["cls"] = params["cls"].reshape(1, 1, width) + table[0]
      table = table[1:]
    params["pos_embedding"] = table.reshape(side, side, width)
  for name in ("cls", "map_head/probe"):
    if name in params:
      params[name] = params[name].reshape(1, 1, width)
  for name in [n for n in params if re.search(r"/(query|key|value)/kernel", n)]:
    bias = name.replace("kernel", "bias")
    params.setdefault(bias, np.zeros(params[name].shape[-1], np.float32))
  if "embedding/bias" not in params:
    params["embedding/bias"] = np.zeros(width, np.float32)


def _some(names: Sequence[str], most: int = 8) -> str:
  more = f", and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more
