"""Random parameters and inputs, and comparison with the reference."""

import dataclasses
import functools
import zlib

import autograd
import jax
import jax.numpy as jnp
import numpy as np

from lookup_vit.models import captioner, factorised, lookup_vit, vit
from tests.models import reference

# All that a model can capture.
CAPTURE = ("tokens", "attention", "attention_logit_max")

KINDS = ("lookup_vit", "vit")

# Of ||a - b|| / ||b|| of an array, float32 against float64.
TOLERANCE = 1e-5

# Most of the time goes to compilation: machine code need not be fast. These
# three take a fourth of the default's time.
jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
  },
)


def make(kind, variant="Ti/4", **fields):
  """A small model of any kind, for seven classes."""
  fields = dict(width=24, depth=2, num_heads=3) | fields
  if kind == "factorised":
    return factorised.Model(7, variant, **dict(temporal_depth=2) | fields)
  if kind == "vit":
    return vit.Model(7, variant, **fields)
  return lookup_vit.Model(7, variant, **dict(grid=(2, 3)) | fields)


def make_captioner(kind, num_classes=11, encoder=None, **fields):
  """A small captioner; the encoder's fields are as of `make`."""
  encoder = dict(width=24, depth=2, num_heads=3) | (encoder or {})
  if kind == "lookup_vit":
    encoder = dict(grid=(2, 3)) | encoder
  encoder = dict(model_name=kind, variant="Ti/4") | encoder
  fields = dict(width=16, depth=2, num_heads=2, max_length=7) | fields
  return captioner.Model(num_classes, None, encoder, **fields)


def flat(tree):
  """A tree's leaves by path: `{"encoderblock_0/mhbc/key/bias": array}`."""
  return {
    "/".join(str(k.key) for k in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def random_like(shapes, seed=0):
  """Parameters in which no array is zero, none is one, and all matter."""

  def leaf(path, shape):
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    x = rng.standard_normal(shape.shape)
    last = path[-1].key
    if last == "kernel":
      x /= np.sqrt(np.prod(shape.shape[:-1]))
    elif last == "scale":
      x = 1 + 0.3 * x
    elif last == "bias":
      x *= 0.3
    else:
      x *= 0.7
    return x.astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_params(model, images, seed=0):
  """Random parameters for a model with a loop over its blocks."""
  inputs = [images]
  if hasattr(model, "encoder"):
    inputs.append(np.zeros((len(images), 1), np.int32))
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return random_like(shapes["params"], seed)


def random_batch(*space, batch=2, classes=7, seed=0):
  """Images (or videos) of any size, and soft labels."""
  rng = np.random.default_rng([seed, *space])
  images = rng.uniform(-1, 1, (batch, *space, 3)).astype(np.float32)
  labels = rng.dirichlet(np.ones(classes), batch).astype(np.float32)
  return images, labels


def spec_of(model, **changes):
  """The reference's description of a model."""
  names = [f.name for f in dataclasses.fields(reference.Spec)]
  fields = {n: getattr(model, n) for n in names if hasattr(model, n)}
  return reference.Spec(**fields | changes)


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def loss_of(out, logits, labels):
  """The loss: the mean of the cross-entropies of the heads there are."""
  heads = [v for k, v in out.items() if k.startswith("logits_")] or [logits]
  losses = [
    -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(x), -1)) for x in heads
  ]
  return sum(losses) / len(losses)


def _run(model, kwargs, params, images, rngs):
  return model.apply({"params": params}, images, rngs=rngs, **dict(kwargs))


_apply = jit(_run, static_argnums=(0, 1))


def apply(model, params, images, rng=None, **kwargs):
  """`model.apply`, compiled."""
  rngs = None if rng is None else {"dropout": jax.random.key(rng, impl="rbg")}
  return _apply(model, tuple(kwargs.items()), params, images, rngs)


@functools.partial(jit, static_argnums=(0, 1))
def _gradients(model, kwargs, params, images, labels, rngs):
  def loss(params, images):
    logits, out = _run(model, kwargs, params, images, rngs)
    return loss_of(out, logits, labels), dict(out, logits=logits)

  grads, out = jax.grad(loss, (0, 1), has_aux=True)(params, images)
  return out, dict(params=grads[0], images=grads[1])


def gradients(model, params, images, labels, rng=None, **kwargs):
  """`out`, with `logits` in it, and gradients by parameters and images."""
  rngs = None if rng is None else {"dropout": jax.random.key(rng, impl="rbg")}
  return _gradients(model, tuple(kwargs.items()), params, images, labels, rngs)


def reference_gradients(loss, spec, params, images, labels):
  """Gradients of a loss of the reference, in float64."""
  labels = np.asarray(labels, np.float64)
  grads = autograd.grad(lambda x: loss(spec, x["params"], x["images"], labels))
  return grads(float64(dict(params=params, images=images)))


def relative_error(got, want):
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def yardstick(path, spec, tokens):
  """Whose gradient to measure one against that is zero in theory, or None.

  A key bias shifts whole rows of a softmax, which changes nothing unless the
  keys are normalised or a softmax over the queries follows. Where `tokens`, the
  number of compressed tokens, is one, a softmax over them is constant.
  """
  if tokens == 1 and "refinement/attention" in path:
    layer, _, name = path.partition("attention/")
    if name.startswith(("query", "key")):
      return f"{layer}attention/value/kernel"
  if not path.endswith("key/bias") or spec.qk_norm:
    return None
  if path.endswith("mhbc/key/bias") and spec.reuse == "logits" and tokens > 1:
    return None
  return path.removesuffix("bias") + "kernel"


def check_gradients(got, want, spec, tokens=None):
  """Every array's gradient against the reference's; returns the worst.

  Where the reference's is zero, since nothing depends on an array, it is too.
  """
  got, want = flat(got), flat(want)
  assert got.keys() == want.keys()
  worst = {}
  for path, b in want.items():
    other = yardstick(path, spec, tokens)
    if not np.any(want[other or path]):
      assert not np.any(got[path]), path
    elif other:
      norm = np.linalg.norm(want[other])
      assert np.linalg.norm(b) < 1e-12 * norm, f"{path} is not zero in theory"
      worst[path] = np.linalg.norm(np.asarray(got[path], np.float64)) / norm
    else:
      worst[path] = relative_error(got[path], b)
  return check(worst)


def check_outputs(got, want):
  """Every output against the reference's of that name."""
  return check({k: relative_error(got[k], want[k]) for k in got})


def check(errors):
  bad = {k: v for k, v in errors.items() if not v < TOLERANCE}
  assert not bad, f"relative errors above {TOLERANCE}: {bad}"
  return max(errors.values())
