r"""Parameters of a config's model, by module.

    python -m lookup_vit.analysis.parameters \
        --config=configs/in1k_lookup_b.py --depth=2

A row has the arrays below a path of at most `--depth` names, from the model's
own modules on, so that rows add up to the model; an array by itself has its
shape. Modules that differ in their number alone, and have arrays of the same
shapes, are one row, `encoderblock_0..11`. With `config.model.scan=True`, blocks
are stacked on the first axis of arrays.

From Python, `table(params)` is the same of any tree of arrays or of shapes,
such as `model.init(rng, images)["params"]`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from lookup_vit import cli, config_utils
from lookup_vit.analysis import steps

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Row:
  """The arrays below a path: how many, and their parameters together.

  `shape` is that of the arrays where each is at the path itself.
  """

  path: str
  arrays: int
  shape: tuple[int, ...] | None
  parameters: int


def rows(params: Any, depth: int) -> list[Row]:
  """Parameters summed to a depth.

  Args:
    params: nested mappings with arrays, or their shapes, as leaves.
    depth: at most so many names make a path; the rest is summed.

  Raises:
    ValueError: the depth is less than 1.
  """
  if depth < 1:
    raise ValueError(f"depth={depth}: want an integer >= 1.")
  groups = {}
  for path, (count, shape) in _merged(params).items():
    groups.setdefault(path[:depth], []).append((path, count, shape))
  found = []
  for group, arrays in groups.items():
    [(path, _, shape), *others] = arrays
    found.append(
      Row(
        "/".join(group),
        sum(count for _, count, _ in arrays),
        shape if path == group and not others else None,
        sum(count * math.prod(shape) for _, count, shape in arrays),
      )
    )
  return found


def _merged(tree):
  """By path, how many arrays there are and their shape; siblings are one."""
  if not isinstance(tree, Mapping):
    return {(): (1, tuple(tree.shape))}
  alike = {}
  for name, child in tree.items():
    stem, _, number = name.rpartition("_")
    arrays = tuple(_merged(child).items())
    key = (stem if number.isdecimal() else name, arrays)
    alike.setdefault(key, []).append(name)
  found = {}
  for (stem, arrays), names in alike.items():
    numbers = sorted(int(n.rpartition("_")[2]) for n in names if n != stem)
    first, count = min(numbers, default=0), len(names)
    if count > 1 and numbers == list(range(first, first + count)):
      times, names = count, [f"{stem}_{first}..{numbers[-1]}"]
    else:
      times = 1
    for name in names:
      for path, (number, shape) in arrays:
        found[(name, *path)] = (times * number, shape)
  return found


def table(params: Any, depth: int = 2) -> str:
  """`rows` in Markdown, with the share of each, and the sum."""
  found = rows(params, depth)
  total = sum(row.parameters for row in found)
  lines = [
    "| module | arrays | shape | parameters | share (%) |",
    "|---|---|---|---|---|",
  ]
  for row in found:
    shape = "-"
    if row.shape is not None:
      shape = config_utils.format_grid(row.shape) or "()"
    share = 100 * row.parameters / max(total, 1)
    lines.append(
      f"| {row.path} | {row.arrays} | {shape} | {row.parameters:,} "
      f"| {share:.1f} |"
    )
  arrays = sum(row.arrays for row in found)
  lines.append(f"| all | {arrays} | - | {total:,} | 100.0 |")
  return "\n".join(lines)


def main(argv):
  """Prints the table of a config."""
  del argv
  config = steps.prepare(config_utils.load(FLAGS.config), None)
  # By shapes, wherever the model may be meant for.
  config.mesh, config.sharding = [("data", -1)], "replicated"
  program = steps.make_program(config, jax.devices()[:1])
  print(table(program.state_shapes.params, FLAGS.depth))


if __name__ == "__main__":
  flags.DEFINE_string(
    "config", None, "configs/NAME.py[:key=value,...]", required=True
  )
  flags.DEFINE_integer("depth", 2, "Names of a path, at most.")
  cli.run(main)
