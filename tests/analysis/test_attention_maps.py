"""Tests of lookup_vit/analysis/attention_maps.py."""

import itertools
import logging
import os

import jax
import matplotlib
import numpy as np
import pytest
from PIL import Image

from lookup_vit import checkpoints, config_utils, train_step
from lookup_vit.analysis import attention_maps, cross_attention
from tests import programs
from tests.models import common

# Neither the images nor the lookup grid (4, 6) are square.
SIZE, GRID = (16, 24), (2, 3)
PP = f"decode|resize({SIZE})|value_range(-1,1)|keep('image','label')"


def make_config(**fields):
  base = dict(
    model_name="lookup_vit",
    num_classes=3,
    model=dict(variant="mu/4", depth=2, grid=GRID, scan=True),
    grids=[GRID, (1, 2)],
    input=dict(pp="", image_size=SIZE, batch_size=4),
    evals=dict(test=dict(pp_fn=PP)),
    lr=1e-3,
    total_steps=2,
  )
  return config_utils.resolve(base | fields)


@pytest.fixture(scope="module")
def program():
  return train_step.Program(make_config(), 2)


@pytest.fixture(scope="module")
def params(program):
  return common.random_like(program.state_shapes.params)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (2, *SIZE, 3)).astype(np.float32)


def linear(x, size):
  """One axis, by its definition: pixels' centres are at halves."""
  places = (np.arange(size) + 0.5) * len(x) / size - 0.5
  return np.interp(places, np.arange(len(x)), x)


def test_upsample():
  rng = np.random.default_rng(0)
  one = rng.uniform(size=(3, 5)).astype(np.float32)
  for size in [(3, 5), (7, 12), (30, 20)]:
    found = attention_maps.upsample(one, size)
    want = np.apply_along_axis(linear, 0, one, size[0])
    want = np.apply_along_axis(linear, 1, want, size[1])
    np.testing.assert_allclose(found, want, 1e-5, 1e-6)


def test_overlay():
  image = np.full((4, 6, 3), [-1, 0, 1.5], np.float32)  # Grey of one half.
  one = np.zeros((2, 3), np.float32)
  one[1, 2] = 0.25
  found = attention_maps.overlay(image, one)
  assert found.shape == (4, 6, 3) and found.dtype == np.uint8
  colours = np.array(matplotlib.colormaps["inferno"].colors)
  # The largest value of a map, whatever it is, has the last colour.
  brightest, darkest = (
    np.round(255 * (0.2 + 0.6 * colour)) for colour in colours[[-1, 0]]
  )
  np.testing.assert_array_equal(found[3, 5], brightest)
  np.testing.assert_array_equal(found[0, 0], darkest)
  even = attention_maps.overlay(image, np.full((2, 3), 1 / 6, np.float32))
  assert np.all(even == brightest)


def test_pixels():
  values = np.array([[-1.2, -1, -1 / 127.5], [0.2, 1, 3]])
  found = attention_maps.as_pixels(values)
  np.testing.assert_array_equal(found, [[0, 0, 126], [153, 255, 255]])


def test_mosaic():
  rng = np.random.default_rng(0)
  tiles = rng.integers(0, 255, (2, 3, 32, 20, 3), np.uint8)
  found = attention_maps.mosaic(tiles)
  assert found.shape == (2 * 32 + 2, 3 * 20 + 2 * 2, 3)
  rest = np.ones(found.shape, bool)
  for row, column in np.ndindex(2, 3):
    place = np.s_[row * 34 : row * 34 + 32, column * 22 : column * 22 + 20]
    np.testing.assert_array_equal(found[place], tiles[row, column])
    rest[place] = False
  assert np.all(found[rest] == 255)


