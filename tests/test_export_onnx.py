"""Tests of lookup_vit/exports/onnx.py."""

import os
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from lookup_vit import export
from lookup_vit.exports import classifier, onnx
from lookup_vit.tasks import classification
from lookup_vit.train_step import build_model
from tests import exports
from tests.exports import GRID, SIZE, check, expected, images
from tests.models import common


@pytest.fixture(scope="module")
def lookup(tmp_path_factory):
  return exports.make_run(tmp_path_factory.mktemp("run"), exports.make_config())


@pytest.fixture(scope="module")
def onnx_export(lookup, tmp_path_factory):
  output = str(tmp_path_factory.mktemp("out") / "onnx")
  worst = export.export(lookup.workdir, "onnx", output)
  assert 0 < worst < 1e-5
  return output


def session_of(model):
  return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def call_onnx(session, given):
  names = [output.name for output in session.get_outputs()]
  return dict(zip(names, session.run(names, {"images": given}), strict=True))


def test_onnx_at_several_grids_and_any_batch(lookup, onnx_export):
  for name, grid in (("2x3", GRID), ("1x2", (1, 2))):
    session = session_of(f"{onnx_export}/{name}.onnx")
    assert session.get_inputs()[0].shape == ["batch", *SIZE, 3]
    for batch in (1, 4):
      found = call_onnx(session, images(batch))
      check(found, expected(lookup, images(batch), grid))
  # The parameters are there once.
  sizes = {
    p.name: p.stat().st_size for p in pathlib.Path(onnx_export).iterdir()
  }
  count = sum(x.size for x in jax.tree.leaves(lookup.params))
  assert 4 * count < sizes["params.safetensors"] < 4 * count + 20_000
  assert sizes["2x3.onnx"] < 100_000


def test_docs(lookup, onnx_export, tmp_path, monkeypatch):
  scope = exports.run_docs("ONNX", onnx_export, monkeypatch, tmp_path)
  want = expected(lookup, scope["images"], GRID)["probabilities"]
  np.testing.assert_allclose(scope["probabilities"], want, atol=2e-5)
  # The one file needs no other.
  assert sorted(os.listdir(tmp_path)) == ["2x3.onnx", "exports", "photo.jpg"]
  found = call_onnx(session_of(str(tmp_path / "2x3.onnx")), images(2))
  check(found, expected(lookup, images(2), GRID))


def test_a_fixed_batch(lookup, tmp_path):
  output = str(tmp_path / "out")
  export.export(lookup.workdir, "onnx", output, grids=[(2, 2)], batch_size=2)
  session = session_of(f"{output}/2x2.onnx")
  assert session.get_inputs()[0].shape == [2, *SIZE, 3]
  check(call_onnx(session, images(2)), expected(lookup, images(2), (2, 2)))


CLIPS = dict(input=dict(pp="", image_size=(4, *SIZE), batch_size=4))


@pytest.mark.parametrize(
  ("name", "fields", "config"),
  [
    ("vit", dict(pool="map", gelu="exact"), {}),
    ("vit", dict(pool="tok", qk_norm=True, positions="sincos"), {}),
    ("vit", dict(variant="mu/2x4"), CLIPS),
    ("lookup_vit", dict(mhbc_impl="direct"), dict(loss="sigmoid_xent")),
    ("lookup_vit", dict(mhbc_impl="absorbed", reuse="logits"), {}),
    ("lookup_vit", dict(mhbc_impl="absorbed", qk_norm=True), {}),
    ("lookup_vit", dict(reuse="none", heads="compressed"), {}),
    ("lookup_vit", dict(reuse_scale="tokens", stem="deep_conv"), {}),
    ("lookup_vit", dict(compressed_init="average", dtype="bfloat16"), {}),
    ("lookup_vit", dict(compressed_init="learned", scan=True), {}),
    ("factorised", dict(variant="mu/2x4", temporal_depth=1), CLIPS),
    (
      "factorised",
      dict(variant="mu/2x4", spatial="lookup_vit", temporal_depth=1),
      CLIPS,
    ),
    (
      "probe",
      dict(
        encoder=dict(variant="mu/4", grid=GRID, scan=True),
        features="both",
        block=0,
      ),
      {},
    ),
  ],
)
def test_models(name, fields, config):
  """Each kind of model, at another grid than its own, and any batch."""
  if name != "probe":
    fields = dict(variant="mu/4", width=24, num_heads=2) | fields
  if name == "lookup_vit" or "spatial" in fields:
    fields = dict(grid=GRID) | fields
  config = exports.make_config(name, model=fields, **config)
  # The model with the config's number of blocks, and in float32.
  model = classifier._with(
    build_model(config), lambda model: dict(dtype="float32")
  )
  size = config.input.image_size
  grid = None
  if hasattr(model, "grid"):
    grid = (2, 2) if len(model.lookup_grid(size)) == 2 else (1, 2, 2)
  given = images(3, size)
  params = common.random_like(
    jax.eval_shape(model.init, jax.random.key(0), given.astype(np.float32))
  )["params"]
  program = types.SimpleNamespace(
    model=build_model(config),
    config=config,
    task=classification.Task(config),
  )
  [function] = classifier.functions(program, [grid]).values()
  converted = onnx.convert(
    function,
    classifier.by_name(params),
    classifier.images_shape(None, size),
  )
  session = session_of(converted.SerializeToString())
  program.model = model
  want = expected(exports.Run("", program, params), given, grid)
  for batch in (1, 3):
    found = call_onnx(session, given[:batch])
    check(found, {name: x[:batch] for name, x in want.items()})


