r"""A metric over the steps of runs, and how soon each reaches a value.

    python -m lookup_vit.analysis.learning_curves --metric=val/4x4/top1 \
        --curve=random:W0,W1,W2 --curve=warm:W3,W4,W5 --output=curves.png

A curve is the mean of runs that differ in their seed. The table has the first
measured step at which each run reaches `--target`, by default the mean end of
the first curve. Runs are read as they are, also while they train.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags

from lookup_vit import cli, config_utils, metric_writer
from lookup_vit.analysis import attention_maps

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAGS = flags.FLAGS


class Curve(NamedTuple):
  """A metric of runs that are alike.

  Attributes:
    label: for people.
    steps: at which it was measured in all runs, ascending.
    values: `[runs, steps]`.
  """

  label: str
  steps: np.ndarray
  values: np.ndarray


def read(label: str, workdirs: Sequence[str], metric: str) -> Curve:
  """A metric of some runs, at the steps that all of them have.

  Raises:
    ValueError: a work directory has no such metric, or they share no step.
  """
  found = []
  for workdir in workdirs:
    config_utils.read_workdir(workdir)
    rows = metric_writer.read(workdir)
    values = {r["step"]: r[metric] for r in rows if metric in r}
    if not values:
      names = sorted({n for r in rows for n in r if n.endswith("/top1")})
      raise ValueError(
        f"{workdir} has no metric {metric!r}; of top-1 it has "
        f"{', '.join(names) or 'none'}."
      )
    found.append(values)
  steps = sorted(set.intersection(*map(set, found)))
  if not steps:
    raise ValueError(f"The runs of {label!r} were measured at no same step.")
  values = [[one[step] for step in steps] for one in found]
  return Curve(label, np.array(steps), np.array(values, float))


def first_steps(curve: Curve, target: float) -> list[int | None]:
  """Of each run the first measured step that reaches a value, or None."""
  return [
    next(
      (int(s) for s, v in zip(curve.steps, row, strict=True) if v >= target),
      None,
    )
    for row in curve.values
  ]


def table(curves: Sequence[Curve], target: float) -> str:
  """Where curves end, and how soon they reach a value, in Markdown."""
  lines = [
    f"| | runs | at the end (%) | steps to {target:.1%} | of the first's |",
    "|---|---|---|---|---|",
  ]
  firsts = first_steps(curves[0], target)
  base = 0 if None in firsts else np.mean(firsts)
  for curve in curves:
    last = 100 * curve.values[:, -1]
    spread = f" ± {last.std(ddof=1):.2f}" if len(last) > 1 else ""
    steps = first_steps(curve, target)
    texts = ["never" if s is None else str(s) for s in steps]
    share = "-"
    if base and None not in steps:
      share = f"{np.mean(steps) / base:.2f}"
    lines.append(
      f"| {curve.label} | {len(last)} | {last.mean():.2f}{spread} | "
      f"{', '.join(texts)} | {share} |"
    )
  return "\n".join(lines)


def draw(
  curves: Sequence[Curve], target: float, metric: str, path: str
) -> None:
  """Draws each mean, with what lies between the runs' extremes, as a PNG."""
  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  for curve in curves:
    values = 100 * curve.values
    [line] = axes.plot(curve.steps, values.mean(0), label=curve.label)
    ends = values.min(0), values.max(0)
    axes.fill_between(curve.steps, *ends, color=line.get_color(), alpha=0.2)
  axes.axhline(100 * target, color="grey", linewidth=0.8, linestyle=":")
  axes.set_xlabel("steps")
  axes.set_ylabel(f"{metric} (%)")
  axes.legend(fontsize=8)
  attention_maps.save(figure, path)


def main(argv: Any) -> None:
  """Prints the table and draws the curves by the flags."""
  del argv
  curves = []
  for text in FLAGS.curve:
    label, colon, workdirs = text.partition(":")
    if not (label and colon and workdirs):
      raise ValueError(f"--curve={text}: want LABEL:WORKDIR,WORKDIR,...")
    with config_utils.at_fault(f"--curve={text}"):
      curves.append(read(label, workdirs.split(","), FLAGS.metric))
  target = FLAGS.target
  if target is None:
    target = float(curves[0].values[:, -1].mean())
  print(table(curves, target))
  draw(curves, target, FLAGS.metric, FLAGS.output)
  print(f"Drawn: {FLAGS.output}")


if __name__ == "__main__":
  flags.DEFINE_multi_string("curve", None, "LABEL:WORKDIR,...", required=True)
  flags.DEFINE_string("metric", "val/top1", "Of metrics.jsonl.")
  flags.DEFINE_float(
    "target", None, "To be reached; the first's end if not set."
  )
  flags.DEFINE_string("output", "curves.png", "The PNG to draw.")
  cli.run(main)
