"""Tests of data/imagenet21k."""

import base64
import collections
import gzip
import io
import pathlib
import subprocess
import sys
import tarfile

from lookup_vit import datasets, input_pipeline

# isort: split
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data.imagenet21k import Builder, imagenet21k_dataset_builder
from tests import imagenet_files

_ROOT = pathlib.Path(__file__).parents[1]
_MESSY = "n09999999"
_FOLDER = "imagenet21k/winter21/1.0.0"
# All images are at least as large.
_CROP = 40


def _tfds(*args, **kwargs):
  """Runs the program `tfds` from the root of the repository."""
  return subprocess.run(
    [str(pathlib.Path(sys.executable).with_name("tfds")), *args],
    cwd=_ROOT,
    text=True,
    capture_output=True,
    timeout=300,
    **kwargs,
  )


def _write_messy(manual_dir):
  """Writes an archive with all that can be wrong with members.

  Returns:
    The images that are stored as they are and those that are re-encoded, by
    file name, and the reasons for the members that are left out, by name.
  """
  rng = np.random.default_rng(1)
  picture, encode = imagenet_files.picture, imagenet_files.encode
  jpeg = encode(picture(rng))
  greys = encode(picture(rng, "L"))
  noise = rng.integers(0, 256, (50, 50, 3), np.uint8)
  long = encode(Image.fromarray(noise))
  names = (f"{_MESSY}_{i}.JPEG" for i in range(100))
  # Images under .JPEG names, whatever they are.
  other = {
    next(names): encode(picture(rng), "PNG"),
    next(names): encode(picture(rng, "P"), "GIF"),
    next(names): encode(picture(rng), "BMP"),
    next(names): encode(picture(rng, "CMYK")),
  }
  broken = {
    next(names): (long[: len(long) // 2], "Invalid JPEG data"),
    next(names): (long[:-2], "Invalid JPEG data"),
    next(names): (jpeg[:20], "Invalid JPEG data"),
    next(names): (encode(picture(rng), "PNG")[:-50], "Invalid PNG data"),
    next(names): (b"", "empty"),
    next(names): (b"<html>no longer available</html>", "Unknown image file"),
    "../../outside.JPEG": (jpeg, f"the name is not {_MESSY}_*"),
    "n01440764_10.JPEG": (jpeg, f"the name is not {_MESSY}_*"),
    f"{_MESSY}_\udcff\t\n.JPEG": (jpeg, f"the name is not {_MESSY}_*"),
  }
  good = {f"{_MESSY}_90.JPEG": greys, f"{_MESSY}_91.JPEG": jpeg}
  reasons = {name: reason for name, (_, reason) in broken.items()}
  with tarfile.open(manual_dir / f"{_MESSY}.tar", "w") as tar:
    for kind, name, link in (
      (tarfile.DIRTYPE, "folder", ""),
      (tarfile.SYMTYPE, f"{_MESSY}_80.JPEG", "/etc/passwd"),
      (tarfile.LNKTYPE, f"{_MESSY}_81.JPEG", f"../{_MESSY}_90.JPEG"),
      (tarfile.FIFOTYPE, f"{_MESSY}_82.JPEG", ""),
    ):
      member = tarfile.TarInfo(name)
      member.type, member.linkname = kind, link
      tar.addfile(member)
      reasons[name] = "not a regular file"
    for name, data in other.items():
      imagenet_files.add(tar, name, data)
    for name, (data, _) in broken.items():
      imagenet_files.add(tar, name, data)
    imagenet_files.add(tar, f"{_MESSY}_90.JPEG", greys)
    # Only the name matters, as nothing is ever written under it.
    imagenet_files.add(tar, f"../../{_MESSY}_91.JPEG", jpeg)
    imagenet_files.add(tar, f"again/{_MESSY}_90.JPEG", jpeg)
    reasons[f"again/{_MESSY}_90.JPEG"] = "another member has this name"
  return good, other, reasons


Built = collections.namedtuple("Built", "data_dir files good other reasons log")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """The set as the real program builds it, from clean and messy archives."""
  root = tmp_path_factory.mktemp("imagenet21k")
  manual_dir = root / "deep" / "manual"
  files = imagenet_files.write_imagenet21k(manual_dir, classes=3, per_class=7)
  messy = _write_messy(manual_dir)
  before = set(root.rglob("*"))
  run = _tfds(
    "build",
    "data/imagenet21k",
    f"--manual_dir={manual_dir}",
    f"--data_dir={root / 'data'}",
    "--num_shards=3",
  )
  assert run.returncode == 0, run.stderr
  written = {
    p.relative_to(root).parts[0] for p in set(root.rglob("*")) - before
  }
  assert written == {"data"}
  files[_MESSY] = {**messy[0], **messy[1]}
  return Built(str(root / "data"), files, *messy, run.stdout + run.stderr)


def _data(built, split="train"):
  module = "data.imagenet21k"
  return {"module": module, "split": split, "data_dir": built.data_dir}


def _examples(builder):
  """The examples in order, with their images as they are stored."""
  ds = builder.as_dataset(
    split="train",
    decoders={"image": tfds.decode.SkipDecoding()},
    read_config=tfds.ReadConfig(interleave_cycle_length=1),
  )
  return list(tfds.as_numpy(ds))


def _originals(built):
  return {k: v for files in built.files.values() for k, v in files.items()}


def _pixels(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int32)


def test_every_image_has_the_pixels_and_the_label_of_its_file(built):
  data = _data(built, "train[2:]")
  ds, batches = input_pipeline.make_eval(
    data, pp=f"decode|central_crop({_CROP})|keep('image','label')", batch_size=1
  )
  originals = _originals(built)
  names = [
    e["file_name"].decode() for e in _examples(datasets.get_builder(data))
  ]
  assert len(originals) == 3 * 7 + 2 + 4
  assert sorted(names) == sorted(originals)
  assert batches == len(names) - 2
  classes = sorted(built.files)
  for name, batch in zip(names[2:], ds, strict=True):
    image, label = np.asarray(batch["image"][0]), int(batch["label"][0])
    want = _pixels(originals[name])
    top, left = (np.array(want.shape[:2]) - _CROP) // 2
    want = want[top : top + _CROP, left : left + _CROP]
    # Decoders differ in rounding, and a JPEG is not its original.
    np.testing.assert_allclose(image, want, atol=8, err_msg=name)
    assert np.abs(image - want).mean() < 1.5
    assert classes[label] == name.split("_")[0]


def test_jpegs_are_stored_byte_by_byte(built):
  builder = datasets.get_builder(_data(built))
  originals = _originals(built)
  for example in _examples(builder):
    name = example["file_name"].decode()
    assert (example["image"] == originals[name]) == (name not in built.other)
    assert example["image"].startswith(b"\xff\xd8\xff")
    image = Image.open(io.BytesIO(example["image"]))
    assert image.mode == ("L" if name == f"{_MESSY}_90.JPEG" else "RGB")


def test_classes_come_back_without_the_archives(built):
  label = Builder(data_dir=built.data_dir).info.features["label"]
  assert label.names == sorted(built.files)
  assert datasets.num_classes(_data(built)) == 4
  assert datasets.num_examples(_data(built, "train[2:]")) == 25


def test_shards_in_an_order_that_mixes_the_classes(built):
  info = Builder(data_dir=built.data_dir).info
  assert len(info.splits["train"].shard_lengths) == 3
  labels = [e["label"] for e in _examples(Builder(data_dir=built.data_dir))]
  assert labels != sorted(labels)
  assert len(set(labels[:9])) > 1


def test_the_report_lists_what_is_left_out_and_what_is_re_encoded(built):
  path = pathlib.Path(built.data_dir, _FOLDER, "report.tsv")
  heading, columns, *lines = path.read_text().splitlines()
  assert heading == "# winter21: 4 of the release's 19,167 classes"
  assert columns == "archive\tmember\taction\treason"
  rows = [line.split("\t") for line in lines]
  assert {row[0] for row in rows} == {f"{_MESSY}.tar"}
  left_out = {
    row[1].encode().decode("unicode_escape"): row[3]
    for row in rows
    if row[2] == "left out"
  }
  assert set(left_out) == set(built.reasons)
  for name, reason in built.reasons.items():
    assert reason in left_out[name]
    assert "{" not in left_out[name]
  re_encoded = {row[1]: row[3] for row in rows if row[2] == "re-encoded"}
  assert len(left_out) + len(re_encoded) == len(rows)
  png, gif, bmp, cmyk = built.other
  not_a_jpeg = "not a JPEG"
  assert re_encoded == {
    png: not_a_jpeg,
    gif: not_a_jpeg,
    bmp: not_a_jpeg,
    cmyk: "CMYK",
  }


def test_the_log_counts(built):
  assert "4 of the release's 19,167 classes" in built.log
  assert f"left out: {len(built.reasons)}" in built.log
  assert "though they were not: 4" in built.log
  # Without `--config`, only the default one is built.
  assert not pathlib.Path(built.data_dir, "imagenet21k", "fall11").exists()


def test_reading_needs_no_beam(built):
  code = (
    "import sys; sys.modules['apache_beam'] = None\n"
    "from lookup_vit import datasets, input_pipeline\n"
    f'ds, n = input_pipeline.make_eval({_data(built)!r}, pp="decode|'
    "keep('label')\", batch_size=1)\n"
    "print(len(list(ds)) == n == 27)"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=_ROOT, text=True, capture_output=True
  )
  assert run.stdout == "True\n", run.stderr


def _build(manual_dir, data_dir, config=None, **kwargs):
  builder = Builder(data_dir=str(data_dir), config=config)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=str(manual_dir), **kwargs
    )
  )
  return builder


