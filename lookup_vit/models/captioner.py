"""Captioning: a text decoder that reads the tokens of an image encoder.

The encoder is a LookupViT, whose compressed tokens are read, or a ViT, all of
whose tokens are. The decoder is that of `text_decoder.py`. The defaults are
those of the captioner in big_vision (configs/proj/cappa; arXiv:2306.07915): as
wide as the encoder, half as deep, 64 positions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lookup_vit.models import decoding, layers, tokens, variants
from lookup_vit.models.text_decoder import Cache, Decoder


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
