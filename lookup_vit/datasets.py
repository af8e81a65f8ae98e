"""Data sets: from a description in a config to a prepared one.

A data description is a dictionary (or ConfigDict) with exactly one source:

  name    a TFDS data set, "cifar10" or "imagenet2012_corrupted/fog_3"
  module  a package with a TFDS `Builder`, "data.digits"; built on first use
  folder  a directory of images, FOLDER/SPLIT/CLASS/*.jpg (.jpeg, .png)

and with `split` ("train", "train[:90%]", "train+validation"), for `name` and
`module` optionally `data_dir`, and for `folder` optionally `on_error`: what to
do about broken images, "fail" (the default) or "skip". Fields that are None
count as absent.
"""

import contextlib
import difflib
import functools
import importlib
import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

from lookup_vit import quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf
import tensorflow_datasets as tfds

from lookup_vit.preprocess import get_preprocess_fn

_LOG = logging.getLogger("lookup_vit")

# TFDS would ask Google's storage for metadata that local data do not need, and
# warn where there is no network.
tfds.core.utils.gcs_utils._is_gcs_disabled = True

_SOURCES = ("name", "module", "folder")
_FIELDS = (*_SOURCES, "split", "data_dir", "on_error")


def _close(word: str, words: Sequence[str]) -> str:
  close = difflib.get_close_matches(word, words, n=3)
  return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def check(data: Mapping[str, Any]) -> dict[str, Any]:
  """Checks a data description and returns it without the absent fields.

  Raises:
    ValueError: an unknown field, not exactly one source, or a field that does
      not go with the source.
  """
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
  data = check(data)
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
  data = check(data)
  builder = get_builder(data)
  if "folder" in data:
    return len(folder_examples(builder, data))
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


def folder_examples(builder, data) -> list[tuple[str, int]]:
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
  broken = find_broken(tuple(path for path, _ in examples))
  if not broken:
    return examples
  if data.get("on_error", "fail") == "fail":
    raise broken_error(data, broken, len(examples))
  _warn_once(
    f"data.folder={data['folder']!r}: left out {len(broken)} of the "
    f"{len(examples)} images of split {data['split']!r} as broken: "
    + ", ".join(broken)
  )
  return [example for example in examples if example[0] not in broken]


@functools.lru_cache
def _warn_once(message):
  _LOG.warning("%s", message)


def broken_error(data, broken, total):
  # The files may have been repaired before the next call.
  find_broken.cache_clear()
  names = "".join(f"\n  {path}: {broken[path]}" for path in list(broken)[:10])
  more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
  advice = "Repair or delete them"
  if data.get("on_error", "fail") == "fail":
    advice += (
      ", or set data.on_error='skip', which leaves out those that a check of "
      "each file's head and tail finds before training"
    )
  return ValueError(
    f"data.folder={data['folder']!r}: {len(broken)} of the {total} images of "
    f"split {data['split']!r} are broken. {advice}.{names}{more}"
  )


@functools.lru_cache(maxsize=8)
def find_broken(paths: tuple[str, ...], full: bool = False) -> dict[str, str]:
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
    seed = tf.zeros(2, tf.int32)
    get_preprocess_fn("decode")({"image": tf.io.read_file(path)}, seed)
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
