"""What every layer may know about the tokens of one forward."""

import dataclasses

import jax
import jax.numpy as jnp

from llmarch.ops import cache
from llmarch.ops.attention import Keys
from llmarch.sharding import ATTENDING_TOKENS, TOKENS, move


@dataclasses.dataclass(frozen=True)
class Buffer:
  """The keys a layer attends to: what they are, and where this call's tokens go (None: the call itself)."""

  keys: Keys
  slots: jax.Array | None  # [B, T]


@dataclasses.dataclass(frozen=True)
class Context:
  real: jax.Array  # bool [B, T], not padding; here, as segments, where a branch's tokens are
  segments: jax.Array  # int32 [B, T]
  queries: Keys  # the tokens of this call, where attention is
  length: jax.Array  # int32 [B, T or 1], of each token's context, for length-dependent RoPE scalings
  buffers: dict[int | None, Buffer]  # by capacity; {None: ...} where there is no state
  cursor: jax.Array | None  # int32 [B], tokens of each row before this call; None where there is no state
  telemetry: bool  # layers add statistics of themselves to aux


def make_context(positions, segment_ids, prefix, state, telemetry) -> tuple[Context, dict | None]:
  """The context of a call and, where there is a state, its part that all layers share, updated.

  The queries lie where attention does: only attention asks who stands where.

  positions int32 [B, T]; segment_ids int32 [B, T] or None; prefix bool [B, T] or None.
  """
  if segment_ids is None:
    segment_ids = jnp.zeros_like(positions)
  tokens = positions >= 0, segment_ids
  positions, segment_ids, prefix = (
    None if a is None else move(a, TOKENS, ATTENDING_TOKENS)
    for a in (positions, segment_ids, prefix)
  )
  queries = Keys(positions, segment_ids, prefix)
  if state is None:
    # Of each document, so that packing changes nothing. XLA drops it where no layer asks.
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = jnp.max(jnp.where(same, positions[:, None, :], -1), axis=2) + 1
    return Context(*tokens, queries, length, {None: Buffer(queries, None)}, None, telemetry), None
  buffers, ledgers = {}, {}
  for name, ledger in state["ledger"].items():
    capacity = int(name)
    if positions.shape[1] > capacity:
      raise ValueError(f"a chunk of {positions.shape[1]} tokens does not fit a buffer of {capacity}")
    slot = cache.slots(state["cursor"], positions, capacity)
    ledgers[name], keys = cache.write_ledger(ledger, slot, queries)
    buffers[capacity] = Buffer(keys, slot)
  cursor = state["cursor"] + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
  shared = {"cursor": cursor, "length": state["length"], "ledger": ledgers}
  return Context(*tokens, queries, state["length"][:, None], buffers, state["cursor"], telemetry), shared
