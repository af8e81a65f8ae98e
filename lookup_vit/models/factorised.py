"""Factorised encoder (ViViT, arXiv:2103.15691, section 3.3, Model 2).

The tokens of each slice, a tubelet's index in time, pass through a spatial
encoder by themselves. It makes one vector of a slice; a temporal encoder, a
transformer over the `T` vectors of a clip, comes before the classifier:

  spatial:   ViT on every slice, positions those of an image
  temporal:  x + P, blocks, norm, mean over time
  head:      a linear classifier

With LookupViT as the spatial encoder, every slice has its own compressed
tokens, on a grid (rows, columns). The means of both kinds of tokens go their
own ways, each with a temporal encoder and a classifier of its own, as both have
classifiers of their own in LookupViT; the logits are the mean. With a single
classifier (`heads`), both temporal encoders stay.

As in scenic (projects/vivit/model.py, SpaceTimeViT) both encoders end in a
norm, and the rates of stochastic depth grow from zero in each. Unlike there,
tokens are averaged where its configs have class tokens (here `pool="tok"`, of
the spatial encoder only), and the masks of dropout and stochastic depth are
drawn for each slice.

The spatial encoder's parameters, under `spatial`, have the names and shapes of
`vit.py` and `lookup_vit.py`, but that the patch has an axis of time.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lookup_vit.models import layers, lookup_vit, tokens, variants, vit


class _OfSlices:
  """Makes of a model one that takes the slices of videos for examples."""

  @nn.nowrap
  def tokenise(
    self, videos: Float[Array, "b t h w 3"], cfg: layers.LayerConfig
  ) -> tuple[Float[Array, "b*T n D"], tokens.Grid]:
    """The tokens of every slice, and the grid of one."""
    x, (_, *grid) = tokens.tokenise(
      videos, self.width, self.patch_size, cfg, self.stem
    )
    return x.reshape(-1, math.prod(grid), self.width), tuple(grid)


class SpatialViT(_OfSlices, vit.ViT):
  """ViT on every slice of videos."""


class SpatialLookupViT(_OfSlices, lookup_vit.LookupViT):
  """LookupViT on every slice of videos."""


class TemporalViT(vit.ViT):
  """ViT over a sequence of vectors `[batch, time, width]`."""

  @nn.nowrap
  def tokenise(
    self, x: Float[Array, "b T D"], cfg: layers.LayerConfig
  ) -> tuple[Float[Array, "b T D"], tokens.Grid]:
    """The vectors themselves."""
    return x.astype(cfg.dtype), x.shape[1:2]


class FactorisedViT(vit.ViT):
  """Factorised encoder with ViT for each slice; make it with `Model`.

  Called as `model.apply(variables, videos, train=False, capture=())` with
  videos `[batch, time, height, width, 3]`, values in [-1, 1].

  Returns `(logits, out)` as ViT does: `pre_logits [batch, width]` is the mean
  of the temporal encoder's tokens. What `capture` asks for, with `T` slices:
    of the spatial encoder, as ViT's, with `[batch, T, ...]` for its `[batch,
      ...]`;
    of the temporal encoder, `temporal_tokens [batch, T, width]`,
      `temporal_block_tokens [temporal_depth, batch, T, width]` and
      `temporal_attention [temporal_depth, batch, heads, T, T]`;
    "attention_logit_max": `attention_logit_max [depth + temporal_depth]`.

  Raises ValueError for an input that the patch does not fit.
  """

  temporal_depth: int = 4

  @nn.compact
  def __call__(
    self,
    videos: Float[Array, "b t h w 3"],
    *,
    train: bool = False,
    capture: tuple[str, ...] = (),
  ) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
    spatial = SpatialViT(**_fields(self, vit.ViT), name="spatial")
    _, captured = spatial(videos, train=train, capture=capture)
    out = _by_video(captured, videos.shape[0])
    x, captured = _over_time(self, out.pop("pre_logits"), "", train, capture)
    out = _join(out, captured) | {"pre_logits": x}
    if self.num_classes is not None:
      x = layers.head(self.num_classes, self.head_bias_init, "head")(x)
    return x, out


class FactorisedLookupViT(lookup_vit.LookupViT):
  """Factorised encoder with LookupViT for each slice; make it with `Model`.

  Called as `model.apply(variables, videos, grid=None, train=False,
  capture=())` with videos `[batch, time, height, width, 3]`, values in [-1,
  1]. `grid` is that of each slice's compressed tokens, (rows, columns).

  Returns `(logits, out)` as LookupViT does: `pre_logits_compressed` and
  `pre_logits_lookup [batch, width]` are the means of the temporal encoders'
  tokens. What `capture` asks for is as `FactorisedViT`'s; the names of what is
  of a temporal encoder end in `_compressed` and `_lookup`, and
  `attention_logit_max` is `[depth + 2 * temporal_depth]`.

  Raises ValueError for an input that the patch does not fit, and for a grid
  that is not (rows, columns) or larger than a slice's grid of lookup tokens.
  """

  temporal_depth: int = 4

  @nn.nowrap
  def lookup_grid(self, image_size: Sequence[int]) -> tokens.Grid:
    """That of a slice, (rows, columns); see `LookupViT.lookup_grid`."""
    return super().lookup_grid(image_size)[1:]

  @nn.compact
  def __call__(
    self,
    videos: Float[Array, "b t h w 3"],
    *,
    grid: tokens.Grid | None = None,
    train: bool = False,
    capture: tuple[str, ...] = (),
  ) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
    fields = _fields(self, lookup_vit.LookupViT)
    spatial = SpatialLookupViT(**fields, name="spatial")
    _, captured = spatial(videos, grid=grid, train=train, capture=capture)
    out = _by_video(captured, videos.shape[0])
    for name in ("compressed", "lookup"):
      x = out.pop(f"pre_logits_{name}")
      x, captured = _over_time(self, x, f"_{name}", train, capture)
      out = _join(out, captured) | {f"pre_logits_{name}": x}
    return lookup_vit.classify(self, out)


def _fields(model, cls):
  """Those of a model that an encoder of class `cls` has; no classifier."""
  names = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
  fields = {n: getattr(model, n) for n in names if hasattr(model, n)}
  return fields | dict(num_classes=None)


def _by_video(captured, batch):
  """`[batch * T, ...]` of a spatial encoder's output to `[batch, T, ...]`."""

  def one(name, x):
    if name == "attention_logit_max":
      return x
    axis = int(name == "attention" or name.startswith("block_"))
    return x.reshape(*x.shape[:axis], batch, -1, *x.shape[axis + 1 :])

  return {name: one(name, x) for name, x in captured.items()}


def _over_time(model, x, suffix, train, capture):
  """A temporal encoder, from inside the `__call__` of a factorised model.

  Args:
    model: the factorised model.
    x: vectors of slices, `[batch, T, width]`.
    suffix: of its parameters' and outputs' names, "_lookup".
    train: as the model's.
    capture: as the model's.

  Returns:
    `[batch, width]`, float32, and what was captured.
  """
  fields = _fields(model, vit.ViT) | dict(
    depth=model.temporal_depth, patch_size=(), pool="gap"
  )
  temporal = TemporalViT(**fields, name=f"temporal{suffix}")
  x, captured = temporal(x, train=train, capture=capture)
  del captured["pre_logits"]
  logit_max = captured.pop("attention_logit_max", None)
  captured = {f"temporal_{k}{suffix}": v for k, v in captured.items()}
  if logit_max is not None:
    captured["attention_logit_max"] = logit_max
  return x, captured


def _join(out, captured):
  """Both, the blocks' maxima of logits one after another."""
  joined = out | captured
  name = "attention_logit_max"
  if name in joined:
    joined[name] = jnp.concatenate([out[name], captured[name]])
  return joined


_MODELS = {"vit": FactorisedViT, "lookup_vit": FactorisedLookupViT}


def Model(  # noqa: N802
  num_classes: int | None,
  variant: str = "B/2x16",
  spatial: str = "vit",
  **fields: Any,
) -> FactorisedViT | FactorisedLookupViT:
  """A factorised encoder, as `Model(400, "B/2x16", "lookup_vit", grid=(5, 5))`.

  Args:
    num_classes: size of each classifier; None for none.
    variant: size and tubelet, see `variants.decode_variant`.
    spatial: the encoder of each slice, "vit" or "lookup_vit".
    **fields: fields of `FactorisedViT` or `FactorisedLookupViT`, over those of
      the variant.

  Raises:
    ValueError: unknown variant, encoder or field, or a patch without time.
  """
  if spatial not in _MODELS:
    raise ValueError(
      f"spatial={spatial!r}: want {' or '.join(map(repr, _MODELS))}."
    )
  model = variants.build(_MODELS[spatial], num_classes, variant, fields)
  if len(model.patch_size) != 3:
    raise ValueError(
      f"A factorised encoder wants a tubelet (time, rows, columns), as of "
      f"'B/2x16', not the patch {model.patch_size}."
    )
  return model
