"""Going through many things: in threads, and telling how far it is."""

import collections
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

log = logging.getLogger("lookup_vit")


def in_threads(
  function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
  """Yields `function(item)` in order, some items ahead, never all of them.

  For work that threads can share: in processes of ffmpeg, or in TensorFlow.
  """
  workers = os.cpu_count() or 1
  with futures.ThreadPoolExecutor(workers) as pool:
    pending = collections.deque()
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) > 2 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


def progress(
  parts: Iterable[Any],
  count: int,
  name: str,
  what: str = "batch",
  every: float = 20.0,
) -> Iterator[Any]:
  """The parts; says now and then how many there were, and what is left.

  Args:
    parts: what to pass on.
    count: how many they are.
    name: of what goes through them.
    what: a part is.
    every: so many seconds it is said.
  """
  start = said = time.monotonic()
  for done, part in enumerate(parts):
    now = time.monotonic()
    if done and now - said > every:
      said = now
      rate = done / (now - start)
      log.info(
        "%s: %s %d/%d  %.3g/s  ETA %s",
        *(name, what, done, count, rate),
        datetime.timedelta(seconds=round((count - done) / rate)),
      )
    yield part
