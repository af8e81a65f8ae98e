"""Tests of lookup_vit/input_pipeline.py."""

import itertools
import os

import numpy as np
import pytest
import tensorflow as tf

from lookup_vit import datasets, input_stream, order, records
from lookup_vit import input_pipeline as ip
from tests import sources
from tests.sources import find

# Random crops and flips, so that a wrong seed shows in the pixels.
RANDOM_PP = "decode|inception_crop(16)|flip_lr|value_range(-1, 1)"
PLAIN_PP = "decode|value_range(-1, 1)"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
  return sources.build_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def folder(tmp_path):
  return sources.write_folder(tmp_path / "images")


def take(data, steps, **kwargs):
  ds = ip.make_train(data, **kwargs)
  return list(itertools.islice(ds, steps))


def assert_same(got, want):
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    assert g.keys() == w.keys()
    for key in w:
      assert g[key].dtype == w[key].dtype
      np.testing.assert_array_equal(g[key], w[key])


# --- The training stream


@pytest.mark.parametrize("window", [5, 1000])
@pytest.mark.parametrize("batch_size", [8, 50])
def test_every_epoch_has_every_example_once(digits, window, batch_size):
  steps = 4 * 37 // batch_size + 1
  batches = take(
    digits,
    steps,
    pp=PLAIN_PP,
    batch_size=batch_size,
    seed=1,
    shuffle_buffer_size=window,
  )
  assert all(b["image"].shape == (batch_size, 32, 32, 3) for b in batches)
  ids = np.concatenate([b["id"] for b in batches])[: 4 * 37].reshape(4, 37)
  everything = np.sort(ids[0])
  assert len(set(everything)) == 37
  for epoch in ids:
    np.testing.assert_array_equal(np.sort(epoch), everything)
  assert len({tuple(epoch) for epoch in ids}) == 4  # Another order in each.


def test_whole_set_in_one_window_is_shuffled_over_its_length(digits):
  data = {**digits, "split": "train"}
  [batch] = take(
    data, 1, pp='decode|keep("image", "id")', batch_size=1437, seed=0
  )
  # The files are in an order of their own, so that counts only as a reference.
  builder = datasets.get_builder(data)
  order = [int(e["id"]) for e in builder.as_dataset(split="train")]
  rank = {i: position for position, i in enumerate(order)}
  ranks = np.array([rank[i] for i in batch["id"]])
  assert abs(np.corrcoef(ranks, np.arange(1437))[0, 1]) < 0.1


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_restart_gives_the_same_bits(source, request):
  data = request.getfixturevalue(source)
  kwargs = dict(pp=RANDOM_PP, batch_size=6, seed=2**40 + 3)
  kwargs["shuffle_buffer_size"] = 10
  want = take(data, 24, **kwargs)
  rng = np.random.default_rng(0)
  for start in [1, *rng.integers(2, 22, 3).tolist()]:
    tf.random.set_seed(start)  # TensorFlow's global seed must not matter.
    assert_same(take(data, 2, start_step=start, **kwargs), want[start:][:2])
  tf.random.set_seed(0)
  assert_same(take(data, 3, **kwargs), want[:3])


def test_late_start_is_at_its_epoch_at_once(digits):
  kwargs = dict(pp=RANDOM_PP, batch_size=37, seed=0)
  [a] = take(digits, 1, start_step=10**7, **kwargs)
  [b, c] = take(digits, 2, start_step=10**7 - 1, **kwargs)
  assert_same([a], [c])
  assert not np.array_equal(a["id"], b["id"])


def test_skipped_examples_are_not_preprocessed(digits, monkeypatch):
  seen = []

  def get_preprocess_fn(pp):
    del pp

    def fn(record, seed):
      # A seed tells not only the example but also its epoch.
      [seed] = tf.numpy_function(
        lambda s: (seen.append(tuple(s)), s)[1], [seed], [tf.int32]
      )
      return {"seed": tf.ensure_shape(seed, [2]), "id": record["id"]}

    return fn

  monkeypatch.setattr(ip, "get_preprocess_fn", get_preprocess_fn)
  monkeypatch.setattr(records, "_image_decoder", lambda feature: lambda r: r)
  kwargs = dict(pp="", batch_size=2, seed=0)
  batches = take(digits, 30, **kwargs)
  seeds = [tuple(s) for s in np.concatenate([b["seed"] for b in batches])]
  assert set(seeds) <= set(seen) and len(set(seeds)) == 60
  seen.clear()
  assert_same(take(digits, 5, start_step=25, **kwargs), batches[25:])
  assert set(seeds[50:]) <= set(seen)
  assert not set(seeds[:50]) & set(seen)


