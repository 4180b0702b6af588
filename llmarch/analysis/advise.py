"""Advice on the published architecture for a task in a given memory: a decision tree, with a formula at each fork.

Surveys draw the tree (bidirectional to understand, causal to generate; windows and latents for long texts; fewer
key-value heads and fewer bits for little memory) and attach unsourced sizes and speeds to it. Here analysis/cost.py and
analysis/roofline.py answer the question of each fork, and a sentence says what a choice loses, with the names of the
claims that measure the loss. Nothing here knows how good a released checkpoint is.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from llmarch.analysis import cost, planner, roofline
from llmarch.analysis.hardware import find_chip
from llmarch.branches import MixerConfig
from llmarch.build import FrozenDict, build
from llmarch.config import ModelConfig
from llmarch.errors import UserError, check, nearest
from llmarch.layers.mask import MaskConfig
from llmarch.layers.mla import MLAConfig
from llmarch.layers.position import Learned
from llmarch.ops import quant
from llmarch.presets import PRESETS


class Task(NamedTuple):
  """A task that one can ask for."""

  mask: str
  state: bool  # true if the task decodes, and so keeps a state
  note: str  # a sentence on what the space has for the task


TASKS = {
  "generate": Task("causal", True, "a decoder writes after what it has read, and keeps a state of it"),
  "understand": Task(
    "bidirectional",
    False,
    "there are no encoders among the presets: these are decoders with mixer.mask=bidirectional, which reads a text in"
    " one pass and keeps no state",
  ),
  "transform": Task(
    "prefix",
    True,
    "there are no encoder-decoders among the presets: these are decoders with mixer.mask=prefix, which reads its input"
    " in both directions and writes on causally",
  ),
}

KV = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "int8": "int8", "fp8": "fp8"}

RANKING = (
  "those published for so long a context first, then by the parameters that a token uses: of one diagram the larger has"
  " the lower loss (2001.08361, 2203.15556), and for experts the parameters in use are the cautious count"
)


class Loss(NamedTuple):
  """A sentence on what a choice gives up, and the claims that measure it, such as "heads/gqa-ties-mha"."""

  what: str
  claims: tuple[str, ...] = ()


# The measured cost of rounding (LOG.md, Quantisation): the relative RMS error of normal weights, and the rise of the
# tiny run's loss in nats per token. For a state, it is the error of one layer's logits that tests/test_quant.py allows.
ROUNDING = {
  "int8": "0.785 % error in normal weights, -0.0004 nats on the tiny run",
  "fp8": "+0.002 nats on the tiny run",
  "int4": "10.76 % error in normal weights, +0.019 nats on the tiny run",
  "int4_32": "9.70 % error in normal weights",
  "int4_128": "11.72 % error in normal weights",
  "nf4": "9.20 % error in normal weights, +0.010 nats on the tiny run",
}
ROUNDING_KV = {"int8": "below 2 % error in a layer's logits", "fp8": "below 6 % error in a layer's logits"}

# The comparisons that measure a loss, as folder of experiments/ and name; a loss that is absent here has none.
CLAIMS = {
  "positions": ("positions/rope-degrades-at-4x",),
  "window": ("recall/window-at-chance",),
  "local": ("recall/local-global-ties-full",),
  "groups": ("heads/gqa-ties-mha",),
  "heads": ("heads/mqa-not-better-than-mha",),
  "latent": ("recall/latent-ties-full",),
}


@dataclasses.dataclass(frozen=True)
class Request:
  """A task, and the memory and chips that there are for it. Raises UserError if there can be no advice."""

  task: str  # a name of TASKS
  context: int  # tokens of a sequence, read and written together
  memory: float | None = None  # bytes for weights and state; None: all that the chips have
  hardware: str | None = None  # a name of hardware.CHIPS; None: speeds are not estimated
  chips: int = 1
  batch: int = 1  # sequences at a time
  weights: str = "bfloat16"  # a name of roofline.WEIGHTS
  kv: str = "bfloat16"  # a name of KV

  def __post_init__(self):
    check(self.task in TASKS, f"--task: there is no {self.task!r}{nearest(str(self.task), TASKS)}")
    for name in ("context", "chips", "batch"):
      check(1 <= getattr(self, name) < 2**31, f"--{name} must be at least 1 and below 2^31, got {getattr(self, name)}")
    for name, known in (("weights", roofline.WEIGHTS), ("kv", KV)):
      value = getattr(self, name)
      check(value in known, f"--{name}: there is no {value!r}{nearest(value, known)}")
    check(
      TASKS[self.task].state or KV[self.kv] == "bfloat16",
      f"--kv={self.kv} has nothing to act on: --task={self.task} keeps no keys and values; leave it out",
    )
    check(self.memory is not None or self.hardware, "--memory is missing; give it, such as 80GiB, or --hardware=h100")
    check(self.memory is None or 0 < self.memory < math.inf, f"--memory must be above 0 bytes, got {self.memory}")
    if self.hardware is None:
      check(self.chips == 1, f"--chips={self.chips} of what? give --hardware as well, or leave it out")
      return
    there, memory = self.chips * find_chip(self.hardware).hbm_bytes, self.memory or 0
    check(
      memory <= there,
      f"--memory={memory:.0f} is more than the {there:.0f} of {self.chips} {self.hardware}; give less, or --chips",
    )

  @property
  def budget(self) -> float:
    """Bytes that weights and state may take."""
    if self.memory is not None:
      return self.memory
    return planner.USABLE * self.chips * find_chip(self.hardware).hbm_bytes


class Option(NamedTuple):
  """An architecture as it would serve a request. Seconds are lower bounds if the chips share the work evenly."""

  name: str
  kind: str
  params: int
  active_params: int
  weight_bytes: float
  state_bytes: int
  seconds: float | None  # seconds of a decode step, or of reading the batch once
  tokens_per_s: float | None  # tokens per second of the whole batch
  beyond: bool  # the context is longer than the published one
  loses: tuple[Loss, ...]

  @property
  def bytes(self) -> float:
    return self.weight_bytes + self.state_bytes


class Refused(NamedTuple):
  """An architecture that cannot serve a request, and the reason."""

  name: str
  why: str  # memory, positions, mask or groups (a format's groups do not divide the matrices)
  bytes: float | None = None


class Change(NamedTuple):
  """Flags that make an architecture fit, and the first one that then does."""

  flags: str
  option: Option


class Branch(NamedTuple):
  """A fork of the tree, taken by one architecture: its cost after the fork, and what the fork gives up."""

  change: str
  option: Option
  loses: Loss


class Advice(NamedTuple):
  """The answer to a request."""

  options: list[Option]  # all that fit, best first
  refused: list[Refused]
  branches: list[Branch]  # forks of the first option
  changes: list[Change]  # what would help, if nothing fits within its published context


def advise(request: Request) -> Advice:
  """Sorts every preset into fitting or refused, takes the best one through the forks, and lists helpful changes."""
  usable, refused = candidates(request)
  options = [option for option in usable if option.bytes <= request.budget]
  large = sorted((o for o in usable if o.bytes > request.budget), key=lambda o: o.bytes)
  return Advice(
    options=options,
    refused=[Refused(option.name, "memory", option.bytes) for option in large] + refused,
    branches=branches(request, options[0].name) if options else [],
    changes=[] if any(not option.beyond for option in options) else changes(request),
  )


def candidates(request: Request) -> tuple[list[Option], list[Refused]]:
  """-> the presets that can do the task, whatever their size, best first by RANKING; and those that cannot."""
  usable, refused = [], []
  for name, make in PRESETS.items():
    config = with_mask(make(), TASKS[request.task].mask)
    if config is None:
      refused.append(Refused(name, "mask"))
    elif not positions_reach(config, request.context):
      refused.append(Refused(name, "positions"))
    elif not groups_fit(config, request.weights):
      refused.append(Refused(name, "groups"))
    else:
      usable.append(evaluate(request, name, config))
  return sorted(usable, key=lambda o: (o.beyond, -o.active_params, -o.params, o.name)), refused


def best_of_each_kind(options: list[Option]) -> list[Option]:
  """The first option of each kind, in order."""
  found: dict[str, Option] = {}
  for option in options:
    found.setdefault(option.kind, option)
  return list(found.values())


def evaluate(request: Request, name: str, config: ModelConfig) -> Option:
  """The bytes, the least time and the losses of a config that has the task's mask."""
  r, task = request, TASKS[request.task]
  state = cost.state_bytes(roofline.hold(config, KV[r.kv]), r.batch, r.context) if task.state else 0
  seconds = None
  if r.hardware:
    sizes = {"batch": r.batch, "context": r.context, "weights": r.weights}
    chip = find_chip(r.hardware)
    if task.state:
      seconds = roofline.decode_seconds(config, chip, kv=KV[r.kv], **sizes) / r.chips
    else:
      seconds = roofline.read_seconds(config, chip, **sizes) / r.chips
  tokens = r.batch * (1 if task.state else r.context)
  return Option(
    name=name,
    kind=kind(config),
    params=cost.params(config)["total"],
    active_params=cost.active_params(config),
    weight_bytes=roofline.weight_bytes(config, r.weights),
    state_bytes=state,
    seconds=seconds,
    tokens_per_s=tokens / seconds if seconds else None,
    beyond=r.context > config.max_seq_len,
    loses=losses(request, config),
  )


