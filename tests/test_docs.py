"""The pages say what there is: links, names in the code, configs, codes."""

import ast
import collections
import functools
import math
import os
import pathlib
import re
import urllib.parse

import jax
import numpy as np
import pytest

from lookup_vit import cli, config_utils, dryrun
from lookup_vit.analysis import parameters, steps
from lookup_vit.models import lookup_vit

_PAGES = [
  *sorted(pathlib.Path().glob("*.md")),
  *sorted(pathlib.Path("docs").glob("*.md")),
  *sorted(pathlib.Path("data").glob("*/*.md")),
]


def _text(name):
  return pathlib.Path("docs", name).read_text()


def _rows(text, heading):
  """Cells of the first table below a heading."""
  table = text.split(f"\n{heading}\n")[1].split("\n|---")[1].split("\n\n")[0]
  return [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in table.splitlines()[1:]
  ]


# Links.


def prose(text: str) -> str:
  """A page without its blocks of code."""
  return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
  """What GitHub calls the headings of a page."""
  found = collections.Counter()
  names = set()
  for heading in re.findall(r"^#+ +(.+?) *#*$", prose(text), re.MULTILINE):
    heading = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
    slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
    found[slug] += 1
  return names


def wrong_links(page: pathlib.Path) -> list[str]:
  """The links of a page that lead nowhere; of others' sites by form alone."""
  text = re.sub(r"`[^`\n]+`", "", prose(page.read_text()))
  wrong = []
  for link in re.findall(r"\]\(([^)]*)\)", text):
    url = urllib.parse.urlsplit(link)
    if url.scheme or url.netloc:
      if (
        url.scheme != "https" or "." not in url.netloc or re.search(r"\s", link)
      ):
        wrong.append(link)
      continue
    path = page.parent / url.path if url.path else page
    there = path.resolve().is_relative_to(pathlib.Path().resolve())
    there = there and path.exists()
    if there and url.fragment:
      there = path.suffix == ".md"
      there = there and url.fragment in anchors(path.read_text())
    if not there:
      wrong.append(link)
  return wrong


@pytest.mark.parametrize("page", _PAGES, ids=str)
def test_links_lead_somewhere(page):
  assert wrong_links(page) == []


def test_what_a_wrong_link_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  other = tmp_path / "b.md"
  other.write_text(
    "# A `b`: c, d-e\n\n## Twice\n\n## Twice\n\n```\n# no\n```\n"
  )
  assert anchors(other.read_text()) == {"a-b-c-d-e", "twice", "twice-1"}
  right = ["b.md", "b.md#twice-1", "b.md#a-b-c-d-e", "#here", "https://a.b/c#d"]
  wrong = [
    "c.md",
    "b.md#twice-2",
    "b.md#no",
    "#there",
    "http://a.b",
    "https://a",
  ]
  wrong += ["../b.md", "https://a.b/c d"]
  links = "\n".join(f"[a\nb]({link})" for link in [*right, *wrong])
  page = tmp_path / "a.md"
  page.write_text(
    f"# Here\n\n{links}\n`[code](x.md)`\n```\n[code](x.md)\n```\n"
  )
  assert wrong_links(page) == wrong


def test_layout_is_that_of_the_package():
  text = pathlib.Path("CONTRIBUTING.md").read_text()
  layout = text.split("## Where things belong")[1].split("```")[1]
  for name in os.listdir("lookup_vit"):
    if not name.startswith("_"):
      assert re.search(rf"  {re.escape(name)}\b", layout), name
  for name in re.findall(r"^(\w+)/ ", layout, re.MULTILINE):
    assert os.path.isdir(name), name
  for name in re.findall(r"(?<=  )(\w+\.py|\w+/) ", layout):
    assert os.path.exists(os.path.join("lookup_vit", name)), name


# The method.


