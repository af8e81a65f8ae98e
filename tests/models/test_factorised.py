"""Tests of lookup_vit/models/factorised.py."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import factorised, layers, lookup_vit, vit
from tests.models import common, reference
from tests.models.common import CAPTURE

make = functools.partial(common.make, "factorised", "Ti/2x4")


# Against the reference.

CASES = {
  "vit": ((6, 12, 8), dict(variant="Ti/2x4", depth=1)),
  "vit, scan": (
    (4, 12, 6),
    dict(
      variant="Ti/2x4x3",
      pool="tok",
      qk_norm=True,
      scan=True,
      remat_policy="dots_saveable",
    ),
  ),
  "lookup_vit": (
    (10, 12, 8),
    dict(spatial="lookup_vit", grid=(2, 1), temporal_depth=1),
  ),
  "lookup_vit, scan": (
    # Of two slices, gradients of temporal queries and keys all but cancel: in
    # float32 they are wrong by up to 2e-5, by the draw.
    (6, 12, 20),
    dict(
      spatial="lookup_vit",
      grid=(3, 2),
      depth=1,
      temporal_depth=3,
      reuse="logits",
      mhbc_heads=2,
      width=26,
      num_heads=2,
      positions="sincos",
      scan=True,
      remat_policy="nothing_saveable",
    ),
  ),
  "lookup_vit, ablations": (
    (4, 20, 12),
    dict(
      spatial="lookup_vit",
      grid=(3, 2),
      depth=1,
      temporal_depth=1,
      heads="compressed",
      compressed_init="learned",
      reuse_scale="tokens",
    ),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_model_equals_reference(case):
  """Whole model: all outputs, and all gradients of the loss."""
  space, fields = CASES[case]
  fields = dict(variant="Ti/2x4") | fields
  model = common.make("factorised", **fields)
  videos, labels = common.random_batch(*space)
  params = common.random_params(model.clone(scan=False), videos)
  given = layers.stack_blocks(params) if model.scan else params
  spec = common.spec_of(model)
  out, grads = common.gradients(model, given, videos, labels, capture=CAPTURE)
  if model.scan:
    grads["params"] = layers.unstack_blocks(grads["params"])
  want = reference.factorised(
    spec, common.float64(params), videos.astype(np.float64)
  )
  assert out.keys() == want.keys()
  common.check_outputs(out, want)
  want = common.reference_gradients(
    reference.factorised_loss, spec, params, videos, labels
  )
  common.check_gradients(grads, want, spec, math.prod(spec.grid) or None)


# Slices and time.


@pytest.fixture(scope="module", params=["vit", "lookup_vit"])
def trained(request):
  """A model of each kind, with parameters that are not those of `init`."""
  fields = dict(spatial=request.param, depth=1)
  if request.param == "lookup_vit":
    fields["grid"] = (2, 2)
  videos, _ = common.random_batch(8, 8, 12)
  params = common.random_params(make(**fields), videos)
  return functools.partial(make, **fields), params, videos


def tokens_of(out):
  return out["tokens"] if "tokens" in out else out["lookup_tokens"]


def test_slices_meet_in_the_temporal_encoder_alone(trained):
  build, params, videos = trained
  run = functools.partial(common.apply, build(), params, capture=CAPTURE)
  changed = videos.copy()
  changed[:, 5] *= -1  # Of slice 2.
  (before, a), (after, b) = run(videos), run(changed)
  same = np.all(tokens_of(a) == tokens_of(b), axis=(2, 3))
  np.testing.assert_array_equal(same, [[True, True, False, True]] * 2)
  assert np.abs(before - after).min() > 1e-4


def test_order_in_time_is_told_by_the_positions_alone(trained):
  build, params, videos = trained
  swapped = videos.reshape(2, 4, 2, 8, 12, 3)[:, [2, 0, 3, 1]]
  swapped = swapped.reshape(videos.shape)
  run = functools.partial(common.apply, build())
  assert np.abs(run(params, videos)[0] - run(params, swapped)[0]).min() > 1e-4
  timeless = {
    name: dict(x, pos_embedding=np.zeros_like(x["pos_embedding"]))
    if name.startswith("temporal")
    else x
    for name, x in params.items()
  }
  np.testing.assert_allclose(
    run(timeless, videos)[0], run(timeless, swapped)[0], atol=1e-5
  )


def test_spatial_parameters_are_an_image_model_s(trained):
  """Names and shapes, but for the patch's axis of time."""
  build, params, videos = trained
  model = build()
  module = lookup_vit if hasattr(model, "grid") else vit
  fields = dict(width=24, depth=1, num_heads=3)
  image = module.Model(None, "Ti/4", **fields)
  if hasattr(model, "grid"):
    image = image.clone(grid=model.grid)
  shapes = jax.eval_shape(image.init, jax.random.key(0), videos[:, 0])
  want = {k: v.shape for k, v in common.flat(shapes["params"]).items()}
  got = {k: v.shape for k, v in common.flat(params["spatial"]).items()}
  assert got.pop("embedding/kernel") == (2, *want.pop("embedding/kernel"))
  assert got == want


