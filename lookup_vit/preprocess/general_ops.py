"""Preprocessing ops on the example as a whole, and on labels."""

import tensorflow as tf

from lookup_vit.preprocess.registry import Data, PreprocessFn, register


@register("keep")
def keep(*keys: str) -> PreprocessFn:
  """Keeps only the given keys; those that the data lacks are ignored."""

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    return {k: v for k, v in data.items() if k in keys}

  return fn


@register("drop")
def drop(*keys: str) -> PreprocessFn:
  """Drops the given keys; those that the data lacks are ignored."""

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    return {k: v for k, v in data.items() if k not in keys}

  return fn


@register("copy")
def copy(key: str, key_result: str) -> PreprocessFn:
  """Stores the value of `key` under `key_result` too."""

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    return {**data, key_result: data[key]}

  return fn


@register("flatten")
def flatten() -> PreprocessFn:
  """Makes `data["a"]["b"]` `data["a/b"]`, at any depth."""

  def flat(data, prefix):
    for key, value in data.items():
      if isinstance(value, dict):
        yield from flat(value, f"{prefix}{key}/")
      else:
        yield prefix + key, value

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    return dict(flat(data, ""))

  return fn


@register("choice")
def choice(key: str, key_result: str | None = None) -> PreprocessFn:
  """Takes one of several at random, such as a caption of an image.

  Args:
    key: key of what is chosen from, of shape [n, ...]; an error where n is 0.
    key_result: key of the result, `key` if None.

  Returns:
    An op that stores a tensor of shape [...].
  """

  def fn(data: Data, seed: tf.Tensor) -> Data:
    several = data[key]
    count = tf.shape(several)[0]
    check = tf.debugging.assert_positive(
      count, message=f"choice: {key!r} is empty, there is none to choose"
    )
    with tf.control_dependencies([check] if check is not None else []):
      place = tf.random.stateless_uniform([], seed, 0, count, tf.int32)
    return {**data, key_result or key: several[place]}

  return fn


@register("onehot")
def onehot(
  depth: int,
  key: str = "label",
  key_result: str | None = None,
  multi: bool = True,
  on: float = 1.0,
  off: float = 0.0,
) -> PreprocessFn:
  """Turns integer labels into vectors.

  A label outside of [0, depth), such as the -1 that pads a list of labels,
  gives no positive entry.

  Args:
    depth: number of classes.
    key: key of the labels, of shape [] or [n].
    key_result: key of the result, `key` if None.
    multi: whether n labels share one vector of shape [depth], rather than
      give shape [n, depth].
    on: value of a class that is among the labels.
    off: value of a class that is not.

  Returns:
    An op that stores a float32 tensor.

  Raises:
    ValueError: if `depth` is not a positive integer.
  """
  if not isinstance(depth, int) or depth < 1:
    raise ValueError(f"wanted a positive integer as depth, got {depth!r}")

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    hot = tf.one_hot(data[key], depth, dtype=tf.float32)
    if multi and hot.shape.rank > 1:
      # No labels at all is a vector of `off`: the maximum with 0 covers it.
      hot = tf.maximum(tf.reduce_max(hot, axis=0), 0.0)
    return {**data, key_result or key: hot * (on - off) + off}

  return fn
