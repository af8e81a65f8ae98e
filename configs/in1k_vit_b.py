r"""ViT on ImageNet-1k.

The recipe is big_vision's configs/vit_i1k.py (AugReg, arXiv:2106.10270): 300
epochs, sigmoid loss, Adam in bfloat16, RandAugment and mixup by model size.
Mean pooling and no representation layer, so that LookupViT differs in its
blocks alone.

    python -m lookup_vit.train --config=configs/in1k_vit_b.py \
        --workdir=gs://BUCKET/in1k_vit_b
    python -m lookup_vit.dryrun --topology=v5e:8x16 \
        --config=configs/in1k_vit_b.py

Arguments: `--config=configs/in1k_vit_b.py:variant=L/16,res=384,aug=strong1`,
`runlocal` for a trial without ImageNet.
"""

import ml_collections

from configs import common

# The best setting for 300 epochs on ImageNet-1k (AugReg, figure 4).
AUG = {
  "Ti/16": "light1",
  "S/32": "medium1",
  "S/16": "medium2",
  "B/32": "medium2",
  "B/16": "medium2",
  "L/16": "medium2",
}


def get_config(arg=None):
  arg = common.parse_arg(arg, variant="B/16", res=224, aug="", runlocal=False)
  if arg.runlocal:
    arg.variant, arg.res = "mu/16", 96
  randaug, mixup = common.augreg(arg.aug or AUG.get(arg.variant, "medium2"))
  config = ml_collections.ConfigDict()

  config.seed = 0
  config.total_epochs = 300
  config.num_classes = 1000
  config.loss = "sigmoid_xent"
  config.mixup = mixup

  config.input = dict(
    data=dict(name="imagenet2012", split="train[:99%]"),
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
    head_bias_init=-6.9,  # -log(classes): the prior of sigmoid classifiers
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
      data=dict(name="imagenet2012", split=split),
      pp_fn=(
        f"decode|resize_small({arg.res * 8 // 7})|central_crop({arg.res})"
        "|value_range(-1,1)|keep('image','label')"
      ),
      log_steps=2500,
    )

  config.evals = dict(
    minival=evaluation("train[99%:]"), val=evaluation("validation")
  )

  if arg.runlocal:
    common.run_local(config)
  return config
