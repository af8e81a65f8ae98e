"""A run's model with the preprocessing it is evaluated with, to predict by.

    predictor = lookup_vit.load(WORKDIR)
    predictor.predict(["a.jpg", "b.png"], grid=(3, 3)).top(5)

Arrays need no TensorFlow.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lookup_vit import checkpoints, config_utils, loops, parallel, tokenizer
from lookup_vit.models import decoding, pooling, tokens
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")

_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What a model says of `n` images or videos.

  Attributes:
    grid: the compressed grid; None for a model without one.
    probabilities: `[n, classes]`, float32: of a softmax, or for each class by
      itself of a sigmoid, as the run was trained; None for captions.
    classes: their names; None for captions.
    captions: one of each image; None for classes.
  """

  grid: tokens.Grid | None
  probabilities: np.ndarray | None = None
  classes: Sequence[str] | None = None
  captions: list[str] | None = None

  def top(self, count: int = 5) -> list[list[tuple[str, float]]]:
    """Of each image the most probable classes, with their probabilities.

    Raises:
      ValueError: these are captions.
    """
    if self.probabilities is None:
      raise ValueError("A captioner has captions, no classes.")
    best = np.argsort(-self.probabilities, axis=-1, kind="stable")[:, :count]
    return [
      [(self.classes[i], float(row[i])) for i in places]
      for row, places in zip(self.probabilities, best, strict=True)
    ]


