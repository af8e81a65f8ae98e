r"""Multi-resolution LookupViT on ImageNet-1k, trained as `in1k_vit_b.py` is.

    python -m lookup_vit.train --config=configs/in1k_lookup_b.py \
        --workdir=gs://BUCKET/in1k_lookup_b
    python -m lookup_vit.dryrun --topology=v5e:8x16 \
        --config=configs/in1k_lookup_b.py

Arguments: `--config=configs/in1k_lookup_b.py:variant=L/16,res=384`, `runlocal`
for a trial without ImageNet.
"""

from configs import common, in1k_vit_b


def get_config(arg=None):
  config = in1k_vit_b.get_config(arg)
  config.model_name = "lookup_vit"
  # The grid of an update is drawn from these.
  config.grids = common.lookup_grids(
    config.model.variant, config.input.image_size[0]
  )
  config.model.grid = (5, 5) if (5, 5) in config.grids else config.grids[-1]
  return config
