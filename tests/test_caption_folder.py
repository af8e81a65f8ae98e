"""Tests of data/caption_folder, and of how a config reads it."""

import io
import json
import logging
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data.caption_folder import Builder
from data.caption_folder import caption_folder_dataset_builder as module
from lookup_vit import damage, datasets, input_pipeline, record_index

MODULE = "data.caption_folder"
# Id, file and captions of each image.
IMAGES = {
  "train": [
    (7, "a.jpg", ["A dog runs.", "Dog "]),
    (2**40, "deep/er/B c.PNG", ["Zwei Hunde, größer als 1 000!\n"]),
    (3, "grey.jpg", ["a cat", "two cats", "a cat"]),
    (4, "x/../alpha.png", ["a bird\nand a cat"]),
  ],
  "val": [(7, "a.jpg", ["another dog"]), (1, "v.png", ["x", "y"])],
}


def picture(mode, seed):
  shape = (24, 31, len(mode)) if len(mode) > 1 else (24, 31)
  pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  return Image.fromarray(pixels, mode)


def annotations(images):
  """COCO's format, with fields that nobody asks for."""
  return {
    "info": {"year": 2014},
    "images": [
      {"id": i, "file_name": name, "height": 24, "license": 3}
      for i, name, _ in images
    ],
    "annotations": [
      {"id": 100 * n + k, "image_id": i, "caption": text}
      for n, (i, _, texts) in enumerate(images)
      for k, text in enumerate(texts)
    ],
    "licenses": [],
  }


def write_json(folder, split, content):
  text = json.dumps(content, ensure_ascii=split == "train")
  (folder / f"{split}.json").write_text(text, encoding="utf-8")


def write_folder(root):
  for s, (split, images) in enumerate(IMAGES.items()):
    for n, (_, name, _) in enumerate(images):
      path = root / split / name
      path.parent.mkdir(parents=True, exist_ok=True)
      (root / split / "x").mkdir(exist_ok=True)
      mode = {"grey.jpg": "L", "x/../alpha.png": "RGBA"}.get(name, "RGB")
      picture(mode, 10 * s + n).save(path)
    write_json(root, split, annotations(images))
  # What has no annotation is nobody's business.
  (root / "train/other.jpg").write_bytes(b"")
  (root / "test").mkdir(exist_ok=True)
  (root / ".cache.json").write_text("{")
  return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("My Captions"))


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


def read(data):
  """The examples of a split by id, as a config's op-strings see them."""
  pp = "flatten|keep('image','image/id','image/filename','captions/id',"
  examples = input_pipeline.examples(data, pp=pp + "'captions/text')")
  return {int(e["image/id"]): e for e in examples}


@pytest.mark.parametrize("split", list(IMAGES))
def test_a_config_reads_all_images_as_they_are(split, folder, data_dir):
  data = describe(folder, data_dir, split)
  assert datasets.num_examples(data) == len(IMAGES[split])
  assert datasets.num_classes(data) is None
  assert record_index.wanted(data)
  found = read(data)
  assert set(found) == {i for i, _, _ in IMAGES[split]}
  for n, (i, name, texts) in enumerate(IMAGES[split]):
    assert found[i]["image/filename"].decode() == name
    # The file itself, not a picture that is encoded again.
    content = (folder / split / name).read_bytes()
    assert bytes(found[i]["image"]) == content
    assert [t.decode() for t in found[i]["captions/text"]] == texts
    ids = [100 * n + k for k in range(len(texts))]
    assert found[i]["captions/id"].tolist() == ids
  assert datasets.num_examples({**data, "split": "train+val"}) == 6
  assert datasets.num_examples({**data, "split": "train[:50%]"}) == 2


def test_features_are_those_of_coco_captions(folder, data_dir, tmp_path):
  builder = datasets.get_builder(describe(folder, data_dir))
  coco = tfds.builder("coco_captions", data_dir=tmp_path)
  own, real = (b.info.features.get_tensor_info() for b in (builder, coco))
  real.pop("objects")
  assert own == real
  assert builder.info.features["image"].encoding_format is None


def test_training_batches(folder, data_dir):
  pp = (
    "decode|resize(16)|value_range(-1,1)|flatten"
    "|choice('captions/id','caption')|keep('image','image/id','caption')"
  )
  batches = input_pipeline.make_train(
    describe(folder, data_dir), pp=pp, batch_size=3, seed=0
  )
  seen = {}
  for _, batch in zip(range(20), batches, strict=False):
    assert batch["image"].shape == (3, 16, 16, 3)
    for i, caption in zip(batch["image/id"], batch["caption"], strict=True):
      seen.setdefault(int(i), set()).add(int(caption))
  assert seen == {
    i: {100 * n + k for k in range(len(texts))}
    for n, (i, _, texts) in enumerate(IMAGES["train"])
  }
  batches, count = input_pipeline.make_eval(
    describe(folder, data_dir),
    pp="decode|resize(8)|keep('image')",
    batch_size=3,
  )
  assert count == 2 and sum(b["_mask"].sum() for b in batches) == 4


