"""Tests of lookup_vit/order.py against brute force."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from lookup_vit.order import Order, index_at, make_seed, mixture_slots

ORDERS = [
  # Shard sizes, batch size, window.
  ((37,), 8, 5),
  ((37,), 8, 37),
  ((5, 3, 9, 1, 7), 12, 4),
  ((11, 11, 10, 11), 50, 3),
  ((2, 2, 3), 5, 1),
  (tuple(range(1, 40)), 64, 100),
]


def int64(*numbers):
  return [tf.constant(number, tf.int64) for number in numbers]


@pytest.mark.parametrize("sizes, batch_size, window", ORDERS)
def test_lanes_share_the_slots(sizes, batch_size, window):
  order = Order(sizes, batch_size, window, make_seed(0))
  slots = [list(range(*order.slots(lane))) for lane in range(order.lanes)]
  assert sum(slots, []) == list(range(batch_size))
  assert max(map(len, slots)) - min(map(len, slots)) <= 1
  assert order.lanes <= 2 * len(sizes)
  if window >= order.size:
    assert order.lanes == 1 and order.lane_window == order.size
  for first, last in itertools.combinations(range(batch_size + 1), 2):
    want = [i for i, s in enumerate(slots) if set(s) & set(range(first, last))]
    assert list(range(*order.lanes_of(first, last))) == want


@pytest.mark.parametrize(
  "batch_size, lanes", [(100, 100), (1024, 128), (3072, 384), (8192, 512)]
)
def test_lanes_of_large_batches(batch_size, lanes):
  order = Order((1251,) * 1024, batch_size, 10_000, make_seed(0))
  assert order.lanes == lanes


@pytest.mark.parametrize("hosts", [1, 3, 12, 16, 48, 96, 128])
def test_hosts_share_the_lanes_of_a_large_batch(hosts):
  order = Order((1251,) * 1024, 3072, 10_000, make_seed(0))
  share = 3072 // hosts
  of_hosts = [
    range(*order.lanes_of(host * share, (host + 1) * share))
    for host in range(hosts)
  ]
  assert list(itertools.chain(*of_hosts)) == list(range(order.lanes))


@pytest.mark.parametrize("sizes, batch_size, window", ORDERS)
def test_counts_are_those_of_the_positions(sizes, batch_size, window):
  order = Order(sizes, batch_size, window, make_seed(0))
  end = 3 * order.size
  for lane in range(order.lanes):
    low, high = order.slots(lane)
    mine = [low <= q % batch_size < high for q in range(end)]
    for position in (0, 1, 7, order.size, end):
      assert order.count(lane, position) == sum(mine[:position])
      got = order.count(*int64(lane, position))
      assert int(got) == sum(mine[:position])
    for epoch in range(3):
      first, last = order.lane_range(lane, epoch)
      want = sum(mine[epoch * order.size : (epoch + 1) * order.size])
      assert last - first == want


@pytest.mark.parametrize("sizes, batch_size, window", ORDERS)
def test_ranges_of_an_epoch_have_every_example_once(sizes, batch_size, window):
  order = Order(sizes, batch_size, window, make_seed(0))
  everything = [(s, i) for s, size in enumerate(sizes) for i in range(size)]
  orders = set()
  for epoch in range(3):
    read = []
    for lane in range(order.lanes):
      parts = order.segments(*int64(epoch, *order.lane_range(lane, epoch)))
      for shard, skip, take in np.stack(parts, 1):
        read += [(int(shard), int(skip + i)) for i in range(take)]
    assert sorted(read) == everything
    orders.add(tuple(read))
  assert len(orders) == 3


def test_segments_of_a_part_are_that_part_of_the_whole():
  order = Order((5, 3, 9, 1, 7), 12, 4, make_seed(1))

  def read(first, last):
    parts = np.stack(order.segments(*int64(2, first, last)), 1)
    return [(s, k + i) for s, k, t in parts.tolist() for i in range(t)]

  whole = read(0, 25)
  for first, last in itertools.combinations(range(26), 2):
    assert read(first, last) == whole[first:last]
  assert read(4, 4) == []


def test_shards_are_in_any_order():
  order = Order((1, 1, 1), 1, 1, make_seed(5))
  seen = [
    tuple(order.segments(*int64(epoch, 0, 3))[0].numpy())
    for epoch in range(200)
  ]
  counts = [seen.count(p) for p in itertools.permutations(range(3))]
  assert sum(counts) == 200 and min(counts) > 15  # 33 are expected.


def test_windows_are_mixed_each_in_its_own_way():
  order = Order((100,), 4, 10, make_seed(0))
  mixed = {
    tuple(order.mix(*int64(epoch, lane, window), 9).numpy())
    for epoch, lane, window in itertools.product(range(3), range(2), range(3))
  }
  assert len(mixed) == 18
  assert all(sorted(m) == list(range(9)) for m in mixed)


def test_late_positions():
  # 300 epochs of ImageNet-21k in batches of 4096, and ten times as far.
  order = Order((7000,) * 2000, 4096, 16_384, make_seed(0))
  for position in (4_200_000_001, 42_000_000_003):
    counts = [order.count(lane, position) for lane in range(order.lanes)]
    assert sum(counts) == position
    tensors = [order.count(*int64(lane, position)) for lane in (0, 127)]
    assert [int(t) for t in tensors] == [counts[0], counts[127]]


@pytest.mark.parametrize("size", [1, 2, 3, 37, 64])
def test_random_access_has_every_example_once(size):
  seed = make_seed(3)
  epochs = []
  for epoch in range(3):
    positions = range(epoch * size, (epoch + 1) * size)
    pairs = [index_at(size, seed, *int64(q)) for q in positions]
    assert {int(e) for e, _ in pairs} == {epoch}
    epochs.append([int(i) for _, i in pairs])
    assert sorted(epochs[-1]) == list(range(size))
  if size > 3:
    assert len(set(map(tuple, epochs))) == 3


def test_seeds_of_up_to_64_bits():
  seeds = [0, 1, 2**31, 2**32, 2**40 + 3, 2**63 - 1]
  assert len({tuple(make_seed(seed)) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize(
  "weights, batch_size, counts",
  [
    ([1.0], 7, [7]),
    ([1, 1], 8, [4, 4]),
    ([3, 1], 7, [5, 2]),
    ([0.9, 0.1], 64, [58, 6]),
    ([0.5, 0.3, 0.2], 11, [6, 3, 2]),
  ],
)
def test_mixture_slots(weights, batch_size, counts):
  owner = mixture_slots(weights, batch_size)
  assert [int((owner == i).sum()) for i in range(len(weights))] == counts
  # Any run of slots has about its share of every set.
  for first, last in itertools.combinations(range(batch_size + 1), 2):
    for i, count in enumerate(counts):
      share = count * (last - first) / batch_size
      assert abs((owner[first:last] == i).sum() - share) <= 2


def test_mixture_with_a_set_that_gets_nothing():
  with pytest.raises(ValueError, match="data set 1 none of the 8"):
    mixture_slots([100, 1], 8)
