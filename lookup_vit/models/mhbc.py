"""Multi-head bidirectional cross-attention (MHBC) of LookupViT.

The compressed tokens gather from the lookup tokens, and later, refined, they
write back through the same attention, transposed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lookup_vit.models import attention, layers

REUSE = ("weights", "logits", "none")
REUSE_SCALES = ("none", "tokens")


class MHBC(nn.Module):
  """Both directions of the cross-attention, with one set of parameters.

  `gather` is called first; the attention it returns is what `contextualise`
  reuses. With `M` compressed and `N` lookup tokens:

    A = softmax_N(Q K^T / sqrt(d))
    gather:         (A V) W_o
    contextualise:  (B V') W_o',  B = A^T            for reuse="weights"
                                  B = softmax_M of the same logits, transposed,
                                                     for reuse="logits"
                                  no update          for reuse="none"

  With reuse_scale="tokens", B = A^T N / M. Rows of A add up to one, so rows of
  A^T to M / N on average, which is another number at every grid; the factor
  makes it one, which it is of reuse="logits" as it stands.
  """

  cfg: layers.LayerConfig
  width: int
  reuse: str = "weights"
  reuse_scale: str = "none"

  def setup(self):
    cfg, width = self.cfg, self.width
    if self.reuse not in REUSE:
      raise ValueError(f"reuse={self.reuse!r}: want one of {', '.join(REUSE)}.")
    if self.reuse_scale not in REUSE_SCALES:
      raise ValueError(
        f"reuse_scale={self.reuse_scale!r}: want one of "
        f"{', '.join(REUSE_SCALES)}."
      )
    if self.reuse_scale != "none" and self.reuse != "weights":
      raise ValueError(
        f"reuse_scale={self.reuse_scale!r} is of reuse='weights', not of "
        f"reuse={self.reuse!r}."
      )
    layers.check_width(width, cfg.num_heads)
    self.norm_compressed = layers.layer_norm(cfg)
    self.norm_lookup = layers.layer_norm(cfg)
    self.query = layers.dense(cfg, width)
    self.key = layers.dense(cfg, width)
    self.value = layers.dense(cfg, width)
    self.out = layers.dense(cfg, width)
    if cfg.qk_norm:
      self.query_norm = layers.head_norm(cfg)
      self.key_norm = layers.head_norm(cfg)
    if self.reuse != "none":
      self.norm_refined = layers.layer_norm(cfg)
      self.value_back = layers.dense(cfg, width)
      self.out_back = layers.dense(cfg, width)

  def gather(
    self, compressed: Float[Array, "b m D"], lookup: Float[Array, "b n D"]
  ) -> tuple[
    Float[Array, "b m D"], Float[Array, "b h m n"] | None, dict[str, Array]
  ]:
    """Lookup to compressed tokens.

    Returns:
      The update of the compressed tokens, the attention for `contextualise`
      (None where nothing is written back), and what `cfg.capture` asks for.
    """
    cfg = self.cfg
    y = self.norm_lookup(lookup)
    q = layers.split_heads(
      self.query(self.norm_compressed(compressed)), cfg.num_heads
    )
    k = layers.split_heads(self.key(y), cfg.num_heads)
    v = layers.split_heads(self.value(y), cfg.num_heads)
    if cfg.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    logits = attention.logits(q, k)
    weights = jax.nn.softmax(logits)
    captured = layers.captured_attention(cfg, logits, weights)
    weights = layers.attention_dropout(cfg, self, weights).astype(v.dtype)
    x = layers.merge_heads(jnp.einsum("bhmn,bnhd->bmhd", weights, v))
    if self.reuse == "weights":
      reused = weights
    elif self.reuse == "logits":
      reused = jax.nn.softmax(logits, axis=-2)
      reused = layers.attention_dropout(cfg, self, reused).astype(v.dtype)
    else:
      reused = None
    return self.out(x), reused, captured

  def contextualise(
    self, compressed: Float[Array, "b m D"], reused: Float[Array, "b h m n"]
  ) -> Float[Array, "b n D"]:
    """Compressed to lookup tokens; returns the update of the lookup tokens."""
    v = self.value_back(self.norm_refined(compressed))
    if self.reuse_scale == "tokens":
      m, n = reused.shape[-2:]
      v = v * (n / m)
    v = layers.split_heads(v, self.cfg.num_heads)
    x = layers.merge_heads(jnp.einsum("bhmn,bmhd->bnhd", reused, v))
    return self.out_back(x)
