"""What the benchmarks of models share: measuring in turn, memory, peaks."""

import json
import logging
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

_LOG = logging.getLogger("lookup_vit")

# Rows of the matrices whose product is a machine's peak; of CPUs, and others.
_CPU_MATRIX, _MATRIX = 2048, 8192


def check_numbers(**numbers: int) -> None:
  """Raises ValueError for one that is less than 1."""
  for name, number in numbers.items():
    if number < 1:
      raise ValueError(f"{name}={number}: want at least 1.")


def in_turn(
  run: Mapping[Hashable, Callable[[], Any]], rounds: int
) -> dict[Hashable, list[float]]:
  """Measures functions in turn, over and over.

  A machine's speed changes while it is measured: a round has each function
  once, and the next begins with another, so that ratios within rounds are fair.

  Args:
    run: functions by name; what they return is waited for. Each is called once
      before the first round.
    rounds: how often each is measured.

  Returns:
    Seconds by name, of each round.
  """
  for function in run.values():
    jax.block_until_ready(function())
  seconds = {name: [] for name in run}
  order = list(run)
  for i in range(rounds):
    for name in order:
      start = time.perf_counter()
      jax.block_until_ready(run[name]())
      seconds[name].append(time.perf_counter() - start)
    _LOG.info("round %d of %d", i + 1, rounds)
    order = order[1:] + order[:1]
  return seconds


def ratios(seconds: Sequence[float], least: Sequence[float]) -> list[float]:
  """Of one list to another, round by round."""
  return [a / b for a, b in zip(seconds, least, strict=True)]


def spread(values: Sequence[float]) -> str:
  """The median, and from where to where."""
  middle = statistics.median(values)
  return f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"


def short(number: float) -> str:
  """Three digits, or all before the point."""
  return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def check_output(folder: str | None) -> None:
  """Makes the directory of `--output`.

  Raises:
    ValueError: there cannot be one.
  """
  if folder:
    try:
      epath.Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise ValueError(f"--output={folder}: {e.strerror or e}.") from e


def write(
  result: Mapping[str, Any],
  folder: str,
  name: str,
  table: Callable[[Mapping[str, Any]], str],
  plot: Callable[[Mapping[str, Any], Any], None] | None = None,
) -> None:
  """Writes `NAME.json`, its table `NAME.md`, and if any the plot `NAME.png`."""
  check_output(folder)
  path = epath.Path(folder).expanduser()
  (path / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
  (path / f"{name}.md").write_text(table(result) + "\n")
  if plot is not None:
    plot(result, path / f"{name}.png")


def program_bytes(compiled: Any) -> int | None:
  """Of arguments, results and temporaries; None where they are not told."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def device_peak_bytes() -> int | None:
  """The most that the first device held; None where it does not count."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def matmul(dtype: str) -> tuple[Callable[[], jax.Array], float]:
  """A product of large square matrices, and its FLOPs."""
  size = _CPU_MATRIX if jax.default_backend() == "cpu" else _MATRIX
  keys = jax.random.split(jax.random.key(0), 2)
  a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
  multiply = jax.jit(jnp.matmul)
  return lambda: multiply(a, b), 2.0 * size**3
