r"""Images (or clips) a second of LookupViT and ViT, trained and in use.

    python -m benchmarks.throughput --variant=B/16 --sizes=224,384 \
        --grids=3x3,5x5,7x7,10x10 --batch_sizes=8 --output=DIR
    python -m benchmarks.throughput --variant=B/2x16 --frames=32 --sizes=224 \
        --grids=8x3x3 --batch_sizes=1 --kinds=inference,train

Random parameters, random images, 1000 classes. Measured are all combinations of
image sizes, batch sizes, kinds, dtypes, and models: LookupViT at each grid with
each `--mhbc` (`models/mhbc.py`), ViT with each `--attention`
(`models/attention.py`). All run in turn, over and over in one run; a ratio is
of one round.

    speed-up  by how much less time than ViT, the fastest of those measured at
              the same sizes, kind and dtype
    FLOPs     of a forward pass with MHBC as the paper has it; and as executed.
              A training step counts as three of them
    of peak   executed FLOPs a second of a device, over those of a product of
              two large matrices of the same dtype, measured on the first
              device in the same rounds
    memory    of a program: arguments, results and temporaries
    first     seconds from nothing compiled to the end of the first step, and
              how much of them was compilation; no compiled programs are kept

A training step is that of `configs/in1k_vit_b.py` or `in1k_lookup_b.py`
(`train_step.py`) without mixup: gradients, clipping and Adam. `--output` keeps
a table (Markdown), all that was measured (JSON), and plots of speed-up against
the image size with the paper's FLOPs beside them.
"""

import dataclasses
import functools
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
from absl import flags
from etils import epath

from benchmarks import cases, timing
from benchmarks.cases import Place, Way
from lookup_vit import cli, parallel, train_step
from lookup_vit.analysis import flops
from lookup_vit.models import tokens

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAGS = flags.FLAGS

_LOG = logging.getLogger("lookup_vit")

_STEPS = 1_000_000  # Of the schedule of training: none comes near its end.


class _Models:
  """Programs by place and way; parameters and train states are shared."""

  def __init__(self, variant: str, fields: Mapping[str, Any]):
    self._variant, self._fields = variant, fields
    self._params, self._states, self._batches = {}, {}, {}

  def program(self, place: Place, way: Way) -> train_step.Program:
    config = cases.config(place, way, self._variant, self._fields)
    return train_step.Program(config, _STEPS)

  def compile(self, place, way) -> tuple[Callable[[], Any], Any, float]:
    """A function that runs a step, its program, and seconds of compiling."""
    program = self.program(place, way)
    batch = self._batch(program, place)
    key = way.grid is None, place.image_size
    if place.kind == "inference":
      apply = program.compile(
        lambda params, batch: program.apply(params, batch, way.grid)[0],
        None,
      )
      if key not in self._params:
        self._params[key] = program.init_state().params
      params = self._params[key]
      compiled, seconds = _compile(apply, params, batch)
      return functools.partial(compiled, params, batch), compiled, seconds
    if key not in self._states:
      self._states[key] = program.init_state()
    state = self._states[key]
    compiled, seconds = _compile(program.update_step, state, batch, way.grid)

    def step():
      # The state was given away with the step before.
      self._states[key], scalars = compiled(self._states[key], batch)
      return scalars

    return step, compiled, seconds

  def _batch(self, program, place):
    key = place.image_size, place.batch
    if key not in self._batches:
      shapes = program.task.batch_shapes(place.batch)
      batch = {
        name: jax.random.uniform(jax.random.key(0), x.shape, x.dtype, -1)
        if name == "image"
        else jnp.zeros(x.shape, x.dtype)
        for name, x in shapes.items()
      }
      self._batches[key] = parallel.put_batch(batch, program.mesh)
    return self._batches[key]


def _compile(function, *args):
  """A compiled program, and seconds of tracing and compiling."""
  start = time.perf_counter()
  compiled = function.lower(*args).compile()
  return compiled, time.perf_counter() - start


