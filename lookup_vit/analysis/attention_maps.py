r"""Which lookup tokens compressed tokens read, drawn over images.

The cross-attention of LookupViT's blocks (arXiv:2407.12753, figures 1a, 6 and
7), for image files that `image_files.py` reads, from a work directory:

    python -m lookup_vit.analysis.attention_maps --workdir=WORKDIR \
        --images=a.jpg,b.png --output=maps.png

draws for each image a row for each grid of the training: the input, then the
maps of four compressed tokens, those of the first grid and, at other grids, the
ones whose cell holds the same point of the image. A frame marks the cell. What
is drawn can be chosen:

    --grid=3x3,5x5        compressed grids, also such as were not trained
    --tokens='(1,1);(0,2)'  places (row, column) in the first grid, or all
    --blocks=0,-1         from 0 on, or from the last, -1
    --heads=0,1           from 0 on, or mean
    --kind=grid           all maps of a grid at once, arranged as the grid

Each map is bright where it is near its own largest value. The images are
preprocessed as by the run's evaluator `val` or else `test`, or by `--pp`.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from absl import flags
from etils import epath

from lookup_vit import checkpoints, cli, config_utils
from lookup_vit.analysis import cross_attention
from lookup_vit.models import tokens
from lookup_vit.train_step import Program

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")

KINDS = ("tokens", "grid")

# Rows and columns of a picture, whose sides may have 2**16 pixels.
_MOST = 128


def upsample(one: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """A map `[rows, columns]` to `[height, width]`, linearly."""
  return np.asarray(jax.image.resize(one, size, "linear"))


def as_pixels(image: np.ndarray) -> np.ndarray:
  """Values in [-1, 1] to uint8."""
  return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def overlay(image: np.ndarray, one: np.ndarray) -> np.ndarray:
  """Colours a map, from 0 to its largest value, over an image in grey.

  Args:
    image: `[height, width, 3]` in [-1, 1].
    one: the map, `[rows, columns]`, not negative.

  Returns:
    `[height, width, 3]`, uint8; 0.6 of it is the map's colour.
  """
  one = upsample(one, image.shape[:2])
  colours = matplotlib.colormaps["inferno"](one / one.max())[..., :3]
  grey = np.mean((np.clip(image, -1, 1) + 1) / 2, axis=-1, keepdims=True)
  return np.round(255 * (0.4 * grey + 0.6 * colours)).astype(np.uint8)


def mosaic(tiles: np.ndarray) -> np.ndarray:
  """`[rows, columns, height, width, 3]` to one picture, white between them."""
  rows, columns, height, width, _ = tiles.shape
  gap = max(1, height // 16)
  pad = [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)]
  tiles = np.pad(tiles, pad, constant_values=255)
  whole = tiles.swapaxes(1, 2).reshape(
    rows * (height + gap), columns * (width + gap), 3
  )
  return whole[:-gap, :-gap]


class Panel(NamedTuple):
  """A part of a picture.

  Attributes:
    title: above it.
    pixels: `[height, width, 3]`, uint8.
    frame: left, top, width and height of what is marked, in pixels.
  """

  title: str
  pixels: np.ndarray
  frame: tuple[float, float, float, float] | None = None


class Row(NamedTuple):
  """A row of panels, and what is said before it."""

  label: str
  panels: list[Panel]


def token_rows(
  program: Program,
  params: Any,
  images: np.ndarray,
  grids: Sequence[tokens.Grid],
  blocks: Sequence[int] = (-1,),
  heads: Sequence[int] | None = None,
  places: Sequence[tokens.Grid] | None = None,
) -> list[Row]:
  """Images beside the maps of chosen compressed tokens (figures 6 and 7).

  Args:
    program: as `cross_attention.maps` takes it.
    params: likewise.
    images: `[batch, height, width, 3]` in [-1, 1].
    grids: compressed grids.
    blocks: as `cross_attention.maps` takes them.
    heads: likewise.
    places: (row, column) in the first grid; of another grid, `same_place`. By
      default four, `evenly_spaced`.

  Returns:
    A row for each image, grid, block and head, in this order: the image, and a
    panel for each place.

  Raises:
    ValueError: as of `cross_attention.maps`; a place that is not in the grid;
      or too many for a picture.
  """
  if places is None:
    places = cross_attention.evenly_spaced(grids[0], 4)
  cross_attention.check_places(places, grids[0])
  count = len(images) * len(grids) * len(blocks) * len(heads or [None])
  check_count(count, len(places) + 1)
  height, width = images.shape[1:3]
  rows = []
  for image, labelled in _each(program, params, images, grids, blocks, heads):
    for label, grid, maps in labelled:
      panels = [Panel("input", as_pixels(image))]
      for place in places:
        here = cross_attention.same_place(place, grids[0], grid)
        cell = height / grid[0], width / grid[1]
        frame = (here[1] * cell[1], here[0] * cell[0], cell[1], cell[0])
        panels.append(Panel(str(here), overlay(image, maps[here]), frame))
      rows.append(Row(label, panels))
  return rows


def grid_rows(
  program: Program,
  params: Any,
  images: np.ndarray,
  grids: Sequence[tokens.Grid],
  blocks: Sequence[int] = (-1,),
  heads: Sequence[int] | None = None,
) -> list[Row]:
  """Images beside all maps of a grid, arranged as the grid (figure 1a).

  Args:
    program: as `cross_attention.maps` takes it.
    params: likewise.
    images: `[batch, height, width, 3]` in [-1, 1].
    grids: compressed grids.
    blocks: as `cross_attention.maps` takes them.
    heads: likewise.

  Returns:
    A row for each image: the image, and a panel for each grid, block and head.

  Raises:
    ValueError: as of `cross_attention.maps`, or too many for a picture.
  """
  count = len(grids) * len(blocks) * len(heads or [None])
  check_count(len(images), count + 1)
  rows = []
  for image, labelled in _each(program, params, images, grids, blocks, heads):
    panels = [Panel("input", as_pixels(image))]
    for label, grid, maps in labelled:
      # One after another: in colour, many are large.
      flat = maps.reshape(-1, *maps.shape[2:])
      tiles = np.stack([overlay(image, one) for one in flat])
      tiles = tiles.reshape(*grid, *tiles.shape[1:])
      panels.append(Panel(label, mosaic(tiles)))
    rows.append(Row("", panels))
  return rows


def _each(
  program, params, images, grids, blocks, heads
) -> Iterator[tuple[np.ndarray, list[tuple[str, tokens.Grid, np.ndarray]]]]:
  """Each image with label, grid and maps `[*grid, rows, columns]`."""
  found = [
    cross_attention.maps(program, params, images, grid, blocks, heads)
    for grid in grids
  ]
  model = cross_attention.encoder(program)
  blocks, heads = cross_attention.check_chosen(model, blocks, heads)
  names = [f"block {i}" for i in blocks]
  of_heads = ["mean of heads"]
  if heads is not None:
    of_heads = [f"head {i}" for i in heads]
  for i, image in enumerate(images):
    labelled = []
    for grid, maps in zip(grids, found, strict=True):
      maps = maps[i].reshape(*maps.shape[1:3], *grid, *maps.shape[4:])
      name = config_utils.format_grid(grid)
      for b, h in itertools.product(range(len(names)), range(len(of_heads))):
        label = f"{name}, {names[b]}, {of_heads[h]}"
        labelled.append((label, grid, maps[b, h]))
    yield image, labelled


def check_count(rows: int, columns: int) -> None:
  """Raises ValueError where a picture would have too many panels."""
  if max(rows, columns) > _MOST:
    raise ValueError(
      f"{rows} rows of {columns} are too many for a picture, which has at most "
      f"{_MOST} of each: choose fewer images, grids, blocks, heads or tokens."
    )


def draw(path: str, rows: Sequence[Row], inches: float = 1.2) -> None:
  """Draws rows of panels as a PNG.

  Args:
    path: the PNG to write.
    rows: as of `token_rows` or `grid_rows`.
    inches: size of a panel; an inch has 150 pixels.
  """
  columns = max(len(row.panels) for row in rows)
  figure, axes = plt.subplots(
    len(rows),
    columns,
    figsize=(inches * columns, (inches + 0.05) * len(rows) + 0.5),
    squeeze=False,
    layout="constrained",
  )
  for row, of_row in zip(rows, axes, strict=True):
    of_row[0].set_ylabel(row.label.replace(", ", "\n"), fontsize=6)
    for axis, panel in zip(of_row, row.panels, strict=True):
      axis.imshow(panel.pixels)
      axis.set_title(panel.title, fontsize=7)
      axis.set_xticks([])
      axis.set_yticks([])
      axis.spines[:].set_visible(False)
      if panel.frame is not None:
        left, top, width, height = panel.frame
        # A colour that is in no map; at the border of the image it is whole.
        axis.add_patch(
          plt.Rectangle(
            (left - 0.5, top - 0.5),
            width,
            height,
            fill=False,
            color="c",
            clip_on=False,
          )
        )
  figure.suptitle("Lookup tokens that compressed tokens read", fontsize=9)
  save(figure, path)


def save(figure: Any, path: str) -> None:
  """Writes a figure as a PNG, and closes it."""
  with epath.Path(path).open("wb") as f:
    figure.savefig(f, dpi=150, format="png")
  plt.close(figure)


def draw_files(
  workdir: str,
  paths: Sequence[str],
  output: str,
  *,
  kind: str = "tokens",
  grids: Sequence[tokens.Grid] | None = None,
  blocks: Sequence[int] = (-1,),
  heads: Sequence[int] | None = None,
  places: Sequence[tokens.Grid] | str | None = None,
  pp: str | None = None,
  step: int | None = None,
) -> None:
  """Draws attention maps of image files, from a work directory.

  Args:
    workdir: of a training run on images.
    paths: of image files.
    output: the PNG to write.
    kind: "tokens" for `token_rows`, "grid" for `grid_rows`.
    grids: compressed grids; those of training where none are given.
    blocks: as `cross_attention.maps` takes them.
    heads: likewise.
    places: as `token_rows` takes them, or "all".
    pp: op-string; that of `config_utils.evaluation` where none is given.
    step: of a checkpoint; the newest where none is given.

  Raises:
    ValueError: a work directory, file or value that cannot work.
  """
  # Only image files want TensorFlow.
  from lookup_vit import image_files

  config = config_utils.read_workdir(workdir)
  size = config.input.image_size
  if len(size) != 2:
    raise ValueError(
      f"{workdir} is of clips of {config_utils.format_grid(size)}, not of "
      "images. Its maps of clips are drawn when its training ends."
    )
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r}: want one of {', '.join(KINDS)}.")
  if not paths:
    raise ValueError("Want at least one image.")
  folder = epath.Path(output).parent
  if not folder.is_dir() or epath.Path(output).is_dir():
    raise ValueError(f"output={output!r}: want a file in a directory there is.")
  config.mesh, config.sharding = [("data", -1)], "replicated"
  program = Program(config, config.total_steps, jax.local_devices()[:1])
  model = cross_attention.encoder(program)
  trained = program.grids
  grids = [
    tokens.check_grid(grid, model.lookup_grid(size))
    for grid in grids or trained
  ]
  cross_attention.check_chosen(model, blocks, heads)
  if kind == "grid" and places is not None:
    raise ValueError("kind='grid' draws all tokens: there are none to choose.")
  if places == "all":
    places = list(np.ndindex(*grids[0]))
  cross_attention.check_places(places or (), grids[0])
  images = image_files.read(
    paths, pp or config_utils.evaluation(config).pp_fn, size
  )
  for grid in grids:
    if grid not in trained:
      log.info(
        "The run was not trained at %s, only at %s.",
        config_utils.format_grid(grid),
        ", ".join(map(config_utils.format_grid, trained)),
      )
  params, step, _ = checkpoints.load_params(workdir, step)
  log.info("Step %d of %s.", step, workdir)
  if kind == "tokens":
    rows = token_rows(program, params, images, grids, blocks, heads, places)
    draw(output, rows)
  else:
    draw(output, grid_rows(program, params, images, grids, blocks, heads), 3.0)


def parse_places(text: str) -> list[tokens.Grid]:
  """`"(1,1);(0,2)"` to `[(1, 1), (0, 2)]`.

  Raises:
    ValueError: the text is not of that form.
  """
  try:
    return [
      tuple(int(p) for p in part.strip(" ()").split(","))
      for part in text.split(";")
    ]
  except ValueError:
    raise ValueError(f"Places are written (1,1);(0,2), not {text!r}.") from None


def _integers(flag, texts):
  try:
    return [int(text) for text in texts]
  except ValueError:
    raise ValueError(
      f"--{flag}={','.join(texts)}: want integers such as 0,1."
    ) from None


def main(argv):
  """Draws by the flags."""
  del argv
  grids = None
  if FLAGS.grid:
    with config_utils.at_fault("--grid"):
      grids = [config_utils.parse_grid(text) for text in FLAGS.grid]
  places = FLAGS.tokens
  if places not in (None, "all"):
    with config_utils.at_fault("--tokens"):
      places = parse_places(places)
  heads = None if FLAGS.heads == ["mean"] else _integers("heads", FLAGS.heads)
  draw_files(
    FLAGS.workdir,
    FLAGS.images,
    FLAGS.output,
    kind=FLAGS.kind,
    grids=grids,
    blocks=_integers("blocks", FLAGS.blocks),
    heads=heads,
    places=places,
    pp=FLAGS.pp,
    step=FLAGS.step,
  )
  print(f"Drawn: {FLAGS.output}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Of a training run.", required=True)
  flags.DEFINE_list("images", None, "Image files.", required=True)
  flags.DEFINE_string("output", "attention_maps.png", "The PNG to draw.")
  flags.DEFINE_enum("kind", "tokens", KINDS, "Some tokens, or the whole grid.")
  flags.DEFINE_list(
    "grid", None, "Compressed grids, as 3x3,5x5; the run's if not set."
  )
  flags.DEFINE_string(
    "tokens", None, "Places such as (1,1);(0,2), or all; four if not set."
  )
  flags.DEFINE_list("blocks", ["-1"], "Blocks, from 0 or from the last, -1.")
  flags.DEFINE_list("heads", ["mean"], "Heads, from 0; or mean.")
  flags.DEFINE_string("pp", None, "Op-string; the evaluator's if not set.")
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not set.")
  cli.run(main)
