"""The undecoded records of a prepared data set, and what is wrong with them.

TFRecord files are read in sequence; ArrayRecord files and images of a folder in
any order.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np

from lookup_vit import (  # noqa: F401
  damage,
  datasets,
  descriptions,
  record_index,
)

# isort: split
import tensorflow as tf
import tensorflow_datasets as tfds

from lookup_vit.preprocess import get_preprocess_fn

_LOG = logging.getLogger("lookup_vit")

# Records of an ArrayRecord file to read at a time in sequence.
_AT_A_TIME = 64


@dataclasses.dataclass(frozen=True)
class Shards:
  """TFRecord files, or parts of them, in the order of the split.

  Attributes:
    paths: of the files.
    skips: records of each file that are not of the split, before its own.
    sizes: number of records of each.
    offsets: bytes before every `record_index.STRIDE`-th record of each file;
      without an index of them, [0].
  """

  paths: tuple[str, ...]
  skips: np.ndarray
  sizes: np.ndarray
  offsets: tuple[np.ndarray, ...]

  def read(
    self, shard: tf.Tensor, skip: tf.Tensor, take: tf.Tensor
  ) -> tf.data.Dataset:
    """Reads parts of shards, one after the other.

    Args:
      shard: int64 [n], which shards.
      skip: int64 [n], their records to pass over. Of those after the nearest
        of `offsets`, a local file reads the lengths, a bucket all.
      take: int64 [n], their records to read.

    Returns:
      A dataset of (index in the split, record).
    """
    firsts = np.cumsum(self.sizes) - self.sizes
    counts = np.array([len(offsets) for offsets in self.offsets])
    first = tf.gather(tf.constant(firsts), shard) + skip
    skip = tf.gather(tf.constant(self.skips), shard) + skip
    place = tf.gather(tf.constant(counts), shard) - 1
    place = tf.minimum(skip // record_index.STRIDE, place)
    skip -= place * record_index.STRIDE
    place += tf.gather(tf.constant(np.cumsum(counts) - counts), shard)
    offset = tf.gather(tf.constant(np.concatenate(self.offsets)), place)
    path = tf.gather(tf.constant(self.paths), shard)

    def read_part(path, offset, skip, take, first):
      # `tf.data.TFRecordDataset` has no offsets. Without a buffer each record
      # is read by itself, so that what is skipped is not.
      records = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path],
        compression_type="",
        buffer_size=tf.constant(0, tf.int64),
        byte_offsets=[offset],
      )
      spec = tf.TensorSpec([], tf.string)
      records = tf.data.experimental.from_variant(records, spec)
      # A file with too few records is an error, not the end of the zip.
      whole = tf.data.experimental.assert_cardinality(take)
      records = records.skip(skip).take(take).apply(whole)
      return tf.data.Dataset.zip(
        tf.data.Dataset.range(first, first + take), records
      )

    parts = tf.data.Dataset.from_tensor_slices(
      (path, offset, skip, take, first)
    )
    return parts.flat_map(read_part)


@dataclasses.dataclass(frozen=True)
class Records:
  """The records of a split.

  Attributes:
    data: the data description.
    size: number of records.
    load: function from a record to the example that preprocessing starts from.
    shards: the files, where they are read in sequence; else None.
    read: function from indices, int64 [n], to records, [n]; None for shards.
    where: function from an index to the place of the record, for messages.
  """

  data: dict[str, Any]
  size: int
  load: Callable[[tf.Tensor], dict[str, Any]]
  where: Callable[[int], str]
  shards: Shards | None = None
  read: Callable[[tf.Tensor], tf.Tensor] | None = None

  def in_sequence(self, first: int, last: int) -> tf.data.Dataset:
    """Makes a dataset of (index, record), those of [first, last)."""
    if self.shards is None:
      indices = tf.data.Dataset.range(first, last).batch(_AT_A_TIME)
      return indices.map(lambda i: (i, self.read(i))).unbatch()
    ends = np.cumsum(self.shards.sizes)
    skip = np.clip(first - ends + self.shards.sizes, 0, self.shards.sizes)
    until = np.clip(last - ends + self.shards.sizes, 0, self.shards.sizes)
    [some] = np.nonzero(until > skip)
    return self.shards.read(some, skip[some], (until - skip)[some])


def open_records(data: Mapping[str, Any]) -> Records:
  """Finds the records of a split.

  Args:
    data: a data description.

  Returns:
    The records, of which nothing was read yet.

  Raises:
    ValueError: if the data are not there, broken or empty.
  """
  data = descriptions.check(data)
  builder = datasets.get_builder(data)
  size = datasets.num_examples(data)
  if not size:
    raise ValueError(f"data.split={data['split']!r} has no examples")
  if descriptions.is_image_folder(data):
    return _open_folder(data, builder)
  lengths = _check_files(data, builder)
  files = builder.info.splits[data["split"]].file_instructions
  firsts = np.cumsum([0] + [f.take for f in files])

  def where(index):
    i = int(np.searchsorted(firsts, index, "right")) - 1
    file = files[i]
    return f"record {file.skip + index - firsts[i]} of {file.filename}"

  fields = dict(data=data, size=size, load=_parser(builder), where=where)
  file_format = builder.info.file_format
  if file_format == tfds.core.FileFormat.TFRECORD:
    offsets = _offsets(data, builder, lengths)
    return Records(shards=_make_shards(files, offsets), **fields)
  if file_format == tfds.core.FileFormat.ARRAY_RECORD:
    return Records(read=_array_record_reader(builder, data), **fields)
  raise ValueError(
    f"{descriptions.source(data)}: the files in {builder.data_path} are of the "
    f"format {file_format.value}; wanted tfrecord or array_record"
  )


def _open_folder(data, builder):
  paths, labels = zip(*datasets.folder_examples(builder, data), strict=True)
  paths_tensor = tf.constant(paths)
  labels_tensor = tf.constant(labels, tf.int64)

  # Of an index only, so that what others have is not read.
  def load(index):
    path = paths_tensor[index]
    return {"image": tf.io.read_file(path), "label": labels_tensor[index]}

  return Records(
    data=data,
    size=len(paths),
    load=load,
    where=lambda index: paths[index],
    read=lambda indices: indices,
  )


def _offsets(data, builder, lengths) -> dict[str, np.ndarray]:
  """Returns the offsets of each file, of those that have an index."""
  offsets = {}
  for split, files in datasets.files(builder, data).items():
    path = record_index.path_of(builder, split)
    index = record_index.load(path, {name: lengths[name] for name, _ in files})
    if index is not None:
      offsets |= index
    elif "://" in str(path):
      _LOG.info(
        "%s is not there: what comes before the place where a file is entered "
        "is read too. `%s` makes it, once.",
        path,
        record_index.COMMAND,
      )
  return offsets


def _make_shards(files, offsets):
  beginning = np.zeros(1, np.int64)
  return Shards(
    paths=tuple(f.filename for f in files),
    skips=np.array([f.skip for f in files], np.int64),
    sizes=np.array([f.take for f in files], np.int64),
    offsets=tuple(offsets.get(f.filename, beginning) for f in files),
  )


def _array_record_reader(builder, data):
  from array_record.python import array_record_module  # Linux alone has it.

  damaged = {}
  files = _files(data, builder)
  for path, size in files:
    try:
      reader = array_record_module.ArrayRecordReader(path)
      if reader.num_records() != size:
        damaged[path] = f"{reader.num_records()} records, wanted {size}"
      reader.close()
    except RuntimeError as e:
      damaged[path] = str(e).partition(";")[0]
  if damaged:
    raise _damage_error(data, damaged, len(files))
  source = builder.as_data_source(data["split"]).data_source

  def fetch(indices):
    try:
      return np.array(source.__getitems__(indices.tolist()), object)
    except RuntimeError:
      # TensorFlow would print its traceback, several times.
      return np.full(len(indices), b"", object)

  def read(indices):
    records = tf.numpy_function(fetch, [indices], tf.string, stateful=False)
    whole = tf.debugging.assert_positive(
      tf.strings.length(records), "the record is corrupt", summarize=0
    )
    with tf.control_dependencies([whole]):
      return tf.identity(records)

  return read


def _parser(builder) -> Callable:
  """Returns a function from a serialised record to an example.

  Images and videos stay encoded, but for images that are all of one size:
  undecoded, they would lose that size, and could only be batched after a
  needless resize. The op `decode` leaves those as they are.
  """
  features = builder.info.features
  is_encoded = (tfds.features.Image, tfds.features.Video)
  decoders = {
    key: tfds.decode.SkipDecoding()
    for key, feature in dict(features).items()
    if isinstance(feature, is_encoded)
  }
  decode = _image_decoder(dict(features).get("image"))

  def load(record):
    return decode(features.deserialize_example(record, decoders=decoders))

  return load


def _image_decoder(feature) -> Callable:
  if (
    not isinstance(feature, tfds.features.Image)
    or None in feature.shape
    or feature.np_dtype != np.uint8
    or feature.shape[-1] not in (1, 3)
  ):
    return lambda example: example
  decode = get_preprocess_fn(f"decode({feature.shape[-1]})")

  def decode_image(example):
    example = decode(example, tf.zeros(2, tf.int32))
    image = tf.ensure_shape(example["image"], feature.shape)
    return {**example, "image": image}

  return decode_image


# --- Damage


def _files(data, builder) -> list[tuple[str, int]]:
  """Lists the files of all splits that `data.split` is of, and their sizes."""
  return list(itertools.chain(*datasets.files(builder, data).values()))


def _check_files(data, builder) -> dict[str, int]:
  """Returns the bytes of each file of the splits.

  Raises:
    ValueError: if files are missing or cut; it names them.
  """
  files = _files(data, builder)

  def length(path):
    try:
      return tf.io.gfile.stat(path).length
    except tf.errors.NotFoundError:
      return None

  with futures.ThreadPoolExecutor(16) as pool:
    lengths = list(pool.map(length, [path for path, _ in files]))
  missing = {
    path: "is missing"
    for (path, _), n in zip(files, lengths, strict=True)
    if n is None
  }
  if missing:
    raise _damage_error(data, missing, len(files))
  names = {name for name, _ in datasets.slices(builder, data)}
  infos = [builder.info.splits[name] for name in names]
  is_tfrecord = builder.info.file_format == tfds.core.FileFormat.TFRECORD
  # TFDS writes 0 where it does not know the number of bytes.
  if is_tfrecord and all(info.num_bytes for info in infos):
    frames = record_index.FRAME * sum(info.num_examples for info in infos)
    wanted = sum(info.num_bytes for info in infos) + frames
    if sum(lengths) < wanted and (damaged := damage.find_damaged(files)):
      raise _damage_error(data, damaged, len(files))
  return {path: n for (path, _), n in zip(files, lengths, strict=True)}


def _damage_error(data, damaged, total) -> ValueError:
  source = descriptions.source(data)
  return ValueError(
    f"{source}: {len(damaged)} of the {total} files of split "
    f"{data['split']!r} are damaged. Copy them again, or delete the directory "
    f"and prepare it again.{damage.listing(damaged)}"
  )


def check_for_damage(records: Records, first: Iterable[int] = ()) -> None:
  """Reads the records of a data set to find what is damaged.

  Args:
    records: the records.
    first: shards to read before the others, which are read if these are whole.

  Raises:
    ValueError: the files, or the first of the records, that are damaged.
  """
  name = descriptions.source(records.data)
  if records.shards is not None:
    files = _files(records.data, datasets.get_builder(records.data))
    likely = {records.shards.paths[shard] for shard in first}
    for some in (
      [file for file in files if file[0] in likely],
      [file for file in files if file[0] not in likely],
    ):
      _LOG.info("%s: reading %d files", name, len(some))
      if damaged := damage.find_damaged(some):
        raise _damage_error(records.data, damaged, len(files))
    if any(len(offsets) > 1 for offsets in records.shards.offsets):
      raise ValueError(
        f"{name}: the files are whole, but their index of records, "
        f"record_index-*.npz beside them, does not fit; {record_index.AGAIN}"
      )
    return
  _LOG.info("%s: reading all %d records", name, records.size)
  for index in range(records.size):
    with at_fault(records, index):
      records.read(tf.constant([index], tf.int64))


@contextlib.contextmanager
def at_fault(records: Records, index: int) -> Iterator[None]:
  """Turns an op's error into a ValueError that names the record it is about."""
  try:
    yield
  except tf.errors.OpError as e:
    raise ValueError(
      f"{descriptions.source(records.data)}: {records.where(index)}: "
      f"{damage.reason(e)}"
    ) from e
