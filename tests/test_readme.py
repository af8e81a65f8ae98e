"""The README says what works."""

import os
import pathlib
import re

import pytest

_TEXT = pathlib.Path("README.md").read_text()


def test_python_runs():
  (code,) = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
  code = code.replace("B/16", "Ti/16")  # The same, in less time.
  scope = {}
  exec(compile(code, "README.md", "exec"), scope)
  assert scope["logits"].shape == (8, 1000)
  assert scope["out"]["attention"].shape == (12, 8, 3, 25, 196)


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)]+)\)", _TEXT))
def test_links_lead_somewhere(path):
  assert os.path.exists(path.split("#")[0])


def test_layout_and_configs_are_those_there_are():
  for name in os.listdir("configs"):
    if name.endswith(".py") and name != "common.py":
      assert name in _TEXT
  for name in re.findall(r"configs/\w+\.py|launch/\w+\.sh", _TEXT):
    assert os.path.exists(name)
  layout = _TEXT.split("## Layout")[1].split("```")[1]
  for name in os.listdir("lookup_vit"):
    if not name.startswith("_"):
      assert name.removesuffix(".py") in layout, name
