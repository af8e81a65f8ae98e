"""Tests of lookup_vit/train_step.py: parts that a config names."""

import pytest

from lookup_vit import train_step
from lookup_vit.models import vit


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package where Python looks, with modules that are right and wrong."""
  monkeypatch.syspath_prepend(tmp_path)
  folder = tmp_path / "parts_of_ones_own"
  folder.mkdir()
  (folder / "model.py").write_text("Model = 3")
  (folder / "empty.py").write_text("")
  (folder / "broken.py").write_text("import parts_of_others")
  (folder / "wrong.py").write_text("import os\nos.no_such_function")
  return folder.name


def _model(name):
  return train_step.import_part("models", name, "Model", "config.model_name")


def test_parts_of_the_package_and_of_ones_own(package):
  assert _model("vit") is vit.Model
  assert _model("lookup_vit.models.vit") is vit.Model
  assert _model(f"{package}.model") == 3


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("vitt", ["lookup_vit/models/vitt.py", "Model", "my_package.vitt"]),
    (None, ["config.model_name=None"]),
    (3, ["config.model_name=3"]),
    ("layers", ["lookup_vit/models/layers.py with Model"]),
    (".vit", ["config.model_name='.vit'"]),
    (".a.b", ["config.model_name='.a.b'"]),
    (
      "parts_of_nobody.model",
      ["no module parts_of_nobody.model", "PYTHONPATH"],
    ),
    ("parts_of_ones_own.modell", ["no module parts_of_ones_own.modell"]),
    ("parts_of_ones_own.empty", ["parts_of_ones_own.empty with Model"]),
  ],
)
def test_a_part_that_there_is_not(package, name, words):
  with pytest.raises(ValueError, match=r"^config\.model_name=") as e:
    _model(name)
  for word in words:
    assert word in str(e.value)


def test_what_a_module_itself_lacks_is_not_hidden(package):
  with pytest.raises(ModuleNotFoundError, match="parts_of_others"):
    _model(f"{package}.broken")
  with pytest.raises(AttributeError, match="no_such_function"):
    _model(f"{package}.wrong")
