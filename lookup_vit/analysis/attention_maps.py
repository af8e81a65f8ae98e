"""Which lookup tokens each compressed token reads, drawn over the input."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from etils import epath

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
    images: `[batch, height, width, 3]` in [-1, 1].
    grid: the compressed grid, of `m` tokens.

  Returns:
    `[batch, m, *lookup grid]`; each map sums to one.
  """

  @jax.jit
  def forward(params, images):
    _, out = program.apply(
      params, {"image": images}, grid, capture=("attention",)
    )
    return jnp.mean(out["attention"][-1], axis=1)

  maps = np.asarray(forward(params, images))
  lookup_grid = program.model.lookup_grid(images.shape[1:-1])
  return maps.reshape(*maps.shape[:2], *lookup_grid)


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
  with epath.Path(path).open("wb") as f:
    figure.savefig(f, dpi=150, format="png")
  plt.close(figure)
