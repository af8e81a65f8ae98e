"""Tests of the probes: features.py, linear_probe.py, few_shot.py, knn.py."""

import os

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn import linear_model, neighbors

from data.digits import Builder
from lookup_vit import config_utils, train_step
from lookup_vit.evaluators import features, few_shot, knn, linear_probe

TRAIN, TEST = 70, 31
DATA = dict(module="data.digits", split=f"test[:{TEST}]")
CONFIG = dict(
  model_name="lookup_vit",
  num_classes=10,
  model=dict(variant="mu/8", depth=2, grid=(2, 2)),
  grids=[(2, 2), (1, 3)],
  input=dict(
    data=dict(module="data.digits", split=f"train[:{TRAIN}]"),
    pp="decode|inception_crop(32)|value_range(-1,1)|keep('image','label')",
    image_size=(32, 32),
    batch_size=16,
  ),
  lr=1e-3,
  total_steps=2,
)
FIELDS = dict(data=DATA, pp_fn="decode|value_range(-1,1)|keep('image','label')")


@pytest.fixture(scope="module")
def program():
  return train_step.Program(config_utils.resolve(CONFIG), 2)


def random_params(program):
  """Parameters on which features depend on the digit."""
  rng = np.random.default_rng(0)

  def leaf(x):
    fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 4
    draw = rng.standard_normal(x.shape) / np.sqrt(fan_in)
    return (2 * draw).astype(np.float32)

  return jax.tree.map(leaf, program.state_shapes.params)


@pytest.fixture(scope="module")
def params(program):
  return random_params(program)


@pytest.fixture(scope="module")
def wanted(program, params):
  """Features and classes of each digit alone, by split, grid, and kind."""
  builder = Builder()
  builder.download_and_prepare()
  found = {}
  apply = jax.jit(
    lambda x, grid: program.model.apply(
      {"params": params}, x, grid=grid, capture=("tokens",)
    )[1],
    static_argnums=1,
  )
  for split, count in (("train", TRAIN), ("test", TEST)):
    examples = list(tfds.as_numpy(builder.as_dataset(split=split)))[:count]
    found[split, "label"] = np.array([e["label"] for e in examples])
    for grid in program.grids:
      rows = {"compressed": [], "lookup": [], "block": []}
      for e in examples:
        image = e["image"].astype(np.float32) / 127.5 - 1
        out = apply(image[None], grid)
        rows["compressed"].append(out["compressed_tokens"][0].mean(0))
        rows["lookup"].append(out["lookup_tokens"][0].mean(0))
        rows["block"].append(out["block_lookup_tokens"][0][0].mean(0))
      for kind, values in rows.items():
        found[split, grid, kind] = np.stack(values).astype(np.float64)
  return found


def run(module, program, params, workdir=None, **fields):
  evaluator = module.Evaluator(program, "probe", **FIELDS | fields)
  return dict(evaluator.run(params, workdir=workdir))


class Raw(features.Probe):
  """Features themselves, as the metrics of a probe."""

  def classify(self, train, test, check):
    yield "train", train
    yield "test", test


def extract(program, params, workdir=None, **fields):
  """By name of grid and split."""
  raw = Raw(program, "probe", **FIELDS | fields)
  return dict(raw.run(params, workdir=workdir))


@pytest.mark.parametrize(
  ("asked", "kinds"),
  [
    (dict(), ["compressed"]),
    (dict(features="both", batch_size=7), ["compressed", "lookup"]),
    (dict(features="lookup", block=0, batch_size=5), ["block"]),
  ],
)
def test_features_are_those_of_single_examples(
  program, params, wanted, asked, kinds
):
  found = extract(program, params, **asked)
  assert len(found) == 4
  for grid in program.grids:
    for name in ("train", "test"):
      split = found[f"probe/{config_utils.format_grid(grid)}/{name}"]
      want = np.concatenate([wanted[name, grid, k] for k in kinds], axis=-1)
      np.testing.assert_allclose(split.x, want, rtol=1e-4, atol=1e-5)
      np.testing.assert_array_equal(split.label, wanted[name, "label"])


