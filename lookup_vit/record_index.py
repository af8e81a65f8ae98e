r"""Where the records of TFRecord files begin.

    python -m lookup_vit.record_index --config=configs/in1k_lookup_b.py

reads the data of a config once, those of its evaluators too, and writes
`record_index-SPLIT.npz` beside their files. From a bucket, files are then
entered anywhere without reading what comes before. On a local disk that needs
no index.
"""

import contextlib
import io
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from lookup_vit import (  # noqa: F401
  damage,
  datasets,
  descriptions,
  quiet_tensorflow,
)

# isort: split
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

_LOG = logging.getLogger("lookup_vit")

# Every so many records one place is kept.
STRIDE = 16
# Bytes of a TFRecord beside its content: length, and two checksums.
FRAME = 16
COMMAND = "python -m lookup_vit.record_index --config=CONFIG"
AGAIN = f"delete it, or make it again by `{COMMAND}`"


def path_of(builder: tfds.core.DatasetBuilder, split: str) -> epath.Path:
  """Returns the path of the index of a split, which need not be there."""
  return epath.Path(builder.data_path) / f"record_index-{split}.npz"


def load(
  path: epath.Path, sizes: Mapping[str, int]
) -> dict[str, np.ndarray] | None:
  """Reads an index.

  Args:
    path: of the index.
    sizes: bytes of each file of the split, by its path.

  Returns:
    For each file the bytes before the records 0, STRIDE, 2 * STRIDE, ..., int64
    [n]. None if there is no index.

  Raises:
    ValueError: the index cannot be read, or is of other files.
  """
  if not path.exists():
    return None
  content = io.BytesIO(path.read_bytes())
  try:
    with np.load(content, allow_pickle=False) as index:
      names, found = index["names"].tolist(), index["sizes"].tolist()
      parts = np.split(index["offsets"], np.cumsum(index["counts"])[:-1])
      stride = int(index["stride"])
  except Exception as e:  # Damage makes NumPy and zlib raise many kinds.
    raise ValueError(f"{path} is no index of records; {AGAIN}") from e
  wanted = list(map(os.path.basename, sizes)), list(sizes.values())
  if (names, found) != wanted or stride != STRIDE:
    raise ValueError(f"{path} is of other files than those beside it; {AGAIN}")
  return dict(zip(sizes, parts, strict=True))


def wanted(data: Mapping[str, Any]) -> dict[epath.Path, list[tuple[str, int]]]:
  """Lists the indices that data can have, which need not be there.

  Args:
    data: a data description.

  Returns:
    Paths of indices, each with paths and numbers of records of its files. There
    are none for what is read in random access: folders and ArrayRecord files.

  Raises:
    ValueError: the data are not there.
  """
  data = descriptions.check(data)
  builder = datasets.get_builder(data)
  is_folder = descriptions.is_image_folder(data)
  if is_folder or builder.info.file_format != tfds.core.FileFormat.TFRECORD:
    return {}
  return {
    path_of(builder, split): files
    for split, files in datasets.files(builder, data).items()
  }


def make(path: epath.Path, files: Sequence[tuple[str, int]]) -> None:
  """Reads TFRecord files and writes their index.

  Args:
    path: of the index.
    files: paths and numbers of records.

  Raises:
    ValueError: a file is damaged, or has another number of records.
    OSError: the index cannot be written; this is found before files are read.
  """
  with _written_whole(path) as partial:
    _LOG.info("%s: reading %d files", path.name, len(files))
    with futures.ThreadPoolExecutor(os.cpu_count() * 4) as pool:
      found = pool.map(_read, *zip(*files, strict=True))
      found = list(damage.with_progress(found, len(files), "files"))
    sizes, offsets = zip(*found, strict=True)
    content = io.BytesIO()
    np.savez_compressed(
      content,
      names=np.array([os.path.basename(name) for name, _ in files]),
      sizes=np.array(sizes),
      counts=np.array([len(part) for part in offsets]),
      offsets=np.concatenate(offsets),
      stride=np.array(STRIDE),
    )
    partial.write_bytes(content.getvalue())
  _LOG.info("wrote %s", path)


@contextlib.contextmanager
def _written_whole(path) -> Iterator[epath.Path]:
  """Gives a path to write to, which then takes the place of `path`."""
  # Of its own, as others may make the same index now.
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  try:
    partial.write_bytes(b"partial")
    yield partial
    partial.replace(path)
  except tf.errors.OpError as e:
    raise OSError(f"{path} cannot be written: {damage.reason(e)}") from e
  finally:
    with contextlib.suppress(tf.errors.OpError, OSError):
      partial.unlink(missing_ok=True)


def _read(path: str, count: int) -> tuple[int, np.ndarray]:
  """Returns the bytes of a file of `count` records, and where some begin."""
  lengths = tf.data.TFRecordDataset(path, buffer_size=1 << 20)
  lengths = lengths.map(tf.strings.length).batch(4096)
  try:
    lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
  except tf.errors.OpError as e:
    raise ValueError(f"{path}: {damage.reason(e)}") from e
  if len(lengths) != count:
    raise ValueError(f"{path}: {len(lengths)} records, wanted {count}")
  places = np.cumsum(np.concatenate([[0], lengths + FRAME]), dtype=np.int64)
  return int(places[-1]), places[: max(count, 1) : STRIDE]


def main(argv):
  """Indexes the data of a config."""
  del argv
  cli.log_overrides()
  config = config_utils.resolve(FLAGS.config)
  described = [("config.input", config.input.data)]
  for name, fields in config.evals.items():
    if "data" in fields:
      described.append((f"config.evals.{name}", fields.data))
  indices = {}
  for where, data in described:
    with config_utils.at_fault(where):
      for member, _, _ in descriptions.mixture(data):
        of_member = wanted(member)
        if not of_member:
          _LOG.info("%s needs no index", descriptions.source(member))
        indices.update(of_member)
  for path, files in indices.items():
    make(path, files)


if __name__ == "__main__":
  # Not for those who import this file, the input side.
  from absl import flags
  from ml_collections import config_flags

  from lookup_vit import cli, config_utils

  FLAGS = flags.FLAGS
  config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:ARGS]")
  flags.mark_flags_as_required(["config"])
  cli.run(main)
