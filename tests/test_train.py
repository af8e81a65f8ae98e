"""Whole runs: training, what it logs and leaves, and where it must stop."""

import copy
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf
from PIL import Image

from lookup_vit import (
  checkpoints,
  config_utils,
  distributed,
  evaluate,
  evaluation,
  metric_writer,
  train,
  train_step,
)
from tests import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """An undisturbed run with mixing, a Polyak average and an attention log."""
  workdir = str(tmp_path_factory.mktemp("run"))
  config = small.config(
    ema_decay=0.9,
    mixup=dict(p=0.5),
    cutmix=dict(p=1.0),
    log_attention_logit=True,
    ckpt_keep=2,
    ckpt_keep_every=4,
  )
  config.evals.test.log_steps = 6
  return config, workdir, train.train_and_evaluate(config, workdir)


def test_leaves_what_a_person_wants(run):
  _, workdir, _ = run
  names = set(os.listdir(workdir))
  assert {
    "config.json",
    "classes.json",
    "checkpoints",
    "metrics.jsonl",
    "environment.jsonl",
    "results.json",
    "accuracy_vs_flops.png",
    "attention_maps.png",
  } <= names
  assert any(n.startswith("events.out.tfevents") for n in names)
  assert checkpoints.read_classes(workdir) == list("0123456789")
  rows = small.results(workdir)
  assert [r["grid"] for r in rows] == ["2x2", "1x3"]
  assert rows[0]["gflops"] > rows[1]["gflops"] > 0
  assert rows[0]["parameters"] == rows[1]["parameters"] > 0


def test_logs_every_step(run):
  config, workdir, _ = run
  rows = [r for r in metric_writer.read(workdir) if "train/loss" in r]
  assert [r["step"] for r in rows] == list(range(1, 13))
  grids = [(2, 2), (1, 3)]
  for r in rows:
    heads = (r["train/loss_compressed"] + r["train/loss_lookup"]) / 2
    np.testing.assert_allclose(r["train/loss"], heads, rtol=1e-5)
    drawn = train_step.draw_grid(grids, config.seed, r["step"] - 1)
    assert r["train/grid"] == config_utils.format_grid(drawn)
    assert r["train/grad_norm"] > 0
    assert np.isfinite(r["train/attention_logit_max"])
    assert ("train/images_per_second" in r) == (r["step"] > 1)
    assert 0 <= r["train/input_wait"] <= 1
  # The rate of the update from step k is that of k: warm-up starts at zero.
  assert rows[0]["train/lr"] == 0 == rows[0]["train/update_norm"]
  assert rows[1]["train/lr"] == pytest.approx(config.lr / 2)
  assert {r["train/grid"] for r in rows} == {"2x2", "1x3"}


def test_evaluate_repeats_the_numbers(run):
  _, workdir, _ = run
  again = evaluate.evaluate(workdir)
  assert again == small.results(workdir)
  with open(os.path.join(workdir, "evaluation_12.json")) as f:
    assert json.load(f) == again
  earlier = evaluate.evaluate(workdir, step=4)
  assert earlier != again


def test_evaluates_what_the_config_does_not_name(run, tmp_path, caplog):
  _, workdir, _ = run
  file = tmp_path / "evals.py"
  file.write_text(
    "import ml_collections\n"
    "def get_config(arg=None):\n"
    "  data = dict(module='data.digits', split=f'test[:{arg}]')\n"
    "  pp = \"decode|value_range(-1,1)|keep('image','label')\"\n"
    "  few = dict(type='classification', data=data, pp_fn=pp)\n"
    "  return ml_collections.ConfigDict(dict(few=few))\n"
  )
  before = evaluate.evaluate(workdir)
  with caplog.at_level("INFO"):
    rows = evaluate.evaluate(
      workdir, evals=["test", "knn", f"{file}:7"], grids=[(2, 2), (2, 3)]
    )
  assert "2x3: the model was trained at 2x2, 1x3, not at this" in caplog.text
  found = {(r["split"], r["grid"]): r for r in rows}
  names = [(s, g) for s in ("few", "knn", "test") for g in ("2x2", "2x3")]
  assert sorted(found) == names
  assert found["test", "2x2"] == before[0]
  assert found["few", "2x2"]["top1"] * 7 == pytest.approx(
    round(found["few", "2x2"]["top1"] * 7)
  )
  assert "20_nn" in found["knn", "2x3"]
  # Results of other evaluators and grids stay in the file.
  with open(os.path.join(workdir, "evaluation_12.json")) as f:
    kept = {(r["split"], r["grid"]) for r in json.load(f)}
  assert kept == {*names, ("test", "1x3")}


