r"""Captions of COCO's images, by a decoder on a frozen ViT.

The counterpart of `coco_caption_lookup_b.py`: the decoder reads all tokens, 196
of an image of 224 pixels.

    python -m lookup_vit.train --workdir=gs://BUCKET/coco_caption_vit_b \
        --config=configs/coco_caption_vit_b.py:encoder=gs://BUCKET/in21k_vit_b
    python -m lookup_vit.dryrun --topology=v5e:4x4 \
        --config=configs/coco_caption_vit_b.py

The arguments are the same; `encoder` is a run of `in21k_vit_b.py`.
"""

from configs import coco_caption_lookup_b, common


def get_config(arg=None):
  config = coco_caption_lookup_b.get_config(arg)
  common.read_all_tokens(config)
  return config
