"""Tests of data/digit_captions."""

import collections
import hashlib
import itertools
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from scipy import stats

from data.digit_captions import Builder, check, grammar
from data.digit_captions import digit_captions_dataset_builder as module
from data.digits import digits_dataset_builder as still
from lookup_vit.analysis import caption_files
from tests import programs

NAMES = [
  *("zero", "one", "two", "three", "four"),
  *("five", "six", "seven", "eight", "nine"),
]
WORDS = {
  *NAMES,
  *("small", "large", "top", "bottom", "left", "right", "corner"),
  *("above", "below", "to", "of", "which", "in", "at", "and", "a", "an"),
  *("the", "there", "is", "are", "digit", "digits", "single", "shows"),
}
D = grammar.Digit
# A small three above and to the left of a large five.
TWO = [D(3, 0, 0, 0), D(5, 1, 1, 1)]
THREE = [*TWO[:1], D(9, 1, 0, 1), *TWO[1:]]


@pytest.fixture(scope="module")
def held_out():
  """The test split."""
  return [module.example("test", i) for i in range(1000)]


def scene(example):
  return [D(**d) for d in example["digits"]]


def texts(example):
  return [c["text"] for c in example["captions"]]


def wrong(text, digits):
  """The keys that are false, without `all`, which follows."""
  right = grammar.check(text, digits)
  assert tuple(right) == grammar.KEYS
  assert right.pop("all") == all(right.values())
  return {key for key, value in right.items() if not value}


# The data.


def test_what_tfds_builds(tmp_path, held_out):
  few = tfds.download.DownloadConfig(max_examples_per_split=24)
  files = []
  for name in ("a", "b"):
    builder = Builder(data_dir=tmp_path / name)
    builder.download_and_prepare(download_config=few)
    files.append(sorted(pathlib.Path(builder.data_dir).glob("*.tfrecord*")))
  assert len(files[0]) == 2
  for a, b in zip(*files, strict=True):
    assert a.read_bytes() == b.read_bytes()

  features = builder.info.features
  assert features["digits"]["size"].names == ["small", "large"]
  assert features["parts"].feature.num_classes == 80
  assert builder.info.citation and builder.info.homepage
  read = list(builder.as_dataset(split="test").as_numpy_iterator())
  assert sorted(e["image/id"] for e in read) == list(range(36000, 36024))
  for got in read:
    want = held_out[got["image/id"] - 36000]
    np.testing.assert_array_equal(got["image"], want["image"])
    np.testing.assert_array_equal(got["parts"], want["parts"])
    assert [t.decode() for t in got["captions"]["text"]] == texts(want)
    assert got["captions"]["id"].tolist() == [
      5 * want["image/id"] + i for i in range(5)
    ]
    for name, values in got["digits"].items():
      assert values.tolist() == [d[name] for d in want["digits"]]


def test_sizes_and_ids():
  assert list(module.SPLITS.items()) == [("train", 36000), ("test", 1000)]
  last = module.example("train", 35999)
  first = module.example("test", 0)
  assert (last["image/id"], first["image/id"]) == (35999, 36000)
  assert last["captions"][-1]["id"] + 1 == first["captions"][0]["id"]
  assert not np.array_equal(first["image"], module.example("train", 0)["image"])


def test_pixels_and_texts_never_change():
  digest = hashlib.sha256()
  for split in module.SPLITS:
    for i in range(20):
      example = module.example(split, i)
      digest.update(np.ascontiguousarray(example["image"]))
      rest = {k: v for k, v in example.items() if k != "image"}
      digest.update(json.dumps(rest).encode())
  assert digest.hexdigest() == (
    "7d25f15a2067d4a8fda67d5a83eefa7f5048aef387a0c86ba9cf0d73fa4dcb6f"
  )


def trimmed(image):
  """What is inside the box of the ink, and the corner of the box."""
  rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
  box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
  return (box.shape, box.tobytes()), (rows[0], columns[0])


@pytest.fixture(scope="module")
def glyphs():
  """All digits: of the ink, the size, digit, split and margins."""
  source, splits = still.load()
  table = collections.defaultdict(list)
  for split, ids in splits.items():
    for i in ids:
      for size, pixels in enumerate((12, 16)):
        image = still.upsample(source.images[i], pixels)[..., 0]
        ink, margin = trimmed(image)
        table[ink].append((size, source.target[i], split, margin))
  return table


