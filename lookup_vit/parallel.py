"""The device mesh, and how arrays lie on it.

A mesh has three axes, of size 1 where the config does not name them:

  data    batches are split over it
  fsdp    batches are, and under the strategies "fsdp", parameters too
  tensor  under the strategies "tensor", heads and hidden units of the MLPs are

The dimensions of arrays have logical names: parameters get theirs from their
paths (`_PARAMETERS`), activations from `layers.constrain`. A strategy maps
logical names to axes of the mesh.
"""

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lookup_vit import config_utils

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")

# By strategy, the axis of the mesh for a logical name. Of the names of one
# array, the first in this order takes an axis.
_TENSOR = (("heads", "tensor"), ("mlp", "tensor"))
_FSDP = tuple((name, "fsdp") for name in ("embed", "mlp", "heads", "classes"))
STRATEGIES = {
  "replicated": (),
  "fsdp": _FSDP,
  "tensor": _TENSOR,
  "fsdp_tensor": _TENSOR + _FSDP,
}

# Logical names of a parameter's last dimensions, by the end of its path; those
# before them (depth, where blocks are scanned; patch; grid) are not split.
_PARAMETERS = (
  (r"(query|key|value|value_back)/kernel", ("embed", "heads")),
  (r"(query|key|value|value_back)/bias", ("heads",)),
  (r"(out|out_back)/kernel", ("heads", "embed")),
  (r"dense_in/kernel", ("embed", "mlp")),
  (r"dense_in/bias", ("mlp",)),
  (r"dense_out/kernel", ("mlp", "embed")),
  (r"head(_\w+)?/kernel", ("embed", "classes")),
  (r"head(_\w+)?/bias", ("classes",)),
  (r"(query_norm|key_norm)/scale", (None,)),
  (r".*", ("embed",)),
)


def make_mesh(
  axes: Sequence[tuple[str, int]], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over devices.

  Args:
    axes: names and sizes, such as `[("data", -1), ("tensor", 4)]`; one -1 takes
      what is left, and an axis that is not named has the size 1.
    devices: all there are by default.

  Raises:
    ValueError: an unknown axis, sizes that do not multiply to the number of
      devices, or a "tensor" that does not fit into a host.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  given = f"config.mesh={list(map(tuple, axes))}"
  sizes = dict(axes)
  if len(sizes) < len(axes) or set(sizes) - set(AXES):
    raise ValueError(f"{given}: want each of {', '.join(AXES)} at most once.")
  if list(sizes.values()).count(-1) == 1:
    rest = math.prod(s for s in sizes.values() if s != -1)
    fill = count // rest if rest > 0 else 0
    sizes = {name: fill if s == -1 else s for name, s in sizes.items()}
  shape = [sizes.get(name, 1) for name in AXES]
  if min(shape) < 1 or math.prod(shape) != count:
    raise ValueError(f"{given} does not fit {count} device(s).")
  # By process, as the input pipeline cuts a batch: its order is then the same
  # for any number of hosts.
  devices = sorted(devices, key=lambda d: (d.process_index, d.id))
  local = count // len({d.process_index for d in devices})
  if local % shape[-1]:
    raise ValueError(
      f"{given}: tensor={shape[-1]} does not divide the {local} device(s) of a "
      "host, which all have the same examples."
    )
  return Mesh(np.asarray(devices).reshape(shape), AXES)


def define_flags() -> None:
  """Flags of the programs that run on many devices."""
  flags.DEFINE_string(
    "mesh", None, "Axes of the mesh, data=-1,tensor=4; the config's if not set."
  )
  flags.DEFINE_string("sharding", None, "Strategy; the config's if not set.")


def lay_out_by_flags(config: ml_collections.ConfigDict) -> None:
  """Sets `config.mesh` and `config.sharding` to what the flags say, if set.

  Raises:
    ValueError: the mesh cannot be read.
  """
  values = flags.FLAGS
  with config.unlocked():
    if values.mesh is not None:
      with config_utils.at_fault("--mesh"):
        config.mesh = config_utils.parse_mesh(values.mesh)
    if values.sharding is not None:
      config.sharding = values.sharding


def rules(strategy: str) -> tuple[tuple[str, Any], ...]:
  """Pairs of logical name and axes of the mesh, for flax's constraints.

  Raises:
    ValueError: there is no such strategy.
  """
  if strategy not in STRATEGIES:
    raise ValueError(
      f"config.sharding={strategy!r}: want one of {', '.join(STRATEGIES)}."
    )
  return (("batch", _BATCH), *STRATEGIES[strategy])


class Compiled:
  """A function under `jax.jit` whose constraints on activations are heeded.

  Args:
    jitted: of `jax.jit`.
    mesh: of `make_mesh`.
    strategy: a key of `STRATEGIES`.
  """

  def __init__(self, jitted: Any, mesh: Mesh, strategy: str):
    self._jitted = jitted
    self._mesh = mesh
    self._rules = rules(strategy)

  @contextlib.contextmanager
  def _active(self):
    with jax.set_mesh(self._mesh), nn.logical_axis_rules(self._rules):
      yield

  def __call__(self, *args: Any) -> Any:
    """Compiles where it has not, and runs."""
    with self._active():
      return self._jitted(*args)

  def trace(self, *args: Any) -> jax.stages.Traced:
    """As `jax.jit(...).trace`."""
    with self._active():
      return self._jitted.trace(*args)

  def lower(self, *args: Any) -> jax.stages.Lowered:
    """As `jax.jit(...).lower`."""
    with self._active():
      return self._jitted.lower(*args)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device has the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 is split over the axes "data" and "fsdp"."""
  return NamedSharding(mesh, PartitionSpec(_BATCH))


def placed(shapes: Any, shardings: Any) -> Any:
  """Shapes that lie on a mesh.

  Args:
    shapes: a tree of arrays or their shapes.
    shardings: a tree of shardings, or of its upper part.
  """
  return jax.tree.map(
    lambda sharding, part: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
    ),
    shardings,
    shapes,
  )


def param_shardings(params: Any, mesh: Mesh, strategy: str) -> Any:
  """Shardings of parameters, by their paths.

  Args:
    params: nested dicts of arrays or their shapes.
    mesh: of `make_mesh`.
    strategy: a key of `STRATEGIES`.

  Returns:
    A tree like `params` of shardings. A dimension that its axis does not divide
    is not split.
  """
  table = rules(strategy)

  def one(path, x):
    name = "/".join(key.key for key in path)
    names = next(n for r, n in _PARAMETERS if re.fullmatch(f"(.*/)?{r}", name))
    names = (None,) * (len(x.shape) - len(names)) + names
    return _sharding(names, x.shape, mesh, table)

  return jax.tree.map_with_path(one, params)


def _sharding(names, shape, mesh, table):
  sizes = dict(zip(names, shape, strict=True))
  fits = [
    (name, axis)
    for name, axis in table
    if name in sizes and sizes[name] % mesh.shape[axis] == 0
  ]
  spec = nn.logical_to_mesh_axes(names, fits)
  return NamedSharding(mesh, spec)


def state_shardings(state: Any, mesh: Mesh, strategy: str) -> Any:
  """Shardings of a train state: what is kept for a parameter lies as it does.

  Args:
    state: a `train_step.TrainState` of arrays or shapes.
    mesh: of `make_mesh`.
    strategy: a key of `STRATEGIES`.

  Returns:
    A tree like `state` of shardings. What is kept for a parameter but has
    another shape, such as Adafactor's factors, is split by its last dimension,
    where that can be; the rest, such as counts, is on every device.
  """
  shardings = param_shardings(state.params, mesh, strategy)
  known = {
    _names(path): (x.shape, sharding)
    for (path, x), sharding in zip(
      jax.tree.leaves_with_path(state.params),
      jax.tree.leaves(shardings),
      strict=True,
    )
  }

  def one(path, x):
    names = _names(path)
    for start in range(len(names)):
      shape, sharding = known.get(names[start:], (None, None))
      if shape == x.shape:
        return sharding
      if shape is not None and x.ndim:
        last = (*[None] * (x.ndim - 1), "embed")
        return _sharding(last, x.shape, mesh, rules(strategy))
    return replicated(mesh)

  return jax.tree.map_with_path(one, state)


def _names(path) -> tuple[str, ...]:
  """The names of dictionaries along a path: those of a parameter's, last."""
  return tuple(
    key.key for key in path if isinstance(key, jax.tree_util.DictKey)
  )


def per_device(function: Callable, mesh: Mesh) -> Callable:
  """Runs a function of a batch on each device's examples, without exchange.

  Args:
    function: called as `function(batch, first, *others)`, where `first` is the
      place in the global batch of the first of these examples; returns a batch.
    mesh: of `make_mesh`.

  Returns:
    A function `(batch, *others)` of the global batch.
  """

  def local(batch, *others):
    size = len(jax.tree.leaves(batch)[0])
    first = jax.lax.axis_index(_BATCH) * size
    return function(batch, first, *others)

  def run(batch, *others):
    split, whole = PartitionSpec(_BATCH), PartitionSpec()
    specs = (split, *[whole] * len(others))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split)
    return mapped(batch, *others)

  return run


