"""Tests of lookup_vit/models/attention.py."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu

from lookup_vit import parallel
from lookup_vit.analysis import steps
from lookup_vit.models import attention, layers
from tests import programs, small
from tests.models import common


def random(*shape, seed=0, dtype=np.float32):
  return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype)


def inputs(queries, keys, heads, size, batch=2):
  """Query, key, value, and a gradient of the result."""
  lengths = (queries, keys, keys, queries)
  return [random(batch, n, heads, size, seed=i) for i, n in enumerate(lengths)]


def reference(q, k, v, g):
  """The result, and the gradients of `q`, `k` and `v`, in float64."""
  q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
  scale = q.shape[-1] ** -0.5
  logits = np.einsum("bmhd,bnhd->bhmn", q, k) * scale
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  dv = np.einsum("bhmn,bmhd->bnhd", weights, g)
  d = np.einsum("bmhd,bnhd->bhmn", g, v)
  d = weights * (d - np.sum(d * weights, -1, keepdims=True)) * scale
  dq = np.einsum("bhmn,bnhd->bmhd", d, k)
  dk = np.einsum("bhmn,bmhd->bnhd", d, q)
  return np.einsum("bhmn,bnhd->bmhd", weights, v), dq, dk, dv


def both(function, q, k, v, g):
  """As `reference`, by JAX."""
  out, vjp = jax.vjp(function, q, k, v)
  return out, *vjp(g)


run = common.jit(both, static_argnums=0)


def check(function, *args):
  for got, want in zip(run(function, *args), reference(*args), strict=True):
    error = np.linalg.norm(got - want)
    assert error <= 1e-5 * np.linalg.norm(want) + 1e-6


SHAPES = [
  (1, 1, 1, 8),
  (37, 37, 3, 64),
  (130, 130, 1, 8),
  (257, 257, 3, 8),
  (1, 130, 3, 8),
  (37, 130, 1, 64),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_direct_equals_reference(shape):
  check(lambda *x: attention.attend(*x, "direct"), *inputs(*shape))


# Of a chunk: heads of all examples, or queries of a head.
@pytest.mark.parametrize(
  "shape, chunk",
  [
    (SHAPES[1], (4, 37)),
    (SHAPES[1], (1, 8)),
    (SHAPES[2], (1, 130)),
    (SHAPES[3], (0.5, 1)),
    (SHAPES[3], (1, 100)),
    (SHAPES[5], (2, 37)),
  ],
)
def test_chunks_equal_reference(shape, chunk, monkeypatch):
  heads, queries = chunk
  limit = int(4 * heads * queries * shape[1])
  monkeypatch.setattr(attention, "_CPU_CHUNK", limit)
  check(lambda *x: attention.attend(*x, "chunked"), *inputs(*shape))


# One block, and three by two.
@pytest.mark.parametrize("shape", [(37, 37, 3, 8), (1100, 1300, 1, 72)])
def test_tpu_kernel_equals_reference(shape, monkeypatch):
  on_tpu = lambda *args, tpu, **_: tpu(*args)  # noqa: E731
  monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
  with pltpu.force_tpu_interpret_mode():
    check(lambda *x: attention.attend(*x, "fused"), *inputs(*shape, batch=1))


def test_blocks_of_the_tpu_kernel():
  padded = {}
  for length in (1, 196, 576, 785, 1024, 1025, 1568, 3136, 3137, 12544):
    block = attention._tpu_block(length)
    assert block % 128 == 0 and block <= 1024
    padded[length] = -(-length // block) * block
  assert padded[3136] == padded[3137] == 3200
  assert padded[12544] == 12544
  assert padded[576] == 640
  for length, size in padded.items():
    assert length <= size <= max(256, 1.25 * length)


def test_bfloat16_gradients_do_not_grow_with_the_parts(monkeypatch):
  """Those of keys and values are sums over the parts."""
  args = [jnp.asarray(x, jnp.bfloat16) for x in inputs(300, 300, 2, 16)]
  want = reference(*args)

  def errors(impl):
    got = run(lambda *x: attention.attend(*x, impl), *args)
    return np.array(
      [
        np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        for a, b in zip(got, want, strict=True)
      ]
    )

  monkeypatch.setattr(attention, "_CPU_CHUNK", 4 * 300 * 7)
  assert np.all(errors("chunked") < 1.5 * errors("direct"))
  assert np.all(errors("direct") < 0.01)


def lowered(function, platform, *shapes, dtype=jnp.bfloat16):
  """The text of a function and its gradient, for a platform."""
  args = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]

  traced = jax.jit(functools.partial(both, function)).trace(*args, args[0])
  return traced.lower(lowering_platforms=(platform,)).as_text()


def weights_in(text):
  """Shapes in a program's text that end in 300 x 300."""
  return re.findall(r"tensor<[\dx]*300x300x\w+>", text)


