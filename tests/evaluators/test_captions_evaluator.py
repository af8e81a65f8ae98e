"""Tests of lookup_vit/evaluators/captions.py, on ten images like COCO's."""

import copy
import functools
import html
import json
import os
import pathlib
import re
import socket

import jax
import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from lookup_vit import config_utils, input_pipeline, train_step
from lookup_vit.analysis import caption_files, caption_scores
from lookup_vit.evaluators.captions import Evaluator
from lookup_vit.models import decoding, lookup_vit
from lookup_vit.preprocess import train_tokenizer
from lookup_vit.tokenizer import Tokenizer
from tests import lookalikes, programs
from tests.models import common

COUNT = 10
TEXT = "a two red cat dog dogs man runs on sits sand grass"
WORDS = TEXT.split(" ")
IMAGE = "decode|resize(8)|value_range(-1,1)"
PP = f"{IMAGE}|keep('image')"
GRIDS = [(2, 2), (1, 2)]
QUICK = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
BEGIN, END, SIZE, LENGTH = 0, 1, 15, 8
# How a split is evaluated where a test does not say.
FIELDS = dict(pp_fn=PP, metrics=QUICK, beams=3, alpha=-2.0)


def number(i):
  """Of an image: in another order than the files', of more than 32 bits."""
  return 2**40 - 7 * i


def texts(i):
  """References of an image."""
  rng = np.random.default_rng(i)
  counts = rng.integers(3, 8, size=rng.integers(2, 5))
  return [" ".join(rng.choice(WORDS, n)) + "." * (n % 2) for n in counts]


@pytest.fixture(scope="module")
def references():
  """By number of the image."""
  return {number(i): texts(i) for i in range(COUNT)}


def build(folder, change, count=COUNT):
  """Images of COCO's look-alike, `change(i)` what is else of them."""
  captioned = lookalikes._captioned
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      lookalikes, "_captioned", lambda rng, i: captioned(rng, i) | change(i)
    )
    lookalikes.build("coco_captions", folder, splits={"val": count})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, references):
  """With the data, and a tokenizer of whole words."""
  folder = tmp_path_factory.mktemp("coco")

  def change(i):
    captions = [dict(id=k, text=text) for k, text in enumerate(texts(i))]
    return {"image/id": number(i), "captions": captions}

  build(folder, change)
  captions = [text.strip(".") for each in references.values() for text in each]
  content = train_tokenizer.train(captions, SIZE, "word")
  (folder / "words.model").write_bytes(content)
  return folder


def data_of(folder):
  return dict(name="coco_captions", split="val", data_dir=str(folder))


def make_program(folder, devices=None, **fields):
  base = dict(
    model_name="captioner",
    task="captioning",
    tokenizer=str(folder / "words.model"),
    num_classes=SIZE,
    model=dict(
      encoder=dict(variant="mu/4", width=16, depth=1, grid=(2, 2)),
      depth=1,
      max_length=LENGTH,
    ),
    grids=GRIDS,
    input=dict(pp="", image_size=(8, 8), batch_size=4),
    lr=1e-3,
    total_steps=2,
  )
  return train_step.Program(config_utils.resolve(base | fields), 2, devices)


def random_params(program):
  """An image makes much of a difference; no caption ends at once."""
  params = common.random_like(program.state_shapes.params, seed=1)
  decoder = params["decoder"]
  decoder["decoderblock_0"]["cross_attention"]["value"]["kernel"] *= 6
  head = decoder["head"]
  head["kernel"] *= 2
  # Neither padding nor what is unknown.
  head["bias"][:3] = -50, -1, -50
  to_end = head["kernel"][:, END]
  decoder["pos_embedding"] *= 3
  decoder["pos_embedding"][:3] -= 6 * to_end / np.linalg.norm(to_end)
  return params


@pytest.fixture(scope="module")
def program(folder):
  return make_program(folder, jax.devices()[:1])


@pytest.fixture(scope="module")
def params(program):
  return random_params(program)


