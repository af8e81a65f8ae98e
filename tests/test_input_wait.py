"""Tests of lookup_vit/input_wait.py, with a device and a clock of its own."""

import threading
import time
import types

import jax
import pytest

from lookup_vit import input_wait


class Played:
  """An InputWait for updates that end, and a clock that goes, when told to."""

  def __init__(self):
    self.now = 100.0
    self.wait = None

  def start(self):
    """Dispatches an update; its event says that it is computed."""
    computed = threading.Event()
    self.wait.dispatched(computed)
    return computed

  def finish(self, computed):
    count = self.wait._finished[0]
    computed.set()
    while self.wait._finished[0] == count:
      time.sleep(0.001)

  def fetch(self, *actions):
    """Fetches a batch meanwhile; seconds go by, and updates end, in order."""
    before = self.wait.seconds
    with self.wait.fetching():
      for action in actions:
        if isinstance(action, threading.Event):
          self.finish(action)
        else:
          self.now += action
    return self.wait.seconds - before


@pytest.fixture
def played(monkeypatch):
  played = Played()
  clock = types.SimpleNamespace(monotonic=lambda: played.now)
  monkeypatch.setattr(input_wait, "time", clock)
  monkeypatch.setattr(jax, "block_until_ready", threading.Event.wait)
  played.wait = input_wait.InputWait()
  yield played
  played.wait.close()


def test_first_batch_is_waited_for(played):
  assert played.fetch(5) == 5
  assert played.wait.seconds == 5


def test_nothing_is_waited_for_while_updates_are_computed(played):
  first, second = played.start(), played.start()
  assert played.fetch(3) == 0
  played.finish(first)
  assert played.fetch(3) == 0
  played.finish(second)
  played.now += 7  # Not fetching: this is not the input's fault.
  assert played.fetch(2) == 2


def test_waiting_begins_when_the_last_update_ends(played):
  first, second = played.start(), played.start()
  assert played.fetch(1, first, 2, second, 4) == 4
  third = played.start()
  assert played.fetch(8, third) == 0
  assert played.wait.seconds == 4


def test_failed_updates_end_too(played, monkeypatch):
  def fail(computed):
    computed.wait()
    raise RuntimeError("device lost")

  monkeypatch.setattr(jax, "block_until_ready", fail)
  computed = played.start()
  assert played.fetch(1, computed, 2) == 2
