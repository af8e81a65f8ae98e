"""Published ViTs' weights: the same outputs as their own libraries'."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from lookup_vit import model_init
from lookup_vit.models import published_vit, vit
from tests.models import published
from tests.models.published import CLASSES, DEPTH, HEADS, PATCH, SIDE, WIDTH

SIZE = (SIDE * PATCH, SIDE * PATCH)
OLD = (0, 2, 1, 3)  # AugReg's numbers of modules in a block.


def images(seed=1, count=3):
  shape = (count, *SIZE, 3)
  return np.random.default_rng(seed).uniform(-1, 1, shape)


def model(classes=CLASSES, **fields):
  size = dict(width=WIDTH, depth=DEPTH, num_heads=HEADS)
  return vit.Model(classes, f"Ti/{PATCH}", **(size | fields))


def shapes(m, *size):
  """Parameters that are zeros, where nothing else takes their place."""
  x = jax.ShapeDtypeStruct((1, *(size or SIZE), 3), np.float32)
  tree = jax.eval_shape(m.init, jax.random.key(0), x)["params"]
  return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tree)


def start(path, m):
  return model_init.init_from(str(path), shapes(m), m, SIZE)


def check(path, m, want, x=None):
  params = start(path, m)
  x = images() if x is None else x
  got, _ = jax.jit(m.apply)({"params": params}, x.astype(np.float32))
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert np.std(want, axis=0).min() > 1e-3  # It depends on the image.
  assert error < 1e-5


def save_npz(path, weights):
  np.savez(path, **weights)
  return path


def save_torch(path, weights):
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(x) for k, x in weights.items()}, path
  )
  return path


@pytest.mark.parametrize("pool", ["gap", "tok", "map"])
def test_big_vision(tmp_path, pool):
  weights = published.draw_flax(pool=pool)
  # As a training's checkpoint has them, and a tower of several.
  for prefix in ("", "params/", "params/img/"):
    named = {prefix + k: x for k, x in weights.items()}
    if prefix:
      named |= {"opt/0/" + k: 0 * x for k, x in named.items()}
    if "img" in prefix:
      named |= {"params/txt/head/bias": np.zeros(3), "params/t": np.zeros(1)}
    path = save_npz(tmp_path / f"{prefix.count('/')}.npz", named)
    want = published.flax(weights, images())
    check(path, model(pool=pool, scan=prefix == "params/"), want)


def test_big_vision_with_stacked_blocks(tmp_path):
  weights = published.draw_flax()
  stacked = {}
  for name, x in weights.items():
    if "encoderblock_0" in name:
      both = [x, weights[name.replace("block_0", "block_1")]]
      stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(both)
    elif "encoderblock_1" not in name:
      stacked[name] = x
  want = published.flax(weights, images())
  check(save_npz(tmp_path / "w.npz", stacked), model(), want)


@pytest.mark.parametrize("pool", ["gap", "tok"])
def test_augreg(tmp_path, pool):
  weights = published.draw_flax(pool=pool, places=OLD, old=True)
  want = published.flax(weights, images(), places=OLD)
  check(save_npz(tmp_path / "w.npz", weights), model(pool=pool), want)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_timm(tmp_path, pool, prefix):
  weights = published.draw_timm(pool=pool)
  want = published.timm(weights, images(), pool)
  named = {prefix + k: x for k, x in weights.items()}
  here = dict(token="tok", avg="gap", map="map")[pool]
  path = save_torch(tmp_path / "w.safetensors", named)
  check(path, model(pool=here, gelu="exact"), want)


@pytest.mark.parametrize("positions", [SIDE**2, None])
def test_timm_with_scales_and_few_biases(tmp_path, positions):
  """LayerScale, positions of patches alone, and no biases of q, k and v."""
  weights = published.draw_timm(positions=positions, scales=True)
  for i in range(DEPTH):
    weights[f"blocks.{i}.attn.qkv.bias"] *= 0
  want = published.timm(weights, images())
  few = {k: x for k, x in weights.items() if "qkv.bias" not in k}
  path = save_torch(tmp_path / "w.safetensors", few)
  check(path, model(pool="tok", gelu="exact"), want)


def test_timm_of_normalised_images(tmp_path):
  """The mean and deviation beside the weights are multiplied in."""
  mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
  weights = published.draw_timm()
  x = images()
  want = published.timm(weights, ((x + 1) / 2 - mean) / std)
  save_torch(tmp_path / "model.safetensors", weights)
  config = {"architecture": "vit", "pretrained_cfg": dict(mean=mean, std=std)}
  (tmp_path / "config.json").write_text(json.dumps(config))
  check(tmp_path, model(pool="tok", gelu="exact"), want, x)


def test_hugging_face(tmp_path, caplog):
  weights = published.draw_hugging_face()
  want = published.hugging_face(weights, images())
  weights["vit.pooler.dense.weight"] = np.zeros((WIDTH, WIDTH), np.float32)
  path = save_torch(tmp_path / "model.safetensors", weights)
  right = dict(pool="tok", gelu="exact", norm_eps=1e-12)
  model_init.log.propagate = True
  check(path, model(**right), want)
  assert "for the same outputs" not in caplog.text
  start(path, model(pool="tok"))
  assert "config.model.gelu='exact'" in caplog.text
  assert "config.model.norm_eps=1e-12" in caplog.text
  # Its own config, beside it.
  config = dict(num_attention_heads=6, hidden_act="gelu")
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="config.model.num_heads=6"):
    start(tmp_path, model(**right))


def test_hugging_face_siglip(tmp_path):
  weights = published.draw_siglip()
  want = published.siglip(weights, images())
  path = save_torch(tmp_path / "model.safetensors", weights)
  check(path, model(None, pool="map"), want)


def test_hugging_face_siglip_for_classification(tmp_path):
  """Its classifier reads the mean of tokens, not the pooled one."""
  weights = published.draw_siglip()
  rng = np.random.default_rng(5)
  weights["classifier.weight"] = rng.normal(size=(CLASSES, WIDTH))
  weights["classifier.bias"] = rng.normal(size=CLASSES)
  weights = {k: x.astype(np.float32) for k, x in weights.items()}
  tokens = published.siglip(weights, images(), pooled=False)
  want = tokens.mean(1) @ weights["classifier.weight"].T
  want += weights["classifier.bias"]
  path = save_torch(tmp_path / "model.safetensors", weights)
  check(path, model(), want)


def test_images_that_are_not_normalised(tmp_path):
  weights = published.draw_timm()
  x = images()
  want = published.timm(weights, (x + 1) / 2)
  save_torch(tmp_path / "model.safetensors", weights)
  config = dict(do_normalize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
  check(tmp_path, model(pool="tok", gelu="exact"), want, x)


@pytest.mark.parametrize(
  "config, words",
  [
    ({"pretrained_cfg": dict(mean=[0.5] * 3, std=[0, 0, 0])}, "> 0"),
    ({"pretrained_cfg": dict(mean=0.5, std=[0.5] * 3)}, "three numbers"),
    ({"pretrained_cfg": dict(mean=[0.5] * 3)}, "three numbers"),
    ({"hidden_act": ["x"]}, "activation"),
    ({"hidden_act": "quick_gelu"}, "activation"),
  ],
)
def test_configs_beside_weights_that_cannot_work(tmp_path, config, words):
  save_torch(tmp_path / "model.safetensors", published.draw_timm())
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=words):
    start(tmp_path, model(pool="tok", gelu="exact"))


def test_empty_configs_beside_weights(tmp_path):
  weights = published.draw_timm()
  save_torch(tmp_path / "model.safetensors", weights)
  config = dict(pretrained_cfg=None, vision_config=None)
  (tmp_path / "config.json").write_text(json.dumps(config))
  want = published.timm(weights, images())
  check(tmp_path, model(pool="tok", gelu="exact"), want)


@pytest.mark.parametrize(
  "name",
  [
    "blocks.0.attn.qkv.weight",
    "patch_embed.proj.weight",
    "blocks.0.norm1.bias",
  ],
)
def test_arrays_without_a_shape(tmp_path, name):
  weights = published.draw_timm() | {name: np.zeros((), np.float32)}
  path = save_torch(tmp_path / "w.safetensors", weights)
  with pytest.raises(ValueError, match="config.model_init="):
    start(path, model(pool="tok", gelu="exact"))


def test_bfloat16(tmp_path):
  """As PyTorch's and NumPy's files have it."""
  timm = published.draw_timm()
  half = {k: x.astype(ml_dtypes.bfloat16) for k, x in timm.items()}
  path = tmp_path / "w.safetensors"
  safetensors.flax.save_file(jax.tree.map(jax.numpy.asarray, half), path)
  full = {k: x.astype(np.float32) for k, x in half.items()}
  want = published.timm(full, images())
  check(path, model(pool="tok", gelu="exact"), want)
  flax = published.draw_flax()
  half = {k: x.astype(ml_dtypes.bfloat16) for k, x in flax.items()}
  full = {k: x.astype(np.float32) for k, x in half.items()}
  want = published.flax(full, images())
  check(save_npz(tmp_path / "w.npz", half), model(), want)


def test_other_resolutions_and_classes(tmp_path, caplog):
  weights = published.draw_flax()
  path = save_npz(tmp_path / "w.npz", weights)
  m = model(classes=7)
  model_init.log.propagate = True
  fresh = shapes(m, 20, 16)
  with caplog.at_level("INFO"):
    got = model_init.init_from(str(path), fresh, m, (20, 16))
  table = weights["pos_embedding"].reshape(SIDE, SIDE, WIDTH)
  want = jax.image.resize(table, (5, 4, WIDTH), "linear")
  np.testing.assert_array_equal(got["pos_embedding"], want)
  np.testing.assert_array_equal(got["head"]["kernel"], fresh["head"]["kernel"])
  assert "head/kernel" in caplog.text and "(3, 3, 24) to (5, 4, 24)" in (
    caplog.text
  )


def test_what_cannot_be_had_is_named(tmp_path):
  """Nothing is left out in silence."""

  def refused(weights, words, m=None):
    path = tmp_path / "w.safetensors"
    save_torch(path, weights)
    with pytest.raises(ValueError, match="config.model_init=") as e:
      start(path, m or model(pool="tok", gelu="exact"))
    assert str(path) in str(e.value)
    for word in words:
      assert word in str(e.value)

  timm = published.draw_timm()
  zeros = np.zeros((1, 4, WIDTH), np.float32)
  refused(timm | dict(reg_token=zeros), ["timm", "reg_token"])
  refused(timm | {"blocks.0.attn.q_norm.weight": zeros}, ["blocks.0.attn.q_n"])
  refused(timm, ["cls (1, 1, 24) has no place", "pool='tok'"], model())
  refused(dict(a=zeros, b=zeros), ["no ViT of", "names: "])
  twice = {p + k: x for k, x in timm.items() for p in ("a.", "b.")}
  refused(twice, ["several", "a.patch_embed", "b.patch_embed"])
  odd = timm | dict(pos_embed=np.zeros((1, 7, WIDTH), np.float32))
  refused(odd, ["7 positions"])
  narrow = model(pool="tok", width=36)
  refused(timm, ["does not fit", "embedding/kernel is (4, 4, 3, 24)"], narrow)


def test_files_that_are_none(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere.npz.*no such file"):
    start(tmp_path / "nowhere.npz", model())
  for name in ("w.npz", "w.safetensors"):
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"config.model_init=.*{name}.*is no"):
      start(tmp_path / name, model())
  np.save(tmp_path / "one.npy", np.zeros(3))
  (tmp_path / "one.npy").rename(tmp_path / "one.npz")
  with pytest.raises(ValueError, match=r"one\.npz.*is no \.npz of arrays"):
    start(tmp_path / "one.npz", model())
  # Nothing is unpickled.
  np.savez(tmp_path / "o.npz", **{"embedding/kernel": np.array([{}])})
  with pytest.raises(ValueError, match=r"o\.npz.*is no \.npz of arrays"):
    start(tmp_path / "o.npz", model())
  save_torch(tmp_path / "model.safetensors", published.draw_timm())
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json.*damaged"):
    start(tmp_path, model(pool="tok", gelu="exact"))


def test_a_norm_after_the_mean_is_told(tmp_path):
  weights = published.draw_timm(pool="avg")
  for leaf in ("weight", "bias"):
    weights[f"fc_norm.{leaf}"] = weights.pop(f"norm.{leaf}")
  assert "fc_norm" in published_vit.convert(weights).notes[0]
  weights["cls_token"] = np.zeros((1, 1, WIDTH), np.float32)
  got = published_vit.convert(weights)
  assert "left out" in got.notes[0] and "head/kernel" not in got.params


def test_a_layer_before_the_classifier_is_left_out_with_it():
  weights = published.draw_flax(places=OLD, old=True)
  weights["pre_logits/kernel"] = np.zeros((WIDTH, WIDTH), np.float32)
  weights["pre_logits/bias"] = np.zeros(WIDTH, np.float32)
  got = published_vit.convert(weights)
  assert "pre_logits" in got.notes[0]
  assert not [name for name in got.params if "head" in name or "pre" in name]
