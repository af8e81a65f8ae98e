"""Captioning: a text decoder that reads the tokens of an image encoder.

The encoder is a LookupViT, whose compressed tokens are read, or a ViT, all of
whose tokens are. The decoder is a pre-norm transformer (arXiv:1706.03762;
pre-norm as in ViT), with learned positions; a block is causal self-attention,
attention over the image's tokens, and an MLP:

  x <- x + SelfAttention(LN(x))
  x <- x + CrossAttention(LN(x), image tokens)
  x <- x + MLP(LN(x))

and logits are a linear map of LN(x), or, where it is tied, the products with
the vocabulary's embeddings. The defaults are those of the captioner in
big_vision (configs/proj/cappa; arXiv:2306.07915): as wide as the encoder, half
as deep, 64 positions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lookup_vit.models import attention, decoding, layers, tokens, variants

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
  """Text decoder; fields as of `Captioner`.

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


class Captioner(nn.Module):
  """Image encoder and text decoder; make it with `Model`.

  Called as `model.apply(variables, images, inputs, train=False, capture=())`,
  and with `grid` where the encoder is a LookupViT, with images (or videos) as
  the encoder takes them and ids `inputs [batch, t]`, `t <= max_length`: the
  first is that which begins a caption, the next ones are those of the caption.

  Returns `(logits, out)`: float32 logits `[batch, t, num_classes]` of the ids
  that come next, and a dict with `memory [batch, m, encoder's width]`, the
  tokens that the decoder reads, and what `capture` asks for:
    "attention": `attention [depth, batch, heads, t, m]`, the decoder's over
      them;
    "attention_logit_max": `attention_logit_max [encoder's depth + depth]`.

  With `frozen` the encoder is in inference mode, no gradient reaches it, and
  its parameters are none of those that are trained (`frozen_params`).

  To decode, `start` and `step`: see decoding.py.

  Raises ValueError for images or a grid as the encoder does, and for more ids
  than `max_length`.
  """

  num_classes: int  # of the vocabulary
  encoder: nn.Module
  width: int
  depth: int
  num_heads: int
  mlp_ratio: float
  max_length: int = 64
  frozen: bool = True
  tied: bool = False
  attention: str = "auto"  # of the cross-attention, see attention.py
  qk_norm: bool = False  # none; for `LayerConfig`
  dropout: float = 0.0
  attention_dropout: float = 0.0
  stochastic_depth: float = 0.0
  gelu: str = "tanh"  # or "exact"
  norm_eps: float = 1e-6
  dtype: str = "float32"  # of the computation; parameters are float32

  @property
  def frozen_params(self) -> list[str]:
    """Regexes of the parameters' paths that are not trained."""
    return ["encoder/.*"] if self.frozen else []

  @nn.nowrap
  def _decoder(self, train=False, capture=()):
    cfg = layers.LayerConfig.of(self, train, capture)
    names = ("width", "depth", "num_heads", "mlp_ratio", "max_length", "tied")
    return Decoder(
      self.num_classes,
      **{name: getattr(self, name) for name in names},
      cfg=cfg,
      name="decoder",
    )

  @nn.nowrap
  def _memory(self, out):
    """The tokens that the decoder reads, of what the encoder returns."""
    return out["tokens"]

  @nn.nowrap
  def _check_length(self, length):
    if length > self.max_length:
      raise ValueError(
        f"{length} ids for a decoder of max_length={self.max_length}."
      )

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b *space 3"],
    inputs: Int[Array, "b t"],
    *,
    train: bool = False,
    capture: tuple[str, ...] = (),
    **fields: Any,
  ) -> tuple[Float[Array, "b t classes"], dict[str, Any]]:
    layers.check_width(self.width, self.num_heads)
    self._check_length(inputs.shape[1])
    of_encoder = {"tokens"} | {"attention_logit_max"} & set(capture)
    _, out = self.encoder(
      images,
      train=train and not self.frozen,
      capture=tuple(of_encoder),
      **fields,
    )
    memory, logit_max = self._memory(out), out.get("attention_logit_max")
    if self.frozen:
      memory = jax.lax.stop_gradient(memory)
    capture = tuple(name for name in capture if name != "tokens")
    decoder = self._decoder(train, capture)
    logits, _, out = decoder(inputs, memory)
    if logit_max is not None:
      logit_max = jnp.concatenate([logit_max, out["attention_logit_max"]])
      out["attention_logit_max"] = logit_max
    return logits, {"memory": memory, **out}

  @nn.nowrap
  def start(
    self,
    params: Any,
    images: Float[Array, "b *space 3"],
    *,
    beams: int = 1,
    length: int | None = None,
    **fields: Any,
  ) -> Cache:
    """What `step` remembers before the first token: keys and values.

    Args:
      params: of the captioner.
      images: as to be captioned.
      beams: captions of each image.
      length: of the longest caption; `max_length` where none is given.
      **fields: `grid`, of a LookupViT.

    Raises:
      ValueError: `length` is more than `max_length`.
    """
    length = length or self.max_length
    self._check_length(length)
    _, out = self.encoder.apply(
      {"params": params["encoder"]}, images, capture=("tokens",), **fields
    )
    memory = self._memory(out)
    begin = jnp.zeros((len(memory), 1), jnp.int32)
    decoder = {"params": params["decoder"]}
    _, cache, _ = self._decoder().apply(decoder, begin, memory)

    def empty(x):
      shape = (len(x), beams, length, *x.shape[2:])
      return jnp.zeros(shape, x.dtype)

    return {
      name: {"self": tuple(map(empty, past["self"])), "cross": past["cross"]}
      for name, past in cache.items()
    }

  @nn.nowrap
  def step(
    self,
    params: Any,
    newest: Int[Array, "b beams"],
    index: int | Int[Array, ""],
    cache: Cache,
  ) -> tuple[Float[Array, "b beams classes"], Cache]:
    """Logits of the ids that follow the newest, which are at `index`."""
    logits, cache, _ = self._decoder().apply(
      {"params": params["decoder"]}, newest, cache=cache, index=index
    )
    return logits, cache

  @nn.nowrap
  def reorder(self, cache: Cache, beams: Int[Array, "b beams"]) -> Cache:
    """The cache of these beams, by what they were before."""
    return {
      name: {
        "self": tuple(decoding.of_beams(x, beams) for x in past["self"]),
        "cross": past["cross"],
      }
      for name, past in cache.items()
    }


