r"""ViViT on Something-Something v2.

The model of `k400_vivit_b.py`, ViViT's model 1 (arXiv:2103.15691), with the
paper's hyperparameters for this set: 35 epochs, SGD with momentum, label
smoothing, mixup and stochastic depth of 0.3 each, 32 consecutive frames at 12
a second. The learning rate is the paper's 0.5; scenic's config of its larger
model, projects/vivit/configs/something_something_v2/
vivit_large_factorised_encoder.py, has 0.4. Apart from there it trains from
scratch; tokens are mean-pooled, as LookupViT's are; crops are of one scale, and
there is no RandAugment; nothing is flipped, as some classes are told apart by
left and right; evaluation sees one view of a video, the centre's.

    python -m lookup_vit.train --config=configs/ssv2_vivit_b.py \
        --workdir=gs://BUCKET/ssv2_vivit_b
    python -m lookup_vit.dryrun --topology=v5e:4x8 \
        --config=configs/ssv2_vivit_b.py

Arguments: `--config=configs/ssv2_vivit_b.py:variant=L/2x16,res=256,frames=16`,
`runlocal` for a trial without the videos. data/something_something_v2/README.md
says how to prepare them.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  arg = common.parse_arg(
    arg, variant="B/2x16", res=224, frames=32, runlocal=False
  )
  if arg.runlocal:
    arg.variant, arg.res, arg.frames = "mu/2x16", 96, 8
  random_clip = f"sample_clip({arg.frames})|decode_clip"
  central_clip = f"central_clip({arg.frames})|decode_clip"
  if arg.runlocal:  # The digits do not move.
    random_clip = central_clip = f"decode|still_clip({arg.frames})"
  resize = f"resize_small({arg.res * 8 // 7})"
  to_video = (
    f"unfold_clip({arg.frames})|value_range(-1,1)|keep('image','label')"
  )
  config = ml_collections.ConfigDict()

  config.seed = 0
  config.total_epochs = 35
  config.num_classes = 174
  config.loss = "softmax_xent"
  config.label_smoothing = 0.3
  config.mixup = dict(p=0.3)

  config.input = dict(
    data=dict(module="data.something_something_v2", split="train"),
    pp=f"{random_clip}|{resize}|random_crop({arg.res})|{to_video}",
    image_size=(arg.frames, arg.res, arg.res),
    batch_size=64,
    shuffle_buffer_size=2048,  # A video has half a megabyte.
  )

  config.model_name = "vit"
  config.model = dict(
    variant=arg.variant,
    stochastic_depth=0.3,
    dtype="bfloat16",
    scan=True,
    # Kept for the backward pass, activations of a clip are 0.2 GB a block.
    remat_policy="nothing_saveable",
  )
  common.fit_large(config)

  config.optax_name = "sgd"
  config.optax = dict(momentum=0.9)
  config.grad_clip_norm = 1.0
  config.lr = 0.5
  config.schedule = dict(warmup_percent=2.5 / 35, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 1000

  config.evals = dict(
    val=dict(
      type="classification",
      data=dict(module="data.something_something_v2", split="validation"),
      pp_fn=f"{central_clip}|{resize}|central_crop({arg.res})|{to_video}",
      log_steps=10_000,
    )
  )

  if arg.runlocal:
    common.run_local(config)
  return config
