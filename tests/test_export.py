"""Tests of lookup_vit/export.py and its formats."""

import importlib
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

import lookup_vit
from lookup_vit import (
  checkpoints,
  export,
  model_init,
  params_file,
  train_step,
)
from lookup_vit.exports import classifier, compare
from lookup_vit.preprocess import get_preprocess_fn
from tests import exports, programs
from tests.exports import (
  GRID,
  LOOKUP,
  PP,
  SIZE,
  check,
  expected,
  images,
  make_config,
  make_run,
)
from tests.models import common

# isort: split
import tensorflow as tf


@pytest.fixture(scope="module")
def lookup(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("lookup"), make_config())


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
  config = make_config("vit", loss="sigmoid_xent")
  return make_run(tmp_path_factory.mktemp("vit"), config)


@pytest.fixture
def made(monkeypatch, lookup):
  """The program of `lookup`, which is not made again."""
  monkeypatch.setattr(export, "Program", lambda *args: lookup.program)


# --- StableHLO


@pytest.fixture(scope="module")
def stablehlo(lookup, tmp_path_factory):
  output = str(tmp_path_factory.mktemp("out") / "stablehlo")
  worst = export.export(lookup.workdir, "stablehlo", output)
  assert 0 < worst < 1e-5
  return output


def call_stablehlo(folder, name, given):
  """As docs/export.md has it."""
  params = safetensors.load_file(f"{folder}/params.safetensors")
  content = pathlib.Path(folder, f"{name}.stablehlo").read_bytes()
  program = jax.export.deserialize(bytearray(content))
  return program, program.call(params, given)


def test_stablehlo_at_several_grids_and_any_batch(lookup, stablehlo):
  for name, grid in (("2x3", GRID), ("1x2", (1, 2))):
    for batch in (1, 4):
      program, found = call_stablehlo(stablehlo, name, images(batch))
      check(found, expected(lookup, images(batch), grid))
    assert program.platforms == ("cpu", "cuda", "tpu")
  assert sorted(os.listdir(stablehlo)) == [
    "1x2.stablehlo",
    "2x3.stablehlo",
    "classes.json",
    "export.json",
    "params.safetensors",
  ]


def test_note(stablehlo):
  note = json.loads(pathlib.Path(stablehlo, "export.json").read_text())
  assert note["format"] == "stablehlo" and note["step"] == 2
  assert note["programs"] == ["2x3", "1x2"]
  assert note["images"] == "uint8[batch,16,24,3]"
  assert set(note["outputs"]) == set(LOOKUP)
  assert note["outputs"]["logits"] == "float32[batch,3]"


def test_stablehlo_of_a_vit_and_a_fixed_batch(vit, tmp_path):
  output = str(tmp_path / "out")
  export.export(
    vit.workdir, "stablehlo", output, batch_size=2, platforms=["cpu"]
  )
  program, found = call_stablehlo(output, "model", images(2))
  check(found, expected(vit, images(2)))
  assert program.platforms == ("cpu",)
  with pytest.raises(ValueError, match="shape"):
    program.call(params_file.read(output)[0], images(3))


def test_no_kernels(lookup, stablehlo):
  """Also for TPUs, where the model itself has some."""
  assert lookup.program.model.mhbc_impl == "auto"
  program, _ = call_stablehlo(stablehlo, "2x3", images(1))
  calls = re.findall(r"custom_call @(\w+)", program.mlir_module())
  assert set(calls) <= {"shape_assertion"}


def test_docs_of_jax(lookup, stablehlo, tmp_path, monkeypatch):
  scope = exports.run_docs("JAX", stablehlo, monkeypatch, tmp_path)
  check(scope["out"], expected(lookup, scope["images"], GRID))


def test_flags_in_docs():
  text = pathlib.Path("docs/export.md").read_text()
  code = pathlib.Path("lookup_vit/export.py").read_text()
  there = set(re.findall(r'flags.DEFINE_\w+\(\s*"(\w+)"', code))
  assert set(re.findall(r"--(\w+)", text)) <= there
  assert set(re.findall(r"--format=(\w+)", text)) == set(export.FORMATS)


# --- safetensors


