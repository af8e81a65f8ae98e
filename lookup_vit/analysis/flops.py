r"""Parameters and FLOPs of a config's model at every grid.

Counted by XLA's cost analysis of one forward pass, and by formula; for MHBC as
the paper has it (`models/mhbc.py`, "direct"), which is the model's cost in
tables of results, and as the model computes it ("executed"; kernels of TPUs
have more, for padded rows). GFLOPs are multiply-adds times 2e-9; papers on ViT
often call half of that "GFLOPs".

    python -m lookup_vit.analysis.flops --config=configs/in1k_lookup_b.py \
        --grid=3x3,5x5,7x7,10x10
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from lookup_vit import cli, config_utils, train_step
from lookup_vit.models import factorised, lookup_vit, mhbc, tokens, vit

FLAGS = flags.FLAGS

# What the formula is of, and not what is made of them elsewhere.
_BY_FORMULA = (
  *(vit.ViT, factorised.FactorisedViT),
  *(lookup_vit.LookupViT, factorised.FactorisedLookupViT),
)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Parameters, and the cost of a forward pass over one image or clip.

  The FLOPs are those with MHBC as in the paper, and those that are executed.
  Those by formula are None of a model that it is not of.
  """

  params: int
  xla_flops: float
  formula_flops: float | None
  executed_xla_flops: float
  executed_flops: float | None


def cost(model: Any, image_size: Sequence[int], grid: Any = None) -> Cost:
  """Counts a model's parameters and FLOPs, by shapes alone.

  Args:
    model: a ViT, a LookupViT, or a factorised encoder with either, or a model
      of your own; of a captioner, its image encoder counts.
    image_size: (rows, columns) or (time, rows, columns).
    grid: compressed grid; the model's own where none is given.
  """
  model = getattr(model, "encoder", model)
  # XLA sees the body of a loop once, and counts a change of dtype as work:
  # count without either.
  plain = dict(
    scan=False, remat_policy="none", dtype="float32", attention="direct"
  )
  model = model.clone(**{k: v for k, v in plain.items() if hasattr(model, k)})
  paper = model
  if hasattr(model, "grid"):
    paper = model.clone(mhbc_impl="direct")
    # What XLA would see of kernels on a TPU is not their products.
    n, m = _tokens(model, image_size, grid)
    model = model.clone(
      mhbc_impl="absorbed" if _absorbs(model, n, m) else "direct"
    )
  params, xla, macs = _count(paper, image_size, grid)
  executed = xla, macs
  if paper != model:
    _, *executed = _count(model, image_size, grid)
  return Cost(params, xla, _twice(macs), executed[0], _twice(executed[1]))


def _twice(macs):
  return None if macs is None else 2.0 * macs


