"""One vector of an image or clip, of what a backbone returns."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of LookupViT, which has two kinds of tokens.
FEATURES = ("compressed", "lookup", "both")


def check(model: nn.Module, features: str | None, block: int | None) -> None:
  """Checks what is asked of a model.

  Args:
    model: a ViT or a LookupViT, also a factorised one.
    features: of a LookupViT, "compressed" (where none are given), "lookup", or
      "both", one after the other; of other models None.
    block: number of a block, from the last one where it is negative; None for
      the model's end.

  Raises:
    ValueError: the model has no such features or block.
  """
  if not hasattr(model, "grid"):
    if features is not None:
      raise ValueError(
        f"features={features!r}: the model has one kind of tokens; want None."
      )
  elif features is not None and features not in FEATURES:
    raise ValueError(
      f"features={features!r}: want one of {', '.join(FEATURES)}."
    )
  if block is None:
    return
  depth = model.depth
  is_int = isinstance(block, int) and not isinstance(block, bool)
  if not is_int or not -depth <= block < depth:
    raise ValueError(
      f"block={block!r}: the model has {depth}; want None or an integer in "
      f"[{-depth}, {depth})."
    )


def capture(block: int | None) -> tuple[str, ...]:
  """What the model is to capture for `pool`."""
  return () if block is None else ("tokens",)


def pool(
  out: dict[str, Any], features: str | None = None, block: int | None = None
) -> Float[Array, "b D"]:
  """The mean over tokens.

  Args:
    out: of a model, with what `capture` names.
    features: as `check` takes them.
    block: likewise. The tokens after a block are those of the residual stream,
      no LayerNorm behind it; where there is a class token, it is one of them.

  Returns:
    float32, the pre-logits where no block is given; for "both" `[b, 2 D]`.
  """

  def one(name):
    if block is None:
      return out[f"pre_logits{name and '_' + name}"]
    x = out[f"block_{name and name + '_'}tokens"]
    x = jax.lax.index_in_dim(x, block, keepdims=False)
    # Of a factorised model, [b, slices, tokens, D].
    axes = tuple(range(1, x.ndim - 1))
    return jnp.mean(x, axis=axes, dtype=jnp.float32)

  if "pre_logits" in out:
    return one("")
  if features == "both":
    return jnp.concatenate([one("compressed"), one("lookup")], axis=-1)
  return one(features or "compressed")