def ink(image):
  """Of each cell with ink, row, column, the ink, and where it begins."""
  assert image.shape == (32, 32, 3) and image.dtype == np.uint8
  assert (image == image[..., :1]).all()
  for row, column in np.ndindex(2, 2):
    cell = image[16 * row :, 16 * column :, 0][:16, :16]
    if cell.any():
      yield (row, column, *trimmed(cell))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_scene_is_in_the_pixels(split, glyphs, held_out):
  """By the ink alone: cells, names and sizes, and whose hand it is."""
  examples = held_out
  if split == "train":
    examples = [module.example("train", i) for i in range(0, 36000, 36)]
  places = []
  for example in examples:
    found = []
    for row, column, key, start in ink(example["image"]):
      [(size, digit, of_split, margin)] = glyphs[key]
      assert of_split == split
      found.append(D(digit, size, row, column))
      places.append(np.subtract(start, margin))
    assert found == scene(example)
    assert example["parts"] == [
      40 * d.row + 20 * d.column + 10 * d.size + d.digit for d in found
    ]
  # All begin where their cells do.
  assert not np.any(places)


def test_scenes_are_uniform(held_out):
  scenes = list(map(scene, held_out))
  counts = {
    "number": [len(s) for s in scenes],
    "digit": [d.digit for s in scenes for d in s],
    "size": [d.size for s in scenes for d in s],
    "cell": [(d.row, d.column) for s in scenes for d in s],
    "pair": [
      tuple((d.row, d.column) for d in s) for s in scenes if len(s) == 2
    ],
  }
  want = {"number": 2, "digit": 10, "size": 2, "cell": 4, "pair": 6}
  for name, values in counts.items():
    times = list(collections.Counter(values).values())
    assert len(times) == want[name]
    assert stats.chisquare(times).pvalue > 1e-3


def test_names_of_the_parts():
  assert len(set(module.PARTS)) == 80
  assert module.PARTS[module.part(D(7, 1, 0, 0))] == "large seven top left"
  assert module.PARTS[module.part(D(0, 0, 1, 0))] == "small zero bottom left"


# The references.


def test_references_are_true(held_out):
  for example in held_out:
    assert len(set(texts(example))) == 5
    for text in texts(example):
      assert not wrong(text, scene(example)), text
      for comma in ("", " ,\n"):
        assert not wrong(text.replace(",", comma), scene(example)), text


def test_words(held_out):
  words = [t.replace(",", "").split() for e in held_out for t in texts(e)]
  # Which is said of a third digit.
  assert set(itertools.chain(*words)) == WORDS - {"which"}
  assert max(map(len, words)) <= 19


def test_the_plain_sentence_comes_first(held_out):
  """And is the most probable one by far."""
  assert grammar.plain(THREE) == (
    "in the top left is a small three, in the top right a large nine, "
    "in the bottom right a large five"
  )
  assert grammar.plain(TWO[::-1]) == (
    "in the top left is a small three, in the bottom right a large five"
  )
  for example in held_out:
    assert texts(example)[0] == grammar.plain(scene(example))
  for digits in (TWO[:1], TWO, THREE):
    rng = np.random.RandomState(0)
    times = collections.Counter()
    for _ in range(500):
      times.update(grammar.describe(digits, rng))
    (_, first), (_, second) = times.most_common(2)
    assert times[grammar.plain(digits)] == first == 500
    assert second < 0.5 * first


def template(text):
  for start, name in (
    ("there ", "counted"),
    ("the ", "shows"),
    (("in the", "at the"), "where_first"),
    ("a single", "chain"),
  ):
    if text.startswith(start):
      return name
  return "list" if " the top " in text or " the bottom " in text else "chain"


def test_distribution_of_the_templates():
  """Of a scene with many sentences, so that few are drawn twice."""
  rng = np.random.RandomState(1)
  drawn = [t for _ in range(1000) for t in grammar.describe(THREE, rng)[1:]]
  times = collections.Counter(map(template, drawn))
  for name, probability in grammar.TEMPLATES.items():
    assert abs(times[name] / len(drawn) - probability) < 0.05, name


def test_nothing_to_describe():
  for digits in ([], [TWO[0], TWO[0]._replace(digit=4)]):
    with pytest.raises(ValueError, match="a cell of its own"):
      grammar.describe(digits, np.random.RandomState(0))


# What a sentence claims.


