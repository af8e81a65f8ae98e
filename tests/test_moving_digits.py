"""Tests of data/moving_digits and of the experiments on it."""

import collections
import hashlib
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from scipy import fft, stats
from sklearn import datasets

from configs import moving_digits_lookup, moving_digits_vivit
from data.moving_digits import Builder
from data.moving_digits import moving_digits_dataset_builder as module
from lookup_vit import config_utils, train, train_step
from lookup_vit import input_pipeline as ip
from lookup_vit.analysis import flops

MOTIONS = [
  *("right", "left", "down", "up"),
  *("right_and_back", "left_and_back", "down_and_back", "up_and_back"),
]
# As (rows, columns).
STEPS = [(0, 1), (0, -1), (1, 0), (-1, 0)]
EXAMPLES = {"train": 1437, "test": 360}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  builder = Builder(data_dir=tmp_path_factory.mktemp("moving_digits"))
  builder.download_and_prepare()
  return builder


@pytest.fixture(scope="module")
def labels(built):
  """Each split's labels and ids, as a dict of arrays."""
  names = ("label", "motion", "glyph", "id")
  out = {}
  for split in EXAMPLES:
    examples = built.as_dataset(
      split=split,
      batch_size=-1,
      decoders=tfds.decode.PartialDecoding(dict.fromkeys(names, True)),
    )
    out[split] = {k: np.asarray(v) for k, v in examples.items()}
  return out


@pytest.fixture(scope="module")
def held_out(built):
  """The test split, its videos `[n, 16, 32, 32]` of one channel."""
  columns = collections.defaultdict(list)
  for example in built.as_dataset(split="test").as_numpy_iterator():
    video = example.pop("video")
    assert video.shape == (16, 32, 32, 3) and video.dtype == np.uint8
    assert (video == video[..., :1]).all()
    columns["video"].append(video[..., 0])
    for name, value in example.items():
      columns[name].append(value)
  return {name: np.stack(values) for name, values in columns.items()}


def wrapped(offsets):
  """Offsets on the canvas as the shortest ones, from -16 to 15."""
  return (offsets + 16) % 32 - 16


