"""configs/ablation.py: what each variation is, and that a program can be."""

import re
import subprocess

import pytest

from configs import ablation, digits_lookup, image_folder
from lookup_vit import config_utils, train_step


def resolved(config):
  return config_utils.resolve(config).to_dict()


def differences(config, base):
  """What it learns by that the base does not, by field."""
  lines = config_utils.differences(resolved(base), resolved(config))
  return {line.partition(": ")[0]: line.split(", now ")[1] for line in lines}


@pytest.mark.parametrize("name", ablation.VARIATIONS)
def test_every_variation_is_the_base_but_for_its_fields(name):
  config = ablation.get_config(f"name={name},seed=2,epochs=3")
  base = digits_lookup.get_config("seed=2,epochs=3")
  want = {
    f"model.{field}": repr(list(v) if field == "grid" else v)
    for field, v in ablation.VARIATIONS[name].items()
  }
  if "grid" in ablation.VARIATIONS[name]:
    want["grids"] = "None"
  if name == "grid_3x3":  # That of the base's model itself.
    del want["model.grid"]
  assert differences(config, base) == want
  assert config.log_attention_logit
  # Less to trace.
  config.model.depth = 1
  config.grids = config.grids and config.grids[:1]
  program = train_step.Program(config_utils.resolve(config), 9)
  grid = ablation.VARIATIONS[name].get("grid")
  assert program.grids == [grid or (2, 2)]


def test_variations_are_no_defaults():
  config = config_utils.resolve(digits_lookup.get_config())
  default = train_step.build_model(config)
  assert ablation.VARIATIONS["default"] == {}
  for name, fields in ablation.VARIATIONS.items():
    for field, value in fields.items():
      own = getattr(default, field)
      if field == "mhbc_heads":
        own = default.num_heads
      assert name.startswith("grid_") or own != value


@pytest.mark.parametrize(
  "arg, want",
  [
    ("size=small", {"model.width": "64"}),
    (
      "size=large,lr=0.01",
      {
        "model.width": "128",
        "model.depth": "6",
        "model.num_heads": "4",
        "lr": "0.01",
      },
    ),
    ("qk_norm,clip=0", {"model.qk_norm": "True", "grad_clip_norm": "None"}),
    ("clip=0.5,qk_norm=false", {"grad_clip_norm": "0.5"}),
    (
      "name=reuse_none,size=large,runlocal",
      {
        "model.reuse": "'none'",
        "model.width": "128",
        "model.num_heads": "4",
      },
    ),
  ],
)
def test_stability(arg, want):
  runlocal = "runlocal" if "runlocal" in arg else ""
  base = digits_lookup.get_config(runlocal)
  found = differences(ablation.get_config(arg), base)
  assert found == {k: v for k, v in want.items() if v != "64"}


def test_images_of_a_folder():
  arg = "folder=/data/x,variant=Ti/4,res=32,batch=64,val=train[90%:],seed=1"
  config = ablation.get_config(f"name=init_learned,{arg}")
  found = differences(config, image_folder.get_config(arg))
  assert found == {"model.compressed_init": "'learned'"}
  assert config.evals.val.data.split == "train[90%:]"


@pytest.mark.parametrize(
  "arg, words",
  [
    ("name=none", "name='none': want one of default, grid_2x2"),
    ("size=huge", "size='huge': want one of small, large"),
    ("variant=S/4", "Unknown config argument 'variant'"),
    ("nam=x", "Unknown config argument 'nam'; there are name, size, lr"),
    ("lr=fast", "lr='fast'"),
  ],
)
def test_errors(arg, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    ablation.get_config(arg)


def test_the_launcher_s_sets_are_those_of_the_config():
  """Every variation once; and stability over two sizes, with five rates."""
  with open("launch/ablations.sh") as f:
    (function,) = re.findall(r"^runs_of\(\) \{.*?^\}", f.read(), re.M | re.S)

  def runs_of(name):
    script = f"{function}\nruns_of {name}"
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.check_output(command, text=True).split()

  names = [arg.removeprefix("name=") for arg in runs_of("variations")]
  assert list(dict.fromkeys(names)) == list(ablation.VARIATIONS)
  found = []
  for part in ("grid", "reuse", "heads", "init", "mlp", "mhbc"):
    found += runs_of(part)
  assert found == runs_of("variations")

  base = digits_lookup.get_config()
  found = [
    differences(ablation.get_config(arg), base) for arg in runs_of("stability")
  ]
  assert len({str(x) for x in found}) == len(found) == 2 * 2 * 2 * 5
  assert {} in found
