"""Videos as JPEG frames, by ffmpeg."""

import functools
import logging
import os
import re
import shutil
import subprocess
import tempfile

from etils import epath

_LOG = logging.getLogger("lookup_vit")

EXTENSIONS = (".mp4", ".webm", ".mkv", ".avi", ".mov")

# Containers whose file is all there is to read. Others, such as playlists,
# name further files, and a file's extension does not decide what it is.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,asf"
# For clips of a few seconds, so that a broken file cannot stop a build.
_TIMEOUT_SECONDS = 600


@functools.cache
def find_ffmpeg() -> str:
  """Returns the ffmpeg to call: that on PATH, else that of imageio-ffmpeg.

  Raises:
    FileNotFoundError: if there is neither.
  """
  path = shutil.which("ffmpeg")
  if path:
    return path
  try:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()
  except (ImportError, RuntimeError) as e:
    raise FileNotFoundError(
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
  # Pixels that are not square become so.
  filters.append("scale=w='iw*sar':h=ih:flags=bicubic,setsar=1")
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
    path: an mp4, webm, mkv, avi or mov file; on this machine, or wherever
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
    FileNotFoundError: if there is no ffmpeg.
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
  # However much is damaged, the rest counts.
  command += ["-max_error_rate", "1"]
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
