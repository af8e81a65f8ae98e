"""From a data description to batches, as a function of the seed and the step.

A data description is a dictionary (or ConfigDict) with exactly one source:

  name    a TFDS data set, "cifar10" or "imagenet2012_corrupted/fog_3"
  module  a package with a TFDS `Builder`, "data.digits"; built on first use
  folder  a directory of images, FOLDER/SPLIT/CLASS/*.jpg (.jpeg, .png)

and with `split` ("train", "train[:90%]", "train+validation"), for `name` and
`module` optionally `data_dir`, and for `folder` optionally `on_error`: what to
do about broken images, "fail" (the default) or "skip". Fields that are None
count as absent.

Training batches are slices of one endless stream: epoch 0, epoch 1, and so on,
each of them every example once, in an order drawn from the seed and the epoch.
The stream does not depend on where it was entered nor on how many hosts share
it, so a run that resumes, even on another number of hosts, sees what it would
have seen. Every host reads all records and decodes only its own.
"""

import contextlib
import difflib
import functools
import importlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

# Before TensorFlow loads, which reads it then.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from lookup_vit.preprocess import get_preprocess_fn

_LOG = logging.getLogger("lookup_vit")

# TFDS would ask Google's storage for metadata that local data do not need, and
# warn where there is no network.
tfds.core.utils.gcs_utils._is_gcs_disabled = True

# TensorFlow would take all memory of the GPUs that JAX computes on. It raises
# if it has started already, and then it is too late.
with contextlib.suppress(RuntimeError):
  tf.config.set_visible_devices([], "GPU")

_SOURCES = ("name", "module", "folder")
_FIELDS = (*_SOURCES, "split", "data_dir", "on_error")
_AUTOTUNE = tf.data.AUTOTUNE
_fold_in = tf.random.experimental.stateless_fold_in


def _close(word: str, words: Sequence[str]) -> str:
  close = difflib.get_close_matches(word, words, n=3)
  return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _check(data: Mapping[str, Any]) -> dict[str, Any]:
  """Checks a data description and returns it without the absent fields."""
  data = {key: value for key, value in dict(data).items() if value is not None}
  for key in data:
    if key not in _FIELDS:
      raise ValueError(
        f"data has no field {key!r}{_close(key, _FIELDS)}; the fields are "
        f"{', '.join(_FIELDS)}"
      )
  given = [key for key in _SOURCES if key in data]
  if len(given) != 1:
    raise ValueError(
      f"data wants exactly one of {', '.join(_SOURCES)}; got "
      f"{', '.join(given) or 'none of them'}"
    )
  wrong = "data_dir" if given == ["folder"] else "on_error"
  if wrong in data:
    raise ValueError(f"data.{wrong} does not apply to data.{given[0]}")
  if data.get("on_error", "fail") not in ("fail", "skip"):
    raise ValueError(
      f"data.on_error is {data['on_error']!r}; wanted 'fail' or 'skip'"
    )
  return data


def get_builder(data: Mapping[str, Any]) -> tfds.core.DatasetBuilder:
  """Finds the builder of a prepared data set; builds that of a module.

  Args:
    data: a data description; `split` may be absent.

  Returns:
    A builder whose data are on disk.

  Raises:
    ValueError: if there is no such data set, or if it is not prepared.
  """
  data = _check(data)
  if "folder" in data:
    return _folder_builder(data["folder"])
  if "module" in data:
    return _module_builder(data["module"], data.get("data_dir"))
  return _named_builder(data["name"], data.get("data_dir"))


def _named_builder(name, data_dir):
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as e:
    names = tfds.list_builders(with_community_datasets=False)
    raise ValueError(
      f"data.name: TFDS has no data set {name!r}{_close(name, names)}"
    ) from e
  except (AssertionError, ValueError) as e:  # No such version, or config.
    raise ValueError(f"data.name: {e}") from e
  if not builder.info.splits:
    raise _not_prepared(builder, name, f"data.name={name!r}")
  return builder


