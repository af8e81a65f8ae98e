r"""Your own images, in folders of classes.

    FOLDER/train/CLASS/*.jpg (or .png)
    FOLDER/val/CLASS/*.jpg

    python -m lookup_vit.train --config=configs/image_folder.py:folder=FOLDER \
        --workdir=workdirs/mine
    python -m lookup_vit.dryrun --topology=v5e:2x2 \
        --config=configs/image_folder.py:folder=FOLDER

Arguments: `model=vit` for the baseline, `variant`, `res`, `epochs`, `batch`;
`init=WORKDIR` starts from another run, and `init=FILE` from a published ViT
(docs/warm_start.md); `on_error=skip` leaves out images that cannot be read;
`val=SPLIT` names the held-out split, also a part of another as `train[90%:]`
(then `train=train[:90%]`).

The recipe is AugReg's for small data (arXiv:2106.10270): medium augmentation,
here in softmax form; the learning rate is that of ViT-S on ImageNet
(arXiv:2205.01580), whose batch is 1024, scaled to the batch by its square root.
"""

import ml_collections

from configs import common
from lookup_vit import config_utils


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    folder="",
    train="train",
    val="val",
    on_error="fail",
    model="lookup_vit",
    variant="S/16",
    res=224,
    epochs=100.0,
    batch=128,
    init="",
    seed=0,
    runlocal=False,
  )
  if arg.runlocal:
    arg.variant, arg.res = "mu/16", 96
  elif not arg.folder or arg.batch < 1:
    raise ValueError("image_folder.py wants folder=FOLDER, and batch >= 1.")
  randaug, mixup = common.augreg("medium1")
  config = ml_collections.ConfigDict()

  config.seed = arg.seed
  config.total_epochs = arg.epochs
  config.num_classes = None  # as many as there are folders
  config.loss = "softmax_xent"
  config.label_smoothing = 0.1
  config.mixup = mixup

  data = dict(folder=arg.folder, on_error=arg.on_error)
  config.input = dict(
    data=dict(split=arg.train, **data),
    pp=(
      f"decode_jpeg_and_inception_crop({arg.res})|flip_lr|{randaug}"
      "|value_range(-1,1)|keep('image','label')"
    ),
    image_size=(arg.res, arg.res),
    batch_size=arg.batch,
    shuffle_buffer_size=50_000,
  )

  config.model_name = arg.model
  config.model = dict(variant=arg.variant, scan=True)
  if arg.model == "lookup_vit":
    config.grids = common.lookup_grids(arg.variant, arg.res)
    config.model.grid = (5, 5) if (5, 5) in config.grids else config.grids[-1]
  if arg.init:
    config.model_init = arg.init
    # That a LookupViT starts from a ViT by; here, to be overridden.
    mapping = config_utils.DEFAULTS["model_init_mapping"]
    config.model_init_mapping = dict(mapping)

  config.optax_name = "adamw"
  config.grad_clip_norm = 1.0
  config.lr = 1e-3 * (arg.batch / 1024) ** 0.5
  config.wd = 1e-4
  config.schedule = dict(warmup_percent=0.05, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 500
  config.evals = dict(
    val=dict(
      type="classification",
      data=dict(split=arg.val, **data),
      pp_fn=(
        f"decode|resize_small({arg.res * 8 // 7})|central_crop({arg.res})"
        "|value_range(-1,1)|keep('image','label')"
      ),
      log_steps=500,
    )
  )

  if arg.runlocal:
    common.run_local(config)
  return config
