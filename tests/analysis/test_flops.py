"""Tests of lookup_vit/analysis/flops.py."""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from lookup_vit.analysis import flops
from lookup_vit.models import factorised, lookup_vit, vit
from tests.programs import Program

GRIDS = [(3, 3), (5, 5), (7, 7), (10, 10)]


def check_count(cost, tolerance=0.01):
  assert cost.xla_flops == pytest.approx(cost.formula_flops, rel=tolerance)
  got, want = cost.executed_xla_flops, cost.executed_flops
  assert got == pytest.approx(want, rel=tolerance)


# XLA's count against the formula.


@pytest.mark.parametrize(
  "size, gmacs",
  [(224, [6.7, 8.5, 11.2, 17.0]), (384, [None, 19.8, None, None])],
)
def test_lookup_vit_b16(size, gmacs):
  model = lookup_vit.Model(1000, "B/16")
  for grid, gmac in zip(GRIDS, gmacs, strict=True):
    cost = flops.cost(model, (size, size), grid)
    check_count(cost)
    if gmac is not None:
      assert cost.xla_flops / 2e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("size, gmac", [(224, 17.5), (384, 55.6)])
def test_vit_b16(size, gmac):
  cost = flops.cost(vit.Model(1000, "B/16"), (size, size))
  check_count(cost)
  assert cost.xla_flops / 2e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("pool", ["map", "tok"])
def test_pooling(pool):
  # One block, so that pooling is not lost among twelve.
  model = vit.Model(1000, "B/16", pool=pool, depth=1)
  check_count(flops.cost(model, (160, 224)))


@pytest.mark.parametrize(
  "fields",
  [
    dict(reuse="none"),
    dict(reuse="logits"),
    dict(reuse_scale="tokens"),
    dict(lookup_mlp_ratio=1.0),
    dict(mlp_ratio=2.0, mhbc_heads=4),
    dict(heads="compressed"),
    dict(heads="compressed", reuse="none"),
    dict(heads="lookup"),
    dict(compressed_init="average"),
    dict(stem="conv"),
    dict(stem="deep_conv"),
    dict(compressed_init="learned", grid=(3, 3)),
  ],
)
def test_ablations(fields):
  model = lookup_vit.Model(1000, "B/16", **dict(depth=2) | fields)
  check_count(flops.cost(model, (224, 160), (5, 4)))


@pytest.mark.parametrize(
  "fields",
  [
    {},
    dict(qk_norm=True),
    dict(reuse="none"),
    dict(reuse="logits", mhbc_heads=4),
    dict(heads="compressed"),
  ],
)
def test_what_is_executed(fields):
  """The paper's cost stays; absorbed MHBC costs less for few queries."""
  size, grid = (224, 160), (3, 3)
  costs = {
    impl: flops.cost(
      lookup_vit.Model(1000, "B/16", depth=2, mhbc_impl=impl, **fields),
      *(size, grid),
    )
    for impl in ("direct", "absorbed", "auto")
  }
  direct, absorbed = costs["direct"], costs["absorbed"]
  assert direct.executed_flops == direct.formula_flops
  assert direct.executed_xla_flops == direct.xla_flops
  check_count(absorbed)
  assert absorbed.executed_flops < 0.9 * direct.executed_flops
  assert absorbed.xla_flops == direct.xla_flops
  assert costs["auto"] == absorbed
  vit_cost = flops.cost(vit.Model(1000, "B/16", depth=1), size)
  assert vit_cost.executed_xla_flops == vit_cost.xla_flops


@pytest.mark.parametrize("grid", [None, (2, 3, 4)])
def test_video(grid):
  size = (8, 96, 128)
  model = lookup_vit.Model(174, "B/2x16", depth=2, grid=(4, 2, 2))
  if grid is None:
    model = vit.Model(174, "B/2x16", depth=2)
  check_count(flops.cost(model, size, grid))


