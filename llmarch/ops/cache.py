"""Decoding state: arrays described by specs, and buffers, which know the token that each entry of them belongs to.

A buffer has a name, and a ledger of the tokens that its slots hold. All layers whose entries lie in the same slots
share one buffer, so that the ledger is stored only once. There are two kinds:

  Ring     a row writes token after token at its cursor, modulo the capacity; padding is not written. A windowed layer
           needs only as many slots as its window and one chunk; a full cache is a ring as long as the text.
  Memory   the output of an encoder: filled once, as a whole, and only read after that.

A layer's state is a `Held`: its arrays by name, and the name of the buffer in whose slots they lie. The layer asks the
context for the buffer of that name, writes into it and reads from it. A new kind is a new class with `name` and
`ledger`, whose ledger's `enter` gives an object with `write` and `read`.

B batch, T tokens of this call, S slots, K heads, H head dim.
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmarch.ops import quant
from llmarch.ops.attention import Keys
from llmarch.ops.quant import QTensor


class Spec(NamedTuple):
  """An array of state: its shape, logical axes (the batch axis first), dtype and initial value."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  dtype: str
  fill: float = 0


def is_spec(x) -> bool:
  """True if x is a Spec."""
  return isinstance(x, Spec)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("leaves",), meta_fields=("buffer",))
@dataclasses.dataclass(frozen=True)
class Held:
  """The state of one branch: arrays (or their specs) by name, with one entry for each slot of the buffer named here."""

  buffer: str
  leaves: dict[str, Any]


def quantised_spec(spec: Spec, format: str) -> QTensor:
  """Describes the same array as codes, with one scale per vector of its last dimension (a token's key of one head)."""
  f = quant.FORMATS[format]
  scale = spec._replace(shape=(*spec.shape[:-1], 1), dtype=f.scale_dtype)
  return QTensor(spec._replace(dtype=f.dtype), scale, format)


def allocate(specs):
  """Makes the arrays that a tree of specs describes."""
  return jax.tree.map(lambda s: jnp.full(s.shape, s.fill, s.dtype), specs, is_leaf=is_spec)


def slots(cursor: jax.Array, positions: jax.Array, capacity: int, place=None) -> jax.Array:
  """The slot of each token of a chunk; for padding `capacity`, which no buffer has.  [B], [B, T] -> [B, T].

  place(index, capacity) says where a row's token number `index` lies; None: in a ring.
  """
  valid = positions >= 0
  index = cursor[:, None] + jnp.cumsum(valid, axis=1) - 1
  return jnp.where(valid, index % capacity if place is None else place(index, capacity), capacity)


def write(buffer: jax.Array | QTensor, slot: jax.Array, values: jax.Array) -> jax.Array | QTensor:
  """Writes a chunk into its slots; padding falls outside of the buffer and is dropped.

  A buffer [B, S] takes values [B, T], and a buffer [B, K, S, H] takes values [B, T, K, H]; slot is [B, T]. A QTensor
  quantises each token by itself, so what is stored of it depends neither on the chunk nor on its neighbours.
  """
  if isinstance(buffer, QTensor):
    parts = quant.quantize(values, (-1,), buffer.format)
    return jax.tree.map(lambda b, v: write(b, slot, v), buffer, parts)
  if slot.size == 1:
    # XLA turns the scatter of a single update into a slice update, fuses it into each of its readers, and then copies
    # the cache for each of them. A second update, which is dropped, keeps it a scatter in place.
    slot = jnp.pad(slot, ((0, 0), (0, 1)), constant_values=jnp.iinfo(slot.dtype).max)
    values = jnp.concatenate([values, values], axis=1)
  rows = jnp.arange(buffer.shape[0])[:, None]
  at = (rows, slot) if buffer.ndim == 2 else (rows, slice(None), slot)
  return buffer.at[at].set(values.astype(buffer.dtype), mode="drop", unique_indices=False)


# ------------------------------------------------------------------------------------------------ kinds of buffers


