"""What is measured: models at sizes, in training and in use."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from benchmarks import timing
from configs import in1k_lookup_b, in1k_vit_b
from lookup_vit import config_utils
from lookup_vit.models import tokens

FLAGS = flags.FLAGS

KINDS = ("inference", "train")


@dataclasses.dataclass(frozen=True)
class Place:
  """What is compared with each other: all but the model."""

  kind: str
  image_size: tuple[int, ...]
  batch: int
  dtype: str

  def __str__(self):
    size = size_text(self.image_size)
    return f"{self.kind} at {size}, batch {self.batch}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Way:
  """A model, a ViT where there is no grid, and how it is computed.

  `impl` is the `mhbc_impl` of a LookupViT (`models/mhbc.py`) and the
  `attention` of a ViT (`models/attention.py`).
  """

  grid: tokens.Grid | None
  impl: str

  def __str__(self):
    return self.names()["model"]

  def names(self) -> dict[str, Any]:
    """Plain values for a row of results."""
    grid = None if self.grid is None else config_utils.format_grid(self.grid)
    model = "ViT" if grid is None else f"LookupViT {grid}"
    return dict(model=f"{model}, {self.impl}", grid=grid, impl=self.impl)


def size_text(image_size: Sequence[int]) -> str:
  """`"224"` of a square image, and else `"32x224x224"`."""
  if len(image_size) == 2 and image_size[0] == image_size[1]:
    return str(image_size[0])
  return "x".join(map(str, image_size))


def product(
  kinds: Sequence[str],
  image_sizes: Sequence[tuple[int, ...]],
  batches: Sequence[int],
  dtypes: Sequence[str],
  grids: Sequence[tokens.Grid],
  mhbc: Sequence[str],
  attention: Sequence[str],
) -> tuple[list[Place], list[Way]]:
  """All places, and the models that are compared at each; ViTs come first.

  Raises:
    ValueError: an unknown kind, a batch of none, or a list of none.
  """
  given = dict(kinds=kinds, sizes=image_sizes, batch_sizes=batches)
  given |= dict(dtypes=dtypes, grids=grids, mhbc=mhbc, attention=attention)
  for name, values in given.items():
    if not values:
      raise ValueError(f"--{name}: want at least one.")
  for batch in batches:
    timing.check_numbers(batch_sizes=batch)
  for kind in kinds:
    if kind not in KINDS:
      raise ValueError(f"kind {kind!r}: want one of {', '.join(KINDS)}.")
  places = [
    Place(*x) for x in itertools.product(kinds, image_sizes, batches, dtypes)
  ]
  ways = [Way(None, impl) for impl in attention]
  ways += [Way(tuple(grid), impl) for grid in grids for impl in mhbc]
  return places, ways


def config(
  place: Place, way: Way, variant: str, fields: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """That of the ImageNet-1k training of a model, without mixup.

  Args:
    place: size, batch and dtype.
    way: the model.
    variant: such as "B/16".
    fields: of the model, over those of the config.
  """
  module = in1k_vit_b if way.grid is None else in1k_lookup_b
  made = module.get_config(f"variant={variant}")
  made.input.image_size = place.image_size
  made.input.batch_size = place.batch
  made.mixup.p = 0.0
  made.model.update(dtype=place.dtype, remat_policy="none", scan=False)
  made.model.update(fields)
  if way.grid is None:
    made.model.attention = way.impl
  else:
    made.grids, made.model.grid = [way.grid], way.grid
    made.model.mhbc_impl = way.impl
  return config_utils.resolve(made)


def define_flags(sizes: str, batch_sizes: str, dtypes: str) -> None:
  """Flags that say what is measured."""
  flags.DEFINE_string("variant", "B/16", "Size and patch, such as S/16.")
  flags.DEFINE_list("sizes", sizes, "Sides of images in pixels.")
  flags.DEFINE_integer("frames", None, "Of a clip, where the patch has three.")
  flags.DEFINE_list("grids", "3x3,5x5,7x7,10x10", "Compressed grids.")
  flags.DEFINE_list("kinds", "inference", "inference, train.")
  flags.DEFINE_list("batch_sizes", batch_sizes, "Images or clips at a time.")
  flags.DEFINE_list("dtypes", dtypes, "Of the computation.")
  flags.DEFINE_list("mhbc", "auto", "LookupViT's: see models/mhbc.py.")
  flags.DEFINE_list("attention", "auto", "ViT's: see models/attention.py.")
  flags.DEFINE_integer("depth", None, "Blocks; the variant's if not set.")
  flags.DEFINE_string("remat_policy", "none", "Of both: see models/layers.py.")
  flags.DEFINE_bool("scan", False, "One compiled block for all.")


def from_flags() -> dict[str, Any]:
  """What the flags say, by the names of `product`, and fields of the models.

  Raises:
    ValueError: a flag that is no number or grid.
  """
  frames = () if FLAGS.frames is None else (FLAGS.frames,)
  with config_utils.at_fault("--grids"):
    grids = [config_utils.parse_grid(grid) for grid in FLAGS.grids]
  fields = dict(remat_policy=FLAGS.remat_policy, scan=FLAGS.scan)
  if FLAGS.depth is not None:
    fields["depth"] = FLAGS.depth
  return dict(
    image_sizes=[
      (*frames, side, side) for side in _numbers("sizes", "224,384")
    ],
    grids=grids,
    kinds=FLAGS.kinds,
    batches=_numbers("batch_sizes", "8,64"),
    dtypes=FLAGS.dtypes,
    mhbc=FLAGS.mhbc,
    attention=FLAGS.attention,
    **fields,
  )


def _numbers(flag, example):
  texts = FLAGS[flag].value
  try:
    return [int(text) for text in texts]
  except ValueError:
    raise ValueError(
      f"--{flag}={','.join(texts)}: want numbers such as {example}."
    ) from None
