"""What is seen of a training while it runs, and what ends it."""

import collections
import datetime
import logging
import time
from typing import Any

import jax

from lookup_vit import (
  checkpoints,
  config_utils,
  input_wait,
  metric_writer,
  startup,
  train_step,
)

log = logging.getLogger("lookup_vit")

# Updates that may be under way on the devices: enough to keep them busy, few
# enough that a loss that is not finite is seen soon (and that many virtual CPU
# devices in one process do not deadlock).
IN_FLIGHT = 8

# Share of the time that the devices wait for data from which on it is told.
_SLOW_INPUT = 0.1


class Progress:
  """Follows the updates: logs, writes metrics, stops where one is not finite.

  Args:
    program: what is trained.
    writer: None on processes that do not write.
    store: where the last good checkpoint is.
    wait: what the devices waited for data.
    clock: of the start.
    step: of the state that training starts from.
    total_steps: length of the training.
  """

  def __init__(
    self,
    program: train_step.Program,
    writer: metric_writer.MetricWriter | None,
    store: checkpoints.Checkpoints,
    wait: input_wait.InputWait,
    clock: startup.Clock,
    step: int,
    total_steps: int,
  ):
    self.config = program.config
    self.writer = writer
    self.store = store
    self.wait = wait
    self.clock = clock
    self.total_steps = total_steps
    self.pending = collections.deque()
    self.start = step
    self.restart_clock(step)

  def restart_clock(self, step: int) -> None:
    """Leaves out of the rate what was done since the last update."""
    self.since = (step, time.monotonic(), self.wait.seconds)

  def add(self, step: int, grid: Any, scalars: dict[str, jax.Array]) -> None:
    """Notes an update that was started; looks at those long started."""
    if step == self.start + 1:
      jax.block_until_ready(scalars)
      self.clock.report()
    self.pending.append((step, grid, scalars))
    while len(self.pending) > IN_FLIGHT:
      self._look(*self.pending.popleft())

  def flush(self) -> None:
    """Waits for the updates that were started and looks at them."""
    while self.pending:
      self._look(*self.pending.popleft())

  def _look(self, step, grid, scalars):
    if not scalars["finite"]:
      self.store.wait()
      steps = self.store.steps()
      last = f"step {steps[-1]} in {self.store.path}" if steps else "none"
      values = {k: float(scalars[k]) for k in ("loss", "grad_norm", "lr")}
      if self.writer:
        text = ", ".join(f"{k} {v:g}" for k, v in values.items())
        self.writer.write(step, {"train/diverged": text})
      raise FloatingPointError(
        f"Update {step} is not finite ({values}, grid {grid}). The last good "
        f"checkpoint: {last}. Lower config.lr, clip gradients "
        "(config.grad_clip_norm) or set config.model.qk_norm, in a new work "
        "directory."
      )
    every = self.config.log_training_steps
    if step % every and step not in (1, self.total_steps):
      return
    scalars = jax.device_get(scalars)
    values = {
      f"train/{k}": float(v) for k, v in scalars.items() if k != "finite"
    }
    if grid is not None:
      values["train/grid"] = config_utils.format_grid(grid)
    parts = [
      f"step {step}/{self.total_steps} ({step / self.total_steps:.0%})",
      f"loss {values['train/loss']:.4f}",
    ]
    if grid is not None:
      parts.append(values["train/grid"])
    then, clock, waited = self.since
    seconds = time.monotonic() - clock
    values["train/input_wait"] = (self.wait.seconds - waited) / seconds
    if step > self.start + 1:  # The first step's time is that of compiling.
      rate = (step - then) / seconds
      values["train/images_per_second"] = rate * self.config.input.batch_size
      parts.append(f"{values['train/images_per_second']:.0f} images/s")
      left = round((self.total_steps - step) / rate)
      parts.append(f"ETA {datetime.timedelta(seconds=left)}")
      if values["train/input_wait"] > _SLOW_INPUT:
        parts.append(f"waits for data {values['train/input_wait']:.0%}")
    self.restart_clock(step)
    log.info("  ".join(parts))
    if self.writer:
      self.writer.write(step, values)
