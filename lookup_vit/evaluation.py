"""A config's evaluators: made, due, and run while a model trains."""

import inspect
import logging
from collections.abc import Collection
from typing import Any

import ml_collections

from lookup_vit import config_utils, distributed, metric_writer, train_step

log = logging.getLogger("lookup_vit")

# Metrics that are logged: their names for people, and how they are written.
_HEADLINES = {"top1": ("top-1", "{:.2%}"), "CIDEr": ("CIDEr", "{:.3f}")}


def make(
  program: train_step.Program, evals: ml_collections.ConfigDict
) -> dict[str, tuple[Any, int | None]]:
  """Evaluators by name, each with its `log_steps` (None: at the end only).

  Raises:
    ValueError: an unknown type or field, or one that cannot work.
  """
  evaluators = {}
  for name, fields in evals.items():
    fields = fields.to_dict()
    where = f"config.evals.{name}"
    evaluator = train_step.import_part(
      "evaluators", fields.pop("type", None), "Evaluator", f"{where}.type"
    )
    log_steps = fields.pop("log_steps", None)
    if log_steps is not None and not (
      isinstance(log_steps, int) and log_steps > 0
    ):
      raise ValueError(f"{where}.log_steps={log_steps!r}: want an integer > 0.")
    try:
      inspect.signature(evaluator).bind(program, name, **fields)
    except TypeError as e:
      raise ValueError(f"{where}: {e}.") from e
    with config_utils.at_fault(where):
      evaluators[name] = evaluator(program, name, **fields), log_steps
  return evaluators


def due(
  evaluators: dict[str, tuple[Any, int | None]], step: int, last: bool
) -> dict[str, Any]:
  """The evaluators whose turn it is after a step: all of them at the end."""
  return {
    name: evaluator
    for name, (evaluator, log_steps) in evaluators.items()
    if last or (log_steps and step % log_steps == 0)
  }


def due_after_restart(
  evaluators: dict[str, Any],
  start: int,
  total_steps: int,
  measured: Collection[str],
) -> dict[str, Any]:
  """The evaluators to run before training goes on.

  A run may have ended between saving and evaluating; and a finished one shows
  its results again.
  """
  last = start == total_steps
  if not start:
    return {}
  return {
    name: evaluator
    for name, evaluator in due(evaluators, start, last).items()
    if last or not any(other.startswith(f"{name}/") for other in measured)
  }


def run(
  evaluators: dict[str, Any],
  state: train_step.TrainState,
  step: int,
  workdir: str,
  writer: metric_writer.MetricWriter | None,
  measured: Collection[str] = (),
) -> dict[str, float]:
  """Runs evaluators, on the Polyak average where there is one.

  Args:
    evaluators: by name.
    state: what to evaluate.
    step: of the state.
    workdir: where evaluators may leave files.
    writer: None on processes that do not write.
    measured: names of metrics of this step that were written before.

  Returns:
    The metrics by name.

  Raises:
    Preempted: the processes were told to stop.
  """
  params = state.params if state.ema is None else state.ema
  metrics = {}
  for evaluator in evaluators.values():
    found = dict(evaluator.run(params, distributed.check, workdir))
    for metric, (title, text) in _HEADLINES.items():
      values = [
        f"{k.removesuffix(f'/{metric}')} {text.format(v)}"
        for k, v in found.items()
        if k.endswith(f"/{metric}")
      ]
      if values:
        log.info("step %d  %s: %s", step, title, ", ".join(values))
    metrics.update(found)
  new = {k: v for k, v in metrics.items() if k not in measured}
  if new and writer:
    writer.write(step, new)
  return metrics
