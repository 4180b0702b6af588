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
from llmarch.errors import UserError, check

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
    check(spaces.drops_nothing(block), "an expert could run out of places, which a decoding state does not know")
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