RNG = np.random.default_rng(3)


def constant(*shape):
  return RNG.normal(size=shape).astype(np.float32)


A, B, C, D = constant(5, 7), constant(4, 5), constant(4, 5, 7), constant(1, 5)
KERNEL = constant(3, 2, 2, 6)


def convolve(x, **fields):
  return jax.lax.conv_general_dilated(
    jnp.tile(x[..., None], (1, 1, 1, 4)),
    KERNEL,
    **dict(window_strides=(2, 1), padding=[(1, 2), (0, 1)]) | fields,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=2,
  )


@pytest.mark.parametrize(
  "function",
  [
    lambda x: (x + B) * (2 - x) / (3 + x * x),
    lambda x: -jnp.maximum(x, D),
    lambda x: x**2 + x**3 + x**5,
    lambda x: jax.lax.rsqrt(x * x + 1),
    jnp.exp,
    jnp.tanh,
    jax.nn.sigmoid,
    jax.nn.softmax,
    lambda x: jax.nn.softmax(x, axis=1),
    lambda x: jax.nn.gelu(x, approximate=False),
    lambda x: jax.nn.gelu(x, approximate=True),
    lambda x: jnp.einsum("bij,jk->bik", x, A),
    lambda x: jnp.einsum("bij,kj->bik", x, B),
    lambda x: jnp.einsum("bij,ijk->bk", x, C),
    lambda x: jnp.einsum("bij,bkj->bik", x, x),
    lambda x: jnp.einsum("bij,bik->bjk", x, x),
    lambda x: jnp.einsum("bij,bij->b", x, x),
    lambda x: jnp.einsum("bij,ijk->ibk", x, C),
    lambda x: jnp.einsum("ij,bjk->bik", B, jnp.swapaxes(x, 1, 2)),
    lambda x: jnp.einsum("bij,k->bijk", x, A[0]),
    lambda x: x @ A,
    lambda x: jnp.sum(x, axis=(1, 2)),
    lambda x: jnp.mean(x, axis=1, keepdims=True),
    lambda x: jnp.max(x, axis=2),
    lambda x: jnp.stack([x, 2 * x], 1),
    lambda x: jax.lax.index_in_dim(x, 2, 1, keepdims=False),
    lambda x: jax.lax.slice_in_dim(x, 0, 4, 2, axis=1),
    lambda x: jax.lax.slice_in_dim(x, 0, 4, axis=1),
    lambda x: jnp.concatenate([x, jnp.tile(D[None], (x.shape[0], 2, 1))], 1),
    lambda x: jnp.broadcast_to(B[:, 0], (2 * x.shape[0], 4)),
    lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 3, 4, 5)),
    lambda x: jnp.swapaxes(x.reshape(-1, 2, 10), 0, 1),
    lambda x: x.astype(jnp.int32).astype(jnp.float32),
    convolve,
    lambda x: convolve(x, rhs_dilation=(1, 2)),
    lambda x: jax.lax.platform_dependent(
      x, cpu=lambda x: x, default=lambda x: x + 0
    ),
  ],
)
def test_operations(function):
  """Each as JAX computes it, whatever the batch."""

  def of_params(params, x):
    return {"x": function(x) + 0 * params["zero"], "unused": params["one"]}

  (batch,) = jax.export.symbolic_shape("batch")
  model = onnx.convert(
    of_params,
    {"zero": np.zeros((), np.float32), "one": np.ones(3, np.float32)},
    jax.ShapeDtypeStruct((batch, 4, 5), np.float32),
  )
  session = session_of(model.SerializeToString())
  for count in (1, 3):
    x = RNG.normal(size=(count, 4, 5)).astype(np.float32)
    want, found = function(x), call_onnx(session, x)
    assert found["x"].shape == want.shape
    np.testing.assert_allclose(found["x"], want, atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(found["unused"], np.ones(3))


def pairs(x):
  return x[:, None] + x[None]


@pytest.mark.parametrize(
  ("function", "words"),
  [
    (jnp.sort, "JAX's operation 'sort', which lookup_vit has no conversion"),
    (jnp.sin, "'sin'"),
    (lambda x: x**-2, "A power -2 has no conversion"),
    (lambda x: convolve(x, lhs_dilation=(2, 1)), "A transposed convolution"),
    (lambda x: jnp.broadcast_to(B, (x.shape[0] + 1, 4, 5)), "A dimension ba"),
    (lambda x: pairs(x).reshape(*(x.shape[0],) * 2, 20), "A shape .batch, ba"),
  ],
)
def test_operations_that_are_not_known(function, words):
  (batch,) = jax.export.symbolic_shape("batch")
  x = jax.ShapeDtypeStruct((batch, 4, 5), np.float32)
  with pytest.raises(ValueError, match=words):
    onnx.convert(lambda params, x: {"x": function(x)}, {}, x)
