"""From `"B/16"` and fields to a model."""

import dataclasses
import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from lookup_vit.models import tokens

# Width, depth, MLP width and heads as in big_vision's models/vit.py; sources:
# ViT (arXiv:2010.11929), DeiT (Ti, S), Scaling ViT (arXiv:2106.04560: g).
_VARIANTS = {
  "mu": (32, 1, 128, 2),
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "M": (512, 12, 2048, 8),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "H": (1280, 32, 5120, 16),
  "g": (1408, 40, 6144, 16),
}


def _is_int(x):
  return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _is_grid(x):
  return isinstance(x, tuple) and len(x) > 0 and all(map(_is_int, x))


# What the value of a field must be by its type: a test, and the same in words.
_WANTED = {
  int: (_is_int, "an integer >= 1"),
  int | None: ((lambda x: x is None or _is_int(x)), "an integer >= 1, or None"),
  float: (
    (lambda x: isinstance(x, int | float) and not isinstance(x, bool)),
    "a number",
  ),
  bool: ((lambda x: isinstance(x, bool)), "True or False"),
  str: ((lambda x: isinstance(x, str)), "text"),
  tokens.Grid: (_is_grid, "a grid such as (5, 5)"),
}


def decode_variant(variant: str) -> dict[str, Any]:
  """Turns `"B/16"` or `"B/2x16"` into model fields.

  Args:
    variant: size, slash, patch. `16` is a 16x16 patch of an image, `2x16` a
      tubelet of 2 frames by 16x16, `2x14x16` a patch given axis by axis.

  Returns:
    `width`, `depth`, `num_heads`, `mlp_ratio` (MLP width over width) and
    `patch_size`, a tuple with an entry for each axis of the input.

  Raises:
    ValueError: the size is not known or the patch cannot be read.
  """
  match = isinstance(variant, str) and re.fullmatch(
    r"(\w+)/(\d+(?:x\d+){0,2})", variant
  )
  if not match or match[1] not in _VARIANTS:
    raise ValueError(
      f"Unknown variant {variant!r}: want SIZE/PATCH such as 'B/16' for images "
      f"or 'B/2x16' for video, SIZE one of {', '.join(_VARIANTS)}."
    )
  patch = tuple(int(p) for p in match[2].split("x"))
  if 0 in patch:
    raise ValueError(f"Variant {variant!r} has a patch of size zero.")
  if len(patch) < 3:
    patch = (*patch, patch[-1])
  return dict(**decode_size(match[1]), patch_size=patch)


def decode_size(size: str) -> dict[str, Any]:
  """Turns `"B"` into `width`, `depth`, `num_heads` and `mlp_ratio`.

  Raises:
    ValueError: the size is not known.
  """
  if size not in _VARIANTS:
    raise ValueError(
      f"Unknown size {size!r}: want one of {', '.join(_VARIANTS)}."
    )
  width, depth, mlp_dim, num_heads = _VARIANTS[size]
  return dict(
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_ratio=mlp_dim / width,
  )


def build(
  cls: type[nn.Module],
  num_classes: int | None,
  variant: str,
  fields: Mapping[str, Any],
) -> nn.Module:
  """Makes a model from a variant and the fields that override it.

  Raises:
    ValueError: a field the model does not have or of another type, or the
      variant is unknown.
  """
  fields = {**decode_variant(variant), **fields}
  return build_of(cls, fields, num_classes=num_classes)


def build_of(
  cls: type[nn.Module], fields: Mapping[str, Any], **fixed: Any
) -> nn.Module:
  """Makes a model of fields that are checked, and others that are not.

  Raises:
    ValueError: a field the model does not have or of another type.
  """
  known = {
    f.name: f.type
    for f in dataclasses.fields(cls)
    if f.name not in ("parent", "name", *fixed)
  }
  for name in fields:
    if name not in known:
      close = difflib.get_close_matches(name, known, 1)
      hint = f" Did you mean {close[0]!r}?" if close else ""
      raise ValueError(
        f"{cls.__name__} has no field {name!r}.{hint} Its fields: "
        f"{', '.join(sorted(known))}."
      )
  fields = {
    k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
  }
  for name, value in fields.items():
    fits, want = _WANTED[known[name]]
    if not fits(value):
      raise ValueError(f"{cls.__name__}.{name}={value!r}: want {want}.")
  return cls(**fixed, **fields)


def build_encoder(fields: Mapping[str, Any], names: Sequence[str]) -> nn.Module:
  """Makes the encoder that another model has: without a classifier.

  Args:
    fields: `model_name`, "lookup_vit" by default, and the fields of its
      `Model`.
    names: of the models that it may be.

  Raises:
    ValueError: another model, or a field that it does not have.
  """
  fields = dict(fields)
  name = fields.pop("model_name", "lookup_vit")
  if "num_classes" in fields:
    raise ValueError("encoder.num_classes: an encoder has no head.")
  if name not in names:
    raise ValueError(
      f"encoder.model_name={name!r}: want {' or '.join(map(repr, names))}."
    )
  model = importlib.import_module(f"lookup_vit.models.{name}")
  return model.Model(None, **fields)
