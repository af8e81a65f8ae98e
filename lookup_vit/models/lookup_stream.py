"""What a block does to the lookup tokens, as two kernels for TPUs (Pallas).

A chip's memory sees the lookup tokens of an image once for `gather`, and once
in and once out for `contextualise`. Nothing else that has a row for each of
them leaves the chip: no keys, values, weights or hidden units, forward or
backward. All that MHBC multiplies is absorbed (`mhbc.py`), in one program for
each image, over its tokens in chunks:

  gather         Y = LN(F_l);  A = softmax_N(Q W_k^T Y^T);  (A Y) W_v
  contextualise  F_l = F_l + s (A^T (V' W_o) + b)
                 F_l = F_l + s' MLP(LN(F_l))

The softmax over tokens is an online one (arXiv:1805.02867), as in
FlashAttention (arXiv:2205.14135): its logarithmic sums `L` go from `gather` to
`contextualise`, where `A = exp(Q W_k^T Y^T - L)` is computed again. They are
differentiated as an array like any other: what `contextualise` says of `L`
makes, in the backward pass of `gather`, the softmax's own gradient.

`gather` also returns the lookup tokens as they came, for `contextualise` to
read, so that the gradients of both uses are added within a kernel. The same in
plain JAX is "absorbed" of `mhbc.py`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lookup_vit.models import attention, lookup_kernels
from lookup_vit.models.lookup_kernels import Spec

Params = Mapping[str, Array]


# Calls.


def _call(kernel, spec, image, params, results, scratch, flops):
  """Runs a kernel for each image.

  Args:
    kernel: of (spec, image, params, results, *scratch).
    spec: of the kernels.
    image: arrays by name, `[b, ...]`, of which a program has its own.
    params: arrays by name, of which each program has all.
    results: by name or one, (shape and dtype, whether they are of an image).
    scratch: shapes and dtypes.
    flops: of an image.
  """
  batch = len(image["lookup"])

  def block(x, of_image=True):
    if of_image:
      rest = (0,) * (x.ndim - 1)
      return pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, *rest))
    place = (0,) * x.ndim
    return pl.BlockSpec(x.shape, lambda i: place)

  pair = lambda x: isinstance(x, tuple)  # noqa: E731
  shapes = jax.tree.map(lambda x: x[0], results, is_leaf=pair)
  moved = jax.tree.leaves((image, params, shapes))
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in moved)
  tokens = image["lookup"].shape[1]
  weights = batch * tokens * image["query"].shape[1] * image["query"].shape[2]
  return pl.pallas_call(
    functools.partial(kernel, spec),
    grid=(batch,),
    in_specs=(
      jax.tree.map(block, image),
      jax.tree.map(lambda x: block(x, False), params),
    ),
    out_specs=jax.tree.map(lambda x: block(*x), results, is_leaf=pair),
    out_shape=shapes,
    scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in scratch],
    cost_estimate=pl.CostEstimate(
      flops=batch * flops, bytes_accessed=moved, transcendentals=weights
    ),
    compiler_params=None
    if spec.interpret
    else pltpu.CompilerParams(
      dimension_semantics=("arbitrary",), vmem_limit_bytes=_fast_memory()
    ),
    interpret=spec.interpret,
    name=kernel.__name__.strip("_"),
  )(image, params)


def _wide(image, dtype=None):
  """The shape of all heads' rows at their full width."""
  _, heads, m, _ = image["query"].shape
  width = image["lookup"].shape[-1]
  return jax.ShapeDtypeStruct((heads * m, width), dtype or image["query"].dtype)


def _flops(image, params, full, narrow):
  """Of an image: twice so many products with all tokens, and projections."""
  tokens = image["lookup"].shape[1]
  wide = _wide(image)
  rows = math.prod(wide.shape)
  mlp = params["kernel_in"].size if "kernel_in" in params else 0
  mlp *= 2 if full <= 2 else 5
  size = image["query"].shape[-1]
  return 2 * (full * tokens * rows + narrow * rows * size + tokens * mlp)


