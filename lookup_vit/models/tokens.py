"""Tokens over a grid of any rank: embedding, positions, resizing.

Tokens are `[batch, tokens, width]`, flattened in row-major order from a grid:
`(rows, columns)` for images, `(time, rows, columns)` for video.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lookup_vit.models import layers

Grid = tuple[int, ...]

# Names of parameters that are a grid of tokens, `[*grid, width]`.
GRIDS = ("pos_embedding", "compressed_queries")


def sincos_positions(
  grid: Grid, width: int, temperature: float = 10_000.0
) -> np.ndarray:
  """Fixed sine-cosine positions, as MoCo v3 (arXiv:2104.02057) has in 2-D.

  Each axis takes an equal, even share of the channels, the last axis first;
  what an even share leaves over is zero.

  Returns:
    Array `[*grid, width]`, float32.

  Raises:
    ValueError: the width is too small for the rank.
  """
  count = width // (2 * len(grid))
  if count < 2:
    raise ValueError(
      f"sincos positions of rank {len(grid)} need a width of at least "
      f"{4 * len(grid)}, not {width}."
    )
  omega = temperature ** (-np.arange(count) / (count - 1))
  parts = []
  for axis in reversed(np.indices(grid)):
    angle = axis[..., None] * omega
    parts += [np.sin(angle), np.cos(angle)]
  table = np.concatenate(parts, axis=-1)
  pad = [(0, 0)] * len(grid) + [(0, width - table.shape[-1])]
  return np.pad(table, pad).astype(np.float32)


def resize_grid(
  tokens: Float[Array, "b n D"], source: Grid, target: Grid
) -> Float[Array, "b m D"]:
  """`T(x, g)`: resizes a grid of tokens, linearly in each axis, antialiased."""
  weights = [
    jax.image.resize(jnp.eye(n, dtype=tokens.dtype), (m, n), "linear")
    for n, m in zip(source, target, strict=True)
  ]
  return _along_axes(tokens, source, weights)


def pool_grid(
  tokens: Float[Array, "b n D"], source: Grid, target: Grid
) -> Float[Array, "b m D"]:
  """Each token of the target is the mean of those of its cell of the source.

  Along an axis of `n` tokens, cell `i` of `m` is from `floor(i n / m)` to
  `ceil((i + 1) n / m)`, as of PyTorch's adaptive average pooling: where `m`
  does not divide `n`, cells overlap.
  """
  weights = []
  for n, m in zip(source, target, strict=True):
    places, i = np.arange(n), np.arange(m)[:, None]
    cells = (places >= i * n // m) & (places < -(-(i + 1) * n // m))
    weights.append(jnp.asarray(cells / cells.sum(1, keepdims=True)))
  return _along_axes(tokens, source, weights)


def _along_axes(tokens, source, weights):
  """Each axis of a grid multiplied by its weights `[m, n]`."""
  batch, _, width = tokens.shape
  x, before = tokens, batch
  for n, axis in zip(source, weights, strict=True):
    m = len(axis)
    if m != n:
      # The weights are repeated so that nothing has to be transposed.
      axis = jnp.broadcast_to(axis.astype(x.dtype), (before, m, n))
      x = x.reshape(before, n, -1)
      x = jnp.einsum("bmn,bnx->bmx", axis, x, precision="highest")
    before *= m
  return x.reshape(batch, -1, width)


def lookup_grid(image_size: Sequence[int], patch_size: Grid) -> Grid:
  """The grid of patches of an image or video, `[*space-time]` in pixels.

  Raises:
    ValueError: the ranks differ, or the patch does not divide the image.
  """
  if len(image_size) != len(patch_size):
    kind = "an image (rows, columns)"
    if len(patch_size) == 3:
      kind = "a video (time, rows, columns)"
    raise ValueError(
      f"The patch {patch_size} wants {kind} in a batch with 3 channels last, "
      f"got an input of size {tuple(image_size)}."
    )
  for size, patch in zip(image_size, patch_size, strict=True):
    if size % patch or size < 1:
      raise ValueError(
        f"The patch {patch_size} does not divide the input {tuple(image_size)}."
        " Choose an image size that is a multiple of the patch."
      )
  return tuple(s // p for s, p in zip(image_size, patch_size, strict=True))


def tokenise(
  images: Float[Array, "b *space c"],
  width: int,
  patch_size: Grid,
  cfg: layers.LayerConfig,
  stem: str = "patch",
) -> tuple[Float[Array, "b n D"], Grid]:
  """Tokens of patches, from inside a compact module, and their grid.

  Args:
    images: or videos.
    width: of a token.
    patch_size: of each axis.
    cfg: of all layers.
    stem: "patch" is linear in the pixels of a patch. "conv" (Xiao et al.,
      arXiv:2106.14881, section 4) has 3x3 convolutions of stride 2, each with
      twice the channels of the one before, and then a linear layer; here with
      LayerNorm and GELU, where the paper has BatchNorm and ReLU. "deep_conv"
      has one of stride 1 more before the first and after each.

  Raises:
    ValueError: the patch does not fit, there is no such stem, or it has no
      convolutions for such a patch or width.
  """
  grid = lookup_grid(images.shape[1:-1], patch_size)
  x = images
  if stem != "patch":
    for i, (channels, stride) in enumerate(
      stem_convolutions(stem, width, patch_size)
    ):
      conv = nn.Conv(
        *(channels, (3, 3), stride, 1),
        use_bias=False,
        dtype=cfg.dtype,
        name=f"stem_{i}",
      )
      x = layers.layer_norm(cfg, f"stem_norm_{i}")(conv(x))
      x = nn.gelu(x, approximate=cfg.gelu == "tanh")
    patch_size = (1, 1)
  embed = nn.Conv(
    *(width, patch_size, patch_size, "VALID"),
    dtype=cfg.dtype,
    conv_general_dilated=_convolve_patches,
    name="embedding",
  )
  x = embed(x)
  return x.reshape(x.shape[0], -1, width), grid


def _convolve_patches(images, kernel, strides, *args, **kwargs):
  """`jax.lax.conv_general_dilated` with strides as the kernel is large."""

  def as_product(images, kernel):
    grid = lookup_grid(images.shape[1:-1], strides)
    rank = len(grid)
    sides = [n for pair in zip(grid, strides, strict=True) for n in pair]
    x = images.reshape(images.shape[0], *sides, images.shape[-1])
    odd, even = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    x = x.transpose(0, *odd, *even, 2 * rank + 1)
    x = x.reshape(images.shape[0], *grid, -1)
    return x @ kernel.reshape(-1, kernel.shape[-1])

  def as_convolution(images, kernel):
    return jax.lax.conv_general_dilated(
      images, kernel, strides, *args, **kwargs
    )

  # XLA multiplies faster than it convolves on CPUs.
  return jax.lax.platform_dependent(
    images, kernel, cpu=as_product, default=as_convolution
  )


def stem_convolutions(
  stem: str, width: int, patch_size: Grid
) -> list[tuple[int, int]]:
  """Channels and stride of the convolutions before a token's linear layer.

  For a `stem` of convolutions; see `tokenise`.

  Raises:
    ValueError: there is no such stem, the patch is not square with a side of 2,
      4, 8, ..., or the width cannot be halved so often.
  """
  if stem not in ("conv", "deep_conv"):
    raise ValueError(f"stem={stem!r}: want 'patch', 'conv' or 'deep_conv'.")
  count = patch_size[0].bit_length() - 1
  if tuple(patch_size) != (2**count,) * 2 or not count:
    raise ValueError(
      f"stem={stem!r} wants a square patch of 2, 4, 8 or 16 pixels, not "
      f"{tuple(patch_size)}."
    )
  deep = stem == "deep_conv"
  halvings = count - 1 + deep
  if width % 2**halvings:
    raise ValueError(
      f"stem={stem!r} with a patch of {2**count} pixels wants a width that "
      f"{2**halvings} divides, not {width}."
    )
  convolutions = [(width >> count, 1)] if deep else []
  for i in reversed(range(count)):
    convolutions += [(width >> i, 2), (width >> i, 1)][: 1 + deep]
  return convolutions


def positions(
  module: nn.Module, kind: str, grid: Grid, width: int
) -> Float[Array, "1 n D"]:
  """The position grid, flattened: learned (`pos_embedding`) or sin-cos.

  Raises:
    ValueError: `kind` is neither "learned" nor "sincos".
  """
  if kind == "learned":
    init = nn.initializers.normal(stddev=1 / math.sqrt(width))
    table = module.param("pos_embedding", init, (*grid, width))
  elif kind == "sincos":
    table = jnp.asarray(sincos_positions(grid, width))
  else:
    raise ValueError(f"positions={kind!r}: want 'learned' or 'sincos'.")
  return table.reshape(1, -1, width)


def check_grid(grid: Grid, lookup_grid: Grid) -> Grid:
  """The compressed grid as a tuple.

  Raises:
    ValueError: its rank is not that of the lookup grid, or it is larger along
      some axis, or not positive.
  """
  grid = tuple(grid)
  if len(grid) != len(lookup_grid) or not all(
    0 < g <= n for g, n in zip(grid, lookup_grid, strict=True)
  ):
    raise ValueError(
      f"The compressed grid {grid} does not fit the lookup grid {lookup_grid}: "
      "want as many axes, each between 1 and that of the lookup grid (image "
      "size over patch size)."
    )
  return grid
