"""ViT (arXiv:2010.11929) over a token grid of any rank.

Over a 3-D grid it is ViViT's joint space-time model (arXiv:2103.15691, Model
1).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lookup_vit.models import layers, tokens, variants


class MapHead(nn.Module):
  """Multi-head attention pooling (Scaling ViT, arXiv:2106.04560)."""

  cfg: layers.LayerConfig
  mlp_ratio: float = 4.0

  @nn.compact
  def __call__(self, x: Float[Array, "b n D"]) -> Float[Array, "b D"]:
    cfg = self.cfg
    batch, _, width = x.shape
    init = nn.initializers.xavier_uniform()
    probe = self.param("probe", init, (1, 1, width)).astype(x.dtype)
    probe = jnp.tile(probe, (batch, 1, 1))
    x, _ = layers.Attention(cfg, name="attention")(probe, x)
    y = layers.layer_norm(cfg, "norm_mlp")(x)
    x = x + layers.Mlp(cfg, self.mlp_ratio, name="mlp")(y)
    return jax.lax.index_in_dim(x, 0, axis=1, keepdims=False)


class ViT(nn.Module):
  """Vision transformer; make it with `Model`.

  Called as `model.apply(variables, images, train=False, capture=())` with
  images `[batch, height, width, 3]`, or videos `[batch, time, height, width,
  3]` where the patch has three axes, values in [-1, 1].

  Returns `(logits, out)`: float32 logits `[batch, classes]` (the pre-logits
  where `num_classes` is None) and a dict with `pre_logits [batch, width]` and
  what `capture` asks for:
    "tokens": `tokens [batch, n, width]`, after the last norm, and
      `block_tokens [depth, batch, n, width]`, after each block;
    "attention": `attention [depth, batch, heads, n, n]`;
    "attention_logit_max": `attention_logit_max [depth]`.
  `n` counts the class token, which comes first, where `pool="tok"`.

  Raises ValueError for an input that the patch does not fit.
  """

  num_classes: int | None
  width: int
  depth: int
  num_heads: int
  mlp_ratio: float
  patch_size: tokens.Grid
  pool: str = "gap"  # "gap": mean, "map": attention, "tok": class token
  stem: str = "patch"  # "conv" or "deep_conv": see tokens.py
  positions: str = "learned"  # or "sincos"
  qk_norm: bool = False
  attention: str = "auto"  # "direct", "chunked", "fused": see attention.py
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  gelu: str = "tanh"  # or "exact"
  norm_eps: float = 1e-6
  head_bias_init: float = 0.0
  dtype: str = "float32"  # of the computation; parameters are float32
  scan: bool = False
  remat_policy: str = "none"

  @nn.nowrap
  def tokenise(
    self, images: Float[Array, "b *space 3"], cfg: layers.LayerConfig
  ) -> tuple[Float[Array, "b n D"], tokens.Grid]:
    """The tokens of the patches and their grid, from inside `__call__`."""
    return tokens.tokenise(images, self.width, self.patch_size, cfg, self.stem)

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b *space 3"],
    *,
    train: bool = False,
    capture: tuple[str, ...] = (),
  ) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
    if self.pool not in ("gap", "map", "tok"):
      raise ValueError(f"pool={self.pool!r}: want 'gap', 'map' or 'tok'.")
    layers.check_width(self.width, self.num_heads)
    cfg = layers.LayerConfig.of(self, train, capture)
    x, grid = self.tokenise(images, cfg)
    pos = tokens.positions(self, self.positions, grid, self.width)
    x = x + pos.astype(cfg.dtype)
    if self.pool == "tok":
      zeros = nn.initializers.zeros
      cls = self.param("cls", zeros, (1, 1, self.width)).astype(cfg.dtype)
      x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
    x = layers.dropout(cfg, x)
    x, captured = layers.apply_blocks(
      layers.EncoderBlock,
      dict(cfg=cfg, mlp_ratio=self.mlp_ratio),
      x,
      depth=self.depth,
      scan=self.scan,
      remat_policy=self.remat_policy,
    )
    x = layers.layer_norm(cfg, "encoder_norm")(x)
    out = {k: v for k, v in captured.items() if k != "tokens"}
    if "tokens" in capture:
      out["tokens"] = x
      out["block_tokens"] = captured["tokens"]

    if self.pool == "gap":
      x = jnp.mean(x, axis=1, dtype=jnp.float32)
    elif self.pool == "map":
      x = MapHead(cfg, self.mlp_ratio, name="map_head")(x)
    else:
      x = jax.lax.index_in_dim(x, 0, axis=1, keepdims=False)
    x = out["pre_logits"] = x.astype(jnp.float32)
    if self.num_classes is not None:
      x = layers.head(self.num_classes, self.head_bias_init, "head")(x)
    return x, out


def Model(num_classes: int | None, variant: str = "B/16", **fields: Any) -> ViT:  # noqa: N802
  """A ViT, as `Model(1000, "B/16", pool="tok")`.

  Args:
    num_classes: size of the classifier; None for none.
    variant: size and patch, see `variants.decode_variant`.
    **fields: fields of `ViT`, over those of the variant.

  Raises:
    ValueError: unknown variant or field.
  """
  return variants.build(ViT, num_classes, variant, fields)
