"""The program lookup_vit/predict.py, on folders as people have them."""

import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import lookup_vit
from lookup_vit import checkpoints, config_utils, predict
from lookup_vit.predict import File
from lookup_vit.predictor import Predictions
from tests import programs, small, test_odd_images, video_files

CLASSES = ["cat", "dog", "eel", "fox"]
SIZE = (16, 24)
PP = f"decode|resize({SIZE})|value_range(-1,1)|keep('image','label')"


def make_config(**fields):
  base = dict(
    model_name="lookup_vit",
    num_classes=len(CLASSES),
    model=dict(variant="mu/4", depth=2, grid=(2, 3), scan=True),
    grids=[(2, 3), (1, 2)],
    input=dict(pp="", image_size=SIZE, batch_size=4),
    evals=dict(test=dict(pp_fn=PP)),
    lr=1e-3,
    total_steps=2,
  )
  return base | fields


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  small.write_run(workdir, make_config())
  checkpoints.write_classes(workdir, CLASSES)
  return workdir


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Good, odd and broken images: the pixels of the good ones, by path."""
  root = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)

  def draw(rows=20, columns=30, channels=3):
    return rng.integers(0, 256, (rows, columns, channels), np.uint8)

  def save(name, pixels, shown=None, **options):
    path = root / name
    path.parent.mkdir(exist_ok=True)
    image = pixels
    if isinstance(pixels, np.ndarray):
      image = Image.fromarray(pixels)
    image.save(path, **options)
    good[str(path)] = pixels if shown is None else shown

  good = {}
  save("a.png", draw())
  save("B.PNG", draw(50, 20))
  turned = draw()
  exif = test_odd_images.exif(8)
  want = test_odd_images.UPRIGHT[8](turned)
  save("more/turned.png", turned, want, exif=exif)
  grey = draw(channels=1)
  save("more/grey.bmp", grey[..., 0], grey.repeat(3, -1))
  alpha = np.dstack([draw(), np.zeros((20, 30), np.uint8)])
  alpha[3:9, :, 3] = 255
  shown = np.where(alpha[..., 3:] > 0, alpha[..., :3], 255)
  save("more/alpha.webp", alpha, shown, lossless=True, exact=True)
  deep = draw(channels=1)[..., 0].astype(np.uint16) * 256 + 77
  save("more/deep.tiff", deep, np.dstack([(deep >> 8).astype(np.uint8)] * 3))

  jpeg = root / "more" / "whole.jpg"
  Image.fromarray(draw(200, 300)).save(jpeg)
  content = jpeg.read_bytes()
  jpeg.unlink()
  (root / "cut.jpg").write_bytes(content[: len(content) // 2])
  (root / "empty.gif").write_bytes(b"")
  (root / "more" / "text.jpeg").write_text("no image")
  (root / "phone.HEIC").write_bytes(test_odd_images.ftyp(b"heic"))
  (root / "bomb.png").write_bytes(test_odd_images.png_of_size(20_000, 10_000))
  # These are nobody's business.
  (root / "notes.txt").write_text("notes")
  (root / ".hidden.png").write_bytes(b"")
  return root, good


BROKEN = {
  "bomb.png": "more than 178,956,970 pixels",
  "cut.jpg": "",  # As TensorFlow says it.
  "empty.gif": "the file is empty",
  "more/text.jpeg": "no image, or a damaged one",
  "phone.HEIC": "HEIC is not read here",
}


# --- Finding files


def test_files_by_names(photos):
  root, good = photos
  extensions = (".png", ".webp")
  paths = [str(root / n) for n in ("B.PNG", "a.png", "bomb.png")]
  more = [str(root / "more" / n) for n in ("alpha.webp", "turned.png")]
  found = predict.find([str(root)], extensions)
  assert found == [File(path) for path in paths + more]
  # A file counts whatever its name, and once.
  text = str(root / "notes.txt")
  found = predict.find([more[1], text, str(root)], extensions)
  assert [f.path for f in found] == [more[1], text, *paths, more[0]]
  found = predict.find([f"{root}/*.png", f"{root}/**/t*.png"], extensions)
  assert [f.path for f in found] == [*paths[1:], more[1]]
  # A pattern may stand for folders.
  assert predict.find([f"{root}/m*"], extensions) == [File(p) for p in more]


def test_names_that_stand_for_nothing(photos, tmp_path):
  root, _ = photos
  os.mkfifo(tmp_path / "pipe")
  cases = {
    str(root / "none.png"): "no such file",
    f"{root}/*.gifs": "no file matches",
    str(root / "more"): "a folder without files .mp4",
    str(tmp_path / "pipe"): "no file",
    "": "no such file",
  }
  found = predict.find(cases, (".mp4",))
  assert found == [File(name, error) for name, error in cases.items()]


def test_a_file_whose_name_is_a_pattern(tmp_path):
  path = tmp_path / "a[1].png"
  path.write_bytes(b"")
  assert predict.find([str(path)], (".png",)) == [File(str(path))]


# --- The program


def start(*args):
  return programs.Program("-m", "lookup_vit.predict", *args)


def finish(process):
  out, err = process.communicate(300)
  assert "Traceback" not in err, err
  return out, err, process.returncode


def read_lines(path):
  return [json.loads(line) for line in open(path).read().splitlines()]


@pytest.fixture(scope="module")
def probabilities(workdir, photos):
  """Of the good images, from their pixels, at 2x3 and 3x3."""
  _, good = photos
  predictor = lookup_vit.load(workdir)
  return {
    grid: dict(
      zip(
        good,
        predictor.predict(list(good.values()), grid).probabilities,
        strict=True,
      )
    )
    for grid in ((2, 3), (3, 3))
  }


def check_good(row, grid, probabilities, top):
  assert list(row) == ["file", "grid", "classes"]
  assert row["grid"] == config_utils.format_grid(grid)
  want = probabilities[grid][row["file"]]
  order = sorted(range(len(want)), key=lambda i: -want[i])[:top]
  found = row["classes"]
  assert [one["class"] for one in found] == [CLASSES[i] for i in order]
  values = [one["probability"] for one in found]
  np.testing.assert_allclose(values, want[order], 1e-4)


def test_a_folder(workdir, photos, probabilities, tmp_path):
  root, good = photos
  lines, maps = tmp_path / "out.jsonl", tmp_path / "maps.png"
  process = start(
    *(f"--workdir={workdir}", str(root), str(root / "none.jpg")),
    *("--grid", "3x3", f"--output={lines}", f"--attention={maps}"),
    *("--top=2", "--batch_size=4"),
  )
  other = start(
    *(f"--workdir={workdir}", "--output=-", *reversed(good), "--step=2"),
  )
  out, err, code = finish(process)
  assert code == 1
  rows = read_lines(lines)
  names = [row["file"] for row in rows]
  assert names == sorted([*good, *(str(root / n) for n in BROKEN)]) + [
    str(root / "none.jpg")
  ]
  table = out.splitlines()
  errors = [line for line in err.splitlines() if line.startswith("error: ")]
  for row in rows:
    path = row["file"]
    if path in good:
      check_good(row, (3, 3), probabilities, 2)
      [line] = [line for line in table if line.startswith(f"{path} ")]
      for one in row["classes"]:
        assert f"{one['class']} {one['probability']:.1%}" in line
      continue
    assert list(row) == ["file", "error"]
    name = os.path.relpath(path, root)
    assert BROKEN.get(name, "no such file") in row["error"]
    assert f"error: {path}: {row['error']}" in errors
  assert len(table) == len(good) and len(errors) == len(BROKEN) + 1
  assert "not trained at 3x3, only at 2x3, 1x2" in err
  assert f"6 of {len(rows)} files could not be read" in err
  # Two rows of panels are an inch and a quarter each, as attention_maps has it.
  picture = Image.open(maps)
  assert picture.size[1] == round((1.25 * len(good) + 0.5) * 150)

  out, err, code = finish(other)
  assert code == 0, err
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["file"] for row in rows] == [*reversed(good)]
  for row in rows:
    check_good(row, (2, 3), probabilities, len(CLASSES))


def test_nothing_can_be_read(photos, workdir, tmp_path):
  # Then the checkpoint, a damaged one, is not.
  copy = shutil.copytree(workdir, tmp_path / "run")
  for path in (copy / "checkpoints").rglob("*"):
    if path.is_file() and "params" in path.parts and path.stat().st_size > 900:
      path.write_bytes(b"")
  root, good = photos
  process = start(f"--workdir={copy}", "--output=-", f"{root}/*.none", "no.png")
  damaged = start(f"--workdir={copy}", "--output=-", next(iter(good)))
  out, err, code = finish(process)
  assert code == 1 and "2 of 2 files could not be read" in err
  assert [json.loads(line)["error"] for line in out.splitlines()] == [
    "no file matches",
    "no such file",
  ]
  out, err, code = finish(damaged)
  assert code == 1 and out == "" and "is damaged" in err


def test_flags_are_checked_before_the_checkpoint(photos, workdir, tmp_path):
  root, good = photos
  vit = str(tmp_path / "vit")
  config = make_config(model_name="vit", model=dict(variant="mu/4"), grids=None)
  small.write_run(vit, config)
  path = next(iter(good))
  cases = [
    ([], workdir, "Name files, folders or patterns"),
    ([path, "--grid=9x9"], workdir, "--grid: The compressed grid (9, 9) does"),
    ([path, "--grid=a"], workdir, "--grid: A grid is written 5x5"),
    ([path, "--grid=2x2"], vit, "--grid: grid=(2, 2): model 'vit' has no"),
    ([path, "--attention=a.png"], vit, "--attention: config.model_name='vit'"),
    ([path, "--output=/nowhere/a"], workdir, "--output: '/nowhere/a': want"),
    ([path, "--top=0"], workdir, "--top=0: want an integer >= 1"),
    ([path, "--step=7"], workdir, "no checkpoint 7, only [2]"),
    ([path, "--pp=decod"], workdir, "'decod'"),
    ([path], str(root), "is no work directory"),
  ]
  running = [start(f"--workdir={w}", *args) for args, w, _ in cases]
  for process, (args, _, words) in zip(running, cases, strict=True):
    out, err, code = finish(process)
    assert code == 1 and out == "", args
    assert err.splitlines()[-1].startswith("error: ") and words in err, err
    assert "Step 2 of" not in err, args


def test_videos(tmp_path):
  workdir = str(tmp_path / "run")
  pp = "central_clip(4)|decode_clip|resize(16)|unfold_clip(4)"
  config = make_config(
    model=dict(variant="mu/2x8", grid=(1, 1, 2)),
    grids=[(1, 1, 2)],
    input=dict(pp="", image_size=(4, 16, 16), batch_size=4),
    evals=dict(val=dict(pp_fn=f"{pp}|value_range(-1,1)")),
  )
  small.write_run(workdir, config)
  folder = tmp_path / "videos"
  video_files.write_video(folder / "a.mp4", video_files.pattern(6))
  (folder / "broken.webm").write_bytes(b"no video")
  (folder / "photo.jpg").write_bytes(b"")
  maps = tmp_path / "maps.png"
  out, err, code = finish(
    start(f"--workdir={workdir}", str(folder), f"--attention={maps}")
  )
  assert code == 1
  assert f"error: {folder}/broken.webm: ffmpeg failed" in err
  [line] = out.splitlines()
  # Without names, classes are numbers.
  name, *said = line.split()
  assert name == f"{folder}/a.mp4" and sorted(said[::2]) == list("0123")
  assert Image.open(maps).size[0] > 100


class Stub:
  """A captioner that says the shape of an image, and notes its batches."""

  batch_size, views = 2, 1

  def __init__(self):
    self.sizes = []

  def reader(self, path):
    if "bad" in path:
      raise ValueError(f"{path}: bad")
    return np.zeros((int(path), 3))

  def predict(self, images, grid):
    self.sizes.append(len(images))
    return Predictions(grid, captions=[f"shape {x.shape}" for x in images])


def test_rows_of_captions_are_in_order():
  names = ["bad 1", "4", "bad 2", "bad 3", "4", "4", "bad 4"]
  files = [File(name) for name in names] + [File("5", "gone")]
  stub = Stub()
  found = list(predict.rows(stub, files, (1, 2)))
  assert stub.sizes == [2, 1]
  assert [row["file"] for row, _ in found] == [*names, "5"]
  for row, image in found:
    name = row.pop("file")
    if name == "4":
      assert image.shape == (4, 3)
      assert row == {"grid": "1x2", "caption": "shape (4, 3)"}
      row = {"file": "4.png", **row}
      assert predict.as_text(row, 7) == "4.png    shape (4, 3)"
      assert json.loads(predict.as_json(row)) == row
    else:
      assert image is None
      assert row == {"error": "gone" if name == "5" else "bad"}


def test_docs_name_every_flag():
  source = pathlib.Path(predict.__file__).read_text()
  names = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)
  assert len(names) == 9
  text = pathlib.Path("docs/predict.md").read_text()
  for name in names:
    assert f"--{name}=" in text
