"""The work of a compiled program on one device, read from its HLO text: FLOPs, bytes, and every collective.

`compiled.cost_analysis()` counts the body of a loop once, knows no collectives, and is None on some backends. Here
loops are multiplied out, fusions and calls are followed, and a collective's groups of devices are named by the axes of
the mesh.
"""

import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Collective(NamedTuple):
  """All collectives of one kind over the same mesh axes.

  `bytes` are those that determine one device's time (2211.05102, appendix A.1): of the output of an all-gather, of the
  input of a reduce-scatter or an all-reduce (which takes twice that time), of the local buffer of an all-to-all or a
  permutation.
  """

  kind: str  # "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", ...
  axes: tuple[str, ...]  # mesh axes within which devices communicate, in the order of the mesh
  group: int  # devices of a group, which may be fewer than the product of the axes
  count: int  # arrays moved, with loops multiplied out (one operation may move several)
  bytes: int  # total bytes of these arrays
  # The form in which an all-reduce was written by the compiler: a "reduce-scatter" if every device keeps only its
  # slice, an "all-gather" if each fills its slice of zeros.
  rewritten: str | None = None
  extra_bytes: int = 0  # cost of rewriting as an all-reduce, which moves its bytes twice


class Counts(NamedTuple):
  """The work of one device in one run of a program."""

  flops: int  # FLOPs of dots and convolutions, two for each multiply-add
  bytes: int  # bytes of main memory that unfused operations read and write; a slice counts its own size
  collectives: tuple[Collective, ...]
  open_loops: int  # loops whose number of trips depends on data; their bodies count once
  opaque: dict[str, int]  # executions of custom calls by target, whose FLOPs are unknown


def count(text: str, mesh: Mapping[str, int]) -> Counts:
  """Counts the program of `compiled.as_text()` that was partitioned over a mesh {axis: size}.

  Devices are numbered by their place in `mesh.devices.flat`, as in the program itself.
  """
  return _Counter(_parse(text), dict(mesh)).run()


# ------------------------------------------------------------------------------------------ the HLO text


class Op(NamedTuple):
  """One operation of a computation."""

  name: str
  kind: str  # opcode
  shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, dimensions); the leaves of a tuple
  far: tuple[bool, ...]  # true for leaves in main memory (a TPU's layout names on-chip memory by S(n))
  operands: tuple[str, ...]
  argument: str  # the text between the parentheses: a parameter's number or a constant's value
  attributes: str

  def attribute(self, name: str) -> str | None:
    """The computation, number or word behind `name=`."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
    return found and found[1]

  def dimensions(self, name: str) -> list[int]:
    """Parses `name={1,2}` to [1, 2]; [] if it is absent."""
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
    return _ints(found[1]) if found else []

  @property
  def bytes(self) -> int:
    return sum(map(_size, self.shapes))

  @property
  def far_bytes(self) -> int:
    return sum(_size(s) for s, far in zip(self.shapes, self.far, strict=True) if far)

  @property
  def elements(self) -> int:
    return sum(math.prod(dims) for _, dims in self.shapes)


class Computation(NamedTuple):
  ops: dict[str, Op]
  root: str
  parameters: dict[int, str]
  users: dict[str, list[str]]


class Program(NamedTuple):
  computations: dict[str, Computation]
  entry: str


_VIEWS = {"bitcast", "reshape", "convert", "copy", "transpose"}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{[\d,]*(?::([^}]*))?\})?")
_ON_CHIP = re.compile(r"S\([1-9]")
_HEAD = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")


def _ints(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n]


def _size(shape: tuple[str, tuple[int, ...]]) -> int:
  return math.ceil(_bits(shape[0]) * math.prod(shape[1]) / 8)


def _bits(dtype: str) -> int:
  """Bits of a dtype: bf16 16, f8e4m3fn 8, s4 4, c64 64, pred 8; token and opaque 0."""
  digits = re.search(r"\d+", dtype)
  return int(digits[0]) if digits else 8 * (dtype == "pred")


def _closing(text: str, start: int) -> int:
  """The index behind the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _parse_op(line: str) -> tuple[Op, bool] | None:
  """Parses one line of a computation to the op, and whether it is the root."""
  head = _HEAD.match(line)
  if not head:
    return None
  at = head.end()
  behind = _closing(line, at) if line[at] == "(" else line.index(" ", at)
  leaves = _SHAPE.findall(line[at:behind])
  shapes = tuple((dtype, tuple(_ints(dims.replace("<=", "")))) for dtype, dims, _ in leaves)
  far = tuple(not _ON_CHIP.search(layout) for _, _, layout in leaves)
  opcode = _OPCODE.match(line, behind)
  end = _closing(line, opcode.end() - 1)
  inside = line[opcode.end() : end - 1]
  return Op(head[2], opcode[1], shapes, far, tuple(_NAME.findall(inside)), inside, line[end:]), bool(head[1])


