"""Checkpoints: exact, checked, and a start for other models."""

import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit import checkpoints, config_utils, train, train_step
from lookup_vit.models import factorised, layers, lookup_vit
from tests import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  config = small.config(evals={}, ckpt_keep=3)
  return config, workdir, train.train_and_evaluate(config, workdir)


@pytest.fixture
def copy(run, tmp_path):
  config, workdir, state = run
  target = str(tmp_path / "copy")
  shutil.copytree(workdir, target)
  return config, target, state


def _largest_file(folder):
  files = [
    os.path.join(root, name)
    for root, _, names in os.walk(folder)
    for name in names
  ]
  return max(files, key=os.path.getsize)


def _flip(path):
  with open(path, "r+b") as f:
    content = bytearray(f.read())
    content[len(content) // 2] ^= 0x10
    f.seek(0)
    f.write(content)


def _truncate(path):
  with open(path, "r+b") as f:
    f.truncate(os.path.getsize(path) // 2)


@pytest.mark.parametrize(
  "damage, item",
  [(_flip, "params"), (_truncate, "opt_state"), (os.remove, "params")],
)
def test_damage_is_noticed_and_the_offer_works(copy, damage, item):
  config, workdir, state = copy
  damage(_largest_file(os.path.join(workdir, "checkpoints", "12", item)))
  with pytest.raises(checkpoints.DamagedCheckpointError) as e:
    train.train_and_evaluate(config, workdir)
  message = str(e.value)
  assert os.path.join("checkpoints", "12") in message
  assert "step 8" in message
  # The command that it offers.
  source, target = re.search(r"mv (\S+) (\S+)$", message).groups()
  shutil.move(source, target)
  again = train.train_and_evaluate(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_damage_of_the_only_checkpoint(copy):
  _, workdir, _ = copy
  for step in (4, 8):
    shutil.rmtree(os.path.join(workdir, "checkpoints", str(step)))
  _flip(_largest_file(os.path.join(workdir, "checkpoints", "12", "params")))
  with pytest.raises(checkpoints.DamagedCheckpointError, match="no earlier"):
    checkpoints.load_params(workdir)


def test_a_save_that_was_killed_does_not_count(copy):
  _, workdir, _ = copy
  folder = os.path.join(workdir, "checkpoints")
  shutil.copytree(
    os.path.join(folder, "12"),
    os.path.join(folder, "16.orbax-checkpoint-tmp"),
  )
  assert checkpoints.load_params(workdir)[1] == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_checksum_sees_any_single_change(dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(0, 2, (3, 5, 7))).astype(dtype)
  before = checkpoints._checksums([x])[0]
  seen = set()
  for place in np.ndindex(x.shape):
    changed = x.at[place].set(1 - x[place])
    seen.add(int(checkpoints._checksums([changed])[0]))
  assert int(before) not in seen
  assert len(seen) > 0.99 * x.size
  # Also two elements exchanged.
  y = jnp.asarray(rng.normal(size=(4, 6)).astype(np.float32))
  swapped = y.at[0, 0].set(y[3, 5]).at[3, 5].set(y[0, 0])
  assert checkpoints._checksums([y]) != checkpoints._checksums([swapped])


def test_missing_things_are_named(tmp_path, run):
  with pytest.raises(ValueError, match=r"no config\.json"):
    checkpoints.load_params(str(tmp_path))
  with pytest.raises(ValueError, match=r"no checkpoint 5, only \[4, 8, 12\]"):
    checkpoints.load_params(run[1], 5)
  config = config_utils.resolve(small.config())
  checkpoints.write_config(str(tmp_path), config)
  with pytest.raises(ValueError, match="has no checkpoint"):
    checkpoints.load_params(str(tmp_path))


def _fresh(**fields):
  config = small.config(evals={}, grids=None, **fields)
  return train_step.Program(config_utils.resolve(config), 12)


def test_init_from_other_layout_classes_and_grid(run, caplog):
  _, workdir, state = run
  program = _fresh(model__scan=True, num_classes=3, input__image_size=(64, 48))
  fresh = program.init_state().params
  checkpoints.log.propagate = True
  with caplog.at_level("INFO"):
    got = checkpoints.init_from(f"{workdir}:12", fresh, True)
  want = layers.stack_blocks(jax.tree.map(np.asarray, state.params))
  jax.tree.map(
    np.testing.assert_array_equal, got["encoderblock"], want["encoderblock"]
  )
  np.testing.assert_array_equal(
    got["head_lookup"]["kernel"], fresh["head_lookup"]["kernel"]
  )
  assert got["pos_embedding"].shape == (8, 6, 32)
  np.testing.assert_allclose(
    got["pos_embedding"],
    jax.image.resize(want["pos_embedding"], (8, 6, 32), "linear"),
  )
  assert "head_compressed/kernel" in caplog.text
  assert "pos_embedding (4, 4, 32) to (8, 6, 32)" in caplog.text
  # The same classes: the heads come along; and back from scan to loop.
  loop = _fresh().init_state().params
  got = checkpoints.init_from(workdir, loop, False)
  jax.tree.map(np.testing.assert_array_equal, got, state.params)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(model__width=64), ["embedding/kernel is (8, 8, 3, 32)", "64)"]),
    (dict(model__depth=2), ["encoderblock_1/", "is missing"]),
    (
      dict(model__reuse="none"),
      ["mhbc/value_back/kernel", "no place in the model"],
    ),
  ],
)
def test_init_from_what_does_not_fit(run, fields, words):
  fresh = _fresh(**fields).init_state().params
  with pytest.raises(ValueError, match="config.model_init") as e:
    checkpoints.init_from(run[1], fresh, False)
  for word in words:
    assert word in str(e.value)


