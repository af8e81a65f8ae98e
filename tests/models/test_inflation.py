"""Tests of lookup_vit/models/inflation.py."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from lookup_vit.models import inflation, layers
from tests.models import common, reference

# Of logits, float32 sums in another order.
CLOSE = dict(rtol=1e-4, atol=2e-5)


def flat(params):
  return {k: np.asarray(x) for k, x in common.flat(params).items()}


def inflate(image_params, model, clip, kind):
  """A video model's parameters, and the paths that stay as they were."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), clip)["params"]
  scale = inflation.contextualisation_scale(model, clip.shape[1:-1])
  result, fresh = inflation.inflate(
    flat(image_params), common.flat(shapes), kind, scale
  )
  assert {k: x.shape for k, x in result.items()} == {
    k: x.shape for k, x in common.flat(shapes).items() if k not in fresh
  }
  return result, fresh


def nested(params):
  return traverse_util.unflatten_dict(params, sep="/")


# What a clip of equal frames looks like to the inflated model.

STATIC = {
  "vit": ("vit", dict(pool="gap"), {}, 3),
  "vit, one slot": ("vit", dict(pool="gap", depth=1), {}, 1),
  "vit, map": ("vit", dict(pool="map", depth=1, qk_norm=True), {}, 4),
  "lookup_vit, all slots": ("lookup_vit", {}, dict(grid=(3, 2, 2)), 3),
  "lookup_vit, fewer slots": ("lookup_vit", {}, dict(grid=(2, 2, 2)), 5),
  "lookup_vit, one slot": (
    "lookup_vit",
    dict(depth=1),
    dict(grid=(1, 2, 2)),
    4,
  ),
  "lookup_vit, learned": (
    "lookup_vit",
    dict(depth=1, compressed_init="learned"),
    dict(grid=(2, 2, 2)),
    3,
  ),
  "scaled": (
    "lookup_vit",
    dict(depth=1, compressed_init="average", reuse_scale="tokens"),
    dict(grid=(2, 2, 2)),
    5,
  ),
  "logits": ("lookup_vit", dict(reuse="logits"), dict(grid=(2, 2, 2)), 5),
  "none": ("lookup_vit", dict(reuse="none", depth=1), dict(grid=(2, 2, 2)), 3),
}


@pytest.mark.parametrize("case", STATIC)
def test_static_clip_has_the_image_s_logits(case):
  kind, fields, of_video, slots = STATIC[case]
  images, _ = common.random_batch(8, 12)
  image = common.make(kind, "Ti/4", **fields)
  if kind == "lookup_vit":
    image = image.clone(grid=(2, 2))
  params = common.random_params(image, images)
  want, of_image = common.apply(image, params, images)
  video = common.make(kind, "Ti/3x4", **fields | of_video)
  clip = np.repeat(images[:, None], 3 * slots, axis=1)
  inflated, fresh = inflate(params, video, clip, "average")
  assert not fresh
  logits, out = common.apply(video, nested(inflated), clip)
  np.testing.assert_allclose(logits, want, **CLOSE)
  for name in out:
    np.testing.assert_allclose(out[name], of_image[name], **CLOSE)
  # Central inflation sees one of equal frames.
  central, _ = inflate(params, video, clip, "central")
  logits, _ = common.apply(video, nested(central), clip)
  np.testing.assert_allclose(logits, want, **CLOSE)

  scale = inflation.contextualisation_scale(video, clip.shape[1:-1])
  if not case.startswith("lookup_vit"):
    assert scale == 1
    return
  assert scale == slots / video.grid[0]
  if scale != 1:
    unscaled, _ = inflation.inflate(
      flat(params), common.flat(nested(inflated)), "average"
    )
    logits, _ = common.apply(video, nested(unscaled), clip)
    assert np.abs(logits - want).max() > 1e-3


def test_only_the_contextualisation_s_kernel_is_scaled():
  """In the layout of a scan too."""
  images, _ = common.random_batch(8, 12)
  params = common.random_params(common.make("lookup_vit"), images)
  video = common.make("lookup_vit", "Ti/3x4", grid=(2, 2, 2), scan=True)
  clip = np.repeat(images[:, None], 15, axis=1)
  params = layers.stack_blocks(params)
  inflated, _ = inflate(params, video, clip, "average")
  for name, x in flat(params).items():
    if name in ("embedding/kernel", "pos_embedding"):
      continue
    scaled = name == "encoderblock/mhbc/out_back/kernel"
    np.testing.assert_allclose(inflated[name], x * (2.5 if scaled else 1))
    assert inflated[name].dtype == np.float32


