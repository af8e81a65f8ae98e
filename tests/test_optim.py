"""Tests of lookup_vit/optim.py, against NumPy in float64."""

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from lookup_vit import config_utils, optim

TOTAL = 20
SHAPES = {
  "embedding/kernel": (2, 2, 3, 6),
  "embedding/bias": (6,),
  "pos_embedding": (3, 5, 6),
  "encoderblock_0/mlp/kernel": (6, 7),
  "encoderblock_0/mlp/bias": (7,),
  "head/kernel": (11, 10),
  "head/bias": (10,),
}


def make_config(**fields):
  base = dict(
    model_name="vit",
    total_steps=TOTAL,
    lr=0.03,
    wd=0.02,
    schedule=dict(warmup_steps=4, decay_type="cosine"),
    input=dict(pp="", image_size=(8, 8), batch_size=4),
  )
  return config_utils.resolve(base | fields)


def nest(flat):
  tree = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = value
  return tree


def flatten(tree):
  return {
    "/".join(k.key for k in path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def random_tree(seed, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  return {
    k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()
  }


def run(config, steps, shapes=SHAPES, scale=1.0):
  """Parameters after each step, the updates, the gradients and the state."""
  params = nest(random_tree(0, shapes))
  tx, _ = optim.make(config, params, TOTAL)
  state = tx.init(params)
  update = jax.jit(tx.update)
  all_params, all_updates, all_grads = [flatten(params)], [], []
  for i in range(steps):
    grads = {k: scale * g for k, g in random_tree(100 + i, shapes).items()}
    updates, state = update(nest(grads), state, params)
    params = optax.apply_updates(params, updates)
    all_params.append(flatten(params))
    all_updates.append(flatten(updates))
    all_grads.append(grads)
  return all_params, all_updates, all_grads, state


def cosine(step, warmup=4, total=TOTAL):
  if step < warmup:
    return step / warmup
  return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def check_updates(config, rule, steps=6, shapes=SHAPES, rtol=1e-5, atol=1e-6):
  """Compares with -schedule * (lr * rule + wd * param), wd on kernels."""
  params, updates, grads, state = run(config, steps, shapes)
  for name in shapes:
    p = params[0][name].astype(np.float64)
    memory = {}
    for t in range(steps):
      u = rule(memory, grads[t][name].astype(np.float64), t)
      wd = config.wd if name.endswith("kernel") else 0.0
      want = -cosine(t) * (config.lr * u + wd * p)
      np.testing.assert_allclose(
        updates[t][name], want, rtol, atol, err_msg=f"{name}, step {t}"
      )
      p = p + want
    np.testing.assert_allclose(params[-1][name], p, rtol, steps * atol)
  return state


# Optimizers.


def adam(memory, g, t, b1, b2, eps):
  m = memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
  v = memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g**2
  m, v = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
  return m / (np.sqrt(v) + eps)


@pytest.mark.parametrize(
  "options", [{}, dict(b1=0.8, b2=0.95, eps=1e-3)], ids=["default", "options"]
)
def test_adamw(options):
  config = make_config(optax=options)
  values = dict(b1=0.9, b2=0.999, eps=1e-8) | options
  check_updates(config, lambda *args: adam(*args, **values))


def test_adamw_moments_have_the_dtype_that_is_asked_for():
  *_, state = run(make_config(optax=dict(mu_dtype="bfloat16")), 2)
  dtypes = [x.dtype.name for x in jax.tree.leaves(state)]
  assert dtypes.count("bfloat16") == len(SHAPES)
  assert dtypes.count("float32") == len(SHAPES)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
  def rule(memory, g, t):
    m = memory["m"] = g + 0.7 * memory.get("m", 0.0)
    return g + 0.7 * m if nesterov else m

  options = dict(momentum=0.7, nesterov=nesterov)
  state = check_updates(make_config(optax_name="sgd", optax=options), rule)
  shapes = sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)
  assert shapes == sorted(SHAPES.values())


def test_sgd_in_bfloat16():
  def rule(memory, g, t):
    m = g + 0.9 * memory.get("m", np.zeros_like(g))
    memory["m"] = m.astype(ml_dtypes.bfloat16).astype(np.float64)
    return m

  config = make_config(optax_name="sgd", optax=dict(dtype="bfloat16"))
  # The product with the momentum is rounded too: half a unit in 8 bits.
  state = check_updates(config, rule, rtol=0.01, atol=2e-3)
  dtypes = {x.dtype.name for x in jax.tree.leaves(state) if x.ndim}
  assert dtypes == {"bfloat16"}


def test_lars():
  config = make_config(optax_name="lars", optax=dict(momentum=0.8))
  params, _, grads, _ = run(config, 5)
  for name, shape in SHAPES.items():
    p, m = params[0][name].astype(np.float64), 0.0
    for t in range(5):
      u = grads[t][name].astype(np.float64)
      if len(shape) > 1:
        u = 1e-3 * np.linalg.norm(p) / np.linalg.norm(u) * u
      m = u + 0.8 * m
      wd = config.wd if name.endswith("kernel") else 0.0
      p = p - cosine(t) * (config.lr * m + wd * p)
      np.testing.assert_allclose(params[t + 1][name], p, 1e-5, 1e-6)


FACTORED = {
  "a/kernel": (33, 40),  # factored
  "b/kernel": (3, 41, 35),  # factored over the two largest axes
  "c/kernel": (31, 64),  # too small to factor
  "c/bias": (64,),
}


def adafactor(memory, g, t, clip, momentum):
  """Scaling ViT, section 3.4; factors in full, as an outer product."""
  beta = min(0.999, 1 - (t + 1.0) ** -0.8)
  square = g**2 + 1e-30
  if np.sort(g.shape)[-2:].min() >= 32 and g.ndim > 1:
    small, large = np.argsort(g.shape)[-2:]
    row = memory["row"] = beta * memory.get("row", 0.0) + (
      1 - beta
    ) * square.mean(large, keepdims=True)
    col = memory["col"] = beta * memory.get("col", 0.0) + (
      1 - beta
    ) * square.mean(small, keepdims=True)
    v = row * col / row.mean(small, keepdims=True)
  else:
    v = memory["v"] = beta * memory.get("v", 0.0) + (1 - beta) * square
  u = g / np.sqrt(v)
  if clip:
    u = u / max(1.0, np.sqrt(np.mean(u**2)) / clip)
  if momentum:
    u = memory["m"] = momentum * memory.get("m", 0.0) + (1 - momentum) * u
  return u


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adafactor(clip):
  options = dict(dtype_momentum="float32", clipping_threshold=clip)
  config = make_config(optax_name="adafactor", optax=options)
  check_updates(
    config, lambda *a: adafactor(*a, clip, 0.9), shapes=FACTORED, rtol=1e-4
  )


def test_adafactor_state_is_small():
  """Factors, no second moments; momentum in bfloat16 as in Scaling ViT."""
  config = make_config(optax_name="adafactor")
  *_, state = run(config, 1, FACTORED)
  by_dtype = {}
  for x in jax.tree.leaves(state):
    by_dtype.setdefault(x.dtype.name, []).append(x.shape)
  assert sorted(by_dtype["bfloat16"]) == sorted(FACTORED.values())
  moments = [s for s in by_dtype["float32"] if s not in ((), (1,))]
  want = [(33,), (40,), (3, 41), (3, 35), (31, 64), (64,)]
  assert sorted(moments) == sorted(want)

  no_momentum = make_config(optax_name="adafactor", optax=dict(momentum=None))
  *_, state = run(no_momentum, 1, FACTORED)
  assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))


