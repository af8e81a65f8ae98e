r"""Ablations in one table, and the stability of training in another.

    python -m lookup_vit.analysis.ablations --output=ablations.md \
        --workdirs=workdirs/ablations/default_0,workdirs/ablations/reuse_none_0

What a run is, its work directory's config says, and not its name. Runs that
differ in their seed alone are a row; runs that differ from the default only in
size, qk-norm, clipping or learning rate are in the table of stability.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from flax import traverse_util

from lookup_vit import cli, config_utils, metric_writer, train_step
from lookup_vit.models import variants

FLAGS = flags.FLAGS

# Fields of a model that do not change what it learns; its own grid is one, as
# those that it is trained at count.
_IGNORED = (
  *("parent", "name", "num_classes", "grid", "encoder"),
  *("scan", "remat_policy", "attention", "mhbc_impl"),
)

_OF_SIZE = ("width", "depth", "num_heads")
_OF_STABILITY = (*_OF_SIZE, "qk_norm", "lr", "grad_clip_norm")


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run, as far as it has come.

  Attributes:
    workdir: its work directory.
    settings: what it learns by but for its seed, by name.
    changes: those fields of the model that are not as they are where a config
      does not say.
    total_steps: of the whole training.
    step: the last that was logged.
    diverged: whether an update was not finite; `step` is that.
    results: rows of classification in `results.json`; None where it has not
      come to its end.
    logit_max: largest logit of attention, over layers and steps that were
      logged; None where none were.
  """

  workdir: str
  settings: dict[str, Any]
  changes: dict[str, Any]
  total_steps: int = 0
  step: int = 0
  diverged: bool = False
  results: list[dict[str, Any]] | None = None
  logit_max: float | None = None


def read(workdir: str) -> Run:
  """A work directory's run.

  Raises:
    ValueError: it is no work directory, or its results are damaged.
  """
  config = config_utils.read_workdir(workdir)
  folder = config_utils.workdir_path(workdir)
  rows, results = [], None
  if (folder / "metrics.jsonl").exists():
    rows = metric_writer.read(workdir)
  if (folder / "results.json").exists():
    results = config_utils.read_json(folder / "results.json")
    results = [
      row
      for row in results
      if "top1" in row and row.get("type") in (None, "classification")
    ]
  name = "train/attention_logit_max"
  logits = [row[name] for row in rows if name in row]
  return Run(
    workdir,
    *settings(config),
    total_steps=config.total_steps,
    step=rows[-1]["step"] if rows else 0,
    diverged=results is None and any("train/diverged" in row for row in rows),
    results=results,
    logit_max=max(logits, default=None),
  )


