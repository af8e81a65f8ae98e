"""Tests of lookup_vit/models/lookup_stream.py and its kernels."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import lookup_kernels, lookup_stream, mhbc
from tests import programs
from tests.models import common

INTERPRET = lookup_kernels.Spec(interpret=True)


def random(*shape, seed=0, scale=1.0):
  rng = np.random.default_rng([seed, *shape])
  return (scale * rng.standard_normal(shape)).astype(np.float32)


def inputs(batch, n, m, heads, size, hidden, dtype):
  """All arguments of both kernels, by name."""
  width = heads * size
  params = dict(
    key=random(heads, size, width, seed=1, scale=width**-0.5),
    value=random(heads, size, width, seed=2, scale=width**-0.5),
    out=random(heads, size, width, seed=3, scale=width**-0.5),
    kernel_in=random(width, hidden, seed=4, scale=width**-0.5),
    kernel_out=random(hidden, width, seed=5, scale=hidden**-0.5),
  )
  params = {name: x.astype(dtype) for name, x in params.items()}
  for i, name in enumerate(("norm", "mlp")):
    params[f"{name}_scale"] = 1 + random(1, width, seed=6 + i, scale=0.3)
    params[f"{name}_bias"] = random(1, width, seed=8 + i, scale=0.3)
  params["out_bias"] = random(1, width, seed=10, scale=0.3)
  params["bias_in"] = random(1, hidden, seed=11, scale=0.3)
  params["bias_out"] = random(1, width, seed=12, scale=0.3)
  return dict(
    params=params,
    lookup=random(batch, n, width, seed=13).astype(dtype),
    query=random(batch, heads, m, size, seed=14).astype(dtype),
    value=random(batch, heads, m, size, seed=15).astype(dtype),
    keep=np.abs(random(batch, 2, seed=16)),
  )


# The same in plain JAX.


def normalise(x, scale, bias, eps):
  x = x.astype(jnp.float32)
  mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
  return (x - mean) / jnp.sqrt(variance + eps) * scale + bias


def einsum(equation, *args):
  return jnp.einsum(equation, *(x.astype(jnp.float32) for x in args))


def logits_of(spec, lookup, query, p):
  y = normalise(lookup, p["norm_scale"], p["norm_bias"], spec.eps)
  y = y.astype(lookup.dtype)
  wide = einsum("bhmd,hdD->bhmD", query, p["key"]).astype(y.dtype)
  return y, einsum("bhmD,bnD->bhmn", wide, y)


def plain_gather(spec, lookup, query, params):
  y, logits = logits_of(spec, lookup, query, params)
  weights = jax.nn.softmax(logits).astype(y.dtype)
  wide = einsum("bhmn,bnD->bhmD", weights, y).astype(y.dtype)
  x = einsum("bhmD,hdD->bhmd", wide, params["value"]).astype(y.dtype)
  top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
  return x, jax.nn.logsumexp(logits, axis=-1), top, lookup


def plain_contextualise(spec, lookup, query, sums, value, keep, p):
  dtype = lookup.dtype
  _, logits = logits_of(spec, lookup, query, p)
  weights = jnp.exp(logits - sums[..., None]).astype(dtype)
  wide = einsum("bhmd,hdD->bhmD", value, p["out"]).astype(dtype)
  update = einsum("bhmn,bhmD->bnD", weights, wide) + p["out_bias"]
  keep = jax.lax.stop_gradient(keep)[..., None, None]
  x = lookup.astype(jnp.float32) + keep[:, 0] * update
  y = normalise(x, p["mlp_scale"], p["mlp_bias"], spec.eps).astype(dtype)
  y = einsum("bnD,Dr->bnr", y, p["kernel_in"]) + p["bias_in"]
  y = jax.nn.gelu(y, approximate=spec.approximate).astype(dtype)
  y = einsum("bnr,rD->bnD", y, p["kernel_out"]) + p["bias_out"]
  return (x + keep[:, 1] * y).astype(dtype)


# Either way.


def both(gather, contextualise, spec, args):
  """Results of both, the second of which depends on those of the first."""
  params = args["params"]
  x, sums, top, lookup = gather(
    *(spec, args["lookup"], args["query"]),
    {name: params[name] for name in lookup_kernels.GATHER},
  )
  out = contextualise(
    *(spec, lookup, args["query"], sums, args["value"] + jnp.tanh(x)),
    *(args["keep"], {k: params[k] for k in lookup_kernels.CONTEXTUALISE}),
  )
  return dict(x=x, sums=sums, top=top, out=out)


@functools.partial(common.jit, static_argnums=(0, 1, 2))
def run(gather, contextualise, spec, args):
  """Results, and gradients of all arguments."""

  def loss(args):
    found = both(gather, contextualise, spec, args)
    total = 0
    for i, name in enumerate(("x", "sums", "out")):
      weights = random(*found[name].shape, seed=20 + i)
      total += jnp.vdot(weights, found[name].astype(jnp.float32))
    return total, found

  gradients, found = jax.grad(loss, has_aux=True)(args)
  return dict(found, gradients=gradients)


def kernels(spec, args):
  return run(lookup_stream.gather, lookup_stream.contextualise, spec, args)


def plain(spec, args):
  return run(plain_gather, plain_contextualise, spec, args)


def errors(got, want):
  want = jax.tree.map(lambda x: np.asarray(x, np.float64), want)
  errors = jax.tree.map(
    lambda a, b: common.relative_error(a, b) if np.any(b) else np.abs(a).max(),
    *(got, want),
  )
  return {
    jax.tree_util.keystr(path): error
    for path, error in jax.tree_util.tree_leaves_with_path(errors)
  }


# The kernels against plain JAX.


@pytest.mark.parametrize(
  "shape, chunk, approximate",
  [
    ((2, 13, 8, 3, 8, 12), 256, True),  # One chunk that is not full.
    ((1, 16, 8, 2, 16, 20), 16, False),  # One that is.
    ((2, 29, 16, 1, 8, 4), 8, True),  # Three, and a rest.
    ((2, 16, 8, 2, 8, 4), 8, False),  # Two.
  ],
)
def test_kernels_equal_plain_jax(monkeypatch, shape, chunk, approximate):
  monkeypatch.setattr(lookup_kernels, "CHUNK", chunk)
  spec = dataclasses.replace(INTERPRET, approximate=approximate, eps=1e-3)
  args = inputs(*shape, np.float32)
  worst = errors(kernels(spec, args), plain(spec, args))
  assert max(worst.values()) < 1e-5, worst


def test_kernels_in_bfloat16(monkeypatch):
  """As far from float32 as plain JAX in bfloat16."""
  monkeypatch.setattr(lookup_kernels, "CHUNK", 16)
  shape = (2, 37, 16, 2, 16, 12)
  args = inputs(*shape, jnp.bfloat16)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float32), args)
  exact = plain(INTERPRET, exact)
  got, want = kernels(INTERPRET, args), plain(INTERPRET, args)
  for name in ("query", "value", "lookup"):
    assert got["gradients"][name].dtype == jnp.bfloat16
  got, want = errors(got, exact), errors(want, exact)
  for name, error in got.items():
    assert error < max(1.5 * want[name], 5e-3), name


def test_logits_of_any_size(monkeypatch):
  """The softmax neither overflows nor loses what comes in the last chunk."""
  monkeypatch.setattr(lookup_kernels, "CHUNK", 8)
  args = inputs(1, 24, 8, 2, 8, 4, np.float32)
  args["query"] *= 300
  got, want = kernels(INTERPRET, args), plain(INTERPRET, args)
  assert np.abs(want["top"]).max() > 500
  worst = errors(got, want)
  assert max(worst[f"['{k}']"] for k in ("x", "sums", "top", "out")) < 1e-5


def test_rows_that_are_not_there():
  """Queries and values of zeros change nothing, nor get a gradient."""
  args = inputs(2, 13, 8, 2, 8, 4, np.float32)
  more = dict(args)
  for name in ("query", "value"):
    more[name] = np.pad(args[name], [(0, 0), (0, 0), (0, 8), (0, 0)])

  def run(args, rows):
    def loss(args):
      params = args["params"]
      x, sums, _, lookup = lookup_stream.gather(
        *(INTERPRET, args["lookup"], args["query"]),
        {name: params[name] for name in lookup_kernels.GATHER},
      )
      out = lookup_stream.contextualise(
        *(INTERPRET, lookup, args["query"], sums, args["value"]),
        *(args["keep"], {k: params[k] for k in lookup_kernels.CONTEXTUALISE}),
      )
      x = x[:, :, :8]
      return jnp.sum(out**2) + jnp.sum(x**2), (x, out)

    return common.jit(jax.grad(loss, has_aux=True))(args)

  d, want = run(args, 8)
  more_d, got = run(more, 16)
  assert max(errors(got, want).values()) < 1e-6
  assert not np.any(more_d["query"][:, :, 8:])
  more_d["query"] = more_d["query"][:, :, :8]
  more_d["value"] = more_d["value"][:, :, :8]
  assert max(errors(more_d, d).values()) < 1e-5


@pytest.mark.parametrize(
  "m, dtype, want",
  [
    *[(m, "float32", w) for m, w in ((1, 8), (8, 8), (9, 16), (25, 32))],
    *[(m, "bfloat16", w) for m, w in ((1, 16), (16, 16), (25, 32), (49, 64))],
  ],
)
def test_rows(m, dtype, want):
  assert lookup_stream.rows(m, dtype) == want


# In a model.


@pytest.fixture
def interpreted(monkeypatch):
  """Models take the kernels, step by step; returns where it is noted."""
  calls = []

  def serves(lookup, *sizes):
    calls.append((lookup.shape, *sizes))
    return True

  spec = mhbc.MHBC._spec
  monkeypatch.setattr(lookup_stream, "serves", serves)
  monkeypatch.setattr(
    *(mhbc.MHBC, "_spec"),
    lambda self: dataclasses.replace(spec(self), interpret=True),
  )
  return calls


FUSED = [
  dict(grid=(2, 3)),
  dict(mhbc_heads=2, gelu="exact", norm_eps=1e-3, lookup_mlp_ratio=1.0),
  dict(reuse_scale="tokens", stochastic_depth=0.4),
]


@pytest.mark.parametrize("fields", FUSED)
def test_a_model_with_kernels(interpreted, fields):
  model = common.make("lookup_vit", mhbc_impl="direct", **fields)
  images, labels = common.random_batch(20, 28)
  params = common.random_params(model, images)
  run = lambda model: common.gradients(  # noqa: E731
    *(model, params, images, labels),
    rng=0,
    train=True,
    capture=("tokens", "attention_logit_max"),
  )
  want = run(model)
  assert not interpreted
  got = run(model.clone(mhbc_impl="fused"))
  hidden = round(24 * model.lookup_mlp_ratio)
  assert set(interpreted) == {((2, 35, 24), 6, model.mhbc_heads or 3, hidden)}
  for name, error in errors(got, want).items():
    if not name.endswith("['key']['bias']"):
      assert error < 1e-5, name


def test_kernels_in_a_scan_that_computes_again(interpreted):
  fields = dict(scan=True, remat_policy="nothing_saveable")
  model = common.make("lookup_vit", mhbc_impl="direct", **fields)
  images, labels = common.random_batch(20, 28)
  params = common.random_params(model, images)
  want = common.gradients(model, params, images, labels)
  got = common.gradients(model.clone(mhbc_impl="auto"), params, images, labels)
  assert interpreted
  for name, error in errors(got, want).items():
    if not name.endswith("['key']['bias']"):
      assert error < 1e-5, name


@pytest.mark.parametrize(
  "fields, kwargs",
  [
    (dict(mhbc_impl="direct"), {}),
    (dict(mhbc_impl="absorbed"), {}),
    (dict(reuse="logits"), {}),
    (dict(reuse="none"), {}),
    (dict(qk_norm=True), {}),
    (dict(), dict(capture=("attention",))),
    (dict(dropout=0.1), dict(train=True)),
    (dict(attention_dropout=0.1), dict(train=True)),
    # Too many rows for "auto".
    (dict(mhbc_impl="auto", mhbc_heads=8), {}),
  ],
)
def test_what_has_no_kernel(interpreted, fields, kwargs):
  model = common.make("lookup_vit", **dict(mhbc_impl="fused") | fields)
  images, _ = common.random_batch(20, 28)
  params = common.random_params(model, images)
  apply = functools.partial(
    model.apply, rngs={"dropout": jax.random.key(0)}, **kwargs
  )
  jax.eval_shape(apply, {"params": params}, images)
  assert not interpreted


def test_evaluation_of_a_model_with_dropout_has_kernels(interpreted):
  model = common.make("lookup_vit", mhbc_impl="fused", dropout=0.1)
  images, _ = common.random_batch(20, 28)
  params = common.random_params(model, images)
  jax.eval_shape(model.apply, {"params": params}, images)
  assert interpreted


def test_no_kernels_on_cpus():
  model = common.make("lookup_vit", mhbc_impl="fused")
  images, _ = common.random_batch(20, 28)
  params = common.random_params(model, images)
  text = str(jax.make_jaxpr(model.apply)({"params": params}, images))
  assert "pallas_call" not in text


# On other devices, in a process of its own.

PROGRAM = """
import dataclasses, json, os
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lookup_vit import parallel
from lookup_vit.analysis import chips
from lookup_vit.models import lookup_stream, lookup_vit, mhbc
from tests.models import common, test_lookup_stream as tests

