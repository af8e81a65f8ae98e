"""The experiments on look-alikes: tiny sets with the real sets' features."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from lookup_vit import config_utils, train
from tests import small


def _jpeg(rng):
  size = rng.integers(40, 90, 2)
  image = rng.integers(0, 256, (*size, 3), np.uint8)
  return tf.io.encode_jpeg(image).numpy()


@pytest.fixture(scope="module")
def imagenet2012(tmp_path_factory):
  """TFDS's own ImageNet builder, but for where its examples come from."""
  real = tfds.builder_cls("imagenet2012")
  with tfds.core.registered.skip_registration():

    class LookAlike(real):
      name = "imagenet2012"
      pkg_dir_path = real._get_pkg_dir_path()

      def _split_generators(self, dl_manager):
        return {
          "train": self._examples(100, 0),
          "validation": self._examples(10, 1),
        }

      def _examples(self, count, seed):
        rng = np.random.default_rng(seed)
        for i in range(count):
          yield (
            i,
            {
              "file_name": f"{i}.JPEG",
              "image": _jpeg(rng),
              "label": int(rng.integers(1000)),
            },
          )

  data_dir = str(tmp_path_factory.mktemp("imagenet2012"))
  LookAlike(data_dir=data_dir).download_and_prepare()
  return data_dir


@pytest.mark.parametrize("name", ["in1k_lookup_b", "in1k_vit_b"])
def test_imagenet_configs_on_imagenet_records(name, imagenet2012, tmp_path):
  arg = "variant=mu/8,res=40,aug=medium1"
  config = config_utils.load(f"configs/{name}.py:{arg}")
  if name == "in1k_lookup_b":
    config.grids = [(2, 2), (3, 3)]
  # Small, but with the real data, classes and preprocessing.
  config.total_steps, config.total_epochs = 4, None
  config.input.batch_size = 16
  config.input.shuffle_buffer_size = 50
  config.schedule = {}
  config.ckpt_steps = 4
  assert config.input.data.name == "imagenet2012"
  config.input.data.data_dir = imagenet2012
  for evaluator in config.evals.values():
    evaluator.data.data_dir = imagenet2012
  state = train.train_and_evaluate(config, str(tmp_path))
  assert int(state.step) == 4
  rows = small.results(str(tmp_path))
  splits = {r["split"] for r in rows}
  assert splits == {"minival", "val"}
  assert all(np.isfinite(r["loss"]) for r in rows)