def gather(tree: Any, mesh: Mesh) -> Any:
  """Arrays with the whole of each on every device; all hosts call it."""
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def check_batch(
  name: str,
  batch_size: int,
  mesh: Mesh,
  grad_accum_steps: int = 1,
  group: int = 1,
) -> None:
  """Raises ValueError where a global batch does not split over the devices.

  Args:
    name: the config field.
    batch_size: of the global batch.
    mesh: of `make_mesh`.
    grad_accum_steps: parts that a batch is trained on in.
    group: examples that must be on one device, 2 where neighbours are mixed.
  """
  if not isinstance(batch_size, int) or batch_size < 1:
    raise ValueError(f"{name}={batch_size!r}: want an integer >= 1.")
  count = math.prod(mesh.shape[axis] for axis in _BATCH)
  # Neighbours are mixed before a batch is cut into parts.
  wanted = count * math.lcm(grad_accum_steps, group)
  if batch_size % wanted:
    accum = (
      f" x {grad_accum_steps} accumulation" if grad_accum_steps > 1 else ""
    )
    pairs = ", in pairs for mixup or cutmix" if group > 1 else ""
    raise ValueError(
      f"{name}={batch_size} does not divide over {count} device(s){accum}"
      f"{pairs}: want a multiple of {wanted}."
    )


def check_tensor(mesh: Mesh, strategy: str, sizes: dict[str, int]) -> None:
  """Raises ValueError where heads or hidden units cannot be split.

  Args:
    mesh: of `make_mesh`.
    strategy: a key of `STRATEGIES`.
    sizes: what is split over the axis "tensor", by names for the message.
  """
  count = mesh.shape["tensor"]
  if "tensor" not in strategy:
    return
  for name, size in sizes.items():
    if size % count:
      raise ValueError(
        f"config.mesh: tensor={count} does not divide {size} {name}."
      )


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """This process's slices of a batch to global arrays over the mesh."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
