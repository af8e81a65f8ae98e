"""Several processes: how they find each other, and how they leave together."""

import glob
import importlib.util
import itertools
import logging
import os
import signal
import threading

import jax
from absl import flags
from orbax.checkpoint import utils as ocp_utils

log = logging.getLogger("lookup_vit")

_told_to_stop = threading.Event()
_calls = itertools.count(1)


class Preempted(Exception):
  """The processes were told to stop."""


def define_flags() -> None:
  """Flags of the programs that run on several hosts."""
  flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, of several."
  )
  flags.DEFINE_integer("num_processes", None, "How many processes there are.")
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
  flags.DEFINE_integer(
    "join_timeout", 300, "Seconds in which all processes have to be there."
  )
  flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds after which a process that is silent counts as lost.",
  )


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  join_timeout: int = 300,
  heartbeat_timeout: int = 100,
  stops: bool = False,
) -> None:
  """Joins the other processes; call it once, before anything of JAX.

  Where the first three are not given, they are read off a Cloud TPU slice or
  SLURM (several tasks of a step); elsewhere this process is alone. Processes
  but the first log errors only. Where not all processes join, or one is lost,
  JAX aborts the others.

  Args:
    coordinator_address: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which of them this is.
    join_timeout: seconds in which all of them have to be there.
    heartbeat_timeout: seconds after which a process that is silent counts as
      lost.
    stops: whether SIGTERM from here on does not end the process but makes
      `preempted` true.

  Raises:
    ValueError: only some of the first three are given, or they do not fit.
  """
  given = dict(
    coordinator_address=coordinator_address,
    num_processes=num_processes,
    process_id=process_id,
  )
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < 3:
    raise ValueError(
      f"--{missing[0]} is not set: want all of --coordinator_address, "
      "--num_processes and --process_id, or none."
    )
  if not missing:
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
      raise ValueError(
        f"--coordinator_address={coordinator_address!r}: want HOST:PORT."
      )
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f"--process_id={process_id}: want 0 <= id < "
        f"--num_processes={num_processes}."
      )
  for name, seconds in (
    ("join_timeout", join_timeout),
    ("heartbeat_timeout", heartbeat_timeout),
  ):
    if seconds < 1:
      raise ValueError(f"--{name}={seconds}: want >= 1.")
  if missing and not _on_tpu() and not _in_slurm_step():
    if stops:
      signal.signal(signal.SIGTERM, lambda *_: _told_to_stop.set())
    return
  if not stops:
    jax.config.update("jax_enable_preemption_service", False)
  if num_processes is not None:
    log.info(
      "Process %d waits for all %d to join at %s, at most %d s.",
      process_id,
      num_processes,
      coordinator_address,
      join_timeout,
    )
  jax.distributed.initialize(
    **given,
    initialization_timeout=join_timeout,
    heartbeat_timeout_seconds=heartbeat_timeout,
  )
  if jax.process_index() != 0:
    log.setLevel(logging.ERROR)


def initialize_by_flags(stops: bool = False) -> None:
  """As `initialize`, by the flags of `define_flags`."""
  values = flags.FLAGS
  initialize(
    values.coordinator_address,
    values.num_processes,
    values.process_id,
    values.join_timeout,
    values.heartbeat_timeout,
    stops,
  )


def _on_tpu() -> bool:
  # The library alone is not enough: dry runs have it on any machine.
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  has_library = importlib.util.find_spec("libtpu") is not None
  return bool(chips) and has_library


def _in_slurm_step() -> bool:
  # Set by srun, not in the script of sbatch.
  in_step = "SLURM_STEP_NODELIST" in os.environ
  return in_step and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def preempted() -> bool:
  """Whether all processes are to save and leave now.

  SIGTERM, or a notice of the TPU runtime, to any process makes it true on all
  of them at the same call. All call it equally often, at every step.
  """
  if jax.distributed.is_initialized():
    return ocp_utils.reached_preemption(next(_calls))
  return _told_to_stop.is_set()


def check() -> None:
  """Raises Preempted where `preempted` is true."""
  if preempted():
    raise Preempted
