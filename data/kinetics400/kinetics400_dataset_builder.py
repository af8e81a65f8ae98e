"""Kinetics-400: ten-second clips of human actions, as JPEG frames.

Annotation files and videos are fetched by hand: see README.md in this folder.
Build it from the root of the repository with

    tfds build data/kinetics400 --manual_dir=DIR

and name it in a config as `module="data.kinetics400"`.
"""

import csv
import dataclasses
import io
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

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
Clips of about ten seconds from YouTube, each with one of 400 human actions, as
JPEG frames. `video_id` is YOUTUBEID_START_END, the clip's place in the YouTube
video in seconds. Videos vanish from YouTube: `missing_videos.tsv`, beside the
data, lists the annotated clips that are not in them.
"""

_CITATION = """\
@article{kay2017kinetics,
  author = {Kay, Will and Carreira, Joao and Simonyan, Karen and Zhang, Brian
    and Hillier, Chloe and Vijayanarasimhan, Sudheendra and Viola, Fabio and
    Green, Tim and Back, Trevor and Natsev, Paul and Suleyman, Mustafa and
    Zisserman, Andrew},
  title = {The Kinetics Human Action Video Dataset},
  journal = {arXiv:1705.06950},
  year = {2017},
}
"""

# In the order of the labels: data/label_map.txt of
# github.com/deepmind/kinetics-i3d, which is alphabetical in ASCII.
_LABELS = pathlib.Path(__file__).parent / "labels.txt"
_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
# Of the annotations and of the folders; the first releases said "validate".
_NAMES = {
  "train": ("train",),
  "validation": ("val", "validate", "validation"),
  "test": ("test",),
}


@dataclasses.dataclass(eq=False)
class KineticsConfig(video_builder.VideoConfig):
  """How the frames are stored: see `video_builder.VideoConfig`."""

  # As ViViT has it: clips of 250 frames.
  fps: float | None = 25.0
  max_seconds: float = 10.0


class Builder(video_builder.VideoBuilder):
  """Builds Kinetics-400 from the official annotations and a folder of clips."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  # One, because `tfds build` builds all that are listed here.
  BUILDER_CONFIGS = [
    KineticsConfig(description="Short side 256 pixels, 25 frames per second.")
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = """\
  train.csv and val.csv, the annotations of Kinetics-400, and the clips below
  train/ and val/, named YOUTUBEID_SSSSSS_EEEEEE.mp4: see
  data/kinetics400/README.md.
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
          "label": tfds.features.ClassLabel(
            names=_LABELS.read_text().splitlines()
          ),
          "video_id": tfds.features.Text(),
        }
      ),
      supervised_keys=("video", "label"),
      homepage="https://github.com/cvdfoundation/kinetics-dataset",
      citation=_CITATION,
    )

  def _clips(self, dl_manager: tfds.download.DownloadManager):
    manual_dir = dl_manager.manual_dir
    folders = (manual_dir, manual_dir / "annotations")
    replacements = video_frames.list_videos(manual_dir / "replacement")
    splits = {}
    for split, names in _NAMES.items():
      files = [f"{name}.csv" for name in names]
      file = video_builder.find_file(folders, files)
      if file is None and split == "test":
        _LOG.warning("no test.csv in %s: no split 'test'", manual_dir)
        continue
      if file is None:
        raise ValueError(
          f"no {' or '.join(files)} in {manual_dir} or its annotations/; "
          f"wanted the annotations of split {split!r}"
        )
      annotations = read_annotations(file, self.info.features["label"].names)
      if annotations is None and split == "test":
        _LOG.warning("%s has no labels: no split 'test'", file)
        continue
      if annotations is None:
        raise ValueError(f"{file} has no column 'label'")
      videos = {}
      for name in reversed(names):
        videos |= video_frames.list_videos(manual_dir / name)
      # Of clips that are broken in the common copy.
      videos |= replacements
      default = manual_dir / next(
        (name for name in names if (manual_dir / name).is_dir()), names[0]
      )
      splits[split] = [
        video_builder.Clip(
          clip,
          {"label": label, "video_id": clip},
          videos.get(clip) or os.fspath(default / f"{clip}.mp4"),
          clip in videos,
        )
        for clip, label in annotations.items()
      ]
    return splits


def read_annotations(
  file: epath.Path, names: Sequence[str]
) -> dict[str, int] | None:
  """Reads an annotation file of Kinetics.

  Args:
    file: csv with columns label, youtube_id, time_start, time_end, in seconds.
    names: of the classes, by label.

  Returns:
    The label of each clip YOUTUBEID_START_END, in the file's order. None if the
    file has all columns but that of the labels.

  Raises:
    ValueError: if the file is not of that form, if a label is no class, or if
      a clip is there twice with different labels.
  """
  text = video_builder.read_text(file, f"csv with {', '.join(_COLUMNS)}")
  rows = csv.DictReader(io.StringIO(text, newline=""))
  columns = rows.fieldnames or []
  missing = [column for column in _COLUMNS if column not in columns]
  if missing == ["label"]:
    return None
  if missing:
    raise ValueError(
      f"{file} has no column {', '.join(map(repr, missing))}; its first line "
      f"is {','.join(columns)!r}, wanted {','.join(_COLUMNS)}"
    )
  labels = {name: i for i, name in enumerate(names)}
  clips = {}
  for row in rows:
    where = f"{file}, line {rows.line_num}"
    if row["label"] not in labels:
      raise ValueError(
        f"{where}: {row['label']!r} is none of the {len(names)} labels of "
        "data/kinetics400/labels.txt"
      )
    try:
      start, end = (int(row[key]) for key in ("time_start", "time_end"))
    except (TypeError, ValueError) as e:
      raise ValueError(
        f"{where}: time_start and time_end are {row['time_start']!r} and "
        f"{row['time_end']!r}; wanted whole seconds"
      ) from e
    clip = f"{row['youtube_id']}_{start:06d}_{end:06d}"
    label = labels[row["label"]]
    if clips.setdefault(clip, label) != label:
      raise ValueError(
        f"{where}: clip {clip} is {row['label']!r}, and "
        f"{names[clips[clip]]!r} in an earlier line"
      )
  if not clips:
    raise ValueError(f"{file} names no clips")
  return clips
