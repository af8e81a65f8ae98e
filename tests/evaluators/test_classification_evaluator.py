"""Tests of lookup_vit/evaluators/classification.py, on 13 real digits."""

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data.digits import Builder
from lookup_vit import config_utils, train_step
from lookup_vit.evaluators.classification import Evaluator

COUNT = 13
DATA = dict(module="data.digits", split=f"test[:{COUNT}]")
PP = "decode|value_range(-1,1)|keep('image','label')"
GRIDS = [(2, 2), (1, 3)]


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
  """Random parameters whose predictions differ from digit to digit."""
  rng = np.random.default_rng(0)

  def leaf(x):
    fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 4
    draw = rng.standard_normal(x.shape) / np.sqrt(fan_in)
    return (2 * draw).astype(np.float32)

  return jax.tree.map(leaf, program.state_shapes.params)


@pytest.fixture(scope="module")
def digits(program):
  """Images in [-1, 1] and labels, one by one, without the input pipeline."""
  builder = Builder()
  builder.download_and_prepare()
  examples = list(tfds.as_numpy(builder.as_dataset(split="test")))[:COUNT]
  images = [e["image"].astype(np.float64) / 127.5 - 1 for e in examples]
  return images, [int(e["label"]) for e in examples]


@pytest.fixture(scope="module")
def outputs(program, params, digits):
  """The three heads' logits of each digit alone, by grid."""
  found = {}
  for grid in GRIDS:
    apply = jax.jit(
      lambda x, g=grid: program.model.apply({"params": params}, x, grid=g)
    )
    found[grid] = []
    for image in digits[0]:
      logits, out = apply(image[None].astype(np.float32))
      heads = logits, out["logits_compressed"], out["logits_lookup"]
      found[grid].append([np.asarray(x[0], np.float64) for x in heads])
  return found


def by_hand(outputs, labels, classes=10, count=COUNT):
  """Means over the examples that have a label among the classes."""
  totals, examples = {}, 0
  for heads, label in zip(outputs, labels, strict=True):
    if label >= classes:
      continue
    examples += 1
    for suffix, z in zip(("", "_compressed", "_lookup"), heads, strict=True):
      order = list(np.argsort(-z))
      one = dict(
        loss=np.log(np.sum(np.exp(z))) - z[label],
        top1=order[0] == label,
        top5=label in order[:5],
      )
      for name, value in one.items():
        totals[name + suffix] = totals.get(name + suffix, 0.0) + value
  assert 0 < examples <= count
  return {name: value / examples for name, value in totals.items()}


def check(got, want):
  assert set(got) == set(want)
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def evaluate(program, params, **fields):
  fields = dict(data=DATA, pp_fn=PP) | fields
  pairs = list(Evaluator(program, "val", **fields).run(params))
  names = [name for name, _ in pairs]
  assert len(set(names)) == len(names)
  return dict(pairs)


@pytest.fixture(scope="module")
def training_batch_size(program, params):
  return evaluate(program, params)


