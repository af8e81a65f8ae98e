"""The notebook: as it is committed, its installation, and all of it run."""

import base64
import copy
import glob
import importlib.util
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

import lookup_vit
from lookup_vit import config_utils
from lookup_vit.analysis import accuracy_vs_flops

_PATH = "notebooks/lookup_vit_colab.ipynb"
_NOTEBOOK = nbformat.read(_PATH, as_version=4)


def _code(notebook):
  """Cells of code by their names."""
  return {c.id: c for c in notebook.cells if c.cell_type == "code"}


def _text(cell):
  """What a cell shows, but for pictures."""
  found = []
  for output in cell.outputs:
    data = output.get("data", {})
    found.append(output.get("text") or data.get("text/markdown", ""))
  return "\n".join(found)


def _pictures(cell):
  """PNGs that a cell shows, as bytes."""
  data = [output.get("data", {}) for output in cell.outputs]
  return [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]


def _kinds(cell):
  """What a cell shows: streams by name, the rest by type."""
  found = set()
  for output in cell.outputs:
    found |= {output.get("name"), *output.get("data", {})}
  return found - {None, "text/plain"}


# As committed.


def test_is_a_notebook_that_was_run_from_top_to_bottom():
  nbformat.validate(_NOTEBOOK)
  cells = _code(_NOTEBOOK).values()
  assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
  for cell in _NOTEBOOK.cells:
    assert "execution" not in cell.metadata  # Times.
  for cell in cells:
    for output in cell.outputs:
      assert output.output_type != "error", cell.id
      assert output.get("name") != "stderr", (cell.id, output.text)


def test_outputs_are_small_pictures_and_no_paths():
  size = 0
  for cell in _code(_NOTEBOOK).values():
    path = re.search(r"(?<![\w.:])/(?!/)\w+/[^\s|]*", _text(cell))
    assert not path, (cell.id, path[0])
    for picture in _pictures(cell):
      size += len(picture)
      Image.open(io.BytesIO(picture)).verify()
  assert 10_000 < size < 300 * 2**10


def test_outputs_are_of_the_parameters_that_are_shown():
  source = _code(_NOTEBOOK)["parameters"].source
  values = {}
  exec(source, values)
  values.pop("__builtins__")
  assert values == dict(
    REPOSITORY="", SMALL=False, FOLDER="", WORKDIRS="workdirs/colab"
  )
  cells = _code(_NOTEBOOK)
  for name in ("lookup", "vit"):
    config = config_utils.load(f"configs/digits_{name}.py")
    # 1,437 digits.
    steps = math.ceil(config.total_epochs * 1437 / config.input.batch_size)
    assert f"step {steps}/{steps} (100%)" in _text(cells[f"train-{name}"])
  grids = re.findall(r"\| LookupViT .*?\| (\dx\d) \|", _text(cells["curve"]))
  assert grids == ["2x2", "3x3", "5x5"]
  accuracies = re.findall(
    r"\| test \| \S+ \| \S+ \| (\S+)", _text(cells["curve"])
  )
  assert len(accuracies) == 4 and min(map(float, accuracies)) > 95


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


# All of it, run.


def _own_images(folder):
  """Photographs of other sizes, of three classes."""
  rng = np.random.default_rng(0)
  for split, count in ("train", 12), ("val", 2):
    for i, kind in enumerate(("blue", "green", "red")):
      (folder / split / kind).mkdir(parents=True)
      for n in range(count):
        image = rng.integers(0, 99, (40 + n, 50, 3), np.uint8)
        image[..., 2 - i] += 150
        path = folder / split / kind / f"{n}.jpg"
        Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  """The notebook in its small mode, then some of it on a folder of images.

  Returns:
    The directory, the notebook, and what its last cells show.
  """
  folder = tmp_path_factory.mktemp("notebook")
  notebook = copy.deepcopy(_NOTEBOOK)
  cells = _code(notebook)
  parameters = cells["parameters"]
  parameters.source, count = re.subn(
    r"^SMALL = False\b", "SMALL = True", parameters.source, flags=re.M
  )
  assert count == 1
  for cell in cells.values():
    cell.outputs = []
  length = len(notebook.cells)
  _own_images(folder / "photos")
  source = "FOLDER = 'photos'\nMINE = f'{WORKDIRS}/photos'"
  notebook.cells.append(nbformat.v4.new_code_cell(source))
  for name in ("folder", "tune", "predict"):
    cell = copy.deepcopy(cells[name])
    cell.id = f"own-{name}"
    notebook.cells.append(cell)
  with pytest.MonkeyPatch.context() as m:
    m.setenv("PYTHONPATH", str(_root()))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
      m.setenv(name, str(folder / name.lower()))
    nbclient.NotebookClient(
      notebook,
      timeout=600,
      kernel_name="python3",
      coalesce_streams=True,
      resources=dict(metadata=dict(path=str(folder))),
    ).execute()
  own = _code(notebook)
  notebook.cells = notebook.cells[:length]
  with pytest.MonkeyPatch.context() as m:
    m.chdir(folder)
    yield folder, notebook, own


