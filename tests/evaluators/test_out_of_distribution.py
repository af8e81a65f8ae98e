"""Tests of lookup_vit/evaluators/out_of_distribution.py, on real digits."""

import json
import socket

import jax
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import tensorflow_datasets as tfds

from data.digits import Builder
from lookup_vit import config_utils, train_step
from lookup_vit.evaluators.out_of_distribution import Evaluator, aupr
from tests import programs
from tests.evaluators.test_views import draw_params

OUT, IN = "train[:9]", "test[:13]"
FIELDS = dict(
  data=dict(module="data.digits", split=OUT),
  inliers=dict(module="data.digits", split=IN),
  pp_fn="decode|value_range(-1,1)|keep('image','label')",
)
GRIDS = [(2, 2), (1, 3)]


def make_program(**fields):
  data = dict(data=FIELDS["data"], pp=FIELDS["pp_fn"], image_size=(32, 32))
  base = dict(
    model_name="lookup_vit",
    num_classes=10,
    model=dict(variant="mu/8", grid=(2, 2)),
    grids=GRIDS,
    input=data | dict(batch_size=4),
    lr=1e-3,
    total_steps=2,
  )
  return train_step.Program(config_utils.resolve(base | fields), 2)


@pytest.fixture(scope="module")
def program():
  return make_program()


@pytest.fixture(scope="module")
def params(program):
  return draw_params(program)


@pytest.fixture(scope="module")
def logits(program, params):
  """Logits of each digit alone, and labels, by grid and split."""
  builder = Builder()
  builder.download_and_prepare()
  found = {}
  for split in OUT, IN:
    name, count = split.partition("[:")[0], int(split[:-1].partition(":")[2])
    examples = list(tfds.as_numpy(builder.as_dataset(split=name)))[:count]
    labels = np.array([int(e["label"]) for e in examples])
    for grid in GRIDS:
      apply = jax.jit(
        lambda x, g=grid: program.model.apply({"params": params}, x, grid=g)[0]
      )
      images = [e["image"].astype(np.float32) / 127.5 - 1 for e in examples]
      rows = [np.asarray(apply(x[None])[0], np.float64) for x in images]
      found[grid, split] = np.stack(rows), labels
  return found


def by_hand(logits, classes):
  """As its paper has it, of each grid."""
  want = {}
  for grid in GRIDS:
    (out, _), (inside, labels) = logits[grid, OUT], logits[grid, IN]
    inside = inside[np.isin(labels, classes)]
    assert 0 < len(inside) < len(labels)
    scores = [
      -scipy.special.softmax(row[classes]).max() for row in (*out, *inside)
    ]
    truth = [1] * len(out) + [0] * len(inside)
    value = sklearn.metrics.average_precision_score(truth, scores)
    want[f"o/{grid[0]}x{grid[1]}/aupr"] = value
  return want


def evaluate(program, params, **fields):
  return dict(Evaluator(program, "o", **(FIELDS | fields)).run(params))


@pytest.mark.parametrize("batch_size", [4, 5])
def test_against_single_examples(program, params, logits, batch_size):
  classes = [0, 2, 3, 5, 9]
  got = evaluate(program, params, classes=classes, batch_size=batch_size)
  assert got == pytest.approx(by_hand(logits, classes))
  # All classes' logits give something else.
  assert got != pytest.approx(by_hand(logits, list(range(9))))


def test_classes_that_occur(program, params, logits):
  data = dict(FIELDS["data"], split="train[:3]")
  evaluator = Evaluator(program, "o", **(FIELDS | dict(data=data)))
  labels = logits[GRIDS[0], OUT][1][:3]
  assert evaluator.classes == tuple(sorted(set(labels.tolist())))
  cut = {
    (grid, split): [x[:3] if split == OUT else x for x in arrays]
    for (grid, split), arrays in logits.items()
  }
  want = by_hand(cut, list(evaluator.classes))
  assert dict(evaluator.run(params)) == pytest.approx(want)


def test_vit(logits):
  program = make_program(
    model_name="vit", model=dict(variant="mu/8"), grids=None
  )
  got = evaluate(program, draw_params(program), classes=[1, 2, 3])
  assert list(got) == ["o/aupr"] and 0 < got["o/aupr"] <= 1


MANY = """
import json, sys
process, port = sys.argv[1:]

import jax

jax.config.update("jax_num_cpu_devices", 2)
from lookup_vit import distributed
from tests.evaluators import test_out_of_distribution as test

distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
program = test.make_program(mesh=[("data", 2), ("fsdp", 2)], sharding="fsdp")
params = test.put(test.draw_params(program), program.state_shardings.params)
print(json.dumps(test.evaluate(program, params, classes=[0, 2, 3, 5, 9])))
"""


def put(params, shardings):
  """Arrays that each process has whole, over the devices of all."""

  def one(x, sharding):
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(one, params, shardings)


def test_devices_do_not_matter(logits):
  """Two processes, each with two devices and parts of the splits."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  started = [programs.Program("-c", MANY, p, port) for p in range(2)]
  for process in started:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    got = json.loads(out.splitlines()[-1])
    assert got == pytest.approx(by_hand(logits, [0, 2, 3, 5, 9]))


def test_aupr_by_hand():
  # By score: 0.9 is one, 0.8 is none, 0.6 is one, 0.1 is none.
  got = aupr(np.array([0.9, 0.6]), np.array([0.1, 0.8]))
  assert got == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
  # Of three with the same score, one is.
  assert aupr(np.array([0.5]), np.array([0.5, 0.5])) == pytest.approx(1 / 3)


def test_no_inliers(program, params, logits):
  label = int(logits[GRIDS[0], IN][1][0])
  inliers = dict(FIELDS["inliers"], split="test[:1]")
  evaluator = Evaluator(
    program,
    "o",
    **(FIELDS | dict(inliers=inliers, classes=[(label + 1) % 10])),
  )
  with pytest.raises(RuntimeError, match="o: no inlier has one of the classes"):
    list(evaluator.run(params))


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(classes=[3, 10]), ["config.evals.o.classes=[3, 10]", "is 10"]),
    (dict(classes="all"), ["config.evals.o.classes='all'", "'present'"]),
    (dict(batch_size=0), ["config.evals.o.batch_size=0"]),
    (dict(grids=[(5, 5)]), ["config.evals.o.grids", "(5, 5)"]),
    (dict(inliers=dict(module="data.digits")), ["data.split is not set"]),
    (
      dict(pp_fn="decode|value_range(-1,1)|keep('image')"),
      ["config.evals.o.pp_fn", "'label'"],
    ),
    (
      dict(
        pp_fn="decode|value_range(-1,1)|onehot(10,key_result='labels')"
        "|keep('image','labels')"
      ),
      ["config.evals.o.pp_fn", "want 'label'"],
    ),
  ],
)
def test_errors(program, fields, words):
  with pytest.raises(ValueError) as e:
    Evaluator(program, "o", **(FIELDS | fields))
  for word in words:
    assert word in str(e.value), str(e.value)
