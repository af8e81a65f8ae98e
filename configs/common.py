"""What config files share: arguments, AugReg's presets, and small trials."""

from typing import Any

import ml_collections

from lookup_vit import config_utils
from lookup_vit.models import tokens
from lookup_vit.models.variants import decode_variant

# RandAugment and mixup of AugReg's presets (arXiv:2106.10270, figure 4, by
# big_vision's configs/vit_i21k.py).
_AUGREG = {
  "none": ("", 0.0),
  "light1": ("randaug(2,0)", 0.0),
  "light2": ("randaug(2,10)", 0.2),
  "medium1": ("randaug(2,15)", 0.2),
  "medium2": ("randaug(2,15)", 0.5),
  "strong1": ("randaug(2,20)", 0.5),
  "strong2": ("randaug(2,20)", 0.8),
}

# Of data/digit_captions.
TOKENIZER = "data/digit_captions/tokenizer.model"


def augreg(name: str) -> tuple[str, dict[str, float]]:
  """The op-string and the `config.mixup` of an AugReg preset.

  Raises:
    ValueError: there is no such preset.
  """
  if name not in _AUGREG:
    raise ValueError(f"AugReg preset {name!r}: want one of {list(_AUGREG)}.")
  randaug, p = _AUGREG[name]
  return randaug, dict(p=p)


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
  """Reads `"variant=L/16,res=384,runlocal"` as big_vision's configs do.

  Args:
    arg: what stands behind the colon of `--config=FILE:ARG`.
    **defaults: the arguments there are; each is read as its default's type.

  Raises:
    ValueError: an unknown argument, or a value of another type.
  """
  values = dict(defaults)
  for item in (arg or "").split(","):
    name, eq, text = (part.strip() for part in item.partition("="))
    if not name:
      continue
    if name not in defaults:
      raise ValueError(
        f"Unknown config argument {name!r}; there are {', '.join(defaults)}."
      )
    kind = type(defaults[name])
    try:
      if kind is bool:
        values[name] = dict(true=True, false=False)[(text or "true").lower()]
      else:
        values[name] = kind(text)
    except (KeyError, ValueError):
      raise ValueError(
        f"Config argument {name}={text!r}: want a value of type "
        f"{kind.__name__}, such as {name}={defaults[name]}."
      ) from None
    if kind is not bool and not eq:
      raise ValueError(f"Config argument {name} wants a value: {name}=...")
  return ml_collections.ConfigDict(values)


def fit_large(config: ml_collections.ConfigDict) -> None:
  """Lets models of size L, H and g fit into chips with 16 GB.

  L and larger keep less for the backward pass, where the config does not say
  what to keep; the state of H and g is split over eight chips, so that their
  number must be a multiple of eight. Of a captioner, it is the encoder's size
  that counts.
  """
  model = config.model.get("encoder", config.model)
  size = model.get("variant", "B/16").split("/")[0]
  if size in ("L", "H", "g") and "remat_policy" not in model:
    model.remat_policy = "dots_with_no_batch_dims_saveable"
  if size in ("H", "g"):
    config.mesh = [("data", -1), ("fsdp", 8)]
    config.sharding = "fsdp"


def lookup_grids(variant: str, res: int) -> list[tuple[int, int]]:
  """The paper's multi-resolution set, as far as it fits the lookup grid."""
  side = res // decode_variant(variant)["patch_size"][-1]
  return [(g, g) for g in (3, 5, 7, 10) if g <= side] or [(side, side)]


def video_grids(
  variant: str, image_size: tuple[int, int, int]
) -> list[tuple[int, int, int]]:
  """LookupViViT's multi-resolution set, as far as it fits the lookup grid.

  Of the 16x14x14 tokens of 32 frames at 224 pixels it leaves 100, 200 and 392.

  Raises:
    ValueError: the tubelets of the variant do not divide the clip.
  """
  patch = decode_variant(variant)["patch_size"]
  with config_utils.at_fault("config.input.image_size"):
    full = tokens.lookup_grid(image_size, patch)
  fits = [
    grid
    for grid in [(4, 5, 5), (8, 5, 5), (8, 7, 7)]
    if all(g <= n for g, n in zip(grid, full, strict=True))
  ]
  return fits or [full]


