"""Tests of configs/cifar10.py."""

import re

import jax
import numpy as np
import pytest
from PIL import Image

from configs import cifar10, evals_cifar10
from lookup_vit import config_utils, train
from tests import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("cifar10")
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for name in ("cat", "dog"):
      where = root / split / name
      where.mkdir(parents=True)
      for i in range(5):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(where / f"{i}.png")
  return root


@pytest.mark.parametrize("model", ["vit", "lookup_vit"])
def test_trains_on_a_folder(folder, tmp_path, model):
  arg = f"folder={folder},model={model},width=16,depth=1,heads=2,batch=4"
  config = cifar10.get_config(f"{arg},epochs=1")
  if model == "lookup_vit":
    assert config.grids == [(3, 3), (4, 4), (5, 5)]
    config.grids, config.model.grid = [(3, 3)], (3, 3)
  state = train.train_and_evaluate(config, str(tmp_path))
  assert state.step == 3
  assert len(small.results(str(tmp_path))) == 1
  # Training images are those of the folder, shifted by up to 4, and flipped.
  config = config_utils.read_workdir(str(tmp_path))
  images = [
    np.asarray(Image.open(path), np.float32) / 127.5 - 1
    for path in folder.glob("train/*/*.png")
  ]
  windows = [
    np.pad(image, ((4, 4), (4, 4), (0, 0)), constant_values=-1)[
      top : top + 32, left : left + 32
    ][:, :: 1 if not flip else -1]
    for image in images
    for top in range(9)
    for left in range(9)
    for flip in (False, True)
  ]
  windows = np.stack(windows)
  batch = next(iter(train.make_dataset(config, 0)))["image"]
  for image in np.asarray(jax.device_get(batch)):
    assert np.abs(windows - image).max((1, 2, 3)).min() < 1e-5


def test_evaluators_of_a_run(folder, tmp_path):
  arg = f"folder={folder},width=16,depth=1,heads=2,batch=4,epochs=0.5"
  config = cifar10.get_config(arg)
  config.grids, config.model.grid = [(3, 3)], (3, 3)
  config.evals = evals_cifar10.get_config(f"folder={folder},split=val[:50%]")
  for evaluator in config.evals.values():
    evaluator.update(corruptions=["fog", "contrast"], severities=[1, 5])
  train.train_and_evaluate(config, str(tmp_path))
  rows = {row["split"]: row for row in small.results(str(tmp_path))}
  assert set(rows) == {"robustness", "feature_distance"}
  assert {"fog_1", "fog_5", "contrast_1", "contrast_5"} < set(
    rows["robustness"]
  )
  # Five images.
  assert rows["robustness"]["top1"] * 5 % 1 == pytest.approx(0)
  assert rows["feature_distance"]["distance"] > 0


def test_arguments():
  config = cifar10.get_config("folder=F,augreg=light2,batch=128,seed=3")
  assert "|flip_lr|randaug(2,10)|value_range" in config.input.pp
  assert config.mixup.p == 0.2
  assert config.lr == pytest.approx(2e-3)
  assert (config.seed, config.total_epochs) == (3, 17)
  assert config.evals.val.data.folder == "F"
  assert config.model.stem == "deep_conv"
  patches = cifar10.get_config("folder=F,stem=patch,model=vit")
  assert patches.model.stem == "patch" and patches.model_name == "vit"


@pytest.mark.parametrize(
  "arg, words",
  [
    ("", "wants folder=FOLDER"),
    ("folder=F,augreg=weak", "AugReg preset 'weak'"),
    ("folder=F,res=64", "Unknown config argument 'res'"),
  ],
)
def test_errors(arg, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    cifar10.get_config(arg)


def test_evaluators_want_a_folder():
  with pytest.raises(ValueError, match="wants folder=FOLDER"):
    evals_cifar10.get_config()


def test_runlocal():
  config = config_utils.load("configs/cifar10.py:runlocal")
  assert config.total_steps == 6 and config.model.depth == 1
  assert config.input.data.module == "data.digits"