def test_safetensors_are_bit_equal(lookup, tmp_path):
  output = str(tmp_path / "out")
  export.export(lookup.workdir, "safetensors", output, step=1)
  config, params = export.load_safetensors(output)
  assert config == lookup.program.config
  want = common.flat(jax.tree.map(np.negative, lookup.params))
  found = common.flat(params)
  assert found.keys() == want.keys()
  for name, x in want.items():
    assert found[name].tobytes() == x.tobytes() and found[name].shape == x.shape
  assert params_file.load(output)[1] == 1
  assert json.loads((tmp_path / "out/classes.json").read_text()) == [*"abc"]


def test_safetensors_stand_where_a_work_directory_does(lookup, tmp_path):
  output = str(tmp_path / "out")
  export.export(lookup.workdir, "safetensors", output)
  shape = (3, *lookup.program.config.input.image_size, 3)
  x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
  want = lookup_vit.load(lookup.workdir).predict(x, grid=GRID)
  got = lookup_vit.load(output).predict(x, grid=GRID)
  np.testing.assert_array_equal(got.probabilities, want.probabilities)
  assert got.classes == want.classes == [*"abc"]
  with pytest.raises(ValueError, match="has no checkpoint 77, only"):
    lookup_vit.load(output, step=77)
  model = lookup.program.model
  start = model_init.init_from(
    output, lookup.params, model, lookup.program.config.input.image_size
  )
  jax.tree.map(np.testing.assert_array_equal, start, lookup.params)


def test_docs_of_safetensors(lookup, tmp_path, monkeypatch, capsys):
  output = tmp_path / "out"
  (tmp_path / "empty").mkdir()
  export.export(lookup.workdir, "safetensors", str(output))
  exports.run_docs("safetensors", output, monkeypatch, tmp_path / "empty")
  assert capsys.readouterr().out == "lookup_vit (4, 6, 32)\n"


def test_safetensors_of_a_captioner(tmp_path):
  (tmp_path / "run").mkdir()
  run = make_run(tmp_path / "run", make_config(**captioner()))
  (tmp_path / "run" / "tokenizer.model").write_bytes(b"words")
  output = tmp_path / "out"
  assert export.export(run.workdir, "safetensors", str(output)) == 0
  config, params = export.load_safetensors(str(output))
  assert config == run.program.config
  assert params_file.same(params, run.params)
  assert (output / "tokenizer.model").read_bytes() == b"words"


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda x: x[: len(x) // 2], "is damaged: "),
    (lambda x: b"no header" + x, "is damaged: "),
    (lambda x: x[:-3] + b"\0" + x[-2:], "is damaged: the checksums differ"),
    (None, "no params.safetensors there"),
  ],
)
def test_damaged_safetensors(change, words, lookup, tmp_path):
  output = tmp_path / "out"
  export.export(lookup.workdir, "safetensors", str(output))
  path = output / "params.safetensors"
  if change is None:
    path.unlink()
  else:
    path.write_bytes(change(path.read_bytes()))
  with pytest.raises(ValueError, match=words):
    export.load_safetensors(str(output))


def test_other_safetensors(lookup, tmp_path):
  output = str(tmp_path / "out")
  export.export(lookup.workdir, "safetensors", output)
  safetensors.save_file({"x": np.zeros(3)}, f"{output}/params.safetensors")
  with pytest.raises(ValueError, match="was not written by lookup_vit.export"):
    export.load_safetensors(output)
  pathlib.Path(output, "config.json").unlink()
  with pytest.raises(ValueError, match="no config.json there"):
    export.load_safetensors(output)


# --- What is checked


def perturbed(params):
  params = jax.tree.map(np.array, params)
  jax.tree.leaves(params)[-1].flat[0] += 0.5
  return params


def tamper(format, folder):
  """Changes the parameters in an export, all else is as it was."""
  path = pathlib.Path(folder, "params.safetensors")
  if format == "onnx":  # Bits in the file.
    tensors = safetensors.load_file(path)
    start = path.read_bytes().index(tensors["norm_lookup/bias"].tobytes())
    content = bytearray(path.read_bytes())
    content[start : start + 4] = np.float32(9).tobytes()
    path.write_bytes(content)
  elif format == "savedmodel":
    module = tf.saved_model.load(folder)
    variable = module.params["norm_lookup/bias"]
    variable.assign(variable + 0.5)
    tf.saved_model.save(module, folder, module.signatures)
  else:
    flat, step = params_file.read(folder)
    params_file.write(folder, perturbed(flat), step)