def test_beam_writes_the_same(built, tmp_path):
  manual_dir = pathlib.Path(built.data_dir).parent / "deep" / "manual"
  builder = _build(
    manual_dir, tmp_path, beam_runner="FnApiRunner", num_shards=3
  )
  assert len(builder.info.splits["train"].shard_lengths) == 3
  assert _examples(builder) == _examples(Builder(data_dir=built.data_dir))
  assert builder.info.features["label"].names == sorted(built.files)
  report = pathlib.Path(builder.data_dir, "report.tsv").read_bytes()
  want = pathlib.Path(built.data_dir, _FOLDER, "report.tsv").read_bytes()
  assert report == want


def test_beam_s_workers_need_no_repository(built, tmp_path):
  from apache_beam.internal import pickler

  manual_dir = pathlib.Path(built.data_dir).parent / "deep" / "manual"
  module = imagenet21k_dataset_builder
  module._beam_generate([], "", "")
  functions = base64.b64encode(
    pickler.dumps((module.read_archive, module.to_example))
  )
  path = str(manual_dir / "n01440764.tar")
  code = f"""
import base64, sys
from apache_beam.internal import pickler
read, to_example = pickler.loads(base64.b64decode({functions!r}))
for member, content in read({path!r}):
  (key, example), row = to_example({path!r}, member, content)
  assert row is None and example["image"] == content
  print(key)
assert "data" not in sys.modules
"""
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True
  )
  assert run.stdout.split() == list(built.files["n01440764"]), run.stderr


