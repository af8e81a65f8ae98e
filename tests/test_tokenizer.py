"""Tests of lookup_vit/tokenizer.py, against SentencePiece itself."""

import io
import pathlib
import re
import sys

import numpy as np
import pytest
import sentencepiece

from configs import common
from lookup_vit import tokenizer

TEXT = "a red dog runs two dogs run on sand größer sees the café"
WORDS = TEXT.split()
# Numbers of the special ids, and which of them begins a caption.
BEGINS = {
  "begin": (dict(bos_id=3, pad_id=0, eos_id=1, unk_id=2), 3),
  "begin, no padding": (dict(bos_id=1, pad_id=-1, eos_id=2, unk_id=0), 1),
  "begin is 0": (dict(bos_id=0, pad_id=3, eos_id=2, unk_id=1), 0),
  "padding": (dict(bos_id=-1, pad_id=0, eos_id=1, unk_id=2), 0),
  "end": (dict(bos_id=-1, pad_id=-1, eos_id=4, unk_id=0), 4),
}


def sentences(count, seed=0):
  rng = np.random.default_rng(seed)
  return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def model_of(**ids):
  """The content of a model's file, trained on random sentences."""
  file = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences(200)),
    model_writer=file,
    vocab_size=40,
    model_type="bpe",
    num_threads=1,
    minloglevel=2,
    **ids,
  )
  return file.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Paths by the names of `BEGINS`."""
  folder = tmp_path_factory.mktemp("models")
  paths = {}
  for name, (ids, _) in BEGINS.items():
    paths[name] = str(folder / f"{name}.model")
    pathlib.Path(paths[name]).write_bytes(model_of(**ids))
  return paths


@pytest.mark.parametrize("name", BEGINS)
def test_special_ids(name, models):
  ids, begin = BEGINS[name]
  words = tokenizer.Tokenizer(models[name])
  assert (words.begin, words.end, words.size) == (begin, ids["eos_id"], 40)
  assert words.path == models[name]
  assert words.content == pathlib.Path(models[name]).read_bytes()


@pytest.mark.parametrize("name", ["begin", "padding", "end"])
def test_encode_and_decode(name, models):
  words = tokenizer.Tokenizer(models[name])
  model = sentencepiece.SentencePieceProcessor(model_file=models[name])
  for text in sentences(50, seed=1):
    ids = words.encode(text)
    assert ids == model.encode(text)
    assert not {words.begin, words.end} & set(ids)
    assert words.decode(ids) == model.decode(ids) == text
  odd = ["", "  two   dogs ", "Dog, 狗!", "\n", "a\ndog", "</s> dog <pad>"]
  for text in odd:
    ids = words.encode(text)
    assert ids == model.encode(text)
    assert words.decode(ids) == model.decode(ids)


@pytest.mark.parametrize("name", ["begin", "end"])
def test_decode_stops_at_the_first_end(name, models):
  words = tokenizer.Tokenizer(models[name])
  model = sentencepiece.SentencePieceProcessor(model_file=models[name])
  rng = np.random.default_rng(0)
  for _ in range(100):
    ids = rng.integers(words.size, size=rng.integers(12))
    ids[rng.uniform(size=len(ids)) < 0.2] = words.end
    before = ids.tolist()
    before = before[: [*before, words.end].index(words.end)]
    # As decoding gives them, and as a list.
    for given in (ids.astype(np.int32), ids.tolist()):
      assert words.decode(given) == model.decode(before)
  assert words.decode([words.end, *words.encode("a dog")]) == ""
  assert words.decode([]) == ""


def test_a_tokenizer_is_loaded_once(models):
  one = tokenizer.load(models["padding"])
  assert tokenizer.load(models["padding"]) is one
  assert tokenizer.load(models["begin"]) is not one


def test_another_one_at_the_same_place(models, tmp_path):
  path = tmp_path / "words.model"
  for name in ("padding", "begin"):
    path.write_bytes(pathlib.Path(models[name]).read_bytes())
    assert tokenizer.load(str(path)).content == path.read_bytes()


def test_that_of_the_digits():
  words = tokenizer.load(common.TOKENIZER)
  text = "a small three in the top left and a large five in the bottom right"
  assert words.decode([*words.encode(text), words.end, 5]) == text
  assert words.size == 128 and words.begin == 0


# What is no tokenizer.


@pytest.mark.parametrize("name", ["none.model", "", "."])
def test_no_file(name, tmp_path):
  path = str(tmp_path / name) if name else ""
  with pytest.raises(ValueError, match="no such file") as e:
    tokenizer.Tokenizer(path)
  assert repr(path) in str(e.value)
  assert "train_tokenizer" in str(e.value)


def test_a_damaged_file(models, tmp_path):
  whole = pathlib.Path(models["begin"]).read_bytes()
  for n, content in enumerate(
    [b"", b"\n", b"\0" * 100, b"<html>", whole[: len(whole) // 2], whole[7:]]
  ):
    path = tmp_path / f"{n}.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="or a damaged one") as e:
      tokenizer.Tokenizer(str(path))
    assert repr(str(path)) in str(e.value)


def test_no_end(tmp_path):
  path = tmp_path / "endless.model"
  path.write_bytes(model_of(eos_id=-1))
  with pytest.raises(ValueError, match=r"no id for the end \(eos_id\)") as e:
    tokenizer.Tokenizer(str(path))
  assert repr(str(path)) in str(e.value)


def test_without_sentencepiece(models, monkeypatch):
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(ValueError, match=r"pip install 'lookup_vit\[captions\]'"):
    tokenizer.Tokenizer(models["begin"])


# Of a work directory.


def test_copy_of_a_work_directory(models, tmp_path):
  workdir = str(tmp_path)
  words = tokenizer.load(models["padding"])
  tokenizer.check_workdir(workdir, words)  # It has none yet.
  tokenizer.check_workdir(str(tmp_path / "none"), words)
  for _ in range(2):
    tokenizer.write(workdir, words)
  path = tokenizer.of_workdir(workdir)
  assert pathlib.Path(path).parent == tmp_path
  assert pathlib.Path(path).read_bytes() == words.content
  copy = tokenizer.Tokenizer(path)
  assert copy.encode("two dogs") == words.encode("two dogs")
  # Only the content counts, not where it lies.
  for same in (words, copy):
    tokenizer.check_workdir(workdir, same)
  other = tokenizer.load(models["begin"])
  match = re.escape(repr(models["begin"])) + ".*" + re.escape(path)
  with pytest.raises(ValueError, match=match) as e:
    tokenizer.check_workdir(workdir, other)
  assert "config.tokenizer" in str(e.value)
  assert pathlib.Path(path).read_bytes() == words.content


def test_work_directory_of_home(models, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "run").mkdir()
  tokenizer.write("~/run", tokenizer.load(models["end"]))
  assert (tmp_path / "run/tokenizer.model").exists()
  assert tokenizer.Tokenizer("~/run/tokenizer.model").end == 4
