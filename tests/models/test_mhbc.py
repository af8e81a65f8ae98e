"""Tests of lookup_vit.models.mhbc, within a block."""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import layers, lookup_vit, mhbc
from tests.models import common

EPS = 1e-6


def make(tokens, num_heads, reuse_scale="none", mhbc_impl="auto", **fields):
  """A block whose other parts add nothing: refinement and the lookup MLP."""
  cfg = layers.LayerConfig(num_heads, norm_eps=EPS, **fields)
  block = lookup_vit.LookupBlock(
    cfg, num_heads, reuse_scale=reuse_scale, mhbc_impl=mhbc_impl
  )
  shapes = jax.eval_shape(block.init, jax.random.key(0), tokens, 0.0)
  params = copy.deepcopy(common.random_like(shapes["params"]))
  refinement = params["refinement"]
  for layer in (
    refinement["attention"]["out"],
    refinement["mlp"]["dense_out"],
    params["lookup_mlp"]["dense_out"],
  ):
    for x in layer.values():
      x[...] = 0
  return block, params


@pytest.mark.parametrize("mhbc_impl", ["direct", "absorbed"])
def test_weights_come_back_transposed_loop_by_loop(mhbc_impl):
  """Both directions of reuse="weights", one number at a time."""
  batch, m, n, width, num_heads = 2, 3, 5, 8, 2
  d = width // num_heads
  rng = np.random.default_rng(0)
  compressed = rng.standard_normal((batch, m, width)).astype(np.float32)
  lookup = rng.standard_normal((batch, n, width)).astype(np.float32)
  block, params = make((compressed, lookup), num_heads, mhbc_impl=mhbc_impl)
  p = params["mhbc"]

  def norm(name, x):
    mean = sum(x) / width
    variance = sum((v - mean) ** 2 for v in x) / width
    scale, bias = p[name]["scale"], p[name]["bias"]
    return [
      float(scale[i]) * (x[i] - mean) / math.sqrt(variance + EPS)
      + float(bias[i])
      for i in range(width)
    ]

  def project(name, x):
    kernel, bias = p[name]["kernel"], p[name]["bias"]
    return [
      float(bias[j]) + sum(x[i] * float(kernel[i, j]) for i in range(width))
      for j in range(width)
    ]

  want_compressed = compressed.astype(np.float64)
  want_lookup = lookup.astype(np.float64)
  for b in range(batch):
    y = [norm("norm_lookup", want_lookup[b, i]) for i in range(n)]
    key = [project("key", x) for x in y]
    value = [project("value", x) for x in y]
    query = [
      project("query", norm("norm_compressed", want_compressed[b, j]))
      for j in range(m)
    ]
    # a[h][j][i]: what compressed token j takes from lookup token i.
    a = []
    for h in range(num_heads):
      columns = range(h * d, (h + 1) * d)
      a.append([])
      for j in range(m):
        e = []
        for i in range(n):
          dot = sum(query[j][c] * key[i][c] for c in columns)
          e.append(math.exp(dot / math.sqrt(d)))
        a[h].append([x / sum(e) for x in e])
    for j in range(m):
      mixed = [
        sum(a[c // d][j][i] * value[i][c] for i in range(n))
        for c in range(width)
      ]
      want_compressed[b, j] += project("out", mixed)
    back = [
      project("value_back", norm("norm_refined", want_compressed[b, j]))
      for j in range(m)
    ]
    for i in range(n):
      mixed = [
        sum(a[c // d][j][i] * back[j][c] for j in range(m))
        for c in range(width)
      ]
      want_lookup[b, i] += project("out_back", mixed)

  got, _ = block.apply({"params": params}, (compressed, lookup), jnp.float32(0))
  common.check_outputs(
    dict(compressed=got[0], lookup=got[1]),
    dict(compressed=want_compressed, lookup=want_lookup),
  )


@pytest.mark.parametrize("m, n", [(3, 7), (1, 5), (4, 4)])
def test_scaled_weights_of_even_attention_are_a_mean(m, n):
  """Where every weight is 1 / n: the mean over the compressed tokens at any
  grid; without the scale, m / n of it.
  """
  rng = np.random.default_rng(0)
  tokens = tuple(
    rng.standard_normal((2, k, 8)).astype(np.float32) for k in (m, n)
  )

  def update(reuse_scale):
    block, params = make(tokens, 2, reuse_scale)
    p = params["mhbc"]
    for x in (*p["query"].values(), p["out_back"]["bias"]):
      x[...] = 0
    (compressed, lookup), _ = block.apply(
      {"params": params}, tokens, jnp.float32(0)
    )
    y = layers.layer_norm(block.cfg).apply(
      {"params": p["norm_refined"]}, compressed
    )
    v = y @ p["value_back"]["kernel"] + p["value_back"]["bias"]
    return lookup - tokens[1], v.mean(1) @ p["out_back"]["kernel"]

  got, mean = update("tokens")
  want = np.repeat(np.asarray(mean)[:, None], n, axis=1)
  np.testing.assert_allclose(got, want, atol=1e-5)
  got, _ = update("none")
  np.testing.assert_allclose(got, want * (m / n), atol=1e-5)


@pytest.mark.parametrize("mhbc_impl", ["direct", "absorbed"])
def test_attention_dropout_is_the_same_in_both_directions(mhbc_impl):
  """What a row drops on the way in, its column lacks on the way back.

  Parameters are chosen so that the update of compressed token `m` spells row
  `m` of the attention, and that of lookup token `n` the sum of column `n`.
  """
  copies, m, n, width, rate = 2000, 3, 5, 8, 0.4
  rng = np.random.default_rng(0)
  compressed = rng.standard_normal((1, m, width)).astype(np.float32)
  lookup = rng.standard_normal((1, n, width)).astype(np.float32)
  block, params = make((compressed, lookup), 1)
  p = params["mhbc"]
  y = (lookup[0] - lookup[0].mean(-1, keepdims=True)) / np.sqrt(
    lookup[0].var(-1, keepdims=True) + EPS
  ) * p["norm_lookup"]["scale"] + p["norm_lookup"]["bias"]
  p["value"]["kernel"] = np.pad(np.linalg.pinv(y), [(0, 0), (0, width - n)])
  p["value_back"]["kernel"] = np.zeros_like(p["value_back"]["kernel"])
  for name, bias in (("value", 0), ("out", 0), ("out_back", 0)):
    p[name]["bias"] = np.full(width, bias, np.float32)
  p["value_back"]["bias"] = np.ones(width, np.float32)
  p["out"]["kernel"] = p["out_back"]["kernel"] = np.eye(width, dtype=np.float32)

  tokens = [np.tile(x, (copies, 1, 1)) for x in (compressed, lookup)]

  def updates(**fields):
    block, _ = make((compressed, lookup), 1, mhbc_impl=mhbc_impl, **fields)
    got, captured = common.jit(block.apply)(
      {"params": params},
      tokens,
      jnp.float32(0),
      rngs={"dropout": jax.random.key(0)},
    )
    rows, columns = (
      np.asarray(a) - b for a, b in zip(got, tokens, strict=True)
    )
    return rows[..., :n], columns, captured

  exact, columns, captured = updates(capture=("attention",))
  np.testing.assert_allclose(exact.sum(-1), 1, atol=1e-5)
  np.testing.assert_allclose(exact, captured["attention"][:, 0], atol=1e-5)
  assert exact.min() > 1e-3

  rows, columns, captured = updates(
    train=True, attention_dropout=rate, capture=("attention",)
  )
  dropped = rows < exact.min() / 2
  np.testing.assert_allclose(dropped.mean(0), rate, atol=0.06)
  want = np.where(dropped, 0, exact / (1 - rate))
  np.testing.assert_allclose(rows, want, atol=1e-5)
  np.testing.assert_allclose(
    columns, np.repeat(rows.sum(1)[..., None], width, -1), atol=1e-5
  )


# Absorbed against direct.

SETTINGS = [
  dict(reuse="weights"),
  dict(reuse="weights", reuse_scale="tokens", attention_dropout=0.3),
  dict(reuse="weights", qk_norm=True, attention_dropout=0.3),
  dict(reuse="logits"),
  dict(reuse="logits", attention_dropout=0.3),
  dict(reuse="logits", qk_norm=True),
  dict(reuse="none", attention_dropout=0.3),
  dict(reuse="none", qk_norm=True),
]


def both_ways(seed, dtype="float32", capture=(), **fields):
  """Results and gradients of both directions, of each implementation."""
  rng = np.random.default_rng(seed)
  heads, d = (int(rng.integers(1, 5)) for _ in range(2))
  m, n, width = int(rng.integers(1, 8)), int(rng.integers(8, 40)), heads * 2 * d
  own = {k: fields.pop(k) for k in ("reuse", "reuse_scale") if k in fields}
  cfg = layers.LayerConfig(
    heads, dtype=jnp.dtype(dtype), train=True, capture=capture, **fields
  )
  tokens = [
    rng.standard_normal((3, k, width)).astype(np.float32) for k in (m, n)
  ]
  weights = [rng.standard_normal(x.shape).astype(np.float32) for x in tokens]
  found, params = {}, None
  for impl in ("direct", "absorbed"):
    module = mhbc.MHBC(cfg, width, impl=impl, **own)

    def there_and_back(module, compressed, lookup):
      update, reused, captured = module.gather(compressed, lookup)
      compressed = compressed + update
      if reused is not None:
        lookup = module.contextualise(compressed, reused)
      return (compressed, lookup), captured

    def loss(inputs, module=module, there_and_back=there_and_back):
      compressed, lookup = (x.astype(dtype) for x in inputs["tokens"])
      results, captured = module.apply(
        {"params": inputs["params"]},
        *(compressed, lookup),
        method=there_and_back,
        rngs={"dropout": jax.random.key(0)},
      )
      results = [x.astype(jnp.float32) for x in results]
      total = sum(map(jnp.vdot, weights, results))
      return total, dict(results=results, captured=captured)

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    shapes = jax.eval_shape(
      functools.partial(module.init, method=there_and_back), rngs, *tokens
    )["params"]
    assert params is None or jax.tree.structure(shapes) == params
    params = jax.tree.structure(shapes)
    inputs = dict(params=common.random_like(shapes), tokens=tokens)
    gradients, results = common.jit(jax.grad(loss, has_aux=True))(inputs)
    found[impl] = dict(results, gradients=gradients)
  return found["absorbed"], found["direct"]


@pytest.mark.parametrize("seed, fields", list(enumerate(SETTINGS)))
def test_absorbed_is_direct(seed, fields):
  capture = ("attention", "attention_logit_max")
  got, want = map(flat, both_ways(seed, capture=capture, **fields))
  assert got.keys() == want.keys()
  for name, a in got.items():
    b = want[name]
    if name.endswith("['key']['bias']") and not np.any(a):
      # Zero in theory, and as the absorbed way does not read it.
      b, a = want[name.replace("bias", "kernel")], b
      assert np.linalg.norm(a) < 1e-5 * np.linalg.norm(b), name
    elif np.any(b):
      assert common.relative_error(a, np.asarray(b)) < 1e-5, name
    else:
      assert not np.any(a), name
  read = fields["reuse"] == "logits" or "qk_norm" in fields
  bias = got["['gradients']['params']['key']['bias']"]
  assert np.any(bias) == read


@pytest.mark.parametrize("seed, fields", list(enumerate(SETTINGS)))
def test_absorbed_is_direct_in_bfloat16(seed, fields):
  """To what bfloat16 loses of direct MHBC, against float32."""
  got, want = map(flat, both_ways(seed, "bfloat16", **fields))
  _, exact = both_ways(seed, **fields)
  exact = flat(exact)

  def distance(a, b):
    return math.sqrt(
      sum(np.sum((np.float64(a[k]) - np.float64(b[k])) ** 2) for k in exact)
    )

  size = distance(exact, {k: 0 for k in exact})
  assert 1e-3 < distance(want, exact) / size < 3e-2
  assert distance(got, exact) < 1.5 * distance(want, exact)


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("space", [(20, 28), (6, 12, 20)])
def test_a_model_is_the_same_with_any(space):
  """Images and videos, one set of parameters, results and gradients."""
  patch, grid = (2, 4, 4)[-len(space) :], (2, 3, 2)[: len(space)]
  images, labels = common.random_batch(*space)
  model = common.make(
    "lookup_vit", patch_size=patch, grid=grid, mhbc_impl="direct"
  )
  params = common.random_params(model, images)
  want = common.gradients(model, params, images, labels)
  for impl in ("absorbed", "auto"):
    got = common.gradients(model.clone(mhbc_impl=impl), params, images, labels)
    for (name, a), b in zip(
      flat(got).items(), flat(want).values(), strict=True
    ):
      b = np.asarray(b)
      if not name.endswith("['key']['bias']"):
        assert common.relative_error(a, b) < 1e-5, name


# The choice.


def test_auto_needs_fewer_multiply_adds():
  """Against a count of each matrix product."""
  rng = np.random.default_rng(0)
  chosen = set()
  for _ in range(300):
    heads, d, m = (int(x) for x in rng.integers(1, 17, 3))
    n, width = m + int(rng.integers(0, 200)), heads * d

    def product(a, b, c, times=1):
      return times * a * b * c

    direct = 3 * product(n, width, width) + 3 * product(m, d, n, heads)
    absorbed = 3 * product(m, d, width, heads) + 3 * product(
      *(m, width, n), heads
    )
    got = mhbc.absorbs("auto", m, n, heads, width)
    assert got == (absorbed < direct), (m, n, heads, width)
    chosen.add(got)
    assert mhbc.absorbs("absorbed", m, n, heads, width)
    assert not mhbc.absorbs("direct", m, n, heads, width)
  assert chosen == {True, False}


def test_no_such_implementation():
  model = lookup_vit.Model(7, "Ti/4", mhbc_impl="fast")
  with pytest.raises(ValueError, match="mhbc_impl='fast': want one of auto, "):
    jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
