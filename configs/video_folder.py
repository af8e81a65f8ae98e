r"""Your own videos, in folders of classes.

    FOLDER/train/CLASS/*.mp4 (or .webm, .mkv, .avi, .mov)
    FOLDER/val/CLASS/*.mp4

    python -m lookup_vit.train --config=configs/video_folder.py:folder=FOLDER \
        --workdir=workdirs/mine
    python -m lookup_vit.dryrun --topology=v5e:2x2 \
        --config=configs/video_folder.py:folder=FOLDER

Arguments: `model=vit` for the baseline, `variant`, `res`, `epochs`, `batch`;
`frames` of a clip, and the `stride` between them, of 25 frames a second;
`init=WORKDIR` starts from another run of the same kind of model, on videos or
on images; `flip=false` is for classes that tell left from right;
`on_error=skip` leaves out videos that cannot be read; `val=SPLIT` names the
held-out split, also a part of another as `train[90%:]` (then
`train=train[:90%]`).

The videos are stored as JPEG frames on first use, and again when the folder has
changed, which wants ffmpeg: `pip install imageio-ffmpeg` brings one.

Augmentation and regularisation are ViViT's for small sets, those of Epic
Kitchens in table 7 of arXiv:2103.15691; optimizer and schedule are those of
`image_folder.py`.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    folder="",
    train="train",
    val="val",
    on_error="fail",
    model="lookup_vit",
    variant="S/2x16",
    res=224,
    frames=16,
    stride=4,
    flip=True,
    epochs=50.0,
    batch=16,
    init="",
    seed=0,
    runlocal=False,
  )
  if arg.runlocal:
    arg.variant, arg.res, arg.frames = "mu/2x16", 80, 8
  elif not arg.folder or arg.batch < 1:
    raise ValueError("video_folder.py wants folder=FOLDER, and batch >= 1.")
  config = ml_collections.ConfigDict()

  config.seed = arg.seed
  config.total_epochs = arg.epochs
  config.num_classes = None  # as many as there are folders
  config.loss = "softmax_xent"
  config.label_smoothing = 0.2
  config.mixup = dict(p=0.1)

  data = dict(
    module="data.video_folder", folder=arg.folder, on_error=arg.on_error
  )
  config.input = dict(
    data=dict(split=arg.train, **data),
    pp=(
      f"sample_clip({arg.frames},{arg.stride})|decode_clip"
      f"|jitter_scale({common.short_side(arg.res)})|random_crop({arg.res})"
      f"{'|flip_lr' if arg.flip else ''}|randaug(2,15,geometric=False)"
      f"|unfold_clip({arg.frames})|value_range(-1,1)|keep('image','label')"
    ),
    image_size=(arg.frames, arg.res, arg.res),
    batch_size=arg.batch,
    shuffle_buffer_size=64,  # A video of a minute has 30 MB.
  )

  config.model_name = arg.model
  config.model = dict(
    variant=arg.variant,
    stochastic_depth=0.2,
    scan=True,
    remat_policy="nothing_saveable",
  )
  if arg.model == "lookup_vit":
    common.look_up(config)
  common.start_from(config, arg.init)

  config.optax_name = "adamw"
  config.grad_clip_norm = 1.0
  config.lr = 1e-3 * (arg.batch / 1024) ** 0.5
  config.wd = 1e-4
  config.schedule = dict(warmup_percent=0.05, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 500
  config.evals = common.video_evals(
    dict(split=arg.val, **data), arg.res, arg.frames, arg.stride, log_steps=500
  )

  if arg.runlocal:
    common.run_local_video(config)
  return config
