"""Evaluation of several views, on 13 digits that stand still in clips."""

import json

import jax
import numpy as np
import pytest

from lookup_vit import config_utils, input_pipeline, train_step
from lookup_vit.evaluators.classification import Evaluator
from tests import programs

COUNT = 13
VIEWS = 3
SIZE = (2, 24, 24)
DATA = dict(module="data.digits", split=f"test[:{COUNT}]")
# Crops of a wide image.
PP = (
  "decode|resize((24,40))|still_clip(2)|spatial_views(24,3)|unfold_views(2)"
  "|value_range(-1,1)|keep('image','label')"
)
ONE = PP.replace("spatial_views(24,3)", "central_crop(24)")
ONE = ONE.replace("unfold_views", "unfold_clip")
GRIDS = [(1, 2, 2), (2, 1, 3)]


def make_program(name, **fields):
  model = dict(variant="mu/1x8")
  if name == "lookup_vit":
    model["grid"] = GRIDS[0]
  config = dict(
    model_name=name,
    num_classes=10,
    model=model,
    grids=GRIDS if name == "lookup_vit" else None,
    input=dict(data=DATA, pp=ONE, image_size=SIZE, batch_size=4),
    lr=1e-3,
    total_steps=2,
  )
  return train_step.Program(config_utils.resolve(config | fields), 2)


def draw_params(program):
  """Parameters whose predictions differ from view to view."""
  rng = np.random.default_rng(0)

  def leaf(x):
    fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 4
    draw = rng.standard_normal(x.shape) / np.sqrt(fan_in)
    return (2 * draw).astype(np.float32)

  return jax.tree.map(leaf, program.state_shapes.params)


def evaluate(name, batch_size, **fields):
  program = make_program(name, **fields)
  params = jax.device_put(draw_params(program), program.state_shardings.params)
  fields = dict(data=DATA, pp_fn=PP, views=VIEWS, batch_size=batch_size)
  return dict(Evaluator(program, "val", **fields).run(params))


@pytest.fixture(scope="module")
def views():
  """Views and label of each digit."""
  batches, _ = input_pipeline.make_eval(DATA, pp=PP, batch_size=1)
  found = [(b["image"][0], int(b["label"][0])) for b in batches]
  assert len(found) == COUNT
  assert found[0][0].shape == (VIEWS, *SIZE, 3)
  return found


def metrics(z, label):
  order = list(np.argsort(-z))
  return dict(
    loss=np.log(np.sum(np.exp(z))) - z[label],
    top1=order[0] == label,
    top5=label in order[:5],
  )


def by_hand(name, views):
  """Means over the digits, each view by itself through the model."""
  program = make_program(name)
  params = draw_params(program)
  want = {}
  for grid in program.grids:
    fields = {} if grid is None else {"grid": grid}
    apply = jax.jit(
      lambda x, f=fields: program.model.apply({"params": params}, x, **f)
    )
    where = "val/" if grid is None else f"val/{config_utils.format_grid(grid)}/"
    differ = 0.0
    for images, label in views:
      total = {}
      for image in images:
        logits, out = apply(image[None])
        heads = {k[6:]: v for k, v in out.items() if k.startswith("logits_")}
        for suffix, z in {"": logits, **heads}.items():
          z = np.asarray(z[0], np.float64)
          total[suffix] = total.get(suffix, 0.0) + z / VIEWS
      differ = max(differ, np.abs(z - total[suffix]).max())
      for suffix, z in total.items():
        for metric, value in metrics(z, label).items():
          key = f"{where}{metric}{suffix}"
          want[key] = want.get(key, 0.0) + value / COUNT
    # Views that all say the same would test nothing.
    assert differ > 0.1
  return want


MANY = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.evaluators import test_views
fields = dict(mesh=[("data", 2), ("fsdp", 2)], sharding="fsdp")
print(json.dumps(test_views.evaluate("lookup_vit", 8, **fields)))
"""


@pytest.mark.parametrize("name", ["vit", "lookup_vit"])
def test_views_are_averaged(name, views):
  want = by_hand(name, views)
  assert len(want) == (3 if name == "vit" else 18)
  runs = [evaluate(name, 4)]
  if name == "lookup_vit":
    program = programs.Program("-c", MANY)
    out, err = program.communicate()
    assert program.returncode == 0, err
    runs.append(json.loads(out.splitlines()[-1]))
  for got in runs:
    assert set(got) == set(want)
    for metric, value in want.items():
      assert got[metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric


def test_one_view_is_in_the_model_at_a_time():
  """More views want room for their images, and for nothing else."""
  program = make_program("vit")
  temporaries = []
  for views in (2, 6):
    batch = {
      "image": jax.ShapeDtypeStruct((4, views, *SIZE, 3), np.float32),
      "label": jax.ShapeDtypeStruct((4,), np.int32),
      "_mask": jax.ShapeDtypeStruct((4,), np.float32),
    }
    params = program.state_shapes.params
    compiled = program.evaluation_step.lower(params, batch, None).compile()
    temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
  few, many = temporaries
  image = 4 * 4 * np.prod(SIZE) * 3
  assert many - few < image, (temporaries, image)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(views=0), ["config.evals.val.views=0", ">= 1"]),
    (dict(views=True), ["config.evals.val.views=True", ">= 1"]),
    (dict(views=1.5), ["config.evals.val.views=1.5", ">= 1"]),
    (
      dict(views=4),
      ["config.evals.val.pp_fn", "(3, 2, 24, 24, 3)", "(4, 2, 24, 24, 3)"]
      + ["config.input.image_size with config.evals.val.views=4 wants"],
    ),
    (dict(), ["config.evals.val.pp_fn", "(3, 2, 24", "wants (2, 24, 24, 3)"]),
    (
      dict(views=3, pp_fn=ONE),
      ["shape (2, 24, 24, 3)", "views=3 wants (3, 2, 24, 24, 3)"],
    ),
  ],
)
def test_views_that_do_not_fit(fields, words):
  fields = dict(data=DATA, pp_fn=PP) | fields
  with pytest.raises(ValueError) as e:
    Evaluator(make_program("vit"), "val", **fields)
  for word in words:
    assert word in str(e.value), str(e.value)
