"""Decoding: captions from a decoder's logits, one id after another.

All take `step(newest, index, cache) -> (logits, cache)`, as `Captioner.step`:
`newest [batch, beams]` are the ids at `index`, `logits [batch, beams, ids]`
those of the ids that follow, and `cache` is what the decoder remembers. Ids at
index 0 are `begin`; a caption ends with `end`, or after `length` ids. All can
be compiled, and end once all captions have.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Of the search, where an evaluator does not say.
BEAMS, ALPHA = 4, 0.6

Step = Callable[[Array, Array, Any], tuple[Array, Any]]
_Choose = Callable[[Array, Array], Array]


def caption(
  model: Any,
  params: Any,
  images: Float[Array, "b *space 3"],
  *,
  begin: int,
  end: int,
  length: int | None = None,
  beams: int = 1,
  alpha: float = 0.6,
  **fields: Any,
) -> Int[Array, "b length"]:
  """The best caption of each image: by beam search, or greedy.

  Args:
    model: a captioner.
    params: its parameters.
    images: as the captioner takes them.
    begin: id that stands before a caption.
    end: id that ends one.
    length: most ids of a caption; the model's `max_length` where none is given.
    beams: of the search; with 1, `greedy`.
    alpha: see `beam_search`.
    **fields: `grid`, of a LookupViT.

  Returns:
    Ids, as `greedy`.
  """
  length = length or model.max_length
  cache = model.start(params, images, beams=beams, length=length, **fields)
  step = functools.partial(model.step, params)
  common = dict(begin=begin, end=end, length=length)
  if beams == 1:
    return greedy(step, cache, len(images), **common)
  captions, _ = beam_search(
    step, model.reorder, cache, len(images), beams=beams, alpha=alpha, **common
  )
  return captions[:, 0]


def greedy(
  step: Step, cache: Any, batch: int, *, begin: int, end: int, length: int
) -> Int[Array, "b length"]:
  """The most probable id, at each place.

  Args:
    step: of one beam.
    cache: before the first token.
    batch: number of captions.
    begin: id that stands before a caption.
    end: id that ends one.
    length: most ids of a caption.

  Returns:
    Ids; behind an `end` there is nothing but `end`.
  """

  def most_probable(logits, index):
    del index
    return jnp.argmax(logits, axis=-1)

  return _one_by_one(step, cache, batch, most_probable, begin, end, length)


def sample(
  step: Step,
  cache: Any,
  rngs: Array,
  *,
  begin: int,
  end: int,
  length: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> Int[Array, "b length"]:
  """Ids drawn by their probability.

  Args:
    step: of one beam.
    cache: before the first token.
    rngs: keys `[batch]`, one of each caption: what is drawn for it is the same
      in any batch.
    begin: id that stands before a caption.
    end: id that ends one.
    length: most ids of a caption.
    temperature: that logits are divided by; more than 0.
    top_p: drawn are the fewest ids that have this probability together (nucleus
      sampling, arXiv:1904.09751).

  Returns:
    Ids, as `greedy`.

  Raises:
    ValueError: `temperature` or `top_p` is out of range.
  """
  if not temperature > 0:
    raise ValueError(f"temperature={temperature}: want a number > 0.")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p}: want a number in (0, 1].")

  def draw(logits, index):
    logits = nucleus(logits / temperature, top_p)
    keys = jax.vmap(jax.random.fold_in, (0, None))(rngs, index)
    return jax.vmap(jax.random.categorical)(keys, logits)

  return _one_by_one(step, cache, len(rngs), draw, begin, end, length)


def nucleus(
  logits: Float[Array, "b ids"], top_p: float
) -> Float[Array, "b ids"]:
  """Logits of the fewest ids whose probabilities reach `top_p`; others -inf."""
  order = jnp.argsort(-logits, axis=-1)
  probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
  before = jnp.cumsum(probs, axis=-1) - probs
  rank = jnp.argsort(order, axis=-1)
  # Rounded, the sum of all but the last may be 1.
  in_nucleus = (before < top_p) | (top_p >= 1)
  kept = jnp.take_along_axis(in_nucleus, rank, axis=-1)
  return jnp.where(kept, logits, -jnp.inf)


def _one_by_one(step, cache, batch, choose: _Choose, begin, end, length):
  ids = jnp.full((batch, length), end, jnp.int32)
  newest = jnp.full((batch,), begin, jnp.int32)
  done = jnp.zeros((batch,), bool)

  def goes_on(state):
    index, _, _, done, _ = state
    return (index < length) & ~jnp.all(done)

  def body(state):
    index, ids, newest, done, cache = state
    logits, cache = step(newest[:, None], index, cache)
    chosen = choose(logits[:, 0], index).astype(jnp.int32)
    newest = jnp.where(done, end, chosen)
    ids = ids.at[:, index].set(newest)
    return index + 1, ids, newest, done | (newest == end), cache

  state = jnp.int32(0), ids, newest, done, cache
  return jax.lax.while_loop(goes_on, body, state)[1]


def beam_search(
  step: Step,
  reorder: Callable[[Any, Array], Any],
  cache: Any,
  batch: int,
  *,
  beams: int,
  begin: int,
  end: int,
  length: int,
  alpha: float = 0.6,
) -> tuple[Int[Array, "b beams length"], Float[Array, "b beams"]]:
  """Captions of high probability by their length.

  Each round, the `beams` best unfinished captions are continued by every id. Of
  the `2 * beams` best continuations those that end are finished captions, of
  which the `beams` best are kept, and the `beams` best of the others go on. The
  search ends after `length` ids, when unfinished captions count as finished; or
  where none of these can come to be among the kept ones. A caption of `n` ids,
  its `end` among them, has the score `log p / ((5 + n) / 6)^alpha`
  (arXiv:1609.08144, section 7).

  Args:
    step: of `beams` beams.
    reorder: `reorder(cache, beams [batch, beams])`, the cache of other beams.
    cache: before the first token.
    batch: number of images.
    beams: captions in the search of each.
    begin: id that stands before a caption.
    end: id that ends one.
    length: most ids of a caption.
    alpha: of the score; 0 is the probability alone.

  Returns:
    Captions by falling score, and their scores; behind an `end` there is
    nothing but `end`.
  """

  def penalty(count):
    return ((5.0 + count) / 6.0) ** alpha

  nothing = jnp.full((batch, beams), -jnp.inf)
  blank = jnp.full((batch, beams, length), end, jnp.int32)
  # All beams are alike before the first id: one of them counts.
  live_scores = nothing.at[:, 0].set(0.0)
  newest = jnp.full((batch, beams), begin, jnp.int32)

  def goes_on(state):
    index, _, live_scores, _, _, done_scores, _ = state
    # Log-probabilities only fall; the penalty for the most ids forgives most.
    hope = live_scores[:, 0] / penalty(length if alpha > 0 else index + 1)
    return (index < length) & jnp.any(hope > done_scores[:, -1])

  def body(state):
    index, live, live_scores, newest, done, done_scores, cache = state
    logits, cache = step(newest, index, cache)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    total = live_scores[..., None] + log_p
    ids = total.shape[-1]
    scores, place = jax.lax.top_k(
      total.reshape(batch, -1), min(2 * beams, beams * ids)
    )
    beam, chosen = place // ids, (place % ids).astype(jnp.int32)
    grown = of_beams(live, beam).at[:, :, index].set(chosen)
    ends = chosen == end

    found = jnp.where(ends, scores / penalty(index + 1), -jnp.inf)
    done, done_scores, _ = _best(
      beams,
      jnp.concatenate([done_scores, found], axis=1),
      jnp.concatenate([done, grown], axis=1),
    )
    live, live_scores, best = _best(
      beams, jnp.where(ends, -jnp.inf, scores), grown
    )
    newest = of_beams(chosen, best)
    cache = reorder(cache, of_beams(beam, best))
    return index + 1, live, live_scores, newest, done, done_scores, cache

  state = jnp.int32(0), blank, live_scores, newest, blank, nothing, cache
  _, live, live_scores, _, done, done_scores, _ = jax.lax.while_loop(
    goes_on, body, state
  )
  # Where the search ended before, no unfinished caption is among the best.
  scores = jnp.concatenate([done_scores, live_scores / penalty(length)], axis=1)
  captions = jnp.concatenate([done, live], axis=1)
  captions, scores, _ = _best(beams, scores, captions)
  return captions, scores


def _best(count, scores, captions):
  """The `count` best captions, by falling score, and where they were."""
  scores, place = jax.lax.top_k(scores, count)
  return of_beams(captions, place), scores, place


def of_beams(x: Array, beams: Int[Array, "b n"]) -> Array:
  """Of `[batch, beams, ...]` some beams, `[batch, n, ...]`."""
  index = beams.reshape(*beams.shape, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)
