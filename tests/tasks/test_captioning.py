"""Tests of lookup_vit/tasks/captioning.py, against NumPy in float64."""

import jax
import numpy as np
import pytest

from lookup_vit import config_utils
from lookup_vit.tasks import captioning

LENGTH, CLASSES = 7, 11


def make_task(**fields):
  base = dict(
    model_name="captioner",
    task="captioning",
    model=dict(max_length=LENGTH),
    lr=1e-3,
    total_steps=5,
    num_classes=CLASSES,
    input=dict(pp="", image_size=(8, 8), batch_size=4),
  )
  return captioning.Task(config_utils.resolve(base | fields))


def make_text(counts, seed=0, begin=1, end=2):
  """Ids of captions of so many ids, their ends among them, and -1 behind."""
  rng = np.random.default_rng(seed)
  text = np.full((len(counts), LENGTH + 1), -1, np.int32)
  text[:, 0] = begin
  for row, count in zip(text, counts, strict=True):
    row[1 : 1 + count] = rng.integers(3, CLASSES, size=count)
    row[count] = end
  return text


def make_logits(count, seed=0, scale=3.0, text=None):
  """Random logits; where `text` is given, right ones at some of the places."""
  rng = np.random.default_rng(seed)
  logits = scale * rng.standard_normal((count, LENGTH, CLASSES))
  if text is not None:
    for i, n in np.argwhere(rng.uniform(size=(count, LENGTH)) < 0.4):
      logits[i, n, text[i, n + 1]] += 10 * (text[i, n + 1] >= 0)
  return logits.astype(np.float32)


def by_hand(logits, text, smoothing=0.0):
  """Of each id that is no padding: `(caption, cross-entropy, right)`."""
  found = []
  for i, ids in enumerate(text):
    for n, target in enumerate(ids[1:]):
      if target < 0:
        continue
      z = logits[i, n].astype(np.float64)
      log_p = z - z.max() - np.log(np.sum(np.exp(z - z.max())))
      wanted = (1 - smoothing) * np.eye(CLASSES)[target] + smoothing / CLASSES
      found.append((i, -np.sum(wanted * log_p), np.argmax(z) == target))
  return found


COUNTS = [7, 1, 4, 3, 6]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_loss(smoothing):
  task = make_task(label_smoothing=smoothing)
  text = make_text(COUNTS)
  logits = make_logits(5, text=text)
  loss, scalars = task.loss(logits, {}, dict(text=text))
  assert loss.shape == () and loss.dtype == np.float32
  _, xent, _ = zip(*by_hand(logits, text, smoothing), strict=True)
  assert len(xent) == sum(COUNTS)
  np.testing.assert_allclose(loss, np.mean(xent), 1e-5)
  # These are of targets as they are.
  _, xent, right = zip(*by_hand(logits, text), strict=True)
  assert scalars.keys() == {"token_accuracy", "perplexity"}
  assert 0.2 < np.mean(right) < 0.8
  np.testing.assert_allclose(scalars["token_accuracy"], np.mean(right), 1e-6)
  np.testing.assert_allclose(scalars["perplexity"], np.exp(np.mean(xent)), 1e-4)


def test_gradient_of_the_loss():
  """Rows of `(p - target) / ids`, and zeros behind the end."""
  task = make_task(label_smoothing=0.1)
  text = make_text(COUNTS)
  logits = make_logits(5)
  got = jax.grad(lambda x: task.loss(x, {}, dict(text=text))[0])(logits)
  z = np.exp(logits.astype(np.float64))
  target = 0.9 * np.eye(CLASSES)[text[:, 1:]] + 0.1 / CLASSES
  want = (z / z.sum(-1, keepdims=True) - target) / sum(COUNTS)
  want[text[:, 1:] < 0] = 0
  np.testing.assert_allclose(got, want, 1e-4, 1e-7)
  assert not np.any(np.asarray(got)[text[:, 1:] < 0])


def test_what_stands_behind_the_end_does_not_count():
  task = make_task(label_smoothing=0.1)
  text = make_text(COUNTS)
  batch = dict(text=text, _mask=np.ones(5, np.float32))
  logits, other = make_logits(5), make_logits(5, seed=1, scale=100.0)
  other = np.where(text[:, 1:, None] < 0, other, logits)
  assert not np.array_equal(other, logits)
  for of in (task.loss, task.metrics):
    for a, b in zip(
      jax.tree.leaves(of(logits, {}, batch)),
      jax.tree.leaves(of(other, {}, batch)),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)


def test_loss_of_large_logits_is_finite():
  text = make_text(COUNTS)
  logits = make_logits(5, scale=500.0)
  loss, _ = make_task(label_smoothing=0.1).loss(logits, {}, dict(text=text))
  _, xent, _ = zip(*by_hand(logits, text, 0.1), strict=True)
  np.testing.assert_allclose(loss, np.mean(xent), 1e-4)


