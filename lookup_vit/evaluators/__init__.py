"""Evaluators, found by the `type` of an entry of `config.evals`.

Each file has a class `Evaluator(program, name, **fields)` with `run(params)`,
which yields pairs of a metric's name and value. `fields` are those of the
entry, apart from `type` and `log_steps`.
"""
