"""What the text of a compiled program says: collectives and buffers."""

import collections
import dataclasses
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
# Dtype, sizes and layout.
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"(?<=[\]})]) ([a-z][\w-]*)\(")
_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# What moves nothing.
_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: its name, shape and operation, and the text."""

  name: str
  shape: str
  opcode: str
  text: str

  @property
  def op_name(self) -> str:
    """Where in the model it comes from; its own name where that is unknown."""
    match = re.search(r'op_name="([^"]*)"', self.text)
    return match[1] if match else self.name


@dataclasses.dataclass
class Collectives:
  """Those of one kind in a step.

  Attributes:
    count: how many are executed.
    bytes: of the whole arrays that a chip takes part in exchanging: the result
      of an all-gather, the input of a reduce-scatter.
    sent: bytes that a chip must send for them, by the bound that rings attain.
  """

  count: float = 0
  bytes: float = 0
  sent: float = 0


def shape_bytes(shape: str) -> float:
  """Bytes of `"f32[2,3]{1,0}"` or a tuple of such, without padding."""
  total = 0
  for dtype, sizes, _ in _ARRAY.findall(shape):
    bits = _BITS.get(dtype)
    if bits is None:  # f32, s8, f8e4m3fn
      bits = int(re.match(r"[a-z]+(\d+)", dtype)[1])
    count = 1
    for size in filter(None, sizes.split(",")):
      count *= int(size)
    total += count * bits / 8
  return total


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The computations of a compiled program by name, and that it begins with."""
  found, entry, current = {}, "", None
  for line in text.splitlines():
    if line[:1] not in (" ", "}", "") and line.endswith("{"):
      match = re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)
      if match:
        current = found[match[2]] = []
        entry = match[2] if match[1] else entry
    elif current is not None:
      match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
      opcode = match and _OPCODE.search(line, match.end())
      if opcode:
        shape = line[match.end() : opcode.start()]
        current.append(Instruction(match[1], shape, opcode[1], line))
  return found, entry


def _called(instruction: Instruction) -> Iterator[tuple[str, str]]:
  """Pairs of the attribute that calls, and the computation."""
  pattern = (
    r"\b(calls|to_apply|body|condition|branch_computations)=(\{.*?\}|\S+)"
  )
  for attribute, names in re.findall(pattern, instruction.text):
    for name in re.findall(r"[\w.\-]+", names):
      yield attribute, name


def _trips(instruction: Instruction, condition: list[Instruction]) -> int:
  """How often a loop's body runs; 1 where that depends on values."""
  match = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text)
  if match:
    return int(match[1])
  # Loops of `jax.lax.scan` count from 0 while less than a constant.
  limits = [i for i in condition if i.opcode == "constant"]
  compares = [i for i in condition if "direction=LT" in i.text]
  if len(limits) == len(compares) == 1 and limits[0].shape.startswith("s32[]"):
    return int(re.search(r"constant\((\d+)\)", limits[0].text)[1])
  return 1


def _group_size(text: str) -> int:
  """Devices among which a collective exchanges."""
  # {{0,1},{2,3}}, or [2,4]<=[8], or axes of a mesh.
  match = re.search(
    r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)", text
  )
  if match:
    return len(match[1].split(","))
  match = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
  if match:
    return int(match[1])
  match = re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", text)
  if not match:
    return 1
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
  count = 1
  for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2]):
    count *= int(part or sizes[axis])
  return count


def collectives(text: str) -> dict[str, Collectives]:
  """The collectives of a compiled program, by kind; in loops, times the trips.

  Args:
    text: of `jax.stages.Compiled.as_text()`.
  """
  parts, entry = computations(text)
  times = collections.Counter()

  def visit(name, count):
    times[name] += count
    for instruction in parts.get(name, ()):
      called = list(_called(instruction))
      condition = dict(called).get("condition")
      for attribute, other in called:
        trips = 1
        if attribute == "body":
          trips = _trips(instruction, parts.get(condition, []))
        visit(other, count * trips)

  visit(entry, 1)
  seen, found = set(), {}
  for name, count in times.items():
    for instruction in parts.get(name, ()):
      kind = instruction.opcode.removesuffix("-start")
      group = _group_size(instruction.text)
      if kind not in _KINDS or group == 1:
        continue
      size = shape_bytes(instruction.shape)
      scatters = name.startswith("all-reduce-scatter")  # How TPUs do it.
      # The parts that one is cut into, to overlap with computing, have the
      # number of the whole and its shape. But the compiler gives one number to
      # all scatters and permutations that it makes itself.
      channel = re.search(r"channel_id=(\d+)", instruction.text)
      if channel and not scatters and kind != "collective-permute":
        key = channel[1], instruction.opcode, instruction.shape
        if key in seen:
          continue
        seen.add(key)
      if scatters:
        kind = "reduce-scatter"
      elif kind == "reduce-scatter":
        size *= group
      elif instruction.opcode == "all-gather-start":  # Input and result.
        size *= group / (group + 1)
      elif instruction.opcode == "collective-permute-start":
        size /= 2
      sent = size
      if kind != "collective-permute":
        sent *= (group - 1) / group
      if kind == "all-reduce":
        sent *= 2
      total = found.setdefault(kind, Collectives())
      total.count += count
      total.bytes += count * size
      total.sent += count * sent
  return found


