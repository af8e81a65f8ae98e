r"""Multi-resolution LookupViViT on Something-Something v2.

It is trained as `ssv2_vivit_b.py` is. The compressed grids, of which each
update draws one, are this repository's choice.

    python -m lookup_vit.train --workdir=gs://BUCKET/ssv2_lookup_vivit_b \
        --config=configs/ssv2_lookup_vivit_b.py:from=gs://BUCKET/k400_lookup_vivit_b
    python -m lookup_vit.dryrun --topology=v5e:4x8 \
        --config=configs/ssv2_lookup_vivit_b.py

Arguments: `--config=configs/ssv2_lookup_vivit_b.py:variant=L/2x16,frames=64`,
`factorised` is LookupViT on each slice in time, its grids (rows, columns);
`from=WORKDIR` starts from a run of LookupViT, see `ssv2_vivit_b.py`; `runlocal`
is for a trial without the videos.
"""

from configs import common, ssv2_vivit_b


def get_config(arg=None):
  config = ssv2_vivit_b.get_config(arg)
  common.look_up(config)
  return config