# ---------------------------------------------------------------------------------------------- what a config is


def with_mask(config: ModelConfig, mask: str) -> ModelConfig | None:
  """Gives every mixer of a model this mask; None if a mixer has no choice of masks and is causal."""
  blocks = {}
  for name, block in config.blocks.items():
    mixer = block.mixer.with_fields(mask=build(MaskConfig, mask, "mask"))
    if mixer is None and mask != "causal":
      return None
    blocks[name] = dataclasses.replace(block, mixer=mixer or block.mixer)
  return dataclasses.replace(config, blocks=FrozenDict(blocks))


def positions_reach(config: ModelConfig, context: int) -> bool:
  """True if every token has a position, which a learned table limits to its rows."""
  table = config.embed.position
  return not isinstance(table, Learned) or context <= table.length


def groups_fit(config: ModelConfig, weights: str) -> bool:
  """True if the groups of a format divide every matrix, as `llmarch generate --weights` demands."""
  if weights not in quant.FORMATS:
    return True
  sizes = {(config.d_model,), (config.embed.dim or config.d_model,)}
  for block in config.blocks.values():
    for branch in block.branches.values():
      sizes |= set(branch.summed(config.d_model))
  try:
    return all(quant.scale_shape(size, range(len(size)), weights) for size in sizes)
  except UserError:
    return False


