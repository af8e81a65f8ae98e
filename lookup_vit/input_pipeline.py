"""From a data description to batches, as a function of the seed and the step.

Training batches are slices of one endless stream (`input_stream.py`). It does
not depend on where it was entered nor on how many hosts share it, so a run that
resumes, even on another number of hosts, sees what it would have seen.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lookup_vit import datasets, descriptions, quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf

from lookup_vit import input_stream, records
from lookup_vit.order import fold, make_seed, mixture_slots
from lookup_vit.preprocess import get_preprocess_fn

_LOG = logging.getLogger("lookup_vit")

_AUTOTUNE = tf.data.AUTOTUNE


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of NumPy arrays, as read-only views of TensorFlow's memory.

  Attributes:
    dataset: of dictionaries of tensors [batch, ...].
    explain: function that is called with the number of the batch, of this
      iteration, that could not be made; it raises ValueError if it finds which
      file or record is to blame.
  """

  dataset: tf.data.Dataset
  explain: Callable[[int], None]

  @property
  def element_spec(self) -> Any:
    """Shapes and dtypes of a batch."""
    return self.dataset.element_spec

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Iterates from the first batch.

    Raises:
      ValueError: if a file or a record is broken; it is named.
    """
    # By a local name: an iterator that is open when the interpreter ends is
    # closed when `tf` is gone.
    op_error = tf.errors.OpError
    iterator = self.dataset.as_numpy_iterator()
    count = 0
    while True:
      try:
        batch = next(iterator)
      except StopIteration:
        return
      except op_error:
        # Ends its threads, which must not be reading when the program ends.
        del iterator
        self.explain(count)
        raise
      yield batch
      count += 1


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
  shuffle_buffer_size: int = 10_000,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Makes this host's batches of the endless training stream.

  Batch k holds the positions from k * batch_size of the stream, on whatever
  epochs they fall; host p takes the p-th contiguous part of each batch. The
  batches are the same bits wherever the stream is entered, and for any number
  of hosts once their parts are concatenated.

  In a mixture every data set has a stream of its own, and a fixed number of
  slots in every batch: `weight / sum of weights * batch_size`, rounded.

  Args:
    data: a data description, also of a mixture.
    pp: the preprocessing string. The seed of an example is a function of
      `seed`, its epoch and its place in the split.
    batch_size: size of the global batch.
    seed: of the order and of the preprocessing, up to 64 bits.
    start_step: number of the first batch. What it costs to start there does
      not depend on it: at most a window is read and not used; of TFRecord files
      that are not local, also what each lane skips in its first shard.
    shuffle_buffer_size: size of the windows of undecoded records that an epoch
      is shuffled through, over all hosts, which have about two of them in
      memory. A folder of images, and ArrayRecord files, need none: their
      epochs are random permutations.
    process_index: this host.
    process_count: number of hosts, which divides `batch_size`.

  Returns:
    Endless batches of dictionaries of arrays
    [batch_size / process_count, ...].

  Raises:
    ValueError: if the data are not there, broken or empty, if the sizes do not
      fit, or if the preprocessed examples cannot be batched.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  first, last = process_index * local_size, (process_index + 1) * local_size
  sets = descriptions.mixture(data)
  owner = mixture_slots([weight for _, weight, _ in sets], batch_size)
  parts = {}
  streams = []
  for i, (description, _, own_pp) in enumerate(sets):
    own_pp = pp if own_pp is None else own_pp
    of_set = owner == i
    with descriptions.at_member(i, len(sets)):
      part = input_stream.Part(
        records=records.open_records(description),
        preprocess=get_preprocess_fn(own_pp),
        seed=fold(make_seed(seed), i),
        batch_size=int(of_set.sum()),
        slots=(int(of_set[:first].sum()), int(of_set[:last].sum())),
        window=shuffle_buffer_size,
      )
      if not part.width:
        continue
      # AutoGraph would bury the errors of the ops in its own.
      one = tf.autograph.experimental.do_not_convert(part.one)
      stream = part.stream(start_step).map(one, _AUTOTUNE, deterministic=True)
      _check_batchable(stream, own_pp)
      if streams and stream.element_spec != streams[0].element_spec:
        raise ValueError(
          f"examples are {stream.element_spec}, those of another data set of "
          f"the mixture {streams[0].element_spec}: let `pp` make them alike"
        )
    parts[i] = part
    streams.append(stream)
  [ds, *others] = streams
  if others:
    turns = np.searchsorted(list(parts), owner[first:last])
    ds = tf.data.Dataset.choose_from_datasets(
      streams,
      tf.data.Dataset.from_tensor_slices(turns.astype(np.int64)).repeat(),
    )

  def explain(number):
    for part in parts.values():
      some = part.stream(start_step + number).take(part.width)
      likely = part.shards_at(start_step + number)
      _explain(part.records, some, part.one, likely)

  ds = ds.batch(local_size, drop_remainder=True).prefetch(_AUTOTUNE)
  return Batches(ds, explain)


def _explain(source, examples, one, likely=()):
  """Finds out why a batch of (..., index, record) failed; raises ValueError.

  Args:
    source: the records.
    examples: those of the batch.
    one: makes an example of a batch.
    likely: shards that are damaged rather than others.
  """
  _LOG.info("%s: looking for the fault", descriptions.source(source.data))
  iterator = iter(examples)
  while True:
    try:
      example = next(iterator)
    except StopIteration:
      return
    except tf.errors.OpError:
      records.check_for_damage(source, likely)
      return
    with records.at_fault(source, int(example[-2])):
      one(*example)


def make_eval(
  data: Mapping[str, Any],
  *,
  pp: str,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> tuple[Batches, int]:
  """Makes this host's batches of one pass over a split.

  Over all hosts, every example comes once: host p has the p-th part of the
  split, in its order. Every host has the same number of batches of the same
  shape: what lacks is zeros, also in `_mask`.

  Args:
    data: a data description.
    pp: the preprocessing string. The seed of an example is its position.
    batch_size: size of the global batch.
    process_index: this host.
    process_count: number of hosts, which divides `batch_size`.

  Returns:
    Batches, dictionaries of arrays [batch_size / process_count, ...], among
    them `_mask`, float32, 1 for examples and 0 for padding; and their number.

  Raises:
    ValueError: as for `make_train`.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  preprocess = get_preprocess_fn(pp)
  source = records.open_records(descriptions.check(data))
  num_batches = -(-source.size // batch_size)
  first, last = (
    p * source.size // process_count for p in (process_index, process_index + 1)
  )

  @tf.autograph.experimental.do_not_convert
  def one(index, record):
    example = preprocess(source.load(record), fold(make_seed(0), index))
    return {**example, "_mask": tf.ones([], tf.float32)}

  def examples(first):
    return source.in_sequence(first, last)

  ds = examples(first).map(one, _AUTOTUNE, deterministic=True)
  _check_batchable(ds, pp)
  zeros = tf.nest.map_structure(
    lambda spec: tf.zeros(spec.shape, spec.dtype), ds.element_spec
  )
  # At most one batch of a host is part real, and none before it is.
  padding = tf.data.Dataset.from_tensors(zeros).repeat(local_size)
  ds = ds.concatenate(padding).batch(local_size, drop_remainder=True)
  ds = ds.take(num_batches)
  ds = ds.apply(tf.data.experimental.assert_cardinality(num_batches))

  def explain(number):
    some = examples(first + number * local_size).take(local_size)
    _explain(source, some, one)

  return Batches(ds.prefetch(_AUTOTUNE), explain), num_batches


def eval_places(
  size: int, batch_size: int, number: int, process_count: int = 1
) -> np.ndarray:
  """Which example of a split each one of a global batch of `make_eval` is.

  Args:
    size: of the split.
    batch_size: size of the global batch.
    number: of the batch.
    process_count: number of hosts.

  Returns:
    int64 `[batch_size]`, the hosts' parts one after another; -1 for padding.
  """
  bounds = np.arange(process_count + 1) * size // process_count
  local = np.arange(batch_size // process_count)
  places = bounds[:-1, None] + number * len(local) + local
  return np.where(places < bounds[1:, None], places, -1).reshape(-1)


def examples(data: Mapping[str, Any], *, pp: str) -> Iterator[dict[str, Any]]:
  """Examples of a split one by one, in its order, with features of any kind.

  Args:
    data: a data description.
    pp: the preprocessing string. The seed of an example is its position.

  Yields:
    Dictionaries of NumPy arrays and bytes.

  Raises:
    ValueError: as for `make_eval`.
  """
  preprocess = get_preprocess_fn(pp)
  source = records.open_records(descriptions.check(data))

  @tf.autograph.experimental.do_not_convert
  def one(index, record):
    # With its place: to TensorFlow, features alone might be none at all.
    return index, preprocess(source.load(record), fold(make_seed(0), index))

  sequence = source.in_sequence(0, source.size)

  def explain(number):
    _explain(source, sequence.skip(number).take(1), one)

  ds = sequence.map(one, _AUTOTUNE, deterministic=True).prefetch(_AUTOTUNE)
  for _, example in Batches(ds, explain):
    yield example


def texts(example: Mapping[str, Any], key: str) -> list[str]:
  """The texts that one of `examples` has in a feature: one, or several.

  Raises:
    ValueError: there is no such feature, or it is no text.
  """
  if key not in example:
    raise ValueError(f"The data have no feature {key!r}.")
  found = np.asarray(example[key], object).reshape(-1).tolist()
  if not all(isinstance(text, bytes) for text in found):
    raise ValueError(f"The feature {key!r} is no text.")
  return [text.decode(errors="replace") for text in found]
