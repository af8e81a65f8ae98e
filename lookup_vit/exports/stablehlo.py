"""Programs in StableHLO, as `jax.export` serialises them.

A program is `call(params, images)`: the parameters, a dictionary by name, are
in a file of their own, once for all programs.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax import export

from lookup_vit import params_file
from lookup_vit.exports.classifier import Function


def write(
  folder: str,
  functions: Mapping[str, Function],
  params: Mapping[str, np.ndarray],
  step: int,
  images: jax.ShapeDtypeStruct,
  platforms: Sequence[str],
) -> None:
  """Writes `NAME.stablehlo` of each function, and `params.safetensors`.

  Args:
    folder: a directory there is.
    functions: of `classifier.functions`.
    params: by name.
    step: of the training.
    images: of `classifier.images_shape`.
    platforms: of `jax.export`, to lower for.
  """
  params_file.write(folder, params, step)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(params)
  )
  for name, function in functions.items():
    lower = export.export(jax.jit(function), platforms=list(platforms))
    content = lower(shapes, images).serialize()
    (pathlib.Path(folder) / f"{name}.stablehlo").write_bytes(content)


def load(
  folder: str,
) -> Callable[[str, str, np.ndarray], dict[str, np.ndarray]]:
  """What runs a program: `run("images", name, images) -> outputs by name`."""
  params, _ = params_file.read(folder)

  def run(kind, name, images):
    del kind  # All are on images.
    content = (pathlib.Path(folder) / f"{name}.stablehlo").read_bytes()
    program = export.deserialize(bytearray(content))
    return jax.tree.map(np.asarray, jax.jit(program.call)(params, images))

  return run