def windows(config: ModelConfig) -> list[int | None]:
  """Number of tokens that each layer's mixer sees, the query included; None: all of them (or a state of all)."""
  return [config.blocks[name].mixer.window for name in config.layers]


def reach(config: ModelConfig) -> int | None:
  """Number of tokens on which the last one depends, itself included: 1 + sum (W - 1) over the layers. None: all."""
  seen = windows(config)
  return None if None in seen else sum(w - 1 for w in seen) + 1


def kind(config: ModelConfig) -> str:
  """An architecture in three words: how heads share keys, how far layers see, whether it has experts."""
  blocks, seen = config.blocks.values(), windows(config)
  sharing = " and ".join(dict.fromkeys(block.mixer.sharing for block in blocks))
  far = "full" if not any(seen) else "local-global" if None in seen else "window"
  return f"{sharing}, {far}, {'experts' if _experts(config) else 'dense'}"


def _experts(config: ModelConfig) -> bool:
  return any(block.ffn is not None and bool(block.ffn.experts) for block in config.blocks.values())


def losses(request: Request, config: ModelConfig) -> tuple[Loss, ...]:
  """The losses that this architecture brings in this request."""
  r, found = request, []
  add_loss = lambda what, claim="": found.append(Loss(what, CLAIMS.get(claim, ())))
  if r.context > config.max_seq_len:
    add_loss(f"published for {config.max_seq_len:,} tokens: later positions need scaling and training", "positions")
  narrow = [w for w in windows(config) if w and w < r.context]
  far = reach(config)
  if far is not None and far < r.context:
    add_loss(f"through all windows a token reaches {far:,} tokens at most", "window")
  elif narrow:
    widths = " or ".join(f"{w:,}" for w in sorted(set(narrow)))
    add_loss(f"{len(narrow)} of {len(config.layers)} layers see {widths} tokens", "local")
  for mixer in {block.mixer for block in config.blocks.values()}:
    if mixer.rank is not None:
      add_loss(f"all keys and values of a token are made of {mixer.rank} numbers", "latent")
    elif mixer.kv_heads == 1 and mixer.heads != 1:
      add_loss(f"{mixer.heads} query heads share one head of keys and values", "heads")
  if _experts(config):
    share = cost.active_params(config) / cost.params(config)["total"]
    add_loss(f"a token uses {share:.0%} of the parameters that memory holds")
  found += _rounding(r.weights, r.kv)
  if TASKS[r.task].mask != "causal":
    add_loss("released weights were trained causally: the mask needs training")
  return tuple(dict.fromkeys(found))


