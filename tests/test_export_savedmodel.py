"""Tests of lookup_vit/exports/savedmodel.py."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from lookup_vit import export, image_files
from lookup_vit.analysis.attention_maps import as_pixels
from lookup_vit.exports import classifier
from lookup_vit.exports.savedmodel import reader
from tests import exports
from tests.exports import GRID, PP, SIZE, check, expected, images
from tests.models import common

# isort: split
import tensorflow as tf


@pytest.fixture(scope="module")
def lookup(tmp_path_factory):
  return exports.make_run(tmp_path_factory.mktemp("run"), exports.make_config())


@pytest.fixture(scope="module")
def savedmodel(lookup, tmp_path_factory):
  output = str(tmp_path_factory.mktemp("out") / "savedmodel")
  worst = export.export(lookup.workdir, "savedmodel", output)
  assert 0 < worst < 1e-5
  return output


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A PNG and a JPEG, of other sizes than the model's."""
  folder = tmp_path_factory.mktemp("files")
  rng = np.random.default_rng(2)
  for name, size in (("a.png", (31, 20)), ("b.jpg", (50, 40))):
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
  return [str(folder / "a.png"), str(folder / "b.jpg")]


def as_numpy(out):
  return {name: x.numpy() for name, x in out.items()}


def test_savedmodel_at_several_grids_and_any_batch(lookup, savedmodel):
  module = tf.saved_model.load(savedmodel)
  assert sorted(module.signatures) == [
    *("encoded_1x2", "encoded_2x3", "images_1x2", "images_2x3"),
    "serving_default",
  ]
  for name, grid in (("2x3", GRID), ("1x2", (1, 2))):
    for batch in (1, 4):
      call = module.signatures[f"images_{name}"]
      found = as_numpy(call(tf.constant(images(batch))))
      check(found, expected(lookup, images(batch), grid))
  found = module.signatures["serving_default"](tf.constant(images(2)))
  check(as_numpy(found), expected(lookup, images(2), GRID))


def test_savedmodel_of_encoded_images(lookup, savedmodel, files):
  contents = [pathlib.Path(path).read_bytes() for path in files]
  pixels = image_files.read(files, PP, SIZE)
  read = reader(PP, SIZE)
  found = read(tf.constant(contents)).numpy()
  np.testing.assert_array_equal(as_pixels(found), as_pixels(pixels))
  # TensorFlow's graphs divide by a number by way of its inverse.
  np.testing.assert_allclose(found, pixels, atol=2e-7)
  call = tf.saved_model.load(savedmodel).signatures["encoded_1x2"]
  found = as_numpy(call(tf.constant(contents)))
  logits, _ = common.apply(
    lookup.program.model, lookup.params, pixels, grid=(1, 2)
  )
  np.testing.assert_allclose(found["logits"], logits, atol=2e-5, rtol=2e-5)
  with pytest.raises(tf.errors.InvalidArgumentError):
    call(tf.constant([b"no image"]))


def test_docs(lookup, savedmodel, tmp_path, monkeypatch):
  scope = exports.run_docs("TensorFlow", savedmodel, monkeypatch, tmp_path)
  pixels = image_files.read([str(tmp_path / "photo.jpg")], PP, SIZE)
  logits, _ = common.apply(
    lookup.program.model, lookup.params, pixels, grid=GRID
  )
  np.testing.assert_allclose(
    scope["out"]["logits"], logits, atol=2e-5, rtol=2e-5
  )


def test_savedmodel_of_a_vit_and_a_fixed_batch(tmp_path):
  (tmp_path / "run").mkdir()
  config = exports.make_config("vit", loss="sigmoid_xent")
  vit = exports.make_run(tmp_path / "run", config)
  output = str(tmp_path / "out")
  pp = "decode|central_crop((16, 24))|value_range(-1,1)"
  export.export(vit.workdir, "savedmodel", output, batch_size=2, pp=pp)
  signatures = tf.saved_model.load(output).signatures
  assert sorted(signatures) == ["encoded", "images", "serving_default"]
  found = as_numpy(signatures["images"](tf.constant(images(2))))
  check(found, expected(vit, images(2)))
  large = np.pad(images(2), [(0, 0), (4, 4), (3, 3), (0, 0)])
  encoded = [tf.io.encode_png(x).numpy() for x in large]
  found = as_numpy(signatures["encoded"](tf.constant(encoded)))
  check(found, expected(vit, images(2)))
  assert signatures["images"].inputs[0].shape == (2, *SIZE, 3)
  with pytest.raises(tf.errors.InvalidArgumentError):
    signatures["encoded"](tf.constant(encoded[:1]))


def test_savedmodel_of_clips(tmp_path):
  """They have no signature on encoded ones."""
  (tmp_path / "run").mkdir()
  config = exports.make_config(
    model=dict(variant="mu/2x4", grid=(1, 2, 3)),
    grids=None,
    input=dict(pp="", image_size=(4, *SIZE), batch_size=4),
    evals=dict(test=dict(pp_fn="decode_clip(4)|value_range(-1,1)")),
  )
  run = exports.make_run(tmp_path / "run", config)
  output = str(tmp_path / "out")
  with pytest.raises(ValueError, match="--pp: clips are not read"):
    export.export(run.workdir, "savedmodel", output, pp=PP)
  export.export(run.workdir, "savedmodel", output, platforms=["cpu"])
  signatures = tf.saved_model.load(output).signatures
  assert sorted(signatures) == ["images_1x2x3", "serving_default"]
  clips = images(2, (4, *SIZE))
  found = as_numpy(signatures["images_1x2x3"](tf.constant(clips)))
  check(found, expected(run, clips))


@pytest.mark.parametrize(
  ("pp", "words"),
  [
    ("decode|value_range(-1,1)", None),
    (
      "decode|resize(8)|value_range(-1,1)",
      "makes float32 .8, 8, 3.,",
    ),
    ("decode|resize((16, 24))", "makes uint8 .*--pp='decode|resize"),
    ("decode|keep('label')", "makes no image"),
    ("decod", "there is no op 'decod'"),
    ("decode|resize((16, 24))|corrupt('fog', 1)|value_range(-1,1)", "Python"),
  ],
)
def test_how_encoded_images_can_be_read(pp, words):
  if words is None:
    encoded = tf.io.encode_png(images(1)[0]).numpy()
    [found] = reader(pp, SIZE)(tf.constant([encoded]))
    want = classifier.scale(images(1)[0])
    np.testing.assert_allclose(found, want, atol=2e-7)
  else:
    with pytest.raises(ValueError, match=words):
      reader(pp, SIZE)
