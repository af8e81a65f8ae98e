"""The experiments on videos, on look-alikes that the real builders build."""

import math
import os

import jax
import numpy as np
import pytest

from configs import common
from data import kinetics400, something_something_v2
from lookup_vit import (
  config_utils,
  evaluate,
  metric_writer,
  train,
  train_step,
)
from lookup_vit import input_pipeline as ip

# isort: split
import tensorflow as tf
import tensorflow_datasets as tfds

from tests import small, video_files
from tests.video_files import greys, pattern

_HOLDING = "Holding [something] next to [something]"
_PUSHING = "Pushing [something] so that it almost falls off but doesn't"
_LAYING = "Laying [something] on the table on its side, not upright"

# What is shorter than the clips of 4 frames, 2 apart, in one and the other.
_KINETICS = {
  "train": [
    ("zumba", "long", pattern(15)),
    ("abseiling", "odd", pattern(9, 47, 63)),
    ("air drumming", "tall", pattern(8, 64, 48)),
    ("zumba", "short", pattern(3)),
    ("abseiling", "one", pattern(1)),
  ],
  "val": [
    ("shooting goal (soccer)", "v", pattern(12)),
    ("zumba", "short", pattern(5)),
    ("abseiling", "odd", pattern(10, 47, 63)),
  ],
}
_SSV2 = {
  "train": [
    ("1", _HOLDING, pattern(11)),
    ("2", _PUSHING, pattern(9, 47, 63)),
    ("3", _LAYING, pattern(3)),
    ("4", _LAYING, pattern(6)),
  ],
  "validation": [
    ("5", _LAYING, pattern(6)),
    ("6", _PUSHING, pattern(2)),
    ("7", _HOLDING, pattern(9, 64, 48)),
  ],
}
# For each video of the validation split: its label, its frames, and which of
# these the central clip has.
_KINETICS_VAL = [
  (297, pattern(12), [2, 4, 6, 8]),
  (399, pattern(5), [0, 2, 4, 1]),
  (0, pattern(10, 47, 63), [1, 3, 5, 7]),
]
_SSV2_VAL = [
  (3, pattern(6), [1, 2, 3, 4]),
  (2, pattern(2), [0, 1, 0, 1]),
  (1, pattern(9, 64, 48), [2, 3, 4, 5]),
]


def _build(builder_class, data_dir, manual_dir):
  builder_class(data_dir=data_dir).download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("data")
  manual_dir = tmp_path_factory.mktemp("kinetics400")
  video_files.write_kinetics400(manual_dir, _KINETICS)
  _build(kinetics400.Builder, path, manual_dir)
  manual_dir = tmp_path_factory.mktemp("something_something_v2")
  video_files.write_something_something_v2(manual_dir, _SSV2)
  _build(something_something_v2.Builder, path, manual_dir)
  return str(path)


def _config(name, data_dir):
  """A config whose clips, model and training are small, on the look-alike."""
  config = config_utils.load(
    f"configs/{name}.py:variant=mu/2x8,res=32,frames=4"
  )
  config.total_steps, config.total_epochs = 3, None
  config.log_training_steps = 1
  config.input.batch_size = 2
  config.model.dtype = "float32"  # CPUs compile it in less time.
  if name.startswith("ssv2"):
    config.num_classes = len(video_files.TEMPLATES)
  if config.get("grids"):
    config.grids = [(1, 3, 3)]
  for data in (config.input.data, *(e.data for e in config.evals.values())):
    data.data_dir = data_dir
  return config


def check_results(rows, grid, views=(1, 12)):
  """Of three videos, each counted once: of one view, and of twelve."""
  names = {1: "val", 12: "val_4x3"}
  assert [r["split"] for r in rows] == [names[n] for n in views]
  assert [r["views"] for r in rows] == list(views)
  for row in rows:
    assert row["grid"] == grid
    assert np.isfinite(row["loss"])
    assert row["top1"] * 3 == pytest.approx(round(row["top1"] * 3), abs=1e-5)
  assert len({row["loss"] for row in rows}) == len(views)


