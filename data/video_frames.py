"""Videos as JPEG frames, and the TFDS builder that stores them.

`read_frames` decodes one video with ffmpeg. `VideoBuilder` does so for all
videos of annotation files, and reports the ones it could not store.
"""

import collections
import csv
import dataclasses
import functools
import io
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

_LOG = logging.getLogger("lookup_vit")

EXTENSIONS = (".mp4", ".webm", ".mkv", ".avi")
REPORT = "missing_videos.tsv"

# Containers whose file is all there is to read. Others, such as playlists,
# name further files, and a file's extension does not decide what it is.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,asf"
# For clips of a few seconds, so that a broken file cannot stop a build.
_TIMEOUT_SECONDS = 600


@functools.cache
def find_ffmpeg() -> str:
  """Returns the ffmpeg to call: that on PATH, else that of imageio-ffmpeg.

  Raises:
    RuntimeError: if there is neither.
  """
  path = shutil.which("ffmpeg")
  if path:
    return path
  try:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()
  except (ImportError, RuntimeError) as e:
    raise RuntimeError(
      "reading videos wants ffmpeg, and there is no `ffmpeg` on PATH. Install "
      "it, or run `pip install imageio-ffmpeg`, which brings one."
    ) from e


@functools.cache
def _keep_all_frames(ffmpeg: str) -> tuple[str, str]:
  """Returns the option that says to repeat and drop no frame."""
  # It was renamed in 5.1, and the old name is gone by now.
  help_text = subprocess.run(
    [ffmpeg, "-hide_banner", "-h", "long"],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    check=False,
  ).stdout
  name = "-fps_mode" if b"-fps_mode" in help_text else "-vsync"
  return name, "passthrough"


def _filters(short_side: int | None, fps: float | None) -> str:
  """Returns the chain of ffmpeg's filters."""
  # Repeats and drops frames until they are evenly spaced.
  filters = [] if fps is None else [f"fps={fps!r}"]
  size = ""
  if short_side is not None:
    # -1: what keeps the aspect ratio.
    size = (
      f"w='if(lte(iw,ih),min(iw,{short_side}),-1)':"
      f"h='if(lte(iw,ih),-1,min(ih,{short_side}))':flags=bicubic:"
    )
  # Decoders of JPEG expect BT.601 at full range, whatever the video has.
  filters.append(f"scale={size}out_color_matrix=bt601:out_range=full")
  filters.append("format=yuvj420p")
  return ",".join(filters)


def read_frames(
  path: str,
  *,
  short_side: int | None = None,
  fps: float | None = None,
  qscale: int = 3,
  max_seconds: float | None = None,
) -> list[bytes]:
  """Decodes a video to JPEG frames.

  Rotation that the file asks for is applied. The first video stream counts.

  Args:
    path: an mp4, webm, mkv or avi file; on this machine, or wherever
      TensorFlow can read.
    short_side: pixels of the frames' shorter side, the aspect ratio kept;
      smaller videos keep their size. None: all keep it.
    fps: frames per second, evenly spaced also where the video's are not. None:
      the video's own frames.
    qscale: ffmpeg's quality of JPEG, from 2 (best) to 31.
    max_seconds: leave out what comes later.

  Returns:
    One JPEG file per frame, in order.

  Raises:
    RuntimeError: if there is no ffmpeg.
    ValueError: if the video cannot be read, or has no frames.
  """
  if "://" in path:
    with tempfile.TemporaryDirectory() as folder:
      local = os.path.join(folder, "video")
      epath.Path(path).copy(local)
      return read_frames(
        local,
        short_side=short_side,
        fps=fps,
        qscale=qscale,
        max_seconds=max_seconds,
      )
  command = [find_ffmpeg(), "-nostdin", "-hide_banner", "-loglevel", "error"]
  command += ["-threads", "1", "-filter_threads", "1"]
  command += ["-protocol_whitelist", "file,pipe"]
  command += ["-format_whitelist", _CONTAINERS]
  if max_seconds is not None:
    command += ["-t", repr(float(max_seconds))]
  # The prefix, so that no name is taken for an option or another protocol.
  command += ["-i", "file:" + os.path.abspath(path), "-map", "0:V:0"]
  command += ["-vf", _filters(short_side, fps)]
  command += _keep_all_frames(find_ffmpeg())
  if max_seconds is not None and fps is not None:
    command += ["-frames:v", str(max(1, round(fps * max_seconds)))]
  command += ["-c:v", "mjpeg", "-q:v", str(qscale), "-threads", "1"]
  command += ["-f", "image2pipe", "pipe:1"]
  try:
    done = subprocess.run(
      command,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      timeout=_TIMEOUT_SECONDS,
      check=False,
    )
  except subprocess.TimeoutExpired as e:
    raise ValueError(f"{path}: not decoded in {e.timeout:.0f} s") from e
  if done.returncode:
    errors = done.stderr.decode("utf-8", "replace").strip()
    # The first line is the cause; without the address of its object.
    reason = re.sub(r"^\[[^]]*\] ", "", errors.partition("\n")[0])
    raise ValueError(
      f"{path}: ffmpeg failed ({done.returncode}): {reason or 'no message'}"
    )
  frames = split_jpegs(done.stdout)
  if not frames:
    raise ValueError(f"{path}: no frames")
  return frames


