r"""ViT on ImageNet-21k.

The recipe is big_vision's configs/vit_i21k.py (AugReg, arXiv:2106.10270): 300
epochs, sigmoid loss, Adam in bfloat16, RandAugment and mixup by model size,
mean pooling.

    python -m lookup_vit.train --config=configs/in21k_vit_b.py \
        --workdir=gs://BUCKET/in21k_vit_b
    python -m lookup_vit.dryrun --topology=v5e:8x16 \
        --config=configs/in21k_vit_b.py

Arguments: `--config=configs/in21k_vit_b.py:variant=L/16,release=fall11`,
`runlocal` for a trial without ImageNet. The data are those of
`data/imagenet21k`, which takes the release of winter 2021 or of fall 2011.
"""

import ml_collections

from configs import common

# The best setting on ImageNet-21k (AugReg, figure 4).
AUG = {
  "Ti/16": "none",
  "S/32": "none",
  "S/16": "light1",
  "B/32": "light2",
  "B/16": "light2",
  "L/16": "medium2",
}

# Of the releases that data/imagenet21k builds.
CLASSES = {"winter21": 19_167, "fall11": 21_841}


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    variant="B/16",
    res=224,
    aug="",
    release="winter21",
    runlocal=False,
  )
  if arg.release not in CLASSES:
    raise ValueError(f"release={arg.release!r}: want one of {list(CLASSES)}.")
  if arg.runlocal:
    arg.variant, arg.res = "mu/16", 96
  randaug, mixup = common.augreg(arg.aug or AUG.get(arg.variant, "medium2"))
  module = f"data.imagenet21k/{arg.release}"
  config = ml_collections.ConfigDict()

  config.seed = 0
  config.total_epochs = 300
  config.num_classes = CLASSES[arg.release]
  config.loss = "sigmoid_xent"
  config.mixup = mixup

  config.input = dict(
    data=dict(module=module, split="train[51200:]"),
    pp=(
      f"decode_jpeg_and_inception_crop({arg.res})|flip_lr|{randaug}"
      "|value_range(-1,1)|keep('image','label')"
    ),
    image_size=(arg.res, arg.res),
    batch_size=4096,
    shuffle_buffer_size=50_000,  # over all hosts, about 110 KB each
  )

  config.model_name = "vit"
  config.model = dict(
    variant=arg.variant,
    head_bias_init=-10.0,  # -log(classes): the prior of sigmoid classifiers
    dtype="bfloat16",
    scan=True,
  )
  common.fit_large(config)

  config.optax_name = "adamw"
  config.optax = dict(mu_dtype="bfloat16")
  config.grad_clip_norm = 1.0
  config.lr = 1e-3
  config.wd = 1e-4
  config.schedule = dict(warmup_steps=10_000, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 1000

  def evaluation(split):
    return dict(
      type="classification",
      data=dict(module=module, split=split),
      pp_fn=(
        f"decode|resize_small({arg.res * 8 // 7})|central_crop({arg.res})"
        "|value_range(-1,1)|keep('image','label')"
      ),
      log_steps=2500,
    )

  config.evals = dict(
    val=evaluation("train[25600:51200]"), test=evaluation("train[:25600]")
  )

  if arg.runlocal:
    common.run_local(config)
  return config