def benchmark(
  variant: str,
  image_sizes: Sequence[tuple[int, ...]],
  grids: Sequence[tokens.Grid],
  *,
  kinds: Sequence[str] = ("inference",),
  batches: Sequence[int] = (8,),
  dtypes: Sequence[str] = ("float32",),
  mhbc: Sequence[str] = ("auto",),
  attention: Sequence[str] = ("auto",),
  rounds: int = 5,
  **fields: Any,
) -> dict[str, Any]:
  """Measures ViT and LookupViT.

  Args:
    variant: of both models, such as "B/16".
    image_sizes: (rows, columns), or (time, rows, columns), in pixels.
    grids: compressed grids.
    kinds: of `cases.KINDS`.
    batches: numbers of images or clips.
    dtypes: of the computation.
    mhbc: values of a LookupViT's `mhbc_impl`.
    attention: values of a ViT's `attention`.
    rounds: number of measurements of each.
    **fields: of both models, such as `depth` or `remat_policy`.

  Returns:
    Plain values by name. `rows` has one for each combination: what it is of,
    `gflops` and `executed_gflops` of an image, `seconds` of a batch in each
    round, `speedups` over the fastest ViT, `of_peak`, `bytes`, `first` and
    `compilation` in seconds; `peaks`, FLOP/s of matrix products by dtype, in
    each round; `device_peak_bytes`.

  Raises:
    ValueError: a number, variant or name that does not work, or a size or grid
      that does not fit.
  """
  timing.check_numbers(rounds=rounds)
  places, ways = cases.product(
    *(kinds, image_sizes, batches, dtypes), grids, mhbc, attention
  )
  models = _Models(variant, fields)
  for place, way in itertools.product(places, ways):
    models.program(place, way)  # What cannot work is said before all else.

  run, rows = {}, {}
  for place, way in itertools.product(places, ways):
    step, compiled, compilation = models.compile(place, way)
    start = time.perf_counter()
    jax.block_until_ready(step())
    first = compilation + time.perf_counter() - start
    _LOG.info("%s; %s: first step after %.0f s.", place, way, first)
    model = models.program(place, way).model
    cost = flops.cost(model, place.image_size, way.grid)
    times = {"inference": 1e-9, "train": 3e-9}[place.kind]
    run[place, way] = step
    rows[place, way] = {
      **dataclasses.asdict(place),
      **way.names(),
      "gflops": times * cost.xla_flops,
      "executed_gflops": times * cost.executed_xla_flops,
      "bytes": timing.program_bytes(compiled),
      "first": first,
      "compilation": compilation,
    }
  products = {dtype: timing.matmul(dtype) for dtype in dtypes}
  run |= {dtype: multiply for dtype, (multiply, _) in products.items()}
  seconds = timing.in_turn(run, rounds)

  peaks = {
    dtype: [count / s for s in seconds[dtype]]
    for dtype, (_, count) in products.items()
  }
  for (place, way), row in rows.items():
    mine = seconds[place, way]
    of_vit = [seconds[place, other] for other in ways if other.grid is None]
    executed = 1e9 * row["executed_gflops"] * place.batch / jax.device_count()
    row["seconds"] = mine
    row["speedups"] = timing.ratios(min(of_vit, key=statistics.median), mine)
    row["of_peak"] = [
      executed / s / peak
      for s, peak in zip(mine, peaks[place.dtype], strict=True)
    ]
  return {
    "variant": variant,
    "fields": fields,
    "rounds": rounds,
    "rows": list(rows.values()),
    "peaks": peaks,
    "device_peak_bytes": timing.device_peak_bytes(),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
  }


