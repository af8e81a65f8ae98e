"""Tests of lookup_vit/datasets.py."""

import logging
import shutil
import sys
import types

import ml_collections
import pytest
from etils import epath
from PIL import Image

from data.digits import Builder
from lookup_vit import datasets, descriptions
from tests import sources


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
  return sources.build_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def folder(tmp_path):
  return sources.write_folder(tmp_path / "images")


def test_sizes(digits, folder):
  assert datasets.num_examples(digits) == 37
  assert datasets.num_examples({**digits, "split": "train+test[:3]"}) == 1440
  assert datasets.num_classes(digits) == 10
  assert datasets.num_examples(folder) == 20
  assert datasets.num_examples({**folder, "split": "all"}) == 23
  assert datasets.num_classes(folder) == 2
  config = ml_collections.ConfigDict({**folder, "data_dir": None})
  assert datasets.num_examples(config) == 20


def test_names_of_classes(digits, folder):
  assert datasets.class_names(folder) == ["cat", "dog"]
  assert datasets.class_names(digits) == list("0123456789")
  mixture = [dict(folder, weight=1.0), dict(folder, weight=2.0)]
  assert datasets.class_names(dict(mixture=mixture)) == ["cat", "dog"]
  with pytest.raises(ValueError, match="2 of .* 10 of"):
    datasets.class_names(dict(mixture=[mixture[0], dict(digits, weight=1.0)]))


@pytest.mark.parametrize(
  ("data", "fps", "short_side", "seconds"),
  [
    (dict(module="data.video_folder", folder="not there"), 25.0, 256, 60.0),
    (dict(module="data.kinetics400"), 25.0, 256, 10.0),
    (dict(module="data.something_something_v2"), 12.0, 240, 30.0),
  ],
)
def test_how_videos_became_frames(data, fps, short_side, seconds):
  assert datasets.frame_options(data) == dict(
    fps=fps, short_side=short_side, qscale=3, max_seconds=seconds
  )


def test_sets_that_do_not_say_how_videos_became_frames():
  for data in (dict(name="ucf101"), dict(module="data.moving_digits")):
    assert datasets.frame_options(data) == {}
  mixture = [dict(module="data.kinetics400", weight=1.0)]
  mixture.append(dict(name="ucf101", weight=1.0))
  assert datasets.frame_options(dict(mixture=mixture))["fps"] == 25.0


def test_classes_of_a_set_without_labels(digits, monkeypatch):
  features = {"image": datasets.get_builder(digits).info.features["image"]}
  info = types.SimpleNamespace(features=features)
  builder = types.SimpleNamespace(info=info)
  monkeypatch.setattr(datasets, "get_builder", lambda data: builder)
  assert datasets.num_classes(digits) is None
  assert datasets.class_names(digits) is None


def test_module_is_built_once(tmp_path, caplog):
  caplog.set_level(logging.INFO, "lookup_vit")
  data = {"module": "data.digits", "split": "test", "data_dir": str(tmp_path)}
  assert datasets.num_examples(data) == 360
  assert datasets.num_examples(data) == 360
  assert sum(r.name == "lookup_vit" for r in caplog.records) == 1


def test_named_set(digits):
  # A set in data_dir needs no code of TFDS.
  data = {"name": "digits", "split": "test", "data_dir": digits["data_dir"]}
  assert datasets.num_examples(data) == 360
  assert datasets.num_classes(data) == 10


# --- Broken images


def test_broken_images_fail_or_are_skipped(folder, caplog):
  sources.break_four(folder)
  with pytest.raises(ValueError, match="4 of the 20") as e:
    datasets.num_examples(folder)
  for name in ("0.jpg", "3.png", "12.jpg", "15.png", "on_error='skip'"):
    assert name in str(e.value)

  skip = {**folder, "on_error": "skip"}
  assert datasets.num_examples(skip) == 16
  assert "4 of the 20" in caplog.text and "12.jpg" in caplog.text


def test_repaired_images_are_seen(folder):
  path = sources.find(folder, "0.jpg")
  sources.cut(path, 600)
  with pytest.raises(ValueError, match="1 of the 20"):
    datasets.num_examples(folder)
  Image.new("RGB", (40, 40)).save(path)
  assert datasets.num_examples(folder) == 20


def test_at_most_ten_broken_images_are_listed(folder):
  for i in range(1, 20, 2):
    sources.cut(sources.find(folder, f"{i}.png"), 50)
  for i in (2, 4):
    sources.cut(sources.find(folder, f"{i}.jpg"), 50)
  with pytest.raises(ValueError, match="and 2 more") as e:
    datasets.num_examples(folder)
  assert str(e.value).count("/train/") == 10