@pytest.fixture(scope="module")
def rows_of(folder, program, params):
  """Ids of captions, by number: of each image alone, without an evaluator."""
  pp = f"{IMAGE}|keep('image','image/id')"
  examples = list(input_pipeline.examples(data_of(folder), pp=pp))
  assert len(examples) == COUNT

  @functools.cache
  def rows(grid, beams, alpha=FIELDS["alpha"], length=LENGTH):
    @common.jit
    def write(params, images):
      options = dict(begin=BEGIN, end=END, length=length, grid=grid)
      options |= dict(beams=beams, alpha=alpha)
      return decoding.caption(program.model, params, images, **options)

    return {
      int(e["image/id"]): np.asarray(write(params, e["image"][None]))[0]
      for e in examples
    }

  return rows


@pytest.fixture(scope="module")
def captions_of(folder, rows_of):
  """Captions by number, likewise."""
  words = Tokenizer(str(folder / "words.model"))
  assert (words.begin, words.end, words.size) == (BEGIN, END, SIZE)

  def captions(*args, **kwargs):
    rows = rows_of(*args, **kwargs)
    return {i: words.decode(row) for i, row in rows.items()}

  return captions


def evaluate(program, params, folder, workdir=None, **fields):
  fields = dict(data=data_of(folder)) | FIELDS | fields
  evaluator = Evaluator(program, "val", **fields)
  pairs = list(evaluator.run(params, workdir=workdir))
  names = [name for name, _ in pairs]
  assert len(set(names)) == len(names)
  return dict(pairs)


def written(workdir, name):
  """The captions that an evaluator left, by image."""
  return caption_files.read_results(
    os.path.join(workdir, f"captions_{name}.json")
  )


def tokens(sentences):
  rows = {i: [dict(caption=s) for s in each] for i, each in sentences.items()}
  return PTBTokenizer().tokenize(rows)


def scores_of_coco(references, captions):
  """By pycocoevalcap itself; of CIDEr those of each image."""
  gts = tokens(references)
  res = tokens({i: [captions[i]] for i in references})
  bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
  cider, each = Cider().compute_score(gts, res)
  rouge, _ = Rouge().compute_score(gts, res)
  means = dict(zip(QUICK[:4], bleu, strict=True), ROUGE_L=rouge, CIDEr=cider)
  return means, dict(zip(gts, each, strict=True))


def check(got, want):
  assert set(got) == set(want)
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.fixture(scope="module")
def of_four(program, params, folder, tmp_path_factory):
  """Metrics and work directory, in batches of four, the last of two."""
  workdir = str(tmp_path_factory.mktemp("four"))
  return evaluate(program, params, folder, workdir, images=3), workdir


def test_captions_and_scores(of_four, captions_of, rows_of, references):
  got, workdir = of_four
  want = {}
  for grid in GRIDS:
    captions = captions_of(grid, 3)
    where = f"{grid[0]}x{grid[1]}"
    assert written(workdir, f"val_{where}") == captions
    means, _ = scores_of_coco(references, captions)
    rows = rows_of(grid, 3).values()
    means["unfinished"] = sum(END not in row for row in rows) / COUNT
    assert 0 < means["unfinished"] < 1 and means["CIDEr"] > 0.01
    # Images are told apart.
    assert len(set(captions.values())) > 5
    want |= {f"val/{where}/{name}": value for name, value in means.items()}
  check(got, want)
  assert want["val/2x2/CIDEr"] != want["val/1x2/CIDEr"]
  with open(os.path.join(workdir, "captions_val_2x2.json")) as f:
    rows = json.load(f)
  assert [set(row) for row in rows] == [{"image_id", "caption"}] * COUNT


def test_page(of_four, captions_of, references, folder):
  _, workdir = of_four
  pp = "keep('image/id')"
  first = [
    int(e["image/id"]) for e in input_pipeline.examples(data_of(folder), pp=pp)
  ][:3]
  for grid in GRIDS:
    name = f"captions_val_{grid[0]}x{grid[1]}.html"
    with open(os.path.join(workdir, name)) as f:
      page = f.read()
    figures = page.split("<figure>")[1:]
    captions = captions_of(grid, 3)
    _, cider = scores_of_coco(references, captions)
    for i, figure in zip(first, figures, strict=True):
      assert figure.count("data:image/png;base64,") == 1
      assert f"<small>{i} &middot; CIDEr {100 * cider[i]:.1f}</small>" in figure
      assert f"<p>{html.escape(captions[i])}</p>" in figure
      items = re.findall("<li>(.*?)</li>", figure, re.DOTALL)
      assert items == [html.escape(r) for r in references[i]]
  path = os.path.join(workdir, "references_val.json")
  assert caption_files.read_references(path) == references
  assert len(os.listdir(workdir)) == 5


