"""The configs and the command line, as a person uses them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from lookup_vit import config_utils, evaluate, metric_writer, train
from tests import programs, small


def _python(*args, **kwargs):
  """A program that is started as users start it."""
  return subprocess.Popen(
    [sys.executable, *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
  """As many as the small runs read, where these look for them."""
  small.digit_captions(os.environ["TFDS_DATA_DIR"])


@pytest.fixture(scope="module")
def in21k(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("in21k_lookup_b"))
  config = config_utils.load("configs/in21k_lookup_b.py:runlocal")
  train.train_and_evaluate(config, workdir)
  return workdir


# One of each kind, and those that are `full`.
CONFIGS = (
  *("digits_lookup", "in1k_lookup_b", "in21k_lookup_b", "linear_probe"),
  "coco_caption_lookup_b",
)
MORE_CONFIGS = (
  *("digits_vit", "ablation", "cifar10", "in1k_vit_b", "in21k_vit_b"),
  *("k400_lookup_vivit_b", "k400_vivit_b", "ssv2_lookup_vivit_b"),
  *("ssv2_vivit_b", "in1k_finetune"),
  *("image_folder", "video_folder", "caption_folder", "coco_caption_vit_b"),
  *("moving_digits_vivit", "moving_digits_lookup"),
  *("digit_captions_vit", "digit_captions_lookup"),
)


@pytest.mark.parametrize(
  "name",
  [*CONFIGS, *(pytest.param(n, marks=pytest.mark.full) for n in MORE_CONFIGS)],
)
def test_every_config_runs_locally(name, in21k, tmp_path):
  starts = name in ("in1k_finetune", "linear_probe")
  arg = f"from={in21k},runlocal" if starts else "runlocal"
  workdir = str(tmp_path)
  if name == "in21k_lookup_b":
    workdir = in21k
  else:
    config = config_utils.load(f"configs/{name}.py:{arg}")
    train.train_and_evaluate(config, workdir)
  rows = [r for r in metric_writer.read(workdir) if "train/loss" in r]
  assert rows[-1]["step"] == 6
  assert all(np.isfinite(r["train/loss"]) for r in rows)
  results = small.results(workdir)
  if "caption" in name:
    assert all(r["CIDEr"] >= 0 for r in results)
    assert all(0 <= r["unfinished"] <= 1 for r in results)
  else:
    assert all(0 <= r["top1"] <= r["top5"] <= 1 for r in results)
  if name in ("digits_lookup", "k400_lookup_vivit_b", "video_folder"):
    assert evaluate.evaluate(workdir) == results


def test_there_is_a_test_of_every_config():
  names = {
    n[:-3]
    for n in os.listdir("configs")
    if n.endswith(".py") and n != "common.py" and not n.startswith("evals_")
  }
  assert names == {*CONFIGS, *MORE_CONFIGS}


@pytest.mark.parametrize("variant", ["S/16", "B/16", "L/16"])
@pytest.mark.parametrize("name", ["in1k_vit_b", "in21k_lookup_b"])
def test_configs_of_other_sizes_resolve(name, variant):
  config = config_utils.load(f"configs/{name}.py:variant={variant},res=384")
  config = config_utils.resolve(config)
  assert config.model.variant == variant
  assert config.input.image_size == [384, 384]
  assert "(384)" in config.input.pp


def _last_step(workdir):
  rows = metric_writer.read(workdir)
  return rows[-1]["step"] if rows else 0


def _losses(workdir):
  rows = metric_writer.read(workdir)
  return [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]


_DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from lookup_vit import train
from tests import small
config = small.config(
  grids=[(2, 2)],
  total_steps=4,
  input__batch_size=16,
  mixup=dict(p=0.2),
  cutmix=dict(p=1.0),
  model__dropout=0.0,
  model__depth=1,
)
config.evals.test.data.split = "test[:31]"
config.evals.test.batch_size = 8
train.train_and_evaluate(config, sys.argv[1])
"""


@pytest.mark.full
def test_four_devices_learn_and_evaluate_as_one(tmp_path):
  four, one = str(tmp_path / "four"), str(tmp_path / "one")
  process = programs.Program("-c", _DEVICES, four)
  _, err = process.communicate()
  assert process.returncode == 0, err
  config = small.config(
    grids=[(2, 2)],
    total_steps=4,
    input__batch_size=16,
    mixup=dict(p=0.2),
    cutmix=dict(p=1.0),
    model__dropout=0.0,
    model__depth=1,
  )
  config.evals.test.data.split = "test[:31]"
  train.train_and_evaluate(config, one)
  a, b = _losses(four), _losses(one)
  np.testing.assert_allclose(a, b, rtol=2e-5)
  for x, y in zip(small.results(four), small.results(one), strict=True):
    assert x["loss"] == pytest.approx(y["loss"], rel=2e-5)
    assert x["top1"] == y["top1"]
  # What four devices trained, one evaluates.
  again = evaluate.evaluate(four, batch_size=5)
  for x, y in zip(small.results(four), again, strict=True):
    assert x["loss"] == pytest.approx(y["loss"], rel=2e-5)
    assert x["top1"] == y["top1"]


def test_batch_against_device_count(tmp_path):
  code = _DEVICES.replace("config.evals.test.batch_size = 8", "").replace(
    "input__batch_size=16", "input__batch_size=12"
  )
  process = programs.Program("-c", code, tmp_path / "run")
  _, err = process.communicate()
  assert process.returncode == 1
  assert "config.input.batch_size=12" in err
  assert "4 device(s), in pairs for mixup or cutmix" in err