def test_no_captions():
  """A batch of padding."""
  batch = dict(
    text=np.full((3, LENGTH + 1), -1, np.int32), _mask=np.zeros(3, np.float32)
  )
  loss, scalars = make_task().loss(make_logits(3), {}, batch)
  assert loss == 0 and scalars["token_accuracy"] == 0
  metrics, weights = make_task().metrics(make_logits(3), {}, batch)
  assert not np.any(weights)
  assert all(np.all(np.isfinite(x)) for x in metrics.values())


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_metrics_over_a_split(batch_size):
  """Their weighted mean is the mean over all ids, whatever the batches."""
  task = make_task(label_smoothing=0.3)
  counts = [7, 1, 4, 3, 6, 2, 2, 5, 7, 1, 1]
  size = len(counts)
  text = make_text(counts, seed=2)
  logits = make_logits(size, text=text)
  totals, weight = {}, 0.0
  for first in range(0, size, batch_size):
    index = np.arange(first, first + batch_size)
    # The last batch is filled with examples that do not count.
    batch = dict(
      text=text[index % size], _mask=(index < size).astype(np.float32)
    )
    metrics, weights = task.metrics(logits[index % size], {}, batch)
    assert weights.shape == (batch_size,)
    want = [counts[i] if i < size else 0 for i in index]
    np.testing.assert_array_equal(weights, want)
    weight += np.sum(weights)
    for name, x in metrics.items():
      assert x.shape == (batch_size,) and x.dtype == np.float32
      totals[name] = totals.get(name, 0.0) + np.sum(x * weights)
  _, xent, right = zip(*by_hand(logits, text), strict=True)
  assert weight == sum(counts) and totals.keys() == {"loss", "token_accuracy"}
  np.testing.assert_allclose(totals["loss"] / weight, np.mean(xent), 1e-5)
  np.testing.assert_allclose(
    totals["token_accuracy"] / weight, np.mean(right), 1e-5
  )


def test_metrics_of_each_caption():
  text = make_text(COUNTS)
  logits = make_logits(5, text=text)
  batch = dict(text=text, _mask=np.ones(5, np.float32))
  metrics, _ = make_task().metrics(logits, {}, batch)
  found = by_hand(logits, text)
  for i in range(5):
    _, xent, right = zip(*(x for x in found if x[0] == i), strict=True)
    np.testing.assert_allclose(metrics["loss"][i], np.mean(xent), 1e-5, 1e-6)
    np.testing.assert_allclose(
      metrics["token_accuracy"][i], np.mean(right), 1e-6
    )


def test_captions_cut():
  batch = dict(text=make_text(COUNTS), text_cut=np.array([1, 0, 0, 1, 0]))
  _, scalars = make_task().loss(make_logits(5), {}, batch)
  np.testing.assert_allclose(scalars["captions_cut"], 0.4, 1e-6)


# What the model is given.


def test_inputs():
  """The ids before each of those to be told, and no negative ones."""
  text = np.array([[1, 5, 6, 2, -1, -1, -1, -1], [1, 3, 3, 4, 4, 5, 5, 2]])
  image = np.ones((2, 8, 8, 3), np.float32)
  got, ids = make_task().inputs(dict(image=image, text=text.astype(np.int32)))
  assert got is image
  want = [[1, 5, 6, 2, 0, 0, 0], [1, 3, 3, 4, 4, 5, 5]]
  np.testing.assert_array_equal(ids, want)


def test_augment_is_the_batch():
  batch = dict(image=np.ones((1, 8, 8, 3)), text=make_text([3]))
  assert make_task().augment(batch, 0, jax.random.key(0)) is batch


def test_shapes_of_a_batch():
  shapes = make_task().batch_shapes(4)
  assert {k: (v.shape, v.dtype.name) for k, v in shapes.items()} == {
    "image": ((4, 8, 8, 3), "float32"),
    "text": ((4, LENGTH + 1), "int32"),
  }
  task = make_task(model={})
  assert task.length == 64 and task.batch_shapes(2)["text"].shape == (2, 65)
  make_task().check_input(shapes, "config.input.pp")
  task.check_input(task.batch_shapes(4), "config.input.pp")


# Errors.


def spec(**changes):
  return make_task().batch_shapes(4) | changes


@pytest.mark.parametrize(
  "given, words",
  [
    (dict(image=spec()["image"]), ["['image']", "'text'", "tokenize"]),
    (dict(text=spec()["text"]), ["['text']", "'image'"]),
    (
      spec(text=jax.ShapeDtypeStruct((4, 7), np.int32)),
      ["(7,), int32", "max_length=7", "(8,)", "tokenize(..., 7)"],
    ),
    (
      spec(text=jax.ShapeDtypeStruct((4, 2, 8), np.int32)),
      ["(2, 8), int32", "(8,)"],
    ),
    (
      spec(text=jax.ShapeDtypeStruct((4, 8), np.float32)),
      ["(8,), float32", "int32"],
    ),
  ],
)
def test_check_input_refuses(given, words):
  with pytest.raises(ValueError) as e:
    make_task().check_input(given, "config.evals.val.pp_fn")
  for word in ["config.evals.val.pp_fn", *words]:
    assert word in str(e.value), str(e.value)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(num_classes=None), ["config.num_classes=None", "vocabulary", ">= 2"]),
    (dict(num_classes=1), ["config.num_classes=1"]),
    (dict(label_smoothing=1.0), ["config.label_smoothing=1.0", "[0, 1)"]),
    (dict(mixup=dict(p=0.2)), ["config.mixup", "captions are not mixed"]),
    (dict(cutmix=dict(p=0.2)), ["config.cutmix", "captions are not mixed"]),
  ],
)
def test_errors(fields, words):
  with pytest.raises(ValueError) as e:
    make_task(**fields)
  for word in words:
    assert word in str(e.value), str(e.value)