def test_batch_size_does_not_matter(program, params, folder, of_four, tmp_path):
  fields = dict(batch_size=7, grids=[(1, 2)])
  got = evaluate(program, params, folder, tmp_path, **fields)
  want, workdir = of_four
  assert got == {k: v for k, v in want.items() if "/1x2/" in k}
  assert written(tmp_path, "val_1x2") == written(workdir, "val_1x2")
  assert not (tmp_path / "captions_val_2x2.json").exists()


# Other devices.

PROGRAM = """
import json, pathlib, sys
out, folder, process, port = sys.argv[1:]

import jax

jax.config.update("jax_num_cpu_devices", 2)
from lookup_vit import distributed
from tests.evaluators import test_captions_evaluator as test

distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
program = test.make_program(pathlib.Path(folder))
state = program.init_state(test.random_params(program))
folder, out = pathlib.Path(folder), pathlib.Path(out)
got = test.evaluate(program, state.params, folder, str(out), grids=[(1, 2)])
(out / f"metrics_{process}.json").write_text(json.dumps(got))
"""


def test_devices_do_not_matter(folder, of_four, tmp_path):
  """Two processes, each with two devices and a part of the split."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  started = [
    programs.Program("-c", PROGRAM, tmp_path, folder, process, port)
    for process in range(2)
  ]
  for process in started:
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
  want, workdir = of_four
  want = {k: v for k, v in want.items() if "/1x2/" in k}
  assert json.loads((tmp_path / "metrics_0.json").read_text()) == want
  assert written(tmp_path, "val_1x2") == written(workdir, "val_1x2")
  pages = [
    pathlib.Path(folder, "captions_val_1x2.html").read_text()
    for folder in (tmp_path, workdir)
  ]
  got, wanted = (
    {re.search(r"<small>(\d+) ", f)[1]: f for f in page.split("</figure>")[:-1]}
    for page in pages
  )
  # Those of the first process's share, and no padding.
  share = list(json.loads((tmp_path / "captions_val_1x2.json").read_text()))
  assert len(got) == len(share) // 2 and len(wanted) == 3
  for i, figure in wanted.items():
    assert got[i].split("<figure>")[1] == figure.split("<figure>")[1]
  # The first process alone has them.
  assert json.loads((tmp_path / "metrics_1.json").read_text()) == {}


# What is searched.


def test_greedy(program, params, folder, captions_of, references, tmp_path):
  got = evaluate(
    program,
    params,
    folder,
    tmp_path,
    beams=1,
    max_length=5,
    grids=[(2, 2)],
    images=0,
  )
  captions = captions_of((2, 2), 1, length=5)
  assert written(tmp_path, "val_2x2") == captions
  assert captions != captions_of((2, 2), 3)
  means, _ = scores_of_coco(references, captions)
  means["unfinished"] = got["val/2x2/unfinished"]
  check(got, {f"val/2x2/{name}": value for name, value in means.items()})
  page = (tmp_path / "captions_val_2x2.html").read_text()
  assert "<figure>" not in page


def test_penalty_of_short_captions(of_four, rows_of):
  """That of `FIELDS` is not the default."""
  got = of_four[0]["val/1x2/unfinished"]
  usual = rows_of((1, 2), 3, alpha=0.6).values()
  assert got < np.mean([END not in row for row in usual])


def test_no_work_directory(
  program, params, folder, of_four, monkeypatch, tmp_path
):
  """And `check` is called for each batch."""
  monkeypatch.chdir(tmp_path)
  fields = FIELDS | dict(data=data_of(folder), grids=[(1, 2)])
  evaluator = Evaluator(program, "val", **fields | dict(metrics=["CIDEr"]))
  calls = []

  class Stop(Exception):
    pass

  def stop():
    calls.append(len(calls))
    if len(calls) == 2:
      raise Stop

  with pytest.raises(Stop):
    list(evaluator.run(params, stop))
  assert len(calls) == 2
  got = dict(evaluator.run(params, lambda: calls.append(0)))
  assert len(calls) == 2 + 3
  assert set(got) == {"val/1x2/CIDEr", "val/1x2/unfinished"}
  assert got.items() < of_four[0].items()
  assert not os.listdir(tmp_path)


def test_captions_are_kept_where_scoring_fails(
  program, params, folder, of_four, monkeypatch, tmp_path
):
  def fail(*args):
    raise ValueError("Java failed.")

  monkeypatch.setattr(caption_scores, "score", fail)
  with pytest.raises(ValueError, match="Java failed"):
    evaluate(program, params, folder, tmp_path, grids=[(1, 2)])
  assert written(tmp_path, "val_1x2") == written(of_four[1], "val_1x2")


def test_defaults(program, folder):
  evaluator = Evaluator(program, "val", data=data_of(folder), pp_fn=PP)
  assert evaluator.metrics == caption_scores.DEFAULT
  assert evaluator.length == LENGTH and evaluator.beams == 4
  assert evaluator.alpha == 0.6
  assert evaluator.grids == GRIDS and evaluator.batch_size == 4


# Errors.


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (dict(beams=0), ["config.evals.val.beams=0", ">= 1"]),
    (dict(beams=2.5), ["config.evals.val.beams=2.5"]),
    (dict(beams=True), ["config.evals.val.beams=True"]),
    (
      dict(max_length=LENGTH + 1),
      ["config.evals.val.max_length=9", f"the decoder has {LENGTH}"],
    ),
    (dict(alpha="0.6"), ["config.evals.val.alpha='0.6'"]),
    (dict(alpha=float("nan")), ["config.evals.val.alpha=nan"]),
    (dict(images=-1), ["config.evals.val.images=-1"]),
    (dict(max_length=0), ["config.evals.val.max_length=0", ">= 1"]),
    (dict(max_length=-1), ["config.evals.val.max_length=-1"]),
    (
      dict(metrics=["CIDEr", "Blue_4"]),
      ["config.evals.val.metrics", "'Blue_4'", "'Bleu_4'"],
    ),
    (dict(references="captions/texts"), ["no feature 'captions/texts'"]),
    (dict(references="captions/id"), ["'captions/id' is no text"]),
    (dict(image_id="image/ids"), ["no feature 'image/ids'"]),
    (
      dict(references="a", image_id="b"),
      ["no feature 'a'"],
    ),
    (dict(grids=[(3, 3)]), ["config.evals.val.grids", "(3, 3)", "(2, 2)"]),
    (dict(batch_size=-4), ["config.evals.val.batch_size=-4"]),
    (
      dict(pp_fn="decode|resize(12)|value_range(-1,1)|keep('image')"),
      ["config.evals.val.pp_fn", "(12, 12, 3)", "(8, 8, 3)"],
    ),
    (dict(pp_fn=f"{IMAGE}|keep('image/id')"), ["val.pp_fn", "'image'"]),
    (dict(data=dict(name="coco_captions")), ["coco_captions"]),
  ],
)
def test_errors(program, folder, fields, words):
  with pytest.raises(ValueError) as e:
    Evaluator(program, "val", **(dict(data=data_of(folder)) | FIELDS | fields))
  for word in words:
    assert word in str(e.value), str(e.value)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"captions": []}, "image/id 12 has no references"),
    ({"captions": [dict(id=1, text=" \n")]}, "image/id 12 has no references"),
    ({"captions": [dict(id=1, text=".")]}, "Image 12 has 0 references that"),
    ({"image/id": 11}, "image/id 11 comes twice"),
  ],
)
def test_data_that_cannot_be(changes, words, program, tmp_path):
  own = {2: changes}
  build(tmp_path, lambda i: {"image/id": 10 + i} | own.get(i, {}), 4)
  with pytest.raises(ValueError, match=words):
    Evaluator(program, "val", data=data_of(tmp_path), **FIELDS)


def test_models_that_write_no_captions(program, folder):
  other = copy.copy(program)
  other.model = lookup_vit.Model(SIZE, "mu/4", depth=1, grid=(2, 2))
  other.config = copy.deepcopy(program.config)
  other.config.model_name = "lookup_vit"
  with pytest.raises(ValueError, match="evals.val.*'lookup_vit' writes no"):
    Evaluator(other, "val", data=data_of(folder), **FIELDS)


def test_no_tokenizer(program, folder):
  other = copy.copy(program)
  other.config = copy.deepcopy(program.config)
  with other.config.ignore_type():
    other.config.tokenizer = None
  with pytest.raises(ValueError, match="evals.val wants config.tokenizer"):
    Evaluator(other, "val", data=data_of(folder), **FIELDS)