def _results(name):
  return accuracy_vs_flops.read(f"workdirs/colab/{name}")


@pytest.mark.full
def test_shows_what_the_committed_one_shows(executed):
  _, notebook, _ = executed
  cells = _code(notebook)
  assert {n: _kinds(c) for n, c in cells.items()} == {
    n: _kinds(c) for n, c in _code(_NOTEBOOK).items()
  }
  assert cells["install"].outputs == []


@pytest.mark.full
def test_curve_is_that_of_the_runs(executed):
  _, notebook, _ = executed
  rows = _results("digits_lookup") + _results("digits_vit")
  assert [r["grid"] for r in rows] == ["2x2", "3x3", "5x5", None]
  shown = _text(_code(notebook)["curve"]).strip().splitlines()[2:]
  assert len(shown) == len(rows)
  for row, line in zip(rows, shown, strict=True):
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == (row["grid"] or "-")
    assert cells[5] == f"{100 * row['top1']:.2f}"
  flops = [r["gflops"] for r in rows]
  assert flops == sorted(flops)


@pytest.mark.full
def test_pictures_are_those_on_disk(executed):
  _, notebook, _ = executed
  for cell, path in (
    ("curve", "accuracy_vs_flops.png"),
    ("maps", "digits_lookup/attention_maps.png"),
    ("features", "my_attention_maps.png"),
  ):
    (shown,) = _pictures(_code(notebook)[cell])
    assert shown == pathlib.Path("workdirs/colab", path).read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"))
    assert pixels.std() > 5


@pytest.mark.full
def test_probe_is_of_each_grid(executed):
  _, notebook, _ = executed
  (path,) = pathlib.Path("workdirs/colab/digits_lookup").glob(
    "evaluation_*.json"
  )
  rows = json.loads(path.read_text())
  assert [r["grid"] for r in rows] == ["2x2", "3x3", "5x5"]
  found = [r["top1"] for r in rows]
  (line,) = re.findall(r"\| top1 \|(.*)\|", _text(_code(notebook)["probe"]))
  shown = [float(cell) for cell in line.split("|")]
  assert shown == pytest.approx(found, abs=1e-4)
  # Random features tell digits apart better than chance, 0.1.
  assert min(shown) > 0.2


@pytest.mark.full
@pytest.mark.parametrize(
  "prefix, run, folder, classes",
  [
    ("", "mine", "workdirs/colab/even_or_odd", ["even", "odd"]),
    ("own-", "photos", "photos", ["blue", "green", "red"]),
  ],
)
def test_predictions_are_those_of_the_run(
  executed, prefix, run, folder, classes
):
  _, _, cells = executed
  log = _text(cells[f"{prefix}tune"])
  assert log.startswith("Started from workdirs/colab/digits_lookup, step 6.")
  predictor = lookup_vit.load(f"workdirs/colab/{run}")
  assert predictor.classes == classes
  head, _, *lines = _text(cells[f"{prefix}predict"]).strip().splitlines()
  table = [[c.strip() for c in x.strip("|").split("|")] for x in lines]
  assert head == "| image | 2x2 | 3x3 | 5x5 |" and len(table) == 6
  paths = [pathlib.Path(folder, "val", row[0]) for row in table]
  for column, grid in enumerate([(2, 2), (3, 3), (5, 5)], 1):
    found = predictor.predict(paths, grid=grid)
    total = found.probabilities.sum(-1)
    np.testing.assert_allclose(total, 1, atol=1e-5)
    for row, ((name, probability),) in zip(table, found.top(1), strict=True):
      shown, percent = row[column].split()
      assert shown == name
      assert float(percent.strip("%")) == pytest.approx(
        100 * probability, abs=0.06
      )


@pytest.mark.full
def test_flips_images_of_ones_own_alone(executed):
  pps = [
    config_utils.read_workdir(f"workdirs/colab/{run}").input.pp
    for run in ("digits_lookup", "mine", "photos")
  ]
  assert pps[0] == pps[1] and "flip_lr" not in pps[1]
  assert "flip_lr" in pps[2]
