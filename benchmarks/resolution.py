r"""FLOPs, time and memory of inference against the image size (figure 1b).

    python -m benchmarks.resolution --variant=B/16 --sizes=224,288,384,512 \
        --grids=3x3,5x5,7x7,10x10 --output=DIR

ViT and LookupViT, both with random parameters and a classifier, of one size and
patch, at each image size and compressed grid (arXiv:2407.12753, figure 1b):

    FLOPs   XLA's count for an image, a multiply-add as two
    time    of a batch over its size; all are measured in turn, over and over in
            one run, and ratios to ViT are of one round
    memory  of a batch: arguments (parameters and images), results and
            temporaries, as the compiled program lays them out

ViT's attention is by default the fastest exact one of the platform
(`models/attention.py`, "auto"). Devices that count their memory say at the end
how much this process held at most, compilation included. `--output` keeps a
table (Markdown), all that was measured (JSON) and a plot.
"""

import functools
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
from absl import flags
from etils import epath

from benchmarks import timing
from lookup_vit import cli, config_utils
from lookup_vit.analysis import flops
from lookup_vit.models import lookup_vit, tokens, vit

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAGS = flags.FLAGS

_LOG = logging.getLogger("lookup_vit")

_CLASSES = 1000


def benchmark(
  variant: str,
  sizes: Sequence[int],
  grids: Sequence[tokens.Grid],
  *,
  batch: int,
  rounds: int,
  **fields: Any,
) -> dict[str, Any]:
  """Measures a ViT, and a LookupViT at compressed grids, at image sizes.

  Args:
    variant: of both models, "B/16".
    sizes: sides of square images in pixels.
    grids: compressed grids.
    batch: number of images.
    rounds: number of measurements of each.
    **fields: of both models, such as `dtype`.

  Returns:
    Plain values by name. `rows` has one for each image size, and of it for ViT
    (`grid` None) and each grid: `gflops` of an image, `seconds` of a batch in
    each round, `ratios` of these to ViT's at the same size, `bytes` of a batch;
    and `device_peak_bytes`, None on devices that do not count.

  Raises:
    ValueError: a number, variant or field that does not work, or a size or grid
      that does not fit.
  """
  timing.check_numbers(batch=batch, rounds=rounds)
  if not sizes:
    raise ValueError("Want at least one image size.")
  models = {
    None: vit.Model(_CLASSES, variant, **fields),
    **{
      grid: lookup_vit.Model(_CLASSES, variant, grid=grid, **fields)
      for grid in grids
    },
  }
  for size in sizes:
    lookup_grid = tokens.lookup_grid((size, size), models[None].patch_size)
    for grid in grids:
      tokens.check_grid(grid, lookup_grid)
  params = {}
  for kind in (vit.ViT, lookup_vit.LookupViT):
    of_kind = [model for model in models.values() if isinstance(model, kind)]
    if of_kind:
      params[kind] = _params(of_kind[0], sizes)
  run, rows = {}, {}
  for size in sizes:
    key = jax.random.key(size)
    images = jax.random.uniform(key, (batch, size, size, 3), minval=-1)
    for grid, model in models.items():
      args = params[type(model)][size], images
      start = time.perf_counter()
      compiled = _compile(model, *args)
      name = "ViT" if grid is None else config_utils.format_grid(grid)
      _LOG.info(
        "%s at %d: compiled in %.0f s.", name, size, time.perf_counter() - start
      )
      run[size, grid] = functools.partial(compiled, *args)
      rows[size, grid] = {
        "image_size": size,
        "grid": None if grid is None else name,
        "gflops": flops.cost(model, (size, size)).xla_flops / 1e9,
        "bytes": timing.program_bytes(compiled),
      }
  seconds = timing.in_turn(run, rounds)
  for (size, grid), row in rows.items():
    row["seconds"] = seconds[size, grid]
    row["ratios"] = timing.ratios(row["seconds"], seconds[size, None])
  return {
    "variant": variant,
    "fields": fields,
    "batch": batch,
    "rounds": rounds,
    "rows": list(rows.values()),
    "device_peak_bytes": timing.device_peak_bytes(),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
  }


def _params(model, sizes):
  """By image size; only positions are not the same ones."""
  init = functools.partial(model.init, jax.random.key(0))
  blank = [jnp.zeros((1, size, size, 3)) for size in sizes]
  first = jax.jit(init)(blank[0])["params"]
  params = {}
  for size, images in zip(sizes, blank, strict=True):
    shapes = jax.eval_shape(init, images)["params"]
    params[size] = jax.tree.map(
      lambda x, s: x if x.shape == s.shape else jnp.zeros(s.shape, s.dtype),
      first,
      shapes,
    )
  return params


