"""Float32 products at full precision, also where that is not the default."""

import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision():
  with jax.default_matmul_precision("highest"):
    yield