@pytest.mark.parametrize(
  "text",
  [
    "a small three in the top left and a large five in the bottom right",
    "a large five at the bottom right corner and a three at the top left",
    "there are two digits, a small three in the top left and a five in the "
    "bottom right",
    "  a small three\tabove and to the left of  a large five\n",
    "a five below and to the right of a three",
    "in the top left is a small three, in the bottom right a large five",
    "the bottom right shows a five and the top left corner shows a three",
  ],
)
def test_true_of_two(text):
  assert not wrong(text, TWO)
  # The same words are wrong of another scene.
  assert wrong(text, TWO[:1]) >= {"count", "names"}
  assert wrong(text, THREE) == {"count", "names"}


@pytest.mark.parametrize(
  ("text", "keys"),
  [
    ("a small three in the top left and a four in the bottom right", "names"),
    ("a large three in the top left and a five in the bottom right", "sizes"),
    ("a three in the top right and a five in the bottom right",
     "places relations"),
    ("a three in the bottom right and a five in the top left",
     "places relations"),
    ("a large three at the top right and a five at the bottom right",
     "sizes places relations"),
    ("a three above a five", "relations"),
    ("a three to the left of a five", "relations"),
    ("a three below and to the right of a five", "relations"),
    ("a three and a five in the bottom right", "relations"),
    ("a three in the top left", "count names"),
    ("a single three", "count names relations"),
    ("a three in the top left, a five in the bottom right and a five in the "
     "bottom right", "count names places relations"),
    ("there are three digits, a three in the top left and a five in the "
     "bottom right", "count"),
    ("there is one digit, a three in the top left and a five in the bottom "
     "right", "count"),
  ],
)  # fmt: skip
def test_false_of_two(text, keys):
  assert wrong(text, TWO) == set(keys.split())


def test_digits_of_one_name():
  """One way to tell them apart has to make all true."""
  digits = [D(3, 0, 0, 0), D(3, 1, 0, 1), D(3, 0, 1, 1)]
  for text in (
    "a large three at the top right, a three at the top left and a small "
    "three at the bottom right",
    "a small three to the left of a large three, which is above a small three",
    "a three below and to the right of a small three, which is to the left of "
    "a three",
    "a three to the left of a three, which is above a three",
  ):
    assert not wrong(text, digits)
  for text, keys in (
    # Two are small; each place and each size is one that there is.
    ("a large three at the top left, a small three at the top right and a "
     "three at the bottom right", {"sizes"}),
    ("a three at the top left, a three at the top left and a three at the "
     "bottom right", {"places", "relations"}),
    ("a three above a three, which is above a three", {"relations"}),
    ("a large three to the left of a three, which is above a three", {"sizes"}),
  ):  # fmt: skip
    assert wrong(text, digits) == keys, text


def test_a_chain_says_of_each_pair_how_it_lies(held_out):
  """By coordinates, of random chains that are right or not."""

  def lies(a, b):
    words = {
      "above": a.row < b.row,
      "below": a.row > b.row,
      "to the left of": a.column < b.column,
      "to the right of": a.column > b.column,
    }
    return " and ".join(word for word, is_so in words.items() if is_so)

  cells = list(itertools.product(range(2), range(2)))
  phrases = [
    lies(D(0, 0, *a), D(0, 0, *b)) for a, b in itertools.permutations(cells, 2)
  ]
  assert len(set(phrases)) == 8
  rng = np.random.default_rng(0)
  seen = collections.Counter()
  for _ in range(2000):
    # Of three names, so that some come twice.
    digits = [D(int(rng.integers(3)), 0, *c) for c in rng.permutation(cells)]
    digits = digits[: rng.integers(2, 4)]
    said = [digits[i] for i in rng.permutation(len(digits))]
    true = [lies(a, b) for a, b in itertools.pairwise(said)]
    stated = [str(rng.choice([p] * 8 + phrases)) for p in true]
    text = f"a {NAMES[said[0].digit]}"
    for i, (phrase, digit) in enumerate(zip(stated, said[1:], strict=True)):
      text += ", which is" * (i > 0) + f" {phrase} a {NAMES[digit.digit]}"
    names = [d.digit for d in said]
    right = any(
      [d.digit for d in order] == names
      and [lies(a, b) for a, b in itertools.pairwise(order)] == stated
      for order in itertools.permutations(digits)
    )
    assert wrong(text, digits) == (set() if right else {"relations"}), text
    seen[right, stated == true] += 1
  # Among them those that are true of another digit of the name alone.
  assert seen[True, True] > 500 and seen[False, False] > 300
  assert seen[True, False] > 10 and not seen[False, True]


