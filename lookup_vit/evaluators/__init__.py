"""Evaluators, found by the `type` of an entry of `config.evals`.

Each file has a class `Evaluator(program, name, **fields)` with `run(params,
check, workdir)`, which yields pairs of a metric's name and value, and may leave
files in the work directory. `fields` are those of the
entry, apart from `type` and `log_steps`.
"""
