"""The planner: layout, mesh, batch and number of chips that serve a decoder best (2211.05102, sections 2 and 3).

A pass costs a chip compute, the loading of weights and of keys and values, and communication (analysis/comm.py).
With perfect overlap it takes the longest of the three, with none their sum. Plans are compared by what lies
between: gathers of weights wait for nothing and hide behind the rest, while the collectives of activations stand
between two products. All are rooflines: they know peaks, not kernels, and the 28.5 ms that the paper measured of a
decode step (PaLM-540B, batch 64, int8) is 2.3 times the 12.4 ms of its terms. `calibrate` fits what is missing on
published rows.

An estimate holds for blocks of attention and a feed-forward of two or three matrices. It leaves out the
activations' own memory traffic, the embedding's and the head's communication, and sampling.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from llmarch.adapt.padding import pad_heads
from llmarch.analysis import comm, cost
from llmarch.analysis.hardware import Chip, find_chip
from llmarch.build import FrozenDict
from llmarch.config import BlockConfig, ModelConfig
from llmarch.errors import UserError, check, nearest
from llmarch.ops.quant import FORMATS
from llmarch.presets import PRESETS

USABLE = 0.95  # share of a chip's memory; XLA reserves the rest (a v4 chip of 32 GiB grants programs 30.75)
BITS = {"int8": 8, "float8_e4m3fn": 8, "int4": 4, "uint4": 4}
# Bytes of an element. The scale of a group takes 16 bits; scales of channels and tokens are few and not counted.
BYTES = {"bf16": 2.0} | {name: BITS[f.dtype] / 8 + (2 / f.group if f.group else 0) for name, f in FORMATS.items()}
KV = ("bf16", "int8", "fp8")  # formats in which a decoding state holds keys and values
PHASES = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Request:
  """The model to serve, its load, and its hardware. Raises UserError if no plan can be made."""

  model: ModelConfig
  hardware: str  # a name of hardware.CHIPS
  chips: int
  batch: int  # number of sequences
  prompt: int  # tokens of each prompt
  generate: int  # tokens decoded after each prompt
  weights: str = "bf16"
  kv: str = "bf16"

  def __post_init__(self):
    for name in ("chips", "batch", "prompt"):
      check(getattr(self, name) >= 1, f"--{name} must be at least 1, got {getattr(self, name)}")
    check(self.generate >= 0, f"--generate must be at least 0, got {self.generate}")
    for name, known in (("weights", BYTES), ("kv", KV)):
      value = getattr(self, name)
      check(value in known, f"--{name}: unknown {value!r}{nearest(value, known)}")
    for name, block in self.model.blocks.items():
      kinds = " and ".join(branch.kind for branch in block.branches.values())
      known = comm.knows(block)
      check(known, f"--model: block {name!r} is made of {kinds}, the planner knows attention and mlp; give another")
    fits = chip_counts(self.model)
    near = sorted(sorted(fits, key=lambda n: abs(n - self.chips))[:2])
    check(
      self.chips in fits,
      f"--chips={self.chips} divides not both d_model={self.model.d_model} and every d_ff;"
      f" give a number that does, such as {' or '.join(map(str, near))}",
    )

  @property
  def chip(self) -> Chip:
    return find_chip(self.hardware)

  @property
  def phases(self) -> tuple[str, ...]:
    return PHASES if self.generate else PHASES[:1]

  def tokens(self, phase: str) -> int:
    return self.batch * (self.prompt if phase == "prefill" else self.generate)


def chip_counts(model: ModelConfig) -> list[int]:
  """Numbers of chips over which d_model and every d_ff split evenly, up to 8192."""
  sizes = [model.d_model] + [block.ffn.d_ff for block in model.blocks.values() if block.ffn]
  return [n for n in range(1, 8193) if not any(size % n for size in sizes)]


class Option(NamedTuple):
  """One phase on one layout and mesh. Seconds are of all passes of the phase together."""

  phase: str
  ffn: str
  attention: str
  mesh: dict[str, int]
  chips: int
  batch: int
  passes: int  # decode: tokens; prefill: chunks of the prompt, as few as activations allow
  layers: int  # layers that run, in all passes together
  compute_s: float
  weights_s: float  # seconds to load the gathered weights from the chip's memory
  kv_s: float
  comm_s: float  # seconds of the collectives of activations
  gather_s: float  # seconds of the gathers of weights
  latency_lower_s: float  # seconds with perfect overlap
  latency_upper_s: float  # seconds without overlap
  latency_s: float  # seconds with weight gathers behind the rest; calibrated if that was asked for
  mfu: float  # 2 N tokens / (chips * peak * latency_s), with N of the unpadded model
  chip_ms_per_token: float
  bytes_per_chip: float  # weights, keys and values of prompt and generated tokens, the pass's working set
  bytes_over: float  # bytes that do not fit
  max_context: int | None  # tokens per sequence that fit; None: no limit (all layers have windows)

  @property
  def fits(self) -> bool:
    return self.bytes_over <= 0


class Plan(NamedTuple):
  """Layouts for both phases over the same weights on the same mesh."""

  prefill: Option
  decode: Option | None  # None: no token is generated
  latency_s: float
  tokens_per_s: float  # tokens of prompts and generated ones per second
  chip_ms_per_token: float
  mfu: float
  why: str


# ------------------------------------------------------------------------------------------------- one option


def meshes(chips: int, torus: int = 0) -> list[dict[str, int]]:
  """Meshes with X*Y*Z = chips: all of them, or those whose axes are axes of a torus, or several of them together.

  The torus is the slice nearest to a cube, as 4x4x4 for 64 chips in the paper: an axis of a mesh that is only a part of
  an axis of the slice would not be a ring.
  """
  if not torus:
    divisors = [d for d in range(1, chips + 1) if chips % d == 0]
    found = [(x, y, chips // x // y) for x in divisors for y in divisors if chips // x % y == 0]
  else:
    shape = slice_shape(chips, torus)
    groups = itertools.product(range(3), repeat=torus)
    found = sorted({tuple(math.prod(s for s, g in zip(shape, at) if g == i) for i in range(3)) for at in groups})
  return [dict(zip(comm.AXES, sizes, strict=True)) for sizes in found]


def slice_shape(chips: int, torus: int) -> tuple[int, ...]:
  """The factors nearest to a cube; 32 in 3 dimensions gives (2, 4, 4)."""
  if torus == 1:
    return (chips,)
  shapes = [(d, *slice_shape(chips // d, torus - 1)) for d in range(1, chips + 1) if chips % d == 0]
  return min((tuple(sorted(shape)) for shape in shapes), key=lambda shape: (max(shape), sum(shape)))


def attention_rows(ffn: str, mesh: dict[str, int]) -> list[str]:
  """The attention rows that differ on this mesh, each named by the axes that split its batch.

  With XYZ-weight-gathered, all four are attention over the batch; on a mesh with Z=1, batch_z is the same as heads.
  """
  row = comm.FEED_FORWARD[ffn]
  found: dict[frozenset, str] = {}
  for name, moved in comm.ATTENTION.items():
    split_by = lambda axes: {a for a in axes if mesh[a] > 1}
    split = frozenset(split_by(row.batch) | split_by(a for a in moved if a in row.hidden + row.embed))
    if split not in found or (not split <= set(comm.ATTENTION[found[split]]) and split <= set(moved)):
      found[split] = name
  return list(found.values())


class _PerPass(NamedTuple):
  """A chip's work in the layers of a model on a layout and mesh: constants, and factors of a pass's tokens."""

  weight_bytes: float  # bytes of the weights at rest
  gathered_bytes: float  # bytes of the weights after gathering, which compute loads
  largest_gather: float  # bytes of the largest gathered matrix
  flops: float  # FLOPs per token of the batch
  sent_weights: float  # bytes of weights sent
  sent: float  # bytes of activations sent, per token of the batch
  working: float  # bytes of activations held, per token of the batch


@functools.lru_cache(maxsize=100_000)
def _layer(block: BlockConfig, d_model: int, ffn: str, attention: str, mesh: tuple, width: float) -> _PerPass:
  sizes, row = dict(mesh), comm.FEED_FORWARD[ffn]
  held = comm.weights(block, d_model, ffn, sizes)
  gathered = [w.local(sizes, row.batch) for w in held]
  share = comm.chips(sizes, row.batch)  # a chip computes 1/share of the tokens
  bytes_sent = lambda tokens: sum(
    c.sent for c in comm.block(block, d_model, ffn, attention, sizes, tokens, weight_bytes=width)
  )
  inner = [block.mixer.num_heads * block.mixer.dim(d_model)]
  if block.ffn:
    inner += [(1 + block.ffn.gated) * block.ffn.d_ff]
  # The working set is the normed input, the output, and the array between two matrices, in bf16.
  working = 2 * d_model / comm.chips(sizes, row.embed) + max(inner) / comm.chips(sizes, row.hidden)
  return _PerPass(
    weight_bytes=width * sum(w.local(sizes) for w in held),
    gathered_bytes=width * sum(gathered),
    largest_gather=width * max(gathered) if comm.chips(sizes, row.batch) > 1 else 0.0,
    flops=2 * sum(gathered) / share,
    sent_weights=bytes_sent(0),
    sent=bytes_sent(1) - bytes_sent(0),
    working=2 * working / share,
  )


def _model(config: ModelConfig, ffn: str, attention: str, mesh: dict[str, int], width: float) -> _PerPass:
  key = tuple(mesh.items())
  rows = [(n, _layer(block, config.d_model, ffn, attention, key, width)) for n, block in _blocks(config)]
  sum_of = lambda field: sum(n * getattr(p, field) for n, p in rows)
  max_of = lambda field: max(getattr(p, field) for _, p in rows)
  # The tables are split over all chips (over fewer, if they do not divide the vocabulary).
  entries = config.vocab_size * (1 if config.head.tied else 2)
  tables = (config.embed.dim or config.d_model) * entries / math.prod(mesh.values())
  return _PerPass(
    weight_bytes=sum_of("weight_bytes") + width * tables,
    gathered_bytes=sum_of("gathered_bytes") + width * tables,
    largest_gather=max_of("largest_gather"),
    flops=sum_of("flops"),
    sent_weights=sum_of("sent_weights"),
    sent=sum_of("sent"),
    working=max_of("working"),
  )


def _blocks(config: ModelConfig) -> list[tuple[int, BlockConfig]]:
  """(number of layers, block) for each named block."""
  counts = Counter(config.layers)
  return [(counts[name], block) for name, block in config.blocks.items()]


def kv_bytes(config: ModelConfig, ffn: str, attention: str, mesh: dict[str, int], batch: int, context, width) -> float:
  """Bytes of keys and values on a chip: layers * 2 * (B / degree) * M * (K / split) * H, with M at most the window."""
  elements = 0.0
  for layers, block in _blocks(config):
    a = block.mixer
    seen = context if a.window is None else min(context, a.window)
    parts = math.prod(comm.kv_split(block, ffn, attention, mesh))
    elements += layers * 2 * a.kv_heads * a.dim(config.d_model) * seen / parts
  return width * batch * elements


def longest_context(config: ModelConfig, kv, budget: float) -> int | None:
  """Tokens whose keys and values, kv(tokens) bytes, fit in a budget of bytes; None: no limit, for all have windows."""
  far = max([block.mixer.window or 0 for _, block in _blocks(config)])
  growth = kv(far + 1) - kv(far)  # layers with windows have stopped growing there
  return max(0, math.floor((budget - kv(far)) / growth + far)) if growth else None


def _mixing_flops(config: ModelConfig, keys) -> float:
  """FLOPs per token of scores and their mix, over keys(attention) keys."""
  return sum(n * 4 * b.mixer.num_heads * b.mixer.dim(config.d_model) * keys(b.mixer) for n, b in _blocks(config))


class Terms(NamedTuple):
  """The seconds that a phase takes of each resource at its peak, and the number of layers that run."""

  compute: float
  weights: float
  kv: float
  comm: float
  gathers: float
  layers: int


class Calibration(NamedTuple):
  """T = max(compute / matmul + weights + kv + comm / links + layers * layer_s, (comm + gathers) / links)."""

  matmul: float = 1.0  # fraction of the peak FLOP/s that matrix products reach
  links: float = 1.0  # fraction of a chip's links that are busy at a time
  layer_s: float = 0.0  # seconds per layer that no roofline counts: latencies of collectives, small operations

  def terms(self, t: Terms) -> Terms:
    """The seconds that each resource takes after calibration, in place of those at its peak."""
    return t._replace(compute=t.compute / self.matmul, comm=t.comm / self.links, gathers=t.gathers / self.links)

  def predict(self, t: Terms) -> float:
    t = self.terms(t)
    return max(t.compute + t.weights + t.kv + t.comm + t.layers * self.layer_s, t.comm + t.gathers)


ROOFLINE = Calibration()


def evaluate(
  r: Request, phase: str, ffn: str, attention: str, mesh: dict[str, int], calibration: Calibration = ROOFLINE
) -> Option:
  """The cost of a phase on a layout and mesh, with heads padded to the chips (`pad_heads`)."""
  chip, n = r.chip, math.prod(mesh.values())
  model, params = _sized(r.model, n)
  p = _model(model, ffn, attention, mesh, BYTES[r.weights])
  kv_of = lambda context: kv_bytes(model, ffn, attention, mesh, r.batch, context, BYTES[r.kv])
  tokens, budget = r.tokens(phase), USABLE * chip.hbm_bytes
  held = p.weight_bytes + kv_of(r.prompt + r.generate)
  working_of = lambda passes: 2 * p.largest_gather + p.working * tokens / passes  # of one in use, and the next
  if phase == "decode":
    passes, context = r.generate, r.prompt + (r.generate + 1) / 2
    keys_of = lambda a: min(context, a.window or context)
    loads = passes * kv_of(context)
  else:
    passes = 1
    while held + working_of(passes) > budget and 2 * passes <= r.prompt:
      passes *= 2
    keys_of = lambda a: a.mask.mean_keys(r.prompt, a.window)
    loads = kv_of(r.prompt) * (passes + 1) / 2  # each chunk reads what is there by then
  # Attention's products are split over all chips, by heads or by batch; only a prompt's last token has logits.
  head = 2 * cost.head_macs(model) * r.batch * (r.generate if phase == "decode" else 1)
  terms = Terms(
    compute=(tokens * (p.flops + _mixing_flops(model, keys_of) / n) + head / n) / chip.flops,
    weights=passes * p.gathered_bytes / chip.hbm_bandwidth,
    kv=loads / chip.hbm_bandwidth,
    comm=tokens * p.sent / chip.link_bandwidth,
    gathers=passes * p.sent_weights / chip.link_bandwidth,
    layers=passes * len(model.layers),
  )
  latency = calibration.predict(terms)
  return Option(
    phase=phase,
    ffn=ffn,
    attention=attention,
    mesh=mesh,
    chips=n,
    batch=r.batch,
    passes=passes,
    layers=terms.layers,
    compute_s=terms.compute,
    weights_s=terms.weights,
    kv_s=terms.kv,
    comm_s=terms.comm,
    gather_s=terms.gathers,
    latency_lower_s=max(terms.compute, terms.weights + terms.kv, terms.comm + terms.gathers),
    latency_upper_s=terms.compute + terms.weights + terms.kv + terms.comm + terms.gathers,
    latency_s=latency,
    mfu=mfu(params, tokens, n, chip.flops, latency),
    chip_ms_per_token=1e3 * n * latency / tokens,
    bytes_per_chip=held + working_of(passes),
    bytes_over=held + working_of(passes) - budget,
    max_context=longest_context(model, kv_of, budget - p.weight_bytes - working_of(passes)),
  )


@functools.lru_cache(maxsize=1000)
def _sized(model: ModelConfig, chips: int) -> tuple[ModelConfig, int]:
  """The padded model, and the parameters of the unpadded one."""
  return pad_heads(model, chips), cost.params(model)["total"]


def mfu(params: float, tokens: float, chips: int, peak: float, seconds: float) -> float:
  """Model FLOPs utilisation: 2 N FLOPs per token, over those that the chips could do (2211.05102, section 2)."""
  return 2 * params * tokens / (chips * peak * seconds)


# ------------------------------------------------------------------------------------------------- many options


def options(
  r: Request,
  layouts: Mapping[str, str] = FrozenDict(),
  among: Sequence[dict[str, int]] | None = None,
  calibration: Calibration = ROOFLINE,
) -> list[Option]:
  """Every layout on every mesh (of `among`, or by default of the chip's torus), for each phase.

  `layouts`, as {"prefill": "wg_xyz", "decode": "ws_2d+batch_yz"}, keeps only some. Raises UserError for an unknown
  layout, for a batch that a layout cannot split, and for two layouts that no mesh has over the same weights.
  """
  found = []
  for phase in r.phases:
    wanted = layouts.get(phase) or ""
    ffn, _, attention = wanted.partition("+")
    for name, known in ((ffn, comm.FEED_FORWARD), (attention, comm.ATTENTION)):
      check(not name or name in known, f"--layout.{phase}: there is no {name!r}{nearest(name, known)}")
    rows = [
      (f, a, mesh)
      for mesh in among or meshes(r.chips, r.chip.torus)
      for f, row in comm.FEED_FORWARD.items()
      if (not ffn or f == ffn) and (not row.batch or comm.chips(mesh, row.batch) > 1)
      for a in attention_rows(f, mesh)
      if not attention or a == attention
    ]
    check(
      rows,
      f"--layout.{phase}={wanted} is no row of its own on {r.chips} chips: an axis of size 1 splits nothing, and wg_xyz"
      f" is attention over the batch in any case; give another row, or more chips",
    )
    degree_of = lambda row: comm.batch_split(*row)
    splittable = [row for row in rows if r.batch % degree_of(row) == 0]
    check(
      splittable,
      f"--batch={r.batch} is too small for --layout.{phase}={wanted}: on {r.chips} chips it splits the batch"
      f" {min(map(degree_of, rows))} ways at least; give a multiple of that, or a row that does not",
    )
    found += [evaluate(r, phase, *row, calibration) for row in splittable]
  given = " and ".join(f"--layout.{phase}={layouts[phase]}" for phase in r.phases if layouts.get(phase))
  check(
    _pairs(found, r.phases),
    f"{given}: no mesh of {r.chips} chips has both over the same weights, and ws_1d goes with ws_1d alone; give one",
  )
  return found


def _pairs(found: Iterable[Option], phases: Sequence[str]) -> list[tuple[Option, ...]]:
  """For each mesh and place of the weights that has all phases, the first option of each phase."""
  groups: dict[tuple, dict[str, Option]] = {}
  for o in found:
    groups.setdefault((*o.mesh.values(), comm.FEED_FORWARD[o.ffn][3:]), {}).setdefault(o.phase, o)
  return [tuple(group[p] for p in phases) for group in groups.values() if set(phases) <= set(group)]


def order(o: Option) -> tuple:
  """Sorts faster options first.

  Among equals (1D is 2D with X=1), 1D comes last, because it stores weights where no other layout does; then the mesh
  nearest to a cube comes first.
  """
  names = list(comm.FEED_FORWARD)
  return round(math.log(o.latency_s), 9), o.ffn == "ws_1d", max(o.mesh.values()), names.index(o.ffn)


def best_plan(found: Sequence[Option]) -> Plan | None:
  """The fastest pair of prefill and decode over the same weights, of one request's options; None if none fits."""
  phases = [phase for phase in PHASES if any(o.phase == phase for o in found)]
  whole = _pairs(sorted((o for o in found if o.fits), key=order), phases)
  if not whole:
    return None
  chosen = min(whole, key=lambda pair: (round(math.log(sum(o.latency_s for o in pair)), 9), *map(order, pair)))
  return _plan(chosen, found)


def _plan(pair: tuple[Option, ...], found: Sequence[Option]) -> Plan:
  latency = sum(o.latency_s for o in pair)
  tokens = sum(o.chips * o.latency_s * 1e3 / o.chip_ms_per_token for o in pair)
  return Plan(
    prefill=pair[0],
    decode=pair[1] if len(pair) > 1 else None,
    latency_s=latency,
    tokens_per_s=tokens / latency,
    chip_ms_per_token=1e3 * pair[0].chips * latency / tokens,
    mfu=sum(o.mfu * o.latency_s for o in pair) / latency,
    why="; ".join(_why(o, found) for o in pair),
  )


def _why(o: Option, found: Sequence[Option]) -> str:
  """A sentence on the binding term, and on the cost of the next layout."""
  terms = {"compute": o.compute_s, "weight loading": o.weights_s, "KV loading": o.kv_s, "communication": o.comm_s}
  name = max(terms, key=terms.get)
  if o.gather_s + o.comm_s > sum(terms.values()):
    name, terms = "weight gathering", {"weight gathering": o.gather_s, "other communication": o.comm_s}
  text = f"{o.phase} on {layout(o)}: {name} binds ({terms[name] / sum(terms.values()):.0%} of the roofline)"
  slower = [p for p in found if p.phase == o.phase and p.fits and order(p)[0] > order(o)[0]]
  slower = [p for p in slower if (p.ffn, p.attention) != (o.ffn, o.attention)]
  if slower:
    other = min(slower, key=order)
    text += f", next {layout(other)}: {other.latency_s / o.latency_s - 1:+.1%}"
  return text


def layout(o: Option) -> str:
  """The name of an option's layout and mesh, as "ws_2d+batch_xyz 4x4x4"."""
  return f"{o.ffn}+{o.attention} {'x'.join(map(str, o.mesh.values()))}"


def best_meshes(found: Iterable[Option]) -> list[Option]:
  """The best mesh of each phase and layout; those that fit come first, and the faster first."""
  kept: dict[tuple, Option] = {}
  for o in sorted(found, key=lambda o: (PHASES.index(o.phase), not o.fits, order(o))):
    kept.setdefault((o.phase, o.ffn, o.attention, o.chips, o.batch), o)
  return list(kept.values())


def pareto(points: Iterable, x, y) -> list:
  """The points that no other beats in both x and y, sorted by x."""
  front = []
  for point in sorted(points, key=lambda p: (x(p), y(p))):
    if not front or y(point) < y(front[-1]):
      front.append(point)
  return front


def best(plans: Iterable[Plan]) -> dict[str, Plan]:
  """The plans of least latency, most tokens per second and least cost, for any batch and number of chips."""
  plans = list(plans)
  return {
    "latency": min(plans, key=lambda p: p.latency_s),
    "throughput": max(plans, key=lambda p: p.tokens_per_s),
    "cost": min(plans, key=lambda p: p.chip_ms_per_token),
  }


def why_it_does_not_fit(r: Request, found: Sequence[Option], layouts: Mapping[str, str] = FrozenDict()) -> str:
  """A sentence on how far the smallest option is too large, and how many chips would do."""
  over = lambda o: o.bytes_over
  worst = min((max(pair, key=over) for pair in _pairs(sorted(found, key=over), r.phases)), key=over)
  gib = lambda n: f"{n / 2**30:.2f} GiB"
  text = (
    f"--chips={r.chips}: {worst.phase} needs at least {gib(worst.bytes_per_chip)} a chip, {gib(worst.bytes_over)} more"
    f" than the {gib(USABLE * r.chip.hbm_bytes)} that a {r.hardware} gives to programs"
  )
  for n in chip_counts(r.model):
    if n > r.chips:
      larger = dataclasses.replace(r, chips=n)
      try:
        if best_plan(options(larger, layouts)):
          return f"{text}; the smallest number of chips that fits is {n}"
      except UserError:  # so many chips cannot split the batch
        continue
  return f"{text}, and no number of chips up to 8192 changes that; make --batch or --prompt smaller"


# --------------------------------------------------------------------------------------------- published figures


class Published(NamedTuple):
  """A row of tables 2 and 3 of 2211.05102: TPU v4, a context of 2048, keys and values in bf16."""

  model: str  # name of a preset
  phase: str
  length: int  # tokens per sequence in this phase
  chips: int
  batch: int
  ffn: str
  attention: str
  weights: str
  mfu: float  # MFU as printed
  seconds: float


PUBLISHED = (
  Published("palm_540b", "prefill", 2048, 64, 1, "ws_2d", "heads", "int8", 0.43, 0.29),
  Published("palm_540b", "decode", 64, 64, 64, "ws_2d", "batch_xyz", "int8", 0.14, 1.82),
  Published("palm_540b", "prefill", 2048, 64, 512, "wg_xyz", "batch_xyz", "bf16", 0.76, 85.2),
  Published("palm_540b", "decode", 64, 64, 512, "ws_2d", "batch_xyz", "bf16", 0.33, 6.0),
  Published("palm_62b", "prefill", 2048, 16, 1, "ws_2d", "heads", "int8", 0.36, 0.16),
  Published("palm_62b", "decode", 64, 16, 32, "ws_2d", "batch_xyz", "int8", 0.08, 0.73),
  Published("palm_62b", "prefill", 2048, 32, 512, "wg_xyz", "batch_xyz", "bf16", 0.73, 20.2),
  Published("palm_62b", "decode", 64, 8, 512, "ws_2d", "batch_xyz", "bf16", 0.37, 5.1),
)
# The meshes are those of the authors' code (X, Y, Z).
PUBLISHED_MESHES = {8: (2, 2, 2), 16: (2, 4, 2), 32: (4, 2, 4), 64: (4, 4, 4)}


def published(row: Published, calibration: Calibration = ROOFLINE) -> Option:
  """The planner's estimate for a published row, on its mesh."""
  mesh = dict(zip(comm.AXES, PUBLISHED_MESHES[row.chips], strict=True))
  return evaluate(published_request(row), row.phase, row.ffn, row.attention, mesh, calibration)


def published_request(row: Published) -> Request:
  """Returns the request that was measured in a published row: a prefill, or the decoding that follows one."""
  prompt, generate = (row.length, 0) if row.phase == "prefill" else (2048 - row.length, row.length)
  return Request(PRESETS[row.model](), "tpu_v4", row.chips, row.batch, prompt, generate, row.weights)


def calibrate(rows: Sequence[Published]) -> Calibration:
  """Fits two constants, `matmul` and `layer_s`, to published rows by least squared relative error.

  `links` is not fitted: on a 3D torus, a collective over one mesh axis at a time keeps a third of them busy.
  """
  import numpy as np

  links = 1 / find_chip("tpu_v4").torus
  seconds = np.array([row.seconds for row in rows])
  found = [published(row) for row in rows]
  known = np.array([o.weights_s + o.kv_s + o.comm_s / links for o in found])  # here gathers always hide behind the rest
  columns = np.array([[o.compute_s, o.layers] for o in found])
  (slowness, layer_s), *_ = np.linalg.lstsq(columns / seconds[:, None], 1 - known / seconds)
  return Calibration(1 / float(slowness), links, float(layer_s))


def calibrated() -> tuple[Calibration, dict[Published, float]]:
  """The calibration fitted on PaLM-62B, and its relative error on each row of PaLM-540B, which it has not seen."""
  fit = calibrate([row for row in PUBLISHED if row.model == "palm_62b"])
  judged = [row for row in PUBLISHED if row.model == "palm_540b"]
  return fit, {row: published(row, fit).latency_s / row.seconds - 1 for row in judged}
