"""The ops on captions, and those that lead to them, against plain Python."""

import collections

import numpy as np
import pytest
import sentencepiece
import tensorflow as tf

from configs import common
from lookup_vit import input_pipeline, order
from lookup_vit.preprocess import get_preprocess_fn
from tests import lookalikes

SEED = tf.constant([3, 5])
BEGIN, END = 0, 1  # Of `common.TOKENIZER`.
TEXT = "A Large THREE in the top left, two and É ǅ ß İ 日本 a\u2028b\t \n"
WORDS = TEXT.split(" ")


def run(pp, seed=SEED, **data):
  data = {key: tf.constant(value) for key, value in data.items()}
  return get_preprocess_fn(pp)(data, seed)


def in_graph(pp, **data):
  """As the input pipeline runs it, for one example."""
  fn = get_preprocess_fn(pp)
  ds = tf.data.Dataset.from_tensors(data).map(lambda x: fn(x, SEED))
  return ds.element_spec, next(ds.as_numpy_iterator())


def captions(count):
  rng = np.random.default_rng(0)
  return [
    " ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(count)
  ]


@pytest.fixture(scope="module")
def model():
  return sentencepiece.SentencePieceProcessor(model_file=common.TOKENIZER)


# lower


def test_lower():
  # These have a lower case of as many characters.
  texts = ["", "A Dog", "ÀÉÎÕŠŽ ΑΒΓ ДЖЯ", "ẞ日本 1/2 !", "already"]
  for text in texts:
    out = run("lower", caption=text, title="KEPT")
    assert out["caption"].numpy().decode() == text.lower()
    assert out["title"].numpy() == b"KEPT"
  out = run("lower('title')", caption="KEPT", title="Grüße AUS KÖLN")
  assert out["title"].numpy().decode() == "grüße aus köln"
  assert out["caption"].numpy() == b"KEPT"
  several = run("lower", caption=texts)["caption"].numpy()
  assert [text.decode() for text in several] == [t.lower() for t in texts]


# tokenize


def by_hand(model, text, length):
  """Ids and whether they are cut, in plain Python."""
  ids = [*model.encode(text), END]
  cut = len(ids) > length
  ids = ids[:length]
  return [BEGIN, *ids, *[-1] * (length - len(ids))], float(cut)


@pytest.mark.parametrize("length", [1, 7, 20])
def test_tokenize(length, model):
  cuts = set()
  for text in captions(60):
    if not text.strip():
      continue
    out = run(f"tokenize({common.TOKENIZER!r}, {length})", caption=text)
    ids, cut = by_hand(model, text, length)
    assert out["text"].numpy().tolist() == ids
    assert out["text_cut"].numpy() == cut
    assert out["caption"].numpy().decode() == text
    cuts.add(cut)
  assert cuts == ({1.0} if length == 1 else {0.0, 1.0})


def test_lengths_about_the_longest(model):
  """Exactly as many ids as there may be, one more, and one less."""
  text = "a small three in the top left and a five at the bottom"
  ids = model.encode(text)
  for length, want, cut in (
    (len(ids) + 2, [BEGIN, *ids, END, -1], 0),
    (len(ids) + 1, [BEGIN, *ids, END], 0),
    (len(ids), [BEGIN, *ids], 1),
    (len(ids) - 1, [BEGIN, *ids[:-1]], 1),
  ):
    out = run(f"tokenize({common.TOKENIZER!r},{length})", caption=text)
    assert out["text"].numpy().tolist() == want
    assert out["text_cut"].numpy() == cut


def test_types_and_shapes_are_known_to_the_graph(model):
  pp = f"tokenize({common.TOKENIZER!r},9,key='title',key_result='ids')"
  spec, out = in_graph(pp, title="a five", image=tf.zeros([2, 2, 3]))
  assert spec["ids"] == tf.TensorSpec([9 + 1], tf.int32)
  assert spec["ids_cut"] == tf.TensorSpec([], tf.float32)
  assert set(out) == {"title", "image", "ids", "ids_cut"}
  assert out["ids"].tolist() == by_hand(model, "a five", 9)[0]


