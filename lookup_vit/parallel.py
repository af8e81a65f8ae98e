"""The device mesh and how arrays lie on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(axes: Sequence[tuple[str, int]]) -> Mesh:
  """A mesh over all devices.

  Args:
    axes: names and sizes, such as `[("data", -1)]`; one -1 takes what is left.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or there is
      no axis "data".
  """
  count = jax.device_count()
  names = [name for name, _ in axes]
  sizes = [size for _, size in axes]
  if sizes.count(-1) == 1:
    rest = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = count // rest if rest else 0
  if math.prod(sizes) != count:
    raise ValueError(
      f"config.mesh={list(map(tuple, axes))} does not fit {count} device(s)."
    )
  if names != ["data"]:
    raise ValueError(f"config.mesh: want one axis 'data', got {names}.")
  # By process, as the input pipeline cuts a batch: its order is then the same
  # for any number of hosts.
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.asarray(devices).reshape(sizes), names)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device has the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 is split over the axis "data"."""
  return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(
  name: str, batch_size: int, mesh: Mesh, grad_accum_steps: int = 1
) -> None:
  """Raises ValueError where a global batch does not split over the devices."""
  if not isinstance(batch_size, int) or batch_size < 1:
    raise ValueError(f"{name}={batch_size!r}: want an integer >= 1.")
  count = mesh.shape["data"]
  if batch_size % (count * grad_accum_steps):
    accum = (
      f" x {grad_accum_steps} accumulation" if grad_accum_steps > 1 else ""
    )
    raise ValueError(
      f"{name}={batch_size} does not divide over {count} device(s){accum}: "
      f"want a multiple of {count * grad_accum_steps}."
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """This process's slices of a batch to global arrays over the mesh."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
