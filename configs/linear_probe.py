r"""A linear classifier on the frozen backbone of a run, trained by SGD.

The recipe is MAE's (arXiv:2111.06377, appendix A.1, table 10): LARS with a base
learning rate of 0.1 for 256 images, no weight decay, 90 epochs, 10 of them
warm-up, batches of 16,384, random crops and flips, features normalised without
learned scale. Crops and flips are MAE's for images of any size, whatever the
run had. On other data than ImageNet-1k the batch is for you to choose.

    python -m lookup_vit.train --workdir=workdirs/probe \
        --config=configs/linear_probe.py:from=workdirs/in21k_lookup_b
    python -m lookup_vit.dryrun --topology=v5e:8x8 \
        --config=configs/linear_probe.py:from=configs/in21k_lookup_b.py

`from` is the work directory of the run whose backbone it is; model, grids and
image size are its own. For a dry run it may be a config, that of a run to come.
Other arguments: `data`, of TFDS, or a module such as `data.digits`, or a folder
of images (`folder=FOLDER`), with `train` and `val`, its splits; `features`, of
LookupViT, `compressed`, `lookup` or `both`; `block`, whose tokens are averaged
(-1 is the last); `batch`, `epochs`, `seed`. `runlocal` is for a trial, from a
run that was made with `runlocal`.
"""

import ml_collections

from configs import common
from lookup_vit import config_utils


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    **{"from": ""},
    data="imagenet2012",
    folder="",
    train="train",
    val="validation",
    features="",
    block="",
    batch=16_384,
    epochs=90.0,
    seed=0,
    runlocal=False,
  )
  if not arg["from"]:
    raise ValueError("linear_probe.py wants the run to probe: from=...")
  if arg["from"].endswith(".py"):
    source = config_utils.resolve(config_utils.load(arg["from"]))
  else:
    source = config_utils.read_workdir(arg["from"])
  if len(source.input.image_size) != 2:
    raise ValueError("linear_probe.py: from=... wants a run on images.")
  res = source.input.image_size[0]
  config = ml_collections.ConfigDict()

  config.seed = arg.seed
  config.total_epochs = arg.epochs
  config.num_classes = None  # as many as the data have
  config.loss = "softmax_xent"

  kind = "module" if arg.data.startswith("data.") else "name"
  data = {"folder": arg.folder} if arg.folder else {kind: arg.data}
  config.input = dict(
    data=dict(split=arg.train, **data),
    pp=(
      f"decode_jpeg_and_inception_crop({res},8)|flip_lr|value_range(-1,1)"
      "|keep('image','label')"
    ),
    image_size=source.input.image_size,
    batch_size=arg.batch,
    shuffle_buffer_size=50_000,
  )

  encoder = source.model.to_dict()
  if "encoder" in encoder:  # A captioner's.
    encoder = encoder["encoder"]
  else:
    encoder["model_name"] = source.model_name
    encoder.pop("head_bias_init", None)
    encoder.pop("heads", None)
  config.model_name = "probe"
  config.model = dict(encoder=encoder)
  if arg.features:
    config.model.features = arg.features
  if arg.block:
    config.model.block = int(arg.block)
  config.grids = source.grids
  config.model_init = arg["from"]

  config.optax_name = "lars"
  config.lr = 0.1 * arg.batch / 256
  config.schedule = dict(warmup_percent=1 / 9, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 500
  config.evals = dict(
    val=dict(
      type="classification",
      data=dict(split=arg.val, **data),
      pp_fn=(
        f"decode|resize_small({common.short_side(res)})|central_crop({res})"
        "|value_range(-1,1)|keep('image','label')"
      ),
      log_steps=1000,
    )
  )

  if arg.runlocal:
    common.run_local(config)
  return config
