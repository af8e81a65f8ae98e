"""Tests of lookup_vit/predictor.py, from work directories of small runs."""

import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import lookup_vit
from configs.common import TOKENIZER
from lookup_vit import (
  checkpoints,
  config_utils,
  datasets,
  input_pipeline,
  startup,
  tokenizer,
  train,
)
from lookup_vit.models import decoding
from lookup_vit.predictor import Predictions, Predictor
from lookup_vit.train_step import build_model
from tests import small, video_files

SIZE, GRID = (32, 32), (2, 2)
CLASSES = ["cat", "dog", "eel"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Photos of three classes, of many sizes."""
  root = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  for split, name in ((s, n) for s in ("train", "val") for n in CLASSES):
    os.makedirs(root / split / name)
    for kind in ("a.jpg", "b.png"):
      size = rng.integers(34, 70, 2)
      pixels = rng.integers(0, 256, (*size, 3), np.uint8)
      Image.fromarray(pixels).save(root / split / name / kind)
  return root


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
  """Of a whole training run on them."""
  workdir = str(tmp_path_factory.mktemp("run"))
  data = dict(folder=str(folder))
  pp = "decode|resize_small(36)|central_crop(32)|value_range(-1,1)"
  evals = dict(
    val=dict(
      type="classification",
      data=dict(data, split="val"),
      pp_fn=f"{pp}|keep('image','label')",
    ),
    other=dict(type="classification", data=dict(data, split="val"), pp_fn=pp),
  )
  config = small.config(
    num_classes=None, evals=evals, total_steps=2, input__batch_size=6
  )
  config.input.data = dict(data, split="train")
  train.train_and_evaluate(config, workdir)
  return workdir


@pytest.fixture(scope="module")
def paths(folder):
  """In the order of the split, which TFDS draws."""
  data = dict(folder=str(folder), split="val")
  examples = datasets.folder_examples(datasets.get_builder(data), data)
  return [path for path, _ in examples]


@pytest.fixture(scope="module")
def predictor(workdir):
  return lookup_vit.load(workdir, batch_size=4)


def applied(workdir):
  """The model itself, `(images, **fields) -> (logits, out)`."""
  params, _, config = checkpoints.load_params(workdir)
  model = build_model(config)
  return lambda *x, **fields: model.apply({"params": params}, *x, **fields)


@pytest.fixture(scope="module")
def apply(workdir):
  return applied(workdir)


def evaluated(fields):
  """The images that an evaluator sees, in the order of the split."""
  data = config_utils.ml_collections.ConfigDict(fields.data).to_dict()
  examples = input_pipeline.examples(data, pp=fields.pp_fn)
  return np.stack([np.asarray(example["image"]) for example in examples])


@pytest.fixture(scope="module")
def images(workdir):
  return evaluated(config_utils.read_workdir(workdir).evals.val)


def softmax(x):
  e = np.exp(np.asarray(x, np.float64) - np.max(x))
  return e / e.sum(-1, keepdims=True)


def close(found, want):
  np.testing.assert_allclose(found, want, 1e-4, 1e-5)


def test_what_it_knows(predictor, workdir):
  assert predictor.classes == CLASSES
  assert predictor.grids == [(2, 2), (1, 3)]
  assert predictor.image_size == SIZE and predictor.step == 2
  config = config_utils.read_workdir(workdir)
  assert predictor.pp == config.evals.val.pp_fn
  assert predictor.config == config
  assert predictor.model == build_model(config)


def test_images_are_those_of_the_evaluation(predictor, paths, images):
  found = predictor.preprocess(paths)
  assert found.dtype == np.float32 and found.shape == (6, *SIZE, 3)
  np.testing.assert_array_equal(found, images)
  png = [i for i, path in enumerate(paths) if path.endswith(".png")]
  pixels = [np.asarray(Image.open(paths[i])) for i in png]
  np.testing.assert_array_equal(predictor.preprocess(pixels), images[png])
  np.testing.assert_array_equal(predictor.preprocess(images), images)
  np.testing.assert_array_equal(predictor.preprocess(paths[0]), images[:1])


@pytest.mark.parametrize("grid", [None, (2, 2), (1, 3), (4, 1)])
def test_predictions_are_those_of_the_model(
  predictor, apply, paths, images, grid
):
  logits, _ = apply(images, grid=grid or GRID)
  found = predictor.predict(paths, grid)
  close(found.probabilities, softmax(logits))
  assert found.grid == (grid or GRID) and found.captions is None
  again = predictor.predict(images, grid).probabilities
  np.testing.assert_array_equal(found.probabilities, again)


def test_most_probable_classes():
  probabilities = np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])
  found = Predictions(None, probabilities, ["a", "b", "c"])
  assert found.top(2) == [
    [("b", 0.5), ("c", 0.3)],
    [("a", 0.4), ("c", 0.4)],
  ]
  assert [len(best) for best in found.top()] == [3, 3]
  with pytest.raises(ValueError, match="captions, no classes"):
    Predictions(None, captions=["a dog"]).top()


def test_features_and_tokens(predictor, apply, images):
  _, out = apply(images, grid=(1, 3), capture=("tokens",))
  close(predictor.features(images, (1, 3)), out["pre_logits_compressed"])
  both = [out["pre_logits_compressed"], out["pre_logits_lookup"]]
  found = predictor.features(images, (1, 3), "both")
  close(found, np.concatenate(both, axis=-1))
  found = predictor.features(images, (1, 3), "lookup", block=-1)
  close(found, out["block_lookup_tokens"][-1].mean(1))
  found = predictor.tokens(images, (1, 3))
  assert sorted(found) == ["compressed_tokens", "lookup_tokens"]
  assert found["compressed_tokens"].shape[:2] == (6, 3)
  for name, values in found.items():
    close(values, out[name])


def test_nothing_is_compiled_twice(predictor, images):
  predictor.predict(images)
  predictor.tokens(images)
  clock = startup.Clock()
  for count in (1, 3, 4, 5):
    predictor.predict(images[:count])
    assert len(predictor.tokens(images[:count])["lookup_tokens"]) == count
  assert clock.seconds == 0


def test_what_was_not_trained_is_said_once(workdir, images, caplog):
  predictor = lookup_vit.load(workdir)
  caplog.set_level(logging.INFO, "lookup_vit")
  for grid in ((3, 2), (3, 2), (1, 3)):
    predictor.predict(images[:1], grid)
  assert caplog.text.count("not trained at 3x2, only at 2x2, 1x3") == 1
  assert "at 1x3" not in caplog.text


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (dict(grid=(9, 9)), r"\(9, 9\) does not fit the lookup grid \(4, 4\)"),
    (dict(grid=(2,)), r"\(2,\) does not fit"),
    (dict(grid="3x3"), "grid='3x3': want a tuple of integers"),
    (dict(images=[]), "at least one image"),
    (dict(images=["none.jpg"]), "none.jpg: "),
    (dict(images=np.zeros((2, 8, 8, 3), np.float32)), r"\(2, 8, 8, 3\): want"),
    (dict(images=np.zeros((32, 32, 3), np.float32)), "want float32 .n, 32, 32"),
    (dict(images=np.zeros((1, 40, 40, 4), np.uint8)), "makes .*32, 32, 4"),
    (dict(images=[3]), "want paths"),
  ],
)
def test_what_cannot_be_predicted(predictor, images, given, words):
  with pytest.raises(ValueError, match=words):
    predictor.predict(**dict(images=images) | given)


def test_features_that_there_are_not(predictor, images):
  with pytest.raises(ValueError, match="features='all': want one of"):
    predictor.features(images, features="all")
  with pytest.raises(ValueError, match="block=7: the model has 1"):
    predictor.features(images, block=7)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (dict(step=7), r"no checkpoint 7, only \[2\]"),
    (dict(batch_size=0), "batch_size=0: want an integer >= 1"),
    (dict(evaluator="none"), "no evaluator 'none' .* val, other has"),
  ],
)
def test_options_that_cannot_work(workdir, options, words):
  with pytest.raises(ValueError, match=words):
    lookup_vit.load(workdir, **options)


def test_other_preprocessing(workdir, paths, images):
  found = lookup_vit.load(workdir, evaluator="other").preprocess(paths)
  np.testing.assert_array_equal(found, images)
  pp = "decode|resize(32)|value_range(0,1)"
  found = lookup_vit.load(workdir, pp=pp).preprocess(paths)
  assert found.min() >= 0 and found.max() <= 1


def test_classes_without_names(workdir, images, tmp_path):
  copy = shutil.copytree(workdir, tmp_path / "run")
  os.remove(copy / "classes.json")
  found = lookup_vit.load(str(copy)).predict(images[:1])
  assert sorted(name for name, _ in found.top()[0]) == ["0", "1", "2"]
  checkpoints.write_classes(str(copy), ["cat", "dog"])
  with pytest.raises(ValueError, match="2 names of classes, .* is 3"):
    lookup_vit.load(str(copy))


def of(config, **fields):
  """A predictor of a config with other fields, and random parameters."""
  config = config_utils.resolve(config.to_dict() | fields)
  predictor = Predictor(config)
  predictor.params = small.common.random_like(
    predictor.program.state_shapes.params
  )
  return predictor


def test_sigmoid(workdir, images):
  config = config_utils.read_workdir(workdir)
  predictor = of(config, loss="sigmoid_xent")
  logits, _ = predictor.model.apply({"params": predictor.params}, images)
  found = predictor.predict(images).probabilities
  close(found, 1 / (1 + np.exp(-np.asarray(logits))))


def test_vit(workdir, images):
  config = config_utils.read_workdir(workdir)
  model = dict(variant="mu/8", depth=1)
  predictor = of(config, model_name="vit", model=model, grids=None)
  assert predictor.grids == [None]
  variables = {"params": predictor.params}
  logits, out = predictor.model.apply(variables, images, capture=("tokens",))
  found = predictor.predict(images)
  close(found.probabilities, softmax(logits))
  assert found.grid is None
  close(predictor.tokens(images)["tokens"], out["tokens"])
  close(predictor.features(images), out["pre_logits"])
  for what in (predictor.predict, predictor.features, predictor.tokens):
    with pytest.raises(ValueError, match="'vit' has no compressed grid"):
      what(images, (2, 2))


def test_linear_probe(workdir, images):
  config = config_utils.read_workdir(workdir)
  encoder = dict(variant="mu/8", depth=1, grid=(2, 2))
  predictor = of(config, model_name="probe", model=dict(encoder=encoder))
  variables = {"params": predictor.params}
  logits, out = predictor.model.apply(variables, images, grid=(1, 3))
  close(predictor.predict(images, (1, 3)).probabilities, softmax(logits))
  close(predictor.features(images, (1, 3)), out["features"])


def test_a_run_that_reads_images_of_one_size(workdir, paths):
  config = config_utils.read_workdir(workdir)
  pp = "decode|value_range(-1,1)|keep('image','label')"
  config.evals = dict(test=dict(type="classification", pp_fn=pp))
  predictor = Predictor(config)
  assert predictor.preprocess(paths).shape == (6, *SIZE, 3)
  exact = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
  want = exact.astype(np.float32) / 127.5 - 1
  np.testing.assert_array_equal(predictor.preprocess(exact), want)
  # Nothing says how to read files: arrays are all that there is.
  config.evals = dict(test=dict(type="classification"))
  predictor = Predictor(config)
  assert predictor.pp is None
  assert predictor.preprocess(want).shape == (1, *SIZE, 3)
  with pytest.raises(ValueError, match="no evaluator says how to read"):
    predictor.preprocess(paths)


# --- Captions


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
  """The work directory of a captioner."""
  workdir = str(tmp_path_factory.mktemp("captioner"))
  config = config_utils.load("configs/digit_captions_lookup.py:runlocal")
  encoder = dict(width=16, depth=1, num_heads=2)
  config.model.encoder.update(encoder)
  config.model.update(depth=1, num_heads=2, max_length=6)
  config.num_classes = tokenizer.load(TOKENIZER).size
  config.evals.test.update(beams=3, alpha=-1.5, max_length=5)
  config.tokenizer = TOKENIZER
  small.write_run(workdir, config)
  config.tokenizer = "not there any more"
  checkpoints.write_config(workdir, config_utils.resolve(config))
  tokenizer.write(workdir, tokenizer.load(TOKENIZER))
  return workdir


def test_captions(captioner, tmp_path):
  predictor = lookup_vit.load(captioner, batch_size=2)
  assert predictor.classes is None
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (3, 50, 70, 3), np.uint8)
  images = predictor.preprocess(pixels)
  words = tokenizer.load(TOKENIZER)
  for grid in (None, (2, 2)):
    ids = decoding.caption(
      *(predictor.model, predictor.params, images),
      begin=words.begin,
      end=words.end,
      length=5,
      beams=3,
      alpha=-1.5,
      grid=grid or (3, 3),
    )
    found = predictor.predict(images, grid)
    assert found.captions == [words.decode(row) for row in ids]
    assert found.probabilities is None and found.grid == (grid or (3, 3))
  assert any(found.captions)
  assert predictor.features(images).shape == (3, 16)
  assert predictor.tokens(images, (2, 2))["compressed_tokens"].shape[1] == 4


# --- Videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  root = tmp_path_factory.mktemp("videos")
  rng = np.random.default_rng(0)
  for name, count in (("train/up/a", 5), ("val/up/a", 9), ("val/down/b", 30)):
    frames = video_files.pattern(count, 48, 64)
    frames = frames[:: rng.choice([-1, 1])]
    video_files.write_video(root / f"{name}.mp4", frames, fps=30)
  return root


@pytest.fixture(scope="module")
def of_videos(videos, tmp_path_factory):
  """The work directory of a run on videos, evaluated with 4 x 3 views too."""
  workdir = str(tmp_path_factory.mktemp("of_videos"))
  config = config_utils.load(
    f"configs/video_folder.py:folder={videos},variant=mu/2x16,res=32,frames=4,"
    "stride=2,batch=2"
  )
  config.model.update(depth=1, grid=(1, 1, 2))
  config.grids = [(1, 1, 2), (2, 2, 2)]
  config.num_classes, config.total_epochs, config.total_steps = 2, None, 2
  data_dir = str(tmp_path_factory.mktemp("data"))
  for fields in (config.input, *config.evals.values()):
    fields.data.data_dir = data_dir
  small.write_run(workdir, config)
  return workdir


def test_videos(of_videos, videos):
  apply = applied(of_videos)
  config = config_utils.read_workdir(of_videos)
  paths = sorted(map(str, videos.glob("val/*/*.mp4")))
  for name, views in (("val", ()), ("val_4x3", (12,))):
    predictor = lookup_vit.load(of_videos, evaluator=name, batch_size=8)
    fields = config.evals[name]
    data = fields.data.to_dict()
    examples = {
      example["video_id"].decode(): example["image"]
      for example in input_pipeline.examples(
        data, pp=fields.pp_fn.replace("'label'", "'video_id'")
      )
    }
    want = np.stack([examples["down/b.mp4"], examples["up/a.mp4"]])
    assert want.shape == (2, *views, 4, 32, 32, 3)
    np.testing.assert_array_equal(predictor.preprocess(paths), want)
    for grid in ((1, 1, 2), (2, 2, 2)):
      logits, out = apply(want.reshape(-1, 4, 32, 32, 3), grid=grid)
      logits = np.asarray(logits).reshape(2, -1, 2).mean(1)
      found = predictor.predict(paths, grid)
      close(found.probabilities, softmax(logits))
      again = predictor.predict(want, grid).probabilities
      np.testing.assert_array_equal(again, found.probabilities)
      pooled = np.asarray(out["pre_logits_compressed"])
      pooled = pooled.reshape(2, -1, pooled.shape[-1]).mean(1)
      close(predictor.features(want, grid), pooled)
    tokens = predictor.tokens(want, (2, 2, 2))["compressed_tokens"]
    assert tokens.shape[: 2 + len(views)] == (2, *views, 8)


def test_videos_by_another_op_string(of_videos, videos):
  """They become frames as those of the run's data all the same."""
  [path] = map(str, videos.glob("val/down/*.mp4"))
  pp = config_utils.read_workdir(of_videos).evals.val.pp_fn
  want = lookup_vit.load(of_videos).preprocess(path)
  found = lookup_vit.load(of_videos, pp=pp).preprocess(path)
  np.testing.assert_array_equal(found, want)


def test_decoded_videos(of_videos):
  predictor = lookup_vit.load(of_videos)
  clips = np.stack([video_files.pattern(9, 48, 64)] * 2)
  found = predictor.preprocess(clips)
  assert found.shape == (2, 4, 32, 32, 3)
  # Frames 1, 3, 5 and 7, in the middle.
  want = video_files.greys(clips[0, 1:8:2]) / 127.5 - 1
  np.testing.assert_allclose(found[0, :, 16, 8, 0], want, atol=0.01)


# --- Without TensorFlow

_WITHOUT_TENSORFLOW = """
import sys
names = "tensorflow", "tensorflow_datasets", "clu", "matplotlib"
sys.modules.update(dict.fromkeys(names))  # To import one of them fails.
import numpy as np
import lookup_vit
predictor = lookup_vit.load(sys.argv[1])
images = np.load(sys.argv[2])
found = predictor.predict(images, grid=(1, 3))
assert found.top(1)[0][0][0] in ("cat", "dog", "eel")
assert predictor.features(images).shape[0] == len(images)
assert predictor.tokens(images)["lookup_tokens"].shape[1] == 16
np.save(sys.argv[3], found.probabilities)
"""


def test_arrays_need_no_tensorflow(predictor, workdir, images, tmp_path):
  np.save(tmp_path / "images.npy", images)
  files = [str(tmp_path / name) for name in ("images.npy", "found.npy")]
  command = [sys.executable, "-c", _WITHOUT_TENSORFLOW, workdir, *files]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  want = predictor.predict(images, (1, 3)).probabilities
  close(np.load(files[1]), want)
