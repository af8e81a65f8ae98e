"""Optimizer and learning-rate schedule from a config, on optax.

Conventions are big_vision's: the schedule is a factor in [0, 1] on both the
learning rate and the weight decay, and weight decay is decoupled from `lr`: an
update is `-schedule(step) * (lr * lr_mult * u + wd * wd_mult * param)`. So
`lr=1e-3, wd=1e-4` is AdamW's `lr=1e-3, weight_decay=0.1` elsewhere.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import traverse_util

Schedule = Callable[[Any], Any]


def make(
  config: ml_collections.ConfigDict,
  params: Any,
  total_steps: int,
  frozen: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, Schedule]:
  """The optimizer, and its learning rate as a function of the step.

  Args:
    config: `optax_name` ("adamw", "adafactor", "sgd", "lars"), `optax` (that
      optimizer's options), `lr`, `wd`, `schedule`, `grad_clip_norm`, and lists
      of (regex of a parameter's path, factor): `lr_mults`, `wd_mults`; and
      `frozen`, regexes of what is not trained. The first regex to match counts;
      without a match, the learning rate's factor is 1 and weight decay's is 0.
    params: the parameters or their shapes.
    total_steps: length of the training.
    frozen: regexes of what is not trained beside `config.frozen`.

  Raises:
    ValueError: an unknown optimizer, option or schedule, or a regex that
      matches nothing.
  """
  schedule = make_schedule(
    config.schedule, config.input.batch_size, total_steps
  )
  lr_mults = by_path(config.lr_mults, params, 1.0, "lr_mults")
  wd_mults = by_path(config.wd_mults, params, 0.0, "wd_mults")

  def scale_and_decay(updates, params):
    return jax.tree.map(
      lambda u, p, lr, wd: config.lr * lr * u + config.wd * wd * p,
      updates,
      params,
      _like(params, lr_mults),
      _like(params, wd_mults),
    )

  steps = []
  if config.grad_clip_norm is not None:
    steps.append(optax.clip_by_global_norm(config.grad_clip_norm))
  steps += [
    _rule(config.optax_name, config.optax),
    optax.stateless(scale_and_decay),
    optax.scale_by_schedule(lambda step: -schedule(step)),
  ]
  tx = optax.chain(*steps)
  labels = trainable(config, params, frozen)
  if not any(jax.tree.leaves(labels)):
    raise ValueError(f"config.frozen={list(config.frozen)} leaves nothing.")
  if not all(jax.tree.leaves(labels)):
    # No state and no update for what is frozen.
    names = jax.tree.map(lambda t: "trained" if t else "frozen", labels)
    tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, names)
  return tx, lambda step: config.lr * schedule(step)


def trainable(
  config: ml_collections.ConfigDict, params: Any, frozen: Sequence[str] = ()
) -> Any:
  """A tree of booleans: False where a regex matches the path.

  Regexes are those of `config.frozen`, and of `frozen`.
  """
  rules = [(regex, True) for regex in (*config.frozen, *frozen)]
  found = by_path(rules, params, False, "frozen")
  return jax.tree.map(lambda f: not f, found)


def paths(params: Any) -> list[str]:
  """Paths of the parameters, "encoderblock_0/mlp/dense_in/kernel"."""
  return list(traverse_util.flatten_dict(params, sep="/"))


def by_path(
  rules: list[tuple[str, Any]], params: Any, default: Any, field: str
) -> Any:
  """A tree like `params` with the value of the first regex to match a path.

  Raises:
    ValueError: a regex is malformed, or no path matches it.
  """
  names = paths(params)
  compiled = []
  for pattern, value in rules:
    try:
      regex = re.compile(pattern)
    except re.error as e:
      raise ValueError(
        f"config.{field}: {pattern!r} is no regex: {e}."
      ) from None
    if not any(regex.fullmatch(n) for n in names):
      raise ValueError(
        f"config.{field}: {pattern!r} matches no parameter; there are "
        f"{', '.join(names[:4])}, ..."
      )
    compiled.append((regex, value))

  def pick(name):
    return next((v for r, v in compiled if r.fullmatch(name)), default)

  return traverse_util.unflatten_dict({n: pick(n) for n in names}, sep="/")


def _like(params, values):
  # Where parameters are frozen, optax masks them out of the tree it passes.
  return jax.tree.map(
    lambda p, v: v if not isinstance(p, optax.MaskedNode) else p,
    params,
    values,
    is_leaf=lambda p: isinstance(p, optax.MaskedNode),
  )


def _rule(name, options):
  """The optimizer's direction, before learning rate and weight decay."""
  options = dict(options)
  rules: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adafactor": _scale_by_adafactor,
    "sgd": _scale_by_momentum,
    "lars": _scale_by_lars,
  }
  if name not in rules:
    raise ValueError(
      f"config.optax_name={name!r}: want one of {', '.join(rules)}."
    )
  try:
    return rules[name](**options)
  except TypeError as e:
    raise ValueError(f"config.optax={options} of {name}: {e}.") from None


def _scale_by_momentum(momentum=0.9, nesterov=False, dtype="float32"):
  return optax.trace(momentum, nesterov, accumulator_dtype=dtype)


def _scale_by_lars(momentum=0.9, trust_coefficient=1e-3):
  """LARS (arXiv:1708.03888), of matrices alone, as in MAE's linear probe.

  Without its weight decay, which is not decoupled.
  """
  ratio = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
  matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
  return optax.chain(optax.masked(ratio, matrices), optax.trace(momentum))


def _scale_by_adafactor(
  min_dim_size_to_factor=32,
  decay_rate=0.8,
  beta2_cap=0.999,
  clipping_threshold=None,
  momentum=0.9,
  dtype_momentum="bfloat16",
  eps=1e-30,
):
  """Adafactor as modified in Scaling ViT (arXiv:2106.04560)."""
  steps = [
    optax.scale_by_factored_rms(
      decay_rate=decay_rate,
      min_dim_size_to_factor=min_dim_size_to_factor,
      epsilon=eps,
      decay_rate_fn=lambda step, rate: jnp.minimum(
        beta2_cap, 1 - (step + 1.0) ** -rate
      ),
    )
  ]
  if clipping_threshold:
    steps.append(optax.clip_by_block_rms(clipping_threshold))
  if momentum:
    steps.append(
      optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum)
    )
  return optax.chain(*steps)


