"""Training a captioner on a frozen encoder, and taking its run up again."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs.common import TOKENIZER
from lookup_vit import (
  checkpoints,
  config_utils,
  evaluate,
  metric_writer,
  model_init,
  tokenizer,
  train,
  train_step,
)
from lookup_vit.preprocess import train_tokenizer
from tests import small
from tests.models import common

STEPS, LENGTH, SIZE = 3, 14, 128
# Of the encoder, in both configs.
SMALL = dict(width=16, depth=1, num_heads=2, grid=(2, 2))


def shrink(config, data_dir, **encoder):
  config.input.data.data_dir = data_dir
  config.input.batch_size = 4
  config.total_steps = STEPS
  config.schedule = dict(decay_type="constant")
  config.log_training_steps = 1
  config.ema_decay = 0.5
  config.model.get("encoder", config.model).update(SMALL | encoder)
  return config


def write_encoder(data_dir, workdir):
  """What the training of an encoder leaves; returns its average, by path."""
  spec = "configs/digit_captions_lookup.py:task=classification,runlocal"
  config = shrink(config_utils.load(spec), data_dir)
  config = config_utils.resolve(config)
  program = train_step.Program(config, STEPS)
  shapes = program.state_shapes.params
  state = program.init_state(common.random_like(shapes, seed=0))
  average = common.random_like(shapes, seed=1)
  checkpoints.write_config(workdir, config)
  store = checkpoints.Checkpoints(workdir)
  store.save(7, state.replace(ema=jax.tree.map(jax.numpy.asarray, average)))
  store.close()
  return average


def of_captioner(data_dir, encoder, words, **fields):
  spec = f"runlocal,encoder={encoder},tokenizer={words}"
  config = config_utils.load(f"configs/digit_captions_lookup.py:{spec}")
  shrink(config, data_dir, **fields)
  config.model.update(depth=1, max_length=LENGTH)
  made = f"{words!r},24"
  assert made in config.input.pp
  config.input.pp = config.input.pp.replace(made, f"{words!r},{LENGTH}")
  config.evals.test.update(
    data=dict(config.input.data) | dict(split="test[:3]"),
    beams=1,
    max_length=2,
  )
  return config


def contents(folder):
  """Of all files in a folder, by their paths."""
  paths = pathlib.Path(folder).rglob("*")
  return {str(p): p.read_bytes() for p in paths if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Config, work directory, state; the encoder's, and its parameters."""
  folder = tmp_path_factory.mktemp("captions")
  data_dir = str(folder / "data")
  small.digit_captions(data_dir)
  encoder = str(folder / "encoder")
  trained = write_encoder(data_dir, encoder)
  before = contents(encoder)
  words = str(folder / "words.model")
  shutil.copy(TOKENIZER, words)
  config = of_captioner(data_dir, encoder, words)
  workdir = str(folder / "run")
  state = train.train_and_evaluate(config, workdir)
  assert contents(encoder) == before
  return config, workdir, state, encoder, trained


@pytest.fixture
def copy(run, tmp_path):
  """A config, its tokenizer and its work directory that a test may change."""
  config, workdir, *_ = run
  target = str(tmp_path / "run")
  shutil.copytree(workdir, target)
  own = pathlib.Path(config.tokenizer)
  content = own.read_bytes()
  yield config, target
  own.write_bytes(content)


def other_tokenizer(size):
  """The content of one with so many pieces."""
  texts = ["a small three in the top left and a large five in the bottom right"]
  return train_tokenizer.train(texts, size, "bpe", "identity")


def same(tree, other):
  """Whether two trees have the same arrays, to the bit."""
  tree, other = (common.flat(jax.device_get(x)) for x in (tree, other))
  return tree.keys() == other.keys() and all(
    np.asarray(x).tobytes() == np.asarray(other[path]).tobytes()
    for path, x in tree.items()
  )


