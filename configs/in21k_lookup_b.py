r"""Multi-resolution LookupViT on ImageNet-21k, trained as `in21k_vit_b.py` is.

    python -m lookup_vit.train --config=configs/in21k_lookup_b.py \
        --workdir=gs://BUCKET/in21k_lookup_b
    python -m lookup_vit.dryrun --topology=v5e:8x16 \
        --config=configs/in21k_lookup_b.py
    python -m lookup_vit.dryrun --topology=v5e:16x16 \
        --config=configs/in21k_lookup_b.py:variant=L/16
    python -m lookup_vit.dryrun --topology=v5e:16x16 \
        --config=configs/in21k_lookup_b.py:variant=g/16

Arguments: `--config=configs/in21k_lookup_b.py:variant=L/16,release=fall11`,
`runlocal` for a trial without ImageNet.
"""

from configs import common, in21k_vit_b


def get_config(arg=None):
  config = in21k_vit_b.get_config(arg)
  config.model_name = "lookup_vit"
  # The grid of an update is drawn from these.
  config.grids = common.lookup_grids(
    config.model.variant, config.input.image_size[0]
  )
  config.model.grid = (5, 5) if (5, 5) in config.grids else config.grids[-1]
  return config
