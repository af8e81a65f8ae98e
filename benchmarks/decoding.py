r"""Seconds of writing captions: with keys and values remembered, and without.

    python -m benchmarks.decoding --config=configs/coco_caption_lookup_b.py \
        --config.model.dtype=float32 --batch_size=4

The decoder of a config, with random parameters, reads the tokens of random
images; no caption ends before `--length` ids. Encoding is measured by itself.
Compared are

    cached   `Captioner.step`: of each id only the newest is computed, and the
             keys of the image's tokens once;
    padded   all `length` places are computed again for each id, as in a
             compiled loop shapes never change;
    prefix   the ids so far are computed again, by a program of each length.
             Greedy decoding alone.

All compute logits at the newest id alone.

All are measured in turn, over and over in one run; a ratio is of one round. All
give the ids of `cached`, except where rounding decides: the share of captions
that are equal is printed.
"""

import functools
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from benchmarks import timing
from lookup_vit import cli
from lookup_vit.models import captioner, decoding, layers, text_decoder

FLAGS = flags.FLAGS

_LOG = logging.getLogger("lookup_vit")

# Of a vocabulary that a config only knows by its tokenizer.
_VOCABULARY = 32_000
# No id: so no caption ends.
_NO_END = -1


def _without_cache(model, params, length):
  """`step` and `reorder` whose cache is the ids so far and the tokens."""
  decode = _decoder(model, params)

  def step(newest, index, cache):
    ids, memory = cache
    batch, beams = newest.shape
    ids = ids.at[:, :, index].set(newest)
    every = jnp.repeat(memory, beams, axis=0)
    logits = decode(ids.reshape(batch * beams, length), every, index)
    return logits.reshape(batch, beams, -1), (ids, memory)

  def reorder(cache, beams):
    ids, memory = cache
    return decoding.of_beams(ids, beams), memory

  return step, reorder


def _decoder(model, params):
  names = ("width", "depth", "num_heads", "mlp_ratio", "max_length", "tied")
  decoder = text_decoder.Decoder(
    model.num_classes,
    **{name: getattr(model, name) for name in names},
    cfg=layers.LayerConfig.of(model, False, ()),
  )
  params = params["decoder"]
  head = params["embedding"]["embedding"].T
  if not model.tied:
    head = params["head"]["kernel"]

  def decode(ids, memory, index):
    """Logits at a place."""
    _, state = decoder.apply(
      {"params": params},
      ids,
      memory,
      capture_intermediates=lambda module, _: module.name == "norm",
      mutable="intermediates",
    )
    (x,) = state["intermediates"]["norm"]["__call__"]
    x = jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False)
    logits = x.astype(jnp.float32) @ head
    return logits if model.tied else logits + params["head"]["bias"]

  return decode


def ways(
  model: Any, params: Any, *, batch: int, length: int, beams: int
) -> dict[str, Callable[..., jax.Array]]:
  """Compiled functions that decode; of `cache` and `memory`, to ids.

  Args:
    model: a captioner.
    params: its parameters.
    batch: number of images.
    length: ids of a caption.
    beams: of beam search.

  Returns:
    By name: "greedy, cached", "greedy, padded", "greedy, prefix", "beams,
    cached" and "beams, padded". All take `params`, what `model.start` returns
    for one beam and for `beams`, and the tokens that the decoder reads.
  """
  common = dict(begin=0, end=_NO_END, length=length)

  def greedy(step, cache):
    return decoding.greedy(step, cache, batch, **common)

  def search(step, reorder, cache):
    captions, _ = decoding.beam_search(
      step, reorder, cache, batch, beams=beams, **common
    )
    return captions[:, 0]

  def blank(beams):
    return jnp.zeros((batch, beams, length), jnp.int32)

  def greedy_cached(params, one, many, memory):
    del many, memory
    return greedy(functools.partial(model.step, params), one)

  def greedy_padded(params, one, many, memory):
    del one, many
    step, _ = _without_cache(model, params, length)
    return greedy(step, (blank(1), memory))

  @jax.jit
  def next_ids(params, ids, memory):
    index = ids.shape[1] - 1
    return jnp.argmax(_decoder(model, params)(ids, memory, index), axis=-1)

  def greedy_prefix(params, one, many, memory):
    del one, many
    ids = jnp.zeros((batch, 1), jnp.int32)
    for _ in range(length):
      newest = next_ids(params, ids, memory)
      ids = jnp.concatenate([ids, newest[:, None]], axis=1)
    return ids[:, 1:]

  def beams_cached(params, one, many, memory):
    del one, memory
    return search(functools.partial(model.step, params), model.reorder, many)

  def beams_padded(params, one, many, memory):
    del one, many
    step, reorder = _without_cache(model, params, length)
    return search(step, reorder, (blank(beams), memory))

  return {
    "greedy, cached": jax.jit(greedy_cached),
    "greedy, padded": jax.jit(greedy_padded),
    "greedy, prefix": greedy_prefix,
    "beams, cached": jax.jit(beams_cached),
    "beams, padded": jax.jit(beams_padded),
  }