def shifts(images, others):
  """How `images` `[..., 32, 32]` are shifted against others, by correlation.

  Of two images that differ by a cyclic shift alone, the correlation is
  greatest there.
  """
  product = fft.rfft2(images) * np.conj(fft.rfft2(others))
  correlation = fft.irfft2(product)
  best = correlation.reshape(*correlation.shape[:-2], -1).argmax(-1)
  return wrapped(np.stack([best // 32, best % 32], -1))


def recognise(steps):
  """Motion and speed of steps `[15, 2]` from frame to frame, and its turn."""
  speed = np.abs(steps).sum(-1)
  assert len(set(speed)) == 1
  directions = [tuple((s // speed[0]).tolist()) for s in steps]
  runs = [(k, len(list(g))) for k, g in itertools.groupby(directions)]
  assert len(runs) <= 2
  motion = STEPS.index(runs[0][0])
  if len(runs) == 1:
    return motion, speed[0], None
  assert runs[1][0] == tuple(-d for d in runs[0][0])
  return motion + 4, speed[0], runs[0][1]


@pytest.fixture(scope="module")
def recovered(held_out):
  """Motion, speed, turn and place, by the pixels of the test split alone."""
  video = held_out["video"].astype(np.float32)
  steps = shifts(video[:, 1:], video[:, :-1])
  motion, speed, turn = zip(*map(recognise, steps), strict=True)
  # The digit in the upper left corner, enlarged without PIL.
  centres = (np.arange(16) + 0.5) / 2 - 0.5
  up = np.stack([np.interp(centres, np.arange(8), e) for e in np.eye(8)], 1)
  glyphs = up @ datasets.load_digits().images[held_out["id"]] @ up.T
  corner = np.pad(glyphs * 255 / 16, [(0, 0), (0, 16), (0, 16)])
  start = shifts(video[:, 0], corner)
  moved = np.concatenate([0 * steps[:, :1], np.cumsum(steps, axis=1)], axis=1)
  return {
    "motion": np.array(motion),
    "speed": np.array(speed),
    "turn": np.array([t or 0 for t in turn]),
    "place": (start[:, None] + moved) % 32,
    "corner": corner,
  }


def test_sizes_and_features(built, labels):
  features = built.info.features
  assert list(features["motion"].names) == MOTIONS
  assert features["glyph"].num_classes == 10
  assert list(features["label"].names) == MOTIONS
  for split, digits in EXAMPLES.items():
    assert built.info.splits[split].num_examples == 8 * digits
    np.testing.assert_array_equal(
      labels[split]["label"], labels[split]["motion"]
    )
  assert built.info.citation and built.info.homepage


def test_every_digit_has_every_motion_once(labels):
  ids = {}
  for split, digits in EXAMPLES.items():
    pairs = list(zip(labels[split]["id"], labels[split]["motion"], strict=True))
    ids[split] = set(labels[split]["id"].tolist())
    assert len(ids[split]) == digits
    assert len(set(pairs)) == len(pairs) == 8 * digits
    np.testing.assert_array_equal(
      labels[split]["glyph"], datasets.load_digits().target[labels[split]["id"]]
    )
  assert not ids["train"] & ids["test"]
  assert ids["train"] | ids["test"] == set(range(1797))


def test_the_split_is_that_of_the_still_digits(labels):
  from data.digits import digits_dataset_builder as still

  for split, ids in still.load()[1].items():
    np.testing.assert_array_equal(np.unique(labels[split]["id"]), ids)


def test_motion_is_in_the_pixels(held_out, recovered):
  """Frame-by-frame correlation, which knows nothing of the builder."""
  np.testing.assert_array_equal(recovered["motion"], held_out["motion"])
  assert set(recovered["speed"]) == {1, 2, 3}
  turns = recovered["turn"][held_out["motion"] >= 4]
  assert set(turns) == set(range(4, 12))
  assert not recovered["turn"][held_out["motion"] < 4].any()


def test_frames_are_the_digit_on_a_canvas_that_wraps_around(
  held_out, recovered
):
  rng = np.random.default_rng(0)
  for i, frame in zip(
    rng.integers(2880, size=100), rng.integers(16, size=100), strict=True
  ):
    row, column = recovered["place"][i, frame]
    want = np.roll(recovered["corner"][i], (row, column), (0, 1))
    np.testing.assert_allclose(held_out["video"][i, frame], want, atol=0.51)


def independent(a, b):
  """The p-value of a chi-square test of independence."""
  table = np.zeros((a.max() + 1, b.max() + 1))
  np.add.at(table, (a, b), 1)
  return stats.chi2_contingency(table[table.any(1)][:, table.any(0)]).pvalue


def test_a_frame_does_not_tell_the_motion(held_out, recovered):
  """The digits are the same in all classes; places and speeds are alike."""
  motion, place = held_out["motion"], recovered["place"]
  uniform = [
    stats.chisquare(np.bincount(place[:, frame, axis], minlength=32)).pvalue
    for frame in range(16)
    for axis in (0, 1)
  ]
  alike = [
    independent(motion, place[:, frame, axis] // 4)
    for frame in range(16)
    for axis in (0, 1)
  ]
  alike.append(independent(motion, recovered["speed"]))
  back = motion >= 4
  alike.append(independent(motion[back], recovered["turn"][back]))
  # 66 tests, of data that do not change.
  assert min(uniform + alike) > 1e-3
  # What such a test sees: where a digit of class "right" has gone.
  moved = (place[:, 15, 1] - place[:, 0, 1]) % 32
  assert independent(motion, moved // 4) < 1e-50


@pytest.mark.parametrize("motion", range(8))
def test_every_place_is_as_likely_in_every_frame(motion):
  """From all starts, each frame of each motion takes each place once."""
  starts = list(itertools.product(range(32), range(32)))
  for speed, turn in [(1, 4), (2, 11), (3, 7)]:
    places = [module.path(motion, s, speed, turn) % 32 for s in starts]
    for frame in np.stack(places, axis=1):
      assert sorted(map(tuple, frame.tolist())) == starts


def test_read_backwards_a_straight_motion_is_the_opposite_one(held_out):
  """So the set of its frames does not tell the one from the other."""
  video = held_out["video"][:400, ::-1].astype(np.float32)
  steps = shifts(video[:, 1:], video[:, :-1])
  got = [recognise(s)[0] for s in steps]
  # What turns back does so in either direction of time.
  opposite = np.array([1, 0, 3, 2, 4, 5, 6, 7])
  np.testing.assert_array_equal(got, opposite[held_out["motion"][:400]])
  glyph = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype="u1")
  for motion, back in [(0, 1), (3, 2)]:
    there = module.path(motion, (5, 9), 3, turn=6)
    other = module.path(back, there[-1], 3, turn=9)
    np.testing.assert_array_equal(
      module.render(glyph, there)[::-1], module.render(glyph, other)
    )


def test_render_pixel_by_pixel():
  rng = np.random.default_rng(0)
  glyph = rng.integers(256, size=(5, 7, 3), dtype=np.uint8)
  places = np.array([(0, 0), (30, 31), (-3, 70)])
  want = np.zeros((3, 32, 32, 3), np.uint8)
  for f, i, j in np.ndindex(3, 5, 7):
    row, column = places[f]
    want[f, (row + i) % 32, (column + j) % 32] = glyph[i, j]
  np.testing.assert_array_equal(module.render(glyph, places), want)


def test_rebuilding_gives_the_same_bytes(tmp_path):
  few = tfds.download.DownloadConfig(max_examples_per_split=24)
  files = []
  for name in ("a", "b"):
    builder = Builder(data_dir=tmp_path / name)
    builder.download_and_prepare(download_config=few)
    files.append(sorted(pathlib.Path(builder.data_dir).glob("*.tfrecord*")))
  assert len(files[0]) == 2
  for a, b in zip(*files, strict=True):
    assert a.read_bytes() == b.read_bytes()


def test_the_pixels_never_change(held_out):
  order = np.lexsort([held_out["motion"], held_out["id"]])
  video = np.ascontiguousarray(held_out["video"][order])
  assert hashlib.sha256(video).hexdigest() == (
    "b0a3d21962bf5b53ef11aa11fb72687e6bf84d756aa13539385f4ac38baa09ec"
  )


def test_glyph_as_the_label(tmp_path, held_out):
  builder = Builder(config="glyph", data_dir=tmp_path)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(max_examples_per_split=16)
  )
  assert builder.info.features["label"].num_classes == 10
  clips = {
    (i, motion): (video, glyph)
    for i, motion, video, glyph in zip(
      *(held_out[k] for k in ("id", "motion", "video", "glyph")), strict=True
    )
  }
  examples = list(builder.as_dataset(split="test").as_numpy_iterator())
  assert len(examples) == 16
  for example in examples:
    video, glyph = clips[example["id"], example["motion"]]
    assert example["label"] == example["glyph"] == glyph
    np.testing.assert_array_equal(example["video"][..., 0], video)


# The experiments.


def _config(built, arg):
  config = config_utils.load(f"configs/moving_digits_lookup.py:{arg}")
  for data in (config.input.data, config.evals.test.data):
    data.data_dir = str(pathlib.Path(built.data_dir).parents[2])
  return config


@pytest.mark.parametrize("still", [False, True])
def test_clips_that_models_see(still, built, held_out):
  config = _config(built, "still" if still else "")
  batches, _ = ip.make_eval(
    {**config.evals.test.data, "split": "test[:6]"},
    pp=config.evals.test.pp_fn,
    batch_size=6,
  )
  [batch] = batches
  want = held_out["video"][:6, ..., None] / 127.5 - 1
  if still:
    want = want[:, 7:8]
  want = np.broadcast_to(want, (6, 16, 32, 32, 3))
  np.testing.assert_allclose(batch["image"], want, atol=1e-6)
  np.testing.assert_array_equal(batch["label"], held_out["motion"][:6])


def test_training_sees_every_frame_of_a_still_clip(built):
  config = _config(built, "still")
  config.input.data.split = "train[:1]"
  config.input.batch_size = 64
  batch = next(iter(train.make_dataset(config, 0)))
  assert (batch["image"] == batch["image"][:, :1]).all()
  example = next(iter(built.as_dataset(split="train[:1]")))
  frames = np.asarray(example["video"]) / 127.5 - 1
  seen = {
    int(np.abs(frames - image).mean((1, 2, 3)).argmin())
    for image in batch["image"][:, 0]
  }
  assert len(seen) > 10


def test_the_experiments_themselves():
  """Both differ in the model alone; LookupViT has half of ViT's FLOPs."""
  configs = {
    model: config_utils.resolve(
      config_utils.load(f"configs/moving_digits_{model}.py")
    )
    for model in ("vivit", "lookup")
  }
  differences = config_utils.differences(
    *(c.to_dict() for c in configs.values())
  )
  fields = {line.partition(":")[0] for line in differences}
  assert fields == {"model_name", "model.grid", "grids"}
  lookup = configs["lookup"]
  assert lookup.model.grid in lookup.grids
  cost = {
    name: flops.cost(train_step.build_model(c), c.input.image_size).xla_flops
    for name, c in configs.items()
  }
  assert cost["lookup"] <= cost["vivit"] / 2


def test_arguments():
  get_config = moving_digits_lookup.get_config
  assert get_config("seed=3,epochs=2").seed == 3
  assert get_config("epochs=2").total_epochs == 2
  for task, classes in (("motion", 8), ("glyph", 10)):
    for arg in (f"task={task}", f"task={task},runlocal"):
      config = get_config(arg)
      assert config.num_classes == classes
      for data in (config.input.data, config.evals.test.data):
        assert data.module == f"data.moving_digits/{task}"
  config = get_config("grid=2x2x2")
  assert config.grids is None and config.model.grid == (2, 2, 2)
  with pytest.raises(ValueError, match="grid"):
    moving_digits_vivit.get_config("grid=2x2x2")
  with pytest.raises(ValueError, match="task='speed'.*motion, glyph"):
    get_config("task=speed")
