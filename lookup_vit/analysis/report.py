r"""One page on any runs: tables, figures, and what is missing.

    python -m lookup_vit.analysis.report --output=report.html \
        --workdirs=workdirs/lookup_0,workdirs/lookup_1,workdirs/vit_0

The page is self-contained: HTML, or Markdown where the output ends in `.md`.
Runs that differ in their seed alone are a row, with mean and standard deviation
(over n - 1). What was evaluated after training counts too
(`evaluation_STEP.json`), of the last step alone; of a run that has not come to
its end, of the newest.
"""

import base64
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import markdown
import matplotlib
import numpy as np
from absl import flags
from etils import epath

from lookup_vit import cli
from lookup_vit.analysis import ablations, accuracy_vs_flops, report_tables
from lookup_vit.analysis.runs import Run, groups, read

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAGS = flags.FLAGS

_NOTE = (
  "Mean and standard deviation over seeds. The corruption error is over the "
  "corruptions and severities of a run's evaluator, and AlexNet's where its "
  "`reference` says so: compare rows of the same."
)

_STYLE = (
  "body{font-family:sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
  "table{border-collapse:collapse;margin:1em 0}"
  "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}"
  "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def severity_curves(runs: Sequence[Run], axes: Any) -> bool:
  """Top-1 over severity, mean over corruptions and seeds."""
  found = report_tables.severities(runs)
  for label, y in found:
    axes.plot(range(6), y, "o-", label=label)
  axes.set_xlabel("severity (0: as they are)")
  axes.set_ylabel("top-1 (%)")
  return bool(found)


def distance_curves(runs: Sequence[Run], axes: Any, severity: int) -> bool:
  """Distribution of the features' distances at a severity, over seeds."""
  drawn = False
  for name, trained, members in groups(runs):
    found: dict[str | None, list[list[float]]] = {}
    for run in members:
      for histogram in run.distances:
        if histogram["severity"] == severity:
          found.setdefault(histogram["grid"], []).append(histogram["shares"])
    for grid, shares in found.items():
      mean = np.mean(shares, axis=0)
      middles = (np.arange(len(mean)) + 0.5) * 2 / len(mean)
      label = " ".join(filter(None, [name, trained and grid]))
      axes.plot(middles, mean * len(mean) / 2, label=label)
      drawn = True
  axes.set_title(f"severity {severity}")
  axes.set_xlabel("distance (1: another image)")
  axes.set_ylabel("density")
  return drawn


def _figure(draws: Sequence[Callable[..., bool]], runs) -> bytes | None:
  """A panel for each of what there is."""
  figure, panels = plt.subplots(
    *(1, len(draws)),
    figsize=(6, 4) if len(draws) == 1 else (3.5 * len(draws), 3.5),
    layout="constrained",
    squeeze=False,
  )
  try:
    drawn = []
    for draw, axes in zip(draws, panels[0], strict=True):
      if draw(runs, axes):
        axes.grid(alpha=0.3)
        drawn.append(axes)
      else:
        axes.remove()
    if not drawn:
      return None
    drawn[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()
  finally:
    plt.close(figure)


def _accuracy_figure(runs):
  """Means over seeds."""
  rows = []
  for _, _, members in groups(runs):
    found: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in (row for run in members for row in run.rows):
      if row.get("type") == "classification":
        found.setdefault((row["split"], row["grid"]), []).append(row)
    for same in found.values():
      rows.append(same[0] | {"top1": np.mean([row["top1"] for row in same])})
  return accuracy_vs_flops.draw(rows) if rows else None


def _ablations(runs):
  """Tables of `ablations.py`, where runs differ in more than seed and kind."""
  found = [
    ablations.read(run.workdir)
    for run in runs
    if run.trained and not run.is_probe and run.of_type("classification")
  ]
  found = [run for run in found if run.results != []]
  if not found or len(ablations.group(found)) == 1:
    return ""
  return ablations.report(found)


def page(runs: Sequence[Run], folders: Sequence[str] = ()) -> str:
  """The page in Markdown, pictures within.

  Args:
    runs: at least one.
    folders: of benchmarks' output, whose tables and plots are taken over.
  """
  parts = ["# LookupViT: report", report_tables.main_table(runs), _NOTE]
  absent = []

  def add(title, content, how):
    if not content:
      absent.append(f"- {title}: {how}")
      return
    if isinstance(content, bytes):
      content = _embed(title, content)
    parts.extend([f"## {title}", content])

  evaluated = "`python -m lookup_vit.evaluate --evals={}`"
  add(
    "Accuracy against FLOPs",
    _accuracy_figure(runs),
    evaluated.format("NAME") + " of a classification evaluator",
  )
  add(
    "One model at many budgets",
    report_tables.multi_resolution(runs),
    "give a run at several grids, and runs at one grid each",
  )
  how = evaluated.format("robustness")
  add("Top-1 under corruption (%)", report_tables.corruption_table(runs), how)
  add("Top-1 over severity", _figure([severity_curves], runs), how)
  add("Top-1 at each severity (%)", report_tables.severity_table(runs), how)
  shifts = evaluated.format("configs/evals_imagenet.py:res=RES")
  add(
    "Other test sets and corruption errors",
    report_tables.others_table(runs),
    shifts,
  )
  how = evaluated.format("feature_distance")
  add("Feature distance", report_tables.distance_table(runs), how)
  curves = [functools.partial(distance_curves, severity=s) for s in range(1, 6)]
  add("Distribution of feature distances", _figure(curves, runs), how)
  tables = _ablations(runs)
  add("Ablations and stability", tables, "`bash launch/ablations.sh`")
  content = [
    _embed(title, picture)
    for run in runs
    for title, picture in run.pictures.items()
  ]
  add("Attention maps", "\n\n".join(content), "of a LookupViT on images")
  content = []
  for folder in folders:
    for path in sorted(epath.Path(folder).glob("*.md")):
      content.append(path.read_text())
    for path in sorted(epath.Path(folder).glob("*.png")):
      content.append(_embed(path.stem, path.read_bytes()))
  how = "`python -m benchmarks.resolution --output=DIR`, and `--benchmarks=DIR`"
  add("Resolution", "\n\n".join(content), how)
  parts += ["## Missing", "\n".join([report_tables.missing(runs), *absent])]
  return "\n\n".join(parts) + "\n"


def _embed(title, picture):
  data = base64.b64encode(picture).decode()
  return f"![{title}](data:image/png;base64,{data})\n\n{title}"


def write(path: str, text: str) -> None:
  """Writes a page, as HTML unless the path ends in `.md`."""
  path = epath.Path(path)
  if path.suffix != ".md":
    body = markdown.markdown(text, extensions=["tables", "sane_lists"])
    text = (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      f"<title>LookupViT: report</title><style>{_STYLE}</style></head>\n"
      f"<body>\n{body}\n</body></html>\n"
    )
  path.write_text(text)


def main(argv):
  """Writes the page of the runs that the flags name."""
  del argv
  folders = FLAGS.benchmarks
  for folder in folders:
    if not epath.Path(folder).is_dir():
      raise ValueError(f"--benchmarks: {folder} is no directory.")
  runs = [read(workdir) for workdir in FLAGS.workdirs]
  if not any(run.rows for run in runs):
    raise ValueError("--workdirs: none has results yet.")
  write(FLAGS.output, page(runs, folders))
  print(f"Written: {FLAGS.output}")


if __name__ == "__main__":
  flags.DEFINE_list("workdirs", None, "Work directories.", required=True)
  flags.DEFINE_list("benchmarks", [], "Output of benchmarks.resolution.")
  flags.DEFINE_string("output", "report.html", "The page, .html or .md.")
  cli.run(main)
