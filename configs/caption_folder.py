r"""Captions of your own images, annotated as COCO's are.

    FOLDER/train.json    {"images": [{"id", "file_name"}, ...],
    FOLDER/val.json       "annotations": [{"id", "image_id", "caption"}, ...]}
    FOLDER/train/*.jpg (or .png), by file_name
    FOLDER/val/*.jpg

First a tokenizer, of as many pieces as the captions give; then the captioner:

    python -m lookup_vit.preprocess.train_tokenizer --vocab_size=1000 \
        --config=configs/caption_folder.py:folder=FOLDER,tokenizer=MODEL \
        --output=MODEL
    python -m lookup_vit.train --workdir=workdirs/mine \
        --config=configs/caption_folder.py:folder=FOLDER,tokenizer=MODEL,\
    encoder=WORKDIR
    python -m lookup_vit.dryrun --topology=v5e:2x2 \
        --config=configs/caption_folder.py:folder=FOLDER,tokenizer=MODEL

Arguments: `encoder` is the work directory of the run that the encoder starts
from, on images, and `variant` its size; without one it is random, and wants
`frozen=false`, which trains it too. `model=vit` is for a ViT, `res` for images
of another size, `max_length` for the most pieces of a caption, of which
`train_tokenizer` says how many there are; `epochs`, `batch`, `seed`;
`on_error=skip` leaves out images that cannot be read; `val=SPLIT` names the
held-out split, also a part of another as `train[90%:]` (then
`train=train[:90%]`).

The recipe is that of `coco_caption_lookup_b.py`, with its learning rate, of a
batch of 512, scaled to the batch by its square root.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    folder="",
    tokenizer="",
    train="train",
    val="val",
    on_error="fail",
    model="lookup_vit",
    encoder="",
    frozen=True,
    variant="B/16",
    res=224,
    max_length=64,
    epochs=20.0,
    batch=64,
    seed=0,
    runlocal=False,
  )
  if arg.runlocal:
    arg.variant, arg.res, arg.tokenizer = "mu/16", 96, common.TOKENIZER
  elif not arg.folder or arg.batch < 1:
    raise ValueError("caption_folder.py wants folder=FOLDER, and batch >= 1.")
  elif not arg.tokenizer:
    raise ValueError(
      "caption_folder.py wants tokenizer=MODEL, a SentencePiece model. This "
      "makes one: python -m lookup_vit.preprocess.train_tokenizer "
      "--vocab_size=1000 --config=configs/caption_folder.py:"
      f"folder={arg.folder},tokenizer=MODEL --output=MODEL"
    )
  config = ml_collections.ConfigDict()

  config.seed = arg.seed
  config.task = "captioning"
  config.total_epochs = arg.epochs
  config.tokenizer = arg.tokenizer
  config.num_classes = None  # as many as the tokenizer has pieces
  config.label_smoothing = 0.1

  data = dict(
    module="data.caption_folder", folder=arg.folder, on_error=arg.on_error
  )
  pp = f"decode|resize({arg.res})|value_range(-1,1)"
  config.input = dict(
    data=dict(split=arg.train, **data),
    pp=common.caption_ops(pp, arg.tokenizer, arg.max_length),
    image_size=(arg.res, arg.res),
    batch_size=arg.batch,
    shuffle_buffer_size=10_000,
  )

  config.model_name = "captioner"
  config.model = dict(
    encoder=dict(model_name="lookup_vit", variant=arg.variant, scan=True),
    max_length=arg.max_length,
    frozen=arg.frozen,
  )
  config.grids = common.lookup_grids(arg.variant, arg.res)
  own = (5, 5) if (5, 5) in config.grids else config.grids[-1]
  config.model.encoder.grid = own
  if arg.model == "vit":
    common.read_all_tokens(config)
  elif arg.model != "lookup_vit":
    raise ValueError(
      f"Config argument model={arg.model!r}: want lookup_vit or vit."
    )
  if arg.encoder:
    config.model_init = arg.encoder

  config.optax_name = "adafactor"
  config.optax = dict(beta2_cap=0.999)
  config.grad_clip_norm = 1.0
  config.lr = 1e-3 * (arg.batch / 512) ** 0.5
  config.wd = 1e-4
  config.schedule = dict(warmup_percent=10_000 / 366_500, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 500
  config.evals = dict(
    val=dict(
      type="captions",
      data=dict(split=arg.val, **data),
      pp_fn=f"{pp}|keep('image')",
      beams=4,
      log_steps=500,
    )
  )

  if arg.runlocal:
    common.run_local_captions(config)
  return config