def look_up(config: ml_collections.ConfigDict) -> None:
  """Makes a multi-resolution LookupViViT of a ViViT, joint or factorised."""
  variant, size = config.model.variant, config.input.image_size
  if config.model_name == "factorised":
    config.model.spatial = "lookup_vit"
    # Every slice in time has such a grid of its own.
    grids = lookup_grids(variant, size[-1])
    config.grids = [grid for grid in grids if grid != (10, 10)]
  else:
    config.model_name = "lookup_vit"
    config.grids = video_grids(variant, size)
  config.model.grid = config.grids[len(config.grids) // 2]


def video_evals(
  data: dict[str, Any], res: int, frames: int, stride: int, log_steps: int
) -> dict[str, Any]:
  """Evaluators of a video set, with views as ViViT has them.

  `val` sees the clip in the middle of a video, its central crop, every
  `log_steps`; `val_4x3` four clips of it, three crops of each, at the end.
  """
  resize = f"decode_clip|resize_small({short_side(res)},'bilinear')"
  end = "value_range(-1,1)|keep('image','label')"
  one = (
    f"central_clip({frames},{stride})|{resize}|central_crop({res})"
    f"|unfold_clip({frames})|{end}"
  )
  views = (
    f"temporal_views({frames},{stride},4)|{resize}|spatial_views({res},3)"
    f"|unfold_views({frames})|{end}"
  )

  def evaluation(**fields):
    return dict(type="classification", data=dict(data), **fields)

  return dict(
    val=evaluation(pp_fn=one, log_steps=log_steps),
    val_4x3=evaluation(pp_fn=views, views=12),
  )


def caption_ops(ops: str, tokenizer: str, max_length: int) -> str:
  """Of TFDS's coco_captions and what is like it, a batch to train on.

  An image has one of its captions, another in each epoch, in lower case.

  Args:
    ops: of the image.
    tokenizer: path of a SentencePiece model.
    max_length: ids of a caption.
  """
  return (
    f"{ops}|flatten|choice('captions/text','caption')|lower('caption')"
    f"|tokenize({tokenizer!r},{max_length})|keep('image','text','text_cut')"
  )


def read_all_tokens(config: ml_collections.ConfigDict) -> None:
  """Makes a ViT of a LookupViT; it may be the encoder of a captioner."""
  if config.model_name == "captioner":
    config.model.encoder.model_name = "vit"
  else:
    config.model_name = "vit"
  config.grids = None
  del config.model.get("encoder", config.model)["grid"]


def short_side(res: int) -> int:
  """The short side that crops of `res` are taken from, 256 for 224."""
  return -(-res * 8 // 7)


def start_from(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Starts a video model from another run, on videos or on images; "": none."""
  if workdir:
    config.model_init = workdir
    config.model_init_inflation = "central"


def run_local(config: ml_collections.ConfigDict) -> None:
  """Makes a config's run a matter of seconds: few steps on the digits.

  Model and image size are for the config itself to make small.
  """
  for model in (config.model, config.model.get("encoder", {})):
    if "dtype" in model:
      model.dtype = "float32"  # CPUs compile it in less time.
  config.num_classes = 10
  config.input.data = dict(module="data.digits", split="train[:64]")
  config.input.batch_size = 8
  config.input.shuffle_buffer_size = 64
  for evaluator in config.evals.values():
    evaluator.data = dict(module="data.digits", split="test[:20]")
    evaluator.log_steps = None
  config.total_steps = 6
  config.total_epochs = None
  config.schedule = dict(warmup_steps=2, decay_type="cosine")
  config.log_training_steps = 2
  config.ckpt_steps = 3


def run_local_video(
  config: ml_collections.ConfigDict,
  module: str = "data.moving_digits",
  num_classes: int | None = 8,
) -> None:
  """As `run_local`, on digits that move: 16 frames each, 8 motions."""
  run_local(config)
  config.num_classes = num_classes
  config.input.data = dict(module=module, split="train[:64]")
  for evaluator in config.evals.values():
    evaluator.data = dict(module=module, split="test[:20]")


def run_local_captions(config: ml_collections.ConfigDict) -> None:
  """As `run_local`, at one grid, on captions of digits.

  Their tokenizer is `TOKENIZER`, which is for the config itself to take.
  """
  run_local_video(config, "data.digit_captions", None)
  config.grids = config.grids and config.grids[:1]
  for evaluator in config.evals.values():
    evaluator.metrics = ["CIDEr"]  # METEOR takes seconds to start.
