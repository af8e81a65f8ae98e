"""What a run was made with: a line in its work directory for each start."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax

import lookup_vit
from lookup_vit import config_utils

FILE = "environment.jsonl"

# Whose versions can change what a run computes; those that are installed.
_PACKAGES = (
  *("jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "flax", "optax"),
  *("orbax-checkpoint", "numpy", "tensorflow", "tensorflow-datasets"),
)
# Seconds for an answer of git.
_PATIENCE = 10


def describe() -> dict[str, Any]:
  """The environment of this process, of plain JSON types.

  Returns:
    `lookup_vit`, its version, and `git`, the state of its repository (see
    `git_state`); `python`, `platform`, and `packages`, by name; `devices`;
    `command`, the command line, and `variables`, those of the environment that
    are JAX's or XLA's: none of the others.
  """
  packages = {}
  for name in _PACKAGES:
    try:
      packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  variables = {
    name: value
    for name, value in sorted(os.environ.items())
    if name == "XLA_FLAGS" or name.startswith("JAX_")
  }
  return {
    "lookup_vit": lookup_vit.__version__,
    "git": git_state(pathlib.Path(lookup_vit.__file__)),
    "python": platform.python_version(),
    "platform": platform.platform(),
    "packages": packages,
    "devices": {
      "kind": jax.devices()[0].device_kind,
      "platform": jax.default_backend(),
      "count": jax.device_count(),
      "processes": jax.process_count(),
    },
    "command": shlex.join(sys.orig_argv),
    "variables": variables,
  }


def git_state(file: pathlib.Path) -> dict[str, Any] | None:
  """The state of the git repository that a file is tracked in.

  Args:
    file: such as a module's.

  Returns:
    `commit`, and whether tracked files differ from it, `dirty`. None where
    there is no such repository, no commit, or no git.
  """

  def git(*args):
    return subprocess.run(
      ["git", "-C", str(file.parent), *args],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      timeout=_PATIENCE,
      check=True,
      text=True,
    ).stdout.strip()

  try:
    # Installed, it may lie in a repository that it is no part of.
    git("ls-files", "--error-unmatch", file.name)
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.SubprocessError):
    return None
  return {"commit": commit, "dirty": bool(changed)}


def write(workdir: str, step: int) -> None:
  """Adds a line to `environment.jsonl`, of this start; call on one process.

  Args:
    workdir: of the run.
    step: that training starts from.
  """
  path = config_utils.workdir_path(workdir) / FILE
  before = path.read_text() if path.exists() else ""
  if before and not before.endswith("\n"):
    before += "\n"
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  line = json.dumps({"time": now, "step": step, **describe()})
  # Atomic: what earlier starts said must not be lost.
  part = path.with_name(FILE + ".tmp")
  part.write_text(f"{before}{line}\n")
  part.replace(path)
