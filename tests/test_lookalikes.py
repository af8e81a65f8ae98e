"""The experiments on look-alikes: tiny sets with the real sets' features."""

import io
import os

import numpy as np
import pytest

from data import imagenet21k, imagenet_o
from lookup_vit import config_utils, train, train_step
from lookup_vit import input_pipeline as ip
from lookup_vit.evaluators import classification

# isort: split
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from tests import imagenet_files, lookalikes, small

NAMES = [
  "imagenet2012",
  "imagenet2012_corrupted/fog_3",
  "imagenet2012_real",
  "imagenet_a",
  "imagenet_r",
  "imagenet_sketch",
  "imagenet_v2",
  "coco_captions",
]
SPLITS = [
  (name, split)
  for name in NAMES
  for split in lookalikes.SPLITS[name.partition("/")[0]]
]
SHARDS = 3
PP = 'decode|resize(32)|value_range(-1,1)|keep("image","label")'


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """Where all of them are, each split in several files."""
  path = tmp_path_factory.mktemp("lookalikes")
  for name in NAMES:
    lookalikes.build(name, path, shards=SHARDS)
  imagenet_files.write_imagenet_o(path / "manual")
  imagenet_files.write_imagenet21k(path / "manual", classes=5)
  config = tfds.download.DownloadConfig(
    manual_dir=path / "manual", num_shards=SHARDS
  )
  for builder_class in (imagenet_o.Builder, imagenet21k.Builder):
    builder = builder_class(data_dir=str(path))
    builder.download_and_prepare(download_config=config)
  return str(path)


def decode(content):
  """Decodes an encoded image to RGB without TensorFlow."""
  return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def sources(name, split):
  return list(lookalikes.examples(name.partition("/")[0], split))


def match(images, source):
  """Finds the source of every image [n, 32, 32, 3]; each must come once."""
  want = [tf.image.resize(decode(e["image"]), (32, 32)) for e in source]
  want = np.stack(want) / 127.5 - 1
  distances = np.abs(images[:, None] - want[None]).mean((2, 3, 4))
  order = distances.argmin(1)
  np.testing.assert_array_equal(np.sort(order), np.arange(len(source)))
  # The decoders differ by a grey level or two.
  assert distances.min(1).max() < 3 / 127.5
  return [source[i] for i in order]


def read(name, split, data_dir, pp, process_count=1):
  """Reads a split by `make_eval`, without the padding, as one dictionary."""
  data = {"name": name, "split": split, "data_dir": data_dir}
  parts = []
  for process in range(process_count):
    ds, steps = ip.make_eval(
      data,
      pp=pp,
      batch_size=4,
      process_index=process,
      process_count=process_count,
    )
    batches = list(ds)
    assert len(batches) == steps
    parts += batches
  out = {k: np.concatenate([b[k] for b in parts]) for k in parts[0]}
  keep = out.pop("_mask") == 1
  return {k: v[keep] for k, v in out.items()}


# --- The data sets


@pytest.mark.parametrize("name", NAMES)
def test_features_and_layout_are_those_of_tfds(name, data_dir, tmp_path):
  set_name, _, config = name.partition("/")
  real = tfds.builder_cls(set_name)(data_dir=tmp_path, config=config or None)
  by_name = tfds.builder(name, data_dir=data_dir)
  assert type(by_name) is type(real)  # It has not been replaced.
  from_disk = tfds.builder_from_directory(by_name.data_dir)
  for got in by_name, from_disk:
    assert got.info.full_name == real.info.full_name
    assert got.info.citation == real.info.citation != ""
    assert got.info.supervised_keys == real.info.supervised_keys
    assert got.info.features.to_json() == real.info.features.to_json()
    assert got.info.features.get_serialized_info() == (
      real.info.features.get_serialized_info()
    )
    for key in ("label", "original_label"):
      if key in real.info.features:
        names = real.info.features[key].names
        assert len(names) == 1000 and got.info.features[key].names == names
    assert {k: v.num_examples for k, v in got.info.splits.items()} == (
      lookalikes.SPLITS[set_name]
    )
    for split in got.info.splits.values():
      assert len(split.shard_lengths) == SHARDS
  assert os.path.relpath(by_name.data_dir, data_dir) == os.path.relpath(
    real.data_dir, tmp_path
  )


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_evaluation_reads_every_example_once(
  name, split, process_count, data_dir
):
  got = read(name, split, data_dir, PP, process_count)
  matched = match(got["image"], sources(name, split))
  if "label" in matched[0]:
    want = [example["label"] for example in matched]
    np.testing.assert_array_equal(got["label"], want)


