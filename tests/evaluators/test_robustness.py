"""Tests of lookup_vit/evaluators/robustness.py, on 13 real digits."""

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data.digits import Builder
from lookup_vit import config_utils, input_pipeline, train_step
from lookup_vit.analysis import corruption_error
from lookup_vit.evaluators import classification, shared
from lookup_vit.evaluators.robustness import Evaluator
from lookup_vit.preprocess import corruptions
from tests import lookalikes
from tests.evaluators.test_views import draw_params

COUNT = 13
DATA = dict(module="data.digits", split=f"test[:{COUNT}]")
PP = "decode|value_range(-1,1)|keep('image','label')"
GRIDS = [(2, 2), (1, 3)]
SOME = dict(corruptions=["contrast", "gaussian_noise"], severities=[5, 2])
TEMPLATE = "imagenet2012_corrupted/{corruption}_{severity}"


def make_program(**fields):
  base = dict(
    model_name="lookup_vit",
    num_classes=10,
    model=dict(variant="mu/8", grid=(2, 2)),
    grids=GRIDS,
    input=dict(data=DATA, pp=PP, image_size=(32, 32), batch_size=4),
    lr=1e-3,
    total_steps=2,
  )
  return train_step.Program(config_utils.resolve(base | fields), 2)


@pytest.fixture(scope="module")
def program():
  return make_program()


@pytest.fixture(scope="module")
def params(program):
  """Without random biases and scales, which outweigh the images."""
  given = dict(bias=0.0, scale=1.0)
  return jax.tree.map_with_path(
    lambda path, x: 0 * x + given.get(path[-1].key, x),
    draw_params(program),
  )


def evaluate(program, params, **fields):
  evaluator = Evaluator(program, "c", **(dict(data=DATA, pp_fn=PP) | fields))
  pairs = list(evaluator.run(params))
  assert len(dict(pairs)) == len(pairs)
  return dict(pairs)


@pytest.fixture(scope="module")
def got(program, params):
  return evaluate(program, params, **SOME)


@pytest.fixture(scope="module")
def top1(program, params):
  """Top-1 by grid, corruption and severity, one digit after the other."""
  builder = Builder()
  builder.download_and_prepare()
  examples = list(tfds.as_numpy(builder.as_dataset(split="test")))[:COUNT]
  found = {}
  for grid in GRIDS:
    apply = jax.jit(
      lambda x, g=grid: program.model.apply({"params": params}, x, grid=g)[0]
    )
    for key in [None, *np.ndindex(2, 2)]:
      right = 0
      for place, example in enumerate(examples):
        image = example["image"]
        if key:
          name = SOME["corruptions"][key[0]]
          severity = SOME["severities"][key[1]]
          # That of the op, the second of the string, at this place.
          seed = input_pipeline.fold(input_pipeline.make_seed(0), place, 1)
          image = corruptions.corrupt_image(image, name, severity, seed.numpy())
        x = (image.astype(np.float64) / 127.5 - 1).astype(np.float32)
        right += int(np.argmax(apply(x[None])[0]) == example["label"])
      where = f"{name}_{severity}" if key else None
      found[grid, where] = right / COUNT
  return found


def test_against_single_examples(got, top1):
  want = {}
  for grid in GRIDS:
    prefix = f"c/{grid[0]}x{grid[1]}/"
    clean = top1[grid, None]
    each = {k: v for (g, k), v in top1.items() if g == grid and k}
    assert len(set(each.values()) | {clean}) > 2
    mean = np.mean(list(each.values()))
    own = dict(top1=clean, **each, top1_corrupted=mean, mce=1 - mean)
    own["relative_mce"] = clean - mean
    want |= {prefix + k: v for k, v in own.items()}
  assert got == pytest.approx(want)
  names = [name.rsplit("/", 1)[1] for name in got if "2x2" in name]
  # The order is that of ImageNet-C.
  assert names[1:5] == [
    f"{c}_{s}" for c in ("gaussian_noise", "contrast") for s in (2, 5)
  ]