def test_what_was_evaluated_before_an_error_stays(run):
  _, workdir, _ = run
  path = os.path.join(workdir, "evaluation_8.json")
  with pytest.raises(
    ValueError, match="few_shot.shots: class 0 has .* want 25"
  ):
    evaluate.evaluate(workdir, step=8, evals=["classification", "few_shot"])
  with open(path) as f:
    rows = json.load(f)
  assert [(r["split"], r["grid"]) for r in rows] == [
    ("classification", "2x2"),
    ("classification", "1x3"),
  ]
  os.remove(path)


def test_damaged_results_of_an_earlier_evaluation(run, monkeypatch):
  _, workdir, _ = run
  path = os.path.join(workdir, "evaluation_8.json")
  with open(path, "w") as f:
    f.write("[{")
  # It is told before anything is evaluated.
  none = {"test": (None, None)}
  monkeypatch.setattr(evaluation, "make", lambda *_: none)
  with pytest.raises(ValueError) as e:
    evaluate.evaluate(workdir, step=8)
  assert f"{path} is damaged" in str(e.value)
  os.remove(path)


@pytest.mark.parametrize(
  ("asked", "words"),
  [
    (dict(evals=["val"]), "--evals=val: the config has test; types are capt"),
    (dict(evals=["test", "test"]), "--evals: there are two evaluators 'test'"),
    (dict(evals=["no/such.py"]), "--evals=no/such.py"),
    # A config of a training.
    (dict(evals=["configs/digits_vit.py"]), "vit.py: want dicts by names"),
    (dict(grids=[(9, 9)]), "config.evals.test.grids"),
    (dict(grids=[(2, 2), (2, 2)]), "--grid=2x2,2x2 names one twice"),
    (dict(step=5), "has no checkpoint 5, only [4, 8, 12]"),
  ],
)
def test_evaluations_that_cannot_be(run, asked, words):
  _, workdir, _ = run
  with pytest.raises(ValueError) as e:
    evaluate.evaluate(workdir, **asked)
  assert words in str(e.value)


def test_evaluations_of_runs_that_are_not_ready(tmp_path):
  def evaluate_run(name, **fields):
    config = config_utils.resolve(small.config(**fields))
    workdir = tmp_path / name
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    evaluate.evaluate(str(workdir), grids=[(2, 2)])

  with pytest.raises(ValueError, match="untrained.* has no checkpoint"):
    evaluate_run("untrained")


@pytest.mark.parametrize("kind", ["classification", "robustness"])
def test_images_of_more_classes(run, tmp_path, kind):
  _, workdir, _ = run
  for name in "abcdefghijkl":
    folder = tmp_path / "images" / "val" / name
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "0.png")
  file = tmp_path / "evals.py"
  file.write_text(
    "import ml_collections\n"
    "def get_config(arg=None):\n"
    f"  data = dict(folder={str(tmp_path / 'images')!r}, split='val')\n"
    "  pp = \"decode|resize(32)|value_range(-1,1)|keep('image','label')\"\n"
    f"  one = dict(type={kind!r}, data=data, pp_fn=pp)\n"
    "  return ml_collections.ConfigDict(dict(mine=one))\n"
  )
  with pytest.raises(ValueError) as e:
    evaluate.evaluate(workdir, evals=[str(file)])
  words = "config.evals.mine.data has 12 classes, config.num_classes is 10."
  assert str(e.value) == words


