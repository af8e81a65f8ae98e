"""Tests of lookup_vit/records.py and lookup_vit/damage.py on TFDS's files.

What folders of images need is in test_datasets.py.
"""

import itertools
import os
import shutil

import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from lookup_vit import datasets, records
from lookup_vit import input_pipeline as ip
from tests import sources

SMALL_PP = "decode|resize(8)|value_range(-1, 1)"


@pytest.fixture(scope="session")
def numbers(tmp_path_factory):
  return sources.build_numbers(tmp_path_factory.mktemp("numbers"), 101, 5)


@pytest.fixture(scope="session")
def array_record(tmp_path_factory):
  path = tmp_path_factory.mktemp("array_record")
  return sources.build_numbers(path, 101, 3, "array_record")


def ids_of(batches):
  return [int(i) for b in batches for i in b["id"][b["_mask"] == 1]]


@pytest.mark.parametrize("source", ["numbers", "array_record"])
def test_ranges_in_sequence(source, request):
  data = request.getfixturevalue(source)
  source = records.open_records(data)
  assert source.size == 101

  def ids(first, last):
    return [
      (int(index), int(source.load(record)["id"]))
      for index, record in source.in_sequence(first, last)
    ]

  everything = ids(0, 101)
  assert [index for index, _ in everything] == list(range(101))
  assert sorted(i for _, i in everything) == list(range(101))
  for first, last in ((0, 1), (20, 21), (19, 61), (100, 101), (50, 50)):
    assert ids(first, last) == everything[first:last]


def test_array_record_as_its_own_reader(array_record):
  builder = datasets.get_builder(array_record)
  want = list(builder.as_data_source("train[20:90]"))
  data = {**array_record, "split": "train[20:90]"}
  ds, count = ip.make_eval(data, pp=SMALL_PP, batch_size=9)
  batches = list(ds)
  assert len(batches) == count == 8
  assert ids_of(batches) == [e["id"] for e in want]


def test_sub_splits_of_shards(numbers):
  builder = datasets.get_builder(numbers)
  for split in ("train[30:80]", "train[97%:]", "train[:5]+train[95:]"):
    want = [int(e["id"]) for e in builder.as_dataset(split=split)]
    data = {**numbers, "split": split}
    ds, _ = ip.make_eval(data, pp=SMALL_PP, batch_size=10)
    # TFDS's own order mixes shards; ours is that of the files.
    assert sorted(ids_of(ds)) == sorted(want)
    batches = ip.make_train(data, pp=SMALL_PP, batch_size=len(want), seed=0)
    assert sorted(next(iter(batches))["id"]) == sorted(want)


# --- Damage


@pytest.fixture
def fragile(tmp_path):
  """A set of its own, to damage."""
  return sources.build_numbers(tmp_path, 40, 3)


def train_batches(data):
  batches = ip.make_train(data, pp=SMALL_PP, batch_size=2, seed=0)
  return list(itertools.islice(batches, 30))


def all_batches(data):
  ds, _ = ip.make_eval(data, pp=SMALL_PP, batch_size=4)
  return list(ds)


def test_missing_shard(fragile):
  path = sources.shard_paths(fragile)[1]
  os.remove(path)
  for make in (ip.make_train, ip.make_eval):
    kwargs = {"seed": 0} if make is ip.make_train else {}
    with pytest.raises(ValueError, match="1 of the 3 files .*again") as e:
      make(fragile, pp=SMALL_PP, batch_size=2, **kwargs)
    assert f"{path}: is missing" in str(e.value)


def test_truncated_shard_is_named_before_training(fragile):
  path = sources.shard_paths(fragile)[2]
  sources.cut(path, os.path.getsize(path) - 1)
  with pytest.raises(ValueError, match="1 of the 3 files") as e:
    ip.make_train(fragile, pp=SMALL_PP, batch_size=2, seed=0)
  assert path in str(e.value) and "truncated record" in str(e.value)


