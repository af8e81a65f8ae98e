"""Multinomial logistic regression on features, by full-batch L-BFGS.

The linear probe of CLIP (arXiv:2103.00020, appendix A.3): no augmentation, an
L2 penalty on the kernel alone, its strength chosen on held-out training data.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lookup_vit import parallel

# CLIP's search of log10 C: these first, then around the best at half of the
# distance, until there are eight values in a decade.
_FIRST = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
_FINEST = 0.125

# Mean loss below which the gradient need not be smaller; float32 has not more.
_LEAST_LOSS = 1e-3


@functools.partial(jax.jit, static_argnames=("classes", "max_steps"))
def _fit(x, labels, weights, c, tolerance, classes, max_steps):
  """Kernel `[width, classes]` and bias `[classes]`, the steps, the gradient."""
  total = jnp.sum(weights)
  mean = weights @ x / total
  std = jnp.sqrt(weights @ jnp.square(x - mean) / total)
  # Centred, and of such units that the Hessian at zero, where each class has
  # probability 1 / classes, has ones on its diagonal: L-BFGS is then quick,
  # and the minimum is the same. A feature that is constant has no weight.
  unit = jax.lax.rsqrt(jnp.square(std) / classes + 1 / (c * total))
  unit = jnp.where(std > 1e-6 * jnp.abs(mean), unit, 0.0)
  bias_unit = jnp.sqrt(classes)
  x = (x - mean) * unit

  def loss(params):
    kernel, bias = params
    logits = jnp.dot(x, kernel, precision="highest") + bias_unit * bias
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    penalty = jnp.sum(jnp.square(unit[:, None] * kernel)) / 2
    return (weights @ each + penalty / c) / total

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)
  params = (
    jnp.zeros((x.shape[1], classes), x.dtype),
    jnp.zeros((classes,), x.dtype),
  )

  def largest(state):
    grads = jax.tree.leaves(optax.tree.get(state, "grad"))
    return functools.reduce(jnp.maximum, [jnp.max(abs(g)) for g in grads])

  def unfinished(carry):
    _, state, before, step = carry
    value = optax.tree.get(state, "value")
    # Of classes that are told apart, loss and gradient vanish together.
    small = largest(state) <= tolerance * jnp.clip(value, _LEAST_LOSS, 1.0)
    # Where no step is less, float32 has come to its end.
    goes_on = (step < 2) | (value < before)
    return (step == 0) | ((step < max_steps) & ~small & goes_on)

  def body(carry):
    params, state, _, step = carry
    value, grad = value_and_grad(params, state=state)
    updates, state = solver.update(
      grad, state, params, value=value, grad=grad, value_fn=loss
    )
    return optax.apply_updates(params, updates), state, value, step + 1

  carry = (params, solver.init(params), jnp.inf, 0)
  (kernel, bias), state, _, steps = jax.lax.while_loop(unfinished, body, carry)
  kernel = unit[:, None] * kernel
  bias = bias_unit * bias - jnp.dot(mean, kernel, precision="highest")
  return kernel, bias, steps, largest(state)


Examples = tuple[Float[Array, "n D"], Int[Array, " n"], Float[Array, " n"]]
Classifier = tuple[Float[Array, "D classes"], Float[Array, " classes"]]


def put(
  features: Float[np.ndarray, "n D"], labels: Int[np.ndarray, " n"], mesh: Any
) -> Examples:
  """Splits examples, which every process has, over the devices.

  Returns:
    Features, classes and weights: 1 for an example, 0 for padding.
  """
  devices = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
  missing = -len(labels) % devices
  sharding = parallel.batch_sharding(mesh)
  weights = np.ones(len(labels), np.float32)

  def one(x):
    x = np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return one(features), one(labels), one(weights)


def fit(
  examples: Examples,
  classes: int,
  c: float,
  max_steps: int = 1000,
  tolerance: float = 1e-5,
) -> Classifier:
  """Fits a kernel and a bias.

  The minimum of `sum_i cross-entropy_i + |kernel|^2 / (2 c)`, as
  scikit-learn's `LogisticRegression(C=c)` has it, in float32.

  Args:
    examples: of `put`.
    classes: how many there are.
    c: inverse strength of the penalty.
    max_steps: most steps of L-BFGS, as many as in CLIP's protocol.
    tolerance: the largest element of the mean loss's gradient to stop at, in
      units in which its Hessian has ones on the diagonal.
  """
  kernel, bias, *_ = _fit(*examples, c, tolerance, classes, max_steps)
  return kernel, bias


@jax.jit
def _share(classifier, x, labels, weights):
  kernel, bias = classifier
  best = jnp.argmax(jnp.dot(x, kernel, precision="highest") + bias, axis=-1)
  return weights @ (best == labels) / jnp.sum(weights)


def accuracy(classifier: Classifier, examples: Examples) -> float:
  """The share of examples whose most probable class is theirs."""
  return float(_share(classifier, *examples))


def search(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
  """CLIP's search for C: 7 values from 1e-6 to 1e6, then finer four times.

  Args:
    score: of a C; the higher the better.

  Returns:
    The best C, and the score of each that was tried. Of equal ones it is the
    middle one, which the protocol leaves open: at the ends the penalty is all,
    or nothing.
  """
  scores: dict[float, float] = {}

  def best():
    most = max(scores.values())
    equal = sorted(power for power, score in scores.items() if score == most)
    return equal[(len(equal) - 1) // 2]

  for power in _FIRST:
    scores[power] = score(10**power)
  distance = (_FIRST[1] - _FIRST[0]) / 2
  while distance >= _FINEST:
    middle = best()
    for power in (middle - distance, middle + distance):
      if _FIRST[0] <= power <= _FIRST[-1] and power not in scores:
        scores[power] = score(10**power)
    distance /= 2
  return 10 ** best(), {10**p: s for p, s in sorted(scores.items())}


def hold_out(
  count: int, share: float, seed: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
  """Places of the examples to fit on, and of those held out, drawn by a seed.

  Raises:
    ValueError: one of them would be empty.
  """
  held = round(count * share)
  if not 0 < held < count:
    raise ValueError(f"{share} of {count} examples cannot be held out.")
  order = np.random.default_rng(seed).permutation(count)
  return np.sort(order[held:]), np.sort(order[:held])
