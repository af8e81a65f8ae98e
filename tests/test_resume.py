"""Training that is stopped and started again, on one process and on two."""

import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lookup_vit import checkpoints, metric_writer
from tests import programs, sources

# 101 examples in 5 shards, in batches of 12: nothing divides anything.
STEPS = 40

CONFIG = f"""
from tests import small


def get_config(arg=None):
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
  config.input.data = dict(name="numbers", split="train", data_dir=arg)
  return config
"""

# Trains, and writes a line for each batch: its step, the ids of the examples,
# and their pixels, by hashes.
PROGRAM = """
import hashlib
import json
import os
import sys
import time

config, workdir, log, process, count, port = sys.argv[1:]

from lookup_vit import cli, config_utils, distributed, train

cli.setup_logging()
if int(count) == 1:
  distributed.initialize(stops=True)
else:
  distributed.initialize(
    f"127.0.0.1:{port}", int(count), int(process), stops=True
  )
make_dataset = train.make_dataset


class Logged:

  def __init__(self, batches, step):
    self.batches, self.step = batches, step
    self.element_spec = batches.element_spec

  def __iter__(self):
    with open(log, "a") as file:
      for step, batch in enumerate(self.batches, self.step):
        images = [image.tobytes() for image in batch["image"]]
        pixels = [hashlib.sha256(image).hexdigest() for image in images]
        line = step, batch["id"].tolist(), pixels
        print(json.dumps(line), file=file, flush=True)
        time.sleep(float(os.environ.get("SECONDS_A_BATCH", 0)))
        yield batch


train.make_dataset = lambda config, step: Logged(
  make_dataset(config, step), step
)
train.train_and_evaluate(config_utils.load(config), workdir)
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
    (path / "config.py").write_text(CONFIG)
    self.config = f"{path / 'config.py'}:{data['data_dir']}"

  def start(self, **environment):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    self.processes = [
      programs.Program(
        *("-c", PROGRAM, self.config, self.workdir),
        *(self.path / f"batches_{process}", process, self.count, port),
        stderr=self.path / f"stderr_{process}",
        env=dict(os.environ, **environment),
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

  def start_to(self, step, **environment):
    """Starts, and waits until a step is reached."""
    self.start(**environment)
    while self.last_step() < step:
      assert self.processes[0].poll() is None, self.errors()
      time.sleep(0.005)

  def kill_at(self, step):
    """Starts, and kills all processes once a step is reached."""
    self.start_to(step)
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
      found.append([json.loads(x) for x in lines if x.endswith('"]]')])
    return found


@pytest.fixture(scope="module")
def undisturbed(numbers, tmp_path_factory):
  """A run of so many processes, by their number."""
  path = tmp_path_factory.mktemp("undisturbed")

  @functools.cache
  def of(count):
    run = Run(path / str(count), numbers, count)
    run.start()
    run.wait()
    return run

  return of


@pytest.fixture(
  scope="module", params=[1, pytest.param(2, marks=pytest.mark.full)]
)
def runs(request, numbers, undisturbed, tmp_path_factory):
  """An undisturbed run, and one that was killed three times."""
  killed = Run(tmp_path_factory.mktemp("runs") / "k", numbers, request.param)
  # An epoch is 8.4 steps: each part between two kills has the end of one.
  rng = random.Random(time.time())
  kills = [rng.randint(*part) for part in ((2, 8), (12, 18), (22, 28))]
  print("killed at", kills)
  for step in kills:
    killed.kill_at(step)
  killed.start()
  killed.wait()
  assert killed.errors().count("Continuing from step") >= 2
  return undisturbed(request.param), killed


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
  assert_same_end(*(run.workdir for run in runs))


def assert_same_end(workdir, other):
  want = checkpoints.load_params(workdir)
  got = checkpoints.load_params(other)
  assert want[1] == got[1] == STEPS
  jax.tree.map(np.testing.assert_array_equal, want[0], got[0])
  assert rows(workdir) == rows(other)


@pytest.mark.full
def test_told_to_stop(numbers, undisturbed, tmp_path):
  """Two processes, then again two or one."""
  run = Run(tmp_path / "run", numbers, 2)
  rng = random.Random(time.time())
  step, told = rng.randint(2, STEPS - 12), rng.randrange(2)
  print("told process", told, "at", step)
  # JAX looks for the signal once a second.
  run.start_to(step, SECONDS_A_BATCH="0.2")
  run.processes[told].send_signal(signal.SIGTERM)
  assert [p.wait(timeout=30) for p in run.processes] == [75, 75], run.errors()
  saved = run.last_step()
  assert step <= saved < STEPS
  assert f"Told to stop: saved step {saved}, to continue" in run.errors()
  one = Run(tmp_path / "one", numbers, 1)
  shutil.copytree(run.workdir, one.workdir)
  for again in (run, one):
    again.start()
    again.wait()
    assert f"Continuing from step {saved}." in again.errors()
  assert_same_end(undisturbed(2).workdir, run.workdir)

  # On one process the batches are the same; sums have another order.
  halves = [
    {step: rest for step, *rest in half} for half in undisturbed(2).batches()
  ]
  [got] = one.batches()
  assert {step for step, *_ in got} >= set(range(saved, STEPS))
  for step, ids, pixels in got:
    if step < STEPS:
      (ids_0, pixels_0), (ids_1, pixels_1) = (half[step] for half in halves)
      assert ids == ids_0 + ids_1 and pixels == pixels_0 + pixels_1
  want, got = (
    [row["train/loss"] for row in rows(workdir) if "train/loss" in row]
    for workdir in (undisturbed(2).workdir, one.workdir)
  )
  assert len(want) == STEPS
  np.testing.assert_allclose(got, want, rtol=2e-5)


def test_alone_told_to_stop(numbers, tmp_path):
  run = Run(tmp_path / "run", numbers, 1)
  run.start_to(7, SECONDS_A_BATCH="0.1")
  run.processes[0].send_signal(signal.SIGTERM)
  assert run.processes[0].wait(timeout=30) == 75
  saved = run.last_step()
  assert checkpoints.load_params(run.workdir)[1] == saved >= 7
  assert f"Told to stop: saved step {saved}, to continue" in run.errors()


def test_lost_process_is_named_and_the_run_goes_on(
  numbers, undisturbed, tmp_path
):
  """One of two is killed; the supervisor starts both again."""
  run = Run(tmp_path / "run", numbers, 2)
  command = [
    *(sys.executable, "-m", "lookup_vit.supervise", "--num_processes=2"),
    *("--restarts=1", "--", sys.executable, "-m", "lookup_vit.train"),
    *(f"--config={run.config}", f"--workdir={run.workdir}"),
  ]
  with (tmp_path / "stderr").open("w") as stderr:
    supervisor = subprocess.Popen(
      command, stderr=stderr, stdout=subprocess.DEVNULL
    )
  # Until there is something to continue from.
  saved = pathlib.Path(run.workdir, "checkpoints")
  while not any(path.name.isdigit() for path in saved.glob("*")):
    assert supervisor.poll() is None, (tmp_path / "stderr").read_text()
    time.sleep(0.01)
  [lost] = [
    pid
    for pid in children(supervisor.pid)
    if "--process_id=1" in arguments(pid)
  ]
  others = set(children(supervisor.pid)) - {lost}
  os.kill(lost, signal.SIGKILL)
  clock = time.monotonic()
  while others & set(children(supervisor.pid)):
    assert time.monotonic() - clock < 30
    time.sleep(0.1)
  assert supervisor.wait() == 0
  text = (tmp_path / "stderr").read_text()
  assert re.search(
    r"Process 1 of 2, on .*, was lost after step \d+: it ended by SIGKILL", text
  )
  assert text.count("Continuing from step") == 1
  assert_same_end(undisturbed(2).workdir, run.workdir)


def children(pid):
  with open(f"/proc/{pid}/task/{pid}/children") as file:
    return [int(child) for child in file.read().split()]


def arguments(pid):
  with open(f"/proc/{pid}/cmdline") as file:
    return file.read().split("\0")


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
