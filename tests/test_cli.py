"""Running programs: one message for an error, no traceback."""

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


PROGRAM = """
import sys
from absl import flags
from lookup_vit import cli
from ml_collections import config_flags

config_flags.DEFINE_config_file("config", None)
flags.DEFINE_integer("number", 1, "")
flags.DEFINE_string("error", "", "")

def main(argv):
  cli.log_overrides()
  if flags.FLAGS.error:
    raise dict(
      value=ValueError("config.x=3: want 4."),
      file=FileNotFoundError("no such thing"),
      float=FloatingPointError("loss is nan"),
      bug=KeyError("a bug"),
    )[flags.FLAGS.error]
  config = flags.FLAGS.config
  print("fine", flags.FLAGS.number, argv[1:], config and config.lr)

if __name__ == "__main__":
  cli.run(main)
"""

CONFIG = """
import ml_collections
from configs import common
def get_config(arg=None):
  arg = common.parse_arg(arg, size=3)
  more = dict(size=arg.size, none=None, pair=(1, 2), on=True)
  return ml_collections.ConfigDict(dict(lr=0.1, more=more))
"""


def start(program, args):
  return subprocess.Popen(
    [sys.executable, str(program), *args],
    env=dict(os.environ, PYTHONPATH=ROOT),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("more", [[], ["--config.lr=1"]])
def test_run_without_the_config_file(tmp_path, more):
  program = tmp_path / "program.py"
  program.write_text(PROGRAM)
  process = start(program, [f"--config={tmp_path}/none.py", *more])
  _, err = process.communicate(timeout=60)
  assert process.returncode == 1
  assert err.startswith("error: ") and "Traceback" not in err, err
  assert f"{tmp_path}/none.py" in err
  assert err.count("\n") == 1


def test_run(tmp_path):
  program, config = tmp_path / "program.py", tmp_path / "c.py"
  program.write_text(PROGRAM)
  config.write_text(CONFIG)
  debug = ["--verbosity=1"]
  cases = [
    # Arguments, exit code, all of stderr (or a part of a traceback).
    (["--number=2", "x"], 1, "error: unexpected arguments ['x']"),
    ([f"--config={config}:size=4", "--config.lr=0.5"], 0, None),
    (["--error=value"], 1, "error: config.x=3: want 4."),
    (["--error=file"], 1, "error: no such thing"),
    (["--error=float"], 1, "error: loss is nan"),
    (["--error=value", *debug], 1, "Traceback"),
    (["--error=bug"], 1, "Traceback"),
    (["--numbr=2"], 1, "error: Unknown command line flag 'numbr'"),
    (["--number=x"], 1, "error: flag --number=x"),
    ([f"--config={config}:sise=4"], 1, "error: Unknown config argument 'sise'"),
    ([f"--config={config}", "--config.lx=4"], 1, "error: "),
    (
      [f"--config={config}", "--config.more.none=4"],
      1,
      "error: --config.more.",
    ),
  ]
  running = [start(program, args) for args, *_ in cases]
  outputs = [p.communicate(timeout=60) for p in running]
  for (args, code, text), process, (out, err) in zip(
    cases, running, outputs, strict=True
  ):
    where = f"{args}\n{out}\n{err}"
    assert process.returncode == code, where
    if not code:
      assert "Traceback" not in err, where
      continue
    assert out == "", where
    if text == "Traceback":
      assert text in err, where
    else:
      assert err.startswith(text) and "Traceback" not in err, where
      assert len(err.strip().splitlines()) <= 3, where
  assert outputs[1][0] == "fine 1 [] 0.5\n"
  # What is overridden is said, and what was there: here of the argument.
  assert outputs[1][1].splitlines()[0].endswith(" config.lr: 0.1, now 0.5")
  assert outputs[1][1].count("\n") == 1
  # Of what the user is to mend, a message of one line.
  assert len({o[1] for o in outputs[2:5]}) == 3
  assert all(o[1].count("\n") == 1 for o in outputs[2:5])


def test_overrides_are_said(tmp_path):
  program, config = tmp_path / "program.py", tmp_path / "c.py"
  program.write_text(PROGRAM)
  config.write_text(CONFIG)
  own = [f"--config={config}:size=4", "--config.more.size=5"]
  own += ["--noconfig.more.on", "--config.more.pair=(3,4)", "--config.lr=0.1"]
  running = [start(program, args) for args in (own, own[:1], [])]
  errors = [process.communicate(timeout=60)[1] for process in running]
  assert [line.split(" ", 1)[1] for line in errors[0].splitlines()] == [
    "config.more.size: 4, now 5",
    "config.more.on: True, now False",
    "config.more.pair: (1, 2), now (3, 4)",
    "config.lr: 0.1, now 0.1",
  ]
  assert errors[1:] == ["", ""]
