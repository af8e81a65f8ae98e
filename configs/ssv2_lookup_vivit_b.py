r"""Multi-resolution LookupViViT on Something-Something v2.

It is trained as `ssv2_vivit_b.py` is. The compressed grids (time, rows,
columns) are this repository's choice.

    python -m lookup_vit.train --workdir=gs://BUCKET/ssv2_lookup_vivit_b \
        --config=configs/ssv2_lookup_vivit_b.py:from=gs://BUCKET/k400_lookup_vivit_b
    python -m lookup_vit.dryrun --topology=v5e:4x8 \
        --config=configs/ssv2_lookup_vivit_b.py

Arguments: `--config=configs/ssv2_lookup_vivit_b.py:variant=L/2x16,frames=64`,
`from=WORKDIR` starts from a run of LookupViT, see `ssv2_vivit_b.py`; `runlocal`
is for a trial without the videos.
"""

from configs import common, ssv2_vivit_b


def get_config(arg=None):
  config = ssv2_vivit_b.get_config(arg)
  config.model_name = "lookup_vit"
  # The grid of an update is drawn from these.
  config.grids = common.video_grids(
    config.model.variant, config.input.image_size
  )
  config.model.grid = config.grids[len(config.grids) // 2]
  return config