def test_adafactor_beta2_is_capped():
  # 1 - 2^-0.8 = 0.426 at the second step.
  options = dict(beta2_cap=0.1, momentum=None)
  config = make_config(
    optax_name="adafactor", optax=options, schedule=dict(decay_type="constant")
  )
  _, updates, grads, _ = run(config, 2, {"x/bias": (5,)} | FACTORED)
  first, second = (g["x/bias"].astype(np.float64) ** 2 for g in grads)
  # 1 - 1^-0.8 = 0 at the first step, below the cap.
  want = grads[1]["x/bias"] / np.sqrt(0.1 * first + 0.9 * second)
  np.testing.assert_allclose(updates[1]["x/bias"], -config.lr * want, 1e-4)


# Multipliers, frozen parameters, clipping.


def test_first_match_wins():
  config = make_config(
    optax_name="sgd",
    optax=dict(momentum=0.0),
    schedule=dict(decay_type="constant"),
    lr_mults=[("head/.*", 0.0), (".*/kernel", 0.5), (".*", 2.0)],
    wd_mults=[("pos_.*", 3.0), ("head/kernel", 0.25), (".*/kernel", 1.0)],
  )
  params, updates, grads, _ = run(config, 1)
  lr = {"head/kernel": 0.0, "head/bias": 0.0}
  lr |= {"embedding/kernel": 0.5, "encoderblock_0/mlp/kernel": 0.5}
  wd = {"pos_embedding": 3.0, "head/kernel": 0.25}
  wd |= {"embedding/kernel": 1.0, "encoderblock_0/mlp/kernel": 1.0}
  for name in SHAPES:
    g, p = grads[0][name], params[0][name]
    want = 0.03 * lr.get(name, 2.0) * g + 0.02 * wd.get(name, 0.0) * p
    np.testing.assert_allclose(updates[0][name], -want, 1e-5, 1e-8)


