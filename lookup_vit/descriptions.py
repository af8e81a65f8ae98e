"""Descriptions of data in a config, checked.

A data description is a dictionary (or ConfigDict) with exactly one source:

  name    a TFDS data set, "cifar10" or "imagenet2012_corrupted/fog_3"
  module  a package with a TFDS `Builder`, "data.digits"; built on first use
          where that needs no files; also "data.imagenet21k/CONFIG:VERSION"
  folder  a directory of images, FOLDER/SPLIT/CLASS/*.jpg (.jpeg, .png)
  module and folder
          a package whose `Builder` takes the folder, "data.video_folder";
          built on first use

and with `split` ("train", "train[:90%]", "train+validation"), for `name` and
`module` optionally `data_dir`, and for `folder` optionally `on_error`: what to
do about broken images or videos, "fail" (the default) or "skip". Fields that
are None count as absent.

Or it is a mixture: `mixture`, a list of data descriptions, each with a `weight`
and optionally with `pp`, a preprocessing string of its own.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

_SOURCES = ("name", "module", "folder")
_FIELDS = (*_SOURCES, "split", "data_dir", "on_error")


def close(word: str, words: Sequence[str]) -> str:
  """Returns what a message says of words like this one, if there are any."""
  found = difflib.get_close_matches(word, words, n=3)
  return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


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
        f"data has no field {key!r}{close(key, _FIELDS)}; the fields are "
        f"{', '.join(_FIELDS)}"
      )
    if not isinstance(data[key], str):
      raise ValueError(f"data.{key}={data[key]!r}: wanted text")
  given = [key for key in _SOURCES if key in data]
  if len(given) != 1 and given != ["module", "folder"]:
    raise ValueError(
      f"data wants exactly one of {', '.join(_SOURCES)}, or a module and its "
      f"folder; got {', '.join(given) or 'none of them'}"
    )
  for wrong, applies in (
    ("data_dir", given != ["folder"]),
    ("on_error", "folder" in given),
  ):
    if wrong in data and not applies:
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
  given = [f"data.{key}={data[key]!r}" for key in _SOURCES if key in data]
  return ", ".join(given)


def is_image_folder(data: Mapping[str, Any]) -> bool:
  """Whether a description is of a folder that is read as it is."""
  return "folder" in data and "module" not in data
