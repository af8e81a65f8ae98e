"""The language of the captions: from a scene to sentences, and back.

`describe` writes the references of a scene. `parse` reads any text, and `check`
compares what it claims with a scene: whether a caption is true needs no
reference, and no likeness to one.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

NAMES = (
  *("zero", "one", "two", "three", "four"),
  *("five", "six", "seven", "eight", "nine"),
)
SIZES = ("small", "large")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
# Of one thing to another, by the signs of the differences of row and column.
RELATIONS = {
  (-1, 0): "above",
  (1, 0): "below",
  (0, -1): "to the left of",
  (0, 1): "to the right of",
  (-1, -1): "above and to the left of",
  (-1, 1): "above and to the right of",
  (1, -1): "below and to the left of",
  (1, 1): "below and to the right of",
}
# The probabilities of the templates of all references but the first.
TEMPLATES = {
  "list": 0.3,
  "counted": 0.3,
  "chain": 0.2,  # "single" where there is one digit.
  "where_first": 0.1,
  "shows": 0.1,
}
REFERENCES = 5
KEYS = (
  *("grammatical", "count", "names", "sizes", "places", "relations", "all"),
)


class Digit(NamedTuple):
  """A digit of a scene: its name, its index in `SIZES`, and its cell."""

  digit: int
  size: int
  row: int
  column: int


@dataclasses.dataclass(frozen=True)
class Mention:
  """What a sentence says of one digit; what it leaves open is None."""

  name: int
  size: int | None = None
  place: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Claims:
  """What a sentence says.

  Attributes:
    mentions: the digits, in the order in which they are named.
    count: the number of digits that is stated in words, or None.
    relations: pairs of mentions, and how the first lies to the second, as a
      key of `RELATIONS`.
  """

  mentions: tuple[Mention, ...]
  count: int | None = None
  relations: tuple[tuple[int, int, tuple[int, int]], ...] = ()


def relation(a: Digit, b: Digit) -> tuple[int, int]:
  """How `a` lies to `b`, as a key of `RELATIONS`.

  Two digits have one relation: "above" alone is in the same column.
  """
  return int(np.sign(a.row - b.row)), int(np.sign(a.column - b.column))


# From a scene to sentences.


def plain(digits: Sequence[Digit]) -> str:
  """The first reference: all digits in reading order, with places and sizes."""
  digits = _reading_order(digits)
  return _where_first(digits, [_mention(d, True) for d in digits], "in")


def describe(digits: Sequence[Digit], rng: np.random.RandomState) -> list[str]:
  """Describes a scene in `REFERENCES` different sentences.

  Args:
    digits: at least one, in cells of their own.
    rng: draws templates, order, sizes and prepositions.

  Returns:
    `plain(digits)`, and sentences drawn as README.md says.

  Raises:
    ValueError: there is no digit, or there are two in one cell.
  """
  digits = _reading_order(digits)
  sentences = [plain(digits)]
  while len(sentences) < REFERENCES:
    sentence = _draw(digits, rng)
    if sentence not in sentences:
      sentences.append(sentence)
  return sentences


def _reading_order(digits):
  digits = sorted(digits, key=lambda d: (d.row, d.column))
  cells = {(d.row, d.column) for d in digits}
  if not digits or len(cells) < len(digits):
    raise ValueError(f"{digits}: want digits, each in a cell of its own.")
  return digits


def _draw(digits, rng):
  template = rng.choice(list(TEMPLATES), p=list(TEMPLATES.values()))
  if rng.rand() < 0.5:
    digits = [digits[i] for i in rng.permutation(len(digits))]
  sized = np.ones(len(digits), bool)
  if rng.rand() < 0.5:
    sized = rng.rand(len(digits)) < 0.5
  preposition = rng.choice(["in", "at"])
  mentions = list(map(_mention, digits, sized))
  if template == "list":
    return _list(digits, sized, preposition)
  if template == "counted":
    count = f"are {NAMES[len(digits)]} digits"
    if len(digits) == 1:
      count = "is one digit"
    return f"there {count}, {_list(digits, sized, preposition)}"
  if template == "where_first":
    return _where_first(digits, mentions, preposition)
  if template == "shows":
    cells = [f"the {_cell(d)} shows" for d in digits]
    return _join(list(map(" ".join, zip(cells, mentions, strict=True))))
  if len(digits) == 1:
    noun = mentions[0].split(" ", 1)[1]
    return f"a single {noun} {preposition} the {_cell(digits[0])} corner"
  sentence = mentions[0]
  for i, mention in enumerate(mentions[1:]):
    sentence += ", which is" * (i > 0)
    sentence += f" {RELATIONS[relation(digits[i], digits[i + 1])]} {mention}"
  return sentence


def _where_first(digits, mentions, preposition):
  places = [f"{preposition} the {_cell(d)}" for d in digits]
  places[0] += " is"
  return ", ".join(map(" ".join, zip(places, mentions, strict=True)))


def _list(digits, sized, preposition):
  return _join(
    [
      f"{_mention(d, s)} {preposition} the {_cell(d)}"
      for d, s in zip(digits, sized, strict=True)
    ]
  )


def _join(items):
  return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _mention(digit, sized):
  noun = f"{SIZES[digit.size]} " * bool(sized) + NAMES[digit.digit]
  return f"an {noun}" if noun == "eight" else f"a {noun}"


def _cell(digit):
  return f"{ROWS[digit.row]} {COLUMNS[digit.column]}"


# From a sentence to claims.

_NOUN = rf"(?:(?:{'|'.join(SIZES)}) )?(?:{'|'.join(NAMES)})"
_ANY = rf"\b(?:an (?=eight)|a (?!eight)){_NOUN}\b"
_CELL = rf"the (?:{'|'.join(ROWS)}) (?:{'|'.join(COLUMNS)})(?: corner)?"
_PLACE = f"(?:in|at) {_CELL}"
_ITEM = f"{_ANY}(?: {_PLACE})?"
_SHOWS = f"{_CELL} shows {_ANY}"
# The longer ones first, as the first that fits is taken.
_SIDE = f"(?:{'|'.join(sorted(RELATIONS.values(), key=len, reverse=True))})"
_COUNT = f"is one digit|are (?:{'|'.join(NAMES[2:])}) digits"

_LIST = re.compile(
  f"(?:there ({_COUNT}) )?{_ITEM}(?:(?: {_ITEM})* and {_ITEM})?"
)
_SINGLE = re.compile(f"a single ({_NOUN})(?: {_PLACE})?")
_PLACES_FIRST = re.compile(
  f"{_PLACE} is {_ANY}(?: {_PLACE} {_ANY})*"
  f"|{_SHOWS}(?:(?: {_SHOWS})* and {_SHOWS})?"
)
_CHAIN = re.compile(f"{_ANY} {_SIDE} {_ANY}(?: which is {_SIDE} {_ANY})*")


def parse(text: str) -> Claims | None:
  """Reads a sentence.

  Commas and the kind of white space say nothing. Beyond what `describe` writes,
  a sentence may name up to nine digits, leave out the place of some, say
  "corner" of any, and state a count that is not that of its digits: it is
  then a sentence, though a wrong one.

  Args:
    text: any.

  Returns:
    What it claims; None where it is no sentence of the grammar.
  """
  text = " ".join(text.replace(",", " ").split())
  count, relations = None, ()
  if match := _LIST.fullmatch(text):
    if match[1]:
      count = NAMES.index(match[1].split()[1])
    found = re.findall(f"({_ANY})(?: ({_PLACE}))?", text)
  elif match := _SINGLE.fullmatch(text):
    count = 1
    found = re.findall(f"({_NOUN})(?: ({_PLACE}))?", text)
  elif _PLACES_FIRST.fullmatch(text):
    found = re.findall(f"({_CELL}) (?:is |shows )?({_ANY})", text)
    found = [(noun, place) for place, noun in found]
  elif _CHAIN.fullmatch(text):
    found = [(noun, "") for noun in re.findall(_ANY, text)]
    signs = {phrase: key for key, phrase in RELATIONS.items()}
    relations = tuple(
      (i, i + 1, signs[phrase])
      for i, phrase in enumerate(re.findall(_SIDE, text))
    )
  else:
    return None
  if len(found) >= len(NAMES):
    return None
  return Claims(tuple(itertools.starmap(_read, found)), count, relations)


def _read(noun, place):
  """A mention, of its words and those of its place, if any."""
  *before, name = noun.split()
  size = SIZES.index(before[-1]) if before and before[-1] in SIZES else None
  words = place.removesuffix(" corner").split()[-2:]
  cell = (ROWS.index(words[0]), COLUMNS.index(words[1])) if words else None
  return Mention(NAMES.index(name), size, cell)


# From claims to truth.


def check(text: str, digits: Sequence[Digit]) -> dict[str, bool]:
  """Whether what a caption claims is true of a scene.

  Mentions are assigned to digits, each to another one. Of all assignments,
  that one counts in which most mentions have their digit's name, and of these
  the one in which most of the other claims hold. So if all can be true, all is.
  What is claimed of a mention for which no digit is left is false.

  Args:
    text: a caption.
    digits: the scene.

  Returns:
    For each of `KEYS` whether it is right:
      grammatical: the text is a sentence. Otherwise nothing is right.
      count: as many digits are named as there are, and a count in words agrees.
      names: the names are those of the digits, each as often.
      sizes: every size that is stated is true.
      places: every absolute place that is stated is true.
      relations: every relation that is stated, or follows from the places of
        two digits, is true, and every digit that is named has one or the other.
      all: all of these.
  """
  claims = parse(text)
  if claims is None:
    return dict.fromkeys(KEYS, False)
  mentions = claims.mentions
  judged = [
    _judge(claims, assigned) for assigned in _assignments(mentions, digits)
  ]
  best = max(
    judged,
    key=lambda truths: (sum(truths["names"]), sum(map(sum, truths.values()))),
  )
  related = {i for *pair, _ in claims.relations for i in pair}
  located = [m.place or i in related for i, m in enumerate(mentions)]
  names = collections.Counter(m.name for m in mentions)
  right = {
    "grammatical": True,
    "count": len(mentions) == len(digits)
    and claims.count in (None, len(digits)),
    "names": names == collections.Counter(d.digit for d in digits),
    "sizes": all(best["sizes"]),
    "places": all(best["places"]),
    "relations": all(best["relations"]) and all(located),
  }
  return {**right, "all": all(right.values())}


def _assignments(
  mentions: Sequence[Mention], digits: Sequence[Digit]
) -> Iterator[tuple[Digit | None, ...]]:
  """All ways to give as many mentions as can be a digit of their own."""
  if len(mentions) <= len(digits):
    yield from itertools.permutations(digits, len(mentions))
    return
  for taken in itertools.permutations(range(len(mentions)), len(digits)):
    owner = dict(zip(taken, digits, strict=True))
    yield tuple(owner.get(i) for i in range(len(mentions)))


def _implied(mentions):
  """Relations of all pairs of mentions that have a place."""
  placed = [
    (i, Digit(m.name, 0, *m.place)) for i, m in enumerate(mentions) if m.place
  ]
  for (i, a), (j, b) in itertools.combinations(placed, 2):
    yield i, j, relation(a, b)


def _judge(claims, assigned):
  """The truth of each claim, by kind, where mentions mean these digits."""
  pairs = list(zip(claims.mentions, assigned, strict=True))
  return {
    "names": [d is not None and m.name == d.digit for m, d in pairs],
    "sizes": [
      d is not None and m.size == d.size for m, d in pairs if m.size is not None
    ],
    "places": [
      d is not None and m.place == (d.row, d.column)
      for m, d in pairs
      if m.place is not None
    ],
    "relations": [
      None not in (assigned[i], assigned[j])
      and relation(assigned[i], assigned[j]) == sign
      for i, j, sign in (*claims.relations, *_implied(claims.mentions))
    ],
  }