def _rounding(weights: str, kv: str) -> list[Loss]:
  found = [Loss(f"{weights} weights: {ROUNDING[weights]}")] if weights in ROUNDING else []
  return found + ([Loss(f"{kv} state: {ROUNDING_KV[kv]}")] if kv in ROUNDING_KV else [])


# ------------------------------------------------------------------------------------------- the forks of the tree


def _mixers(config: ModelConfig, change: Callable) -> ModelConfig:
  """Applies `change` to each softmax attention of a model whose key-value heads can be chosen."""
  change_block = lambda block: dataclasses.replace(block, mixer=change(block.mixer))
  change_if_possible = lambda block: change_block(block) if _has_choice(block.mixer) else block
  blocks = {name: change_if_possible(b) for name, b in config.blocks.items()}
  return dataclasses.replace(config, blocks=FrozenDict(blocks))


def _has_choice(mixer: MixerConfig) -> bool:
  """True if a mixer has key-value heads, and a window, to choose."""
  return mixer.with_fields(num_kv_heads=mixer.kv_heads, window=mixer.window) is not None


def share_heads(config: ModelConfig, num_kv_heads: int) -> ModelConfig:
  """Lowers key-value heads to `num_kv_heads`, if these divide the query heads (1911.02150, 2305.13245)."""
  has_more = lambda c: c.kv_heads > num_kv_heads and c.heads % num_kv_heads == 0
  return _mixers(config, lambda c: dataclasses.replace(c, num_kv_heads=num_kv_heads) if has_more(c) else c)


def see_locally(config: ModelConfig, window: int = 1024, every: int = 6) -> ModelConfig:
  """A window in all but every sixth layer, as in Gemma 3 (2503.19786); a model with windows stays as it is."""
  if any(windows(config)) or not all(_has_choice(b.mixer) for b in config.blocks.values()):
    return config
  order = [name if i % every == 0 else f"{name}_local" for i, name in enumerate(config.layers, 1)]
  local = _mixers(config, lambda c: dataclasses.replace(c, window=window)).blocks
  blocks = config.blocks | {f"{name}_local": block for name, block in local.items()}
  blocks = FrozenDict({name: block for name, block in blocks.items() if name in order})
  return dataclasses.replace(config, blocks=blocks, stack=" ".join(order))


def latent(config: ModelConfig) -> ModelConfig:
  """Latent attention of DeepSeek-V2's sizes, 512 + 64 numbers per token (2405.04434), without windows."""
  if any(windows(config)):
    return config
  sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
  return _mixers(config, lambda c: MLAConfig(num_heads=c.heads, **sizes))


