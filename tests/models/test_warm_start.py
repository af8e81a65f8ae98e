"""A ViT's parameters as a LookupViT's: where each is, and what it computes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lookup_vit.models import layers, lookup_vit, vit, warm_start

WIDTH, DEPTH, HEADS, PATCH = 24, 2, 3, 4
SIZE = (12, 20)
FIELDS = dict(width=WIDTH, depth=DEPTH, num_heads=HEADS)


def flat(params):
  return traverse_util.flatten_dict(params, sep="/")


def drawn(model, seed):
  """Parameters none of which is zero or one."""
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3))
  )
  rng = np.random.default_rng(seed)

  def draw(path, x):
    scale = 0.3 / max(1, x.shape[0] if len(x.shape) > 1 else 1) ** 0.5
    one = any(getattr(p, "key", "") == "scale" for p in path)
    return (one + scale * rng.normal(size=x.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def start(source, model, each, **mapping):
  target = flat(drawn(model, 1))
  got, left = warm_start.lookup_vit(
    flat(source),
    target,
    tokens_each=each,
    exact_gelu=model.gelu == "exact",
    mapping=warm_start.Mapping(**mapping),
  )
  return target, got, left


@pytest.mark.parametrize(
  "reuse, qk_norm, gelu",
  [
    ("weights", False, "tanh"),
    ("logits", True, "exact"),
    ("none", False, "tanh"),
  ],
)
def test_each_parameter_has_its_origin(reuse, qk_norm, gelu):
  """All of LookupViT's, and none else, of its shapes."""
  same = dict(qk_norm=qk_norm, gelu=gelu, **FIELDS)
  source = drawn(vit.Model(5, f"Ti/{PATCH}", **same), 0)
  model = lookup_vit.Model(5, f"Ti/{PATCH}", grid=(2, 2), reuse=reuse, **same)
  target, got, left = start(source, model, 3.75)
  assert not left
  assert {k: x.shape for k, x in got.items()} == {
    k: x.shape for k, x in target.items()
  }
  old = flat(source)
  for i, leaf in itertools.product(range(DEPTH), ("kernel", "bias")):
    block = f"encoderblock_{i}"
    for part in ("query", "key", "value"):
      want = old[f"{block}/attention/{part}/{leaf}"]
      name = f"{block}/refinement/attention/{part}/{leaf}"
      np.testing.assert_array_equal(got[name], want)
      np.testing.assert_array_equal(got[f"{block}/mhbc/{part}/{leaf}"], want)
    out = old[f"{block}/attention/out/{leaf}"]
    np.testing.assert_array_equal(got[f"{block}/mhbc/out/{leaf}"], out / 2)
    name = f"{block}/refinement/attention/out/{leaf}"
    np.testing.assert_array_equal(got[name], out / 2)
    if reuse != "none":
      scale = 3.75 if leaf == "kernel" else 1
      name = f"{block}/mhbc/out_back/{leaf}"
      np.testing.assert_allclose(got[name], out * scale, rtol=1e-6)
    for name in ("head_compressed", "head_lookup"):
      np.testing.assert_array_equal(got[f"{name}/{leaf}"], old[f"head/{leaf}"])


@pytest.mark.parametrize(
  "pool, left", [("tok", "cls"), ("map", "map_head/probe")]
)
def test_what_reads_no_mean_stays_behind(pool, left):
  source = drawn(vit.Model(5, f"Ti/{PATCH}", pool=pool, **FIELDS), 0)
  model = lookup_vit.Model(5, f"Ti/{PATCH}", grid=(2, 2), **FIELDS)
  target, got, behind = start(source, model, 1)
  assert left in behind and "head/kernel" in behind
  missing = set(target) - set(got)
  assert missing == {
    f"head_{a}/{b}"
    for a in ("compressed", "lookup")
    for b in ("kernel", "bias")
  }


def test_it_computes_what_vit_does():
  """Where all lookup tokens are compressed ones, and updates are ViT's."""
  model = vit.Model(5, f"Ti/{PATCH}", **FIELDS)
  source = drawn(model, 0)
  # Without a contextualisation the lookup tokens are those of the patches,
  # which in the first block are ViT's tokens.
  shallow = {k: x for k, x in source.items() if k != "encoderblock_1"}
  grid = (3, 5)
  lookup = lookup_vit.Model(
    *(5, f"Ti/{PATCH}"), grid=grid, **(FIELDS | dict(depth=1))
  )
  images = np.random.default_rng(2).uniform(-1, 1, (2, *SIZE, 3))
  vit_1 = vit.Model(5, f"Ti/{PATCH}", **(FIELDS | dict(depth=1)))
  _, want = vit_1.apply({"params": shallow}, images, capture=("tokens",))
  for gathering in ("gathering", "refinement"):
    _, got, _ = start(shallow, lookup, 1, gathering=gathering)
    params = traverse_util.unflatten_dict(got, sep="/")
    _, out = lookup.apply({"params": params}, images, capture=("tokens",))
    np.testing.assert_allclose(
      *(out["compressed_tokens"], want["tokens"]), rtol=1e-4, atol=1e-5
    )
  _, got, _ = start(shallow, lookup, 1, gathering="whole")
  params = traverse_util.unflatten_dict(got, sep="/")
  _, out = lookup.apply({"params": params}, images, capture=("tokens",))
  assert np.abs(out["compressed_tokens"] - want["tokens"]).max() > 1e-2


