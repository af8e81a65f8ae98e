"""Tests of lookup_vit/models/layers.py: what both kinds of models share."""

import collections
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import layers
from tests.models import common, reference
from tests.models.common import CAPTURE, KINDS, make

# Loop, scan and rematerialisation.


@pytest.fixture(scope="module")
def exact():
  """For a kind of model: its inputs, and the reference's results."""

  @functools.cache
  def get(kind):
    model = make(kind)
    images, labels = common.random_batch(12, 16)
    params = common.random_params(model, images)
    spec = common.spec_of(model)
    run = getattr(reference, kind)
    out = run(spec, common.float64(params), images.astype(np.float64))
    loss = getattr(reference, f"{kind}_loss")
    grads = common.reference_gradients(loss, spec, params, images, labels)
    return images, labels, params, spec, out, grads

  return get


POLICIES = [
  "nothing_saveable",
  "everything_saveable",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
]
LAYOUTS = [
  *((kind, True, "none") for kind in KINDS),
  *(("lookup_vit", i % 2 == 0, policy) for i, policy in enumerate(POLICIES)),
  ("vit", False, "nothing_saveable"),
]


@pytest.mark.parametrize("kind, scan, policy", LAYOUTS)
def test_scan_and_remat_change_nothing(exact, kind, scan, policy):
  """The tests of the models hold for a loop; all else is the same function."""
  images, labels, params, spec, want, want_grads = exact(kind)
  model = make(kind, scan=scan, remat_policy=policy)
  if scan:
    params = layers.stack_blocks(params)
  out, grads = common.gradients(model, params, images, labels, capture=CAPTURE)
  if scan:
    grads["params"] = layers.unstack_blocks(grads["params"])
  assert out.keys() == want.keys()
  common.check_outputs(out, want)
  common.check_gradients(grads, want_grads, spec, 6)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_remat_computes_twice(exact, kind, scan):
  """Policies are not ignored: the backward pass repeats what is not kept."""
  images, labels, params, *_ = exact(kind)
  if scan:
    params = layers.stack_blocks(params)

  def count(policy):
    """How many equations of each kind the backward pass has."""
    model = make(kind, scan=scan, remat_policy=policy)

    def loss(params):
      logits, out = model.apply({"params": params}, images)
      return common.loss_of(out, logits, labels)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    return collections.Counter(e.primitive.name for e in equations(jaxpr))

  counts = {policy: count(policy) for policy in ("none", *POLICIES)}
  tanh = {k: v["tanh"] for k, v in counts.items()}
  assert tanh["nothing_saveable"] == 2 * tanh["none"]
  assert tanh["everything_saveable"] == tanh["none"]
  dots = {k: v["dot_general"] for k, v in counts.items()}
  assert dots["dots_saveable"] == dots["everything_saveable"] == dots["none"]
  assert dots["nothing_saveable"] > dots["dots_with_no_batch_dims_saveable"]
  assert dots["dots_with_no_batch_dims_saveable"] > dots["none"]


def equations(jaxpr):
  """All equations of a jaxpr, those of inner jaxprs too."""
  for e in jaxpr.eqns:
    inner = list(jax.extend.core.jaxprs_in_params(e.params))
    for j in inner:
      yield from equations(j)
    if not inner:
      yield e


@pytest.mark.parametrize("kind", KINDS)
def test_stack_and_unstack_are_inverse(kind):
  """Both ways, bit for bit, and each gives what `init` of the other does."""
  images, _ = common.random_batch(12, 16)
  # Two digits, so that names and numbers sort differently.
  loop, scan = (make(kind, depth=11, scan=s) for s in (False, True))
  unstacked, stacked = (common.random_params(m, images) for m in (loop, scan))

  def same(a, b):
    a, b = common.flat(a), common.flat(b)
    assert a.keys() == b.keys()
    for path in a:
      assert a[path].dtype == b[path].dtype
      np.testing.assert_array_equal(a[path], b[path])

  before = common.flat(unstacked)
  same(layers.unstack_blocks(layers.stack_blocks(unstacked)), unstacked)
  same(layers.stack_blocks(layers.unstack_blocks(stacked)), stacked)
  assert common.flat(unstacked).keys() == before.keys()

  def shapes(tree):
    return {k: v.shape for k, v in common.flat(tree).items()}

  assert shapes(layers.stack_blocks(unstacked)) == shapes(stacked)
  assert shapes(layers.unstack_blocks(stacked)) == shapes(unstacked)
  # What has no blocks, or has the wanted layout, passes.
  same(layers.stack_blocks(stacked), stacked)
  same(layers.unstack_blocks(unstacked), unstacked)
  assert layers.stack_blocks({}) == layers.unstack_blocks({}) == {}


