"""LookupViT: vision transformers that do the heavy work on few tokens."""

import time
from typing import Any

__version__ = "0.1.0"

# When the program began, but for the interpreter's own start.
START = time.monotonic()


def load(workdir: str, step: int | None = None, **options: Any) -> Any:
  """A run's model, ready to predict: see `lookup_vit.predictor.load`."""
  from lookup_vit import predictor  # JAX is for those who want it.

  return predictor.load(workdir, step, **options)