_WITHOUT_TENSORFLOW = """
import sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in ("tensorflow", "tensorflow_datasets", "clu"):
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import jax
import lookup_vit
from lookup_vit import checkpoints, config_utils, optim, parallel, train_step
from lookup_vit import dryrun
from lookup_vit.analysis import attention_maps, flops, steps, summary
from benchmarks import pod, resolution, throughput
from lookup_vit.models import lookup_vit, vit
images = jax.numpy.ones((2, 32, 32, 3))
for model in (
  lookup_vit.Model(5, "mu/8", grid=(2, 2)), vit.Model(5, "mu/8")
):
  logits, _ = model.apply(model.init(jax.random.key(0), images), images)
  assert logits.shape == (2, 5)
config = config_utils.load("configs/in1k_lookup_b.py:runlocal")
program = train_step.Program(config_utils.resolve(config), 10)
assert not any(m.partition(".")[0] == "tensorflow" for m in sys.modules)
print("fine")
"""


def test_models_work_without_tensorflow():
  process = _python("-c", _WITHOUT_TENSORFLOW)
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert out.strip() == "fine"


@pytest.mark.parametrize(
  ("module", "args", "words"),
  [
    ("train", ["--config=configs/none.py", "--workdir=w"], ["configs/none.py"]),
    (
      "train",
      ["--config=configs/in1k_vit_b.py:variant=S/16", "--workdir=w"],
      ["imagenet2012", "tfds build"],
    ),
    (
      "train",
      ["--config=configs/digits_vit.py:variant=3", "--workdir=w"],
      ["'variant'", "runlocal"],
    ),
    (
      "train",
      ["--config=configs/image_folder.py", "--workdir=w"],
      ["folder=FOLDER"],
    ),
    ("evaluate", ["--workdir=w"], ["no config.json"]),
    (
      "train",
      ["--config=configs/digits_vit.py:seed=1,", "runlocal", "--workdir=w"],
      ["unexpected arguments ['runlocal']"],
    ),
    (
      "train",
      ["--config=configs/digits_vit.py", "--config.lrr=1", "--workdir=w"],
      ["lrr"],
    ),
    (
      "train",
      ["--config=configs/digits_vit.py:runlocal", "--workdir="],
      ["''"],
    ),
    ("analysis.accuracy_vs_flops", ["--workdirs=w"], ["no results.json"]),
    (
      "analysis.flops",
      ["--config=configs/digits_lookup.py", "--grid=9x9"],
      ["(9, 9)", "(8, 8)"],
    ),
  ],
)
def test_command_line_errors_are_one_message(module, args, words, tmp_path):
  args = [a.replace("=w", f"={tmp_path}/w") for a in args]
  process = programs.Program("-m", f"lookup_vit.{module}", *args)
  _, err = process.communicate()
  assert process.returncode == 1
  assert "Traceback" not in err
  assert err.count("error: ") == 1
  for word in words:
    assert word in err


def test_a_normal_run_prints_its_progress_and_no_warnings(tmp_path):
  workdir = str(tmp_path / "run")
  config = "configs/digits_vit.py:runlocal"
  process = _python(
    "-m", "lookup_vit.train", f"--config={config}", f"--workdir={workdir}"
  )
  out, err = process.communicate()
  assert process.returncode == 0, err
  lines = err.splitlines()
  assert all(line[:2].isdigit() and line[2] == ":" for line in lines), err
  assert len(lines) < 15
  assert "step 6/6 (100%)  loss" in err
  assert "images/s  ETA 0:00:00" in err
  assert "| ViT Ti/4 (width 64, depth 1) | - | test |" in out
  # Nor where the library for TPUs is installed, and no TPU is there.
  process = _python(
    *("-m", "lookup_vit.evaluate", f"--workdir={workdir}"),
    env=dict(os.environ, JAX_PLATFORMS=""),
  )
  again, err = process.communicate()
  assert process.returncode == 0, err
  assert again == out and len(err.splitlines()) == 1
  assert "Compiled programs are kept in " in err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("folder")
  rng = np.random.default_rng(0)
  for split, count in (("train", 9), ("val", 4)):
    for name in ("cat", "dog", "eel"):
      os.makedirs(root / split / name)
      for i in range(count):
        size = rng.integers(20, 70, 2)
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        content = tf.io.encode_jpeg(image).numpy()
        (root / split / name / f"{i}.jpg").write_bytes(content)
  return root


def _folder_config(folder, arg=""):
  config = config_utils.load(
    f"configs/image_folder.py:folder={folder},variant=mu/16,res=32,batch=4"
    f",epochs=1{arg}"
  )
  config.grids = [(2, 2)]
  config.model.grid = (2, 2)
  return config


def test_own_folder(folder, tmp_path):
  train.train_and_evaluate(_folder_config(folder), str(tmp_path))
  assert config_utils.read_workdir(str(tmp_path)).num_classes == 3
  assert len(small.results(str(tmp_path))) == 1


def test_truncated_jpeg_is_named_or_skipped(folder, tmp_path):
  import shutil

  broken = tmp_path / "folder"
  shutil.copytree(folder, broken)
  path = broken / "train" / "dog" / "3.jpg"
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(ValueError, match="broken") as e:
    train.train_and_evaluate(_folder_config(broken), str(tmp_path / "a"))
  assert os.path.join("train", "dog", "3.jpg") in str(e.value)
  assert "skip" in str(e.value)
  assert not os.path.exists(tmp_path / "a")
  config = _folder_config(broken, ",on_error=skip")
  train.train_and_evaluate(config, str(tmp_path / "b"))
  # 26 images are left: an epoch of batches of 4 is 7 steps.
  assert _last_step(str(tmp_path / "b")) == 7


def test_results_are_json(in21k):
  with open(os.path.join(in21k, "config.json")) as f:
    assert json.load(f)["model"]["variant"] == "mu/16"