# --- Folders that change


def test_a_folder_that_changed_is_built_again(copy, tmp_path, monkeypatch):
  paths = []
  read_image = damage.read_image

  def counted(path):
    paths.append(path)
    return read_image(path)

  monkeypatch.setattr(damage, "read_image", counted)
  data = describe(copy, tmp_path)
  for _ in range(2):
    assert datasets.num_examples(data) == 4
    assert len(paths) == 6
  # What nobody annotated does not count.
  (copy / "train/more.jpg").write_bytes(b"")
  assert datasets.num_examples(data) == 4 and len(paths) == 6

  more = [*IMAGES["train"], (9, "a.jpg", ["the same picture"])]
  write_json(copy, "train", annotations(more))
  assert datasets.num_examples(data) == 5 and len(paths) == 13
  picture("RGB", 99).save(copy / "train/a.jpg", quality=50)
  content = (copy / "train/a.jpg").read_bytes()
  assert bytes(read(data)[9]["image"]) == content
  assert len(paths) == 20


def test_folders_never_share_what_is_built(folder, copy, tmp_path):
  names = [
    Builder(folder=path, data_dir=tmp_path).builder_config.name
    for path in (str(folder), str(copy), f"{folder}/", f"{copy}/../copy")
  ]
  assert names[0] == names[2] != names[1] == names[3]
  assert names[0].startswith("my_captions")
  assert names[1].startswith("copy_")


def test_annotations_are_parsed_once(copy, tmp_path, monkeypatch):
  paths = []
  parse = module.read_annotations

  def counted(path):
    paths.append(path)
    return parse(path)

  monkeypatch.setattr(module, "read_annotations", counted)
  for _ in range(3):
    datasets.num_examples(describe(copy, tmp_path))
  assert len(paths) == 2


# --- Images that cannot be read