def test_corrupt_record_is_named_when_it_is_read(fragile):
  path = sources.shard_paths(fragile)[1]
  with open(path, "r+b") as file:
    file.seek(os.path.getsize(path) // 2)
    file.write(b"garbage")
  with pytest.raises(ValueError, match="1 of the 3 files") as e:
    train_batches(fragile)
  assert path in str(e.value) and "corrupted record" in str(e.value)
  with pytest.raises(ValueError, match="corrupted record"):
    all_batches(fragile)


def test_corrupt_array_record_is_named_when_it_is_read(tmp_path):
  data = sources.build_numbers(tmp_path, 40, 3, "array_record")
  path = sources.shard_paths(data)[1]
  with open(path, "r+b") as file:
    file.seek(30_000)
    file.write(b"garbage" * 200)
  for make in (train_batches, all_batches):
    with pytest.raises(ValueError, match=r"record \d+ of .*corrupt") as e:
      make(data)
    assert path in str(e.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "shorter"])
def test_damaged_array_record_is_named_before_training(damage, tmp_path):
  data = sources.build_numbers(tmp_path / "a", 40, 3, "array_record")
  path = sources.shard_paths(data)[1]
  if damage == "shorter":
    other = sources.build_numbers(tmp_path / "b", 20, 3, "array_record")
    shutil.copy(sources.shard_paths(other)[1], path)
  else:
    sources.cut(path, 0 if damage == "empty" else os.path.getsize(path) - 999)
  with pytest.raises(ValueError, match="1 of the 3 files") as e:
    ip.make_train(data, pp=SMALL_PP, batch_size=2, seed=0)
  assert path in str(e.value)


def test_shard_with_too_few_records_is_named(fragile):
  """Cut between two records, which TensorFlow takes for the end."""
  path = sources.shard_paths(fragile)[1]
  raw = [record.numpy() for record in tf.data.TFRecordDataset(path)]
  with tf.io.TFRecordWriter(path) as writer:
    # As many bytes as before, so that their number tells nothing.
    writer.write(raw[0] + bytes(sum(map(len, raw[-2:])) + 32))
    for record in raw[1:-2]:
      writer.write(record)
  for make in (train_batches, all_batches):
    with pytest.raises(ValueError, match="1 of the 3 files") as e:
      make(fragile)
    want = f"{path}: {len(raw) - 2} records, wanted {len(raw)}"
    assert want in str(e.value)


@pytest.mark.parametrize("file_format", [None, "array_record"])
def test_broken_image_in_a_whole_record_is_named(tmp_path, file_format):
  data = sources.build_numbers(tmp_path, 40, 3, file_format, broken=23)
  with pytest.raises(ValueError, match=r"record \d+ of .*-of-00003.*JPEG") as e:
    train_batches(data)
  train_place = str(e.value)
  with pytest.raises(ValueError, match="JPEG") as e:
    all_batches(data)
  assert str(e.value) == train_place
  # It is the record that it says.
  builder = datasets.get_builder(data)
  words = train_place.partition(": record ")[2].split()
  number, path = int(words[0]), words[2].rstrip(":")
  files = builder.info.splits["train"].file_instructions
  before = 0
  for file in files:
    if file.filename == path:
      break
    before += file.take
  if file_format:
    source = builder.as_data_source(
      "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert source[before + number]["id"] == 23
  else:
    record = next(iter(tf.data.TFRecordDataset(path).skip(number)))
    assert (
      builder.info.features.deserialize_example(
        record, decoders={"image": tfds.decode.SkipDecoding()}
      )["id"]
      == 23
    )


def test_format_that_is_not_read(tmp_path, monkeypatch):
  data = sources.build_numbers(tmp_path, 5, 1)
  builder = datasets.get_builder(data)
  monkeypatch.setattr(
    type(builder.info), "file_format", tfds.core.FileFormat.RIEGELI
  )
  with pytest.raises(ValueError, match="format riegeli; wanted tfrecord or"):
    ip.make_train(data, pp=SMALL_PP, batch_size=2, seed=0)
