"""A run of seconds that has everything in it, for the whole-program tests."""

import json
import os

from data.digit_captions import Builder
from lookup_vit import checkpoints, config_utils, train_step
from tests.models import common

# isort: split
import tensorflow_datasets as tfds


def config(**fields):
  """A small multi-resolution LookupViT on the digits.

  Args:
    **fields: values to set, with `__` for the dot: `model__depth=2`.
  """
  c = config_utils.load("configs/digits_lookup.py:runlocal")
  c.unlock()
  c.input.data = dict(module="data.digits", split="train[:100]")
  c.input.batch_size = 12
  c.model = dict(variant="mu/8", depth=1, grid=(2, 2), dropout=0.1)
  c.grids = [(2, 2), (1, 3)]
  c.total_steps = 12
  c.ckpt_steps = 4
  c.log_training_steps = 1
  for name, value in fields.items():
    *parents, last = name.split("__")
    target = c
    for parent in parents:
      target = target[parent]
    with target.ignore_type():
      target[last] = value
  return c


def results(workdir):
  """The rows of `results.json`."""
  with open(os.path.join(workdir, "results.json")) as f:
    return json.load(f)


def write_run(workdir, config, step=2):
  """What a training leaves, of random parameters, which it returns."""
  config = config_utils.resolve(config)
  program = train_step.Program(config, config.total_steps)
  params = common.random_like(program.state_shapes.params)
  checkpoints.write_config(workdir, config)
  store = checkpoints.Checkpoints(workdir)
  store.save(step, program.init_state(params))
  store.close()
  return params


def digit_captions(data_dir: str, count: int = 64) -> None:
  """Prepares the first scenes of both splits of `data.digit_captions`."""
  few = tfds.download.DownloadConfig(max_examples_per_split=count)
  Builder(data_dir=data_dir).download_and_prepare(download_config=few)