def test_seed_and_epoch_change_order_and_pixels(digits):
  kwargs = dict(pp=RANDOM_PP, batch_size=37)
  seeds = [take(digits, 2, seed=seed, **kwargs) for seed in (0, 1, 2**32)]
  by_id = []
  for batch in itertools.chain(*seeds):
    order = np.argsort(batch["id"])
    by_id.append((tuple(batch["id"]), batch["image"][order]))
  for (ids_a, images_a), (ids_b, images_b) in itertools.combinations(by_id, 2):
    assert ids_a != ids_b
    same = (images_a == images_b).all((1, 2, 3))
    assert same.sum() < 3


def test_examples_of_an_epoch_differ_in_their_augmentation(folder):
  # Copies of one image, so that only their seeds tell them apart.
  data = {**folder, "split": "train[:1]" + "+train[:1]" * 9}
  [batch] = take(data, 1, pp=RANDOM_PP, batch_size=10, seed=0)
  assert len({image.tobytes() for image in batch["image"]}) == 10


def test_batches_are_views(digits):
  [batch] = take(digits, 1, pp=PLAIN_PP, batch_size=4, seed=0)
  assert not batch["image"].flags.owndata
  assert not batch["image"].flags.writeable


def test_named_set(digits):
  # A set in data_dir needs no code of TFDS.
  data = {"name": "digits", "split": "test", "data_dir": digits["data_dir"]}
  [batch] = take(data, 1, pp=PLAIN_PP, batch_size=4, seed=0)
  assert batch["image"].shape == (4, 32, 32, 3)


# --- Files of several shards


@pytest.fixture(scope="session")
def numbers(tmp_path_factory):
  """257 examples in 5 shards: neither is divided by a batch."""
  return sources.build_numbers(tmp_path_factory.mktemp("numbers"), 257, 5)


@pytest.fixture(scope="session")
def array_record(tmp_path_factory):
  path = tmp_path_factory.mktemp("array_record")
  return sources.build_numbers(path, 101, 3, "array_record")


@pytest.mark.parametrize(
  "source, size", [("numbers", 257), ("array_record", 101)]
)
@pytest.mark.parametrize("batch_size, window", [(12, 7), (50, 40), (4, 1000)])
def test_every_epoch_of_shards(source, size, batch_size, window, request):
  data = request.getfixturevalue(source)
  batches = take(
    data,
    3 * size // batch_size + 1,
    pp=RANDOM_PP,
    batch_size=batch_size,
    seed=2,
    shuffle_buffer_size=window,
  )
  ids = np.concatenate([b["id"] for b in batches])[: 3 * size]
  for epoch in ids.reshape(3, size):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
  assert len(set(map(tuple, ids.reshape(3, size)))) == 3


@pytest.mark.parametrize(
  "source, process_count, start",
  [
    ("numbers", 2, 43),
    ("numbers", 3, 20),
    ("numbers", 12, 20),
    ("array_record", 3, 7),
    ("folder", 2, 1),
    ("folder", 4, 43),
  ],
)
def test_hosts_of_any_number_share_the_batches(
  source, process_count, start, request
):
  data = request.getfixturevalue(source)
  kwargs = dict(pp=RANDOM_PP, batch_size=12, seed=5, shuffle_buffer_size=30)
  want = take(data, 45, **kwargs)[start:][:2]
  kwargs |= dict(start_step=start, process_count=process_count)
  assert_same(gather(data, 2, **kwargs), want)


