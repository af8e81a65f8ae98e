"""Tests of data/digits."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn import datasets

from data.digits import Builder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  builder = Builder(data_dir=tmp_path_factory.mktemp("digits"))
  builder.download_and_prepare()
  return builder


@pytest.fixture(scope="module")
def splits(built):
  """Each split as a dict of stacked arrays."""
  out = {}
  for split in ("train", "test"):
    examples = list(tfds.as_numpy(built.as_dataset(split=split)))
    out[split] = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
  return out


def test_sizes_and_features(built, splits):
  assert built.info.splits["train"].num_examples == 1437
  assert built.info.splits["test"].num_examples == 360
  assert built.info.features["label"].num_classes == 10
  for split, n in (("train", 1437), ("test", 360)):
    assert splits[split]["image"].shape == (n, 32, 32, 3)
    assert splits[split]["image"].dtype == np.uint8
  assert built.info.citation and built.info.homepage


def test_ids_are_disjoint_and_complete(splits):
  ids = np.concatenate([splits["train"]["id"], splits["test"]["id"]])
  np.testing.assert_array_equal(np.sort(ids), np.arange(1797))


def test_every_class_has_its_share_of_the_test_split(splits):
  everything = np.bincount(datasets.load_digits().target)
  test = np.bincount(splits["test"]["label"])
  assert np.all(np.abs(test - everything * 360 / 1797) < 1)


def test_pixels_and_labels_are_those_of_scikit_learn(splits):
  digits = datasets.load_digits()
  # Bilinear upsampling as a matrix from 8 to 32 pixels, written without PIL;
  # its pseudo-inverse takes the images back to the originals.
  centres = (np.arange(32) + 0.5) / 4 - 0.5
  up = np.stack([np.interp(centres, np.arange(8), e) for e in np.eye(8)], 1)
  down = np.linalg.pinv(up)
  for split in splits.values():
    images = split["image"]
    assert np.all(images == images[..., :1])
    originals = down @ (images[..., 0] / 255 * 16) @ down.T
    want = digits.images[split["id"]]
    np.testing.assert_allclose(originals, want, atol=0.1)
    np.testing.assert_array_equal(split["label"], digits.target[split["id"]])


def test_rebuilding_gives_the_same_bytes(built, tmp_path):
  again = Builder(data_dir=tmp_path)
  again.download_and_prepare()
  files = sorted(pathlib.Path(built.data_dir).glob("*.tfrecord*"))
  assert len(files) == 2
  for file in files:
    assert (
      file.read_bytes()
      == (pathlib.Path(again.data_dir) / file.name).read_bytes()
    )
