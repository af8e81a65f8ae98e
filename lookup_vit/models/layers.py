"""What ViT and LookupViT share: tokens over a grid of any rank, and blocks.

Tokens are `[batch, tokens, width]`, flattened in row-major order from a grid:
`(rows, columns)` for images, `(time, rows, columns)` for video.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Grid = tuple[int, ...]

# Width, depth, MLP width and heads as in big_vision's models/vit.py; sources:
# ViT (arXiv:2010.11929), DeiT (Ti, S), Scaling ViT (arXiv:2106.04560: g).
_VARIANTS = {
  "mu": (32, 1, 128, 2),
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "M": (512, 12, 2048, 8),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "H": (1280, 32, 5120, 16),
  "g": (1408, 40, 6144, 16),
}

CAPTURES = ("tokens", "attention", "attention_logit_max")
_REMAT_POLICIES = (
  "nothing_saveable",
  "everything_saveable",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
)


def decode_variant(variant: str) -> dict[str, Any]:
  """Turns `"B/16"` or `"B/2x16"` into model fields.

  Args:
    variant: size, slash, patch. `16` is a 16x16 patch of an image, `2x16` a
      tubelet of 2 frames by 16x16, `2x14x16` a patch given axis by axis.

  Returns:
    `width`, `depth`, `num_heads`, `mlp_ratio` (MLP width over width) and
    `patch_size`, a tuple with an entry for each axis of the input.

  Raises:
    ValueError: the size is not known or the patch cannot be read.
  """
  match = re.fullmatch(r"(\w+)/(\d+(?:x\d+){0,2})", variant)
  if not match or match[1] not in _VARIANTS:
    raise ValueError(
      f"Unknown variant {variant!r}: want SIZE/PATCH such as 'B/16' for images "
      f"or 'B/2x16' for video, SIZE one of {', '.join(_VARIANTS)}."
    )
  patch = tuple(int(p) for p in match[2].split("x"))
  if 0 in patch:
    raise ValueError(f"Variant {variant!r} has a patch of size zero.")
  if len(patch) < 3:
    patch = (*patch, patch[-1])
  width, depth, mlp_dim, num_heads = _VARIANTS[match[1]]
  return dict(
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_ratio=mlp_dim / width,
    patch_size=patch,
  )


def build(
  cls: type[nn.Module],
  num_classes: int | None,
  variant: str,
  fields: Mapping[str, Any],
) -> nn.Module:
  """Makes a model from a variant and the fields that override it.

  Raises:
    ValueError: a field the model does not have, or the variant is unknown.
  """
  known = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
  for name in fields:
    if name not in known:
      close = difflib.get_close_matches(name, known, 1)
      hint = f" Did you mean {close[0]!r}?" if close else ""
      raise ValueError(
        f"{cls.__name__} has no field {name!r}.{hint} Its fields: "
        f"{', '.join(sorted(known))}."
      )
  fields = {
    k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
  }
  return cls(num_classes=num_classes, **{**decode_variant(variant), **fields})


@dataclasses.dataclass(frozen=True)
class LayerConfig:
  """What every layer of one forward pass has in common."""

  num_heads: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  qk_norm: bool = False
  gelu: str = "tanh"
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  train: bool = False
  capture: tuple[str, ...] = ()

  def __post_init__(self):
    """Raises ValueError for a field that no layer can serve."""
    if self.gelu not in ("tanh", "exact"):
      raise ValueError(f"gelu={self.gelu!r}: want 'tanh' or 'exact'.")
    unknown = set(self.capture) - set(CAPTURES)
    if unknown:
      raise ValueError(
        f"capture={self.capture!r}: want a tuple of {', '.join(CAPTURES)}."
      )
    for name in ("dropout", "attention_dropout", "stochastic_depth"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)!r}: want 0 <= rate < 1.")


def layer_norm(cfg: LayerConfig, name: str | None = None) -> nn.LayerNorm:
  """LayerNorm: statistics in float32, output in the compute dtype."""
  return nn.LayerNorm(epsilon=cfg.norm_eps, dtype=cfg.dtype, name=name)


def head_norm(cfg: LayerConfig, name: str | None = None) -> nn.LayerNorm:
  """LayerNorm of each head's query or key, no bias (ViT-22B, 2302.05442)."""
  return nn.LayerNorm(
    epsilon=cfg.norm_eps, dtype=cfg.dtype, use_bias=False, name=name
  )


