"""Changes to a config that does not fit into memory."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

log = logging.getLogger("lookup_vit")

Change = dict[str, Any]

# By how much a guess may be above what a step wants: 1.12 was seen.
_SLACK = 1.25


def ladders(config: Any, axes: Mapping[str, int], kind: str) -> Iterator[list]:
  """Changes that save memory, in lists of ever stronger ones.

  Args:
    config: prepared.
    axes: sizes of the mesh's axes by name, as they are.
    kind: of the step that does not fit, "train" or "evaluation".

  Yields:
    Lists of dicts of config fields, such as `model.remat_policy`, and values.
  """
  tensor = axes["tensor"]
  splits = axes["data"] * axes["fsdp"]
  sharding = "fsdp_tensor" if "tensor" in config.sharding else "fsdp"
  now = axes["fsdp"] if "fsdp" in config.sharding else 1

  def mesh(n):
    rest = [("tensor", tensor)] if tensor > 1 else []
    return {"mesh": [("data", -1), ("fsdp", n), *rest], "sharding": sharding}

  fsdp = [mesh(n) for n in range(now + 1, splits + 1) if _is_power(n, splits)]
  if kind == "evaluation":
    default = config.input.batch_size
    sizes = {
      name: fields.get("batch_size") or default
      for name, fields in config.evals.items()
    }
    largest = max(sizes.values(), default=default)
    yield [
      {
        f"evals.{name}.batch_size": min(size, largest // n)
        for name, size in sizes.items()
        if size > largest // n
      }
      for n in (2, 4, 8)
      if sizes and largest % n == 0
    ]
    yield fsdp
    return
  policies = ["dots_with_no_batch_dims_saveable", "nothing_saveable"]
  model, field = config.model, "model.remat_policy"
  if "encoder" in model:  # Nothing is kept of one that is frozen, the default.
    policies = [] if model.get("frozen", True) else policies
    model, field = model.encoder, "model.encoder.remat_policy"
  policy = model.get("remat_policy", "none")
  if policy in policies:
    policies = policies[policies.index(policy) + 1 :]
  remat = [{field: p} for p in policies]
  parts = [n * config.grad_accum_steps for n in (2, 4, 8)]
  accum = [
    {"grad_accum_steps": n} for n in parts if config.input.batch_size % n == 0
  ]
  yield remat
  yield fsdp
  yield accum
  most = remat[-1] if remat else {}
  if most:
    yield [{**most, **f} for f in fsdp]
    yield [{**most, **a} for a in accum]
  if fsdp:
    yield [{**most, **fsdp[-1], **a} for a in accum]


def _is_power(n, multiple):
  """Whether n is a power of two that divides a number."""
  return n & (n - 1) == 0 and multiple % n == 0


def find_change(
  config: Any,
  axes: Mapping[str, int],
  kinds: Sequence[str],
  memory: Callable[[Any, str, bool], float],
  room: float,
) -> Change | None:
  """The first change of `ladders` that makes a config fit, or None.

  Where several kinds of steps do not fit, each has a change of its own, upon
  that of the one before.

  Args:
    config: prepared.
    axes: sizes of the mesh's axes by name.
    kinds: of the steps that do not fit.
    memory: called as `memory(config, kind, quick)`: bytes that a step wants, at
      a guess or for certain; ValueError where the config does not work at all.
    room: bytes that there are.
  """
  found = {}
  for kind in kinds:
    now = changed(config, found)
    if found and memory(now, kind, False) <= room:
      continue  # What one wanted helps the other too.
    change = _first(now, ladders(now, axes, kind), kind, memory, room)
    if change is None:
      return None
    found |= change
    if "mesh" in change:
      size = dict(change["mesh"])["fsdp"]
      splits = axes["data"] * axes["fsdp"]
      axes = {**axes, "fsdp": size, "data": splits // size}
  return found


def _first(config, choices, kind, memory, room):

  def works(change, quick):
    """None where it cannot be."""
    log.info(
      "%s %s", "Trying" if quick else "Checking", "; ".join(as_lines(change))
    )
    limit = room * _SLACK if quick else room
    try:
      return memory(changed(config, change), kind, quick) <= limit
    except ValueError as e:
      log.info("That cannot be: %s", e)
      return None

  for ladder in choices:
    # Where the strongest that can be is too weak, so are the others.
    verdict = None
    while ladder and verdict is None:
      *ladder, strongest = ladder
      verdict = works(strongest, True)
    if not verdict:
      continue
    for change in (*ladder, strongest):
      promising = change is strongest or works(change, True)
      if promising and works(change, False):
        return change
  return None


def changed(config: Any, change: Change) -> Any:
  """A copy of a config with a change made."""
  config = copy.deepcopy(config)
  for field, value in change.items():
    *parents, last = field.split(".")
    target = config
    for parent in parents:
      target = target[parent]
    with target.unlocked(), target.ignore_type():
      target[last] = value
  return config


def as_lines(change: Change) -> list[str]:
  """A change as lines of a config file."""
  return [f"config.{field} = {value!r}" for field, value in change.items()]
