"""Running a program: flags, logs and errors as a person wants them."""

import glob
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import absl.logging
from absl import app, flags

# Status of a run that was told to stop, and saved its state before: EX_TEMPFAIL
# of sysexits.h. The same command continues it.
PREEMPTED = 75

# What a user can mend: a wrong value, a file, a rate that is too high.
_USER_ERRORS = (ValueError, OSError, FloatingPointError)


def run(main: Callable[[Any], Any], takes_command: bool = False) -> None:
  """Runs a program's `main` under absl, with readable logs and errors.

  A ValueError, OSError or FloatingPointError is the user's to mend: its message
  alone is printed, and the exit code is 1. `--verbosity=1` shows the traceback.

  Args:
    main: called with the arguments that are no flags.
    takes_command: whether there may be any, behind `--`.
  """

  def parse(argv):
    # This calls the config's get_config too.
    try:
      argv = flags.FLAGS(argv)
    except flags.Error as e:
      if _debug():
        raise
      text = str(e).strip()
      if "Traceback" in text:  # config_flags puts that of get_config into it.
        _fail(text.splitlines()[-1].strip().removeprefix("ValueError: "))
      _fail(f"{text}\nTry --help.")
    except (AttributeError, KeyError) as e:
      if _debug():
        raise
      _fail(f"no such config field to override: {e.args[0]}")
    if len(argv) > 1 and not takes_command:
      _fail(f"unexpected arguments {argv[1:]}; a flag is --NAME=VALUE.")
    return argv

  def guarded(argv):
    setup_logging(_debug())
    _leave_out_tpu()
    try:
      main(argv)
    except _USER_ERRORS as e:
      if _debug():
        raise
      text = str(e).strip()
      if "Configuration is not available" in text:
        # config_flags says so, at length, where the file cannot be read.
        text = text.splitlines()[-1].strip()
      _fail(text)

  app.run(guarded, flags_parser=parse)


def has_tpu() -> bool:
  """Whether TPU chips, and the library for them, are on this machine."""
  # The library alone is not enough: dry runs have it on any machine.
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _leave_out_tpu():
  # The library would be tried, and would complain that there is no TPU.
  has_library = importlib.util.find_spec("libtpu") is not None
  has_cuda = importlib.util.find_spec("jax_cuda12_plugin") is not None
  is_set = os.environ.get("JAX_PLATFORMS")
  if not has_library or has_tpu() or has_cuda or is_set:
    return
  if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_platforms", "cpu")


def _debug():
  return absl.logging.get_verbosity() >= absl.logging.DEBUG


def _fail(message):
  sys.exit(f"error: {message}")


def setup_logging(debug: bool = False) -> None:
  """Sends this package's log to stderr; of other packages, errors only."""
  log = logging.getLogger("lookup_vit")
  log.setLevel(logging.DEBUG if debug else logging.INFO)
  log.propagate = False
  if not log.handlers:
    handler = logging.StreamHandler()
    form = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handler.setFormatter(form)
    log.addHandler(handler)
  if not debug:
    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
