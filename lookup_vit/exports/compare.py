"""Whether programs that were written compute what the model does."""

import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from lookup_vit.exports import classifier
from lookup_vit.models import tokens
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")

# Of |a - b| of an output, over the greatest |b| of it, or over one.
TOLERANCE = 1e-4

# Batches that a program of any is run on.
_BATCHES = (1, 3)


def compare(
  run: Callable[[str, str, Any], dict[str, np.ndarray]],
  program: Program,
  params: Any,
  grids: Sequence[tokens.Grid | None],
  batch_size: int | None,
  pp: str | None,
) -> float:
  """Runs programs on random images, and the model.

  Args:
    run: of the written programs, `(kind, name, images) -> outputs by name`.
    program: of the model.
    params: of the model, nested.
    grids: that there are programs of; [None] of a model without any.
    batch_size: of the programs; None for any.
    pp: op-string by which they read "encoded" images; None where they do not.

  Returns:
    The largest difference, as `TOLERANCE` has it.

  Raises:
    ValueError: it is more than that.
  """
  size, worst = tuple(program.config.input.image_size), 0.0
  for name, grid in classifier.names(grids).items():
    wanted = jax.jit(classifier.reference(program, grid))
    for batch in _BATCHES if batch_size is None else (batch_size,):
      images = random_images(batch, size)
      inputs = {"images": (images, classifier.scale(images))}
      if pp:
        inputs["encoded"] = _encoded(images, pp)
      for kind, (given, pixels) in inputs.items():
        found = difference(run(kind, name, given), wanted(params, pixels))
        what = f"{kind}, {name}, batch {batch}"
        log.info("%s: largest difference %.1e.", what, found)
        worst = max(worst, check(what, found))
  return worst


def random_images(batch: int, image_size: Sequence[int]) -> np.ndarray:
  """uint8 `[batch, *image_size, 3]`, each time the same."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (batch, *image_size, 3), np.uint8)


def _encoded(images, pp):
  """What PNG and JPEG files of images hold, and what is read of them."""
  from lookup_vit import image_files

  with tempfile.TemporaryDirectory() as folder:
    paths = []
    for i, image in enumerate(images):
      paths.append(os.path.join(folder, f"{i}.{('png', 'jpg')[i % 2]}"))
      Image.fromarray(image).save(paths[-1])
    contents = [pathlib.Path(path).read_bytes() for path in paths]
    return contents, image_files.read(paths, pp, images.shape[1:3])


def difference(found: Any, wanted: Any) -> float:
  """The largest difference of outputs by name, as `TOLERANCE` has it.

  Raises:
    ValueError: they have other names or shapes.
  """
  shapes = [{k: np.shape(x) for k, x in out.items()} for out in (found, wanted)]
  if shapes[0] != shapes[1]:
    raise ValueError(f"It returns {shapes[0]}, the model {shapes[1]}.")
  worst = [0.0]
  for name, x in wanted.items():
    x = np.asarray(x, np.float64)
    greatest = max(1.0, np.max(np.abs(x)))
    worst.append(np.max(np.abs(found[name] - x)) / greatest)
  return float(np.max(worst))  # NaN, where one is.


def check(what: str, found: float) -> float:
  """A difference, or where it is too large a ValueError."""
  if not found <= TOLERANCE:
    raise ValueError(
      f"{what}: what was written differs from the model by {found:.1e}; at "
      f"most {TOLERANCE:.0e} is rounding. Nothing is left of it."
    )
  return found
