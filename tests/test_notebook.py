"""The notebook: what it names, and its installation."""

import glob
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

import lookup_vit

_PATH = "notebooks/lookup_vit_colab.ipynb"
_NOTEBOOK = nbformat.read(_PATH, as_version=4)


def _code(notebook):
  """Cells of code by their names."""
  return {c.id: c for c in notebook.cells if c.cell_type == "code"}


# As committed.


def test_files_that_are_named_are_there():
  text = "\n".join(c.source for c in _NOTEBOOK.cells)
  names = set(re.findall(r"\b(?:docs|configs)/\w+\.\w+|\b[A-Z]+\.md", text))
  assert len(names) > 5
  assert not [n for n in names if not os.path.exists(n)]


# Installation.


@pytest.fixture
def install(monkeypatch, tmp_path):
  """Runs the cell where nothing is installed; returns the commands."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [])

  def call(found=None, devices=(), programs=(), repository="https://a.b/c"):
    commands = []

    def run(command, check, cwd=None):
      assert check
      commands.append((command, cwd))

    with monkeypatch.context() as m:
      m.setattr(importlib.util, "find_spec", lambda name: found)
      m.setattr(glob, "glob", lambda p: [p] if p in devices else [])
      m.setattr(shutil, "which", lambda p: p if p in programs else None)
      m.setattr(subprocess, "run", run)
      source = _code(_NOTEBOOK)["install"].source
      exec(source, dict(REPOSITORY=repository))
    return commands

  return call


@pytest.mark.parametrize(
  "machine, extra",
  [
    ({}, ""),
    (dict(programs=["nvidia-smi"]), "[cuda]"),
    (dict(devices=["/dev/accel*"]), "[tpu]"),
    (dict(devices=["/dev/vfio/[0-9]*"]), "[tpu]"),
  ],
)
def test_installs_for_the_device(install, tmp_path, machine, extra):
  (git, _), (pip, cwd) = install(**machine)
  clone = str(tmp_path / "lookup_vit_repository")
  assert git[:2] == ["git", "clone"] and git[-2:] == ["https://a.b/c", clone]
  assert pip[:4] == [sys.executable, "-m", "pip", "install"]
  assert pip[-4:] == ["-c", "requirements.lock", "-e", f".{extra}"]
  assert cwd == clone and sys.path == [clone]
  name = extra.strip("[]")
  assert f'"{name}": [' in pathlib.Path(_root(), "setup.py").read_text() or (
    not name
  )


def _root():
  return pathlib.Path(lookup_vit.__file__).parents[1]


def test_does_not_clone_twice_and_installs_nothing_where_it_is(
  install, tmp_path
):
  assert install(found="there", repository="") == []
  with pytest.raises(ValueError, match="^Set REPOSITORY"):
    install(repository="")
  (tmp_path / "lookup_vit_repository").mkdir()
  ((command, _),) = install(repository="")
  assert "pip" in command
