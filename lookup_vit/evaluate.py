r"""Reloads a work directory's checkpoint and repeats its evaluation.

python -m lookup_vit.evaluate --workdir=workdirs/digits_lookup
"""

import json
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from lookup_vit import (
  checkpoints,
  cli,
  config_utils,
  distributed,
  parallel,
  tokenizer,
  train,
  train_step,
)
from lookup_vit.analysis import accuracy_vs_flops, summary

FLAGS = flags.FLAGS


def evaluate(
  workdir: str,
  step: int | None = None,
  batch_size: int | None = None,
  lay_out: Callable[[Any], None] = lambda config: None,
) -> list[dict[str, Any]]:
  """Runs the evaluators of a work directory's config on a checkpoint.

  Args:
    workdir: of a training run.
    step: of a checkpoint; the newest where none is given.
    batch_size: global; that of the config where none is given.
    lay_out: sets `mesh` and `sharding` of the config; by default parameters are
      whole on every device, and batches are split over all of them.

  Returns:
    The rows of results (see `analysis.summary.results`), which are written to
    `evaluation_STEP.json` too.

  Raises:
    ValueError: no work directory, no such checkpoint, a damaged one, no
      evaluator in the config, or another tokenizer than that of the training.
  """
  config = config_utils.read_workdir(workdir)
  if not config.evals:
    raise ValueError(f"The config of {workdir} names no evaluators.")
  # The devices that are here, not those of the training.
  config.mesh, config.sharding = [("data", -1)], "replicated"
  lay_out(config)
  if batch_size is not None:
    # What only an update would need of a batch is not asked of this one.
    config.grad_accum_steps = 1
    config.mixup.p = config.cutmix.p = 0.0
    config.input.batch_size = batch_size
    for evaluator in config.evals.values():
      evaluator.batch_size = batch_size
  if config.tokenizer is not None:
    config.tokenizer = tokenizer.of_workdir(workdir)
    tokenizer.of_config(config)
  program = train_step.Program(config, config.total_steps)
  evaluators = train.make_evaluators(program, config.evals)
  params, step, _ = checkpoints.load_params(
    workdir, step, program.state_shardings.params
  )
  metrics = {}
  for evaluator, _ in evaluators.values():
    metrics.update(evaluator.run(params, workdir=workdir))
  rows = summary.results(program, metrics)
  if jax.process_index() != 0:
    return rows
  path = config_utils.workdir_path(workdir) / f"evaluation_{step}.json"
  path.write_text(json.dumps(rows, indent=2))
  return rows


def main(argv):
  """Evaluates by the flags and prints the table."""
  del argv
  distributed.initialize_by_flags()
  lay_out = parallel.lay_out_by_flags
  rows = evaluate(FLAGS.workdir, FLAGS.step, FLAGS.batch_size, lay_out)
  if jax.process_index() == 0:
    print(accuracy_vs_flops.table(rows))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Of a training run.", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
  flags.DEFINE_integer("batch_size", None, "The config's if not set.")
  distributed.define_flags()
  parallel.define_flags()
  cli.run(main)
