r"""Captions of scenes of digits, by a decoder on a frozen ViT.

The counterpart of `digit_captions_lookup.py`, whose tokenizer it takes: the
decoder reads all tokens.

    python -m lookup_vit.train --workdir=workdirs/digit_captions_vit_encoder \
        --config=configs/digit_captions_vit.py:task=classification
    python -m lookup_vit.train --workdir=workdirs/digit_captions_vit \
        --config=configs/digit_captions_vit.py:tokenizer=workdirs/\
    digits.model,encoder=workdirs/digit_captions_vit_encoder
    python -m lookup_vit.dryrun --topology=cpu:8 \
        --config=configs/digit_captions_vit.py

The arguments are the same.
"""

from configs import common, digit_captions_lookup


def get_config(arg=None):
  config = digit_captions_lookup.get_config(arg)
  common.read_all_tokens(config)
  return config
