"""Tests of data/video_folder, and of how a config reads it."""

import contextlib
import logging
import os
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data import video_builder
from data.video_folder import Builder
from lookup_vit import datasets, input_pipeline, record_index
from lookup_vit.video_frames import find_ffmpeg
from tests.video_files import decode_jpegs, greys, pattern, write_video

MODULE = "data.video_folder"
# Path, frames, and whether another rate; in two splits, one class in each.
VIDEOS = {
  "train/cat/a.mp4": pattern(6),
  "train/cat/B C.WEBM": pattern(4, 47, 63),
  "train/dog's ü/a.avi": pattern(8, 64, 48),
  "train/dog's ü/b.mkv": pattern(1),
  "val/cat/a.mov": pattern(5),
  "val/fish/a.mp4": pattern(3),
}


def write_folder(root):
  for name, frames in VIDEOS.items():
    path = root / name
    write_video(path.with_suffix(path.suffix.lower()), frames)
    path.with_suffix(path.suffix.lower()).rename(path)
  # What is no video is nobody's business.
  (root / "train/cat/notes.txt").write_text("notes")
  (root / "train/cat/._a.mp4").write_bytes(b"of another system")
  (root / ".cache").mkdir()
  (root / ".cache/x.mp4").write_bytes(b"")
  return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("My Videos"))


@pytest.fixture
def copy(folder, tmp_path):
  """One that a test may change."""
  return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("data"))


def describe(folder, data_dir, split="train", **fields):
  fields = dict(folder=str(folder), data_dir=str(data_dir), **fields)
  return dict(module=MODULE, split=split, **fields)


@contextlib.contextmanager
def counted(monkeypatch):
  """Counts the videos that are decoded."""
  paths = []
  read = video_builder.read_frames

  def read_frames(path, **options):
    paths.append(path)
    return read(path, **options)

  monkeypatch.setattr(video_builder, "read_frames", read_frames)
  yield paths


def test_a_config_reads_all_videos(folder, data_dir, caplog):
  caplog.set_level(logging.INFO, "lookup_vit")
  data = describe(folder, data_dir)
  assert datasets.num_examples(data) == 4
  assert datasets.num_examples({**data, "split": "train[:50%]"}) == 2
  assert datasets.num_examples({**data, "split": "train+val"}) == 6
  assert datasets.num_classes(data) == 3
  assert record_index.wanted(data)
  # Built once, with all splits.
  lines = [r.getMessage() for r in caplog.records if r.name == "lookup_vit"]
  assert sum("building data.video_folder" in line for line in lines) == 1
  assert not any("left out" in line for line in lines)

  builder = datasets.get_builder(data)
  assert builder.info.features["label"].names == ["cat", "dog's ü", "fish"]
  found = {}
  for split in ("train", "val"):
    examples = builder.as_dataset(
      split=split, decoders={"video": tfds.decode.SkipDecoding()}
    )
    for e in tfds.as_numpy(examples):
      found[f"{split}/{e['video_id'].decode()}"] = e
  assert set(found) == set(VIDEOS)
  for name, source in VIDEOS.items():
    example = found[name]
    label = builder.info.features["label"].int2str(int(example["label"]))
    assert label == name.split("/")[1]
    frames = decode_jpegs(example["video"])
    assert frames.shape == source.shape
    np.testing.assert_allclose(greys(frames), greys(source), atol=5)


def test_clips_of_a_folder(folder, data_dir):
  pp = "central_clip(4)|decode_clip|resize((20,30))|unfold_clip(4)"
  pp += "|keep('image','label')"
  batches, _ = input_pipeline.make_eval(
    describe(folder, data_dir, "val"), pp=pp, batch_size=2
  )
  [batch] = batches
  assert batch["image"].shape == (2, 4, 20, 30, 3)
  assert sorted(batch["label"]) == [0, 2]


