r"""Captions of COCO's images, by a decoder on a frozen LookupViT.

The splits are those of Karpathy and Li, as TFDS has them in `coco_captions`:
training is on `train` and `restval`, 113,287 images; `val`, 5,000, is scored
along the way, and `test`, 5,000, at the end. One checkpoint is scored at every
compressed grid of `config.grids`, of which each update draws one.

    python -m lookup_vit.train --workdir=gs://BUCKET/coco_caption_lookup_b \
        --config=configs/coco_caption_lookup_b.py:encoder=\
    gs://BUCKET/in21k_lookup_b
    python -m lookup_vit.dryrun --topology=v5e:4x4 \
        --config=configs/coco_caption_lookup_b.py
    python -m lookup_vit.dryrun --topology=v5e:4x4 \
        --config=configs/coco_caption_lookup_b.py:frozen=false

Arguments: `--config=configs/coco_caption_lookup_b.py:variant=L/16,res=384` are
of the encoder; `encoder=WORKDIR` is the run that it starts from, of
`in21k_lookup_b.py`. Without one the encoder is random, and as it is frozen it
stays so. `frozen=false` trains it too. `tokenizer=FILE` is a SentencePiece
model, by default the c4_en of T5 and big_vision, which has 32,000 pieces;
`train_tokenizer` makes one. `runlocal` is for a trial without COCO.

The paper says nothing of how captioners are trained. As in big_vision's CapPa,
configs/proj/cappa/pretrain.py (arXiv:2306.07915), are: images resized without
any other augmentation, c4_en, 64 ids, a decoder as wide as the encoder and half
as deep, Adafactor, learning rate, weight decay, clipping, and the share of the
steps that warm up. That recipe is for pre-training on a billion images. This
repository's own choices are what COCO's size asks for, the batch of 512, 20
epochs and label smoothing of 0.1, and captions in lower case, as the scores are
of words in lower case. None of the values were tuned.
"""

import ml_collections

from configs import common

C4_EN = "gs://t5-data/vocabs/cc_en.32000/sentencepiece.model"
_LENGTH = 64


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    encoder="",
    frozen=True,
    variant="B/16",
    res=224,
    tokenizer=C4_EN,
    seed=0,
    epochs=20.0,
    runlocal=False,
  )
  if arg.runlocal:
    arg.variant, arg.res, arg.tokenizer = "mu/16", 96, common.TOKENIZER
  config = ml_collections.ConfigDict()

  config.seed = arg.seed
  config.task = "captioning"
  config.total_epochs = arg.epochs
  config.tokenizer = arg.tokenizer
  # That of a tokenizer is read off its file.
  config.num_classes = 32_000 if arg.tokenizer == C4_EN else None
  config.label_smoothing = 0.1

  pp = f"decode|resize({arg.res})|value_range(-1,1)"
  config.input = dict(
    data=dict(name="coco_captions", split="train+restval"),
    pp=common.caption_ops(pp, arg.tokenizer, _LENGTH),
    image_size=(arg.res, arg.res),
    batch_size=512,
    shuffle_buffer_size=50_000,  # over all hosts, about 160 KB each
  )

  config.model_name = "captioner"
  config.model = dict(
    encoder=dict(
      model_name="lookup_vit",
      variant=arg.variant,
      dtype="bfloat16",
      scan=True,
    ),
    max_length=_LENGTH,
    frozen=arg.frozen,
    dtype="bfloat16",
  )
  common.fit_large(config)
  config.grids = common.lookup_grids(arg.variant, arg.res)
  own = (5, 5) if (5, 5) in config.grids else config.grids[-1]
  config.model.encoder.grid = own
  if arg.encoder:
    config.model_init = arg.encoder

  config.optax_name = "adafactor"
  config.optax = dict(beta2_cap=0.999)
  config.grad_clip_norm = 1.0
  config.lr = 1e-3
  config.wd = 1e-4
  config.schedule = dict(warmup_percent=10_000 / 366_500, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 500

  def evaluation(split, **fields):
    return dict(
      type="captions",
      data=dict(name="coco_captions", split=split),
      pp_fn=f"{pp}|keep('image')",
      beams=4,
      **fields,
    )

  config.evals = dict(val=evaluation("val", log_steps=1000))
  config.evals.test = evaluation("test")

  if arg.runlocal:
    common.run_local_captions(config)
  return config