class LookupCaptioner(Captioner):
  """A captioner whose encoder is a LookupViT."""

  @property
  def grid(self) -> tokens.Grid:
    """The encoder's own compressed grid."""
    return self.encoder.grid

  @nn.nowrap
  def _memory(self, out):
    return out["compressed_tokens"]

  @nn.nowrap
  def lookup_grid(self, image_size: Sequence[int]) -> tokens.Grid:
    """See `LookupViT.lookup_grid`."""
    return self.encoder.lookup_grid(image_size)


# Fields that say how a model is trained or compiled, and at which grid, and not
# what tokens it computes; and the patch, which parameters have.
_OF_TRAINING = (
  *("num_classes", "heads", "head_bias_init", "grid", "scan", "remat_policy"),
  *("dtype", "attention", "dropout", "attention_dropout", "stochastic_depth"),
  *("patch_size", "parent", "name"),
)


def differences(encoder: nn.Module, trained: nn.Module) -> list[str]:
  """In what an encoder computes something else than one that was trained.

  Args:
    encoder: as it is to be used.
    trained: the model of the run that its parameters are of.

  Returns:
    Fields and both values. Of models of different kinds nothing: parameters of
    one do not fit the other.
  """
  if type(encoder) is not type(trained):
    return []
  skipped = set(_OF_TRAINING)
  if getattr(encoder, "compressed_init", None) == "learned":
    skipped.remove("grid")  # That of a parameter, which would be resized.
  pairs = {
    field.name: (getattr(encoder, field.name), getattr(trained, field.name))
    for field in dataclasses.fields(encoder)
    if field.name not in skipped
  }
  return [
    f"{name}={new!r}, but was trained with {name}={old!r}"
    for name, (new, old) in pairs.items()
    if new != old
  ]


def Model(  # noqa: N802
  num_classes: int,
  variant: str | None = None,
  encoder: Mapping[str, Any] | None = None,
  **fields: Any,
) -> Captioner:
  """A captioner, as `Model(32_000, "B", dict(variant="B/16", grid=(5, 5)))`.

  Args:
    num_classes: size of the vocabulary.
    variant: size of the decoder, "B"; by default the encoder's, at half of its
      depth.
    encoder: `model_name`, "lookup_vit" (by default) or "vit", and the fields of
      its `Model`.
    **fields: fields of `Captioner`, over those of the variant.

  Raises:
    ValueError: unknown variant, encoder or field, a field that a captioner
      cannot have, or no size of a vocabulary.
  """
  if num_classes is None:
    raise ValueError("A captioner wants num_classes, the vocabulary's size.")
  if fields.get("qk_norm"):
    raise ValueError("qk_norm: a captioner's decoder has none.")
  encoder = variants.build_encoder(encoder or {}, ("lookup_vit", "vit"))
  if variant is None:
    like = ("width", "num_heads", "mlp_ratio")
    own = {name: getattr(encoder, name) for name in like}
    own["depth"] = max(1, encoder.depth // 2)
  else:
    own = variants.decode_size(variant)
  make = LookupCaptioner if hasattr(encoder, "grid") else Captioner
  return variants.build_of(
    make, {**own, **fields}, num_classes=num_classes, encoder=encoder
  )
