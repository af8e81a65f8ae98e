"""Tests of lookup_vit/tasks/classification.py, against NumPy in float64."""

import jax
import numpy as np
import pytest

from lookup_vit import config_utils
from lookup_vit.tasks import classification


def make_task(**fields):
  base = dict(
    model_name="vit",
    lr=1e-3,
    total_steps=5,
    num_classes=7,
    input=dict(pp="", image_size=(8, 8), batch_size=4),
  )
  return classification.Task(config_utils.resolve(base | fields))


def make_logits(count, classes, heads, seed=0, scale=3.0):
  rng = np.random.default_rng(seed)
  draw = lambda: (  # noqa: E731
    rng.standard_normal((count, classes)) * scale
  ).astype(np.float32)
  if not heads:
    return draw(), {"pre_logits": np.zeros((count, 2))}
  out = {f"logits_{name}": draw() for name in ("compressed", "lookup")}
  return (out["logits_compressed"] + out["logits_lookup"]) / 2, out


def softmax_xent(logits, targets):
  z = logits.astype(np.float64)
  z = z - z.max(-1, keepdims=True)
  log_p = z - np.log(np.sum(np.exp(z), -1, keepdims=True))
  return -np.sum(targets * log_p, -1)


def sigmoid_xent(logits, targets):
  z = logits.astype(np.float64)
  log_p, log_not_p = -np.log1p(np.exp(-z)), -np.log1p(np.exp(z))
  return -np.sum(targets * log_p + (1 - targets) * log_not_p, -1)


XENT = dict(softmax_xent=softmax_xent, sigmoid_xent=sigmoid_xent)


def make_targets(kind, count=5, classes=7, seed=1):
  """A batch's targets, and the same as an array `[count, classes]`."""
  rng = np.random.default_rng(seed)
  label = rng.integers(classes, size=count)
  if kind == "label":
    return {"label": label}, np.eye(classes)[label]
  if kind == "soft":
    labels = rng.dirichlet(np.ones(classes), count).astype(np.float32)
    return {"labels": labels}, labels.astype(np.float64)
  labels = rng.integers(0, 2, (count, classes))
  return {"labels": labels}, labels.astype(np.float64)


# Loss.


@pytest.mark.parametrize("kind", ["label", "soft", "multi-hot"])
@pytest.mark.parametrize("loss", ["softmax_xent", "sigmoid_xent"])
@pytest.mark.parametrize("heads", [False, True])
def test_loss(loss, kind, heads):
  task = make_task(loss=loss)
  batch, targets = make_targets(kind)
  logits, out = make_logits(5, 7, heads)
  got, scalars = task.loss(logits, out, batch)
  each = {
    name.replace("logits", "loss"): np.mean(XENT[loss](x, targets))
    for name, x in out.items()
    if name.startswith("logits_")
  }
  want = np.mean(list(each.values())) if heads else None
  if not heads:
    want = np.mean(XENT[loss](logits, targets))
  np.testing.assert_allclose(got, want, 1e-5)
  assert set(scalars) == set(each)
  for name, value in each.items():
    np.testing.assert_allclose(scalars[name], value, 1e-5)
  assert got.shape == () and got.dtype == np.float32


@pytest.mark.parametrize("name", ["compressed", "lookup"])
def test_one_head_of_two(name):
  """Of a LookupViT with a single classifier: its cross-entropy, its metrics."""
  task = make_task()
  batch, targets = make_targets("label")
  logits, _ = make_logits(5, 7, False)
  out = {f"logits_{name}": logits, "pre_logits_compressed": None}
  got, scalars = task.loss(logits, out, batch)
  want = np.mean(softmax_xent(logits, targets))
  np.testing.assert_allclose(got, want, 1e-5)
  assert set(scalars) == {f"loss_{name}"}
  metrics, _ = task.metrics(logits, out, dict(batch, _mask=np.ones(5)))
  assert set(metrics) == {
    f"{metric}{suffix}"
    for metric in ("loss", "top1", "top5")
    for suffix in ("", f"_{name}")
  }
  np.testing.assert_array_equal(metrics["top1"], metrics[f"top1_{name}"])


