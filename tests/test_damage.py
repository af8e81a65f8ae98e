"""Tests of lookup_vit/damage.py on files alone."""

import tensorflow as tf
from PIL import Image

from lookup_vit import damage
from tests import sources


def test_tfrecord_files(tmp_path):
  files = []
  for name in ("whole", "cut", "few"):
    path = str(tmp_path / name)
    with tf.io.TFRecordWriter(path) as writer:
      for i in range(3):
        writer.write(bytes(100 + i))
    files.append((path, 3))
  sources.cut(files[1][0], 200)
  files[2] = files[2][0], 5
  files.append((str(tmp_path / "none"), 1))
  found = damage.find_damaged(files)
  assert list(found) == [path for path, _ in files[1:]]
  cut, few, none = found.values()
  assert "truncated" in cut and "after 1 of 3" in cut
  assert few == "3 records, wanted 5"
  assert "No such file" in none
  assert damage.find_damaged([]) == damage.find_damaged(files[:1]) == {}


def test_images(tmp_path):
  paths = []
  for i, name in enumerate(("a.jpg", "b.png", "c.jpg", "d.png", "e.jpg")):
    paths.append(str(tmp_path / name))
    Image.new("RGB", (40, 40), (i, 9, 9)).save(paths[-1])
  sources.cut(paths[2], 300)
  sources.cut(paths[3], 0)
  paths.append(str(tmp_path / "absent.jpg"))
  found = damage.find_broken(tuple(paths))
  assert list(found) == [paths[2], paths[3], paths[5]]
  assert found[paths[3]] == "the file is empty"


def test_listing():
  assert damage.listing({"a": "x", "b": "y"}) == "\n  a: x\n  b: y"
  many = damage.listing({str(i): "x" for i in range(12)})
  assert many.endswith("  9: x\n  and 2 more")
