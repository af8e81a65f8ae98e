r"""Fine-tunes a run on ImageNet-1k, at a higher resolution.

The recipe is big_vision's configs/transfer.py for ImageNet (ViT's own,
arXiv:2010.11929, appendix B.1.1): SGD with momentum, 20,000 steps of 512, no
weight decay, learning rate 0.03. Positions are resized, and classifiers start
afresh where the classes differ.

    python -m lookup_vit.train --workdir=workdirs/in1k_finetune \
        --config=configs/in1k_finetune.py:from=workdirs/in21k_lookup_b,res=384
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/in1k_finetune.py:from=configs/in21k_lookup_b.py

`from` is the work directory of the run to start from; model and grids are its
own. For a dry run it may be a config, that of a run to come. `runlocal` is for
a trial, from a run that was made with `runlocal`.
"""

import ml_collections

from configs import common
from lookup_vit import config_utils


def get_config(arg=None):
  arg = common.parse_arg(arg, **{"from": ""}, res=384, runlocal=False)
  if not arg["from"]:
    raise ValueError("in1k_finetune.py wants the run to start from: from=...")
  if arg.runlocal:
    arg.res = 128
  if arg["from"].endswith(".py"):
    source = config_utils.resolve(config_utils.load(arg["from"]))
  else:
    source = config_utils.read_workdir(arg["from"])
  config = ml_collections.ConfigDict()

  config.seed = 0
  config.total_steps = 20_000
  config.num_classes = 1000
  config.loss = "softmax_xent"

  config.input = dict(
    data=dict(name="imagenet2012", split="train[:99%]"),
    pp=(
      f"decode_jpeg_and_inception_crop({arg.res})|flip_lr|value_range(-1,1)"
      "|keep('image','label')"
    ),
    image_size=(arg.res, arg.res),
    batch_size=512,
    shuffle_buffer_size=50_000,
  )

  config.model_name = source.model_name
  config.model = {**source.model.to_dict(), "head_bias_init": 0.0}
  common.fit_large(config)
  config.grids = source.grids
  config.model_init = arg["from"]

  config.optax_name = "sgd"
  config.optax = dict(momentum=0.9, dtype="bfloat16")
  config.grad_clip_norm = 1.0
  config.lr = 0.03
  config.schedule = dict(warmup_steps=500, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 1000

  def evaluation(split):
    return dict(
      type="classification",
      data=dict(name="imagenet2012", split=split),
      pp_fn=(
        f"decode|resize_small({arg.res * 7 // 6})|central_crop({arg.res})"
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
