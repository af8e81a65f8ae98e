"""Tests of lookup_vit.models.vit."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import vit
from tests.models import common, reference
from tests.models.common import CAPTURE

make = functools.partial(common.make, "vit")


CASES = {
  "gap": ((12, 20), {}),
  "map": ((12, 20), dict(depth=1, pool="map", gelu="exact", mlp_ratio=2.5)),
  "tok": ((12, 20), dict(depth=1, pool="tok", norm_eps=1e-2)),
  "gap, video": (
    (6, 8, 12),
    dict(variant="Ti/2x4", positions="sincos", width=26, num_heads=2),
  ),
  "map, video": (
    (6, 8, 12),
    dict(depth=1, variant="Ti/2x4", pool="map", qk_norm=True),
  ),
  "convolutions": ((12, 20), dict(depth=1, stem="conv", num_heads=2)),
  "more convolutions": ((8, 12), dict(depth=1, stem="deep_conv", num_heads=2)),
  "tok, video": (
    (6, 8, 12),
    dict(variant="Ti/3x4x2", pool="tok", positions="sincos", qk_norm=True),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_model_equals_reference(case):
  """Whole model: all outputs, and all gradients of the loss."""
  space, fields = CASES[case]
  model = make(**fields)
  images, labels = common.random_batch(*space)
  params = common.random_params(model, images)
  spec = common.spec_of(model)
  out, grads = common.gradients(model, params, images, labels, capture=CAPTURE)
  want = reference.vit(spec, common.float64(params), images.astype(np.float64))
  assert out.keys() == want.keys()
  common.check_outputs(out, want)
  want = common.reference_gradients(
    reference.vit_loss, spec, params, images, labels
  )
  common.check_gradients(grads, want, spec)


def test_number_of_parameters():
  """B/16 at 224 with 1000 classes.

  The class token has no position of its own, as in big_vision; with one, the
  count is the well-known 86,567,656.
  """
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

  def count(**fields):
    model = vit.Model(1000, **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))

  assert count(pool="tok") == 86_567_656 - 768
  assert count() == count(scan=True) == 86_567_656 - 2 * 768
  # A probe, the four projections of attention, a norm, and the MLP.
  d = 768
  head = d + 4 * (d * d + d) + 2 * d + (8 * d * d + 5 * d)
  assert count(pool="map") == count() + head


@pytest.mark.parametrize("pool", ["gap", "map", "tok"])
@pytest.mark.parametrize(
  "capture, added",
  [
    ((), set()),
    (("tokens",), {"tokens", "block_tokens"}),
    (("attention",), {"attention"}),
    (("attention_logit_max",), {"attention_logit_max"}),
  ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_capture_adds_what_it_names(pool, capture, added, scan):
  images = jax.ShapeDtypeStruct((3, 12, 20, 3), jnp.float32)
  model = make(pool=pool, scan=scan)
  init = functools.partial(model.init_with_output, capture=capture)
  (logits, out), _ = jax.eval_shape(init, jax.random.key(0), images)
  n = 16 if pool == "tok" else 15
  shapes = {
    "pre_logits": (3, 24),
    "tokens": (3, n, 24),
    "block_tokens": (2, 3, n, 24),
    "attention": (2, 3, 3, n, n),
    "attention_logit_max": (2,),
  }
  assert logits.shape == (3, 7)
  assert {k: v.shape for k, v in out.items()} == {
    k: shapes[k] for k in {"pre_logits"} | added
  }


def test_captured_tokens_and_attention():
  images, _ = common.random_batch(12, 20)
  model = make()
  params = common.random_params(model, images)
  logits, out = common.apply(model, params, images, capture=CAPTURE)
  np.testing.assert_allclose(out["attention"].sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(
    out["tokens"].mean(1), out["pre_logits"], atol=1e-5
  )
  np.testing.assert_allclose(
    reference.linear(params["head"], np.asarray(out["pre_logits"])),
    logits,
    atol=1e-5,
  )


@pytest.mark.parametrize("pool", ["gap", "map", "tok"])
def test_without_classes(pool):
  images, _ = common.random_batch(12, 20)
  model = make(pool=pool).clone(num_classes=None)
  params = common.random_params(model, images)
  assert "head" not in params
  features, out = common.apply(model, params, images)
  np.testing.assert_array_equal(features, out["pre_logits"])
  want = reference.vit(
    common.spec_of(model), common.float64(params), images.astype(np.float64)
  )
  common.check_outputs(out, want)


def test_heads_start_at_their_bias():
  images, _ = common.random_batch(8, 8)
  model = make(width=12, depth=1, head_bias_init=-7.0)
  init = common.jit(model.init_with_output)
  (logits, _), _ = init(jax.random.key(0, impl="rbg"), images)
  np.testing.assert_array_equal(logits, np.full((2, 7), -7.0))


@pytest.mark.parametrize(
  "size, fields, message",
  [
    ((24, 20), dict(pool="max"), "pool='max'.*gap.*map.*tok"),
    ((8, 24, 20), {}, r"\(4, 4\).*image.*\(8, 24, 20\)"),
    ((24, 20), dict(variant="Ti/2x4"), r"\(2, 4, 4\).*video.*\(24, 20\)"),
    ((24, 22), {}, r"\(4, 4\).*divide.*\(24, 22\)"),
    ((0, 20), {}, r"\(4, 4\).*\(0, 20\)"),
    ((24, 20), dict(num_heads=5), "5 heads.*24"),
    ((24, 20), dict(gelu="relu"), "gelu='relu'.*tanh.*exact"),
    ((24, 20), dict(positions="rope"), "positions='rope'.*learned.*sincos"),
    ((24, 20), dict(remat_policy="all"), "remat_policy='all'.*none"),
    ((24, 20), dict(attention_dropout=2.0), "attention_dropout=2.0"),
    ((24, 20), dict(stem="resnet"), "stem='resnet'.*patch.*'conv'.*deep_conv"),
    ((24, 18), dict(stem="conv", variant="Ti/6"), r"conv.*\(6, 6\)"),
    ((8, 8, 8), dict(stem="conv", variant="Ti/2x4"), r"conv.*\(2, 4, 4\)"),
    ((16, 16), dict(stem="conv", width=21, variant="Ti/4"), "conv.*21"),
    ((16, 16), dict(stem="deep_conv", width=18, variant="Ti/4"), "4 div.*18"),
  ],
)
def test_refuses(size, fields, message):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(make(**fields).init, jax.random.key(0), images)


def test_refuses_fields_of_lookup_vit():
  with pytest.raises(ValueError, match="ViT has no field 'grid'"):
    make(grid=(2, 2))
