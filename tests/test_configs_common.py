"""What config files share."""

import pytest

from configs import common, image_folder, in1k_lookup_b


def fails(function, *args, words, error=ValueError):
  with pytest.raises(error) as e:
    function(*args)
  for word in words:
    assert word in str(e.value), str(e.value)


def parse(arg):
  config = common.parse_arg(
    arg, variant="B/16", res=224, lr=0.5, runlocal=False, long=True
  )
  return config.to_dict()


@pytest.mark.parametrize(
  "arg, want",
  [
    (None, {}),
    ("", {}),
    ("res=384", dict(res=384)),
    ("variant=L/16,res=384,lr=1e-3", dict(variant="L/16", res=384, lr=1e-3)),
    (" res = 96 , runlocal ", dict(res=96, runlocal=True)),
    ("runlocal", dict(runlocal=True)),
    ("runlocal=True,long=false", dict(runlocal=True, long=False)),
    ("variant=", dict(variant="")),
    ("lr=2,,", dict(lr=2.0)),
    ("variant=a=b", dict(variant="a=b")),
    ("res=1,res=2", dict(res=2)),
  ],
)
def test_parse_arg(arg, want):
  defaults = dict(variant="B/16", res=224, lr=0.5, runlocal=False, long=True)
  got = parse(arg)
  assert got == defaults | want
  assert [type(got[k]) for k in defaults] == [str, int, float, bool, bool]


@pytest.mark.parametrize(
  "arg, words",
  [
    ("size=3", ["'size'", "variant, res, lr, runlocal, long"]),
    ("res=big", ["res='big'", "int", "res=224"]),
    ("res=1.5", ["res='1.5'", "int"]),
    ("lr=x", ["lr='x'", "float"]),
    ("runlocal=1", ["runlocal='1'", "bool"]),
    ("res", ["res"]),
    ("variant", ["variant", "variant=..."]),
  ],
)
def test_parse_arg_errors(arg, words):
  fails(parse, arg, words=words)


def test_augreg():
  """Figure 4 of arXiv:2106.10270; also big_vision's vit_i21k.py."""
  layers_magnitude_mixup = {
    "none": None,
    "light1": (2, 0, 0.0),
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
  }
  for name, want in layers_magnitude_mixup.items():
    randaug, mixup = common.augreg(name)
    if want is None:
      assert (randaug, mixup) == ("", dict(p=0.0))
    else:
      assert randaug == f"randaug({want[0]},{want[1]})"
      assert mixup == dict(p=want[2])
  fails(common.augreg, "heavy", words=["'heavy'", "'medium1'"])


@pytest.mark.parametrize(
  "variant, res, want",
  [
    ("B/16", 224, [3, 5, 7, 10]),
    ("B/16", 160, [3, 5, 7, 10]),
    ("B/16", 144, [3, 5, 7]),
    ("S/32", 224, [3, 5, 7]),
    ("S/32", 64, [2]),
  ],
)
def test_lookup_grids_fit_the_lookup_grid(variant, res, want):
  arg = f"variant={variant},res={res}"
  for config in (
    in1k_lookup_b.get_config(arg),
    image_folder.get_config(f"{arg},folder=x"),
  ):
    assert list(config.grids) == [(g, g) for g in want]
    assert config.model.grid in config.grids
