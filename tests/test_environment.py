"""What a work directory says of the starts of its run."""

import json
import os
import pathlib
import subprocess
import sys

import flax
import jax
import numpy as np
import optax
import pytest

import lookup_vit
from lookup_vit import environment


def _rows(folder):
  return [json.loads(x) for x in (folder / "environment.jsonl").open()]


def test_every_start_adds_a_line(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "x", "--a=b c"])
  environment.write(str(tmp_path), 0)
  environment.write(str(tmp_path), 7)
  first, second = _rows(tmp_path)
  assert [first["step"], second["step"]] == [0, 7]
  assert first["command"] == "python -m x '--a=b c'"
  assert first["time"] <= second["time"]
  assert first["lookup_vit"] == lookup_vit.__version__
  assert first["python"] == ".".join(map(str, sys.version_info[:3]))
  for module in (jax, flax, optax, np):
    assert first["packages"][module.__name__] == module.__version__
  assert first["devices"] == {
    "kind": jax.devices()[0].device_kind,
    "platform": "cpu",
    "count": jax.device_count(),
    "processes": 1,
  }
  assert os.listdir(tmp_path) == ["environment.jsonl"]


def test_half_a_line_spoils_no_other(tmp_path):
  (tmp_path / "environment.jsonl").write_text('{"step": 0}\n{"ste')
  environment.write(str(tmp_path), 3)
  lines = (tmp_path / "environment.jsonl").read_text().splitlines()
  assert lines[:2] == ['{"step": 0}', '{"ste']
  assert json.loads(lines[2])["step"] == 3


def test_no_variables_but_those_of_jax_and_xla(tmp_path, monkeypatch):
  for name in list(os.environ):
    if name.startswith("JAX_"):
      monkeypatch.delenv(name)
  monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
  monkeypatch.setenv("JAX_NUMBER", "2")
  monkeypatch.setenv("SOME_API_KEY", "hunter2")
  environment.write(str(tmp_path), 0)
  [row] = _rows(tmp_path)
  assert row["variables"] == {"JAX_NUMBER": "2", "XLA_FLAGS": "--xla_x=1"}
  assert "hunter2" not in (tmp_path / "environment.jsonl").read_text()


def _git(folder, *args):
  who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
  command = ["git", *who, *args]
  return subprocess.check_output(command, cwd=folder, text=True).strip()


def test_git(tmp_path):
  file = tmp_path / "package" / "module.py"
  file.parent.mkdir()
  file.write_text("a = 1\n")
  assert environment.git_state(file) is None
  _git(tmp_path, "init", "--quiet")
  assert environment.git_state(file) is None
  _git(tmp_path, "add", "package")
  _git(tmp_path, "commit", "--quiet", "--message=All")
  commit = _git(tmp_path, "rev-parse", "HEAD")
  assert environment.git_state(file) == {"commit": commit, "dirty": False}
  # Data and runs beside it are not what it computes with.
  other = file.with_name("other.py")
  other.write_text("")
  assert environment.git_state(file) == {"commit": commit, "dirty": False}
  # Nor is a repository that the package only lies in.
  assert environment.git_state(other) is None
  file.write_text("a = 2\n")
  assert environment.git_state(file) == {"commit": commit, "dirty": True}


@pytest.mark.parametrize("script", [None, "exit 3", "sleep 60"])
def test_without_git_that_answers(script, tmp_path, monkeypatch):
  if script:
    git = tmp_path / "git"
    git.write_text(f"#!/bin/sh\n{'exec ' * (script != 'exit 3')}{script}\n")
    git.chmod(0o755)
  monkeypatch.setattr(environment, "_PATIENCE", 0.3)
  monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script else "/none")
  assert environment.git_state(pathlib.Path(lookup_vit.__file__)) is None
  environment.write(str(tmp_path), 0)
  assert _rows(tmp_path)[0]["git"] is None


def test_version_is_that_of_the_package():
  name = [sys.executable, "setup.py", "--version"]
  out = subprocess.check_output(name, text=True, stderr=subprocess.DEVNULL)
  assert out.split()[-1] == lookup_vit.__version__
