"""Tests of lookup_vit.models.captioner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit import config_utils, train_step
from lookup_vit.models import captioner
from tests.models import common, reference

SPACE = (12, 20)
CAPTURE = ("attention", "attention_logit_max")


def batch_of(model, length, batch=2, seed=0):
  """Images, ids, and soft targets of every place."""
  images, _ = common.random_batch(*SPACE, batch=batch, seed=seed)
  rng = np.random.default_rng([seed, length])
  classes = model.num_classes
  inputs = rng.integers(classes, size=(batch, length)).astype(np.int32)
  labels = rng.dirichlet(np.ones(classes), (batch, length))
  return images, inputs, labels.astype(np.float32)


def run(model, kwargs, params, images, inputs, rng=None):
  rngs = None if rng is None else {"dropout": rng}
  variables = {"params": params}
  return model.apply(variables, images, inputs, rngs=rngs, **dict(kwargs))


compiled = common.jit(run, static_argnums=(0, 1))


def apply(model, params, images, inputs, rng=None, **kwargs):
  """`model.apply`, compiled."""
  rng = None if rng is None else jax.random.key(rng, impl="rbg")
  kwargs = tuple(kwargs.items())
  return compiled(model, kwargs, params, images, inputs, rng)


@functools.partial(common.jit, static_argnums=(0, 1))
def gradients(model, kwargs, params, images, inputs, labels):
  """`out`, with `logits` in it, and gradients of the loss."""

  def loss(params, images):
    logits, out = run(model, kwargs, params, images, inputs)
    xent = -jnp.sum(labels * jax.nn.log_softmax(logits), -1)
    return jnp.mean(xent), dict(out, logits=logits)

  grads, out = jax.grad(loss, (0, 1), has_aux=True)(params, images)
  return out, dict(params=grads[0], images=grads[1])


def reference_of(model, inputs, grid=None):
  """A function of `(spec, params, images)`, the reference."""
  changes = {} if grid is None else dict(grid=grid)
  encoder = common.spec_of(model.encoder, **changes)

  def call(spec, params, images):
    return reference.captioner(spec, encoder, params, images, inputs)

  return call


# Encoder, length, grid, capture, and fields.
CASES = {
  "lookup_vit": ("lookup_vit", 7, None, CAPTURE, dict(frozen=False)),
  "vit": ("vit", 5, None, CAPTURE, dict(frozen=False, tied=True)),
  "lookup_vit, frozen": (
    "lookup_vit",
    3,
    (3, 1),
    CAPTURE,
    dict(gelu="exact", mlp_ratio=2.5),
  ),
  "vit, frozen": (
    "vit",
    6,
    None,
    (),
    dict(encoder=dict(pool="tok"), attention="chunked", norm_eps=1e-2),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_model_equals_reference(case):
  """Whole model: all outputs, and all gradients of the loss."""
  kind, length, grid, capture, fields = CASES[case]
  model = common.make_captioner(kind, **fields)
  images, inputs, labels = batch_of(model, length)
  params = common.random_params(model, images)
  kwargs = dict(capture=capture) | ({} if grid is None else dict(grid=grid))
  out, grads = gradients(
    model, tuple(kwargs.items()), params, images, inputs, labels
  )
  spec, call = common.spec_of(model), reference_of(model, inputs, grid)
  want = call(spec, common.float64(params), images.astype(np.float64))
  assert out.keys() == {"logits", "memory", *capture}
  common.check_outputs(out, want)

  def loss(spec, params, images, labels):
    logits = call(spec, params, images)["logits"]
    return reference.cross_entropy(logits, labels)

  want = common.reference_gradients(loss, spec, params, images, labels)
  got, want = common.flat(grads), common.flat(want)
  nothing = {
    path
    for path, x in want.items()
    if not np.any(x)
    or (model.frozen and path.startswith(("params/encoder", "images")))
  }
  for path in nothing:
    np.testing.assert_array_equal(got.pop(path), 0, path)
    want.pop(path)
  assert any(path.startswith("params/encoder") for path in want) == (
    not model.frozen
  )
  common.check_gradients(got, want, spec)


@pytest.mark.parametrize(
  "kind, length, grid",
  [("lookup_vit", 1, (1, 1)), ("lookup_vit", 7, (3, 5)), ("vit", 1, None)],
)
def test_lengths_and_grids(kind, length, grid):
  """Compressed tokens of a LookupViT at its grids; all tokens of a ViT."""
  model = common.make_captioner(kind)
  images, inputs, _ = batch_of(model, length, batch=3, seed=1)
  params = common.random_params(model, images, seed=1)
  fields = {} if grid is None else dict(grid=grid)
  logits, out = apply(model, params, images, inputs, **fields)
  want = reference_of(model, inputs, grid)(
    common.spec_of(model), common.float64(params), images.astype(np.float64)
  )
  common.check_outputs(dict(out, logits=logits), want)
  assert out["memory"].shape == (3, np.prod(grid or (3, 5)), 24)
  assert logits.shape == (3, length, 11) and logits.dtype == np.float32


@pytest.mark.parametrize("tied", [False, True])
def test_logits_do_not_depend_on_later_ids(tied):
  """Their gradients by the later ids' embeddings are zeros."""
  model = common.make_captioner("vit", encoder=dict(depth=1), tied=tied)
  images, _, _ = batch_of(model, 7, batch=1)
  params = common.random_params(model, images)
  ids = np.random.default_rng(0).permutation(11)[None, :7]
  weights = np.random.default_rng(1).standard_normal(11).astype(np.float32)
  # Of ids that are none of the caption's: a tied head has a gradient by all.
  others = np.setdiff1d(np.arange(11), ids)
  if tied:
    weights[ids[0]] = 0

  @common.jit
  def jacobian(table):
    def total(table):
      decoder = dict(params["decoder"], embedding={"embedding": table})
      changed = dict(params, decoder=decoder)
      return run(model, (), changed, images, ids)[0][0] @ weights

    return jax.jacrev(total)(table)

  by_id = jacobian(params["decoder"]["embedding"]["embedding"])
  nonzero = np.any(by_id[:, ids[0]], axis=-1)
  np.testing.assert_array_equal(nonzero, np.tri(7, dtype=bool))
  assert np.any(by_id[:, others]) == tied


