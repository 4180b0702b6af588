"""A choice of about 64 configs in which every pair of option values meets that can meet.

An option value is one value of a field that has few: `AttentionConfig.mask='prefix'`, `BlockConfig.norm=RMSNorm`,
`AttentionConfig.window=None`. Two of them meet where one layer of a model feels both: both are of the same block, or
one or both are of what all blocks share (embedding, head, initialisers). Mistakes of a model's code are mostly of one
option or of two together, so that configs which hold every pair find nearly all that a much longer list would find.

    block a: mask='prefix', norm=RMSNorm      the pairs of this config: (prefix, RMSNorm), (causal, LayerNorm),
    block b: mask='causal', norm=LayerNorm    and each of these four values with tied=True; not (prefix, LayerNorm)
    head:    tied=True
"""

import contextlib
import dataclasses
import functools
import itertools

import spaces
from hypothesis import HealthCheck, Phase, given, seed, settings

from llmarch.config import ModelConfig, Precision
from llmarch.errors import UserError

DRAWS = 100  # random configs to choose from and to take parts of
TRIES = 12  # pairs of models out of which two option values are joined before they are called refused
ROUNDS, WIDTH = 2, 16  # of improvements of a config: how often, and how many option values are tried in each
LEAST = 40  # a drawn config is chosen while it brings so many new pairs; the rest are joined from parts


@functools.cache
def options(owner: type, field: str) -> dict:
  """{label: predicate} of the values that a field is distinguished by; empty for a number."""
  return spaces.options(spaces.field_types(owner)[field])


def label_of(owner: type, field: str, value) -> list[str]:
  """Returns what the value of a field is called: its kind, a choice by name, `None` or `given`."""
  if dataclasses.is_dataclass(value):
    return [type(value).__name__]
  return [label for label, holds in options(owner, field).items() if holds(value)]


@functools.cache
def labels(config) -> tuple[tuple[tuple[str, ...], str, str], ...]:
  """Each option value of a config as (path, `Owner.field=value`, value): (("mixer", "mask"), ..., "'prefix'")."""
  found = []
  for field in spaces.field_types(type(config)):
    value = getattr(config, field)
    if field == "blocks" or isinstance(value, Precision):
      continue
    for label in label_of(type(config), field, value):
      found.append(((field,), f"{type(config).__name__}.{field}={label}", label))
    if dataclasses.is_dataclass(value):
      found += [((field, *path), name, label) for path, name, label in labels(value)]
  return tuple(found)


@functools.cache
def option_values(config) -> frozenset[str]:
  """The option values of a config of any part, as `Owner.field=value`; of a model, without those of its blocks."""
  return frozenset(name for _, name, _ in labels(config))


def sites(config: ModelConfig) -> list[frozenset[str]]:
  """For each block, the option values that a layer of it feels: its own and those that all blocks share."""
  return [option_values(block) | option_values(config) for block in config.blocks.values()]


def pairs(config: ModelConfig) -> set[tuple[str, str]]:
  """The pairs of option values that meet in a model, each in alphabetical order."""
  return {pair for site in sites(config) for pair in itertools.combinations(sorted(site), 2)}


# ------------------------------------------------------------------------------- joining two values in one layer


class Single:
  """A model of one block, as a tree of parts that can be exchanged for parts of others."""

  def __init__(self, config: ModelConfig):
    self.config, self.block = config, config.blocks["a"]
    self.labels = labels(self.block) + labels(config)
    self.kinds = {path: label for path, _, label in self.labels}
    self.values = {name for _, name, _ in self.labels}

  @property
  def chains(self) -> dict:
    """{option value: the kinds down to it}: {"YaRN.truncate=True": ((("mixer",), "MLAConfig"), ...)}."""
    chain = lambda path: tuple((path[:n], self.kinds[path[:n]]) for n in range(1, len(path) + 1))
    return {name: chain(path) for path, name, _ in self.labels}

  def below(self, path: tuple[str, ...]) -> set[str]:
    """The option values of a part."""
    return {name for place, name, _ in self.labels if place[: len(path)] == path}

  def at(self, path: tuple[str, ...]):
    """The part at a path, which leads into the block or into what all blocks share."""
    return functools.reduce(getattr, path, self.block if hasattr(self.block, path[0]) else self.config)

  def with_part(self, path: tuple[str, ...], value) -> "Single":
    """The same with another part at a path; raises UserError where that cannot be."""

    def put(node, path):
      inner = value if len(path) == 1 else put(getattr(node, path[0]), path[1:])
      return dataclasses.replace(node, **{path[0]: inner})

    if not hasattr(self.block, path[0]):
      return Single(put(self.config, path))
    block = put(self.block, path)
    return Single(spaces.completed(self.config, {"a": block}, "2*a"))

  def taking(self, chain, donor: "Single") -> "Single":
    """The same with that part of a donor that holds an option value, which lies at the end of the chain."""
    path = next(path for path, label in chain if self.kinds.get(path) != label)
    return self.with_part(path, donor.at(path))


