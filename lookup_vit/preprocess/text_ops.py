"""Preprocessing ops on text: captions to ids."""

import numpy as np
import tensorflow as tf

from lookup_vit import tokenizer
from lookup_vit.preprocess.registry import (
  Data,
  PreprocessFn,
  calls,
  register,
)


@register("lower")
def lower(key: str = "caption") -> PreprocessFn:
  """Makes a text lower-case."""

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    return {**data, key: tf.strings.lower(data[key], encoding="utf-8")}

  return fn


@register("tokenize")
def tokenize(
  model: str,
  max_length: int,
  key: str = "caption",
  key_result: str = "text",
) -> PreprocessFn:
  """Turns a caption into ids, for a decoder to be trained on.

  Args:
    model: path of a SentencePiece model.
    max_length: ids of a caption, its end among them. Of a longer caption the
      first `max_length` ids remain, without an end.
    key: key of the caption, a text.
    key_result: key of the result.

  Returns:
    An op that stores int32 `[max_length + 1]`: the id that stands before a
    caption, those of the caption, its end, and -1 behind it; and under
    `KEY_RESULT_cut`, float32, 1 for a caption that was cut and 0 for others.
    An empty caption is an error.

  Raises:
    ValueError: there is no such model, or `max_length` is no positive integer.
  """
  if not isinstance(max_length, int) or max_length < 1:
    raise ValueError(
      f"wanted a positive integer as max_length, got {max_length!r}"
    )
  words = tokenizer.load(model)

  def encode(caption):
    # Bytes in a graph, an array of them in eager execution.
    caption = np.asarray(caption, object).item().decode(errors="replace")
    ids = [words.begin, *words.encode(caption), words.end]
    cut = np.float32(len(ids) > max_length + 1)
    ids = np.array(ids[: max_length + 1], np.int32)
    pad = max_length + 1 - len(ids)
    return np.pad(ids, (0, pad), constant_values=-1), cut

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    caption = data[key]
    check = tf.debugging.assert_positive(
      tf.strings.length(tf.strings.strip(caption)),
      message="tokenize: the caption is empty",
    )
    with tf.control_dependencies([check] if check is not None else []):
      # SentencePiece's own op for TensorFlow is of one version of it each.
      ids, cut = tf.numpy_function(
        encode, [tf.identity(caption)], (tf.int32, tf.float32), stateful=False
      )
    ids = tf.ensure_shape(ids, [max_length + 1])
    return {
      **data,
      key_result: ids,
      f"{key_result}_cut": tf.ensure_shape(cut, []),
    }

  return fn


def check_tokenizer(pp: str, words: tokenizer.Tokenizer) -> None:
  """Checks that captions become ids by the tokenizer that reads them.

  Args:
    pp: op-string that can be built.
    words: the config's tokenizer.

  Raises:
    ValueError: the string has `tokenize` with another one.
  """
  for call in calls(pp, "tokenize"):
    path = call.arguments["model"]
    if tokenizer.load(path).content != words.content:
      raise ValueError(
        f"{pp!r} makes ids with {path!r}, but config.tokenizer="
        f"{words.path!r} is another one."
      )