FORKS: tuple[tuple[str, Callable[[ModelConfig], ModelConfig], Loss], ...] = (
  ("8 key-value heads", lambda c: share_heads(c, 8), Loss("query heads share keys and values", CLAIMS["groups"])),
  ("1 key-value head", lambda c: share_heads(c, 1), Loss("one head of keys and values for all", CLAIMS["heads"])),
  ("1,024 tokens seen by 5 of 6 layers", see_locally, Loss("one layer in six sees far", CLAIMS["local"])),
  ("latent attention, 512 + 64", latent, Loss("keys and values of rank 512", CLAIMS["latent"])),
)

FORMATS = ("int8", "int4")


def branches(request: Request, name: str) -> list[Branch]:
  """A preset as it is, and after each fork that lowers its memory or its least time.

  Forks of the architecture are models yet to be trained: no weights of them were released.
  """
  task = TASKS[request.task]
  config = with_mask(PRESETS[name](), task.mask)
  found = [Branch("as published", evaluate(request, name, config), Loss("nothing"))]
  for change, fork, loss in FORKS:
    other = with_mask(fork(config), task.mask)
    found += [Branch(change, evaluate(request, name, other), loss)] if other else []
  for format in (f for f in FORMATS if groups_fit(config, f)):
    rounded = dataclasses.replace(request, weights=format)
    found.append(Branch(f"{format} weights", evaluate(rounded, name, config), _rounding(format, "bfloat16")[0]))
  if task.state:
    rounded = dataclasses.replace(request, kv="int8")
    found.append(Branch("int8 state", evaluate(rounded, name, config), _rounding("bfloat16", "int8")[0]))
  first = found[0].option
  is_lower = lambda o: o.bytes < first.bytes or (o.seconds or 0) < (first.seconds or 0)
  return found[:1] + [branch for branch in found[1:] if is_lower(branch.option)]


# ------------------------------------------------------------------------------------------- where nothing fits


def changes(request: Request) -> list[Change]:
  """Changes that make an architecture fit within its published context, the smallest first.

  Fewer bits come first, for the state before the weights, then more memory. No change helps if nothing was published
  for so long a context.
  """
  tried = [(flags, dataclasses.replace(request, **flags)) for flags in _fewer_bits(request)]
  more = _more_memory(request)
  tried += [(more, dataclasses.replace(request, **more))] if more else []
  found = []
  for flags, r in tried:
    best = next((o for o in candidates(r)[0] if not o.beyond and o.bytes <= r.budget), None)
    if best:
      found.append(Change(" ".join(f"--{k}={v}" for k, v in flags.items()), best))
  return found


def _fewer_bits(request: Request) -> list[dict[str, str]]:
  """The flags to try: formats that take fewer bits than the request does."""
  wide = lambda weights, kv: (roofline.WEIGHTS[weights], cost.BYTES[KV[kv]])
  now = wide(request.weights, request.kv)
  states = (request.kv, "int8") if TASKS[request.task].state else (request.kv,)
  found = []
  for weights in (request.weights, *FORMATS):
    for kv in states:
      then = wide(weights, kv)
      if then != now and all(a <= b for a, b in zip(then, now)):
        new = {"weights": weights, "kv": kv}
        found.append({k: v for k, v in new.items() if v != getattr(request, k)})
  return [flags for i, flags in enumerate(found) if flags not in found[:i]]


def _more_memory(request: Request) -> dict[str, int]:
  """Flags for the least memory, and number of chips, in which something fits; {} if nothing ever does."""
  sizes = [option.bytes for option in candidates(request)[0] if not option.beyond]
  if not sizes:
    return {}
  found = {} if request.memory is None else {"memory": math.ceil(min(sizes))}
  if request.hardware:
    usable = find_chip(request.hardware).hbm_bytes * (planner.USABLE if request.memory is None else 1)
    chips = math.ceil(min(sizes) / usable)
    found |= {"chips": chips} if chips > request.chips else {}
  return found