@pytest.mark.parametrize(
  "fields",
  [
    {},
    dict(pool="tok", temporal_depth=1),
    dict(spatial="lookup_vit", grid=(4, 3)),
    dict(spatial="lookup_vit", grid=(4, 3), heads="compressed", depth=1),
  ],
)
def test_factorised(fields):
  model = factorised.Model(174, "B/2x16", **dict(depth=2) | fields)
  check_count(flops.cost(model, (8, 96, 128)))
  if "grid" in fields:
    check_count(flops.cost(model, (8, 96, 128), (2, 5)))


@pytest.mark.parametrize(
  "make, gmac", [(vit.Model, 455.2), (factorised.Model, 284.4)]
)
def test_vivit_b16x2(make, gmac):
  """Of 32 frames, as in ViViT's table 2 (arXiv:2103.15691)."""
  cost = flops.cost(make(400, "B/2x16"), (32, 224, 224))
  check_count(cost)
  assert cost.xla_flops / 2e9 == pytest.approx(gmac, rel=0.01)


def test_without_a_classifier():
  model = lookup_vit.Model(None, "B/16", depth=2)
  check_count(flops.cost(model, (224, 160), (5, 4)))


# The formula against the sums in the paper's terms.


def random_size(rng, patch):
  return tuple(int(rng.integers(3, 12)) * p for p in patch)


@pytest.mark.parametrize("seed", range(5))
def test_formula(seed):
  rng = np.random.default_rng(seed)
  patch = [(16, 16), (4, 8), (2, 8, 4)][seed % 3]
  size = random_size(rng, patch)
  n = math.prod(s // p for s, p in zip(size, patch, strict=True))
  d, depth, classes = 24, int(rng.integers(1, 5)), int(rng.integers(2, 99))
  fields = dict(width=d, num_heads=3, depth=depth, patch_size=patch)
  stem = n * math.prod(patch) * 3 * d

  got = flops.multiply_adds(vit.Model(classes, "B/16", **fields), size)
  block = 12 * n * d**2 + 2 * n**2 * d
  assert got == stem + depth * block + classes * d

  fields["grid"] = (2,) * len(patch)
  model = lookup_vit.Model(classes, "B/16", mhbc_impl="direct", **fields)
  for grid in (None, tuple(int(g) for g in rng.integers(1, 4, len(patch)))):
    m = math.prod(grid or model.grid)
    block = (4 * n + 15 * m) * d**2 + (3 * n * m + 2 * m**2) * d
    got = flops.multiply_adds(model, size, grid)
    assert got == stem + depth * block + 2 * classes * d

    # Keys, values and updates are of M H rows, and so are their products.
    block = (n + 18 * m) * d**2 + (3 * n * m * 3 + 2 * m**2) * d
    absorbed = model.clone(mhbc_impl="absorbed")
    got = flops.multiply_adds(absorbed, size, grid)
    assert got == stem + depth * block + 2 * classes * d

  # The lookup tokens after the last gathering are for nothing.
  m = math.prod(model.grid)
  want = stem + depth * ((4 * n + 15 * m) * d**2 + (3 * n * m + 2 * m**2) * d)
  want -= (2 * n + m) * d**2 + n * m * d
  compressed = model.clone(heads="compressed")
  assert flops.multiply_adds(compressed, size) == want + classes * d
  without = model.clone(num_classes=None)
  assert flops.multiply_adds(without, size) == want

  # Nothing written back: no V', A^T V' and W_o'.
  model = model.clone(reuse="none")
  m = math.prod(model.grid)
  block = (3 * n + 14 * m) * d**2 + (2 * n * m + 2 * m**2) * d
  got = flops.multiply_adds(model, size)
  assert got == stem + depth * block + 2 * classes * d


def test_formula_of_a_factorised_encoder():
  time, rows, columns, d, classes = 3, 4, 2, 24, 5
  n = rows * columns
  fields = dict(width=d, num_heads=3, depth=2, temporal_depth=6)
  size = (2 * time, 8 * rows, 8 * columns)
  stem = time * n * 2 * 8 * 8 * 3 * d

  def vit_block(n):
    return 12 * n * d**2 + 2 * n**2 * d

  got = flops.multiply_adds(factorised.Model(classes, "B/2x8", **fields), size)
  want = stem + 2 * time * vit_block(n) + 6 * vit_block(time) + classes * d
  assert got == want

  # A temporal encoder for each head.
  fields |= dict(grid=(1, 2), mhbc_impl="direct")
  model = factorised.Model(classes, "B/2x8", "lookup_vit", **fields)
  for grid, m in ((None, 2), ((3, 2), 6)):
    block = (4 * n + 15 * m) * d**2 + (3 * n * m + 2 * m**2) * d
    want = stem + 2 * time * block + 12 * vit_block(time) + 2 * classes * d
    assert flops.multiply_adds(model, size, grid) == want


def test_formula_without_a_classifier_and_with_a_class_token():
  size, n, d = (32, 48), 24, 32
  fields = dict(patch_size=(8, 8), depth=2)
  plain = flops.multiply_adds(vit.Model(None, "mu/8", **fields), size)
  assert plain == n * 192 * d + 2 * (12 * n * d**2 + 2 * n**2 * d)
  tok = flops.multiply_adds(vit.Model(None, "mu/8", pool="tok", **fields), size)
  n1 = n + 1
  assert tok == n * 192 * d + 2 * (12 * n1 * d**2 + 2 * n1**2 * d)


def test_formula_of_one_block_is_what_the_design_promises():
  """LookupViT at 5x5 has under half of ViT's cost, at 3x3 under 0.4."""
  cost = lambda m, g=None: flops.multiply_adds(m, (224, 224), g)  # noqa: E731
  base = cost(vit.Model(1000, "B/16"))
  model = lookup_vit.Model(1000, "B/16", mhbc_impl="direct")
  ratios = [cost(model, g) / base for g in GRIDS]
  np.testing.assert_allclose(ratios, [0.383, 0.486, 0.64, 0.97], 0, 0.01)


# Parameters, and what does not matter.


@pytest.mark.parametrize(
  "module, fields",
  [
    (vit, dict(pool="gap")),
    (vit, dict(pool="map")),
    (vit, dict(pool="tok")),
    (lookup_vit, dict(grid=(2, 2))),
    (lookup_vit, dict(grid=(2, 2), reuse="none", positions="sincos")),
  ],
)
def test_parameters(module, fields):
  model = module.Model(7, "mu/4", **fields)
  got = flops.cost(model, (8, 12)).params
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 12, 3)))
  assert got == sum(x.size for x in jax.tree.leaves(variables))


