"""Tests of lookup_vit/models/lookup_vit.py: what its ablations change."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import captioner, layers, lookup_vit
from tests.models import common, reference
from tests.models.common import CAPTURE

make = functools.partial(common.make, "lookup_vit")

# Input, grid, fields, and the model's own grid where it is another.
CASES = {
  "compressed head": (
    (24, 20),
    (5, 3),
    dict(heads="compressed", compressed_init="average"),
    None,
  ),
  "lookup head": (
    (28, 20),
    (5, 2),
    dict(heads="lookup", compressed_init="learned"),
    (3, 3),
  ),
  "scaled": (
    (20, 20),
    (3, 3),
    dict(depth=1, reuse_scale="tokens", mhbc_heads=2),
    None,
  ),
  "one token": (
    (20, 12),
    (1, 1),
    dict(depth=1, compressed_init="average", reuse_scale="tokens"),
    None,
  ),
  "compressed head, video": (
    (6, 20, 12),
    (2, 3, 2),
    dict(
      variant="Ti/2x4",
      heads="compressed",
      compressed_init="average",
      reuse_scale="tokens",
    ),
    None,
  ),
  "lookup head, video": (
    (6, 20, 16),
    (3, 1, 4),
    dict(
      depth=1,
      variant="Ti/2x4",
      heads="lookup",
      compressed_init="learned",
      reuse="logits",
    ),
    (2, 3, 2),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_model_equals_reference(case):
  """Whole model: all outputs, and all gradients of the loss."""
  space, grid, fields, own = CASES[case]
  model = make(grid=own or grid, **fields)
  images, labels = common.random_batch(*space)
  params = common.random_params(model, images)
  spec = common.spec_of(model, grid=grid)
  out, grads = common.gradients(
    model, params, images, labels, capture=CAPTURE, grid=grid
  )
  want = reference.lookup_vit(
    spec, common.float64(params), images.astype(np.float64)
  )
  assert out.keys() == want.keys()
  common.check_outputs(out, want)
  want = common.reference_gradients(
    reference.lookup_vit_loss, spec, params, images, labels
  )
  common.check_gradients(grads, want, spec, math.prod(grid))

  # What is for nothing with a single head.
  last = f"encoderblock_{model.depth - 1}"
  back = ("norm_refined", "value_back", "out_back")
  unread = {
    "both": (),
    "lookup": ("norm_compressed/",),
    "compressed": (
      *("norm_lookup/", f"{last}/norm_lookup_mlp/", f"{last}/lookup_mlp/"),
      *(f"{last}/mhbc/{name}/" for name in back),
    ),
  }[model.heads]
  for path, g in common.flat(grads["params"]).items():
    if math.prod(grid) > 1 and not path.endswith("bias"):
      assert np.any(g) != path.startswith(unread), path


def tree(**fields):
  """Shapes of parameters, by path."""
  images = jax.ShapeDtypeStruct((1, 20, 16, 3), jnp.float32)
  model = make(**dict(grid=(3, 2)) | fields)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  return {path: x.shape for path, x in common.flat(shapes).items()}


@pytest.mark.parametrize("scan", [False, True])
def test_parameters(scan):
  """What each field adds to the default's, and what it takes."""
  default = tree(scan=scan)
  assert default["head_lookup/kernel"] == (24, 7)

  def without(name):
    return {k: v for k, v in default.items() if not k.startswith(f"{name}/")}

  assert tree(scan=scan, heads="compressed") == without("head_lookup")
  assert tree(scan=scan, heads="lookup") == without("head_compressed")
  assert tree(scan=scan, compressed_init="average") == default
  assert tree(scan=scan, reuse_scale="tokens") == default
  learned = default | {"compressed_queries": (3, 2, 24)}
  assert tree(scan=scan, compressed_init="learned") == learned


def test_scan_and_remat_change_nothing():
  fields = dict(
    grid=(3, 2),
    heads="compressed",
    compressed_init="learned",
    reuse_scale="tokens",
  )
  images, labels = common.random_batch(20, 16)
  params = common.random_params(make(**fields), images)
  out, grads = common.gradients(make(**fields), params, images, labels)
  model = make(**fields, scan=True, remat_policy="nothing_saveable")
  stacked = layers.stack_blocks(params)
  again, other = common.gradients(model, stacked, images, labels)
  for name, x in out.items():
    np.testing.assert_allclose(again[name], x, rtol=1e-4, atol=1e-5)
  other = common.flat(layers.unstack_blocks(other["params"]))
  for name, x in common.flat(grads["params"]).items():
    np.testing.assert_allclose(other[name], x, rtol=1e-3, atol=1e-5)


