"""The same training on one device, on eight, and on two processes of four.

By the digits config, with fewer blocks and grids.
"""

import json
import math
import re
import socket

import numpy as np
import pytest
from flax import traverse_util

from tests import programs

pytestmark = pytest.mark.full

STEPS, DEPTH = 20, 2
# Mesh and strategy of eight devices.
MESHES = {
  "replicated": ([("data", -1)], "replicated"),
  "fsdp": ([("fsdp", -1)], "fsdp"),
  "tensor": ([("data", -1), ("tensor", 2)], "tensor"),
  "mixed": ([("data", 2), ("fsdp", 2), ("tensor", 2)], "fsdp_tensor"),
}
# Those of one process, and of two.
NAMES = {1: tuple(MESHES), 2: ("fsdp", "mixed")}

# Trains by the digits config on each mesh; writes what came of it.
PROGRAM = f"""
import json, os, sys
out, devices, process, count, port = sys.argv[1:]

import jax

jax.config.update("jax_num_cpu_devices", int(devices))
import numpy as np

from lookup_vit import (
  checkpoints, config_utils, distributed, evaluation, parallel, train,
  train_step,
)
from tests import test_meshes

if int(count) > 1:
  distributed.initialize(f"127.0.0.1:{{port}}", int(count), int(process))


def program_of(mesh, sharding, devices=None):
  config = config_utils.load("configs/digits_lookup.py")
  config.mesh, config.sharding = mesh, sharding
  config.model.depth, config.grids = {DEPTH}, [(3, 3), (5, 5)]
  config = config_utils.resolve(config)
  # As many steps as training has, for the schedule's sake.
  return train_step.Program(config, 1348, devices)


def bytes_of(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def train_on(name, program):
  state = program.init_state()
  kept = state.params, state.opt_state
  of_device = [x.addressable_shards[0].data for x in jax.tree.leaves(kept)]
  losses, config = [], program.config
  batches = train.prefetch(train.make_dataset(config, 0), program.mesh)
  for step in range({STEPS}):
    grid = train_step.draw_grid(program.grids, config.seed, step)
    batch = next(batches)
    state, scalars = program.update_step(state, batch, grid)
    losses.append(float(scalars["loss"]))
  found = dict(losses=losses, share=bytes_of(of_device) / bytes_of(kept))
  if name in ("one", "mixed"):
    [(evaluator, _)] = evaluation.make(program, config.evals).values()
    found["metrics"] = dict(evaluator.run(state.params))
  if name == "mixed":
    # Restored on another mesh, and by another number of processes.
    store = checkpoints.Checkpoints(f"{{out}}/of_{{count}}")
    store.save({STEPS}, state)
    store.close()
  if int(count) == 1 and name == "replicated":
    lowered = program.update_step.lower(state, batch, grid)
    found |= dict(text=lowered.compile().as_text(), grid=grid)
  if int(count) == 1 and name == "mixed":
    found["lowered"] = program.update_step.lower(state, batch, grid).as_text()
  params = jax.device_get(parallel.gather(state.params, program.mesh))
  if int(process) == 0:
    np.savez(f"{{out}}/{{name}}_{{count}}.npz", **test_meshes.flat(params))
    with open(f"{{out}}/{{name}}_{{count}}.json", "w") as file:
      json.dump(found, file)


if int(count) == 1:
  program = program_of([("data", -1)], "replicated", jax.devices()[:1])
  train_on("one", program)
for name in test_meshes.NAMES[int(count)]:
  program = program_of(*test_meshes.MESHES[name])
  train_on(name, program)
  if int(count) == 1:
    store = checkpoints.Checkpoints(f"{{out}}/of_2", read_only=True)
    state = store.restore(
      {STEPS}, program.state_shapes, program.state_shardings
    )
    store.close()
    for x, sharding in zip(
      jax.tree.leaves(state), jax.tree.leaves(program.state_shardings)
    ):
      assert x.sharding == sharding
    params = jax.device_get(parallel.gather(state.params, program.mesh))
    with np.load(f"{{out}}/mixed_2.npz") as saved:
      for name, x in test_meshes.flat(params).items():
        np.testing.assert_array_equal(saved[name], x)
"""