def main_memory_bytes(text: str) -> float:
  """What a program's entry reads from and writes to a chip's main memory.

  Operands and results of each instruction; arrays that the compiler placed in a
  fast memory (`S(1)` in their layouts) are left out, and of what is copied
  between both memories the one in the main one counts. Loops are not entered.
  """
  found, entry = computations(text)
  of_name = {i.name: i for i in found[entry]}
  total = 0.0
  for instruction in found[entry]:
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
      continue
    if instruction.opcode.endswith("-start"):
      # What goes where, operands among them; the sizes of what moves are alike,
      # or that of a slice is less than that of what it is of.
      arrays = [x for x in _ARRAY.finditer(instruction.shape) if x[2]]
      if arrays:
        moved = min(shape_bytes(x[0]) for x in arrays)
        total += moved * (1 if any(_is_fast(x) for x in arrays) else 2)
      continue
    for shape in (instruction.shape, *_operands(instruction, of_name)):
      total += sum(
        shape_bytes(x[0]) for x in _ARRAY.finditer(shape) if not _is_fast(x)
      )
  return total


def _is_fast(array):
  return re.search(r"S\([1-9]", array[3] or "") is not None


def _operands(instruction, of_name):
  """Shapes of the operands, each as often as it is one."""
  start = instruction.text.index(f" {instruction.opcode}(")
  start += len(instruction.opcode) + 2
  depth = 1
  for end in range(start, len(instruction.text)):
    depth += {"(": 1, ")": -1}.get(instruction.text[end], 0)
    if not depth:
      break
  names = re.findall(r"%?([\w.\-]+)", instruction.text[start:end])
  return [of_name[name].shape for name in names if name in of_name]


def temporaries(
  assignment: str, text: str, count: int
) -> list[tuple[float, str]]:
  """The largest temporaries of a compiled program.

  Args:
    assignment: XLA's dump "buffer-assignment.txt".
    text: of the program.
    count: how many are wanted, at most.

  Returns:
    Pairs of bytes and of shape and origin, largest first. No two lie at the
    same place in memory; what takes a place at another time is left out.
  """
  parts, _ = computations(text)
  origin = {i.name: i.op_name for part in parts.values() for i in part}
  values = {}
  block = None
  for line in assignment.splitlines():
    match = re.match(r"allocation (\d+): size \d+, (.*)", line)
    if match:
      # A color is another memory than HBM.
      is_temp = "preallocated-temp" in match[2] and "color" not in match[2]
      block = match[1] if is_temp else None
      continue
    match = re.match(
      r" value: <\d+ (\S+?)(?:\{.*?\})? @\d+> "
      r"\(size=(\d+),offset=(\d+)\): (.*)",
      line,
    )
    if match and block is not None:
      name, size, offset, shape = match.groups()
      place = (int(size), block, int(offset))
      what = f"{shape.split('{')[0]} {_short(origin.get(name, name))}"
      # Of those that share a place in turn, one that computes says most.
      if place not in values or "broadcast" in values[place]:
        values[place] = what
  chosen = []
  for (size, block, offset), what in sorted(values.items(), reverse=True):
    overlaps = any(
      block == b and offset < o + s and o < offset + size
      for (s, b, o), _ in chosen
    )
    if not overlaps:
      chosen.append(((size, block, offset), what))
    if len(chosen) == count:
      break
  return [(size, what) for (size, _, _), what in chosen]


def _short(op_name: str) -> str:
  """The end of an origin, without the names of transformations."""
  if op_name.endswith("/dynamic_update_slice"):  # Of a loop.
    return "kept of each block"
  backward = "transpose(" in op_name
  skip = r"jit\(\w*\)|while|body|closed_call|checkpoint|rematted_computation"
  parts = [p for p in op_name.split("/") if not re.fullmatch(skip, p)]
  parts = [re.sub(r"\b(jvp|transpose|vmap|jit)\(|\)", "", p) for p in parts]
  name = "/".join([p for p in parts if p][-4:])
  return ("backward of " if backward else "") + name


def required_memory(message: str) -> tuple[float, list[tuple[float, str]]]:
  """Reads a compiler's refusal of what does not fit into memory.

  Returns:
    The bytes that are needed (infinity where the message does not say), and
    pairs of bytes and of shape and origin for what it names as largest.

  Raises:
    ValueError: the message is about something else.
  """
  if "RESOURCE_EXHAUSTED" not in message:
    raise ValueError(f"The compiler failed: {message.strip().splitlines()[0]}")
  number = r"([\d.]+)([KMGT]?)"
  match = re.search(rf"\({number}\) exceeds available", message)
  match = match or re.search(rf"Used {number} of", message)
  needed = _bytes(*match.groups()) if match else float("inf")
  largest = [
    (_bytes(size, unit), f"{shape.split('{')[0]} {_short(name)}")
    for size, unit, name, shape in re.findall(
      rf'Size: {number}\s+Operator: op_name="([^"]*)".*?Shape: (\S+)',
      message,
      re.DOTALL,
    )
  ]
  return needed, largest


def _bytes(number, unit):
  return float(number) * 1024 ** " KMGT".index(unit or " ")
