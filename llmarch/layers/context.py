"""The context of a call: what every layer may know about its tokens."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmarch.ops.attention import Keys
from llmarch.sharding import ATTENDING_TOKENS, TOKENS, move


class Memory(NamedTuple):
  """The output of an encoder, which cross-attention reads."""

  hidden: jax.Array  # [B, S, D of the encoder]
  keys: Keys  # int32 [B, S] each; a negative position is padding, and a query reads its own segment alone


@dataclasses.dataclass(frozen=True)
class Context:
  """The tokens of one call, the buffers of its decoding state, and an encoder's output.

  `real`, `segments` and `positions` are sharded as the inputs of a branch; `queries` is sharded as attention's are.
  """

  real: jax.Array  # bool [B, T]: the token is not padding
  segments: jax.Array  # int32 [B, T]: the document of a packed row
  positions: jax.Array  # int32 [B, T]: the position in the document; negative for padding
  queries: Keys  # positions, segments and prefix marks of the same tokens, sharded for attention
  length: jax.Array  # int32 [B, T or 1]: length of each token's context, for length-dependent RoPE scalings
  buffers: dict[str, Any]  # the decoding state's buffers by name (ops/cache.py)
  cursor: jax.Array | None  # int32 [B]: tokens of each row before this call; None without a decoding state
  memory: Memory | None  # an encoder's output, in the calls that bring one
  telemetry: bool  # if true, layers report statistics of themselves


def make_context(positions, segment_ids, prefix, state, memory, telemetry) -> tuple[Context, dict | None]:
  """Makes the context of a call, and updates the part of the decoding state that all layers share (None without one).

  The queries are redistributed to where attention is, since only attention compares tokens by their positions.

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
    # The length is counted in each document, so that packing changes nothing. XLA drops it if no layer reads it.
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