def _parse(text: str) -> Program:
  computations, entry, ops, name = {}, None, None, None
  root = None
  for line in text.splitlines():
    if ops is None:
      # "%name (parameters) -> result {" begins a computation, and no other line looks like it
      if line.endswith("{") and " -> " in line and not line.startswith(("HloModule", " ")):
        is_entry = line.startswith("ENTRY ")
        name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
        entry = name if is_entry else entry
        ops, root = {}, None
    elif line.startswith("}"):
      parameters = {int(op.argument): op.name for op in ops.values() if op.kind == "parameter"}
      users = defaultdict(list)
      for op in ops.values():
        for operand in dict.fromkeys(op.operands):
          users[operand].append(op.name)
      computations[name] = Computation(ops, root, parameters, users)
      ops = None
    elif parsed := _parse_op(line):
      op, is_root = parsed
      ops[op.name] = op
      root = op.name if is_root else root
  return Program(computations, entry)


# ---------------------------------------------------------------------------------------- groups and axes


def device_groups(op: Op, devices: int) -> np.ndarray:
  """Parses the groups of a collective, int [groups, devices of a group], from any of the forms that HLO prints.

  The forms are replica_groups={{0,1},{2,3}}, {} (all devices), [2,4]<=[4,2]T(1,0) (an iota, transposed and reshaped),
  and mesh['x'=2,'y'=4], device_ids=(...) {'y','x':(1)2} (axes, or parts of them, of a mesh).
  """
  text = op.attributes.partition("replica_groups=")[2]
  if iota := re.match(r"(\[[\d,]+\]<=\S*?)(?:, |$)", text):
    return _iota(iota[1])
  if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
    return _mesh_groups(*mesh.groups())
  explicit = re.match(r"\{(\{[\d,{}]*\})?\}", text)
  if not explicit or not explicit[1]:
    return np.arange(devices)[None]
  return np.array([_ints(group) for group in re.findall(r"\{([\d,]+)\}", explicit[1])])