def test_training_starts_from_model_init(run, tmp_path):
  _, workdir, state = run
  config = small.config(
    evals={}, model_init=workdir, total_steps=1, schedule=dict(warmup_steps=1)
  )
  # The first step of a warm-up has a rate of zero: nothing moves.
  got = train.train_and_evaluate(config, str(tmp_path / "run"))
  jax.tree.map(np.testing.assert_array_equal, got.params, state.params)
  bad = small.config(evals={}, model_init=str(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match=r"config\.model_init=.*nowhere"):
    train.train_and_evaluate(bad, str(tmp_path / "bad"))
  assert not os.path.exists(tmp_path / "bad" / "config.json")


# From images to videos.

_TO_CLIP = "decode|still_clip(4)|unfold_clip(4)|value_range(-1,1)"
_FACTORISED = dict(
  variant="mu/2x8", spatial="lookup_vit", depth=1, temporal_depth=1, grid=(2, 2)
)


class _NoCheckpoint:
  """Of a new work directory."""

  def steps(self):
    return []


def _shapes(model, *size):
  images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


@pytest.fixture(scope="module")
def factorised_run(run, tmp_path_factory):
  """A step, of a rate of zero, from the images' run."""
  workdir = str(tmp_path_factory.mktemp("factorised"))
  config = small.config(
    model_name="factorised",
    model=_FACTORISED | dict(scan=True),
    grids=[(1, 3)],
    input__image_size=(4, 32, 32),
    input__pp=f"{_TO_CLIP}|keep('image','label')",
    model_init=run[1],
    total_steps=1,
    schedule=dict(warmup_steps=1),
  )
  config.evals.test.pp_fn = config.input.pp
  return config, workdir, train.train_and_evaluate(config, workdir)


def test_lookup_vivit_from_a_run_on_images(run, caplog):
  config, workdir, state = run
  video_config = small.config(
    evals={},
    model__variant="mu/2x8",
    model__grid=(1, 2, 2),
    grids=None,
    input__image_size=(4, 32, 32),
    model_init=workdir,
    model_init_inflation="average",
  )
  program = train_step.Program(config_utils.resolve(video_config), 12)
  checkpoints.log.propagate = True
  with caplog.at_level("INFO"):
    video = train.restore_or_init(program, _NoCheckpoint())
  assert "patch kernel average" in caplog.text
  assert "contextualisation kernels times 2" in caplog.text
  images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3))
  model = train_step.build_model(config_utils.resolve(config))
  want, _ = jax.jit(model.apply)({"params": state.params}, images)
  clip = np.repeat(images[:, None], 4, axis=1)
  got, _ = jax.jit(program.model.apply)({"params": video.params}, clip)
  assert np.std(want) > 1e-3
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_factorised_from_a_run_on_images(run, factorised_run):
  """A slice has what the image model had; the rest is as it was drawn."""
  _, _, state = run
  config, workdir, got = factorised_run
  drawn = train_step.Program(config_utils.resolve(config), 1).init_state()
  want = layers.stack_blocks(jax.tree.map(np.asarray, state.params))
  kernel = np.zeros((2, 8, 8, 3, 32), np.float32)
  kernel[1] = want["embedding"]["kernel"]  # Central, where one does not say.
  want["embedding"]["kernel"] = kernel
  del want["head_compressed"], want["head_lookup"]
  want = drawn.params | {"spatial": want}
  jax.tree.map(np.testing.assert_array_equal, got.params, want)
  [row] = small.results(workdir)
  assert row["grid"] == "1x3" and np.isfinite(row["loss"]) and row["gflops"] > 0


