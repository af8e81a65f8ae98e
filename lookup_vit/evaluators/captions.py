"""Captions of a whole split, scored as COCO's are, at every compressed grid."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lookup_vit import (
  config_utils,
  input_pipeline,
  loops,
  parallel,
  tokenizer,
)
from lookup_vit.analysis import caption_files, caption_scores, caption_sheet
from lookup_vit.evaluators import shared
from lookup_vit.models import decoding
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")


class Evaluator:
  """Writes a caption for each image of a split, and scores them.

  Yields `NAME/METRIC`, for a LookupViT encoder `NAME/GRID/METRIC`: the metrics
  of `analysis/caption_scores.py`, as pycocoevalcap gives them (1, not 100), and
  `unfinished`, the share of captions that are cut at the most ids. In a work
  directory it leaves `captions_NAME_GRID.json`, the results as COCO's server
  takes them; `captions_NAME_GRID.html`, a page with images, captions and
  references; and `references_NAME.json`, the references as COCO's annotations.

  Args:
    program: a captioner's; `config.tokenizer` is its tokenizer.
    name: prefix of the metrics.
    data: the data set, as `config.input.data`.
    pp_fn: op-string of the preprocessing, which makes the images.
    batch_size: global; that of training where none is given.
    grids: compressed grids; those of training where none are given.
    beams: of the search; 1 is greedy decoding.
    alpha: of the penalty for short captions, see `decoding.beam_search`.
    max_length: most ids of a caption; the model's where none is given.
    metrics: names of metrics; all but SPICE where none are given.
    references: feature with the references of an image, flattened as by the op
      `flatten`; of TFDS's coco_captions by default.
    image_id: feature with an image's number, likewise.
    images: how many are shown on the page.

  Raises:
    ValueError: a field or data that cannot work, a metric that cannot be
      computed here, or an image without references.
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
    beams: int = decoding.BEAMS,
    alpha: float = decoding.ALPHA,
    max_length: int | None = None,
    metrics: Sequence[str] | None = None,
    references: str = "captions/text",
    image_id: str = "image/id",
    images: int = 24,
  ):
    config = program.config
    where = f"config.evals.{name}"
    if not hasattr(program.model, "start"):
      raise ValueError(
        f"{where}: model {config.model_name!r} writes no captions."
      )
    if config.tokenizer is None:
      raise ValueError(f"{where} wants config.tokenizer.")
    self.program = program
    self.name = name
    self.words = tokenizer.load(config.tokenizer)
    self.grids = shared.check_grids(program, name, grids)
    self.beams = shared.positive(f"{where}.beams", beams)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
      raise ValueError(f"{where}.alpha={alpha!r}: want a number.")
    self.alpha = alpha
    longest = program.model.max_length
    length = longest if max_length is None else max_length
    self.length = shared.positive(f"{where}.max_length", length)
    if self.length > longest:
      raise ValueError(
        f"{where}.max_length={max_length}: the decoder has {longest}."
      )
    self.metrics = tuple(metrics or caption_scores.DEFAULT)
    with config_utils.at_fault(f"{where}.metrics"):
      caption_scores.check(self.metrics)
    if isinstance(images, bool) or not isinstance(images, int) or images < 0:
      raise ValueError(f"{where}.images={images!r}: want an integer >= 0.")
    self.shown = images
    self.dataset, self.count, self.batch_size = shared.make_batches(
      program, name, data, pp_fn, batch_size
    )
    program.check_images(self.dataset.element_spec, f"{where}.pp_fn")
    self.references = _references(data, references, image_id)
    with config_utils.at_fault(f"{where}.data"):
      caption_scores.check_references(self.references)
    self._write = program.compile(
      self._captions, parallel.replicated(program.mesh), static_argnums=2
    )

  def batches(self) -> Iterator[dict[str, Any]]:
    """This process's batches of NumPy arrays, padding marked in `_mask`."""
    return iter(self.dataset)

  def _captions(self, params, images, grid):
    fields = {} if grid is None else {"grid": grid}
    return decoding.caption(
      self.program.model,
      params,
      images,
      begin=self.words.begin,
      end=self.words.end,
      length=self.length,
      beams=self.beams,
      alpha=self.alpha,
      **fields,
    )

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
      workdir: where captions are written; nowhere if None.

    Yields:
      Names and values, on the first process alone.
    """
    ids = list(self.references)
    found = {grid: {} for grid in self.grids}
    pictures = {}  # By image; of this process's share.
    batches = loops.progress(self.batches(), self.count, self.name)
    for number, batch in enumerate(batches):
      check()
      images = parallel.put_batch(batch["image"], self.program.mesh)
      places = input_pipeline.eval_places(
        len(ids), self.batch_size, number, jax.process_count()
      )
      # The first process, which shows them, has the first places.
      for place, image in zip(places.tolist(), batch["image"], strict=False):
        if place >= 0 and len(pictures) < self.shown:
          pictures[ids[place]] = np.array(image)
      for grid, captions in found.items():
        rows = np.asarray(self._write(params, images, grid))
        for place, row in zip(places.tolist(), rows, strict=True):
          if place >= 0:
            captions[ids[place]] = row
    if jax.process_index() != 0:
      return
    if workdir is not None:
      path = config_utils.workdir_path(workdir) / f"references_{self.name}.json"
      caption_files.write_references(path, self.references)
    for grid, rows in found.items():
      parts = [] if grid is None else [config_utils.format_grid(grid)]
      where = "/".join([self.name, *parts])
      captions = {i: self.words.decode(row) for i, row in rows.items()}
      log.info("%s: scoring %d captions.", where, len(captions))
      file = "_".join(["captions", self.name, *parts])
      if workdir is not None:
        folder = config_utils.workdir_path(workdir)
        caption_files.write_results(folder / f"{file}.json", captions)
      scores = caption_scores.score(self.references, captions, self.metrics)
      if workdir is not None:
        self._show(folder / f"{file}.html", captions, scores, pictures)
      unfinished = [self.words.end not in row for row in rows.values()]
      means = {**scores.means, "unfinished": float(np.mean(unfinished))}
      for metric, value in means.items():
        yield f"{where}/{metric}", value

  def _show(self, path, captions, scores, pictures):
    """Writes the page of a grid."""
    rows = [
      caption_sheet.Row(
        image, i, captions[i], self.references[i], scores.each[i]
      )
      for i, image in pictures.items()
    ]
    caption_sheet.write(path, rows)


def _references(data, key, image_id) -> dict[int, list[str]]:
  """Of each image, in the order of the split.

  Raises:
    ValueError: an image has none, or a number comes twice.
  """
  found = {}
  pp = f"flatten|keep({key!r}, {image_id!r})"
  for example in input_pipeline.examples(data, pp=pp):
    texts = input_pipeline.texts(example, key)
    if image_id not in example:
      raise ValueError(f"The data have no feature {image_id!r}.")
    i = int(example[image_id])
    if i in found:
      raise ValueError(f"{image_id} {i} comes twice.")
    if not any(text.strip() for text in texts):
      raise ValueError(f"The image with {image_id} {i} has no references.")
    found[i] = texts
  return found
