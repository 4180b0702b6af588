"""Attention over explicit positions: which keys a query sees, biases by distance, and the softmax.

B batch, T query length, S key length, N query heads, K key-value heads, G = N/K, H head dim.
A negative position is padding. No function here reads a buffer index, so ring buffers, ragged batches, chunked
prefill and packed documents need no further code.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Keys(NamedTuple):
  """All that a mask may know of keys (or queries): int32 [B, S] each, and `prefix` bool [B, S] or None."""

  positions: jax.Array
  segment_ids: jax.Array
  prefix: jax.Array | None


class Extent(NamedTuple):
  """Bounds on a block of tokens, for each row: int32 [B] positions, and bool [B]."""

  low: jax.Array  # the smallest position; the largest int32 if the whole block is padding
  high: jax.Array  # the largest position; -1 if the whole block is padding
  marked: jax.Array  # true if some token is marked as prefix


def visible(queries: Keys, keys: Keys, *, mask, window: int | None, which=None) -> jax.Array:
  """Says as bool [B, 1 or N, T, S] whether query t (of head n) sees key s.

  mask is a MaskConfig (layers/mask.py). A window of w hides keys at a distance of w or more. `which` names the heads
  and the layer that ask (mask.Heads), for masks that read them. Padding sees no key and is not seen; tokens of
  different segments do not see each other.
  """
  q = Keys(*(None if a is None else a[:, None, :, None] for a in queries))
  k = Keys(*(None if a is None else a[:, None, None, :] for a in keys))
  seen = (k.positions >= 0) & (q.positions >= 0) & (q.segment_ids == k.segment_ids)
  seen &= mask.sees(q, k, which)
  if window is not None:
    seen &= jnp.abs(q.positions - k.positions) < window
  return seen


def growth(positions: jax.Array, rate: float, every: int) -> jax.Array:
  """The factor 1 + rate ln(1 + floor(p / every)) of a query at position p, int32 [B, T] -> f32 [B, T]; 1 for padding.

  It keeps the softmax as sharp over many keys as over few (2501.19399); Llama 4 and Ministral 3 have it in this form.
  """
  return 1 + rate * jnp.log1p((jnp.maximum(positions, 0) // every).astype(jnp.float32))


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Slopes m_h = 2^(-8h/n) for h = 1..n (2108.12409).  [N].

  If n is not a power of two, the published rule takes the slopes of the next lower power, then every other slope of
  the next higher power.
  """
  power = 2 ** math.floor(math.log2(num_heads))
  geometric = lambda n: 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
  return np.concatenate([geometric(power), geometric(2 * power)[0::2][: num_heads - power]])


def t5_bucket(distance: jax.Array, *, num_buckets: int, max_distance: int, bidirectional: bool) -> jax.Array:
  """The bucket of a key position minus a query position (1910.10683).

  Buckets are exact up to half their number, then logarithmic up to max_distance. Bidirectional attention gives each
  sign half of the buckets.
  """
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset = jnp.where(distance > 0, num_buckets, 0)
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(-distance, 0)
  exact = num_buckets // 2
  # The logarithms are in a table, because the bucket of a distance must not depend on a device's log function.
  reach = np.arange(exact, max(max_distance, exact + 1))
  log = exact + np.floor(np.log(reach / exact) / math.log(max_distance / exact) * (num_buckets - exact) + 1e-9)
  table = np.concatenate([np.arange(exact), np.minimum(log, num_buckets - 1), [num_buckets - 1]]).astype(np.int32)
  return offset + jnp.asarray(table)[jnp.minimum(distance, len(table) - 1)]


def shared_scores(q: jax.Array, k: jax.Array, *, scale: float) -> jax.Array:
  """Scores with one key per token for all heads: q [B, T, N, H], k [B, S, H] -> scale q k^T, f32 [B, N, T, S]."""
  return jnp.einsum("btnh,bsh->bnts", q, k, preferred_element_type=jnp.float32) * scale


def attend(
  q: jax.Array,  # [B, T, N, H]
  k: jax.Array,  # [B, K, S, H], the order of the cache's dimensions, so that a decode step reads it in place
  v: jax.Array,  # [B, K, S, H]
  seen: jax.Array,  # bool [B, 1 or N, T, S]
  bias: jax.Array | None,  # f32 [B or 1, N, T, S], added to the scaled scores
  sinks: jax.Array | None,  # f32 [N]: a logit that joins the softmax and attends to nothing (gpt-oss)
  *,
  scale: float,
  softcap: float | None,
  dropout: float,
  key: jax.Array | None,
  entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """softmax(scale q k^T + bias) v with grouped heads, softmax in f32.  -> [B, T, N, H], entropy f32 [B, T, N] or None.

  A query that sees no key gets zeros; jax.nn.softmax would give it the mean of v, which leaks hidden tokens. The
  normaliser divides the result instead of the T x S weights, which gives the same numbers with fewer operations.
  """
  B, T, N, H = q.shape
  K, S = k.shape[1:3]
  # The queries of a group become rows (r) of one matrix; in any other order XLA transposes T x S arrays.
  rows = lambda x: jnp.broadcast_to(x, (x.shape[0], x.shape[1], N // K, T, x.shape[-1])).reshape(
    x.shape[0], x.shape[1], -1, x.shape[-1]
  )
  q = rows(q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4))  # [B, K, R, H]
  logits = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) * scale
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  if bias is not None:
    logits += rows(bias.reshape(-1, K, N // K, T, S))
  seen = seen.reshape(seen.shape[0], -1, 1 if seen.shape[1] == 1 else N // K, T, S)  # [B, 1 or K, 1 or G, T, S]
  logits = jnp.where(rows(seen), logits, -jnp.inf)
  top = jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
  if sinks is not None:
    sinks = rows(sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1))
    top = jnp.maximum(top, sinks)
  top = jax.lax.stop_gradient(top)
  weights = jnp.exp(logits - top)  # [B, K, R, S]
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if sinks is not None:
    sink = jnp.exp(sinks - top)
    total += sink
  total = jnp.where(total > 0, total, 1.0)
  unrows = lambda x: x.reshape(B, N, T, -1).swapaxes(1, 2)  # [B, K, R, X] -> [B, T, N, X]
  h = None
  if entropy:  # H = log Z - sum p (logit - top), over the weights of keys and sink
    mean = jnp.sum(weights * jnp.where(weights > 0, logits - top, 0.0), axis=-1, keepdims=True)
    if sinks is not None:
      mean += sink * (sinks - top)
    h = unrows(jnp.log(total) - mean / total)[..., 0]
  if key is not None and dropout > 0:
    weights *= jax.random.bernoulli(key, 1 - dropout, weights.shape) / (1 - dropout)
  out = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
  return unrows(out.astype(v.dtype)), h