@functools.cache
def _symbols(path):
  """Functions and classes of a file, and methods as CLASS.METHOD."""
  names = set()
  for node in ast.parse(pathlib.Path(path).read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    if isinstance(node, ast.ClassDef):
      names |= {f"{node.name}.{getattr(x, 'name', '')}" for x in node.body}
  return names


def test_names_in_the_code_are_there():
  found = []
  for page in _PAGES:
    links = re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", page.read_text())
    for name, path in links:
      found.append(name)
      path = os.path.normpath(page.parent / path)
      assert name in _symbols(path), f"{page}: {path} has no {name}"
  assert len(found) > 30 and "MHBC.gather" in found


def test_parameters_of_the_method_are_the_models():
  model = lookup_vit.Model(10, "mu/8", depth=1, grid=(2, 2))
  images = np.zeros((1, 32, 32, 3), np.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  paths = {r.path for r in parameters.rows(params, 9)}
  named = set()
  text = _text("method.md")
  for heading in ("## Tokens", "## A block", "## Heads and loss"):
    for *_, cell in _rows(text, heading):
      named |= {n.replace("B/", "encoderblock_0/") for n in _quoted(cell)}
  for name in named:
    assert any(f"{p}/".startswith(f"{name}/") for p in paths), name
  # And no other: the page has all of the model.
  for path in paths:
    assert any(f"{path}/".startswith(f"{name}/") for name in named), path


def _quoted(text):
  return re.findall(r"`([^`]+)`", text)


# Experiments.


def test_every_config_is_an_experiment():
  text = _text("experiments.md")
  for path in sorted(pathlib.Path("configs").glob("*.py")):
    assert f"](../{path})" in text, path
    commands = re.findall(rf"--(?:config|evals)={path}\b|# {path}\b", text)
    assert commands or path.name == "common.py", path


@pytest.mark.parametrize(
  "spec",
  sorted(
    {
      spec
      for page in _PAGES
      for spec in re.findall(r"--config=(configs/[^\s`]+)", page.read_text())
      if "$" not in spec
    }
  ),
)
def test_configs_in_commands_are_there(spec):
  if re.search(r"\bfrom=(?!configs/)", spec):
    # Of a run that is not here: that config reads its work directory.
    spec = re.sub(r"\bfrom=[^,]+", "from=configs/in21k_lookup_b.py", spec)
  if not pathlib.Path(spec.partition(":")[0]).exists():
    assert spec == "configs/NAME.py:key=value,flag"
    return
  config_utils.load(spec)


def _two_digits(x):
  return f"{float(f'{x:.2g}'):,g}"


def test_costs_are_those_of_the_dry_runs():
  planned = {
    row[0].strip("`"): row[1:] for row in _rows(_text("pods.md"), "## Planning")
  }
  found = _rows(_text("experiments.md"), "## What they cost")
  for spec, topology, length, flops, ms, hours, chip_hours in found:
    spec = spec.strip("`")
    slice_, _, _, _, tflop, _, _, planned_ms, *_ = planned[spec]
    assert (topology, ms) == (slice_, planned_ms), spec
    config = steps.prepare(config_utils.load(f"configs/{spec}"), None)
    # COCO's are not known to a dry run.
    examples = steps.num_examples(config) or 113_287
    total = config_utils.total_steps(config, round(examples))
    assert length == f"{total:,} x {config.input.batch_size:,}", spec
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    assert flops == f"{float(tflop) * 1e12 * chips * total:.2g}", spec
    if ms == "-":
      assert (hours, chip_hours) == ("-", "-"), spec
      continue
    want = total * float(ms) / 3.6e6
    assert hours == _two_digits(want), spec
    assert chip_hours == _two_digits(want * chips), spec
  of_folder = {spec for spec in planned if "folder=FOLDER" in spec}
  assert {row[0].strip("`") for row in found} == set(planned) - of_folder


# Conventions.


def _exit_codes():
  """What the package gives to `sys.exit`, where that is a number."""
  known = {"DOES_NOT_FIT": 3, "PREEMPTED": 75}
  codes = set()
  for path in pathlib.Path("lookup_vit").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.Call) or ast.unparse(node.func) != "sys.exit":
        continue
      value = node.args[0]
      if isinstance(value, ast.Constant) and isinstance(value.value, int):
        codes.add(value.value)
      elif isinstance(value, ast.Constant | ast.JoinedStr):
        codes.add(1)  # A message.
      elif isinstance(value, ast.Name | ast.Attribute):
        codes.add(known[ast.unparse(value).rpartition(".")[2]])
      else:  # A command's own.
        assert path.name == "supervise.py", f"{path}: {ast.unparse(node)}"
  return codes


def test_exit_codes_are_those_of_the_code():
  stated = [row[0] for row in _rows(_text("conventions.md"), "## Exit codes")]
  assert stated == ["0", "1", "3", "75", "128 + n"]
  assert _exit_codes() == {0, 1, 3, 75}
  assert (dryrun.DOES_NOT_FIT, cli.PREEMPTED) == (3, 75)


@pytest.mark.parametrize(
  "code",
  re.findall(r"```python\n(.*?)```", _text("conventions.md"), re.DOTALL),
  ids=["environment", "parameters"],
)
def test_python_runs(code, capsys):
  exec(compile(code, "conventions.md", "exec"), {})
  out = capsys.readouterr().out
  assert '"packages"' in out or "| encoderblock_0..11 |" in out


def test_table_of_parameters_is_that_of_the_program():
  text = _text("conventions.md").split("## A model's parameters")[1]
  [block] = re.findall(r"^```\n(\|.*?)```", text, re.DOTALL | re.MULTILINE)
  config = steps.prepare(config_utils.load("configs/digits_lookup.py"), None)
  program = steps.make_program(config, jax.devices()[:1])
  table = parameters.table(program.state_shapes.params, 2).splitlines()
  first, last = block.split("...\n")
  assert table[: first.count("\n")] == first.splitlines()
  assert table[-1] == last.strip()