# bfloat16.


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  "kind, fields",
  [
    ("lookup_vit", {}),
    ("lookup_vit", dict(reuse="logits", qk_norm=True)),
    ("vit", dict(pool="map", qk_norm=True)),
    ("vit", dict(pool="tok")),
  ],
)
def test_bfloat16_computes_what_is_delicate_in_float32(kind, fields, scan):
  """Softmax, norms and heads in float32; all large products in bfloat16."""
  model = make(kind, dtype="bfloat16", scan=scan, **fields)
  images, _ = common.random_batch(12, 16)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  jaxpr = jax.make_jaxpr(model.apply)(shapes, images)
  seen = {}
  for e in equations(jaxpr.jaxpr):
    dtypes = {str(v.aval.dtype) for v in e.invars}
    seen.setdefault(e.primitive.name, []).append(dtypes)
    if e.primitive.name == "dot_general" and dtypes == {"float32"}:
      # Only the classifiers.
      assert e.outvars[0].aval.shape == (2, 7)
  for name in ("exp", "rsqrt", "reduce_sum", "reduce_max"):
    assert seen[name] and all(d == {"float32"} for d in seen[name]), name
  assert seen["conv_general_dilated"] == [{"bfloat16"}]
  classifiers = 2 if kind == "lookup_vit" else 1
  assert seen["dot_general"].count({"float32"}) == classifiers
  assert len(seen["dot_general"]) > 8


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(exact, kind):
  images, labels, params, _, want, want_grads = exact(kind)
  model = make(kind, dtype="bfloat16")
  out, grads = common.gradients(model, params, images, labels, capture=CAPTURE)
  for name, x in out.items():
    tokens = name.endswith("tokens")
    assert x.dtype == ("bfloat16" if tokens else "float32"), name
    error = common.relative_error(x, want[name])
    # Eight bits of mantissa.
    assert 1e-5 < error < 0.03, (name, error)
  for path, g in common.flat(grads["params"]).items():
    assert g.dtype == jnp.float32
    if not path.endswith("key/bias"):
      error = common.relative_error(g, common.flat(want_grads["params"])[path])
      assert error < 0.15, (path, error)


# Dropout and stochastic depth.

RATES = dict(dropout=0.2, attention_dropout=0.2, stochastic_depth=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_rates_are_off_in_evaluation(exact, kind):
  images, _, params, *_ = exact(kind)
  plain, _ = common.apply(make(kind), params, images)
  model = make(kind, **RATES)
  # Without random numbers at hand.
  logits, _ = common.apply(model, params, images)
  np.testing.assert_array_equal(logits, plain)
  # Nor does training need them where all rates are zero.
  logits, _ = common.apply(make(kind), params, images, train=True)
  np.testing.assert_array_equal(logits, plain)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rate_acts_and_follows_the_rng(exact, kind, rate):
  images, _, params, *_ = exact(kind)
  images = np.repeat(images[:1], 16, axis=0)
  model = make(kind, **{rate: 0.4})
  run = functools.partial(common.apply, model, params, images, train=True)
  (a, _), (b, _), (c, _) = run(rng=1), run(rng=2), run(rng=1)
  np.testing.assert_array_equal(a, c)
  assert np.abs(a - b).max() > 1e-3
  # The mask is drawn for each example.
  assert np.asarray(a).std(0).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_remat_repeats_the_same_masks(exact, kind):
  images, labels, params, *_ = exact(kind)
  params = {k: v for k, v in params.items() if k != "encoderblock_1"}
  results = []
  for policy in ("none", "nothing_saveable"):
    model = make(kind, depth=1, remat_policy=policy, **RATES)
    results.append(
      common.gradients(model, params, images, labels, rng=5, train=True)
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    *results,
  )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_depth_grows_linearly(kind, scan):
  """From zero at the first block to the field's rate, block by block.

  All branches but one of each block add zero, so that a block that drops it
  returns its tokens as they are.
  """
  rate, depth, copies = 0.6, 4, 3000
  fields = dict(
    width=8, num_heads=1, patch_size=(1, 1), grid=(1, 1), depth=depth
  )
  if kind == "vit":
    del fields["grid"]
  model = make(kind, stochastic_depth=rate, **fields)
  images = np.tile(common.random_batch(2, 2)[0][:1], (copies, 1, 1, 1))
  params = common.random_params(model, images)
  name = "block_tokens" if kind == "vit" else "block_lookup_tokens"
  kept = "mlp/dense_out" if kind == "vit" else "lookup_mlp/dense_out"

  def silence(path, x):
    path = "/".join(k.key for k in path)
    branch = any(s in path for s in ("out", "out_back", "dense_out"))
    if path.startswith("encoderblock") and branch:
      return x if "/" + kept in path else np.zeros_like(x)
    return x

  params = jax.tree_util.tree_map_with_path(silence, params)
  if scan:
    model, params = model.clone(scan=True), layers.stack_blocks(params)
  _, out = common.apply(
    model, params, images, rng=0, train=True, capture=("tokens",)
  )
  tokens = np.asarray(out[name])
  assert np.all(tokens[0] == tokens[0, :1])
  dropped = np.all(tokens[1:] == tokens[:-1], axis=(2, 3))
  wanted = np.array([1, 2, 3]) * rate / 3
  np.testing.assert_allclose(dropped.mean(1), wanted, atol=0.04)
  # Blocks draw independently.
  both = np.mean(dropped[1] & dropped[2])
  assert abs(both - wanted[1] * wanted[2]) < 0.04


def test_dropout_of_an_mlp_keeps_the_mean():
  copies = 4000
  x = np.random.default_rng(0).standard_normal((1, 3, 8)).astype(np.float32)
  x = np.tile(x, (copies, 1, 1))

  def run(params, **fields):
    mlp = layers.Mlp(layers.LayerConfig(1, **fields), 2.0)
    if params is None:
      shapes = jax.eval_shape(mlp.init, jax.random.key(0), x)
      return common.random_like(shapes["params"])
    rngs = {"dropout": jax.random.key(1)}
    return np.asarray(mlp.apply({"params": params}, x, rngs=rngs))

  params = run(None)
  want, got = run(params), run(params, dropout=0.5, train=True)
  score = np.abs(got.mean(0) - want[0]) / (got.std(0) / np.sqrt(copies))
  assert score.max() < 5
  assert got.std(0).min() > 0.01