found = {}
serves, spec = lookup_stream.serves, mhbc.MHBC._spec

# Equal on a mesh, of CPUs; the last batch is not split.
lookup_stream.serves = lambda *args: True
mhbc.MHBC._spec = lambda self: dataclasses.replace(spec(self), interpret=True)
model = common.make("lookup_vit", depth=1)
mesh = parallel.make_mesh(
  [("data", 2), ("fsdp", 2)], jax.devices("cpu")
)
for batch in (4, 3):
  images, labels = common.random_batch(8, 12, batch=batch)
  params = common.random_params(model, images)

  def gradients(model, params, images, labels):
    def loss(params):
      logits, out = model.apply({"params": params}, images)
      return common.loss_of(out, logits, labels)
    return jax.grad(loss)(params)

  want = jax.jit(gradients, static_argnums=0)(
    model.clone(mhbc_impl="direct"), params, images, labels
  )
  fused = model.clone(mhbc_impl="fused")
  step = jax.jit(lambda *args: gradients(fused, *args))
  step = parallel.Compiled(step, mesh, "fsdp")
  args = [params, images, labels]
  if batch == 4:
    args[1:] = jax.device_put(args[1:], parallel.batch_sharding(mesh))
  worst = tests.errors(step(*args), want)
  found[batch] = max(
    v for k, v in worst.items() if not k.endswith("['key']['bias']")
  )

