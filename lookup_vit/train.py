r"""Trains a model by a config; running the same command again continues.

    python -m lookup_vit.train --config=configs/digits_lookup.py \
        --workdir=workdirs/digits_lookup

A config is Python, `configs/NAME.py`; its arguments stand behind a colon, as in
`configs/in1k_lookup_b.py:variant=S/16`, and its docstring says which there are.
The work directory gets checkpoints, metrics, results and pictures. SIGTERM
saves and leaves, to be continued.

Exit codes: 0 where training is done, 75 where it was told to stop and has saved
its state, 1 for an error.
"""

import collections
import datetime
import inspect
import itertools
import logging
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from lookup_vit import (
  checkpoints,
  cli,
  config_utils,
  datasets,
  descriptions,
  distributed,
  environment,
  input_pipeline,
  input_wait,
  metric_writer,
  model_init,
  parallel,
  startup,
  tokenizer,
  train_step,
)
from lookup_vit.analysis import summary
from lookup_vit.models import captioner, probe
from lookup_vit.preprocess import text_ops

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")

# Updates that may be under way on the devices: enough to keep them busy, few
# enough that a loss that is not finite is seen soon (and that many virtual CPU
# devices in one process do not deadlock).
_IN_FLIGHT = 8

# Metrics that are logged: their names for people, and how they are written.
_HEADLINES = {"top1": ("top-1", "{:.2%}"), "CIDEr": ("CIDEr", "{:.3f}")}

# Batches that the statistics of a probe's features are of.
_CALIBRATION = 16

# Share of the time that the devices wait for data from which on it is told.
_SLOW_INPUT = 0.1


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str
) -> train_step.TrainState:
  """Trains, evaluates, and writes all that a run leaves behind.

  Args:
    config: as `get_config()` of a config file returns it.
    workdir: the run's own directory; where it has checkpoints of the same
      config, training continues from the newest.

  Returns:
    The final train state.

  Raises:
    ValueError: config, data or work directory that cannot work, before any
      training.
    FloatingPointError: the loss is not finite; the last line of `metrics.jsonl`
      has `train/diverged`.
    SystemExit: of status `cli.PREEMPTED`, where the processes were told
      to stop; the state is saved.
  """
  clock = startup.Clock()
  # What can be wrong is found first.
  config = config_utils.resolve(config)
  words = _tokenizer(config, workdir)
  data = config.input.data
  with config_utils.at_fault("config.input"):
    sets = descriptions.mixture(data)
    num_examples = None
    if len(sets) == 1:
      num_examples = datasets.num_examples(sets[0][0])
    if config.num_classes is None:
      config.num_classes = datasets.num_classes(data)
  train_step.build_model(config)
  # Known from here on: to evaluate a run, its training data are not needed.
  total_steps = config_utils.total_steps(config, num_examples)
  config.total_steps, config.total_epochs = total_steps, None
  checkpoints.check_workdir(workdir, config)
  if words:
    tokenizer.check_workdir(workdir, words)
  program = train_step.Program(config, total_steps)
  check_classes(config, data, "config.input.data")
  evaluators = make_evaluators(program, config.evals)
  program.check_input(make_dataset(config, 0).element_spec, "config.input.pp")
  for _, _, pp in sets if words else ():
    with config_utils.at_fault("config.input.pp"):
      text_ops.check_tokenizer(pp or config.input.pp, words)

  # The state that training starts from.
  store = checkpoints.Checkpoints(
    workdir, config.ckpt_keep, config.ckpt_keep_every
  )
  state = restore_or_init(program, store)
  start = int(state.step)
  if start == 0 and isinstance(program.model, probe.Probe):
    state = calibrate(program, state)
  checkpoints.write_config(workdir, config)
  if classes := datasets.class_names(data):
    checkpoints.write_classes(workdir, classes)
  if words and jax.process_index() == 0:
    tokenizer.write(workdir, words)
  measured = metric_writer.names(workdir, start)
  writer = None
  if jax.process_index() == 0:
    writer = metric_writer.MetricWriter(workdir, start)
    environment.write(workdir, start)
  log.info(
    "%s: %s, %.2fM parameters, step %d to %d on %d %s device(s).",
    workdir,
    config.model_name,
    sum(x.size for x in jax.tree.leaves(state.params)) / 1e6,
    start,
    total_steps,
    jax.device_count(),
    jax.default_backend(),
  )

  # Training.
  wait = input_wait.InputWait()
  progress = Progress(program, writer, store, wait, clock, start, total_steps)
  batches = prefetch(make_dataset(config, start), program.mesh)
  saved = start
  try:
    due = due_after_restart(evaluators, start, total_steps, measured)
    metrics = evaluate(due, state, start, workdir, writer, measured)
    for step in range(start, total_steps):
      grid = train_step.draw_grid(program.grids, config.seed, step)
      with wait.fetching():
        batch = next(batches)
      state, scalars = program.update_step(state, batch, grid)
      wait.dispatched(scalars["loss"])
      progress.add(step + 1, grid, scalars)
      last = step + 1 == total_steps
      due = due_evaluators(evaluators, step + 1, last)
      save = last or (step + 1) % config.ckpt_steps == 0
      leave = distributed.preempted() and not last
      if not due and not save and not leave:
        continue
      progress.flush()  # Nothing is saved that is not finite.
      if save or leave:
        store.save(step + 1, state)
        saved = step + 1
      if leave:
        raise distributed.Preempted
      metrics = evaluate(due, state, step + 1, workdir, writer)
      progress.restart_clock(step + 1)
  except distributed.Preempted:
    step = int(state.step)
    if saved != step:  # In an evaluation.
      store.save(step, state)
    store.wait()
    log.info("Told to stop: saved step %d, to continue there.", step)
    sys.exit(cli.PREEMPTED)
  finally:
    wait.close()
    store.close()
    if writer:
      writer.close()

  # What it leaves for people.
  weights = state.params if state.ema is None else state.ema
  weights = parallel.gather(weights, program.mesh)
  if writer:
    summary.write(workdir, program, metrics, weights, _images(evaluators))
  return state