class Buffer(NamedTuple):
  """A ring in one call."""

  keys: Keys  # the tokens that the slots hold, including those of this call
  slots: jax.Array  # int32 [B, T]: the slots of this call's tokens

  def write(self, leaf: jax.Array | QTensor, values: jax.Array) -> jax.Array | QTensor:
    """Writes the entries [B, T, K, H] of this call's tokens into an array [B, K, S, H]."""
    return write(leaf, self.slots, values)

  def read(self, leaf: jax.Array | QTensor, dtype) -> jax.Array:
    """Reads all entries, [B, K, S, H]."""
    return leaf.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Ring:
  """The kind of buffer that holds the newest `capacity` tokens of a row."""

  capacity: int
  mask: Hashable = None  # a mask whose `slot` says where a token lies; None: in a ring

  @property
  def name(self) -> str:
    """Name of the buffer; rings of the same capacity and mask share one."""
    return f"ring_{self.capacity}" + (f"_{self.mask.kind}" if self.mask else "")

  def ledger(self, batch: int) -> "RingLedger":
    """Specs of an empty ledger."""
    axes = ("cache_batch", "cache_length")
    spec = Spec((batch, self.capacity), axes, "int32", -1)
    return RingLedger(self, spec, spec._replace(fill=0))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("positions", "segment_ids"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class RingLedger:
  """The token that each slot of a ring holds, int32 [B, S] each; position -1 marks an empty slot."""

  kind: Ring
  positions: Any
  segment_ids: Any

  def enter(self, cursor: jax.Array, queries: Keys, memory: Keys | None) -> tuple["RingLedger", Buffer]:
    """Enters a chunk [B, T]; returns the new ledger, and the buffer for this call.

    `cursor` is the number of each row's tokens before the chunk. Only keys of the chunk itself are marked as prefix:
    older ones lie before every query, which sees them anyway.
    """
    T, S = queries.positions.shape[1], self.positions.shape[1]
    if T > S:
      raise ValueError(f"a chunk of {T} tokens does not fit a buffer of {S}")
    slot = slots(cursor, queries.positions, S, self.kind.mask and self.kind.mask.slot)
    positions = write(self.positions, slot, queries.positions)
    segment_ids = write(self.segment_ids, slot, queries.segment_ids)
    prefix = None if queries.prefix is None else write(jnp.zeros(positions.shape, bool), slot, queries.prefix)
    return RingLedger(self.kind, positions, segment_ids), Buffer(Keys(positions, segment_ids, prefix), slot)


class MemoryBuffer(NamedTuple):
  """A memory in one call."""

  keys: Keys
  filled: bool  # this call fills it

  def write(self, leaf: jax.Array, values: jax.Array | None) -> jax.Array:
    """Returns the array [B, K, S, H] as it is, or with entries [B, n, K, H] of a new memory of at most S tokens."""
    if not self.filled:
      return leaf
    room = leaf.shape[2] - values.shape[1]
    values = values.swapaxes(1, 2).astype(leaf.dtype)
    return jnp.pad(values, ((0, 0), (0, 0), (0, room), (0, 0)))

  def read(self, leaf: jax.Array, dtype) -> jax.Array:
    """Reads all entries, [B, K, S, H]."""
    return leaf.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Memory:
  """The kind of buffer that holds an encoder's output of at most `capacity` tokens."""

  capacity: int

  @property
  def name(self) -> str:
    """Name of the buffer; memories of the same capacity share one."""
    return f"memory_{self.capacity}"

  def ledger(self, batch: int) -> "MemoryLedger":
    """Specs of an empty ledger."""
    spec = Spec((batch, self.capacity), ("cache_batch", "cache_length"), "int32", -1)
    return MemoryLedger(spec, spec._replace(fill=0))


class MemoryLedger(NamedTuple):
  """The token of the source that each slot holds, int32 [B, S] each; position -1 marks an empty slot."""

  positions: Any
  segment_ids: Any

  def enter(self, cursor: jax.Array, queries: Keys, memory: Keys | None) -> tuple["MemoryLedger", MemoryBuffer]:
    """Enters a memory [B, n], or None; returns the new ledger, and the buffer for this call."""
    if memory is None:
      return self, MemoryBuffer(Keys(self.positions, self.segment_ids, None), False)
    n, S = memory.positions.shape[1], self.positions.shape[1]
    if n > S:
      raise ValueError(f"a memory of {n} tokens does not fit a buffer of {S}; raise max_source_len")
    pad = lambda a, fill: jnp.pad(a, ((0, 0), (0, S - n)), constant_values=fill)
    ledger = MemoryLedger(pad(memory.positions, -1), pad(memory.segment_ids, 0))
    return ledger, MemoryBuffer(Keys(*ledger, None), True)
