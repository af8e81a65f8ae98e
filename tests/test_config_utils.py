"""Tests of lookup_vit/config_utils.py."""

import json
import os
import textwrap

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lookup_vit import config_utils

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def minimal(**fields):
  base = dict(
    model_name="vit",
    lr=1e-3,
    total_steps=5,
    input=dict(pp="decode", image_size=(8, 8), batch_size=6),
  )
  return base | fields


def fails(function, *args, words, error=ValueError):
  with pytest.raises(error) as e:
    function(*args)
  for word in words:
    assert word in str(e.value), str(e.value)


def test_load(tmp_path):
  path = tmp_path / "c.py"
  path.write_text(
    textwrap.dedent(
      """
      import ml_collections
      def get_config(arg=None):
        return ml_collections.ConfigDict(dict(arg=arg))
      """
    )
  )
  assert config_utils.load(str(path)).arg is None
  assert config_utils.load(f"{path}:").arg is None
  assert config_utils.load(f"{path}:a=1,b=x:y").arg == "a=1,b=x:y"


def test_load_errors(tmp_path):
  missing = str(tmp_path / "missing.py")
  fails(config_utils.load, missing, words=["No config file", missing])
  fails(config_utils.load, f"{missing}:a=1", words=[repr(missing)])
  fails(config_utils.load, str(tmp_path), words=["No config file"])
  path = tmp_path / "empty.py"
  path.write_text("")
  fails(config_utils.load, str(path), words=[str(path), "get_config"])


def test_load_of_the_configs_of_the_project():
  path = os.path.join(ROOT, "configs", "digits_lookup.py")
  full = config_utils.load(path)
  local = config_utils.load(f"{path}:runlocal,seed=3")
  assert (full.seed, local.seed) == (0, 3)
  assert local.total_steps == 6 and local.total_epochs is None
  assert local.input.batch_size == 8 < full.input.batch_size
  assert config_utils.resolve(local).evals.test.data.split == "test[:20]"
  fails(
    config_utils.load,
    f"{path}:sed=3",
    words=["'sed'", "seed, epochs, runlocal"],
  )


# Completing and checking.


def test_resolve_fills_in_the_defaults():
  config = config_utils.resolve(
    minimal(input=minimal()["input"] | {"data": {}})
  )
  assert set(config) == set(config_utils.DEFAULTS)
  assert set(config.input) == set(config_utils.DEFAULTS["input"])
  assert config.seed == 0 and config.optax_name == "adamw"
  assert config.input.shuffle_buffer_size == 10_000
  assert config.input.batch_size == 6
  assert config.wd_mults == [[r".*/kernel$", 1.0]]


def test_resolve_leaves_the_defaults_and_its_argument_alone():
  before = json.dumps(config_utils.DEFAULTS)
  given = minimal(mixup=dict(p=0.3))
  copy = json.dumps(given)
  config = config_utils.resolve(given)
  config.model.width = 3
  config.input.data.name = "x"
  config.mixup.p = 0.7
  config.evals.test = dict(type="x")
  assert json.dumps(config_utils.DEFAULTS) == before
  assert json.dumps(given) == copy


def test_resolve_takes_a_config_dict_with_references():
  config = ml_collections.ConfigDict(minimal())
  config.wd = config.get_ref("lr")
  config.model = dict(variant="mu/4", grid=(2, 2))
  got = config_utils.resolve(config)
  assert got.wd == 1e-3
  assert got.model.grid == [2, 2]


def test_a_resolved_config_is_itself_after_json_and_after_resolve():
  config = config_utils.resolve(
    minimal(
      grids=[(3, 3), (4, 4)],
      model=dict(grid=(3, 3)),
      frozen=("a.*",),
      lr_mults=[("a", 0.1)],
      evals=dict(x=dict(type="classification", grids=((1, 2),))),
      lr=0.1 + 0.2,
    )
  )
  again = json.loads(json.dumps(config.to_dict()))
  assert again == config.to_dict()
  assert config_utils.resolve(again) == config
  assert config_utils.resolve(config) == config
  assert not config_utils.differences(config.to_dict(), again)