def test_the_encoder_stays_as_it_is(run):
  """That of the encoder's checkpoint, the average, without its heads."""
  _, workdir, state, _, trained = run
  heads = {"head_compressed", "head_lookup"}
  assert heads < set(trained)
  trained = {name: x for name, x in trained.items() if name not in heads}
  assert same(state.params["encoder"], trained)
  assert same(state.ema["encoder"], trained)
  # It is not the encoder of a fresh model; the decoder is not either.
  program = train_step.Program(config_utils.resolve(config_of(workdir)), STEPS)
  fresh = program.init_state().params
  assert not same(fresh["encoder"], trained)
  for tree in (state.params, state.ema):
    was, now = (
      common.flat(jax.device_get(x["decoder"])) for x in (fresh, tree)
    )
    assert was.keys() == now.keys()
    assert not any(np.array_equal(was[path], now[path]) for path in was)
  assert not same(state.params["decoder"], state.ema["decoder"])
  # The same of what was saved.
  store = checkpoints.Checkpoints(workdir, read_only=True)
  saved = store.restore(STEPS, program.state_shapes, program.state_shardings)
  store.close()
  assert same(saved.params["encoder"], trained)
  assert same(saved.ema["encoder"], trained)
  assert same(saved.params["decoder"], state.params["decoder"])


def test_a_linear_probe_of_the_encoder(run, tmp_path):
  _, workdir, _, _, trained = run
  spec = f"configs/linear_probe.py:from={workdir},data=data.digits"
  config = config_utils.load(f"{spec},val=test")
  config.num_classes = 10
  program = train_step.Program(config_utils.resolve(config), STEPS)
  store = checkpoints.Checkpoints(str(tmp_path))
  params = train.restore_or_init(program, store).params
  store.close()
  heads = {"head_compressed", "head_lookup"}
  want = {name: x for name, x in trained.items() if name not in heads}
  assert same(params["encoder"], want)


def config_of(workdir):
  return config_utils.read_workdir(workdir).to_dict()


def test_no_optimizer_state_of_the_encoder(run):
  _, workdir, state, *_ = run
  paths = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  ]
  decoder = len(jax.tree.leaves(state.params["decoder"]))
  assert sum("'decoder'" in path for path in paths) == 2 * decoder
  assert not any("encoder" in path for path in paths)

  def on_disk(part):
    """Names of the arrays in the checkpoint, by its files."""
    path = pathlib.Path(workdir, "checkpoints", str(STEPS), part, "_METADATA")
    tree = json.loads(path.read_text())["tree_metadata"]
    kinds = {k: v["value_metadata"]["value_type"] for k, v in tree.items()}
    # What is masked has a name, and nothing under it.
    return [name for name, kind in kinds.items() if kind != "None"]

  kept = on_disk("opt_state")
  assert sum("'decoder'" in name for name in kept) == 2 * decoder
  assert not any("encoder" in name for name in kept)
  params = on_disk("params")
  assert sum("'encoder'" in name for name in params) == len(
    jax.tree.leaves(state.params["encoder"])
  )


def test_captions_that_are_too_long(run):
  """They are cut, and it is told how many."""
  config, workdir, *_ = run
  words = tokenizer.load(config.tokenizer)
  rows = metric_writer.read(workdir)
  logged = {
    r["step"]: r["train/captions_cut"] for r in rows if "train/loss" in r
  }
  assert list(logged) == [1, 2, 3]
  batches = iter(train.make_dataset(config_utils.resolve(config), 0))
  for step in logged:
    text = next(batches)["text"]
    assert text.shape == (4, LENGTH + 1)
    cut = [words.end not in row for row in text.tolist()]
    assert all(min(row) >= 0 for row, c in zip(text, cut, strict=True) if c)
    assert logged[step] == pytest.approx(np.mean(cut))
  assert 0 < sum(logged.values()) < 3


def test_an_encoder_that_does_not_fit(run):
  config, _, state, encoder, _ = run
  params = jax.device_get(state.params)
  config = config_utils.resolve(config)
  config.num_classes = SIZE
  rest = train_step.build_model(config).encoder, config.input.image_size
  wide = params["encoder"] | dict(pos_embedding=np.zeros((8, 8, 32)))
  match = r"config.model_init=.*does not fit.*pos_embedding .*want \(8, 8, 32\)"
  with pytest.raises(ValueError, match=match) as e:
    model_init.init_from(encoder, params | dict(encoder=wide), *rest)
  assert repr(encoder) in str(e.value)
  del wide["norm_compressed"]
  with pytest.raises(ValueError, match="norm_compressed.* has no place"):
    model_init.init_from(encoder, params | dict(encoder=wide), *rest)


def test_a_frozen_encoder_that_computes_something_else(run, tmp_path):
  config, *_ = run
  other = config.copy_and_resolve_references()
  other.model.encoder.num_heads = 4
  other.model.encoder.dropout = 0.1  # Of its training alone.
  with pytest.raises(ValueError, match="num_heads=4, but.*num_heads=2") as e:
    train.train_and_evaluate(other, str(tmp_path / "new"))
  assert str(e.value).startswith("config.model_init=")
  assert "dropout" not in str(e.value)