# What a device has, by its kind.
lookup_stream.serves, mhbc.MHBC._spec = serves, spec
try:
  devices = chips.devices("v5e:2x2")
except ValueError as e:
  found["no libtpu"] = str(e)
else:
  def serves_on(axes, strategy, n, m, heads, hidden, width, dtype="bfloat16"):
    mesh = parallel.make_mesh(axes, devices)
    lookup = jax.ShapeDtypeStruct((8, n, width), dtype)
    with parallel.Compiled(None, mesh, strategy)._active():
      return lookup_stream.serves(lookup, m, heads, hidden)

  data = [("data", 4)]
  found["serves"] = dict(
    base=serves_on(data, "replicated", 196, 25, 12, 384, 768),
    half=serves_on(data, "replicated", 196, 25, 12, 384, 768, "float16"),
    long=serves_on(data, "replicated", 3136, 25, 12, 384, 768),
    longer=serves_on(data, "replicated", 30_000, 25, 12, 384, 768),
    wide=serves_on(data, "replicated", 196, 25, 64, 2048, 4096),
    tensor=serves_on(
      [("data", 2), ("tensor", 2)], "tensor", 196, 25, 12, 384, 768
    ),
  )

  # A step compiled for TPUs: odd numbers of tokens, forward and backward.
  mesh = parallel.make_mesh(data, devices)
  found["compiled"] = {}
  for dtype in ("bfloat16", "float32"):
    model = lookup_vit.Model(
      7, "Ti/4", width=128, num_heads=2, depth=1, grid=(3, 3), dtype=dtype
    )
    images = jax.ShapeDtypeStruct(
      (8, 68, 76, 3), jnp.float32, sharding=parallel.batch_sharding(mesh)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(model.init, key, images)["params"]
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=parallel.replicated(mesh)
      ),
      params,
    )

    def loss(params, images):
      logits, out = model.apply({"params": params}, images)
      return jnp.sum(logits**2)

    step = parallel.Compiled(jax.jit(jax.grad(loss)), mesh, "replicated")
    text = step.lower(params, images).compile().as_text()
    found["compiled"][dtype] = [
      text.count('custom_call_target="tpu_custom_call"'),
      *("9,323]" in text, "323,9]" in text),
    ]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
  program = programs.Program("-c", PROGRAM)
  out, err = program.communicate(timeout=600)
  assert program.returncode == 0, err
  return json.loads(out)


def test_a_mesh_changes_nothing(found):
  assert found["4"] < 1e-5 and found["3"] < 1e-5


def test_which_programs_have_kernels(found):
  if "no libtpu" in found:
    pytest.skip(found["no libtpu"])
  assert found["serves"] == dict(
    base=True,
    half=False,
    long=True,
    longer=False,
    wide=False,
    tensor=False,
  )


def test_kernels_compile_for_tpus(found):
  if "no libtpu" in found:
    pytest.skip(found["no libtpu"])
  # Gathering and contextualisation, forward and backward, and no weights.
  for dtype in ("bfloat16", "float32"):
    assert found["compiled"][dtype] == [4, False, False]
