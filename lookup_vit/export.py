r"""Writes a run's model for other programs, and checks what it wrote.

    python -m lookup_vit.export --workdir=WORKDIR --format=FORMAT --output=PATH

PATH becomes a directory. What it holds, by FORMAT:

  stablehlo    `GRID.stablehlo`, programs for `jax.export.deserialize`
  safetensors  the parameters, and `config.json`: no program

A program is of one compressed grid, since all shapes in it follow from the
grid: `3x3.stablehlo`; of a model without grid, `model.stablehlo`. Programs
share the parameters. They take uint8 images `[batch, height, width, 3]` of the
model's size, or clips, scale them, and compute in float32. Which ones, and for
what, can be chosen:

    --grid=3x3,5x5        compressed grids; those of the training by default
    --batch_size=8        a fixed one; any by default
    --platforms=cpu,cuda  of stablehlo

Each program is read back and run, in its own runtime, on random images, and
compared with the model. Where they differ, nothing is left at PATH.
"""

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from lookup_vit import (
  checkpoints,
  cli,
  config_utils,
  export_programs,
  export_safetensors,
  export_stablehlo,
)
from lookup_vit.models import tokens
from lookup_vit.train_step import Program

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")

# What each wants to be installed.
FORMATS = {
  "stablehlo": ("safetensors",),
  "safetensors": ("safetensors",),
}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_PLATFORMS = ("cpu", "cuda", "tpu")

# What says that a directory is an export, and what of.
FILE = "export.json"

# Of |a - b| of an output, over the greatest |b| of it, or over one.
TOLERANCE = 1e-4

# Batches that a program of any is compared on.
_BATCHES = (1, 3)

# Files of a work directory that go with its parameters, where it has them.
_BESIDE = ("classes.json", "tokenizer.model")


def export(
  workdir: str,
  format: str,
  output: str,
  *,
  grids: Sequence[tokens.Grid] | None = None,
  batch_size: int | None = None,
  platforms: Sequence[str] | None = None,
  step: int | None = None,
  overwrite: bool = False,
) -> float:
  """Exports a run's model.

  Args:
    workdir: of the run.
    format: one of `FORMATS`.
    output: the directory to make, on this machine.
    grids: compressed grids; those of training where none are given.
    batch_size: of the programs; None for any.
    platforms: some of `PLATFORMS`, for "stablehlo"; cpu, cuda and tpu where
      none are given.
    step: of a checkpoint; the newest where none is given.
    overwrite: whether an export that is there is replaced.

  Returns:
    The largest difference that was found, as `TOLERANCE` has it.

  Raises:
    ValueError: an argument that cannot work, a run that is not to be had in
      this format; or what was written does not compute what the model does.
  """
  # What can be wrong is found first.
  config = config_utils.read_workdir(workdir)
  _check_format(config, format)
  if format == "safetensors":
    given = dict(grid=grids, batch_size=batch_size, platforms=platforms)
    for name, value in given.items():
      if value is not None:
        raise ValueError(f"--{name}: safetensors holds parameters, no program.")
  if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
    raise ValueError(f"batch_size={batch_size!r}: want an integer >= 1.")
  _check_platforms(platforms or _PLATFORMS)
  _check_output(output, overwrite)
  checkpoints.check(workdir, step)
  with _on_cpu() as device:
    if format != "safetensors":
      config.mesh, config.sharding = [("data", -1)], "replicated"
      program = Program(config, config.total_steps, [device])
      grids = _check_grids(program, grids)
    sharding = jax.sharding.SingleDeviceSharding(device)
    params, step, saved = checkpoints.load_params(workdir, step, sharding)
    log.info("Step %d of %s.", step, workdir)
    with _made(output) as folder:
      if format == "safetensors":
        export_safetensors.write(folder, params, step)
        checkpoints.write_config(folder, saved)
        worst = _check_params(folder, params)
        _write_note(folder, format, step)
      else:
        worst = _write_programs(
          *(folder, format, program, params, step),
          *(grids, batch_size, platforms or _PLATFORMS),
        )
      _copy_beside(workdir, folder)
  return worst