def test_token_rows(program, params, images):
  grids, blocks, heads = [GRID, (1, 2), (4, 6)], (-1, 0), (1,)
  places = [(0, 0), (1, 2)]
  rows = attention_maps.token_rows(
    program, params, images, grids, blocks, heads, places
  )
  found = {
    grid: cross_attention.maps(program, params, images, grid, blocks, heads)
    for grid in grids
  }
  # The same points of the image.
  here = {GRID: places, (1, 2): [(0, 0), (0, 1)], (4, 6): [(1, 1), (3, 5)]}
  order = itertools.product(range(2), grids, range(2))
  for row, (i, grid, b) in zip(rows, order, strict=True):
    name = config_utils.format_grid(grid)
    assert row.label == f"{name}, block {[1, 0][b]}, head 1"
    image, *panels = row.panels
    assert image.title == "input" and image.frame is None
    pixels = attention_maps.as_pixels(images[i])
    np.testing.assert_array_equal(image.pixels, pixels)
    maps = found[grid][i, b, 0].reshape(*grid, 4, 6)
    cell = 16 / grid[0], 24 / grid[1]
    for panel, place in zip(panels, here[grid], strict=True):
      assert panel.title == str(place)
      want = attention_maps.overlay(images[i], maps[place])
      np.testing.assert_array_equal(panel.pixels, want)
      top, left = place[0] * cell[0], place[1] * cell[1]
      assert panel.frame == (left, top, cell[1], cell[0])


def test_four_tokens_and_the_mean_by_default(program, params, images):
  [row] = attention_maps.token_rows(program, params, images[:1], [GRID])
  assert row.label == "2x3, block 1, mean of heads"
  places = cross_attention.evenly_spaced(GRID, 4)
  assert [panel.title for panel in row.panels[1:]] == list(map(str, places))


def test_grid_rows(program, params, images):
  grids = [(1, 2), GRID]
  rows = attention_maps.grid_rows(program, params, images, grids, heads=[0, 1])
  maps = cross_attention.maps(program, params, images, GRID, heads=[0, 1])
  for i, row in enumerate(rows):
    assert [panel.title for panel in row.panels] == [
      "input",
      *("1x2, block 1, head 0", "1x2, block 1, head 1"),
      *("2x3, block 1, head 0", "2x3, block 1, head 1"),
    ]
    for head in range(2):
      whole = row.panels[3 + head].pixels
      assert whole.shape == (2 * 16 + 1, 3 * 24 + 2, 3)
      for r, c in np.ndindex(2, 3):
        tile = whole[17 * r : 17 * r + 16, 25 * c : 25 * c + 24]
        one = maps[i, 0, head, 3 * r + c]
        want = attention_maps.overlay(images[i], one)
        np.testing.assert_array_equal(tile, want)


def test_too_much_for_a_picture(program, params, images):
  many = np.broadcast_to(images[:1], (130, *SIZE, 3))
  for rows_of in attention_maps.token_rows, attention_maps.grid_rows:
    with pytest.raises(ValueError, match="130 rows of .* at most 128"):
      rows_of(program, params, many, [GRID])
    with pytest.raises(ValueError, match="at most 128"):
      rows_of(program, params, images, [GRID] * 65, heads=[0, 1])


def test_draw(tmp_path):
  """Panels come out at their places, and frames on them."""
  colours = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [90, 30, 160]]])
  rows = []
  for row in colours:
    pixels = np.broadcast_to(row[:, None, None], (2, 16, 24, 3))
    of_row = [attention_maps.Panel("one", x.astype(np.uint8)) for x in pixels]
    rows.append(attention_maps.Row("2x3, block 1", of_row))
  framed = rows[1].panels[1]._replace(frame=(12, 8, 12, 8))
  rows[1].panels[1] = framed
  path = str(tmp_path / "maps.png")
  attention_maps.draw(path, rows, inches=2)
  picture = np.asarray(Image.open(path).convert("RGB"), int)
  assert picture.shape == (int(150 * (2 * 2.05 + 0.5)), 150 * 4, 3)
  centres = {}
  for row, column in np.ndindex(2, 2):
    there = np.all(picture == colours[row, column], axis=-1)
    assert there.sum() > 10_000
    centres[row, column] = np.argwhere(there).mean(0)
  assert centres[0, 0][0] == pytest.approx(centres[0, 1][0], abs=9)
  assert centres[1, 0][0] > centres[0, 0][0] + 100
  assert centres[0, 1][1] > centres[0, 0][1] + 100
  # The frame is the lower right quarter of its panel.
  there = np.argwhere(np.all(picture == colours[1, 1], axis=-1))
  marked = np.argwhere(np.abs(picture - [0, 191, 191]).max(-1) < 30)
  (top, left), (bottom, right) = there.min(0), there.max(0)
  want = [(top + bottom) / 2, (left + right) / 2]
  np.testing.assert_allclose(marked.min(0), want, atol=4)
  np.testing.assert_allclose(marked.max(0), [bottom, right], atol=4)


