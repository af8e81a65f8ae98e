r"""Runs a program as one or several processes here, and again after a failure.

    python -m lookup_vit.supervise --num_processes=2 --restarts=3 -- \
        python -m lookup_vit.train --config=configs/digits_lookup.py \
        --workdir=DIR

The status is that of the program: 0, 1 for an error of the user's, 75 where it
was told to stop and saved its state (`cli.PREEMPTED`). After another one, the
same command starts again, up to `--restarts` times; after 75 it does so without
counting, unless this program was told to stop.
"""

import collections
import contextlib
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from absl import flags

from lookup_vit import cli
from lookup_vit.cli import PREEMPTED

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")

# Statuses that another start would not mend: done, the user's error, a wrong
# flag, and what a shell says of a program that it cannot run.
_FINAL = (0, 1, 2, 126, 127)
# Lines of a lost process to show.
_LAST_LINES = 10


class Run:
  """The processes of one start.

  Args:
    command: program and arguments.
    num_processes: how many; with several, each gets the flags of
      `distributed.define_flags`.
    heartbeat_timeout: seconds, for those flags.
    grace: seconds that the others have to end after one was lost.
    stop_timeout: seconds that all have to end after they were told to.
  """

  def __init__(
    self,
    command: Sequence[str],
    num_processes: int,
    heartbeat_timeout: int,
    grace: float,
    stop_timeout: float,
  ):
    self.grace = grace
    self.stop_timeout = stop_timeout
    self.step = None
    self.lines = [
      collections.deque(maxlen=_LAST_LINES) for _ in range(num_processes)
    ]
    self.processes = []
    self.threads = []
    port = _free_port()
    for i in range(num_processes):
      arguments = list(command)
      if num_processes > 1:
        arguments += [
          f"--coordinator_address=127.0.0.1:{port}",
          f"--num_processes={num_processes}",
          f"--process_id={i}",
          f"--heartbeat_timeout={heartbeat_timeout}",
        ]
      process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=None if i == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # A group, for signals to reach what a wrapper started.
        start_new_session=True,
      )
      self.processes.append(process)
      # By a thread each: a process must not wait for its lines to be read.
      thread = threading.Thread(target=self._read, args=(i,), daemon=True)
      thread.start()
      self.threads.append(thread)

  def _read(self, i):
    for line in self.processes[i].stderr:
      self.lines[i].append(line.rstrip("\n"))
      if i == 0:
        # Its reader may be gone; the process must go on all the same.
        with contextlib.suppress(OSError, ValueError):
          sys.stderr.write(line)
          sys.stderr.flush()
      if step := re.search(r"\bstep (\d+)/\d+ ", line):
        self.step = int(step[1])

  def signal(self, number: int) -> None:
    """Sends a signal to all processes, and to what they started."""
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)

  def wait(self, told_to_stop: threading.Event) -> int:
    """Waits for the end of all processes, and returns the status of the run.

    Where one is lost, it ends the others, and says which and at which step.

    Args:
      told_to_stop: from when it is set, processes have `stop_timeout` to end.
    """
    failed, end = [], math.inf
    while not failed and time.monotonic() < end:
      codes = self._codes()
      failed = [i for i, c in enumerate(codes) if c not in (None, 0, PREEMPTED)]
      if None not in codes:
        break
      if told_to_stop.is_set() and end == math.inf:
        end = time.monotonic() + self.stop_timeout
      time.sleep(0.1)
    if failed:  # Who else is ending shows soon; the others have some time.
      time.sleep(0.3)
      codes = self._codes()
      end = time.monotonic() + self.grace
      while None in self._codes() and time.monotonic() < end:
        time.sleep(0.1)
    hang = [i for i, code in enumerate(self._codes()) if code is None]
    self.signal(signal.SIGKILL)
    for process in self.processes:
      process.wait()
    for thread in self.threads:
      thread.join(timeout=1)
    if hang:
      names = ", ".join(map(str, hang))
      log.error("Killed, as they did not end: process %s.", names)
    if not failed:
      return max(map(_status, self._codes()))
    # Those who are left are aborted, or see errors, because of the lost one.
    failed = [i for i, code in enumerate(codes) if code not in (None, 0)]
    first = min(failed, key=lambda i: _rank(codes[i]))
    status = _status(codes[first])
    if status not in _FINAL and not told_to_stop.is_set():
      log.error(
        "Process %d of %d, on %s, was lost %s: it ended %s.",
        first,
        len(codes),
        socket.gethostname(),
        f"after step {self.step}" if self.step else "before the first step",
        f"by {signal.Signals(status - 128).name}"
        if codes[first] < 0
        else f"with status {status}",
      )
    if first != 0:  # The lines of process 0 were shown.
      for line in self.lines[first]:
        log.error("  process %d: %s", first, line)
    return status

  def _codes(self):
    return [process.poll() for process in self.processes]