def test_regexes_match_whole_paths():
  params = nest(random_tree(0))
  tree = optim.by_path([("head", 1), ("head/.*", 2)][1:], params, 0, "x")
  assert flatten(tree)["head/kernel"] == 2
  with pytest.raises(ValueError, match="matches no parameter"):
    optim.by_path([("head", 1)], params, 0, "x")


@pytest.mark.parametrize("optax_name", ["adamw", "sgd", "adafactor"])
def test_frozen_parameters(optax_name):
  frozen = ["embedding/.*", "pos_embedding"]
  config = make_config(optax_name=optax_name, frozen=frozen, grad_clip_norm=0.5)
  params, updates, grads, state = run(config, 5)
  names = [n for n in SHAPES if n.startswith(("emb", "pos"))]
  assert len(names) == 3
  for name in SHAPES:
    same = np.array_equal(params[0][name], params[-1][name])
    assert same == (name in names), name
    if name in names:
      np.testing.assert_array_equal(updates[0][name], 0)

  # No state: as many leaves as for a model without them.
  rest = {k: s for k, s in SHAPES.items() if k not in names}
  other = make_config(optax_name=optax_name, grad_clip_norm=0.5)
  *_, want = run(other, 1, rest)
  shapes = sorted(x.shape for x in jax.tree.leaves(state))
  assert shapes == sorted(x.shape for x in jax.tree.leaves(want))

  # The others learn as if there were no frozen ones: the norm that gradients
  # are clipped by leaves them out.
  start = nest({k: params[0][k] for k in rest})
  tx, _ = optim.make(other, start, TOTAL)
  alone, state, update = start, tx.init(start), jax.jit(tx.update)
  for g in grads:
    u, state = update(nest({k: g[k] for k in rest}), state, alone)
    alone = optax.apply_updates(alone, u)
  for name, value in flatten(alone).items():
    np.testing.assert_allclose(params[-1][name], value, 1e-6, 1e-7)


def test_trainable():
  params = nest(random_tree(0))
  tree = optim.trainable(make_config(frozen=[".*/bias"]), params)
  assert {k for k, t in flatten(tree).items() if not t} == {
    k for k in SHAPES if k.endswith("bias")
  }
  assert all(jax.tree.leaves(optim.trainable(make_config(), params)))


def test_everything_but_one_frozen_and_all_frozen():
  config = make_config(frozen=["(?!head/bias).*"])
  params, *_ = run(config, 3)
  changed = [
    k for k in SHAPES if not np.array_equal(params[0][k], params[-1][k])
  ]
  assert changed == ["head/bias"]
  with pytest.raises(ValueError, match="config.frozen.*leaves nothing"):
    run(make_config(frozen=[".*"]), 1)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gradient_clipping(scale):
  clip = 0.7
  config = make_config(
    optax_name="sgd",
    optax=dict(momentum=0.0),
    wd=0.0,
    grad_clip_norm=clip,
    schedule=dict(decay_type="constant"),
  )
  _, updates, grads, _ = run(config, 1, scale=scale)
  norm = np.sqrt(
    sum(np.sum(g.astype(np.float64) ** 2) for g in grads[0].values())
  )
  assert (norm > clip) == (scale == 1.0)
  for name in SHAPES:
    want = grads[0][name] * min(1.0, clip / norm)
    np.testing.assert_allclose(updates[0][name], -0.03 * want, 1e-5)


def test_works_on_shapes_alone():
  shapes = jax.eval_shape(lambda: nest(random_tree(0)))
  tx, _ = optim.make(make_config(frozen=["head/.*"]), shapes, TOTAL)
  assert jax.tree.leaves(jax.eval_shape(tx.init, shapes))


# Schedules.


def values(options, total, batch_size=8):
  schedule = optim.make_schedule(options, batch_size, total)
  got = np.array([schedule(t) for t in range(total + 1)], np.float64)
  assert got.min() >= 0 and got.max() <= 1
  return got


