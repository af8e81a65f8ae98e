r"""LookupViT and ViT compiled for TPUs that are not here: how fast they can be.

    python -m benchmarks.pod --topology=v5e:2x2 --variant=B/16 \
        --sizes=224,384 --grids=3x3,5x5,7x7,10x10 --batch_sizes=128 \
        --kinds=inference,train --output=DIR

As `throughput.py`, of which it has the flags, but nothing is computed: of each
combination a chip's step is compiled as `lookup_vit/dryrun.py` does, with
`--batch_sizes` examples for each chip. Compared with ViT at the same sizes are

    FLOPs        as executed, by XLA's count; a kernel's as it states them
    bytes        read and written, by XLA's count with the compiler at low
                 effort, which keeps few arrays in a fast memory; a kernel's are
                 its arguments and results, each once
    full effort  the same at the effort of a run, which copies arrays to a fast
                 memory and back: XLA counts copies, and what is read there
    main memory  of these what is of the chip's main memory
    temporaries  of the compiled step
    roofline     the longest of FLOPs, bytes and what is sent to other chips,
                 over the chip's peaks
    compiling    tracing too: how long it takes here, at the effort of a run

TPUs want libtpu (`pip install '.[tpu]'`). `--output` keeps a table (Markdown)
and all that was found (JSON).
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import cases, timing
from lookup_vit import cli, dryrun
from lookup_vit.analysis import chips, steps
from lookup_vit.models import tokens

FLAGS = flags.FLAGS

_LOG = logging.getLogger("lookup_vit")

_STEPS = {"inference": "evaluation", "train": "train"}
# Values by name: their unit, and whether they are of an image.
_COLUMNS = {
  "flops": (1e9, True),
  "bytes": (1e6, True),
  "full_bytes": (1e6, True),
  "main_bytes": (1e6, True),
  "temporaries": (2**20, False),
  "seconds": (1e-3, False),
  "compilation": (1, False),
}


def benchmark(
  topology: str,
  variant: str,
  image_sizes: Sequence[tuple[int, ...]],
  grids: Sequence[tokens.Grid],
  *,
  kinds: Sequence[str],
  batches: Sequence[int],
  dtypes: Sequence[str],
  mhbc: Sequence[str] = ("auto",),
  attention: Sequence[str] = ("auto",),
  **fields: Any,
) -> dict[str, Any]:
  """Compiles all combinations; the arguments are as of `throughput.benchmark`.

  Args:
    topology: such as "v5e:2x2".
    variant: of both models, such as "B/16".
    image_sizes: (rows, columns), or (time, rows, columns), in pixels.
    grids: compressed grids.
    kinds: of `cases.KINDS`.
    batches: numbers of images or clips for each chip.
    dtypes: of the computation.
    mhbc: values of a LookupViT's `mhbc_impl`.
    attention: values of a ViT's `attention`.
    **fields: of both models.

  Returns:
    Plain values by name. `rows` has one for each combination: what it is of,
    and for a chip `flops`, `bytes`, at full effort `full_bytes` and of these
    `main_bytes`, `temporaries`, `seconds` of the roofline, None where the
    chip's peaks are not known, and `compilation` in seconds; and of each of
    these `of_vit`, by the least of the ViTs at the same place.

  Raises:
    ValueError: as of `throughput.benchmark`, there is no such topology, a step
      wants more memory than a chip has, or attention in chunks: a loop, of
      which XLA would count one turn.
  """
  if "chunked" in attention:
    raise ValueError("--attention=chunked: want others, chunks are for CPUs.")
  places, ways = cases.product(
    *(kinds, image_sizes, batches, dtypes), grids, mhbc, attention
  )
  chip, devices = chips.chip(topology), chips.devices(topology)
  made = {}
  for place, way in itertools.product(places, ways):
    whole = dataclasses.replace(place, batch=place.batch * len(devices))
    config = steps.prepare(cases.config(whole, way, variant, fields), None)
    config.evals = {}
    made[place, way] = config, steps.make_program(config, devices)
  rows = {}
  for (place, way), (config, program) in made.items():
    _LOG.info("%s; %s", place, way)
    start = time.perf_counter()
    step = steps.measure(program, _STEPS[place.kind], way.grid)
    compilation = time.perf_counter() - start
    if step.memory.refused:
      raise ValueError(
        f"{place}; {way}: wants {dryrun.size_text(step.memory.total)} of "
        f"{dryrun.size_text(chip.memory)}. Set a smaller --batch_sizes."
      )
    kind = _STEPS[place.kind]
    step.cost = steps.count(config, devices, kind, way.grid)
    full = steps.count(config, devices, kind, way.grid, quick=False)
    best = dryrun.roofline(step, chip, config)
    rows[place, way] = {
      **dataclasses.asdict(place),
      **way.names(),
      "flops": step.cost["flops"],
      "bytes": step.cost["bytes accessed"],
      "full_bytes": full["bytes accessed"],
      "main_bytes": full["main memory"],
      "temporaries": step.memory.parts["temporaries"],
      "seconds": best and best.seconds,
      "bound": best and best.bound,
      "compilation": compilation,
    }
  for (place, _), row in rows.items():
    of_vit = [rows[place, way] for way in ways if way.grid is None]
    row["of_vit"] = {
      name: row[name] and row[name] / min(other[name] for other in of_vit)
      for name in _COLUMNS
    }
  return {
    "topology": topology,
    "variant": variant,
    "fields": fields,
    "rows": list(rows.values()),
    "jax": jax.__version__,
  }


def table(result: Mapping[str, Any]) -> str:
  """A table, in Markdown, of what `benchmark` returned."""
  fields = ", ".join(f"{k} {v}" for k, v in result["fields"].items())
  lines = [
    f"{result['variant']}{', ' * bool(fields)}{fields}, compiled for "
    f"{result['topology']} (jax {result['jax']}); a chip's share, and in "
    "brackets the ratio to ViT.",
    "",
    "| kind | image | a chip | dtype | model | GFLOP an image | MB an image "
    "| at full effort | of main memory | temporaries, MiB | roofline, ms "
    "| compiling, s | bound |",
    "|" + "---|" * 13,
  ]
  for row in result["rows"]:
    cells = [row["kind"], cases.size_text(row["image_size"])]
    cells += [str(row["batch"]), row["dtype"], row["model"]]
    for name, (unit, of_image) in _COLUMNS.items():
      if row[name] is None:
        cells.append("-")
        continue
      value = row[name] / unit / (row["batch"] if of_image else 1)
      cells.append(f"{value:.4g} ({row['of_vit'][name]:.2f})")
    lines.append(f"| {' | '.join([*cells, row['bound'] or '-'])} |")
  return "\n".join(lines)


def main(argv):
  """Compiles by the flags and prints the table."""
  del argv
  timing.check_output(FLAGS.output)
  kind, shape = chips.parse(FLAGS.topology)
  chips.use_cpu(shape[0] if kind == "cpu" else 1)
  # What comes out of a cache says nothing of its memory.
  jax.config.update("jax_enable_compilation_cache", False)
  result = benchmark(FLAGS.topology, FLAGS.variant, **cases.from_flags())
  print(table(result))
  if FLAGS.output:
    timing.write(result, FLAGS.output, "pod", table)


if __name__ == "__main__":
  flags.DEFINE_string("topology", "v5e:2x2", "As of lookup_vit.dryrun.")
  cases.define_flags(sizes="224", batch_sizes="128", dtypes="bfloat16")
  flags.DEFINE_string("output", None, "Directory for table and JSON.")
  cli.run(main)