def dense(
  cfg: LayerConfig,
  features: int,
  name: str | None = None,
  bias_init: nn.initializers.Initializer = nn.initializers.zeros,
) -> nn.Dense:
  """Linear layer in the compute dtype, initialised as in big_vision's ViT."""
  return nn.Dense(
    features,
    dtype=cfg.dtype,
    kernel_init=nn.initializers.xavier_uniform(),
    bias_init=bias_init,
    name=name,
  )


def dropout(cfg: LayerConfig, x: Array) -> Array:
  """Dropout at the rate of the residual branches; identity in evaluation."""
  if not cfg.train or not cfg.dropout:
    return x
  return nn.Dropout(cfg.dropout, deterministic=False)(x)


def split_heads(x: Float[Array, "b n D"], num_heads: int):
  """`[batch, tokens, width]` to `[batch, tokens, heads, width / heads]`."""
  return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x: Float[Array, "b n h d"]) -> Float[Array, "b n D"]:
  """The inverse of `split_heads`."""
  return x.reshape(*x.shape[:-2], -1)


def attention_logits(
  query: Float[Array, "b m h d"], key: Float[Array, "b n h d"]
) -> Float[Array, "b h m n"]:
  """Scaled dot products, accumulated and returned in float32."""
  query = query / math.sqrt(query.shape[-1])
  return jnp.einsum(
    "bmhd,bnhd->bhmn", query, key, preferred_element_type=jnp.float32
  )


def attention_dropout(
  cfg: LayerConfig, module: nn.Module, weights: Float[Array, "b h m n"]
) -> Float[Array, "b h m n"]:
  """Drops attention weights and rescales the rest; identity in evaluation."""
  if not cfg.train or not cfg.attention_dropout:
    return weights
  keep = 1 - cfg.attention_dropout
  mask = jax.random.bernoulli(module.make_rng("dropout"), keep, weights.shape)
  return jnp.where(mask, weights / keep, 0)


def captured_attention(
  cfg: LayerConfig,
  logits: Float[Array, "b h m n"],
  weights: Float[Array, "b h m n"],
) -> dict[str, Array]:
  """Those of attention's intermediates that `cfg.capture` asks for."""
  captured = {}
  if "attention" in cfg.capture:
    captured["attention"] = weights
  if "attention_logit_max" in cfg.capture:
    captured["attention_logit_max"] = jnp.max(logits)
  return captured


class Attention(nn.Module):
  """Multi-head attention of `queries` over `memory` (self-attention: itself).

  Returns the projected result `[batch, m, width]` and what `cfg.capture` asks
  for: `attention [batch, heads, m, n]`, `attention_logit_max []`.
  """

  cfg: LayerConfig

  @nn.compact
  def __call__(
    self, queries: Float[Array, "b m D"], memory: Float[Array, "b n D"]
  ) -> tuple[Float[Array, "b m D"], dict[str, Array]]:
    cfg = self.cfg
    width = queries.shape[-1]
    q, k, v = (
      split_heads(dense(cfg, width, name)(x), cfg.num_heads)
      for name, x in (("query", queries), ("key", memory), ("value", memory))
    )
    if cfg.qk_norm:
      q = head_norm(cfg, "query_norm")(q)
      k = head_norm(cfg, "key_norm")(k)
    logits = attention_logits(q, k)
    weights = jax.nn.softmax(logits)
    captured = captured_attention(cfg, logits, weights)
    weights = attention_dropout(cfg, self, weights).astype(v.dtype)
    x = merge_heads(jnp.einsum("bhmn,bnhd->bmhd", weights, v))
    return dense(cfg, width, "out")(x), captured


