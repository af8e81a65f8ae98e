"""docs/extending.md says what works: its files are run as they stand there."""

import importlib
import json
import os
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import tensorflow as tf

from lookup_vit import checkpoints, config_utils, train_step
from lookup_vit.analysis import flops, steps
from lookup_vit.preprocess import get_preprocess_fn
from tests import programs

_TEXT = pathlib.Path("docs/extending.md").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
  """A folder with the files of the page."""
  folder = tmp_path_factory.mktemp("extending")
  for code in re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL):
    path = folder / re.match(r"# (\S+)\n", code)[1]
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
  return folder


@pytest.fixture(scope="module")
def outputs(project):
  """What the commands of the page print, run there in turn."""
  (block,) = re.findall(r"```sh\n(.*?)```", _TEXT, re.DOTALL)
  block = block.replace("\\\n", " ").strip()
  found = []
  for command in block.splitlines():
    python, *args = shlex.split(command)
    assert python == "python"
    process = programs.Program(*args, cwd=project)
    out, err = process.communicate()
    assert process.returncode == 0, err
    found.append(out)
  return found


@pytest.fixture
def module(project, monkeypatch):
  """Imports a file of the page, as users' programs do."""
  monkeypatch.syspath_prepend(project)
  return lambda name: importlib.import_module(f"my_project.{name}")


def _row(project, split):
  results = project / "workdirs" / "stripes" / "results.json"
  (row,) = [r for r in json.loads(results.read_text()) if r["split"] == split]
  return row


def test_page_has_four_parts_and_a_config(project):
  names = ["calibration", "config", "mixer", "ops", "stripes_dataset_builder"]
  assert sorted(os.listdir(project / "my_project")) == [
    f"{n}.py" for n in names
  ]


def test_run_learns(project, outputs):
  assert _row(project, "test")["top1"] == 1.0
  assert "| my_project.mixer mu/8 (depth 2) | - | test |" in outputs[0]
  last = [out.strip().splitlines()[-1] for out in outputs]
  assert last[0] == last[1] and "| calibration | ece |" in last[0]


def test_metrics_are_those_of_an_independent_count(project, outputs, module):
  # Images, op, model and metric again, without pipeline, TFDS or bins of JAX.
  stripes = module("stripes_dataset_builder")
  labels = np.array([seed % 3 for seed in range(1000, 1060)])
  images = np.stack([stripes.draw(s, s % 3) for s in range(1000, 1060)])
  images = np.where(images >= 128, 1.0, -1.0)
  workdir = str(project / "workdirs" / "stripes")
  config = config_utils.read_workdir(workdir)
  model = train_step.build_model(config)
  params = checkpoints.load_params(workdir)[0]
  logits, out = model.apply({"params": params}, images)
  assert out["pre_logits"].shape == (60, 32)
  probabilities = np.asarray(jax.nn.softmax(logits))
  right = probabilities.argmax(1) == labels
  assert right.mean() == _row(project, "test")["top1"]
  confidence = probabilities.max(1)
  error = 0.0
  for k in range(10):
    inside = (confidence > k / 10) & (confidence <= (k + 1) / 10)
    if inside.any():
      gap = abs(right[inside].mean() - confidence[inside].mean())
      error += inside.sum() / 60 * gap
  assert error > 0.01
  assert _row(project, "calibration")["ece"] == pytest.approx(error, rel=1e-4)


def test_wrong_arguments_are_named(project, module):
  with pytest.raises(ValueError, match="no field 'token_ration'.*token_ratio"):
    module("mixer").Model(3, "mu/8", token_ration=1.0)
  with pytest.raises(ValueError, match="op 1 of 1.*want 0 to 255"):
    get_preprocess_fn("my_project.ops.threshold(300)")


def test_op(project, module):
  fn = get_preprocess_fn("my_project.ops.threshold(9,jitter=2)")
  image = tf.constant(np.arange(20, dtype=np.uint8).reshape(4, 5, 1))

  def first_white(seed):
    white = fn({"image": image}, tf.constant([0, seed]))["image"].numpy()
    assert set(white.ravel()) == {0, 255}
    return int((white == 0).sum())

  found = [first_white(seed) for seed in range(40)]
  assert set(found) == {7, 8, 9, 10, 11}
  assert found == [first_white(seed) for seed in range(40)]


@pytest.mark.full
def test_a_dry_run_counts_what_the_model_needs(project, module):
  config = config_utils.load(str(project / "my_project" / "config.py"))
  config = steps.prepare(config, None)
  one = flops.cost(train_step.build_model(config), (32, 32)).xla_flops
  found = steps.count(config, jax.devices()[:1], "evaluation", None)
  assert found["flops"] == pytest.approx(30 * one, rel=0.02)