def test_rates_become_one(tmp_path):
  # The same second, in 10 and in 50 frames.
  write_video(tmp_path / "v/train/a/slow.mp4", pattern(10), fps=10)
  write_video(tmp_path / "v/train/a/fast.mp4", pattern(50), fps=50)
  builder = datasets.get_builder(describe(tmp_path / "v", tmp_path))
  examples = builder.as_dataset(
    split="train", decoders={"video": tfds.decode.SkipDecoding()}
  )
  for example in tfds.as_numpy(examples):
    assert abs(len(example["video"]) - 25) <= 1


def test_a_folder_that_changed_is_built_again(copy, tmp_path, monkeypatch):
  data = describe(copy, tmp_path)
  with counted(monkeypatch) as paths:
    assert datasets.num_examples(data) == 4
    assert len(paths) == 6
    assert datasets.num_examples(data) == 4
    assert len(paths) == 6
    (copy / "train/cat/more.txt").write_text("no video")
    assert datasets.num_examples(data) == 4
    assert len(paths) == 6
    # Another file, another name, another content of the same size.
    write_video(copy / "train/dog's ü/c.mp4", pattern(2))
    assert datasets.num_examples(data) == 5
    (copy / "train/cat/a.mp4").rename(copy / "train/cat/z.mp4")
    assert datasets.num_examples(data) == 5
    assert len(paths) == 6 + 7 + 7
    os.utime(copy / "train/cat/z.mp4", ns=(1, 1))
    assert datasets.num_examples(data) == 5
    assert len(paths) == 6 + 7 + 7 + 7


def test_what_is_left_out_is_said(copy, tmp_path, caplog):
  (copy / "train/cat/a.m4v").write_bytes(b"")
  (copy / "train/cat/.hidden").write_bytes(b"")
  (copy / "train/eel").mkdir()
  assert datasets.num_classes(describe(copy, tmp_path)) == 3
  lines = [r.getMessage() for r in caplog.records]
  [empty] = [line for line in lines if "without videos" in line]
  assert ": 1 folders of classes" in empty and "train/eel" in empty
  [others] = [line for line in lines if "no videos by their names" in line]
  assert "cat/a.m4v" in others and "hidden" not in others


def test_folders_never_share_what_is_built(folder, copy, tmp_path):
  names = [
    Builder(folder=path, data_dir=tmp_path).builder_config.name
    # Copies keep their times.
    for path in (str(folder), str(copy), f"{folder}/", f"{copy}/../copy")
  ]
  assert names[0] == names[2] != names[1] == names[3]
  assert names[1].startswith("copy_")
  assert names[0].startswith("my_videos")


# --- Broken videos


@pytest.fixture
def broken(copy):
  cut = copy / "train/cat/a.mp4"
  cut.write_bytes(cut.read_bytes()[:900])
  (copy / "train/dog's ü/foreign.mp4").write_bytes(b"no video" * 99)
  (copy / "train/fish").mkdir()
  (copy / "train/fish/empty.webm").write_bytes(b"")
  (copy / "train/fish/link.mp4").symlink_to(copy / "nowhere")
  # Sound alone: a file that is whole and has no frame.
  silence = ["-loglevel", "error", "-f", "lavfi", "-i", "anullsrc", "-t", "0.2"]
  path = str(copy / "train/fish/sound.mp4")
  subprocess.run([find_ffmpeg(), *silence, path], check=True)
  return copy


def test_broken_videos_fail_or_are_skipped(
  broken, tmp_path, monkeypatch, caplog
):
  data = describe(broken, tmp_path)
  with counted(monkeypatch) as paths:
    for _ in range(2):
      with pytest.raises(ValueError) as e:
        datasets.num_examples(data)
    message = str(e.value)
    assert "5 of the 8 files of train cannot be read" in message
    assert "data.on_error='skip'" in message
    for name in ("a.mp4", "foreign.mp4", "empty.webm", "sound.mp4"):
      assert message.count(name) >= 1
    assert "b.mkv" not in message
    # They are of one split.
    assert datasets.num_examples({**data, "split": "val"}) == 2
    skip = {**data, "on_error": "skip"}
    for _ in range(2):
      assert datasets.num_examples(skip) == 3
    # What was read is not read again.
    assert len(paths) == 10
  warnings = [r.getMessage() for r in caplog.records if "left out" in r.message]
  assert len(warnings) == 1
  assert "5 of the 8 files of train" in warnings[0]
  assert "sound.mp4" in warnings[0]
  # A class of which nothing can be read is a class.
  assert datasets.num_classes(skip) == 3

  shutil.rmtree(broken / "train/fish")
  os.remove(broken / "train/dog's ü/foreign.mp4")
  write_video(broken / "train/cat/a.mp4", pattern(3))
  assert datasets.num_examples(data) == 4