@pytest.mark.parametrize(
  ("format", "part"),
  [
    ("stablehlo", "exports.stablehlo"),
    ("savedmodel", "exports.savedmodel"),
    ("onnx", "exports.onnx"),
    ("safetensors", "params_file"),
  ],
)
def test_nothing_is_left_of_what_differs(
  format, part, lookup, made, tmp_path, monkeypatch
):
  part = importlib.import_module(f"lookup_vit.{part}")
  load = part.load
  fields = {}
  if format != "safetensors":
    fields = dict(grids=[GRID], batch_size=1)

  def load_tampered(folder):
    tamper(format, folder)
    return load(folder)

  output = tmp_path / "out"
  for overwrite in (False, True):
    with monkeypatch.context() as patch:
      patch.setattr(part, "load", load_tampered)
      with pytest.raises(ValueError, match="differs from the (model|param)"):
        export.export(
          *(lookup.workdir, format, str(output)), overwrite=overwrite, **fields
        )
    if not overwrite:
      assert os.listdir(tmp_path) == []
      export.export(lookup.workdir, "safetensors", str(output), step=1)
  # What was there is there still.
  assert params_file.load(str(output))[1] == 1
  assert os.listdir(tmp_path) == ["out"]


def test_difference():
  one = {"a": np.array([[1.0, 4.0]]), "b": np.array([0.5])}
  found = {"a": np.array([[1.0, 4.2]]), "b": np.array([0.51])}
  assert compare.difference(found, one) == pytest.approx(0.05)
  found["b"][0] = np.nan
  assert not compare.difference(found, one) <= 1
  with pytest.raises(ValueError, match="differs from the model by nan"):
    compare.check("it", compare.difference(found, one))
  with pytest.raises(ValueError, match=r"It returns .*, the model"):
    compare.difference({"a": one["a"]}, one)
  with pytest.raises(ValueError, match=r"It returns .*, the model"):
    compare.difference({**one, "b": np.array([[0.5]])}, one)


def test_scale():
  """As the ops do."""
  pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
  ops = get_preprocess_fn("value_range(-1,1)")
  want = ops({"image": pixels}, np.zeros(2, np.int32))["image"].numpy()
  np.testing.assert_array_equal(classifier.scale(pixels), want)


def test_portable_models():
  """MHBC by the fewest multiply-adds, and as the run says where it says."""
  program = train_step.Program(make_config(), 2, jax.local_devices()[:1])
  model = program.model
  assert classifier.portable(model, SIZE, (1, 2)).mhbc_impl == "absorbed"
  assert classifier.portable(model, SIZE, (4, 6)).mhbc_impl == "direct"
  fused = model.clone(mhbc_impl="fused", dtype="bfloat16", attention="fused")
  made = classifier.portable(fused, SIZE, (4, 6))
  assert (made.mhbc_impl, made.dtype, made.scan) == (
    *("absorbed", "float32"),
    False,
  )
  assert made.attention == "direct"


def captioner():
  return dict(
    task="captioning",
    model_name="captioner",
    num_classes=11,
    model=dict(encoder=dict(model_name="vit", variant="mu/4")),
    grids=None,
  )


