"""Programs as ONNX graphs, converted from JAX's own (jaxprs).

What depends on nothing but constants is computed here; each operation on
images or parameters becomes nodes of its own, and one that is not known is an
error. Graphs hold no parameters: all of them refer to `params.safetensors`.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from lookup_vit import params_file
from lookup_vit.exports.classifier import Function

# Versions that runtimes of 2023 read: ReduceMax has axes as an input from 18.
_OPSET, _IR = 18, 8

# Primitives that are one node, of the same inputs.
_SAME = {
  "add": "Add",
  "copy": "Identity",
  "div": "Div",
  "exp": "Exp",
  "logistic": "Sigmoid",
  "max": "Max",
  "mul": "Mul",
  "neg": "Neg",
  "stop_gradient": "Identity",
  "sub": "Sub",
  "tanh": "Tanh",
}

# A value: an array, or the name of what a node or an input is.
_Value = np.ndarray | jax.Array | str


def write(
  folder: str,
  functions: Mapping[str, Function],
  params: Mapping[str, np.ndarray],
  step: int,
  images: jax.ShapeDtypeStruct,
) -> None:
  """Writes `NAME.onnx` of each function, and `params.safetensors`.

  Args:
    folder: a directory there is.
    functions: of `classifier.functions`.
    params: by name.
    step: of the training.
    images: of `classifier.images_shape`.

  Raises:
    ValueError: a function has an operation that this has no conversion of.
  """
  params_file.write(folder, params, step)
  path = pathlib.Path(folder) / params_file.FILE
  stored = {
    name: _external(name, x, *place)
    for (name, x), place in zip(
      sorted(params.items()), _places(path, sorted(params)), strict=True
    )
  }
  for name, function in functions.items():
    model = convert(function, params, images, stored)
    path = pathlib.Path(folder) / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path)


def load(
  folder: str,
) -> Callable[[str, str, np.ndarray], dict[str, np.ndarray]]:
  """What runs a program: `run("images", name, images) -> outputs by name`."""
  import onnxruntime

  def run(kind, name, images):
    del kind  # All are on images.
    session = onnxruntime.InferenceSession(
      pathlib.Path(folder) / f"{name}.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": images})
    return dict(zip(names, found, strict=True))

  return run


def convert(
  function: Function,
  params: Mapping[str, np.ndarray],
  images: jax.ShapeDtypeStruct,
  stored: Mapping[str, onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
  """A function of parameters and an array as an ONNX model.

  Args:
    function: `(params, images) -> outputs by name`.
    params: by name.
    images: of the array; the first dimension may be symbolic.
    stored: the parameters as tensors; they are in the model where none are
      given.

  Returns:
    A model whose input is `images`, with outputs as the function has them.

  Raises:
    ValueError: the function has an operation that this has no conversion of.
  """
  shapes = {
    k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in params.items()
  }
  traced = jax.jit(function).trace(shapes, images)
  if stored is None:
    stored = {k: numpy_helper.from_array(x, k) for k, x in params.items()}
  graph = _Graph(images.shape[0])
  closed = traced.jaxpr
  # In the order of the leaves of (params, images).
  outputs = graph.run(closed.jaxpr, closed.consts, [*sorted(params), "images"])
  names = sorted(traced.out_info)
  for name, x in zip(names, outputs, strict=True):
    graph.node("Identity", [x], name)
  nodes, used = _needed(graph.nodes, names)
  known = {**stored, **graph.constants}
  result = helper.make_graph(
    nodes,
    "lookup_vit",
    [_info("images", images)],
    [_info(name, traced.out_info[name]) for name in names],
    [tensor for name, tensor in known.items() if name in used],
  )
  return helper.make_model(
    result,
    producer_name="lookup_vit",
    ir_version=_IR,
    opset_imports=[helper.make_opsetid("", _OPSET)],
  )


class _Graph:
  """Nodes and constants, as they come to be.

  Args:
    batch: the first dimension of `images`, perhaps symbolic.
  """

  def __init__(self, batch: Any):
    self.batch = batch
    self.nodes, self.constants = [], {}
    self._names = {}

  def run(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Value]):
    """Converts a jaxpr; returns its outputs."""
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= zip(jaxpr.invars, inputs, strict=True)

    def read(x):
      if isinstance(x, core.Literal):
        return np.asarray(x.val, x.aval.dtype)
      return env[x]

    for eqn in jaxpr.eqns:
      outputs = self._equation(eqn, [read(x) for x in eqn.invars])
      env |= zip(eqn.outvars, outputs, strict=True)
    return [read(x) for x in jaxpr.outvars]

  def _equation(self, eqn, inputs):
    name = eqn.primitive.name
    if name == "jit":
      inner = eqn.params["jaxpr"]
      return self.run(inner.jaxpr, inner.consts, inputs)
    if name == "platform_index":
      # What is for no platform of its own.
      return [np.int32(eqn.params["platforms"].index(None))]
    if name == "cond" and not isinstance(inputs[0], str):
      branch = eqn.params["branches"][int(inputs[0])]
      return self.run(branch.jaxpr, branch.consts, inputs[1:])
    shapes = [x for v in eqn.outvars for x in v.aval.shape]
    are_known = not any(isinstance(x, str) for x in inputs)
    if are_known and all(isinstance(n, int) for n in shapes):
      found = eqn.primitive.bind(*inputs, **eqn.params)
      return found if eqn.primitive.multiple_results else [found]
    if name in _SAME:
      return [self.node(_SAME[name], inputs)]
    if name not in _CONVERSIONS:
      raise ValueError(
        f"The model has JAX's operation {name!r}, which lookup_vit has no "
        "conversion of to ONNX."
      )
    return [_CONVERSIONS[name](self, eqn, *inputs)]

  def node(
    self, kind: str, inputs: Sequence[_Value], name: str = "", **attributes: Any
  ) -> str:
    """Adds a node; returns the name of its output."""
    name = name or f"{kind}_{len(self.nodes)}"
    inputs = [x if isinstance(x, str) else self.constant(x) for x in inputs]
    self.nodes.append(
      helper.make_node(kind, inputs, [name], name, **attributes)
    )
    return name

  def constant(self, x: Any) -> str:
    """The name of an array, which is held once."""
    x = np.asarray(x)
    key = x.dtype, x.shape, x.tobytes()
    if key not in self._names:
      name = self._names[key] = f"constant_{len(self._names)}"
      self.constants[name] = numpy_helper.from_array(x, name)
    return self._names[key]

  def integers(self, values: Sequence[int]) -> str:
    """A constant of int64, as shapes and axes are."""
    return self.constant(np.array(values, np.int64))

  def reshape(self, x: _Value, shape: Sequence[Any]) -> str:
    """Reshapes; one dimension may be symbolic."""
    sizes = [n if isinstance(n, int) else -1 for n in shape]
    if sizes.count(-1) > 1:
      raise ValueError(f"A shape {tuple(shape)} has no conversion to ONNX.")
    return self.node("Reshape", [x, self.integers(sizes)])

  def transpose(self, x: _Value, order: Sequence[int]) -> _Value:
    """Permutes axes, where they are not in order."""
    if list(order) == sorted(order):
      return x
    return self.node("Transpose", [x], perm=list(order))

  def shape(self, sizes: Sequence[Any]) -> str:
    """A shape as a value; dimensions may be multiples of the batch."""
    if all(isinstance(n, int) for n in sizes):
      return self.integers(sizes)
    batch = self.node("Shape", ["images"], start=0, end=1)
    parts = []
    for n in sizes:
      if isinstance(n, int):
        parts.append(self.integers([n]))
        continue
      times = n // self.batch
      if not isinstance(times, int) or times * self.batch != n:
        raise ValueError(f"A dimension {n} has no conversion to ONNX.")
      parts.append(self.node("Mul", [batch, self.integers([times])]))
    return self.node("Concat", parts, axis=0)


# Conversions, each (graph, equation, *inputs) to an output.


def _broadcast_in_dim(graph, eqn, x):
  target = eqn.params["shape"]
  source = eqn.invars[0].aval.shape
  places = eqn.params["broadcast_dimensions"]
  sizes = [1] * len(target)
  for place, n in zip(places, source, strict=True):
    sizes[place] = n
  x = graph.reshape(x, sizes)
  if sizes == list(target):
    return x
  return graph.node("Expand", [x, graph.shape(target)])


def _concatenate(graph, eqn, *inputs):
  return graph.node("Concat", inputs, axis=eqn.params["dimension"])


def _conv_general_dilated(graph, eqn, x, kernel):
  p = eqn.params
  if any(n != 1 for n in (*p["lhs_dilation"], p["batch_group_count"])):
    raise ValueError("A transposed convolution has no conversion to ONNX.")
  spec = p["dimension_numbers"]
  x = graph.transpose(x, spec.lhs_spec)
  kernel = graph.transpose(kernel, spec.rhs_spec)
  x = graph.node(
    "Conv",
    [x, kernel],
    strides=list(p["window_strides"]),
    dilations=list(p["rhs_dilation"]),
    pads=[n for pair in zip(*p["padding"], strict=True) for n in pair],
    group=p["feature_group_count"],
  )
  return graph.transpose(x, np.argsort(spec.out_spec).tolist())


def _convert_element_type(graph, eqn, x):
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(eqn.params["new_dtype"]))
  return graph.node("Cast", [x], to=kind)


def _dot_general(graph, eqn, a, b):
  """A MatMul: axes that are summed, or only one side's, are made one each."""
  (a_sum, b_sum), (a_batch, b_batch) = eqn.params["dimension_numbers"]
  a_shape, b_shape = (v.aval.shape for v in eqn.invars)
  a_own, b_own = (
    [i for i in range(len(shape)) if i not in (*batch, *summed)]
    for shape, batch, summed in (
      (a_shape, a_batch, a_sum),
      (b_shape, b_batch, b_sum),
    )
  )
  a = graph.transpose(a, [*a_batch, *a_own, *a_sum])
  b = graph.transpose(b, [*b_batch, *b_sum, *b_own])
  # A matrix on the right is multiplied with whatever there is on the left.
  if not a_batch and len(b_sum) == len(b_own) == 1 and a_own:
    return graph.node("MatMul", [a, b])
  batch = [a_shape[i] for i in a_batch]

  def sizes(shape, *groups):
    return [*batch, *(math.prod(shape[i] for i in axes) for axes in groups)]

  if not len(a_own) == len(a_sum) == 1:
    a = graph.reshape(a, sizes(a_shape, a_own, a_sum))
  if not len(b_own) == len(b_sum) == 1:
    b = graph.reshape(b, sizes(b_shape, b_sum, b_own))
  x = graph.node("MatMul", [a, b])
  if not len(a_own) == len(b_own) == 1:
    x = graph.reshape(x, eqn.outvars[0].aval.shape)
  return x


