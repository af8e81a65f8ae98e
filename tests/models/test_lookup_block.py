"""Tests of lookup_vit/models/lookup_vit.py: one block."""

import functools

import autograd
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import layers, lookup_vit
from tests.models import common, reference


def make_block(batch, m, n, width=24, num_heads=3, mhbc_heads=3, **fields):
  """A block with random parameters, and random tokens for it."""
  own = {k: fields.pop(k) for k in ("reuse", "mhbc_impl") if k in fields}
  cfg = layers.LayerConfig(num_heads, **fields)
  block = lookup_vit.LookupBlock(cfg, mhbc_heads, **own)
  rng = np.random.default_rng(0)
  tokens = tuple(
    rng.standard_normal((batch, k, width)).astype(np.float32) for k in (m, n)
  )
  shapes = jax.eval_shape(block.init, jax.random.key(0), tokens, 0.0)
  return block, common.random_like(shapes["params"]), tokens


@pytest.mark.parametrize("mhbc_impl", ["direct", "absorbed"])
@pytest.mark.parametrize(
  "m, n, fields",
  [
    (6, 11, {}),
    (1, 9, dict(qk_norm=True, mhbc_heads=8)),
    (5, 13, dict(reuse="logits", mhbc_heads=4, norm_eps=1e-2)),
    (5, 13, dict(reuse="logits", qk_norm=True)),
    (7, 8, dict(reuse="none", gelu="exact")),
  ],
)
def test_block_equals_reference(m, n, fields, mhbc_impl):
  block, params, tokens = make_block(3, m, n, mhbc_impl=mhbc_impl, **fields)
  spec = reference.Spec(
    num_heads=3,
    mhbc_heads=block.mhbc_heads,
    reuse=block.reuse,
    qk_norm=block.cfg.qk_norm,
    gelu=block.cfg.gelu,
    norm_eps=block.cfg.norm_eps,
  )
  rng = np.random.default_rng(1)
  weights = [rng.standard_normal(x.shape).astype(np.float32) for x in tokens]

  @common.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(inputs):
    outputs, _ = block.apply(
      {"params": inputs["params"]}, inputs["tokens"], 0.0
    )
    total = sum(jnp.vdot(w, x) for w, x in zip(weights, outputs, strict=True))
    return total, outputs

  def total(inputs):
    outputs = reference.lookup_block(spec, inputs["params"], *inputs["tokens"])
    return sum((w * x).sum() for w, x in zip(weights, outputs[:2], strict=True))

  names = ("compressed", "lookup")
  tokens = dict(zip(names, tokens, strict=True))
  grads, outputs = run(dict(params=params, tokens=tuple(tokens.values())))
  grads["tokens"] = dict(zip(names, grads["tokens"], strict=True))
  exact = common.float64(dict(params=params, tokens=tokens))
  want = reference.lookup_block(
    spec, exact["params"], *exact["tokens"].values()
  )
  common.check_outputs(
    dict(zip(names, outputs, strict=True)), dict(zip(names, want, strict=False))
  )
  want = autograd.grad(
    lambda x: total(dict(x, tokens=[x["tokens"][k] for k in names]))
  )(exact)
  common.check_gradients(grads, want, spec, m)


# Dropout, attention dropout and stochastic depth within a block.

BRANCHES = {
  "mhbc/out": "compressed",
  "refinement/attention/out": "compressed",
  "refinement/mlp/dense_out": "compressed",
  "mhbc/out_back": "lookup",
  "lookup_mlp/dense_out": "lookup",
}


def only(branch, params):
  """Parameters with which all branches but one add zero."""

  def leaf(path, x):
    path = "/".join(k.key for k in path).rpartition("/")[0]
    return np.zeros_like(x) if path in BRANCHES and path != branch else x

  return jax.tree_util.tree_map_with_path(leaf, params)


COPIES = 4000


@pytest.fixture(scope="module")
def noisy():
  """For a kind of noise: its block's function, parameters and tokens."""

  @functools.cache
  def get(kind):
    fields = dict(width=8, num_heads=2, mhbc_heads=2)
    if kind:
      fields |= {kind: 0.3, "train": True}
    block, params, tokens = make_block(1, 3, 5, **fields)
    tokens = [np.tile(x, (COPIES, 1, 1)) for x in tokens]

    @common.jit
    def run(params):
      rngs = {"dropout": jax.random.key(0)}
      (compressed, lookup), _ = block.apply(
        {"params": params}, tokens, jnp.float32(0.3), rngs=rngs
      )
      return dict(compressed=compressed - tokens[0], lookup=lookup - tokens[1])

    return run, params

  return get


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
  "kind", ["dropout", "attention_dropout", "stochastic_depth"]
)
def test_noise_keeps_the_mean(noisy, kind, branch):
  """Each branch is linear in its masks, so its mean is that without noise."""
  run, params = noisy(kind)
  params = only(branch, params)
  updates = {k: np.asarray(v) for k, v in run(params).items()}
  side = BRANCHES[branch]
  assert all(not np.any(v) for k, v in updates.items() if k != side)
  want = np.asarray(noisy("")[0](params)[side][0])
  update = updates[side]
  if kind == "attention_dropout" and "dense" in branch:
    np.testing.assert_allclose(
      update, np.broadcast_to(want, update.shape), atol=1e-5
    )
    return
  deviation = update.std(0)
  assert np.all(deviation > 0)
  score = np.abs(update.mean(0) - want) / (deviation / np.sqrt(COPIES))
  assert score.max() < 5


@pytest.mark.parametrize("branch", BRANCHES)
def test_stochastic_depth_drops_whole_branches(noisy, branch):
  run, params = noisy("stochastic_depth")
  params = only(branch, params)
  side = BRANCHES[branch]
  update = np.asarray(run(params)[side])
  want = np.asarray(noisy("")[0](params)[side][0])
  dropped = np.all(update == 0, axis=(1, 2))
  assert abs(dropped.mean() - 0.3) < 0.04
  kept = update[~dropped]
  np.testing.assert_allclose(
    kept, np.broadcast_to(want / 0.7, kept.shape), atol=1e-5
  )