def test_one_set_of_parameters_serves_every_grid():
  videos, _ = common.random_batch(4, 12, 8)
  model = make(spatial="lookup_vit", grid=(2, 2), depth=1, temporal_depth=1)
  params = common.random_params(model, videos)
  grid = (3, 1)
  logits, out = common.apply(model, params, videos, grid=grid)
  want = reference.factorised(
    common.spec_of(model, grid=grid),
    common.float64(params),
    videos.astype(np.float64),
  )
  common.check_outputs(dict(out, logits=logits), want)


def test_lookup_grid():
  model = make(spatial="lookup_vit", grid=(2, 2))
  assert model.lookup_grid((6, 12, 20)) == (3, 5)
  assert lookup_vit.Model(7, "Ti/2x4").lookup_grid((6, 12, 20)) == (3, 3, 5)


def test_rates_act_in_training_and_not_in_evaluation(trained):
  build, params, videos = trained
  plain, _ = common.apply(build(), params, videos)
  rates = ("dropout", "attention_dropout", "stochastic_depth")
  model = build(**dict.fromkeys(rates, 0.4))
  np.testing.assert_array_equal(common.apply(model, params, videos)[0], plain)
  # Of stochastic depth, the one spatial block has none: the temporal ones do.
  model = build(stochastic_depth=0.6)
  videos = np.repeat(videos[:1], 8, axis=0)
  run = functools.partial(common.apply, model, params, videos, train=True)
  (a, _), (b, _), (c, _) = run(rng=1), run(rng=2), run(rng=1)
  np.testing.assert_array_equal(a, c)
  assert np.abs(a - b).max() > 1e-3
  # The mask is drawn for each example.
  assert np.asarray(a).std(0).max() > 1e-3


def test_bfloat16(trained):
  """All large products in bfloat16, near float32."""
  build, params, videos = trained
  model = build(dtype="bfloat16")
  logits, out = common.apply(model, params, videos, capture=CAPTURE)
  exact, want = common.apply(build(), params, videos, capture=CAPTURE)
  assert logits.dtype == jnp.float32
  for name, x in (out | {"logits": logits}).items():
    tokens = "tokens" in name
    assert x.dtype == ("bfloat16" if tokens else "float32"), name
    target = np.asarray((want | {"logits": exact})[name])
    assert 1e-5 < common.relative_error(x, target) < 0.05, name


def test_without_classes(trained):
  build, params, videos = trained
  model = build().clone(num_classes=None)
  params = {k: v for k, v in params.items() if not k.startswith("head")}
  assert common.random_params(model, videos).keys() == params.keys()
  features, out = common.apply(model, params, videos)
  first = "pre_logits" if "pre_logits" in out else "pre_logits_compressed"
  np.testing.assert_array_equal(features, out[first])
  assert not any(name.startswith("logits") for name in out)


# Capture.