def _module_builder(module, data_dir):
  field = f"data.module={module!r}"
  try:
    builder_class = importlib.import_module(module).Builder
  except ImportError as e:
    raise ValueError(
      f"{field} cannot be imported: {e}. The modules under data/ are found "
      "from the root of the repository: start there, or add it to PYTHONPATH."
    ) from e
  except AttributeError as e:
    raise ValueError(
      f"{field} has no class Builder, which should be a "
      "tfds.core.GeneratorBasedBuilder"
    ) from e
  builder = builder_class(data_dir=data_dir)
  if builder.info.splits:
    return builder
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    raise _not_prepared(builder, module.replace(".", "/"), field)
  _LOG.info("building %s in %s", module, builder.data_dir)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints.
      builder.download_and_prepare()
  except Exception:
    # Another process on this machine may have been faster.
    if not builder_class(data_dir=data_dir).info.splits:
      raise
  return builder_class(data_dir=data_dir)


def _not_prepared(builder, name, field):
  """Returns the error for a data set that is not on disk."""
  # The root above NAME[/CONFIG]/VERSION.
  root = builder.data_path.parents[1 + bool(builder.builder_config)]
  command = f"tfds build {name} --data_dir={root}"
  manual = ""
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    command += " --manual_dir=DIR"
    manual = " DIR holds files to fetch by hand: " + " ".join(
      builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split()
    )
  return ValueError(
    f"{field} is not prepared: nothing in {builder.data_path}. Prepare it with "
    f"`{command}` (which wants `pip install apache-beam mlcroissant`), or set "
    f"data.data_dir to where it is.{manual}"
  )


def _folder_builder(folder):
  wanted = "wanted the layout FOLDER/SPLIT/CLASS/*.jpg (.jpeg, .png)"
  path = os.path.expanduser(folder)
  if not tf.io.gfile.isdir(path):
    raise ValueError(f"data.folder={folder!r} is no directory; {wanted}")
  builder = tfds.ImageFolder(path)
  if not any(info.num_examples for info in builder.info.splits.values()):
    raise ValueError(f"data.folder={folder!r} holds no images; {wanted}")
  return builder


def num_classes(data: Mapping[str, Any]) -> int | None:
  """Returns the number of classes of `label`, None if it is no ClassLabel."""
  label = dict(get_builder(data).info.features).get("label")
  is_class = isinstance(label, tfds.features.ClassLabel)
  return label.num_classes if is_class else None


def num_examples(data: Mapping[str, Any]) -> int:
  """Returns the number of examples of the split.

  Args:
    data: a data description. Images of a folder that are broken and skipped
      do not count.

  Returns:
    The number of examples.

  Raises:
    ValueError: if the data or the split are not there, or images are broken.
  """
  data = _check(data)
  builder = get_builder(data)
  if "folder" in data:
    return len(_folder_examples(builder, data))
  return sum(len(positions) for _, positions in _slices(builder, data))


def _slices(builder, data) -> list[tuple[str, range]]:
  """Resolves `data.split` to names of splits and ranges of their examples."""
  splits = builder.info.splits
  if "split" not in data:
    raise ValueError(f"data.split is not set; there are {', '.join(splits)}")
  try:
    spec = tfds.core.ReadInstruction.from_spec(data["split"])
    parts = spec.to_absolute(splits)
  except (NotImplementedError, ValueError) as e:
    raise ValueError(
      f"data.split={data['split']!r}: {str(e).strip()} There are "
      + ", ".join(f"{k} ({v.num_examples})" for k, v in splits.items())
    ) from e
  return [
    (p.splitname, range(splits[p.splitname].num_examples)[p.from_ : p.to])
    for p in parts
  ]


def _folder_examples(builder, data) -> list[tuple[str, int]]:
  """Lists (path, label) of a folder's split, without its broken images."""
  # TFDS reads no parts of a folder's splits, but it has listed the files, in
  # an order that depends on the names alone.
  label = builder.info.features["label"]
  examples = [
    (example.image_path, label.str2int(example.label))
    for name, positions in _slices(builder, data)
    for example in builder._split_examples[name][
      positions.start : positions.stop
    ]
  ]
  broken = _find_broken(tuple(path for path, _ in examples))
  if not broken:
    return examples
  if data.get("on_error", "fail") == "fail":
    raise _broken_error(data, broken, len(examples))
  _LOG.warning(
    "data.folder=%r: left out %d of the %d images of split %r as broken: %s",
    data["folder"],
    len(broken),
    len(examples),
    data["split"],
    ", ".join(broken),
  )
  return [example for example in examples if example[0] not in broken]


