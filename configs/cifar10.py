r"""CIFAR-10, or other images of 32 x 32 pixels, in folders of classes.

    FOLDER/train/CLASS/*.png (or .jpg)
    FOLDER/val/CLASS/*.png

    python -m lookup_vit.train --workdir=workdirs/cifar10_lookup \
        --config=configs/cifar10.py:folder=FOLDER
    python -m lookup_vit.train --workdir=workdirs/cifar10_vit \
        --config=configs/cifar10.py:folder=FOLDER,model=vit
    python -m lookup_vit.dryrun --topology=cpu:8 \
        --config=configs/cifar10.py:folder=FOLDER

Arguments: `model=vit` for the baseline; `width`, `depth` and `heads`; `stem`,
"patch", "conv" or "deep_conv"; `epochs`, `batch`, `seed`; `augreg`, one of
AugReg's presets beside shifts and flips, for trainings of 100 epochs and more;
`init=WORKDIR` starts from another run, of LookupViT or ViT; `train` and `val`
name the splits; `runlocal` for a run of seconds.

The default is a model that a CPU trains in hours: small batches are fastest
there, as what they take fits into the cache. Both models have a stem of
convolutions (after arXiv:2106.14881; see models/tokens.py), as linear patches
take many more epochs on so few images. The learning rate was not searched for;
it scales with the batch by its square root. Crops after padding by four pixels,
and flips, are ResNet's augmentation (arXiv:1512.03385, 4.2). All else is as in
`image_folder.py`.
"""

from configs import common, image_folder


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    folder="",
    train="train",
    val="val",
    model="lookup_vit",
    width=128,
    depth=2,
    heads=4,
    stem="deep_conv",
    epochs=17.0,
    batch=32,
    augreg="none",
    init="",
    seed=0,
    runlocal=False,
  )
  randaug, mixup = common.augreg(arg.augreg)
  given = dict(variant="Ti/4", res=32)
  for name in ("folder", "train", "val", "model", "epochs", "batch", "seed"):
    given[name] = arg[name]
  given["init"] = arg.init
  if arg.runlocal:
    given["folder"] = "none"
  config = image_folder.get_config(
    ",".join(f"{name}={value}" for name, value in given.items())
  )

  ops = ["decode", "pad(40)", "random_crop(32)", "flip_lr", randaug]
  ops += ["value_range(-1,1)", "keep('image','label')"]
  config.input.pp = "|".join(filter(None, ops))
  config.evals.val.pp_fn = (
    "decode|central_crop(32)|value_range(-1,1)|keep('image','label')"
  )
  config.evals.val.log_steps = 5_000
  config.mixup = mixup

  config.model.update(
    width=arg.width,
    depth=arg.depth,
    num_heads=arg.heads,
    stem=arg.stem,
    scan=False,
  )
  if arg.model == "lookup_vit":
    config.grids = [(3, 3), (4, 4), (5, 5)]
    config.model.grid = (4, 4)
  config.lr = 1e-3 * (arg.batch / 32) ** 0.5

  if arg.runlocal:
    config.model.depth = 1
    common.run_local(config)
  return config
