"""Tests of lookup_vit/record_index.py, and of reading from a bucket."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lookup_vit import datasets, order, record_index, records
from lookup_vit import input_pipeline as ip
from tests import fake_bucket, sources

PP = 'decode|resize(8)|value_range(-1, 1)|keep("image", "id")'


@pytest.fixture
def numbers(tmp_path):
  """35 or 36 records a shard: not a multiple of the index's stride."""
  return sources.build_numbers(tmp_path, 213, 6)


def index_path(data, split="train"):
  return record_index.path_of(datasets.get_builder(data), split)


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
  [path] = record_index.make(numbers)
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
  record_index.make(data)
  got = everything()
  assert got[0] == want[0] == list(range(17, 141))
  for a, b in zip(got[1], want[1], strict=True):
    np.testing.assert_array_equal(a["id"], b["id"])
    np.testing.assert_array_equal(a["image"], b["image"])


def test_an_index_of_other_files_is_named(numbers, tmp_path):
  [path] = record_index.make(numbers)
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
  for broken in (b"", b"no archive", content[: len(content) // 2]):
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=f"{path} is no index of records"):
      take(numbers, 1, batch_size=8)
  np.savez(path, names=np.array(["a"], object))  # Would be unpickled.
  with pytest.raises(ValueError, match="is no index"):
    take(numbers, 1, batch_size=8)


def test_what_has_no_index(numbers, tmp_path):
  folder = sources.write_folder(tmp_path / "folder")
  with pytest.raises(ValueError, match="data.folder=.* in random access"):
    record_index.make(folder)
  array_record = sources.build_numbers(tmp_path / "a", 20, 2, "array_record")
  with pytest.raises(ValueError, match="data.name='numbers' .*random access"):
    record_index.make(array_record)
  with pytest.raises(ValueError, match="trian"):
    record_index.make({**numbers, "split": "trian"})
  path = sources.shard_paths(numbers)[4]
  with open(path, "r+b") as file:
    file.seek(5000)
    file.write(b"garbage")
  with pytest.raises(ValueError, match=rf"{path}: corrupted record"):
    record_index.make(numbers)
  path = sources.shard_paths(numbers)[2]  # Before the other, in order.
  sources.cut(path, record_ends(path)[20])
  with pytest.raises(ValueError, match=f"{path}: 21 records, wanted 3[56]"):
    record_index.make(numbers)
  assert not index_path(numbers).exists()


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


def test_training_from_a_bucket(tmp_path):
  """Same batches as from a local disk; bytes within bounds, by an index."""
  local = sources.build_numbers(tmp_path / "root", 1030, 5)
  total = sum(map(os.path.getsize, sources.shard_paths(local)))
  shard = max(map(os.path.getsize, sources.shard_paths(local)))
  window = 60
  kwargs = dict(pp=PP, batch_size=12, seed=3, shuffle_buffer_size=window)
  lanes = order.Order((206,) * 5, 12, window, None).lanes
  assert lanes == 10
  with fake_bucket.serve(tmp_path / "root", tmp_path) as (server, env):
    data = {**local, "data_dir": "gs://bucket"}
    config = tmp_path / "config.py"
    config.write_text(
      "from configs import digits_vit\n"
      "def get_config(arg=None):\n"
      "  config = digits_vit.get_config(arg)\n"
      f"  config.input.data = {data}\n"
      "  return config\n"
    )
    made = subprocess.run(
      [sys.executable, "-m", "lookup_vit.record_index", f"--config={config}"],
      env=dict(os.environ, **env),
      capture_output=True,
      text=True,
    )
    assert made.returncode == 0, made.stderr
    assert index_path(local).exists(), made.stderr
    reader = Reader(server, env, data, **kwargs)
    for step in (0, 10, 10_000, 123_456_789):
      ids, got = reader.ask(step, 0, 1, 1)
      want = ip.make_train(local, start_step=step, **kwargs)
      assert ids[0] == next(iter(want))["id"].tolist()
      # A lane's next window is fetched ahead.
      most = 2 * total * window / 1030 + shard + lanes * BLOCK
      assert got < most, (step, got, most)
    steps = 3 * 1030 // 12
    for process, count in ((0, 1), (3, 4)):
      _, got = reader.ask(0, process, count, steps)
      share, windows = total / count, total * window / 1030
      assert 2.9 * share < got < 3 * (share + windows + shard), (process, count)
    reader.close()
