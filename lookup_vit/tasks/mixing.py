"""Mixup and cutmix on the device.

Partners are fixed neighbours (2i with 2i+1) and draws are keyed by the place
in the global batch: the result is the same on any number of devices, and no
image leaves a device that holds an even number of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def mix(
  rng: jax.Array,
  images: Float[Array, "b *space c"],
  labels: Float[Array, "b classes"],
  mixup_p: float,
  cutmix_p: float,
  first: int | jax.Array = 0,
) -> tuple[Float[Array, "b *space c"], Float[Array, "b classes"]]:
  """Mixes each example with its neighbour.

  Mixup (arXiv:1710.09412): `a x + (1 - a) x'` with `a = max(t, 1 - t)`, `t ~
  Beta(p, p)`, as in big_vision. Cutmix (arXiv:1905.04899): a box with a share
  `1 - t` of rows x columns (all frames of a video) is the neighbour's, `t ~
  Beta(p, p)`, labels weighted by the area. Where both are asked for, each
  example draws one of the two.

  Args:
    rng: key of this step.
    images: the batch; an even number of examples.
    labels: their targets, one-hot or multi-hot.
    mixup_p: parameter of the Beta distribution; 0 for no mixup.
    cutmix_p: likewise for cutmix.
    first: place of the first example in the global batch, of which this may be
      a part.

  Returns:
    The mixed images and labels, of the same shapes.

  Raises:
    ValueError: the batch is odd, and there is something to mix.
  """
  if not mixup_p and not cutmix_p:
    return images, labels
  count = images.shape[0]
  if count % 2:
    raise ValueError(f"Mixup and cutmix pair a batch: {count} is odd.")

  def one(index, x, other_x, y, other_y):
    keys = jax.random.split(jax.random.fold_in(rng, index), 4)
    if mixup_p:
      t = jax.random.beta(keys[0], mixup_p, mixup_p)
      a = jnp.maximum(t, 1 - t)
      mixed = (a * x + (1 - a) * other_x, a * y + (1 - a) * other_y)
    if cutmix_p:
      t = jax.random.beta(keys[1], cutmix_p, cutmix_p)
      inside = _box(keys[2], x.shape[-3:-1], jnp.sqrt(1 - t))
      a = 1 - jnp.mean(inside)
      cut = (
        jnp.where(inside[..., None], other_x, x),
        a * y + (1 - a) * other_y,
      )
    if not cutmix_p:
      return mixed
    if not mixup_p:
      return cut
    first = jax.random.bernoulli(keys[3])
    return jax.tree.map(lambda m, c: jnp.where(first, m, c), mixed, cut)

  indices = first + jnp.arange(count)
  return jax.vmap(one)(
    indices, images, _neighbours(images), labels, _neighbours(labels)
  )


def _neighbours(x):
  pairs = x.reshape(x.shape[0] // 2, 2, *x.shape[1:])
  return pairs[:, ::-1].reshape(x.shape)


def _box(key, size, share):
  """Mask of a box of `share` of each side around a uniform centre, clipped."""
  inside = jnp.ones(size, bool)
  for axis, (n, k) in enumerate(zip(size, jax.random.split(key), strict=True)):
    centre = jax.random.randint(k, (), 0, n)
    half = jnp.floor(n * share).astype(int) // 2
    places = jnp.arange(n)
    line = (places >= centre - half) & (places < centre + half)
    inside &= line[:, None] if axis == 0 else line[None, :]
  return inside
