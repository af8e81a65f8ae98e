"""Features of a split, which probes of a frozen backbone are made of."""

import abc
import dataclasses
import hashlib
import io
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lookup_vit import (
  checksums,
  config_utils,
  datasets,
  descriptions,
  input_pipeline,
  loops,
  parallel,
)
from lookup_vit.evaluators import shared
from lookup_vit.models import pooling
from lookup_vit.train_step import Program

log = logging.getLogger("lookup_vit")

_FOLDER = "features"


@dataclasses.dataclass(frozen=True)
class Split:
  """Features `[n, width]` of the examples of a split, and classes `[n]`."""

  x: np.ndarray
  label: np.ndarray


class Probe(abc.ABC):
  """What classifies a test set by the features of a training set.

  An evaluator of it has `classify(train, test, check)`, which yields pairs of a
  metric's name and value, and attributes `classes`, their number, and `train`
  and `test`, its `Features`.

  Args:
    program: of the backbone.
    name: prefix of the metrics.
    data: the test set, as `config.input.data`.
    pp_fn: op-string for both sets; nothing in it is random.
    train: the training set; `config.input.data` where none is given.
    batch_size: global; that of training where none is given.
    grids: compressed grids; those of training where none are given.
    features: of LookupViT, "compressed" (where none are given), "lookup" or
      "both".
    block: whose tokens are averaged; None for the pre-logits.
    **unknown: none.

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
    train: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    grids: list[Any] | None = None,
    features: str | None = None,
    block: int | None = None,
    **unknown: Any,
  ):
    self.where = f"config.evals.{name}"
    if unknown:
      raise ValueError(f"{self.where}: there is no field {', '.join(unknown)}.")
    self.name = name
    self.grids = shared.check_grids(program, name, grids)
    if train is None:
      train = program.config.input.data

    def of(field, described):
      return Features(
        *(program, name, field, described, pp_fn),
        *(batch_size, features, block),
      )

    self.train, self.test = of("train", train), of("data", data)
    self.classes = datasets.num_classes(train)
    classes = datasets.num_classes(data)
    if self.classes is None or classes != self.classes:
      raise ValueError(
        f"{self.where}: train has {self.classes} classes, data has {classes}; "
        "want the same."
      )

  def batches(self) -> Iterator[dict[str, Any]]:
    """This process's batches of the test set, padding marked in `_mask`."""
    return iter(self.test.dataset)

  @abc.abstractmethod
  def classify(
    self, train: Split, test: Split, check: Callable[[], None]
  ) -> Iterator[tuple[str, float]]:
    """Names and values of metrics; `check` is called for each fit."""

  def run(
    self,
    params: Any,
    check: Callable[[], None] = lambda: None,
    workdir: str | None = None,
  ) -> Iterator[tuple[str, float]]:
    """Classifies by the features of parameters.

    Args:
      params: of the model.
      check: called for each batch and fit; what it raises ends the evaluation.
      workdir: where features are kept; nowhere if None.

    Yields:
      Names and values.
    """
    parts = (self.train, self.test)
    [train, test] = [
      part.extract(params, self.grids, check, workdir) for part in parts
    ]
    for grid in self.grids:
      prefix = shared.metric_prefix(self.name, grid)
      for metric, value in self.classify(train[grid], test[grid], check):
        yield prefix + metric, value


