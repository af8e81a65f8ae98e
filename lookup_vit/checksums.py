"""Checksums of arrays: whether they are what was written."""

from typing import Any

import jax
import jax.numpy as jnp


def of(tree: Any) -> list[int]:
  """A number for each array of a tree, of its bits and their places."""
  return [int(s) for s in _of(tree)]


@jax.jit
def _of(tree):
  """A uint32 for each array, of its bits and their places.

  Integer arithmetic: the same on any number of devices. A change of a single
  element always shows, since each is mixed by a bijection (MurmurHash3's last
  step).
  """

  def one(x):
    x = jnp.atleast_1d(x)
    if x.dtype == jnp.bool_:
      x = x.astype(jnp.uint8)
    uint = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, uint).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
      iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
      place = place * jnp.uint32(0x9E3779B1) + iota
    mixed = bits ^ (place * jnp.uint32(0x85EBCA77))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

  return [one(x) for x in jax.tree.leaves(tree)]
