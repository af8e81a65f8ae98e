"""Tests of lookup_vit.models.decoding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookup_vit.models import decoding
from tests.models import common

SPACE = (8, 12)
BATCH = 5
BEGIN, END = 1, 2
SEEDS = (0, 1, 2)


# The reference: no cache, no arrays of beams, no early end.


def best(hypotheses, count):
  """The `count` best of `(ids, score)`."""
  return sorted(hypotheses, key=lambda h: -h[1])[:count]


def normalised(log_p, ids, alpha):
  return log_p / ((5 + len(ids)) / 6) ** alpha


def greedy(log_probs, end, length):
  """Ids, from `log_probs(prefixes)`, those of the next id of each prefix."""
  ids = ()
  while len(ids) < length and end not in ids:
    (row,) = log_probs([ids])
    ids += (int(np.argmax(row)),)
  return ids


def beam_search(log_probs, beams, end, length, alpha):
  """Best captions and their scores, `[(ids, score), ...]`."""
  live, done = [((), 0.0)], []
  for _ in range(length):
    rows = log_probs([ids for ids, _ in live])
    grown = [
      ((*ids, i), total + float(log_p))
      for (ids, total), row in zip(live, rows, strict=True)
      for i, log_p in enumerate(row)
    ]
    grown = best(grown, 2 * beams)
    for ids, total in grown:
      if ids[-1] == end:
        done.append((ids, normalised(total, ids, alpha)))
    done = best(done, beams)
    live = best([h for h in grown if h[0][-1] != end], beams)
  done += [(ids, normalised(total, ids, alpha)) for ids, total in live]
  return best(done, beams)


def padded(ids, end, length):
  return [*ids, *[end] * (length - len(ids))]


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - np.max(x, -1, keepdims=True)
  return x - np.log(np.sum(np.exp(x), -1, keepdims=True))


def cut(ids, end):
  """A caption's ids up to its end; behind that there is nothing else."""
  ids = tuple(int(i) for i in ids)
  if end not in ids:
    return ids
  count = ids.index(end) + 1
  assert set(ids[count:]) <= {end}
  return ids[:count]


# Captioners: with the cache as without.


@functools.partial(common.jit, static_argnums=(0, 1))
def next_logits(model, fields, params, images, inputs):
  """Logits of each prefix, by the whole model on all of its ids."""
  variables = {"params": params}
  return model.apply(variables, images, inputs, **dict(fields))[0]


def log_probs_of(model, params, image, fields=()):
  """A function of prefixes, for an image."""
  images = np.stack([image] * BATCH)

  def log_probs(prefixes):
    # Rows and places beyond those asked for do not count.
    inputs = np.zeros((BATCH, model.max_length), np.int32)
    inputs[:, 0] = BEGIN
    for row, ids in zip(inputs, prefixes, strict=False):
      row[1 : 1 + len(ids)] = ids
    logits = next_logits(model, fields, params, images, inputs)
    return [
      log_softmax(row[len(ids)])
      for row, ids in zip(logits, prefixes, strict=False)
    ]

  return log_probs


@functools.partial(common.jit, static_argnums=(0, 3))
def caption(model, params, images, options):
  options = dict(options, begin=BEGIN, end=END)
  return decoding.caption(model, params, images, **options)


@functools.partial(common.jit, static_argnums=(0, 3))
def search(model, params, images, options):
  """All beams, and their scores."""
  options = dict(options)
  beams, length = options["beams"], options["length"]
  cache = model.start(params, images, beams=beams, length=length)
  step = functools.partial(model.step, params)
  return decoding.beam_search(
    step, model.reorder, cache, len(images), begin=BEGIN, end=END, **options
  )


def random_captioner(kind, ids, seed, bias):
  """A captioner, and parameters with which captions of a batch differ.

  An image, and the place of an id, make much of a difference; `END` is less
  probable at first, and by `bias` more.
  """
  model = common.make_captioner(kind, ids, encoder=dict(depth=1))
  images, _ = common.random_batch(*SPACE, batch=BATCH, seed=seed)
  params = common.random_params(model, images, seed)
  decoder = params["decoder"]
  for i in range(model.depth):
    attention = decoder[f"decoderblock_{i}"]["cross_attention"]
    attention["value"]["kernel"] *= 4
  head = decoder["head"]
  head["kernel"] *= 4
  head["bias"][END] = bias
  decoder["pos_embedding"] *= 3
  to_end = head["kernel"][:, END]
  decoder["pos_embedding"][0] -= 6 * to_end / np.linalg.norm(to_end)
  return model, params, images


