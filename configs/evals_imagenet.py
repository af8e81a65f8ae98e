r"""Evaluators of classifiers of ImageNet-1k: validation, shifts, corruptions.

    python -m lookup_vit.evaluate --workdir=workdirs/in1k_lookup_b \
        --evals=configs/evals_imagenet.py:res=224

docs/evaluation.md says what each of them measures, docs/data.md how the data
sets are prepared. Arguments: `res`, the image size of the model; `batch`, the
global batch size, that of training where it is not set; `on_the_fly` to corrupt
validation images rather than to read `imagenet2012_corrupted`.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  """Evaluators by name, as `config.evals`."""
  arg = common.parse_arg(arg, res=224, batch=0, on_the_fly=False)
  ops = f"resize_small({common.short_side(arg.res)})|central_crop({arg.res})"
  end = "value_range(-1,1)|keep('image','label')"
  pp_fn = f"decode|{ops}|{end}"
  real_label = "onehot(1000,'real_label','labels')|keep('image','labels')"
  validation = dict(name="imagenet2012", split="validation")

  evals = ml_collections.ConfigDict()
  evals.val = dict(type="classification", data=validation)
  evals.real = dict(
    type="classification",
    data=dict(name="imagenet2012_real", split="validation"),
    pp_fn=f"decode|{ops}|value_range(-1,1)|{real_label}",
  )
  evals.v2 = dict(
    type="classification",
    data=dict(name="imagenet_v2/matched-frequency", split="test"),
  )
  evals.sketch = dict(
    type="classification", data=dict(name="imagenet_sketch", split="test")
  )
  for key in ("a", "r"):  # They have 200 of the 1000 classes.
    evals[key] = dict(
      type="classification",
      data=dict(name=f"imagenet_{key}", split="test"),
      classes="present",
    )
  evals.c = dict(type="robustness", data=validation, reference="alexnet")
  if not arg.on_the_fly:
    evals.c.corrupted = "imagenet2012_corrupted/{corruption}_{severity}"
    # They are the central 224 of 256 pixels already.
    evals.c.corrupted_pp_fn = f"decode|resize({arg.res},antialias=True)|{end}"
  evals.o = dict(
    type="out_of_distribution",
    data=dict(module="data.imagenet_o", split="test"),
    inliers=validation,
  )
  for evaluator in evals.values():
    evaluator.pp_fn = evaluator.get("pp_fn", pp_fn)
    evaluator.batch_size = arg.batch or None
  return evals
