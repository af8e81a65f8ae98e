"""Captioning: the next id of a caption, by an image and the ids before it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float

# Of `Captioner`, where a config does not say.
_MAX_LENGTH = 64


class Task:
  """Teacher forcing: at each place, the ids before it are those of the caption.

  A batch has `image` and `text [batch, max_length + 1]`, ids as the op
  `tokenize` makes them: that before a caption, those of the caption, its end,
  and -1 behind it. Optional is `text_cut [batch]`, 1 for captions that were
  cut.

  Args:
    config: `num_classes` (the size of the vocabulary), `model.max_length`,
      `input.image_size`, `label_smoothing`, and `mixup`, `cutmix` without any.

  Raises:
    ValueError: a field is missing or not as wanted.
  """

  group = 1

  def __init__(self, config: ml_collections.ConfigDict):
    if not isinstance(config.num_classes, int) or config.num_classes < 2:
      raise ValueError(
        f"config.num_classes={config.num_classes!r}: want the size of the "
        "vocabulary, an integer >= 2."
      )
    if config.mixup.p or config.cutmix.p:
      raise ValueError("config.mixup, config.cutmix: captions are not mixed.")
    self.config = config

  @property
  def length(self) -> int:
    """Most ids of a caption."""
    return self.config.model.get("max_length", _MAX_LENGTH)

  def batch_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch of so many examples, by shapes."""
    shape = (size, *self.config.input.image_size, 3)
    return {
      "image": jax.ShapeDtypeStruct(shape, jnp.float32),
      "text": jax.ShapeDtypeStruct((size, self.length + 1), jnp.int32),
    }

  def check_input(self, spec: Mapping[str, Any], field: str) -> None:
    """Raises ValueError unless a batch, made by a config field, has ids."""
    if "image" not in spec or "text" not in spec:
      raise ValueError(
        f"{field}: a batch has {sorted(spec)}; want 'image' and 'text', the "
        "ids that tokenize(...) makes."
      )
    got, want = tuple(spec["text"].shape[1:]), (self.length + 1,)
    if got != want or spec["text"].dtype != "int32":
      raise ValueError(
        f"{field} makes ids of shape {got}, {spec['text'].dtype.name}; "
        f"config.model.max_length={self.length} wants {want}, int32: "
        f"tokenize(..., {self.length})."
      )

  def inputs(self, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Images, and the ids that stand before those to be told."""
    return batch["image"], jnp.maximum(batch["text"][:, :-1], 0)

  def augment(
    self, batch: dict[str, Any], first: Any, rng: jax.Array
  ) -> dict[str, Any]:
    """The batch itself."""
    del first, rng
    return batch

  def loss(
    self,
    logits: Float[Array, "b t classes"],
    out: dict[str, Any],
    batch: dict[str, Any],
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy with smoothed targets, the mean over a batch's ids.

    With `config.grad_accum_steps` it is that over a micro-batch's ids, and the
    update the mean over micro-batches, which may have other numbers of ids.

    Logged are `token_accuracy`; `perplexity`, of targets that are not smoothed;
    and the share of `captions_cut`, where the batch says.
    """
    del out
    xent, right, counts = self._by_id(logits, batch)
    total = jnp.maximum(jnp.sum(counts), 1.0)

    def mean(x):
      return jnp.sum(x * counts) / total

    s = self.config.label_smoothing
    # Of the uniform distribution that s of the target is.
    uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    scalars = {
      "token_accuracy": mean(right),
      "perplexity": jnp.exp(mean(xent)),
    }
    if "text_cut" in batch:
      scalars["captions_cut"] = jnp.mean(batch["text_cut"])
    return mean((1 - s) * xent + s * uniform), scalars

  def metrics(
    self,
    logits: Float[Array, "b t classes"],
    out: dict[str, Any],
    batch: dict[str, Any],
  ) -> tuple[dict[str, Float[Array, " b"]], Float[Array, " b"]]:
    """Of each caption: loss and accuracy of its ids, and how many it has.

    Their weighted mean over a split is the mean over its ids; `exp(loss)` is
    the perplexity.
    """
    del out
    xent, right, counts = self._by_id(logits, batch)
    total = jnp.sum(counts, axis=-1)

    def mean(x):
      return jnp.sum(x * counts, axis=-1) / jnp.maximum(total, 1.0)

    metrics = {"loss": mean(xent), "token_accuracy": mean(right)}
    return metrics, total * batch["_mask"]

  def _by_id(self, logits, batch):
    """Cross-entropy, whether the most probable is right, and what counts."""
    targets = batch["text"][:, 1:]
    counts = (targets >= 0).astype(jnp.float32)
    targets = jnp.maximum(targets, 0)
    xent = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return xent, right, counts