def test_fall11_from_a_folder_beside_the_other_release(tmp_path):
  imagenet_files.write_imagenet21k(tmp_path / "in" / "winter21_whole", 1, 2)
  folder = tmp_path / "in" / "fall11_whole"
  files = imagenet_files.write_imagenet21k(folder, classes=2, per_class=2)
  _build(tmp_path / "in", tmp_path / "out", config="fall11")
  data = {"name": "imagenet21k/fall11", "data_dir": str(tmp_path / "out")}
  label = datasets.get_builder(data).info.features["label"]
  assert label.names == sorted(files)
  assert not (tmp_path / "out" / "imagenet21k" / "winter21").exists()


def test_a_limit_on_the_examples_leaves_a_report(tmp_path):
  imagenet_files.write_imagenet21k(tmp_path / "in", classes=2, per_class=30)
  builder = _build(tmp_path / "in", tmp_path / "out", max_examples_per_split=3)
  assert builder.info.splits["train"].num_examples == 3
  assert pathlib.Path(builder.data_dir, "report.tsv").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_no_manual_directory_or_an_empty_one(exists, tmp_path):
  manual_dir = tmp_path / "in"
  if exists:
    manual_dir.mkdir()
  with pytest.raises(AssertionError, match="does not exist or is empty") as e:
    _build(manual_dir, tmp_path / "out")
  assert str(manual_dir) in str(e.value)
  assert "nXXXXXXXX.tar" in str(e.value)


