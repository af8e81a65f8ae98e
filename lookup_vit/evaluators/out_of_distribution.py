"""AUPR of the detection of images of no known class, as of ImageNet-O."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from sklearn import metrics

from lookup_vit import datasets, input_pipeline, loops, parallel
from lookup_vit.evaluators import shared
from lookup_vit.train_step import Program


class Evaluator:
  """How well low confidence tells images of other classes from a classifier's.

  Yields `NAME/aupr`, for LookupViT `NAME/GRID/aupr`, of the default prediction.
  It is defined as for ImageNet-O (arXiv:1907.07174, section 4; the details by
  `eval_many_models.py` of https://github.com/hendrycks/natural-adv-examples):
  the logits of 200 classes of ImageNet-1k alone, those that ImageNet-O's
  folders are named after; the images of ImageNet-O are the positives, the
  validation images of these classes the negatives; the score of an image is
  minus its greatest probability.

  Args:
    program: of a classifier.
    name: prefix of the metrics.
    data: the images of no known class, as `config.input.data`. Their `label` is
      what ImageNet-O's is: not their class, but one to compare with.
    inliers: images of the classifier's classes, likewise; those of other
      classes than `classes` do not count.
    pp_fn: op-string of the preprocessing of both, which keeps `label`.
    classes: a list, or "present" for those that occur as `label` in `data`.
    batch_size: global; that of training where none is given.
    grids: compressed grids; those of training where none are given.

  Raises:
    ValueError: data, classes, grids or batch size that cannot work.
  """

  views = 1

  def __init__(
    self,
    program: Program,
    name: str,
    *,
    data: Mapping[str, Any],
    inliers: Mapping[str, Any],
    pp_fn: str,
    classes: str | Sequence[int] = "present",
    batch_size: int | None = None,
    grids: list[Any] | None = None,
  ):
    self.program = program
    self.name = name
    # Outliers first.
    self.splits, self.sizes, self.count = [], [], 0
    for split in (data, inliers):
      batches, count, self.batch_size = shared.make_batches(
        program, name, split, pp_fn, batch_size
      )
      field = f"config.evals.{name}.pp_fn"
      program.check_input(batches.element_spec, field)
      if "label" not in batches.element_spec:
        raise ValueError(f"{field}: want 'label' of a batch.")
      self.splits.append(batches)
      self.sizes.append(datasets.num_examples(split))
      self.count += count
    self.grids = shared.check_grids(program, name, grids)
    self.classes = shared.check_classes(program, name, data, classes)
    if self.classes is None:
      self.classes = tuple(range(program.config.num_classes))
    self._confidences = program.compile(
      self._predict, parallel.replicated(program.mesh), static_argnums=2
    )

  def batches(self) -> Iterator[dict[str, Any]]:
    """This process's batches of images of no known class."""
    return iter(self.splits[0])

  def _predict(self, params, batch, grid):
    """The greatest probability of each image, and its label."""
    logits, _ = self.program.apply(params, batch, grid)
    logits = logits[:, np.array(self.classes)].astype(jnp.float32)
    return jnp.max(jax.nn.softmax(logits), axis=-1), batch["label"]

  def _all_batches(self):
    for split, batches in enumerate(self.splits):
      for number, batch in enumerate(batches):
        yield split, number, batch

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
      workdir: nothing is written there.

    Yields:
      Names and values.
    """
    del workdir
    found = {
      grid: [np.full(n, np.nan) for n in self.sizes] for grid in self.grids
    }
    labels = [np.full(n, -1) for n in self.sizes]
    batches = loops.progress(self._all_batches(), self.count, self.name)
    for split, number, batch in batches:
      check()
      places = input_pipeline.eval_places(
        self.sizes[split], self.batch_size, number, jax.process_count()
      )
      real = places >= 0
      names = ("image", "label")
      batch = {k: v for k, v in batch.items() if k in names}
      batch = parallel.put_batch(batch, self.program.mesh)
      for grid, confidences in found.items():
        confidence, label = map(
          np.asarray, self._confidences(params, batch, grid)
        )
        confidences[split][places[real]] = confidence[real]
        labels[split][places[real]] = label[real]
    known = np.isin(labels[1], self.classes)
    if not known.any():
      raise RuntimeError(f"{self.name}: no inlier has one of the classes.")
    for grid, (outliers, inliers) in found.items():
      prefix = shared.metric_prefix(self.name, grid)
      yield f"{prefix}aupr", aupr(-outliers, -inliers[known])


def aupr(
  positives: Float[np.ndarray, " p"], negatives: Float[np.ndarray, " n"]
) -> float:
  """Area under the precision-recall curve, as average precision.

  Args:
    positives: scores of what is to be detected, high where it is.
    negatives: scores of what is not.
  """
  truth = np.repeat([1, 0], [len(positives), len(negatives)])
  scores = np.concatenate([positives, negatives])
  return float(metrics.average_precision_score(truth, scores))