def _compile(model, params, images):
  @jax.jit
  def logits(params, images):
    return model.apply({"params": params}, images)[0]

  return logits.lower(params, images).compile()


def _name(row):
  return "ViT" if row["grid"] is None else f"LookupViT {row['grid']}"


def _ms(result, row):
  """Of an image."""
  return 1e3 * statistics.median(row["seconds"]) / result["batch"]


def table(result: Mapping[str, Any]) -> str:
  """A table, in Markdown, of what `benchmark` returned."""
  fields = ", ".join(f"{k} {v}" for k, v in result["fields"].items())
  lines = [
    f"{result['variant']}{', ' * bool(fields)}{fields}, batches of "
    f"{result['batch']} on {result['device']} (jax {result['jax']}); time: "
    f"median of {result['rounds']} rounds, and the spread of the ratio.",
    "",
    "| image | model | GFLOPs | of ViT | ms an image | of ViT | MiB | of ViT |",
    "|---|---|---|---|---|---|---|---|",
  ]
  of_vit = {r["image_size"]: r for r in result["rows"] if r["grid"] is None}
  for row in result["rows"]:
    like = of_vit[row["image_size"]]
    memory = ["-", "-"]
    if row["bytes"] is not None:
      memory = [timing.short(row["bytes"] / 2**20)]
      memory.append(f"{row['bytes'] / like['bytes']:.2f}")
    cells = [
      str(row["image_size"]),
      _name(row),
      timing.short(row["gflops"]),
      f"{row['gflops'] / like['gflops']:.2f}",
      timing.short(_ms(result, row)),
      timing.spread(row["ratios"]),
      *memory,
    ]
    lines.append(f"| {' | '.join(cells)} |")
  if result["device_peak_bytes"] is not None:
    peak = result["device_peak_bytes"] / 2**20
    lines += ["", f"The device held {peak:.0f} MiB at most."]
  return "\n".join(lines)


def plot(result: Mapping[str, Any], path: str) -> None:
  """Draws FLOPs, time and memory over the image size, a line for each model."""
  figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
  panels = {
    "GFLOPs an image (multiply-add = 2)": lambda row: row["gflops"],
    "ms an image, median": lambda row: _ms(result, row),
    f"MiB of a batch of {result['batch']}": lambda row: (
      math.nan if row["bytes"] is None else row["bytes"] / 2**20
    ),
  }
  lines: dict[str, list[Mapping[str, Any]]] = {}
  for row in result["rows"]:
    lines.setdefault(_name(row), []).append(row)
  for axis, (title, value) in zip(axes, panels.items(), strict=True):
    for name, rows in lines.items():
      style = "ko--" if name == "ViT" else "o-"
      rows = sorted(rows, key=lambda row: row["image_size"])
      x = [row["image_size"] for row in rows]
      axis.plot(x, list(map(value, rows)), style, label=name, markersize=4)
    axis.set_xticks(sorted({row["image_size"] for row in result["rows"]}))
    axis.set_xlabel("image size (pixels)")
    axis.set_ylabel(title)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
  axes[0].legend(fontsize=8)
  figure.suptitle(f"{result['variant']} on {result['device']}", fontsize=9)
  with epath.Path(path).open("wb") as f:
    figure.savefig(f, dpi=150, format="png")
  plt.close(figure)


def main(argv):
  """Measures by the flags and prints the table."""
  del argv
  timing.check_output(FLAGS.output)
  try:
    sizes = [int(size) for size in FLAGS.sizes]
  except ValueError:
    raise ValueError(
      f"--sizes={','.join(FLAGS.sizes)}: want pixels such as 224,384."
    ) from None
  with config_utils.at_fault("--grids"):
    grids = [config_utils.parse_grid(grid) for grid in FLAGS.grids]
  result = benchmark(
    FLAGS.variant,
    sizes,
    grids,
    batch=FLAGS.batch_size,
    rounds=FLAGS.rounds,
    dtype=FLAGS.dtype,
    attention=FLAGS.attention,
  )
  print(table(result))
  if FLAGS.output:
    timing.write(result, FLAGS.output, "resolution", table, plot)


if __name__ == "__main__":
  flags.DEFINE_string("variant", "B/16", "Size and patch, such as S/16.")
  flags.DEFINE_list("sizes", "224,288,384,512", "Sides of images in pixels.")
  flags.DEFINE_list("grids", "3x3,5x5,7x7,10x10", "Compressed grids.")
  flags.DEFINE_integer("batch_size", 4, "Images at a time.")
  flags.DEFINE_integer("rounds", 5, "Measurements of each.")
  flags.DEFINE_string("dtype", "float32", "Of the computation.")
  flags.DEFINE_string("attention", "auto", "See models/attention.py.")
  flags.DEFINE_string("output", None, "Directory for table, JSON and plot.")
  cli.run(main)