def _status(code: int) -> int:
  """As a shell has it."""
  return code if code >= 0 else 128 - code


def _rank(code: int) -> int:
  """Which of several ends came first: killed, crashed, aborted, an error."""
  if code < 0:
    return 2 if code == -signal.SIGABRT else 0
  return 3 if code in _FINAL else 1


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def supervise(
  command: Sequence[str],
  num_processes: int = 1,
  restarts: int = 0,
  heartbeat_timeout: int = 10,
  grace: float = 20.0,
  stop_timeout: float = 300.0,
) -> int:
  """Runs a command until it is done, or may not be started again.

  Args:
    command: program and arguments.
    num_processes: how many of it, on this machine.
    restarts: how often it may start again after a crash.
    heartbeat_timeout: seconds after which a silent process counts as lost.
    grace: seconds that processes have to end after one was lost.
    stop_timeout: seconds that they have to save and end after SIGTERM or
      SIGINT, before they are killed.

  Returns:
    The status, as a shell has it: 128 + n for one that signal n ended.

  Raises:
    ValueError: an argument is out of range.
    OSError: the command cannot be run.
  """
  if num_processes < 1 or restarts < 0:
    raise ValueError(
      f"--num_processes={num_processes}, --restarts={restarts}: want at least "
      "1 and 0."
    )
  told_to_stop = threading.Event()
  run = None

  def stop(number, frame):
    del frame
    told_to_stop.set()
    if run is not None:
      run.signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
  while True:
    run = Run(command, num_processes, heartbeat_timeout, grace, stop_timeout)
    if told_to_stop.is_set():  # While it was being started.
      run.signal(signal.SIGTERM)
    status = run.wait(told_to_stop)
    if status in _FINAL or told_to_stop.is_set():
      return status
    if status == PREEMPTED:
      log.info("It was told to stop and saved its state; starting again.")
      time.sleep(1)
      continue
    if not restarts:
      return status
    restarts -= 1
    log.info("Starting again; %d more restart(s).", restarts)


def main(argv):
  """Supervises by the flags."""
  if not argv[1:]:
    raise ValueError("no command: want supervise [FLAGS] -- COMMAND.")
  sys.exit(
    supervise(
      argv[1:],
      FLAGS.num_processes,
      FLAGS.restarts,
      FLAGS.heartbeat_timeout,
      FLAGS.grace,
      FLAGS.stop_timeout,
    )
  )


if __name__ == "__main__":
  flags.DEFINE_integer("num_processes", 1, "Processes on this machine.")
  flags.DEFINE_integer("restarts", 0, "How often to start again after a crash.")
  flags.DEFINE_integer("heartbeat_timeout", 10, "Seconds of silence.")
  flags.DEFINE_float("grace", 20.0, "Seconds for others to end after a loss.")
  flags.DEFINE_float("stop_timeout", 300.0, "Seconds to save when told to end.")
  cli.run(main, takes_command=True)
