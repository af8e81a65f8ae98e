"""Tests of data/kinetics400 on a tiny look-alike."""

import csv
import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data.kinetics400 import Builder, KineticsConfig
from lookup_vit import datasets
from tests.video_files import (
  KINETICS_LABELS,
  decode_jpegs,
  greys,
  pattern,
  write_kinetics400,
  write_video,
)

_TFDS = os.path.join(os.path.dirname(sys.executable), "tfds")

_CLIPS = {
  "train": [
    ("zumba", "-abc_d-EFGH", pattern(25)),
    ("abseiling", "--------odd", pattern(20, 47, 63)),
    ("air drumming", "000missing0", None),
    ("air drumming", "00garbage00", None),
    ("shooting goal (soccer)", "0truncated0", pattern(10)),
    ("air drumming", "000replaced", None),
    ("zumba", "000nested00", None),
  ],
  "val": [("shooting goal (soccer)", "vvvvvvvvvvv", pattern(15))],
  "test": [("abseiling", "ttttttttttt", pattern(5))],
}


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("manual")
  names = write_kinetics400(path, _CLIPS)
  train = names["train"]
  garbage = path / "train" / f"{train[3]}.mp4"
  garbage.write_bytes(b"no video" * 100)
  truncated = path / "train" / f"{train[4]}.mp4"
  truncated.write_bytes(truncated.read_bytes()[:1000])
  (path / "train" / f"{train[5]}.mp4").write_bytes(b"corrupted")
  replaced = path / "replacement/replacement_for_corrupted_k400"
  write_video(replaced / f"{train[5]}.mp4", pattern(6))
  write_video(path / "train/zumba" / f"{train[6]}.webm", pattern(7))
  return path


def _build(data_dir, manual_dir, config=None, **options):
  builder = Builder(data_dir=data_dir, config=config)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=manual_dir, **options
    )
  )
  return builder


@pytest.fixture(scope="module")
def data_dir(manual_dir, tmp_path_factory):
  path = tmp_path_factory.mktemp("data")
  subprocess.run(
    [_TFDS, "build", "data/kinetics400"]
    + [f"--manual_dir={manual_dir}", f"--data_dir={path}"],
    check=True,
    cwd=pathlib.Path(__file__).parents[1],
    # As a user starts it: the tests' own path must not help.
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
  )
  return path


def _examples(builder, split):
  examples = tfds.as_numpy(
    builder.as_dataset(
      split=split, decoders={"video": tfds.decode.SkipDecoding()}
    )
  )
  return {e["video_id"].decode(): e for e in examples}


def _report(builder):
  with open(os.path.join(builder.data_dir, "missing_videos.tsv")) as file:
    return list(csv.DictReader(file, delimiter="\t"))


def test_what_tfds_built_is_what_a_config_reads(data_dir):
  data = {"module": "data.kinetics400", "data_dir": str(data_dir)}
  builder = datasets.get_builder(data)
  assert builder.builder_config.name == "short256_fps25"
  assert datasets.num_classes(data) == 400
  names = builder.info.features["label"].names
  want = {
    "train": [_CLIPS["train"][i] for i in (0, 1, 5, 6)],
    "validation": _CLIPS["val"],
    "test": _CLIPS["test"],
  }
  lengths = {"000replaced": 6, "000nested00": 7}
  assert set(builder.info.splits) == set(want)
  for split, clips in want.items():
    examples = _examples(builder, split)
    assert len(examples) == len(clips)
    for label, youtube_id, source in clips:
      (video_id,) = [v for v in examples if v.startswith(youtube_id)]
      example = examples[video_id]
      assert example["label"] == KINETICS_LABELS[label]
      assert names[example["label"]] == label
      if source is None:
        source = pattern(lengths[youtube_id])
      frames = decode_jpegs(example["video"])
      assert frames.shape == source.shape
      np.testing.assert_allclose(greys(frames), greys(source), atol=4)
  # TFDS's own decoding sees the same.
  for example in tfds.as_numpy(builder.as_dataset(split="validation")):
    assert example["video"].dtype == np.uint8
    np.testing.assert_allclose(
      greys(example["video"]), greys(pattern(15)), atol=4
    )


