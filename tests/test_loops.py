"""Tests of lookup_vit/loops.py."""

import itertools
import logging
import threading

import pytest

from lookup_vit import loops


def test_in_threads_keeps_the_order_and_works_ahead():
  both = threading.Barrier(2, timeout=60)

  def work(i):
    if i < 2:  # Neither ends before the other has begun.
      both.wait()
    return i * i

  assert list(loops.in_threads(work, range(50))) == [i * i for i in range(50)]


def test_in_threads_takes_no_more_than_it_needs():
  taken = []
  items = (taken.append(i) or i for i in itertools.count())
  results = loops.in_threads(lambda i: i, items)
  assert [next(results) for _ in range(3)] == [0, 1, 2]
  count = len(taken)
  assert next(results) == 3 and len(taken) == count + 1
  results.close()


def test_in_threads_raises_what_the_function_raises():
  def work(i):
    if i == 3:
      raise ValueError("three")
    return i

  results = loops.in_threads(work, range(9))
  assert [next(results) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(ValueError, match="three"):
    next(results)


@pytest.fixture
def clock(monkeypatch):
  """The time, which a test sets."""
  now = [100.0]
  monkeypatch.setattr(loops.time, "monotonic", lambda: now[0])
  return now


def test_progress(clock, caplog):
  caplog.set_level(logging.INFO, "lookup_vit")
  found = []
  for i in loops.progress(range(10), 10, "name", "file", every=5):
    found.append(i)
    clock[0] += 2
  assert found == list(range(10))
  assert [
    r.getMessage() for r in caplog.records if "name" in r.msg % r.args
  ] == [
    "name: file 3/10  0.5/s  ETA 0:00:14",
    "name: file 6/10  0.5/s  ETA 0:00:08",
    "name: file 9/10  0.5/s  ETA 0:00:02",
  ]