# Encoder, size of the vocabulary, bias of the end, and how to decode.
CASES = {
  "greedy": ("vit", 9, 1.0, dict()),
  "greedy, short": ("lookup_vit", 9, 1.0, dict(length=5)),
  "1": ("lookup_vit", 7, 3.0, dict(beams=1, length=4, grid=(1, 3))),
  "2": ("vit", 7, 3.0, dict(beams=2, alpha=1.0)),
  "3": ("lookup_vit", 11, 0.0, dict(beams=3, length=5, alpha=0)),
  "4": ("lookup_vit", 5, 4.0, dict(beams=4, grid=(2, 1))),
  "5": ("vit", 4, -1.0, dict(beams=5, length=6, alpha=0.6)),
}


@functools.cache
def captions_of(case):
  """Of each seed: model, parameters, images, and captions."""
  kind, ids, bias, options = CASES[case]
  found = []
  for seed in SEEDS:
    model, params, images = random_captioner(kind, ids, seed, bias)
    got = caption(model, params, images, tuple(options.items()))
    found.append((model, params, images, np.asarray(got)))
  return found


@pytest.mark.parametrize("case", CASES)
def test_captions_equal_those_without_a_cache(case):
  options = dict(CASES[case][-1])
  fields = tuple((k, options[k]) for k in ("grid",) if k in options)
  beams, alpha = options.get("beams", 1), options.get("alpha", 0.6)
  lengths = []
  for model, params, images, captions in captions_of(case):
    length = options.get("length", model.max_length)
    assert captions.shape == (BATCH, length) and captions.dtype == np.int32
    for image, got in zip(images, captions, strict=True):
      log_probs = log_probs_of(model, params, image, fields)
      if beams == 1:
        want = greedy(log_probs, END, length)
      else:
        want, _ = beam_search(log_probs, beams, END, length, alpha)[0]
      assert list(got) == padded(want, END, length)
      lengths.append(len(want) if END in want else None)
  # Some end early, others later, and some never.
  ended = {n for n in lengths if n is not None and n < length}
  assert len(ended) > 1 and None in lengths, lengths


@pytest.mark.parametrize("case", ["greedy, short", "3"])
def test_captions_are_the_same_in_any_batch(case):
  options = tuple(CASES[case][-1].items())
  for model, params, images, captions in captions_of(case)[:2]:
    for i in range(BATCH):
      alone = caption(model, params, images[i : i + 1], options)
      np.testing.assert_array_equal(alone[0], captions[i])


@pytest.mark.parametrize("alpha", [0, 0.6])
def test_all_beams_and_their_scores(alpha):
  options = tuple(dict(beams=3, length=5, alpha=alpha).items())
  for seed in SEEDS[:2]:
    model, params, images = random_captioner("vit", 6, seed, -0.5)
    captions, scores = search(model, params, images, options)
    assert np.all(np.diff(scores, axis=1) <= 0)
    for image, rows, row_scores in zip(images, captions, scores, strict=True):
      log_probs = log_probs_of(model, params, image)
      want = beam_search(log_probs, 3, END, 5, alpha)
      assert [list(ids) for ids in np.asarray(rows)] == [
        padded(ids, END, 5) for ids, _ in want
      ]
      for ids, got in zip(rows, row_scores, strict=True):
        ids = cut(ids, END)
        (*each,) = (log_probs([ids[:n]])[0][i] for n, i in enumerate(ids))
        score = normalised(sum(each), ids, alpha)
        np.testing.assert_allclose(got, score, 1e-4)


def test_refuses_to_decode_more_than_the_decoder_has_places_for():
  model = common.make_captioner("vit")
  images = jax.ShapeDtypeStruct((2, *SPACE, 3), jnp.float32)
  inputs = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), images, inputs)
  start = functools.partial(model.start, length=8)
  with pytest.raises(ValueError, match="8 ids.*max_length=7"):
    jax.eval_shape(start, params["params"], images)


# A table of random logits, by all ids before: the cache is those ids.


def random_table(ids, length, batch, seed, scale=2.0):
  """Logits `[batch, place, number of the ids before, ids]`."""
  rng = np.random.default_rng([seed, ids, length])
  shape = (batch, length, ids ** (length - 1), ids)
  return (scale * rng.standard_normal(shape)).astype(np.float32)


def step_of(table):
  """`step` of a table."""
  batch, _, _, count = table.shape

  def step(newest, index, prefix):
    # `begin` is no id of the caption.
    prefix = jnp.where(
      index > 0, prefix.at[:, :, index - 1].set(newest), prefix
    )
    place = jnp.arange(prefix.shape[-1])
    powers = jnp.where(place < index, count**place, 0)
    number = jnp.sum(prefix * powers, axis=-1)
    return table[jnp.arange(batch)[:, None], index, number], prefix

  return step


