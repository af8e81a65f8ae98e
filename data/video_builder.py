"""The TFDS builder of video sets: annotated videos as JPEG frames.

`VideoBuilder` decodes all videos of annotation files, and reports the ones that
it could not store.
"""

import csv
import dataclasses
import datetime
import functools
import io
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from lookup_vit import loops
from lookup_vit.video_frames import EXTENSIONS, find_ffmpeg, read_frames

_LOG = logging.getLogger("lookup_vit")

REPORT = "missing_videos.tsv"

# From one line on the progress to the next.
_LOG_SECONDS = 10


class Clip(NamedTuple):
  """A video that an annotation names.

  Attributes:
    video_id: unique in its split.
    features: the features of its example, but for `video`.
    path: where it is, or would be.
    found: whether it is there.
  """

  video_id: str
  features: dict[str, Any]
  path: str
  found: bool


class Loss(NamedTuple):
  """A line of the report: an annotated video that is not in the data."""

  split: str
  video_id: str
  reason: str
  file: str


@dataclasses.dataclass(eq=False)
class VideoConfig(tfds.core.BuilderConfig):
  """How the frames are stored; `name` follows from it unless given.

  Attributes:
    short_side: pixels of the frames' shorter side; smaller videos keep their
      size. None: all keep it.
    fps: frames per second. None: the videos' own frames.
    qscale: ffmpeg's quality of JPEG, from 2 (best) to 31.
    max_seconds: what comes later in a video is left out.
  """

  name: str = ""
  short_side: int | None = 256
  fps: float | None = None
  qscale: int = 3
  max_seconds: float = 60.0

  def __post_init__(self):
    for field, valid, wanted in (
      ("short_side", lambda v: v is None or v >= 1, "None, or at least 1"),
      ("fps", lambda v: v is None or v > 0, "None, or more than 0"),
      ("qscale", lambda v: 2 <= v <= 31, "2 (best) to 31"),
      ("max_seconds", lambda v: v > 0, "more than 0"),
    ):
      value = getattr(self, field)
      if not valid(value):
        raise ValueError(f"{field} is {value!r}; wanted {wanted}")
    if not self.name:
      size = "full" if self.short_side is None else f"short{self.short_side}"
      rate = "own_fps" if self.fps is None else f"fps{self.fps:g}"
      self.name = f"{size}_{rate}"
      # What differs from the default; the class holds that.
      if self.qscale != type(self).qscale:
        self.name += f"_q{self.qscale}"
      if self.max_seconds != type(self).max_seconds:
        self.name += f"_max{self.max_seconds:g}s"


def frame_options(config: VideoConfig) -> dict[str, Any]:
  """Returns the options of `read_frames` that a config has."""
  names = ("short_side", "fps", "qscale", "max_seconds")
  return {name: getattr(config, name) for name in names}


def _read_clip(
  clip: Clip, split: str, options: dict[str, Any]
) -> tuple[str, dict[str, Any]] | Loss:
  """Returns the key and the example of a clip, or why there is none."""
  if not clip.found:
    return Loss(split, clip.video_id, "missing", clip.path)
  try:
    frames = read_frames(clip.path, **options)
  except ValueError as e:  # Not OSError: what another try may get right.
    reason = "unreadable: " + " ".join(str(e).split())
    reason = reason.replace(f"{clip.path}: ", "", 1)
    return Loss(split, clip.video_id, reason, clip.path)
  return clip.video_id, {"video": frames, **clip.features}


def _write_losses(losses: Iterable[Loss], path: str, total: int):
  """Writes a report; fails where nothing but losses is left of a split."""
  losses = sorted(losses)
  if len(losses) == total:
    first = losses[0]
    raise ValueError(
      f"none of the {total} videos of split {first.split!r} can be read. The "
      f"first: {first.file}: {first.reason}"
    )
  text = io.StringIO()
  writer = csv.writer(text, delimiter="\t", lineterminator="\n")
  writer.writerows(losses)
  epath.Path(path).write_text(text.getvalue())


class VideoBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Stores the clips of annotation files as JPEG frames.

  A subclass gives `_info` and `_clips`.

  Without options for Beam the videos are decoded on this machine, on all its
  cores, and the data pass through temporary files: the in-process runner of
  Beam would hold all of them in memory.
  """

  _use_beam = False

  @classmethod
  def frame_options(cls, config: str = "") -> dict[str, Any]:
    """Returns the options of `read_frames` for a config, "" for the first."""
    name = config or cls.BUILDER_CONFIGS[0].name
    return frame_options(cls.builder_configs[name])

  def _clips(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Sequence[Clip]]:
    """Returns the annotated clips of each split."""
    raise NotImplementedError

  def _download_and_prepare(self, dl_manager, download_config):
    self._use_beam = bool(
      download_config.beam_runner or download_config.beam_options
    )
    super()._download_and_prepare(dl_manager, download_config)
    # One report, in the folder that TFDS is about to rename.
    parts = [self._losses_path(split) for split in self.info.splits]
    report = "".join(epath.Path(part).read_text() for part in parts)
    path = self.data_path / REPORT
    path.write_text("\t".join(Loss._fields) + "\n" + report)
    for split, part in zip(self.info.splits, parts, strict=True):
      lost = epath.Path(part).read_text().count("\n")
      stored = self.info.splits[split].num_examples
      _LOG.log(
        logging.WARNING if lost else logging.INFO,
        "%s: stored %d of %d videos; %d are missing or unreadable, see %s",
        split,
        stored,
        stored + lost,
        lost,
        REPORT,
      )
      epath.Path(part).unlink()

  def _losses_path(self, split: str) -> str:
    return os.fspath(self.data_path / f"lost_{split}.tsv")

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    find_ffmpeg()  # Fails now rather than after the annotations are read.
    splits = self._clips(dl_manager)
    for split, clips in splits.items():
      missing = sum(not clip.found for clip in clips)
      if missing == len(clips):
        raise ValueError(
          f"none of the {len(clips)} videos of split {split!r} is there. "
          f"Searched {os.path.dirname(clips[0].path)} and the folders in it, "
          f"for files such as {os.path.basename(clips[0].path)} "
          f"({', '.join(EXTENSIONS)})"
          + (
            ". Move its annotation file away to leave the split out"
            if split == "test"
            else ""
          )
        )
      _LOG.info("%s: %d videos, %d of them missing", split, len(clips), missing)
    return {
      split: self._generate_examples(split, clips)
      for split, clips in splits.items()
    }

  def _generate_examples(self, split: str, clips: Sequence[Clip]):
    options = frame_options(self.builder_config)
    read = functools.partial(_read_clip, split=split, options=options)
    write = functools.partial(
      _write_losses, path=self._losses_path(split), total=len(clips)
    )
    if self._use_beam:
      return _beam_examples(clips, read, write)
    return _local_examples(clips, read, write)


def _local_examples(clips, read, write):
  losses = []
  start = last = time.monotonic()
  try:
    for done, result in enumerate(loops.in_threads(read, clips), 1):
      if isinstance(result, Loss):
        losses.append(result)
      else:
        yield result
      now = time.monotonic()
      if now - last > _LOG_SECONDS:
        last = now
        eta = round((now - start) / done * (len(clips) - done))
        eta = datetime.timedelta(seconds=eta)
        _LOG.info("read %d of %d videos, ETA %s", done, len(clips), eta)
  finally:
    write(losses)


def _beam_examples(clips, read, write):
  import apache_beam as beam  # Reading prepared data does without.

  def expand(root):
    results = (
      root
      | "Clips" >> beam.Create(clips)
      | "Spread" >> beam.Reshuffle()
      | "Read" >> beam.Map(read)
    )
    _ = (
      results
      | "Losses" >> beam.Filter(lambda result: isinstance(result, Loss))
      | "Gather" >> beam.combiners.ToList()
      | "Report" >> beam.Map(write)
    )
    return results | "Examples" >> beam.Filter(
      lambda result: not isinstance(result, Loss)
    )

  return beam.ptransform_fn(expand)()


def read_text(path: epath.Path, wanted: str) -> str:
  """Reads an annotation file.

  Args:
    path: the file.
    wanted: what it should be, for the error.

  Raises:
    ValueError: if it is no text in UTF-8.
  """
  try:
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise ValueError(f"{path} is not UTF-8 ({e}); wanted {wanted}") from e


def find_file(folders: Iterable[epath.Path], names: Sequence[str]):
  """Returns the first path FOLDER/NAME that exists, or None."""
  for folder in folders:
    for name in names:
      if (folder / name).exists():
        return folder / name
  return None
