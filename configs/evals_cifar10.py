r"""Evaluators of what corruptions do to a run of `cifar10.py`.

    python -m lookup_vit.evaluate --workdir=workdirs/cifar10_lookup \
        --evals=configs/evals_cifar10.py:folder=FOLDER

All 15 corruptions at 5 severities, of `split`: by default a fifth of the images
under FOLDER/val, as each image is read 75 times by either evaluator.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  """Evaluators by name, as `config.evals`."""
  arg = common.parse_arg(arg, folder="", split="val[:20%]")
  if not arg.folder:
    raise ValueError("evals_cifar10.py wants folder=FOLDER.")
  return ml_collections.ConfigDict(
    {
      kind: dict(
        type=kind,
        data=dict(folder=arg.folder, split=arg.split),
        pp_fn="decode|central_crop(32)|value_range(-1,1)|keep('image','label')",
        batch_size=100,
      )
      for kind in ("robustness", "feature_distance")
    }
  )