@pytest.mark.parametrize("module", [vit, lookup_vit])
def test_scan_and_remat_do_not_matter(module):
  fields = dict(depth=3) | (dict(grid=(2, 2)) if module is lookup_vit else {})
  plain, scanned = (
    flops.cost(module.Model(7, "mu/4", **fields, **f), (16, 16))
    for f in ({}, dict(scan=True, remat_policy="nothing_saveable"))
  )
  assert plain == scanned


def test_table():
  model = lookup_vit.Model(7, "mu/4")
  lines = flops.table(model, (16, 16), [(2, 2), (3, 4)]).splitlines()
  assert len(lines) == 4
  for grid, name, line in zip(
    [(2, 2), (3, 4)], ("2x2", "3x4"), lines[2:], strict=True
  ):
    cost = flops.cost(model, (16, 16), grid)
    assert [c.strip() for c in line.strip("|").split("|")] == [
      name,
      f"{cost.params / 1e6:.2f}",
      f"{cost.xla_flops / 1e9:.3f}",
      f"{cost.formula_flops / 1e9:.3f}",
      f"{cost.executed_xla_flops / 1e9:.3f}",
      f"{cost.executed_flops / 1e9:.3f}",
    ]
  assert "| - |" in flops.table(vit.Model(7, "mu/4"), (16, 16), [None])