def _erfc(graph, eqn, x):
  del eqn
  return graph.node("Sub", [np.float32(1), graph.node("Erf", [x])])


def _integer_pow(graph, eqn, x):
  if eqn.params["y"] < 2:
    raise ValueError(f"A power {eqn.params['y']} has no conversion to ONNX.")
  product = x
  for _ in range(eqn.params["y"] - 1):
    product = graph.node("Mul", [product, x])
  return product


def _reduce_max(graph, eqn, x):
  axes = graph.integers(eqn.params["axes"])
  return graph.node("ReduceMax", [x, axes], keepdims=0)


def _reduce_sum(graph, eqn, x):
  axes = graph.integers(eqn.params["axes"])
  return graph.node("ReduceSum", [x, axes], keepdims=0)


def _reshape(graph, eqn, x):
  return graph.reshape(x, eqn.outvars[0].aval.shape)


def _rsqrt(graph, eqn, x):
  del eqn
  return graph.node("Reciprocal", [graph.node("Sqrt", [x])])


def _slice(graph, eqn, x):
  p, shape = eqn.params, eqn.invars[0].aval.shape
  steps = p["strides"] or [1] * len(shape)
  parts = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
  chosen = [
    (i, *part) for i, part in enumerate(parts) if part != (0, shape[i], 1)
  ]
  if not all(isinstance(n, int) for part in chosen for n in part):
    raise ValueError("A slice of the batch has no conversion to ONNX.")
  if not chosen:
    return x
  axes, starts, ends, steps = zip(*chosen, strict=True)
  given = [graph.integers(n) for n in (starts, ends, axes, steps)]
  return graph.node("Slice", [x, *given])