def test_against_single_examples(training_batch_size, outputs, digits):
  want = {}
  for grid in GRIDS:
    name = f"val/{grid[0]}x{grid[1]}/"
    metrics = by_hand(outputs[grid], digits[1])
    want |= {name + k: v for k, v in metrics.items()}
    # A prediction that is always right or wrong would test nothing.
    assert 0 < metrics["top5"] < 1
  check(training_batch_size, want)
  assert want["val/2x2/loss"] != pytest.approx(want["val/1x3/loss"], rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_batch_size_does_not_matter(
  program, params, training_batch_size, batch_size
):
  got = evaluate(program, params, batch_size=batch_size, grids=[(2, 2)])
  assert len(got) == 9
  for name, value in got.items():
    want = training_batch_size[name]
    assert value == pytest.approx(want, rel=1e-6, abs=1e-6), name


def test_every_example_comes_once(program, digits):
  evaluator = Evaluator(program, "val", data=DATA, pp_fn=PP, batch_size=5)
  assert evaluator.examples == COUNT
  for _ in range(2):
    batches = list(evaluator.batches())
    masks = np.stack([b["_mask"] for b in batches])
    np.testing.assert_array_equal(masks, [[1] * 5, [1] * 5, [1] * 3 + [0] * 2])
    images = np.concatenate([b["image"] for b in batches])[:COUNT]
    labels = np.concatenate([b["label"] for b in batches])[:COUNT]
    np.testing.assert_allclose(images, np.stack(digits[0]), 0, 1e-6)
    np.testing.assert_array_equal(labels, digits[1])


def test_examples_that_are_missing_are_noticed(program, params):
  evaluator = Evaluator(program, "val", data=DATA, pp_fn=PP, grids=[(2, 2)])
  evaluator.examples = COUNT + 1
  with pytest.raises(RuntimeError, match="val: saw 13 of 14 examples"):
    list(evaluator.run(params))


def test_other_grids_than_those_of_training(program, params):
  got = evaluate(program, params, grids=[[3, 1]])
  assert {name.rsplit("/", 1)[0] for name in got} == {"val/3x1"}


def test_vit_and_examples_without_a_label():
  """Of ten digits, six classes: the other digits do not count."""
  classes = 6
  program = make_program(
    model_name="vit",
    model=dict(variant="mu/8"),
    grids=None,
    num_classes=classes,
    loss="sigmoid_xent",
  )
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: (rng.standard_normal(x.shape) * 0.3).astype(np.float32),
    program.state_shapes.params,
  )
  pp = (
    f"decode|value_range(-1,1)|onehot({classes},key='label',"
    "key_result='labels')|keep('image','labels')"
  )
  evaluator = Evaluator(program, "real", data=DATA, pp_fn=pp)
  got = dict(evaluator.run(params))

  totals, examples = np.zeros(3), 0
  apply = jax.jit(lambda x: program.model.apply({"params": params}, x)[0])
  for batch in evaluator.batches():
    for image, labels, mask in zip(
      batch["image"], batch["labels"], batch["_mask"], strict=True
    ):
      if mask and labels.any():
        z = np.asarray(apply(image[None])[0], np.float64)
        order = np.argsort(-z)
        loss = np.sum(np.log1p(np.exp(-z * (2 * labels - 1))))
        totals += loss, labels[order[0]], labels[order[:5]].any()
        examples += 1
  assert 0 < examples < COUNT
  loss, top1, top5 = totals / examples
  check(got, {"real/loss": loss, "real/top1": top1, "real/top5": top5})


# Of some of the classes.


def of_classes(outputs, labels, classes):
  """As `by_hand`, of the logits and the digits of these classes."""
  some = [
    ([z[classes] for z in heads], classes.index(label))
    for heads, label in zip(outputs, labels, strict=True)
    if label in classes
  ]
  return by_hand(*zip(*some, strict=True)), len(some)


@pytest.mark.parametrize("pp", ["label", "labels"])
def test_some_classes(program, params, outputs, digits, pp):
  pp_fn = PP
  if pp == "labels":
    pp_fn = "decode|value_range(-1,1)|onehot(10,'label','labels')"
    pp_fn += "|keep('image','labels')"
  fields = dict(pp_fn=pp_fn, grids=[(2, 2)])
  got = evaluate(program, params, classes=[9, 0, 3, 4, 1, 7], **fields)
  metrics, count = of_classes(outputs[2, 2], digits[1], [0, 1, 3, 4, 7, 9])
  assert 0 < count < COUNT
  check(got, {f"val/2x2/{k}": v for k, v in metrics.items()})


def test_classes_that_occur(program, params, outputs, digits):
  data = dict(DATA, split="test[:4]")
  classes = sorted(set(digits[1][:4]))
  assert 1 < len(classes) < 10
  fields = dict(data=data, grids=[(2, 2)], classes="present")
  evaluator = Evaluator(program, "val", pp_fn=PP, **fields)
  assert evaluator.classes == tuple(classes)
  got = dict(evaluator.run(params))
  metrics, count = of_classes(outputs[2, 2][:4], digits[1][:4], classes)
  assert count == 4
  check(got, {f"val/2x2/{k}": v for k, v in metrics.items()})
  # Fewer than five classes.
  assert got["val/2x2/top5"] == 1


