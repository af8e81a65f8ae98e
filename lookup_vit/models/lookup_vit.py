"""LookupViT (ECCV 2024, arXiv:2407.12753) over a token grid of any rank.

All `N` lookup tokens `F_l` stay, the heavy layers run on `M` compressed tokens
`F_p`, and MHBC (`mhbc.py`) joins the two. `T` resizes a grid linearly, `P` is
the position grid, every `LN` has parameters of its own:

  tokenise:          F_l = patches,  F_p = T(F_l) + T(P),  F_l = F_l + P
  gathering:         F_p = F_p + MHBC(LN(F_p), LN(F_l))
  refinement:        F_p = F_p + MHSA(LN(F_p))
                     F_p = F_p + MLP(LN(F_p))              of ratio 4
  contextualisation: F_l = F_l + MHBC^T(LN(F_p))           attention reused
                     F_l = F_l + MLP(LN(F_l))              of ratio 1/2
  heads:             a linear classifier on the mean of LN(F_p), one on that of
                     LN(F_l); the logits are their mean

No parameter depends on the compressed grid.

Ablations, each a field: `reuse` and `reuse_scale` (`mhbc.py`); `heads`, one
classifier instead of two, whose logits are the model's; `compressed_init`, what
the compressed tokens are at first:

  "resize"   T(F_l) + T(P)
  "average"  the same with means over cells (`tokens.pool_grid`) for T
  "learned"  T(Q), where Q is a learned grid of tokens, whose shape is that of
             the model's own compressed grid, whatever the image
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lookup_vit.models import layers, tokens, variants
from lookup_vit.models.mhbc import MHBC

# The classifiers of each value of `heads`.
HEADS = {
  "both": ("compressed", "lookup"),
  "compressed": ("compressed",),
  "lookup": ("lookup",),
}


class LookupBlock(nn.Module):
  """One block of LookupViT: gathering, refinement, contextualisation.

  Called as `block((compressed, lookup), drop_rate)`; returns the pair and what
  is captured.
  """

  cfg: layers.LayerConfig
  mhbc_heads: int
  mlp_ratio: float = 4.0
  lookup_mlp_ratio: float = 0.5
  reuse: str = "weights"
  reuse_scale: str = "none"
  mhbc_impl: str = "auto"

  @nn.compact
  def __call__(
    self,
    pair: tuple[Float[Array, "b m D"], Float[Array, "b n D"]],
    drop_rate: Float[Array, ""],
  ) -> tuple[
    tuple[Float[Array, "b m D"], Float[Array, "b n D"]], dict[str, Array]
  ]:
    cfg = self.cfg
    compressed, lookup = pair
    mhbc_cfg = dataclasses.replace(cfg, num_heads=self.mhbc_heads)
    width = compressed.shape[-1]
    mhbc = MHBC(
      *(mhbc_cfg, width, self.reuse, self.reuse_scale, self.mhbc_impl),
      name="mhbc",
    )

    # Information gathering.
    fused = mhbc.fuses(compressed, lookup, round(width * self.lookup_mlp_ratio))
    gather = mhbc.fused_gather if fused else mhbc.gather
    update, reused, captured = gather(compressed, lookup)
    compressed = layers.residual(cfg, self, compressed, update, drop_rate)

    # Representation refinement.
    refine = layers.EncoderBlock(cfg, self.mlp_ratio, name="refinement")
    compressed, refined = refine(compressed, drop_rate)

    # Global contextualisation.
    if fused:
      keep = [
        layers.survival(cfg, self, len(lookup), drop_rate) for _ in range(2)
      ]
      keep = (
        jnp.ones((len(lookup), 2)) if keep[0] is None else jnp.stack(keep, 1)
      )
      params = self.variables["params"]
      parts = params["norm_lookup_mlp"], params["lookup_mlp"]
      lookup = mhbc.fused_contextualise(compressed, reused, keep, *parts)
    else:
      if reused is not None:
        update = mhbc.contextualise(compressed, reused)
        lookup = layers.residual(cfg, self, lookup, update, drop_rate)
      y = layers.layer_norm(cfg, "norm_lookup_mlp")(lookup)
      y = layers.Mlp(cfg, self.lookup_mlp_ratio, name="lookup_mlp")(y)
      lookup = layers.residual(cfg, self, lookup, y, drop_rate)

    if "attention_logit_max" in captured:
      captured["attention_logit_max"] = jnp.maximum(
        captured["attention_logit_max"], refined["attention_logit_max"]
      )
    if "tokens" in cfg.capture:
      captured["compressed_tokens"] = compressed
      captured["lookup_tokens"] = lookup
    return (compressed, lookup), captured


class LookupViT(nn.Module):
  """LookupViT; make it with `Model`.

  Called as `model.apply(variables, images, grid=None, train=False,
  capture=())` with images `[batch, height, width, 3]`, or videos `[batch,
  time, height, width, 3]` where the patch has three axes, values in [-1, 1].
  `grid` is the compressed grid, the model's own where none is given.

  Returns `(logits, out)`: float32 logits `[batch, classes]`, the mean of both
  heads' (where `num_classes` is None, the compressed pre-logits, or with
  heads="lookup" those of the lookup tokens), and a dict with
  `logits_compressed` and `logits_lookup [batch, classes]` (of a single head,
  its logits alone), `pre_logits_compressed` and `pre_logits_lookup [batch,
  width]`, and what `capture` asks for, with `m` compressed and `n` lookup
  tokens:
    "tokens": `compressed_tokens [batch, m, width]` and `lookup_tokens [batch,
      n, width]`, after the last norms, and `block_compressed_tokens` and
      `block_lookup_tokens`, after each block, stacked on axis 0;
    "attention": `attention [depth, batch, heads, m, n]`, that of MHBC;
    "attention_logit_max": `attention_logit_max [depth]`, over the MHBC and the
      self-attention of a block.

  Raises ValueError for an input that the patch does not fit, and for a grid of
  another rank than the patch or larger than the lookup grid; with
  compressed_init="learned", for such a grid of the model's own too.
  """

  num_classes: int | None
  width: int
  depth: int
  num_heads: int
  mlp_ratio: float
  patch_size: tokens.Grid
  grid: tokens.Grid = (5, 5)
  heads: str = "both"  # or "compressed", "lookup"
  compressed_init: str = "resize"  # or "average", "learned"
  reuse: str = "weights"  # or "logits", "none": see mhbc.py
  reuse_scale: str = "none"  # or "tokens"
  lookup_mlp_ratio: float = 0.5
  mhbc_heads: int | None = None  # as num_heads
  mhbc_impl: str = "auto"  # "direct", "absorbed", "fused": see mhbc.py
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
  def lookup_grid(self, image_size: Sequence[int]) -> tokens.Grid:
    """The grid that compressed grids are of the rank of, and no larger than.

    Args:
      image_size: (rows, columns) or (time, rows, columns) in pixels.

    Raises:
      ValueError: the patch does not fit.
    """
    return tokens.lookup_grid(image_size, self.patch_size)

  @nn.nowrap
  def tokenise(
    self, images: Float[Array, "b *space 3"], cfg: layers.LayerConfig
  ) -> tuple[Float[Array, "b n D"], tokens.Grid]:
    """The lookup tokens and their grid, from inside `__call__`."""
    return tokens.tokenise(images, self.width, self.patch_size, cfg, self.stem)

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b *space 3"],
    *,
    grid: tokens.Grid | None = None,
    train: bool = False,
    capture: tuple[str, ...] = (),
  ) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
    layers.check_width(self.width, self.num_heads)
    cfg = layers.LayerConfig.of(self, train, capture)
    lookup, lookup_grid = self.tokenise(images, cfg)
    grid = tokens.check_grid(self.grid if grid is None else grid, lookup_grid)
    pos = tokens.positions(self, self.positions, lookup_grid, self.width)
    pos = pos.astype(cfg.dtype)
    compressed = self._first_compressed(lookup, pos, lookup_grid, grid)
    compressed = layers.dropout(cfg, compressed)
    lookup = layers.dropout(cfg, lookup + pos)

    (compressed, lookup), captured = layers.apply_blocks(
      LookupBlock,
      dict(
        cfg=cfg,
        mhbc_heads=self.mhbc_heads or self.num_heads,
        mlp_ratio=self.mlp_ratio,
        lookup_mlp_ratio=self.lookup_mlp_ratio,
        reuse=self.reuse,
        reuse_scale=self.reuse_scale,
        mhbc_impl=self.mhbc_impl,
      ),
      (compressed, lookup),
      depth=self.depth,
      scan=self.scan,
      remat_policy=self.remat_policy,
    )

    out = {
      f"block_{k}" if k.endswith("tokens") else k: v
      for k, v in captured.items()
    }
    for name, x in (("compressed", compressed), ("lookup", lookup)):
      x = layers.layer_norm(cfg, f"norm_{name}")(x)
      if "tokens" in capture:
        out[f"{name}_tokens"] = x
      out[f"pre_logits_{name}"] = jnp.mean(x, axis=1, dtype=jnp.float32)
    return classify(self, out)

  @nn.nowrap
  def _first_compressed(self, lookup, pos, lookup_grid, grid):
    """The compressed tokens before the first block, from inside `__call__`."""
    if self.compressed_init == "learned":
      own = tokens.check_grid(self.grid, lookup_grid)
      init = nn.initializers.normal(stddev=1 / math.sqrt(self.width))
      queries = self.param("compressed_queries", init, (*own, self.width))
      queries = queries.reshape(1, -1, self.width).astype(lookup.dtype)
      queries = tokens.resize_grid(queries, own, grid)
      return jnp.tile(queries, (lookup.shape[0], 1, 1))
    fits = {"resize": tokens.resize_grid, "average": tokens.pool_grid}
    if self.compressed_init not in fits:
      raise ValueError(
        f"compressed_init={self.compressed_init!r}: want one of "
        f"{', '.join(fits)}, learned."
      )
    fit = fits[self.compressed_init]
    return fit(lookup, lookup_grid, grid) + fit(pos, lookup_grid, grid)


def classify(
  model: nn.Module, out: dict[str, Any]
) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
  """The classifiers on their pre-logits, from inside a compact module.

  Returns:
    The mean of the logits, and `out` with those of each; without classes, the
    pre-logits that the first of them would have had, and `out`.

  Raises:
    ValueError: `model.heads` is unknown, or nothing that it reads depends on
      the compressed tokens.
  """
  if model.heads not in HEADS:
    raise ValueError(f"heads={model.heads!r}: want one of {', '.join(HEADS)}.")
  if (model.heads, model.reuse) == ("lookup", "none"):
    raise ValueError(
      "heads='lookup' with reuse='none': the compressed tokens would be for "
      "nothing."
    )
  names = HEADS[model.heads]
  if model.num_classes is None:
    return out[f"pre_logits_{names[0]}"], out
  logits = {}
  for name in names:
    head = layers.head(model.num_classes, model.head_bias_init, f"head_{name}")
    logits[f"logits_{name}"] = head(out[f"pre_logits_{name}"])
  return sum(logits.values()) / len(logits), out | logits


def Model(  # noqa: N802
  num_classes: int | None, variant: str = "B/16", **fields: Any
) -> LookupViT:
  """A LookupViT, as `Model(1000, "B/16", grid=(5, 5))`.

  Args:
    num_classes: size of each classifier; None for none.
    variant: size and patch, see `variants.decode_variant`.
    **fields: fields of `LookupViT`, over those of the variant.

  Raises:
    ValueError: unknown variant or field.
  """
  return variants.build(LookupViT, num_classes, variant, fields)
