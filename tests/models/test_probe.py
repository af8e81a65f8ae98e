"""Tests of lookup_vit/models/probe.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import lookup_vit, probe

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (5, 16, 24, 3)).astype(np.float32)
ENCODER = dict(variant="mu/8", depth=2, grid=(2, 2), dropout=0.5)


@pytest.fixture(scope="module")
def made():
  """A probe of the first block's lookup tokens, and random parameters."""
  model = probe.Model(4, ENCODER, features="lookup", block=0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
  draw = lambda x: jnp.asarray(RNG.uniform(0.1, 1, x.shape), x.dtype)  # noqa: E731
  return model, jax.tree.map(draw, shapes)


def test_logits_by_hand(made):
  model, params = made
  logits, out = model.apply({"params": params}, IMAGES, grid=(1, 3))
  encoder = lookup_vit.Model(None, **ENCODER)
  _, captured = encoder.apply(
    {"params": params["encoder"]}, IMAGES, grid=(1, 3), capture=("tokens",)
  )
  x = np.asarray(captured["block_lookup_tokens"][0], np.float64).mean(1)
  np.testing.assert_allclose(out["features"], x, rtol=1e-5)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  z = (x - p["norm"]["mean"]) / np.sqrt(p["norm"]["variance"] + 1e-6)
  want = z @ p["head"]["kernel"] + p["head"]["bias"]
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_classifier_alone(made):
  model, params = made

  def loss(params, train):
    logits, _ = model.apply({"params": params}, IMAGES, train=train)
    return jnp.sum(jnp.square(logits))

  grads = jax.grad(loss)(params, True)
  assert all(not np.any(g) for g in jax.tree.leaves(grads["encoder"]))
  assert all(np.any(g) for g in jax.tree.leaves(grads["head"]))
  # The backbone's dropout is off: no random numbers are asked for.
  assert loss(params, True) == loss(params, False)


def test_statistics_of_batches():
  batches = RNG.normal(3, 2, (4, 6, 7)).astype(np.float32)
  params = {"head": 1, "norm": {"mean": None, "variance": None}}
  found = probe.calibrated(params, [probe.moments(x) for x in batches])
  x = batches.astype(np.float64).reshape(-1, 7)
  assert found["head"] == 1
  np.testing.assert_allclose(found["norm"]["mean"], x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(found["norm"]["variance"], x.var(0), rtol=1e-4)


def test_models():
  assert probe.Model(3, ENCODER).grid == (2, 2)
  vit = probe.Model(3, dict(model_name="vit", variant="mu/8"))
  assert not hasattr(vit, "grid")
  for fields, words in (
    (dict(encoder=dict(model_name="captioner")), "encoder.model_name"),
    (dict(encoder=dict(num_classes=3)), "encoder.num_classes"),
    (dict(encoder=ENCODER, block=7), "block=7: the model has 2"),
    (dict(encoder=dict(model_name="vit"), features="both"), "one kind"),
  ):
    with pytest.raises(ValueError, match=words):
      probe.Model(3, **fields)
  with pytest.raises(ValueError, match="wants num_classes"):
    probe.Model(None, ENCODER)
