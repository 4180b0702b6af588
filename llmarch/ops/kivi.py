"""A cache whose keys have one scale per channel (KIVI, 2402.02750), since the channels of keys differ in size.

The scale of a channel needs a group of tokens, 32 in a row of text. The keys and values of an unfinished group are kept
in full precision beside the cache, and enter the cache when the group is complete. A query reads its own group in
full precision and every earlier group as codes, so the values that it reads depend on the text before it alone,
neither on the chunks in which the text came nor on padding.

B batch, T tokens of this call, K heads, H head dim, S slots of the cache, R slots beside it.
"""

import jax
import jax.numpy as jnp

from llmarch.ops import cache, quant
from llmarch.ops.attention import Keys
from llmarch.ops.quant import QTensor

GROUP = 32


def capacity(slots: int) -> int:
  """Number of slots of the cache, rounded up to whole groups."""
  return -(-slots // GROUP) * GROUP


def specs(kv: cache.Spec, format: str, chunk: int) -> dict[str, cache.Spec | QTensor]:
  """Specs for keys and values of shape [B, K, S, H], with S from `capacity`; kv.dtype is that of full precision."""
  B, K, S, H = kv.shape
  f = quant.FORMATS[format]
  scale = kv._replace(shape=(B, K, S // GROUP, H), dtype=f.scale_dtype)
  # A chunk is written before it is read, and it may begin at the end of a group.
  recent = kv._replace(shape=(B, K, min(S, GROUP - 1 + chunk), H))
  return {
    "k": QTensor(kv._replace(dtype=f.dtype), scale, format),
    "v": cache.quantised_spec(kv, format),
    "recent_k": recent,
    "recent_v": recent,
  }


def update(state: dict, cursor: jax.Array, queries: Keys, keys: Keys, k: jax.Array, v: jax.Array):
  """Writes a chunk k, v [B, T, K, H] of the tokens `queries`, then returns the keys and values that they may read.

  cursor int32 [B]: tokens of each row before this call; keys: the ledger of the S slots after it. Returns the state,
  k and v [B, K, S + R, H] in k's dtype, their keys, and bool [B, T, S + R], which slots each query reads.
  """
  S, R, G = state["k"].shape[2], state["recent_k"].shape[2], GROUP
  valid = queries.positions >= 0
  index = cursor[:, None] + jnp.cumsum(valid, axis=1) - 1  # [B, T], number of each token in its row's text
  end = cursor + jnp.sum(valid, axis=1, dtype=jnp.int32)
  slots_of = lambda n: cache.slots(cursor, queries.positions, n)
  state = {
    "k": state["k"],
    "v": cache.write(state["v"], slots_of(S), v),
    "recent_k": cache.write(state["recent_k"], slots_of(R), k),
    "recent_v": cache.write(state["recent_v"], slots_of(R), v),
  }
  state["k"] = _complete(state["k"], state["recent_k"], cursor, end, k.shape[1])

  latest_in = lambda n: end[:, None] - 1 - (end[:, None] - 1 - jnp.arange(n)) % n  # [B, n], newest token of each slot
  main, beside = latest_in(S), latest_in(R)
  pick_recent = lambda a: None if a is None else jnp.take_along_axis(a, beside % S, axis=1)
  positions, segment_ids, prefix = (pick_recent(a) for a in keys)
  positions = jnp.where(beside >= 0, positions, -1)
  concatenate = lambda a, b, axis: None if a is None else jnp.concatenate([a, b], axis=axis)
  keys = Keys(*(concatenate(a, b, 1) for a, b in zip(keys, (positions, segment_ids, prefix))))

  group = concatenate(main, beside, 1) // G
  # A query reads its own group, and groups that are not yet complete, in full precision.
  exact = (group[:, None] == index[:, :, None] // G) | (group >= end[:, None] // G)[:, None]  # [B, T, S + R]
  readable = exact == (jnp.arange(S + R) >= S)
  read_both = lambda name: concatenate(state[name].astype(k.dtype), state[f"recent_{name}"].astype(k.dtype), 2)
  return state, read_both("k"), read_both("v"), keys, readable


def _complete(stored: QTensor, recent: jax.Array, cursor, end, chunk: int) -> QTensor:
  """Writes the groups that tokens cursor..end (at most `chunk` of them) complete into the cache."""
  B, K, S, H = stored.shape
  n = (chunk + GROUP - 1) // GROUP
  groups = cursor[:, None] // GROUP + jnp.arange(n)  # [B, n]
  done = (groups + 1) * GROUP <= end[:, None]
  tokens = (groups[..., None] * GROUP + jnp.arange(GROUP)).reshape(B, -1)
  values = jnp.take_along_axis(recent, tokens[:, None, :, None] % recent.shape[2], axis=2)
  new = quant.quantize(values.reshape(B, K, n, GROUP, H), (3,), stored.format)
  slot_if_done = lambda index, done, size: jnp.where(done, index % size, size)  # slot `size` is outside: dropped
  to_rows = lambda a: jnp.moveaxis(a.reshape(B, K, -1, H), 1, 2)
  return QTensor(
    cache.write(stored.codes, slot_if_done(tokens, jnp.repeat(done, GROUP, axis=1), S), to_rows(new.codes)),
    cache.write(stored.scale, slot_if_done(groups, done, S // GROUP), to_rows(new.scale)),
    stored.format,
  )
