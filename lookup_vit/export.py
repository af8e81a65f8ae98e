r"""Writes a run's model for other programs, and checks what it wrote.

    python -m lookup_vit.export --workdir=WORKDIR --format=FORMAT --output=PATH

PATH becomes a directory. What it holds, by FORMAT:

  stablehlo    `GRID.stablehlo`, programs for `jax.export.deserialize`
  savedmodel   of TensorFlow, with signatures `images_GRID` and, on what JPEG
               and PNG files hold, `encoded_GRID`
  onnx         `GRID.onnx`, graphs for ONNX Runtime and others
  safetensors  the parameters, and `config.json`: no program

A program is of one compressed grid, since all shapes in it follow from the
grid: `3x3.onnx`, or `images_3x3`; of a model without grid, `model.onnx`, or
`images`. Programs share the parameters. They take uint8 images `[batch,
height, width, 3]` of the model's size, or clips, scale them, and compute in
float32. Which ones, and for what, can be chosen:

    --grid=3x3,5x5        compressed grids; those of the training by default
    --batch_size=8        a fixed one; any by default
    --platforms=cpu,cuda  of stablehlo and savedmodel
    --pp=OPS              of savedmodel, how encoded images are read; by
                          default as by the run's evaluator `val` or else `test`

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
from absl import flags

from lookup_vit import (
  checkpoints,
  cli,
  config_utils,
  params_file,
  predictor,
)
from lookup_vit.exports import classifier, compare, stablehlo
from lookup_vit.models import tokens
from lookup_vit.train_step import Program

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")

# What each wants to be installed.
FORMATS = {
  "stablehlo": ("safetensors",),
  "savedmodel": ("tensorflow",),
  "onnx": ("onnx", "onnxruntime", "safetensors"),
  "safetensors": ("safetensors",),
}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_BY_DEFAULT = ("cpu", "cuda", "tpu")

# Which formats a flag is of.
_FLAGS = dict(
  grid=("stablehlo", "savedmodel", "onnx"),
  batch_size=("stablehlo", "savedmodel", "onnx"),
  platforms=("stablehlo", "savedmodel"),
  pp=("savedmodel",),
)

# What says that a directory is an export, and what of.
FILE = "export.json"

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
  pp: str | None = None,
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
    platforms: some of `PLATFORMS`, for "stablehlo" and "savedmodel"; cpu, cuda
      and tpu where none are given.
    pp: op-string by which a "savedmodel" reads encoded images;
      that of `predictor.Predictor` where none is given.
    step: of a checkpoint; the newest where none is given.
    overwrite: whether an export that is there is replaced.

  Returns:
    The largest difference that was found, as `compare.TOLERANCE` has
    it.

  Raises:
    ValueError: an argument that cannot work, a run that is not to be had in
      this format; or what was written does not compute what the model does.
  """
  # What can be wrong is found first.
  config = config_utils.read_workdir(workdir)
  _check_format(config, format)
  given = dict(grid=grids, batch_size=batch_size, platforms=platforms, pp=pp)
  for name, value in given.items():
    if value is not None and format not in _FLAGS[name]:
      raise ValueError(
        f"--{name} is of {', '.join(_FLAGS[name])}, not of {format}."
      )
  if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
    raise ValueError(f"batch_size={batch_size!r}: want an integer >= 1.")
  _check_platforms(platforms or _BY_DEFAULT)
  _check_output(output, overwrite)
  if format != "safetensors":
    pp = _check_pp(config, format, pp)
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
        params_file.write(folder, params, step)
        checkpoints.write_config(folder, saved)
        worst = _check_params(folder, params)
        _write_note(folder, format, step)
      else:
        worst = _write_programs(
          *(folder, format, program, params, step),
          *(grids, batch_size, platforms or _BY_DEFAULT, pp),
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
  params, _, config = params_file.load(path)
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
  folder = path.absolute().parent
  is_there = folder.is_dir() and os.access(folder, os.W_OK)
  if not output or "://" in output or not is_there:
    raise ValueError(
      f"output={output!r}: want a path on this machine, in a directory that "
      "can be written to."
    )
  if not path.exists() and not path.is_symlink():
    return
  if not (path / FILE).is_file():
    raise ValueError(f"output={output!r} is there already, and is no export.")
  if not overwrite:
    raise ValueError(
      f"output={output!r} is there already: --overwrite replaces it."
    )


def _check_pp(config, format, pp):
  """How encoded images are to be read; None where none are.

  Raises:
    ValueError: the run reads images by other values than `scale` makes, or the
      op-string cannot be of this format.
  """
  from lookup_vit.preprocess import registry

  size = config.input.image_size
  encoded = format == "savedmodel" and len(size) == 2
  if pp is not None and not encoded:
    raise ValueError("--pp: clips are not read from files.")
  if pp is None and (encoded or config.evals):
    with config_utils.at_fault("--pp"):
      pp = config_utils.evaluation(config).pp_fn
    pp = predictor.with_resize(pp, size[-2:])
  if encoded:
    from lookup_vit.exports import savedmodel

    savedmodel.reader(pp, size)
  for call in registry.calls(pp or "", "value_range"):
    call.apply_defaults()
    found = [call.arguments[k] for k in ("vmin", "vmax", "in_min", "in_max")]
    if found != [-1, 1, 0, 255]:
      raise ValueError(
        f"{pp!r}: images are scaled to [-1, 1] in an export, from [0, 255]: "
        "want value_range(-1,1)."
      )
  return pp if encoded else None


def _check_grids(program, grids):
  if grids is None:
    return program.grids
  if program.grids == [None]:
    raise ValueError("--grid: the model has no compressed grid.")
  if not grids or len(set(grids)) < len(grids):
    given = ",".join(map(config_utils.format_grid, grids))
    raise ValueError(f"--grid={given}: want grids, each of them once.")
  size = program.config.input.image_size
  lookup_grid = program.model.lookup_grid(size)
  grids = [tokens.check_grid(grid, lookup_grid) for grid in grids]
  new = [config_utils.format_grid(g) for g in grids if g not in program.grids]
  if new:
    trained = ", ".join(map(config_utils.format_grid, program.grids))
    given = ", ".join(new)
    log.info("The run was not trained at %s, only at %s.", given, trained)
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
  folder, format, program, params, step, grids, batch_size, platforms, pp
):
  """Writes the programs and runs them; returns the largest difference."""
  functions = classifier.functions(program, grids)
  flat = classifier.by_name(params)
  size = program.config.input.image_size
  images = classifier.images_shape(batch_size, size)
  note = dict(programs=list(functions), images=_described(images))
  if format == "onnx":
    from lookup_vit.exports import onnx as part

    part.write(folder, functions, flat, step, images)
  elif format == "savedmodel":
    from lookup_vit.exports import savedmodel as part

    read = part.reader(pp, size) if pp else None
    part.write(folder, functions, flat, images, platforms, read)
    note |= dict(platforms=list(platforms), pp=pp)
  else:
    part = stablehlo
    part.write(folder, functions, flat, step, images, platforms)
    note |= dict(platforms=list(platforms))
  worst = compare.compare(
    part.load(folder), program, params, grids, batch_size, pp
  )
  first, *_ = functions.values()
  outputs = jax.eval_shape(first, flat, images)
  note["outputs"] = {name: _described(x) for name, x in outputs.items()}
  _write_note(folder, format, step, **note, largest_difference=worst)
  return worst


