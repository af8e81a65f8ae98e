r"""Multi-resolution LookupViViT on Kinetics-400.

It is trained as `k400_vivit_b.py` is. The compressed grids (time, rows,
columns) are this repository's choice.

    python -m lookup_vit.train --workdir=gs://BUCKET/k400_lookup_vivit_b \
        --config=configs/k400_lookup_vivit_b.py:from=gs://BUCKET/in21k_lookup_b
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/k400_lookup_vivit_b.py
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/k400_lookup_vivit_b.py:variant=L/2x16

Arguments: `--config=configs/k400_lookup_vivit_b.py:variant=L/2x16,frames=64`,
`from=WORKDIR` starts from a run of LookupViT, see `k400_vivit_b.py`; `runlocal`
is for a trial without Kinetics.
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