def make_schedule(
  options: Mapping[str, Any], batch_size: int, total_steps: int
) -> Schedule:
  """A factor in [0, 1] as a function of the step.

  Args:
    options: `decay_type` "cosine" (default), "linear" (to `linear_end`),
      "rsqrt" (with `timescale`) or "constant"; `warmup_steps`,
      `warmup_percent` (a share of the steps, 0.05 for a twentieth) or
      `warmup_examples`; `cooldown_steps`,
      a linear descent to zero at the end.
    batch_size: of a step.
    total_steps: length of the training.

  Raises:
    ValueError: an unknown option or decay, or a warm-up and cooldown longer
      than the training.
  """
  known = [
    "decay_type",
    "warmup_steps",
    "warmup_percent",
    "warmup_examples",
    "cooldown_steps",
    "timescale",
    "linear_end",
  ]
  unknown = set(options) - set(known)
  if unknown:
    raise ValueError(
      f"config.schedule has no {sorted(unknown)}; it has {', '.join(known)}."
    )
  for name in set(options) - {"decay_type"}:
    value = options[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise ValueError(f"config.schedule.{name}={value!r}: want a number.")
  if sum(name.startswith("warmup_") for name in options) > 1:
    raise ValueError(f"config.schedule={dict(options)}: want one warmup_*.")
  get = dict(options).get
  kind = get("decay_type", "cosine")
  warmup = get("warmup_steps", 0)
  if "warmup_percent" in options:
    share = get("warmup_percent")
    if not 0 <= share <= 1:
      raise ValueError(
        f"config.schedule.warmup_percent={share}: want a share in [0, 1]."
      )
    warmup = round(share * total_steps)
  if "warmup_examples" in options:
    warmup = round(get("warmup_examples") / batch_size)
  cooldown = get("cooldown_steps", 0)
  timescale = get("timescale", 10_000)
  if min(warmup, cooldown) < 0 or timescale <= 0:
    raise ValueError(
      f"config.schedule={dict(options)}: warm-up and cooldown cannot be "
      "negative, and timescale is more than 0."
    )
  if warmup + cooldown > total_steps:
    raise ValueError(
      f"config.schedule: a warm-up of {warmup} and a cooldown of {cooldown} "
      f"steps are longer than the training of {total_steps}."
    )
  decay_steps = max(1, total_steps - warmup)
  if kind == "cosine":
    decay = optax.cosine_decay_schedule(1.0, decay_steps)
  elif kind == "linear":
    decay = optax.linear_schedule(1.0, get("linear_end", 0.0), decay_steps)
  elif kind == "rsqrt":
    decay = lambda step: jax.lax.rsqrt(1.0 + step / timescale)  # noqa: E731
  elif kind == "constant":
    decay = optax.constant_schedule(1.0)
  else:
    raise ValueError(
      f"config.schedule.decay_type={kind!r}: want cosine, linear, rsqrt or "
      "constant."
    )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    factor = decay(jnp.maximum(0.0, step - warmup))
    if warmup:
      factor *= jnp.minimum(1.0, step / warmup)
    if cooldown:
      factor *= jnp.minimum(1.0, (total_steps - step) / cooldown)
    return factor

  return schedule
