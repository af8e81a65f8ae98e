"""From a data description to batches, as a function of the seed and the step.

Training batches are slices of one endless stream: epoch 0, epoch 1, and so on,
each of them every example once, in an order drawn from the seed and the epoch.
The stream does not depend on where it was entered nor on how many hosts share
it, so a run that resumes, even on another number of hosts, sees what it would
have seen. Every host reads all records and decodes only its own.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lookup_vit import datasets, quiet_tensorflow  # noqa: F401

# isort: split
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from lookup_vit.preprocess import get_preprocess_fn

_LOG = logging.getLogger("lookup_vit")

_AUTOTUNE = tf.data.AUTOTUNE
_fold_in = tf.random.experimental.stateless_fold_in


def _records(data) -> tuple[tf.data.Dataset, int, Callable]:
  """Finds the records of a split.

  Args:
    data: a data description.

  Returns:
    A dataset of undecoded records in a fixed order, their number, and a
    function from a record to the example that preprocessing starts from.

  Raises:
    ValueError: if the data are not there, broken or empty.
  """
  data = datasets.check(data)
  builder = datasets.get_builder(data)
  if "folder" in data:
    examples = datasets.folder_examples(builder, data)
    total = len(examples)
  else:
    total = datasets.num_examples(data)
  if not total:
    raise ValueError(f"data.split={data['split']!r} has no examples")

  if "folder" in data:
    paths, labels = zip(*examples, strict=True)
    # Paths, so that what a resumed run skips or another host has is not read.
    records = tf.data.Dataset.from_tensor_slices(
      {"image": list(paths), "label": np.array(labels, np.int64)}
    )
    return records, total, _read_image

  features = dict(builder.info.features)
  skip_decoding = {
    key: tfds.decode.SkipDecoding()
    for key, feature in features.items()
    if isinstance(feature, tfds.features.Image)
  }
  records = builder.as_dataset(
    split=data["split"],
    shuffle_files=False,
    decoders=skip_decoding,
    read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
  )
  return records, total, _image_decoder(features.get("image"))


def _read_image(record):
  return {**record, "image": tf.io.read_file(record["image"])}


def _image_decoder(feature) -> Callable:
  """Returns a function that decodes `image` if all images are of one size.

  Undecoded, they would lose that size, and could only be batched after a
  needless resize. The op `decode` leaves them as they are.
  """
  if (
    not isinstance(feature, tfds.features.Image)
    or None in feature.shape
    or feature.dtype != np.uint8
    or feature.shape[-1] not in (1, 3)
  ):
    return lambda record: record
  decode = get_preprocess_fn(f"decode({feature.shape[-1]})")

  def decode_image(record):
    record = decode(record, tf.constant(_seed(0)))
    return {**record, "image": tf.ensure_shape(record["image"], feature.shape)}

  return decode_image


def _seed(seed: int) -> np.ndarray:
  """Returns an integer of up to 64 bits as the int32 [2] of stateless ops."""
  words = [seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]
  return np.array(words, np.uint32).view(np.int32)


def _local_size(batch_size, process_index, process_count) -> int:
  """Returns this host's share of a batch."""
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index={process_index} is not in [0, {process_count})"
    )
  if batch_size <= 0 or batch_size % process_count:
    raise ValueError(
      f"batch_size={batch_size} is not a positive multiple of the number of "
      f"processes, {process_count}"
    )
  return batch_size // process_count


def _check_batchable(ds, pp):
  """Checks that preprocessed examples stack to arrays that JAX takes."""
  for key, spec in ds.element_spec.items():
    for leaf in tf.nest.flatten(spec):
      if not isinstance(leaf, tf.TensorSpec):
        wrong = f"is no tensor but {leaf}"
      elif leaf.dtype == tf.string:
        wrong = "is a string"
      elif not leaf.shape.is_fully_defined():
        wrong = f"has the shape {leaf.shape}, which may vary"
      else:
        continue
      raise ValueError(
        f"feature {key!r} cannot be batched: after the preprocessing string "
        f"{pp!r} it {wrong}. Decode and resize what the model needs, and name "
        'it in keep(...), for example keep("image", "label").'
      )