def benchmark(
  model: Any,
  image_size: tuple[int, ...],
  *,
  batch: int,
  length: int,
  beams: int,
  rounds: int,
) -> dict[str, Any]:
  """Measures all ways to decode.

  Args:
    model: a captioner.
    image_size: (height, width).
    batch: number of images.
    length: ids of a caption.
    beams: of beam search.
    rounds: number of measurements of each.

  Returns:
    Plain values by name: `seconds` in each round by way, that of "encode"
    among them; `ratios` to the cached way in each round; `equal`, the share of
    captions that are those of the cached way.

  Raises:
    ValueError: a number that does not work.
  """
  numbers = dict(batch=batch, length=length, beams=beams, rounds=rounds)
  timing.check_numbers(**numbers)
  keys = jax.random.split(jax.random.key(0), 2)
  images = jax.random.uniform(keys[0], (batch, *image_size, 3), minval=-1)
  blank = jnp.zeros((batch, 1), jnp.int32)
  params = jax.jit(model.init)(keys[1], images, blank)["params"]

  @jax.jit
  def encode(params, images):
    _, out = model.apply({"params": params}, images, blank)
    start = functools.partial(model.start, params, images, length=length)
    return start(), start(beams=beams), out["memory"]

  known = encode(params, images)
  found = {}
  run = {"encode": lambda: encode(params, images)}
  for name, way in ways(
    model, params, batch=batch, length=length, beams=beams
  ).items():
    run[name] = functools.partial(way, params, *known)
    start = time.perf_counter()
    found[name] = np.asarray(run[name]())
    _LOG.info("%s: compiled in %.0f s.", name, time.perf_counter() - start)
  seconds = timing.in_turn(run, rounds)
  cached = {name: name.split(",")[0] + ", cached" for name in found}
  return {
    **numbers,
    "seconds": seconds,
    "ratios": {
      name: timing.ratios(seconds[name], seconds[least])
      for name, least in cached.items()
    },
    "equal": {
      name: float(np.mean(np.all(found[name] == found[least], axis=1)))
      for name, least in cached.items()
    },
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
  }


def table(result: Mapping[str, Any]) -> str:
  """A table, in Markdown, of what `benchmark` returned."""
  lines = [
    f"{result['batch']} captions of {result['length']} ids, {result['beams']} "
    f"beams; median of {result['rounds']} rounds, and the spread of the ratio.",
    "",
    "| | seconds | of cached | same captions |",
    "|---|---|---|---|",
  ]
  for name, seconds in result["seconds"].items():
    cells = [name, f"{statistics.median(seconds):.3f}", "-", "-"]
    if name in result["ratios"]:
      spread = timing.spread(result["ratios"][name])
      cells[2:] = spread, f"{result['equal'][name]:.0%}"
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def main(argv):
  """Prints the table for a config's captioner."""
  del argv
  cli.log_overrides()
  config = FLAGS.config
  if config.get("model_name") != "captioner":
    raise ValueError("--config: want that of a captioner.")
  result = benchmark(
    captioner.Model(config.get("num_classes") or _VOCABULARY, **config.model),
    tuple(config.input.image_size),
    batch=FLAGS.batch_size,
    length=FLAGS.length,
    beams=FLAGS.beams,
    rounds=FLAGS.rounds,
  )
  print(table(result))
  if FLAGS.output:
    text = json.dumps(result, indent=2)
    epath.Path(FLAGS.output).write_text(text + "\n")


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", "configs/coco_caption_lookup_b.py", "configs/NAME.py[:ARGS]"
  )
  flags.DEFINE_integer("batch_size", 8, "Captions at a time.")
  flags.DEFINE_integer("length", 32, "Ids of a caption.")
  flags.DEFINE_integer("beams", 4, "Of beam search.")
  flags.DEFINE_integer("rounds", 5, "Measurements of each way.")
  flags.DEFINE_string("output", None, "JSON file for all that was measured.")
  cli.run(main)
