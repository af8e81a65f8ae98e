"""Tests of lookup_vit/parallel.py, on one device and on four."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lookup_vit import parallel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PROGRAM = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from lookup_vit import parallel

def error(function, *args):
  try:
    function(*args)
  except ValueError as e:
    return str(e)

mesh = parallel.make_mesh([("data", -1)])
batch = dict(
  image=np.arange(8 * 3, dtype=np.float32).reshape(8, 3), label=np.arange(8)
)
put = parallel.put_batch(batch, mesh)
whole = jax.device_put(np.arange(5), parallel.replicated(mesh))
print(json.dumps(dict(
  sizes=[
    dict(parallel.make_mesh(axes).shape)
    for axes in ([("data", -1)], [("data", 4)], (["data", -1],))
  ],
  devices=[d.id for d in mesh.devices.flat],
  same=all(np.array_equal(put[k], batch[k]) for k in batch),
  shards=[s.data.tolist() for s in put["label"].addressable_shards],
  image_shards=[list(s.data.shape) for s in put["image"].addressable_shards],
  replicas=[s.data.tolist() for s in whole.addressable_shards],
  meshes=[
    error(parallel.make_mesh, [("data", n)]) for n in (3, 8, 1, 0, -2)
  ],
  fits=[
    error(parallel.check_batch, "x", b, mesh, accum)
    for b, accum in ((4, 1), (16, 1), (16, 2), (24, 3))
  ],
  misfit=error(parallel.check_batch, "config.b", 6, mesh),
  misfit_accum=error(parallel.check_batch, "config.b", 20, mesh, 2),
)))
"""


def test_four_devices():
  out = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env=dict(os.environ, PYTHONPATH=ROOT, JAX_PLATFORMS="cpu"),
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert out.returncode == 0, out.stderr
  got = json.loads(out.stdout)
  assert got["sizes"] == [{"data": 4}] * 3
  assert got["devices"] == [0, 1, 2, 3]
  assert got["same"]
  assert got["shards"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert got["image_shards"] == [[2, 3]] * 4
  assert got["replicas"] == [[0, 1, 2, 3, 4]] * 4
  for n, message in zip((3, 8, 1, 0, -2), got["meshes"], strict=True):
    for word in ("config.mesh", f"('data', {n})", "4 device(s)"):
      assert word in message
  assert got["fits"] == [None] * 4
  for word in ("config.b=6", "4 device(s)", "multiple of 4"):
    assert word in got["misfit"]
  for word in ("config.b=20", "4 device(s) x 2 acc", "multiple of 8"):
    assert word in got["misfit_accum"]


def test_one_device():
  mesh = parallel.make_mesh([("data", -1)])
  assert mesh.axis_names == ("data",)
  assert mesh.devices.shape == (jax.device_count(),)
  assert parallel.batch_sharding(mesh).spec == PartitionSpec("data")
  assert parallel.replicated(mesh).spec == PartitionSpec()
  batch = dict(x=np.arange(6).reshape(3, 2), y=(np.ones(3),))
  put = parallel.put_batch(batch, mesh)
  jax.tree.map(np.testing.assert_array_equal, put, batch)
  parallel.check_batch("x", 7, mesh)
  parallel.check_batch("x", 9, mesh, 3)
  with pytest.raises(ValueError, match="x=7 does not divide.*multiple of 3"):
    parallel.check_batch("x", 7, mesh, 3)


@pytest.mark.parametrize(
  "axes", [[], [("model", -1)], [("data", -1), ("model", 1)], [("data", 2)]]
)
def test_mesh_errors(axes):
  with pytest.raises(ValueError, match="config.mesh"):
    parallel.make_mesh(axes)


def test_mesh_with_two_sizes_to_fill():
  with pytest.raises(ValueError, match="config.mesh"):
    parallel.make_mesh([("data", -1), ("model", -1)])
