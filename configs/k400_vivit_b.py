r"""ViViT on Kinetics-400.

ViT over tubelets, with attention in space and time at once: ViViT's model 1
(arXiv:2103.15691). The recipe is the paper's, from table 7 and scenic's
projects/vivit/configs/kinetics400/vivit_base_k400.py: 30 epochs, SGD with
momentum, no dropout; 32 frames at every second of 25 a second; scale and colour
jitter, random crops and flips; 4 x 3 views at the end. Here tokens are
mean-pooled, as LookupViT's are, where ViViT has a class token.

    python -m lookup_vit.train --workdir=gs://BUCKET/k400_vivit_b \
        --config=configs/k400_vivit_b.py:from=gs://BUCKET/in21k_vit_b
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/k400_vivit_b.py

Arguments: `--config=configs/k400_vivit_b.py:variant=L/2x16,res=320,frames=64`;
`factorised` is ViViT's model 2, a ViT on each slice in time and then one over
time; `from=WORKDIR` starts from a run on images, of a model of the same size,
as the paper does from ImageNet-21k: the patch embedding becomes that of a
tubelet's central frame (section 3.4); `runlocal` is for a trial without
Kinetics. data/kinetics400/README.md says how to prepare the data.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    variant="B/2x16",
    res=224,
    frames=32,
    factorised=False,
    **{"from": ""},
    runlocal=False,
  )
  if arg.runlocal:
    arg.variant, arg.res, arg.frames = "mu/2x16", 80, 8
  config = ml_collections.ConfigDict()

  config.seed = 0
  config.total_epochs = 30
  config.num_classes = 400
  config.loss = "softmax_xent"

  config.input = dict(
    data=dict(module="data.kinetics400", split="train"),
    pp=(
      f"sample_clip({arg.frames},2)|decode_clip"
      f"|jitter_scale({common.short_side(arg.res)})|random_crop({arg.res})"
      f"|flip_lr|color_jitter|unfold_clip({arg.frames})|value_range(-1,1)"
      "|keep('image','label')"
    ),
    image_size=(arg.frames, arg.res, arg.res),
    batch_size=64,
    shuffle_buffer_size=512,  # A video has megabytes.
  )

  config.model_name = "factorised" if arg.factorised else "vit"
  config.model = dict(
    variant=arg.variant,
    dtype="bfloat16",
    scan=True,
    # Kept for the backward pass, activations of a clip are 0.2 GB a block.
    remat_policy="nothing_saveable",
  )
  common.fit_large(config)
  common.start_from(config, arg["from"])

  config.optax_name = "sgd"
  config.optax = dict(momentum=0.9)
  config.grad_clip_norm = 1.0
  config.lr = 0.1
  config.schedule = dict(warmup_percent=2.5 / 30, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 1000

  data = dict(module="data.kinetics400", split="validation")
  config.evals = common.video_evals(data, arg.res, arg.frames, 2, 10_000)

  if arg.runlocal:
    common.run_local_video(config)
  return config
