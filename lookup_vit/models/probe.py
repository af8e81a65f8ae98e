"""A linear classifier on a frozen backbone, trained by SGD.

As MAE has it (arXiv:2111.06377, appendix A.1): features are normalised without
learned scale and bias, as by BatchNorm, and then classified. The backbone is
frozen, so the statistics are those of some batches before the first step
(`calibrated`), where BatchNorm has running averages.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lookup_vit.models import pooling, tokens, variants

_EPSILON = 1e-6


class Standardise(nn.Module):
  """Subtracts a mean and divides by a standard deviation, both parameters."""

  @nn.compact
  def __call__(self, x: Float[Array, "b D"]) -> Float[Array, "b D"]:
    shape = x.shape[-1:]
    mean = self.param("mean", nn.initializers.zeros, shape)
    variance = self.param("variance", nn.initializers.ones, shape)
    return (x - mean) * jax.lax.rsqrt(variance + _EPSILON)


class Probe(nn.Module):
  """A frozen backbone and a linear classifier; make it with `Model`.

  Called as `model.apply(variables, images, train=False, capture=())`, and with
  `grid` where the backbone is a LookupViT, with images or videos as the
  backbone takes them.

  Returns `(logits, out)`: float32 logits `[batch, classes]`, and a dict with
  `features [batch, width]` and what of `capture` the backbone returns. No
  gradient reaches the backbone, which is in inference mode.

  Raises ValueError as the backbone does.
  """

  num_classes: int
  encoder: nn.Module
  features: str | None = None  # of LookupViT, see pooling.py
  block: int | None = None

  frozen = True
  frozen_params = ("encoder/.*", "norm/.*")

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b *space 3"],
    *,
    train: bool = False,
    capture: tuple[str, ...] = (),
    **fields: Any,
  ) -> tuple[Float[Array, "b classes"], dict[str, Any]]:
    del train
    needed = {*capture, *pooling.capture(self.block)}
    _, out = self.encoder(images, capture=tuple(sorted(needed)), **fields)
    x = jax.lax.stop_gradient(pooling.pool(out, self.features, self.block))
    # MAE's initialisation of the classifier.
    init = nn.initializers.truncated_normal(0.01)
    head = nn.Dense(self.num_classes, kernel_init=init, name="head")
    logits = head(Standardise(name="norm")(x))
    kept = {k: v for k, v in out.items() if k.startswith("attention")}
    return logits, {"features": x, **kept}


class LookupProbe(Probe):
  """A probe whose backbone is a LookupViT."""

  @property
  def grid(self) -> tokens.Grid:
    """The backbone's own compressed grid."""
    return self.encoder.grid

  @nn.nowrap
  def lookup_grid(self, image_size: Sequence[int]) -> tokens.Grid:
    """See `LookupViT.lookup_grid`."""
    return self.encoder.lookup_grid(image_size)


def moments(x: Float[Array, "b D"]) -> tuple[Array, Array]:
  """Means of features and of their squares, `[D]`, over a batch."""
  return jnp.mean(x, axis=0), jnp.mean(jnp.square(x), axis=0)


def calibrated(params: Any, each: Sequence[tuple[Array, Array]]) -> Any:
  """Parameters with the statistics of batches of equal size.

  Args:
    params: of a probe.
    each: the `moments` of the batches' features.
  """
  first, second = (sum(x) / len(each) for x in zip(*each, strict=True))
  variance = jnp.maximum(second - jnp.square(first), 0)
  return {**params, "norm": {"mean": first, "variance": variance}}


def Model(  # noqa: N802
  num_classes: int,
  encoder: Mapping[str, Any] | None = None,
  features: str | None = None,
  block: int | None = None,
) -> Probe:
  """A probe, as `Model(1000, dict(model_name="vit", variant="B/16"))`.

  Args:
    num_classes: of the data set that is probed.
    encoder: `model_name` ("lookup_vit" by default) and the fields of its
      `Model`.
    features: see `pooling.check`.
    block: see there.

  Raises:
    ValueError: unknown backbone or field, or features that it does not have.
  """
  if num_classes is None:
    raise ValueError("A probe wants num_classes.")
  backbone = variants.build_encoder(
    encoder or {}, ("lookup_vit", "vit", "factorised")
  )
  pooling.check(backbone, features, block)
  make = LookupProbe if hasattr(backbone, "grid") else Probe
  return make(num_classes, backbone, features, block)
