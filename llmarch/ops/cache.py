"""Decoding state: arrays described by specs, and the ledger of what each buffer holds.

All attention layers whose buffers have the same capacity hold the same tokens in the same slots, so who
sits where is stored once for them: the ledger. A row writes token after token at its cursor, modulo the
capacity; padding is not written. A ring buffer is no more than a capacity below the length of the text.
"""

from typing import NamedTuple

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


def quantised_spec(spec: Spec, format: str) -> QTensor:
  """The same array as codes and, for each vector along its last dimension (a token's key of one head), a scale."""
  f = quant.FORMATS[format]
  scale = spec._replace(shape=(*spec.shape[:-1], 1), dtype=f.scale_dtype)
  return QTensor(spec._replace(dtype=f.dtype), scale, format)


def allocate(specs):
  """Arrays for a tree of specs."""
  return jax.tree.map(lambda s: jnp.full(s.shape, s.fill, s.dtype), specs, is_leaf=is_spec)


def ledger_spec(batch: int, capacity: int) -> dict[str, Spec]:
  axes = ("cache_batch", "cache_length")
  return {
    "positions": Spec((batch, capacity), axes, "int32", -1),
    "segment_ids": Spec((batch, capacity), axes, "int32", 0),
  }


def slots(cursor: jax.Array, positions: jax.Array, capacity: int) -> jax.Array:
  """The slot of each token of a chunk; `capacity`, which no buffer has, for padding.  [B], [B, T] -> [B, T]."""
  valid = positions >= 0
  index = cursor[:, None] + jnp.cumsum(valid, axis=1) - 1
  return jnp.where(valid, index % capacity, capacity)


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


def write_ledger(ledger: dict, slot: jax.Array, queries: Keys) -> tuple[dict, Keys]:
  """Enters a chunk; returns the ledger and the Keys it now describes.

  Only keys of the chunk itself are marked as prefix: older ones lie before every query and are seen anyway.
  """
  ledger = {
    "positions": write(ledger["positions"], slot, queries.positions),
    "segment_ids": write(ledger["segment_ids"], slot, queries.segment_ids),
  }
  prefix = None
  if queries.prefix is not None:
    prefix = write(jnp.zeros(ledger["positions"].shape, bool), slot, queries.prefix)
  return ledger, Keys(ledger["positions"], ledger["segment_ids"], prefix)
