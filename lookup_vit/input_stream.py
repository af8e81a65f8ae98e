"""The endless stream of training examples, entered anywhere.

Epoch 0, epoch 1, and so on, each of them every example once, in an order drawn
from the seed and the epoch (`order.py`). To enter it, and to read a host's
share of it, nothing is read but what the host needs, up to a window of
shuffling.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lookup_vit import quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf

from lookup_vit import records
from lookup_vit.order import Order, fold, index_at

_AUTOTUNE = tf.data.AUTOTUNE
# Lanes whose files are opened and first read at the same time.
_PARALLEL_LANES = 16


@dataclasses.dataclass(frozen=True)
class Part:
  """A host's slots of the batches of one data set, and how to fill them."""

  records: records.Records
  preprocess: Callable
  seed: Any
  batch_size: int
  slots: tuple[int, int]
  window: int

  @property
  def width(self) -> int:
    """Examples in a batch."""
    return self.slots[1] - self.slots[0]

  def stream(self, start_step: int) -> tf.data.Dataset:
    """Makes an endless dataset of (epoch, index, record)."""
    if self.records.shards is None:
      return self._stream_in_random_access(start_step)
    return self._stream_in_lanes(start_step)

  def one(
    self, epoch: tf.Tensor, index: tf.Tensor, record: Any
  ) -> dict[str, Any]:
    """Makes an example. Its seed is a function of its epoch and index."""
    return self.preprocess(
      self.records.load(record), fold(self.seed, 1, epoch, index)
    )

  def shards_at(self, step: int) -> set[int]:
    """Returns the shards that the batch of a step, and the next, come from."""
    if self.records.shards is None:
      return set()
    order, shards = self._order(), set()
    position = step * self.batch_size
    for lane in range(*order.lanes_of(*self.slots)):
      epoch = position // order.size
      begin, end = order.lane_range(lane, epoch)
      done = order.count(lane, position) - order.count(lane, epoch * order.size)
      begin += done // order.lane_window * order.lane_window
      after = order.lane_range(lane, epoch + 1)[0]
      for where in (
        (epoch, begin, min(end, begin + 3 * order.lane_window)),
        (epoch + 1, after, after + order.lane_window),
      ):
        where = [tf.constant(number, tf.int64) for number in where]
        shards.update(order.segments(*where)[0].numpy().tolist())
    return shards

  def _order(self):
    return Order(
      tuple(self.records.shards.sizes.tolist()),
      self.batch_size,
      self.window,
      fold(self.seed, 0),
    )

  def _stream_in_random_access(self, start_step):
    size, (first, _) = self.records.size, self.slots
    seed = fold(self.seed, 0)

    def place(number):
      step, slot = number // self.width, number % self.width
      position = step * self.batch_size + first + slot
      return index_at(size, seed, position)

    def read(epoch, index):
      return epoch, index, self.records.read(index)

    numbers = _range_from(start_step * self.width)
    batches = numbers.map(place).batch(self.width)
    return batches.map(read, _AUTOTUNE, deterministic=True).unbatch()

  def _stream_in_lanes(self, start_step):
    shards, (first, last) = self.records.shards, self.slots
    order = self._order()
    window = order.lane_window
    start = start_step * self.batch_size
    slots = tf.constant([first, last], tf.int64)

    def windows(lane, epoch):
      begin, end = order.lane_range(lane, epoch)
      # What came before `start`: something in its epoch, nothing later.
      done = order.count(lane, start) - order.count(lane, epoch * order.size)
      done = tf.clip_by_value(done, 0, end - begin)
      entry = done // window

      def mix(number, examples):
        index, record = examples
        mixed = order.mix(epoch, lane, number, tf.size(index))
        mixed = mixed[tf.where(number == entry, done - entry * window, 0) :]
        return epoch, mixed, index, record

      parts = order.segments(epoch, begin + entry * window, end)
      return shards.read(*parts).batch(window).enumerate(entry).map(mix)

    def unroll(epoch, mixed, index, record):
      # So that a record is copied once.
      return tf.data.Dataset.from_tensor_slices(mixed).map(
        lambda i: (epoch, index[i], record[i])
      )

    def steps(lane):
      """Makes a lane's examples in this host's slots, step by step."""
      low, high = order.slots(lane)
      epochs = _range_from(start // order.size)
      lane_windows = epochs.flat_map(lambda epoch: windows(lane, epoch))
      examples = lane_windows.prefetch(1).flat_map(unroll)
      begin, end = tf.unstack(tf.clip_by_value(slots, low, high) - low)
      return examples.batch(high - low).map(
        lambda *columns: tuple(column[begin:end] for column in columns)
      )

    lanes = order.lanes_of(first, last)
    count = lanes[1] - lanes[0]
    return (
      tf.data.Dataset.range(*lanes)
      .interleave(
        steps,
        cycle_length=count,
        block_length=1,
        num_parallel_calls=min(count, _PARALLEL_LANES),
        deterministic=True,
      )
      .unbatch()
    )


def _range_from(start) -> tf.data.Dataset:
  return tf.data.Dataset.range(start, np.iinfo(np.int64).max)