def _like(x, dtype=None):
  return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _gradients(image, params, of_image):
  """The results of a backward kernel: those of parameters are in float32."""
  found = {name: (_like(image[name]), True) for name in of_image}
  for name, x in params.items():
    found[name] = (_like(x, jnp.float32), False)
  return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(
  spec: Spec,
  lookup: Float[Array, "b n D"],
  query: Float[Array, "b h m d"],
  params: Params,
) -> tuple[
  Float[Array, "b h m d"],
  Float[Array, "b h m"],
  Float[Array, "b h m"],
  Float[Array, "b n D"],
]:
  """Compressed tokens' queries meet the lookup tokens.

  Args:
    spec: of the kernels.
    lookup: lookup tokens.
    query: divided by the square root of `d`; in so many rows as `rows` says.
    params: those of `lookup_kernels.GATHER`.

  Returns:
    Each head's average of values, without their bias; the logarithmic sum of
    each query's softmax, in float32; its largest logit, without gradient; and
    the lookup tokens as they are.
  """
  return _gather_forward(spec, lookup, query, params)[0]


def _gather_forward(spec, lookup, query, params):
  image = dict(lookup=lookup, query=query)
  batch, heads, m, _ = query.shape
  row = jax.ShapeDtypeStruct((batch, 1, heads * m), jnp.float32)
  results = dict(x=(_like(query), True), sums=(row, True), top=(row, True))
  wide = _wide(image)
  scratch = [wide, _like(wide, jnp.float32)]
  flops = _flops(image, params, full=2, narrow=2)
  out = _call(
    lookup_kernels.gather, spec, image, params, results, scratch, flops
  )
  sums, top = (out[k].reshape(batch, heads, m) for k in ("sums", "top"))
  kept = (lookup, query, params, out["x"], sums)
  return (out["x"], sums, top, lookup), kept


def _gather_backward(spec, kept, gradients):
  lookup, query, params, x, sums = kept
  d_x, d_sums, _, d_lookup = gradients
  # Of the softmax: its rows are weighted by their own sums.
  product = d_x.astype(jnp.float32) * x.astype(jnp.float32)
  d_sums = d_sums - jnp.sum(product, axis=-1)
  flat = lambda x: x.reshape(len(x), 1, -1)  # noqa: E731
  image = dict(lookup=lookup, query=query, sums=flat(sums))
  image |= dict(d_x=d_x, d_sums=flat(d_sums), d_lookup=d_lookup)
  results = _gradients(image, params, ("lookup", "query"))
  wide = _wide(image)
  scratch = [wide, wide, *[_like(wide, jnp.float32)] * 2]
  flops = _flops(image, params, full=6, narrow=5)
  d = _call(
    *(
      lookup_kernels.gather_backward,
      spec,
      image,
      params,
      results,
      scratch,
      flops,
    )
  )
  return _in_order(d, ("lookup", "query"), params)


def _in_order(d, names, params):
  of_params = {name: d[name].astype(x.dtype) for name, x in params.items()}
  return *(d[name] for name in names), of_params


gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contextualise(
  spec: Spec,
  lookup: Float[Array, "b n D"],
  query: Float[Array, "b h m d"],
  sums: Float[Array, "b h m"],
  value: Float[Array, "b h m d"],
  keep: Float[Array, "b 2"],
  params: Params,
) -> Float[Array, "b n D"]:
  """The lookup tokens after the update by MHBC and their MLP.

  Args:
    spec: of the kernels.
    lookup: as `gather` returned them.
    query: as of `gather`.
    sums: of `gather`.
    value: of the compressed tokens, with bias; in rows beyond those there are,
      zeros.
    keep: by what to multiply the update of MHBC and that of the MLP; float32,
      without gradient.
    params: those of `lookup_kernels.CONTEXTUALISE`.
  """
  return _contextualise_forward(spec, lookup, query, sums, value, keep, params)[
    0
  ]


