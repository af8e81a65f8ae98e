"""Data sets: from a description in a config to a prepared one.

A data description is a dictionary (or ConfigDict) with exactly one source:

  name    a TFDS data set, "cifar10" or "imagenet2012_corrupted/fog_3"
  module  a package with a TFDS `Builder`, "data.digits"; built on first use
          where that needs no files; also "data.imagenet21k/CONFIG:VERSION"
  folder  a directory of images, FOLDER/SPLIT/CLASS/*.jpg (.jpeg, .png)

and with `split` ("train", "train[:90%]", "train+validation"), for `name` and
`module` optionally `data_dir`, and for `folder` optionally `on_error`: what to
do about broken images, "fail" (the default) or "skip". Fields that are None
count as absent.

Or it is a mixture: `mixture`, a list of data descriptions, each with a `weight`
and optionally with `pp`, a preprocessing string of its own.
"""

import contextlib
import difflib
import functools
import importlib
import io
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lookup_vit import damage, quiet_tensorflow  # noqa: F401

# isort: split
import ml_collections
import tensorflow as tf
import tensorflow_datasets as tfds
from google.protobuf import json_format

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
  if "mixture" in data:
    raise ValueError("data.mixture is for training, and not within a mixture")
  for key in data:
    if key not in _FIELDS:
      raise ValueError(
        f"data has no field {key!r}{_close(key, _FIELDS)}; the fields are "
        f"{', '.join(_FIELDS)}"
      )
    if not isinstance(data[key], str):
      raise ValueError(f"data.{key}={data[key]!r}: wanted text")
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


def mixture(
  data: Mapping[str, Any],
) -> list[tuple[dict[str, Any], float, str | None]]:
  """Lists the data sets of a description, several if it is of a mixture.

  Returns:
    Description, weight, and `pp` or None, of each.

  Raises:
    ValueError: a description that is not right; it is named.
  """
  data = dict(data)
  if data.get("mixture") is None:
    return [(check(data), 1.0, None)]
  if others := [k for k, v in data.items() if v is not None and k != "mixture"]:
    raise ValueError(f"data.{others[0]} does not apply to data.mixture")
  if not isinstance(data["mixture"], list | tuple) or not data["mixture"]:
    raise ValueError(
      f"data.mixture={data['mixture']!r}: wanted a list of data descriptions"
    )
  sets = []
  for i, part in enumerate(data["mixture"]):
    if not isinstance(part, Mapping | ml_collections.ConfigDict):
      raise ValueError(f"data.mixture[{i}]={part!r}: wanted a dict")
    part = dict(part)
    weight, pp = part.pop("weight", None), part.pop("pp", None)
    is_number = isinstance(weight, int | float) and weight is not True
    if not is_number or not 0 < weight < math.inf:
      raise ValueError(
        f"data.mixture[{i}].weight={weight!r}: wanted a number > 0"
      )
    if not isinstance(pp, str | None):
      raise ValueError(f"data.mixture[{i}].pp={pp!r}: wanted text")
    with at_member(i, 2):  # Also if it is the only one.
      sets.append((check(part), weight, pp))
  return sets


@contextlib.contextmanager
def at_member(i: int, count: int) -> Iterator[None]:
  """Names the data set of a mixture of `count` that a ValueError is about."""
  try:
    yield
  except ValueError as e:
    if count == 1:
      raise
    raise ValueError(f"data.mixture[{i}]: {e}") from e


def source(data: Mapping[str, Any]) -> str:
  """Returns the source of a description as messages name it."""
  return next(f"data.{key}={data[key]!r}" for key in _SOURCES if key in data)


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
      f"{_close(stem, names)}"
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


def _module_builder(module, data_dir):
  field = f"data.module={module!r}"
  module, _, version = module.partition(":")
  module, _, config = module.partition("/")
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
  make = functools.partial(
    builder_class,
    data_dir=data_dir,
    config=config or None,
    version=version or None,
  )
  try:
    builder = make()
  except _UNREADABLE as e:
    name = module.rpartition(".")[2]
    raise _unreadable(field, name, data_dir) from e
  except (AssertionError, ValueError) as e:  # No such version, or config.
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
  for description, _, _ in mixture(data):
    label = dict(get_builder(description).info.features).get("label")
    is_class = isinstance(label, tfds.features.ClassLabel)
    found[source(description)] = label.num_classes if is_class else None
  if len(set(found.values())) > 1:
    raise ValueError(
      "a mixture wants data sets of the same classes; it has "
      + ", ".join(f"{n} of {name}" for name, n in found.items())
    )
  return next(iter(found.values()))


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
  return sum(len(positions) for _, positions in slices(builder, data))


def slices(builder, data) -> list[tuple[str, range]]:
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


def files(builder, data) -> dict[str, list[tuple[str, int]]]:
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


def folder_examples(builder, data) -> list[tuple[str, int]]:
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


@functools.lru_cache
def _warn_once(message):
  _LOG.warning("%s", message)


def broken_error(data, broken, total):
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
