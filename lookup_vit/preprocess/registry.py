"""Turns a preprocessing string into a function on one example.

A string names ops and their arguments, separated by bars:

  decode|inception_crop(224)|flip_lr|value_range(-1, 1)|keep("image", "label")

An op is a factory, `op(*args) -> fn(data, seed) -> data`, registered under
its name. One that a module of your own registers is named with the module,
`my_package.my_ops.sharpen(2)`. `data` is one example, a dictionary of tensors,
which `fn` does not change in place; `seed` is an int32 tensor of shape [2], the
op's only source of randomness.
"""

import ast
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable

import tensorflow as tf

Data = dict[str, tf.Tensor]
PreprocessFn = Callable[[Data, tf.Tensor], Data]

_OPS: dict[str, Callable[..., PreprocessFn]] = {}


def register(name: str) -> Callable:
  """Registers an op factory under `name`.

  Args:
    name: the op's name in a preprocessing string.

  Returns:
    A decorator that returns the factory unchanged.

  Raises:
    ValueError: if another op has the name.
  """

  def decorate(factory: Callable[..., PreprocessFn]):
    if name in _OPS:
      raise ValueError(f"a preprocessing op {name!r} is registered already")
    _OPS[name] = factory
    return factory

  return decorate


def image_op(
  factory: Callable, of_any_rank: bool = False
) -> Callable[..., PreprocessFn]:
  """Makes an op factory from one whose functions map an image alone.

  Args:
    factory: `factory(*args) -> fn(image, seed) -> image`.
    of_any_rank: whether an image may have axes before [height, width,
      channels].

  Returns:
    A factory, of the same signature, of functions on `data` that replace
    `data["image"]`. They raise KeyError if there is none, and ValueError if it
    has more axes than it may.
  """

  @functools.wraps(factory)
  def wrapper(*args, **kwargs):
    fn = factory(*args, **kwargs)

    def apply(data: Data, seed: tf.Tensor) -> Data:
      if "image" not in data:
        raise KeyError(f"wanted the key 'image', the data has {sorted(data)}")
      shape = data["image"].shape
      if not of_any_rank and shape.rank is not None and shape.rank > 3:
        raise ValueError(
          f"{factory.__name__} wants an image [height, width, channels], got "
          f"one of shape {shape}; put it before unfold_clip and unfold_views"
        )
      return {**data, "image": fn(data["image"], seed)}

    return apply

  return wrapper


def get_preprocess_fn(pp: str, skip_missing: bool = False) -> PreprocessFn:
  """Builds the preprocessing function that a string describes.

  Arguments are Python literals and are never evaluated. Empty segments are
  skipped, so that a config can leave an op out by an empty string. A bar
  always separates ops, also within quotes.

  Args:
    pp: ops separated by `|`, each a name or a call with literal arguments.
    skip_missing: whether an op that misses a key in the data, such as one on
      the labels of an image without any, is left out rather than an error.

  Returns:
    A function `fn(data, seed) -> data`. Op i gets the seed
    `stateless_fold_in(seed, i)`, i counting from 0 without empty segments:
    the same data and seed (int32, shape [2]) give the same bits. It can be
    mapped by `tf.data`.

  Raises:
    ValueError: if an op is malformed or unknown, or its arguments do not fit;
      by the function, if an op misses a key in the data, unless `skip_missing`.
  """
  segments = _segments(pp)

  def name_op(i):
    return (
      f"op {i + 1} of {len(segments)}, {segments[i]!r}, in the preprocessing "
      f"string {pp!r}"
    )

  ops = []
  for i, segment in enumerate(segments):
    try:
      ops.append(_make_op(segment))
    except (TypeError, ValueError) as e:
      raise ValueError(f"{name_op(i)}: {e}") from e

  # The ops are graph code already; AutoGraph would only slow the tracing.
  @tf.autograph.experimental.do_not_convert
  def preprocess(data: Data, seed: tf.Tensor) -> Data:
    data = dict(data)
    for i, op in enumerate(ops):
      seed_i = tf.random.experimental.stateless_fold_in(seed, i)
      try:
        data = op(data, seed_i)
      except KeyError as e:
        if not skip_missing:
          raise ValueError(f"{name_op(i)}: {e.args[0]}") from e
    return data

  return preprocess


def calls(pp: str, name: str) -> list[inspect.BoundArguments]:
  """The arguments of all calls of an op in a string that can be built."""
  signature = inspect.signature(_OPS[name])
  parsed = map(_parse_call, _segments(pp))
  return [
    signature.bind(*args, **kwargs) for op, args, kwargs in parsed if op == name
  ]


def insert_before(pp: str, name: str, op: str) -> str:
  """Puts an op before the first one of a name.

  Raises:
    ValueError: the string has none of that name.
  """
  segments = _segments(pp)
  places = [i for i, s in enumerate(segments) if _parse_call(s)[0] == name]
  if not places:
    raise ValueError(f"there is no op {name!r} in {pp!r}, to put {op} before")
  segments.insert(places[0], op)
  return "|".join(segments)


def _segments(pp):
  return [s for s in (part.strip() for part in pp.split("|")) if s]


def _make_op(segment: str) -> PreprocessFn:
  """Makes the function that one segment, such as `resize(224)`, describes."""
  name, args, kwargs = _parse_call(segment)
  factory = _find(name)
  signature = inspect.signature(factory)
  try:
    signature.bind(*args, **kwargs)
  except TypeError as e:
    raise ValueError(f"{e}; the op is {name}{signature}") from e
  return factory(*args, **kwargs)


def _find(name: str) -> Callable[..., PreprocessFn]:
  """The factory of an op; `MODULE.OP` is one that a module registers."""
  module, _, op = name.rpartition(".")
  if module:
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as e:
      # What the module itself fails to import is not about its name.
      if not f"{module}.".startswith(f"{e.name}."):
        raise
      raise ValueError(
        f"Python finds no module {module!r}, to have an op {op!r}. It looks in "
        "the directory of the start, in those of PYTHONPATH, and among what is "
        "installed"
      ) from e
  there = {
    op: factory
    for op, factory in _OPS.items()
    if not module or factory.__module__ == module
  }
  if op not in there:
    close = difflib.get_close_matches(op, there, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    where = f"{module} registers" if module else "The ops are:"
    raise ValueError(
      f"there is no op {name!r}.{hint} {where} "
      f"{', '.join(sorted(there)) or 'none'}"
    )
  return there[op]


def _parse_call(segment: str) -> tuple[str, list, dict]:
  """Splits `name` or `name(1, key="x")` into name, args and kwargs."""
  malformed = ValueError(
    "wanted a name, or a name with literal arguments in round brackets, such "
    "as resize(224)"
  )
  try:
    node = ast.parse(segment, mode="eval").body
  except SyntaxError as e:
    raise malformed from e
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  op = _dotted(call.func)
  if not op:
    raise malformed
  names = [keyword.arg for keyword in call.keywords]
  # A name of None is a `**mapping`.
  if None in names or len(set(names)) < len(names):
    raise malformed
  try:
    args = [ast.literal_eval(arg) for arg in call.args]
    kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
  except (TypeError, ValueError) as e:
    raise malformed from e
  return op, args, kwargs


def _dotted(node: ast.expr) -> str | None:
  """`a.b.c` as text; None for all else than names and dots."""
  if isinstance(node, ast.Attribute):
    before = _dotted(node.value)
    return before and f"{before}.{node.attr}"
  return node.id if isinstance(node, ast.Name) else None
