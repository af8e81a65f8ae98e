"""The attention of MHBC as arrays, and the places of compressed tokens."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

from lookup_vit.models import tokens
from lookup_vit.train_step import Program


def maps(
  program: Program,
  params: Any,
  images: np.ndarray,
  grid: tokens.Grid,
  blocks: Sequence[int] = (-1,),
  heads: Sequence[int] | None = None,
) -> np.ndarray:
  """MHBC attention of blocks, by head or averaged over heads.

  Args:
    program: a LookupViT's, or a captioner's whose encoder is one.
    params: its parameters.
    images: `[batch, height, width, 3]` in [-1, 1], or clips `[batch, time,
      height, width, 3]`.
    grid: the compressed grid, of `m` tokens.
    blocks: which; negative ones count from the last.
    heads: which; None for the mean of all.

  Returns:
    `[batch, blocks, heads, m, *lookup grid]`, where the mean is one head; each
    map sums to one. Of a factorised encoder, `[batch, blocks, heads, m, slices,
    *grid of a slice]`; each slice of a map does.

  Raises:
    ValueError: the model has no compressed tokens, or there is no such grid,
      block or head.
  """
  model = encoder(program)
  lookup_grid = model.lookup_grid(images.shape[1:-1])
  grid = tokens.check_grid(grid, lookup_grid)
  blocks, heads = check_chosen(model, blocks, heads)

  @jax.jit
  def forward(params, images):
    _, out = model.apply(
      {"params": params}, images, grid=grid, capture=("attention",)
    )
    found = jnp.moveaxis(out["attention"][np.array(blocks)], 0, 1)
    if heads is None:
      return jnp.mean(found, axis=-3, keepdims=True)
    return found[..., np.array(heads), :, :]

  if model is not program.model:
    params = params["encoder"]
  found = np.asarray(forward(params, images))
  found = found.reshape(*found.shape[:-1], *lookup_grid)
  if len(lookup_grid) < images.ndim - 2:  # Of slices.
    return np.moveaxis(found, 2, 4)
  return found


def encoder(program: Program) -> Any:
  """The LookupViT of a program, which may be a captioner's.

  Raises:
    ValueError: it has none.
  """
  model = getattr(program.model, "encoder", program.model)
  if not hasattr(model, "grid"):
    raise ValueError(
      f"config.model_name={program.config.model_name!r}: this model has no "
      "compressed tokens, whose attention could be drawn."
    )
  return model


def check_chosen(
  model: Any, blocks: Sequence[int], heads: Sequence[int] | None
) -> tuple[list[int], list[int] | None]:
  """Blocks and heads of a LookupViT, counted from 0 on.

  Raises:
    ValueError: there is no such block or head, or none is chosen.
  """
  counts = {"block": model.depth, "head": model.mhbc_heads or model.num_heads}
  chosen = []
  for (what, count), indices in zip(
    counts.items(), (blocks, heads), strict=True
  ):
    if indices is None:
      chosen.append(None)
      continue
    if not indices:
      raise ValueError(f"Want at least one {what}.")
    for i in indices:
      if not -count <= i < count:
        raise ValueError(
          f"There is no {what} {i}: there are {count}, from 0 on."
        )
    chosen.append([i % count for i in indices])
  return tuple(chosen)


def check_places(places: Sequence[tokens.Grid], grid: tokens.Grid) -> None:
  """Raises ValueError unless each is the place of a compressed token."""
  for place in places:
    if len(place) != len(grid) or not all(
      0 <= p < g for p, g in zip(place, grid, strict=True)
    ):
      raise ValueError(f"There is no compressed token {place} in {grid}.")


def evenly_spaced(grid: tokens.Grid, count: int) -> list[tokens.Grid]:
  """Places of `count` compressed tokens, spread over all axes, in order."""
  count = min(count, math.prod(grid))
  places = {}  # As a set in the order of its making.
  points = qmc.Halton(len(grid), scramble=False)
  points.fast_forward(1)  # The first is a corner.
  while len(places) < count:
    [point] = points.random(1)
    places[tuple(int(p * g) for p, g in zip(point, grid, strict=True))] = None
  return sorted(places)


def same_place(
  place: tokens.Grid, source: tokens.Grid, target: tokens.Grid
) -> tokens.Grid:
  """The token of `target` whose cell holds the centre of a cell of `source`.

  Of a centre between two cells, it is the latter.
  """
  return tuple(
    (2 * p + 1) * t // (2 * s)
    for p, s, t in zip(place, source, target, strict=True)
  )