def break_four(copy):
  whole = (copy / "train/a.jpg").read_bytes()
  (copy / "train/a.jpg").write_bytes(whole[: len(whole) // 2])
  # Damage in the middle of a file that is whole at both ends.
  path = copy / "train/deep/er/B c.PNG"
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 255
  path.write_bytes(content)
  (copy / "train/grey.jpg").write_text("<html>not an image</html>")
  (copy / "train/alpha.png").unlink()


def test_broken_images_fail_or_are_skipped(copy, tmp_path, caplog):
  write_json(
    copy, "train", annotations([*IMAGES["train"], (5, "other.jpg", ["x"])])
  )
  shutil.copy(copy / "val/v.png", copy / "train/other.jpg")
  break_four(copy)
  data = describe(copy, tmp_path)
  for _ in range(2):
    with pytest.raises(ValueError) as e:
      datasets.num_examples(data)
  message = str(e.value)
  assert "4 of the 5 files of train cannot be read" in message
  assert "data.on_error='skip'" in message
  for words in (
    "train/a.jpg: image 7: ",
    f"B c.PNG: image {2**40}: ",
    "grey.jpg: image 3: Unknown image file format",
    "alpha.png: image 4: No such file",
  ):
    assert words in message
  # They are of one split.
  assert datasets.num_examples({**data, "split": "val"}) == 2
  skip = {**data, "on_error": "skip"}
  caplog.set_level(logging.WARNING, "lookup_vit")
  for _ in range(2):
    assert datasets.num_examples(skip) == 1
  warnings = [r.getMessage() for r in caplog.records if "left out" in r.message]
  assert len(warnings) == 1 and "grey.jpg" in warnings[0]
  assert list(read(skip)) == [5]
  for split, images in IMAGES.items():
    write_json(copy, split, annotations(images))
  write_folder(copy)
  assert datasets.num_examples(data) == 4


def test_nothing_that_can_be_read(copy, tmp_path):
  for path in (copy / "val").iterdir():
    if path.is_file():
      path.unlink()
  with pytest.raises(ValueError) as e:
    datasets.num_examples(describe(copy, tmp_path, on_error="skip"))
  for words in ("none of the 2 images of split 'val'", "image 7: No such file"):
    assert words in str(e.value)


# --- Other layouts and annotations


def fails(data, *words):
  with pytest.raises(ValueError) as e:
    datasets.num_examples(data)
  message = str(e.value)
  for word in words:
    assert word in message, message
  return message


@pytest.mark.parametrize(
  ("names", "words"),
  [
    (None, ["is no directory"]),
    ([], ["holds no annotations", "found nothing"]),
    (["train/a.jpg", "notes.txt"], ["holds no annotations", "found notes.txt"]),
    ([".train.json"], ["holds no annotations"]),
    (["train.json"], ["train.json has no folder of images beside it, train"]),
    (["my split.json"], ["my split cannot be a split"]),
    (["all.json"], ["all cannot be a split"]),
  ],
)
def test_other_layouts(names, words, tmp_path):
  folder = tmp_path / "captions"
  for name in names or []:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
  if names == []:
    folder.mkdir()
  message = fails(describe(folder, tmp_path), *words)
  assert message.startswith(f"data.module='{MODULE}', data.folder='{folder}': ")
  if "cannot be" not in words[0]:
    assert "FOLDER/SPLIT.json, FOLDER/SPLIT/*.jpg" in message


def test_splits_that_are_not_there(folder, data_dir):
  data = describe(folder, data_dir, "test")
  fails(data, "'test'", "train (4), val (2)")


def one(file_name="a.jpg", i=1, caption="x"):
  return annotations([(i, file_name, [caption])])


def changed(key, **fields):
  content = one()
  content[key][0].update(fields)
  return content


TWICE = annotations([(5, "a.jpg", ["x"]), (6, "b", ["x"]), (5, "c", ["x"])])
WITHOUT = [(i, f"{i}.jpg", ["x"] if i == 3 else []) for i in range(9)]


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", ["is no JSON", "wanted COCO's annotations"]),
    (b"{'images': []}", ["is no JSON"]),
    (b"[" * 100_000, ["is no JSON"]),
    (b'{"images": "\xff"}', ["is not UTF-8"]),
    ([], ["has no list 'images'", '{"images": [{"id": int']),
    ({"images": {}}, ["has no list 'images'"]),
    ({"images": []}, ["has no list 'annotations'", '"image_id": int']),
    ({"images": [], "annotations": []}, ["has no images"]),
    ({"images": ["a.jpg"]}, ["images[0] is 'a.jpg'"]),
    ({"images": [{"id": 1}]}, ["images[0] is {'id': 1}", '"file_name": str']),
    (changed("images", id="1"), ["images[0] is {'id': '1'", '"id": int']),
    (changed("images", id=True), ["images[0] is {'id': True"]),
    (changed("images", id=2**63), ["images[0] is "]),
    (changed("images", id=1.0), ["images[0] is "]),
    (changed("annotations", caption="a \ud800"), ["annotations[0]"]),
    (changed("annotations", caption=None), ["annotations[0]", '"caption": s']),
    (
      changed("annotations", image_id=8),
      ["annotation 0", "image 8", "none of"],
    ),
    (TWICE, ["two images have the id 5, 'a.jpg' and 'c'"]),
    (one(caption=" \n"), ["annotation 0", "image 1 (a.jpg)", "without a word"]),
    (
      annotations(WITHOUT),
      ["8 of its 9 images have no captions: 0 (0.jpg), 1 (", "5 (5.jpg), ..."],
    ),
    (one("/etc/passwd"), ["image 1 has file_name='/etc/passwd'", "below the"]),
    (one("../train.json"), ["'../train.json'"]),
    (one("a/../../b.jpg"), ["'a/../../b.jpg'"]),
    (one("a/.."), ["'a/..'"]),
    (one(".."), ["'..'"]),
    (one(""), ["file_name=''"]),
    (one("a\0.jpg"), ["file_name='a"]),
  ],
)
def test_annotations_that_are_not_as_wanted(content, words, tmp_path):
  folder = tmp_path / "captions"
  (folder / "train").mkdir(parents=True)
  (folder / "train/a.jpg").write_bytes(b"")
  if not isinstance(content, bytes):
    content = json.dumps(content).encode()
  (folder / "train.json").write_bytes(content)
  message = fails(describe(folder, tmp_path), *words)
  start = f"data.module='{MODULE}', data.folder='{folder}': "
  assert message.startswith(f"{start}{folder}/train.json")


def test_names_with_dots_that_stay_below(tmp_path):
  content = io.BytesIO()
  picture("RGB", 0).save(content, "JPEG")
  names = ["..a.jpg", "x/../b.jpg", "./c.jpg"]
  folder = tmp_path / "captions"
  (folder / "train/x").mkdir(parents=True)
  for name in names:
    (folder / "train" / name).write_bytes(content.getvalue())
  rows = [(i, name, ["x"]) for i, name in enumerate(names)]
  # As some editors begin a file.
  text = "\ufeff" + json.dumps(annotations(rows))
  (folder / "train.json").write_text(text, encoding="utf-8")
  assert datasets.num_examples(describe(folder, tmp_path)) == 3


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(module=MODULE), [MODULE, "wants its data.folder"]),
    (dict(module=f"{MODULE}/small", folder="."), ["no config 'small'"]),
    (dict(module=MODULE, folder="x", on_error="no"), ["'no'", "'skip'"]),
  ],
)
def test_wrong_descriptions(fields, words):
  fails({"split": "train", **fields}, *words)
