"""A transformer decoder of text that attends to an image's tokens.

It is pre-norm (arXiv:1706.03762; pre-norm as in ViT), with learned positions; a
block is causal self-attention, attention over the image's tokens, and an MLP:

  x <- x + SelfAttention(LN(x))
  x <- x + CrossAttention(LN(x), image tokens)
  x <- x + MLP(LN(x))

and logits are a linear map of LN(x), or, where it is tied, the products with
the vocabulary's embeddings.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lookup_vit.models import attention, layers, tokens

# Keys and values, and those of all blocks: see `SelfAttention`.
Past = tuple[Array, Array]
Cache = dict[str, dict[str, Past]]


class SelfAttention(nn.Module):
  """Causal self-attention, or that of one new token over those before it.

  Called as `module(x)` with `x [batch, t, width]`; or with `x [batch, beams,
  width]`, the newest token of each beam, and keys and values of the beams'
  tokens, `past = (key, value)`, each `[batch, beams, length, heads, d]`, into
  which those of `x` are written at `index`.

  Returns the result, keys and values, the latter `[batch, t, heads, d]` without
  a past; and what `cfg.capture` asks for.
  """

  cfg: layers.LayerConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t D"],
    past: Past | None = None,
    index: int | Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "b t D"], Past, dict[str, Array]]:
    cfg = self.cfg
    width = x.shape[-1]
    q, k, v = (
      layers.split_heads(layers.dense(cfg, width, name)(x), cfg.num_heads)
      for name in ("query", "key", "value")
    )
    if past is None:
      logits = attention.logits(q, k)
      seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
      average = attention.average
    else:
      k, v = (
        jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None], index, 2)
        for old, new in zip(past, (k, v), strict=True)
      )
      # A beam is an example with one query, for which it alone has keys.
      logits = jax.vmap(attention.logits)(q[:, :, None], k)[..., 0, :]
      logits = logits.swapaxes(1, 2)  # `[batch, heads, beams, length]`
      seen = jnp.arange(k.shape[2]) <= index
      average = _average_of_beams
    logits = jnp.where(seen, logits, -jnp.inf)
    weights = jax.nn.softmax(logits)
    captured = layers.captured_attention(cfg, logits, weights)
    y = average(layers.attention_dropout(cfg, self, weights), v)
    y = layers.dense(cfg, width, "out")(layers.merge_heads(y))
    return y, (k, v), captured


def _average_of_beams(
  weights: Float[Array, "b h k n"], value: Float[Array, "b k n h d"]
) -> Float[Array, "b k h d"]:
  return jnp.einsum("bhkn,bknhd->bkhd", weights.astype(value.dtype), value)


class CrossAttention(nn.Module):
  """Attention over an image's tokens, `memory [batch, m, encoder width]`.

  Called as `module(x, memory)`, or as `module(x, past=(key, value))` with what
  it returned for the same memory, each `[batch, m, heads, d]`.

  Returns the result, keys and values, and what `cfg.capture` asks for.
  """

  cfg: layers.LayerConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t D"],
    memory: Float[Array, "b m E"] | None = None,
    past: Past | None = None,
  ) -> tuple[Float[Array, "b t D"], Past, dict[str, Array]]:
    cfg = self.cfg
    width = x.shape[-1]

    def project(name, y):
      return layers.split_heads(
        layers.dense(cfg, width, name)(y), cfg.num_heads
      )

    q = project("query", x)
    if past is None:
      past = project("key", memory), project("value", memory)
    k, v = past
    dropped = cfg.train and cfg.attention_dropout
    if dropped or cfg.capture:
      logits = attention.logits(q, k)
      weights = jax.nn.softmax(logits)
      captured = layers.captured_attention(cfg, logits, weights)
      y = attention.average(layers.attention_dropout(cfg, self, weights), v)
    else:
      y, captured = attention.attend(q, k, v, cfg.attention), {}
    y = layers.dense(cfg, width, "out")(layers.merge_heads(y))
    return y, past, captured


class DecoderBlock(nn.Module):
  """A block of the decoder; `past` is what it returned as its second result."""

  cfg: layers.LayerConfig
  mlp_ratio: float

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t D"],
    drop_rate: Float[Array, ""],
    memory: Float[Array, "b m E"] | None = None,
    past: dict[str, Past] | None = None,
    index: int | Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "b t D"], dict[str, Past], dict[str, Array]]:
    cfg = self.cfg
    past = past or {}
    y = layers.layer_norm(cfg, "norm_self_attention")(x)
    y, own, captured = SelfAttention(cfg, name="self_attention")(
      y, past.get("self"), index
    )
    x = layers.residual(cfg, self, x, y, drop_rate)
    y = layers.layer_norm(cfg, "norm_cross_attention")(x)
    y, cross, read = CrossAttention(cfg, name="cross_attention")(
      y, memory, past.get("cross")
    )
    x = layers.residual(cfg, self, x, y, drop_rate)
    y = layers.layer_norm(cfg, "norm_mlp")(x)
    y = layers.Mlp(cfg, self.mlp_ratio, name="mlp")(y)
    x = layers.residual(cfg, self, x, y, drop_rate)
    if "attention_logit_max" in cfg.capture:
      logit_max = "attention_logit_max"
      read[logit_max] = jnp.maximum(captured[logit_max], read[logit_max])
    return x, {"self": own, "cross": cross}, read


class Decoder(nn.Module):
  """Text decoder; fields as of `captioner.Captioner`.

  Called as `module(inputs, memory)` with ids `[batch, t]`, or with the newest
  ids `[batch, beams]` and their place, `index`, as `module(newest, cache=cache,
  index=index)`. Returns logits, the cache and what is captured.
  """

  num_classes: int
  width: int
  depth: int
  num_heads: int
  mlp_ratio: float
  max_length: int
  tied: bool
  cfg: layers.LayerConfig

  @nn.compact
  def __call__(
    self,
    inputs: Int[Array, "b t"],
    memory: Float[Array, "b m E"] | None = None,
    cache: Cache | None = None,
    index: int | Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "b t classes"], Cache, dict[str, Array]]:
    cfg = self.cfg
    embed = nn.Embed(
      self.num_classes, self.width, dtype=cfg.dtype, name="embedding"
    )
    pos = tokens.positions(self, "learned", (self.max_length,), self.width)[0]
    if cache is None:
      pos = pos[: inputs.shape[1]]
    else:
      pos = jax.lax.dynamic_index_in_dim(pos, index, keepdims=True)
    x = embed(inputs) + pos.astype(cfg.dtype)
    x = layers.dropout(cfg, x)
    rates = jnp.linspace(0, cfg.stochastic_depth, self.depth)
    new, captured = {}, []
    for i in range(self.depth):
      name = f"decoderblock_{i}"
      past = None if cache is None else cache[name]
      block = DecoderBlock(cfg, self.mlp_ratio, name=name)
      x, new[name], one = block(x, rates[i], memory, past, index)
      captured.append(one)
    x = layers.layer_norm(cfg, "norm")(x)
    if self.tied:
      logits = embed.attend(x).astype(jnp.float32)
    else:
      logits = layers.head(self.num_classes, 0.0, "head")(x.astype(jnp.float32))
    captured = jax.tree.map(lambda *xs: jnp.stack(xs), *captured)
    return logits, new, captured
