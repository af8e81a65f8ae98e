"""What is wrong with files: images that do not decode, records that are cut.

It works on paths alone; who asks makes the error of what is found.
"""

import functools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

from lookup_vit import quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf

from lookup_vit.preprocess import get_preprocess_fn

_LOG = logging.getLogger("lookup_vit")

# Errors that every host will see alike; others, such as a storage that is not
# available for a moment, must not decide which images a split has.
_BROKEN = (
  tf.errors.FailedPreconditionError,
  tf.errors.InvalidArgumentError,
  tf.errors.NotFoundError,
  tf.errors.PermissionDeniedError,
)


def reason(error: tf.errors.OpError) -> str:
  """Returns the message of an op without the names of nodes around it."""
  message = error.message.splitlines()[0]
  return message.rpartition("}} ")[2].partition(" [Op:")[0]


def listing(wrong: dict[str, str]) -> str:
  """Returns lines for a message: the first ten files, and what is wrong."""
  names = "".join(f"\n  {path}: {wrong[path]}" for path in list(wrong)[:10])
  return names + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")


def with_progress(
  results: Iterable[Any], total: int, what: str
) -> Iterator[Any]:
  """Passes results on, with a line of progress every few seconds.

  Args:
    results: what to pass on.
    total: how many they are.
    what: what they are, for the line.

  Yields:
    The results.
  """
  start = last = time.monotonic()
  for done, result in enumerate(results, 1):
    yield result
    now = time.monotonic()
    if now - last > 5:
      last = now
      eta = (now - start) / done * (total - done)
      _LOG.info("checked %d of %d %s, ETA %.0f s", done, total, what, eta)


@functools.lru_cache(maxsize=8)
def find_broken(paths: tuple[str, ...]) -> dict[str, str]:
  """Finds images that cannot be decoded, from their heads and tails.

  This finds truncated and foreign files, but not damage in the middle.

  Args:
    paths: files.

  Returns:
    What is wrong with each broken file, by its path, in the order of `paths`.
  """

  def check(group):
    return [(path, error) for path in group if (error := _image_error(path))]

  # Groups, as a task for the pool costs more than the check of a file. Threads,
  # for storage that answers slowly.
  groups = [paths[i : i + 64] for i in range(0, len(paths), 64)]
  broken = {}
  with futures.ThreadPoolExecutor(16) as pool:
    errors = pool.map(check, groups)
    for group in with_progress(errors, len(groups), "groups of 64 images"):
      broken.update(group)
  return broken


def _image_error(path: str) -> str | None:
  """Says what is wrong with an image, from its head and tail if these do."""
  try:
    with tf.io.gfile.GFile(path, "rb") as file:
      size = file.size()
      head = file.read(8)
      file.seek(max(size - 12, 0))
      tail = file.read(12)
  except _BROKEN as e:
    return reason(e)
  if size == 0:
    return "the file is empty"
  if head.startswith(b"\xff\xd8") and tail.endswith(b"\xff\xd9"):
    return None
  if head == b"\x89PNG\r\n\x1a\n" and tail[4:8] == b"IEND":
    return None
  # Bytes after the end of an image are common, and decoders ignore them.
  return read_image(path)[1]


def read_image(path: str) -> tuple[bytes, str | None]:
  """Reads an image, and decodes it as training would.

  Returns:
    The content of the file, and what is wrong with it, if anything is.
  """
  content = tf.constant(b"")
  try:
    content = tf.io.read_file(path)
    seed = tf.zeros(2, tf.int32)
    get_preprocess_fn("decode")({"image": content}, seed)
  except _BROKEN as e:
    return content.numpy(), reason(e)
  return content.numpy(), None


def find_damaged(files: Sequence[tuple[str, int]]) -> dict[str, str]:
  """Reads TFRecord files from end to end.

  Args:
    files: paths, and the number of records that each should have.

  Returns:
    What is wrong with each damaged file, by its path.
  """
  if not files:
    return {}
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    errors = pool.map(_records_error, *zip(*files, strict=True))
    errors = with_progress(errors, len(files), "files")
    found = zip([path for path, _ in files], errors, strict=True)
    return {path: error for path, error in found if error}


def _records_error(path: str, size: int) -> str | None:
  """Says what is wrong with a TFRecord file of `size` records."""
  count = 0
  try:
    for _ in tf.data.TFRecordDataset(path, buffer_size=1 << 20):
      count += 1
  except tf.errors.DataLossError as e:
    return f"{reason(e)}, after {count} of {size} records"
  except _BROKEN as e:
    return reason(e)
  return None if count == size else f"{count} records, wanted {size}"