def settings(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """What a resolved config makes a run learn by, and its model's changes.

  Returns:
    Fields of the model, also those that the config does not name; the grids of
    training; and the config's other fields, "input.batch_size". Then those
    fields of the model that are not what they are by default.
  """
  model = train_step.build_model(config)
  found, changes = _of_model(model, config.model)
  if hasattr(model, "encoder"):
    both = _of_model(model.encoder, config.model.get("encoder", {}))
    for all_of, some in zip((found, changes), both, strict=True):
      all_of.update({f"encoder.{name}": value for name, value in some.items()})
  if hasattr(model, "grid"):
    grids = train_step.train_grids(config, model)
    found["grids"] = ", ".join(map(config_utils.format_grid, grids))
  rest = traverse_util.flatten_dict(config.to_dict(), sep=".")
  skipped = (*config_utils.FREE, "model", "grids", "seed")
  for name, value in rest.items():
    if not any(f"{name}.".startswith(f"{skip}.") for skip in skipped):
      found[name] = value
  return found, changes


def _of_model(model, given):
  """Fields of a module but for its encoder, and those that are changed."""
  fields = [f for f in dataclasses.fields(model) if f.name not in _IGNORED]
  found = {f.name: getattr(model, f.name) for f in fields}
  default = {
    f.name: f.default for f in fields if f.default is not dataclasses.MISSING
  }
  if "mlp_ratio" in found:
    size = given.get("variant", "B").split("/")[0]
    default["mlp_ratio"] = variants.decode_size(size)["mlp_ratio"]
  if "mhbc_heads" in found and found["mhbc_heads"] == model.num_heads:
    found["mhbc_heads"] = None  # As many as by default.
  return found, {k: found[k] for k, v in default.items() if found[k] != v}


# Groups of runs.


def group(runs: Sequence[Run]) -> list[list[Run]]:
  """Runs that differ in their seed alone together; the default's come first.

  The default is what has the fewest changes of its model; of those, what is
  trained at the most grids; then what the others differ from the least.
  """
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(repr(sorted(run.settings.items())), []).append(run)
  first = [found[0] for found in groups.values()]

  def order(found):
    run = found[0]
    grids = run.settings.get("grids", "").count("x")
    others = sum(len(differences(run, other)) for other in first)
    return len(run.changes), -grids, others

  default = min(groups.values(), key=order)
  others = [found for found in groups.values() if found is not default]
  label = lambda found: describe(default[0], found[0])  # noqa: E731
  return [default, *sorted(others, key=label)]


def differences(default: Run, run: Run) -> dict[str, Any]:
  """Settings in which a run differs; of another kind of model, shared ones."""
  a, b = default.settings, run.settings
  names = dict.fromkeys([*b, *a])
  if a["model_name"] != b["model_name"]:
    names = [name for name in names if name in a and name in b]
  return {k: b.get(k) for k in names if a.get(k) != b.get(k)}


def describe(default: Run, run: Run) -> str:
  """In words, such as "reuse logits, lr 0.01"."""
  found = differences(default, run)
  if found:
    return _words(found)
  changes = _words(default.changes)
  return f"default ({changes})" if changes else "default"


def _words(found):
  return ", ".join(f"{k} {_text(v)}" for k, v in found.items())


def _text(value):
  return f"{value:g}" if isinstance(value, float) else str(value)


# Tables.


def report(runs: Sequence[Run]) -> str:
  """The tables there are runs for, and what has not come to its end.

  Raises:
    ValueError: there are no runs, or one has come to its end without a top-1.
  """
  if not runs:
    raise ValueError("--workdirs: no work directories.")
  for run in runs:
    if run.results == []:
      raise ValueError(f"{run.workdir}: its results.json has no top-1.")
  default, *others = group(runs)
  stability = [
    found
    for found in others
    if "width" in found[0].settings
    and set(differences(default[0], found[0])) <= set(_OF_STABILITY)
  ]
  rest = [found for found in others if found not in stability]
  parts = []
  if rest or not stability:
    parts.append(table([default, *rest]))
  if stability:
    parts.append(stability_table([default, *stability]))
  lines = [f"- {state(run)}" for run in runs if run.results is None]
  if lines:
    parts.append("\n".join(["Not in the means:", "", *lines]))
  return "\n\n".join(parts) + "\n"


def state(run: Run) -> str:
  """How far a run has come that has no results."""
  if run.diverged:
    return f"{run.workdir}: diverged at update {run.step} of {run.total_steps}"
  return f"{run.workdir}: unfinished, step {run.step} of {run.total_steps}"


def table(groups: Sequence[Sequence[Run]]) -> str:
  """A row for each group of runs, split and grid, in Markdown.

  GFLOPs count a multiply-add as two. Top-1 is that of the default prediction,
  mean and standard deviation (over n - 1) of the runs that came to their end;
  `compressed` and `lookup` are the means of the heads. `difference` is to the
  mean of the default, the first group, at the same grid; its error is the
  standard error, sqrt(s^2 / n + s0^2 / n0).
  """
  head = (
    "changed|split|grid|GFLOPs|parameters (M)|runs|top-1 (%), mean|std|"
    "compressed (%)|lookup (%)|difference|its error"
  )
  lines = _head(head)
  of_default = _by_grid(groups[0])
  for found in groups:
    label, runs = describe(groups[0][0], found[0]), _count(found)
    by_grid = _by_grid(found)
    if not by_grid:
      grids = found[0].settings.get("grids", "-")
      lines.append(_line([label, "-", grids, "-", "-", runs, _ended(found)], 5))
    for (split, grid), rows in by_grid.items():
      base = of_default.get((split, grid), [])
      cells = [label, split, grid or "-", f"{rows[0]['gflops']:.3g}"]
      cells += [f"{rows[0]['parameters'] / 1e6:.2f}", runs]
      cells += _mean_std(_top1(rows))
      for name in ("top1_compressed", "top1_lookup"):
        there = all(name in row for row in rows)
        cells.append(f"{_top1(rows, name).mean():.2f}" if there else "-")
      is_default = found is groups[0]
      cells += ["-", "-"] if is_default else _difference(rows, base)
      lines.append(_line(cells))
  return "\n".join(lines)


def stability_table(groups: Sequence[Sequence[Run]]) -> str:
  """A row for each size, qk-norm, clipping and learning rate, in Markdown.

  Top-1 is the mean over a run's grids, of its first split; then mean and
  standard deviation over the runs that came to their end. The logit is the
  largest of all runs, also of those that diverged, where it was logged.
  """
  head = (
    "size|qk-norm|clipping|learning rate|runs|diverged|unfinished|"
    "top-1 (%), mean|std|largest attention logit"
  )
  lines = _head(head)

  def order(found):
    s = found[0].settings
    clip = s["grad_clip_norm"] or float("inf")
    return s["width"], s["depth"], s["qk_norm"], -clip, s["lr"]

  for found in sorted(groups, key=order):
    s = found[0].settings
    diverged = [run for run in found if run.diverged]
    ended = [run for run in found if run.results is not None]
    unfinished = len(found) - len(diverged) - len(ended)
    cells = [f"width {s['width']}, depth {s['depth']}"]
    cells += ["yes" if s["qk_norm"] else "no"]
    cells += [_text(s["grad_clip_norm"] or "none"), f"{s['lr']:g}"]
    cells += [str(len(found)), str(len(diverged)), str(unfinished)]
    means = []
    for run in ended:
      split = run.results[0]["split"]
      means.append(_top1([r for r in run.results if r["split"] == split]))
    cells += (
      _mean_std(np.array([x.mean() for x in means]))
      if means
      else [_ended(found), "-"]
    )
    logits = [run.logit_max for run in found if run.logit_max is not None]
    cells.append(f"{max(logits):.3g}" if logits else "-")
    lines.append(_line(cells))
  return "\n".join(lines)


def _head(titles):
  names = titles.split("|")
  return [_line(names), "|" + "---|" * len(names)]


def _line(cells, empty=0):
  return f"| {' | '.join([*cells, *['-'] * empty])} |"


def _by_grid(runs):
  """Rows of results of the runs that came to their end, by split and grid."""
  found = {}
  for run in runs:
    for row in run.results or ():
      found.setdefault((row["split"], row["grid"]), []).append(row)
  return found


def _count(runs):
  """How many runs came to their end, and of how many if not all did."""
  ended = sum(run.results is not None for run in runs)
  return str(ended) if ended == len(runs) else f"{ended} of {len(runs)}"


def _ended(runs):
  """How runs ended of which none came to its end."""
  diverged = [run.diverged for run in runs]
  if all(diverged):
    return "diverged"
  return "diverged, unfinished" if any(diverged) else "unfinished"


def _top1(rows, name="top1"):
  return 100 * np.array([row[name] for row in rows])


def _mean_std(x):
  return [f"{x.mean():.2f}", f"{x.std(ddof=1):.2f}" if len(x) > 1 else "-"]


def _difference(rows, base):
  """Of two means, and its standard error."""
  if not base:
    return ["-", "-"]
  x, y = _top1(rows), _top1(base)
  text = f"{x.mean() - y.mean():+.2f}"
  if min(len(x), len(y)) < 2:
    return [text, "-"]
  error = np.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y))
  return [text, f"{error:.2f}"]


def main(argv):
  """Prints the tables, and writes them."""
  del argv
  text = report([read(workdir) for workdir in FLAGS.workdirs])
  print(text, end="")
  if FLAGS.output:
    epath.Path(FLAGS.output).write_text(text)


if __name__ == "__main__":
  flags.DEFINE_list("workdirs", None, "Work directories.", required=True)
  flags.DEFINE_string("output", None, "The Markdown file to write, if any.")
  cli.run(main)
