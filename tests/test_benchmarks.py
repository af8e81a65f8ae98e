"""The benchmarks: tiny runs, for what they report and not for speed."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks import input_pipeline as benchmark
from benchmarks import photos as photographs

PP = (
  "decode_jpeg_and_inception_crop((16, 24))|flip_lr|randaug(1, 15)"
  "|value_range(-1, 1)|keep('image', 'label')"
)
SMALL = dict(examples=6, batch_size=2, rounds=2, threads=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  return photographs.make_photos(str(tmp_path_factory.mktemp("photos")), 6)


def test_photos_are_much_like_imagenet():
  contents = [photographs.photo(i) for i in range(16)]
  assert len(set(contents)) == 16
  sizes = []
  for content in contents:
    image = Image.open(io.BytesIO(content))
    # 4:2:0: one value of colour for 2x2 pixels.
    assert image.layer[0][1:3] == (2, 2)
    assert image.layer[1][1:3] == image.layer[2][1:3] == (1, 1)
    sizes.append((len(content), *image.size))
  count, width, height = np.array(sizes).T
  assert {min(w, h) // 100 for _, w, h in sizes} <= {3, 4}
  assert {max(w, h) // 100 for _, w, h in sizes} <= {4, 5}
  assert np.any(width > height)
  assert np.any(width < height)
  # ImageNet: 0.55 to 0.6 bytes a pixel, about 110 KB.
  assert 0.5 < count.sum() / (width * height).sum() < 0.65
  assert 90_000 < count.mean() < 130_000


def test_photos_are_made_once_and_in_several_files(photos):
  files = benchmark.find_files(photos)
  assert len(files) == 6
  before = [tf.io.gfile.stat(file).mtime_nsec for file in files]
  assert photographs.make_photos(photos["data_dir"], 6) == photos
  assert [tf.io.gfile.stat(file).mtime_nsec for file in files] == before
  other = photographs.make_photos(photos["data_dir"], 2)
  assert len(benchmark.find_files(other)) == 2


def test_bare_gives_crops_of_the_records(photos):
  ds = benchmark.bare(benchmark.find_files(photos), (16, 24), 4)
  assert ds.cardinality() == tf.data.INFINITE_CARDINALITY
  labels = []
  for batch in ds.take(3).as_numpy_iterator():
    assert batch["image"].shape == (4, 16, 24, 3)
    assert batch["image"].dtype == np.float32
    assert 0 <= batch["image"].min() < batch["image"].max() <= 255
    labels += batch["label"].tolist()
  assert sorted(labels) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.full
def test_results_add_up(photos):
  result = benchmark.benchmark(photos, PP, **SMALL)
  plain = benchmark.without_randaug(PP)
  assert plain.count("|") == PP.count("|") - 1
  assert "randaug" not in plain
  assert list(result["rates"]) == ["bare", plain, PP]
  for name, values in result["rates"].items():
    assert len(values) == 2
    assert min(values) > 0
    for i, value in enumerate(values):
      bare = result["rates"]["bare"][i]
      assert result["ratios"][name][i] == pytest.approx(value / bare)
  ops = [op.strip() for op in PP.split("|")]
  assert list(result["profile"]) == ["read and parse", *ops]
  # What takes a thousand times longer than the others.
  assert result["slowest"] in (ops[0], ops[2])
  sizes = [len(photographs.photo(i)) for i in range(6)]
  assert result["mean_bytes"] == pytest.approx(np.mean(sizes))

  text = benchmark.table(result)
  for name in (*ops, plain, PP, "bare", f"slowest op: {result['slowest']}"):
    assert name in text


def test_profile_tells_a_slow_op(photos):
  files = benchmark.find_files(photos)
  slow = "resize(2000, 'lanczos5')"
  costs = benchmark.profile(
    files, f"decode|resize(8)| |flip_lr|{slow}", examples=4, rounds=3
  )
  assert list(costs)[1:] == ["decode", "resize(8)", "flip_lr", slow]
  assert max(costs, key=costs.get) == slow


def test_without_randaug_nothing_comes_twice(photos):
  pp = benchmark.without_randaug(PP)
  files = benchmark.find_files(photos)
  measured = benchmark.rates(
    photos, files, pp, batch_size=2, batches=1, rounds=1, threads=2
  )
  assert list(measured) == ["bare", pp]


def _other(features, example, name, data_dir, **config):
  """Prepares a set of one example."""
  with tfds.core.registered.skip_registration():

    class Other(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      pkg_dir_path = None

      def _info(self):
        features_dict = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features_dict)

      def _split_generators(self, dl_manager):
        return {"train": [(0, example)]}

      def _generate_examples(self):
        raise NotImplementedError

  Other.name = name
  Other(data_dir=str(data_dir), **config).download_and_prepare()
  return {"name": name, "split": "train", "data_dir": str(data_dir)}


def test_wants_jpegs_in_tfrecord_files(tmp_path):
  wanted = "wants JPEGs as `image` in TFRecord files"
  pixels = np.zeros((4, 4, 3), np.uint8)
  jpeg = tfds.features.Image(encoding_format="jpeg")
  for name, features, example, config in [
    ("no_image", {"label": np.int64}, {"label": 1}, {}),
    ("png_image", {"image": tfds.features.Image()}, {"image": pixels}, {}),
    (
      "other_files",
      {"image": jpeg},
      {"image": pixels},
      {"file_format": "array_record"},
    ),
  ]:
    data = _other(features, example, name, tmp_path, **config)
    with pytest.raises(ValueError, match=f"{name}.*{wanted}"):
      benchmark.find_files(data)
  with pytest.raises(ValueError, match=wanted):
    benchmark.find_files({"folder": str(tmp_path), "split": "train"})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(rounds=0), "rounds=0: want at least 1"),
    (dict(threads=-1), "threads=-1: want at least 1"),
    (dict(batch_size=7), "examples=6: want at least a batch, batch_size=7"),
  ],
)
def test_numbers_that_do_not_work(photos, change, message):
  with pytest.raises(ValueError, match=message):
    benchmark.benchmark(photos, PP, **{**SMALL, **change})


def test_preprocessing_that_does_not_work(photos):
  with pytest.raises(ValueError, match="gives no images"):
    benchmark.benchmark(photos, "keep('label')", **SMALL)
  with pytest.raises(ValueError, match="there is no op 'decod'"):
    benchmark.benchmark(photos, "decod", **SMALL)


def _run(*args):
  return subprocess.run(
    [sys.executable, "-m", "benchmarks.input_pipeline", *args],
    capture_output=True,
    text=True,
  )


@pytest.mark.full
def test_program(photos, tmp_path):
  output = tmp_path / "result.json"
  small = ["--examples=2", "--batch_size=1", "--rounds=1", "--threads=1"]
  done = _run("--pp=decode|resize(8)", *small, f"--output={output}")
  assert done.returncode == 0, done.stderr
  result = json.loads(output.read_text())
  assert done.stdout.rstrip("\n") == benchmark.table(result)
  assert result["examples"] == 2

  done = _run(
    "--config=configs/in1k_vit_b.py:res=16",
    f"--config.input.data.name={photos['name']}",
    f"--config.input.data.split={photos['split']}",
    f"--data_dir={photos['data_dir']}",
    *small,
  )
  assert done.returncode == 0, done.stderr
  assert "decode_jpeg_and_inception_crop(16)" in done.stdout


def test_program_fails_before_it_makes_photos(tmp_path):
  data_dir = tmp_path / "photos"
  output = tmp_path / "none" / "result.json"
  done = _run(f"--data_dir={data_dir}", f"--output={output}")
  assert done.returncode == 1
  assert done.stderr == f"error: --output={output}: no directory for it.\n"
  assert not data_dir.exists()