def table_log_probs(table):
  """As `log_probs_of`, of an image's table."""
  count = table.shape[-1]

  def log_probs(prefixes):
    return [
      log_softmax(table[len(ids), sum(i * count**n for n, i in enumerate(ids))])
      for ids in prefixes
    ]

  return log_probs


@functools.partial(common.jit, static_argnums=1)
def search_table(table, options):
  options = dict(begin=0, end=0) | dict(options)
  batch, length, _, _ = table.shape
  cache = jnp.zeros((batch, options["beams"], length), jnp.int32)
  return decoding.beam_search(
    step_of(table), decoding.of_beams, cache, batch, length=length, **options
  )


@pytest.mark.parametrize("alpha", [0, 0.6, 1.0, -2.0])
@pytest.mark.parametrize("ids, length, beams", [(5, 4, 2), (3, 5, 4)])
def test_beam_search_of_a_table(ids, length, beams, alpha):
  """Also where the vocabulary is less than twice the beams.

  Of each image alone, where the search ends when it may, and of all at once.
  """
  end = ids - 1
  options = tuple(dict(beams=beams, alpha=alpha, end=end).items())
  table = random_table(ids, length, 40, 0)
  captions, scores = jax.device_get(search_table(table, options))
  lengths = set()
  for i in range(len(table)):
    want = beam_search(table_log_probs(table[i]), beams, end, length, alpha)
    alone = jax.device_get(search_table(table[i : i + 1], options))
    for rows, row_scores in (
      (captions[i], scores[i]),
      (alone[0][0], alone[1][0]),
    ):
      assert [cut(x, end) for x in rows] == [ids for ids, _ in want]
      np.testing.assert_allclose(row_scores, [x for _, x in want], 1e-4)
    lengths |= {len(ids) for ids, _ in want if ids[-1] == end}
  assert lengths == set(range(1, length + 1))


@pytest.mark.parametrize("alpha", [0, 0.6, 1.0])
def test_beams_enough_find_the_best_of_all(alpha):
  """All captions, by falling score; there are fewer than beams."""
  ids, length, end, beams = 3, 4, 1, 3**4
  options = tuple(dict(beams=beams, alpha=alpha, end=end).items())
  table = random_table(ids, length, 6, 1)
  captions, scores = jax.device_get(search_table(table, options))
  others = [i for i in range(ids) if i != end]
  every = [
    (*before, end)
    for n in range(length)
    for before in itertools.product(others, repeat=n)
  ] + list(itertools.product(others, repeat=length))
  assert len(every) == 31
  for i in range(len(table)):
    log_probs = table_log_probs(table[i])
    want = []
    for x in every:
      log_p = sum(log_probs([x[:n]])[0][j] for n, j in enumerate(x))
      want.append((x, normalised(log_p, x, alpha)))
    want = best(want, 31)
    assert [cut(x, end) for x in captions[i][:31]] == [x for x, _ in want]
    np.testing.assert_allclose(scores[i][:31], [s for _, s in want], 1e-4)
    assert np.all(scores[i][31:] == -np.inf)


@pytest.mark.parametrize("beams", [1, 2])
def test_ends_once_all_captions_have(beams):
  """After three ids, of six; or after four, where one image wants them."""
  ids, length, end = 3, 6, 2
  table = np.zeros((2, length, ids ** (length - 1), ids), np.float32)
  table[..., 0] = 30
  table[0, 2:, :, end] = table[1, 3:, :, end] = 90
  options = dict(begin=0, end=end, length=length)

  def steps_of(table):
    calls = []
    follow = step_of(jnp.asarray(table))

    def step(newest, index, cache):
      jax.debug.callback(lambda i: calls.append(int(i)), index)
      return follow(newest, index, cache)

    cache = jnp.zeros((len(table), beams, length), jnp.int32)
    if beams == 1:
      found = decoding.greedy(step, cache, len(table), **options)
    else:
      found, _ = decoding.beam_search(
        step, decoding.of_beams, cache, len(table), beams=beams, **options
      )
      found = found[:, 0]
    jax.effects_barrier()
    return [len(cut(x, end)) for x in np.asarray(found)], sorted(calls)

  assert steps_of(table[:1]) == ([3], [0, 1, 2])
  assert steps_of(table) == ([3, 4], [0, 1, 2, 3])


# Sampling.


