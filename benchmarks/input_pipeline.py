r"""Examples/s of the input pipeline, against the bare rate of decoding.

    python -m benchmarks.input_pipeline

measures on photographs that it makes, or, of a config, on the config's data and
preprocessing:

    python -m benchmarks.input_pipeline --config=configs/in1k_vit_b.py \
        --data_dir=gs://BUCKET/tensorflow_datasets

Bare is the least that training on JPEGs takes: the same TFRecord files read and
parsed, `tf.io.decode_and_crop_jpeg` of a random crop, `tf.image.resize`, and
batching, each with TensorFlow's defaults. All pipelines have the same threads
and are measured in turn, over and over in one run, each time anew: after some
batches of warm-up, from an endless stream. A ratio is of one round.

The profile is wall time on one thread: that of passes over examples in memory
with one op, less that of passes without.
"""

import contextlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from benchmarks import photos
from lookup_vit import cli, config_utils, quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf

from lookup_vit import datasets, descriptions, input_pipeline
from lookup_vit.preprocess import get_preprocess_fn

FLAGS = flags.FLAGS

_LOG = logging.getLogger("lookup_vit")

_PP = (
  "decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2,15)|value_range(-1,1)"
  '|keep("image","label")'
)
# Photographs are so many times those of a measurement: in a smaller set, lanes
# would have windows of a few records, and epochs of a few windows.
_PASSES = 4
# Where a run may be taken up again: early, and late.
_STARTS = (10, 10_000)
_BARE = "bare"
_READ = "read and parse"


def find_files(data: Mapping[str, Any]) -> list[str]:
  """The TFRecord files that a data description's split is in.

  Raises:
    ValueError: the data are not there, or are not JPEGs in TFRecord files.
  """
  data = descriptions.check(data)
  wanted = "the bare pipeline wants JPEGs as `image` in TFRecord files"
  if "folder" in data:
    raise ValueError(f"data.folder={data['folder']!r}: {wanted}")
  builder = datasets.get_builder(data)
  if not datasets.num_examples(data):
    raise ValueError(f"data.split={data['split']!r} has no examples")
  found = builder.info.file_format.value
  if found != "tfrecord":
    raise ValueError(f"{builder.data_dir} is in {found} files; {wanted}")
  split = builder.info.splits[data["split"]]
  files = [part.filename for part in split.file_instructions]
  try:
    first = next(iter(tf.data.TFRecordDataset(files).map(_parse)))["image"]
  except tf.errors.InvalidArgumentError as e:
    raise ValueError(f"{builder.data_dir} has no `image`; {wanted}") from e
  if not tf.io.is_jpeg(first):
    raise ValueError(f"{builder.data_dir} has other images; {wanted}")
  return files


def _parse(record):
  features = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "label": tf.io.FixedLenFeature([], tf.int64, -1),
  }
  return tf.io.parse_single_example(record, features)


def _bare_one(example, size):
  begin, extent, _ = tf.image.sample_distorted_bounding_box(
    tf.io.extract_jpeg_shape(example["image"]),
    tf.zeros([0, 0, 4]),
    min_object_covered=0.0,
    aspect_ratio_range=(3 / 4, 4 / 3),
    area_range=(0.05, 1.0),
    use_image_if_no_bounding_boxes=True,
  )
  window = tf.concat([begin[:2], extent[:2]], axis=0)
  image = tf.io.decode_and_crop_jpeg(example["image"], window, 3)
  return {**example, "image": tf.image.resize(image, size)}


def bare(
  files: Sequence[str], size: tuple[int, int], batch_size: int
) -> tf.data.Dataset:
  """An endless stream of batches of random crops, as in the docstring above.

  Args:
    files: TFRecord files of JPEGs.
    size: (height, width) to resize to.
    batch_size: number of examples in a batch.

  Returns:
    A dataset of `image`, float32 [batch_size, height, width, 3], and `label`.
  """
  ds = tf.data.TFRecordDataset(files).repeat()
  ds = ds.map(lambda record: _bare_one(_parse(record), size), tf.data.AUTOTUNE)
  return ds.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def _limited(ds, threads):
  """Gives a dataset threads of its own."""
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  options.autotune.cpu_budget = threads
  return ds.with_options(options)