def _broken_error(data, broken, total):
  # The files may have been repaired before the next call.
  _find_broken.cache_clear()
  names = "".join(f"\n  {path}: {broken[path]}" for path in list(broken)[:10])
  more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
  return ValueError(
    f"data.folder={data['folder']!r}: {len(broken)} of the {total} images of "
    f"split {data['split']!r} are broken. Repair or delete them, or set "
    "data.on_error='skip', which leaves out those that a check of each file's "
    f"head and tail finds before training.{names}{more}"
  )


@functools.lru_cache(maxsize=8)
def _find_broken(paths: tuple[str, ...], full: bool = False) -> dict[str, str]:
  """Finds images that cannot be decoded.

  Args:
    paths: files.
    full: decode all of them; else only those with an unusual head or tail,
      which finds truncated and foreign files but not damage in the middle.

  Returns:
    What is wrong with each broken file, by its path, in the order of `paths`.
  """
  error_of = _decode_error if full else _image_error

  def check(group):
    return [(path, error) for path in group if (error := error_of(path))]

  broken = {}
  start = last = time.monotonic()
  # Groups, as a task for the pool costs more than the check of a file. Threads,
  # for storage that answers slowly.
  groups = [paths[i : i + 64] for i in range(0, len(paths), 64)]
  with futures.ThreadPoolExecutor(16) as pool:
    for done, errors in enumerate(pool.map(check, groups), 1):
      broken.update(errors)
      if time.monotonic() - last > 5:
        last = time.monotonic()
        _LOG.info(
          "checked %d of %d images in %.0f s, %d of them broken",
          min(done * 64, len(paths)),
          len(paths),
          last - start,
          len(broken),
        )
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
    return e.message.splitlines()[0]
  if size == 0:
    return "the file is empty"
  if head.startswith(b"\xff\xd8") and tail.endswith(b"\xff\xd9"):
    return None
  if head == b"\x89PNG\r\n\x1a\n" and tail[4:8] == b"IEND":
    return None
  # Bytes after the end of an image are common, and decoders ignore them.
  return _decode_error(path)


def _decode_error(path: str) -> str | None:
  """Says what is wrong with an image by decoding it as training would."""
  try:
    get_preprocess_fn("decode")({"image": tf.io.read_file(path)}, _seed(0))
  except _BROKEN as e:
    return e.message.splitlines()[0]
  return None


# Errors that every host will see alike; others, such as a storage that is not
# available for a moment, must not decide which images a split has.
_BROKEN = (
  tf.errors.FailedPreconditionError,
  tf.errors.InvalidArgumentError,
  tf.errors.NotFoundError,
  tf.errors.PermissionDeniedError,
)


def _records(data) -> tuple[tf.data.Dataset, int, Callable]:
  """Finds the records of a split.

  Args:
    data: a data description.

  Returns:
    A dataset of undecoded records in a fixed order, their number, and a
    function from a record to the example that preprocessing starts from.

  Raises:
    ValueError: if the data are not there, broken or empty.
  """
  data = _check(data)
  builder = get_builder(data)
  if "folder" in data:
    examples = _folder_examples(builder, data)
    total = len(examples)
  else:
    total = num_examples(data)
  if not total:
    raise ValueError(f"data.split={data['split']!r} has no examples")

  if "folder" in data:
    paths, labels = zip(*examples, strict=True)
    # Paths, so that what a resumed run skips or another host has is not read.
    records = tf.data.Dataset.from_tensor_slices(
      {"image": list(paths), "label": np.array(labels, np.int64)}
    )
    return records, total, _read_image

  features = dict(builder.info.features)
  skip_decoding = {
    key: tfds.decode.SkipDecoding()
    for key, feature in features.items()
    if isinstance(feature, tfds.features.Image)
  }
  records = builder.as_dataset(
    split=data["split"],
    shuffle_files=False,
    decoders=skip_decoding,
    read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
  )
  return records, total, _image_decoder(features.get("image"))


