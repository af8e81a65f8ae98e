"""Tests of lookup_vit/checksums.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit import checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_checksum_sees_any_single_change(dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(0, 2, (3, 5, 7))).astype(dtype)
  before = checksums._of([x])[0]
  seen = set()
  for place in np.ndindex(x.shape):
    changed = x.at[place].set(1 - x[place])
    seen.add(int(checksums._of([changed])[0]))
  assert int(before) not in seen
  assert len(seen) > 0.99 * x.size
  # Also two elements exchanged.
  y = jnp.asarray(rng.normal(size=(4, 6)).astype(np.float32))
  swapped = y.at[0, 0].set(y[3, 5]).at[3, 5].set(y[0, 0])
  assert checksums._of([y]) != checksums._of([swapped])
