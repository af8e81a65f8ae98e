"""The kernels of the lookup stream, for TPUs (Pallas): see `lookup_stream.py`.

The arguments of each are references to what an image has (`image`), to
parameters (`p`) and results, and scratch.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

# References to memory of the chip: Pallas's, by name.
Ref = Any
Refs = Mapping[str, Ref]

# Lookup tokens at a time.
CHUNK = 256

_NN = ((1,), (0,))
_NT = ((1,), (1,))
_TN = ((0,), (0,))


@dataclasses.dataclass(frozen=True)
class Spec:
  """What the kernels are, beside shapes and dtypes.

  Attributes:
    eps: of LayerNorm.
    approximate: whether GELU is that with tanh.
    interpret: whether to run the kernels step by step on any device, for tests.
  """

  eps: float = 1e-6
  approximate: bool = True
  interpret: bool = False


# Parameters by name: `norm_scale` and `norm_bias [1, D]` of the normalised
# lookup tokens; for each head `key`, `value` and `out [h, d, D]`, the first two
# transposed; `out_bias [1, D]`; of the MLP `mlp_scale` and `mlp_bias [1, D]`,
# `kernel_in [D, r]`, `bias_in [1, r]`, `kernel_out [r, D]`, `bias_out [1, D]`.
_NORM = ("norm_scale", "norm_bias", "key")
GATHER = (*_NORM, "value")
CONTEXTUALISE = (
  *(*_NORM, "out", "out_bias", "mlp_scale", "mlp_bias"),
  *("kernel_in", "bias_in", "kernel_out", "bias_out"),
)


def normalise(
  x: Float[Array, "*n D"], eps: float
) -> tuple[Float[Array, "*n D"], Float[Array, "*n 1"]]:
  """Of mean 0 and variance 1 over the last axis, and by what it was divided."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  factor = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return x * factor, factor


def layer_norm(
  x: Float[Array, "*n D"],
  scale: Float[Array, "1 D"],
  bias: Float[Array, "1 D"],
  spec: Spec,
) -> Float[Array, "*n D"]:
  """In float32, and rounded to the dtype of `x`."""
  y = normalise(x, spec.eps)[0] * scale + bias
  return y.astype(x.dtype)


def _dot(x, y, contracted):
  return jax.lax.dot_general(
    *(x, y, (contracted, ((), ()))), preferred_element_type=jnp.float32
  )


def _chunks(length, body, *carry):
  """`carry = body(start, size, *carry)` for each chunk of the lookup tokens."""
  full, rest = divmod(length, CHUNK)

  def step(i, carry):
    return body(pl.multiple_of(i * CHUNK, CHUNK), CHUNK, *carry) or ()

  if full == 1:
    carry = body(0, CHUNK, *carry) or ()
  elif full:
    carry = jax.lax.fori_loop(0, full, step, carry)
  if rest:
    carry = body(full * CHUNK, rest, *carry) or ()
  return carry


def _heads(x):
  """The rows of each head, `[m, d]` and `[h m, D]`."""
  heads, m = x.shape[-3:-1]
  return [(h, slice(h * m, (h + 1) * m)) for h in range(heads)]


def _widen(x, kernel, wide):
  for h, rows in _heads(x):
    wide[rows] = _dot(x[0, h], kernel[h], _NN).astype(wide.dtype)


def _widen_backward(x, kernel, d_wide, d_x, d_kernel):
  """From the gradient of the wide rows to those of `x` and the kernel."""
  for h, rows in _heads(x):
    d = d_wide[rows].astype(x.dtype)
    d_x[0, h] = _dot(d, kernel[h], _NT).astype(d_x.dtype)
    d_kernel[h] += _dot(x[0, h], d, _TN)


def _row(x):
  """A column `[r, 1]` as a row `[1, r]`."""
  shape = (x.shape[0], x.shape[0])
  same = [jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1)]
  return jnp.sum(jnp.where(same[0] == same[1], x, 0.0), axis=0, keepdims=True)


def _zero_first(*refs):
  """What is added to in all programs begins at zero in the first."""

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in refs:
      ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _norm_backward(d, x, factor, scale):
  """The gradient of what was normalised, where `x` is that and `d` of `y`."""
  d = d * scale
  mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
  return factor * (d - mean(d) - x * mean(d * x))


