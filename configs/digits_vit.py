r"""ViT on scikit-learn's handwritten digits, trained as `digits_lookup.py` is.

    python -m lookup_vit.train --config=configs/digits_vit.py \
        --workdir=workdirs/digits_vit
    python -m lookup_vit.dryrun --topology=cpu:1 \
        --config=configs/digits_vit.py

The arguments are the same.
"""

from configs import digits_lookup


def get_config(arg=None):
  config = digits_lookup.get_config(arg)
  config.model_name = "vit"
  config.grids = None
  del config.model["grid"]
  return config