def _read_image(record):
  return {**record, "image": tf.io.read_file(record["image"])}


def _image_decoder(feature) -> Callable:
  """Returns a function that decodes `image` if all images are of one size.

  Undecoded, they would lose that size, and could only be batched after a
  needless resize. The op `decode` leaves them as they are.
  """
  if (
    not isinstance(feature, tfds.features.Image)
    or None in feature.shape
    or feature.dtype != np.uint8
    or feature.shape[-1] not in (1, 3)
  ):
    return lambda record: record
  decode = get_preprocess_fn(f"decode({feature.shape[-1]})")

  def decode_image(record):
    record = decode(record, tf.constant(_seed(0)))
    return {**record, "image": tf.ensure_shape(record["image"], feature.shape)}

  return decode_image


def _seed(seed: int) -> np.ndarray:
  """Returns an integer of up to 64 bits as the int32 [2] of stateless ops."""
  words = [seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]
  return np.array(words, np.uint32).view(np.int32)


def _local_size(batch_size, process_index, process_count) -> int:
  """Returns this host's share of a batch."""
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index={process_index} is not in [0, {process_count})"
    )
  if batch_size <= 0 or batch_size % process_count:
    raise ValueError(
      f"batch_size={batch_size} is not a positive multiple of the number of "
      f"processes, {process_count}"
    )
  return batch_size // process_count


def _check_batchable(ds, pp):
  """Checks that preprocessed examples stack to arrays that JAX takes."""
  for key, spec in ds.element_spec.items():
    for leaf in tf.nest.flatten(spec):
      if not isinstance(leaf, tf.TensorSpec):
        wrong = f"is no tensor but {leaf}"
      elif leaf.dtype == tf.string:
        wrong = "is a string"
      elif not leaf.shape.is_fully_defined():
        wrong = f"has the shape {leaf.shape}, which may vary"
      else:
        continue
      raise ValueError(
        f"feature {key!r} cannot be batched: after the preprocessing string "
        f"{pp!r} it {wrong}. Decode and resize what the model needs, and name "
        'it in keep(...), for example keep("image", "label").'
      )