# Errors and the program.


def test_errors():
  model = lookup_vit.Model(7, "mu/4")
  with pytest.raises(ValueError, match="does not divide"):
    flops.cost(model, (18, 16))
  with pytest.raises(ValueError, match=r"\(5, 5\) does not fit .*\(4, 4\)"):
    flops.cost(model, (16, 16), (5, 5))
  with pytest.raises(ValueError, match="video"):
    flops.cost(vit.Model(7, "mu/2x4"), (16, 16))


CONFIG = """
import ml_collections
def get_config(arg=None):
  return ml_collections.ConfigDict(dict(
    model_name=arg or "lookup_vit", num_classes=7, total_steps=1, lr=0.1,
    model={model},
    input=dict(pp="decode", image_size=(16, 16), batch_size=1),
  ))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  """Exit code, stdout and stderr of the program with several arguments."""
  folder = tmp_path_factory.mktemp("flops")
  mu, plain = str(folder / "mu.py"), str(folder / "plain.py")
  with open(mu, "w") as f:
    f.write(CONFIG.format(model='dict(variant="mu/4")'))
  with open(plain, "w") as f:
    f.write(CONFIG.format(model="dict(depth=1, grid=(1, 1))"))
  arguments = dict(
    grids=[f"--config={mu}", "--grid=2x2,3x3"],
    vit_with_grid=[f"--config={mu}:vit", "--grid=2x2"],
    no_variant=[f"--config={plain}"],
    no_file=[f"--config={folder}/none.py"],
  )
  running = {
    name: Program("-m", "lookup_vit.analysis.flops", *args)
    for name, args in arguments.items()
  }
  outputs = {name: p.communicate(timeout=120) for name, p in running.items()}
  return {name: (p.returncode, *outputs[name]) for name, p in running.items()}


def test_program(programs):
  code, out, err = programs["grids"]
  assert code == 0, err
  assert "lookup_vit mu/4, input (16, 16)" in out
  model = lookup_vit.Model(7, "mu/4")
  assert flops.table(model, (16, 16), [(2, 2), (3, 3)]) in out


def test_program_of_a_config_without_a_variant(programs):
  code, out, err = programs["no_variant"]
  assert code == 0, err
  assert "B/16" in out and "| 1x1 |" in out


def test_program_with_a_grid_for_vit(programs):
  code, _, err = programs["vit_with_grid"]
  assert code == 1
  assert err.startswith("error: ") and "Traceback" not in err, err
  assert "grid" in err and "vit" in err


def test_program_without_the_config(programs):
  code, _, err = programs["no_file"]
  assert code == 1
  assert err.startswith("error: No config file") and "none.py" in err


class _Linear(nn.Module):
  """No field of ViT's but `dtype`."""

  dtype: str = "bfloat16"

  @nn.compact
  def __call__(self, images):
    x = images.reshape(len(images), -1).astype(self.dtype)
    return nn.Dense(7, dtype=self.dtype)(x), {}


def test_a_model_without_formula():
  cost = flops.cost(_Linear(), (4, 5))
  assert cost.params == 61 * 7
  assert cost.xla_flops == cost.executed_xla_flops
  assert cost.xla_flops == pytest.approx(2 * 60 * 7, rel=0.02)
  assert cost.formula_flops is None is cost.executed_flops
  row = flops.table(_Linear(), (4, 5), [None]).splitlines()[-1]
  assert row == "| - | 0.00 | 0.000 | - | 0.000 | - |"


def test_what_is_made_of_a_vit_has_no_formula_of_its():
  class Other(vit.ViT):
    """May compute anything."""

  fields = dict(num_classes=3, width=8, depth=1, num_heads=2, mlp_ratio=4.0)
  fields |= dict(patch_size=(4, 4))
  assert flops.cost(vit.ViT(**fields), (8, 8)).formula_flops > 0
  assert flops.cost(Other(**fields), (8, 8)).formula_flops is None
