"""Features and what comes of them, on one device and on several."""

import json
import socket

import numpy as np
import pytest

from tests import programs

EVALS = {
  "linear_probe": {},
  "few_shot": dict(shots=[2]),
  "knn": dict(metric="euclidean"),
  "robustness": dict(corruptions=["gaussian_noise", "fog"], severities=[2]),
  "feature_distance": dict(corruptions=["contrast"], severities=[3]),
}

PROGRAM = """
import json, sys
out, devices, process, count, port = sys.argv[1:]

import jax

jax.config.update("jax_num_cpu_devices", int(devices))
import numpy as np

from lookup_vit import config_utils, distributed, evaluation, train_step
from tests.evaluators import test_probes, test_several_devices as this

if int(count) > 1:
  distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))
config = test_probes.CONFIG | dict(
  evals={
    kind: dict(type=kind, **test_probes.FIELDS, **fields)
    for kind, fields in this.EVALS.items()
  }
)
program = train_step.Program(config_utils.resolve(config), 2)
assert program.mesh.size == int(devices) * int(count)
params = test_probes.random_params(program)
params = jax.device_put(params, program.state_shardings.params)
evals, metrics = evaluation.make(program, program.config.evals), {}
for evaluator, _ in evals.values():
  metrics.update(evaluator.run(params))
raw = test_probes.extract(program, params)
with open(f"{out}/metrics_{process}.json", "w") as file:
  json.dump(metrics, file)
np.savez(
  f"{out}/features_{process}.npz",
  **{name.replace("/", "."): split.x for name, split in raw.items()},
)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """A function to what so many processes of so many devices find.

  Metrics and features, of each process.
  """
  out, done = tmp_path_factory.mktemp("several_devices"), {}

  def run(count, devices):
    if (count, devices) in done:
      return done[count, devices]
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    folder = out / f"{count}x{devices}"
    folder.mkdir()
    processes = [
      programs.Program(
        *("-c", PROGRAM, folder, devices, i, count, port),
        stderr=folder / f"stderr_{i}",
      )
      for i in range(count)
    ]
    codes = [process.wait(timeout=900) for process in processes]
    assert not any(codes), (folder / "stderr_0").read_text()[-3000:]
    done[count, devices] = [
      (
        json.loads((folder / f"metrics_{i}.json").read_text()),
        dict(np.load(folder / f"features_{i}.npz")),
      )
      for i in range(count)
    ]
    return done[count, devices]

  return run


@pytest.mark.full
@pytest.mark.parametrize(("count", "devices"), [(1, 4), (2, 2)])
def test_the_same_as_on_one_device(found, count, devices):
  [(metrics, features)] = found(1, 1)
  assert {name.split("/")[0] for name in metrics} == set(EVALS)
  assert len(features) == 4
  for got_metrics, got_features in found(count, devices):
    assert set(got_metrics) == set(metrics)
    for name, value in metrics.items():
      # One of 31 digits may be at the border.
      exact = "distance" in name or name.endswith("/C")
      atol = 0 if exact else 1.5 / 31
      np.testing.assert_allclose(got_metrics[name], value, rtol=1e-4, atol=atol)
    assert set(got_features) == set(features)
    for name, x in features.items():
      np.testing.assert_allclose(got_features[name], x, rtol=1e-5, atol=1e-6)
