"""Tests of lookup_vit/models/lookup_vit.py: the whole model."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import layers, lookup_vit
from tests.models import common, reference
from tests.models.common import CAPTURE

make = functools.partial(common.make, "lookup_vit")


# Against the reference.

CASES = {
  "weights": ((24, 20), (3, 3), {}),
  "weights, all tokens": (
    (24, 20),
    (6, 5),
    dict(depth=1, qk_norm=True, mhbc_heads=2),
  ),
  "weights, one token": (
    (24, 20),
    (1, 1),
    dict(depth=1, gelu="exact", norm_eps=1e-2),
  ),
  "weights, video": (
    (8, 12, 20),
    (3, 1, 4),
    dict(variant="Ti/2x4", width=26, num_heads=2, positions="sincos"),
  ),
  "weights, video, learned positions": (
    (6, 8, 12),
    (2, 1, 3),
    dict(depth=1, variant="Ti/2x4"),
  ),
  "weights, sequence": ((27,), (4,), dict(depth=1, patch_size=(3,))),
  "logits": (
    (24, 28),
    (5, 7),
    dict(reuse="logits", mhbc_heads=4, mlp_ratio=2.5, lookup_mlp_ratio=1.0),
  ),
  "logits, one token": ((24, 20), (1, 1), dict(depth=1, reuse="logits")),
  "logits, video": (
    (10, 12, 8),
    (3, 2, 2),
    dict(variant="Ti/2x4", reuse="logits", qk_norm=True, gelu="exact"),
  ),
  "none": (
    (24, 20),
    (2, 5),
    dict(reuse="none", positions="sincos", norm_eps=1e-2),
  ),
  "convolutions": (
    (16, 24),
    (2, 3),
    dict(depth=1, stem="conv", variant="Ti/8", width=16, num_heads=2),
  ),
  "more convolutions": (
    (8, 12),
    (2, 1),
    dict(depth=1, stem="deep_conv", variant="Ti/4", width=16, num_heads=2),
  ),
  "none, video": (
    (6, 12, 12),
    (3, 1, 3),
    dict(depth=1, variant="Ti/2x3x4", reuse="none", mhbc_heads=6),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_model_equals_reference(case):
  """Whole model: all outputs, and all gradients of the loss."""
  space, grid, fields = CASES[case]
  model = make(grid=grid, **fields)
  images, labels = common.random_batch(*space)
  params = common.random_params(model, images)
  spec = common.spec_of(model)
  out, grads = common.gradients(model, params, images, labels, capture=CAPTURE)
  common.check_outputs(
    out,
    reference.lookup_vit(
      spec, common.float64(params), images.astype(np.float64)
    ),
  )
  want = common.reference_gradients(
    reference.lookup_vit_loss, spec, params, images, labels
  )
  common.check_gradients(grads, want, spec, math.prod(grid))


# Grids.


def test_one_set_of_parameters_serves_every_grid():
  images, _ = common.random_batch(24, 20)
  model = make(grid=(3, 3))
  params = common.random_params(model, images)
  for grid in [None, (2, 5), (1, 1), (6, 5)]:
    kwargs = {} if grid is None else dict(grid=grid)
    logits, out = common.apply(model, params, images, **kwargs)
    want = reference.lookup_vit(
      common.spec_of(model, grid=grid or model.grid),
      common.float64(params),
      images.astype(np.float64),
    )
    common.check_outputs(dict(out, logits=logits), want)


@pytest.mark.parametrize("scan", [False, True])
def test_init_does_not_depend_on_the_grid(scan):
  images, _ = common.random_batch(20, 20)

  @functools.partial(common.jit, static_argnums=0)
  def init(kwargs):
    model = make(width=12, depth=1, grid=(3, 3), scan=scan)
    return model.init(jax.random.key(3, impl="rbg"), images, **dict(kwargs))

  a, b = init(()), init((("grid", (5, 5)),))
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_list_is_a_grid():
  assert make(grid=[2, 3]).grid == (2, 3)
  images, _ = common.random_batch(12, 12)
  model = make(grid=[2, 3])
  shapes = jax.eval_shape(
    lambda: model.init_with_output(jax.random.key(0), images, grid=[1, 3])
  )
  assert shapes[0][0].shape == (2, 7)


def test_heads_start_at_their_bias():
  images, _ = common.random_batch(8, 8)
  model = make(grid=(2, 1), width=12, depth=1, head_bias_init=-7.0)
  init = common.jit(model.init_with_output)
  (logits, out), _ = init(jax.random.key(0, impl="rbg"), images)
  for x in (logits, out["logits_compressed"], out["logits_lookup"]):
    np.testing.assert_array_equal(x, np.full((2, 7), -7.0))


def test_lookup_tokens_alone_without_reuse():
  """With reuse="none" nothing flows from the compressed to the lookup side."""
  images, _ = common.random_batch(12, 8)
  model = make(reuse="none", grid=(2, 2), width=12)
  params = common.random_params(model, images)

  @common.jit
  @jax.grad
  def gradient(params):
    return model.apply({"params": params}, images)[1]["logits_lookup"].sum()

  for path, g in common.flat(gradient(params)).items():
    assert bool(np.any(g)) == (
      "lookup_mlp" in path
      or path.split("/")[0]
      in ("embedding", "pos_embedding", "norm_lookup", "head_lookup")
    ), path


def test_number_of_parameters():
  """Against a count by hand, for B/16 at 224 with 1000 classes."""
  d = 768
  linear = d * d + d
  norm = 2 * d
  mhbc = 6 * linear + 3 * norm
  refinement = 4 * linear + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * norm
  lookup_mlp = (d * d // 2 + d // 2) + (d * d // 2 + d) + norm
  want = (16 * 16 * 3 * d + d) + 196 * d + 2 * norm + 2 * (d * 1000 + 1000)
  want += 12 * (mhbc + refinement + lookup_mlp)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  for scan in (False, True):
    model = lookup_vit.Model(1000, scan=scan)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == want


# Capture.


@pytest.fixture(scope="module")
def captured():
  images, _ = common.random_batch(24, 20, batch=3)
  model = make(grid=(3, 2), mhbc_heads=4)
  params = common.random_params(model, images)
  logits, out = common.apply(model, params, images, capture=CAPTURE)
  return model, params, images, logits, out


HEADS = {
  f"{what}_{which}"
  for what in ("logits", "pre_logits")
  for which in ("compressed", "lookup")
}


@pytest.mark.parametrize(
  "capture, added",
  [
    ((), set()),
    (("attention",), {"attention"}),
    (("attention_logit_max",), {"attention_logit_max"}),
    (
      ("tokens",),
      {
        "compressed_tokens",
        "lookup_tokens",
        "block_compressed_tokens",
        "block_lookup_tokens",
      },
    ),
  ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_capture_adds_what_it_names(captured, capture, added, scan):
  _, params, images, _, full = captured
  model = make(grid=(3, 2), mhbc_heads=4, scan=scan)
  if scan:
    params = layers.stack_blocks(params)
  _, out = jax.eval_shape(
    functools.partial(model.apply, capture=capture), {"params": params}, images
  )
  assert out.keys() == HEADS | added
  for name, x in out.items():
    assert x.shape == full[name].shape, name


def test_nothing_is_stacked_without_capture(captured):
  """A scan over blocks without capture yields the tokens and nothing else."""
  _, params, images, _, _ = captured
  model = make(grid=(3, 2), mhbc_heads=4, scan=True)
  params = layers.stack_blocks(params)
  jaxpr = jax.make_jaxpr(model.apply)({"params": params}, images)
  scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
  assert len(scans) == 1
  shapes = sorted(v.aval.shape for v in scans[0].outvars if v.aval.shape)
  assert shapes == [(3, 6, 24), (3, 30, 24)]


def test_captured_shapes(captured):
  *_, out = captured
  assert {k: v.shape for k, v in out.items() if k not in HEADS} == {
    "compressed_tokens": (3, 6, 24),
    "lookup_tokens": (3, 30, 24),
    "block_compressed_tokens": (2, 3, 6, 24),
    "block_lookup_tokens": (2, 3, 30, 24),
    "attention": (2, 3, 4, 6, 30),
    "attention_logit_max": (2,),
  }


def test_rows_of_attention_sum_to_one(captured):
  *_, out = captured
  assert np.all(out["attention"] >= 0)
  np.testing.assert_allclose(out["attention"].sum(-1), 1, rtol=1e-5)


def test_tokens_lead_to_the_logits(captured):
  model, params, _, logits, out = captured
  spec = common.spec_of(model)
  for name in ("compressed", "lookup"):
    tokens = np.asarray(out[f"{name}_tokens"], np.float64)
    last = np.asarray(out[f"block_{name}_tokens"][-1], np.float64)
    np.testing.assert_allclose(
      reference.layer_norm(spec, params[f"norm_{name}"], last),
      tokens,
      atol=1e-5,
    )
    np.testing.assert_allclose(
      tokens.mean(1), out[f"pre_logits_{name}"], atol=1e-5
    )
    np.testing.assert_allclose(
      reference.linear(params[f"head_{name}"], tokens.mean(1)),
      out[f"logits_{name}"],
      atol=1e-5,
    )
  np.testing.assert_allclose(
    (out["logits_compressed"] + out["logits_lookup"]) / 2, logits, rtol=1e-6
  )


def test_without_classes(captured):
  _, params, images, _, out = captured
  params = {k: v for k, v in params.items() if not k.startswith("head")}
  model = lookup_vit.Model(
    None, "Ti/4", width=24, depth=2, num_heads=3, mhbc_heads=4, grid=(3, 2)
  )
  assert common.random_params(model, images).keys() == params.keys()
  features, bare = common.apply(model, params, images)
  assert bare.keys() == {"pre_logits_compressed", "pre_logits_lookup"}
  np.testing.assert_array_equal(features, bare["pre_logits_compressed"])
  for k, v in bare.items():
    np.testing.assert_allclose(v, out[k], atol=1e-5)


# What it refuses.


@pytest.mark.parametrize(
  "size, fields, message",
  [
    ((24, 20), dict(grid=(7, 5)), r"\(7, 5\).*lookup grid \(6, 5\)"),
    ((24, 20), dict(grid=(6, 6)), r"\(6, 6\).*lookup grid \(6, 5\)"),
    ((24, 20), dict(grid=(0, 5)), r"\(0, 5\)"),
    ((24, 20), dict(grid=(-1, 5)), r"\(-1, 5\)"),
    ((24, 20), dict(grid=(5,)), r"\(5,\).*\(6, 5\)"),
    ((24, 20), dict(grid=(2, 5, 5)), r"\(2, 5, 5\).*\(6, 5\)"),
    ((8, 24, 20), dict(grid=(2, 2)), r"\(4, 4\).*image.*\(8, 24, 20\)"),
    ((24, 20), dict(variant="Ti/2x4"), r"\(2, 4, 4\).*video.*\(24, 20\)"),
    ((24, 22), dict(grid=(2, 2)), r"\(4, 4\).*divide.*\(24, 22\)"),
    ((7, 8, 8), dict(variant="Ti/2x4"), r"\(2, 4, 4\).*divide.*\(7, 8, 8\)"),
    ((24, 20), dict(num_heads=5), "5 heads.*24"),
    ((24, 20), dict(mhbc_heads=7), "7 heads.*24"),
    ((24, 20), dict(reuse="both"), "reuse='both'.*weights.*logits.*none"),
    ((24, 20), dict(gelu="relu"), "gelu='relu'.*tanh.*exact"),
    ((24, 20), dict(positions="rope"), "positions='rope'.*learned.*sincos"),
    ((24, 20), dict(remat_policy="all"), "remat_policy='all'.*none"),
    ((24, 20), dict(remat_policy="full", scan=True), "remat_policy='full'"),
    ((24, 20), dict(dropout=1.0), "dropout=1.0"),
    ((24, 20), dict(stochastic_depth=-0.1), "stochastic_depth=-0.1"),
    ((24, 20), dict(lookup_mlp_ratio=0.01), "0.01.*24"),
    ((24, 20), dict(stem="resnet"), "stem='resnet'.*patch.*'conv'.*deep_conv"),
    ((24, 18), dict(stem="conv", variant="Ti/6"), r"conv.*\(6, 6\)"),
    ((8, 8, 8), dict(stem="conv", variant="Ti/2x4"), r"conv.*\(2, 4, 4\)"),
    ((16, 16), dict(stem="conv", width=21, variant="Ti/4"), "conv.*21"),
    ((24, 20), dict(width=7, num_heads=1, positions="sincos"), "sincos.*7"),
  ],
)
def test_refuses(size, fields, message):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  with pytest.raises(ValueError, match=message):
    model = make(**dict(grid=(2, 2)) | fields)
    jax.eval_shape(model.init, jax.random.key(0), images)


def test_refuses_a_grid_of_the_call():
  images, _ = common.random_batch(24, 20)
  model = make(grid=(2, 2))
  params = common.random_params(model, images)
  for grid in [(7, 5), (3,), (2, 2, 2)]:
    with pytest.raises(ValueError, match="lookup grid"):
      model.apply({"params": params}, images, grid=grid)


@pytest.mark.parametrize("capture", [("everything",), "tokens"])
def test_refuses_to_capture(capture):
  images, _ = common.random_batch(24, 20)
  with pytest.raises(ValueError, match="attention_logit_max"):
    jax.eval_shape(
      functools.partial(make(grid=(2, 2)).init, capture=capture),
      jax.random.key(0),
      images,
    )
