"""What a training starts from: other runs, and published ViTs."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit import (
  checkpoints,
  config_utils,
  model_init,
  train,
  train_step,
)
from lookup_vit.models import factorised, layers, lookup_vit, warm_start
from tests import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  config = small.config(evals={}, ckpt_keep=3)
  return config, workdir, train.train_and_evaluate(config, workdir)


def _fresh(**fields):
  config = small.config(evals={}, grids=None, **fields)
  return train_step.Program(config_utils.resolve(config), 12)


def _start(spec, program, **kwargs):
  params = program.init_state().params
  size = program.config.input.image_size
  return model_init.init_from(spec, params, program.model, size, **kwargs)


def test_init_from_other_layout_classes_and_grid(run, caplog):
  _, workdir, state = run
  program = _fresh(model__scan=True, num_classes=3, input__image_size=(64, 48))
  fresh = program.init_state().params
  model_init.log.propagate = True
  with caplog.at_level("INFO"):
    got = _start(f"{workdir}:12", program)
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
  got = _start(workdir, _fresh())
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
  program = _fresh(**fields)
  with pytest.raises(ValueError, match="config.model_init") as e:
    _start(run[1], program)
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
  model_init.log.propagate = True
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
  model = factorised.Model(10, **_FACTORISED)
  target = _shapes(model, 8, 32, 32)
  got = model_init.init_from(workdir, target, model, (8, 32, 32))
  want = layers.unstack_blocks(jax.tree.map(np.asarray, state.params))
  for name in ("temporal_compressed", "temporal_lookup"):
    assert got[name]["pos_embedding"].shape == (4, 32)
    np.testing.assert_allclose(
      got[name].pop("pos_embedding"),
      jax.image.resize(want[name].pop("pos_embedding"), (4, 32), "linear"),
    )
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_inflation_of_what_does_not_fit(factorised_run):
  model = lookup_vit.Model(10, "mu/8", depth=1, grid=(2, 2))
  with pytest.raises(ValueError, match=r"config\.model_init=.*\(8, 8\)") as e:
    model_init.init_from(
      factorised_run[1], _shapes(model, 32, 32), model, (32, 32)
    )
  assert "(2, 8, 8), for an image model" in str(e.value)


def test_inflation_at_another_patch(run):
  _, workdir, state = run
  model = lookup_vit.Model(10, "mu/2x16", depth=1, grid=(2, 2, 2))
  target = _shapes(model, 4, 64, 64)
  got = model_init.init_from(workdir, target, model, (4, 64, 64))
  kernel = np.asarray(state.params["embedding"]["kernel"])
  want = np.zeros((2, 16, 16, 3, 32), np.float32)
  want[1] = warm_start.resample_patch(kernel, (16, 16))
  np.testing.assert_array_equal(got["embedding"]["kernel"], want)


def test_learned_compressed_tokens_are_resized(tmp_path, caplog):
  """As positions are, where the model's own grid is another."""
  learned = dict(model__compressed_init="learned", model__depth=1)
  trained = _fresh(**learned)
  state = trained.init_state()
  checkpoints.write_config(str(tmp_path), trained.config)
  store = checkpoints.Checkpoints(str(tmp_path))
  store.save(1, state)
  store.close()
  program = _fresh(model__grid=(3, 1), **learned)
  model_init.log.propagate = True
  with caplog.at_level("INFO"):
    got = _start(str(tmp_path), program)
  queries = got.pop("compressed_queries")
  want = dict(state.params)
  np.testing.assert_allclose(
    queries,
    jax.image.resize(want.pop("compressed_queries"), (3, 1, 32), "linear"),
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert "compressed_queries (2, 2, 32) to (3, 1, 32)" in caplog.text