def block(seed=0, width=16, hidden=64):
  rng = np.random.default_rng(seed)
  shapes = {
    "norm_mlp/scale": (width,),
    "norm_mlp/bias": (width,),
    "mlp/dense_in/kernel": (width, hidden),
    "mlp/dense_in/bias": (hidden,),
    "mlp/dense_out/kernel": (hidden, width),
    "mlp/dense_out/bias": (width,),
  }
  return {
    k: (rng.normal(size=s) / len(s) ** 2 + k.endswith("scale")).astype(
      np.float32
    )
    for k, s in shapes.items()
  }


def compute(params, prefix, x):
  x = np.asarray(x, np.float64)
  h = x @ params[f"{prefix}dense_in/kernel"] + params[f"{prefix}dense_in/bias"]
  h = np.asarray(jax.nn.gelu(h))
  return (
    h @ params[f"{prefix}dense_out/kernel"] + params[f"{prefix}dense_out/bias"]
  )


def test_small_mlp_fits_the_whole_one():
  """On inputs of its own kind, better than a slice, which beats nothing."""
  one = block()
  rng = np.random.default_rng(9)
  x = rng.normal(size=(5000, 16)) * one["norm_mlp/scale"] + one["norm_mlp/bias"]
  want = compute(one, "mlp/", x)
  errors = {}
  for kind in warm_start.SMALL_MLP:
    got = warm_start.small_mlp(one, 8, False, kind)
    error = compute(got, "lookup_mlp/", x) - want
    errors[kind] = np.mean(error**2)
  assert errors["fit"] < 0.9 * errors["slice"] < 0.9 * errors["none"]
  # No fit of these units, by least squares in float64, is much better.
  got = warm_start.small_mlp(one, 8, False, "fit")
  h = x @ got["lookup_mlp/dense_in/kernel"] + got["lookup_mlp/dense_in/bias"]
  h = np.c_[np.asarray(jax.nn.gelu(h)), np.ones(len(x))]
  best = h @ np.linalg.lstsq(h, want, rcond=None)[0]
  assert errors["fit"] < 1.1 * np.mean((best - want) ** 2)


@pytest.mark.parametrize("kind", ["fit", "slice"])
def test_small_mlp_of_all_units_is_the_whole_one(kind):
  one = block(hidden=8)
  got = warm_start.small_mlp(one, 8, True, kind)
  for name, x in got.items():
    np.testing.assert_array_equal(x, one[name.replace("lookup_", "")])


@pytest.mark.parametrize("new", [(6, 6), (8, 5), (4, 4)])
def test_resampled_patches_give_the_tokens_of_resized_ones(new):
  """Where patches grow (FlexiViT, equation 4); by loops over pixels."""
  rng = np.random.default_rng(3)
  kernel = rng.normal(size=(4, 4, 3, 7))
  patches = rng.normal(size=(10, 4, 4, 3))
  got = warm_start.resample_patch(kernel, new)
  assert got.shape == (*new, 3, 7)

  def weights(old, new):
    """Of linear interpolation at the middles of pixels."""
    table = np.zeros((new, old))
    for i in range(new):
      at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
      low = min(int(at), old - 2)
      table[i, low], table[i, low + 1] = 1 - (at - low), at - low
    return table

  rows, columns = weights(4, new[0]), weights(4, new[1])
  resized = np.einsum("ar,bs,nrsc->nabc", rows, columns, patches)
  want = np.einsum("nrsc,rsco->no", patches, kernel)
  tokens = np.einsum("nabc,abco->no", resized, got)
  np.testing.assert_allclose(tokens, want, rtol=1e-5, atol=1e-5)


def test_resampled_patches_over_time_too():
  kernel = np.random.default_rng(0).normal(size=(2, 4, 4, 3, 5))
  got = warm_start.resample_patch(kernel, (4, 4, 4))
  # A clip of equal frames: what they sum to is the same.
  np.testing.assert_allclose(got.sum(0), kernel.sum(0), rtol=1e-5, atol=1e-5)


def test_applies():
  source = flat(drawn(vit.Model(5, f"Ti/{PATCH}", **FIELDS), 0))
  model = lookup_vit.Model(5, f"Ti/{PATCH}", grid=(2, 2), **FIELDS)
  target = flat(drawn(model, 0))
  assert warm_start.applies(source, target)
  assert not warm_start.applies(target, target)
  assert not warm_start.applies(source, source)
  stacked = flat(layers.stack_blocks(drawn(model, 0)))
  assert not warm_start.applies(stacked, source)


@pytest.mark.parametrize(
  "name", ["gathering", "contextualisation", "small_mlp"]
)
def test_unknown_values_are_named(name):
  with pytest.raises(ValueError, match=f"{name}='most': want one of "):
    warm_start.Mapping(**{name: "most"}).check()