def test_a_random_encoder_is_told_of(run, tmp_path, caplog):
  config, *_ = run
  for frozen, said in ((True, 1), (False, 0)):
    other = config_utils.resolve(config)
    other.num_classes = SIZE
    other.model.frozen, other.model_init = frozen, None
    program = train_step.Program(other, STEPS)
    caplog.clear()
    train.restore_or_init(program, checkpoints.Checkpoints(str(tmp_path)))
    assert caplog.text.count("config.model_init is not set") == said


# Other tokenizers than that of the training.


@pytest.mark.parametrize("size", [40, SIZE])
def test_the_tokenizer_s_file_is_another_one(size, copy, run):
  """At the path of the config."""
  config, workdir = copy
  content = other_tokenizer(40)
  if size == SIZE:
    data = config.input.data.to_dict()
    captions = train_tokenizer.captions_of(data, "captions/text", True)
    content = train_tokenizer.train(captions, SIZE, "bpe")
  pathlib.Path(config.tokenizer).write_bytes(content)
  with pytest.raises(ValueError) as e:
    train.train_and_evaluate(config, workdir)
  if size == SIZE:
    assert f"config.tokenizer={config.tokenizer!r} is not the" in str(e.value)
    assert tokenizer.of_workdir(workdir) in str(e.value)
  else:
    assert f"num_classes: {SIZE}, now {size}" in str(e.value)
    assert workdir in str(e.value)
  # The run's own is as it was, and serves to evaluate.
  assert contents(workdir).keys() == {
    path.replace(run[1], workdir) for path in contents(run[1])
  }
  if size == SIZE:
    assert evaluate.evaluate(workdir) == small.results(run[1])


def test_a_config_with_another_tokenizer(copy, tmp_path):
  config, workdir = copy
  path = tmp_path / "other.model"
  path.write_bytes(other_tokenizer(40))
  other = config.copy_and_resolve_references()
  other.tokenizer = str(path)
  with pytest.raises(ValueError, match="belongs to another config") as e:
    train.train_and_evaluate(other, workdir)
  for word in ("num_classes: 128, now 40", f"now {str(path)!r}"):
    assert word in str(e.value)
  # Where the config says how many pieces there are.
  other.num_classes = SIZE
  with pytest.raises(ValueError, match="has 40 pieces.*num_classes is 128"):
    train.train_and_evaluate(other, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_training_by_another_tokenizer_than_reading(copy, tmp_path):
  """One of as many pieces, of which the op-string does not know."""
  config, _ = copy
  path = tmp_path / "other.model"
  data = config.input.data.to_dict()
  captions = train_tokenizer.captions_of(data, "captions/text", True)
  path.write_bytes(train_tokenizer.train(captions, SIZE, "bpe"))
  other = config.copy_and_resolve_references()
  other.tokenizer = str(path)
  with pytest.raises(ValueError, match="config.input.pp.* is another one") as e:
    train.train_and_evaluate(other, str(tmp_path / "new"))
  assert repr(str(path)) in str(e.value)
  assert repr(config.tokenizer) in str(e.value)
  assert not (tmp_path / "new").exists()


def test_the_tokenizer_s_file_is_gone(copy):
  config, workdir = copy
  pathlib.Path(config.tokenizer).unlink()
  with pytest.raises(ValueError, match="no such file.*has a copy") as e:
    train.train_and_evaluate(config, workdir)
  assert tokenizer.of_workdir(workdir) in str(e.value)


def test_the_work_directory_s_tokenizer_is_another_one(copy):
  config, workdir = copy
  own = pathlib.Path(tokenizer.of_workdir(workdir))
  content = own.read_bytes()
  own.write_bytes(other_tokenizer(40))
  match = f"{own}.* has 40 pieces, config.num_classes is {SIZE}"
  with pytest.raises(ValueError, match=match):
    evaluate.evaluate(workdir)
  with pytest.raises(ValueError, match=f"is not the one.*{own}"):
    train.train_and_evaluate(config, workdir)
  for damage, match in (
    (lambda: own.write_bytes(content[:300]), "config.tokenizer: .*damaged"),
    (own.unlink, "config.tokenizer: .*no such file"),
  ):
    damage()
    with pytest.raises(ValueError, match=match) as e:
      evaluate.evaluate(workdir)
    assert str(own) in str(e.value)
