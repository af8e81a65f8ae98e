r"""Multi-resolution LookupViViT on Kinetics-400.

It is trained as `k400_vivit_b.py` is. The compressed grids (time, rows,
columns) are this repository's choice.

    python -m lookup_vit.train --config=configs/k400_lookup_vivit_b.py \
        --workdir=gs://BUCKET/k400_lookup_vivit_b
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/k400_lookup_vivit_b.py
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/k400_lookup_vivit_b.py:variant=L/2x16

Arguments: `--config=configs/k400_lookup_vivit_b.py:variant=L/2x16,frames=64`,
`runlocal` for a trial without Kinetics.
"""

from configs import common, k400_vivit_b


def get_config(arg=None):
  config = k400_vivit_b.get_config(arg)
  config.model_name = "lookup_vit"
  # The grid of an update is drawn from these.
  config.grids = common.video_grids(
    config.model.variant, config.input.image_size
  )
  config.model.grid = config.grids[len(config.grids) // 2]
  return config
