"""Tests of lookup_vit/models/variants.py."""

import jax
import jax.numpy as jnp
import pytest

from lookup_vit.models import lookup_vit, variants, vit
from tests.models.common import KINDS

# Width, depth, MLP width, heads.
VARIANTS = {
  "mu": (32, 1, 128, 2),
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "M": (512, 12, 2048, 8),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "H": (1280, 32, 5120, 16),
  "g": (1408, 40, 6144, 16),
}


@pytest.mark.parametrize("size", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_variants(kind, size):
  width, depth, mlp_dim, num_heads = VARIANTS[size]
  module = dict(vit=vit, lookup_vit=lookup_vit)[kind]
  model = module.Model(10, f"{size}/14", scan=True)
  assert model.num_heads == num_heads
  images = jax.ShapeDtypeStruct((1, 70, 70, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  assert shapes["embedding"]["kernel"].shape == (14, 14, 3, width)
  block = shapes["encoderblock"]
  mlp = block["mlp"] if kind == "vit" else block["refinement"]["mlp"]
  assert mlp["dense_in"]["kernel"].shape == (depth, width, mlp_dim)
  assert mlp["dense_out"]["kernel"].shape == (depth, mlp_dim, width)
  if kind == "lookup_vit":
    kernel = block["lookup_mlp"]["dense_in"]["kernel"]
    assert kernel.shape == (depth, width, width // 2)


@pytest.mark.parametrize(
  "variant, patch",
  [
    ("B/16", (16, 16)),
    ("B/2x16", (2, 16, 16)),
    ("B/2x14x16", (2, 14, 16)),
    ("g/14", (14, 14)),
  ],
)
def test_patch_of_a_variant(variant, patch):
  assert variants.decode_variant(variant)["patch_size"] == patch
  for module in (vit, lookup_vit):
    assert module.Model(10, variant).patch_size == patch


@pytest.mark.parametrize(
  "variant",
  ["", "B", "B/", "/16", "X/16", "b/16", "B16", "B/16x", "B/2x4x4x4", "B/-4"],
)
@pytest.mark.parametrize("module", [vit, lookup_vit])
def test_refuses_a_variant(module, variant):
  with pytest.raises(ValueError, match="Unknown variant.*B/16.*mu, Ti, S"):
    module.Model(10, variant)


def test_refuses_a_patch_of_zero():
  with pytest.raises(ValueError, match="zero"):
    vit.Model(10, "B/0")


@pytest.mark.parametrize("module", [vit, lookup_vit])
def test_refuses_an_unknown_field(module):
  with pytest.raises(ValueError, match="'drop_out'.*mean 'dropout'"):
    module.Model(10, "B/16", drop_out=0.1)
  with pytest.raises(ValueError, match="'zzz'. Its fields: .*remat_policy"):
    module.Model(10, "B/16", zzz=1)
  # Flax's own fields are not the model's.
  for name in ("name", "parent"):
    with pytest.raises(ValueError, match=f"no field '{name}'"):
      module.Model(10, "B/16", **{name: None})


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(width="24"), "LookupViT.width='24'.*integer"),
    (dict(depth=0), "LookupViT.depth=0.*integer"),
    (dict(num_heads=True), "LookupViT.num_heads=True.*integer"),
    (dict(dropout="0.1"), "LookupViT.dropout='0.1'.*number"),
    (dict(scan=1), "LookupViT.scan=1.*True or False"),
    (dict(gelu=None), "LookupViT.gelu=None.*text"),
    (dict(grid=5), r"LookupViT.grid=5.*\(5, 5\)"),
    (dict(grid=(0, 5)), r"LookupViT.grid=\(0, 5\).*\(5, 5\)"),
  ],
)
def test_refuses_a_value_of_another_type(fields, message):
  with pytest.raises(ValueError, match=message):
    lookup_vit.Model(10, "B/16", **fields)
