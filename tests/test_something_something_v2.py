"""Tests of data/something_something_v2 on a tiny look-alike."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data.something_something_v2 import Builder, SomethingSomethingConfig
from lookup_vit import datasets
from tests.video_files import (
  TEMPLATES,
  decode_jpegs,
  greys,
  pattern,
  write_something_something_v2,
  write_video,
)

_TFDS = os.path.join(os.path.dirname(sys.executable), "tfds")
_HOLDING = "Holding [something] next to [something]"
_PUSHING = "Pushing [something] so that it almost falls off but doesn't"
_LAYING = "Laying [something] on the table on its side, not upright"

_VIDEOS = {
  "train": [
    ("78687", _HOLDING, pattern(12)),
    ("42", _PUSHING, pattern(9, 47, 63)),
    ("1", _LAYING, None),
    ("2", _LAYING, pattern(8)),
  ],
  "validation": [("7", _LAYING, pattern(6)), ("8", _HOLDING, None)],
  "test": [("9", "", pattern(5)), ("10", "", pattern(4))],
}


def _build(data_dir, manual_dir, config=None):
  builder = Builder(data_dir=data_dir, config=config)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
  )
  return builder


def _examples(builder, split):
  examples = tfds.as_numpy(
    builder.as_dataset(
      split=split, decoders={"video": tfds.decode.SkipDecoding()}
    )
  )
  return {e["video_id"].decode(): e for e in examples}


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("manual")
  write_something_something_v2(path, _VIDEOS)
  (path / "20bn-something-something-v2/1.webm").write_bytes(b"no video")
  return path


@pytest.fixture(scope="module")
def data_dir(manual_dir, tmp_path_factory):
  path = tmp_path_factory.mktemp("data")
  subprocess.run(
    [_TFDS, "build", "data/something_something_v2"]
    + [f"--manual_dir={manual_dir}", f"--data_dir={path}"],
    check=True,
    cwd=pathlib.Path(__file__).parents[1],
    # As a user starts it: the tests' own path must not help.
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
  )
  return path


def test_what_tfds_built_is_what_a_config_reads(data_dir):
  data = {
    "module": "data.something_something_v2",
    "data_dir": str(data_dir),
  }
  builder = datasets.get_builder(data)
  assert builder.builder_config.name == "short240_fps12"
  # The names are the annotations', which are not asked for again.
  assert datasets.num_classes(data) == len(TEMPLATES)
  assert builder.info.features["label"].names == list(TEMPLATES)
  stored = {"train": [0, 1, 3], "validation": [0], "test": [0, 1]}
  assert set(builder.info.splits) == set(stored)
  for split, indices in stored.items():
    examples = _examples(builder, split)
    assert set(examples) == {_VIDEOS[split][i][0] for i in indices}
    for i in indices:
      video_id, template, source = _VIDEOS[split][i]
      example = examples[video_id]
      frames = decode_jpegs(example["video"])
      assert frames.shape == source.shape
      np.testing.assert_allclose(greys(frames), greys(source), atol=4)
      if split == "test":
        assert (example["label"], example["text"]) == (-1, b"")
      else:
        name = template.replace("[something]", "something")
        assert example["label"] == int(TEMPLATES[name])
        text = template.lower().replace("[something]", "a cup")
        assert example["text"].decode() == text


def test_report_names_what_is_not_there(data_dir, manual_dir):
  builder = Builder(data_dir=data_dir)
  with open(os.path.join(builder.data_dir, "missing_videos.tsv")) as file:
    first, second = csv.DictReader(file, delimiter="\t")
  videos = manual_dir / "20bn-something-something-v2"
  assert (first["split"], first["video_id"]) == ("train", "1")
  assert first["reason"].startswith("unreadable: ffmpeg failed")
  assert first["file"] == str(videos / "1.webm")
  assert second == {
    "split": "validation",
    "video_id": "8",
    "reason": "missing",
    "file": str(videos / "8.webm"),
  }


def test_first_release_own_frames_and_answers(tmp_path):
  videos = {**_VIDEOS, "train": _VIDEOS["train"][:2]}
  write_something_something_v2(tmp_path, videos, fps=30, old_names=True)
  (tmp_path / "test-answers.csv").write_text(
    "10;Holding something next to something\n"
  )
  config = SomethingSomethingConfig(short_side=24, fps=None)
  builder = _build(tmp_path / "data", tmp_path, config)
  assert builder.builder_config.name == "short24_own_fps"
  examples = _examples(builder, "train")
  assert decode_jpegs(examples["78687"]["video"]).shape == (12, 24, 32, 3)
  assert decode_jpegs(examples["42"]["video"]).shape == (9, 24, 32, 3)
  labels = {k: e["label"] for k, e in _examples(builder, "test").items()}
  assert labels == {"9": -1, "10": 1}


def test_no_test_annotations_no_test_split(tmp_path):
  write_something_something_v2(
    tmp_path, {k: v for k, v in _VIDEOS.items() if k != "test"}
  )
  builder = _build(tmp_path / "data", tmp_path)
  assert set(builder.info.splits) == {"train", "validation"}


_ENTRY = {"id": "5", "template": _HOLDING, "label": "holding a cup"}


@pytest.mark.parametrize(
  ("name", "content", "match"),
  [
    ("labels", None, r"no labels\.json or something-something-v2-labels\.json"),
    ("train", None, r"no train\.json or something-something-v2-train\.json"),
    ("labels", "{", r"labels\.json is not JSON"),
    ("labels", "[]", r"labels\.json holds no list; wanted an object"),
    ("labels", '{"A": "x"}', "invalid literal .* wanted an object"),
    ("labels", '{"A": "1", "B": "2"}', "from 1 to 2; wanted each of 0 to 1"),
    ("labels", '{"A": "0", "B": "0"}', "2 names with 1 labels from 0 to 0"),
    ("train", "[{]", r"train\.json is not JSON"),
    ("train", '{"id": 1}', "holds a dict; wanted a list of objects"),
    ("train", "[]", "holds no list"),
    ("train", "[1]", "entry 0 is 1; wanted a list"),
    ("train", [{"id": "5", "label": "x"}], "entry 0 is .*'template'"),
    ("train", [_ENTRY, {**_ENTRY, "template": "No"}], "entry 1: template 'No'"),
    ("train", [_ENTRY, _ENTRY], "entry 1: id '5' is there twice"),
    ("train", [_ENTRY], r"none of the 1 videos of split 'train' .*5\.webm"),
    ("test-answers", "9;Sitting on something\n", "line 1 is '9;Sitting on"),
    ("test-answers", "9\n", "line 1 is '9'; wanted an id"),
  ],
)
def test_wrong_annotations(name, content, match, tmp_path):
  videos = {split: rows[:1] for split, rows in _VIDEOS.items()}
  write_something_something_v2(
    tmp_path, {k: [(i, t, None) for i, t, _ in v] for k, v in videos.items()}
  )
  write_video(
    tmp_path / "20bn-something-something-v2" / "78687.webm", pattern(2)
  )
  extension = "csv" if name == "test-answers" else "json"
  path = tmp_path / "labels" / f"{name}.{extension}"
  if content is None:
    path.unlink()
  else:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
  with pytest.raises(ValueError, match=match):
    _build(tmp_path / "data", tmp_path)
