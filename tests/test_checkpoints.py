"""Checkpoints: exact, and checked."""

import os
import re
import shutil

import jax
import numpy as np
import pytest

from lookup_vit import checkpoints, config_utils, train
from tests import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  config = small.config(evals={}, ckpt_keep=3)
  return config, workdir, train.train_and_evaluate(config, workdir)


@pytest.fixture
def copy(run, tmp_path):
  config, workdir, state = run
  target = str(tmp_path / "copy")
  shutil.copytree(workdir, target)
  return config, target, state


def test_classes(tmp_path):
  workdir = str(tmp_path / "run")
  assert checkpoints.read_classes(workdir) is None
  names = ["tabby cat", "Bär", 'a "quoted" one']
  checkpoints.write_classes(workdir, names)
  assert os.listdir(workdir) == ["classes.json"]
  assert checkpoints.read_classes(workdir) == names
  for text in ('["a', '{"a": 1}', '["a", 1]'):
    (tmp_path / "run" / "classes.json").write_text(text)
    with pytest.raises(ValueError, match="classes.json is damaged"):
      checkpoints.read_classes(workdir)


def _largest_file(folder):
  files = [
    os.path.join(root, name)
    for root, _, names in os.walk(folder)
    for name in names
  ]
  return max(files, key=os.path.getsize)


def _flip(path):
  with open(path, "r+b") as f:
    content = bytearray(f.read())
    content[len(content) // 2] ^= 0x10
    f.seek(0)
    f.write(content)


def _truncate(path):
  with open(path, "r+b") as f:
    f.truncate(os.path.getsize(path) // 2)


@pytest.mark.parametrize(
  "damage, item",
  [(_flip, "params"), (_truncate, "opt_state"), (os.remove, "params")],
)
def test_damage_is_noticed_and_the_offer_works(copy, damage, item):
  config, workdir, state = copy
  damage(_largest_file(os.path.join(workdir, "checkpoints", "12", item)))
  with pytest.raises(checkpoints.DamagedCheckpointError) as e:
    train.train_and_evaluate(config, workdir)
  message = str(e.value)
  assert os.path.join("checkpoints", "12") in message
  assert "step 8" in message
  # The command that it offers.
  source, target = re.search(r"mv (\S+) (\S+)$", message).groups()
  shutil.move(source, target)
  again = train.train_and_evaluate(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_damage_of_the_only_checkpoint(copy):
  _, workdir, _ = copy
  for step in (4, 8):
    shutil.rmtree(os.path.join(workdir, "checkpoints", str(step)))
  _flip(_largest_file(os.path.join(workdir, "checkpoints", "12", "params")))
  with pytest.raises(checkpoints.DamagedCheckpointError, match="no earlier"):
    checkpoints.load_params(workdir)


def test_a_save_that_was_killed_does_not_count(copy):
  _, workdir, _ = copy
  folder = os.path.join(workdir, "checkpoints")
  shutil.copytree(
    os.path.join(folder, "12"),
    os.path.join(folder, "16.orbax-checkpoint-tmp"),
  )
  assert checkpoints.load_params(workdir)[1] == 12


def test_missing_things_are_named(tmp_path, run):
  with pytest.raises(ValueError, match=r"no config\.json"):
    checkpoints.load_params(str(tmp_path))
  with pytest.raises(ValueError, match=r"no checkpoint 5, only \[4, 8, 12\]"):
    checkpoints.load_params(run[1], 5)
  config = config_utils.resolve(small.config())
  checkpoints.write_config(str(tmp_path), config)
  with pytest.raises(ValueError, match="has no checkpoint"):
    checkpoints.load_params(str(tmp_path))