@pytest.mark.parametrize(
  "kind, fields, clip_size, want",
  [
    ("vit", {}, (6, 8, 8), 1),
    ("lookup_vit", dict(grid=(1, 2, 2)), (6, 8, 8), 3),
    ("lookup_vit", dict(grid=(2, 2, 2)), (6, 8, 8), 1.5),
    ("lookup_vit", dict(grid=(1, 2, 2), reuse="logits"), (6, 8, 8), 1),
    ("lookup_vit", dict(grid=(1, 2, 2), reuse="none"), (6, 8, 8), 1),
    ("lookup_vit", dict(grid=(1, 2, 2), reuse_scale="tokens"), (6, 8, 8), 1),
    ("factorised", dict(spatial="lookup_vit", grid=(2, 2)), (6, 8, 8), 1),
    ("lookup_vit", dict(variant="Ti/4", grid=(2, 2)), (8, 8), 1),
  ],
)
def test_contextualisation_scale(kind, fields, clip_size, want):
  model = common.make(kind, **dict(variant="Ti/2x4") | fields)
  assert inflation.contextualisation_scale(model, clip_size) == want


# Kernels and positions.


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_kernels_against_a_loop_over_frames(frames):
  """What an inflated kernel makes of a tubelet whose frames differ."""
  rng = np.random.default_rng(frames)
  kernel = rng.standard_normal((4, 3, 3, 6))
  tubelet = rng.standard_normal((frames, 4, 3, 3))
  of_frames = [np.sum(f[..., None] * kernel, axis=(0, 1, 2)) for f in tubelet]

  def project(kind):
    inflated = inflation.patch_kernel(kernel, frames, kind)
    assert inflated.shape == (frames, *kernel.shape)
    assert inflated.dtype == kernel.dtype
    return np.einsum("tpqc,tpqcd->d", tubelet, inflated)

  np.testing.assert_allclose(project("average"), np.mean(of_frames, axis=0))
  np.testing.assert_allclose(project("central"), of_frames[frames // 2])


@pytest.mark.parametrize("grid", [(3, 4, 5), (2, 7, 5), (1, 2, 3), (4, 4, 9)])
def test_positions(grid):
  """Resized in space as elsewhere, the same at all times."""
  table = np.random.default_rng(0).standard_normal((4, 5, 6))
  got = inflation.positions(table.astype(np.float32), grid)
  want = reference.resize(table.reshape(1, 20, 6), (4, 5), grid[1:])
  want = np.stack([want.reshape(*grid[1:], 6)] * grid[0])
  common.check_outputs(dict(x=got), dict(x=want))


@pytest.mark.parametrize("spatial", ["vit", "lookup_vit"])
def test_factorised_models_take_an_image_model_for_each_slice(spatial):
  """Pre-logits of slices are the image model's of their central frames."""
  images, _ = common.random_batch(8, 12, batch=6)
  fields = dict(grid=(2, 2)) if spatial == "lookup_vit" else {}
  image = common.make(spatial, "Ti/4", depth=1, **fields)
  params = common.random_params(image, images)
  _, of_image = common.apply(image, params, images, capture=("tokens",))
  model = common.make(
    "factorised", "Ti/2x4", spatial=spatial, depth=1, temporal_depth=1, **fields
  )
  # Two clips of three slices, of which the second frame counts.
  clips = np.random.default_rng(0).uniform(-1, 1, (2, 6, 8, 12, 3))
  clips = clips.astype(np.float32)
  clips[:, 1::2] = images.reshape(2, 3, 8, 12, 3)
  inflated, fresh = inflate(params, model, clips, "central")
  assert {n.split("/")[0].split("_")[0] for n in fresh} == {"temporal", "head"}
  drawn = flat(common.random_params(model, clips))
  both = nested(inflated | {n: drawn[n] for n in fresh})
  _, out = common.apply(model, both, clips, capture=("tokens",))
  for name in [n for n in of_image if n.endswith("tokens")]:
    want = np.asarray(of_image[name])
    got = np.asarray(out[name]).reshape(want.shape)
    np.testing.assert_allclose(got, want, **CLOSE)


# What is left alone, and what it refuses.


def shapes(model, *size):
  images = jax.ShapeDtypeStruct((1, *size, 3), np.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  return common.flat(params)


def test_models_of_one_rank_are_left_alone():
  image = shapes(common.make("vit", "Ti/4"), 8, 8)
  other = shapes(common.make("vit", "Ti/2"), 8, 8)
  clip = shapes(common.make("vit", "Ti/2x4"), 4, 8, 8)
  for source, target in [(image, other), (clip, clip), ({}, image)]:
    same, fresh = inflation.inflate(source, target, "central", 3.0)
    assert same is source and fresh == []


@pytest.mark.parametrize(
  "source, target, kind, message",
  [
    ("Ti/4", "Ti/2x4", "middle", "'middle'.*central or average"),
    ("Ti/2x4", "Ti/4", "central", r"video.*\(2, 4, 4\).*image.*\(4, 4\)"),
    ("Ti/4", "Ti/2x8", "central", r"\(4, 4\).*\(2, 8, 8\).*space"),
    ("Ti/4", "Ti/2x4x8", "average", r"\(4, 4\).*\(2, 4, 8\).*space"),
  ],
)
def test_refuses(source, target, kind, message):
  def of(variant):
    model = common.make("vit", variant)
    size = (4, 8, 8) if len(model.patch_size) == 3 else (8, 8)
    return {k: np.zeros(x.shape) for k, x in shapes(model, *size).items()}

  with pytest.raises(ValueError, match=message):
    inflation.inflate(of(source), of(target), kind)