def test_real_labels_become_vectors(data_dir):
  pp = (
    'decode|resize(32)|value_range(-1,1)|onehot(1000,"real_label","labels")'
    '|keep("image","labels")'
  )
  got = read("imagenet2012_real", "validation", data_dir, pp)
  matched = match(got["image"], sources("imagenet2012_real", "validation"))
  want = np.zeros((len(matched), 1000))
  for row, example in zip(want, matched, strict=True):
    row[example["real_label"]] = 1
  np.testing.assert_array_equal(got["labels"], want)
  assert {0, 1, 2, 3} == set(want.sum(1))


def test_captions_and_objects_stay_with_their_image(data_dir):
  builder = tfds.builder("coco_captions", data_dir=data_dir)
  want = {e["image/id"]: e for e in sources("coco_captions", "train")}
  for got in tfds.as_numpy(builder.as_dataset(split="train")):
    source = want.pop(got["image/id"])
    np.testing.assert_allclose(got["image"], decode(source["image"]), atol=8)
    texts = [text.decode() for text in got["captions"]["text"]]
    assert texts == [caption["text"] for caption in source["captions"]]
    boxes = np.reshape([o["bbox"] for o in source["objects"]], (-1, 4))
    np.testing.assert_allclose(got["objects"]["bbox"], boxes, rtol=1e-6)
  assert not want


def test_images_have_odd_sizes_and_modes():
  images = [e["image"] for e in sources("imagenet2012", "train")]
  modes = [Image.open(io.BytesIO(content)).mode for content in images]
  assert set(modes) == {"L", "RGB"}
  shapes = {decode(content).shape for content in images}
  assert len(shapes) > 50
  assert all(40 <= side <= 90 for shape in shapes for side in shape[:2])


def test_seed_and_counts(tmp_path):
  first, same, other = (
    list(lookalikes.examples("imagenet_a", "test", 3, seed))
    for seed in (0, 0, 1)
  )
  assert first == same != other
  splits = {"test": 3}
  lookalikes.build("imagenet_a", tmp_path, splits=splits, seed=1)
  builder = tfds.builder("imagenet_a", data_dir=tmp_path)
  labels = [e["label"] for e in tfds.as_numpy(builder.as_dataset("test"))]
  assert sorted(labels) == sorted(example["label"] for example in other)


@pytest.mark.parametrize("process_count", [1, 2])
def test_array_record(process_count, tmp_path):
  lookalikes.build("imagenet_r", tmp_path, shards=2, file_format="array_record")
  assert len(list(tmp_path.glob("**/*.array_record*"))) == 2
  got = read("imagenet_r", "test", str(tmp_path), PP, process_count)
  matched = match(got["image"], sources("imagenet_r", "test"))
  want = [example["label"] for example in matched]
  np.testing.assert_array_equal(got["label"], want)