@pytest.fixture
def passes(monkeypatch):
  """How often a batch was asked for its features, in a list."""
  calls = []
  progress = features.loops.progress

  def counted(batches, count, name):
    calls.append(name)
    return progress(batches, count, name)

  monkeypatch.setattr(features.loops, "progress", counted)
  return calls


def test_features_are_kept(program, params, passes, tmp_path, caplog):
  first = extract(program, params, str(tmp_path))
  assert passes == ["probe, train", "probe, data"]
  again = extract(program, params, str(tmp_path), batch_size=10)
  assert len(passes) == 2
  for name, split in first.items():
    np.testing.assert_array_equal(split.x, again[name].x)
    np.testing.assert_array_equal(split.label, again[name].label)
  # Others are another file; other parameters replace it.
  extract(program, params, str(tmp_path), features="lookup")
  assert len(passes) == 4
  changed = jax.tree.map(lambda x: x * 1.01, params)
  other = extract(program, changed, str(tmp_path))
  assert len(passes) == 6
  name = "probe/2x2/train"
  assert np.any(other[name].x != first[name].x)
  files = sorted((tmp_path / "features").iterdir())
  assert len(files) == 4
  for file in files:
    file.write_bytes(file.read_bytes()[:-100])
  extract(program, changed, str(tmp_path))
  assert len(passes) == 8
  assert "cannot be read and is made again" in caplog.text


def test_changed_files_have_other_features(tmp_path, passes):
  from PIL import Image  # Only here.

  rng = np.random.default_rng(0)

  def write(split, name, number):
    path = tmp_path / "images" / split / name / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)

  for split in ("train", "val"):
    for name in ("a", "b"):
      for number in range(3):
        write(split, name, number)
  folder = str(tmp_path / "images")
  config = config_utils.resolve(CONFIG | dict(num_classes=2, grids=[(2, 2)]))
  program = train_step.Program(config, 2)
  params = program.init_state().params
  fields = dict(
    data=dict(folder=folder, split="val"),
    train=dict(folder=folder, split="train"),
    pp_fn="decode|resize(32)|value_range(-1,1)|keep('image','label')",
  )
  before = extract(program, params, str(tmp_path), **fields)
  extract(program, params, str(tmp_path), **fields)
  assert len(passes) == 2
  write("val", "a", 1)
  os.utime(tmp_path / "images/val/a/1.png", (1, 1))
  after = extract(program, params, str(tmp_path), **fields)
  assert len(passes) == 3
  name = "probe/2x2/test"
  differ = np.any(before[name].x != after[name].x, axis=-1)
  assert differ.sum() == 1
  with pytest.raises(ValueError, match="train has 10 classes, data has 2"):
    extract(program, params, **fields | dict(train=CONFIG["input"]["data"]))


@pytest.mark.parametrize("c", [0.5, None])
def test_linear_probe_as_scikit_learn(program, params, wanted, c):
  got = run(linear_probe, program, params, C=c, hold_out=0.2)
  for grid in program.grids:
    where = f"probe/{config_utils.format_grid(grid)}"
    chosen = got[f"{where}/C"]
    assert chosen == c or c is None
    model = linear_model.LogisticRegression(
      C=chosen, solver="newton-cholesky", tol=1e-8
    )
    x, y = (
      [wanted[split, key] for split in ("train", "test")]
      if key == "label"
      else [wanted[split, grid, key] for split in ("train", "test")]
      for key in ("compressed", "label")
    )
    model.fit(x[0], y[0])
    assert got[f"{where}/top1"] == pytest.approx(
      model.score(x[1], y[1]), abs=0.002
    )
  assert 0.2 < got["probe/2x2/top1"] < 1  # Else nothing was tested.


