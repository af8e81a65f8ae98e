"""Runs to export, and what programs of them return."""

import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from lookup_vit import checkpoints, config_utils, train_step
from tests.models import common

# Neither the images nor the lookup grid (4, 6) are square.
SIZE, GRID = (16, 24), (2, 3)
PP = f"decode|resize({SIZE})|value_range(-1,1)|keep('image','label')"
NAMES = ("logits", "probabilities")
LOOKUP = (*NAMES, "pre_logits_compressed", "pre_logits_lookup")


class Run(NamedTuple):
  """A work directory, and what its newest checkpoint is of."""

  workdir: str
  program: train_step.Program
  params: Any


def make_config(model_name="lookup_vit", **fields):
  """A resolved config of a small classifier of three classes."""
  model = dict(variant="mu/4", depth=2)
  if model_name == "lookup_vit":
    model |= dict(grid=GRID, scan=True)
    fields = dict(grids=[GRID, (1, 2)]) | fields
  base = dict(
    model_name=model_name,
    num_classes=3,
    model=model,
    input=dict(pp="", image_size=SIZE, batch_size=4),
    evals=dict(test=dict(pp_fn=PP)),
    lr=1e-3,
    total_steps=2,
  )
  return config_utils.resolve(base | fields)


def make_run(workdir: pathlib.Path, config) -> Run:
  """As training leaves it: two checkpoints, of which the newest is `params`."""
  program = train_step.Program(config, 2, jax.local_devices()[:1])
  params = common.random_like(program.state_shapes.params)
  checkpoints.write_config(str(workdir), config)
  store = checkpoints.Checkpoints(str(workdir))
  for step, saved in ((1, jax.tree.map(np.negative, params)), (2, params)):
    store.save(step, program.init_state(saved))
  store.close()
  (workdir / "classes.json").write_text(json.dumps(["a", "b", "c"]))
  return Run(str(workdir), program, params)


def images(batch, size=SIZE):
  """uint8 `[batch, *size, 3]`."""
  rng = np.random.default_rng(7)
  return rng.integers(0, 256, (batch, *size, 3), np.uint8)


def expected(run, images, grid=None):
  """By the model itself, and probabilities by their definition."""
  fields = {} if grid is None else {"grid": grid}
  pixels = (images.astype(np.float64) / 127.5 - 1).astype(np.float32)
  logits, out = common.apply(run.program.model, run.params, pixels, **fields)
  logits = np.asarray(logits, np.float64)
  if run.program.config.loss == "sigmoid_xent":
    probabilities = 1 / (1 + np.exp(-logits))
  else:
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  features = {k: v for k, v in out.items() if k[:3] in ("pre", "fea")}
  return {"logits": logits, "probabilities": probabilities, **features}


def check(found, want):
  """Outputs by name, each near what is wanted."""
  assert found.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_allclose(found[name], x, atol=2e-5, rtol=2e-5)


def run_docs(section, output, monkeypatch, folder):
  """Runs the code of a section of docs/export.md; returns its variables.

  Args:
    section: title of it.
    output: an export of its format.
    monkeypatch: pytest's.
    folder: to run in, empty.
  """
  text = pathlib.Path("docs/export.md").read_text()
  text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
  code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
  # The same, of what is here.
  code = code.replace("224, 224", "16, 24").replace("3x3", "2x3")
  [format] = set(re.findall(r"exports/(\w+)", code))
  (folder / "exports").mkdir()
  (folder / "exports" / format).symlink_to(output)
  Image.fromarray(images(1, (40, 50))[0]).save(folder / "photo.jpg")
  monkeypatch.chdir(folder)
  scope = {}
  exec(compile(code, "docs/export.md", "exec"), scope)
  return scope