@pytest.mark.parametrize("scan", [False, True])
def test_captured_shapes(scan):
  fields = dict(scan=scan, temporal_depth=3)
  videos = jax.ShapeDtypeStruct((2, 8, 8, 12, 3), jnp.float32)

  def shapes(capture, **more):
    init = functools.partial(
      make(**fields, **more).init_with_output, capture=capture
    )
    (logits, out), _ = jax.eval_shape(init, jax.random.key(0), videos)
    assert logits.shape == (2, 7)
    return {k: v.shape for k, v in out.items()}

  assert shapes(()) == {"pre_logits": (2, 24)}
  assert shapes(CAPTURE, pool="tok") == {
    "pre_logits": (2, 24),
    "tokens": (2, 4, 7, 24),
    "block_tokens": (2, 2, 4, 7, 24),
    "attention": (2, 2, 4, 3, 7, 7),
    "attention_logit_max": (5,),
    "temporal_tokens": (2, 4, 24),
    "temporal_block_tokens": (3, 2, 4, 24),
    "temporal_attention": (3, 2, 3, 4, 4),
  }
  lookup = dict(spatial="lookup_vit", grid=(2, 1))
  heads = {
    **{f"logits_{name}": (2, 7) for name in ("compressed", "lookup")},
    **{f"pre_logits_{name}": (2, 24) for name in ("compressed", "lookup")},
  }
  assert shapes((), **lookup) == heads
  assert shapes(CAPTURE, **lookup) == heads | {
    "compressed_tokens": (2, 4, 2, 24),
    "lookup_tokens": (2, 4, 6, 24),
    "block_compressed_tokens": (2, 2, 4, 2, 24),
    "block_lookup_tokens": (2, 2, 4, 6, 24),
    "attention": (2, 2, 4, 3, 2, 6),
    "attention_logit_max": (8,),
    **{
      f"temporal_{k}_{name}": shape
      for name in ("compressed", "lookup")
      for k, shape in [
        ("tokens", (2, 4, 24)),
        ("block_tokens", (3, 2, 4, 24)),
        ("attention", (3, 2, 3, 4, 4)),
      ]
    },
  }


# Parameters, and what it refuses.


@pytest.mark.parametrize(
  "make_model, millions",
  [(vit.Model, 88.9), (factorised.Model, 115.1)],
)
def test_number_of_parameters(make_model, millions):
  """Those of ViViT-B/16x2 (arXiv:2103.15691, table 2), of 32 frames."""
  videos = jax.ShapeDtypeStruct((1, 32, 224, 224, 3), jnp.float32)
  model = make_model(400, "B/2x16", scan=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), videos)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
  "size, fields, message",
  [
    ((4, 8, 8), dict(spatial="resnet"), "spatial='resnet'.*vit.*lookup_vit"),
    ((4, 8, 8), dict(variant="Ti/4"), r"tubelet.*B/2x16.*\(4, 4\)"),
    ((4, 8, 8), dict(temporal_depth=0), "FactorisedViT.temporal_depth=0"),
    ((4, 8, 8), dict(grid=(2, 2)), "FactorisedViT has no field 'grid'"),
    ((4, 8, 8), dict(temporal_dept=1), "mean 'temporal_depth'"),
    ((8, 8), {}, r"\(2, 4, 4\).*video.*\(8, 8\)"),
    ((5, 8, 8), {}, r"\(2, 4, 4\).*divide.*\(5, 8, 8\)"),
    (
      (4, 8, 8),
      dict(spatial="lookup_vit", grid=(1, 2, 2)),
      r"\(1, 2, 2\).*lookup grid \(2, 2\)",
    ),
    (
      (4, 8, 8),
      dict(spatial="lookup_vit", grid=(3, 2)),
      r"\(3, 2\).*lookup grid \(2, 2\)",
    ),
    ((4, 8, 8), dict(spatial="lookup_vit", pool="gap"), "no field 'pool'"),
  ],
)
def test_refuses(size, fields, message):
  videos = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  with pytest.raises(ValueError, match=message):
    model = common.make("factorised", **dict(variant="Ti/2x4") | fields)
    jax.eval_shape(model.init, jax.random.key(0), videos)