class Features:
  """Pooled features of every example of a split, and its class.

  They are kept in the work directory, in `features/`, and read from there
  where model, parameters and data are the same; what differs replaces them.

  Args:
    program: of a model; of a captioner, or a probe, its encoder counts.
    name: of the evaluator.
    field: its field that describes the data, for messages.
    data: the data set, as `config.input.data`; no mixture.
    pp_fn: op-string, which makes `image` and `label`.
    batch_size: global; that of training where none is given.
    features: see `pooling.check`.
    block: see there.
    like: others of the same program, `features` and `block`, whose compiled
      forward pass serves these too.

  Raises:
    ValueError: data, preprocessing, features or batch size that cannot work.
  """

  def __init__(
    self,
    program: Program,
    name: str,
    field: str,
    data: Mapping[str, Any],
    pp_fn: str,
    batch_size: int | None,
    features: str | None,
    block: int | None,
    like: "Features | None" = None,
  ):
    where = f"config.evals.{name}"
    self.program = program
    self.name = f"{name}, {field}"
    with config_utils.at_fault(f"{where}.{field}"):
      self.data = descriptions.check(data)
    self.dataset, self.count, self.batch_size = shared.make_batches(
      program, name, self.data, pp_fn, batch_size
    )
    program.check_images(self.dataset.element_spec, f"{where}.pp_fn")
    if "label" not in self.dataset.element_spec:
      raise ValueError(
        f"{where}.pp_fn: a batch has {sorted(self.dataset.element_spec)}; want "
        "'label'."
      )
    self.size = datasets.num_examples(self.data)
    self.pp_fn = pp_fn
    self.encoder = getattr(program.model, "encoder", program.model)
    with config_utils.at_fault(where):
      pooling.check(self.encoder, features, block)
    self.features, self.block = features, block
    self._pool = like and like._pool
    if like is None:
      self._pool = program.compile(
        self._forward, parallel.replicated(program.mesh), static_argnums=2
      )

  def _forward(self, params, images, grid):
    fields = {} if grid is None else {"grid": grid}
    _, out = self.encoder.apply(
      {"params": params.get("encoder", params)},
      images,
      capture=pooling.capture(self.block),
      **fields,
    )
    return pooling.pool(out, self.features, self.block)

  def extract(
    self,
    params: Any,
    grids: Sequence[Any],
    check: Callable[[], None] = lambda: None,
    workdir: str | None = None,
  ) -> dict[Any, Split]:
    """Features at every grid; each process has those of all examples.

    Args:
      params: of the model.
      grids: compressed grids, or [None].
      check: called for each batch; what it raises ends the extraction.
      workdir: where they are kept; None: nowhere.

    Returns:
      By grid, in the order of the split, float32 and int32.
    """
    path, key = None, None
    if workdir is not None:
      name, key = self._name_and_key(params, grids)
      path = config_utils.workdir_path(workdir) / _FOLDER / f"{name}.npz"
      kept = load(path, key)
      if kept is not None:
        log.info("%s: features are those in %s.", self.name, path)
        labels, *found = kept
        return {g: Split(x, labels) for g, x in zip(grids, found, strict=True)}
    labels = np.zeros(self.size, np.int32)
    found = dict.fromkeys(grids)
    for number, batch in enumerate(
      loops.progress(self.dataset, self.count, self.name)
    ):
      check()
      places = input_pipeline.eval_places(
        self.size, self.batch_size, number, jax.process_count()
      )
      real = places >= 0
      batch = {k: batch[k] for k in ("image", "label")}
      batch = parallel.put_batch(batch, self.program.mesh)
      gathered = parallel.gather(batch["label"], self.program.mesh)
      labels[places[real]] = np.asarray(gathered)[real]
      for grid in grids:
        rows = np.asarray(self._pool(params, batch["image"], grid))
        if found[grid] is None:
          found[grid] = np.zeros((self.size, rows.shape[1]), np.float32)
        found[grid][places[real]] = rows[real]
    if path is not None and jax.process_index() == 0:
      save(path, key, [labels, *found.values()])
    return {grid: Split(x, labels) for grid, x in found.items()}

  def _name_and_key(self, params, grids):
    """Of the file: what is asked for, and what it is computed from."""
    asked = [dict(self.data), self.pp_fn, self.features, self.block, grids]
    # Modules of the encoder are its own; fields with `_` are flax's.
    fields = {k: v for k, v in vars(self.encoder).items() if k[0] != "_"}
    source = [
      *(asked, type(self.encoder).__name__, sorted(fields.items(), key=str)),
      *(checksums.of(params), datasets.fingerprint(self.data)),
    ]
    return _digest(asked)[:16], _digest(source)


def _digest(value):
  return hashlib.sha256(repr(value).encode()).hexdigest()


def load(path: epath.Path, key: str) -> list[np.ndarray] | None:
  """The arrays of a file of this key, where every process can read it."""
  arrays = None
  try:
    with path.open("rb") as f, np.load(f, allow_pickle=False) as file:
      if str(file["arr_0"]) == key:
        arrays = [file[f"arr_{i}"] for i in range(1, len(file.files))]
  except FileNotFoundError:
    pass
  except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as e:
    log.warning("%s cannot be read and is made again: %s", path, e)
  have = np.array([arrays is not None])
  if jax.process_count() > 1:
    have = multihost_utils.process_allgather(have)
  return arrays if have.all() else None


def save(path: epath.Path, key: str, arrays: Sequence[np.ndarray]) -> None:
  """Writes a file of arrays, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  content = io.BytesIO()  # `savez` goes back in a file, which no bucket can.
  np.savez(content, np.array(key), *arrays)
  part = path.with_suffix(".tmp")
  part.write_bytes(content.getvalue())
  part.replace(path)
