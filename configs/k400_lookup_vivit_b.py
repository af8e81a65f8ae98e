r"""Multi-resolution LookupViViT on Kinetics-400.

It is trained as `k400_vivit_b.py` is. The compressed grids, of which each
update draws one, are this repository's choice.

    python -m lookup_vit.train --workdir=gs://BUCKET/k400_lookup_vivit_b \
        --config=configs/k400_lookup_vivit_b.py:from=gs://BUCKET/in21k_lookup_b
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/k400_lookup_vivit_b.py
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/k400_lookup_vivit_b.py:variant=L/2x16

Arguments: `--config=configs/k400_lookup_vivit_b.py:variant=L/2x16,frames=64`,
`factorised` is LookupViT on each slice in time, its grids (rows, columns);
`from=WORKDIR` starts from a run of LookupViT, see `k400_vivit_b.py`; `runlocal`
is for a trial without Kinetics.
"""

from configs import common, k400_vivit_b


def get_config(arg=None):
  config = k400_vivit_b.get_config(arg)
  common.look_up(config)
  return config