def test_classes_are_the_directories_of_all_splits(folder):
  root = epath.Path(folder["folder"])
  for name in ("train/dog/notes.txt", "train/dog/more/1.jpg", "val/ape/1.webp"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"not read")
  (root / "train" / ".hidden").mkdir()
  builder = datasets.get_builder(folder)
  names = builder.info.features["label"].names
  assert names == [".hidden", "ape", "cat", "dog"]
  assert datasets.num_examples(folder) == 20
  # Each part of a split has all of its classes.
  half = datasets.folder_examples(builder, {**folder, "split": "train[:50%]"})
  assert {names[label] for _, label in half} == {"cat", "dog"}


def test_unusual_but_legal_images_are_kept(folder):
  with open(sources.find(folder, "0.jpg"), "ab") as file:
    file.write(b"camera maker's notes")
  # A PNG that is named .jpg.
  png = Image.open(sources.find(folder, "1.png"))
  png.save(sources.find(folder, "2.jpg"), "PNG")
  assert datasets.num_examples(folder) == 20


# --- Errors


@pytest.mark.parametrize(
  "data, words",
  [
    ({"nam": "cifar10"}, ["'nam'", "'name'", "folder, split"]),
    ({"split": "train"}, ["exactly one", "none"]),
    ({"name": "a", "folder": "b"}, ["exactly one", "name, folder"]),
    ({"name": "cifar10", "on_error": "skip"}, ["on_error", "data.name"]),
    ({"folder": "a", "data_dir": "b"}, ["data_dir", "data.folder"]),
    ({"folder": "a", "on_error": "ignore"}, ["'ignore'", "'skip'"]),
    ({"name": "cifar11"}, ["'cifar11'", "'cifar10'"]),
    ({"name": "cifar10:9.0.0"}, ["9.0.0", "3.0.2"]),
    ({"name": "imagenet2012_corrupted/fog_9"}, ["fog_9", "fog_1"]),
    ({"module": "data.nothing"}, ["data.nothing", "root of the repo"]),
    ({"module": "data.digits:9.9.9"}, ["data.digits:9.9.9", "1.0.0"]),
    ({"module": "data.imagenet21k/spring"}, ["spring", "winter21"]),
    ({"mixture": []}, ["data.mixture"]),
    ({"name": 3}, ["data.name=3", "text"]),
    ({"name": "digits", "data_dir": 3}, ["data.data_dir=3", "text"]),
    ({"module": "lookup_vit"}, ["'lookup_vit'", "no class Builder"]),
    ({"folder": "/nowhere/at/all"}, ["/nowhere/at/all", "FOLDER/SPLIT/CLASS"]),
  ],
)
def test_wrong_descriptions(data, words):
  with pytest.raises(ValueError) as e:
    datasets.num_examples({"split": "train", **data})
  for word in words:
    assert word in str(e.value)


def test_set_that_is_not_prepared(tmp_path):
  data = {"name": "cifar10", "split": "train", "data_dir": str(tmp_path)}
  with pytest.raises(ValueError) as e:
    datasets.get_builder(data)
  assert f"tfds build cifar10 --data_dir={tmp_path}`" in str(e.value)
  assert str(tmp_path / "cifar10") in str(e.value)
  assert "manual" not in str(e.value)

  data["name"] = "imagenet2012_corrupted/fog_1"
  with pytest.raises(ValueError) as e:
    datasets.get_builder(data)
  want = f"tfds build {data['name']} --data_dir={tmp_path} --manual_dir="
  assert want in str(e.value)
  assert "ILSVRC2012_img_val.tar" in str(e.value)


@pytest.fixture
def numbers(tmp_path):
  """A set that there is no code for, only its files."""
  return sources.build_numbers(tmp_path, 5, 1)


def test_version_that_is_not_prepared(numbers, tmp_path):
  """What is there is said, also a preparation that was not finished."""
  done = tmp_path / "numbers" / "1.0.0"
  half = done.rename(done.parent / "incomplete.ABC123_1.0.0")
  with pytest.raises(ValueError, match="it has incomplete.ABC123_1.0.0"):
    datasets.get_builder(numbers)
  data = {"module": "data.imagenet21k", "data_dir": str(tmp_path)}
  old = tmp_path / "imagenet21k" / "winter21" / "0.9.0"
  half.rename(tmp_path / "half")
  old.mkdir(parents=True)
  with pytest.raises(ValueError) as e:
    datasets.get_builder(data)
  for word in ("winter21/1.0.0", "has 0.9.0", "data/imagenet21k --data_dir="):
    assert word in str(e.value)
  data["module"] += "/fall11"
  with pytest.raises(ValueError, match="imagenet21k --config=fall11 --data_d"):
    datasets.get_builder(data)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_description_that_is_cut(file, numbers, tmp_path):
  sources.cut(tmp_path / "numbers" / "1.0.0" / file, 50)
  with pytest.raises(ValueError, match="cannot be read.*again") as e:
    datasets.get_builder(numbers)
  assert "data.name='numbers'" in str(e.value) and str(tmp_path) in str(e.value)


