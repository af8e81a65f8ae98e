"""Data sets: from a description in a config to a prepared one.

Descriptions are those of `descriptions.py`.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

from lookup_vit import damage, descriptions, quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf
import tensorflow_datasets as tfds
from google.protobuf import json_format

_LOG = logging.getLogger("lookup_vit")

# TFDS would ask Google's storage for metadata that local data do not need, and
# warn where there is no network.
tfds.core.utils.gcs_utils._is_gcs_disabled = True


def get_builder(data: Mapping[str, Any]) -> tfds.core.DatasetBuilder:
  """Finds the builder of a prepared data set; builds that of a module.

  Args:
    data: a data description; `split` may be absent.

  Returns:
    A builder whose data are on disk.

  Raises:
    ValueError: if there is no such data set, or if it is not prepared.
  """
  data = descriptions.check(data)
  if descriptions.is_image_folder(data):
    return _folder_builder(data["folder"])
  if "module" in data:
    return _module_builder(data)
  return _named_builder(data["name"], data.get("data_dir"))


def _named_builder(name, data_dir):
  field = f"data.name={name!r}"
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as e:
    stem = name.partition(":")[0].partition("/")[0]
    folder = tfds.core.as_path(data_dir or tfds.core.constants.DATA_DIR) / stem
    if folder.exists():
      found = _listing(folder, 2)
      raise ValueError(
        f"{field}: {folder} has no such data set that is whole; it has {found}"
      ) from e
    names = tfds.list_builders(with_community_datasets=False)
    raise ValueError(
      f"{field}: TFDS has no data set {stem!r}, nor is there a {folder}"
      f"{descriptions.close(stem, names)}"
    ) from e
  except _UNREADABLE as e:
    raise _unreadable(field, name, data_dir) from e
  except (AssertionError, ValueError) as e:  # No such version, or config.
    raise ValueError(f"{field}: {str(e).strip()}") from e
  if not builder.info.splits:
    raise _not_prepared(builder, name, f"data.name={name!r}")
  return builder


# What a file of a data set's description that is cut is an error of.
_UNREADABLE = (json_format.ParseError, json.JSONDecodeError)


def _unreadable(field, name, data_dir):
  root = tfds.core.as_path(data_dir or tfds.core.constants.DATA_DIR)
  return ValueError(
    f"{field}: dataset_info.json or features.json in the directory of "
    f"{name!r} below {root} cannot be read. Copy the directory again, or "
    "delete it and prepare it again."
  )


def _listing(folder, depth) -> str:
  """Lists what is in a directory, and in those in it."""
  names = []
  for path in sorted(folder.iterdir()):
    inner = []
    if depth > 1 and path.is_dir():
      inner = [p.name for p in sorted(path.iterdir()) if p.is_dir()]
    names += [f"{path.name}/{name}" for name in inner] or [path.name]
  return ", ".join(names) or "nothing"


def _builder_class(field, module):
  try:
    return importlib.import_module(module).Builder
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


def _module_builder(data):
  field, folder = descriptions.source(data), data.get("folder")
  module, _, version = data["module"].partition(":")
  module, _, config = module.partition("/")
  builder_class = _builder_class(field, module)
  if ("folder" in inspect.signature(builder_class).parameters) != bool(folder):
    wants = "does not take a" if folder else "wants its"
    raise ValueError(f"{field}: this module {wants} data.folder")
  make = functools.partial(
    builder_class,
    data_dir=data.get("data_dir"),
    config=config or None,
    version=version or None,
    **({"folder": folder} if folder else {}),
  )
  try:
    builder = make()
  except _UNREADABLE as e:
    name = module.rpartition(".")[2]
    raise _unreadable(field, name, data.get("data_dir")) from e
  except (AssertionError, ValueError) as e:  # No such version, or config.
    if folder:
      raise ValueError(f"{field}: {str(e).strip()}") from e
    names = ", ".join(builder_class.builder_configs) or "none"
    raise ValueError(f"{field}: {str(e).strip()} (configs: {names})") from e
  if builder.info.splits:
    return builder
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    name = module.replace(".", "/") + (config and f" --config={config}")
    raise _not_prepared(builder, name, field)
  _LOG.info("building %s in %s", module, builder.data_dir)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints.
      builder.download_and_prepare()
  except Exception:
    # Another process on this machine may have been faster.
    if not make().info.splits:
      raise
  return make()


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
  parent = builder.data_path.parent
  there = f"; {parent} has {_listing(parent, 1)}" if parent.exists() else ""
  return ValueError(
    f"{field} is not prepared: no data set in {builder.data_path}{there}. "
    f"Prepare it with `{command}` (after `pip install -e .[beam]`), or set "
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
  """Returns the number of classes of `label`, None if it is no ClassLabel.

  Raises:
    ValueError: the data sets of a mixture differ in it.
  """
  found = {}
  for description, _, _ in descriptions.mixture(data):
    label = dict(get_builder(description).info.features).get("label")
    is_class = isinstance(label, tfds.features.ClassLabel)
    count = label.num_classes if is_class else None
    found[descriptions.source(description)] = count
  if len(set(found.values())) > 1:
    raise ValueError(
      "a mixture wants data sets of the same classes; it has "
      + ", ".join(f"{n} of {name}" for name, n in found.items())
    )
  return next(iter(found.values()))


def class_names(data: Mapping[str, Any]) -> list[str] | None:
  """Returns the names of the classes of `label`, None if it is no ClassLabel.

  Of classes without names, TFDS has numbers as text.

  Raises:
    ValueError: the data sets of a mixture differ in the number of classes.
  """
  if num_classes(data) is None:
    return None
  [(description, _, _), *_] = descriptions.mixture(data)
  return list(get_builder(description).info.features["label"].names)


def frame_options(data: Mapping[str, Any]) -> dict[str, Any]:
  """Returns how videos became the frames of a data set.

  The data need not be there.

  Args:
    data: a data description; of a mixture, the first data set counts.

  Returns:
    Options of `video_frames.read_frames`; none of a data set that does not say.

  Raises:
    ValueError: if the module of the data cannot be imported.
  """
  [(data, _, _), *_] = descriptions.mixture(data)
  if "module" not in data:
    return {}
  module, _, config = data["module"].partition(":")[0].partition("/")
  builder_class = _builder_class(descriptions.source(data), module)
  if not hasattr(builder_class, "frame_options"):
    return {}
  return builder_class.frame_options(config)


def num_examples(data: Mapping[str, Any]) -> int:
  """Returns the number of examples of the split.

  Args:
    data: a data description. Images and videos of a folder that are broken and
      skipped do not count.

  Returns:
    The number of examples.

  Raises:
    ValueError: if the data or the split are not there, or images or videos are
      broken.
  """
  data = descriptions.check(data)
  builder = get_builder(data)
  if descriptions.is_image_folder(data):
    return len(folder_examples(builder, data))
  parts = slices(builder, data)
  if "folder" in data:
    _check_lost(builder, data, dict.fromkeys(name for name, _ in parts))
  return sum(len(positions) for _, positions in parts)


def slices(
  builder: tfds.core.DatasetBuilder, data: Mapping[str, Any]
) -> list[tuple[str, range]]:
  """Resolves `data.split` to names of splits and ranges of their examples.

  Raises:
    ValueError: there is no such split, or it is not set.
  """
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


def files(
  builder: tfds.core.DatasetBuilder, data: Mapping[str, Any]
) -> dict[str, list[tuple[str, int]]]:
  """Lists the files of the splits that `data.split` is of.

  Returns:
    For each split, by its name, the paths and numbers of records.

  Raises:
    ValueError: there is no such split, or it is not set.
  """
  splits = {}
  for name, _ in slices(builder, data):
    info = builder.info.splits[name]
    paths = map(str, info.filepaths)
    splits[name] = list(zip(paths, info.shard_lengths, strict=True))
  return splits


def fingerprint(data: Mapping[str, Any]) -> str:
  """Returns a digest of the split's files: of paths, sizes, and times.

  Args:
    data: a data description.

  Raises:
    ValueError: if the data or the split are not there, or broken.
  """
  data = descriptions.check(data)
  builder = get_builder(data)
  if descriptions.is_image_folder(data):
    paths = [path for path, _ in folder_examples(builder, data)]
  else:
    of_splits = files(builder, data).values()
    paths = [path for of_split in of_splits for path, _ in of_split]

  def look(path):
    stat = tf.io.gfile.stat(path)
    return path, stat.length, stat.mtime_nsec

  with futures.ThreadPoolExecutor(16) as pool:
    found = [data.get("split"), *pool.map(look, paths)]
  return hashlib.sha256(repr(found).encode()).hexdigest()


def folder_examples(
  builder: tfds.core.DatasetBuilder, data: Mapping[str, Any]
) -> list[tuple[str, int]]:
  """Lists (path, label) of a folder's split, without its broken images."""
  # TFDS reads no parts of a folder's splits, but it has listed the files, in
  # an order that depends on the names alone.
  label = builder.info.features["label"]
  examples = [
    (example.image_path, label.str2int(example.label))
    for name, positions in slices(builder, data)
    for example in builder._split_examples[name][
      positions.start : positions.stop
    ]
  ]
  broken = damage.find_broken(tuple(path for path, _ in examples))
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


