"""Evaluators, found by the `type` of an entry of `config.evals`.

Each file has a class `Evaluator(program, name, **fields)`, where `fields` are
those of the entry, apart from `type` and `log_steps`. An evaluator has
  `run(params, check, workdir)`, which yields pairs of a metric's name and
    value, and may leave files in the work directory;
  `batches()`: an iterator of this process's batches, or of none, of which the
    pictures that a run leaves have a few images;
  `views`: how many images an example has in them.
"""