def make_train(
  data: Mapping[str, Any],
  *,
  pp: str,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  shuffle_buffer_size: int = 50_000,
  process_index: int = 0,
  process_count: int = 1,
) -> tf.data.Dataset:
  """Makes this host's batches of the endless training stream.

  Batch k holds the positions from k * batch_size of the stream, on whatever
  epochs they fall; host p takes the p-th contiguous part of each batch. The
  batches are the same bits wherever the stream is entered, and for any number
  of hosts once their parts are concatenated.

  Args:
    data: a data description.
    pp: the preprocessing string. The seed of an example is a function of
      `seed`, its epoch and its position there.
    batch_size: size of the global batch.
    seed: of the order and of the preprocessing, up to 64 bits.
    start_step: number of the first batch. What comes before it in the epoch is
      read, but neither decoded nor preprocessed; earlier epochs cost nothing.
    shuffle_buffer_size: size of the window of undecoded records (of a folder:
      of paths) that an epoch is shuffled through, in memory on every host.
    process_index: this host.
    process_count: number of hosts, which divides `batch_size`.

  Returns:
    An endless dataset of dictionaries of tensors
    [batch_size / process_count, ...].

  Raises:
    ValueError: if the data are not there, broken or empty, if the sizes do not
      fit, or if the preprocessed examples cannot be batched.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  preprocess = get_preprocess_fn(pp)
  records, total, load = _records(data)
  seed = tf.constant(_seed(seed))
  start_epoch, start_position = divmod(start_step * batch_size, total)

  def epoch_records(epoch):
    # Dataset.shuffle mixes the seed of tf.random.set_seed into its own. Here,
    # this sets that of the epoch's graph, and so detaches it from the global.
    tf.compat.v1.set_random_seed(1)
    order_seed = tf.random.stateless_uniform(
      [], _fold_in(seed, tf.cast(epoch, tf.int32)), None, None, tf.int64
    )
    shuffled = records.shuffle(
      min(shuffle_buffer_size, total), order_seed, False
    )
    return shuffled.enumerate().map(
      lambda position, record: (epoch, position, record)
    )

  def is_local(epoch, position, record):
    del record
    in_batch = (epoch * total + position) % batch_size
    return in_batch // local_size == process_index

  # AutoGraph would bury the errors of the ops in its own.
  @tf.autograph.experimental.do_not_convert
  def one(epoch, position, record):
    epoch_seed = _fold_in(seed, tf.cast(epoch, tf.int32))
    example_seed = _fold_in(epoch_seed, tf.cast(position, tf.int32))
    return preprocess(load(record), example_seed)

  epochs = tf.data.Dataset.range(start_epoch, np.iinfo(np.int64).max)
  stream = epochs.flat_map(epoch_records).skip(start_position)
  ds = stream.filter(is_local).map(one, _AUTOTUNE, deterministic=True)
  _check_batchable(ds, pp)
  return ds.batch(local_size, drop_remainder=True).prefetch(_AUTOTUNE)


def make_eval(
  data: Mapping[str, Any],
  *,
  pp: str,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> tuple[tf.data.Dataset, int]:
  """Makes this host's batches of one pass over a split, in its order.

  Over all hosts, every example comes once. Every host has the same number of
  batches of the same shape: what lacks is zeros, also in `_mask`.

  Args:
    data: a data description.
    pp: the preprocessing string. The seed of an example is its position.
    batch_size: size of the global batch; host p takes the p-th contiguous
      part.
    process_index: this host.
    process_count: number of hosts, which divides `batch_size`.

  Returns:
    A dataset of dictionaries of tensors [batch_size / process_count, ...],
    among them `_mask`, float32, 1 for examples and 0 for padding; and the
    number of batches.

  Raises:
    ValueError: as for `make_train`.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  preprocess = get_preprocess_fn(pp)
  records, total, load = _records(data)
  num_batches = -(-total // batch_size)

  def is_local(position, record):
    del record
    return position % batch_size // local_size == process_index

  @tf.autograph.experimental.do_not_convert
  def one(position, record):
    seed = _fold_in(_seed(0), tf.cast(position, tf.int32))
    example = preprocess(load(record), seed)
    return {**example, "_mask": tf.ones([], tf.float32)}

  ds = records.enumerate().filter(is_local)
  ds = ds.map(one, _AUTOTUNE, deterministic=True)
  _check_batchable(ds, pp)
  zeros = tf.nest.map_structure(
    lambda spec: tf.zeros(spec.shape, spec.dtype), ds.element_spec
  )
  # At most one batch of a host is part real, and none before it is.
  padding = tf.data.Dataset.from_tensors(zeros).repeat(local_size)
  ds = ds.concatenate(padding).batch(local_size, drop_remainder=True)
  ds = ds.take(num_batches)
  ds = ds.apply(tf.data.experimental.assert_cardinality(num_batches))
  return ds.prefetch(_AUTOTUNE), num_batches


def numpy_iterator(
  ds: tf.data.Dataset, data: Mapping[str, Any]
) -> Iterator[dict[str, np.ndarray]]:
  """Iterates over batches as read-only NumPy views of TensorFlow's memory.

  Args:
    ds: what `make_train` or `make_eval` returned.
    data: the data description that it was made from.

  Yields:
    Dictionaries of arrays.

  Raises:
    ValueError: if images of a folder turn out to be broken. All files of the
      split are decoded then, to name those that are.
  """
  data = datasets.check(data)
  # By a local name: an iterator that is open when the interpreter ends is
  # closed when `tf` is gone.
  invalid_argument = tf.errors.InvalidArgumentError
  try:
    yield from ds.as_numpy_iterator()
  except invalid_argument as e:
    if "folder" not in data:
      raise
    _LOG.info("data.folder=%r: looking for broken images", data["folder"])
    examples = datasets.folder_examples(datasets.get_builder(data), data)
    paths = tuple(path for path, _ in examples)
    broken = datasets.find_broken(paths, full=True)
    if not broken:  # Then an op of the preprocessing failed.
      raise
    raise datasets.broken_error(data, broken, len(paths)) from e