def _check_params(folder, params):
  found, _, _ = params_file.load(folder)
  if not params_file.same(found, params):
    raise ValueError("What was written differs from the parameters.")
  return 0.0


def _described(x):
  return f"{x.dtype.name}[{','.join(map(str, x.shape))}]"


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
    pp=FLAGS.pp,
    step=FLAGS.step,
    overwrite=FLAGS.overwrite,
  )
  found = f"largest difference {worst:.1e}, at most {compare.TOLERANCE}"
  if FLAGS.format == "safetensors":
    found = "bit for bit"
  print(f"Written: {FLAGS.output} ({found})")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Of a training run.", required=True)
  flags.DEFINE_enum("format", None, FORMATS, "What to write.", required=True)
  flags.DEFINE_string("output", None, "The directory to make.", required=True)
  flags.DEFINE_list(
    "grid", None, "Compressed grids, as 3x3,5x5; the run's if not set."
  )
  flags.DEFINE_string("batch_size", None, "A number, or any, the default.")
  flags.DEFINE_list(
    "platforms",
    None,
    f"Some of {','.join(PLATFORMS)}; {','.join(_BY_DEFAULT)} if not set.",
  )
  flags.DEFINE_string("pp", None, "Op-string; the evaluator's if not set.")
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
  flags.DEFINE_bool("overwrite", False, "Replace an export that is there.")
  cli.run(main)
