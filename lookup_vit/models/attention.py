"""Softmax attention, and ways to it that do not hold all of its weights.

All are the same function, to rounding:

  direct   all weights of a batch at once, in float32
  chunked  some of them at a time, computed again for the backward pass
  fused    only in the chip's fast memory: cuDNN's kernel on NVIDIA GPUs, splash
           attention (jax.experimental.pallas.ops.tpu) on TPUs; in chunks where
           there is no kernel

The platform is that for which a program is lowered, not the one it is traced
on: a program for devices that are not here has their kernels.

Of JAX's two kernels for TPUs, flash attention broadcasts the rows' maxima and
sums to hundreds of columns in its backward pass. Splash attention takes them
as they are: for 3136 tokens and 12 heads of 64 in bfloat16, in blocks of 640,
XLA counts 0.42 GB from and to a v5e's memory in both passes, and 0.89 GB for
flash attention.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

IMPLS = ("auto", "direct", "chunked", "fused")

# Weights of a head up to which "auto" is "direct": on every platform, where
# nothing is faster on CPUs; and on accelerators, where they are a small part.
_TINY = 128 * 128
_SHORT = 256 * 256

# Bytes of float32 weights in a chunk; on CPUs what the cache of a core holds.
_CPU_CHUNK = 3 * 2**19
_CHUNK = 256 * 2**20

# Tokens of a block of the TPU kernel; a multiple of its 128 lanes.
_TPU_BLOCKS = range(256, 1024 + 1, 128)
_TPU_HEAD_SIZE = 256

_Attention = Callable[[Array, Array, Array], Array]


def check(impl: str) -> None:
  """Raises ValueError where there is no such implementation."""
  if impl not in IMPLS:
    raise ValueError(f"attention={impl!r}: want one of {', '.join(IMPLS)}.")


def logits(
  query: Float[Array, "b m h d"], key: Float[Array, "b n h d"]
) -> Float[Array, "b h m n"]:
  """Scaled dot products, accumulated and returned in float32."""
  query = query / math.sqrt(query.shape[-1])
  x = jnp.einsum(
    "bmhd,bnhd->bhmn", query, key, preferred_element_type=jnp.float32
  )
  return nn.with_logical_constraint(x, ("batch", "heads", None, None))


def average(
  weights: Float[Array, "b h m n"], value: Float[Array, "b n h d"]
) -> Float[Array, "b m h d"]:
  """Values averaged with weights."""
  return jnp.einsum("bhmn,bnhd->bmhd", weights.astype(value.dtype), value)


def attend(
  query: Float[Array, "b m h d"],
  key: Float[Array, "b n h d"],
  value: Float[Array, "b n h d"],
  impl: str = "auto",
) -> Float[Array, "b m h d"]:
  """Softmax attention.

  Args:
    query: of each head.
    key: likewise.
    value: likewise.
    impl: one of the module's docstring, or "auto": "fused" where weights are
      many. Those of a single query are few: it is "direct" in any case.

  Raises:
    ValueError: there is no such implementation.
  """
  check(impl)
  if _is_direct(query, key, impl):
    return _direct(query, key, value)

  def chunked(limit):
    return _per_device(functools.partial(_chunked, limit=limit))

  ways = {"cpu": chunked(_CPU_CHUNK), "default": chunked(_CHUNK)}
  if impl == "auto" and _weights(query, key) <= _SHORT:
    ways["default"] = _direct
  elif impl != "chunked":
    if _splash_serves(query):
      ways["tpu"] = _per_device(_splash)
    if _cudnn_serves(query, key, value):
      ways["cuda"] = _per_device(_cudnn)
  return jax.lax.platform_dependent(query, key, value, **ways)


def logit_max(
  query: Float[Array, "b m h d"],
  key: Float[Array, "b n h d"],
  impl: str = "auto",
) -> Float[Array, ""]:
  """The largest logit, without gradient.

  Args:
    query: of each head.
    key: likewise.
    impl: as of `attend`, which holds no more logits at once; "fused" is in
      chunks.
  """
  query, key = jax.lax.stop_gradient((query, key))

  def direct(query, key):
    return jnp.max(logits(query, key))

  if _is_direct(query, key, impl):
    return direct(query, key)

  def of_head(query, key, _):
    return jnp.max(_scores(query, key), axis=-1, keepdims=True)

  def chunked(limit):
    of_each = _per_device(functools.partial(_map, of_head, limit=limit))
    return lambda query, key: jnp.max(of_each(query, key, key))

  ways = {"cpu": chunked(_CPU_CHUNK), "default": chunked(_CHUNK)}
  if impl == "auto" and _weights(query, key) <= _SHORT:
    ways["default"] = direct
  return jax.lax.platform_dependent(query, key, **ways)


def _is_direct(query, key, impl):
  """Whether all weights are computed at once on every platform."""
  if impl == "direct" or query.shape[1] == 1:
    return True
  return impl == "auto" and _weights(query, key) <= _TINY


def _weights(query, key):
  """How many a head has."""
  return query.shape[1] * key.shape[1]


def partition(
  names: Sequence[str | None], shape: Sequence[int]
) -> PartitionSpec | None:
  """How the devices of the mesh in use split an array.

  Args:
    names: of its dimensions, as of `layers.constrain`.
    shape: what the devices do not divide is not split.

  Returns:
    None where there are no several devices, or each is by itself already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return None
  fits = []
  for axes, size in zip(nn.logical_to_mesh_axes(names), shape, strict=True):
    split = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[name] for name in split)
    fits.append(None if size % parts else axes)
  return PartitionSpec(*fits)