def _count(model, image_size, grid):
  """Parameters, FLOPs by XLA, and multiply-adds by formula, if it has one."""
  images = jax.ShapeDtypeStruct((1, *image_size, 3), np.float32)
  fields = {} if grid is None else {"grid": tuple(grid)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(
    functools.partial(model.init, **fields), key, images
  )
  forward = lambda v, x: model.apply(v, x, **fields)[0]  # noqa: E731
  analysis = jax.jit(forward).lower(variables, images).cost_analysis()
  params = sum(math.prod(x.shape) for x in jax.tree.leaves(variables))
  macs = None
  if type(model) in _BY_FORMULA:
    macs = multiply_adds(model, image_size, grid)
  return params, float(analysis["flops"]), macs


def multiply_adds(
  model: Any, image_size: Sequence[int], grid: Any = None
) -> int:
  """Multiply-adds of a forward pass over one image or clip, by formula.

  With `N` lookup and `M` compressed tokens, width `D`, MLP ratios `p` and `r`:
  a ViT block has `(4 + 2p) N D^2 + 2 N^2 D`, a LookupViT block `((3 + 2r) N +
  (7 + 2p) M) D^2 + (3NM + 2M^2) D` with direct MHBC, and with `H` heads of it
  absorbed `(2r N + (10 + 2p) M) D^2 + (3NMH + 2M^2) D`. Added are the patch
  embedding and the classifiers; resizing of grids, norms and mean pooling are
  left out. A factorised encoder has its blocks on each slice, and ViT blocks on
  the `T` vectors of a clip, once for each head. What the output does not depend
  on is left out, as XLA does: with heads="compressed", and without a
  classifier, the contextualisation of the last block.
  """
  lookup_grid = tokens.lookup_grid(image_size, model.patch_size)
  n, d = math.prod(lookup_grid), model.width
  stem = _stem(model, lookup_grid)
  heads = len(_heads(model)) if hasattr(model, "grid") else 1
  rest = heads * (model.num_classes or 0) * d
  slices = 1
  if hasattr(model, "temporal_depth"):
    slices = lookup_grid[0]
    rest += heads * model.temporal_depth * _vit_block(model, slices)
  return stem + slices * _encoder(model, n // slices, grid) + rest


def _tokens(model, image_size, grid):
  """Lookup and compressed tokens that meet in MHBC."""
  lookup_grid = tokens.lookup_grid(image_size, model.patch_size)
  slices = lookup_grid[0] if hasattr(model, "temporal_depth") else 1
  m = math.prod(model.grid if grid is None else grid)
  return math.prod(lookup_grid) // slices, m


def _absorbs(model, n, m):
  heads = model.mhbc_heads or model.num_heads
  return mhbc.absorbs(model.mhbc_impl, m, n, heads, model.width)


def _stem(model, lookup_grid):
  """From pixels to a grid of tokens; padding is not counted, as by XLA."""
  d, patch = model.width, model.patch_size
  n = math.prod(lookup_grid)
  if model.stem == "patch":
    return n * math.prod(patch) * 3 * d
  sides = [g * p for g, p in zip(lookup_grid, patch, strict=True)]
  macs, before = 0, 3
  for channels, stride in tokens.stem_convolutions(model.stem, d, patch):
    sides = [side // stride for side in sides]
    # Three pixels for each, but at borders: the first, with stride 1 the last.
    pixels = math.prod(3 * side - (1 if stride == 2 else 2) for side in sides)
    macs += pixels * before * channels
    before = channels
  return macs + n * d * d


def _heads(model):
  """Those of a LookupViT that its output depends on."""
  names = lookup_vit.HEADS[model.heads]
  return names if model.num_classes else names[:1]


def _vit_block(model, n):
  """Of `n` tokens."""
  d, hidden = model.width, round(model.width * model.mlp_ratio)
  return n * (4 * d * d + 2 * d * hidden) + 2 * n * n * d


def _encoder(model, n, grid):
  """From `n` tokens of patches to pooled tokens."""
  d, hidden = model.width, round(model.width * model.mlp_ratio)
  if not hasattr(model, "grid"):
    n += model.pool == "tok"
    pool = 0
    if model.pool == "map":
      pool = 2 * (n + 1) * d * d + 2 * n * d + 2 * d * hidden
    return model.depth * _vit_block(model, n) + pool
  m = math.prod(model.grid if grid is None else grid)
  refine = _vit_block(model, m)
  if _absorbs(model, n, m):
    product, rest = n * m * (model.mhbc_heads or model.num_heads) * d, m
    # A norm of keys needs them.
    keys = n * d * d + n * m * d if model.qk_norm else m * d * d + product
  else:
    product, rest = n * m * d, n
    keys = n * d * d + product
  gather = 2 * m * d * d + keys + rest * d * d + product
  back = (m + rest) * d * d + product if model.reuse != "none" else 0
  back += 2 * n * d * round(d * model.lookup_mlp_ratio)
  backs = model.depth - ("lookup" not in _heads(model))
  return model.depth * (gather + refine) + backs * back


def table(model: Any, image_size: Sequence[int], grids: Sequence[Any]) -> str:
  """A table in Markdown: a row for each grid."""
  lines = [
    "| compressed grid | parameters (M) | GFLOPs (XLA) | GFLOPs (formula) "
    "| executed GFLOPs (XLA) | executed GFLOPs (formula) |",
    "|---|---|---|---|---|---|",
  ]
  for grid in grids:
    c = cost(model, image_size, grid)
    name = "-" if grid is None else config_utils.format_grid(grid)
    counts = [c.xla_flops, c.formula_flops]
    counts += [c.executed_xla_flops, c.executed_flops]
    cells = [name, f"{c.params / 1e6:.2f}"]
    cells += ["-" if n is None else f"{n / 1e9:.3f}" for n in counts]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def main(argv):
  """Prints the table of a config."""
  del argv
  config = config_utils.resolve(config_utils.load(FLAGS.config))
  if config.num_classes is None:  # To be read off the data.
    config.num_classes = 1000
  model = train_step.build_model(config)
  grids = train_step.train_grids(config, model)
  if FLAGS.grid:
    if grids == [None]:
      raise ValueError(
        f"--grid: model {config.model_name!r} has no compressed grid."
      )
    grids = [config_utils.parse_grid(g) for g in FLAGS.grid]
  size = config.input.image_size
  name, fields = config.model_name, config.model
  if "encoder" in fields:
    name, fields = "encoder of a captioner", fields.encoder
  variant = fields.get("variant", "B/16")
  print(f"{name} {variant}, input {tuple(size)}")
  print(table(model, size, grids))


if __name__ == "__main__":
  flags.DEFINE_string(
    "config", None, "configs/NAME.py[:key=value,...]", required=True
  )
  flags.DEFINE_list(
    "grid", None, "Compressed grids, as 3x3,5x5; the config's if not set."
  )
  cli.run(main)
