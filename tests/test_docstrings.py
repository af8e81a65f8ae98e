"""Types that public functions state; ruff's rules D look after docstrings."""

import ast
import pathlib

import pytest

_FILES = sorted(pathlib.Path("lookup_vit").rglob("*.py"))


def _public(body, where=""):
  """Functions and methods whose names, and whose classes', are public."""
  for node in body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      yield from _public(node.body, f"{where}{node.name}.")
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      special = where and node.name in ("__init__", "__call__")
      # What `cli.run` calls is not for others.
      if special or not (node.name.startswith("_") or node.name == "main"):
        yield f"{where}{node.name}", node


def untyped(source: str) -> list[str]:
  """Arguments and results of public functions that have no type."""
  found = []
  for name, node in _public(ast.parse(source).body):
    a = node.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    arguments += [x for x in (a.vararg, a.kwarg) if x]
    is_static = any(
      isinstance(d, ast.Name) and d.id == "staticmethod"
      for d in node.decorator_list
    )
    if "." in name and not is_static:
      arguments = arguments[1:]
    found += [f"{name}({x.arg})" for x in arguments if not x.annotation]
    if node.returns is None and not name.endswith(".__init__"):
      found.append(f"{name} ->")
  return found


@pytest.mark.parametrize("path", _FILES, ids=str)
def test_public_functions_state_types(path):
  assert untyped(path.read_text()) == []


def test_what_is_found():
  source = """
def f(a, *b, c: int = 3, **d): ...
def _g(x): ...
def main(argv): ...
class A:
  def __init__(self, y): ...
  def h(self) -> None:
    def inner(z): ...
  @staticmethod
  def s(q: int, r): ...
class _B:
  def i(self, x): ...
"""
  assert untyped(source) == [
    *("f(a)", "f(b)", "f(d)", "f ->"),
    *("A.__init__(y)", "A.s(r)", "A.s ->"),
  ]
