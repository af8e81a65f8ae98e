"""The layers that ViT and LookupViT share, and how blocks are repeated."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lookup_vit.models import attention

CAPTURES = ("tokens", "attention", "attention_logit_max")
_REMAT_POLICIES = (
  "nothing_saveable",
  "everything_saveable",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
  """What every layer of one forward pass has in common."""

  num_heads: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  qk_norm: bool = False
  attention: str = "auto"
  gelu: str = "tanh"
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  train: bool = False
  capture: tuple[str, ...] = ()

  @classmethod
  def of(
    cls, model: nn.Module, train: bool, capture: tuple[str, ...]
  ) -> "LayerConfig":
    """That of a model with fields of the same names."""
    names = {f.name for f in dataclasses.fields(cls)}
    names -= {"dtype", "train", "capture"}
    return cls(
      **{name: getattr(model, name) for name in names},
      dtype=compute_dtype(model.dtype),
      train=train,
      capture=tuple(capture),
    )

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
    attention.check(self.attention)
    if self.attention_dropout and self.attention in ("chunked", "fused"):
      raise ValueError(
        f"attention={self.attention!r} has no attention dropout, and "
        f"attention_dropout={self.attention_dropout}: want attention='auto' or "
        "'direct'."
      )


def compute_dtype(name: str) -> jnp.dtype:
  """The dtype of a model's computation.

  Raises:
    ValueError: it is neither float32 nor bfloat16 nor float16.
  """
  if name not in ("float32", "bfloat16", "float16"):
    raise ValueError(f"dtype={name!r}: want float32, bfloat16 or float16.")
  return jnp.dtype(name)


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


def constrain(x: Array, *names: str | None) -> Array:
  """Names the dimensions of an activation, for `parallel.py` to lay it out.

  Names: "batch", "heads", "mlp"; None is not split. Without a mesh and rules
  nothing is done.
  """
  return nn.with_logical_constraint(x, names)


def split_heads(
  x: Float[Array, "b n D"], num_heads: int
) -> Float[Array, "b n h d"]:
  """`[batch, tokens, width]` to `[batch, tokens, heads, width / heads]`."""
  x = x.reshape(*x.shape[:-1], num_heads, -1)
  return constrain(x, "batch", None, "heads", None)


def merge_heads(x: Float[Array, "b n h d"]) -> Float[Array, "b n D"]:
  """The inverse of `split_heads`."""
  return x.reshape(*x.shape[:-2], -1)


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
  for: `attention [batch, heads, m, n]`, `attention_logit_max []`. All weights
  are held at once where they are captured or dropped, and elsewhere as
  `cfg.attention` says.
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
    dropped = cfg.train and cfg.attention_dropout
    if dropped or "attention" in cfg.capture:
      logits = attention.logits(q, k)
      weights = jax.nn.softmax(logits)
      captured = captured_attention(cfg, logits, weights)
      x = attention.average(attention_dropout(cfg, self, weights), v)
    else:
      x, captured = attention.attend(q, k, v, cfg.attention), {}
      if "attention_logit_max" in cfg.capture:
        logit_max = attention.logit_max(q, k, cfg.attention)
        captured["attention_logit_max"] = logit_max
    return dense(cfg, width, "out")(merge_heads(x)), captured


class Mlp(nn.Module):
  """Two dense layers with a GELU between them.

  Raises ValueError where `ratio` leaves no hidden unit.
  """

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
    x = constrain(x, "batch", None, "mlp")
    x = nn.gelu(x, approximate=cfg.gelu == "tanh")
    x = dropout(cfg, x)
    return dense(cfg, width, "dense_out", bias_init)(x)


def survival(
  cfg: LayerConfig,
  module: nn.Module,
  batch: int,
  drop_rate: Float[Array, ""],
) -> Float[Array, " b"] | None:
  """By what stochastic depth (arXiv:1603.09382) multiplies updates, or None."""
  if not cfg.train or not cfg.stochastic_depth:
    return None
  keep = 1 - drop_rate
  mask = jax.random.bernoulli(module.make_rng("dropout"), keep, (batch, 1, 1))
  return jnp.where(mask, 1 / keep, 0)[:, 0, 0]


def residual(
  cfg: LayerConfig,
  module: nn.Module,
  x: Float[Array, "b n D"],
  update: Float[Array, "b n D"],
  drop_rate: Float[Array, ""],
) -> Float[Array, "b n D"]:
  """`x + update`, under dropout and stochastic depth."""
  update = constrain(dropout(cfg, update), "batch", None, None)
  kept = survival(cfg, module, x.shape[0], drop_rate)
  if kept is not None:
    update = update * kept[:, None, None].astype(update.dtype)
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
  """Parameters of a loop over blocks, in the layout of a scan.

  Those of submodules too.
  """
  params = _of_submodules(stack_blocks, params)
  names = [f"encoderblock_{i}" for i in range(len(params))]
  blocks = [params.pop(n) for n in names if n in params]
  if blocks:
    params["encoderblock"] = jax.tree.map(lambda *xs: np.stack(xs), *blocks)
  return params


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of a scan over blocks, in the layout of a loop.

  Those of submodules too.
  """
  params = _of_submodules(unstack_blocks, params)
  if "encoderblock" in params:
    stacked = params.pop("encoderblock")
    for i in range(len(jax.tree.leaves(stacked)[0])):
      params[f"encoderblock_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
  return params


def _of_submodules(function, params):
  return {
    name: function(x) if isinstance(x, Mapping) else x
    for name, x in params.items()
  }


def head(num_classes: int, bias: float, name: str) -> nn.Dense:
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
