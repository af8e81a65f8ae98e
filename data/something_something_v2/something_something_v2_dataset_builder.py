"""Something-Something v2: short videos of hands and objects, as JPEG frames.

Annotation files and videos are fetched by hand: see README.md in this folder.
Build it from the root of the repository with

    tfds build data/something_something_v2 --manual_dir=DIR

and name it in a config as `module="data.something_something_v2"`.
"""

import csv
import dataclasses
import io
import json
import logging
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

try:
  from data import video_builder
  from lookup_vit import video_frames
except ModuleNotFoundError:
  # `tfds build` imports this file alone, without the repository's root.
  sys.path.append(os.fspath(pathlib.Path(__file__).resolve().parents[2]))
  from data import video_builder
  from lookup_vit import video_frames

_LOG = logging.getLogger("lookup_vit")

_DESCRIPTION = """\
Videos of a few seconds in which people do basic things with everyday objects,
each with one of 174 templates such as "Holding something next to something", as
JPEG frames. `text` is the template with the objects in place. The labels of the
test split are -1 unless its answers were among the annotations.
`missing_videos.tsv`, beside the data, lists the annotated videos that are not
in them.
"""

_CITATION = """\
@inproceedings{goyal2017something,
  author = {Goyal, Raghav and Ebrahimi Kahou, Samira and Michalski, Vincent and
    Materzynska, Joanna and Westphal, Susanne and Kim, Heuna and Haenel,
    Valentin and Fruend, Ingo and Yianilos, Peter and Mueller-Freitag, Moritz
    and Hoppe, Florian and Thurau, Christian and Bax, Ingo and Memisevic,
    Roland},
  title = {The "Something Something" Video Database for Learning and Evaluating
    Visual Common Sense},
  booktitle = {ICCV},
  year = {2017},
}
"""

_VIDEOS = "20bn-something-something-v2"
_PREFIX = "something-something-v2-"


@dataclasses.dataclass(eq=False)
class SomethingSomethingConfig(video_builder.VideoConfig):
  """How the frames are stored: see `video_builder.VideoConfig`."""

  # Those of the videos themselves.
  short_side: int | None = 240
  fps: float | None = 12.0
  # Longer than any of them.
  max_seconds: float = 30.0


class Builder(video_builder.VideoBuilder):
  """Builds the set from the official annotations and a folder of videos."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  # One, because `tfds build` builds all that are listed here.
  BUILDER_CONFIGS = [
    SomethingSomethingConfig(
      description="Short side 240 pixels, 12 frames per second."
    )
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = """\
  labels/ with labels.json, train.json, validation.json and test.json, and
  20bn-something-something-v2/ with the videos, named ID.webm: see
  data/something_something_v2/README.md.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "video": tfds.features.Video(
            shape=(None, None, None, 3), encoding_format="jpeg"
          ),
          # The names come with the annotations, and later with the data.
          "label": tfds.features.ClassLabel(),
          "text": tfds.features.Text(),
          "video_id": tfds.features.Text(),
        }
      ),
      supervised_keys=("video", "label"),
      homepage="https://www.qualcomm.com/developer/software/"
      "something-something-v-2-dataset",
      citation=_CITATION,
    )

  def _clips(self, dl_manager: tfds.download.DownloadManager):
    manual_dir = dl_manager.manual_dir
    labels = read_labels(_find(manual_dir, "labels.json"))
    self.info.features["label"].names = list(labels)
    videos = video_frames.list_videos(manual_dir / _VIDEOS)
    splits = {}
    for split in ("train", "validation", "test"):
      file = _find(manual_dir, f"{split}.json", optional=split == "test")
      if file is None:
        _LOG.warning("no test.json in %s: no split 'test'", manual_dir)
        continue
      answers = None
      if split == "test":
        answers = {}
        path = _find(manual_dir, "test-answers.csv", optional=True)
        if path is None:
          _LOG.warning("no test-answers.csv: the labels of 'test' are -1")
        else:
          answers = read_answers(path, labels)
      splits[split] = [
        video_builder.Clip(
          features["video_id"],
          features,
          videos.get(features["video_id"])
          or os.fspath(manual_dir / _VIDEOS / f"{features['video_id']}.webm"),
          features["video_id"] in videos,
        )
        for features in read_annotations(file, labels, answers)
      ]
    return splits


