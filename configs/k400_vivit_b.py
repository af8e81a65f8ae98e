r"""ViViT on Kinetics-400.

ViT over tubelets, with attention in space and time at once: ViViT's model 1
(arXiv:2103.15691). Optimizer, schedule and clips are ViViT's, from the paper's
table of hyperparameters and scenic's
projects/vivit/configs/kinetics400/vivit_base_k400.py: 30 epochs, SGD with
momentum, no dropout, 32 frames at every second of 25 a second. Apart from there
it trains from scratch; tokens are mean-pooled, as LookupViT's are; crops are of
one scale, and colours stay; evaluation sees one view of a video, the centre's.

    python -m lookup_vit.train --config=configs/k400_vivit_b.py \
        --workdir=gs://BUCKET/k400_vivit_b
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/k400_vivit_b.py

Arguments: `--config=configs/k400_vivit_b.py:variant=L/2x16,res=320,frames=64`,
`runlocal` for a trial without Kinetics. data/kinetics400/README.md says how to
prepare the data.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  arg = common.parse_arg(
    arg, variant="B/2x16", res=224, frames=32, runlocal=False
  )
  if arg.runlocal:
    arg.variant, arg.res, arg.frames = "mu/2x16", 96, 8
  random_clip = f"sample_clip({arg.frames},2)|decode_clip"
  central_clip = f"central_clip({arg.frames},2)|decode_clip"
  if arg.runlocal:  # The digits do not move.
    random_clip = central_clip = f"decode|still_clip({arg.frames})"
  resize = f"resize_small({arg.res * 8 // 7})"
  to_video = (
    f"unfold_clip({arg.frames})|value_range(-1,1)|keep('image','label')"
  )
  config = ml_collections.ConfigDict()

  config.seed = 0
  config.total_epochs = 30
  config.num_classes = 400
  config.loss = "softmax_xent"

  config.input = dict(
    data=dict(module="data.kinetics400", split="train"),
    pp=f"{random_clip}|{resize}|random_crop({arg.res})|flip_lr|{to_video}",
    image_size=(arg.frames, arg.res, arg.res),
    batch_size=64,
    shuffle_buffer_size=512,  # A video has megabytes.
  )

  config.model_name = "vit"
  config.model = dict(
    variant=arg.variant,
    dtype="bfloat16",
    scan=True,
    # Kept for the backward pass, activations of a clip are 0.2 GB a block.
    remat_policy="nothing_saveable",
  )
  common.fit_large(config)

  config.optax_name = "sgd"
  config.optax = dict(momentum=0.9)
  config.grad_clip_norm = 1.0
  config.lr = 0.1
  config.schedule = dict(warmup_percent=2.5 / 30, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 1000

  config.evals = dict(
    val=dict(
      type="classification",
      data=dict(module="data.kinetics400", split="validation"),
      pp_fn=f"{central_clip}|{resize}|central_crop({arg.res})|{to_video}",
      log_steps=10_000,
    )
  )

  if arg.runlocal:
    common.run_local(config)
  return config