# --- Image files, from a work directory


@pytest.fixture(scope="module")
def workdir(program, params, tmp_path_factory):
  """As training leaves it: two checkpoints, of which the newest is `params`."""
  workdir = str(tmp_path_factory.mktemp("run"))
  checkpoints.write_config(workdir, program.config)
  store = checkpoints.Checkpoints(workdir)
  flipped = jax.tree.map(lambda x: -x, params)
  for step, saved in ((1, flipped), (2, params)):
    store.save(step, program.init_state(saved))
  store.close()
  return workdir


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  rng = np.random.default_rng(2)
  for name, size in (("a.png", SIZE), ("b.jpg", (50, 40))):
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
  return [str(folder / "a.png"), str(folder / "b.jpg")]


@pytest.fixture
def drawn(monkeypatch):
  """What is drawn, instead of a picture."""
  drawn = []
  monkeypatch.setattr(
    attention_maps, "draw", lambda path, rows, *args: drawn.append(rows)
  )
  return drawn


@pytest.fixture
def made(monkeypatch, program):
  """The program, which is not made again."""
  monkeypatch.setattr(attention_maps, "Program", lambda *args: program)


def titles(row):
  return [panel.title for panel in row.panels]


def same(rows, others):
  return [titles(row) for row in rows] == [titles(row) for row in others] and (
    all(
      np.array_equal(a.pixels, b.pixels)
      for row, other in zip(rows, others, strict=True)
      for a, b in zip(row.panels, other.panels, strict=True)
    )
  )


def test_files_at_the_grids_of_training(
  workdir, files, drawn, program, params, tmp_path
):
  output = str(tmp_path / "maps.png")
  attention_maps.draw_files(workdir, files, output)
  [rows] = drawn
  assert [row.label for row in rows] == [
    f"{grid}, block 1, mean of heads" for grid in ("2x3", "1x2") * 2
  ]
  # The first file has the size of the model: it is drawn as it is.
  pixels = np.asarray(Image.open(files[0]))
  np.testing.assert_array_equal(rows[0].panels[0].pixels, pixels)
  image = pixels.astype(np.float32) / 127.5 - 1
  want = attention_maps.token_rows(program, params, image[None], [GRID, (1, 2)])
  assert same(rows[:2], want)