def test_batch_size_does_not_matter(program, params, got):
  fields = dict(batch_size=7, grids=[[1, 3]])
  again = evaluate(program, params, **SOME, **fields)
  assert again == {k: v for k, v in got.items() if "/1x3/" in k}


def test_one_split_is_open_at_a_time(program, params, monkeypatch):
  log = []
  make_batches, add_sums = shared.make_batches, shared.add_sums

  def note_open(program, name, data, pp, batch_size):
    log.append(pp)
    return make_batches(program, name, data, pp, batch_size)

  def note_sums(*args):
    log.append(None)
    return add_sums(*args)

  evaluator = Evaluator(
    program, "c", data=DATA, pp_fn=PP, grids=[(2, 2)], **SOME
  )
  monkeypatch.setattr(shared, "make_batches", note_open)
  monkeypatch.setattr(shared, "add_sums", note_sums)
  next(evaluator.run(params))
  # The clean split is open already; every split has four batches.
  opened = [
    f"decode|corrupt('{c}', {s})"
    for c in ("gaussian_noise", "contrast")
    for s in (2, 5)
  ]
  want = [None] * 4
  for op in opened:
    want += [PP.replace("decode", op), *[None] * 4]
  assert log == want


def test_what_check_raises_ends_it(program, params):
  def check():
    raise KeyError("told to stop")

  evaluator = Evaluator(program, "c", data=DATA, pp_fn=PP, **SOME)
  with pytest.raises(KeyError, match="told to stop"):
    next(evaluator.run(params, check))


def test_examples_that_are_missing_are_noticed(program, params):
  fields = dict(data=DATA, pp_fn=PP, grids=[(2, 2)])
  evaluator = Evaluator(
    program, "c", **fields, corruptions=["contrast"], severities=[2]
  )
  data, pp, _ = evaluator.splits["contrast", 2]
  evaluator.splits["contrast", 2] = data, pp, COUNT + 1
  with pytest.raises(RuntimeError, match="c: saw 13 of 14 examples"):
    list(evaluator.run(params))


# Sets that are prepared, and AlexNet's errors.


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("lookalikes")
  lookalikes.build("imagenet2012", path, splits={"validation": 9})
  for config in ("fog_1", "fog_4", "snow_1", "snow_4"):
    lookalikes.build(f"imagenet2012_corrupted/{config}", path)
  return str(path)


@pytest.fixture(scope="module")
def vit():
  size = dict(data=DATA, pp=PP, image_size=(24, 24), batch_size=4)
  return make_program(
    model_name="vit",
    model=dict(variant="mu/8"),
    grids=None,
    num_classes=1000,
    input=size,
  )


CLEAN_PP = "decode|resize(32)|central_crop(24)|value_range(-1,1)"
CLEAN_PP += "|keep('image','label')"
CORRUPTED_PP = "decode|resize(24)|value_range(-1,1)|keep('image','label')"


def prepared(data_dir, **fields):
  base = dict(
    data=dict(name="imagenet2012", split="validation", data_dir=data_dir),
    pp_fn=CLEAN_PP,
    corrupted=TEMPLATE,
    corrupted_pp_fn=CORRUPTED_PP,
    corruptions=["snow", "fog"],
    severities=[1, 4],
  )
  return base | fields


def test_prepared_sets(vit, data_dir):
  """Each as the evaluator of classification has it."""
  params = draw_params(vit)
  fields = prepared(data_dir)
  got = evaluate(vit, params, **fields)
  want = {}
  for split in ("", "snow_1", "snow_4", "fog_1", "fog_4"):
    data, pp = fields["data"], CLEAN_PP
    if split:
      data, pp = (
        data | dict(name=f"imagenet2012_corrupted/{split}"),
        CORRUPTED_PP,
      )
    metrics = dict(
      classification.Evaluator(vit, "c", data=data, pp_fn=pp).run(params)
    )
    want[f"c/{split or 'top1'}"] = metrics["c/top1"]
  assert {k: got[k] for k in want} == want
  assert set(got) - set(want) == {"c/top1_corrupted", "c/mce", "c/relative_mce"}


