"""Training that is killed and started again, on one process and on two."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lookup_vit import checkpoints, metric_writer
from tests import sources

# 101 examples in 5 shards, in batches of 12: nothing divides anything.
STEPS = 40

# Trains, and writes a line for each batch: its step, the ids of the examples,
# and the pixels, by their hash.
PROGRAM = f"""
import hashlib
import json
import sys

sys.path.insert(0, ".")
workdir, data_dir, log, process, count, port = sys.argv[1:]

import jax

if int(count) > 1:
  jax.distributed.initialize(
    f"127.0.0.1:{{port}}", int(count), int(process), initialization_timeout=60
  )

from lookup_vit import cli, train
from tests import small

cli.setup_logging()
make_dataset = train.make_dataset


class Logged:

  def __init__(self, batches, step):
    self.batches, self.step = batches, step
    self.element_spec = batches.element_spec

  def __iter__(self):
    with open(log, "a") as file:
      for step, batch in enumerate(self.batches, self.step):
        pixels = hashlib.sha256(batch["image"].tobytes()).hexdigest()
        line = step, batch["id"].tolist(), pixels
        print(json.dumps(line), file=file, flush=True)
        yield {{k: batch[k] for k in ("image", "label")}}


train.make_dataset = lambda config, step: Logged(
  make_dataset(config, step), step
)
config = small.config(
  total_steps={STEPS},
  ckpt_steps=4,
  ema_decay=0.9,
  model_name="vit",
  model=dict(variant="mu/8", depth=1, dropout=0.1),
  grids=None,
  evals={{}},
  input__shuffle_buffer_size=20,
  input__pp="decode|inception_crop(32)|flip_lr|value_range(-1,1)"
  "|keep('image','label','id')",
)
config.input.data = dict(name="numbers", split="train", data_dir=data_dir)
train.train_and_evaluate(config, workdir)
"""


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
  return sources.build_numbers(tmp_path_factory.mktemp("numbers"), 101, 5)


class Run:
  """A run of one or more processes in a work directory of its own."""

  def __init__(self, path, data, count):
    self.path, self.data, self.count = path, data, count
    self.workdir = str(path / "workdir")
    path.mkdir()

  def start(self):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    self.processes = [
      subprocess.Popen(
        [
          *(sys.executable, "-c", PROGRAM, self.workdir),
          *(self.data["data_dir"], self.path / f"batches_{process}"),
          *(str(process), str(self.count), str(port)),
        ],
        stderr=(self.path / f"stderr_{process}").open("a"),
        stdout=subprocess.DEVNULL,
      )
      for process in range(self.count)
    ]

  def wait(self):
    codes = [process.wait() for process in self.processes]
    assert codes == [0] * self.count, self.errors()

  def errors(self):
    return (self.path / "stderr_0").read_text()

  def last_step(self):
    if not os.path.exists(os.path.join(self.workdir, "metrics.jsonl")):
      return 0
    rows = metric_writer.read(self.workdir)
    return rows[-1]["step"] if rows else 0

  def kill_at(self, step):
    """Starts, and kills all processes once a step is reached."""
    self.start()
    while self.last_step() < step:
      assert self.processes[0].poll() is None, self.errors()
      time.sleep(0.005)
    for process in self.processes:
      process.send_signal(signal.SIGKILL)
    codes = {process.wait() for process in self.processes}
    # The other process of a dead one may have ended itself.
    assert codes <= {-signal.SIGKILL, -signal.SIGABRT}, codes

  def batches(self):
    """Steps, ids and pixels that each process had, over all its starts."""
    found = []
    for process in range(self.count):
      lines = (self.path / f"batches_{process}").read_text().splitlines()
      # The last line before a kill may be cut.
      found.append([json.loads(x) for x in lines if x.endswith('"]')])
    return found


@pytest.fixture(scope="module", params=[1, 2])
def runs(request, numbers, tmp_path_factory):
  """An undisturbed run, and one that was killed three times."""
  path = tmp_path_factory.mktemp("runs")
  undisturbed = Run(path / "undisturbed", numbers, request.param)
  undisturbed.start()
  undisturbed.wait()
  killed = Run(path / "killed", numbers, request.param)
  # An epoch is 8.4 steps: each part between two kills has the end of one.
  rng = random.Random(time.time())
  kills = [rng.randint(*part) for part in ((2, 8), (12, 18), (22, 28))]
  print("killed at", kills)
  for step in kills:
    killed.kill_at(step)
  killed.start()
  killed.wait()
  assert killed.errors().count("Continuing from step") >= 2
  return undisturbed, killed


def test_batches_are_the_same(runs):
  undisturbed, killed = runs
  for want, got in zip(undisturbed.batches(), killed.batches(), strict=True):
    by_step = {step: (ids, pixels) for step, ids, pixels in want}
    assert set(by_step) >= set(range(STEPS))
    assert {step for step, *_ in got} >= set(range(STEPS))
    for step, ids, pixels in got:
      if step in by_step:  # Else it was fetched ahead, past the end.
        assert (ids, pixels) == by_step[step], step
  # Together, the processes have every example once in every epoch.
  parts = [dict((step, ids) for step, ids, _ in p) for p in killed.batches()]
  ids = [i for step in range(STEPS) for part in parts for i in part[step]]
  for epoch in range(STEPS * 12 // 101):
    assert sorted(ids[epoch * 101 :][:101]) == list(range(101))


def test_parameters_and_metrics_are_the_same(runs):
  undisturbed, killed = runs
  want = checkpoints.load_params(undisturbed.workdir)
  got = checkpoints.load_params(killed.workdir)
  assert want[1] == got[1] == STEPS
  jax.tree.map(np.testing.assert_array_equal, want[0], got[0])
  assert rows(undisturbed.workdir) == rows(killed.workdir)


def rows(workdir):
  """The rows of the metrics, but for those of time."""
  return [
    {
      name: value
      for name, value in row.items()
      if name not in ("train/images_per_second", "train/input_wait")
    }
    for row in metric_writer.read(workdir)
  ]