class Mlp(nn.Module):
  """Two dense layers with a GELU between them."""

  cfg: LayerConfig
  ratio: float

  @nn.compact
  def __call__(self, x: Float[Array, "b n D"]) -> Float[Array, "b n D"]:
    cfg = self.cfg
    width = x.shape[-1]
    hidden = round(width * self.ratio)
    if hidden < 1:
      raise ValueError(f"MLP ratio {self.ratio} of width {width} leaves none.")
    bias_init = nn.initializers.normal(1e-6)
    x = dense(cfg, hidden, "dense_in", bias_init)(x)
    x = nn.gelu(x, approximate=cfg.gelu == "tanh")
    x = dropout(cfg, x)
    return dense(cfg, width, "dense_out", bias_init)(x)


def residual(
  cfg: LayerConfig,
  module: nn.Module,
  x: Float[Array, "b n D"],
  update: Float[Array, "b n D"],
  drop_rate: Float[Array, ""],
) -> Float[Array, "b n D"]:
  """`x + update`, under dropout and stochastic depth (arXiv:1603.09382)."""
  update = dropout(cfg, update)
  if cfg.train and cfg.stochastic_depth:
    keep = 1 - drop_rate
    shape = (x.shape[0], 1, 1)
    mask = jax.random.bernoulli(module.make_rng("dropout"), keep, shape)
    update = jnp.where(mask, update / keep.astype(update.dtype), 0)
  return x + update


class EncoderBlock(nn.Module):
  """Pre-norm transformer block (arXiv:2010.11929): attention, then MLP.

  Called as `block(x, drop_rate)`; returns the tokens and what is captured.
  """

  cfg: LayerConfig
  mlp_ratio: float = 4.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n D"], drop_rate: Float[Array, ""]
  ) -> tuple[Float[Array, "b n D"], dict[str, Array]]:
    cfg = self.cfg
    y = layer_norm(cfg, "norm_attention")(x)
    y, captured = Attention(cfg, name="attention")(y, y)
    x = residual(cfg, self, x, y, drop_rate)
    y = layer_norm(cfg, "norm_mlp")(x)
    y = Mlp(cfg, self.mlp_ratio, name="mlp")(y)
    x = residual(cfg, self, x, y, drop_rate)
    if "tokens" in cfg.capture:
      captured["tokens"] = x
    return x, captured