class Predictor:
  """A model with the preprocessing that it is evaluated with, on one device.

  Make it with `load`. Where `images` are asked for, they are
    paths of image files, or of videos for a model of clips: they are read by
      the op-string `pp`;
    or decoded ones, uint8 `[height, width, 3]`, clips `[time, height, width,
      3]`: likewise;
    or what `preprocess` returns, float32 `[n, *image_size, 3]`, usually in [-1,
      1]: this needs no TensorFlow.
  `grid` is the compressed grid, a tuple; the model's own where none is given.
  Batches are filled up to `batch_size`, so that a function is compiled once for
  a grid.

  Args:
    config: of a run, resolved.
    params: of its model; None until there are any.
    step: of the training, that the parameters are of.
    classes: their names; numbers where none are given.
    pp: op-string; that of the evaluator where none is given.
    evaluator: the name of one in `config.evals`; that which the run is judged
      by where none is given (see `config_utils.evaluation`).
    batch_size: of images, or views of clips, that are computed at once.

  Attributes:
    config: likewise.
    params: likewise.
    step: likewise.
    classes: likewise; None of a captioner.
    pp: likewise, with an op that resizes where an evaluator's has none; None
      where there is neither it nor an evaluator.
    views: of each example, as the evaluator has them; logits are averaged.
    program: the `Program`, over one device.
    model: its model.
    grids: the compressed grids of the training; [None] of a model without any.
    image_size: (rows, columns), or (time, rows, columns) of clips.
    batch_size: see above.

  Raises:
    ValueError: anything that cannot work.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    params: Any = None,
    *,
    step: int | None = None,
    classes: Sequence[str] | None = None,
    pp: str | None = None,
    evaluator: str | None = None,
    batch_size: int = _BATCH_SIZE,
  ):
    if type(batch_size) is not int or batch_size < 1:
      raise ValueError(f"batch_size={batch_size!r}: want an integer >= 1.")
    self.config = config
    self.params, self.step = params, step
    self.batch_size = batch_size
    self.image_size = tuple(config.input.image_size)
    fields = {}
    if evaluator or pp is None:
      # To predict from arrays, none has to say how to read files.
      with contextlib.suppress(() if evaluator else ValueError):
        fields = config_utils.evaluation(config, evaluator)
    self.pp, self.views = pp, fields.get("views", 1)
    if pp is None and "pp_fn" in fields:
      self.pp = with_resize(fields.pp_fn, self.image_size[-2:])
    self._data = fields.get("data") or config.input.data
    config = config.copy_and_resolve_references()
    config.mesh, config.sharding = [("data", -1)], "replicated"
    # What only an update would need of a batch is not asked of this one.
    config.grad_accum_steps = 1
    config.mixup.p = config.cutmix.p = 0.0
    self.program = Program(config, config.total_steps, jax.local_devices()[:1])
    self.model = self.program.model
    self.grids = self.program.grids
    self._encoder = getattr(self.model, "encoder", self.model)
    self._functions = {}
    self._told = set()
    self.classes = None
    if self._captions:
      self._search = _search(config, evaluator)
    else:
      self._probabilities = jax.jit(self.program.task.probabilities)
      names = classes or map(str, range(config.num_classes))
      self.classes = list(names)
      if len(self.classes) != config.num_classes:
        raise ValueError(
          f"{len(self.classes)} names of classes, config.num_classes is "
          f"{config.num_classes}."
        )

  def restore(self, workdir: str, step: int | None = None) -> None:
    """Reads `params`, of the newest checkpoint where no `step` is given.

    Raises:
      ValueError: there is none, or a damaged one.
    """
    self.params, self.step, _ = checkpoints.load_params(workdir, step)

  @property
  def _captions(self):
    return hasattr(self.model, "start")

  def check_grid(self, grid: tokens.Grid | None) -> tokens.Grid | None:
    """The grid that is computed at where this one is asked for.

    Says so where the run was not trained at it.

    Raises:
      ValueError: the model has no such grid.
    """
    if self.grids == [None]:
      if grid is not None:
        raise ValueError(
          f"grid={grid!r}: model {self.config.model_name!r} has no compressed "
          "grid."
        )
      return None
    grid = self.model.grid if grid is None else grid
    is_tuple = isinstance(grid, tuple | list)
    if not is_tuple or not all(isinstance(g, int) for g in grid):
      raise ValueError(f"grid={grid!r}: want a tuple of integers, as (3, 3).")
    grid = tokens.check_grid(grid, self.model.lookup_grid(self.image_size))
    if grid not in self.grids and grid not in self._told:
      self._told.add(grid)
      log.info(
        "The run was not trained at %s, only at %s.",
        config_utils.format_grid(grid),
        ", ".join(map(config_utils.format_grid, self.grids)),
      )
    return grid

  def preprocess(self, images: Any) -> np.ndarray:
    """Images as the model takes them.

    Args:
      images: see above.

    Returns:
      `[n, *image_size, 3]`, float32; `[n, views, *image_size, 3]` where there
      are several.

    Raises:
      ValueError: a file that cannot be read, it is named; or something else.
    """
    if isinstance(images, str | os.PathLike):
      images = [images]
    if not len(images):
      raise ValueError("Want at least one image.")
    first = images[0]
    if not isinstance(first, str | os.PathLike):
      dtype = getattr(first, "dtype", np.dtype(object))
      if jnp.issubdtype(dtype, jnp.floating):
        return self._as_they_are(np.asarray(images, np.float32))
      if dtype != np.uint8:
        raise ValueError(
          f"Images are {type(first).__name__}: want paths, or arrays of uint8 "
          "or float32."
        )
    return np.stack(list(loops.in_threads(self.reader, images)))

  def _as_they_are(self, images):
    want = (*self.image_size, 3)
    views = (self.views, *want)
    if images.shape[1:] not in (want, views):
      raise ValueError(
        f"Images of shape {images.shape}: want float32 [n, "
        f"{', '.join(map(str, want))}] in [-1, 1], or uint8 images or paths."
      )
    return images

  @functools.cached_property
  def reader(self) -> Any:
    """The `image_files.Reader` of the op-string."""
    # They want TensorFlow, which arrays do not.
    from lookup_vit import datasets, image_files

    if self.pp is None:
      config_utils.evaluation(self.config)  # It says what is missing.
    options = {}
    if self._data and len(self.image_size) == 3:
      options = datasets.frame_options(self._data)
    return image_files.Reader(self.pp, self.image_size, self.views, options)

  def _batches(self, images) -> Iterator[np.ndarray]:
    """Preprocessed, so many at a time that not all are in memory."""
    if isinstance(images, str | os.PathLike):
      images = [images]
    size = max(1, self.batch_size // self.views)
    for start in range(0, max(1, len(images)), size):
      yield self.preprocess(images[start : start + size])

  def _compute(self, what, images, grid, *options):
    """`what` of each view `[n, views, ...]`; a tree of arrays."""
    key = (what, options)
    if key not in self._functions:
      function = functools.partial(getattr(self, f"_{what}"), *options)
      self._functions[key] = self.program.compile(
        function, parallel.replicated(self.program.mesh), static_argnums=2
      )
    function = functools.partial(self._functions[key], self.params)
    found = []
    for batch in self._batches(images):
      views = batch.reshape(-1, *self.image_size, 3)
      found.append(self._in_batches(lambda x: function(x, grid), views))
    per = len(views) // len(batch)
    return jax.tree.map(
      lambda *x: np.concatenate(x).reshape(-1, per, *x[0].shape[1:]), *found
    )

  def _in_batches(self, function, x):
    """What a function makes of the rows of an array; a tree of arrays."""
    found = []
    for start in range(0, len(x), self.batch_size):
      part = x[start : start + self.batch_size]
      fill = [(0, self.batch_size - len(part)), *[(0, 0)] * (x.ndim - 1)]
      made = jax.device_get(function(np.pad(part, fill)))
      found.append(_first(made, len(part)))
    return jax.tree.map(lambda *x: np.concatenate(x), *found)

  def predict(
    self, images: Any, grid: tokens.Grid | None = None
  ) -> Predictions:
    """Probabilities of classes, or captions.

    Captions are found as by the run's evaluator of captions.

    Args:
      images: see above.
      grid: likewise.

    Raises:
      ValueError: a file that cannot be read, or images or a grid that do not
        fit the model.
    """
    grid = self.check_grid(grid)
    if self._captions:
      ids = self._compute("caption", images, grid)[:, 0]
      return Predictions(grid, captions=list(map(self._words.decode, ids)))
    logits = self._compute("logits", images, grid).mean(1)
    probabilities = self._in_batches(self._probabilities, logits)
    return Predictions(grid, probabilities, self.classes)

  def features(
    self,
    images: Any,
    grid: tokens.Grid | None = None,
    features: str | None = None,
    block: int | None = None,
  ) -> np.ndarray:
    """One vector of each image: a mean of the encoder's tokens.

    Args:
      images: see above.
      grid: likewise.
      features: as `pooling.check` takes them.
      block: likewise.

    Returns:
      `[n, width]`, float32; for both features `[n, 2 * width]`. The mean of
      several views.

    Raises:
      ValueError: as of `predict` or `pooling.check`.
    """
    grid = self.check_grid(grid)
    pooling.check(self._encoder, features, block)
    return self._compute("features", images, grid, features, block).mean(1)

  def tokens(
    self, images: Any, grid: tokens.Grid | None = None
  ) -> dict[str, np.ndarray]:
    """The tokens at the end of the encoder.

    Args:
      images: see above.
      grid: likewise.

    Returns:
      By name, as the model has them: of a LookupViT `compressed_tokens [n, m,
      width]` and `lookup_tokens`, of a ViT `tokens`; `[n, views, ...]` where
      there are several.

    Raises:
      ValueError: as of `predict`.
    """
    found = self._compute("tokens", images, self.check_grid(grid))
    return {n: x[:, 0] if x.shape[1] == 1 else x for n, x in found.items()}

  def _logits(self, params, images, grid):
    fields = {} if grid is None else {"grid": grid}
    return self.model.apply({"params": params}, images, **fields)[0]

  @functools.cached_property
  def _words(self):
    return tokenizer.load(self.config.tokenizer)

  def _caption(self, params, images, grid):
    fields = {} if grid is None else {"grid": grid}
    return decoding.caption(
      self.model,
      params,
      images,
      begin=self._words.begin,
      end=self._words.end,
      **self._search,
      **fields,
    )

  def _encode(self, params, images, grid, capture):
    fields = {} if grid is None else {"grid": grid}
    params = {"params": params.get("encoder", params)}
    return self._encoder.apply(params, images, capture=capture, **fields)[1]

  def _features(self, features, block, params, images, grid):
    out = self._encode(params, images, grid, pooling.capture(block))
    return pooling.pool(out, features, block)

  def _tokens(self, params, images, grid):
    out = self._encode(params, images, grid, ("tokens",))
    return {
      name: x
      for name, x in out.items()
      if "tokens" in name and "block_" not in name
    }


def with_resize(pp: str, size: Sequence[int]) -> str:
  """An op-string that images of any size go through.

  Where all examples of a data set have the size of the model, a run's has none
  that resizes; to them, this one does nothing.

  Args:
    pp: an op-string.
    size: (rows, columns) of the model.
  """
  segments = pp.split("|")
  names = [segment.partition("(")[0].strip() for segment in segments]
  sized = [n for n in names if "resize" in n or "inception_crop" in n]
  for i, name in enumerate(names):
    if name in ("decode", "decode_clip") and not sized:
      segments.insert(i + 1, f"resize({tuple(size)},antialias=True)")
      break
  return "|".join(segments)


def _first(tree, count):
  return jax.tree.map(lambda x: x[:count], tree)


def _search(config, name):
  """How captions are searched for: as by the run's evaluator of captions."""
  names = [name] if name else config_utils.evals_in_order(config.evals)
  all_fields = [config.evals[name] for name in names]
  of = [f for f in all_fields if f.get("type") == "captions"]
  fields = of[0] if of else {}
  return dict(
    beams=fields.get("beams", decoding.BEAMS),
    alpha=fields.get("alpha", decoding.ALPHA),
    length=fields.get("max_length"),
  )


def prepare(workdir: str, step: int | None = None, **options: Any) -> Predictor:
  """As `load`, without parameters: what can be wrong is found before these."""
  config = config_utils.read_workdir(workdir)
  checkpoints.check(workdir, step)
  if config.tokenizer is not None:
    config.tokenizer = tokenizer.of_workdir(workdir)
    tokenizer.of_config(config)
  classes = checkpoints.read_classes(workdir)
  return Predictor(config, classes=classes, **options)


def load(workdir: str, step: int | None = None, **options: Any) -> Predictor:
  """A run's model, ready to predict.

  Args:
    workdir: of a training run.
    step: of a checkpoint; the newest where none is given.
    **options: `pp`, `evaluator` and `batch_size` of `Predictor`.

  Raises:
    ValueError: no work directory, no such checkpoint, a damaged one, or an
      option that cannot work.
  """
  predictor = prepare(workdir, step, **options)
  predictor.restore(workdir, step)
  return predictor