def test_report_names_what_is_not_there(data_dir, manual_dir):
  builder = Builder(data_dir=data_dir)
  rows = _report(builder)
  assert list(rows[0]) == ["split", "video_id", "reason", "file"]
  assert [(r["split"], r["video_id"]) for r in rows] == [
    ("train", "000missing0_000014_000024"),
    ("train", "00garbage00_000021_000031"),
    ("train", "0truncated0_000028_000038"),
  ]
  assert rows[0]["reason"] == "missing"
  for row in rows:
    assert row["file"] == str(manual_dir / "train" / f"{row['video_id']}.mp4")
  for row in rows[1:]:
    assert row["reason"].startswith("unreadable: ffmpeg failed")
  assert not [f for f in os.listdir(builder.data_dir) if f.startswith("lost")]


def test_beam_builds_the_same(data_dir, manual_dir, tmp_path):
  from apache_beam.options.pipeline_options import PipelineOptions

  here = Builder(data_dir=data_dir)
  # Not "DirectRunner", which looks for another runner on the network first.
  runner = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
  beam = _build(
    tmp_path, manual_dir, beam_options=PipelineOptions([f"--runner={runner}"])
  )
  assert _report(here) == _report(beam)
  for split in here.info.splits:
    first, second = _examples(here, split), _examples(beam, split)
    assert list(first) == list(second)
    for key, example in first.items():
      assert example["label"] == second[key]["label"]
      assert list(example["video"]) == list(second[key]["video"])


def test_reading_wants_neither_beam_nor_ffmpeg(data_dir):
  code = f"""
import sys
sys.modules["apache_beam"] = sys.modules["imageio_ffmpeg"] = None
from lookup_vit import datasets
data = {{"module": "data.kinetics400", "data_dir": {str(data_dir)!r}}}
builder = datasets.get_builder(data)
print(len(list(builder.as_dataset(split="train"))))
"""
  out = subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    capture_output=True,
    text=True,
    env={**os.environ, "PATH": ""},
  )
  assert out.stdout.strip() == "4"


def test_size_and_rate_are_the_configs(manual_dir, tmp_path):
  config = KineticsConfig(short_side=24, fps=5, max_seconds=0.6)
  builder = _build(tmp_path, manual_dir, config)
  assert builder.builder_config.name == "short24_fps5_max0.6s"
  examples = _examples(builder, "train")
  # A second at 25 frames, then the odd one; cut after 0.6 s.
  first = decode_jpegs(examples["-abc_d-EFGH_000000_000010"]["video"])
  assert first.shape == (3, 24, 32, 3)
  odd = decode_jpegs(examples["--------odd_000007_000017"]["video"])
  assert odd.shape == (3, 24, 32, 3)
  # Found by name, as a config of the experiments names it.
  data = {"name": "kinetics400/short24_fps5_max0.6s", "data_dir": str(tmp_path)}
  assert len(_examples(datasets.get_builder(data), "train")) == 4


def test_building_again_gives_the_same_bytes(manual_dir, tmp_path):
  sums = []
  for name in ("a", "b"):
    builder = _build(tmp_path / name, manual_dir)
    files = sorted(pathlib.Path(builder.data_dir).glob("*.tfrecord*"))
    sums.append([hashlib.sha256(f.read_bytes()).digest() for f in files])
  assert len(sums[0]) == 3
  assert sums[0] == sums[1]


def test_labels_are_the_official_ones():
  names = Builder(data_dir="unused").info.features["label"].names
  assert len(names) == len(set(names)) == 400
  assert names == sorted(names)
  for name, label in KINETICS_LABELS.items():
    assert names[label] == name