def test_description_of_a_module_that_is_cut(digits, tmp_path):
  shutil.copytree(digits["data_dir"], tmp_path, dirs_exist_ok=True)
  sources.cut(tmp_path / "digits" / "1.0.0" / "dataset_info.json", 50)
  data = {"module": "data.digits", "data_dir": str(tmp_path)}
  with pytest.raises(ValueError, match="data.module='data.digits'.*'digits'"):
    datasets.get_builder(data)


def test_versions_and_configs_that_only_the_files_tell(numbers):
  for name in ("numbers:2.0.0", "numbers/small"):
    data = {**numbers, "name": name}
    with pytest.raises(ValueError, match="it has 1.0.0") as e:
      datasets.get_builder(data)
    assert name in str(e.value) and numbers["data_dir"] in str(e.value)


DIGITS = {"module": "data.digits", "split": "train[:9]"}


def test_mixtures(digits):
  assert descriptions.mixture(DIGITS) == [(DIGITS, 1.0, None)]
  parts = [{**digits, "weight": 2, "pp": "decode"}, {**DIGITS, "weight": 0.5}]
  config = ml_collections.ConfigDict({"mixture": parts, "name": None})
  assert descriptions.mixture(config) == [
    (digits, 2, "decode"),
    (DIGITS, 0.5, None),
  ]
  assert datasets.num_classes(config) == 10


def test_mixture_of_other_classes(digits, folder):
  parts = [{**digits, "weight": 1}, {**folder, "weight": 1}]
  with pytest.raises(ValueError, match="10 of data.module=.*2 of data.folder"):
    datasets.num_classes({"mixture": parts})


@pytest.mark.parametrize(
  "mixture, words",
  [
    ("digits", ["'digits'", "list"]),
    (["digits"], ["data.mixture[0]='digits'", "dict"]),
    ([DIGITS], ["data.mixture[0].weight=None", "> 0"]),
    ([{**DIGITS, "weight": -1}], ["data.mixture[0].weight=-1"]),
    ([{**DIGITS, "weight": True}], ["data.mixture[0].weight=True"]),
    ([{**DIGITS, "weight": 1, "pp": 7}], ["data.mixture[0].pp=7", "text"]),
    (
      [{**DIGITS, "weight": 1}, {"name": "a", "wieght": 1, "weight": 1}],
      ["data.mixture[1]", "'wieght'"],
    ),
    ([{"mixture": [], "weight": 1}], ["data.mixture[0]", "within a mixture"]),
  ],
)
def test_wrong_mixtures(mixture, words):
  with pytest.raises(ValueError) as e:
    descriptions.mixture({"mixture": mixture})
  for word in words:
    assert word in str(e.value)
  with pytest.raises(ValueError, match="data.split does not apply"):
    descriptions.mixture({"mixture": mixture, "split": "train"})


def test_module_that_needs_manual_files(tmp_path, monkeypatch):
  monkeypatch.setattr(Builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", "Ask them.")
  data = {"module": "data.digits", "data_dir": str(tmp_path)}
  with pytest.raises(ValueError, match="build data/digits .*Ask them"):
    datasets.get_builder(data)


def test_module_whose_own_import_fails(tmp_path, monkeypatch):
  (tmp_path / "needs_more.py").write_text("import no_such_package\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match="no_such_package"):
    datasets.get_builder({"module": "needs_more"})
  sys.modules.pop("needs_more", None)


def test_folder_without_the_layout(folder):
  classes = {**folder, "folder": folder["folder"] + "/train"}
  with pytest.raises(ValueError, match="no images.*FOLDER/SPLIT/CLASS"):
    datasets.get_builder(classes)


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_wrong_splits(source, request):
  data = request.getfixturevalue(source)
  for split in ("trian", "train[:5", "train[:9999]", "all[:3]"):
    with pytest.raises(ValueError) as e:
      datasets.num_examples({**data, "split": split})
    for word in (split, "train (", "test ("):
      assert word in str(e.value)
  with pytest.raises(ValueError, match="not set; there are .*test"):
    datasets.num_examples({**data, "split": None})
  assert datasets.num_examples({**data, "split": "train[:0]"}) == 0