def _iota(text: str) -> np.ndarray:
  """Parses an iota: [8,8]<=[4,4,4]T(0,2,1) gives the numbers 0..63 as [4,4,4], transposed, as [8,8]."""
  shape, source, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  numbers = np.arange(math.prod(_ints(source))).reshape(_ints(source))
  return (numbers.transpose(_ints(order)) if order else numbers).reshape(_ints(shape))


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> np.ndarray:
  names, sizes = zip(*((name, int(size)) for name, size in re.findall(r"'?([^'=,]+)'?=(\d+)", mesh)), strict=True)
  total = math.prod(sizes)
  if device_ids is None:
    numbers = np.arange(total)
  elif device_ids.startswith("["):
    source, _, order = device_ids.partition("T")
    numbers = _iota(f"[{total}]<={source.split('<=')[-1]}" + (f"T{order}" if order else "")).reshape(-1)
  else:
    numbers = np.array(_ints(device_ids))
  # An axis that is taken in part, 'x':(before)size, becomes three dimensions: before, size, and the remainder.
  parts = re.findall(r"'?([^'=,:]+)'?(?::\((\d+)\)(\d+))?", axes)
  wanted = {(name, int(before or 1), int(part or dict(zip(names, sizes))[name])) for name, before, part in parts}
  dims, grouped = [], []
  for name, size in zip(names, sizes, strict=True):
    cuts = {1, size}
    for n, before, part in wanted:
      if n == name:
        cuts |= {before, before * part}
    for low, high in itertools.pairwise(sorted(cuts)):
      inside = any(n == name and before <= low < before * part for n, before, part in wanted)
      grouped += [len(dims)] * inside
      dims.append(high // low)
  kept = [i for i in range(len(dims)) if i not in grouped]
  together = math.prod(dims[i] for i in grouped)
  return numbers.reshape(dims).transpose(kept + grouped).reshape(-1, together)


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which members of a group differ."""
  places = np.stack(np.unravel_index(groups, tuple(mesh.values())), axis=-1)  # [groups, members, axes]
  differ = (places != places[:, :1]).any(axis=(0, 1))
  return tuple(name for name, d in zip(mesh, differ, strict=True) if d)


# ------------------------------------------------------------------------------------------------- FLOPs


@functools.lru_cache(maxsize=4096)
def _meetings(length: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
  """Counts pairs (output, kernel element) of one spatial dimension that meet an input element and not padding."""
  at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilate - low
  return int(((at >= 0) & (at % dilate == 0) & (at // dilate < length)).sum())


def _convolution(op: Op, left: Op, right: Op) -> int:
  """FLOPs of a convolution. The TPU compiler writes dots as convolutions, with batch dimensions as dilated windows."""
  lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
  shapes = [x.shapes[0][1] for x in (left, right, op)]
  size_of = lambda labels, which, label: shapes[which][labels.index(label)]
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", op.attributes) or ["", ""])[1]))
  rank = len(lhs) - 2
  window_field = lambda key, default: [int(n) for n in window[key].split("x")] if key in window else [default] * rank
  low = [int(p.split("_")[0]) for p in window["pad"].split("x")] if "pad" in window else [0] * rank
  strides, dilate, kernel_dilate = (window_field(key, 1) for key in ("stride", "lhs_dilate", "rhs_dilate"))
  macs = size_of(rhs, 1, "i") * size_of(rhs, 1, "o") * size_of(lhs, 0, "b")
  for i in range(rank):
    length, kernel, n = size_of(lhs, 0, str(i)), size_of(rhs, 1, str(i)), size_of(out, 2, str(i))
    macs *= _meetings(length, kernel, n, strides[i], low[i], dilate[i], kernel_dilate[i])
  batch_groups = op.attribute("batch_group_count")
  return 2 * macs // int(batch_groups or 1)


def _flops(op: Op, ops: dict[str, Op]) -> int:
  if op.kind == "dot":
    lhs = ops[op.operands[0]].shapes[0][1]
    return 2 * op.elements * math.prod(lhs[i] for i in op.dimensions("lhs_contracting_dims"))
  if op.kind == "convolution":
    return _convolution(op, ops[op.operands[0]], ops[op.operands[1]])
  if op.kind == "custom-call" and "$" in op.attributes and "dot_dimension_numbers" in op.attributes:
    # This is a library's matmul (cuBLAS); its first result is the product, and the others are workspace.
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)[1]
    lhs = ops[op.operands[0]].shapes[0][1]
    return 2 * math.prod(op.shapes[0][1]) * math.prod(lhs[i] for i in _ints(contracted.replace('"', "")))
  if op.kind == "reduce" and re.search(r'op_name="[^"]*dot_general"', op.attributes):
    # This is a dot with few rows, unrolled to a sum over products.
    products = _behind_views(ops, ops[op.operands[0]])
    return 2 * products.elements if products.kind == "multiply" else 0
  return 0


def _behind_views(ops: dict[str, Op], op: Op) -> Op:
  while op.kind in _VIEWS:
    op = ops[op.operands[0]]
  return op


# ------------------------------------------------------------------------------------------------- bytes

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # ops done in place, with the operand that is written
# Custom calls by which the TPU compiler annotates values; they neither compute nor move anything.
_MARKS = ("AsyncCollective", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndices", "ZeroCrop")


def _is_mark(op: Op) -> bool:
  target = op.attributes.partition('custom_call_target="')[2]
  return op.kind == "custom-call" and target.startswith(_MARKS)


def _read_bytes(program: Program, computation: Computation, name: str) -> int:
  """Bytes of a value that its users in a fused computation read; a slice counts only its own size."""
  value, total = computation.ops[name], 0
  for user_name in computation.users.get(name, ()):
    user = computation.ops[user_name]
    if user.kind in _SLICES and user.operands[0] == name:
      total += user.bytes
    elif user.kind in _UPDATES and user.operands[0] == name and name not in user.operands[1:]:
      continue
    elif _is_view(program, user) and user_name != computation.root:
      total += _read_bytes(program, computation, user_name) * value.bytes // max(user.bytes, 1)
    elif user.kind == "fusion":
      total += _operand_bytes(program, user, name)
    else:
      return value.bytes
  return min(total, value.bytes)


def _is_view(program: Program, op: Op) -> bool:
  """True if an operation only shows its operand in another form; a fusion may do no more than that."""
  if op.kind != "fusion":
    return op.kind in _VIEWS
  inside = program.computations[op.attribute("calls")]
  return _behind_views(inside.ops, inside.ops[inside.root]).kind == "parameter"


def _operand_bytes(program: Program, fusion: Op, operand: str) -> int:
  inside = program.computations[fusion.attribute("calls")]
  wanted = [inside.parameters[i] for i, o in enumerate(fusion.operands) if o == operand]
  return sum(_read_bytes(program, inside, name) for name in wanted)


def _written_bytes(program: Program, computation: Computation, name: str) -> int:
  """Bytes of a result that are written to main memory; an update in place counts only the update."""
  op = computation.ops[name]
  if op.kind == "tuple":
    return sum(_written_bytes(program, computation, o) for o in op.operands)
  if op.kind == "fusion":
    inside = program.computations[op.attribute("calls")]
    return _written_bytes(program, inside, inside.root)
  if op.kind == "parameter" or _is_mark(op) or not op.far_bytes:  # the value is passed on, or stays on the chip
    return 0
  source = _behind_views(computation.ops, op)
  if source.kind in _UPDATES:
    return computation.ops[source.operands[_UPDATES[source.kind]]].bytes
  return op.far_bytes


def _bytes(program: Program, computation: Computation, op: Op) -> int:
  """Bytes that one unfused operation reads from main memory and writes to it."""
  operands = [computation.ops[o] for o in dict.fromkeys(op.operands)]
  if op.kind == "fusion":
    read = sum(_operand_bytes(program, op, o.name) for o in operands if o.far_bytes)
    return read + _written_bytes(program, computation, op.name)
  if op.kind in ("copy-start", "slice-start"):  # its leaves are (target, source, ...) or (source, target, ...)
    target = 0 if op.kind == "copy-start" else 1
    return _size(op.shapes[target]) * (op.far[target] + op.far[1 - target])
  if op.kind in _SLICES:
    return op.far_bytes + (op.bytes if operands[0].far_bytes else 0)
  if op.kind in _UPDATES:
    return 2 * computation.ops[op.operands[_UPDATES[op.kind]]].bytes
  return op.far_bytes + sum(o.far_bytes for o in operands)


# ------------------------------------------------------------------------------- numbers known beforehand

_ARITHMETIC: dict[str, Callable] = {
  "add": lambda a, b: a + b,
  "subtract": lambda a, b: a - b,
  "multiply": lambda a, b: a * b,
  "minimum": min,
  "maximum": max,
  "and": lambda a, b: a & b,
  "or": lambda a, b: a | b,
}
_COMPARE = {
  "LT": lambda a, b: a < b,
  "LE": lambda a, b: a <= b,
  "GT": lambda a, b: a > b,
  "GE": lambda a, b: a >= b,
  "EQ": lambda a, b: a == b,
  "NE": lambda a, b: a != b,
}
_MOST_TRIPS = 10**6


class _Frame:
  """The integers that a computation derives from its arguments; None is a number that depends on data.

  An argument is a number or None or, for a tuple, a function from an index to such an argument.
  """

  def __init__(self, program: Program, computation: Computation, arguments: list):
    self.program, self.computation, self.arguments = program, computation, arguments
    self.known = {}

  def value(self, name: str):
    if name not in self.known:
      self.known[name] = self._value(self.computation.ops[name])
    return self.known[name]

  def _value(self, op: Op):
    operand = lambda i: self.value(op.operands[i])
    if op.kind == "constant":
      text = {"true": "1", "false": "0"}.get(op.argument, op.argument)
      return int(text) if re.fullmatch(r"-?\d+", text) else None
    if op.kind == "parameter":
      return self.arguments[int(op.argument)]
    if op.kind == "tuple":
      return operand
    if op.kind == "get-tuple-element":
      source = operand(0)
      return source(int(op.attribute("index"))) if callable(source) else None
    if op.kind in ("copy", "bitcast", "convert", "reshape"):
      return operand(0)
    if op.kind in _ARITHMETIC or op.kind == "compare":
      act = _ARITHMETIC.get(op.kind) or _COMPARE[op.attribute("direction")]
      a, b = operand(0), operand(1)
      return None if a is None or b is None or callable(a) or callable(b) else int(act(a, b))
    if op.kind in ("fusion", "call") and op.elements == 1:
      inside = self.program.computations[op.attribute("calls") or op.attribute("to_apply")]
      return _Frame(self.program, inside, [self.value(o) for o in op.operands]).value(inside.root)
    if op.kind == "while":  # the elements that a loop does not change are known after it
      return self.unchanged(op)
    return None

  def unchanged(self, loop: Op):
    """The loop's arguments; elements that its body passes on untouched keep their number."""
    body = self.program.computations[loop.attribute("body")]
    root, first = body.ops[body.root], self.value(loop.operands[0])

    def element(i):
      op = body.ops[root.operands[i]]
      while op.kind in ("copy", "bitcast"):
        op = body.ops[op.operands[0]]
      kept = op.kind == "get-tuple-element" and int(op.attribute("index")) == i
      return first(i) if kept and body.ops[op.operands[0]].kind == "parameter" else None

    return element if callable(first) and root.kind == "tuple" else None

  def trips(self, loop: Op) -> int | None:
    """Number of times that the body of a while runs, or None if that depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(known[1])
    condition = self.program.computations[loop.attribute("condition")]
    body = self.program.computations[loop.attribute("body")]
    state, body_root = self.value(loop.operands[0]), body.ops[body.root]
    if not callable(state) or body_root.kind != "tuple":
      return None
    for trip in range(_MOST_TRIPS):
      more = _Frame(self.program, condition, [state]).value(condition.root)
      if more is None or callable(more):
        return None
      if not more:
        return trip
      step = _Frame(self.program, body, [state])
      # The value is computed at once; lazily, one trip would ask the one before it, and so on.
      numbers = {i: step.value(o) for i, o in enumerate(body_root.operands) if _is_counter(body.ops[o])}
      state = numbers.get
    return None


def _is_counter(op: Op) -> bool:
  return len(op.shapes) == 1 and not op.shapes[0][1] and op.shapes[0][0] in ("s32", "u32", "s64", "u64", "pred")


# ----------------------------------------------------------------------------------------------- the walk

_COLLECTIVES = {
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
}


class _Counter:
  """Counts the work of a program, from its entry computation on."""

  def __init__(self, program: Program, mesh: dict[str, int]):
    self.program, self.mesh = program, mesh
    self.flops = self.bytes = self.open_loops = 0
    self.found: dict[tuple, np.ndarray] = defaultdict(lambda: np.zeros(3, np.int64))  # count, bytes, extra bytes
    self.opaque = Counter()

  def run(self) -> Counts:
    entry = self.program.computations[self.program.entry]
    self.walk(entry, 1, [None] * len(entry.parameters), fused=False)
    rows = [
      Collective(kind, axes, group, n, total, rewritten, extra)
      for (kind, axes, group, rewritten), numbers in sorted(self.found.items(), key=lambda item: str(item[0]))
      for n, total, extra in [numbers.tolist()]
    ]
    return Counts(self.flops, self.bytes, tuple(rows), self.open_loops, dict(self.opaque))

  def walk(self, computation: Computation, times: int, arguments: list, fused: bool) -> None:
    """Adds the work of one computation in `times` runs. If `fused`, its operands stay on the chip."""
    frame = _Frame(self.program, computation, arguments)
    for op in computation.ops.values():
      kind = op.kind.removesuffix("-start")
      self.flops += times * _flops(op, computation.ops)
      if kind in _COLLECTIVES and _first_of_chain(computation, op):
        self.collective(computation, op, kind, times)
      if op.kind == "while":
        self.loop(op, frame, times, fused)
        continue
      if op.kind == "conditional":
        self.branches(op, times, fused)
        continue
      called = op.attribute("calls") or (op.kind == "call" and op.attribute("to_apply"))
      if called and not op.kind.endswith(("-done", "-update")):
        inside = self.program.computations[called]
        self.walk(inside, times, [frame.value(o) for o in op.operands], fused or op.kind == "fusion")
      if op.kind == "custom-call" and not _flops(op, computation.ops) and not _is_mark(op):
        self.opaque[op.attributes.partition('custom_call_target="')[2].partition('"')[0]] += times
      counts_bytes = op.kind not in _FREE and op.kind != "call" and not op.kind.startswith("async")
      if counts_bytes and not _is_mark(op) and not fused and not op.kind.endswith(("-done", "-update")):
        self.bytes += times * _bytes(self.program, computation, op)

  def loop(self, op: Op, frame: _Frame, times: int, fused: bool) -> None:
    trips = frame.trips(op)
    self.open_loops += trips is None
    inside = self.program.computations[op.attribute("body")]
    self.walk(inside, times * (1 if trips is None else trips), [frame.unchanged(op)], fused)

  def branches(self, op: Op, times: int, fused: bool) -> None:
    """Counts a conditional as its most expensive branch."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
    names = _NAME.findall(listed[1]) if listed else map(op.attribute, ("true_computation", "false_computation"))
    tried = []
    for name in names:
      branch_counter = _Counter(self.program, self.mesh)
      branch_counter.walk(self.program.computations[name], times, [None], fused)
      tried.append(branch_counter)
    best = max(tried, key=lambda c: (c.flops, c.bytes))
    self.flops += best.flops
    self.bytes += best.bytes
    self.open_loops += best.open_loops
    self.opaque.update(best.opaque)
    for key, numbers in best.found.items():
      self.found[key] += numbers

  def collective(self, computation: Computation, op: Op, kind: str, times: int) -> None:
    devices = math.prod(self.mesh.values())
    if kind == "collective-permute":
      pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", op.attributes)[1]
      groups = np.array([_ints(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs)])
      axes = axes_of(groups, self.mesh)
      group = math.prod(self.mesh[a] for a in axes)
    else:
      groups = device_groups(op, devices)
      axes, group = axes_of(groups, self.mesh), groups.shape[1]
    sizes = [computation.ops[o].bytes * (group if kind == "all-gather" else 1) for o in op.operands]
    if kind == "all-to-all" and not op.dimensions("dimensions"):  # it has one operand per peer: parts of one array
      sizes = [sum(sizes)]
    for i, size in enumerate(sizes):
      rewritten = _rewritten(self.program, computation, op, i, group) if kind == "all-reduce" and group > 1 else None
      self.found[kind, axes, group, rewritten] += np.array([1, size, size if rewritten else 0]) * times


def _first_of_chain(computation: Computation, op: Op) -> bool:
  """True for the first part of a collective, which the TPU compiler repeats in each fusion that overlaps with it."""
  users = (computation.ops[u] for u in computation.users.get(op.name, ()))
  return "chain_id=" not in op.attributes or any("AsyncCollectiveStart" in u.attributes for u in users)


def _rewritten(program: Program, computation: Computation, op: Op, index: int, group: int) -> str | None:
  """The kind that the all-reduce of one operand had before the compiler rewrote it; None if it was an all-reduce."""
  source = computation.ops[op.operands[index]]
  results = [op.name]
  if len(op.operands) > 1:  # one operation moves several arrays
    done = [u for u in computation.users[op.name] if computation.ops[u].kind == "all-reduce-done"] or results
    results = [u for d in done for u in computation.users[d] if computation.ops[u].attribute("index") == str(index)]
  if results and all(_keeps_a_slice(program, computation, r, source.elements, group) for r in results):
    return "reduce-scatter"
  while source.kind in _VIEWS or source.kind == "fusion":
    if source.kind == "fusion":
      computation = program.computations[source.attribute("calls")]
      source = computation.ops[computation.root]
    else:
      source = computation.ops[source.operands[0]]
  if source.kind != "dynamic-update-slice":
    return None
  return "all-gather" if computation.ops[source.operands[1]].elements * group == source.elements else None


def _keeps_a_slice(program: Program, computation: Computation, name: str, elements: int, parts: int) -> bool:
  """True if only 1/parts of a value is read, by dynamic slices."""
  users = computation.users.get(name, ())

  def sliced(user: Op) -> bool:
    if user.kind == "dynamic-slice":
      return user.operands[0] == name and user.elements * parts == elements
    if user.kind == "fusion":
      inside = program.computations[user.attribute("calls")]
      wanted = [inside.parameters[i] for i, o in enumerate(user.operands) if o == name]
      return all(_keeps_a_slice(program, inside, p, elements, parts) for p in wanted)
    if user.kind in _VIEWS or user.kind in ("all-reduce-done", "get-tuple-element"):
      return _keeps_a_slice(program, computation, user.name, elements, parts)
    return False

  return bool(users) and all(sliced(computation.ops[u]) for u in users)