def mutations(text, digits, rng):
  """Sentences that differ in one claim, each with the key that is wrong."""
  words = text.split(" ")
  bare = [w.strip(",") for w in words]
  related = "above" in bare or "below" in bare or "to" in bare
  for i, word in enumerate(bare):
    if word in ("small", "large"):
      yield i, {"small": "large", "large": "small"}[word], "sizes"
    elif word in NAMES and bare[i + 1 : i + 2] in (["digits"], ["digit"]):
      if word != "one":
        others = {"two", "three", "four"} - {word}
        yield i, str(rng.choice(sorted(others))), "count"
    elif word in NAMES and word != "eight":
      names = {NAMES[d.digit] for d in digits} | {"eight"}
      yield i, str(rng.choice(sorted(set(NAMES) - names))), "names"
    elif word in ("top", "bottom"):
      yield i, {"top": "bottom", "bottom": "top"}[word], "places"
    elif word in ("left", "right"):
      other = {"left": "right", "right": "left"}[word]
      yield i, other, "relations" if related else "places"
    elif word in ("above", "below"):
      yield i, {"above": "below", "below": "above"}[word], "relations"


def test_one_claim_that_is_false_is_found(held_out):
  rng = np.random.default_rng(0)
  times = collections.Counter()
  for example in held_out:
    digits = scene(example)
    unique = len({d.digit for d in digits}) == len(digits)
    for text in texts(example):
      words = text.split(" ")
      for i, word, key in mutations(text, digits, rng):
        comma = "," * words[i].endswith(",")
        changed = " ".join([*words[:i], word + comma, *words[i + 1 :]])
        keys = wrong(changed, digits)
        if key == "places" and len(digits) > 1:
          # With the place it is another relation.
          assert "relations" in keys
          keys -= {"relations"}
        if unique:
          assert keys == {key}, changed
        elif key == "relations":
          # Another one of the name may be meant, as in "a two above a two".
          assert keys <= {"relations", "sizes"}, changed
        else:
          assert keys, changed
        times[key] += 1
  assert set(times) == {"sizes", "count", "names", "places", "relations"}
  assert min(times.values()) > 400


def test_a_scene_with_one_change_is_told_from_it(held_out):
  for example in held_out:
    digits = scene(example)
    if len({d.digit for d in digits}) < len(digits):
      continue
    first, *others = digits
    text = grammar.plain(digits)
    name = next(n for n in range(10) if n not in {d.digit for d in digits})
    free = next(
      c
      for c in itertools.product(range(2), range(2))
      if c not in {(d.row, d.column) for d in digits}
    )
    moved = {"places"}
    for d in others:
      before, after = (
        np.sign(np.subtract(cell, (d.row, d.column))).tolist()
        for cell in ((first.row, first.column), free)
      )
      if before != after:
        moved.add("relations")
    for change, keys in (
      ({"digit": name}, {"names"}),
      ({"size": 1 - first.size}, {"sizes"}),
      ({"row": free[0], "column": free[1]}, moved),
    ):
      assert wrong(text, [first._replace(**change), *others]) == keys
    more = [*digits, D(name, 0, *free)]
    assert wrong(text, more) == {"count", "names"}
    assert wrong(text, others) >= {"count", "names"}


# What is no sentence.


@pytest.mark.parametrize(
  "text",
  [
    "",
    ",",
    "a",
    "a dog in the top left",
    "three in the top left",
    "a eight in the top left",
    "an large eight in the top left",
    "a threein the top left",
    "a three in the top left and",
    "a three in the top left a five in the top right",
    "a three in the top left and a five in the top right and a two",
    "a small large three in the top left",
    "a three in the left top",
    "there are two digits",
    "there is one digits, a three in the top left",
    "there are one digits, a three in the top left",
    "a three above",
    "a three above a five which is",
    "a three above and below a five",
    "a single three in the top left and a five in the top right",
    "in the top left a three",
    "the top left shows",
    "A three in the top left",
    "a three in the top left.",
    "a three \x00",
    " and ".join([", ".join(["a two"] * 9), "a two"]),
  ],
)
def test_no_sentence(text):
  assert grammar.parse(text) is None
  assert not any(grammar.check(text, TWO).values())


def test_sentences_of_up_to_nine_digits():
  text = " and ".join([", ".join(["a two"] * 8), "an eight"])
  claims = grammar.parse(text)
  assert [m.name for m in claims.mentions] == [2] * 8 + [8]
  assert wrong(text, THREE) == {"count", "names", "relations"}
  claims = grammar.parse("there are nine digits, a small one")
  assert claims == grammar.Claims((grammar.Mention(1, 0),), count=9)


