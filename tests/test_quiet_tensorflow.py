"""Tests of lookup_vit/quiet_tensorflow.py: each in a process of its own."""

import os
import pathlib
import subprocess
import sys

ROOT = str(pathlib.Path(__file__).resolve().parents[1])


def run(code, *paths):
  """Runs code that finds modules in `paths` first."""
  path = os.pathsep.join([*map(str, paths), ROOT])
  # Under a setting of the user's, TensorFlow might be quiet by itself.
  unset = ("TF_CPP_MIN_LOG_LEVEL", "PYTHONWARNINGS")
  env = {k: v for k, v in os.environ.items() if k not in unset}
  return subprocess.run(
    [sys.executable, "-c", code],
    env=dict(env, PYTHONPATH=path),
    capture_output=True,
    text=True,
    timeout=120,
  )


def stub(path, source):
  """Writes a package `tensorflow`; it prints to stderr as C++ does."""
  (path / "tensorflow").mkdir()
  code = 'import os\nos.write(2, b"note from C++\\n")\n' + source
  (path / "tensorflow" / "__init__.py").write_text(code)


_SPEAK = """
import os, sys
print("before", file=sys.stderr)
from lookup_vit import quiet_tensorflow
print("after", file=sys.stderr)
os.write(2, b"by descriptor\\n")
import tensorflow as tf
print(float(tf.reduce_sum([1.0, 2.0])), len(tf.config.get_visible_devices()))
"""


def test_import_prints_nothing_and_leaves_stderr():
  result = run(_SPEAK)
  assert result.returncode == 0, result.stderr
  assert result.stderr == "before\nafter\nby descriptor\n"
  assert result.stdout == "3.0 1\n"


def test_notes_are_kept_back(tmp_path):
  stub(
    tmp_path,
    "class config:\n"
    "  set_visible_devices = lambda devices, kind: print(devices, kind)\n",
  )
  code = "import sys; from lookup_vit import quiet_tensorflow; "
  result = run(code + "print('after', file=sys.stderr)", tmp_path)
  assert result.returncode == 0, result.stderr
  assert result.stderr == "after\n"
  assert result.stdout == "[] GPU\n"


def test_started_tensorflow_is_accepted(tmp_path):
  stub(
    tmp_path,
    "class config:\n"
    "  def set_visible_devices(devices, kind):\n"
    "    raise RuntimeError('already initialised')\n",
  )
  result = run("from lookup_vit import quiet_tensorflow", tmp_path)
  assert result.returncode == 0, result.stderr
  assert result.stderr == ""


def test_failure_shows_what_was_printed(tmp_path):
  stub(tmp_path, "raise ImportError('no libtensorflow')\n")
  code = """
import sys
try:
  from lookup_vit import quiet_tensorflow
except ImportError as e:
  print("raised", e, file=sys.stderr)
"""
  result = run(code, tmp_path)
  assert result.returncode == 0, result.stderr
  assert result.stderr == "note from C++\nraised no libtensorflow\n"
  result = run("from lookup_vit import quiet_tensorflow", tmp_path)
  assert result.returncode == 1
  assert result.stderr.startswith("note from C++\nTraceback")
  assert "ImportError: no libtensorflow" in result.stderr
