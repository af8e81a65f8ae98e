"""The language of preprocessing strings, and its errors."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf

from lookup_vit.preprocess import get_preprocess_fn, register, registry

SEED = tf.constant([3, 5])


@pytest.fixture
def scratch_ops(monkeypatch):
  """Lets a test register ops that go away with it."""
  monkeypatch.setattr(registry, "_OPS", dict(registry._OPS))


def test_ops_run_in_order_with_their_arguments(scratch_ops):
  calls = []

  @register("note")
  def note(*args, **kwargs):
    calls.append((args, kwargs))
    return lambda data, seed: {**data, "x": data["x"] * 10 + len(args)}

  fn = get_preprocess_fn("note|note(1, 'b') | note(-1, (2, 3), k=[None, True])")
  assert calls == [
    ((), {}),
    ((1, "b"), {}),
    ((-1, (2, 3)), {"k": [None, True]}),
  ]
  assert fn({"x": tf.constant(0)}, SEED)["x"].numpy() == 22


def test_op_i_gets_the_seed_folded_with_i(scratch_ops):
  seeds = []

  @register("spy")
  def spy():
    return lambda data, seed: seeds.append(seed.numpy().tolist()) or data

  get_preprocess_fn("spy|keep('a')||spy")({}, SEED)
  fold = tf.random.experimental.stateless_fold_in
  assert seeds == [fold(SEED, i).numpy().tolist() for i in (0, 2)]


@pytest.mark.parametrize("pp", ["", " ", "|", "||keep('a', 'b')|"])
def test_empty_segments_are_skipped(pp):
  data = {"a": tf.constant(1), "b": tf.constant(2)}
  assert get_preprocess_fn(pp)(data, SEED).keys() == data.keys()


def test_the_given_data_is_not_changed():
  data = {"a": tf.constant(1), "label": tf.constant(2)}
  before = dict(data)
  get_preprocess_fn("copy('a', 'b')|onehot(3)|drop('a')")(data, SEED)
  assert data == before


@pytest.mark.parametrize(
  ("pp", "words"),
  [
    ("decode|flip_rl", ["op 2 of 2", "'flip_rl'", "Did you mean 'flip_lr'"]),
    ("zzz", ["no op 'zzz'", "central_crop", "value_range"]),
    ("decode|resize(224", ["op 2 of 2", "'resize(224'", "literal arguments"]),
    ("resize(side)", ["op 1 of 1", "'resize(side)'", "literal arguments"]),
    ("resize(2**9)", ["literal arguments"]),
    ("resize(__import__('os').getcwd())", ["literal arguments"]),
    ("resize(*[224])", ["literal arguments"]),
    ("resize(**{'size': 224})", ["literal arguments"]),
    ("resize(size=1, size=2)", ["literal arguments"]),
    ("decode|no_such.resize(2)", ["op 2 of 2", "'no_such'", "PYTHONPATH"]),
    ("os.path.exists('/')", ["no op 'os.path.exists'", "registers none"]),
    ("resize(8).numpy()", ["literal arguments"]),
    ("'a'.upper()", ["literal arguments"]),
    ("resize(224)(224)", ["literal arguments"]),
    ("keep({[]: 1})", ["literal arguments"]),
    ("flip_lr(", ["'flip_lr('"]),
    ("decode flip_lr", ["'decode flip_lr'"]),
    ("flip_lr(1)", ["op 1 of 1", "too many positional", "flip_lr()"]),
    ("||resize", ["op 1 of 1", "'size'", "antialias"]),
    ("resize(1, sise=2)", ["'sise'", "resize(size"]),
    ("resize(0)", ["op 1 of 1", "got 0"]),
    ("resize((1, 2, 3))", ["got (1, 2, 3)"]),
    ("resize(8, 'cubist')", ["'cubist'"]),
    ("inception_crop(224, 50, 20)", ["area_min", "50", "20"]),
    ("inception_crop(ratio_min=2)", ["ratio_min", "got 2"]),
    ("decode(4)", ["got 4"]),
    ("onehot(0)", ["got 0"]),
    ("randaug(-1, 10)", ["num_layers", "-1"]),
    ("randaug(2, 'strong')", ["magnitude", "'strong'"]),
  ],
)
def test_a_bad_string_fails_before_any_data(pp, words):
  with pytest.raises(ValueError) as e:
    get_preprocess_fn(pp)
  for word in [*words, repr(pp)]:
    assert word in str(e.value)


_OWN_OPS = """
from lookup_vit.preprocess import register

