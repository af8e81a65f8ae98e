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
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator
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
  evaluation,
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
from lookup_vit.progress import Progress

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")

# Batches that the statistics of a probe's features are of.
_CALIBRATION = 16


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
  evaluators = evaluation.make(program, config.evals)
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
    due = evaluation.due_after_restart(evaluators, start, total_steps, measured)
    metrics = evaluation.run(due, state, start, workdir, writer, measured)
    for step in range(start, total_steps):
      grid = train_step.draw_grid(program.grids, config.seed, step)
      with wait.fetching():
        batch = next(batches)
      state, scalars = program.update_step(state, batch, grid)
      wait.dispatched(scalars["loss"])
      progress.add(step + 1, grid, scalars)
      last = step + 1 == total_steps
      due = evaluation.due(evaluators, step + 1, last)
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
      metrics = evaluation.run(due, state, step + 1, workdir, writer)
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
