"""An image model's parameters as those of a video model (ViViT, section 3.4).

Of the patch kernel (arXiv:2103.15691, equations 8 and 9; in scenic,
projects/vivit/model_utils.py, init_embedding), with tubelets of `t` frames:

  average  every frame has the image's kernel over `t`
  central  frame `floor(t / 2)` has the image's kernel, the others zeros

Positions are resized in space where the grids differ, and tiled in time. The
spatial encoder of a factorised model takes them as they are; its temporal part
and its classifiers have no counterpart.

On a clip whose frames are equal, a ViT or LookupViT over a 3-D grid then
computes what the image model does, if the grids are equal in space. Two
exceptions: a class token weighs less against `T` times as many tokens, and
sine-cosine positions, which are no parameters, are others in 3-D.

LookupViT's reused weights need a factor. Let the compressed grid have `t'`
slots in time, the lookup grid `T`. Each row of the gathering attention is a
softmax over the lookup tokens: of `T` equal copies each gets `1 / T` of what
the image's token gets. Transposed, a lookup token gathers from `t'` equal
copies of each compressed token: `t' / T` of the image's update. So the kernel
of that update's projection, not its bias, is multiplied by `T / t'`. Of
reuse="logits" the softmax is over the compressed tokens themselves, whose
shares add up to the image's: no factor; nor is there one with
reuse_scale="tokens", which has it by itself.

Learned compressed tokens are treated as positions are.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lookup_vit.models import tokens

KINDS = ("central", "average")

# The contextualisation's output kernel, of one block or of all stacked.
_OUT_BACK = r"(.*/)?mhbc/out_back/kernel"


def patch_kernel(kernel: np.ndarray, frames: int, kind: str) -> np.ndarray:
  """`[rows, columns, 3, width]` to `[frames, rows, columns, 3, width]`.

  Raises:
    ValueError: `kind` is neither "central" nor "average".
  """
  if kind not in KINDS:
    raise ValueError(f"inflation {kind!r}: want {' or '.join(KINDS)}.")
  if kind == "average":
    return np.tile(kernel / frames, (frames, 1, 1, 1, 1)).astype(kernel.dtype)
  inflated = np.zeros((frames, *kernel.shape), kernel.dtype)
  inflated[frames // 2] = kernel
  return inflated


def positions(table: np.ndarray, grid: tokens.Grid) -> np.ndarray:
  """`[rows, columns, width]` to `[*grid, width]`, (time, rows, columns)."""
  time, *space = grid
  if table.shape[:-1] != tuple(space):
    shape = (*space, table.shape[-1])
    table = np.asarray(jax.image.resize(table, shape, "linear"))
  return np.tile(table, (time, 1, 1, 1))


def contextualisation_scale(model: Any, clip_size: Sequence[int]) -> float:
  """The factor of the contextualisation's output kernel, `T / t'`.

  Args:
    model: the video model; its own grid counts. 1.0 where it has none over
      time, or does not reuse weights.
    clip_size: (time, rows, columns) in pixels.
  """
  grid = getattr(model, "grid", ())
  if len(grid) != 3 or model.reuse != "weights":
    return 1.0
  if model.reuse_scale == "tokens":
    return 1.0
  return model.lookup_grid(clip_size)[0] / grid[0]


def inflate(
  source: Mapping[str, np.ndarray],
  target: Mapping[str, Any],
  kind: str,
  scale: float = 1.0,
) -> tuple[Mapping[str, np.ndarray], list[str]]:
  """An image model's parameters under the names of a video model.

  Args:
    source: parameters by path, "encoderblock_0/mlp/dense_in/kernel".
    target: parameters of the video model, or their shapes; blocks stacked as
      in `source`.
    kind: "central" or "average".
    scale: of `contextualisation_scale`.

  Returns:
    Parameters by path, and the paths of `target` that an image model has no
    counterpart for. `source` itself and none where both models are of images,
    or both of videos.

  Raises:
    ValueError: the model is of images and the checkpoint of videos, the patches
      differ in space, or an unknown `kind`.
  """
  old, new = _patch(source), _patch(target)
  if old is None or new is None or len(old) == len(new):
    return source, []
  if len(old) > len(new):
    raise ValueError(
      f"a video model's checkpoint, of patch {old}, for an image model, of "
      f"patch {new}; there is only the other way."
    )
  if old != new[1:]:
    raise ValueError(
      f"the checkpoint's patch {old} is not the model's, {new}, in space."
    )
  factorised = any(name.startswith("spatial/") for name in target)
  prefix = "spatial/" if factorised else ""
  fresh = []
  if factorised:
    source = {k: x for k, x in source.items() if not k.startswith("head")}
    fresh = [name for name in target if not name.startswith(prefix)]
  result = {}
  for name, x in source.items():
    if name == "embedding/kernel":
      x = patch_kernel(x, new[0], kind)
    elif name in tokens.GRIDS and name in target:
      x = positions(x, target[name].shape[:-1])
    elif re.fullmatch(_OUT_BACK, name):
      x = (x * scale).astype(x.dtype)
    result[prefix + name] = x
  return result, fresh


def _patch(params):
  """The patch, by the shape of the embedding; None where there is none."""
  for name in ("embedding/kernel", "spatial/embedding/kernel"):
    if name in params:
      return tuple(params[name].shape[:-2])
  return None
