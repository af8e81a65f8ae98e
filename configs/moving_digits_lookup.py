r"""Multi-resolution LookupViViT on moving digits: the class is the motion.

    python -m lookup_vit.train --config=configs/moving_digits_lookup.py \
        --workdir=workdirs/moving_digits_lookup
    python -m lookup_vit.dryrun --topology=cpu:8 \
        --config=configs/moving_digits_lookup.py

Arguments: `seed`, `epochs`, and `runlocal` for a run of seconds; `grid=4x2x2`
trains at one grid. `still` shows one frame for the whole clip, a random one in
training and the eighth in evaluation: what a model can know without motion.
`task=glyph` asks which digit it is instead.
"""

import ml_collections

from configs import common
from lookup_vit import config_utils

_CLASSES = {"motion": 8, "glyph": 10}


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    seed=0,
    epochs=6.0,
    grid="",
    task="motion",
    still=False,
    runlocal=False,
  )
  if arg.task not in _CLASSES:
    raise ValueError(
      f"Config argument task={arg.task!r}: want one of {', '.join(_CLASSES)}."
    )
  module = f"data.moving_digits/{arg.task}"
  seen = 1 if arg.still else 16
  to_video = "unfold_clip(16)|value_range(-1,1)|keep('image','label')"
  if arg.still:
    to_video = f"still_clip(16)|{to_video}"
  config = ml_collections.ConfigDict()

  config.seed = arg.seed
  config.total_epochs = arg.epochs
  config.num_classes = _CLASSES[arg.task]
  config.loss = "softmax_xent"
  config.label_smoothing = 0.1

  config.input = dict(
    data=dict(module=module, split="train"),
    pp=f"sample_clip({seen})|decode_clip|{to_video}",
    image_size=(16, 32, 32),
    batch_size=32,
    shuffle_buffer_size=12_000,
  )

  config.model_name = "lookup_vit"
  config.model = dict(variant="Ti/2x8", width=64, depth=4, num_heads=2)
  # Fixed positions know early from late everywhere at once; learned ones stay
  # long at 75 %, where the order of there and back is not told.
  config.model.positions = "sincos"
  config.model.grid = (4, 2, 2)
  config.grids = [(2, 2, 2), (4, 2, 2), (4, 3, 3)]
  if arg.grid:
    config.model.grid = config_utils.parse_grid(arg.grid)
    config.grids = None

  config.optax_name = "adamw"
  config.grad_clip_norm = 1.0
  config.lr = 1e-3
  config.wd = 1e-4
  config.schedule = dict(warmup_percent=0.1, decay_type="cosine")

  config.log_training_steps = 50
  config.ckpt_steps = 500
  config.evals = dict(
    test=dict(
      type="classification",
      data=dict(module=module, split="test"),
      pp_fn=f"central_clip({seen})|decode_clip|{to_video}",
      log_steps=1000,
    )
  )

  if arg.runlocal:
    config.model.depth = 1
    common.run_local_video(config, module, _CLASSES[arg.task])
  return config
