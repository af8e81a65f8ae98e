"""Tiny videos and annotation files in the forms of the real data sets."""

import csv
import io
import json
import pathlib
import subprocess
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from lookup_vit.video_frames import find_ffmpeg

_CODECS = {
  ".mp4": ("-c:v", "libx264", "-crf", "8"),
  ".webm": ("-c:v", "libvpx-vp9", "-crf", "8", "-b:v", "0", "-cpu-used", "8"),
  ".mkv": ("-c:v", "libx264", "-crf", "8"),
  ".avi": ("-c:v", "mpeg4", "-q:v", "2"),
  ".mov": ("-c:v", "libx264", "-crf", "8"),
}

# Of Kinetics-400: the first, the last, one between, and one with signs.
KINETICS_LABELS = {
  "abseiling": 0,
  "air drumming": 1,
  "shooting goal (soccer)": 297,
  "zumba": 399,
}

# labels.json; the real one has 174.
TEMPLATES = {
  "Approaching something with your camera": "0",
  "Holding something next to something": "1",
  "Pushing something so that it almost falls off but doesn't": "2",
  "Laying something on the table on its side, not upright": "3",
}


def pattern(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
  """Returns frames that tell their index and which side is up.

  Returns:
    uint8 `[num_frames, height, width, 3]`: left half grey, brighter from frame
    to frame; right half red above, blue below.
  """
  frames = np.zeros((num_frames, height, width, 3), np.uint8)
  grey = np.linspace(20, 230, num_frames) if num_frames > 1 else [128]
  frames[:, :, : width // 2] = np.rint(grey)[:, None, None, None]
  frames[:, : height // 2, width // 2 :] = 200, 40, 40
  frames[:, height // 2 :, width // 2 :] = 40, 40, 200
  return frames


def greys(frames: np.ndarray) -> np.ndarray:
  """Returns the mean of each frame's left half, but for its border."""
  height, width = frames.shape[1:3]
  part = frames[:, height // 8 : -height // 8, width // 8 : 3 * width // 8]
  return part.mean((1, 2, 3))


def decode_jpegs(jpegs: Sequence[bytes]) -> np.ndarray:
  """Decodes with PIL, which neither ffmpeg nor TensorFlow is."""
  return np.stack([np.asarray(Image.open(io.BytesIO(j))) for j in jpegs])


def write_video(
  path: pathlib.Path,
  frames: np.ndarray,
  fps: float = 25,
  output: Sequence[str] = (),
):
  """Writes an mp4, webm, mkv, avi or mov.

  Args:
    path: the file; its extension decides.
    frames: uint8 `[frames, height, width, 3]`.
    fps: frames per second.
    output: further options of ffmpeg.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  height, width = frames.shape[1:3]
  # Half the colours need an even size.
  pixels = "yuv444p" if height % 2 or width % 2 else "yuv420p"
  command = [find_ffmpeg(), "-nostdin", "-loglevel", "error", "-y"]
  command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
  command += ["-r", str(fps), "-i", "pipe:0", "-threads", "1"]
  command += ["-pix_fmt", pixels, *_CODECS[path.suffix], *output]
  command += ["file:" + str(path.absolute())]
  subprocess.run(command, input=frames.tobytes(), check=True)


def write_kinetics400(
  manual_dir: pathlib.Path,
  clips: Mapping[str, Sequence[tuple[str, str, np.ndarray | None]]],
  fps: float = 25,
) -> dict[str, list[str]]:
  """Writes annotations of Kinetics-400 and its videos.

  Args:
    manual_dir: where to.
    clips: for "train", "val" and "test", the label, the YouTube id and the
      frames of each clip; without frames no video is written.
    fps: frames per second of the videos.

  Returns:
    The names of the clips, YOUTUBEID_START_END, in their order.
  """
  names = {}
  for split, rows in clips.items():
    names[split] = []
    manual_dir.mkdir(parents=True, exist_ok=True)
    with open(manual_dir / f"{split}.csv", "w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(
        ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"]
      )
      for i, (label, youtube_id, frames) in enumerate(rows):
        writer.writerow([label, youtube_id, 7 * i, 7 * i + 10, split, 0])
        name = f"{youtube_id}_{7 * i:06d}_{7 * i + 10:06d}"
        names[split].append(name)
        if frames is not None:
          write_video(manual_dir / split / f"{name}.mp4", frames, fps)
  return names


def write_something_something_v2(
  manual_dir: pathlib.Path,
  videos: Mapping[str, Sequence[tuple[str, str, np.ndarray | None]]],
  fps: float = 12,
  old_names: bool = False,
):
  """Writes annotations of Something-Something v2 and its videos.

  Args:
    manual_dir: where to.
    videos: for "train", "validation" and "test", the id, the template with
      brackets and the frames of each; without frames no video is written.
    fps: frames per second of the videos.
    old_names: the names of the first release instead of the newer one's.
  """
  folder = manual_dir if old_names else manual_dir / "labels"
  prefix = "something-something-v2-" if old_names else ""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{prefix}labels.json").write_text(json.dumps(TEMPLATES))
  for split, rows in videos.items():
    entries = []
    for video_id, template, frames in rows:
      entry = {"id": video_id}
      if split != "test":
        count = template.count("[something]")
        entry["label"] = template.lower().replace("[something]", "a cup")
        entry["template"] = template
        entry["placeholders"] = ["a cup"] * count
      entries.append(entry)
      if frames is not None:
        path = manual_dir / "20bn-something-something-v2" / f"{video_id}.webm"
        write_video(path, frames, fps)
    (folder / f"{prefix}{split}.json").write_text(json.dumps(entries))
