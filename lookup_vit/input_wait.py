"""The time for which the devices have nothing to do for want of data."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax


class InputWait:
  """Adds up the time for which the devices waited for batches.

  Updates are computed while the program fetches the next batch, so that what
  the program waits is not what the devices wait: theirs begins when the last
  update that was dispatched has finished. A thread notes when that is.

  Attributes:
    seconds: waited so far.
  """

  def __init__(self):
    self.seconds = 0.0
    self._dispatched = 0
    self._finished = (0, 0.0)  # how many updates, and when the last
    self._outputs = queue.SimpleQueue()
    threading.Thread(target=self._watch, daemon=True).start()

  def _watch(self):
    count = 0
    while (output := self._outputs.get()) is not None:
      # An error of the device is for the program to meet.
      with contextlib.suppress(Exception):
        jax.block_until_ready(output)
      count += 1
      self._finished = count, time.monotonic()

  def dispatched(self, output: Any) -> None:
    """Notes an update by one of its outputs."""
    self._dispatched += 1
    self._outputs.put(output)

  @contextlib.contextmanager
  def fetching(self) -> Iterator[None]:
    """Surrounds what fetches a batch."""
    start = time.monotonic()
    yield
    end = time.monotonic()
    count, finished = self._finished
    if count == self._dispatched:
      self.seconds += max(0.0, end - max(start, finished))

  def close(self) -> None:
    """Ends the thread."""
    self._outputs.put(None)
