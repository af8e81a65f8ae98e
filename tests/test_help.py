"""`--help` of every program: what it does, an example, and its own flags."""

import ast
import pathlib

import pytest

from tests import programs


def _module(path):
  return ".".join(path.with_suffix("").parts)


def _programs():
  """Modules that are programs, by the files there are."""
  paths = [
    path
    for folder in ("lookup_vit", "benchmarks", "data")
    for path in sorted(pathlib.Path(folder).rglob("*.py"))
  ]
  return [p for p in paths if '\nif __name__ == "__main__":' in p.read_text()]


def _flags(tree):
  """Names of the flags that a file defines where it is a program."""
  calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
  return [
    call.args[0].value
    for call in calls
    if isinstance(call.func, ast.Attribute)
    and call.func.attr.startswith("DEFINE_")
  ]


@pytest.fixture(scope="module")
def helps():
  """What each program prints, started two at a time."""
  paths, found = _programs(), {}
  for pair in zip(paths[::2], [*paths[1::2], None], strict=False):
    started = {
      path: programs.Program("-m", _module(path), "--help")
      for path in pair
      if path
    }
    for path, process in started.items():
      found[path] = (process.communicate(timeout=120), process.returncode)
  return found


@pytest.mark.parametrize("path", _programs(), ids=_module)
def test_help(path, helps):
  (out, err), status = helps[path]
  assert status == 0, err
  tree = ast.parse(path.read_text())
  doc = ast.get_docstring(tree)
  # What it does, and how it is started; then its flags, in their order.
  assert out.startswith(doc)
  assert f"\n    python -m {_module(path)}" in doc
  own = out.removeprefix(doc).strip().split("\n\n")[0]
  names = [
    line.split()[0].removeprefix("--").removeprefix("[no]")
    for line in own.splitlines()
    if line.startswith("  --")
  ]
  assert names == _flags(tree)
  assert "--alsologtostderr" not in out  # Of a library.
  assert all(len(line) <= 80 for line in out.splitlines()), out


def test_flags_of_parts_follow_and_say_what_they_are(helps):
  (out, _), _ = helps[pathlib.Path("lookup_vit/train.py")]
  own = out.index("--workdir ")
  assert own < out.index("\nThe device mesh, and how") < out.index("--mesh ")
  assert out.index("\nSeveral processes: ") < out.index("--process_id ")
  assert "--workdir" in out and "(required)" in out
  assert "--config.FIELD=VALUE" in out
  (out, _), _ = helps[pathlib.Path("benchmarks/pod.py")]
  assert out.index("--topology ") < out.index("--sizes ")
  assert "(default v5e:2x2)" in out
  assert "--config.FIELD" not in out


def test_programs_were_found():
  found = {_module(path) for path in _programs()}
  assert {"lookup_vit.train", "benchmarks.pod", "data.digits.knn"} <= found
  assert len(found) > 15