def test_nothing_that_can_be_read(tmp_path):
  path = tmp_path / "v/train/a/b.mp4"
  path.parent.mkdir(parents=True)
  path.write_bytes(b"nothing")
  with pytest.raises(ValueError, match="none of the 1 videos of split 'train'"):
    datasets.num_examples(describe(tmp_path / "v", tmp_path, on_error="skip"))


# --- Other layouts


@pytest.mark.parametrize(
  ("names", "words"),
  [
    (None, ["is no directory"]),
    ([], ["holds no videos", "found nothing"]),
    (["train/cat/a.jpg"], ["holds no videos", "found train"]),
    (["cat/a.mp4", "dog/b.mp4"], ["2 of the 2 videos", "found cat/a.mp4, dog"]),
    (["a.webm"], ["1 of the 1 videos", "found a.webm"]),
    (
      ["train/cat/a.mp4", "train/b.mp4", "train/cat/deep/c.mp4"],
      ["2 of the 3 videos", "train/b.mp4, train/cat/deep/c.mp4"],
    ),
    (["a/b/c/d/e.mp4"], ["holds no videos", "found a"]),
    (["my split/cat/a.mp4"], ["my split cannot be a split"]),
    (["all/cat/a.mp4"], ["all cannot be a split"]),
  ],
)
def test_other_layouts(names, words, tmp_path):
  folder = tmp_path / "videos"
  for name in names or []:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
  if names == []:
    folder.mkdir()
  with pytest.raises(ValueError) as e:
    datasets.num_examples(describe(folder, tmp_path))
  message = str(e.value)
  assert message.startswith(f"data.module='{MODULE}', data.folder='{folder}': ")
  if "cannot be" not in words[0]:
    words = [*words, "FOLDER/SPLIT/CLASS/*.mp4", ".webm", ".mov"]
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(module=MODULE), [MODULE, "wants its data.folder"]),
    (dict(module="data.digits", folder="x"), ["does not take a data.folder"]),
    (dict(module=f"{MODULE}/small", folder="."), ["no config 'small'"]),
    (dict(module=f"{MODULE}:9.0.0"), ["wants its data.folder"]),
    (dict(name="cifar10", folder="x"), ["exactly one", "name, folder"]),
    (dict(module=MODULE, on_error="skip"), ["on_error does not apply"]),
    (dict(module=MODULE, folder="x", on_error="no"), ["'no'", "'skip'"]),
  ],
)
def test_wrong_descriptions(fields, words):
  with pytest.raises(ValueError) as e:
    datasets.num_examples({"split": "train", **fields})
  for word in words:
    assert word in str(e.value), str(e.value)


def test_a_version_that_is_not_there(folder, data_dir):
  data = {**describe(folder, data_dir), "module": f"{MODULE}:9.0.0"}
  with pytest.raises(ValueError, match="9.0.0"):
    datasets.num_examples(data)


def test_splits_that_are_not_there(folder, data_dir):
  with pytest.raises(ValueError, match=r"'test'.*train \(4\), val \(2\)"):
    datasets.num_examples(describe(folder, data_dir, "test"))


def test_no_ffmpeg(folder, tmp_path, monkeypatch):
  def fail():
    raise FileNotFoundError("pip install imageio-ffmpeg")

  monkeypatch.setattr(video_builder, "find_ffmpeg", fail)
  with pytest.raises(FileNotFoundError, match="imageio-ffmpeg"):
    datasets.num_examples(describe(folder, tmp_path))
