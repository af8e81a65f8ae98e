"""Tests of lookup_vit/video_frames.py on videos that ffmpeg writes here."""

import os
import shutil
import struct
import sys

import imageio_ffmpeg
import numpy as np
import pytest

from data.video_builder import VideoConfig
from lookup_vit import video_frames
from lookup_vit.video_frames import read_frames
from tests.video_files import decode_jpegs, greys, pattern, write_video


def _decode(path, **options):
  return decode_jpegs(read_frames(str(path), **options))


@pytest.mark.parametrize("extension", video_frames.EXTENSIONS)
def test_frames_are_those_of_the_source_in_order(extension, tmp_path):
  source = pattern(20)
  write_video(tmp_path / f"a{extension}", source)
  frames = _decode(tmp_path / f"a{extension}")
  assert frames.shape == source.shape
  np.testing.assert_allclose(greys(frames), greys(source), atol=3)
  # Away from the borders of the colours, which are blurred.
  for rows in (slice(4, 20), slice(28, 44)):
    np.testing.assert_allclose(
      frames[:, rows, 40:60].mean((0, 1, 2)),
      source[:, rows, 40:60].mean((0, 1, 2)),
      atol=6,
    )


def test_frames_agree_with_an_independent_decoder(tmp_path):
  path = tmp_path / "a.webm"
  # Grey, as decoders differ in how they widen the colours.
  noise = np.random.default_rng(0).integers(0, 256, (6, 12, 16, 1), np.uint8)
  write_video(path, noise.repeat(4, 1).repeat(4, 2).repeat(3, 3))
  reader = imageio_ffmpeg.read_frames(str(path))
  width, height = next(reader)["size"]
  want = [np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader]
  frames = _decode(path, qscale=2).astype(float)
  assert len(frames) == len(want) == 6
  assert np.abs(frames - np.stack(want)).mean() < 3


@pytest.mark.parametrize(
  ("size", "short_side", "want"),
  [
    ((48, 64), 24, (24, 32)),
    ((64, 48), 24, (32, 24)),
    ((48, 64), 48, (48, 64)),
    ((48, 64), 1000, (48, 64)),
    ((64, 48), 1000, (64, 48)),
    ((47, 63), None, (47, 63)),
    ((47, 63), 21, (21, 28)),
    ((47, 63), 100, (47, 63)),
  ],
)
def test_short_side_keeps_the_aspect_ratio_and_never_grows(
  size, short_side, want, tmp_path
):
  write_video(tmp_path / "a.mp4", pattern(4, *size))
  frames = _decode(tmp_path / "a.mp4", short_side=short_side)
  assert frames.shape == (4, *want, 3)
  np.testing.assert_allclose(greys(frames), greys(pattern(4)), atol=4)


def test_pixels_become_square(tmp_path):
  frames = pattern(2)
  write_video(tmp_path / "a.mp4", frames, output=["-vf", "setsar=2/1"])
  assert _decode(tmp_path / "a.mp4").shape == (2, 48, 128, 3)
  small = _decode(tmp_path / "a.mp4", short_side=24)
  assert small.shape == (2, 24, 64, 3)
  np.testing.assert_allclose(greys(small), greys(frames), atol=4)


@pytest.mark.parametrize("fps", [5, 12.5, 25, 50, 30000 / 1001])
def test_rate_takes_the_nearest_frames(fps, tmp_path):
  source = greys(pattern(25))
  write_video(tmp_path / "a.mp4", pattern(25), fps=25)
  got = greys(_decode(tmp_path / "a.mp4", fps=fps))
  assert abs(len(got) - fps) <= 1
  # The time of each frame, by its grey, against that of its place.
  times = np.interp(got, source, np.arange(25) / 25)
  np.testing.assert_allclose(
    times, np.arange(len(got)) / fps, atol=0.5 / fps + 0.5 / 25
  )
  assert np.all(np.diff(times) > -0.005)