@pytest.mark.parametrize(
  "name",
  [
    "k400_lookup_vivit_b",
    pytest.param("ssv2_vivit_b", marks=pytest.mark.full),
    pytest.param("k400_vivit_b", marks=pytest.mark.full),
    pytest.param("ssv2_lookup_vivit_b", marks=pytest.mark.full),
  ],
)
def test_training_on_videos(name, data_dir, tmp_path):
  config = _config(name, data_dir)
  views = (1, 12)
  if name in ("k400_lookup_vivit_b", "ssv2_vivit_b"):
    del config.evals["val_4x3"]  # To compile less.
    views = (1,)
  state = train.train_and_evaluate(config, str(tmp_path))
  assert int(state.step) == 3
  rows = [r for r in metric_writer.read(str(tmp_path)) if "train/loss" in r]
  assert [r["step"] for r in rows] == [1, 2, 3]
  assert all(np.isfinite(r["train/loss"]) for r in rows)
  rows = small.results(str(tmp_path))
  check_results(rows, "1x3x3" if "lookup" in name else None, views)
  assert os.path.exists(tmp_path / "attention_maps.png") == ("lookup" in name)
  assert os.path.exists(tmp_path / "accuracy_vs_flops.png")


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize(
  ("name", "want"),
  [("k400_vivit_b", _KINETICS_VAL), ("ssv2_vivit_b", _SSV2_VAL)],
)
def test_evaluation_sees_the_middle_of_every_video_once(
  name, want, process_count, data_dir
):
  config = _config(name, data_dir)
  found = []
  for process in range(process_count):
    batches, _ = ip.make_eval(
      config.evals.val.data,
      pp=config.evals.val.pp_fn,
      batch_size=2,
      process_index=process,
      process_count=process_count,
    )
    for batch in batches:
      assert batch["image"].shape[1:] == (4, 32, 32, 3)
      for i in np.flatnonzero(batch["_mask"]):
        found.append((int(batch["label"][i]), batch["image"][i]))
  assert sorted(label for label, _ in found) == sorted(w[0] for w in want)
  found = dict(found)
  for label, frames, indices in want:
    # The left half of what the central crop leaves is of the left half.
    got = greys((found[label] + 1) * 127.5)
    np.testing.assert_allclose(got, greys(frames)[indices], atol=5)


def test_training_on_a_folder(tmp_path):
  """From videos of several kinds to twelve views, as a person uses it."""
  videos = {
    "train/red/a.mp4": pattern(9),
    "train/red/b.webm": pattern(3, 47, 63),
    "train/blue/c.avi": pattern(12, 64, 48),
    "train/blue/cut.mp4": pattern(5),
    "val/red/d.mkv": pattern(6),
    "val/blue/e.mov": pattern(14),
    "val/blue/f.mp4": pattern(1),
  }
  folder = tmp_path / "videos"
  for name, frames in videos.items():
    video_files.write_video(folder / name, frames)
  cut = folder / "train/blue/cut.mp4"
  cut.write_bytes(cut.read_bytes()[:500])
  config = config_utils.load(
    f"configs/video_folder.py:folder={folder},variant=mu/2x8,res=32,frames=4,"
    "epochs=2,batch=2"
  )
  config.grids = [(1, 3, 3)]
  for data in (config.input.data, *(e.data for e in config.evals.values())):
    data.data_dir = str(tmp_path / "data")
  workdir = str(tmp_path / "run")
  match = r"1 of the 4 files of train.*\n.*cut.mp4"
  with pytest.raises(ValueError, match=match):
    train.train_and_evaluate(config, workdir)
  config.input.data.on_error = "skip"
  state = train.train_and_evaluate(config, workdir)
  # Two epochs of three.
  assert int(state.step) == 3
  rows = small.results(workdir)
  check_results(rows, "1x3x3")
  saved = config_utils.read_workdir(workdir)
  assert saved.num_classes == 2
  assert evaluate.evaluate(workdir) == rows