@register("own_dim")
def own_dim(by=2):
  return lambda data, seed: {**data, "x": data["x"] // by}
"""


def test_ops_of_a_module_of_ones_own(scratch_ops, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  package = tmp_path / "registry_of_ones_own"
  package.mkdir()
  (package / "ops.py").write_text(_OWN_OPS)
  (package / "broken.py").write_text("import no_such_package")
  name = "registry_of_ones_own.ops"
  fn = get_preprocess_fn(f"{name}.own_dim|{name}.own_dim(by=5)")
  assert fn({"x": tf.constant(70)}, SEED)["x"].numpy() == 7
  pp = registry.insert_before(f"keep('x')|{name}.own_dim", "keep", "flatten")
  assert pp == f"flatten|keep('x')|{name}.own_dim"
  cases = [
    (f"{name}.own_dims", ["'own_dim'", f"{name} registers own_dim"]),
    (f"{name}.own_dim(to=5)", ["'to'", f"{name}.own_dim(by=2)"]),
    # Of another module than it says.
    (f"{name}.decode", [f"no op '{name}.decode'"]),
  ]
  for pp, words in cases:
    with pytest.raises(ValueError, match="op 1 of 1") as e:
      get_preprocess_fn(pp)
    for word in words:
      assert word in str(e.value)
  with pytest.raises(ModuleNotFoundError, match="no_such_package"):
    get_preprocess_fn("registry_of_ones_own.broken.own_dim")


def test_a_name_is_registered_once(scratch_ops):
  with pytest.raises(ValueError, match="'decode'"):
    register("decode")(lambda: None)


def test_a_missing_image_is_named():
  fn = get_preprocess_fn("keep('picture')|flip_lr")
  with pytest.raises(ValueError, match="op 2 of 2, 'flip_lr'.*picture"):
    fn({"picture": tf.constant(1)}, SEED)


def test_ops_that_miss_a_key_can_be_left_out(scratch_ops):
  seeds = []

  @register("spy")
  def spy():
    return lambda data, seed: seeds.append(seed.numpy().tolist()) or data

  pp = "onehot(3)|spy|copy('b', 'c')|copy('a', 'c')"
  data = get_preprocess_fn(pp, skip_missing=True)({"a": tf.constant(1)}, SEED)
  assert {k: v.numpy() for k, v in data.items()} == {"a": 1, "c": 1}
  fold = tf.random.experimental.stateless_fold_in
  assert seeds == [fold(SEED, 1).numpy().tolist()]
  with pytest.raises(ValueError, match="op 1 of 4"):
    get_preprocess_fn(pp)({"a": tf.constant(1)}, SEED)


def test_general_ops():
  data = {"a": tf.constant(1), "b": tf.constant(2), "c": tf.constant(3)}
  assert set(get_preprocess_fn("keep('a', 'c', 'z')")(data, SEED)) == {"a", "c"}
  assert set(get_preprocess_fn("drop('a', 'z')")(data, SEED)) == {"b", "c"}
  assert get_preprocess_fn("copy('a', 'd')")(data, SEED)["d"].numpy() == 1


@pytest.mark.parametrize(
  ("pp", "label", "want"),
  [
    ("onehot(3)", 1, [0, 1, 0]),
    ("onehot(3, on=0.9, off=0.1)", 2, [0.1, 0.1, 0.9]),
    ("onehot(3)", -1, [0, 0, 0]),
    ("onehot(4)", [1, 3, 1, -1], [0, 1, 0, 1]),
    ("onehot(4, on=2.0, off=1.0)", [], [1, 1, 1, 1]),
    ("onehot(3, multi=False)", [2, 0], [[0, 0, 1], [1, 0, 0]]),
  ],
)
def test_onehot(pp, label, want):
  out = get_preprocess_fn(pp)({"label": tf.constant(label, tf.int64)}, SEED)
  assert out["label"].dtype == tf.float32
  np.testing.assert_allclose(out["label"], want, rtol=1e-6)


def test_onehot_keys():
  out = get_preprocess_fn("onehot(2, key='y', key_result='z')")(
    {"y": tf.constant(1)}, SEED
  )
  assert out["y"].numpy() == 1
  assert out["z"].numpy().tolist() == [0, 1]


@pytest.mark.parametrize(
  "pp, want",
  [
    ("decode|flip_lr", "decode|x(1)|flip_lr"),
    (" flip_lr() ||decode|flip_lr", "x(1)|flip_lr()|decode|flip_lr"),
  ],
)
def test_an_op_is_put_before_another(pp, want):
  assert registry.insert_before(pp, "flip_lr", "x(1)") == want


def test_there_is_no_op_to_put_another_before():
  words = r"no op 'flip_lr' in 'decode\|keep\(\"flip_lr\"\)', to put x\(1\)"
  with pytest.raises(ValueError, match=words):
    registry.insert_before('decode|keep("flip_lr")', "flip_lr", "x(1)")
