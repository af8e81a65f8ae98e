"""Image and video classification."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float

from lookup_vit.tasks import mixing


class Task:
  """Classification with one head (ViT) or two (LookupViT, by default).

  A batch has `image` and either integer classes `label [batch]` or targets
  `labels [batch, classes]`; in evaluation also `_mask [batch]`.

  Args:
    config: `num_classes`, `input.image_size`, `loss`, `label_smoothing`,
      `mixup`, `cutmix`.

  Raises:
    ValueError: a field is missing or out of range.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    if not isinstance(config.num_classes, int) or config.num_classes < 1:
      raise ValueError(
        f"config.num_classes={config.num_classes!r}: want an integer >= 1."
      )
    if config.loss not in ("softmax_xent", "sigmoid_xent"):
      raise ValueError(
        f"config.loss={config.loss!r}: want softmax_xent or sigmoid_xent."
      )
    mixed = config.mixup.p or config.cutmix.p
    if mixed and config.input.batch_size % 2:
      raise ValueError(
        f"config.input.batch_size={config.input.batch_size} is odd: mixup and "
        "cutmix mix neighbours in a batch."
      )
    self.config = config
    self.group = 2 if mixed else 1

  def batch_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch of so many examples, by shapes."""
    shape = (size, *self.config.input.image_size, 3)
    return {
      "image": jax.ShapeDtypeStruct(shape, jnp.float32),
      "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }

  def check_input(self, spec: Mapping[str, Any], field: str) -> None:
    """Raises ValueError unless a batch, made by a config field, has targets."""
    names = sorted(spec)
    if "image" not in spec or not {"label", "labels"} & set(names):
      raise ValueError(
        f"{field}: a batch has {names}; want 'image' and 'label' or 'labels'."
      )
    if "labels" in spec and spec["labels"].shape[1] != self.config.num_classes:
      raise ValueError(
        f"{field} makes targets of {spec['labels'].shape[1]} classes, "
        f"config.num_classes is {self.config.num_classes}."
      )

  def inputs(self, batch: Mapping[str, Any]) -> tuple[jax.Array]:
    """What of a batch the model is called with."""
    return (batch["image"],)

  def augment(
    self, batch: dict[str, Any], first: Any, rng: jax.Array
  ) -> dict[str, Any]:
    """Targets smoothed, images and targets mixed; any number of devices."""
    config = self.config
    targets = self.targets(batch)
    s = config.label_smoothing
    targets = targets * (1 - s) + s / config.num_classes
    images, targets = mixing.mix(
      rng, batch["image"], targets, config.mixup.p, config.cutmix.p, first
    )
    return {"image": images, "labels": targets}

  def targets(self, batch: dict[str, Any]) -> Float[Array, "b classes"]:
    """Targets `[batch, classes]` of a batch, float32."""
    if "labels" in batch:
      return batch["labels"].astype(jnp.float32)
    return jax.nn.one_hot(batch["label"], self.config.num_classes)

  def loss(
    self,
    logits: Float[Array, "b classes"],
    out: dict[str, Any],
    batch: dict[str, Any],
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean of the heads' cross-entropies, equally weighted."""
    targets = self.targets(batch)
    heads = _heads(out)
    if not heads:
      return jnp.mean(self._xent(logits, targets)), {}
    losses = {
      f"loss_{name}": jnp.mean(self._xent(x, targets))
      for name, x in heads.items()
    }
    return sum(losses.values()) / len(losses), losses

  def probabilities(
    self, logits: Float[Array, "b classes"]
  ) -> Float[Array, "b classes"]:
    """Of the classes: by a softmax, or of each by itself by a sigmoid."""
    if self.config.loss == "softmax_xent":
      return jax.nn.softmax(logits)
    return jax.nn.sigmoid(logits)

  def metrics(
    self,
    logits: Float[Array, "b classes"],
    out: dict[str, Any],
    batch: dict[str, Any],
    classes: tuple[int, ...] | None = None,
  ) -> tuple[dict[str, Float[Array, " b"]], Float[Array, " b"]]:
    """Loss, top-1 and top-5 of each example, of every head, and its weight.

    Of multi-hot `labels`, any class counts as right (as ImageNet-ReaL does),
    and an example without one has weight zero. Where `classes` are given, they
    are all the classes there are: logits of others are left out.
    """
    targets = self.targets(batch)
    predictions = {"": logits}
    predictions.update({f"_{n}": x for n, x in _heads(out).items()})
    if classes is not None:
      columns = np.array(classes)
      targets = targets[:, columns]
      predictions = {k: x[:, columns] for k, x in predictions.items()}
    counts = batch["_mask"]
    if "labels" in batch or classes is not None:
      counts = counts * (jnp.max(targets, axis=-1) > 0)
    metrics = {}
    for suffix, x in predictions.items():
      metrics[f"loss{suffix}"] = self._xent(x, targets)
      _, best = jax.lax.top_k(x, min(5, x.shape[-1]))
      right = jnp.take_along_axis(targets, best, axis=-1) > 0
      metrics[f"top1{suffix}"] = right[:, 0].astype(jnp.float32)
      metrics[f"top5{suffix}"] = jnp.any(right, axis=-1).astype(jnp.float32)
    return metrics, counts

  def _xent(self, logits, targets):
    if self.config.loss == "softmax_xent":
      return optax.softmax_cross_entropy(logits, targets)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


def _heads(out):
  return {
    name: out[f"logits_{name}"]
    for name in ("compressed", "lookup")
    if f"logits_{name}" in out
  }
