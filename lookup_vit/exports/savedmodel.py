"""Programs as signatures of a TensorFlow SavedModel.

They run JAX's programs as they are, in one operation (XlaCallModule), on
variables that all of them share. Around it are TensorFlow's own: those that
decode and preprocess images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lookup_vit import quiet_tensorflow  # noqa: F401

# isort: split
import tensorflow as tf
from jax.experimental import jax2tf

from lookup_vit.exports import classifier
from lookup_vit.exports.classifier import Function
from lookup_vit.preprocess import get_preprocess_fn

# Operations that call Python, which is not in the file.
_PYTHON = ("EagerPyFunc", "PyFunc", "PyFuncStateless")


def signature(kind: str, name: str) -> str:
  """Name of a signature: "images_3x3", or "images" of a model without grid.

  Args:
    kind: "images" or "encoded".
    name: of a function of `classifier.functions`.
  """
  return kind if name == classifier.NAME else f"{kind}_{name}"


def reader(pp: str, image_size: Sequence[int]) -> Callable:
  """A `tf.function` from encoded images `[batch]` to `[batch, *size, 3]`.

  As `image_files.read`, of what files hold.

  Args:
    pp: op-string, which decodes.
    image_size: (rows, columns).

  Raises:
    ValueError: the op-string is wrong, calls Python, or does not make float32
      of this size.
  """
  preprocess = get_preprocess_fn(pp, skip_missing=True)
  want = (*image_size, 3)

  def read_one(encoded):
    image = preprocess({"image": encoded}, tf.zeros(2, tf.int32)).get("image")
    dtype = getattr(image, "dtype", None)
    if dtype != tf.float32 or not image.shape.is_compatible_with(want):
      made = "no image" if image is None else f"{dtype.name} {image.shape}"
      raise ValueError(
        f"{pp!r} makes {made}, the model wants float32 of shape {want}: "
        f"--pp='decode|resize({tuple(image_size)})|value_range(-1,1)'."
      )
    return tf.ensure_shape(image, want)

  def read(encoded):
    spec = tf.TensorSpec(want, tf.float32)
    return tf.map_fn(read_one, encoded, fn_output_signature=spec)

  function = tf.function(read, autograph=False)
  traced = function.get_concrete_function(tf.TensorSpec([None], tf.string))
  graph = traced.graph.as_graph_def()
  nodes = [
    *graph.node,
    *(n for f in graph.library.function for n in f.node_def),
  ]
  if any(node.op in _PYTHON for node in nodes):
    raise ValueError(f"{pp!r} has an op in Python, which no file can hold.")
  return function


def write(
  folder: str,
  functions: Mapping[str, Function],
  params: Mapping[str, np.ndarray],
  images: jax.ShapeDtypeStruct,
  platforms: Sequence[str],
  read: Callable | None,
) -> None:
  """Writes a SavedModel.

  Of each function it has the signature `images_GRID`, on uint8 images, and
  where they can be read `encoded_GRID`, on what files hold; `serving_default`
  is the first.

  Args:
    folder: a directory there is.
    functions: of `classifier.functions`.
    params: by name.
    images: of `classifier.images_shape`.
    platforms: of `jax.export`, to lower for.
    read: of `reader`; None for clips.
  """
  module = tf.Module()
  module.params = {
    name: tf.Variable(x, trainable=False) for name, x in params.items()
  }
  size = [n if isinstance(n, int) else None for n in images.shape]
  polymorphic = None
  if size[0] is None:
    polymorphic = [None, "(batch, ...)"]
  signatures: dict[str, Any] = {}
  for name, function in functions.items():
    call = jax2tf.convert(
      function,
      polymorphic_shapes=polymorphic,
      with_gradient=False,
      native_serialization_platforms=tuple(platforms),
    )

    def of_images(images, call=call):
      return call(dict(module.params), images)

    def of_encoded(encoded, call=call):
      pixels = tf.ensure_shape(read(encoded), size)
      return call(dict(module.params), pixels)

    spec = tf.TensorSpec(size, tf.uint8, "images")
    signatures[signature("images", name)] = _traced(of_images, spec)
    if read:
      spec = tf.TensorSpec(size[:1], tf.string, "encoded")
      signatures[signature("encoded", name)] = _traced(of_encoded, spec)
  signatures["serving_default"] = next(iter(signatures.values()))
  tf.saved_model.save(module, folder, signatures)


def _traced(function, spec):
  return tf.function(function, autograph=False).get_concrete_function(spec)


def load(folder: str) -> Callable[[str, str, Any], dict[str, np.ndarray]]:
  """What runs a signature: `run(kind, name, input) -> outputs by name`."""
  module = tf.saved_model.load(folder)

  def run(kind, name, given):
    out = module.signatures[signature(kind, name)](tf.constant(given))
    return {name: x.numpy() for name, x in out.items()}

  return run
