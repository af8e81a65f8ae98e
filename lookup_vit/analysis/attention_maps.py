"""Which lookup tokens compressed tokens read, drawn over images and clips."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from etils import epath
from scipy.stats import qmc

from lookup_vit import config_utils
from lookup_vit.models import tokens
from lookup_vit.train_step import Program

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def attention(
  program: Program, params: Any, images: np.ndarray, grid: tokens.Grid
) -> np.ndarray:
  """MHBC attention of the last block, averaged over heads.

  Args:
    program: a LookupViT's.
    params: its parameters.
    images: `[batch, height, width, 3]` in [-1, 1], or clips `[batch, time,
      height, width, 3]`.
    grid: the compressed grid, of `m` tokens.

  Returns:
    `[batch, m, *lookup grid]`; each map sums to one. Of a factorised encoder,
    `[batch, m, slices, *grid of a slice]`; each slice of a map does.
  """

  @jax.jit
  def forward(params, images):
    _, out = program.apply(
      params, {"image": images}, grid, capture=("attention",)
    )
    return jnp.mean(out["attention"][-1], axis=-3)

  maps = np.asarray(forward(params, images))
  lookup_grid = program.model.lookup_grid(images.shape[1:-1])
  maps = maps.reshape(*maps.shape[:-1], *lookup_grid)
  if len(lookup_grid) < images.ndim - 2:  # Of slices.
    return np.moveaxis(maps, 1, 2)
  return maps


def write(
  path: str,
  program: Program,
  params: Any,
  images: np.ndarray,
  grid: tokens.Grid,
) -> None:
  """Draws a row for each image: the input, then every compressed token's map.

  Args:
    path: the PNG to write.
    program: a LookupViT's.
    params: its parameters.
    images: `[batch, height, width, 3]` in [-1, 1].
    grid: the compressed grid.
  """
  maps = attention(program, params, images, grid)
  count = math.prod(grid)
  figure, axes = plt.subplots(
    len(images),
    count + 1,
    figsize=(1.2 * (count + 1), 1.25 * len(images) + 0.5),
    squeeze=False,
    layout="constrained",
  )
  extent = (-0.5, images.shape[2] - 0.5, images.shape[1] - 0.5, -0.5)
  for row, image, image_maps in zip(axes, images, maps, strict=True):
    image = np.clip((image + 1) / 2, 0, 1)
    row[0].imshow(image)
    for axis, one in zip(row[1:], image_maps, strict=True):
      axis.imshow(image.mean(-1), cmap="gray")
      axis.imshow(one, cmap="inferno", alpha=0.6, extent=extent)
  for axis in axes.flat:
    axis.set_axis_off()
  axes[0, 0].set_title("input", fontsize=8)
  for axis, place in zip(axes[0, 1:], np.ndindex(*grid), strict=True):
    axis.set_title(str(place), fontsize=8)
  figure.suptitle(
    "Last block: lookup tokens that each compressed token "
    f"({config_utils.format_grid(grid)}) reads",
    fontsize=9,
  )
  _save(figure, path)


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


def write_clips(
  path: str,
  program: Program,
  params: Any,
  clips: np.ndarray,
  grid: tokens.Grid,
  chosen: Sequence[tokens.Grid] | None = None,
) -> None:
  """Draws compressed tokens' attention over space and time.

  A column for each slice of the lookup grid in time. For each clip a row of
  the frames in the middle of the slices, and below it a row for each chosen
  token, bright where it reads, on one scale over all its slices. A frame marks
  the token's own part of the clip.

  Args:
    path: the PNG to write.
    program: a LookupViT's, over clips, or a factorised encoder's.
    params: its parameters.
    clips: `[batch, time, height, width, 3]` in [-1, 1].
    grid: the compressed grid (time, rows, columns), or that of each slice
      (rows, columns).
    chosen: places of compressed tokens; four of them where none are given.

  Raises:
    ValueError: a place that is not in the grid.
  """
  chosen = evenly_spaced(grid, 4) if chosen is None else list(chosen)
  for place in chosen:
    if len(place) != len(grid) or not all(
      0 <= p < g for p, g in zip(place, grid, strict=True)
    ):
      raise ValueError(f"There is no compressed token {place} in {grid}.")
  maps = attention(program, params, clips, grid)
  slices = maps.shape[2]
  maps = maps.reshape(len(clips), *grid, *maps.shape[2:])
  tubelet = clips.shape[1] // slices
  height, width = clips.shape[2:4]
  rows = len(chosen) + 1
  figure, axes = plt.subplots(
    len(clips) * rows,
    slices,
    figsize=(0.9 * slices + 0.6, 0.95 * rows * len(clips) + 0.6),
    squeeze=False,
    layout="constrained",
  )
  extent = (-0.5, width - 0.5, height - 0.5, -0.5)
  for i, (clip, clip_maps) in enumerate(zip(clips, maps, strict=True)):
    frames = np.clip((clip[tubelet // 2 :: tubelet] + 1) / 2, 0, 1)
    for row, place in enumerate([None, *chosen]):
      for t, axis in enumerate(axes[i * rows + row]):
        axis.set_xticks([])
        axis.set_yticks([])
        if place is None:
          axis.imshow(frames[t])
          axis.set_title(f"t={t * tubelet + tubelet // 2}", fontsize=7)
          continue
        one = clip_maps[place]
        axis.imshow(frames[t].mean(-1), cmap="gray")
        axis.imshow(
          one[t],
          cmap="inferno",
          alpha=0.6,
          extent=extent,
          vmin=0,
          vmax=one.max(),
        )
        # A slice's own tokens are in all of its slices.
        every = (0,) * (3 - len(grid))
        (first, last), (top, bottom), (left, right) = (
          (p * n / g, (p + 1) * n / g)
          for p, g, n in zip(
            (*every, *place),
            (*(1 for _ in every), *grid),
            (slices, height, width),
            strict=True,
          )
        )
        if first - 1 < t < last:
          corner = (left - 0.5, top - 0.5)
          axis.add_patch(
            plt.Rectangle(
              corner, right - left, bottom - top, fill=False, color="w"
            )
          )
      axes[i * rows + row, 0].set_ylabel(
        "input" if place is None else str(place), fontsize=7
      )
  figure.suptitle(
    "Last block: lookup tokens that\ncompressed tokens "
    f"({config_utils.format_grid(grid)}) read over time",
    fontsize=9,
  )
  _save(figure, path)


def _save(figure, path):
  with epath.Path(path).open("wb") as f:
    figure.savefig(f, dpi=150, format="png")
  plt.close(figure)