def test_bfloat16():
  fields = dict(grid=(3, 2), compressed_init="average", reuse_scale="tokens")
  images, _ = common.random_batch(20, 16)
  params = common.random_params(make(**fields), images)
  exact, _ = common.apply(make(**fields), params, images)
  model = make(**fields, dtype="bfloat16")
  logits, out = common.apply(model, params, images, capture=("tokens",))
  assert out["lookup_tokens"].dtype == "bfloat16"
  error = common.relative_error(logits, np.asarray(exact))
  assert 1e-5 < error < 0.05


@pytest.mark.parametrize("heads", ["compressed", "lookup"])
def test_without_classes_it_returns_what_the_head_would_read(heads):
  images, _ = common.random_batch(12, 8)
  model = make(grid=(2, 2), heads=heads, depth=1).clone(num_classes=None)
  params = common.random_params(model, images)
  assert not any(name.startswith("head") for name in params)
  features, out = common.apply(model, params, images)
  assert out.keys() == {"pre_logits_compressed", "pre_logits_lookup"}
  np.testing.assert_array_equal(features, out[f"pre_logits_{heads}"])


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(heads="two"), "heads='two': want one of both, compressed, lookup"),
    (dict(heads="lookup", reuse="none"), "heads='lookup' with reuse='none'"),
    (
      dict(compressed_init="zeros"),
      "compressed_init='zeros': want one of resize, average, learned",
    ),
    (
      dict(compressed_init="learned", grid=(6, 2)),
      r"\(6, 2\) does not fit the lookup grid \(5, 4\)",
    ),
    (dict(compressed_init="learned", grid=(2, 2, 2)), r"\(2, 2, 2\)"),
    (dict(reuse_scale="sqrt"), "reuse_scale='sqrt': want one of none, tokens"),
    (
      dict(reuse_scale="tokens", reuse="logits"),
      "reuse_scale='tokens' is of reuse='weights', not of reuse='logits'",
    ),
    (dict(mlp_ratio=0.0), "MLP ratio 0.0 of width 24"),
    (dict(lookup_mlp_ratio=-1.0), "MLP ratio -1.0 of width 24"),
    (dict(mhbc_heads=5), "5 heads do not divide the width 24"),
    (dict(mhbc_heads=0), "LookupViT.mhbc_heads=0: want an integer >= 1"),
    (dict(mlp_ratio="4"), "LookupViT.mlp_ratio='4': want a number"),
    (dict(heads=None), "LookupViT.heads=None: want text"),
  ],
)
def test_refuses(fields, message):
  images = jax.ShapeDtypeStruct((1, 20, 16, 3), jnp.float32)
  with pytest.raises(ValueError, match=message):
    model = make(**dict(grid=(2, 2)) | fields)
    jax.eval_shape(
      functools.partial(model.init, grid=(1, 1)), jax.random.key(0), images
    )


def test_what_makes_another_encoder_of_a_captioner():
  """How the tokens come about; not which of them classifiers read."""
  trained = lookup_vit.Model(10, "Ti/4", heads="compressed", grid=(3, 3))
  plain = lookup_vit.Model(None, "Ti/4")
  assert captioner.differences(plain, trained) == []
  fields = dict(compressed_init="average", reuse_scale="tokens")
  assert captioner.differences(plain.clone(**fields), trained) == [
    "compressed_init='average', but was trained with compressed_init='resize'",
    "reuse_scale='tokens', but was trained with reuse_scale='none'",
  ]
  # Learned tokens have the shape of the model's own grid.
  learned = [m.clone(compressed_init="learned") for m in (plain, trained)]
  (line,) = captioner.differences(*learned)
  assert line == "grid=(5, 5), but was trained with grid=(3, 3)"
  assert lookup_vit.HEADS.keys() == {"both", "compressed", "lookup"}
