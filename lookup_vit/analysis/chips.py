"""Devices that are not here, and what a chip of each kind can do."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

_GIB = 2**30
# Virtual devices of a CPU, each with threads of its own.
_MOST_CPU = 1024


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak numbers of a kind of chip; None where they are not known.

  Attributes:
    memory: bytes that a program may use of a chip's memory.
    flops: floating-point operations a second, of bfloat16 matrix products.
    hbm: bytes a second from and to memory.
    ici: bytes a second that a chip can send to its neighbours, over all links.
    source: where these numbers are from.
    rank: of the torus.
    pod: chips in the largest slice.
    options: what libtpu must be told to make the chip's topology.
  """

  memory: float
  flops: float | None = None
  hbm: float | None = None
  ici: float | None = None
  source: str = ""
  rank: int = 1
  pod: int = 0
  options: tuple[tuple[str, Any], ...] = ()


# Memory is what libtpu's compiler says that it has ("exceeds available HBM");
# the rest is Google's, where the bandwidth between chips counts both directions
# (half of it is sent). Of TPU v4 the pages leave that out; its paper has it.
_CHIPS = {
  "v4": Chip(
    memory=30.75 * _GIB,
    flops=275e12,
    hbm=1200e9,
    ici=300e9,
    source="https://cloud.google.com/tpu/docs/v4, arXiv:2304.01433",
    rank=3,
    pod=4096,
    # Both cores of a chip are one device.
    options=(("chip_config_name", "megacore"),),
  ),
  "v5e": Chip(
    memory=15.75 * _GIB,
    flops=197e12,
    hbm=819e9,
    ici=200e9,
    source="https://cloud.google.com/tpu/docs/v5e",
    rank=2,
    pod=256,
  ),
  "v5p": Chip(
    memory=95.74 * _GIB,
    flops=459e12,
    hbm=2765e9,
    ici=600e9,
    source="https://cloud.google.com/tpu/docs/v5p",
    rank=3,
    pod=8960,
  ),
  "v6e": Chip(
    memory=31.25 * _GIB,
    flops=918e12,
    hbm=1638e9,
    ici=400e9,
    source="https://cloud.google.com/tpu/docs/v6e",
    rank=2,
    pod=256,
  ),
}

# libtpu asks Google's metadata server, or these.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  # No chip is taken: several programs may plan at once.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
  """`"v5e:16x16"` to `("v5e", (16, 16))`, `"cpu:8"` to `("cpu", (8,))`.

  Raises:
    ValueError: it is of another form, or there is no such chip or slice.
  """
  match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", topology)
  kind = match[1] if match else None
  if kind not in ("cpu", *_CHIPS):
    raise ValueError(
      f"--topology={topology}: want CHIP:SIZE such as v5e:16x16, v5p:4x4x4 or "
      f"cpu:8, CHIP one of cpu, {', '.join(_CHIPS)}."
    )
  shape = tuple(int(n) for n in match[2].split("x"))
  rank = 1 if kind == "cpu" else _CHIPS[kind].rank
  if len(shape) != rank:
    example = f"{kind}:{'x'.join('4' * rank)}"
    raise ValueError(
      f"--topology={topology}: {kind} wants {rank} size(s), as {example}."
    )
  if kind == "cpu" and shape[0] > _MOST_CPU:
    raise ValueError(f"--topology={topology}: want at most cpu:{_MOST_CPU}.")
  if kind != "cpu" and math.prod(shape) > _CHIPS[kind].pod:
    raise ValueError(
      f"--topology={topology}: {math.prod(shape)} chips; the largest slice of "
      f"{kind} has {_CHIPS[kind].pod}."
    )
  return kind, shape


def chip(topology: str) -> Chip:
  """What a chip of a topology can do.

  The memory of a virtual CPU device is its share of this machine's.

  Raises:
    ValueError: there is no such topology.
  """
  kind, shape = parse(topology)
  if kind != "cpu":
    return _CHIPS[kind]
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return Chip(memory=memory / shape[0], source="this machine")


def use_cpu(count: int) -> None:
  """Has JAX compute on the CPU; call it before anything of JAX.

  Args:
    count: of virtual devices, at least.

  Raises:
    ValueError: JAX has started with fewer.
  """
  # On a TPU VM too: the chips there are not taken.
  jax.config.update("jax_platforms", "cpu")
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    if jax.local_device_count("cpu") < count:
      raise ValueError(
        f"cpu:{count} wants a process of its own: JAX has started here, with "
        f"{jax.local_device_count('cpu')} device(s)."
      ) from None


def devices(topology: str) -> list[Any]:
  """The devices of a topology, to compile for; after `use_cpu`.

  Raises:
    ValueError: there is no such topology, or libtpu is not installed.
  """
  kind, shape = parse(topology)
  if kind == "cpu":
    return jax.devices("cpu")[: shape[0]]
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"--topology={topology} wants libtpu: pip install -c requirements.lock "
      "-e '.[tpu]'."
    )
  os.environ.update(_ENVIRONMENT)
  options = dict(_CHIPS[kind].options)
  if len(shape) == 2 and math.prod(shape) <= 8:
    # One host; those of larger slices have 2x2 chips.
    options["chips_per_host_bounds"] = (*shape, 1)
  from jax.experimental import topologies

  try:
    description = topologies.get_topology_desc(
      topology_name=topology, platform="tpu", **options
    )
  except jax.errors.JaxRuntimeError as e:
    raise ValueError(
      f"--topology={topology}: libtpu has no such slice: "
      f"{str(e).splitlines()[0]}"
    ) from None
  return list(description.devices)
