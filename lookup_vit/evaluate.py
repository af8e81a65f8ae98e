r"""Evaluates a work directory's checkpoint, as in training or otherwise.

    python -m lookup_vit.evaluate --workdir=workdirs/digits_lookup
    python -m lookup_vit.evaluate --workdir=workdirs/digits_lookup \
        --evals=test,linear_probe,few_shot,knn --grid=3x3,4x4

`--evals` lists what to run: evaluators of the run's config by their names;
types (files of `lookup_vit/evaluators`), on the data of the config's evaluator
`val` or else `test`, with the fields that they have by default; or
`FILE.py[:ARGS]`, whose `get_config` returns evaluators by name, as
`config.evals` has them. The flag may be given several times.
"""

import json
import logging
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags

from lookup_vit import (
  checkpoints,
  cli,
  config_utils,
  distributed,
  evaluation,
  evaluators,
  parallel,
  startup,
  tokenizer,
  train_step,
)
from lookup_vit.analysis import accuracy_vs_flops, summary

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")

# What evaluators share, and no evaluator itself.
_PARTS = ("features", "shared")


def evaluate(
  workdir: str,
  step: int | None = None,
  batch_size: int | None = None,
  lay_out: Callable[[Any], None] = lambda config: None,
  evals: Sequence[str] = (),
  grids: Sequence[tuple[int, ...]] = (),
) -> list[dict[str, Any]]:
  """Runs evaluators on a work directory's checkpoint.

  Args:
    workdir: of a training run.
    step: of a checkpoint; the newest where none is given.
    batch_size: global; that of the config where none is given.
    lay_out: sets `mesh` and `sharding` of the config; by default parameters are
      whole on every device, and batches are split over all of them.
    evals: what to run, see above; all evaluators of the config if empty.
    grids: compressed grids; those of each evaluator if empty.

  Returns:
    The rows of results (see `analysis.summary.results`). Those of
    each evaluator are written to `evaluation_STEP.json` when it is done, over
    those of the same names and grids there.

  Raises:
    ValueError: no work directory, no such checkpoint, a damaged one, no
      such evaluator or grid, another tokenizer than that of the training, or
      damaged results of an earlier evaluation.
  """
  config = config_utils.read_workdir(workdir)
  checkpoints.check(workdir, step)
  if not config.evals and not evals:
    raise ValueError(f"The config of {workdir} names no evaluators.")
  config.evals = choose(config, evals)
  # The devices that are here, not those of the training.
  config.mesh, config.sharding = [("data", -1)], "replicated"
  lay_out(config)
  # What only an update would need of a batch is not asked of this one.
  config.grad_accum_steps = 1
  config.mixup.p = config.cutmix.p = 0.0
  if batch_size is not None:
    config.input.batch_size = batch_size
    for evaluator in config.evals.values():
      evaluator.batch_size = batch_size
  if config.tokenizer is not None:
    config.tokenizer = tokenizer.of_workdir(workdir)
    tokenizer.of_config(config)
  program = train_step.Program(config, config.total_steps)
  if grids:
    _set_grids(program, grids)
  chosen = evaluation.make(program, config.evals)
  params, step, _ = checkpoints.load_params(
    workdir, step, program.state_shardings.params
  )
  path = config_utils.workdir_path(workdir) / f"evaluation_{step}.json"
  kept = config_utils.read_json(path) if path.exists() else []
  rows = []
  for evaluator, _ in chosen.values():
    metrics = dict(evaluator.run(params, workdir=workdir))
    found = summary.results(program, metrics)
    rows += found
    new = {(row["split"], row["grid"]) for row in found}
    kept = [row for row in kept if (row["split"], row["grid"]) not in new]
    kept += found
    if jax.process_index() == 0:
      path.write_text(json.dumps(kept, indent=2))
  return rows


def choose(
  config: ml_collections.ConfigDict, evals: Sequence[str]
) -> ml_collections.ConfigDict:
  """Evaluators by name, as `config.evals` has them.

  Args:
    config: of a run, resolved.
    evals: names, types, or files; all of the config if empty.

  Raises:
    ValueError: there is no such evaluator, two have the same name, or a type
      that finds no data in the config.
  """
  if not evals:
    return config.evals
  chosen = ml_collections.ConfigDict()
  types = [m.name for m in pkgutil.iter_modules(evaluators.__path__)]
  types = [name for name in types if name not in _PARTS]
  for item in evals:
    if item in config.evals:
      found = {item: config.evals[item]}
    elif item in types:
      found = {item: _by_default(config, item)}
    elif ".py" in item:
      with config_utils.at_fault(f"--evals={item}"):
        found = config_utils.load(item)
        config_utils.check_evals(found)
    else:
      raise ValueError(
        f"--evals={item}: the config has {', '.join(config.evals) or 'none'}; "
        f"types are {', '.join(types)}; or want FILE.py[:ARGS]."
      )
    for name, fields in found.items():
      if name in chosen:
        raise ValueError(f"--evals: there are two evaluators {name!r}.")
      chosen[name] = fields
  return chosen


def split(values: Sequence[str]) -> list[str]:
  """Values of `--evals` as a list; a file's arguments have commas too."""
  return [
    item
    for value in values
    for item in ([value] if ".py" in value else value.split(","))
  ]


def _by_default(config, kind):
  """An evaluator of a type, on the data that the run is judged by."""
  for name in config_utils.evals_in_order(config.evals):
    fields = config.evals[name]
    if "data" in fields and "pp_fn" in fields:
      log.info("%s: on the data of the config's %r.", kind, name)
      names = ("data", "pp_fn", "batch_size")
      same = {name: fields[name] for name in names if name in fields}
      return ml_collections.ConfigDict(dict(type=kind, **same))
  raise ValueError(
    f"--evals={kind}: the config has no evaluator whose data it could take; "
    "want a file, FILE.py[:ARGS], that describes it."
  )


def _set_grids(program, grids):
  """Lets all evaluators run at grids; tells of those that are new."""
  if program.grids == [None]:
    raise ValueError("--grid: the model has no compressed grid.")
  if len(set(grids)) < len(grids):
    given = ",".join(map(config_utils.format_grid, grids))
    raise ValueError(f"--grid={given} names one twice.")
  new = [config_utils.format_grid(g) for g in grids if g not in program.grids]
  if new:
    trained = ", ".join(map(config_utils.format_grid, program.grids))
    log.info(
      "%s: the model was trained at %s, not at this.", ", ".join(new), trained
    )
  for fields in program.config.evals.values():
    fields.grids = list(grids)


def main(argv):
  """Evaluates by the flags and prints the table."""
  del argv
  distributed.initialize_by_flags()
  startup.keep_programs()
  lay_out = parallel.lay_out_by_flags
  with config_utils.at_fault("--grid"):
    grids = [config_utils.parse_grid(text) for text in FLAGS.grid]
  rows = evaluate(
    *(FLAGS.workdir, FLAGS.step, FLAGS.batch_size, lay_out),
    *(split(FLAGS.evals), grids),
  )
  if jax.process_index() == 0:
    print(accuracy_vs_flops.table(rows))


if __name__ == "__main__":
  flags.DEFINE_string(
    "workdir", None, "Directory of a training run.", required=True
  )
  flags.DEFINE_multi_string(
    "evals",
    [],
    "Names and types, with commas; or one file; the config's if empty.",
  )
  flags.DEFINE_list("grid", [], "Compressed grids, 3x3,5x5.")
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
  flags.DEFINE_integer("batch_size", None, "The config's if not set.")
  distributed.define_flags()
  parallel.define_flags()
  cli.run(main)