def nucleus(logits, top_p):
  """Ids by falling probability, until they have `top_p` together."""
  probs = np.exp(log_softmax(logits))
  kept, total = [], 0.0
  for i in np.argsort(-probs):
    if total >= top_p:
      break
    kept.append(i)
    total += probs[i]
  return sorted(kept)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_nucleus(top_p):
  logits = np.random.default_rng(0).standard_normal((50, 13)) * 2
  logits = logits.astype(np.float32)
  got = np.asarray(decoding.nucleus(logits, top_p))
  sizes = set()
  for row, new in zip(logits, got, strict=True):
    kept = np.flatnonzero(new > -np.inf)
    assert list(kept) == nucleus(row, top_p)
    np.testing.assert_array_equal(new[kept], row[kept])
    sizes.add(len(kept))
  if top_p in (1e-6, 1.0):
    assert sizes == {1 if top_p < 1 else 13}
  else:
    assert len(sizes) > 1


def test_no_id_is_outside_a_nucleus_of_all():
  logits = jnp.linspace(0.0, -60.0, 1000)[None]
  got = decoding.nucleus(logits, 1.0)
  np.testing.assert_array_equal(got, logits)
  assert np.sum(np.asarray(decoding.nucleus(logits, 0.999)) > -np.inf) < 200


def sample_table(table, rngs, **options):
  options = dict(begin=0, end=0, length=table.shape[1]) | options
  cache = jnp.zeros((len(table), 1, table.shape[1]), jnp.int32)
  return decoding.sample(step_of(table), cache, rngs, **options)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("fields", [dict(temperature=1e-4), dict(top_p=1e-6)])
def test_sampling_of_the_most_probable_is_greedy(fields):
  table = jnp.asarray(random_table(5, 5, 20, 2))
  cache = jnp.zeros((20, 1, 5), jnp.int32)
  options = dict(begin=0, end=0, length=5)
  want = np.asarray(decoding.greedy(step_of(table), cache, 20, **options))
  for row, got in zip(np.asarray(table), want, strict=True):
    ids = greedy(table_log_probs(row), 0, 5)
    assert list(got) == padded(ids, 0, 5)
  got = sample_table(table, keys(20), **fields)
  np.testing.assert_array_equal(got, want)
  other = sample_table(table, keys(20))
  assert not np.array_equal(other, want)
  for ids in other:
    cut(ids, 0)


@pytest.mark.parametrize(
  "temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (3.0, 1.0), (1.0, 0.8)]
)
def test_frequencies(temperature, top_p):
  """Pearson's statistic stays below what one in 10^6 exceeds."""
  count = 20_000
  logits = np.array([1.0, -0.5, 0.3, 2.0, -1.2, 0.9], np.float32)
  table = jnp.broadcast_to(logits, (count, 1, 1, 6))
  ids = sample_table(
    table, keys(count), temperature=temperature, top_p=top_p, end=5
  )
  probs = np.exp(log_softmax(logits / temperature))
  kept = nucleus(logits / temperature, top_p)
  assert len(kept) == (6 if top_p == 1 else 3)
  want = count * probs[kept] / probs[kept].sum()
  got = np.bincount(np.asarray(ids)[:, 0], minlength=6)
  assert got[kept].sum() == count
  statistic = np.sum((got[kept] - want) ** 2 / want)
  # Of chi-squared with 5 degrees of freedom, and 2.
  assert statistic < (35.9 if top_p == 1 else 27.7)


def test_draws_are_the_same_in_any_batch():
  """Those of an image by its key; others by another key, and by place."""
  table = jnp.asarray(random_table(6, 4, 12, 3, scale=0.5))
  rngs = keys(12)
  ids = np.asarray(sample_table(table, rngs, end=5))
  for part in (slice(7, 8), slice(3, 9)):
    got = sample_table(table[part], rngs[part], end=5)
    np.testing.assert_array_equal(got, ids[part])
  again = sample_table(table, keys(12, seed=1), end=5)
  assert not np.array_equal(again, ids)
  flat = jnp.zeros((200, 2, 6, 6))
  ids = np.asarray(sample_table(flat, keys(200), end=5))
  # Of two ids that are drawn alike and apart, a sixth are equal.
  assert 0.05 < np.mean(ids[:, 0] == ids[:, 1]) < 0.4


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(temperature=0), "temperature=0: want a number > 0"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_p=0), r"top_p=0: want a number in \(0, 1\]"),
    (dict(top_p=1.1), "top_p=1.1"),
    (dict(top_p=float("nan")), "top_p=nan"),
  ],
)
def test_sample_refuses(fields, message):
  table = jnp.zeros((2, 1, 1, 3))
  with pytest.raises(ValueError, match=message):
    sample_table(table, keys(2), **fields)
