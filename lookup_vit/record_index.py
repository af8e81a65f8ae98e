r"""Where the records of TFRecord files begin.

python -m lookup_vit.record_index --config=configs/in1k_lookup_b.py

reads the training data of a config once and writes `record_index-SPLIT.npz`
beside their files. From a bucket, training then enters files anywhere without
reading what comes before. On a local disk it does so without an index.
"""

import io
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import flags

from lookup_vit import cli, config_utils, damage, datasets  # noqa: F401

# isort: split
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

FLAGS = flags.FLAGS

_LOG = logging.getLogger("lookup_vit")

# Every so many records one place is kept.
STRIDE = 16
# Bytes of a TFRecord beside its content: length, and two checksums.
FRAME = 16
COMMAND = "python -m lookup_vit.record_index --config=CONFIG"


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
  again = f"delete it, or make it again by `{COMMAND}`"
  try:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as index:
      found = dict(zip(index["names"].tolist(), index["sizes"], strict=True))
      parts = np.split(index["offsets"], np.cumsum(index["counts"])[:-1])
      stride = int(index["stride"])
  except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f"{path} is no index of records; {again}") from e
  wanted = {os.path.basename(name): size for name, size in sizes.items()}
  if found != wanted or stride != STRIDE:
    raise ValueError(f"{path} is of other files than those beside it; {again}")
  return dict(zip(sizes, parts, strict=True))


def make(data: Mapping[str, Any]) -> list[epath.Path]:
  """Writes the indices of the splits that a data description names.

  Args:
    data: a data description, of TFRecord files.

  Returns:
    Their paths.

  Raises:
    ValueError: the data are not there, are of another kind, or are damaged.
    OSError: an index cannot be written.
  """
  data = datasets.check(data)
  builder = datasets.get_builder(data)
  is_folder = "folder" in data
  if is_folder or builder.info.file_format != tfds.core.FileFormat.TFRECORD:
    raise ValueError(
      f"{datasets.source(data)} is read in random access, without an index"
    )
  paths = []
  for split, files in datasets.files(builder, data).items():
    path = path_of(builder, split)
    _LOG.info("%s: reading %d files", path.name, len(files))
    with futures.ThreadPoolExecutor(os.cpu_count() * 4) as pool:
      found = pool.map(_read, *zip(*files, strict=True))
      found = list(damage.with_progress(found, len(files), "files"))
    _write(path, files, found)
    _LOG.info("wrote %s", path)
    paths.append(path)
  return paths


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
  ends = np.cumsum(lengths.astype(np.int64) + FRAME)
  return int(ends[-1]), np.concatenate([[0], ends[:-1]])[::STRIDE]


def _write(path, files: Sequence[tuple[str, int]], found):
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
  # Whoever reads meanwhile finds the old index or the new one.
  partial = path.with_name(f"{path.name}.partial")
  partial.write_bytes(content.getvalue())
  partial.replace(path)


def main(argv):
  """Indexes the training data of a config."""
  del argv
  config = config_utils.resolve(config_utils.load(FLAGS.config))
  for data, _, _ in datasets.mixture(config.input.data):
    make(data)


if __name__ == "__main__":
  flags.DEFINE_string(
    "config", None, "configs/NAME.py[:key=value,...]", required=True
  )
  cli.run(main)
