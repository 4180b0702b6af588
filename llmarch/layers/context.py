"""What every layer may know about the tokens of one forward."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmarch.ops.attention import Keys
from llmarch.sharding import ATTENDING_TOKENS, TOKENS, move


class Memory(NamedTuple):
  """The output of an encoder, which cross-attention reads."""

  hidden: jax.Array  # [B, S, D of the encoder]
  keys: Keys  # int32 [B, S]: negative positions are padding; a query reads its own segment


@dataclasses.dataclass(frozen=True)
class Context:
  real: jax.Array  # bool [B, T], not padding; here, as segments, where a branch's tokens are
  segments: jax.Array  # int32 [B, T]
  positions: jax.Array  # int32 [B, T]
  queries: Keys  # the tokens of this call, where attention is
  length: jax.Array  # int32 [B, T or 1], of each token's context, for length-dependent RoPE scalings
  buffers: dict[str, Any]  # of the decoding state, by name (ops/cache.py)
  cursor: jax.Array | None  # int32 [B], tokens of each row before this call; None where there is no state
  memory: Memory | None  # of an encoder, in the calls that bring one
  telemetry: bool  # layers add statistics of themselves


def make_context(positions, segment_ids, prefix, state, memory, telemetry) -> tuple[Context, dict | None]:
  """The context of a call and, where there is a state, its part that all layers share, updated.

  The queries lie where attention does: only attention asks who stands where.

  positions int32 [B, T]; segment_ids int32 [B, T] or None; prefix bool [B, T] or None; memory: a Memory or None.
  """
  if segment_ids is None:
    segment_ids = jnp.zeros_like(positions)
  tokens = positions >= 0, segment_ids, positions
  positions, segment_ids, prefix = (
    None if a is None else move(a, TOKENS, ATTENDING_TOKENS)
    for a in (positions, segment_ids, prefix)
  )
  queries = Keys(positions, segment_ids, prefix)
  if state is None:
    # Of each document, so that packing changes nothing. XLA drops it where no layer asks.
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = jnp.max(jnp.where(same, positions[:, None, :], -1), axis=2) + 1
    return Context(*tokens, queries, length, {}, None, memory, telemetry), None
  entered = {
    name: ledger.enter(state["cursor"], queries, memory and memory.keys) for name, ledger in state["ledger"].items()
  }
  buffers = {name: buffer for name, (_, buffer) in entered.items()}
  cursor = state["cursor"] + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
  shared = {"cursor": cursor, "length": state["length"], "ledger": {name: new for name, (new, _) in entered.items()}}
  context = Context(*tokens, queries, state["length"][:, None], buffers, state["cursor"], memory, telemetry)
  return context, shared