def make_dataset(
  config: ml_collections.ConfigDict, start_step: int
) -> input_pipeline.Batches:
  """This process's training batches, from a step on.

  Raises:
    ValueError: data or preprocessing that cannot work.
  """
  with config_utils.at_fault("config.input"):
    return input_pipeline.make_train(
      config.input.data,
      pp=config.input.pp,
      batch_size=config.input.batch_size,
      seed=config.seed,
      start_step=start_step,
      shuffle_buffer_size=config.input.shuffle_buffer_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )


def _tokenizer(config, workdir):
  """That of a config; says where a copy is, if the file itself is gone."""
  try:
    return tokenizer.of_config(config)
  except ValueError as e:
    copy = epath.Path(tokenizer.of_workdir(workdir))
    if epath.Path(config.tokenizer).expanduser().exists() or not copy.exists():
      raise
    raise ValueError(
      f"{e} The work directory has a copy, {copy}: put that in its place."
    ) from None


def check_classes(
  config: ml_collections.ConfigDict, data: Any, field: str
) -> None:
  """Raises ValueError where a data set has other classes than the config."""
  classes = datasets.num_classes(data)
  if classes is not None and classes != config.num_classes:
    raise ValueError(
      f"{field} has {classes} classes, config.num_classes is "
      f"{config.num_classes}."
    )


def restore_or_init(
  program: train_step.Program, store: checkpoints.Checkpoints
) -> train_step.TrainState:
  """The newest checkpoint's state, or that before step 0.

  Raises:
    ValueError: the checkpoint is damaged, or `config.model_init` does not fit.
  """
  steps = store.steps()
  if steps:
    log.info("Continuing from step %d.", steps[-1])
    return store.restore(
      steps[-1], program.state_shapes, program.state_shardings
    )
  state = program.init_state()
  config = program.config
  if config.model_init is None:
    if getattr(program.model, "frozen", False):
      log.warning(
        "config.model_init is not set: the encoder is random, and as it is "
        "frozen it stays so."
      )
    return state
  model = getattr(program.model, "encoder", program.model)
  # What published weights are of is known to people alone.
  is_run = not model_init.is_file(config.model_init)
  if getattr(program.model, "frozen", False) and is_run:
    check_encoder(config.model_init, model)
  params = model_init.init_from(
    config.model_init,
    parallel.gather(state.params, program.mesh),
    model,
    config.input.image_size,
    sharding=parallel.replicated(program.mesh),
    inflate=config.model_init_inflation,
    mapping=config.model_init_mapping.to_dict(),
  )
  return program.init_state(params)