def test_loss_of_large_logits_is_finite():
  batch, targets = make_targets("label")
  logits, out = make_logits(5, 7, False, scale=500.0)
  for loss in XENT:
    got, _ = make_task(loss=loss).loss(logits, out, batch)
    want = np.mean(
      softmax_xent(logits, targets)
      if loss == "softmax_xent"
      # log(1 + exp(z)) is max(z, 0) there.
      else np.sum(np.maximum(logits, 0) - logits * targets, -1)
    )
    np.testing.assert_allclose(got, want, 1e-4)


def test_both_heads_have_equal_gradients():
  task = make_task()
  batch, _ = make_targets("label")
  _, out = make_logits(5, 7, True)
  out["logits_lookup"] = out["logits_compressed"]
  grads = jax.grad(lambda o: task.loss(None, o, batch)[0])(out)
  np.testing.assert_array_equal(
    grads["logits_compressed"], grads["logits_lookup"]
  )
  # That of a mean cross-entropy, halved: rows of (p - y) / (2 * 5).
  z = np.exp(out["logits_lookup"].astype(np.float64))
  p = z / z.sum(-1, keepdims=True)
  want = (p - np.eye(7)[batch["label"]]) / 10
  np.testing.assert_allclose(grads["logits_lookup"], want, 1e-4, 1e-7)


# What is trained on.


@pytest.mark.parametrize("kind", ["label", "soft", "multi-hot"])
def test_label_smoothing(kind):
  task = make_task(label_smoothing=0.2)
  batch, targets = make_targets(kind)
  batch["image"] = np.ones((5, 2, 2, 3), np.float32)
  got = task.augment(batch, 0, jax.random.key(0))
  assert set(got) == {"image", "labels"}
  assert got["image"] is batch["image"]
  assert got["labels"].dtype == np.float32
  np.testing.assert_allclose(got["labels"], 0.8 * targets + 0.2 / 7, 1e-6)


def test_no_augmentation():
  batch, targets = make_targets("label")
  batch["image"] = np.ones((5, 2, 2, 3), np.float32)
  got = make_task().augment(batch, 0, jax.random.key(0))
  np.testing.assert_array_equal(got["labels"], targets)


def test_mixing_is_of_smoothed_targets():
  task = make_task(label_smoothing=0.2, mixup=dict(p=0.5))
  batch = dict(
    image=np.arange(4 * 36, dtype=np.float32).reshape(4, 6, 6, 1),
    label=np.array([0, 1, 2, 3]),
  )
  got = task.augment(batch, 0, jax.random.key(0))
  smoothed = 0.8 * np.eye(7)[:4] + 0.2 / 7
  np.testing.assert_allclose(np.sum(got["labels"], -1), 1, 1e-6)
  assert not np.array_equal(got["image"], batch["image"])
  for i in range(4):
    own = (got["labels"][i, i] - 0.2 / 7) / 0.8
    want = own * smoothed[i] + (1 - own) * smoothed[i ^ 1]
    np.testing.assert_allclose(got["labels"][i], want, 1e-4, 1e-6)


# Metrics.


def count_by_hand(logits, targets, k):
  """Whether any of the k largest logits belongs to a right class."""
  hits = []
  for z, y in zip(logits, targets, strict=True):
    best = sorted(range(len(z)), key=lambda c: -z[c])[:k]
    hits.append(float(any(y[c] > 0 for c in best)))
  return hits


@pytest.mark.parametrize("kind", ["label", "multi-hot"])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("classes", [1, 3, 5, 7, 40])
def test_metrics(kind, heads, classes):
  count = 30
  task = make_task(num_classes=classes, loss="sigmoid_xent")
  batch, targets = make_targets(kind, count, classes)
  batch["_mask"] = (np.arange(count) % 3 > 0).astype(np.float32)
  logits, out = make_logits(count, classes, heads)
  got, weights = task.metrics(logits, out, batch)

  predictions = {"": logits}
  if heads:
    predictions["_compressed"] = out["logits_compressed"]
    predictions["_lookup"] = out["logits_lookup"]
  assert set(got) == {
    f"{m}{s}" for m in ("loss", "top1", "top5") for s in predictions
  }
  for suffix, x in predictions.items():
    want = dict(
      loss=sigmoid_xent(x, targets),
      top1=count_by_hand(x, targets, 1),
      top5=count_by_hand(x, targets, 5),
    )
    for name, value in want.items():
      g = got[name + suffix]
      assert g.shape == (count,) and g.dtype == np.float32
      np.testing.assert_allclose(g, value, 1e-5, 1e-6)
  # Padding does not count, nor what has no right class at all.
  want = batch["_mask"] * (targets.sum(-1) > 0)
  np.testing.assert_array_equal(weights, want)
  if classes <= 5 and kind == "label":
    np.testing.assert_array_equal(got["top5"], 1)


