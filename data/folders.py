"""What the builders of people's own folders share."""

import hashlib
import os
import re
from collections.abc import Iterable
from typing import Any

from etils import epath


def whole_path(folder: str) -> str:
  """The same for all names of a folder that lead there without a link."""
  if "://" in folder:
    return folder
  return os.path.abspath(os.path.expanduser(folder))


def stat(path: epath.Path) -> tuple[int, int]:
  """Size and time of a file, as precisely as known; zeros if there is none."""
  try:
    if "://" in os.fspath(path):
      found = path.stat()
      return found.length, found.mtime
    found = os.stat(path)  # It knows more than the first.
  except (FileNotFoundError, NotADirectoryError):
    return 0, 0
  return found.st_size, found.st_mtime_ns


def config_name(root: str, listing: Iterable[Any]) -> str:
  """A name for what is built of a folder: another where its files are others.

  Args:
    root: of `whole_path`.
    listing: what there is to know of the files, in an order of theirs.
  """
  content = repr([root, *listing])
  fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
  stem = re.sub("[^0-9A-Za-z]+", "_", os.path.basename(root.rstrip("/")))
  return f"{stem.lower()}_{fingerprint}"


def check_splits(folder: str, splits: Iterable[str]) -> None:
  """Raises ValueError for a split that TFDS could not name."""
  for split in splits:
    if not re.fullmatch(r"\w+", split, re.ASCII) or split == "all":
      raise ValueError(
        f"{folder}/{split} cannot be a split; wanted a name of letters, digits "
        "and underscores, and not 'all'"
      )
