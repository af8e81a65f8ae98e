"""Your own videos, in folders of classes, as JPEG frames.

    FOLDER/SPLIT/CLASS/*.mp4 (.webm, .mkv, .avi, .mov)

Name it in a config as `dict(module="data.video_folder", folder=FOLDER,
split=SPLIT)`: it is built on first use, and again when the folder has changed.
"""

import csv
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from data import folders, video_builder
from lookup_vit import video_frames

_LOG = logging.getLogger("lookup_vit")

_DESCRIPTION = """\
Videos of a folder of folders of classes, as JPEG frames. `video_id` is the
video's path below the folder of its split. `missing_videos.tsv`, beside the
data, lists the videos that could not be read.
"""

_WANTED = (
  "wanted the layout FOLDER/SPLIT/CLASS/*.mp4 "
  f"({', '.join(e for e in video_frames.EXTENSIONS if e != '.mp4')})"
)


# Of `video_builder.VideoConfig`.
_FRAMES = dict(fps=25.0)


class Video(NamedTuple):
  """A video of a folder.

  Attributes:
    parts: the names along its path below the folder.
    path: where it is.
    size: in bytes.
    changed: when it was, as precisely as the file system says.
  """

  parts: tuple[str, ...]
  path: epath.Path
  size: int
  changed: int


def list_folder(folder: str) -> list[Video]:
  """Lists the videos of a folder FOLDER/SPLIT/CLASS/*.mp4.

  Other files are ignored, and so are names that begin with a dot.

  Raises:
    ValueError: there is no folder, no video in it, a video in another place, or
      a split that TFDS could not name.
  """
  root = epath.Path(os.path.expanduser(folder))
  if not folder or not root.is_dir():
    raise ValueError(f"{folder!r} is no directory; {_WANTED}")
  videos = sorted(_walk(root, ()))
  if not videos:
    found = sorted(path.name for path in root.iterdir())
    more = ", ..." if len(found) > 10 else ""
    raise ValueError(
      f"{folder} holds no videos; {_WANTED}; found "
      f"{', '.join(found[:10]) or 'nothing'}{more}"
    )
  misplaced = ["/".join(v.parts) for v in videos if len(v.parts) != 3]
  if misplaced:
    more = ", ..." if len(misplaced) > 3 else ""
    raise ValueError(
      f"{len(misplaced)} of the {len(videos)} videos in {folder} are not in a "
      f"folder SPLIT/CLASS; {_WANTED}; found {', '.join(misplaced[:3])}{more}"
    )
  folders.check_splits(folder, {video.parts[0] for video in videos})
  return videos


def _walk(folder: epath.Path, parts: tuple[str, ...]) -> Iterator[Video]:
  for path in folder.iterdir():
    inner = (*parts, path.name)
    if path.name.startswith("."):
      continue
    if path.suffix.lower() in video_frames.EXTENSIONS:
      yield Video(inner, path, *folders.stat(path))
    # One level more than the layout has, to find what is too deep.
    elif len(inner) < 4 and path.is_dir():
      yield from _walk(path, inner)


def _warn_of_others(root: str, videos: list[Video]) -> None:
  """Names classes without videos, and files that are none."""
  visible = [p for p in epath.Path(root).glob("*/*") if p.name[0] != "."]
  classes = {video.parts[:2] for video in videos}
  empty = [p for p in visible if p.is_dir() and p.parts[-2:] not in classes]
  files = [p for folder in visible if folder.is_dir() for p in folder.iterdir()]
  others = [
    p
    for p in files
    if p.name[0] != "." and p.suffix.lower() not in video_frames.EXTENSIONS
  ]
  known = ", ".join(video_frames.EXTENSIONS)
  for paths, what in (
    (empty, "folders of classes are without videos, and no classes"),
    (others, f"files are no videos by their names ({known})"),
  ):
    if paths:
      names = ", ".join(sorted("/".join(p.parts[-3:]) for p in paths)[:3])
      _LOG.warning("%s: %d %s, such as %s", root, len(paths), what, names)


class Builder(video_builder.VideoBuilder, skip_registration=True):
  """Builds the set of a folder, under a name that its files decide.

  Frames are evenly spaced, 25 a second, as those of `data/kinetics400` are; of
  the first 60 seconds; with a short side of 256 pixels at most.

  Args:
    folder: FOLDER of FOLDER/SPLIT/CLASS/*.mp4.
    **kwargs: `data_dir` and `version`, of all builders.

  Raises:
    ValueError: the layout is another, or a config was asked for.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}

  def __init__(self, *, folder: str, **kwargs):
    if kwargs.get("config"):
      raise ValueError(f"no config {kwargs['config']!r}; there are none")
    self._videos = list_folder(folder)
    self._root = folders.whole_path(folder)
    listing = [(*v.parts, v.size, v.changed) for v in self._videos]
    name = folders.config_name(self._root, listing)
    config = video_builder.VideoConfig(name=name, **_FRAMES)
    super().__init__(**{**kwargs, "config": config})

  @classmethod
  def frame_options(cls, config: str = "") -> dict[str, Any]:
    """Returns the options of `read_frames`; there is no `config`."""
    del config
    return video_builder.frame_options(video_builder.VideoConfig(**_FRAMES))

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
            names=sorted({video.parts[1] for video in self._videos})
          ),
          "video_id": tfds.features.Text(),
        }
      ),
      supervised_keys=("video", "label"),
    )

  def _clips(self, dl_manager: tfds.download.DownloadManager):
    splits = {}
    _warn_of_others(self._root, self._videos)
    for video in self._videos:
      split, label, name = video.parts
      clip = video_builder.Clip(
        f"{label}/{name}",
        {"label": label, "video_id": f"{label}/{name}"},
        os.fspath(video.path),
        True,
      )
      splits.setdefault(split, []).append(clip)
    return splits

  def lost(self, split: str) -> dict[str, str]:
    """Returns why videos of a split are not in the data, by their paths."""
    report = (self.data_path / video_builder.REPORT).read_text()
    rows = csv.DictReader(report.splitlines(), delimiter="\t")
    return {r["file"]: r["reason"] for r in rows if r["split"] == split}