def test_no_example_has_one_of_the_classes(program, params, digits):
  data, label = dict(DATA, split="test[:1]"), digits[1][0]
  fields = dict(data=data, pp_fn=PP, grids=[(2, 2)])
  other = (label + 1) % 10
  evaluator = Evaluator(program, "val", **fields, classes=[other])
  with pytest.raises(RuntimeError, match="val: no example has one of the"):
    list(evaluator.run(params))


# Errors.


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(data=dict(module="data.digits", split="tset")), ["tset", "test"]),
    (dict(data=dict(module="data.none", split="test")), ["'data.none'"]),
    (dict(data=dict(split="test")), ["name, module, folder"]),
    (dict(data=dict(nam="digits")), ["'nam'", "'name'"]),
    (dict(data=DATA | dict(split="test[:0]")), ["no examples"]),
    (
      dict(pp_fn="decode|resize(16)|keep('image','label')"),
      ["config.evals.val.pp_fn", "(16, 16, 3)", "(32, 32, 3)"],
    ),
    (
      dict(pp_fn="decode|keep('image')"),
      ["config.evals.val.pp_fn", "'label' or 'labels'", "_mask"],
    ),
    (
      dict(
        pp_fn="decode|value_range(-1,1)"
        "|onehot(7,key='label',key_result='labels')"
        "|keep('image','labels')"
      ),
      ["config.evals.val.pp_fn", "7 classes", "config.num_classes is 10"],
    ),
    (dict(pp_fn="decode|nonsense"), ["nonsense"]),
    (dict(batch_size=-4), ["batch_size=-4"]),
    # The lookup grid is 4 x 4.
    (dict(grids=[(5, 5)]), ["config.evals.val.grids", "(5, 5)", "(4, 4)"]),
    (dict(grids=[(2, 2, 2)]), ["config.evals.val.grids", "(2, 2, 2)"]),
    (dict(classes="some"), ["config.evals.val.classes='some'", "'present'"]),
    (dict(classes=3), ["config.evals.val.classes=3", "a list of integers"]),
    (dict(classes=[]), ["config.evals.val.classes=[]", "one or more"]),
    (dict(classes=[1, 2, 1]), ["val.classes=[1, 2, 1]", "each of them once"]),
    (dict(classes=[1, 10]), ["classes are 1 to 10", "num_classes is 10"]),
    (dict(classes=[-1]), ["config.evals.val.classes=[-1]", "-1 to -1"]),
    (dict(classes=[1.0]), ["config.evals.val.classes=[1.0]", "integers"]),
    (dict(classes=[True]), ["config.evals.val.classes=[True]", "integers"]),
  ],
)
def test_errors(program, fields, words):
  with pytest.raises(ValueError) as e:
    Evaluator(program, "val", **(dict(data=DATA, pp_fn=PP) | fields))
  for word in words:
    assert word in str(e.value), str(e.value)


def test_grids_of_a_factorised_encoder():
  """They are those of a slice of the clip."""
  program = make_program(
    model_name="factorised",
    model=dict(variant="mu/2x8", spatial="lookup_vit", grid=(2, 2)),
    grids=None,
    input=dict(data=DATA, pp=PP, image_size=(4, 32, 32), batch_size=4),
  )
  pp = "decode|still_clip(4)|unfold_clip(4)|value_range(-1,1)"
  fields = dict(data=DATA, pp_fn=f"{pp}|keep('image','label')")
  assert Evaluator(program, "val", **fields, grids=[(4, 1)]).grids == [(4, 1)]
  for grid in ((5, 5), (2, 2, 2)):
    with pytest.raises(ValueError, match=r"config.evals.val.grids.*\(4, 4\)"):
      Evaluator(program, "val", **fields, grids=[grid])


def test_grids_for_a_model_without():
  program = make_program(
    model_name="vit", model=dict(variant="mu/8"), grids=None
  )
  with pytest.raises(ValueError, match="config.evals.val.grids"):
    Evaluator(program, "val", data=DATA, pp_fn=PP, grids=[(2, 2)])