def gather(data, steps, process_count, **kwargs):
  """The global batches that all hosts have together."""
  hosts = [
    take(data, steps, process_index=p, process_count=process_count, **kwargs)
    for p in range(process_count)
  ]
  return [
    {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for parts in zip(*hosts, strict=True)
  ]


def test_augmentation_belongs_to_example_and_epoch(numbers):
  """Another window is another order, of the same pixels."""
  epochs = []
  for window, batch_size in ((10, 12), (100, 50)):
    batches = take(
      numbers,
      2 * 257 // batch_size + 1,
      pp=RANDOM_PP,
      batch_size=batch_size,
      seed=3,
      shuffle_buffer_size=window,
    )
    ids, images = (
      np.concatenate([b[key] for b in batches])[: 2 * 257]
      for key in ("id", "image")
    )
    for i in range(2):
      part = slice(i * 257, (i + 1) * 257)
      epochs.append((ids[part], images[part][np.argsort(ids[part])]))
  assert not np.array_equal(epochs[0][0], epochs[2][0])
  np.testing.assert_array_equal(epochs[0][1], epochs[2][1])
  np.testing.assert_array_equal(epochs[1][1], epochs[3][1])
  assert (epochs[0][1] != epochs[1][1]).any((1, 2, 3)).all()


def test_shards_of_a_step_are_those_that_its_batch_is_from(numbers):
  """What is checked first where a record is corrupt."""
  source = records.open_records(numbers)
  ends = np.cumsum(source.shards.sizes)
  part = input_stream.Part(source, None, order.make_seed(3), 12, (6, 12), 30)
  fewer = 0
  for step in (0, 7, 20, 21, 22, 5000):
    examples = part.stream(step).take(2 * part.width)
    used = {int(np.searchsorted(ends, i, "right")) for _, i, _ in examples}
    assert used <= part.shards_at(step)
    fewer += len(part.shards_at(step)) < len(ends)
  assert fewer


def bytes_read():
  """Bytes that this process has read so far, from the page cache too."""
  with open("/proc/self/io") as file:
    return int(file.readline().removeprefix("rchar: "))


def bytes_of(data, steps, **kwargs):
  """Bytes read up to the last of some batches."""
  batches = ip.make_train(data, pp=PLAIN_PP + "|resize(8)", seed=0, **kwargs)
  start = bytes_read()
  iterator = iter(batches)
  for _ in range(steps):
    next(iterator)
  return bytes_read() - start


def test_hosts_read_their_share_of_the_bytes(numbers):
  sizes = [os.path.getsize(path) for path in sources.shard_paths(numbers)]
  total, shard, window = sum(sizes), max(sizes), 24
  kwargs = dict(batch_size=12, shuffle_buffer_size=window)
  bytes_of(numbers, 1, **kwargs)  # What is read once: files of TFDS.
  steps = 3 * 257 // 12  # What is read ahead is not of these epochs.
  # 10 lanes, which 3, 4 and 12 hosts do not share evenly.
  for process, count in ((0, 1), (1, 2), (1, 3), (3, 4), (0, 12), (5, 12)):
    kwargs |= dict(process_index=process, process_count=count)
    got = bytes_of(numbers, steps, **kwargs) / 3
    share = total / count
    most = share + total * window / 257 + shard
    assert share * 0.9 < got < most, (count, process, got / total)


@pytest.mark.parametrize("size", [1, 64])
def test_a_late_start_reads_no_more_than_a_window_and_a_shard(size, tmp_path):
  """Of large records and of small ones."""
  data = sources.build_numbers(tmp_path, 512, 5, size=size)
  sizes = [os.path.getsize(path) for path in sources.shard_paths(data)]
  window = 48
  kwargs = dict(batch_size=12, shuffle_buffer_size=window)
  bytes_of(data, 1, **kwargs)
  # Lanes have their next window read while the first is used.
  most = 2 * sum(sizes) * window / 512 + max(sizes)
  for step in (0, 10, 10_000, 123_456_789):
    assert bytes_of(data, 1, start_step=step, **kwargs) < most


# --- Mixtures


def mixture(**kwargs):
  parts = [dict(part) for part in kwargs["parts"]]
  for part, weight in zip(parts, kwargs["weights"], strict=True):
    part["weight"] = weight
  return {"mixture": parts}


@pytest.fixture
def mixed(numbers, digits):
  """Ids of the digits are told from those of the numbers by the pixels."""
  return mixture(parts=[numbers, digits], weights=[3, 1])


MIXED_PP = RANDOM_PP + '|keep("image", "label", "id")'


def test_mixture_has_the_streams_of_its_sets(mixed, numbers, digits):
  """Each set comes as it would come alone, in batches of its own slots."""
  kwargs = dict(pp=MIXED_PP, seed=4, shuffle_buffer_size=20)
  batches = take(mixed, 60, batch_size=12, **kwargs)
  owner = order.mixture_slots([3, 1], 12)
  ids = [
    np.concatenate([b["id"][owner == i] for b in batches]) for i in range(2)
  ]
  assert [len(i) for i in ids] == [540, 180]
  for of_set, size in zip(ids, (257, 37), strict=True):
    epochs = of_set[: len(of_set) // size * size].reshape(-1, size)
    assert len(epochs) >= 2
    for epoch in epochs:
      assert sorted(epoch) == sorted(epochs[0])
      assert len(set(epoch)) == size
  # The first set's stream is that of the set alone.
  alone = take(numbers, 60, batch_size=9, **kwargs)
  np.testing.assert_array_equal(
    ids[0], np.concatenate([b["id"] for b in alone])
  )


@pytest.mark.parametrize("process_count, start", [(1, 7), (2, 28), (4, 15)])
def test_mixture_restarts_and_is_shared_by_hosts(mixed, process_count, start):
  kwargs = dict(pp=MIXED_PP, batch_size=12, seed=4, shuffle_buffer_size=20)
  want = take(mixed, 30, **kwargs)[start:][:2]
  kwargs |= dict(start_step=start, process_count=process_count)
  assert_same(gather(mixed, 2, **kwargs), want)


def test_mixture_with_preprocessing_of_its_own(numbers):
  constant = MIXED_PP.replace("value_range(-1, 1)", "value_range(7, 7)")
  parts = [numbers, {**numbers, "pp": constant}]
  data = mixture(parts=parts, weights=[1, 1])
  [batch] = take(data, 1, pp=MIXED_PP, batch_size=8, seed=0)
  is_constant = (batch["image"] == 7).all((1, 2, 3))
  assert is_constant.tolist() == [False, True] * 4


def test_mixture_errors_name_the_data_set(numbers, digits):
  for wrong, words in (
    ({"split": "trian"}, "trian"),
    ({"pp": "decod"}, "decod"),
    ({"pp": "decode"}, r"preprocessing string 'decode' it has the shape"),
  ):
    data = mixture(parts=[digits, {**numbers, **wrong}], weights=[1, 1])
    with pytest.raises(ValueError, match=r"data.mixture\[1\]: .*" + words):
      ip.make_train(data, pp=MIXED_PP, batch_size=8, seed=0)


def test_mixture_of_different_features(numbers, digits):
  parts = [numbers, {**digits, "pp": PLAIN_PP + '|keep("image", "label")'}]
  data = mixture(parts=parts, weights=[1, 1])
  with pytest.raises(ValueError, match=r"mixture\[1\]: .*another.*alike"):
    ip.make_train(data, pp=MIXED_PP, batch_size=8, seed=0)


# --- Evaluation


@pytest.mark.parametrize("process_count", [1, 2, 3, 4])
@pytest.mark.parametrize("split", ["train[:37]", "train[:24]", "train[:2]"])
def test_eval_has_every_example_once(digits, split, process_count):
  data = {**digits, "split": split}
  everything = [
    int(e["id"]) for e in datasets.get_builder(data).as_dataset(split=split)
  ]
  hosts = []
  for p in range(process_count):
    ds, num_batches = ip.make_eval(
      data,
      pp=PLAIN_PP,
      batch_size=12,
      process_index=p,
      process_count=process_count,
    )
    batches = list(ds)
    assert num_batches == len(batches) == -(-len(everything) // 12)
    for batch in batches:
      assert batch["image"].shape == (12 // process_count, 32, 32, 3)
      assert batch["_mask"].dtype == np.float32
      for key in batch:
        assert not batch[key][batch["_mask"] == 0].any()
    hosts.append(batches)
  # Host after host, each its part of the split.
  got = [
    int(i)
    for batches in hosts
    for batch in batches
    for i in batch["id"][batch["_mask"] == 1]
  ]
  assert got == everything


def test_images_of_one_size_need_no_resize(digits):
  want = list(datasets.get_builder(digits).as_dataset(split=digits["split"]))
  for pp in ("", "decode"):
    ds, _ = ip.make_eval(digits, pp=pp, batch_size=37)
    [batch] = ds
    np.testing.assert_array_equal(batch["image"], [e["image"] for e in want])
    np.testing.assert_array_equal(batch["label"], [e["label"] for e in want])


# --- Folders


def tops(data):
  """Returns the values that name the images of a split, in order."""
  pp = 'decode|resize(40)|keep("image", "label")'
  ds, _ = ip.make_eval(data, pp=pp, batch_size=7)
  values = []
  for batch in ds:
    real = batch["_mask"] == 1
    top = np.rint(batch["image"][real, :6].mean((1, 2, 3))).astype(int)
    np.testing.assert_array_equal(batch["label"][real], top >= 10)
    values += top.tolist()
  return values


def test_folder_and_its_sub_splits(folder):
  everything = tops(folder)
  assert sorted(everything) == list(range(20))
  splits = ["train[:70%]", "train[14:18]", "train[-2:]"]
  parts = [tops({**folder, "split": split}) for split in splits]
  assert [len(part) for part in parts] == [14, 4, 2]
  assert sum(parts, []) == everything
  assert tops({**folder, "split": "+".join(splits)}) == everything


def test_broken_images_fail_or_are_skipped(folder):
  before = tops({**folder, "split": "train[:75%]"})
  sources.break_four(folder)
  with pytest.raises(ValueError, match="4 of the 20"):
    ip.make_train(folder, pp=RANDOM_PP, batch_size=2, seed=0)
  with pytest.raises(ValueError, match="4 of the 20"):
    ip.make_eval(folder, pp=RANDOM_PP, batch_size=2)

  skip = {**folder, "on_error": "skip"}
  broken = {0, 3, 12, 15}
  assert sorted(tops(skip)) == sorted(set(range(20)) - broken)
  # What is broken moves no other image to another sub-split.
  after = tops({**skip, "split": "train[:75%]"})
  assert after == [i for i in before if i not in broken]


def test_damage_in_mid_file_is_named_at_run_time(folder):
  path = find(folder, "7.png")
  with open(path, "r+b") as file:
    file.seek(200)
    file.write(b"\0" * 200)
  assert datasets.num_examples(folder) == 20
  with pytest.raises(ValueError, match="Invalid PNG") as e:
    take(folder, 10, pp=RANDOM_PP, batch_size=4, seed=0)
  assert path in str(e.value)


def test_failing_op_names_the_image(folder):
  pp = "decode|random_crop(100)|value_range(-1, 1)"
  with pytest.raises(ValueError, match=r"/train/.*g: random_crop: .* less"):
    take(folder, 1, pp=pp, batch_size=4, seed=0)


# --- Errors


@pytest.mark.parametrize(
  "sizes, words",
  [
    ((10, 0, 3), "batch_size=10 .* 3"),
    ((0, 0, 1), "batch_size=0 "),
    ((4, 2, 2), r"process_index=2 .*\[0, 2\)"),
  ],
)
def test_sizes_that_do_not_fit(digits, sizes, words):
  names = ("batch_size", "process_index", "process_count")
  sizes = dict(zip(names, sizes, strict=True))
  with pytest.raises(ValueError, match=words):
    ip.make_train(digits, pp=PLAIN_PP, seed=0, **sizes)
  with pytest.raises(ValueError, match=words):
    ip.make_eval(digits, pp=PLAIN_PP, **sizes)


def test_features_that_cannot_be_batched(folder):
  pp = 'copy("image", "file")|decode|resize(8)'
  with pytest.raises(ValueError, match="'file'.*is a string.*keep"):
    ip.make_train(folder, pp=pp, batch_size=2, seed=0)
  with pytest.raises(ValueError, match="'image'.*may vary.*resize.*keep"):
    ip.make_eval(folder, pp="decode", batch_size=2)


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_split_without_examples(source, request):
  data = request.getfixturevalue(source)
  empty = {**data, "split": "train[:0]"}
  with pytest.raises(ValueError, match=r"'train\[:0\]' has no examples"):
    ip.make_train(empty, pp=PLAIN_PP, batch_size=2, seed=0)
  with pytest.raises(ValueError, match=r"'train\[:0\]' has no examples"):
    ip.make_eval(empty, pp=PLAIN_PP, batch_size=2)
