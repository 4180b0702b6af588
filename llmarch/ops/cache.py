"""Decoding state: arrays described by specs, and buffers, which say what the entries of such arrays belong to.

A buffer has a name, and a ledger of the tokens that its slots hold. Layers whose entries lie in the same slots share
one buffer, so that who sits where is stored once for them all. There are two kinds:

  Ring     a row writes token after token at its cursor, modulo the capacity; padding is not written. A window needs
           a capacity no larger than itself and a chunk, and a full cache is a ring that is as long as the text.
  Memory   what an encoder has read: filled once, as a whole, and only read after that.

A layer's state is a `Held`: its arrays by name, and the name of the buffer in whose slots they lie. The layer asks the
context for the buffer of that name, writes into it and reads from it; another kind is another class with these doors.

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
  """An array of state: shape, logical axes (the batch axis first), dtype and initial value."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  dtype: str
  fill: float = 0


def is_spec(x) -> bool:
  return isinstance(x, Spec)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("leaves",), meta_fields=("buffer",))
@dataclasses.dataclass(frozen=True)
class Held:
  """The state of one branch: arrays (or their specs) by name, an entry for each slot of the buffer of this name."""

  buffer: str
  leaves: dict[str, Any]


def quantised_spec(spec: Spec, format: str) -> QTensor:
  """The same array as codes and, for each vector along its last dimension (a token's key of one head), a scale."""
  f = quant.FORMATS[format]
  scale = spec._replace(shape=(*spec.shape[:-1], 1), dtype=f.scale_dtype)
  return QTensor(spec._replace(dtype=f.dtype), scale, format)


def allocate(specs):
  """Arrays for a tree of specs."""
  return jax.tree.map(lambda s: jnp.full(s.shape, s.fill, s.dtype), specs, is_leaf=is_spec)


def slots(cursor: jax.Array, positions: jax.Array, capacity: int, place=None) -> jax.Array:
  """The slot of each token of a chunk; `capacity`, which no buffer has, for padding.  [B], [B, T] -> [B, T].

  place(index, capacity): where a row's token number `index` lies; None: a ring.
  """
  valid = positions >= 0
  index = cursor[:, None] + jnp.cumsum(valid, axis=1) - 1
  return jnp.where(valid, index % capacity if place is None else place(index, capacity), capacity)


def write(buffer: jax.Array | QTensor, slot: jax.Array, values: jax.Array) -> jax.Array | QTensor:
  """Puts a chunk into its slots; padding falls outside and is dropped.

  buffer [B, S] with values [B, T], or buffer [B, K, S, H] with values [B, T, K, H]; slot [B, T]. A QTensor
  takes each token by itself, so that neither chunks nor neighbours change what is stored of it.
  """
  if isinstance(buffer, QTensor):
    parts = quant.quantize(values, (-1,), buffer.format)
    return jax.tree.map(lambda b, v: write(b, slot, v), buffer, parts)
  if slot.size == 1:
    # XLA turns the scatter of a single update into a slice update, fuses that into each of its readers and
    # then copies the cache for every one of them. A second update, dropped, keeps it a scatter in place.
    slot = jnp.pad(slot, ((0, 0), (0, 1)), constant_values=jnp.iinfo(slot.dtype).max)
    values = jnp.concatenate([values, values], axis=1)
  rows = jnp.arange(buffer.shape[0])[:, None]
  at = (rows, slot) if buffer.ndim == 2 else (rows, slice(None), slot)
  return buffer.at[at].set(values.astype(buffer.dtype), mode="drop", unique_indices=False)


# ------------------------------------------------------------------------------------------------ kinds of buffers


class Buffer(NamedTuple):
  """A ring in one call."""

  keys: Keys  # the tokens that its slots hold, those of this call among them
  slots: jax.Array  # int32 [B, T], where this call's tokens go

  def write(self, leaf: jax.Array | QTensor, values: jax.Array) -> jax.Array | QTensor:
    """An array [B, K, S, H] with the entries [B, T, K, H] of this call's tokens."""
    return write(leaf, self.slots, values)

  def read(self, leaf: jax.Array | QTensor, dtype) -> jax.Array:
    """All entries, [B, K, S, H]."""
    return leaf.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Ring:
  """The kind of buffer that holds the newest `capacity` tokens of a row."""

  capacity: int
  mask: Hashable = None  # whose `slot` says where a token lies; None: in a ring

  @property
  def name(self) -> str:
    return f"ring_{self.capacity}" + (f"_{self.mask.kind}" if self.mask else "")

  def ledger(self, batch: int) -> "RingLedger":
    """Its specs, nothing held."""
    axes = ("cache_batch", "cache_length")
    spec = Spec((batch, self.capacity), axes, "int32", -1)
    return RingLedger(self, spec, spec._replace(fill=0))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("positions", "segment_ids"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class RingLedger:
  """Which token each slot of a ring holds, int32 [B, S]; position -1: none."""

  kind: Ring
  positions: Any
  segment_ids: Any

  def enter(self, cursor: jax.Array, queries: Keys, memory: Keys | None) -> tuple["RingLedger", Buffer]:
    """The ledger after a chunk [B, T], of which each row has `cursor` tokens before it, and the buffer of the call.

    Only keys of the chunk itself are marked as prefix: older ones lie before every query and are seen anyway.
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
  filled: bool  # by this call

  def write(self, leaf: jax.Array, values: jax.Array | None) -> jax.Array:
    """An array [B, K, S, H]: the entries [B, n, K, H] of a new memory, of at most S tokens, or what it holds."""
    if not self.filled:
      return leaf
    room = leaf.shape[2] - values.shape[1]
    values = values.swapaxes(1, 2).astype(leaf.dtype)
    return jnp.pad(values, ((0, 0), (0, 0), (0, room), (0, 0)))

  def read(self, leaf: jax.Array, dtype) -> jax.Array:
    """All entries, [B, K, S, H]."""
    return leaf.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Memory:
  """The kind of buffer that holds the output of an encoder, of at most `capacity` tokens."""

  capacity: int

  @property
  def name(self) -> str:
    return f"memory_{self.capacity}"

  def ledger(self, batch: int) -> "MemoryLedger":
    """Its specs, nothing held."""
    spec = Spec((batch, self.capacity), ("cache_batch", "cache_length"), "int32", -1)
    return MemoryLedger(spec, spec._replace(fill=0))


class MemoryLedger(NamedTuple):
  """Which token of the source each slot holds, int32 [B, S]; position -1: none."""

  positions: Any
  segment_ids: Any

  def enter(self, cursor: jax.Array, queries: Keys, memory: Keys | None) -> tuple["MemoryLedger", MemoryBuffer]:
    """The ledger after a call that brings a memory [B, n], or none, and the buffer of the call."""
    if memory is None:
      return self, MemoryBuffer(Keys(self.positions, self.segment_ids, None), False)
    n, S = memory.positions.shape[1], self.positions.shape[1]
    if n > S:
      raise ValueError(f"a memory of {n} tokens does not fit a buffer of {S}; raise max_source_len")
    pad = lambda a, fill: jnp.pad(a, ((0, 0), (0, S - n)), constant_values=fill)
    ledger = MemoryLedger(pad(memory.positions, -1), pad(memory.segment_ids, 0))
    return ledger, MemoryBuffer(Keys(*ledger, None), True)