def _per_device(function: _Attention) -> _Attention:
  """Under a mesh, runs a function on each device's examples and heads.

  The compiler splits no kernel, and no loop over examples or heads.
  """

  def run(query, key, value):
    spec = partition(("batch", None, "heads", None), query.shape)
    if spec is None:
      return function(query, key, value)
    # JAX's kernels do not say over which axes their results vary.
    mapped = jax.shard_map(
      function, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    return mapped(query, key, value)

  return run


def _direct(query, key, value):
  return average(jax.nn.softmax(logits(query, key)), value)


def _scores(query, key):
  """Logits of a head, `[m, d]` and `[n, d]` to `[m, n]`; queries are scaled."""
  return jnp.einsum("md,nd->mn", query, key, preferred_element_type=jnp.float32)


def _head(query, key, value):
  """Attention of a head; queries are scaled."""
  weights = jax.nn.softmax(_scores(query, key))
  return weights.astype(value.dtype) @ value


# With a gradient of its own, so that no rematerialisation policy keeps a
# chunk's weights: the backward pass computes them again.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(query, key, value, limit):
  return _map(_head, query, key, value, limit)


def _chunked_forward(query, key, value, limit):
  return _chunked(query, key, value, limit), (query, key, value)


def _chunked_backward(limit, inputs, gradient):
  head = jax.checkpoint(_head)
  _, vjp = jax.vjp(functools.partial(_map, head, limit=limit), *inputs)
  return vjp(gradient)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _map(function, query, key, value, limit):
  """A function of a head, over so many heads or queries as are `limit` bytes.

  Args:
    function: of `[m, d]`, `[n, d]` and `[n, d]`, each row of the first by
      itself; returns `[m, ...]`.
    query: `[b, m, h, d]`.
    key: `[b, n, h, d]`.
    value: likewise.
    limit: bytes of float32 weights.

  Returns:
    `[b, m, h, ...]`.
  """
  batch, queries, heads, size = query.shape
  query = query / math.sqrt(size)
  rows = [
    x.swapaxes(1, 2).reshape(batch * heads, -1, size)
    for x in (query, key, value)
  ]
  row = 4 * key.shape[1]
  if queries * row <= limit:
    group = _even(batch * heads, limit // (queries * row))
    x = jax.lax.map(lambda x: function(*x), rows, batch_size=group)
  else:
    part = _even(queries, max(1, limit // row))

    def one(x):
      query, *others = x
      # Gradients of keys and values are sums over the parts, in float32.
      others = [y.astype(jnp.float32) for y in others]

      def of_query(q):
        k, v = (y.astype(q.dtype) for y in others)
        return function(q[None], k, v)[0]

      return jax.lax.map(of_query, query, batch_size=part)

    x = jax.lax.map(one, rows)
  return x.reshape(batch, heads, queries, -1).swapaxes(1, 2)


def _even(count, most):
  """The size of nearly equal parts of `count`, each of `most` or less."""
  return -(-count // -(-count // most))


def _cudnn(query, key, value):
  return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _cudnn_serves(query, key, value):
  """Whether there is a cuDNN, and it has a kernel for these, by JAX's word."""
  try:
    jax.eval_shape(_cudnn, query, key, value)
  except (NotImplementedError, RuntimeError):
    return False
  return True


def _splash_serves(query):
  dtypes = (jnp.float32, jnp.bfloat16)
  return query.dtype in dtypes and query.shape[-1] <= _TPU_HEAD_SIZE


def _tpu_block(length):
  """The block that least is padded for, the largest of such."""
  return min(_TPU_BLOCKS, key=lambda b: (-(-length // b) * b, -b))


def _splash(query, key, value):
  # Most programs do without this import, which takes a second.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  batch, queries, heads, size = query.shape
  keys = key.shape[1]
  block_q, block_kv = _tpu_block(queries), _tpu_block(keys)
  padded = -(-queries // block_q) * block_q, -(-keys // block_kv) * block_kv

  def rows(x, length):
    x = x.swapaxes(1, 2).reshape(batch * heads, -1, size)
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))

  # Padded keys are of another segment than all queries.
  segments = None
  if keys < padded[1]:
    segments = splash.SegmentIds(
      q=jnp.zeros(padded[0], jnp.int32),
      kv=(jnp.arange(padded[1]) >= keys).astype(jnp.int32),
    )
  # To the kernel, the heads of all examples are those of one.
  mask = splash.MultiHeadMask([splash.FullMask(padded)] * batch * heads)
  kernel = splash.make_splash_mha_single_device(
    mask,
    block_sizes=splash.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
  )
  x = kernel(
    rows(query / math.sqrt(size), padded[0]),
    rows(key, padded[1]),
    rows(value, padded[1]),
    segment_ids=segments,
  )
  x = x[:, :queries].reshape(batch, heads, queries, size)
  return x.swapaxes(1, 2)
