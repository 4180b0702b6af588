"""Recurrences over the tokens of a row: the tokens that share a state, and linear attention in chunks.

B batch, T tokens of this call, N heads, P dims of a key's features, R dims of a value, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp


def documents(
  positions: jax.Array, segment_ids: jax.Array, last_segment: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Numbers the documents of a call, for states that must not pass from one document to the next.

  positions and segment_ids are int32 [B, T]; last_segment int32 [B] is the segment of each row's last real token before
  this call (None: there is no state). Returns int32 [B, T] and int32 [B]. The first is 0 for tokens that continue with
  the state of the call before, 1, 2, ... for those of documents that begin in this call, and -1 for padding; the second
  is the segment of the last real token.

  A document begins at position 0, and wherever the segment differs from that of the real token before.

    positions    3  4 -1  0  1  0        segment_ids  7  7  9  7  7  8        last_segment  7
    documents    0  0 -1  1  1  2        last segment after the call: 8
  """
  real = positions >= 0
  start = segment_ids[:, :1] if last_segment is None else last_segment[:, None]
  # The segment of the last real token up to each. (A gather at its index makes XLA's partitioner abort in a pipeline
  # whose mesh splits the batch and the length.)
  later = lambda a, b: (a[0] | b[0], jnp.where(b[0], b[1], a[1]))
  any_real, segment = jax.lax.associative_scan(later, (real, segment_ids), axis=1)
  newest = jnp.where(any_real, segment, start)
  before = jnp.concatenate([start, newest[:, :-1]], axis=1)
  begins = real & ((positions == 0) | (segment_ids != before))
  return jnp.where(real, jnp.cumsum(begins, axis=1), -1), newest[:, -1]


def linear_attention(
  q: jax.Array,  # [B, T, N, P]
  k: jax.Array,  # [B, T, N, P]
  v: jax.Array,  # [B, T, N, R]
  document: jax.Array,  # int32 [B, T], from `documents`
  state: jax.Array,  # f32 [B, N, P, R + 1], the state of document 0
  *,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """y_t = f(q_t) S_t / f(q_t) z_t with f(x) = elu(x) + 1 (2006.16236, equations 7 to 12).

  S_t is the sum of f(k_s) v_s^T, and z_t of f(k_s), over the s <= t of t's document. Returns y [B, T, N, R] in v's
  dtype, and the state after the call, which is S with z as one more column. Within a chunk the sum is a masked product
  of the chunk with itself, and the state adds all chunks before it: T C + T P multiply-adds for each head and value
  dimension, all in f32.
  """
  B, T, N, R = v.shape
  C = min(chunk, T)
  features = lambda x: jax.nn.elu(x.astype(jnp.float32)) + 1
  values = jnp.concatenate([v.astype(jnp.float32), jnp.ones((B, T, N, 1), jnp.float32)], axis=-1)
  pad = lambda x, fill: jnp.pad(x, ((0, 0), (0, -T % C)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
  in_chunks = lambda x, fill=0: jnp.moveaxis(pad(x, fill).reshape(B, -1, C, *x.shape[2:]), 1, 0)

  def step(carry, chunk_inputs):
    S, held = carry  # the state, and the number of the document that it belongs to
    q, k, v, document = chunk_inputs
    same = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, None, :] & jnp.tri(C, dtype=bool)
    weights = jnp.einsum("btnp,bsnp->bnts", q, k) * same[:, None]
    y = jnp.einsum("bnts,bsnr->btnr", weights, v)
    goes_on = (document == held[:, None])[:, :, None, None]
    y += jnp.where(goes_on, jnp.einsum("btnp,bnpr->btnr", q, S), 0.0)
    newest = jnp.maximum(held, jnp.max(document, axis=1))
    mine = (document == newest[:, None])[:, :, None, None]
    S = jnp.where((newest == held)[:, None, None, None], S, 0.0)
    S += jnp.einsum("btnp,btnr->bnpr", jnp.where(mine, k, 0.0), v)
    return (S, newest), y

  inputs = in_chunks(features(q)), in_chunks(features(k)), in_chunks(values), in_chunks(document, -1)
  (state, _), y = jax.lax.scan(step, (state, jnp.zeros((B,), jnp.int32)), inputs)
  y = jnp.moveaxis(y, 0, 1).reshape(B, -1, N, R + 1)[:, :T]
  total = y[..., -1:]
  return (y[..., :-1] / jnp.where(total > 0, total, 1.0)).astype(v.dtype), state
