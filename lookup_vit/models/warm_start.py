"""A ViT's parameters as those of a LookupViT, or at another patch.

LookupViT's parts (names of `lookup_vit.py` and `mhbc.py`) from a block of ViT:

  tokenise           patches and positions as they are
  refinement         the block itself: its norms, attention and MLP
  gathering          query, key, value and out of the block's attention, and its
                     norm, for both kinds of tokens: compressed tokens read
                     lookup tokens as a token of ViT reads all
  contextualisation  value and out of the same attention: with the same
                     weights, transposed, lookup tokens read compressed ones
  small MLP          the block's norm; see below
  last norms         ViT's, twice; both classifiers ViT's one, where it reads
                     the mean of tokens and has the same classes

Two factors, which `Mapping` sets. A compressed token is attended for twice in a
block, in gathering and in refinement; ViT's update comes once. And a lookup
token's weights, a column of the attention, add up to M / N on average, where
those of ViT add up to one.

The small MLP has D/2 hidden units of ViT's 4 D: those whose part of the output
varies most, where inputs are what a LayerNorm gives of normal ones. Their
output layer is then fitted to the output of the whole MLP at such inputs, by
least squares.
"""

import re
from collections.abc import Mapping as MappingType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]

# Of what `Mapping` may have.
GATHERING = ("half", "whole", "gathering", "refinement")
CONTEXTUALISATION = ("mean", "sum", "none")
SMALL_MLP = ("fit", "slice", "none")


class Mapping(NamedTuple):
  """How a ViT becomes a LookupViT (`config.model_init_mapping`).

  Attributes:
    gathering: where the update by attention comes from: "half" of it from
      gathering and half from refinement, the "whole" of it from both, or from
      "gathering" or "refinement" alone. The other's output layer is zeros.
    contextualisation: "mean", its output layer's kernel times N / M; "sum", as
      it is; or "none", zeros.
    small_mlp: "fit" as above; "slice", the same hidden units with the output
      layer that they had; or "none", an output layer of zeros.
  """

  gathering: str = "half"
  contextualisation: str = "mean"
  small_mlp: str = "fit"

  def check(self) -> None:
    """Raises ValueError for a value that is none of those."""
    for name, values in (
      ("gathering", GATHERING),
      ("contextualisation", CONTEXTUALISATION),
      ("small_mlp", SMALL_MLP),
    ):
      if getattr(self, name) not in values:
        raise ValueError(
          f"{name}={getattr(self, name)!r}: want one of {', '.join(values)}."
        )


def applies(source: Arrays, target: MappingType[str, Any]) -> bool:
  """Whether these are parameters of a ViT, for a LookupViT.

  Args:
    source: parameters by path, blocks apart.
    target: likewise, or their shapes.
  """

  def is_lookup(params):
    return any("/refinement/" in name for name in params)

  return (
    is_lookup(target)
    and not is_lookup(source)
    and "encoderblock_0/attention/query/kernel" in source
  )


def lookup_vit(
  source: Arrays,
  target: MappingType[str, Any],
  *,
  tokens_each: float,
  exact_gelu: bool,
  mapping: Mapping,
) -> tuple[Arrays, list[str]]:
  """A ViT's parameters under the names of a LookupViT.

  Args:
    source: of the ViT, by path, blocks apart.
    target: of the LookupViT, or their shapes, likewise.
    tokens_each: lookup tokens to a compressed one, N / M; 1 where the model
      reuses other than the weights or scales them itself.
    exact_gelu: as of the model.
    mapping: see above.

  Returns:
    Parameters of the same widths as in `source`, and the names of those of
    `source` that have no counterpart.

  Raises:
    ValueError: `mapping` has an unknown value.
  """
  mapping.check()
  reads_mean = not {"cls", "map_head/probe"} & set(source)
  result, left = {}, []
  for name, x in source.items():
    block, _, rest = name.partition("/")
    if re.fullmatch(r"encoderblock_\d+", block):
      result[f"{block}/refinement/{rest}"] = x
    elif block == "encoder_norm":
      for kind in ("compressed", "lookup"):
        result[f"norm_{kind}/{rest}"] = x
    elif block == "head" and reads_mean:
      for kind in ("compressed", "lookup"):
        if f"head_{kind}/{rest}" in target:
          result[f"head_{kind}/{rest}"] = x
    elif block in ("head", "cls", "map_head"):
      left.append(name)
    else:
      result[name] = x
  for block in {n.split("/")[0] for n in source}:
    if not re.fullmatch(r"encoderblock_\d+", block):
      continue
    one = {
      name.removeprefix(f"{block}/"): x
      for name, x in source.items()
      if name.startswith(f"{block}/")
    }
    small = target.get(f"{block}/lookup_mlp/dense_in/kernel")
    hidden = None if small is None else small.shape[-1]
    parts = _block(one, hidden, tokens_each, exact_gelu, mapping)
    result |= {f"{block}/{name}": x for name, x in parts.items()}
  # Without reuse there is no contextualisation.
  back = re.compile(r".*/mhbc/(norm_refined|value_back|out_back)/.*")
  return {
    name: x
    for name, x in result.items()
    if name in target or not back.fullmatch(name)
  }, left


