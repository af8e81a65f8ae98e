"""The experiments on captions, on a look-alike of COCO and on a folder."""

import json
import os
import re
import shlex

import numpy as np
import pytest

from configs import common
from lookup_vit import (
  config_utils,
  datasets,
  evaluate,
  metric_writer,
  tokenizer,
  train,
)
from lookup_vit.preprocess import train_tokenizer
from tests import lookalikes, programs, small
from tests.test_caption_folder import annotations, picture, write_json

KEY = "captions/text"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("data"))
  lookalikes.build("coco_captions", path)
  return path


def shrink(config, data_dir):
  config.total_steps, config.total_epochs = 3, None
  config.log_training_steps = 1
  config.input.batch_size = 4
  config.input.data.data_dir = data_dir
  config.model.dtype = config.model.encoder.dtype = "float32"
  for evaluator in config.evals.values():
    evaluator.data.data_dir = data_dir
    evaluator.metrics = ["CIDEr"]
    evaluator.max_length = 10
  return config


def written(workdir, name):
  """The captions that a run left, by image."""
  with open(os.path.join(workdir, f"captions_{name}.json")) as f:
    rows = json.load(f)
  found = {row["image_id"]: row["caption"] for row in rows}
  assert len(found) == len(rows)
  return found


@pytest.mark.full
def test_coco(data_dir, tmp_path):
  model, workdir = str(tmp_path / "coco.model"), str(tmp_path / "run")
  config = shrink(
    config_utils.load(
      f"configs/coco_caption_lookup_b.py:variant=mu/16,res=48,tokenizer={model}"
    ),
    data_dir,
  )
  config.grids = [(2, 2), (3, 3)]
  config.evals.val.log_steps = None
  config.evals.test.batch_size = 3
  config.evals.test.grids = [(2, 2)]
  data = config.input.data
  assert datasets.num_examples(data) == 11 + 7
  captions = list(train_tokenizer.captions_of(data, KEY, lower=True))
  assert len(captions) == 18 * 5 + 5 + 3
  content = train_tokenizer.train(captions, 32, "bpe", "identity")
  (tmp_path / "coco.model").write_bytes(content)

  state = train.train_and_evaluate(config, workdir)
  assert int(state.step) == 3
  assert state.params["decoder"]["head"]["bias"].shape == (32,)
  rows = metric_writer.read(workdir)
  assert all(np.isfinite(r["train/loss"]) for r in rows if "train/loss" in r)
  results = small.results(workdir)
  names = {"val_2x2", "val_3x3", "test_2x2"}
  assert {f"{r['split']}_{r['grid']}" for r in results} == names
  assert {r["tokens"] for r in results} == {4, 9}
  found = {}
  for name in names:
    found[name] = written(workdir, name)
    assert set(found[name]) == set(range(7))
    os.remove(os.path.join(workdir, f"captions_{name}.json"))
    assert os.path.exists(os.path.join(workdir, f"captions_{name}.html"))

  os.remove(model)  # The run has its own.
  assert evaluate.evaluate(workdir) == results
  assert {name: written(workdir, name) for name in names} == found