@pytest.mark.parametrize(
  ("fields", "config", "words"),
  [
    (dict(format="pickle"), {}, "format='pickle': want one of stablehlo"),
    (
      dict(format="onnx", platforms=["cpu"]),
      {},
      "--platforms is of stablehlo, savedmodel, not of onnx",
    ),
    (dict(pp=PP), {}, "--pp is of savedmodel, not of stablehlo"),
    (
      dict(format="savedmodel", pp="decode|resize(8)|value_range(-1,1)"),
      {},
      r"makes float32 \(8, 8, 3\)",
    ),
    (
      dict(format="savedmodel"),
      dict(evals={}),
      "--pp: config.evals: no evaluator says",
    ),
    (
      dict(format="onnx"),
      dict(evals=dict(test=dict(pp_fn=PP.replace("-1,1", "0,1")))),
      r"scaled to \[-1, 1\] in an export",
    ),
    (dict(batch_size=0), {}, "batch_size=0: want an integer >= 1"),
    (dict(platforms=["gpu"]), {}, "--platforms=gpu: want some of cpu, cuda"),
    (dict(platforms=["cpu", "cpu"]), {}, "each once"),
    (dict(grids=[(5, 1)]), {}, "grid .5, 1. does not fit"),
    (dict(grids=[(1, 1), (1, 1)]), {}, "--grid=1x1,1x1: .* each of them once"),
    (dict(output="/nowhere/out"), {}, "output='/nowhere/out': want a path on"),
    (dict(output="gs://bucket/out"), {}, "want a path on this machine"),
    (dict(step=7), {}, r"no checkpoint 7, only \[1, 2\]"),
    (
      dict(format="safetensors", grids=[GRID]),
      {},
      "--grid is of stablehlo, savedmodel, onnx, not of safetensors",
    ),
    (
      dict(format="safetensors", batch_size=2),
      {},
      "--batch_size is of",
    ),
    ({}, captioner(), "captioning'.* classifiers alone.*--format=safetensors"),
    (
      dict(grids=[GRID]),
      dict(model_name="vit", model=dict(variant="mu/4"), grids=None),
      "--grid: the model has no compressed grid",
    ),
  ],
)
def test_flags_are_checked_first(
  fields, config, words, lookup, tmp_path, monkeypatch
):
  def load(*_):
    raise AssertionError("The checkpoint was loaded.")

  monkeypatch.setattr(checkpoints, "load_params", load)
  workdir = lookup.workdir
  if config:
    workdir = str(tmp_path / "run")
    checkpoints.write_config(workdir, make_config(**config))
    monkeypatch.setattr(checkpoints, "check", lambda *_: None)
  fields = dict(format="stablehlo", output=str(tmp_path / "out")) | fields
  with pytest.raises(ValueError, match=words):
    export.export(workdir, **fields)
  assert not (tmp_path / "out").exists()


def test_an_output_that_is_there(lookup, tmp_path):
  output = tmp_path / "out"
  output.mkdir()
  (output / "mine").touch()
  for overwrite in (False, True):
    with pytest.raises(ValueError, match="there already, and is no export"):
      export.export(
        lookup.workdir, "safetensors", str(output), overwrite=overwrite
      )
  (output / "mine").unlink()
  output.rmdir()
  export.export(lookup.workdir, "safetensors", str(output), step=1)
  with pytest.raises(ValueError, match="--overwrite replaces it"):
    export.export(lookup.workdir, "safetensors", str(output))
  assert params_file.load(str(output))[1] == 1
  export.export(lookup.workdir, "safetensors", str(output), overwrite=True)
  assert params_file.load(str(output))[1] == 2
  assert os.listdir(tmp_path) == ["out"]


def test_no_cpu(lookup, tmp_path, monkeypatch):
  def devices(backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", devices)
  monkeypatch.setenv("JAX_PLATFORMS", "tpu")
  with pytest.raises(ValueError, match="JAX_PLATFORMS=tpu leaves out: add cpu"):
    export.export(lookup.workdir, "stablehlo", str(tmp_path / "out"))


def test_a_package_that_is_missing(lookup, tmp_path, monkeypatch):
  monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"safetensors: pip .*lookup_vit\[exp"):
    export.export(lookup.workdir, "stablehlo", str(tmp_path / "out"))


def test_command(vit, tmp_path):
  def command(*args):
    flags = [f"--workdir={vit.workdir}", f"--output={tmp_path / 'out'}"]
    return programs.Program("-m", "lookup_vit.export", *flags, *args)

  process = command("--format=stablehlo", "--batch_size=2", "--platforms=cpu")
  wrong = command("--format=stablehlo", "--batch_size=many")
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert out.startswith(f"Written: {tmp_path / 'out'} (largest difference ")
  assert "model, batch 2: largest difference" in err
  _, err = wrong.communicate()
  assert wrong.returncode == 1 and "Traceback" not in err
  assert err.startswith("error: --batch_size=many: want 8, say, or any"), err
