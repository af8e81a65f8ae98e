"""Tests of lookup_vit/parallel.py, on one device and on eight."""

import json

import jax
import ml_collections
import numpy as np
import pytest
from absl import flags
from jax.sharding import PartitionSpec

from lookup_vit import parallel
from tests import programs

PROGRAM = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from lookup_vit import parallel

def error(function, *args):
  try:
    function(*args)
  except ValueError as e:
    return str(e)

mesh = parallel.make_mesh([("fsdp", 2), ("data", -1)])
cube = parallel.make_mesh([("data", 2), ("fsdp", 2), ("tensor", 2)])
batch = dict(
  image=np.arange(8 * 3, dtype=np.float32).reshape(8, 3), label=np.arange(8)
)
put = parallel.put_batch(batch, mesh)
wide = parallel.put_batch(batch, cube)
whole = jax.device_put(np.arange(5), parallel.replicated(mesh))
kernel = jnp.zeros((4, 8, 8))
params = {
  "query": {"kernel": kernel, "bias": jnp.zeros((4, 6))},
  "compressed_queries": jnp.zeros((2, 4, 6)),
}
layouts = {
  strategy: jax.tree.map(
    lambda x, s: s.shard_shape(x.shape),
    params,
    parallel.param_shardings(params, cube, strategy),
  )
  for strategy in parallel.STRATEGIES
}
place = parallel.per_device(lambda x, first, y: first + 0 * x + y, mesh)
whole_again = parallel.gather(put, mesh)
print(json.dumps(dict(
  sizes=[
    list(parallel.make_mesh(axes).shape.values())
    for axes in ([("data", -1)], [("data", 8)], (["tensor", -1],), [
      ("tensor", 2), ("fsdp", -1), ("data", 2)
    ])
  ],
  devices=[d.id for d in cube.devices.flat],
  subset=parallel.make_mesh([("data", -1)], jax.devices()[3:5]).size,
  same=all(np.array_equal(put[k], batch[k]) for k in batch),
  shards=[s.data.tolist() for s in put["label"].addressable_shards],
  wide=[s.data.tolist() for s in wide["label"].addressable_shards],
  replicas=[s.data.tolist() for s in whole.addressable_shards],
  gathered=[
    np.array_equal(s.data, batch["image"])
    for s in whole_again["image"].addressable_shards
  ],
  layouts=layouts,
  place=np.asarray(jax.jit(place)(put["label"] * 1.0, 0.5)).tolist(),
  meshes=[
    error(parallel.make_mesh, [("data", n)]) for n in (3, 16, 1, 0, -2)
  ],
  fits=[
    error(parallel.check_batch, "x", b, mesh, accum, group)
    for b, accum, group in ((8, 1, 1), (16, 2, 2), (48, 3, 2), (24, 3, 1))
  ],
  misfit=error(parallel.check_batch, "config.b", 12, mesh),
  misfit_accum=error(parallel.check_batch, "config.b", 40, mesh, 2),
  misfit_pairs=error(parallel.check_batch, "config.b", 8, mesh, 1, 2),
)))
"""


def test_eight_devices():
  program = programs.Program("-c", PROGRAM)
  out, err = program.communicate(timeout=60)
  assert program.returncode == 0, err
  got = json.loads(out)
  assert got["sizes"] == [[8, 1, 1], [8, 1, 1], [1, 1, 8], [2, 2, 2]]
  assert got["devices"] == list(range(8))
  assert got["subset"] == 2
  assert got["same"]
  # By process, whatever the axes; all of "tensor" have the same examples.
  assert got["shards"] == [[i] for i in range(8)]
  assert got["wide"] == [[i // 2 * 2, i // 2 * 2 + 1] for i in range(8)]
  assert got["replicas"] == [[0, 1, 2, 3, 4]] * 8
  assert got["gathered"] == [True] * 8
  # The kernels of four scanned layers are [width, heads x head size] each; the
  # 6 of the bias fit both axes, of size 2. Of a grid of tokens, the width does.
  wanted = {
    "replicated": ([4, 8, 8], [4, 6], [2, 4, 6]),
    "fsdp": ([4, 4, 8], [4, 3], [2, 4, 3]),
    "tensor": ([4, 8, 4], [4, 3], [2, 4, 6]),
    "fsdp_tensor": ([4, 4, 4], [4, 3], [2, 4, 3]),
  }
  assert got["layouts"] == {
    strategy: {
      "query": {"kernel": kernel, "bias": bias},
      "compressed_queries": queries,
    }
    for strategy, (kernel, bias, queries) in wanted.items()
  }
  assert got["place"] == [i + 0.5 for i in range(8)]
  for n, message in zip((3, 16, 1, 0, -2), got["meshes"], strict=True):
    for word in ("config.mesh", f"('data', {n})", "8 device(s)"):
      assert word in message
  assert got["fits"] == [None] * 4
  for word in ("config.b=12", "8 device(s)", "multiple of 8"):
    assert word in got["misfit"]
  for word in ("config.b=40", "8 device(s) x 2 acc", "multiple of 16"):
    assert word in got["misfit_accum"]
  for word in ("config.b=8", "in pairs for mixup", "multiple of 16"):
    assert word in got["misfit_pairs"]


def test_one_device():
  mesh = parallel.make_mesh([("data", -1)])
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.devices.size == jax.device_count()
  assert parallel.batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
  assert parallel.replicated(mesh).spec == PartitionSpec()
  batch = dict(x=np.arange(6).reshape(3, 2), y=(np.ones(3),))
  put = parallel.put_batch(batch, mesh)
  jax.tree.map(np.testing.assert_array_equal, put, batch)
  parallel.check_batch("x", 7, mesh)
  parallel.check_batch("x", 9, mesh, 3)
  with pytest.raises(ValueError, match="x=7 does not divide.*multiple of 3"):
    parallel.check_batch("x", 7, mesh, 3)


class Device:
  """One of a host, for meshes that are not here."""

  def __init__(self, index, process_index):
    self.id, self.process_index = index, process_index


def test_devices_lie_by_process_and_tensor_stays_on_a_host():
  devices = [Device(i, i % 4) for i in range(16)]
  mesh = parallel.make_mesh([("data", -1), ("tensor", 4)], devices)
  for host, of_host in enumerate(mesh.devices[:, 0]):
    assert [d.process_index for d in of_host] == [host] * 4
  with pytest.raises(ValueError, match="tensor=8 does not divide the 4 dev"):
    parallel.make_mesh([("data", -1), ("tensor", 8)], devices)


@pytest.mark.parametrize(
  "axes",
  [
    [("model", -1)],
    [("data", -1), ("data", 1)],
    [("data", -1), ("fsdp", -1)],
    [("data", 2)],
  ],
)
def test_mesh_errors(axes):
  with pytest.raises(ValueError, match="config.mesh"):
    parallel.make_mesh(axes)


def test_strategies():
  with pytest.raises(ValueError, match="config.sharding='zero3'.*fsdp_tensor"):
    parallel.rules("zero3")
  mesh = parallel.make_mesh([("data", -1)])
  parallel.check_tensor(mesh, "tensor", {"heads": 3})
  devices = [Device(i, 0) for i in range(4)]
  mesh = parallel.make_mesh([("tensor", 4)], devices)
  parallel.check_tensor(mesh, "replicated", {"heads": 3})
  parallel.check_tensor(mesh, "tensor", {"heads": 8})
  with pytest.raises(ValueError, match="tensor=4 does not divide 6 heads"):
    parallel.check_tensor(mesh, "fsdp_tensor", {"MLP": 8, "heads": 6})


def test_flags_lay_out_a_config(monkeypatch):
  values = flags.FlagValues()
  monkeypatch.setattr(flags, "FLAGS", values)
  define = flags.DEFINE_string
  monkeypatch.setattr(
    flags, "DEFINE_string", lambda *args: define(*args, flag_values=values)
  )
  parallel.define_flags()
  values(["program"])
  config = ml_collections.ConfigDict(dict(mesh=[("data", -1)])).lock()
  parallel.lay_out_by_flags(config)
  assert config.to_dict() == dict(mesh=[("data", -1)])
  values(["program", "--mesh=fsdp=-1,tensor=2", "--sharding=fsdp_tensor"])
  parallel.lay_out_by_flags(config)
  mesh = [("fsdp", -1), ("tensor", 2)]
  assert config.to_dict() == dict(mesh=mesh, sharding="fsdp_tensor")
  values(["program", "--mesh=fsdp:8"])
  with pytest.raises(ValueError, match="--mesh: .*data=-1,tensor=4, not 'fs"):
    parallel.lay_out_by_flags(config)
