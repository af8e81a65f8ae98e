"""Which lookup tokens compressed tokens read over time, drawn over clips."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lookup_vit import config_utils
from lookup_vit.analysis import attention_maps, cross_attention
from lookup_vit.analysis.attention_maps import plt
from lookup_vit.models import tokens
from lookup_vit.train_step import Program


def write(
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
  if chosen is None:
    chosen = cross_attention.evenly_spaced(grid, 4)
  cross_attention.check_places(chosen, grid)
  maps = cross_attention.maps(program, params, clips, grid)[:, 0, 0]
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
  attention_maps.save(figure, path)
