r"""Ablations of LookupViT and the stability of its training, a run at a time.

    python -m lookup_vit.train --workdir=workdirs/ablations/reuse_none_0 \
        --config=configs/ablation.py:name=reuse_none
    python -m lookup_vit.train --workdir=workdirs/ablations/large_0 \
        --config=configs/ablation.py:size=large,lr=0.01,qk_norm,clip=0
    python -m lookup_vit.dryrun --topology=cpu:8 \
        --config=configs/ablation.py:name=reuse_none

`launch/ablations.sh` trains sets of them and makes a table.

Arguments: `name`, one of `VARIATIONS`; `size`, one of `SIZES`, `lr`, `qk_norm`
and `clip` (norm of gradients, 0 for none); `seed`, `epochs`, and `runlocal` for
a run of seconds. All else is as in `digits_lookup.py`; with `folder=FOLDER`, as
in `image_folder.py`, whose `variant`, `res`, `batch`, `train` and `val` there
are then too.
"""

from configs import common, digits_lookup, image_folder

# Fields of the model that are not as in the base. Those of a grid are trained
# at that grid alone, the others at all grids of the base.
VARIATIONS = {
  "default": {},
  # Compressed grid.
  "grid_2x2": dict(grid=(2, 2)),
  "grid_3x3": dict(grid=(3, 3)),
  "grid_5x5": dict(grid=(5, 5)),
  # What of the gathering's attention is reused, and how it is scaled.
  "reuse_logits": dict(reuse="logits"),
  "reuse_none": dict(reuse="none"),
  "reuse_scale_tokens": dict(reuse_scale="tokens"),
  # One classifier.
  "heads_compressed": dict(heads="compressed"),
  "heads_lookup": dict(heads="lookup"),
  # What the compressed tokens are at first.
  "init_average": dict(compressed_init="average"),
  "init_learned": dict(compressed_init="learned"),
  # MLPs of the compressed tokens, 4 in the base, and of the lookup tokens, 1/2.
  "mlp_ratio_2": dict(mlp_ratio=2.0),
  "lookup_mlp_ratio_0.25": dict(lookup_mlp_ratio=0.25),
  "lookup_mlp_ratio_1": dict(lookup_mlp_ratio=1.0),
  # Heads of MHBC; in the base as many as of self-attention, 2 on the digits.
  "mhbc_heads_1": dict(mhbc_heads=1),
  "mhbc_heads_4": dict(mhbc_heads=4),
}

SIZES = {
  "small": dict(width=64, depth=4, num_heads=2),
  "large": dict(width=128, depth=6, num_heads=4),
}

_OWN = dict(name="default", size="", lr=0.0, qk_norm=False, clip=1.0)


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    **_OWN,
    folder="",
    variant="",
    res=0,
    batch=0,
    train="",
    val="",
    epochs=0.0,
    seed=0,
    runlocal=False,
  )
  if arg.name not in VARIATIONS:
    raise ValueError(f"name={arg.name!r}: want one of {', '.join(VARIATIONS)}.")
  if arg.size and arg.size not in SIZES:
    raise ValueError(f"size={arg.size!r}: want one of {', '.join(SIZES)}.")
  base = image_folder if arg.folder else digits_lookup
  given = {k: v for k, v in arg.items() if v and k not in _OWN}
  config = base.get_config(",".join(f"{k}={v}" for k, v in given.items()))

  config.model.update(VARIATIONS[arg.name])
  if "grid" in VARIATIONS[arg.name]:
    config.grids = None
  if arg.size:
    config.model.update(SIZES[arg.size])
  if arg.qk_norm:
    config.model.qk_norm = True
  if arg.lr:
    config.lr = arg.lr
  config.grad_clip_norm = arg.clip or None
  config.log_attention_logit = True

  if arg.runlocal:
    config.model.depth = 1
  return config