@pytest.mark.parametrize(
  "fields, words",
  [
    (
      dict(modle=1),
      ["config.modle", "Did you mean config.model?", "total_epochs"],
    ),
    (dict(zzzz=1), ["config.zzzz. config has"]),
    (
      dict(input=dict(batchsize=3)),
      ["config.input.batchsize", "config.input.batch_size?", "image_size"],
    ),
    (dict(mixup=dict(q=1)), ["config.mixup.q", "config.mixup has p."]),
    (dict(input=3), ["config.input=3", "want a dict"]),
    (dict(model="B/16"), ["config.model='B/16'", "want a dict"]),
    (dict(model_name=None), ["config.model_name is not set"]),
    (dict(lr=None), ["config.lr is not set"]),
    (dict(total_epochs=3), ["total_steps", "total_epochs", "not both"]),
    (dict(total_steps=None), ["total_steps", "total_epochs", "not neither"]),
    (dict(ckpt_steps=0), ["config.ckpt_steps=0", "integer >= 1"]),
    (
      dict(model_init_inflation="middle"),
      ["config.model_init_inflation='middle'", "'central' or 'average'"],
    ),
    (dict(log_training_steps=1.5), ["config.log_training_steps=1.5"]),
    (dict(grad_accum_steps=None), ["config.grad_accum_steps is not set"]),
    (
      dict(grad_accum_steps=4),
      ["config.input.batch_size=6", "config.grad_accum_steps=4"],
    ),
    (dict(lr=jnp.ones(())), ["plain values", "not JSON serializable"]),
    (dict(model=dict(dtype=np.float32)), ["plain values"]),
    (dict(model=dict(dims=np.arange(3))), ["plain values"]),
    (dict(frozen={"a", "b"}), ["plain values", "set"]),
  ],
)
def test_resolve_errors(fields, words):
  fails(config_utils.resolve, minimal(**fields), words=words)


@pytest.mark.parametrize("name", ["pp", "image_size", "batch_size"])
def test_resolve_wants_the_fields_of_the_input(name):
  given = minimal()
  del given["input"][name]
  words = [f"config.input.{name} is not set"]
  fails(config_utils.resolve, given, words=words)


@pytest.mark.parametrize("batch_size", [0, -6, 6.0, "6"])
def test_resolve_wants_a_batch_size(batch_size):
  given = minimal()
  given["input"]["batch_size"] = batch_size
  words = [f"config.input.batch_size={batch_size!r}"]
  fails(config_utils.resolve, given, words=words)


# Steps, comparing, grids, presets.


@pytest.mark.parametrize(
  "epochs, examples, batch, want",
  [(60, 1437, 96, 899), (1, 8, 8, 1), (1, 9, 8, 2), (0.5, 16, 8, 1)],
)
def test_total_steps_of_epochs_see_every_example(epochs, examples, batch, want):
  given = minimal(total_steps=None, total_epochs=epochs)
  given["input"]["batch_size"] = batch
  config = config_utils.resolve(given)
  assert config_utils.total_steps(config, examples) == want
  assert want * batch >= epochs * examples > (want - 1) * batch


def test_total_steps_are_not_rounded_up_by_a_rounding_error():
  """1.1 * 100 / 10 is 11.000000000000002 in floating point."""
  given = minimal(total_steps=None, total_epochs=1.1)
  given["input"]["batch_size"] = 10
  config = config_utils.resolve(given)
  assert config_utils.total_steps(config, 100) == 11


def test_total_steps():
  config = config_utils.resolve(minimal(total_steps=7))
  assert config_utils.total_steps(config, 1) == 7
  for name in ("total_steps", "total_epochs"):
    fields = minimal(**{"total_steps": None, name: 0})
    fails(config_utils.resolve, fields, words=[f"config.{name}=0"])
  config = minimal(total_steps=None, total_epochs=0.1)
  config = config_utils.resolve(config)
  words = ["total_steps", "total_epochs", "20 examples", "less than a step"]
  fails(config_utils.total_steps, config, 20, words=words)


def test_differences():
  a = config_utils.resolve(minimal(model=dict(width=8))).to_dict()
  assert config_utils.differences(a, a) == []
  b = config_utils.resolve(
    minimal(
      model=dict(width=9, depth=2),
      input=dict(pp="decode", image_size=(8, 8), batch_size=12),
      lr_mults=[("x", 1.0)],
      # What may differ.
      evals=dict(x=dict(type="classification")),
      mesh=[("data", 4)],
      log_training_steps=1,
      log_attention_logit=True,
      ckpt_steps=1,
      ckpt_keep=7,
      ckpt_keep_every=9,
    )
  ).to_dict()
  assert sorted(config_utils.differences(a, b)) == [
    "input.batch_size: 6, now 12",
    "lr_mults: [], now [['x', 1.0]]",
    "model.depth: None, now 2",
    "model.width: 8, now 9",
  ]