def _block(one, hidden, tokens_each, exact_gelu, mapping):
  """MHBC and the small MLP of a block; and what changes of its refinement."""
  result = {}
  parts = {
    "norm_attention": ("norm_compressed", "norm_lookup", "norm_refined"),
    "attention/query": ("query",),
    "attention/key": ("key",),
    "attention/value": ("value", "value_back"),
    "attention/out": ("out", "out_back"),
    "attention/query_norm": ("query_norm",),
    "attention/key_norm": ("key_norm",),
  }
  for name, x in one.items():
    module, _, leaf = name.rpartition("/")
    for part in parts.get(module, ()):
      result[f"mhbc/{part}/{leaf}"] = x
    if module == "norm_mlp":
      result[f"norm_lookup_mlp/{leaf}"] = x
  gathering = dict(half=0.5, whole=1, gathering=1, refinement=0)
  refinement = dict(half=0.5, whole=1, gathering=0, refinement=1)
  back = dict(mean=tokens_each, sum=1, none=0)[mapping.contextualisation]
  for leaf in ("kernel", "bias"):
    x = one[f"attention/out/{leaf}"]
    of_bias = min(back, 1) if leaf == "bias" else back
    result |= {
      f"mhbc/out/{leaf}": x * np.float32(gathering[mapping.gathering]),
      f"refinement/attention/out/{leaf}": (
        x * np.float32(refinement[mapping.gathering])
      ),
      f"mhbc/out_back/{leaf}": x * np.float32(of_bias),
    }
  if hidden is not None:
    result |= small_mlp(one, hidden, exact_gelu, mapping.small_mlp)
  return result


def small_mlp(
  one: Arrays, hidden: int, exact_gelu: bool, kind: str = "fit"
) -> Arrays:
  """An MLP of fewer hidden units, near another.

  Args:
    one: of a block, `norm_mlp/{scale,bias}` and `mlp/dense_{in,out}/{kernel,
      bias}`.
    hidden: units to keep, as many as there are at most.
    exact_gelu: as of the model.
    kind: of `SMALL_MLP`.

  Returns:
    `lookup_mlp/dense_{in,out}/{kernel,bias}`.
  """
  names = [
    f"mlp/dense_{i}/{k}" for i in ("in", "out") for k in ("kernel", "bias")
  ]
  into, bias_in, out, bias_out = (
    jnp.asarray(one[n], jnp.float32) for n in names
  )
  width, units = into.shape
  # More samples than unknowns of a column, so that the fit is of the MLP.
  samples = np.random.default_rng(0).standard_normal(
    (8 * max(hidden, 64), width)
  )
  scale, bias = (jnp.asarray(one[f"norm_mlp/{k}"]) for k in ("scale", "bias"))
  y = jnp.asarray(samples, jnp.float32) * scale + bias
  acts = jax.nn.gelu(y @ into + bias_in, approximate=not exact_gelu)
  parts = jnp.std(acts, axis=0) * jnp.linalg.norm(out, axis=1)
  chosen = np.sort(np.argsort(-np.asarray(parts), kind="stable")[:hidden])
  out_small, bias_small = out[chosen], bias_out
  if kind == "fit" and hidden < units:
    want = acts @ out
    few = acts[:, chosen]
    mean_few, mean_want = few.mean(0), want.mean(0)
    gram = (few - mean_few).T @ (few - mean_few)
    right = (few - mean_few).T @ (want - mean_want)
    # A unit that never varies is no reason to fail.
    ridge = 1e-4 * jnp.trace(gram) / hidden * jnp.eye(hidden)
    out_small = jnp.linalg.solve(gram + ridge, right)
    bias_small = bias_out + mean_want - mean_few @ out_small
  elif kind == "none":
    out_small, bias_small = 0 * out_small, 0 * bias_out
  result = {
    "dense_in/kernel": into[:, chosen],
    "dense_in/bias": bias_in[chosen],
    "dense_out/kernel": out_small,
    "dense_out/bias": bias_small,
  }
  return {f"lookup_mlp/{k}": np.asarray(x) for k, x in result.items()}


def resample_patch(kernel: np.ndarray, patch: tuple[int, ...]) -> np.ndarray:
  """The linear layer of patches, for patches of another size.

  By the pseudo-inverse of a linear resize along each axis (FlexiViT,
  arXiv:2212.08013, section 3.4): where patches grow, a resized patch has the
  token that the patch had.

  Args:
    kernel: `[*old patch, channels, width]`.
    patch: the new one, of the same rank.
  """
  x = kernel.astype(np.float64)
  for axis, (old, new) in enumerate(zip(kernel.shape, patch, strict=False)):
    if old == new:
      continue
    eye = jnp.eye(old)
    resize = jax.image.resize(eye, (new, old), "linear", antialias=False)
    inverse = np.linalg.pinv(np.asarray(resize, np.float64).T)
    x = np.moveaxis(np.tensordot(inverse, x, (1, axis)), 0, axis)
  return x.astype(kernel.dtype)