def test_variable_rate(tmp_path):
  # Ten frames at 25 per second, then ten at 6.25.
  slow = "setpts='if(lt(N,10),N,10+(N-10)*4)/25/TB'"
  passthrough = video_frames._keep_all_frames(video_frames.find_ffmpeg())
  path = tmp_path / "a.mp4"
  write_video(path, pattern(20), output=["-vf", slow, *passthrough])
  source = greys(pattern(20))
  own = greys(_decode(path))
  np.testing.assert_allclose(own, source, atol=3)
  even = greys(_decode(path, fps=25))
  # The last one's duration is for the writer of the file to say.
  assert 46 <= len(even) <= 50
  indices = np.arange(46)
  shown = np.where(indices < 10, indices, 10 + (indices - 8) // 4)
  shown = np.clip(shown, 0, 19)
  # A frame may start one place sooner or later, by rounding.
  steps = np.abs(np.interp(even[:46], source, np.arange(20)) - shown)
  assert steps.max() < 1.2


def test_rotation_is_applied(tmp_path):
  path = tmp_path / "a.mp4"
  write_video(path, pattern(3))
  # What phones write: the picture lies, and the track's matrix says so.
  data = bytearray(path.read_bytes())
  matrix = data.index(b"tkhd") + 4 + 40
  one = 1 << 16
  data[matrix : matrix + 36] = struct.pack(
    ">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30
  )
  path.write_bytes(data)
  frames = _decode(path, short_side=24)
  assert frames.shape == (3, 32, 24, 3)
  # A quarter turn clockwise: left is above, above is right.
  np.testing.assert_allclose(
    frames[:, 2:14, 4:20].mean((1, 2, 3)), greys(pattern(3)), atol=4
  )
  red, blue = frames[0, 24, 20].astype(int), frames[0, 24, 4].astype(int)
  assert red[0] > 150 > 100 > red[2]
  assert blue[2] > 150 > 100 > blue[0]


def test_colours_of_hd_video(tmp_path):
  source = pattern(2)
  for matrix in ("bt709", "smpte170m"):
    path = tmp_path / f"{matrix}.mp4"
    filters = ["-vf", f"scale=out_color_matrix={matrix}"]
    write_video(path, source, output=[*filters, "-colorspace", matrix])
    got = _decode(path)[0, 10, 50].astype(int)
    assert np.abs(got - source[0, 10, 50]).max() <= 6, matrix


def test_long_videos_are_cut(tmp_path):
  path = tmp_path / "a.mp4"
  write_video(path, pattern(25), fps=25)
  assert len(read_frames(str(path), max_seconds=0.4)) == 10
  assert len(read_frames(str(path), max_seconds=0.4, fps=10)) == 4
  assert len(read_frames(str(path), max_seconds=9, fps=25)) == 25


def test_quality_is_that_of_the_files(tmp_path):
  path = tmp_path / "a.mp4"
  noise = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
  write_video(path, noise)
  sizes = [len(read_frames(str(path), qscale=q)[0]) for q in (2, 8, 31)]
  assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
  "name",
  [
    "-y.mp4",
    "-i_000001_000011.mp4",
    "a b'c\"d;$(e).mp4",
    "%03d.mp4",
    "concat:a.mp4|b.mp4",
    "http:x.mp4",
    "pipe:0.mp4",
    "ümlaut.mp4",
  ],
)
def test_names_are_only_names(name, tmp_path, monkeypatch):
  write_video(tmp_path / "source.mp4", pattern(3))
  os.rename(tmp_path / "source.mp4", tmp_path / name)
  monkeypatch.chdir(tmp_path)
  assert len(read_frames(name)) == 3
  assert len(read_frames(str(tmp_path / name))) == 3
  assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"no video" * 500,
    b"ffconcat version 1.0\nfile a.mp4\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n",
  ],
)
def test_what_is_no_video_is_an_error(content, tmp_path):
  # A file that a playlist could name.
  write_video(tmp_path / "a.mp4", pattern(3))
  path = tmp_path / "b.mp4"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"b\.mp4: ffmpeg failed"):
    read_frames(str(path))