def test_a_text_that_is_no_utf_8():
  out = run(f"tokenize({common.TOKENIZER!r},9)", caption=b"a \xff five")
  same = run(f"tokenize({common.TOKENIZER!r},9)", caption="a \ufffd five")
  assert out["text"].numpy().tolist() == same["text"].numpy().tolist()


@pytest.mark.parametrize("caption", ["", " ", "\t \n"])
def test_an_empty_caption_is_an_error(caption):
  pp = f"tokenize({common.TOKENIZER!r},9)"
  with pytest.raises(tf.errors.InvalidArgumentError, match="caption is empty"):
    run(pp, caption=caption)
  with pytest.raises(tf.errors.InvalidArgumentError, match="caption is empty"):
    in_graph(pp, caption=caption)


@pytest.mark.parametrize(
  ("pp", "words"),
  [
    (f"tokenize({common.TOKENIZER!r},0)", ["max_length, got 0"]),
    (f"tokenize({common.TOKENIZER!r},-3)", ["max_length, got -3"]),
    (f"tokenize({common.TOKENIZER!r},7.5)", ["max_length, got 7.5"]),
    (f"tokenize({common.TOKENIZER!r},'7')", ["max_length, got '7'"]),
    (f"tokenize({common.TOKENIZER!r})", ["max_length"]),
    ("tokenize('no/such.model',7)", ["'no/such.model'", "no such file"]),
    ("tokenize('README.md',7)", ["'README.md'", "damaged"]),
  ],
)
def test_arguments_that_cannot_be(pp, words):
  with pytest.raises(ValueError) as e:
    get_preprocess_fn(f"lower|{pp}")
  for word in ["op 2 of 2", *words]:
    assert word in str(e.value)


@pytest.mark.parametrize("op", ["lower", f"tokenize({common.TOKENIZER!r},3)"])
def test_a_missing_caption_is_named(op):
  with pytest.raises(ValueError, match="op 1 of 1.*caption"):
    run(op, title="a dog")


# flatten


def test_flatten():
  data = {
    "image": tf.constant(1),
    "a/b": tf.constant(2),
    "captions": {"id": tf.constant([3, 4]), "deep": {"er": {"x": 5, "y": 6}}},
    "nothing": {},
  }
  out = get_preprocess_fn("flatten")(data, SEED)
  assert set(out) == {
    "image",
    "a/b",
    "captions/id",
    "captions/deep/er/x",
    "captions/deep/er/y",
  }
  assert out["captions/id"].numpy().tolist() == [3, 4]
  assert out["captions/deep/er/y"] == 6
  assert set(data) == {"image", "a/b", "captions", "nothing"}


# choice


def test_choice_takes_each_as_often():
  texts = [f"caption {i}" for i in range(5)]
  fn = get_preprocess_fn("choice('texts','one')")

  @tf.autograph.experimental.do_not_convert
  def draw(seed):
    return fn({"texts": tf.constant(texts)}, tf.stack([7, seed]))["one"]

  ds = tf.data.Dataset.range(2000).map(lambda i: draw(tf.cast(i, tf.int32)))
  drawn = [[t.decode() for t in ds.as_numpy_iterator()] for _ in range(2)]
  assert drawn[0] == drawn[1]
  times = collections.Counter(drawn[0])
  assert set(times) == set(texts)
  # Of 400; a standard deviation is 18.
  assert all(abs(n - 400) < 70 for n in times.values()), times