def make_train(
  data: Mapping[str, Any],
  *,
  pp: str,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  shuffle_buffer_size: int = 50_000,
  process_index: int = 0,
  process_count: int = 1,
) -> tf.data.Dataset:
  """Makes this host's batches of the endless training stream.

  Batch k holds the positions from k * batch_size of the stream, on whatever
  epochs they fall; host p takes the p-th contiguous part of each batch. The
  batches are the same bits wherever the stream is entered, and for any number
  of hosts once their parts are concatenated.

  Args:
    data: a data description.
    pp: the preprocessing string. The seed of an example is a function of
      `seed`, its epoch and its position there.
    batch_size: size of the global batch.
    seed: of the order and of the preprocessing, up to 64 bits.
    start_step: number of the first batch. What comes before it in the epoch is
      read, but neither decoded nor preprocessed; earlier epochs cost nothing.
    shuffle_buffer_size: size of the window of undecoded records (of a folder:
      of paths) that an epoch is shuffled through, in memory on every host.
    process_index: this host.
    process_count: number of hosts, which divides `batch_size`.

  Returns:
    An endless dataset of dictionaries of tensors
    [batch_size / process_count, ...].

  Raises:
    ValueError: if the data are not there, broken or empty, if the sizes do not
      fit, or if the preprocessed examples cannot be batched.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  preprocess = get_preprocess_fn(pp)
  records, total, load = _records(data)
  seed = tf.constant(_seed(seed))
  start_epoch, start_position = divmod(start_step * batch_size, total)

  def epoch_records(epoch):
    # Dataset.shuffle mixes the seed of tf.random.set_seed into its own. Here,
    # this sets that of the epoch's graph, and so detaches it from the global.
    tf.compat.v1.set_random_seed(1)
    order_seed = tf.random.stateless_uniform(
      [], _fold_in(seed, tf.cast(epoch, tf.int32)), None, None, tf.int64
    )
    shuffled = records.shuffle(
      min(shuffle_buffer_size, total), order_seed, False
    )
    return shuffled.enumerate().map(
      lambda position, record: (epoch, position, record)
    )

  def is_local(epoch, position, record):
    del record
    in_batch = (epoch * total + position) % batch_size
    return in_batch // local_size == process_index

  # AutoGraph would bury the errors of the ops in its own.
  @tf.autograph.experimental.do_not_convert
  def one(epoch, position, record):
    epoch_seed = _fold_in(seed, tf.cast(epoch, tf.int32))
    example_seed = _fold_in(epoch_seed, tf.cast(position, tf.int32))
    return preprocess(load(record), example_seed)

  epochs = tf.data.Dataset.range(start_epoch, np.iinfo(np.int64).max)
  stream = epochs.flat_map(epoch_records).skip(start_position)
  ds = stream.filter(is_local).map(one, _AUTOTUNE, deterministic=True)
  _check_batchable(ds, pp)
  return ds.batch(local_size, drop_remainder=True).prefetch(_AUTOTUNE)


def make_eval(
  data: Mapping[str, Any],
  *,
  pp: str,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> tuple[tf.data.Dataset, int]:
  """Makes this host's batches of one pass over a split, in its order.

  Over all hosts, every example comes once. Every host has the same number of
  batches of the same shape: what lacks is zeros, also in `_mask`.

  Args:
    data: a data description.
    pp: the preprocessing string. The seed of an example is its position.
    batch_size: size of the global batch; host p takes the p-th contiguous
      part.
    process_index: this host.
    process_count: number of hosts, which divides `batch_size`.

  Returns:
    A dataset of dictionaries of tensors [batch_size / process_count, ...],
    among them `_mask`, float32, 1 for examples and 0 for padding; and the
    number of batches.

  Raises:
    ValueError: as for `make_train`.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  preprocess = get_preprocess_fn(pp)
  records, total, load = _records(data)
  num_batches = -(-total // batch_size)

  def is_local(position, record):
    del record
    return position % batch_size // local_size == process_index

  @tf.autograph.experimental.do_not_convert
  def one(position, record):
    seed = _fold_in(_seed(0), tf.cast(position, tf.int32))
    example = preprocess(load(record), seed)
    return {**example, "_mask": tf.ones([], tf.float32)}

  ds = records.enumerate().filter(is_local)
  ds = ds.map(one, _AUTOTUNE, deterministic=True)
  _check_batchable(ds, pp)
  zeros = tf.nest.map_structure(
    lambda spec: tf.zeros(spec.shape, spec.dtype), ds.element_spec
  )
  # At most one batch of a host is part real, and none before it is.
  padding = tf.data.Dataset.from_tensors(zeros).repeat(local_size)
  ds = ds.concatenate(padding).batch(local_size, drop_remainder=True)
  ds = ds.take(num_batches)
  ds = ds.apply(tf.data.experimental.assert_cardinality(num_batches))
  return ds.prefetch(_AUTOTUNE), num_batches


def numpy_iterator(
  ds: tf.data.Dataset, data: Mapping[str, Any]
) -> Iterator[dict[str, np.ndarray]]:
  """Iterates over batches as read-only NumPy views of TensorFlow's memory.

  Args:
    ds: what `make_train` or `make_eval` returned.
    data: the data description that it was made from.

  Yields:
    Dictionaries of arrays.

  Raises:
    ValueError: if images of a folder turn out to be broken. All files of the
      split are decoded then, to name those that are.
  """
  data = _check(data)
  # By a local name: an iterator that is open when the interpreter ends is
  # closed when `tf` is gone.
  invalid_argument = tf.errors.InvalidArgumentError
  try:
    yield from ds.as_numpy_iterator()
  except invalid_argument as e:
    if "folder" not in data:
      raise
    _LOG.info("data.folder=%r: looking for broken images", data["folder"])
    examples = _folder_examples(get_builder(data), data)
    paths = tuple(path for path, _ in examples)
    broken = _find_broken(paths, full=True)
    if not broken:  # Then an op of the preprocessing failed.
      raise
    raise _broken_error(data, broken, len(paths)) from e