def _contextualise_forward(spec, lookup, query, sums, value, keep, params):
  image = dict(lookup=lookup, query=query, value=value)
  image |= dict(sums=sums.reshape(len(sums), 1, -1), keep=keep[:, None])
  wide = _wide(image)
  out = _call(
    *(lookup_kernels.contextualise, spec, image, params, (_like(lookup), True)),
    *([wide, wide], _flops(image, params, full=2, narrow=2)),
  )
  return out, (image, params)


def _contextualise_backward(spec, kept, d_out):
  image, params = kept
  image = image | dict(d_out=d_out)
  names = ("lookup", "query", "sums", "value")
  results = _gradients(image, params, names)
  wide = _wide(image)
  scratch = [wide, wide, *[_like(wide, jnp.float32)] * 2]
  flops = _flops(image, params, full=6, narrow=6)
  d = _call(
    *(lookup_kernels.contextualise_backward, spec, image, params, results),
    *(scratch, flops),
  )
  batch, heads, m, _ = image["query"].shape
  d["sums"] = d["sums"].reshape(batch, heads, m)
  d["keep"] = jnp.zeros((batch, 2))
  return _in_order(d, (*names, "keep"), params)


contextualise.defvjp(_contextualise_forward, _contextualise_backward)


# For the models.


def rows(m: int, dtype: Any) -> int:
  """Rows for `m` compressed tokens: whole tiles of the chip's registers."""
  tile = 32 // jnp.dtype(dtype).itemsize
  return -(-m // tile) * tile


def serves(
  lookup: Float[Array, "b n D"], m: int, heads: int, hidden: int
) -> bool:
  """Whether the program is for TPUs whose fast memory holds all of a kernel.

  The devices are those of the mesh in use; JAX's default ones where there is
  none. Where the gradient's kernel does not fit, there is none of inference
  either: a model does not know what it is called for.

  Args:
    lookup: lookup tokens, in float32 or bfloat16.
    m: number of compressed tokens.
    heads: of MHBC.
    hidden: units of the MLP of the lookup tokens.
  """
  if lookup.dtype not in (jnp.float32, jnp.bfloat16):
    return False  # TPUs have no other.
  if not pltpu.is_tpu_device() or _split_by_head():
    return False
  _, n, width = lookup.shape
  size = lookup.dtype.itemsize
  wide, chunk = heads * rows(m, lookup.dtype), min(n, lookup_kernels.CHUNK)
  kernels = 2 * width * (width + hidden)
  # Of the backward pass of `contextualise`, which takes most. What is moved has
  # two places: one is read or written while the kernel works on the other.
  needed = 2 * (3 * n * width * size + kernels * (size + 4))
  needed += wide * width * (2 * size + 8)
  needed += chunk * (4 * wide + 8 * width + 4 * hidden) * 4
  return needed <= _fast_memory()


def _fast_memory():
  """Bytes that a kernel may take; the compiler wants some for itself."""
  return pltpu.get_tpu_info().vmem_capacity_bytes * 3 // 4


def _split_by_head():
  mesh = jax.sharding.get_abstract_mesh()
  for name in ("heads", "mlp"):
    (axes,) = nn.logical_to_mesh_axes((name,))
    axes = (axes,) if isinstance(axes, str) else axes or ()
    if any(mesh.shape.get(axis, 1) > 1 for axis in axes):
      return True
  return False


def per_device(function: Callable, *args: Any, params: Params) -> Any:
  """Calls `function(*args, params)`; under a mesh, for each device's examples.

  The compiler splits no kernel. The gradients of parameters are added up.
  """
  spec = attention.partition(("batch",), args[0].shape[:1])
  if spec is None:
    return function(*args, params)
  mapped = jax.shard_map(
    function,
    in_specs=(*[spec] * len(args), PartitionSpec()),
    out_specs=spec,
    check_vma=False,  # Kernels do not say over which axes their results vary.
  )
  return mapped(*args, params)