def test_alexnet(vit):
  data = dict(DATA, split="test[:2]")
  pp = PP.replace("decode", "decode|resize(24)")
  evaluator = Evaluator(vit, "c", data=data, pp_fn=pp, reference="alexnet")
  assert len(evaluator.splits) == 75
  rng = np.random.default_rng(0)
  top1 = {key: rng.uniform(0, 0.8) for key in evaluator.splits}
  metrics = evaluator._metrics(top1 | {None: 0.85})
  ce, relative = [], []
  for name, alexnet in corruption_error.ALEXNET.items():
    errors = sum(1 - top1[name, s] for s in range(1, 6))
    ce.append(errors / sum(alexnet))
    relative.append((errors - 5 * 0.15) / (sum(alexnet) - 5 * 0.4348))
  assert metrics["mce"] == pytest.approx(np.mean(ce))
  assert metrics["relative_mce"] == pytest.approx(np.mean(relative))
  assert metrics["top1_corrupted"] == pytest.approx(
    np.mean(list(top1.values()))
  )


# Errors.


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(corruptions=["rain"]), ["c.corruptions=['rain']", "gaussian_noise"]),
    (dict(corruptions="snow"), ["c.corruptions='snow'"]),
    (dict(corruptions=["fog", "fog"]), ["c.corruptions=['fog', 'fog']"]),
    (dict(severities=[]), ["c.severities=[]", "1, 2, 3, 4, 5"]),
    (dict(severities=[0]), ["c.severities=[0]"]),
    (dict(severities=[True]), ["c.severities=[True]"]),
    (dict(reference="resnet"), ["c.reference='resnet'", "'alexnet'"]),
    (
      dict(reference="alexnet", corruptions=None, severities=None),
      ["c.reference='alexnet' wants 1000 classes", "num_classes is 10"],
    ),
    (
      dict(pp_fn="decode|keep('image','label')"),
      ["config.evals.c.pp_fn", "want float32", "value_range"],
    ),
    (
      dict(corrupted="imagenet2012"),
      ["c.corrupted='imagenet2012'", "{severity}"],
    ),
    (
      dict(corrupted="x/{corruption}_{severity}_{more}"),
      ["c.corrupted='x/{corruption}_{severity}_{more}'"],
    ),
    (
      dict(corrupted_pp_fn=PP),
      ["c.corrupted_pp_fn is set, but not .corrupted"],
    ),
    # `data` is of a module, the sets have names.
    (dict(corrupted=TEMPLATE), ["config.evals.c.corrupted=", "module"]),
    (dict(batch_size=-4), ["batch_size=-4"]),
    (dict(grids=[(5, 5)]), ["config.evals.c.grids", "(5, 5)"]),
  ],
)
def test_errors(program, fields, words):
  with pytest.raises(ValueError) as e:
    Evaluator(program, "c", **(dict(data=DATA, pp_fn=PP) | SOME | fields))
  for word in words:
    assert word in str(e.value), str(e.value)


@pytest.mark.parametrize(
  "fields, words",
  [
    (
      dict(corruptions=["fog"], severities=[1, 2]),
      ["config.evals.c.corrupted=", "imagenet2012_corrupted/fog_2", "not prep"],
    ),
    (
      dict(corrupted_pp_fn="decode|value_range(-1,1)|keep('image','label')"),
      ["config.evals.c.corrupted_pp_fn", "(224, 224, 3)", "(24, 24, 3)"],
    ),
    (
      dict(reference="alexnet"),
      ["wants 1000 classes, all 15", "the severities 1, 4"],
    ),
  ],
)
def test_prepared_sets_that_do_not_fit(vit, data_dir, fields, words):
  with pytest.raises(ValueError) as e:
    Evaluator(vit, "c", **prepared(data_dir, **fields))
  for word in words:
    assert word in str(e.value), str(e.value)