def test_few_shot_by_the_normal_equations(program, params, wanted):
  got = run(few_shot, program, params, shots=[1, 2], seeds=2, grids=[(1, 3)])
  assert set(got) == {
    f"probe/1x3/{n}_shot{end}" for n in (1, 2) for end in ("", "_std")
  }
  labels = wanted["train", "label"]
  for shots in (1, 2):
    found = []
    for seed in range(2):
      places = few_shot.draw(labels, 10, shots, seed)
      assert np.bincount(labels[places]).tolist() == [shots] * 10
      x = wanted["train", (1, 3), "compressed"][places]
      mean, std = x.mean(0), x.std(0) + 1e-5

      def prepare(x, mean=mean, std=std):
        return np.c_[(x - mean) / std, np.full(len(x), 100.0)]

      a = prepare(x)
      y = np.where(labels[places][:, None] == np.arange(10), 1.0, -1.0)
      kernel = np.linalg.solve(a.T @ a + 1024 * np.eye(a.shape[1]), a.T @ y)
      z = prepare(wanted["test", (1, 3), "compressed"]) @ kernel
      found.append(np.mean(z.argmax(-1) == wanted["test", "label"]))
    assert got[f"probe/1x3/{shots}_shot"] == pytest.approx(np.mean(found))
    std = abs(found[0] - found[1]) / np.sqrt(2)
    assert got[f"probe/1x3/{shots}_shot_std"] == pytest.approx(std)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_knn_by_brute_force(program, params, wanted, metric):
  got = run(knn, program, params, k=[1, 4], metric=metric, features="lookup")
  for grid in program.grids:
    x = wanted["train", grid, "lookup"]
    z = wanted["test", grid, "lookup"]
    if metric == "cosine":
      x, z = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, z))
    distance = np.linalg.norm(z[:, None] - x, axis=-1)
    where = f"probe/{config_utils.format_grid(grid)}"
    for k in (1, 4):
      nearest = wanted["train", "label"][np.argsort(distance)[:, :k]]
      best = [np.bincount(n).argmax() for n in nearest]
      right = np.mean(np.array(best) == wanted["test", "label"])
      assert got[f"{where}/{k}_nn"] == pytest.approx(right)
      model = neighbors.KNeighborsClassifier(k, metric=metric)
      model.fit(wanted["train", grid, "lookup"], wanted["train", "label"])
      assert got[f"{where}/{k}_nn"] == model.score(
        wanted["test", grid, "lookup"], wanted["test", "label"]
      )


@pytest.mark.parametrize(
  ("module", "fields", "words"),
  [
    (linear_probe, dict(hold_out=1.5), "probe.hold_out=1.5: want 0 < share"),
    (linear_probe, dict(C=-1), "probe.C=-1: want a number > 0"),
    (linear_probe, dict(max_steps=0), "probe.max_steps=0"),
    (linear_probe, dict(features="cls"), "config.evals.probe: features='cls'"),
    (linear_probe, dict(block=2), "config.evals.probe: block=2"),
    (linear_probe, dict(grids=[(9, 9)]), "config.evals.probe.grids"),
    (
      linear_probe,
      dict(pp_fn="decode|value_range(-1,1)|keep('image')"),
      "config.evals.probe.pp_fn: a batch has",
    ),
    (linear_probe, dict(train=dict(name="x", module="y")), "probe.train: "),
    (linear_probe, dict(penalty=1.0), "probe: there is no field penalty"),
    (few_shot, dict(shots=[]), "probe.shots=[]: want a list"),
    (few_shot, dict(shots=[0]), "probe.shots=0: want an integer >= 1"),
    (few_shot, dict(seeds=0), "probe.seeds=0"),
    (knn, dict(k=5), "probe.k=5: want a list"),
    (knn, dict(k=[71]), "probe.k=71: there are 70"),
    (knn, dict(metric="dot"), "probe.metric='dot': want cosine or euclidean"),
  ],
)
def test_what_cannot_work_is_said_first(program, module, fields, words):
  with pytest.raises(ValueError) as e:
    module.Evaluator(program, "probe", **FIELDS | fields)
  assert words in str(e.value)


def test_too_few_examples_for_the_shots(program, params):
  with pytest.raises(ValueError, match=r"probe.shots: class \d has \d+ exa"):
    run(few_shot, program, params, shots=[60])
