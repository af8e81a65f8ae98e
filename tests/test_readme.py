"""The README says what works."""

import os
import pathlib
import re

_TEXT = pathlib.Path("README.md").read_text()


def test_python_runs():
  code, _ = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
  code = code.replace("B/16", "Ti/16")  # The same, in less time.
  scope = {}
  exec(compile(code, "README.md", "exec"), scope)
  assert scope["logits"].shape == (8, 1000)
  assert scope["out"]["attention"].shape == (12, 8, 3, 25, 196)


def test_files_that_are_named_are_there():
  names = re.findall(
    r"(?:configs|launch|data|docs)/[\w/]+\.(?:py|sh|md)", _TEXT
  )
  assert len(names) > 10
  for name in names:
    assert os.path.exists(name), name