def _find(manual_dir, name, optional=False):
  """Returns the path of an annotation file of the older or newer release."""
  folders = (manual_dir, manual_dir / "labels", manual_dir / "annotations")
  path = video_builder.find_file(folders, (_PREFIX + name, name))
  if path is None and not optional:
    raise ValueError(
      f"no {name} or {_PREFIX}{name} in {manual_dir} or its labels/ or "
      "annotations/; wanted the annotations of Something-Something v2"
    )
  return path


def _read_json(file, kind, wanted):
  text = video_builder.read_text(file, wanted)
  try:
    content = json.loads(text)
  except json.JSONDecodeError as e:
    raise ValueError(f"{file} is not JSON: {e}; wanted {wanted}") from e
  if not isinstance(content, kind) or not content:
    raise ValueError(
      f"{file} holds {'no' if not content else 'a'} "
      f"{type(content).__name__}; wanted {wanted}"
    )
  return content


def read_labels(file: epath.Path) -> dict[str, int]:
  """Reads labels.json: the label of each template, sorted by label.

  Raises:
    ValueError: unless the labels are 0 to n - 1.
  """
  wanted = 'an object such as {"Closing something": "5", ...}'
  content = _read_json(file, dict, wanted)
  try:
    labels = {name.strip(): int(label) for name, label in content.items()}
  except (TypeError, ValueError) as e:
    raise ValueError(f"{file}: {e}; wanted {wanted}") from e
  if sorted(labels.values()) != list(range(len(content))) or "" in labels:
    raise ValueError(
      f"{file}: {len(content)} names with {len(set(labels.values()))} labels "
      f"from {min(labels.values())} to {max(labels.values())}; wanted each of "
      f"0 to {len(content) - 1} once"
    )
  return dict(sorted(labels.items(), key=lambda item: item[1]))


def read_answers(file: epath.Path, labels: Mapping[str, int]) -> dict[str, int]:
  """Reads test-answers.csv, lines of ID;TEMPLATE: the label of each video.

  Raises:
    ValueError: if a line is not of that form, or its template no label.
  """
  text = video_builder.read_text(file, "lines of ID;TEMPLATE")
  answers = {}
  rows = csv.reader(io.StringIO(text, newline=""), delimiter=";")
  for row in rows:
    if len(row) != 2 or row[1].strip() not in labels:
      raise ValueError(
        f"{file}, line {rows.line_num} is {';'.join(row)!r}; wanted an id and "
        f"one of the {len(labels)} templates of labels.json"
      )
    answers[row[0].strip()] = labels[row[1].strip()]
  return answers


def read_annotations(
  file: epath.Path,
  labels: Mapping[str, int],
  answers: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
  """Reads the annotations of a split.

  Args:
    file: a list of objects with `id`, and `template` and `label` (the text)
      unless answers are given.
    labels: the label of each template, without the brackets.
    answers: the label of each id, for a file that has none; -1 where there is
      no answer.

  Returns:
    `video_id`, `label` and `text` of each video, in the file's order.

  Raises:
    ValueError: if the file is not of that form, if a template is no label, or
      if an id is there twice.
  """
  wanted = "a list of objects with 'id'" + (
    ", 'template' and 'label'" if answers is None else ""
  )
  videos = {}
  for i, entry in enumerate(_read_json(file, list, wanted)):
    where = f"{file}, entry {i}"
    try:
      video_id = str(entry["id"])
      if answers is None:
        template = entry["template"].replace("[", "").replace("]", "").strip()
        text = entry["label"]
    except (AttributeError, KeyError, TypeError) as e:
      raise ValueError(f"{where} is {entry!r}; wanted {wanted}") from e
    if answers is not None:
      label, text = answers.get(video_id, -1), ""
    elif template in labels:
      label = labels[template]
    else:
      raise ValueError(
        f"{where}: template {entry['template']!r} is none of the {len(labels)} "
        "of labels.json"
      )
    if video_id in videos:
      raise ValueError(f"{where}: id {video_id!r} is there twice")
    videos[video_id] = {"video_id": video_id, "label": label, "text": text}
  return list(videos.values())