def test_cudnn_kernel_on_gpus(monkeypatch):
  """As far as there is one: else chunks, as without cuDNN."""
  shape = (2, 300, 3, 64)

  def text(platform, impl="auto", shape=shape, **kwargs):
    # Not to be taken from a cache.
    attend = functools.partial(attention.attend, impl=impl)
    return lowered(attend, platform, *[shape] * 3, **kwargs)

  assert "cudnn" not in text("cuda")
  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91000
  )
  found = text("cuda")
  names = re.findall(r"@(__cudnn\$\w+)", found)
  assert names == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
  assert not weights_in(found)
  for kwargs in (dict(dtype=jnp.float32), dict(shape=(2, 300, 3, 12))):
    found = text("cuda", **kwargs)
    assert "cudnn" not in found and "while" in found
  found = text("cuda", "direct")
  assert "cudnn" not in found and "while" not in found
  assert "tensor<2x3x300x300xf32>" in weights_in(found)


def test_auto_is_direct_where_weights_are_few():
  def loops(platform, tokens, queries=None):
    shapes = [(8, n, 12, 64) for n in (queries or tokens, tokens, tokens)]
    return "while" in lowered(attention.attend, platform, *shapes)

  assert not loops("cpu", 64)
  assert loops("cpu", 196) and not loops("cuda", 196)
  assert loops("cuda", 300)
  assert not loops("cpu", 3136, queries=1)


@pytest.mark.parametrize(
  "impl, shape",
  [("direct", SHAPES[1]), ("chunked", SHAPES[1]), ("auto", SHAPES[3])],
)
def test_logit_max(impl, shape, monkeypatch):
  monkeypatch.setattr(attention, "_CPU_CHUNK", 4 * 50 * shape[1])
  q, k, *_ = inputs(*shape)
  value = lambda q, k: attention.logit_max(q, k, impl)  # noqa: E731
  got, grads = common.jit(jax.value_and_grad(value, (0, 1)))(q, k)
  want = np.einsum("bmhd,bnhd->bhmn", q, k).max() / np.sqrt(q.shape[-1])
  assert got == pytest.approx(want, rel=1e-5)
  assert not np.any(grads[0]) and not np.any(grads[1])


# In models.


@pytest.mark.parametrize(
  "kind, impl", [("lookup_vit", "auto"), ("vit", "chunked"), ("vit", "fused")]
)
def test_models_are_the_same_functions(kind, impl, monkeypatch):
  monkeypatch.setattr(attention, "_CPU_CHUNK", 1000)
  monkeypatch.setattr(attention, "_TINY", 20)
  grid = dict(grid=(3, 4)) if kind == "lookup_vit" else dict(pool="map")
  models = [
    common.make(kind, depth=1, attention=a, **grid) for a in ("direct", impl)
  ]
  images, labels = common.random_batch(12, 20)
  params = common.random_params(models[0], images)
  capture = ("attention_logit_max",)
  want, got = (
    common.gradients(m, params, images, labels, capture=capture) for m in models
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
    got,
    want,
  )


def test_captured_attention_is_whole(monkeypatch):
  monkeypatch.setattr(attention, "_CPU_CHUNK", 1000)
  monkeypatch.setattr(attention, "_TINY", 20)
  model = common.make("vit", depth=1, attention="chunked")
  images, _ = common.random_batch(12, 20)
  params = common.random_params(model, images)
  capture = ("attention", "attention_logit_max")
  logits, out = common.apply(model, params, images, capture=capture)
  assert out["attention"].shape == (1, 2, 3, 15, 15)
  np.testing.assert_allclose(out["attention"].sum(-1), 1, rtol=1e-5)
  want, others = common.apply(model, params, images, capture=capture[1:])
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    out["attention_logit_max"], others["attention_logit_max"], rtol=1e-5
  )


@pytest.mark.parametrize("kind", common.KINDS)
def test_errors(kind):
  images, _ = common.random_batch(12, 20)

  def init(**fields):
    model = common.make(kind, **fields)
    return jax.eval_shape(model.init, jax.random.key(0), images)

  with pytest.raises(ValueError, match="attention='flash': want one of auto"):
    init(attention="flash")
  with pytest.raises(ValueError, match="attention=True: want text"):
    init(attention=True)
  for impl in ("chunked", "fused"):
    with pytest.raises(
      ValueError, match=f"'{impl}' has no .*attention_dropout=0.1: want"
    ):
      init(attention=impl, attention_dropout=0.1)
  with pytest.raises(ValueError, match="attention='': want one of"):
    attention.attend(*inputs(3, 3, 1, 8)[:3], impl="")


@pytest.mark.parametrize(
  "policy", ["dots_saveable", "dots_with_no_batch_dims_saveable"]
)
def test_no_policy_keeps_weights(policy, monkeypatch):
  """Not even one that keeps what matrix products return."""
  monkeypatch.setattr(attention, "_CPU_CHUNK", 2**16)
  n, depth = 600, 4
  cfg = layers.LayerConfig(num_heads=1, train=True)
  x = random(1, n, 8)

  class Blocks(layers.nn.Module):
    @layers.nn.compact
    def __call__(self, x):
      fields = dict(cfg=cfg, mlp_ratio=1.0)
      x, _ = layers.apply_blocks(
        layers.EncoderBlock,
        fields,
        x,
        depth=depth,
        scan=True,
        remat_policy=policy,
      )
      return jnp.sum(x)

  params = jax.eval_shape(Blocks().init, jax.random.key(0), x)
  compiled = common.jit(jax.grad(Blocks().apply)).lower(params, x).compile()
  size = compiled.memory_analysis().temp_size_in_bytes
  assert size < 0.5 * depth * 4 * n * n