def _sum(x):
  return jnp.sum(x, axis=0, keepdims=True)


def gather(
  spec: Spec, image: Refs, p: Refs, out: Refs, wide: Ref, total: Ref
) -> None:
  """Online softmax over chunks; `wide` and `total` are `[h m, D]`."""
  lookup, query = image["lookup"], image["query"]
  dtype = lookup.dtype
  _widen(query, p["key"], wide)
  rows = wide.shape[0]
  total[...] = jnp.zeros(total.shape, total.dtype)

  def chunk(start, size, top, sums):
    y = lookup[0, pl.ds(start, size)]
    y = layer_norm(y, p["norm_scale"][...], p["norm_bias"][...], spec)
    logits = _dot(wide[...], y, _NT)
    new = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp(logits - new)
    factor = jnp.exp(top - new)
    total[...] = factor * total[...] + _dot(weights.astype(dtype), y, _NN)
    return new, factor * sums + jnp.sum(weights, axis=1, keepdims=True)

  first = jnp.full((rows, 1), -jnp.inf), jnp.zeros((rows, 1))
  top, sums = _chunks(lookup.shape[1], chunk, *first)
  mean = (total[...] / sums).astype(dtype)
  for h, rows in _heads(query):
    out["x"][0, h] = _dot(mean[rows], p["value"][h], _NT).astype(dtype)
  out["sums"][0] = _row(top + jnp.log(sums))
  out["top"][0] = _row(top)


def gather_backward(
  spec: Spec,
  image: Refs,
  p: Refs,
  d: Refs,
  wide: Ref,
  d_mean: Ref,
  d_wide: Ref,
  mean: Ref,
) -> None:
  """Gradients; rows of the scratch are `[h m, D]`, the last two in float32."""
  lookup, query, d_x = image["lookup"], image["query"], image["d_x"]
  dtype = lookup.dtype
  scale, bias = p["norm_scale"][...], p["norm_bias"][...]
  _zero_first(*(d[name] for name in GATHER))
  _widen(query, p["key"], wide)
  _widen(d_x, p["value"], d_mean)
  for x in (d_wide, mean):
    x[...] = jnp.zeros(x.shape, x.dtype)

  def chunk(start, size):
    place = pl.ds(start, size)
    x, factor = normalise(lookup[0, place], spec.eps)
    y = (x * scale + bias).astype(dtype)
    weights = jnp.exp(_dot(y, wide[...], _NT) - image["sums"][0])
    d_logits = weights * (_dot(y, d_mean[...], _NT) + image["d_sums"][0])
    weights, d_logits = weights.astype(dtype), d_logits.astype(dtype)
    mean[...] += _dot(weights, y, _TN)
    d_wide[...] += _dot(d_logits, y, _TN)
    d_y = _dot(d_logits, wide[...], _NN) + _dot(weights, d_mean[...], _NN)
    d["norm_scale"][...] += _sum(d_y * x)
    d["norm_bias"][...] += _sum(d_y)
    d_lookup = _norm_backward(d_y, x, factor, scale)
    d_lookup += image["d_lookup"][0, place].astype(jnp.float32)
    d["lookup"][0, place] = d_lookup.astype(dtype)

  _chunks(lookup.shape[1], chunk)
  _widen_backward(query, p["key"], d_wide, d["query"], d["key"])
  for h, rows in _heads(query):
    d["value"][h] += _dot(d_x[0, h], mean[rows].astype(dtype), _TN)


def _forward(spec, image, p, wide, wide_value, place):
  """A chunk of lookup tokens, and what there is on the way to the result."""
  dtype, keep = wide.dtype, image["keep"]
  lookup = image["lookup"][0, place]
  x, factor = normalise(lookup, spec.eps)
  y = (x * p["norm_scale"][...] + p["norm_bias"][...]).astype(dtype)
  weights = jnp.exp(_dot(y, wide[...], _NT) - image["sums"][0])
  update = _dot(weights.astype(dtype), wide_value[...], _NN)
  update = keep[0, :, 0:1] * (update + p["out_bias"][...])
  middle = lookup.astype(jnp.float32) + update
  z, z_factor = normalise(middle, spec.eps)
  mlp_in = (z * p["mlp_scale"][...] + p["mlp_bias"][...]).astype(dtype)
  hidden = _dot(mlp_in, p["kernel_in"][...], _NN) + p["bias_in"][...]
  active = jax.nn.gelu(hidden, approximate=spec.approximate).astype(dtype)
  out = _dot(active, p["kernel_out"][...], _NN) + p["bias_out"][...]
  out = middle + keep[0, :, 1:2] * out
  return out, (x, factor, y, weights, z, z_factor, mlp_in, hidden, active)