def singles(config: ModelConfig) -> list[Single]:
  """A model of one block for each block of a model."""
  return [Single(spaces.completed(config, {"a": block}, "2*a")) for block in config.blocks.values()]


class Parts:
  """Where each option value is found: {value: {chain of kinds down to it: [models of one block]}}."""

  def __init__(self, found: list[Single]):
    self.where = {}
    for single in found:
      for value, chain in single.chains.items():
        self.where.setdefault(value, {}).setdefault(chain, []).append(single)

  def places(self, u: str, v: str):
    """Pairs of chains that do not ask for two kinds at one place: a layer could hold u and v."""
    for one, other in itertools.product(self.where[u], self.where[v]):
      asked = dict(one)
      if all(asked.get(path, label) == label for path, label in other):
        yield one, other

  def join(self, u: str, v: str) -> "Single | str":
    """A model in which u and v meet, or the sentence that refuses the last of several attempts."""
    sentence = ""
    for one, other in self.places(u, v):
      hosts, donors = self.where[u][one], self.where[v][other]
      for i in range(TRIES):
        host, donor = hosts[i % len(hosts)], donors[i // 2 % len(donors)]
        for (mine, _), (its, chain) in (((host, one), (donor, other)), ((donor, other), (host, one))):
          try:
            made = mine if {u, v} <= mine.values else mine.taking(chain, its)
          except UserError as e:
            sentence = str(e)
            continue
          if {u, v} <= made.values:
            return made
    return sentence


# -------------------------------------------------------------------------------------------------- the choice


class Left:
  """Pairs that no chosen config has yet; a set of option values is a whole number with a bit for each."""

  def __init__(self, values: list[str], wanted):
    self.bit = {value: 1 << i for i, value in enumerate(values)}
    self.values, self.rows = values, [0] * len(values)
    for u, v in wanted:
      self.rows[self.bit[u].bit_length() - 1] |= self.bit[v]
      self.rows[self.bit[v].bit_length() - 1] |= self.bit[u]
    self.alive = self.mask(values)

  def mask(self, values) -> int:
    """The number with the bits of these values."""
    return sum(self.bit[value] for value in values)

  def gain(self, mask: int) -> int:
    """Twice the number of new pairs among a set of values."""
    rows, total, rest = self.rows, 0, mask & self.alive
    while rest:
      total += (rows[(rest & -rest).bit_length() - 1] & mask).bit_count()
      rest &= rest - 1
    return total

  def drop(self, mask: int):
    """Notes that all pairs among a set of values have been found."""
    self.rows = [row & ~mask if mask >> i & 1 else row for i, row in enumerate(self.rows)]
    self.alive = sum(1 << i for i, row in enumerate(self.rows) if row)

  def first(self) -> tuple[str, str] | None:
    """Some pair that no chosen config has, or None where there is none left."""
    for i, row in enumerate(self.rows):
      if row:
        return self.values[i], self.values[row.bit_length() - 1]
    return None


def climb(single: Single, parts: Parts, left: Left, shared: bool) -> Single:
  """Exchanges one part after the other while that brings new pairs; parts that blocks share only if `shared`."""
  mask = left.mask(single.values)
  gain = left.gain(mask)
  for _ in range(ROUNDS):
    wanted = sorted(left.values, key=lambda v: -(left.rows[left.bit[v].bit_length() - 1] & mask).bit_count())
    better = False
    for value in wanted[:WIDTH]:
      if value in single.values:
        continue
      for chain, donors in parts.where[value].items():
        if not shared and not hasattr(single.block, chain[0][0][0]):
          continue
        for donor in donors[:2]:
          try:
            made = single.taking(chain, donor)
          except UserError:
            continue
          new = left.mask(made.values)
          if left.gain(new) > gain:
            single, mask, gain, better = made, new, left.gain(new), True
            break
        if value in single.values:
          break
    if not better:
      break
  return single


@functools.cache
def draws(n: int) -> tuple[ModelConfig, ...]:
  """About n configs that hypothesis draws, the same on every run."""
  found = {}

  @seed(0)
  @settings(
    max_examples=n, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
  )
  @given(spaces.model_configs())
  def collect(config):
    found[config] = None

  with spaces.draws_alike():
    collect()
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Choice:
  configs: tuple[ModelConfig, ...]
  refused: dict[tuple[str, str], str]  # pairs for which a layer has a place each, and the sentence that refuses them


@functools.cache
def choice() -> Choice:
  """The chosen configs, the same on every run of one commit; takes some seconds, once a process.

  Each begins with the random model of one block that has most new pairs, or, once those bring few, with a model that is
  made to hold some pair that is left; parts of it are exchanged for parts of others while that brings more; and up to
  two more blocks are added that bring some. It ends when no pair is left.
  """
  found = [single for config in (*draws(DRAWS), *spaces.HAND.values()) for single in singles(config)]
  parts = Parts(found)
  values = sorted(parts.where)
  left = Left(values, (p for p in itertools.combinations(values, 2) if next(parts.places(*p), None)))
  shared = {id(s): left.mask(option_values(s.config)) for s in found}
  own = {id(s): left.mask(option_values(s.block)) for s in found}
  chosen, refused = [], {}
  while pair := left.first():
    best = max(found, key=lambda s: left.gain(own[id(s)] | shared[id(s)]))
    if left.gain(left.mask(best.values)) < 2 * LEAST:
      best = parts.join(*pair)
      if isinstance(best, str):
        refused[tuple(sorted(pair))] = best
        left.drop(left.mask(pair))
        continue
    model = climb(best, parts, left, shared=True)
    frame = left.mask(option_values(model.config))
    left.drop(left.mask(model.values))
    blocks = [model.block]
    for _ in range(2):
      for other in sorted(found, key=lambda s: -left.gain(own[id(s)] | frame))[:4]:
        with contextlib.suppress(UserError):
          added = climb(Single(spaces.completed(model.config, {"a": other.block}, "2*a")), parts, left, shared=False)
          if left.gain(left.mask(added.values)) >= 8:
            left.drop(left.mask(added.values))
            blocks.append(added.block)
            break
    names = "abc"[: len(blocks)]
    stack = spaces.STACKS[names][len(chosen) % len(spaces.STACKS[names])]
    made = spaces.completed(model.config, dict(zip(names, blocks, strict=True)), stack)
    chosen.append(spaces.with_room(made))
  return Choice(tuple(chosen), refused)


@functools.cache
def widest(n: int) -> tuple[str, ...]:
  """The names of n configs of the list by hand: each next one has the most option values that those before have not."""
  left = {name: set().union(*sites(config)) for name, config in spaces.HAND.items()}
  names, seen = [], set()
  for _ in range(n):
    names.append(max(left, key=lambda name: len(left[name] - seen)))
    seen |= left.pop(names[-1])
  return tuple(names)


# ------------------------------------------------------------------------- few models that hold every option value


def even(config: ModelConfig) -> ModelConfig:
  """The same options at sizes that every mesh of eight devices divides: for layouts, and for training over meshes.

  Dropout, which draws by place, is left out.
  """
  heads = lambda branch: None if branch.num_kv_heads is None else {1: 1, 2: 2, 3: 4}.get(branch.num_kv_heads, 8)
  width = lambda feed_forward, d_ff: dataclasses.replace(feed_forward, d_ff=d_ff) if feed_forward else None

  def mixer(m):
    changes = {"num_heads": 8}
    for field, value in {"num_kv_heads": getattr(m, "num_kv_heads", None) and heads(m), "dropout": 0.0}.items():
      changes |= {field: value} if field in spaces.field_types(type(m)) else {}
    if "kv_lora_rank" in spaces.field_types(type(m)):
      changes |= {"kv_lora_rank": 16, "q_lora_rank": None if m.q_lora_rank is None else 24}
    scaling = getattr(getattr(m, "position", None), "scaling", None)
    if hasattr(scaling, "short_factors"):  # a factor for each pair of dimensions that turns
      sizes = m.position.dims, getattr(m, "qk_rope_head_dim", None), getattr(m, "head_dim", None), EVEN_WIDTH // 8
      turned = next(size for size in sizes if size)
      cut = lambda factors: tuple(factors[i % len(factors)] for i in range(turned // 2))
      factors = {name: cut(getattr(scaling, name)) for name in ("short_factors", "long_factors")}
      changes["position"] = dataclasses.replace(m.position, scaling=dataclasses.replace(scaling, **factors))
    return dataclasses.replace(m, **changes)

  def feed_forward(f):
    if f is None or not hasattr(f, "expert"):
      return width(f, 24)
    groups = getattr(f.router, "groups", None)
    count = 4 * (groups.num if groups else -(-f.num_experts // 4))
    return dataclasses.replace(f, num_experts=count, expert=width(f.expert, 16), shared=width(f.shared, 24))

  def cross(c):
    return c and dataclasses.replace(
      c, num_heads=8, num_kv_heads=heads(c), memory_dim=EVEN_WIDTH, max_source_len=8, dropout=0.0
    )

  blocks = {
    name: dataclasses.replace(
      block, mixer=mixer(block.mixer), ffn=feed_forward(block.ffn), cross=cross(block.cross), dropout=0.0
    )
    for name, block in config.blocks.items()
  }
  position = config.embed.position
  if hasattr(position, "length"):
    position = dataclasses.replace(position, length=EVEN_LENGTH)
  embed = dataclasses.replace(
    config.embed, position=position, dropout=0.0, dim=None if config.embed.dim is None else 16
  )
  # Every term of a stack is repeated, so that the stages of a pipeline can share it.
  stack = f"2*({' '.join(dict.fromkeys(config.layers))})"
  return dataclasses.replace(
    config,
    d_model=EVEN_WIDTH,
    vocab_size=40,
    max_seq_len=EVEN_LENGTH,
    blocks=blocks,
    stack=stack,
    embed=embed,
    encoder=config.encoder and even(config.encoder),
  )


EVEN_WIDTH, EVEN_LENGTH = 48, 48


def with_state(config: ModelConfig, dtype: str) -> ModelConfig:
  """The same with a decoding state in another dtype or format."""
  return dataclasses.replace(config, precision=dataclasses.replace(config.precision, state=dtype))


def few(found: list[Single], accepts, models: int, blocks: int) -> tuple[ModelConfig, ...]:
  """Models of even sizes which together hold every option value of the parts that are accepted.

  accepts(config): raises UserError for a model of one block that cannot be. What blocks share is put together of what
  earlier models have not, field by field; then come the blocks with most new option values, and to the last model all
  that are left. Each has experts, so that a mesh can split them.
  """
  parts = []
  for single in found:
    with contextlib.suppress(UserError):
      made = Single(even(single.config))
      accepts(made.config)
      parts.append((made, option_values(made.block)))
  where, seen, made = Parts([part for part, _ in parts]), set(), []

  def newest(candidates, values):
    best = max(candidates, key=lambda one: len(values(one) - seen))
    seen.update(values(best))
    return best

  def fresh() -> Single:
    """The part with most new option values in its block, and then with parts of others in it that bring more."""
    best = max(parts, key=lambda part: len(part[1] - seen))[0]
    news = lambda part: len(option_values(part.block) - seen)
    for value in sorted(set(where.where) - seen - best.values):
      for chain, donors in where.where[value].items():
        if not hasattr(best.block, chain[0][0][0]):
          continue
        for donor in donors[:6]:
          if value in best.values:
            break
          with contextlib.suppress(UserError):
            changed = best.taking(chain, donor)
            accepts(changed.config)
            best = max(best, changed, key=news)
    seen.update(option_values(best.block))
    return best

  of_blocks = set().union(*(values for _, values in parts))
  for number in range(models):
    chosen = []
    while of_blocks - seen and (len(chosen) < blocks or number == models - 1):
      chosen.append(fresh())
    if not any(part.block.ffn and part.block.ffn.experts for part in chosen):
      chosen.append(next(part for part, _ in parts if part.block.ffn and part.block.ffn.experts))
    frame = next((part for part in chosen if part.config.encoder), chosen[0])
    for path in SHARED:
      frame = frame.with_part(path, newest(parts, lambda part, path=path: part[0].below(path))[0].at(path))
    names = "abcdefghijklmnop"[: len(chosen)]
    blocks_by_name = {name: part.block for name, part in zip(names, chosen, strict=True)}
    made.append(even(spaces.completed(frame.config, blocks_by_name, " ".join(names))))
  return tuple(made)


# What blocks share, in parts that can be exchanged.
SHARED = [("embed", field) for field in ("norm", "position", "dim")]
SHARED += [("head",), ("final_norm",), ("init",), ("embed_init",)]