@pytest.mark.parametrize("kind", common.KINDS)
def test_frozen_encoder_is_in_inference_mode(kind):
  """Where it is not, its dropout is on; the decoder's is in any case."""
  drops = dict(dropout=0.5, attention_dropout=0.5, stochastic_depth=0.5)
  if kind == "vit":
    drops["depth"] = 1
  frozen = common.make_captioner(kind, encoder=drops, depth=1)
  images, inputs, _ = batch_of(frozen, 3)
  params = common.random_params(frozen, images)
  want = apply(frozen, params, images, inputs)[0]
  for rng in (0, 1):
    got = apply(frozen, params, images, inputs, rng, train=True)[0]
    np.testing.assert_array_equal(got, want)
  for fields in (dict(frozen=False), dict(dropout=0.5)):
    model = frozen.clone(**fields)
    a, b = (
      apply(model, params, images, inputs, rng, train=True)[0] for rng in (0, 1)
    )
    assert common.relative_error(a, np.asarray(b)) > 0.01


def test_captures():
  model = common.make_captioner("lookup_vit", encoder=dict(depth=1))
  images, inputs, _ = batch_of(model, 5, batch=3)
  params = common.random_params(model, images)
  logits, out = apply(
    model, params, images, inputs, capture=("tokens", *CAPTURE)
  )
  assert {k: v.shape for k, v in out.items()} == {
    "memory": (3, 6, 24),
    "attention": (2, 3, 2, 5, 6),
    "attention_logit_max": (3,),
  }
  np.testing.assert_allclose(out["attention"].sum(-1), 1, rtol=1e-5)
  assert out["attention"].min() > 0
  for name in CAPTURE:
    capture = functools.partial(run, model, (("capture", (name,)),))
    _, shapes = jax.eval_shape(capture, params, images, inputs)
    assert shapes.keys() == {"memory", name}
  want, out = apply(model, params, images, inputs)
  assert out.keys() == {"memory"}
  np.testing.assert_allclose(logits, want, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16(tied):
  model = common.make_captioner("lookup_vit", depth=1, tied=tied)
  images, inputs, _ = batch_of(model, 7)
  params = common.random_params(model, images)
  want, out = apply(model, params, images, inputs)
  low = model.clone(
    dtype="bfloat16", encoder=model.encoder.clone(dtype="bfloat16")
  )
  got, low_out = apply(low, params, images, inputs)
  assert got.dtype == jnp.float32 and low_out["memory"].dtype == jnp.bfloat16
  for a, b in ((got, want), (low_out["memory"], out["memory"])):
    assert 1e-4 < common.relative_error(a, np.asarray(b)) < 0.05


# The factory.


def size_of(model):
  return model.width, model.depth, model.num_heads, model.mlp_ratio


def test_size_of_the_decoder():
  """By default the encoder's, half as deep; or one by name; or by fields."""
  ti = dict(variant="Ti/4", grid=(2, 2))
  model = captioner.Model(11, encoder=ti)
  assert size_of(model) == (192, 6, 3, 4.0)
  assert model.max_length == 64 and model.frozen and not model.tied
  assert model.num_classes == 11 and model.encoder.num_classes is None
  assert model.grid == (2, 2) and model.lookup_grid((12, 20)) == (3, 5)
  shallow = captioner.Model(11, encoder=ti | dict(depth=1))
  assert size_of(shallow) == (192, 1, 3, 4.0)
  wide = dict(model_name="vit", variant="S/4")
  assert size_of(captioner.Model(11, encoder=wide)) == (384, 6, 6, 4.0)
  assert not hasattr(captioner.Model(11, encoder=wide), "grid")
  assert size_of(captioner.Model(11, "Ti", wide)) == (192, 12, 3, 4.0)
  model = captioner.Model(11, "Ti", wide, depth=2, max_length=9)
  assert size_of(model) == (192, 2, 3, 4.0) and model.max_length == 9


@pytest.mark.parametrize(
  "args, fields, message",
  [
    ((None,), {}, "num_classes"),
    ((11, "XL"), {}, "size 'XL'.*Ti, S"),
    ((11, "B/16"), {}, "size 'B/16'"),
    ((11,), dict(dept=3), "no field 'dept'.*'depth'"),
    ((11,), dict(frozen=1), "frozen=1: want True or False"),
    (
      (11,),
      dict(encoder=dict(model_name="factorised")),
      "encoder.model_name='factorised': want 'lookup_vit' or 'vit'",
    ),
    ((11,), dict(encoder=dict(gird=(5, 5))), "LookupViT.*'gird'.*'grid'"),
    ((11,), dict(encoder=dict(variant="B")), "variant 'B'.*SIZE/PATCH"),
    ((11,), dict(encoder=dict(num_classes=3)), "encoder.num_classes"),
    ((11,), dict(qk_norm=True), "qk_norm"),
  ],
)
def test_factory_refuses(args, fields, message):
  with pytest.raises(ValueError, match=message):
    captioner.Model(*args, **fields)


@pytest.mark.parametrize(
  "fields, kwargs, length, message",
  [
    ({}, {}, 8, "8 ids.*max_length=7"),
    (dict(num_heads=5), {}, 7, "5 heads.*16"),
    (dict(attention="flash"), {}, 7, "attention='flash'"),
    (dict(dropout=1.5), {}, 7, "dropout=1.5"),
    (dict(encoder=dict(num_heads=5)), {}, 7, "5 heads.*24"),
    ({}, dict(grid=(4, 5)), 7, r"\(4, 5\)"),
    ({}, dict(capture=("weights",)), 7, "weights"),
  ],
)
def test_refuses(fields, kwargs, length, message):
  model = common.make_captioner("lookup_vit", **fields)
  images = jax.ShapeDtypeStruct((2, *SPACE, 3), jnp.float32)
  inputs = jax.ShapeDtypeStruct((2, length), jnp.int32)
  init = functools.partial(model.init, **kwargs)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(init, jax.random.key(0), images, inputs)


# What trains it.

FACTORED = dict(min_dim_size_to_factor=8)


def make_program(kind="lookup_vit", frozen=True, **fields):
  encoder = dict(model_name=kind, variant="mu/8", width=16)
  if kind == "lookup_vit":
    encoder["grid"] = (2, 2)
  base = dict(
    model_name="captioner",
    task="captioning",
    num_classes=11,
    model=dict(encoder=encoder, depth=1, max_length=5, frozen=frozen),
    input=dict(pp="", image_size=(16, 24), batch_size=2),
    lr=1e-2,
    wd=1e-2,
    ema_decay=0.9,
    total_steps=4,
    schedule=dict(decay_type="constant"),
  )
  return train_step.Program(config_utils.resolve(base | fields), 4)


def arrays(tree):
  """Paths of a tree's arrays, as text."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [jax.tree_util.keystr(path) for path, _ in leaves]


@pytest.mark.parametrize(
  "kind, name, options",
  [("lookup_vit", "adamw", {}), ("vit", "adafactor", FACTORED)],
)
def test_no_optimizer_state_of_a_frozen_encoder(kind, name, options):
  make = functools.partial(
    make_program, kind, optax_name=name, optax=options, ema_decay=None
  )
  shapes = make().state_shapes
  params = common.flat(shapes.params)
  decoder = [path for path in params if path.startswith("decoder/")]
  assert 0 < len(decoder) < len(params)
  kept = arrays(shapes.opt_state)
  assert not any("encoder" in path for path in kept)
  of_decoder = [path for path in kept if "'decoder'" in path]
  moments = dict(adamw=2, adafactor=4)[name]
  assert len(of_decoder) == moments * len(decoder)

  all_kept = arrays(make(frozen=False).state_shapes.opt_state)
  assert sum("'decoder'" in path for path in all_kept) == len(of_decoder)
  of_encoder = sum("'encoder'" in path for path in all_kept)
  assert of_encoder == moments * (len(params) - len(decoder))


@pytest.mark.parametrize(
  "kind, frozen, name, options",
  [
    ("lookup_vit", True, "adamw", {}),
    ("vit", True, "adafactor", FACTORED),
    ("lookup_vit", False, "adamw", {}),
  ],
)
def test_what_is_trained(kind, frozen, name, options):
  """A frozen encoder stays as it is, to the bit; also under decay, averaged."""
  program = make_program(
    kind, frozen, optax_name=name, optax=options, grad_clip_norm=1.0
  )
  rng = np.random.default_rng(0)
  params = common.random_like(program.state_shapes.params)
  state = program.init_state(params)
  images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
  text = rng.integers(11, size=(2, 6)).astype(np.int32)
  text[0, 4:] = -1
  for _ in range(3):
    state, scalars = program.update_step(
      state, dict(image=images, text=text), program.grids[0]
    )
    assert scalars["finite"] and scalars["update_norm"] > 0
  before = common.flat(params)
  for tree in (state.params, state.ema):
    after = common.flat(jax.device_get(tree))
    assert after.keys() == before.keys()
    same = {
      path
      for path, x in before.items()
      if x.tobytes() == np.asarray(after[path]).tobytes()
    }
    encoder = {path for path in before if path.startswith("encoder/")}
    if frozen:
      assert same == encoder
    else:
      # The parts of the last block that a captioner does not use, and what
      # absorbed MHBC does not read.
      last = "encoder/encoderblock_0"
      unused = (
        f"{last}/mhbc/key/bias",
        f"{last}/mhbc/norm_refined",
        f"{last}/mhbc/value_back",
        f"{last}/mhbc/out_back",
        f"{last}/norm_lookup_mlp",
        f"{last}/lookup_mlp",
        "encoder/norm_lookup",
      )
      assert all(path.startswith(unused) for path in same)
