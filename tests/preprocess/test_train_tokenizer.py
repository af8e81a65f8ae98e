"""Tests of lookup_vit/preprocess/train_tokenizer.py."""

import sys

import numpy as np
import pytest
import sentencepiece

from data.digit_captions import digit_captions_dataset_builder as scenes
from lookup_vit import tokenizer
from lookup_vit.preprocess import train_tokenizer
from tests import lookalikes, programs, small

TEXT = "a red dog runs two dogs run on sand größer: sees the café"
WORDS = TEXT.split(" ")
CAPTIONS = [
  *(" ".join(np.random.default_rng(i).choice(WORDS, 9)) for i in range(40)),
  *("", " \n", "größer: a dog\nsees\tdogs"),
]


def load(content):
  model = sentencepiece.SentencePieceProcessor()
  model.LoadFromSerializedProto(content)
  return model


# train


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char", "word"])
def test_train(model_type):
  """The same for the same captions; special ids are T5's."""
  size = 12 if model_type == "word" else 32
  args = size, model_type, "identity"
  content = train_tokenizer.train(CAPTIONS, *args)
  # Of any iterable; blank captions, and how words are set apart, do not count.
  like = [" ".join(c.split()) for c in CAPTIONS if c.strip()]
  assert train_tokenizer.train(iter(like), *args) == content
  assert train_tokenizer.train([*CAPTIONS, "dogs"] * 2, *args) != content
  model = load(content)
  assert (model.pad_id(), model.eos_id(), model.unk_id()) == (0, 1, 2)
  assert model.bos_id() == -1
  assert model.get_piece_size() <= size
  if model_type in ("bpe", "unigram"):
    assert model.get_piece_size() == size
    for text in like:
      ids = model.encode(text)
      assert 2 not in ids and model.decode(ids) == text
      assert len(ids) < len(text)
  assert model.encode("dog 狗")[-1] == 2


def test_normalization():
  """The rule that is said, or that of SentencePiece."""
  text = "ﬁne １dog" + "".join(CAPTIONS)
  own, usual = (
    train_tokenizer.train([text], 40, "bpe", *rule)
    for rule in (("identity",), ())
  )
  assert len(own) < 10_000 < len(usual)
  odd = "ﬁne １dog"
  assert load(own).decode(load(own).encode(odd)) == odd
  assert load(usual).decode(load(usual).encode(odd)) == "fine 1dog"


@pytest.mark.parametrize(
  ("args", "words"),
  [
    ((5,), ["vocab_size=5, model_type='unigram'", "required_chars"]),
    ((5, "bpe"), ["vocab_size=5, model_type='bpe'", "required_chars"]),
    ((999,), ["vocab_size=999", "too high (999)", "<="]),
    ((999, "bpe"), ["vocab_size=999", "too high (999)", "<="]),
    ((0,), ["vocab_size=0"]),
    ((30, "word2vec"), ["word2vec"]),
    ((30, "bpe", "NFC"), ["NFC"]),
  ],
)
def test_what_cannot_be_trained(args, words):
  with pytest.raises(ValueError) as e:
    train_tokenizer.train(CAPTIONS, *args)
  for word in words:
    assert word in str(e.value)


@pytest.mark.parametrize("captions", [[], ["", " ", "\n\t"]])
def test_no_captions(captions):
  with pytest.raises(ValueError, match="There are no captions"):
    train_tokenizer.train(captions, 30)


def test_without_sentencepiece(monkeypatch):
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(ValueError, match=r"pip install 'lookup_vit\[captions\]'"):
    train_tokenizer.train(CAPTIONS, 30)


# captions_of


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("data"))
  lookalikes.build("coco_captions", path, splits={"train": 5, "val": 3})
  return dict(name="coco_captions", data_dir=path)


def of_coco(split, count):
  return [
    caption["text"]
    for example in lookalikes.examples("coco_captions", split, count)
    for caption in example["captions"]
  ]


@pytest.mark.parametrize("lower", [False, True])
def test_captions_of(lower, coco):
  key = "captions/text"
  train, val = (coco | dict(split=split) for split in ("train", "val"))
  want = {"train": of_coco("train", 5), "val": of_coco("val", 3)}
  assert len(want["train"]) == 5 * 5 + 2
  if lower:
    want = {name: [t.lower() for t in texts] for name, texts in want.items()}
  got = list(train_tokenizer.captions_of(train, key, lower))
  assert sorted(got) == sorted(want["train"])
  # In a mixture weights do not count, nor does a preprocessing of their own.
  mixture = [dict(val, weight=3, pp="decode"), dict(train, weight=0.1)]
  got = list(train_tokenizer.captions_of(dict(mixture=mixture), key, lower))
  count = len(want["val"])
  assert sorted(got[:count]) == sorted(want["val"])
  assert sorted(got[count:]) == sorted(want["train"])


def test_a_feature_of_one_text(coco):
  data = coco | dict(split="val")
  got = list(train_tokenizer.captions_of(data, "image/filename", True))
  assert sorted(got) == [f"coco_val2014_{i:012}.jpg" for i in range(3)]


@pytest.mark.parametrize(
  ("key", "words"),
  [
    ("captions/texts", "no feature 'captions/texts'"),
    ("captions", "no feature 'captions'"),
    ("image/id", "'image/id' is no text"),
    ("captions/id", "'captions/id' is no text"),
  ],
)
def test_features_that_are_no_captions(key, words, coco):
  data = coco | dict(split="val")
  with pytest.raises(ValueError, match="--key: ") as e:
    list(train_tokenizer.captions_of(data, key, True))
  assert words in str(e.value)


def test_a_split_that_is_not_there(coco):
  data = coco | dict(split="tset")
  with pytest.raises(ValueError, match="tset"):
    list(train_tokenizer.captions_of(data, "captions/text", True))


# The program.

# The config, but for where the data are.
CONFIG = """
from configs import digit_captions_lookup


def get_config(arg=None):
  config = digit_captions_lookup.get_config(arg)
  config.input.data.data_dir = {data_dir!r}
  return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("digits")
  small.digit_captions(str(folder / "data"))
  path = folder / "config.py"
  path.write_text(CONFIG.format(data_dir=str(folder / "data")))
  return f"{path}:runlocal"


def start(config, output, *more):
  module = "lookup_vit.preprocess.train_tokenizer"
  flags = [f"--config={config}", f"--output={output}", "--vocab_size=100"]
  return programs.Program("-m", module, *flags, "--model_type=bpe", *more)


def test_program(config, tmp_path):
  output = tmp_path / "a folder/digits.model"
  good = start(config, output, "--normalization=identity")
  bad = start(config, tmp_path / "none.model", "--key=captions/words")
  _, err = good.communicate(timeout=120)
  assert good.returncode == 0, err
  captions = [
    caption["text"]
    for i in range(64)
    for caption in scenes.example("train", i)["captions"]
  ]
  assert f"100 pieces from {len(captions)} captions: {output}" in err
  words = tokenizer.Tokenizer(str(output))
  assert (words.begin, words.end, words.size) == (0, 1, 100)
  lengths = []
  for caption in captions:
    ids = words.encode(caption)
    assert words.decode([*ids, words.end]) == caption
    lengths.append(len(ids) + 1)
  median, most, longest = np.quantile(lengths, [0.5, 0.99, 1], method="higher")
  assert f"{median} pieces (median), {most} (99 %) or {longest} (the" in err

  _, err = bad.communicate(timeout=120)
  assert bad.returncode == 1
  assert "no feature 'captions/words'" in err and "--key" in err
  assert "Traceback" not in err
  assert not (tmp_path / "none.model").exists()
