"""Several processes: how they find each other, and how they leave together."""

import glob
import importlib.util
import logging
import os
import signal
import threading

import jax
import ml_collections
from absl import flags
from orbax.checkpoint import utils as ocp_utils

from lookup_vit import config_utils

log = logging.getLogger("lookup_vit")

_told_to_stop = threading.Event()


def define_flags() -> None:
  """Flags of the programs that run on many devices."""
  flags.DEFINE_string(
    "mesh", None, "Axes of the mesh, data=-1,tensor=4; the config's if not set."
  )
  flags.DEFINE_string("sharding", None, "Strategy; the config's if not set.")
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, for several processes.",
  )
  flags.DEFINE_integer("num_processes", None, "How many processes there are.")
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
  flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds after which a process that is silent counts as lost.",
  )


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins the other processes; call it once, before anything of JAX.

  Where the first three are not given, they are read off a Cloud TPU slice or
  SLURM (several tasks of a step); elsewhere this process is alone. Processes
  but the first log errors only. From here on SIGTERM does not end the process,
  but makes `preempted` true.

  Args:
    coordinator_address: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which of them this is.
    heartbeat_timeout: seconds after which a process that is silent counts as
      lost. The others are then aborted.

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
  if heartbeat_timeout < 1:
    raise ValueError(f"--heartbeat_timeout={heartbeat_timeout}: want >= 1.")
  if missing and not _on_tpu() and not _in_slurm_step():
    signal.signal(signal.SIGTERM, lambda *_: _told_to_stop.set())
    return
  jax.distributed.initialize(
    **given, heartbeat_timeout_seconds=heartbeat_timeout
  )
  if jax.process_index() != 0:
    log.setLevel(logging.ERROR)


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


def initialize_by_flags() -> None:
  """As `initialize`, by the flags of `define_flags`."""
  values = flags.FLAGS
  initialize(
    values.coordinator_address,
    values.num_processes,
    values.process_id,
    values.heartbeat_timeout,
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


def preempted(step: int) -> bool:
  """Whether all processes are to save after this step, and to leave.

  True on all of them at the same step, one that SIGTERM or a notice of the TPU
  runtime to any of them is followed by. Call it at every step.

  Args:
    step: number of updates made.
  """
  if jax.distributed.is_initialized():
    return ocp_utils.reached_preemption(step)
  return _told_to_stop.is_set()
