"""Changes to a config that does not fit into memory."""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

from lookup_vit.analysis import steps

log = logging.getLogger("lookup_vit")

Change = dict[str, Any]


def ladders(config: Any, devices: int, kind: str) -> Iterator[list[Change]]:
  """Changes that save memory, in lists of ever stronger ones.

  Args:
    config: prepared.
    devices: how many there are.
    kind: of the step that does not fit, "train" or "evaluation".

  Yields:
    Lists of dicts of config fields, such as `model.remat_policy`, and values.
  """
  axes = dict(map(tuple, config.mesh))
  tensor = max(axes.get("tensor", 1), 1)
  split = "fsdp_tensor" if "tensor" in config.sharding else "fsdp"
  now = axes.get("fsdp", 1) if "fsdp" in config.sharding else 1

  def mesh(n):
    rest = [("tensor", tensor)] if tensor > 1 else []
    return {"mesh": [("data", -1), ("fsdp", n), *rest], "sharding": split}

  sizes = [2**i for i in range(1, 14) if devices // tensor % 2**i == 0]
  fsdp = [mesh(n) for n in sizes if n > now > 0]
  if kind == "evaluation":
    batch, _ = steps.batch_shape(config, kind)
    yield [
      {f"evals.{name}.batch_size": batch // n for name in config.evals}
      for n in (2, 4, 8)
      if config.evals and batch % n == 0
    ]
    yield fsdp
    return
  policies = ["dots_with_no_batch_dims_saveable", "nothing_saveable"]
  policy = config.model.get("remat_policy", "none")
  if policy in policies:
    policies = policies[policies.index(policy) + 1 :]
  remat = [{"model.remat_policy": p} for p in policies]
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


def find_change(
  config: Any,
  devices: int,
  kind: str,
  fits: Callable[[Any, bool], bool],
) -> Change | None:
  """The first change of `ladders` that makes a config fit, or None.

  Args:
    config: prepared.
    devices: how many there are.
    kind: of the step that does not fit.
    fits: called as `fits(config, quick)`: whether a config does, quickly or for
      certain; ValueError where it does not work at all.
  """

  def works(change, quick):
    log.info(
      "%s %s", "Trying" if quick else "Checking", "; ".join(as_lines(change))
    )
    try:
      return fits(changed(config, change), quick)
    except ValueError as e:
      log.info("That cannot be: %s", e)
      return None

  for ladder in ladders(config, devices, kind):
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