def _check_lost(builder, data, splits):
  """Fails, or warns, where a module has left out files of its folder."""
  lost = {}
  total = 0
  for split in splits:
    lost |= builder.lost(split)
    total += builder.info.splits[split].num_examples
  if not lost:
    return
  source = descriptions.source(data)
  what = f"{len(lost)} of the {total + len(lost)} files of {', '.join(splits)}"
  if data.get("on_error", "fail") == "fail":
    raise ValueError(
      f"{source}: {what} cannot be read. Repair or delete them, or set "
      f"data.on_error='skip', which leaves them out.{damage.listing(lost)}"
    )
  _warn_once(f"{source}: left out {what}, unreadable: {', '.join(lost)}")


@functools.lru_cache
def _warn_once(message):
  _LOG.warning("%s", message)


def broken_error(
  data: Mapping[str, Any], broken: Sequence[str], total: int
) -> ValueError:
  """What is to be raised where images of a folder's split are broken."""
  # The files may have been repaired before the next call.
  damage.find_broken.cache_clear()
  advice = "Repair or delete them"
  if data.get("on_error", "fail") == "fail":
    advice += (
      ", or set data.on_error='skip', which leaves out those that a check of "
      "each file's head and tail finds before training"
    )
  return ValueError(
    f"data.folder={data['folder']!r}: {len(broken)} of the {total} images of "
    f"split {data['split']!r} are broken. {advice}.{damage.listing(broken)}"
  )