def test_a_linear_probe_of_the_run(run, tmp_path):
  _, workdir, state = run
  spec = "data=data.digits,train=train[:96],val=test[:9],batch=8,epochs=1"
  config = config_utils.load(
    f"configs/linear_probe.py:from={workdir},features=both,block=-1,{spec}"
  )
  config.lr = 1.0
  found = train.train_and_evaluate(config, str(tmp_path))
  # The Polyak average, which is what was evaluated.
  before = {k: v for k, v in state.ema.items() if not k.startswith("head")}
  jax.tree.map(np.testing.assert_array_equal, found.params["encoder"], before)
  paths = jax.tree_util.tree_leaves_with_path(found.opt_state)
  assert not any("encoder" in jax.tree_util.keystr(path) for path, _ in paths)
  assert np.any(found.params["head"]["kernel"])
  # Statistics are those of the features of the first batches.
  config = config_utils.read_workdir(str(tmp_path))
  program = train_step.Program(config, config.total_steps)
  x = []
  for i, batch in zip(range(16), train.make_dataset(config, 0), strict=False):
    grid = program.grids[i % 2]
    _, out = program.apply(found.params, batch, grid)
    x.append(np.asarray(out["features"], np.float64))
  x = np.concatenate(x)
  assert x.shape == (16 * 8, 2 * 32)
  norm = found.params["norm"]
  np.testing.assert_allclose(norm["mean"], x.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(norm["variance"], x.var(0), rtol=1e-3, atol=1e-6)
  rows = small.results(str(tmp_path))
  assert [r["grid"] for r in rows] == ["2x2", "1x3"]
  assert all(0 <= r["top1"] <= 1 and "top1_lookup" not in r for r in rows)


def test_keeps_the_checkpoints_asked_for(run):
  _, workdir, _ = run
  assert checkpoints.Checkpoints(workdir, read_only=True).steps() == [4, 8, 12]


def test_ema_is_the_running_average_and_is_what_is_evaluated(run, tmp_path):
  config, workdir, state = run
  one = config.copy_and_resolve_references()
  one.evals = {}
  program = train_step.Program(config_utils.resolve(one), 12)
  batch = {
    "image": np.random.default_rng(0).uniform(-1, 1, (12, 32, 32, 3)),
    "label": np.arange(12) % 10,
  }
  before = program.init_state()
  want = jax.tree.map(np.asarray, before.ema)
  for _ in range(3):
    before, _ = program.update_step(before, batch, (2, 2))
    want = jax.tree.map(
      lambda e, p: 0.9 * e + 0.1 * np.asarray(p, np.float64),
      want,
      before.params,
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    before.ema,
    want,
  )
  params, step, _ = checkpoints.load_params(workdir)
  assert step == 12
  jax.tree.map(np.testing.assert_array_equal, params, state.ema)


def test_rerun_of_a_finished_run_changes_nothing(run):
  config, workdir, state = run
  rows = small.results(workdir)
  again = train.train_and_evaluate(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, again, state)
  assert small.results(workdir) == rows


def test_a_run_cut_short_continues_to_the_same_bits(run, tmp_path):
  config, _, state = run
  # The state of step 8 is what a killed run leaves.
  other = str(tmp_path / "run")
  train.train_and_evaluate(config, other)
  os.rename(
    os.path.join(other, "checkpoints", "12"), os.path.join(other, "away")
  )
  again = train.train_and_evaluate(config, other)
  jax.tree.map(np.testing.assert_array_equal, again, state)
  steps = [r["step"] for r in metric_writer.read(other) if "train/loss" in r]
  assert steps == list(range(1, 13))
  with open(os.path.join(other, "environment.jsonl")) as f:
    assert [json.loads(line)["step"] for line in f] == [0, 8]


@pytest.mark.parametrize(
  "log_steps, stopped",
  [(6, 6), pytest.param(None, 12, marks=pytest.mark.full)],
)
def test_told_to_stop_in_an_evaluation(
  log_steps, stopped, run, tmp_path, monkeypatch
):
  """At the step that the evaluation was of; the next start repeats it."""
  config, workdir, state = run
  config = copy.deepcopy(config)
  config.evals.test.log_steps = log_steps
  other = str(tmp_path / "run")

  def check():
    raise distributed.Preempted

  with monkeypatch.context() as patch:
    patch.setattr(distributed, "check", check)
    with pytest.raises(SystemExit) as e:
      train.train_and_evaluate(config, other)
  assert e.value.code == 75
  assert checkpoints.load_params(other)[1] == stopped
  assert not evaluations(other)
  again = train.train_and_evaluate(config, other)
  jax.tree.map(np.testing.assert_array_equal, again, state)
  want = [row for row in evaluations(workdir) if row["step"] >= stopped]
  assert [row["step"] for row in want] == [6, 12][-len(want) :]
  assert evaluations(other) == want
  # And a finished run is not written to.
  train.train_and_evaluate(config, other)
  assert evaluations(other) == want


def evaluations(workdir):
  return [r for r in metric_writer.read(workdir) if "train/loss" not in r]


def test_mixture_of_data_sets(tmp_path):
  data = dict(module="data.digits", split="train[:60]", weight=2.0)
  other = dict(module="data.digits", split="train[100:137]", weight=1)
  config = small.config(total_steps=4, grids=[(2, 2)], evals={})
  config.input.data = dict(mixture=[data, other])
  state = train.train_and_evaluate(config, str(tmp_path))
  again = train.train_and_evaluate(config, str(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, state, again)
  config.total_steps, config.total_epochs = None, 3
  with pytest.raises(ValueError, match="mixture has no epochs.*total_steps"):
    train.train_and_evaluate(config, str(tmp_path / "other"))


def test_what_was_checked_is_not_traced_again(monkeypatch, tmp_path):
  """The update of the check by shapes is the one that is compiled."""
  traced = []
  update = train_step.Program.update

  def counted(self, state, batch, grid):
    traced.append(grid)
    return update(self, state, batch, grid)

  monkeypatch.setattr(train_step.Program, "update", counted)
  config = small.config(total_steps=2, evals={})
  config.grids = [(1, 3)]
  train.train_and_evaluate(config, str(tmp_path))
  assert traced == [(1, 3)]


def test_gradient_accumulation_is_the_whole_batch():
  """Summed over micro-batches: the same update, to rounding."""
  batch = {
    "image": np.random.default_rng(1).uniform(-1, 1, (12, 32, 32, 3)),
    "label": np.arange(12) % 10,
  }
  found = []
  for accum in (1, 3):
    config = small.config(
      model__dropout=0.0,
      grad_accum_steps=accum,
      mixup=dict(p=0.2),
      optax_name="sgd",
      schedule={},
      evals={},
      log_attention_logit=True,
    )
    program = train_step.Program(config_utils.resolve(config), 12)
    state = program.init_state()
    found.append(program.update_step(state, batch, (2, 2)))
  (a, scalars_a), (b, scalars_b) = found
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    (a.params, scalars_a),
    (b.params, scalars_b),
  )


def test_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(tmp_path):
  workdir = str(tmp_path)
  # From step 6 on the rate is beyond float32.
  config = small.config(ckpt_steps=2, lr=1.0, schedule={})
  jumps = lambda step: jnp.where(step < 5, 1e-3, 1e38)  # noqa: E731
  make = train_step.optim.make_schedule
  train_step.optim.make_schedule = lambda *args: jumps
  try:
    with pytest.raises(FloatingPointError) as e:
      train.train_and_evaluate(config, workdir)
  finally:
    train_step.optim.make_schedule = make
  message = str(e.value)
  bad = int(message.split("Update ")[1].split(" ")[0])
  assert bad in (6, 7)
  kept = checkpoints.Checkpoints(workdir, read_only=True).steps()
  assert f"step {kept[-1]} in" in message and kept[-1] < bad
  last = metric_writer.read(workdir)[-1]
  assert last["step"] == bad and "grad_norm" in last["train/diverged"]
  params, _, _ = checkpoints.load_params(workdir)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_frozen_parameters_do_not_move(tmp_path):
  config = small.config(
    frozen=["embedding/.*", "pos_embedding"], total_steps=4, evals={}
  )
  program = train_step.Program(config_utils.resolve(config), 4)
  first = jax.tree.map(np.asarray, program.init_state().params)
  state = train.train_and_evaluate(config, str(tmp_path))
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params["embedding"], state.params["pos_embedding"]),
    (first["embedding"], first["pos_embedding"]),
  )
  moved = (
    state.params["head_lookup"]["kernel"] != first["head_lookup"]["kernel"]
  )
  assert moved.any()
  adam = next(
    s
    for s in jax.tree.leaves(
      state.opt_state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState)
    )
    if isinstance(s, optax.ScaleByAdamState)
  )
  assert len(jax.tree.leaves(adam.mu)) == len(jax.tree.leaves(first)) - 3


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(learning_rate=1), ["learning_rate", "lr"]),
    (dict(input__batchsize=8), ["config.input.batchsize", "batch_size"]),
    (dict(model_name="lookupvit"), ["config.model_name='lookupvit'"]),
    (dict(model__variant="XL/16"), ["'XL/16'", "B/16"]),
    (dict(model__widht=8), ["'widht'", "width"]),
    (dict(model__reuse="all"), ["reuse='all'", "weights"]),
    (dict(grids=[(2, 2), (5, 3)]), ["(5, 3)", "(4, 4)"]),
    (dict(grids=[(2, 2, 2)]), ["(2, 2, 2)", "(4, 4)"]),
    (dict(model__variant="mu/7"), ["(7, 7)", "(32, 32)"]),
    (dict(input__image_size=(64, 64)), ["(32, 32, 3)", "(64, 64, 3)"]),
    (dict(num_classes=7), ["10 classes", "7"]),
    (dict(mesh=[("data", 3)]), ["config.mesh", "1 device"]),
    (dict(lr="abc"), ["config.lr='abc'", "number"]),
    (dict(seed=-1), ["config.seed=-1"]),
    (dict(ckpt_keep=0), ["config.ckpt_keep=0"]),
    (dict(grad_clip_norm=-1), ["config.grad_clip_norm=-1"]),
    (dict(ema_decay=2), ["config.ema_decay=2"]),
    (dict(grids=[]), ["config.grids=[]"]),
    (dict(grids=["2x2"]), ["config.grids=['2x2']"]),
    (dict(input__shuffle_buffer_size=0), ["shuffle_buffer_size=0"]),
    (dict(input__image_size=32), ["config.input.image_size=32"]),
    (dict(input__pp="decode|keep('image','label')"), ["value_range"]),
    (dict(optax=dict(b1="x")), ["config"]),
    (dict(optax=dict(beta=1)), ["config.optax", "beta"]),
    (dict(frozen=[".*"]), ["config.frozen"]),
    (dict(schedule=dict(warmup_steps="a")), ["config.schedule.warmup_steps"]),
    (
      dict(schedule=dict(warmup_steps=1, warmup_percent=0.1)),
      ["config.schedule", "warmup_percent"],
    ),
    (dict(schedule=dict(warmup_steps=-5)), ["config.schedule", "warmup_steps"]),
    (dict(model__depth=0), ["depth=0"]),
    (dict(model__dropout="a"), ["dropout='a'"]),
    (dict(model__dtype="float31"), ["dtype='float31'"]),
    (dict(model_name="layers"), ["config.model_name='layers'", "Model"]),
    (dict(task="mixing"), ["config.task='mixing'", "Task"]),
    (dict(evals__test__batch_size=0), ["config.evals.test.batch_size=0"]),
    (dict(evals__test__grids=[]), ["config.evals.test.grids"]),
    (dict(evals__test__log_steps=-1), ["config.evals.test.log_steps=-1"]),
    (dict(evals={"a/b": {}}), ["a/b"]),
    (dict(loss="hinge"), ["config.loss='hinge'", "softmax_xent"]),
    (dict(optax_name="lion"), ["config.optax_name='lion'", "adamw"]),
    (dict(frozen=["nothing"]), ["config.frozen", "'nothing'"]),
    (dict(evals__test__type="probe"), ["config.evals.test.type='probe'"]),
    (dict(evals__test__shots=5), ["config.evals.test", "shots"]),
    (dict(input__data__split="train[:0]"), ["train[:0]"]),
    (dict(input__data__split="valid"), ["'valid'", "train", "test"]),
    (dict(input__pp="decode|crop_inception(32)"), ["crop_inception"]),
    (
      dict(input__data=dict(name="imagenet2012", split="train")),
      ["tfds build imagenet2012", "--manual_dir"],
    ),
    (
      dict(input__data=dict(folder="/nowhere", split="train")),
      ["/nowhere"],
    ),
  ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
  fields, words, tmp_path
):
  workdir = str(tmp_path / "run")
  with pytest.raises(ValueError) as e:
    train.train_and_evaluate(small.config(**fields), workdir)
  for word in words:
    assert word in str(e.value)
  assert not os.path.exists(workdir)