def _rate(ds, batch_size, batches):
  """Examples/s of a new iterator, to NumPy; half as many batches warm up."""
  iterator = ds.as_numpy_iterator()
  for _ in range(-(-batches // 2)):
    next(iterator)
  start = time.perf_counter()
  for _ in range(batches):
    next(iterator)
  return batches * batch_size / (time.perf_counter() - start)


def without_randaug(pp: str) -> str:
  """Leaves the op `randaug` out of a preprocessing string."""
  ops = [op for op in pp.split("|") if op.split("(")[0].strip() != "randaug"]
  return "|".join(ops)


def rates(
  data: Mapping[str, Any],
  files: Sequence[str],
  pp: str,
  *,
  batch_size: int,
  batches: int,
  rounds: int,
  threads: int,
) -> dict[str, list[float]]:
  """Measures the pipelines.

  Args:
    data: a data description.
    files: its TFRecord files.
    pp: a preprocessing string; one with RandAugment is measured without too.
    batch_size: number of examples in a batch.
    batches: number of batches in a measurement; half as many warm up.
    rounds: number of measurements of each pipeline.
    threads: number of threads of each pipeline.

  Returns:
    Examples/s in each round, by preprocessing string, and of "bare".

  Raises:
    ValueError: data or preprocessing that do not work.
  """
  pipelines = {
    each: input_pipeline.make_train(
      data,
      pp=each,
      batch_size=batch_size,
      seed=0,
      shuffle_buffer_size=_window(data),
    ).dataset
    for each in dict.fromkeys([without_randaug(pp), pp])
  }
  spec = pipelines[pp].element_spec.get("image")
  if spec is None or spec.shape.rank != 4:
    raise ValueError(f"pp={pp!r} gives no images to compare with: {spec}")
  size = tuple(spec.shape[1:3])
  pipelines = {_BARE: bare(files, size, batch_size), **pipelines}
  measured = {name: [] for name in pipelines}
  order = list(pipelines)
  for i in range(rounds):
    for name in order:
      rate = _rate(_limited(pipelines[name], threads), batch_size, batches)
      measured[name].append(rate)
      _LOG.info("round %d of %d: %.0f/s, %s", i + 1, rounds, rate, name)
    # What slows the machine down as time goes by is not to hit one alone.
    order = order[1:] + order[:1]
  return measured


def _window(data):
  """A window of shuffling that is a part of the data, as of ImageNet's."""
  return min(10_000, -(-datasets.num_examples(data) // 2))


def starts(
  data: Mapping[str, Any], pp: str, *, batch_size: int, rounds: int
) -> dict[str, list[float]]:
  """Measures how long the first batch takes of a stream entered at a step.

  Args:
    data: a data description.
    pp: a preprocessing string.
    batch_size: number of examples in a batch.
    rounds: number of measurements of each step.

  Returns:
    Seconds in each round, by the step.
  """
  seconds = {str(step): [] for step in _STARTS}
  for _ in range(rounds):
    for step in _STARTS:
      start = time.perf_counter()
      batches = input_pipeline.make_train(
        data,
        pp=pp,
        batch_size=batch_size,
        seed=0,
        start_step=step,
        shuffle_buffer_size=_window(data),
      )
      next(iter(batches))
      seconds[str(step)].append(time.perf_counter() - start)
  return seconds


def _passes(ds, count):
  """Iterates over passes of `count` elements on one thread, within C++."""
  ds = ds.repeat().enumerate()
  ds = ds.filter(lambda i, element: i % count == count - 1)
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  # No pass ahead of being asked for.
  options.autotune.enabled = False
  options.experimental_optimization.inject_prefetch = False
  passes = iter(ds.map(lambda i, element: i).with_options(options))
  next(passes)  # Starting takes longer than a pass.
  return passes


def _seconds(passes):
  start = time.perf_counter()
  next(passes)
  return time.perf_counter() - start


def profile(
  files: Sequence[str], pp: str, *, examples: int, rounds: int
) -> dict[str, float]:
  """Measures the ops one by one.

  Args:
    files: TFRecord files of JPEGs.
    pp: a preprocessing string.
    examples: number of examples.
    rounds: number of measurements, of which the median is taken.

  Returns:
    Microseconds an example by op, with "read and parse" as the first.
  """
  examples = tf.data.TFRecordDataset(files).take(examples).map(_parse)
  nothing = tf.data.Dataset.range(1)
  before = examples.enumerate().map(
    lambda i, example: (example, tf.stack([tf.cast(i, tf.int32), 0]))
  )
  before = before.cache()
  count = sum(1 for _ in before)
  steps = [(_READ, nothing, examples)]
  for op in (op.strip() for op in pp.split("|")):
    if op:
      after = before.map(_with_seed(get_preprocess_fn(op)))
      steps.append((op, before, after))
      before = after.cache()
  # Reading from a cache fills it.
  pairs = [(_passes(a, count), _passes(b, count)) for _, a, b in steps]
  costs = [[] for _ in steps]
  for i in range(rounds):
    for cost, (before, after) in zip(costs, pairs, strict=True):
      cost.append(1e6 * (_seconds(after) - _seconds(before)) / count)
    _LOG.info("profile: round %d of %d", i + 1, rounds)
  result = {}
  for cost, (name, _, _) in zip(costs, steps, strict=True):
    # An op that comes twice counts twice.
    result[name] = result.get(name, 0.0) + statistics.median(cost)
  return result


def _with_seed(fn: Callable):
  # AutoGraph would bury the errors of the ops in its own.
  @tf.autograph.experimental.do_not_convert
  def apply(example, seed):
    return fn(example, seed), seed

  return apply


def _mean_image(files, examples):
  """Mean bytes and pixels of the first images."""
  images = tf.data.TFRecordDataset(files).take(examples).map(_parse)
  sizes = images.map(
    lambda example: (
      tf.strings.length(example["image"]),
      tf.reduce_prod(tf.io.extract_jpeg_shape(example["image"])[:2]),
    )
  )
  return np.mean(list(sizes.as_numpy_iterator()), axis=0)


def _spread(values):
  low, high = min(values), max(values)
  return f"{statistics.median(values):.2f} ({low:.2f} .. {high:.2f})"


def table(result: Mapping[str, Any]) -> str:
  """A table of what `benchmark` returned."""
  size, pixels = result["mean_bytes"], result["mean_pixels"]
  lines = [
    f"JPEGs of {size / 1e3:.0f} KB and {pixels / 1e3:.0f}k pixels on average, "
    f"{size / pixels:.2f} bytes a pixel; {result['threads']} threads, batches "
    f"of {result['batch_size']}.",
    "",
    f"median of {result['rounds']} rounds, and the spread of the ratio",
    f"{'examples/s':>10}  {'of bare':<22}pipeline",
  ]
  for name, values in result["rates"].items():
    ratio = _spread(result["ratios"][name]) if name != _BARE else "1"
    rate = statistics.median(values)
    lines.append(f"{rate:10.0f}  {ratio:<22}{name}")
  costs = result["profile"]
  total = sum(costs.values())
  lines += ["", "on one thread", f"{'us/example':>10}  {'share':<7}op"]
  for name, cost in costs.items():
    lines.append(f"{cost:10.0f}  {cost / total:<7.0%}{name}")
  lines += ["", f"slowest op: {result['slowest']}", ""]
  for step, seconds in result["starts"].items():
    lines.append(f"first batch from step {step}: {_spread(seconds)} s")
  return "\n".join(lines)


def _check(examples, batch_size, rounds, threads):
  """Returns the numbers by name, or raises ValueError."""
  numbers = dict(
    examples=examples, batch_size=batch_size, rounds=rounds, threads=threads
  )
  for name, number in numbers.items():
    if number < 1:
      raise ValueError(f"{name}={number}: want at least 1.")
  if examples < batch_size:
    raise ValueError(
      f"examples={examples}: want at least a batch, batch_size={batch_size}."
    )
  return numbers


def benchmark(
  data: Mapping[str, Any],
  pp: str,
  *,
  examples: int,
  batch_size: int,
  rounds: int,
  threads: int,
) -> dict[str, Any]:
  """Measures the rates and the profile.

  Args:
    data: a data description, of JPEGs in TFRecord files.
    pp: a preprocessing string.
    examples: number of examples in a measurement, at least `batch_size`.
    batch_size: number of examples in a batch.
    rounds: number of measurements.
    threads: number of threads of each pipeline.

  Returns:
    Plain numbers by name: `rates` (examples/s) and `ratios` (to bare, without
    unit) in each round by pipeline, `starts` (seconds to the first batch) in
    each round by step, `profile` in microseconds by op, the
    `slowest` op, and what was measured on.

  Raises:
    ValueError: data, preprocessing or numbers that do not work.
  """
  numbers = _check(examples, batch_size, rounds, threads)
  files = find_files(data)
  measured = rates(
    data,
    files,
    pp,
    batch_size=batch_size,
    batches=examples // batch_size,
    rounds=rounds,
    threads=threads,
  )
  seconds = starts(
    data, without_randaug(pp), batch_size=batch_size, rounds=rounds
  )
  costs = profile(files, pp, examples=min(examples, 128), rounds=rounds)
  size, pixels = _mean_image(files, examples)
  return {
    **numbers,
    "mean_bytes": float(size),
    "mean_pixels": float(pixels),
    "rates": measured,
    "ratios": {
      name: [a / b for a, b in zip(values, measured[_BARE], strict=True)]
      for name, values in measured.items()
    },
    "starts": seconds,
    "profile": costs,
    "slowest": max((op for op in costs if op != _READ), key=costs.get),
  }


def main(argv):
  """Prints the table, for photographs or for a config's data."""
  del argv
  cli.log_overrides()
  numbers = _check(
    FLAGS.examples, FLAGS.batch_size, FLAGS.rounds, FLAGS.threads
  )
  if FLAGS.config is None:
    pp = FLAGS.pp or _PP
  else:
    config = config_utils.resolve(FLAGS.config)
    pp = FLAGS.pp or config.input.pp
  get_preprocess_fn(pp)
  output = FLAGS.output
  if output and not os.path.isdir(os.path.dirname(output) or "."):
    raise ValueError(f"--output={output}: no directory for it.")
  with contextlib.ExitStack() as stack:
    if FLAGS.config is None:
      data_dir = FLAGS.data_dir or stack.enter_context(
        tempfile.TemporaryDirectory(prefix="benchmark_photos_")
      )
      data = photos.make_photos(data_dir, _PASSES * FLAGS.examples)
    else:
      data = {**config.input.data}
      if FLAGS.data_dir:
        data["data_dir"] = FLAGS.data_dir
    result = benchmark(data, pp, **numbers)
  print(table(result))
  if output:
    with open(output, "w") as f:
      json.dump(result, f, indent=2)
      f.write("\n")


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py[:ARGS]; photographs if not set."
  )
  flags.DEFINE_string("pp", None, "Preprocessing; the config's if not set.")
  flags.DEFINE_string(
    "data_dir",
    None,
    "Where TFDS has the config's data, or is to keep the photographs.",
  )
  flags.DEFINE_integer("examples", 512, "Examples in a measurement.")
  flags.DEFINE_integer("batch_size", 64, "Examples in a batch.")
  flags.DEFINE_integer("rounds", 5, "Measurements of each pipeline.")
  flags.DEFINE_integer(
    "threads", len(os.sched_getaffinity(0)), "Threads of each pipeline."
  )
  flags.DEFINE_string("output", None, "JSON file for all that was measured.")
  cli.run(main)
