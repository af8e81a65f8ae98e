r"""ViViT on moving digits, trained as `moving_digits_lookup.py` is.

    python -m lookup_vit.train --config=configs/moving_digits_vivit.py \
        --workdir=workdirs/moving_digits_vivit
    python -m lookup_vit.dryrun --topology=cpu:1 \
        --config=configs/moving_digits_vivit.py

The arguments are the same, but for `grid`.
"""

from configs import moving_digits_lookup


def get_config(arg=None):
  config = moving_digits_lookup.get_config(arg)
  if config.grids is None:
    raise ValueError("Config argument grid: ViViT has no compressed tokens.")
  config.model_name = "vit"
  config.grids = None
  del config.model["grid"]
  return config