def closed_form(options, total, decay, warmup=0, cooldown=0):
  out = []
  for t in range(total + 1):
    x = decay(max(0, t - warmup))
    if warmup:
      x *= min(1.0, t / warmup)
    if cooldown:
      x *= min(1.0, (total - t) / cooldown)
    out.append(x)
  return out


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("cooldown", [0, 5])
@pytest.mark.parametrize("kind", ["cosine", "linear", "rsqrt", "constant"])
def test_schedule(kind, warmup, cooldown):
  total = 37
  options = dict(
    decay_type=kind,
    warmup_steps=warmup,
    cooldown_steps=cooldown,
    linear_end=0.2,
    timescale=13,
  )
  n = total - warmup
  decay = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t / n)),
    "linear": lambda t: 1 - 0.8 * t / n,
    "rsqrt": lambda t: 1 / math.sqrt(1 + t / 13),
    "constant": lambda t: 1.0,
  }[kind]
  want = closed_form(options, total, decay, warmup, cooldown)
  np.testing.assert_allclose(values(options, total), want, 1e-5, 1e-6)


def test_schedule_defaults():
  want = [cosine(t, 0, 37) for t in range(38)]
  np.testing.assert_allclose(values({}, 37), want, 1e-5, 1e-6)
  linear = values(dict(decay_type="linear"), 10)
  np.testing.assert_allclose(linear, 1 - np.arange(11) / 10, 1e-5, 1e-6)
  rsqrt = values(dict(decay_type="rsqrt"), 100)
  np.testing.assert_allclose(rsqrt[-1], (1 + 100 / 10_000) ** -0.5, 1e-6)


@pytest.mark.parametrize(
  "options", [dict(warmup_percent=0.125), dict(warmup_examples=40)]
)
def test_units_of_warm_up(options):
  """12.5 % of 40 steps, and 40 examples in batches of 8, are 5 steps."""
  np.testing.assert_array_equal(
    values(options, 40), values(dict(warmup_steps=5), 40)
  )


def test_schedule_of_steps_beyond_float16_and_under_jit():
  schedule = optim.make_schedule(dict(warmup_steps=10_000), 8, 300_000)
  got = [float(jax.jit(schedule)(jnp.int32(t))) for t in (9_999, 299_999)]
  want = [cosine(t, 10_000, 300_000) for t in (9_999, 299_999)]
  np.testing.assert_allclose(got, want, 1e-4, 1e-7)


def test_learning_rate_that_is_logged():
  _, learning_rate = optim.make(make_config(), nest(random_tree(0)), TOTAL)
  got = [float(learning_rate(t)) for t in range(TOTAL)]
  want = [0.03 * cosine(t) for t in range(TOTAL)]
  np.testing.assert_allclose(got, want, 1e-5, 1e-8)


# Errors.


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(optax_name="lion"), ["optax_name='lion'", "adamw, adafactor, sgd"]),
    (dict(optax=dict(beta=0.9)), ["config.optax", "adamw", "'beta'"]),
    (dict(optax_name="sgd", optax=dict(b1=1)), ["config.optax", "sgd", "'b1'"]),
    (dict(frozen=["hed/.*"]), ["config.frozen", "'hed/.*'", "embedding/"]),
    (dict(lr_mults=[("hed/.*", 1)]), ["config.lr_mults", "'hed/.*'"]),
    (dict(wd_mults=[("hed/.*", 1)]), ["config.wd_mults", "'hed/.*'"]),
    (dict(lr_mults=[("head/(", 1)]), ["config.lr_mults", "'head/('", "regex"]),
    (dict(frozen=["*"]), ["config.frozen", "'*'", "regex"]),
    (
      dict(schedule=dict(warmup=3)),
      ["config.schedule", "'warmup'", "warmup_steps"],
    ),
    (
      dict(schedule=dict(decay_type="step")),
      ["config.schedule.decay_type='step'", "rsqrt"],
    ),
    (dict(schedule=dict(warmup_steps=21)), ["config.schedule", "21", "20"]),
    (
      dict(schedule=dict(warmup_steps=15, cooldown_steps=6)),
      ["config.schedule", "15", "6", "20"],
    ),
  ],
)
def test_errors(fields, words):
  with pytest.raises(ValueError) as e:
    optim.make(make_config(**fields), nest(random_tree(0)), TOTAL)
  for word in words:
    assert word in str(e.value), str(e.value)


def test_paths():
  assert sorted(optim.paths(nest(random_tree(0)))) == sorted(SHAPES)
  assert all(re.fullmatch(r"[\w/]+", p) for p in SHAPES)