def _square(graph, eqn, x):
  del eqn
  return graph.node("Mul", [x, x])


def _stack(graph, eqn, *inputs):
  axis = eqn.params["axis"]
  shape = list(eqn.outvars[0].aval.shape)
  shape[axis] = 1
  parts = [graph.reshape(x, shape) for x in inputs]
  return graph.node("Concat", parts, axis=axis)


def _tile(graph, eqn, x):
  return graph.node("Tile", [x, graph.shape(eqn.params["reps"])])


def _transpose(graph, eqn, x):
  return graph.transpose(x, eqn.params["permutation"])


_CONVERSIONS = {
  "broadcast_in_dim": _broadcast_in_dim,
  "concatenate": _concatenate,
  "conv_general_dilated": _conv_general_dilated,
  "convert_element_type": _convert_element_type,
  "dot_general": _dot_general,
  "erfc": _erfc,
  "integer_pow": _integer_pow,
  "reduce_max": _reduce_max,
  "reduce_sum": _reduce_sum,
  "reshape": _reshape,
  "rsqrt": _rsqrt,
  "slice": _slice,
  "square": _square,
  "squeeze": _reshape,
  "stack": _stack,
  "tile": _tile,
  "transpose": _transpose,
}


# Models.


def _needed(nodes, outputs):
  """The nodes that outputs depend on, and the names of all that they read."""
  used, kept = set(outputs), []
  for node in reversed(nodes):
    if node.output[0] in used:
      used.update(node.input)
      kept.append(node)
  return kept[::-1], used


def _info(name, x):
  shape = [n if isinstance(n, int) else str(n) for n in x.shape]
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(x.dtype))
  return helper.make_tensor_value_info(name, kind, shape)


def _places(path, names):
  """Offset and length of arrays in a safetensors file, in bytes."""
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
  for name in names:
    start, end = header[name]["data_offsets"]
    yield 8 + size + start, end - start


def _external(name, x, offset, length):
  """A tensor whose values are in the safetensors file."""
  kind = helper.np_dtype_to_tensor_dtype(x.dtype)
  tensor = onnx.TensorProto(name=name, data_type=kind, dims=x.shape)
  tensor.data_location = onnx.TensorProto.EXTERNAL
  where = dict(location=params_file.FILE, offset=offset, length=length)
  for key, value in where.items():
    tensor.external_data.add(key=key, value=str(value))
  return tensor