def test_any_text_can_be_read(held_out):
  rng = np.random.default_rng(0)
  words = [*sorted(WORDS), ",", ".", "\n", "</s>", "é", "\u2003", "(", "*"]
  for _ in range(3000):
    text = " ".join(rng.choice(words, size=rng.integers(30)))
    assert set(grammar.check(text, THREE)) == set(grammar.KEYS)
  # References with words that are missing, come twice or are moved.
  read = 0
  for example in held_out:
    tokens = texts(example)[-1].split()
    picked = rng.integers(len(tokens), size=2)
    for some in (
      np.delete(tokens, picked),
      np.insert(tokens, picked, rng.choice(tokens)),
      rng.permutation(tokens),
    ):
      text = " ".join(some)
      claims = grammar.parse(text)
      read += claims is not None
      grammar.check(text, scene(example))
  assert 0 < read < 1500
  # Nothing takes long, whatever the length.
  for text in ("a two ", "in the top left is a two ", "a"):
    assert grammar.parse(text * 100_000) is None


# The program.


def results(held_out, which=0):
  return {e["image/id"]: texts(e)[which] for e in held_out}


def test_shares(held_out):
  rows = check.shares(results(held_out, 3))
  assert list(rows) == ["all", "1", "2"]
  lengths = collections.Counter(len(e["digits"]) for e in held_out)
  for group, row in rows.items():
    scenes = 1000 if group == "all" else lengths[int(group)]
    assert row == {"scenes": scenes, **dict.fromkeys(grammar.KEYS, 1)}

  wanted = results(held_out)
  of_one = [i for i, e in enumerate(held_out) if len(e["digits"]) == 1]
  for i in of_one[:50]:
    wanted[36000 + i] = "a dog"
  for i in of_one[50:60]:
    (digit,) = scene(held_out[i])
    noun = f"a {['small', 'large'][digit.size]} {NAMES[digit.digit]}"
    place = wanted[36000 + i].removeprefix("in ").split(" is ")[0]
    wanted[36000 + i] = f"there are two digits, {noun} in {place}"
  rows = check.shares(dict(reversed(wanted.items())))
  n = lengths[1]
  assert rows["1"]["grammatical"] == rows["1"]["places"] == (n - 50) / n
  assert rows["1"]["count"] == rows["1"]["all"] == (n - 60) / n
  assert rows["all"]["all"] == 0.94 and rows["2"]["all"] == 1
  lines = check.table(rows).splitlines()
  assert lines[0] == (
    "| digits | scenes | grammatical | count | names | sizes | places | "
    "relations | all |"
  )
  assert lines[2] == (
    "| all | 1000 | 95.0 | 94.0 | 95.0 | 95.0 | 95.0 | 95.0 | 94.0 |"
  )


def test_images_of_another_split_and_missing_ones(held_out):
  wanted = results(held_out)
  other = {i: caption for i, caption in wanted.items() if i >= 36007}
  other[3] = ""
  with pytest.raises(ValueError) as e:
    check.shares(other)
  assert str(e.value) == (
    "want one caption for each of the 1000 images of test; 7 without a "
    "caption: 36000, 36001, 36002, 36003, 36004, ...; 1 not of the split: 3."
  )


def run(path):
  program = programs.Program(
    *("-m", "data.digit_captions.check", f"--results={path}")
  )
  out, err = program.communicate(timeout=120)
  return program.returncode, out, err


def test_program(tmp_path, held_out):
  path = tmp_path / "captions.json"
  captions = results(held_out)
  caption_files.write_results(path, captions)
  status, out, _ = run(path)
  assert status == 0
  assert out == check.table(check.shares(captions)) + "\n"

  other = tmp_path / "other.json"
  caption_files.write_results(other, {**captions, 36007: "a dog"})
  status, out, _ = run(f"{path},{other}")
  assert status == 0
  head, _, *lines = out.splitlines()
  assert head.startswith("| results | scenes | grammatical |")
  shown = {str(path): "100.0", str(other): "99.9", "mean": "100.0"}
  assert lines == [
    f"| {name} | 1000 |" + f" {share} |" * len(grammar.KEYS)
    for name, share in shown.items()
  ]

  del captions[36999]
  caption_files.write_results(path, captions)
  status, out, err = run(path)
  assert status == 1 and not out
  assert err.startswith(f"error: {path}: want one caption for each of")
  assert err.endswith("1 without a caption: 36999.\n")