def load_safetensors(path: str) -> tuple[ml_collections.ConfigDict, Any]:
  """What `--format=safetensors` wrote: the config, and the parameters.

  Args:
    path: the directory.

  Returns:
    The resolved config, and the model's parameters, nested, of NumPy.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  params, _, config = export_safetensors.load(path)
  return config, params


def _check_format(config, format):
  if format not in FORMATS:
    raise ValueError(f"format={format!r}: want one of {', '.join(FORMATS)}.")
  for package in FORMATS[format]:
    if importlib.util.find_spec(package) is None:
      raise ValueError(
        f"--format={format} wants the package {package}: pip install "
        "'lookup_vit[export]'."
      )
  if format != "safetensors" and config.task != "classification":
    raise ValueError(
      f"config.task={config.task!r}: {format} is of classifiers alone. Of a "
      "captioner there is --format=safetensors."
    )


def _check_platforms(platforms):
  unknown = sorted(set(platforms) - set(PLATFORMS))
  if unknown or len(set(platforms)) < len(platforms):
    raise ValueError(
      f"--platforms={','.join(platforms)}: want some of "
      f"{', '.join(PLATFORMS)}, each once."
    )


def _check_output(output, overwrite):
  path = pathlib.Path(output).expanduser()
  if not output or "://" in output or not path.resolve().parent.is_dir():
    raise ValueError(
      f"output={output!r}: want a path on this machine, in a directory there "
      "is."
    )
  if not path.exists() and not path.is_symlink():
    return
  if not (path / FILE).is_file():
    raise ValueError(f"output={output!r} is there already, and is no export.")
  if not overwrite:
    raise ValueError(
      f"output={output!r} is there already: --overwrite replaces it."
    )


def _check_grids(program, grids):
  if grids is None:
    return program.grids
  if program.grids == [None]:
    raise ValueError("--grid: the model has no compressed grid.")
  if not grids or len(set(grids)) < len(grids):
    given = ",".join(map(config_utils.format_grid, grids))
    raise ValueError(f"--grid={given}: want grids, each of them once.")
  size = program.config.input.image_size
  model = getattr(program.model, "encoder", program.model)
  grids = [tokens.check_grid(g, model.lookup_grid(size)) for g in grids]
  new = [config_utils.format_grid(g) for g in grids if g not in program.grids]
  if new:
    trained = ", ".join(map(config_utils.format_grid, program.grids))
    log.info("The run was not trained at %s, only at %s.", *new, trained)
  return grids


@contextlib.contextmanager
def _on_cpu() -> Iterator[jax.Device]:
  """Computes on the CPU, which multiplies float32 as such; the device."""
  try:
    device = jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    raise ValueError(
      "An export is compared on the CPU, which JAX_PLATFORMS="
      f"{os.environ.get('JAX_PLATFORMS')} leaves out: add cpu to it."
    ) from None
  with jax.default_device(device):
    yield device


@contextlib.contextmanager
def _made(output: str) -> Iterator[str]:
  """A directory to fill, which then has the name `output`, or never."""
  path = pathlib.Path(output).expanduser().absolute()
  beside = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
  with beside as folder:
    new = pathlib.Path(folder) / "new"
    new.mkdir()
    yield str(new)
    if path.exists():
      path.rename(pathlib.Path(folder) / "old")
    new.rename(path)


def _write_programs(
  folder, format, program, params, step, grids, batch_size, platforms
):
  """Writes the programs and runs them; returns the largest difference."""
  functions = export_programs.functions(program, grids)
  flat = export_programs.by_name(params)
  size = program.config.input.image_size
  images = export_programs.images_shape(batch_size, size)
  export_stablehlo.write(folder, functions, flat, step, images, platforms)
  run = export_stablehlo.load(folder)
  batches = _BATCHES if batch_size is None else (batch_size,)
  worst = 0.0
  for name, grid in export_programs.names(grids).items():
    wanted = jax.jit(export_programs.reference(program, grid))
    for batch in batches:
      given = random_images(batch, size)
      want = wanted(params, export_programs.scale(given))
      found = difference(run(name, given), want)
      log.info("%s, batch %d: largest difference %.1e.", name, batch, found)
      worst = max(worst, check(f"{name}, batch {batch}", found))
  outputs = jax.eval_shape(functions[name], flat, images)
  _write_note(
    *(folder, format, step),
    programs=list(functions),
    platforms=list(platforms),
    images=_described(images),
    outputs={name: _described(x) for name, x in outputs.items()},
    largest_difference=worst,
  )
  return worst


def random_images(batch: int, image_size: Sequence[int]) -> np.ndarray:
  """uint8 `[batch, *image_size, 3]`, each time the same."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (batch, *image_size, 3), np.uint8)


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


def _check_params(folder, params):
  found, _, _ = export_safetensors.load(folder)
  if not export_safetensors.same(found, params):
    raise ValueError("What was written differs from the parameters.")
  return 0.0


def _described(x):
  shape = [n if isinstance(n, int) else str(n) for n in x.shape]
  return {"dtype": x.dtype.name, "shape": shape}


def _write_note(folder, format, step, **more):
  """Writes what an export is, for people and programs, into it."""
  packages = ("jax", "flax", *FORMATS[format])
  versions = {name: metadata.version(name) for name in packages}
  note = dict(format=format, step=step, versions=versions) | more
  path = pathlib.Path(folder) / FILE
  path.write_text(json.dumps(note, indent=2) + "\n")


def _copy_beside(workdir, folder):
  for name in _BESIDE:
    path = config_utils.workdir_path(workdir) / name
    if path.exists():
      (pathlib.Path(folder) / name).write_bytes(path.read_bytes())


def main(argv):
  """Exports by the flags."""
  del argv
  grids = batch_size = None
  if FLAGS.grid is not None:
    with config_utils.at_fault("--grid"):
      grids = [config_utils.parse_grid(text) for text in FLAGS.grid]
  if FLAGS.batch_size not in (None, "any"):
    if not FLAGS.batch_size.isdecimal():
      raise ValueError(f"--batch_size={FLAGS.batch_size}: want 8, say, or any.")
    batch_size = int(FLAGS.batch_size)
  worst = export(
    *(FLAGS.workdir, FLAGS.format, FLAGS.output),
    grids=grids,
    batch_size=batch_size,
    platforms=FLAGS.platforms,
    step=FLAGS.step,
    overwrite=FLAGS.overwrite,
  )
  print(
    f"Written: {FLAGS.output} (largest difference {worst:.1e}, at most "
    f"{TOLERANCE:.0e})"
  )


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Of a training run.", required=True)
  flags.DEFINE_enum("format", None, FORMATS, "What to write.", required=True)
  flags.DEFINE_string("output", None, "The directory to make.", required=True)
  flags.DEFINE_list(
    "grid", None, "Compressed grids, as 3x3,5x5; the run's if not set."
  )
  flags.DEFINE_string("batch_size", None, "A number, or any, the default.")
  flags.DEFINE_list(
    "platforms", None, f"Some of {','.join(PLATFORMS)}, for stablehlo."
  )
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
  flags.DEFINE_bool("overwrite", False, "Replace an export that is there.")
  cli.run(main)
