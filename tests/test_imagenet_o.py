"""Tests of data/imagenet_o."""

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

from data.imagenet_o import Builder
from tests import imagenet_files

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """The set as the real program builds it, and the files it was made from."""
  root = tmp_path_factory.mktemp("imagenet_o")
  files = imagenet_files.write_imagenet_o(root / "manual")
  run = subprocess.run(
    [
      str(pathlib.Path(sys.executable).with_name("tfds")),
      "build",
      "data/imagenet_o",
      f"--manual_dir={root / 'manual'}",
      f"--data_dir={root / 'data'}",
    ],
    cwd=_ROOT,
    text=True,
    capture_output=True,
    timeout=300,
  )
  assert run.returncode == 0, run.stderr
  log = run.stdout + run.stderr
  assert "15 images in 3 folders; the published set has 2000 in 200" in log
  data = {"module": "data.imagenet_o", "split": "test"}
  return {**data, "data_dir": str(root / "data")}, files


def _names(builder):
  """The names of the files in order."""
  ds = builder.as_dataset(
    split="test", decoders={"image": tfds.decode.SkipDecoding()}
  )
  return [e["file_name"].decode() for e in tfds.as_numpy(ds)]


def test_pixels_labels_and_names(built):
  data, files = built
  ds, batches = input_pipeline.make_eval(
    data, pp="decode|central_crop(40)|keep('image','label')", batch_size=1
  )
  assert batches == 15
  wnids = tfds.builder_cls("imagenet_a")().info.features["label"].names
  names = _names(datasets.get_builder(data))
  seen = []
  for name, batch in zip(names, ds, strict=True):
    wnid = wnids[int(batch["label"][0])]
    seen.append((wnid, name))
    want = np.asarray(Image.open(io.BytesIO(files[wnid][name])))
    top, left = (np.array(want.shape[:2]) - 40) // 2
    want = want[top : top + 40, left : left + 40]
    np.testing.assert_allclose(batch["image"][0], want, atol=8)
  assert sorted(seen) == [(k, name) for k in files for name in files[k]]


def test_features_are_those_of_imagenet_a(built):
  data, _ = built
  builder = datasets.get_builder(data)
  assert datasets.num_classes(data) == 1000
  want = tfds.builder_cls("imagenet_a")().info.features
  assert builder.info.features.get_tensor_info() == want.get_tensor_info()
  assert builder.info.features["label"].names == want["label"].names
  assert list(builder.info.splits) == ["test"]


def _build(root):
  builder = Builder(data_dir=str(root / "out"))
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=str(root / "in"))
  )
  return builder


def test_images_are_stored_byte_by_byte(tmp_path):
  rng = np.random.default_rng(0)
  picture, encode = imagenet_files.picture, imagenet_files.encode
  files = {
    "imagenet-o/n01443537/a.JPEG": encode(picture(rng)),
    "imagenet-o/n01443537/b.JPEG": encode(picture(rng, "CMYK")),
    "imagenet-o/n01443537/c.JPEG": encode(picture(rng), "PNG"),
    "imagenet-o/n01443537/d.JPEG": encode(picture(rng, "L")),
  }
  (tmp_path / "in").mkdir()
  junk = {"imagenet-o/.DS_Store": b"a", "imagenet-o/n01443537/._a.JPEG": b"b"}
  imagenet_files.write_tar(tmp_path / "in" / "imagenet-o.tar", files | junk)
  decoders = {"image": tfds.decode.SkipDecoding()}
  ds = _build(tmp_path).as_dataset(split="test", decoders=decoders)
  images = {e["file_name"].decode(): e["image"] for e in tfds.as_numpy(ds)}
  assert images == {name[-6:]: data for name, data in files.items()}
  data = {
    "module": "data.imagenet_o",
    "split": "test",
    "data_dir": str(tmp_path / "out"),
  }
  ds, batches = input_pipeline.make_eval(
    data, pp="decode|central_crop(40)|keep('image')", batch_size=4
  )
  (batch,) = ds
  assert batches == 1 and batch["image"].shape == (4, 40, 40, 3)


def test_no_archive(tmp_path):
  (tmp_path / "in").mkdir()
  with pytest.raises(AssertionError, match="does not exist or is empty"):
    _build(tmp_path)
  (tmp_path / "in" / "imagenet-a.tar").write_bytes(b"a")
  with pytest.raises(
    ValueError, match=r"there is no .*imagenet-o\.tar; wanted"
  ):
    _build(tmp_path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.7, 1])
def test_an_archive_that_was_cut_off(share, tmp_path):
  imagenet_files.write_imagenet_o(tmp_path / "in", per_class=2)
  path = tmp_path / "in" / "imagenet-o.tar"
  with tarfile.open(path) as tar:
    tar.getmembers()
    size = tar.offset
  path.write_bytes(path.read_bytes()[: int(share * size)])
  with pytest.raises(ValueError, match=f"{path} is damaged or was cut off"):
    _build(tmp_path)
  assert not list((tmp_path / "out").rglob("*.tfrecord*"))


def test_no_archive_but_a_page(tmp_path):
  (tmp_path / "in").mkdir()
  path = tmp_path / "in" / "imagenet-o.tar"
  path.write_bytes(b"<html>404</html>" * 100)
  with pytest.raises(ValueError, match=f"{path} is damaged or was cut off"):
    _build(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_broken_image_is_named(damage, tmp_path):
  files = imagenet_files.write_imagenet_o(tmp_path / "in", 2, 2)
  members = {
    f"imagenet-o/{wnid}/{name}": data
    for wnid in files
    for name, data in files[wnid].items()
  }
  name = "imagenet-o/n01704323/photo (1).JPEG"
  members[name] = {
    "truncated": members[name][:-30],
    "empty": b"",
    "text": b"no longer available",
  }[damage]
  imagenet_files.write_tar(tmp_path / "in" / "imagenet-o.tar", members)
  with pytest.raises(ValueError, match="cannot be decoded") as e:
    _build(tmp_path)
  assert name in str(e.value)
  assert not list((tmp_path / "out").rglob("*.tfrecord*"))


@pytest.mark.parametrize(
  ("name", "error"),
  [
    ("../../x.JPEG", "has the member '../../x.JPEG'"),
    ("imagenet-o/n01443537/../../../x.JPEG", "has the member"),
    ("imagenet-a/n01443537/x.JPEG", "has the member"),
    ("imagenet-o/x.JPEG", "has the member"),
    ("imagenet-o/n00000001/x.JPEG", "n00000001 is no class of ImageNet-1k"),
  ],
)
def test_members_of_other_names(name, error, tmp_path):
  (tmp_path / "in").mkdir()
  jpeg = imagenet_files.encode(imagenet_files.picture(np.random.default_rng(0)))
  imagenet_files.write_tar(tmp_path / "in" / "imagenet-o.tar", {name: jpeg})
  with pytest.raises(ValueError, match=error):
    _build(tmp_path)
  assert not list(tmp_path.rglob("x.JPEG"))


def test_a_link_is_no_image(tmp_path):
  (tmp_path / "in").mkdir()
  member = tarfile.TarInfo("imagenet-o/n01443537/x.JPEG")
  member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
  with tarfile.open(tmp_path / "in" / "imagenet-o.tar", "w") as tar:
    tar.addfile(member)
  with pytest.raises(ValueError, match="has the member"):
    _build(tmp_path)