def test_factorised_from_factorised(factorised_run):
  """In another layout, for longer clips."""
  _, workdir, state = factorised_run
  target = _shapes(factorised.Model(10, **_FACTORISED), 8, 32, 32)
  got = checkpoints.init_from(workdir, target, False)
  want = layers.unstack_blocks(jax.tree.map(np.asarray, state.params))
  for name in ("temporal_compressed", "temporal_lookup"):
    assert got[name]["pos_embedding"].shape == (4, 32)
    np.testing.assert_allclose(
      got[name].pop("pos_embedding"),
      jax.image.resize(want[name].pop("pos_embedding"), (4, 32), "linear"),
    )
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_inflation_of_what_does_not_fit(run, factorised_run):
  grid = dict(depth=1, grid=(2, 2, 2))
  wide = _shapes(lookup_vit.Model(10, "mu/2x16", **grid), 4, 32, 32)
  with pytest.raises(ValueError, match=r"config\.model_init=.*\(8, 8\)") as e:
    checkpoints.init_from(run[1], wide, False)
  assert "(2, 16, 16), in space" in str(e.value)
  image = _shapes(lookup_vit.Model(10, "mu/8", depth=1, grid=(2, 2)), 32, 32)
  with pytest.raises(ValueError, match=r"config\.model_init=.*\(8, 8\)") as e:
    checkpoints.init_from(factorised_run[1], image, False)
  assert "(2, 8, 8), for an image model" in str(e.value)


def test_learned_compressed_tokens_are_resized(tmp_path, caplog):
  """As positions are, where the model's own grid is another."""
  learned = dict(model__compressed_init="learned", model__depth=1)
  trained = _fresh(**learned)
  state = trained.init_state()
  checkpoints.write_config(str(tmp_path), trained.config)
  store = checkpoints.Checkpoints(str(tmp_path))
  store.save(1, state)
  store.close()
  target = _fresh(model__grid=(3, 1), **learned).state_shapes.params
  checkpoints.log.propagate = True
  with caplog.at_level("INFO"):
    got = checkpoints.init_from(str(tmp_path), target, False)
  queries = got.pop("compressed_queries")
  want = dict(state.params)
  np.testing.assert_allclose(
    queries,
    jax.image.resize(want.pop("compressed_queries"), (3, 1, 32), "linear"),
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert "compressed_queries (2, 2, 32) to (3, 1, 32)" in caplog.text