def test_names_of_the_first_release(tmp_path):
  names = write_kinetics400(tmp_path, {"train": _CLIPS["train"][:1]})
  write_kinetics400(tmp_path, {"val": _CLIPS["val"]})
  (tmp_path / "annotations").mkdir()
  (tmp_path / "train.csv").rename(tmp_path / "annotations/train.csv")
  (tmp_path / "val.csv").rename(tmp_path / "annotations/validate.csv")
  (tmp_path / "val").rename(tmp_path / "validate")
  # The first release's test annotations have no labels.
  (tmp_path / "annotations/test.csv").write_text(
    "youtube_id,time_start,time_end,split\nxxxxxxxxxxx,1,11,test\n"
  )
  builder = _build(tmp_path / "data", tmp_path)
  assert set(builder.info.splits) == {"train", "validation"}
  assert list(_examples(builder, "train")) == names["train"]
  assert _report(builder) == []


_HEADER = "label,youtube_id,time_start,time_end,split\n"


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (None, r"no train\.csv in .*annotations of split 'train'"),
    ("label,youtube_id,time_start\nzumba,a,1\n", "no column 'time_end'; its"),
    ("", "no column 'label', 'youtube_id', 'time_start', 'time_end'"),
    ("youtube_id,time_start,time_end\na,1,2\n", "no column 'label'"),
    (_HEADER, "names no clips"),
    (
      _HEADER + "zumba,a,0,10,train\nzumbo,b,0,10,train\n",
      "line 3: 'zumbo' is",
    ),
    (_HEADER + "zumba,a,0,x,train\n", "line 2: time_start and .* '0' and 'x'"),
    (_HEADER + "zumba,a\n", "line 2: time_start and .* None and None"),
    (
      _HEADER + "zumba,a,0,9,\nabseiling,a,0,9,\n",
      "line 3: clip a_000000_000009",
    ),
    (b"\xff\xfe\x00", "is not UTF-8"),
    (
      _HEADER + "zumba,-gone,5,15,train\n",
      "none of the 1 videos of split 'tra",
    ),
  ],
)
def test_wrong_annotations(content, match, tmp_path):
  write_kinetics400(tmp_path, {"val": [("zumba", "vvvvvvvvvvv", pattern(2))]})
  if content is not None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "train.csv").write_bytes(data)
  with pytest.raises(ValueError, match=match):
    _build(tmp_path / "data", tmp_path)


def test_nothing_found_says_where_and_what(tmp_path):
  clips = [("zumba", "-gone", None)]
  write_kinetics400(tmp_path, {"train": clips, "val": clips})
  with pytest.raises(ValueError) as e:
    _build(tmp_path / "data", tmp_path)
  assert f"Searched {tmp_path / 'train'}" in str(e.value)
  assert "-gone_000000_000010.mp4" in str(e.value)


def test_annotated_test_videos_may_be_left_out(tmp_path):
  clips = [("zumba", "a", pattern(2))]
  absent = [("zumba", "b", None)]
  write_kinetics400(tmp_path, {"train": clips, "val": clips, "test": absent})
  with pytest.raises(ValueError, match="Move its annotation file away"):
    _build(tmp_path / "data", tmp_path)


def test_a_few_examples_for_a_trial(manual_dir, tmp_path):
  builder = _build(tmp_path, manual_dir, max_examples_per_split=1)
  assert builder.info.splits["train"].num_examples == 1
  assert len(_examples(builder, "train")) == 1
  assert all(row["split"] == "train" for row in _report(builder))


def test_nothing_readable_says_so(tmp_path):
  clips = [("zumba", "garbage", None)]
  names = write_kinetics400(tmp_path, {"train": clips, "val": clips})
  (tmp_path / "train").mkdir()
  (tmp_path / "train" / f"{names['train'][0]}.mp4").write_bytes(b"no video")
  (tmp_path / "val").mkdir()
  (tmp_path / "val" / f"{names['val'][0]}.mp4").write_bytes(b"no video")
  with pytest.raises(ValueError, match="none of the 1 videos of split 'train'"):
    _build(tmp_path / "data", tmp_path)


def test_no_ffmpeg_is_told_before_anything_is_read(tmp_path, monkeypatch):
  from data import video_builder

  (tmp_path / "train.csv").write_text("wrong")

  def fail():
    raise RuntimeError("pip install imageio-ffmpeg")

  monkeypatch.setattr(video_builder, "find_ffmpeg", fail)
  with pytest.raises(RuntimeError, match="imageio-ffmpeg"):
    _build(tmp_path / "data", tmp_path)