def test_any_of_several_right_classes_counts():
  """As ImageNet-ReaL (arXiv:2006.07159) counts."""
  task = make_task()
  logits = np.array([[7, 6, 5, 4, 3, 2, 1]] * 4, np.float32)
  labels = np.zeros((4, 7), np.float32)
  labels[0, [0, 6]] = 1  # best
  labels[1, [4, 5]] = 1  # fifth
  labels[2, [5, 6]] = 1  # none of five
  batch = dict(labels=labels, _mask=np.array([1, 1, 1, 1], np.float32))
  got, weights = task.metrics(logits, {}, batch)
  np.testing.assert_array_equal(got["top1"][:3], [1, 0, 0])
  np.testing.assert_array_equal(got["top5"][:3], [1, 1, 0])
  np.testing.assert_array_equal(weights, [1, 1, 1, 0])
  assert all(np.all(np.isfinite(x)) for x in got.values())


def test_prediction_is_of_the_mean_of_the_heads():
  """Each head alone is wrong where their mean is right."""
  task = make_task(num_classes=3)
  out = dict(
    logits_compressed=np.array([[2.0, 3.0, -9.0]], np.float32),
    logits_lookup=np.array([[2.0, -9.0, 3.0]], np.float32),
  )
  mean = (out["logits_compressed"] + out["logits_lookup"]) / 2
  batch = dict(label=np.array([0]), _mask=np.ones(1, np.float32))
  got, _ = task.metrics(mean, out, batch)
  assert got["top1"] == 1
  assert got["top1_compressed"] == got["top1_lookup"] == 0


# Errors.


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(num_classes=None), ["config.num_classes=None", "integer >= 1"]),
    (dict(num_classes=0), ["config.num_classes=0"]),
    (dict(num_classes=10.0), ["config.num_classes=10.0"]),
    (dict(loss="l2"), ["config.loss='l2'", "softmax_xent or sigmoid_xent"]),
    (dict(label_smoothing=1.0), ["config.label_smoothing=1.0", "[0, 1)"]),
    (dict(label_smoothing=-0.1), ["config.label_smoothing=-0.1"]),
    (dict(mixup=dict(p=-1)), ["config.mixup.p=-1", ">= 0"]),
    (dict(cutmix=dict(p="1")), ["config.cutmix.p='1'", ">= 0"]),
    (dict(cutmix=dict(p=None)), ["config.cutmix.p is not set"]),
    (
      dict(
        mixup=dict(p=0.2), input=dict(pp="", image_size=(8, 8), batch_size=5)
      ),
      ["config.input.batch_size=5", "odd"],
    ),
  ],
)
def test_errors(fields, words):
  with pytest.raises(ValueError) as e:
    make_task(**fields)
  for word in words:
    assert word in str(e.value), str(e.value)


@pytest.mark.parametrize("loss", XENT)
def test_probabilities(loss):
  logits, _ = make_logits(5, 7, heads=False)
  found = make_task(loss=loss).probabilities(logits)
  # Of each class, as the loss has it for that class alone.
  z = logits.astype(np.float64)
  if loss == "softmax_xent":
    eye = np.broadcast_to(np.eye(7)[:, None], (7, 5, 7))
    want = np.exp(-np.stack([softmax_xent(z, one) for one in eye], axis=1))
  else:
    want = np.exp(-sigmoid_xent(z[..., None], np.ones((5, 7, 1))))
  np.testing.assert_allclose(found, want, 1e-5)