@pytest.mark.parametrize(
  ("name", "splits", "message"),
  [
    ("imagenet_b", None, "no look-alike of 'imagenet_b'"),
    ("imagenet_a", {"train": 3}, r"no splits \['train'\]; it has \['test'\]"),
    ("imagenet2012_corrupted/fog_6", None, "fog_6"),
  ],
)
def test_what_is_not_there(name, splits, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    lookalikes.build(name, tmp_path, splits=splits)
  assert not list(tmp_path.iterdir())


# --- The experiments


def run(config, workdir, data_dir):
  """Trains a few steps; everything but the sizes is the config's own."""
  if config.get("grids"):
    config.grids = [(2, 2)]  # To compile less.
  config.total_steps, config.total_epochs = 4, None
  config.input.batch_size = 16
  config.input.shuffle_buffer_size = 50
  config.schedule = {}
  config.ckpt_steps = 4
  config.input.data.data_dir = data_dir
  for evaluator in config.evals.values():
    for field in ("data", "inliers"):
      if field in evaluator:
        evaluator[field].data_dir = data_dir
  state = train.train_and_evaluate(config, str(workdir))
  assert int(state.step) == 4
  return small.results(str(workdir))


def assert_complete(rows, splits, grids):
  assert {(row["split"], row["grid"]) for row in rows} == {
    (split, grid) for split in splits for grid in grids
  }
  assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.fixture(scope="module")
def lookup_run(data_dir, tmp_path_factory):
  """The work directory and the results of in1k_lookup_b, on all test sets."""
  workdir = tmp_path_factory.mktemp("in1k_lookup_b")
  config = config_utils.load(
    "configs/in1k_lookup_b.py:variant=mu/8,res=40,aug=medium1"
  )
  evals = config_utils.load("configs/evals_imagenet.py:res=40,batch=8")
  assert evals.c.reference == "alexnet"
  evals.c.update(reference=None, corruptions=["fog"], severities=[3])
  # Those of ImageNet-O do not occur among so few.
  inliers = {e["label"] for e in sources("imagenet2012", "validation")}
  evals.o.classes = sorted(inliers)[:7]
  config.evals.update(evals)
  return workdir, run(config, workdir, data_dir)


def test_in1k_lookup_b_and_the_test_sets(lookup_run):
  _, rows = lookup_run
  others = [row for row in rows if row["split"] in ("c", "o")]
  rows = [row for row in rows if row not in others]
  splits = {"minival", "val", "real", "v2", "sketch", "a", "r"}
  assert_complete(rows, splits, {"2x2"})
  c, o = sorted(others, key=lambda row: row["split"])
  assert c["split"] == "c" and c["grid"] == o["grid"] == "2x2"
  [val] = [row for row in rows if row["split"] == "val"]
  assert c["top1"] == val["top1"]
  assert c["fog_3"] == c["top1_corrupted"] == 1 - c["mce"]
  assert c["relative_mce"] == pytest.approx(c["top1"] - c["fog_3"])
  assert 0 < o["aupr"] <= 1


def test_classes_are_numbered_as_those_of_imagenet(data_dir):
  names = tfds.builder_cls("imagenet2012")().info.features["label"].names
  assert names == sorted(names)
  for name in ("imagenet_a", "imagenet_r", "imagenet2012_corrupted/fog_3"):
    builder = tfds.builder(name, data_dir=data_dir)
    assert builder.info.features["label"].names == names
  # The first of ImageNet-A's, by the two lists of its authors: eval.py and
  # eval_many_models.py of https://github.com/hendrycks/natural-adv-examples.
  wnids = ["n01498041", "n01531178", "n01534433", "n01558993", "n01580077"]
  assert [names.index(wnid) for wnid in wnids] == [6, 11, 13, 15, 17]


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_classes_that_occur(name, data_dir):
  config = config_utils.load("configs/in1k_vit_b.py:variant=mu/8,res=40")
  config.input.batch_size = 16
  config.input.data.data_dir = data_dir
  program = train_step.Program(config_utils.resolve(config), 20_000)
  evals = config_utils.load("configs/evals_imagenet.py:res=40,batch=8")
  fields = evals[name[-1]].to_dict()
  assert fields.pop("type") == "classification"
  fields["data"]["data_dir"] = data_dir
  evaluator = classification.Evaluator(program, name, **fields)
  labels = {example["label"] for example in sources(name, "test")}
  assert evaluator.classes == tuple(sorted(labels))


def test_in1k_vit_b(data_dir, tmp_path):
  config = config_utils.load(
    "configs/in1k_vit_b.py:variant=mu/8,res=40,aug=medium1"
  )
  rows = run(config, tmp_path, data_dir)
  assert_complete(rows, {"minival", "val"}, {None})


def test_in1k_finetune(lookup_run, data_dir, tmp_path):
  source, _ = lookup_run
  config = config_utils.load(f"configs/in1k_finetune.py:from={source},res=48")
  rows = run(config, tmp_path, data_dir)
  assert_complete(rows, {"minival", "val"}, {"2x2"})


@pytest.mark.parametrize(
  "name",
  ["in21k_lookup_b", pytest.param("in21k_vit_b", marks=pytest.mark.full)],
)
def test_in21k(name, data_dir, tmp_path):
  config = config_utils.load(
    f"configs/{name}.py:variant=mu/8,res=40,aug=medium1"
  )
  # 35 images of 5 classes, where the config counts in millions.
  with pytest.raises(ValueError, match=r"train\[51200:\].* \(35\)"):
    run(config, tmp_path, data_dir)
  config.input.data.split = "train[10:]"
  config.evals.val.data.split = "train[5:10]"
  config.evals.test.data.split = "train[:5]"
  with pytest.raises(ValueError, match="5 classes.*num_classes is 19167"):
    run(config, tmp_path, data_dir)
  config.num_classes = 5
  rows = run(config, tmp_path, data_dir)
  grids = {"2x2"} if config.get("grids") else {None}
  assert_complete(rows, {"val", "test"}, grids)