def table(result: Mapping[str, Any]) -> str:
  """A table, in Markdown, of what `benchmark` returned."""
  fields = ", ".join(f"{k} {v}" for k, v in result["fields"].items())
  peaks = ", ".join(
    f"{statistics.median(rates) / 1e9:.0f} GFLOP/s in {dtype}"
    for dtype, rates in result["peaks"].items()
  )
  lines = [
    f"{result['variant']}{', ' * bool(fields)}{fields} on {result['devices']} "
    f"{result['device']} (jax {result['jax']}), matrix products {peaks}; "
    f"medians of {result['rounds']} rounds, and the spread of speed-ups.",
    "",
    "| kind | image | batch | dtype | model | GFLOPs | executed | ms an image "
    "| images/s | speed-up | of peak | MiB | first step, s |",
    "|" + "---|" * 13,
  ]
  for row in result["rows"]:
    middle = statistics.median(row["seconds"])
    cells = [
      *(
        row["kind"],
        cases.size_text(row["image_size"]),
        str(row["batch"]),
        row["dtype"],
        row["model"],
      ),
      *(timing.short(row["gflops"]), timing.short(row["executed_gflops"])),
      timing.short(1e3 * middle / row["batch"]),
      timing.short(row["batch"] / middle),
      timing.spread(row["speedups"]),
      f"{statistics.median(row['of_peak']):.2f}",
      "-" if row["bytes"] is None else timing.short(row["bytes"] / 2**20),
      f"{row['first']:.1f} ({row['compilation']:.1f} compiling)",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  if result["device_peak_bytes"] is not None:
    peak = result["device_peak_bytes"] / 2**20
    lines += ["", f"The device held {peak:.0f} MiB at most."]
  return "\n".join(lines)


def plot(result: Mapping[str, Any], path: str) -> None:
  """Draws speed-ups over the image size, and the paper's ratios of FLOPs.

  A panel for each kind, batch and dtype.
  """
  panels: dict[Any, dict[Any, list[Mapping[str, Any]]]] = {}
  for row in result["rows"]:
    panel = panels.setdefault((row["kind"], row["batch"], row["dtype"]), {})
    panel.setdefault((row["grid"], row["impl"]), []).append(row)
  figure, axes = plt.subplots(
    *(1, len(panels)),
    figsize=(1 + 4 * len(panels), 3.8),
    layout="constrained",
    squeeze=False,
  )
  for axis, (place, lines) in zip(axes[0], panels.items(), strict=True):
    of_vit = {
      tuple(row["image_size"]): row["gflops"]
      for (grid, _), rows in lines.items()
      for row in rows
      if grid is None
    }
    colors = {}
    for (grid, _), rows in lines.items():
      if grid is None:
        continue
      rows = sorted(rows, key=lambda row: row["image_size"])
      sizes = [row["image_size"][-1] for row in rows]
      new = grid not in colors
      color = colors.setdefault(grid, f"C{len(colors)}")
      speedups = [statistics.median(row["speedups"]) for row in rows]
      axis.plot(sizes, speedups, "o-", color=color, label=rows[0]["model"])
      if new:
        paper = [
          of_vit[tuple(row["image_size"])] / row["gflops"] for row in rows
        ]
        label = f"{grid}, FLOPs in the paper"
        axis.plot(sizes, paper, "x:", color=color, label=label)
    axis.axhline(1, color="k", linestyle="--", linewidth=1)
    axis.set_xticks(sorted({size[-1] for size in of_vit}))
    axis.set_xlabel("image size (pixels)")
    axis.set_ylabel("times as fast as ViT")
    axis.set_ylim(bottom=0)
    axis.set_title("{}, batch {}, {}".format(*place), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
  figure.suptitle(f"{result['variant']} on {result['device']}", fontsize=9)
  with epath.Path(path).open("wb") as f:
    figure.savefig(f, dpi=150, format="png")
  plt.close(figure)


def main(argv):
  """Measures by the flags and prints the table."""
  del argv
  timing.check_output(FLAGS.output)
  jax.config.update("jax_enable_compilation_cache", False)
  result = benchmark(FLAGS.variant, rounds=FLAGS.rounds, **cases.from_flags())
  print(table(result))
  if FLAGS.output:
    timing.write(result, FLAGS.output, "throughput", table, plot)


if __name__ == "__main__":
  cases.define_flags(sizes="224,384", batch_sizes="8", dtypes="float32")
  flags.DEFINE_integer("rounds", 5, "Measurements of each.")
  flags.DEFINE_string("output", None, "Directory for table, JSON and plot.")
  cli.run(main)