@pytest.mark.parametrize(
  "name", ["winter21_whole.tar.gz", "n01440764.tgz", "n0144076.tar"]
)
def test_no_class_archives(name, tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / name).write_bytes(b"a")
  with pytest.raises(ValueError, match=r"wanted the archives nX+\.tar") as e:
    _build(tmp_path / "in", tmp_path / "out")
  assert f"{tmp_path / 'in'} holds no class archives" in str(e.value)
  assert ("tar -xf" in str(e.value)) == name.startswith("winter21_whole")


def test_more_archives_than_the_release_has(tmp_path, monkeypatch):
  classes = {"winter21": 2, "fall11": 3}
  monkeypatch.setattr(imagenet21k_dataset_builder, "_NUM_CLASSES", classes)
  imagenet_files.write_imagenet21k(tmp_path / "in", classes=3, per_class=1)
  with pytest.raises(ValueError, match="3 class archives, but winter21 has 2"):
    _build(tmp_path / "in", tmp_path / "out")


def _cut(data, where):
  """Cuts an archive of two members of between 512 and 1536 bytes."""
  with tarfile.open(fileobj=io.BytesIO(data)) as tar:
    first, second = tar
    return {
      "within the first header": data[:300],
      "within the first file": data[: first.offset_data + 100],
      "within the second header": data[: second.offset + 100],
      "within the second file": data[: second.offset_data + 512],
    }[where]


@pytest.mark.parametrize(
  "where",
  [
    "within the first header",
    "within the first file",
    "within the second header",
    "within the second file",
  ],
)
def test_archives_that_were_cut_off(where, tmp_path):
  imagenet_files.write_imagenet21k(tmp_path / "in", classes=3, per_class=2)
  path = tmp_path / "in" / "n01440801.tar"
  path.write_bytes(_cut(path.read_bytes(), where))
  with pytest.raises(ValueError, match="1 of 3 class archives are broken") as e:
    _build(tmp_path / "in", tmp_path / "out")
  assert str(path) in str(e.value)
  # And so where it happens after the check.
  with pytest.raises(ValueError, match=f"{path} is damaged or was cut off"):
    list(imagenet21k_dataset_builder.read_archive(str(path)))
  assert not list((tmp_path / "out").rglob("*.tfrecord*"))


@pytest.mark.parametrize(
  ("data", "error"),
  [
    (b"", "is empty"),
    (b"<html>404</html>" * 100, "is no tar archive"),
    (gzip.compress(bytes(10240)), "is no tar archive"),
    (bytes(10240), "is no tar archive"),
  ],
  ids=["empty", "page", "gzip", "zeros"],
)
def test_files_that_are_no_archives(data, error, tmp_path):
  imagenet_files.write_imagenet21k(tmp_path / "in", classes=2, per_class=1)
  path = tmp_path / "in" / "n02000000.tar"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=f"{path} {error}"):
    _build(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("runner", [None, "FnApiRunner"])
def test_damage_in_the_middle_is_an_error_of_the_build(runner, tmp_path):
  imagenet_files.write_imagenet21k(tmp_path / "in", classes=2, per_class=3)
  path = tmp_path / "in" / "n01440801.tar"
  data = bytearray(path.read_bytes())
  with tarfile.open(path) as tar:
    offset = tar.getmembers()[1].offset
  data[offset : offset + 512] = b"x" * 512
  path.write_bytes(data)
  with pytest.raises(Exception, match=f"{path} is damaged or was cut off"):
    _build(tmp_path / "in", tmp_path / "out", beam_runner=runner)
  assert not list((tmp_path / "out").rglob("*.tfrecord*"))


def test_zeros_in_place_of_the_rest_are_an_error(tmp_path):
  path = tmp_path / "n01440764.tar"
  imagenet_files.write_tar(path, {"n01440764_1.JPEG": b"a"})
  with path.open("ab") as file:
    file.write(bytes(1 << 21))
  with pytest.raises(ValueError, match=f"{path} is damaged or was cut off"):
    list(imagenet21k_dataset_builder.read_archive(str(path)))


def test_an_archive_without_the_usual_end_is_read(tmp_path):
  files = imagenet_files.write_imagenet21k(tmp_path, classes=1, per_class=2)
  path = tmp_path / "n01440764.tar"
  data = path.read_bytes()
  with tarfile.open(path) as tar:
    tar.getmembers()
    path.write_bytes(data[: tar.offset])
  imagenet21k_dataset_builder.check_archives([path])
  members = dict(imagenet21k_dataset_builder.read_archive(str(path)))
  assert members == files["n01440764"]
