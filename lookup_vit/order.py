"""Which example stands where in the training stream: arithmetic alone.

The stream of a data set of N examples is epoch 0, epoch 1, and so on: position
q is in epoch q // N, and step k has the positions from k * batch_size on. Slot
j of every batch belongs to one of a fixed number of lanes, and a lane reads its
part of an epoch in sequence: a range of the epoch's examples, whose shards are
put in another order in every epoch, mixed within windows. A host has a range of
slots and so reads only some of the lanes, and none of this depends on how many
hosts there are.

Arguments may be integers or int64 tensors.
"""

import dataclasses
from typing import Any

import numpy as np

from lookup_vit import quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf

# Up to so many lanes, each with a window and a file open on some host. Batches
# of more than eight examples for each of them have more lanes, for hosts to
# share evenly; fewer examples of a lane in a batch cost more time each.
_LANES = 128
_MAX_LANES = 512

Int = Any  # int or int64 scalar tensor

fold_in = tf.random.experimental.stateless_fold_in


def make_seed(seed: int) -> np.ndarray:
  """Returns an integer of up to 64 bits as the int32 [2] of stateless ops."""
  words = [seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]
  return np.array(words, np.uint32).view(np.int32)


def fold(seed: tf.Tensor, *data: Int) -> tf.Tensor:
  """Folds integers into a seed, one after the other."""
  for number in data:
    seed = fold_in(seed, tf.cast(number, tf.int32))
  return seed


def _below(slot: Int, position: Int, batch_size: int) -> Int:
  """Counts the positions before `position` that lie in slots before `slot`."""
  if isinstance(slot, int) and isinstance(position, int):
    return position // batch_size * slot + min(position % batch_size, slot)
  slot, position = (
    tf.convert_to_tensor(number, tf.int64) for number in (slot, position)
  )
  rest = tf.minimum(position % batch_size, slot)
  return position // batch_size * slot + rest


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of one data set's stream.

  Attributes:
    shard_sizes: examples of each shard.
    batch_size: of the global batch.
    window: examples that are mixed at a time, over all lanes.
    seed: int32 [2].
  """

  shard_sizes: tuple[int, ...]
  batch_size: int
  window: int
  seed: Any

  @property
  def size(self) -> int:
    """Number of examples."""
    return sum(self.shard_sizes)

  @property
  def lanes(self) -> int:
    """Number of lanes.

    One where a window holds the whole set, which then is mixed as a whole. No
    more than two for each shard, as a lane that begins within a shard has to
    skip what comes before.
    """
    if self.size <= self.window:
      return 1
    most = min(max(self.batch_size // 8, _LANES), _MAX_LANES)
    return min(self.batch_size, 2 * len(self.shard_sizes), most)

  @property
  def lane_window(self) -> int:
    """Examples that a lane mixes at a time."""
    return -(-min(self.window, self.size) // self.lanes)

  def slots(self, lane: Int) -> tuple[Int, Int]:
    """Returns the range of slots of a lane: first, and one past the last."""
    return (
      lane * self.batch_size // self.lanes,
      (lane + 1) * self.batch_size // self.lanes,
    )

  def lanes_of(self, first_slot: int, last_slot: int) -> tuple[int, int]:
    """Returns the range of lanes that have slots in [first_slot, last_slot)."""
    inside = [
      lane
      for lane in range(self.lanes)
      if self.slots(lane)[0] < last_slot and self.slots(lane)[1] > first_slot
    ]
    return inside[0], inside[-1] + 1

  def count(self, lane: Int, position: Int) -> Int:
    """Counts the examples that a lane gives before a position."""
    low, high = self.slots(lane)
    return _below(high, position, self.batch_size) - _below(
      low, position, self.batch_size
    )

  def lane_range(self, lane: Int, epoch: Int) -> tuple[Int, Int]:
    """Returns the range of an epoch's ordered examples that a lane reads.

    The ranges of all lanes are disjoint and cover the epoch: their lengths are
    the numbers of the epoch's positions in the lanes' slots.
    """
    begin, end = epoch * self.size, (epoch + 1) * self.size
    first, last = (
      _below(slot, end, self.batch_size) - _below(slot, begin, self.batch_size)
      for slot in self.slots(lane)
    )
    return first, last

  def segments(
    self, epoch: Int, first: Int, last: Int
  ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Resolves a range of an epoch's ordered examples to parts of shards.

    The epoch's order is its shards in random order, entered at a random place
    and read around.

    Returns:
      Shards, examples to skip in each of them, and to take, each int64 [n].
    """
    seed = fold(self.seed, epoch)
    shards = tf.random.experimental.stateless_shuffle(
      tf.range(len(self.shard_sizes), dtype=tf.int64), fold(seed, 0), "philox"
    )
    sizes = tf.gather(tf.constant(self.shard_sizes, tf.int64), shards)
    entry = tf.random.stateless_uniform(
      [], fold(seed, 1), 0, self.size, tf.int64, "philox"
    )
    ends = tf.cumsum(sizes)

    def part(first, last):
      before = tf.clip_by_value(first - ends + sizes, 0, sizes)
      until = tf.clip_by_value(last - ends + sizes, 0, sizes)
      some = until > before
      columns = (shards, before, until - before)
      return [tf.boolean_mask(column, some) for column in columns]

    first, last = first + entry, last + entry
    straight = part(first, last)
    around = part(
      tf.maximum(first - self.size, 0), tf.maximum(last - self.size, 0)
    )
    shard, skip, take = (
      tf.concat(columns, 0) for columns in zip(straight, around, strict=True)
    )
    return shard, skip, take

  def mix(self, epoch: Int, lane: Int, window: Int, size: Int) -> tf.Tensor:
    """Returns the order, int64 [size], of the examples of a lane's window."""
    return tf.random.experimental.stateless_shuffle(
      tf.range(size, dtype=tf.int64),
      fold(self.seed, epoch, 2, lane, window),
      "philox",
    )


def index_at(
  size: int, seed: tf.Tensor, position: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns epoch and example of a position of a stream in random access.

  Every epoch is a random permutation of all examples.

  Args:
    size: number of examples.
    seed: int32 [2].
    position: of the stream, an int64 scalar.
  """
  epoch = position // size
  index = tf.random.experimental.index_shuffle(
    position % size, fold(seed, epoch), tf.constant(size - 1, tf.int64)
  )
  return epoch, index


def mixture_slots(weights: list[float], batch_size: int) -> np.ndarray:
  """Shares the slots of a batch among data sets, spread evenly.

  Args:
    weights: of the data sets, > 0; they need not sum to one.
    batch_size: of the global batch.

  Returns:
    The data set of each slot, int64 [batch_size]. Data set i has
    `weights[i] / sum(weights) * batch_size` slots, rounded so that they add up
    (largest remainder).

  Raises:
    ValueError: a data set would have no slot.
  """
  shares = np.array(weights, np.float64) / np.sum(weights) * batch_size
  counts = np.floor(shares).astype(np.int64)
  rest = batch_size - counts.sum()
  counts[np.argsort(counts - shares, kind="stable")[:rest]] += 1
  if not counts.all():
    raise ValueError(
      f"weights {weights} give data set {int(np.argmin(counts))} none of the "
      f"{batch_size} examples of a batch"
    )
  owner = np.repeat(np.arange(len(counts)), counts)
  place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
  return owner[np.argsort(place, kind="stable")]