def test_damaged_and_absent_videos(tmp_path):
  path = tmp_path / "a.mp4"
  write_video(path, pattern(3))
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(ValueError, match="ffmpeg failed"):
    read_frames(str(path))
  with pytest.raises(ValueError, match="No such file"):
    read_frames(str(tmp_path / "absent.mp4"))


def test_what_is_left_of_a_damaged_video(tmp_path):
  path = tmp_path / "a.mp4"
  noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
  # The index comes first, and what is of the frames is much more.
  write_video(path, noise, output=["-movflags", "faststart"])
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 5].ljust(len(content), b"\0"))
  assert 1 <= len(_decode(path)) < 60 / 3


def test_a_video_that_never_ends_is_an_error(tmp_path, monkeypatch):
  path = tmp_path / "a.mp4"
  write_video(path, pattern(3))
  read_frames(str(path))
  monkeypatch.setattr(video_frames, "_TIMEOUT_SECONDS", 1e-6)
  with pytest.raises(ValueError, match="not decoded in"):
    read_frames(str(path))


def test_remote_files_are_copied_first(tmp_path, monkeypatch):
  write_video(tmp_path / "a.mp4", pattern(3))

  class Remote:
    def __init__(self, path):
      assert path == "gs://bucket/a.mp4"

    def copy(self, target):
      shutil.copy(tmp_path / "a.mp4", target)

  monkeypatch.setattr(video_frames.epath, "Path", Remote)
  assert len(read_frames("gs://bucket/a.mp4")) == 3


@pytest.fixture
def fresh_search():
  video_frames.find_ffmpeg.cache_clear()
  yield
  video_frames.find_ffmpeg.cache_clear()


def test_ffmpeg_on_path_comes_first(fresh_search, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert video_frames.find_ffmpeg() == imageio_ffmpeg.get_ffmpeg_exe()
  video_frames.find_ffmpeg.cache_clear()
  (tmp_path / "ffmpeg").write_text("#!/bin/sh\n")
  (tmp_path / "ffmpeg").chmod(0o755)
  assert video_frames.find_ffmpeg() == str(tmp_path / "ffmpeg")


def test_no_ffmpeg(fresh_search, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
  with pytest.raises(FileNotFoundError, match="pip install imageio-ffmpeg"):
    video_frames.find_ffmpeg()


def test_split_jpegs(tmp_path):
  write_video(tmp_path / "a.mp4", pattern(4))
  frames = read_frames(str(tmp_path / "a.mp4"))
  assert video_frames.split_jpegs(b"".join(frames)) == frames
  assert video_frames.split_jpegs(b"") == []
  with pytest.raises(ValueError, match="whole JPEG"):
    video_frames.split_jpegs(b"".join(frames)[:-1])


def test_list_videos(tmp_path):
  for name in (
    "b/x.mp4",
    "a/x.webm",
    "a/deep/-y.MKV",
    "z.avi",
    "a/z.mp4",
    "a/notes.txt",
    "a/w.mp4.part",
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  videos = video_frames.list_videos(tmp_path)
  assert videos == {
    "x": str(tmp_path / "a/x.webm"),
    "-y": str(tmp_path / "a/deep/-y.MKV"),
    "z": str(tmp_path / "z.avi"),
  }
  assert video_frames.list_videos(tmp_path / "absent") == {}


def test_names_of_configs_say_what_is_in_them():
  assert VideoConfig().name == "short256_own_fps"
  assert VideoConfig(short_side=None, fps=12.5).name == "full_fps12.5"
  config = VideoConfig(short_side=64, fps=8, qscale=9, max_seconds=3)
  assert config.name == "short64_fps8_q9_max3s"
  assert VideoConfig(name="mine", fps=3).name == "mine"


@pytest.mark.parametrize(
  ("field", "value"),
  [("short_side", 0), ("fps", 0), ("fps", -1), ("qscale", 1), ("qscale", 32)]
  + [("max_seconds", 0)],
)
def test_configs_out_of_range(field, value):
  with pytest.raises(ValueError, match=f"{field} is {value}; wanted"):
    VideoConfig(**{field: value})