def test_choices(
  workdir, files, drawn, made, caplog, program, params, tmp_path
):
  output = str(tmp_path / "maps.png")
  image = np.asarray(Image.open(files[0])).astype(np.float32) / 127.5 - 1
  log = logging.getLogger("lookup_vit")
  log.addHandler(caplog.handler)
  level = log.level
  log.setLevel(logging.INFO)
  try:
    attention_maps.draw_files(
      workdir,
      files[:1],
      output,
      grids=[(2, 2)],
      blocks=[0],
      heads=[1],
      places="all",
      step=1,
    )
  finally:
    log.removeHandler(caplog.handler)
    log.setLevel(level)
  assert "not trained at 2x2, only at 2x3, 1x2" in caplog.text
  flipped = jax.tree.map(lambda x: -x, params)
  want = attention_maps.token_rows(
    program,
    flipped,
    image[None],
    [(2, 2)],
    [0],
    [1],
    [(0, 0), (0, 1), (1, 0), (1, 1)],
  )
  assert same(drawn.pop(), want)
  attention_maps.draw_files(workdir, files[:1], output, kind="grid")
  want = attention_maps.grid_rows(program, params, image[None], [GRID, (1, 2)])
  assert same(drawn.pop(), want)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(kind="all"), "kind='all': want one of tokens, grid"),
    (dict(paths=[]), "at least one image"),
    (dict(paths=["none.png"]), "none.png: "),
    (dict(output="/nowhere/maps.png"), "output='/nowhere/maps.png'"),
    (dict(output="/"), "output='/'"),
    (dict(grids=[(5, 1)]), "grid .5, 1. does not fit"),
    (dict(blocks=[2]), "no block 2: there are 2"),
    (dict(places=[(2, 0)]), "no compressed token .2, 0. in .2, 3."),
    (dict(kind="grid", places="all"), "none to choose"),
    (dict(pp="decode|value_range(-1,1)"), r"makes float32.*--pp='decode"),
    (dict(pp="decod"), "'decod'"),
    (dict(step=7), r"no checkpoint 7, only \[1, 2\]"),
  ],
)
def test_what_cannot_be_drawn(fields, words, workdir, files, made, tmp_path):
  output = str(tmp_path / "maps.png")
  fields = dict(paths=files[1:], output=output) | fields
  with pytest.raises(ValueError, match=words):
    attention_maps.draw_files(workdir, **fields)
  assert not os.path.exists(output)


@pytest.mark.parametrize(
  ("config", "words"),
  [
    (
      dict(model_name="vit", model=dict(variant="mu/4"), grids=None),
      "'vit'.*no compressed tokens",
    ),
    (
      dict(
        model=dict(variant="mu/2x4", grid=(1, 2, 2)),
        grids=None,
        input=dict(pp="", image_size=(4, *SIZE), batch_size=4),
      ),
      "of clips of 4x16x24, not of images",
    ),
    (dict(evals={}), "config.evals: no evaluator says"),
    (dict(), "has no checkpoint"),
    (None, "no config.json"),
  ],
)
def test_runs_without_such_maps(config, words, files, tmp_path):
  workdir, output = str(tmp_path), str(tmp_path / "maps.png")
  if config is not None:
    checkpoints.write_config(workdir, make_config(**config))
  with pytest.raises(ValueError, match=words):
    attention_maps.draw_files(workdir, files, output)
  assert not os.path.exists(output)


def command(*args):
  name = "lookup_vit.analysis.attention_maps"
  return programs.Program("-m", name, *args)


def test_command(workdir, files, tmp_path):
  output = str(tmp_path / "maps.png")
  flags = [f"--workdir={workdir}", f"--images={','.join(files)}"]
  process = command(
    *flags,
    f"--output={output}",
    *("--grid=4x6,2x2", "--blocks=-1,0", "--heads=0,1"),
    "--tokens=(1, 1); (3,5);(0,0)",
  )
  wrong = command(*flags, "--heads=mean,1")
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert out == f"Drawn: {output}\n"
  assert "not trained at 4x6" in err and "Step 2 of" in err
  # For two images, two grids, blocks and heads each; and four columns.
  picture = Image.open(output)
  assert picture.size == (round(1.2 * 4 * 150), round((1.25 * 16 + 0.5) * 150))
  _, err = wrong.communicate()
  assert wrong.returncode == 1 and "Traceback" not in err
  assert err.startswith("error: --heads=mean,1: want integers"), err


def test_places():
  text = "(1, 1); (3,5);0,0 "
  found = attention_maps.parse_places(text)
  assert found == [(1, 1), (3, 5), (0, 0)]
  for text in ("", "1,a", "(1,2),(3,4)", "(1,2);"):
    with pytest.raises(ValueError, match="Places are written"):
      attention_maps.parse_places(text)