def apply_blocks(
  block: type[nn.Module],
  fields: Mapping[str, Any],
  carry: Any,
  *,
  depth: int,
  scan: bool,
  remat_policy: str,
) -> tuple[Any, dict[str, Array]]:
  """Runs `depth` blocks, from inside a compact module.

  The rate of stochastic depth grows linearly from 0 to that of `fields["cfg"]`.

  Args:
    block: a module called as `block(carry, drop_rate)`.
    fields: its fields.
    carry: what passes from block to block.
    depth: number of blocks.
    scan: one compiled block for all. Its parameters are `encoderblock`,
      stacked on axis 0, instead of `encoderblock_0`, `encoderblock_1`, ...;
      `stack_blocks` and `unstack_blocks` convert.
    remat_policy: "none", or what of `jax.checkpoint_policies` may be kept for
      the backward pass.

  Returns:
    The carry, and what the blocks captured, stacked on axis 0.

  Raises:
    ValueError: the policy is unknown.
  """
  rates = jnp.linspace(0, fields["cfg"].stochastic_depth, depth)
  if remat_policy != "none":
    if remat_policy not in _REMAT_POLICIES:
      raise ValueError(
        f"remat_policy={remat_policy!r}: want 'none' or one of "
        f"{', '.join(_REMAT_POLICIES)}."
      )
    policy = getattr(jax.checkpoint_policies, remat_policy)
    block = nn.remat(block, prevent_cse=not scan, policy=policy)
  if scan:
    scanned = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      length=depth,
    )
    return scanned(**fields, name="encoderblock")(carry, rates)
  captured = []
  for i in range(depth):
    carry, c = block(**fields, name=f"encoderblock_{i}")(carry, rates[i])
    captured.append(c)
  return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *captured)


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of a loop over blocks, in the layout of a scan."""
  params = dict(params)
  names = [f"encoderblock_{i}" for i in range(len(params))]
  blocks = [params.pop(n) for n in names if n in params]
  if blocks:
    params["encoderblock"] = jax.tree.map(lambda *xs: np.stack(xs), *blocks)
  return params


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of a scan over blocks, in the layout of a loop."""
  params = dict(params)
  if "encoderblock" in params:
    stacked = params.pop("encoderblock")
    for i in range(len(jax.tree.leaves(stacked)[0])):
      params[f"encoderblock_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
  return params


def sincos_positions(
  grid: Grid, width: int, temperature: float = 10_000.0
) -> np.ndarray:
  """Fixed sine-cosine positions, as MoCo v3 (arXiv:2104.02057) has in 2-D.

  Each axis takes an equal, even share of the channels, the last axis first;
  what an even share leaves over is zero.

  Returns:
    Array `[*grid, width]`, float32.
  """
  count = width // (2 * len(grid))
  if count < 2:
    raise ValueError(
      f"sincos positions of rank {len(grid)} need a width of at least "
      f"{4 * len(grid)}, not {width}."
    )
  omega = temperature ** (-np.arange(count) / (count - 1))
  parts = []
  for axis in reversed(np.indices(grid)):
    angle = axis[..., None] * omega
    parts += [np.sin(angle), np.cos(angle)]
  table = np.concatenate(parts, axis=-1)
  pad = [(0, 0)] * len(grid) + [(0, width - table.shape[-1])]
  return np.pad(table, pad).astype(np.float32)


def resize_grid(
  tokens: Float[Array, "b n D"], source: Grid, target: Grid
) -> Float[Array, "b m D"]:
  """`T(x, g)`: resizes a grid of tokens, linearly in each axis, antialiased."""
  if source == target:
    return tokens
  batch, _, width = tokens.shape
  x = tokens.reshape(batch, *source, width)
  x = jax.image.resize(x, (batch, *target, width), "linear")
  return x.reshape(batch, math.prod(target), width)


def lookup_grid(image_size: Sequence[int], patch_size: Grid) -> Grid:
  """The grid of patches of an image or video, `[*space-time]` in pixels.

  Raises:
    ValueError: the ranks differ, or the patch does not divide the image.
  """
  if len(image_size) != len(patch_size):
    kind = "an image (rows, columns)"
    if len(patch_size) == 3:
      kind = "a video (time, rows, columns)"
    raise ValueError(
      f"The patch {patch_size} wants {kind} in a batch with 3 channels last, "
      f"got an input of size {tuple(image_size)}."
    )
  for size, patch in zip(image_size, patch_size, strict=True):
    if size % patch or not size:
      raise ValueError(
        f"The patch {patch_size} does not divide the input {tuple(image_size)}."
        " Choose an image size that is a multiple of the patch."
      )
  return tuple(s // p for s, p in zip(image_size, patch_size, strict=True))


def tokenise(
  images: Float[Array, "b *space c"], width: int, patch_size: Grid, dtype: Any
) -> tuple[Float[Array, "b n D"], Grid]:
  """Patch embedding, from inside a compact module; returns tokens and grid."""
  grid = lookup_grid(images.shape[1:-1], patch_size)
  embed = nn.Conv(
    width, patch_size, patch_size, "VALID", dtype=dtype, name="embedding"
  )
  x = embed(images)
  return x.reshape(x.shape[0], -1, width), grid


def positions(
  module: nn.Module, kind: str, grid: Grid, width: int
) -> Float[Array, "1 n D"]:
  """The position grid, flattened: learned (`pos_embedding`) or sin-cos."""
  if kind == "learned":
    init = nn.initializers.normal(stddev=1 / math.sqrt(width))
    table = module.param("pos_embedding", init, (*grid, width))
  elif kind == "sincos":
    table = jnp.asarray(sincos_positions(grid, width))
  else:
    raise ValueError(f"positions={kind!r}: want 'learned' or 'sincos'.")
  return table.reshape(1, -1, width)


def head(num_classes: int, bias: float, name: str) -> Callable[[Array], Array]:
  """Linear classifier in float32, zeros at the start (as in big_vision)."""
  return nn.Dense(
    num_classes,
    dtype=jnp.float32,
    kernel_init=nn.initializers.zeros,
    bias_init=nn.initializers.constant(bias),
    name=name,
  )


def check_width(width: int, num_heads: int) -> None:
  """Raises ValueError where the heads do not divide the width."""
  if width % num_heads:
    raise ValueError(f"{num_heads} heads do not divide the width {width}.")