def test_long_sequences_train():
  """3136 tokens, scanned and rematerialised."""
  held = {}
  for impl in ("auto", "direct"):
    program, lowered = long_sequences(impl)
    compiled = lowered.compile()
    held[impl] = compiled.memory_analysis().temp_size_in_bytes
    if impl == "auto":
      state = program.init_state()
      before = jax.device_get(state.params)
      image = random(1, 56, 56, 3)
      batch = dict(image=image, label=np.arange(1, dtype=np.int32))
      batch = parallel.put_batch(batch, program.mesh)
      losses = []
      for _ in range(3):
        state, scalars = compiled(state, batch)
        losses.append(scalars["loss"])
      assert losses[-1] < losses[0]
      kernels = (
        p["encoderblock"]["attention"]["query"]["kernel"]
        for p in (before, state.params)
      )
      assert np.all(np.not_equal(*kernels))
  # Weights, and their gradient.
  weights = 4 * 3136**2
  assert held["direct"] > 2 * weights
  assert held["auto"] < weights / 3


def long_sequences(impl):
  """The program of a small config, and its training step."""
  config = small.config(
    model_name="vit",
    model=dict(
      variant="mu/1",
      width=8,
      num_heads=1,
      depth=2,
      scan=True,
      remat_policy="nothing_saveable",
      attention=impl,
    ),
    grids=None,
    input__batch_size=1,
    input__image_size=(56, 56),
  )
  program = steps.make_program(steps.prepare(config, None), jax.devices()[:1])
  return program, steps.lower(program, "train", None)


# On several devices, and on those that are not here.

PROGRAM = """
import json
from lookup_vit.analysis import chips, flops, steps
chips.use_cpu(4)
import flax.linen as nn
import jax
jax.config.update("jax_enable_compilation_cache", False)
import numpy as np
from lookup_vit import parallel, train_step
from lookup_vit.models import attention
from tests import small
from tests.models import test_attention

found = {}

# Equal on a mesh, of CPUs; the last batch is not split.
attention._CPU_CHUNK = 4 * 40 * 130
axes = [("data", 2), ("tensor", 2)]
mesh = parallel.make_mesh(axes, jax.devices("cpu"))
attend = lambda *x: attention.attend(*x, "fused")
for batch in (4, 3):
  args = test_attention.inputs(130, 130, 2, 8, batch=batch)
  step = jax.jit(lambda *args: test_attention.both(attend, *args))
  compiled = parallel.Compiled(step, mesh, "tensor").lower(*args).compile()
  got = compiled(*args)
  want = test_attention.reference(*args)
  found[batch] = max(
    float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True)
  )
  text = compiled.as_text()
  found[f"exchange {batch}"] = "all-gather" in text or "all-to-all" in text


# A training step of 3136 tokens, for TPUs.
def config(side):
  c = small.config(
    model_name="vit",
    model=dict(
      variant="mu/1", scan=True, remat_policy="nothing_saveable",
      dtype="bfloat16",
    ),
    grids=None,
    input__batch_size=4,
    input__image_size=(side, side),
    mesh=[("data", -1), ("tensor", 2)],
    sharding="tensor",
  )
  return steps.prepare(c, None)


try:
  devices = chips.devices("v5e:2x2")
except ValueError as e:
  found["no libtpu"] = str(e)
else:
  program = steps.make_program(config(56), devices)
  with steps._effort(-1.0):
    compiled = steps.lower(program, "train", None).compile()
  text = compiled.as_text()
  found["step"] = dict(
    temporaries=compiled.memory_analysis().temp_size_in_bytes,
    weights="3136,3136]" in text,
    kernels=text.count('custom_call_target="tpu_custom_call"'),
  )
  small_config = config(17)
  found["counted"] = steps.count(small_config, devices, "evaluation", None)
  model = train_step.build_model(small_config)
  found["formula"] = 2 * flops.multiply_adds(model, (17, 17))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
  program = programs.Program("-c", PROGRAM)
  out, err = program.communicate(timeout=300)
  assert program.returncode == 0, err
  return json.loads(out)


def test_a_mesh_changes_nothing(found):
  assert found["4"] < 1e-5 and found["3"] < 1e-5
  assert not found["exchange 4"]


def test_tpu_step_of_long_sequences(found):
  if "no libtpu" in found:
    pytest.skip(found["no libtpu"])
  # Forward, again for the backward pass, and its two.
  assert found["step"]["kernels"] == 4 and not found["step"]["weights"]
  # Of the two examples and the one head of a chip.
  assert found["step"]["temporaries"] < 2 * 4 * 3136**2 / 2


def test_cost_with_kernels(found):
  if "no libtpu" in found:
    pytest.skip(found["no libtpu"])
  # Four examples on four chips; norms and softmax have some too.
  assert 1 < found["counted"]["flops"] / found["formula"] < 1.2
