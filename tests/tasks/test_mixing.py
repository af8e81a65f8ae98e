"""Tests of lookup_vit/tasks/mixing.py, against loops over examples."""

import jax
import numpy as np
import pytest
from scipy import stats

from lookup_vit.tasks import mixing
from tests import programs

# Most of the time goes to compilation: machine code need not be fast.
mix = jax.jit(
  mixing.mix,
  static_argnums=(3, 4),
  compiler_options={"xla_backend_optimization_level": 0},
)


def random_batch(count, *space, classes=5, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.uniform(-1, 1, (count, *space, 3)).astype(np.float32)
  labels = rng.dirichlet(np.ones(classes), count).astype(np.float32)
  return images, labels


def numbered_batch(count, *space):
  """Pixels and labels that tell which example they come from."""
  images = np.zeros((count, *space, 3), np.float32)
  images += np.arange(count).reshape(-1, *[1] * (images.ndim - 1))
  return images, np.eye(count, dtype=np.float32)


def draws(rng, index, p):
  """The draws of one example: keyed by its place in the batch."""
  keys = jax.random.split(jax.random.fold_in(rng, index), 4)
  mixup = float(jax.random.beta(keys[0], p[0], p[0])) if p[0] else None
  cutmix = None
  if p[1]:
    t = np.float32(jax.random.beta(keys[1], p[1], p[1]))
    cutmix = t, jax.random.split(keys[2])
  return mixup, cutmix, bool(jax.random.bernoulli(keys[3]))


def one_by_one(rng, images, labels, mixup_p, cutmix_p):
  out_images, out_labels = [], []
  images = images.astype(np.float64)
  labels = labels.astype(np.float64)
  for i in range(len(images)):
    x, y, other_x, other_y = images[i], labels[i], images[i ^ 1], labels[i ^ 1]
    t, cut, first = draws(rng, i, (mixup_p, cutmix_p))
    if mixup_p and (first or not cutmix_p):
      a = max(t, 1 - t)
      x, y = a * x + (1 - a) * other_x, a * y + (1 - a) * other_y
    else:
      t, keys = cut
      rows, columns = x.shape[-3:-1]
      spans = []
      for key, n in zip(keys, (rows, columns), strict=True):
        centre = int(jax.random.randint(key, (), 0, n))
        half = int(np.floor(np.float32(n) * np.sqrt(1 - t))) // 2
        spans.append(range(max(0, centre - half), min(n, centre + half)))
      x = x.copy()
      for r in spans[0]:
        for c in spans[1]:
          x[..., r, c, :] = other_x[..., r, c, :]
      a = 1 - len(spans[0]) * len(spans[1]) / (rows * columns)
      y = a * y + (1 - a) * other_y
    out_images.append(x)
    out_labels.append(y)
  return np.stack(out_images), np.stack(out_labels)


@pytest.mark.parametrize(
  "p, space",
  [
    ((0.2, 0), (9, 14)),
    ((0, 1.0), (9, 14)),
    ((0.8, 0.7), (9, 14)),
    ((0.8, 0.7), (3, 8, 5)),
  ],
)
def test_against_a_loop(p, space):
  rng = jax.random.key(3)
  images, labels = random_batch(10, *space)
  got = mix(rng, images, labels, *p)
  want = one_by_one(rng, images, labels, *p)
  for g, w in zip(got, want, strict=True):
    assert g.shape == w.shape and g.dtype == np.float32
    np.testing.assert_allclose(g, w, 0, 1e-6)
  np.testing.assert_allclose(np.sum(got[1], -1), np.sum(labels, -1), 1e-6)
  assert np.max(np.abs(got[0] - images)) > 0.1


def test_nothing_to_mix():
  images, labels = random_batch(3, 4, 4)
  got = mixing.mix(jax.random.key(0), images, labels, 0.0, 0.0)
  assert got[0] is images and got[1] is labels


@pytest.mark.parametrize("p", [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_odd_batch(p):
  images, labels = random_batch(5, 4, 4)
  with pytest.raises(ValueError, match="5 is odd"):
    mixing.mix(jax.random.key(0), images, labels, *p)


def test_only_neighbours_mix():
  images, labels = random_batch(10, 9, 14)
  p = 0.8, 0.7
  rng = jax.random.key(1)
  before = mix(rng, images, labels, *p)
  changed_images, changed_labels = images.copy(), labels.copy()
  changed_images[3] += 1
  changed_labels[3] += 1
  after = mix(rng, changed_images, changed_labels, *p)
  for a, b in zip(before, after, strict=True):
    changed = [not np.array_equal(x, y) for x, y in zip(a, b, strict=True)]
    assert changed[3]
    assert not any(changed[i] for i in (0, 1, *range(4, 10)))


def test_a_batch_is_mixed_alike_whatever_follows():
  images, labels = random_batch(10, 9, 14)
  rng = jax.random.key(2)
  whole = mix(rng, images, labels, 0.8, 0.7)
  part = mix(rng, images[:4], labels[:4], 0.8, 0.7)
  for w, p in zip(whole, part, strict=True):
    np.testing.assert_array_equal(w[:4], p)
  other = mix(jax.random.key(3), images, labels, 0.8, 0.7)
  assert not np.allclose(whole[1], other[1])


def test_cutmix_labels_are_shares_of_pixels():
  count = 64
  images, labels = numbered_batch(count, 3, 13, 10)
  got, targets = mix(jax.random.key(0), images, labels, 0.0, 1.0)
  got = np.asarray(got)
  # The same box in all frames and channels.
  np.testing.assert_array_equal(
    got, got[:, :1, ..., :1] + np.zeros((3, 1, 1, 3))
  )
  areas = set()
  for i in range(count):
    own = got[i, 0, ..., 0] == i
    assert np.all(own | (got[i, 0, ..., 0] == i ^ 1))
    np.testing.assert_allclose(targets[i, i], own.mean(), 1e-6)
    np.testing.assert_allclose(targets[i, i ^ 1], 1 - own.mean(), 0, 1e-6)
    # What is not its own is a box.
    rows, columns = (~own).any(1), (~own).any(0)
    np.testing.assert_array_equal(~own, rows[:, None] & columns[None])
    for line in (rows, columns):
      assert np.count_nonzero(np.diff(np.pad(line.astype(int), 1))) in (0, 2)
    areas.add(int(np.sum(~own)))
  assert len(areas) > 20


@pytest.mark.parametrize("p", [0.2, 0.8])
def test_mixup_weights_are_of_the_larger_half_of_a_beta(p):
  count = 4096
  images = np.zeros((count, 1, 1, 3), np.float32)
  labels = np.tile(np.eye(2, dtype=np.float32), (count // 2, 1))
  _, targets = mix(jax.random.key(5), images, labels, p, 0.0)
  weights = np.sum(np.asarray(targets) * labels, -1)
  assert weights.min() >= 0.5 and weights.max() <= 1
  beta = stats.beta(p, p)
  # Folded at a half. In float32 many a weight is 1, hence the clipping.
  folded = lambda a: 1 - 2 * beta.cdf(1 - np.clip(a, 0.5, 1))  # noqa: E731
  assert (
    stats.kstest(
      weights[weights < 1 - 1e-5], lambda a: folded(a) / folded(1 - 1e-5)
    ).pvalue
    > 0.01
  )
  tail = folded(1.0) - folded(1 - 1e-5)
  share = np.mean(weights >= 1 - 1e-5)
  assert abs(share - tail) < 5 * np.sqrt(tail / count) + 1e-3


def test_cutmix_areas_are_those_of_the_paper():
  """Against boxes drawn by NumPy as in arXiv:1905.04899, algorithm 1."""
  count, size, p = 4096, 32, 1.0
  images = np.zeros((count, size, size, 1), np.float32)
  labels = np.tile(np.eye(2, dtype=np.float32), (count // 2, 1))
  _, targets = mix(jax.random.key(6), images, labels, 0.0, p)
  got = 1 - np.sum(np.asarray(targets) * labels, -1)

  rng = np.random.default_rng(0)
  want = []
  for _ in range(count):
    side = int(size * np.sqrt(1 - rng.beta(p, p)))
    centre = rng.integers(size, size=2)
    low = np.clip(centre - side // 2, 0, size)
    high = np.clip(centre + side // 2, 0, size)
    want.append(np.prod(high - low) / size**2)
  assert stats.ks_2samp(got, want).pvalue > 0.01


def test_each_of_both_has_its_half():
  count = 2048
  images, labels = numbered_batch(2, 8, 8)
  images = np.tile(images, (count // 2, 1, 1, 1))
  labels = np.tile(labels, (count // 2, 1))
  got, _ = mix(jax.random.key(7), images, labels, 1.0, 1.0)
  # Only mixup makes new values.
  pixels = np.asarray(got)[..., 0]
  mixup = np.any((pixels > 0) & (pixels < 1), axis=(1, 2))
  assert abs(mixup.mean() - 0.5) < 5 * 0.5 / np.sqrt(count)
  # Neighbours draw on their own.
  both = np.mean(mixup[::2] & mixup[1::2])
  assert abs(both - 0.25) < 5 * 0.5 / np.sqrt(count / 2)


PROGRAM = r"""
import re
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from lookup_vit import parallel
from lookup_vit.tasks import mixing

rng = np.random.default_rng(0)
batch = rng.uniform(size=(16, 7, 6, 3)).astype(np.float32), rng.uniform(
  size=(16, 5)
).astype(np.float32)
mix = jax.jit(
  mixing.mix,
  static_argnums=(3, 4),
  compiler_options={"xla_backend_optimization_level": 0},
)
key = jax.random.key(0)
want = mix(key, *batch, 0.3, 0.8)
put = parallel.put_batch(batch, parallel.make_mesh([("data", -1)]))
compiled = mix.lower(key, *put, 0.3, 0.8).compile()
got = compiled(key, *put)
for g, w in zip(got, want):
  np.testing.assert_array_equal(g, w)
  assert len(w.devices()) == 1 and len(g.devices()) == 4
pattern = r"= (\S+) (all-\w+|reduce-scatter|collective-permute)[(]"
print(set(re.findall(pattern, compiled.as_text())))
"""


def test_any_number_of_devices():
  """Four devices make what one makes, and pass no data to each other."""
  program = programs.Program("-c", PROGRAM)
  out, err = program.communicate(timeout=120)
  assert program.returncode == 0, err
  # Drawing from a Beta distribution is a loop that all devices end together.
  assert out in ("set()\n", "{('pred[]', 'all-reduce')}\n")
