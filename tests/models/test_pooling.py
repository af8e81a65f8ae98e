"""Tests of lookup_vit/models/pooling.py."""

import jax
import numpy as np
import pytest

from lookup_vit.models import factorised, lookup_vit, pooling, vit

MODELS = {
  "lookup_vit": lambda: lookup_vit.Model(None, "mu/8", depth=2, grid=(2, 2)),
  "vit": lambda: vit.Model(3, "mu/8", depth=2),
  "vit_tok": lambda: vit.Model(3, "mu/8", depth=2, pool="tok"),
  "factorised": lambda: factorised.Model(
    3, "mu/2x8", "lookup_vit", depth=2, temporal_depth=1, grid=(1, 2)
  ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def outputs(request):
  """A model, and what it returns for random input, tokens captured."""
  model = MODELS[request.param]()
  shape = (4, 16, 24) if request.param == "factorised" else (24, 16)
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (3, *shape, 3)).astype(np.float32)
  params = model.init(jax.random.key(0), images)
  _, out = model.apply(params, images, capture=("tokens",))
  return model, out


def wanted(model, out, features, block):
  """By hand, of one kind of tokens."""
  if features is None and not hasattr(model, "grid"):
    features = ""
  features = "compressed" if features is None else features
  if block is None:
    return np.asarray(out[f"pre_logits_{features}".rstrip("_")])
  x = np.asarray(out["_".join(filter(None, ["block", features, "tokens"]))])
  return x[block].reshape(3, -1, x.shape[-1]).mean(1, dtype=np.float64)


@pytest.mark.parametrize("block", [None, 0, -1])
@pytest.mark.parametrize("features", [None, "compressed", "lookup", "both"])
def test_features(outputs, features, block):
  model, out = outputs
  if features is not None and not hasattr(model, "grid"):
    with pytest.raises(ValueError, match="one kind of tokens; want None"):
      pooling.check(model, features, block)
    return
  pooling.check(model, features, block)
  if features == "both":
    parts = [wanted(model, out, f, block) for f in ("compressed", "lookup")]
    want = np.concatenate(parts, axis=-1)
  else:
    want = wanted(model, out, features, block)
  got = pooling.pool(out, features, block)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_captures_what_it_needs():
  assert pooling.capture(None) == ()
  assert pooling.capture(0) == ("tokens",)


@pytest.mark.parametrize("block", [2, -3, 1.0, True, "1"])
def test_no_such_block(block):
  model = MODELS["lookup_vit"]()
  with pytest.raises(ValueError, match=f"block={block!r}: the model has 2"):
    pooling.check(model, None, block)


def test_no_such_features():
  model = MODELS["lookup_vit"]()
  with pytest.raises(ValueError, match="want one of compressed, lookup, both"):
    pooling.check(model, "cls", None)