def sides(batch):
  """Whether each clip's half that is grey is its right, None if it is unclear.

  The other is red above and blue below, whatever happens to the colours.
  """
  size = batch.shape[2]
  above, below = batch[:, :, : size // 3], batch[:, :, -(size // 3) :]
  change = np.abs(above.mean(2) - below.mean(2)).sum(-1)
  left, right = change[..., : size // 4], change[..., -(size // 4) :]
  found = []
  for difference in left.mean(-1) - right.mean(-1):
    flipped = difference > 0
    is_clear = np.abs(difference).min() > 0.02
    assert not is_clear or (flipped == flipped[0]).all()
    found.append(bool(flipped[0]) if is_clear else None)
  return found


@pytest.mark.parametrize("name", ["k400_vivit_b", "ssv2_vivit_b"])
def test_flips_swap_the_labels_that_say_so(name, data_dir):
  config = _config(name, data_dir)
  swapped = {}
  pp = config.input.pp
  if name.startswith("ssv2"):
    assert "flip_lr_swap((86,87),(93,94),(166,167))" in pp
    # Labels that the look-alike has.
    pp = pp.replace("(86,87)", "(1,2)")
    swapped = {1: 2, 2: 1}
  pp = pp.replace("keep('image'", "keep('image','annotated'")
  config.input.pp = f"copy('label','annotated')|{pp}"
  batches = iter(train.make_dataset(config, 0))
  seen = set()
  for _ in range(20):
    batch = next(batches)
    assert batch["image"].shape == (2, 4, 32, 32, 3)
    assert -1 <= batch["image"].min() <= batch["image"].max() <= 1
    columns = batch["annotated"], batch["label"], sides(batch["image"])
    for before, after, flipped in zip(*columns, strict=True):
      if flipped is not None:
        want = swapped.get(int(before), int(before)) if flipped else before
        assert after == want
        seen.add((flipped, bool(after != before)))
  assert seen == {(False, False), (True, False)} | (
    {(True, True)} if swapped else set()
  )


def test_a_video_without_frames_is_named(tmp_path):
  with tfds.core.registered.skip_registration():

    class Empty(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      name = "empty"

      def _info(self):
        features = {
          "video": tfds.features.Video(
            (None, None, None, 3), encoding_format="jpeg"
          ),
          "label": tfds.features.ClassLabel(num_classes=400),
        }
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        yield 0, {"video": [], "label": 0}

  Empty(data_dir=tmp_path).download_and_prepare()
  data = dict(name="empty", data_dir=str(tmp_path), split="train")
  config = _config("k400_vivit_b", str(tmp_path))
  config.input.data = data
  with pytest.raises(ValueError) as e:
    next(iter(train.make_dataset(config, 0)))
  for words in ("record 0 of", "empty-train", "the video has no frames"):
    assert words in str(e.value)


@pytest.mark.parametrize(
  ("variant", "image_size", "want"),
  [
    ("B/2x16", (32, 224, 224), [(4, 5, 5), (8, 5, 5), (8, 7, 7)]),
    ("L/2x16", (32, 96, 96), [(4, 5, 5), (8, 5, 5)]),
    ("B/2x16", (8, 224, 80), [(4, 5, 5)]),
    ("B/4x16", (8, 224, 224), [(2, 14, 14)]),
  ],
)
def test_grids_fit_the_lookup_grid(variant, image_size, want):
  assert common.video_grids(variant, image_size) == want


def test_tubelets_must_divide_the_clip():
  for arg in ("frames=31", "variant=B/2x15", "variant=B/16"):
    with pytest.raises(ValueError, match="patch"):
      config_utils.load(f"configs/k400_lookup_vivit_b.py:{arg}")


@pytest.mark.parametrize("name", ["k400", "ssv2"])
def test_the_experiments_themselves(name):
  """What runs at full size differs in the model alone, and fits together."""
  vit, lookup = (
    config_utils.resolve(config_utils.load(f"configs/{name}_{model}.py"))
    for model in ("vivit_b", "lookup_vivit_b")
  )
  differences = config_utils.differences(vit.to_dict(), lookup.to_dict())
  fields = {line.partition(":")[0] for line in differences}
  assert fields == {"model_name", "model.grid", "grids"}
  assert tuple(lookup.model.grid) in {tuple(g) for g in lookup.grids}
  assert vit.input.image_size == [32, 224, 224]
  # 2.5 epochs, whatever the size of the set.
  warmup = vit.schedule.warmup_percent * vit.total_epochs
  assert math.isclose(warmup, 2.5)
  spec = {
    "video": tf.TensorSpec([None], tf.string),
    "label": tf.TensorSpec([], tf.int64),
  }
  for pp, views in (
    (vit.input.pp, ()),
    (vit.evals.val.pp_fn, ()),
    (vit.evals.val_4x3.pp_fn, (12,)),
  ):
    fn = ip.get_preprocess_fn(pp)
    graph = tf.function(lambda x, fn=fn: fn(x, tf.constant([0, 0])))
    outputs = graph.get_concrete_function(spec).structured_outputs
    assert outputs["image"].shape == (*views, 32, 224, 224, 3)
  assert vit.evals.val_4x3.views == 12
  # At the end alone.
  assert "log_steps" not in vit.evals.val_4x3 and vit.evals.val.log_steps


@pytest.mark.parametrize("name", ["k400", "ssv2"])
def test_factorised(name):
  vit, lookup = (
    config_utils.load(f"configs/{name}_{model}.py:factorised")
    for model in ("vivit_b", "lookup_vivit_b")
  )
  assert vit.model_name == lookup.model_name == "factorised"
  assert lookup.grids == [(3, 3), (5, 5), (7, 7)]
  assert lookup.model.grid == (5, 5)
  for config in (vit, lookup):
    config = config_utils.resolve(config)
    model = train_step.build_model(config)
    videos = np.zeros((1, *config.input.image_size, 3), np.float32)
    (logits, _), params = jax.eval_shape(
      model.init_with_output, jax.random.key(0), videos
    )
    assert logits.shape == (1, config.num_classes)
    assert "spatial" in params["params"]


@pytest.mark.parametrize(
  "spec", ["k400_vivit_b.py:from", "ssv2_lookup_vivit_b.py:from"]
)
def test_starting_from_another_run(spec):
  config = config_utils.load(f"configs/{spec}=runs/images")
  assert config.model_init == "runs/images"
  assert config.model_init_inflation == "central"
  assert "model_init" not in config_utils.load(f"configs/{spec}=")