def test_a_work_directory_that_is_a_file(tmp_path):
  path = tmp_path / "file"
  path.write_text("")
  with pytest.raises(ValueError, match="workdir=.*file"):
    train.train_and_evaluate(small.config(), str(path))
  assert path.read_text() == ""


def test_evaluation_of_more_classes_than_the_model_has(tmp_path):
  folder = tmp_path / "folder"
  image = tf.io.encode_png(np.zeros((32, 32, 3), np.uint8)).numpy()
  for i in range(12):
    (folder / "val" / f"{i:02}").mkdir(parents=True)
    (folder / "val" / f"{i:02}" / "0.png").write_bytes(image)
  config = small.config()
  config.evals.test.data = dict(folder=str(folder), split="val")
  config.evals.test.pp_fn = "decode|resize(32)|value_range(-1,1)"
  with pytest.raises(ValueError, match="config.evals.test.data has 12 classes"):
    train.train_and_evaluate(config, str(tmp_path / "run"))


def test_a_work_directory_of_another_config(run):
  config, workdir, _ = run
  other = config.copy_and_resolve_references()
  other.lr = 0.5
  other.ckpt_steps = 99  # Free to change.
  with pytest.raises(ValueError, match="belongs to another config") as e:
    train.train_and_evaluate(other, workdir)
  assert f"lr: {config.lr}, now 0.5" in str(e.value)
  assert "ckpt_steps" not in str(e.value)