def test_people_s_own(tmp_path):
  """From the message that asks for a tokenizer to captions of a split."""
  folder, model = tmp_path / "mine", tmp_path / "mine.model"
  texts = ["a red dog runs", "two dogs run on sand", "a dog sees sand"]
  texts.append("red sand")
  images = {
    "train": [(i, f"{i}.jpg", texts) for i in range(9)],
    "val": [(2**33 + i, f"{i}.png", ["two dogs run"]) for i in range(4)],
  }
  for split, rows in images.items():
    (folder / split).mkdir(parents=True)
    for i, name, _ in rows:
      picture("RGB", i).save(folder / split / name)
    write_json(folder, split, annotations(rows))
  (folder / "val/2.png").write_bytes(b"")
  arg = f"folder={folder}"
  with pytest.raises(ValueError, match="wants tokenizer=MODEL") as e:
    config_utils.load(f"configs/caption_folder.py:{arg}")
  command = str(e.value).partition("This makes one: ")[2]
  command = command.replace("MODEL", str(model)).replace("1000", "20")
  program, *flags = shlex.split(command)
  assert program == "python"
  process = programs.Program(*flags)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  assert "20 pieces from 36 captions" in err

  spec = f"{arg},tokenizer={model},model=vit,variant=mu/16,res=32,max_length=12"
  config = config_utils.load(f"configs/caption_folder.py:{spec},frozen=false")
  shrink(config, str(tmp_path / "data"))
  workdir = str(tmp_path / "run")
  with pytest.raises(ValueError, match=r"1 of the 4 files of val.*\n.*image 8"):
    train.train_and_evaluate(config, workdir)
  config.evals.val.data.on_error = "skip"
  train.train_and_evaluate(config, workdir)
  assert tokenizer.load(tokenizer.of_workdir(workdir)).size == 20
  assert set(written(workdir, "val")) == {2**33 + i for i in (0, 1, 3)}
  (row,) = small.results(workdir)
  assert (row["model"], row["grid"], row["tokens"]) == ("vit", None, 4)


@pytest.mark.parametrize(
  ("arg", "words"),
  [
    ("", "wants folder=FOLDER"),
    ("folder=x,tokenizer=y,batch=0", "batch >= 1"),
    ("folder=x,tokenizer=y,model=vivit", "model='vivit': want lookup_vit or"),
  ],
)
def test_arguments_of_a_folder_that_cannot_be(arg, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    config_utils.load(f"configs/caption_folder.py:{arg}")


@pytest.mark.parametrize(
  ("name", "arg"),
  [
    ("coco_caption_{}_b", ""),
    ("coco_caption_{}_b", "encoder=runs/in21k,frozen=false,variant=L/16"),
    ("digit_captions_{}", ""),
    ("digit_captions_{}", "task=classification"),
  ],
)
def test_a_vit_differs_in_the_encoder_alone(name, arg):
  names = name.format("lookup"), name.format("vit")
  lookup, vit = (
    config_utils.resolve(config_utils.load(f"configs/{name}.py:{arg}"))
    for name in names
  )
  differences = config_utils.differences(lookup.to_dict(), vit.to_dict())
  fields = {line.partition(":")[0] for line in differences}
  where = "" if "classification" in arg else "model.encoder."
  model_name = f"{where}model_name"
  grid = f"{where or 'model.'}grid"
  assert fields == {model_name, grid, "grids"}
  encoder = lookup.model.get("encoder", lookup.model)
  assert tuple(encoder.grid) in {tuple(g) for g in lookup.grids}


def test_the_arguments_of_coco():
  load = config_utils.load
  config = load("configs/coco_caption_lookup_b.py")
  assert config.num_classes == 32_000
  assert "model_init" not in config
  assert config.model.frozen is True
  assert config.input.pp.startswith("decode|resize(224)|value_range(-1,1)|")
  assert config.input.data.split == "train+restval"
  splits = {name: e.data.split for name, e in config.evals.items()}
  assert splits == {"val": "val", "test": "test"}
  # At the end alone.
  assert "log_steps" not in config.evals.test and config.evals.val.log_steps
  for evaluator in config.evals.values():
    assert evaluator.pp_fn == config.input.pp.partition("|flatten")[0] + (
      "|keep('image')"
    )
  config = load(
    "configs/coco_caption_lookup_b.py:encoder=runs/in21k,frozen=false,"
    f"variant=L/16,res=144,tokenizer={common.TOKENIZER}"
  )
  assert config.num_classes is None
  assert config.tokenizer == common.TOKENIZER
  assert repr(common.TOKENIZER) in config.input.pp
  assert config.model_init == "runs/in21k"
  assert config.model.frozen is False
  assert config.model.encoder.variant == "L/16"
  # Where the encoder is trained, it keeps less.
  assert config.model.encoder.remat_policy
  assert config.grids == [(3, 3), (5, 5), (7, 7)]
