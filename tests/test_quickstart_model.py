"""What one does with the quickstart's model: predict, and export it."""

import json

import numpy as np
import pytest
from PIL import Image

import lookup_vit
from lookup_vit import config_utils, export, train
from tests import programs

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The quickstart's config, for fewer epochs."""
  workdir = str(tmp_path_factory.mktemp("quickstart"))
  config = config_utils.load("configs/digits_lookup.py")
  config.total_epochs = 2
  train.train_and_evaluate(config, workdir)
  return workdir


def test_predicts_a_folder_of_good_odd_and_broken_images(run, tmp_path):
  folder = tmp_path / "digits"
  folder.mkdir()
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (40, 30, 3), np.uint8)
  image = Image.fromarray(pixels)
  image.save(folder / "good.png")
  image.convert("CMYK").save(folder / "cmyk.jpg")
  image.convert("L").save(folder / "grey.webp")
  image.convert("RGBA").save(folder / "alpha.png")
  deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
  deep.save(folder / "deep.png")
  image.save(folder / "moves.gif", save_all=True, append_images=[image])
  (folder / "broken.jpg").write_bytes(b"no image")
  output = tmp_path / "found.jsonl"
  program = programs.Program(
    *("-m", "lookup_vit.predict", f"--workdir={run}", "--grid=3x3"),
    *(f"--output={output}", f"--attention={tmp_path / 'maps.png'}"),
    str(folder),
  )
  _, error = program.communicate(300)
  assert program.returncode == 1
  assert "broken.jpg" in error and "1 of 7 files" in error
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  good = [row for row in rows if "error" not in row]
  assert len(rows) == 7 and len(good) == 6
  for row in good:
    assert row["grid"] == "3x3" and len(row["classes"]) == 5
  assert (tmp_path / "maps.png").stat().st_size > 1000
  # From Python the same.
  names = [row["file"] for row in good]
  top = lookup_vit.load(run).predict(names, grid=(3, 3)).top(1)
  for row, [(name, probability)] in zip(good, top, strict=True):
    assert row["classes"][0]["class"] == name
    assert row["classes"][0]["probability"] == pytest.approx(
      probability, abs=1e-5
    )


@pytest.mark.parametrize("name", export.FORMATS)
def test_exports(run, name, tmp_path):
  """Each compares itself with the model."""
  worst = export.export(run, name, str(tmp_path / name))
  assert 0 <= worst < 1e-4
  note = json.loads((tmp_path / name / "export.json").read_text())
  assert note["format"] == name
