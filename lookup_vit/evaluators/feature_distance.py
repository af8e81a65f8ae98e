"""How far corruptions move the features of images."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lookup_vit import config_utils, loops
from lookup_vit.evaluators import shared
from lookup_vit.evaluators.features import Features
from lookup_vit.preprocess import corruptions as ops
from lookup_vit.preprocess import registry
from lookup_vit.train_step import Program

# Of the histograms: ends of bins, the last of which has all that is above.
BINS = np.linspace(0, 2, 101)


class Evaluator:
  """Distances between features of images as they are, and corrupted.

  A distance is that of the pooled features, divided by the root mean square
  distance of the features of two different images (LookupViT paper, figure 4,
  whose normalisation is not stated): 1 is as far as another image.

  Yields `NAME/METRIC`, for LookupViT `NAME/GRID/METRIC`: `severity_S`, the mean
  over images and corruptions, and `distance`, that over severities too. In a
  work directory it leaves `feature_distance_NAME.json`, with a dict for
  each `grid` and `severity`: `mean`, and `shares` of distances over `BINS`.

  Args:
    program: of the backbone.
    name: prefix of the metrics.
    data: the data set, as `config.input.data`.
    pp_fn: op-string; the op `corrupt` is put before its `value_range`.
    batch_size: global; that of training where none is given.
    grids: compressed grids; those of training where none are given.
    features: of LookupViT, "compressed" (where none are given), "lookup" or
      "both".
    block: whose tokens are averaged; None for the pre-logits.
    corruptions: by name; all of `preprocess.corruptions` where none are given.
    severities: of 1 to 5; all of them where none are given.

  Raises:
    ValueError: a field or data that cannot work.
  """

  views = 1

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    data: Mapping[str, Any],
    pp_fn: str,
    batch_size: int | None = None,
    grids: list[Any] | None = None,
    features: str | None = None,
    block: int | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
  ):
    where = f"config.evals.{name}"
    self.name = name
    self.grids = shared.check_grids(program, name, grids)
    self.severities = shared.some(
      f"{where}.severities", severities, ops.SEVERITIES
    )
    corruptions = shared.some(f"{where}.corruptions", corruptions, ops.NAMES)

    def of(pp, like=None):
      return Features(
        *(program, name, "data", data, pp, batch_size, features, block, like)
      )

    self.clean = of(pp_fn)
    if self.clean.size < 2:
      raise ValueError(f"{where}.data has one example; want two or more.")
    self.corrupted = {}
    for severity, corruption in itertools.product(self.severities, corruptions):
      with config_utils.at_fault(f"{where}.pp_fn"):
        op = f"corrupt{(corruption, severity)}"
        pp = registry.insert_before(pp_fn, "value_range", op)
      self.corrupted[severity, corruption] = of(pp, self.clean)

  def batches(self) -> Iterator[dict[str, Any]]:
    """This process's batches of what is not corrupted."""
    return iter(self.clean.dataset)

  def run(
    self,
    params: Any,
    check: Callable[[], None] = lambda: None,
    workdir: str | None = None,
  ) -> Iterator[tuple[str, float]]:
    """Evaluates parameters.

    Args:
      params: of the model.
      check: called for each batch; what it raises ends the evaluation.
      workdir: where the histograms are written, over those of the same grids
        and severities; nowhere if None.

    Yields:
      Names and values.
    """
    path, kept = None, []
    if workdir is not None:
      folder = config_utils.workdir_path(workdir)
      path = folder / f"feature_distance_{self.name}.json"
      kept = config_utils.read_json(path) if path.exists() else []
    clean = self.clean.extract(params, self.grids, check)
    found = {(s, grid): [] for s in self.severities for grid in self.grids}
    parts = loops.progress(
      *(self.corrupted.items(), len(self.corrupted), self.name, "corruption")
    )
    for (severity, _), part in parts:
      for grid, split in part.extract(params, self.grids, check).items():
        found[severity, grid].append(distances(clean[grid].x, split.x))
    histograms = []
    for grid in self.grids:
      where = shared.metric_prefix(self.name, grid)
      means = []
      for severity in self.severities:
        values = np.concatenate(found[severity, grid])
        means.append(values.mean())
        yield f"{where}severity_{severity}", float(means[-1])
        counts, _ = np.histogram(np.minimum(values, BINS[-1]), BINS)
        histograms.append(
          dict(
            grid=grid and config_utils.format_grid(grid),
            severity=severity,
            mean=float(means[-1]),
            shares=(counts / len(values)).tolist(),
          )
        )
      yield f"{where}distance", float(np.mean(means))
    if path is not None and jax.process_index() == 0:
      new = {(h["grid"], h["severity"]) for h in histograms}
      kept = [h for h in kept if (h["grid"], h["severity"]) not in new]
      path.write_text(json.dumps(kept + histograms))


def distances(
  clean: Float[np.ndarray, "n D"], other: Float[np.ndarray, "n D"]
) -> Float[np.ndarray, " n"]:
  """Of each pair, over the root mean square distance of two of `clean`."""
  clean = clean.astype(np.float64)
  # Of all pairs, |a - b|^2 is twice the variance on average.
  spread = np.sqrt(2 * clean.var(axis=0, ddof=1).sum())
  return np.linalg.norm(other - clean, axis=-1) / spread