def flat(params):
  """Parameters by their paths, without slashes, for `np.savez`."""
  return traverse_util.flatten_dict(params, sep=".")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """What each mesh came to: losses and others, and parameters, by name."""
  out = tmp_path_factory.mktemp("meshes")
  for count in (2, 1):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    processes = [
      programs.Program(
        *("-c", PROGRAM, out, 8 // count, i, count, port),
        stderr=out / f"stderr_{count}_{i}",
      )
      for i in range(count)
    ]
    codes = [process.wait(timeout=900) for process in processes]
    assert not any(codes), (out / f"stderr_{count}_0").read_text()[-3000:]
  return out


def found(runs, name, count):
  return json.loads((runs / f"{name}_{count}.json").read_text())


@pytest.mark.parametrize(
  "name, count", [(name, count) for count in NAMES for name in NAMES[count]]
)
def test_training_is_the_same_on_every_mesh(name, count, runs):
  want, got = found(runs, "one", 1), found(runs, name, count)
  assert len(got["losses"]) == STEPS
  np.testing.assert_allclose(got["losses"], want["losses"], rtol=1e-5)
  with (
    np.load(runs / "one_1.npz") as want,
    np.load(runs / f"{name}_{count}.npz") as got,
  ):
    assert set(want) == set(got)
    for path in want:
      if path.endswith("key.bias"):  # Its gradient is zero but for rounding.
        np.testing.assert_allclose(got[path], want[path], atol=1e-4)
      else:
        error = np.linalg.norm(got[path] - want[path])
        assert error < 1e-5 * np.linalg.norm(want[path]), path


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_is_the_same(count, runs):
  want, got = (
    found(runs, *which)["metrics"] for which in (("one", 1), ("mixed", count))
  )
  assert set(got) == set(want)
  for name in want:
    # One of 360 digits may be at the border.
    atol = 1.5 / 360 if "top" in name else 0
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=atol)


def test_shares_of_a_device(runs):
  assert found(runs, "replicated", 1)["share"] == 1
  # All but norms, embedding, heads and some biases.
  assert 0.5 <= found(runs, "tensor", 1)["share"] < 0.56
  for count in NAMES:
    assert found(runs, "fsdp", count)["share"] <= 1.02 / 8
    assert 0.25 <= found(runs, "mixed", count)["share"] < 0.29


def test_data_parallel_exchanges_gradients_alone(runs):
  text = found(runs, "replicated", 1)["text"]
  others = "all-gather|reduce-scatter|all-to-all|collective-"
  assert not re.findall(rf" (?:{others})[\w-]*\(", text)
  reduced = []
  for shapes in re.findall(r" = (.+?) all-reduce(?:-start)?\(", text):
    for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
      reduced.append(math.prod(int(n) for n in dims.split(",") if n))
  with np.load(runs / "replicated_1.npz") as params:
    # No gradient reaches the bias of keys, which shifts all logits of a query.
    sizes = [
      x.size for name, x in params.items() if not name.endswith("mhbc.key.bias")
    ]
    assert len(sizes) == len(params) - DEPTH
  # The positions' gradient comes from two grids; some kernels' may be split.
  sizes.append(math.prod(found(runs, "replicated", 1)["grid"]) * 64)
  assert sum(n for n in reduced if n > 1) == sum(sizes)
  assert max(reduced) <= max(sizes)
  assert reduced.count(1) < 10


def test_constraints_on_activations_are_heeded(runs):
  """Heads and hidden units are split over the axis "tensor"."""
  text = found(runs, "mixed", 1)["lowered"]
  for spec in (
    r'\[\{"data", "fsdp"\}, \{\}, \{"tensor"\}, \{\}\]',
    r'\[\{"data", "fsdp"\}, \{\}, \{"tensor"\}\]',
  ):
    assert re.search(r"sharding_constraint.*" + spec, text)
