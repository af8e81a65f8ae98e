"""Running a program: flags, logs and errors as a person wants them."""

import contextlib
import glob
import importlib.util
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import absl.logging
from absl import app, flags
from ml_collections.config_flags import config_path

from lookup_vit import config_utils

log = logging.getLogger("lookup_vit")

# Status of a run that was told to stop, and saved its state before: EX_TEMPFAIL
# of sysexits.h. The same command continues it.
PREEMPTED = 75

# What a user can mend: a wrong value, a file, a rate that is too high.
_USER_ERRORS = (ValueError, OSError, FloatingPointError)


# Packages whose flags `--help` shows; the rest are of libraries.
_OWN = ("lookup_vit", "benchmarks", "data")


def run(main: Callable[[Any], Any], takes_command: bool = False) -> None:
  """Runs a program's `main` under absl, with readable help, logs and errors.

  A ValueError, OSError or FloatingPointError is the user's to mend: its message
  alone is printed, and the exit code is 1. `--verbosity=1` shows the traceback.
  `--help` prints the docstring of the program and its flags.

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
      if field := re.search(r"of field (\S+) is not supported", text):
        _fail(
          f"--{field[1]}: only numbers, texts, booleans and tuples that a "
          "config sets can be set to others."
        )
      _fail(f"{text}\nTry --help.")
    except (AttributeError, KeyError) as e:
      if _debug():
        raise
      _fail(f"no such config field to override: {e.args[0]}")
    except OSError as e:
      if _debug():
        raise
      _fail(_text(e))
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
      _fail(_text(e))

  app.define_help_flags()
  flags.DEFINE_flag(_Help())
  app.run(guarded, flags_parser=parse)


class _Help(flags.BooleanFlag):
  """`--help`, in place of absl's, whose exit code is 1."""

  def __init__(self):
    super().__init__(
      "help", False, "Shows this.", short_name="h", allow_override=True
    )

  def parse(self, argument):
    if self._parse(argument):
      with contextlib.suppress(BrokenPipeError):  # As of `| head`.
        print(help_text(), flush=True)
      sys.exit(0)


def help_text() -> str:
  """What a program does, and its flags: its own, and those of its parts."""
  main = sys.modules["__main__"]
  by_module = flags.FLAGS.flags_by_module_dict()
  parts = [(main.__doc__ or "").strip()]
  own = flags.FLAGS.get_flags_for_module(sys.argv[0])
  if own:
    parts.append(_section("Flags:", own))
  for name, found in by_module.items():
    if name.partition(".")[0] in _OWN and name != __name__:
      title = (sys.modules[name].__doc__ or name).strip().splitlines()[0]
      parts.append(_section(title, found))
  if any(flag.flag_type() == "config object" for flag in own):
    parts.append(
      "--config.FIELD=VALUE, behind --config, sets what the config sets to "
      "another\nnumber or text."
    )
  parts.append(
    "--verbosity=1 shows tracebacks, --helpfull all flags there are."
  )
  return "\n\n".join(parts)


def _section(title, found):
  lines = [title]
  for flag in found:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    text = " ".join((flag.help or "").split()).replace(".;", ";")
    if any("other than None" in v.message for v in flag.validators):
      text += " (required)"
    elif flag.default is not None and flag.default not in (False, [], ""):
      default = flag.default_as_str.strip("'")
      text += f" (default {default})"
    lines += textwrap.wrap(
      *(f"{name:22}  {text}", 80),
      **dict(initial_indent="  ", subsequent_indent=" " * 26),
      **dict(break_on_hyphens=False, break_long_words=False),
    )
  return "\n".join(lines)


def log_overrides(name: str = "config") -> None:
  """Logs what `--config.FIELD=VALUE` sets, and what the config had there.

  Args:
    name: of the flag, one of `DEFINE_config_file`.
  """
  flag = flags.FLAGS[name]
  if flag.value is None or not flag.override_values:
    return
  before = config_utils.load(flag.config_filename)
  for field, value in flag.override_values.items():
    try:
      old = repr(config_path.get_value(field, before))
    except (AttributeError, IndexError, KeyError):
      old = "not set"
    log.info("%s.%s: %s, now %r", name, field, old, value)


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


def _text(error):
  text = str(error).strip()
  if "Configuration is not available" in text:
    # config_flags says so, at length, where the file cannot be read.
    text = text.splitlines()[-1].strip()
  return text


def _fail(message):
  sys.exit(f"error: {message}")


def setup_logging(debug: bool = False) -> None:
  """Sends this package's log to stderr; of other packages, errors only."""
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
