"""Tests of lookup_vit/record_index.py, and of reading from a bucket."""

import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from lookup_vit import datasets, record_index, records
from lookup_vit import input_pipeline as ip
from tests import fake_bucket, sources

PP = 'decode|resize(8)|value_range(-1, 1)|keep("image", "id")'


@pytest.fixture
def numbers(tmp_path):
  """35 or 36 records a shard: not a multiple of the index's stride."""
  return sources.build_numbers(tmp_path, 213, 6)


def index_path(data, split="train"):
  return record_index.path_of(datasets.get_builder(data), split)


def make(data):
  """Writes the index of the only split that is named."""
  [(path, files)] = record_index.wanted(data).items()
  record_index.make(path, files)
  return path


def take(data, steps, **kwargs):
  batches = iter(ip.make_train(data, pp=PP, seed=3, **kwargs))
  return [next(batches) for _ in range(steps)]


def record_ends(path):
  """Bytes up to the end of each record, by the lengths in a file."""
  content, ends, place = pathlib.Path(path).read_bytes(), [], 0
  while place < len(content):
    place += int.from_bytes(content[place : place + 8], "little") + 16
    ends.append(place)
  return ends


def test_index_has_the_places_of_records(numbers):
  path = make(numbers)
  assert path == index_path(numbers)
  paths = sources.shard_paths(numbers)
  sizes = {path: os.path.getsize(path) for path in paths}
  index = record_index.load(path, sizes)
  assert list(index) == paths
  for path in paths:
    want = [0, *record_ends(path)][: -1 : record_index.STRIDE]
    assert len(want) == 3
    np.testing.assert_array_equal(index[path], want)


@pytest.mark.parametrize("split", ["train", "train[40:190]"])
def test_an_index_changes_nothing(split, numbers):
  data = {**numbers, "split": split}
  kwargs = dict(batch_size=9, shuffle_buffer_size=20)

  def everything():
    part = [int(i) for i, _ in records.open_records(data).in_sequence(17, 141)]
    late = take(data, 3, start_step=77, **kwargs)
    return part, take(data, 50, **kwargs) + late

  want = everything()
  make(data)
  got = everything()
  assert got[0] == want[0] == list(range(17, 141))
  for a, b in zip(got[1], want[1], strict=True):
    np.testing.assert_array_equal(a["id"], b["id"])
    np.testing.assert_array_equal(a["image"], b["image"])


def test_an_index_of_other_files_is_named(numbers, tmp_path):
  path = make(numbers)
  want = rf"{path} is of other files .*lookup_vit.record_index"
  content = path.read_bytes()
  for change in (
    {"sizes": np.arange(6)},
    {"names": np.array(list("abcdef"))},
    {"stride": np.array(7)},
  ):
    with np.load(io.BytesIO(content)) as index:
      np.savez(path, **(dict(index) | change))
    with pytest.raises(ValueError, match=want):
      take(numbers, 1, batch_size=8)
  middle = len(content) // 2
  changed = bytearray(content)
  for i in range(0, len(content), 7):
    changed[i] ^= 0x5A
  for broken in (b"", b"no archive", content[:middle], bytes(changed)):
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=f"{path} is no index of records"):
      take(numbers, 1, batch_size=8)
  np.savez(path, names=np.array(["a"], object))  # Would be unpickled.
  with pytest.raises(ValueError, match="is no index"):
    take(numbers, 1, batch_size=8)


@pytest.mark.parametrize("place", range(40, 600, 40))
def test_a_changed_byte_never_gives_other_offsets(place, numbers, tmp_path):
  path = make(numbers)
  sizes = {p: os.path.getsize(p) for p in sources.shard_paths(numbers)}
  want = record_index.load(path, sizes)
  content = bytearray(path.read_bytes())
  content[place] ^= 0x5A
  path.write_bytes(content)
  try:
    got = record_index.load(path, sizes)
  except ValueError as e:
    assert str(path) in str(e)
  else:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_an_index_of_other_records_is_named_when_it_is_read(numbers):
  """Files of the same names and sizes, whose records begin elsewhere."""
  path = make(numbers)
  for file in sources.shard_paths(numbers):
    records = list(tf.data.TFRecordDataset(file).as_numpy_iterator())
    with tf.io.TFRecordWriter(file) as writer:
      for record in records[::-1]:
        writer.write(record)
  with pytest.raises(ValueError, match="record_index-.* does not fit; delete"):
    take(numbers, 40, batch_size=9, shuffle_buffer_size=20)
  path.unlink()
  take(numbers, 40, batch_size=9, shuffle_buffer_size=20)


def test_shards_without_records(tmp_path):
  files = []
  for i, count in enumerate((0, 1, 17)):
    files.append((str(tmp_path / f"{i}.tfrecord"), count))
    with tf.io.TFRecordWriter(files[-1][0]) as writer:
      for _ in range(count):
        writer.write(b"record")
  path = epath.Path(tmp_path / "index.npz")
  record_index.make(path, files)
  sizes = {file: os.path.getsize(file) for file, _ in files}
  index = record_index.load(path, sizes)
  assert [index[file].tolist() for file, _ in files] == [[0], [0], [0, 16 * 22]]


