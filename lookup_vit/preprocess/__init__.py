"""Preprocessing by a string of ops, for example `"decode|flip_lr"`."""

from lookup_vit import quiet_tensorflow  # noqa: F401

# isort: split
# An op exists once its module is imported.
from lookup_vit.preprocess import (
  augment_ops,
  corruptions,
  general_ops,
  image_ops,
  randaugment,
  text_ops,
  video_ops,
)
from lookup_vit.preprocess.registry import get_preprocess_fn, register

__all__ = [
  "augment_ops",
  "corruptions",
  "general_ops",
  "get_preprocess_fn",
  "image_ops",
  "randaugment",
  "register",
  "text_ops",
  "video_ops",
]