def test_choice_of_one_and_of_rows():
  out = run("choice('x')", x=["the only one"], y=[1, 2])
  assert out["x"].numpy() == b"the only one" and out["x"].shape == ()
  assert out["y"].numpy().tolist() == [1, 2]
  rows = np.arange(12).reshape(3, 2, 2)
  spec, out = in_graph("choice('x','row')", x=rows)
  assert spec["row"].shape == (2, 2)
  assert any(np.array_equal(out["row"], row) for row in rows)
  np.testing.assert_array_equal(out["x"], rows)


def test_nothing_to_choose_is_an_error():
  for fn in (run, in_graph):
    with pytest.raises(tf.errors.InvalidArgumentError, match="none to choose"):
      fn("choice('captions/text')", **{"captions/text": tf.zeros([0])})
  with pytest.raises(ValueError, match="op 1 of 1.*captions/text"):
    run("choice('captions/text')", x=[1])


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("data"))
  lookalikes.build("coco_captions", path, splits={"train": 7})
  return dict(name="coco_captions", split="train", data_dir=path)


def test_captions_of_training(coco, model):
  """Each epoch another draw, a function of seed, epoch and place."""
  steps, batch_size = 18, 4
  before = "copy('image/id','index')|flatten"
  ops = "choice('captions/text','caption')|lower('caption')"
  last = f"tokenize({common.TOKENIZER!r},40)|keep('index','text','text_cut')"

  def stream(seed=4, start_step=0):
    batches = input_pipeline.make_train(
      coco,
      pp=f"{before}|{ops}|{last}",
      batch_size=batch_size,
      seed=seed,
      start_step=start_step,
    )
    found = []
    for _, batch in zip(range(steps - start_step), batches, strict=False):
      assert batch["text"].shape == (batch_size, 41)
      found += zip(batch["index"].tolist(), batch["text"].tolist(), strict=True)
    return found

  found = stream()
  assert stream(start_step=11) == found[11 * batch_size :]
  assert stream(seed=5, start_step=14) != found[14 * batch_size :]
  places = list(input_pipeline.examples(coco, pp="flatten"))
  texts = {int(e["image/id"]): e["captions/text"].tolist() for e in places}
  ids = list(texts)

  @tf.function
  def which(epoch, place, count):
    # Choice is the third op: its seed is folded with 2.
    seed = order.fold(order.make_seed(4), 0, 1, epoch, place, 2)
    return tf.random.stateless_uniform([], seed, 0, count, tf.int32)

  drawn = collections.defaultdict(list)
  for position, (i, text) in enumerate(found):
    numbers = position // len(ids), ids.index(i), len(texts[i])
    number = int(which(*map(tf.constant, numbers)))
    caption = texts[i][number].decode().lower()
    assert text == by_hand(model, caption, 40)[0]
    drawn[i].append(number)
  # Each image comes ten times or so.
  assert all(len(set(several)) > 2 for several in drawn.values())
  assert len({tuple(several[:10]) for several in drawn.values()}) == len(ids)


def test_the_record_with_an_empty_caption_is_named(tmp_path, monkeypatch):
  captioned = lookalikes._captioned

  def one(rng, i):
    texts = [" \n"] if i == 3 else ["A dog", "Two dogs"]
    captions = [{"id": k, "text": text} for k, text in enumerate(texts)]
    return captioned(rng, i) | {"captions": captions}

  monkeypatch.setattr(lookalikes, "_captioned", one)
  lookalikes.build("coco_captions", tmp_path, splits={"val": 6})
  data = dict(name="coco_captions", split="val", data_dir=str(tmp_path))
  order_of_records = [
    int(e["image/id"])
    for e in input_pipeline.examples(data, pp="keep('image/id')")
  ]
  place = order_of_records.index(3)
  pp = "flatten|choice('captions/text','caption')|tokenize({!r},9)|{}"
  batches, _ = input_pipeline.make_eval(
    data, pp=pp.format(common.TOKENIZER, "keep('text')"), batch_size=6
  )
  with pytest.raises(ValueError, match="the caption is empty") as e:
    list(batches)
  assert f"record {place} " in str(e.value)