def calibrate(
  program: train_step.Program, state: train_step.TrainState
) -> train_step.TrainState:
  """A probe's state, with the statistics of features of training batches."""

  def moments(params, batch, grid):
    _, out = program.apply(params, batch, grid)
    return probe.moments(out["features"])

  moments = program.compile(
    moments, parallel.replicated(program.mesh), static_argnums=2
  )
  batches = prefetch(make_dataset(program.config, 0), program.mesh)
  each = [
    moments(state.params, batch, program.grids[i % len(program.grids)])
    for i, batch in enumerate(itertools.islice(batches, _CALIBRATION))
  ]
  return program.init_state(probe.calibrated(state.params, each))


def check_encoder(spec: str, encoder: Any) -> None:
  """Checks that a frozen encoder computes what it was trained to.

  Args:
    spec: `config.model_init`.
    encoder: the captioner's.

  Raises:
    ValueError: fields of the model differ from those of the run that it starts
      from; they are listed. Or there is no such run.
  """
  with config_utils.at_fault(f"config.model_init={spec!r}"):
    trained = train_step.build_model(model_init.read_config(spec))
    trained = getattr(trained, "encoder", trained)
    wrong = captioner.differences(encoder, trained)
    if wrong:
      raise ValueError(f"the frozen encoder has {'; '.join(wrong)}.")


def make_evaluators(
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
    make = train_step.import_part(
      "evaluators", fields.pop("type", None), "Evaluator", f"{where}.type"
    )
    log_steps = fields.pop("log_steps", None)
    if log_steps is not None and not (
      isinstance(log_steps, int) and log_steps > 0
    ):
      raise ValueError(f"{where}.log_steps={log_steps!r}: want an integer > 0.")
    try:
      inspect.signature(make).bind(program, name, **fields)
    except TypeError as e:
      raise ValueError(f"{where}: {e}.") from e
    with config_utils.at_fault(where):
      evaluator = make(program, name, **fields)
    evaluators[name] = (evaluator, log_steps)
  return evaluators


def due_evaluators(
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
    for name, evaluator in due_evaluators(evaluators, start, last).items()
    if last or not any(other.startswith(f"{name}/") for other in measured)
  }


def evaluate(
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


def prefetch(
  batches: Iterable[Any], mesh: Any, ahead: int = 2
) -> Iterator[Any]:
  """Puts batches on the devices, some ahead of their use."""
  queue = collections.deque()
  for batch in batches:
    queue.append(parallel.put_batch(batch, mesh))
    if len(queue) > ahead:
      yield queue.popleft()
  yield from queue


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
    while len(self.pending) > _IN_FLIGHT:
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


def _images(evaluators, count=4):
  """A few images of the first evaluator that has some; a view of each."""
  for name in config_utils.evals_in_order(evaluators):
    evaluator, _ = evaluators[name]
    for batch in itertools.islice(evaluator.batches(), 1):
      images = batch["image"][:count]
      return images if evaluator.views == 1 else images[:, 0]
  return None


def main(argv):
  """Trains by the flags."""
  del argv
  distributed.initialize_by_flags(stops=True)
  cli.log_overrides()
  startup.keep_programs()
  parallel.lay_out_by_flags(FLAGS.config)
  train_and_evaluate(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "What to train: configs/NAME.py[:key=value,...]."
  )
  flags.DEFINE_string(
    "workdir", None, "Directory of the run, also gs://...; continued if there."
  )
  flags.mark_flags_as_required(["config", "workdir"])
  distributed.define_flags()
  parallel.define_flags()
  cli.run(main)