def test_what_has_no_index(numbers, tmp_path):
  folder = sources.write_folder(tmp_path / "folder")
  array_record = sources.build_numbers(tmp_path / "a", 20, 2, "array_record")
  assert record_index.wanted(folder) == record_index.wanted(array_record) == {}
  with pytest.raises(ValueError, match="trian"):
    record_index.wanted({**numbers, "split": "trian"})
  path = sources.shard_paths(numbers)[4]
  with open(path, "r+b") as file:
    file.seek(5000)
    file.write(b"garbage")
  with pytest.raises(ValueError, match=rf"{path}: corrupted record"):
    make(numbers)
  path = sources.shard_paths(numbers)[2]  # Before the other, in order.
  sources.cut(path, record_ends(path)[20])
  with pytest.raises(ValueError, match=f"{path}: 21 records, wanted 3[56]"):
    make(numbers)
  # Nor is anything half written.
  assert not tf.io.gfile.glob(f"{index_path(numbers).parent}/record_index*")


# --- On a bucket

# What is read at a time.
BLOCK = 20_000

SCRIPT = """
import json, sys
from lookup_vit import input_pipeline as ip
data, kwargs = json.loads(sys.argv[1])
for line in sys.stdin:
  step, process, count, steps = json.loads(line)
  batches = iter(ip.make_train(
    data, start_step=step, process_index=process, process_count=count, **kwargs
  ))
  ids = [next(batches)["id"].tolist() for _ in range(steps)]
  del batches
  print(json.dumps(ids), flush=True)
"""


class Reader:
  """A program that reads from the bucket."""

  def __init__(self, server, env, data, **kwargs):
    self.server = server
    arguments = json.dumps([data, kwargs])
    env = dict(os.environ, GCS_READAHEAD_BUFFER_SIZE_BYTES=str(BLOCK), **env)
    self.program = subprocess.Popen(
      [sys.executable, "-c", SCRIPT, arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=env,
      text=True,
    )
    self.ask(0, 0, 1, 1)  # What is read once: files of TFDS.

  def ask(self, step, process, count, steps):
    """Ids of some batches, and the bytes that were read for them."""
    before = self.server.sent
    print([step, process, count, steps], file=self.program.stdin, flush=True)
    ids = json.loads(self.program.stdout.readline())
    return ids, self.server.sent - before

  def close(self):
    self.program.communicate()
    assert self.program.returncode == 0


CONFIG = """
from configs import digits_vit

def get_config(arg=None):
  config = digits_vit.get_config(arg)
  config.input.data = {data}
  config.evals = dict(val=dict(type="classification", data={evaluation}))
  return config
"""


def run_command(path, env, data, evaluation):
  """Runs the command on a config of these data; returns status and lines."""
  config = path / "config.py"
  config.write_text(CONFIG.format(data=data, evaluation=evaluation))
  done = subprocess.run(
    [sys.executable, "-m", "lookup_vit.record_index", f"--config={config}"],
    env=dict(os.environ, **env),
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.full
def test_training_from_a_bucket(tmp_path):
  """Same batches as from a local disk; bytes within bounds, by an index."""
  local = sources.build_numbers(tmp_path / "root", 1030, 20)
  total = sum(map(os.path.getsize, sources.shard_paths(local)))
  shard = max(map(os.path.getsize, sources.shard_paths(local)))
  window = 120
  kwargs = dict(pp=PP, batch_size=12, seed=3, shuffle_buffer_size=window)
  # A lane's next window is fetched ahead, blocks are read whole, and a lane
  # enters a shard at a place of the index.
  lane = BLOCK + record_index.STRIDE * total / 1030
  most = 2 * total * window / 1030 + shard + 12 * lane
  with fake_bucket.serve(tmp_path / "root", tmp_path) as (server, env):
    data = {**local, "data_dir": "gs://bucket"}
    folder = sources.write_folder(tmp_path / "folder")
    command = lambda data: run_command(tmp_path, env, data, folder)  # noqa: E731
    reader = Reader(server, env, data, **kwargs)
    _, without_index = reader.ask(10_000, 0, 1, 1)
    reader.close()

    # Where it cannot be written, this is said before the data are read.
    server.read_only = True
    server.sent = 0
    status, lines = command(data)
    assert status == 1 and server.sent < shard
    name = "gs://bucket/numbers/1.0.0/record_index-train.npz"
    assert lines[-1].startswith(f"error: {name} cannot be written: ")
    server.read_only = False
    status, lines = command({**data, "split": "trian"})
    assert status == 1 and len(lines) == 1 and "error: config.input" in lines[0]
    parts = [{**data, "split": s, "weight": 1} for s in ("train", "train[:9]")]
    status, lines = command({"mixture": [*parts, {**folder, "weight": 1}]})
    assert status == 0, lines
    assert sum(f"wrote {name}" in line for line in lines) == 1
    assert sum("folder" in line for line in lines) == 2  # Of the evaluator too.
    assert [p.name for p in index_path(local).parent.glob("record_i*")] == [
      "record_index-train.npz"
    ]
    # Of the programs that were not told otherwise.
    assert server.asked == 4 << 20

    reader = Reader(server, env, data, **kwargs)
    for step in (0, 10, 10_000, 123_456_789):
      ids, got = reader.ask(step, 0, 1, 1)
      want = ip.make_train(local, start_step=step, **kwargs)
      assert ids[0] == next(iter(want))["id"].tolist()
      assert got < most, (step, got, most)
      assert step != 10_000 or got < 0.8 * without_index
    steps = 3 * 1030 // 12
    for process, count in ((0, 1), (3, 4)):
      _, got = reader.ask(0, process, count, steps)
      share = total / count
      most = share + total * window / 1030 + shard + 12 * lane
      assert 2.9 * share < got < 3 * most, (process, count)
    reader.close()