def split_jpegs(stream: bytes) -> list[bytes]:
  """Splits the JPEG files of a stream, end to end as ffmpeg writes them.

  Raises:
    ValueError: if the stream is not made of whole files.
  """
  if not stream:
    return []
  start, end = b"\xff\xd8", b"\xff\xd9"
  if not (stream.startswith(start) and stream.endswith(end)):
    raise ValueError("wanted whole JPEG files, end to end")
  # Inside a file, an end is never followed by a start.
  return [start + f + end for f in stream[2:-2].split(end + start)]


def list_videos(folder: epath.PathLike) -> dict[str, str]:
  """Finds the videos of a folder and of the folders in it.

  Each folder is listed once; files are not looked at.

  Args:
    folder: a folder, which need not exist.

  Returns:
    The paths of the videos by their names without extension. Of several with
    one name, the one in the outer folder, or else the alphabetically first.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    return {}
  videos = {}
  folders = []
  for path in sorted(folder.iterdir(), key=os.fspath):
    stem, extension = os.path.splitext(path.name)
    if extension.lower() in EXTENSIONS:
      videos.setdefault(stem, os.fspath(path))
    elif path.is_dir():
      folders.append(path)
  for path in folders:
    for stem, video in list_videos(path).items():
      videos.setdefault(stem, video)
  return videos


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


def _in_threads(
  function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
  """Yields `function(item)` in order, some items ahead, never all of them."""
  # Threads, because the work is in processes of ffmpeg.
  workers = os.cpu_count() or 1
  with futures.ThreadPoolExecutor(workers) as pool:
    pending = collections.deque()
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) > 2 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


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

  def _clips(self, manual_dir: epath.Path) -> dict[str, Sequence[Clip]]:
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
    splits = self._clips(dl_manager.manual_dir)
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
    config = self.builder_config
    options = {
      name: getattr(config, name)
      for name in ("short_side", "fps", "qscale", "max_seconds")
    }
    read = functools.partial(_read_clip, split=split, options=options)
    write = functools.partial(
      _write_losses, path=self._losses_path(split), total=len(clips)
    )
    if self._use_beam:
      return _beam_examples(clips, read, write)
    return _local_examples(clips, read, write)


def _local_examples(clips, read, write):
  losses = []
  try:
    for done, result in enumerate(_in_threads(read, clips), 1):
      if isinstance(result, Loss):
        losses.append(result)
      else:
        yield result
      if done % 1000 == 0:
        _LOG.info("read %d of %d videos", done, len(clips))
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
