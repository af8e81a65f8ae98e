"""A run's classifier as functions of uint8 images, for other programs to call.

They compute in float32, whatever the run did, with operations that every
platform has: no kernels, no chunks, no scan over blocks. MHBC is direct or
absorbed, by the fewest multiply-adds where the run says "auto".
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export
from jaxtyping import Array, Float, UInt8

from lookup_vit import config_utils
from lookup_vit.models import layers, mhbc, tokens
from lookup_vit.train_step import Program

# Parameters by name, and images, to outputs by name.
Function = Callable[[Mapping[str, Array], Array], dict[str, Array]]

# Of a model without compressed grid.
NAME = "model"


def scale(images: UInt8[Array, "*any"]) -> Float[Array, "*any"]:
  """uint8 to [-1, 1], as the op `value_range(-1,1)`."""
  return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def names(grids: Sequence[tokens.Grid | None]) -> dict[str, tokens.Grid | None]:
  """Grids by the names of their functions: "3x3", or "model" without any."""
  return {
    NAME if grid is None else config_utils.format_grid(grid): grid
    for grid in grids
  }


def functions(
  program: Program, grids: Sequence[tokens.Grid | None]
) -> dict[str, Function]:
  """A function of each grid, by name.

  Each takes the parameters as `by_name` returns them, and uint8 images
  `[batch, *image_size, 3]` or what `scale` makes of them. It returns float32
  `logits` and `probabilities [batch, classes]`, and the features that are
  classified: of a ViT `pre_logits [batch, width]`, of a LookupViT
  `pre_logits_compressed` and `pre_logits_lookup`, of a probe `features`.

  Args:
    program: of a classifier.
    grids: compressed grids, or [None].
  """
  size = program.config.input.image_size
  return {
    name: functools.partial(
      _forward, program, portable(program.model, size, grid), grid
    )
    for name, grid in names(grids).items()
  }


def reference(program: Program, grid: tokens.Grid | None) -> Function:
  """As `functions`, of a grid, by the model as the run has it, in float32.

  But that it takes the run's own parameters, nested.
  """
  model = _with(program.model, lambda model: dict(dtype="float32"))

  def run(params, images):
    flat = traverse_util.flatten_dict(params, sep="/")
    return _forward(program, model, grid, flat, images)

  return run


def _forward(program, model, grid, params, images):
  if images.dtype == np.uint8:
    images = scale(images)
  fields = {} if grid is None else {"grid": grid}
  params = {"params": traverse_util.unflatten_dict(params, sep="/")}
  logits, out = model.apply(params, images, **fields)
  features = {
    name: x
    for name, x in out.items()
    if name.startswith("pre_logits") or name == "features"
  }
  probabilities = program.task.probabilities(logits)
  return {"logits": logits, "probabilities": probabilities, **features}


def portable(
  model: nn.Module, image_size: Sequence[int], grid: tokens.Grid | None
) -> nn.Module:
  """The same model, in float32 and operations that every platform has.

  Its parameters are those of a loop over blocks.

  Args:
    model: a classifier.
    image_size: of its images or clips.
    grid: the compressed grid that it is called with.
  """

  def fields(model):
    found = dict(
      dtype="float32", attention="direct", scan=False, remat_policy="none"
    )
    if grid is not None:
      absorbed = mhbc.absorbs(
        model.mhbc_impl,
        math.prod(grid),
        math.prod(model.lookup_grid(image_size)),
        model.mhbc_heads or model.num_heads,
        model.width,
      )
      found["mhbc_impl"] = "absorbed" if absorbed else "direct"
    return found

  return _with(model, fields)


def _with(model, fields):
  """A model, or the one that a probe has, with other fields."""
  if hasattr(model, "encoder"):
    return model.clone(encoder=_with(model.encoder, fields))
  return model.clone(**fields(model))


def by_name(params: Any) -> dict[str, np.ndarray]:
  """Nested parameters by name, with slashes, in the layout of a loop."""
  params = jax.tree.map(np.asarray, params)
  return traverse_util.flatten_dict(layers.unstack_blocks(params), sep="/")


def images_shape(
  batch_size: int | None, image_size: Sequence[int]
) -> jax.ShapeDtypeStruct:
  """uint8 images by shape; a batch of any size is a symbolic dimension."""
  if batch_size is None:
    (batch_size,) = export.symbolic_shape("batch")
  return jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.uint8)
