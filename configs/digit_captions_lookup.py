r"""Captions of scenes of digits, by a decoder on a frozen LookupViT.

First a tokenizer; then the encoder, which learns which digit of which size is
where; then the decoder:

    python -m lookup_vit.preprocess.train_tokenizer --vocab_size=128 \
        --model_type=bpe --normalization=identity \
        --config=configs/digit_captions_lookup.py --output=workdirs/digits.model
    python -m lookup_vit.train --workdir=workdirs/digit_captions_encoder \
        --config=configs/digit_captions_lookup.py:task=classification
    python -m lookup_vit.train --workdir=workdirs/digit_captions_lookup \
        --config=configs/digit_captions_lookup.py:tokenizer=workdirs/\
    digits.model,encoder=workdirs/digit_captions_encoder
    python -m lookup_vit.dryrun --topology=cpu:8 \
        --config=configs/digit_captions_lookup.py

Arguments: `task`, `encoder` (the work directory of an encoder; without, one
that is not trained), `tokenizer`, `frozen=false` to train the encoder too,
`seed`, `epochs`, and `runlocal` for a run of seconds.
"""

import ml_collections

from configs import common

_MODULE = "data.digit_captions"
# Which digit of which size is in which cell.
_PARTS = 80
_LENGTH = 24
_SIZE = 32


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    task="captioning",
    encoder="",
    tokenizer=common.TOKENIZER,
    frozen=True,
    seed=0,
    epochs=0.0,
    runlocal=False,
  )
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.task = arg.task
  config.input = dict(
    data=dict(module=_MODULE, split="train"),
    image_size=(_SIZE, _SIZE),
    batch_size=32,
    shuffle_buffer_size=36_000,
  )
  encoder = dict(variant="Ti/4", width=64, depth=4, num_heads=2, grid=(3, 3))
  config.grids = [(2, 2), (3, 3), (4, 4)]

  config.optax_name = "adamw"
  config.optax = dict(b2=0.95)
  config.grad_clip_norm = 1.0
  config.lr = 3e-3
  config.wd = 1e-4
  config.schedule = dict(warmup_percent=0.1, decay_type="cosine")
  config.log_training_steps = 100
  config.ckpt_steps = 2000

  if arg.task == "classification":
    _classify(config, encoder)
  elif arg.task == "captioning":
    _caption(config, encoder, arg)
  else:
    raise ValueError(
      f"Config argument task={arg.task!r}: want captioning or classification."
    )
  if arg.epochs:
    config.total_epochs = arg.epochs
  if arg.runlocal:
    if arg.task == "captioning":
      config.model.encoder.depth = 1
      common.run_local_captions(config)
    else:
      config.model.depth = 1
      common.run_local_video(config, _MODULE, _PARTS)
  return config


def _classify(config, encoder):
  config.model_name = "lookup_vit"
  config.model = encoder
  # Few of the parts are there: so the loss starts low.
  config.model.head_bias_init = -4.0
  config.num_classes = _PARTS
  config.loss = "sigmoid_xent"
  config.total_epochs = 7.0
  pp = (
    f"value_range(-1,1)|onehot({_PARTS},'parts','labels')"
    "|keep('image','labels')"
  )
  # Shifted by up to a pixel each way: there are few different digits.
  config.input.pp = f"decode|pad({_SIZE + 2})|random_crop({_SIZE})|{pp}"
  config.evals = dict(
    test=dict(
      type="classification",
      data=dict(module=_MODULE, split="test"),
      pp_fn=f"decode|{pp}",
      log_steps=2000,
    )
  )


def _caption(config, encoder, arg):
  config.model_name = "captioner"
  config.model = dict(
    encoder=dict(model_name="lookup_vit", **encoder),
    depth=3,
    num_heads=4,
    max_length=_LENGTH,
    frozen=arg.frozen,
  )
  config.tokenizer = arg.tokenizer
  config.model_init = arg.encoder or None
  config.total_epochs = 5.0
  pp = "decode|value_range(-1,1)"
  config.input.pp = common.caption_ops(pp, arg.tokenizer, _LENGTH)
  config.evals = dict(
    test=dict(
      type="captions",
      data=dict(module=_MODULE, split="test"),
      pp_fn=f"{pp}|keep('image')",
    )
  )
