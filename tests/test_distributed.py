"""Tests of lookup_vit/distributed.py; being told to stop is in test_resume."""

import json
import os
import random
import signal

import pytest

from lookup_vit import distributed
from tests import programs

PROGRAM = """
import json, logging, sys
import jax
from absl import app, flags
from lookup_vit import cli, distributed

def main(argv):
  cli.setup_logging()
  distributed.initialize_by_flags()
  log = logging.getLogger("lookup_vit")
  log.info("a line of %d", jax.process_index())
  from jax.experimental import multihost_utils
  everyone = multihost_utils.process_allgather(jax.numpy.ones(1))
  print(json.dumps([jax.process_index(), int(everyone.sum())]))

distributed.define_flags()
app.run(main)
"""


def run(environments, *arguments):
  """Runs a process for each environment; returns output and errors of each."""
  processes = [
    programs.Program(
      *("-c", PROGRAM, *arguments), env=dict(os.environ, **environment)
    )
    for environment in environments
  ]
  ends = [process.communicate(timeout=100) for process in processes]
  assert not any(process.returncode for process in processes), ends
  return [(json.loads(out.splitlines()[-1]), err) for out, err in ends]


def test_tasks_of_a_slurm_step_find_each_other():
  step = {
    "SLURM_JOB_ID": str(random.randrange(10**6)),  # The port depends on it.
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
  }
  environments = [
    dict(step, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)
  ]
  # One device each, as JAX takes that of SLURM_LOCALID.
  environments = [dict(e, JAX_LOCAL_DEVICE_IDS="0") for e in environments]
  (first, log), (second, silent) = run(environments)
  assert first == [0, 2] and second == [1, 2]
  assert "a line of 0" in log and "a line of" not in silent


def test_in_the_script_of_a_slurm_job_it_is_alone():
  job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
  [(got, log)] = run([job])
  assert got == [0, 1] and "a line of 0" in log


@pytest.mark.parametrize(
  "given, words",
  [
    (dict(coordinator_address="h:1"), "--num_processes is not set"),
    (dict(num_processes=2, process_id=0), "--coordinator_address is not set"),
    (dict(coordinator_address="h", num_processes=2, process_id=0), "'h': want"),
    (dict(coordinator_address="h:1", num_processes=2, process_id=2), "< --num"),
    (dict(heartbeat_timeout=0), "--heartbeat_timeout=0"),
    (dict(join_timeout=0), "--join_timeout=0"),
  ],
)
def test_flags_that_do_not_fit(given, words):
  with pytest.raises(ValueError, match=words):
    distributed.initialize(**given)


def test_alone_it_is_told_by_sigterm(monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.delenv("SLURM_NTASKS", raising=False)
  try:
    distributed.initialize()
    assert signal.getsignal(signal.SIGTERM) == before
    distributed.initialize(stops=True)
    assert not distributed.preempted()
    distributed.check()
    os.kill(os.getpid(), signal.SIGTERM)
    assert distributed.preempted() and distributed.preempted()
    with pytest.raises(distributed.Preempted):
      distributed.check()
  finally:
    signal.signal(signal.SIGTERM, before)
    distributed._told_to_stop.clear()