def contextualise(
  spec: Spec, image: Refs, p: Refs, out: Ref, wide: Ref, wide_value: Ref
) -> None:
  """The update and the MLP by chunks; `wide` and `wide_value` `[h m, D]`."""
  _widen(image["query"], p["key"], wide)
  _widen(image["value"], p["out"], wide_value)

  def chunk(start, size):
    place = pl.ds(start, size)
    x, _ = _forward(spec, image, p, wide, wide_value, place)
    out[0, place] = x.astype(out.dtype)

  _chunks(out.shape[1], chunk)


def contextualise_backward(
  spec: Spec,
  image: Refs,
  p: Refs,
  d: Refs,
  wide: Ref,
  wide_value: Ref,
  d_wide: Ref,
  d_wide_value: Ref,
) -> None:
  """Gradients; scratch `[h m, D]`, the last two in float32."""
  dtype, keep = wide.dtype, image["keep"]
  _zero_first(*(d[name] for name in CONTEXTUALISE))
  _widen(image["query"], p["key"], wide)
  _widen(image["value"], p["out"], wide_value)
  for x in (d_wide, d_wide_value, d["sums"]):
    x[...] = jnp.zeros(x.shape, x.dtype)

  def chunk(start, size):
    place = pl.ds(start, size)
    _, found = _forward(spec, image, p, wide, wide_value, place)
    x, factor, y, weights, z, z_factor, mlp_in, hidden, active = found
    d_out = image["d_out"][0, place].astype(jnp.float32)

    d_mlp = keep[0, :, 1:2] * d_out
    d["bias_out"][...] += _sum(d_mlp)
    d_mlp = d_mlp.astype(dtype)
    d["kernel_out"][...] += _dot(active, d_mlp, _TN)
    gelu = functools.partial(jax.nn.gelu, approximate=spec.approximate)
    _, gelu_backward = jax.vjp(gelu, hidden)
    (d_hidden,) = gelu_backward(_dot(d_mlp, p["kernel_out"][...], _NT))
    d["bias_in"][...] += _sum(d_hidden)
    d_hidden = d_hidden.astype(dtype)
    d["kernel_in"][...] += _dot(mlp_in, d_hidden, _TN)
    d_z = _dot(d_hidden, p["kernel_in"][...], _NT)
    d["mlp_scale"][...] += _sum(d_z * z)
    d["mlp_bias"][...] += _sum(d_z)
    d_middle = d_out + _norm_backward(d_z, z, z_factor, p["mlp_scale"][...])

    d_update = keep[0, :, 0:1] * d_middle
    d["out_bias"][...] += _sum(d_update)
    d_update = d_update.astype(dtype)
    d_wide_value[...] += _dot(weights.astype(dtype), d_update, _TN)
    d_logits = weights * _dot(d_update, wide_value[...], _NT)
    d["sums"][0] -= _sum(d_logits)
    d_logits = d_logits.astype(dtype)
    d_wide[...] += _dot(d_logits, y, _TN)
    d_y = _dot(d_logits, wide[...], _NN)
    d["norm_scale"][...] += _sum(d_y * x)
    d["norm_bias"][...] += _sum(d_y)
    d_lookup = d_middle + _norm_backward(d_y, x, factor, p["norm_scale"][...])
    d["lookup"][0, place] = d_lookup.astype(dtype)

  _chunks(image["lookup"].shape[1], chunk)
  _widen_backward(image["query"], p["key"], d_wide, d["query"], d["key"])
  _widen_backward(image["value"], p["out"], d_wide_value, d["value"], d["out"])