def test_differences_of_lists_and_tuples_and_of_nested_names():
  same = dict(grids=[(3, 3)]), dict(grids=[[3, 3]])
  assert config_utils.differences(*same) == []
  # Only at the top are names free.
  a, b = dict(model=dict(mesh=1, evals=2)), dict(model=dict(mesh=3, evals=2))
  assert config_utils.differences(a, b) == ["model.mesh: 1, now 3"]
  a, b = dict(x=dict(y=dict(z=1))), dict(x=2)
  assert config_utils.differences(a, b) == ["x: {'y': {'z': 1}}, now 2"]


def test_differences_of_mixtures():
  def config(**fields):
    parts = [dict(name="a", data_dir="x", weight=1), dict(name="b", weight=2)]
    parts[0] |= fields
    return dict(input=dict(data=dict(mixture=parts)))

  assert config_utils.differences(config(), config(data_dir="y")) == []
  [line] = config_utils.differences(config(), config(weight=3))
  assert line == "input.data.mixture.weight: 1, now 3"
  other = config()
  other["input"]["data"]["mixture"].pop()
  [line] = config_utils.differences(config(), other)
  assert line.startswith("input.data.mixture: [{")


@pytest.mark.parametrize("grid", [(5, 5), (4, 5, 6), (10,), (1, 12)])
def test_grids(grid):
  assert config_utils.parse_grid(config_utils.format_grid(grid)) == grid
  assert config_utils.format_grid(list(grid)) == "x".join(map(str, grid))


@pytest.mark.parametrize(
  "text", ["", "5x", "x5", "0x5", "5x-1", "5,5", "5.0x5"]
)
def test_grid_errors(text):
  fails(config_utils.parse_grid, text, words=[repr(text), "5x5"])


# Work directories.


def test_read_workdir(tmp_path):
  config = config_utils.resolve(minimal(grids=[(2, 2)]))
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config.to_dict()))
  assert config_utils.read_workdir(str(tmp_path)) == config


def test_read_workdir_errors(tmp_path):
  missing = str(tmp_path / "missing")
  words = [missing, "no work directory", "config.json"]
  fails(config_utils.read_workdir, missing, words=words)
  fails(config_utils.read_workdir, str(tmp_path), words=["no work directory"])

  path = tmp_path / "config.json"
  whole = json.dumps(config_utils.resolve(minimal()).to_dict())
  for text in ("", whole[: len(whole) // 2], whole + "}"):
    path.write_text(text)
    words = [str(path), "damaged"]
    fails(config_utils.read_workdir, str(tmp_path), words=words)

  path.write_text(json.dumps(minimal(typo=1)))
  fails(config_utils.read_workdir, str(tmp_path), words=["config.typo"])


@pytest.mark.parametrize("content", [b"[1, 2]", b"null", b"3", b"\xff\xfe{}"])
def test_read_workdir_of_something_else(tmp_path, content):
  path = tmp_path / "config.json"
  path.write_bytes(content)
  words = [str(path), "damaged"]
  fails(config_utils.read_workdir, str(tmp_path), words=words)


def test_evaluators_in_order():
  names = ["b", "test", "a", "val"]
  assert config_utils.evals_in_order(names) == ["val", "test", "a", "b"]


def test_the_evaluator_that_says_how_files_are_read():
  evals = dict(
    a=dict(pp_fn="decode|a"), test=dict(type="x"), val=dict(pp_fn="decode|b")
  )
  config = config_utils.resolve(minimal(evals=evals))
  assert config_utils.evaluation(config).pp_fn == "decode|b"
  assert config_utils.evaluation(config, "a").pp_fn == "decode|a"
  words = ["'test'", "val, a has"]
  fails(config_utils.evaluation, config, "test", words=words)
  config = config_utils.resolve(minimal(evals=dict(test=dict(type="x"))))
  fails(config_utils.evaluation, config, words=["config.evals: no evaluator"])
