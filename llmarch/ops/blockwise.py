"""Attention block by block: no [T, S] array is ever held, and a block of keys that no query sees costs no work.

This is FlashAttention (2205.14135, 2307.08691) in plain JAX: an online softmax over blocks of keys, and a backward
pass that computes the scores again from the log-sum-exp which the forward pass keeps. If a mesh axis splits the
length, the blocks of keys pass from device to device in a ring (2310.01889). `ops.attention.attend` is the oracle.

B batch, T queries, S keys, N query heads, K key-value heads, G = N/K; H and H' the head dims of keys and values.
A block has C tokens: [B, K, R = G C, H] of queries (a group's queries are rows of one matrix), [B, K, C, H] of keys.
"""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmarch.ops.attention import Extent, Keys, visible
from llmarch.sharding import is_automatic, with_active_layout


def block_length(length: int) -> int:
  """Tokens of a block: an eighth of the length, from 64 to 1024.

  Half of a block on the diagonal of a causal mask is masked, so large blocks waste work.
  """
  return min(length, 1024, max(64, length // 8))


class _Options(NamedTuple):
  """Options of `attend` that are the same for all blocks."""

  mask: Hashable  # a MaskConfig (layers/mask.py)
  window: int | None
  scale: float
  softcap: float | None
  bias: Callable | None = None  # maps table and key minus query position int32 [B, C, C] to f32 [B, N, C, C]
  entropy: bool = False
  ring: str | None = None  # the mesh axis that splits the length, in manual mode; None: not split
  skip: bool = True  # skips pairs of blocks in which no query sees a key


class _Held(NamedTuple):
  """Blocks of keys and values held by this device: [blocks, B, K, C, H], [blocks, B, K, C, H'], [blocks, B, C]."""

  k: jax.Array
  v: jax.Array
  keys: Keys


class _Softmax(NamedTuple):
  """The running softmax of blocks of queries, scaled so that the largest score so far has weight 1.

  Its arrays are f32 [blocks, B, K, R, ...].
  """

  out: jax.Array  # sum of weights times values
  top: jax.Array  # the largest score so far
  total: jax.Array  # sum of weights
  mean: jax.Array | None  # sum of weights times scores, for the entropy


def attend(
  q: jax.Array,  # [B, T, N, H]
  k: jax.Array,  # [B, K, S, H]
  v: jax.Array,  # [B, K, S, H']
  queries: Keys,  # [B, T]
  keys: Keys,  # [B, S]
  sinks: jax.Array | None,  # f32 [N]
  table: jax.Array | None = None,  # the first argument of `bias`
  *,
  block: int,
  which=None,  # the heads and the layer (mask.Heads), for masks that read them
  **options,
) -> tuple[jax.Array, jax.Array | None]:
  """softmax(scale q k^T + bias) v over the keys that a query sees.  -> [B, T, N, H'], entropy f32 [B, T, N] or None.

  `options` are the fields of `_Options`. As in `attention.attend`, a query that sees no key gets zeros, and the softmax
  is in f32. The entropy has no gradient. If the mask has an order of its own, tokens are sorted by it first, so that
  the keys that a query sees lie in few blocks.
  """
  order = options["mask"].order
  if order(queries.positions) is not None:
    q, queries, back = _sorted(order(queries.positions), q, queries, axis=1)
    (k, v), keys, _ = _sorted(order(keys.positions), (k, v), keys, axis=2)
    out, entropy = _in_blocks(q, k, v, queries, keys, sinks, table, block, which, options)
    return jax.tree.map(lambda x: _take(x, back, 1), (out, entropy))
  return _in_blocks(q, k, v, queries, keys, sinks, table, block, which, options)


def _sorted(order: jax.Array, tree, tokens: Keys, axis: int):
  """Sorts the tokens, and arrays with tokens along `axis`, by order int32 [B, T]; also returns the inverse order."""
  by = jnp.argsort(order, axis=1, stable=True)
  sort_along = lambda axis: lambda x: _take(x, by, axis)
  return jax.tree.map(sort_along(axis), tree), jax.tree.map(sort_along(1), tokens), jnp.argsort(by, axis=1)


def _take(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
  """Takes from x [B, ...], along an axis, the entries that index int32 [B, n] names for each row."""
  shape = [1] * x.ndim
  shape[0], shape[axis] = index.shape
  return jnp.take_along_axis(x, index.reshape(shape), axis)


def _in_blocks(q, k, v, queries: Keys, keys: Keys, sinks, table, block: int, which, options: dict):
  """`attend` for tokens in the order in which they are given."""
  B, T, N, H = q.shape
  K = k.shape[1]
  group = N // K
  in_groups = lambda x: x.reshape(B, -1, block, K, group, H).transpose(1, 0, 3, 4, 2, 5)
  to_rows = lambda x: in_groups(x).reshape(-1, B, K, group * block, H)
  to_keys = lambda x: x.reshape(B, K, -1, block, x.shape[-1]).transpose(2, 0, 1, 3, 4)
  q = to_rows(_padded(q, 1, block))
  held = _Held(*(to_keys(_padded(x, 2, block)) for x in (k, v)), _tokens(keys, block))
  sinks = jnp.full((N,), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
  sinks = jnp.repeat(sinks.reshape(K, group), block, axis=1)[..., None]  # [K, R, 1]
  options = _Options(**options)
  # In automatic mode over a mesh, the devices would need a collective for each block to agree on what to skip.
  options = options._replace(bias=options.bias and with_active_layout(options.bias), skip=not is_automatic())
  out, _, entropy = _attend(options, q, held, _tokens(queries, block), sinks, table, which)

  def from_rows(x):
    x = x.reshape(-1, B, K, group, block, x.shape[-1]).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, N, x.shape[-1])[:, :T]

  return from_rows(out), None if entropy is None else from_rows(entropy)[..., 0]


def _padded(x: jax.Array, axis: int, block: int, fill: int = 0) -> jax.Array:
  """Pads an axis to a whole number of blocks."""
  widths = [(0, -size % block if a == axis else 0) for a, size in enumerate(x.shape)]
  return jnp.pad(x, widths, constant_values=fill) if any(map(any, widths)) else x


def _tokens(keys: Keys, block: int) -> Keys:
  """Cuts tokens [B, T] into blocks [blocks, B, C], and fills the last block with padding."""
  to_blocks = lambda x, fill=0: _padded(x, 1, block, fill).reshape(x.shape[0], -1, block).swapaxes(0, 1)
  prefix = None if keys.prefix is None else to_blocks(keys.prefix)
  return Keys(to_blocks(keys.positions, -1), to_blocks(keys.segment_ids), prefix)


def _where_seen(options: _Options, queries: Keys, keys: Keys, which, kv_heads: int, work, carry):
  """work(carry, seen), or just the carry if no query of the one block can see a key of the other.

  seen is bool [B, 1 or K, 1 or G, C, C].
  """

  def work_on_seen(carry):
    seen = visible(queries, keys, mask=options.mask, window=options.window, which=which)  # [B, 1 or N, C, C]
    grouped = (1, 1) if seen.shape[1] == 1 else (kv_heads, seen.shape[1] // kv_heads)
    return work(carry, seen.reshape(seen.shape[0], *grouped, *seen.shape[2:]))

  if not options.skip:
    return work_on_seen(carry)
  worthwhile = may_see(queries, keys, mask=options.mask, window=options.window)
  return jax.lax.cond(worthwhile, work_on_seen, lambda carry: carry, carry)


def may_see(queries: Keys, keys: Keys, *, mask, window: int | None) -> jax.Array:
  """True if some query of a block may see some key of another (`attention.visible`); tokens are [B, C] each.

  The answer comes from the blocks' extreme positions and segments alone. That costs C steps a pair of blocks instead
  of C^2, so a row of T tokens is surveyed in T^2 / C steps. It may be true although no key is seen; then the pair of
  blocks is computed and adds nothing.
  """
  (q, q_segment), (k, k_segment) = map(_extents, (queries, keys))
  may = (q.high >= 0) & (k.high >= 0) & (q_segment.low <= k_segment.high) & (k_segment.low <= q_segment.high)
  may &= mask.may_see(q, k)
  if window is not None:
    may &= (q.low - k.high < window) & (k.low - q.high < window)
  return jnp.any(may)


def _extents(block: Keys) -> tuple[Extent, Extent]:
  """Bounds on a block's positions, and on its segments."""
  far, valid = jnp.iinfo(jnp.int32).max, block.positions >= 0
  low = lambda x: jnp.min(x, axis=1, where=valid, initial=far)
  high = lambda x: jnp.max(x, axis=1, where=valid, initial=-1)
  marked = jnp.zeros(block.positions.shape[:1], bool) if block.prefix is None else jnp.any(block.prefix & valid, axis=1)
  return tuple(Extent(low(x), high(x), marked) for x in (block.positions, block.segment_ids))


def _products(options: _Options, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scores before the bias, and their derivative with respect to q k^T, f32 [B, K, R, C] each."""
  scores = jnp.einsum("bkrh,bkch->bkrc", q, k, preferred_element_type=jnp.float32) * options.scale
  slope = options.scale
  if options.softcap is not None:
    bent = jnp.tanh(scores / options.softcap)
    scores, slope = options.softcap * bent, options.scale * (1 - bent * bent)
  return scores, slope


def _biases(options: _Options, queries: Keys, keys: Keys, shape: tuple[int, ...]) -> Callable:
  """Makes a function from the table to the biases f32 [B, K, R, C] of a pair of blocks."""
  distance = keys.positions[:, None, :] - queries.positions[:, :, None]
  B, K, R, C = shape
  grouped = lambda bias: bias.reshape(-1, K, R // C, C, C)
  return lambda table: jnp.broadcast_to(grouped(options.bias(table, distance)), (B, K, R // C, C, C)).reshape(shape)


def _masked(scores: jax.Array, seen: jax.Array) -> jax.Array:
  """Sets the scores of keys that are not seen to -inf."""
  B, K, _, C = scores.shape
  grouped = scores.reshape(B, K, -1, seen.shape[-2], C)
  return jnp.where(seen, grouped, -jnp.inf).reshape(scores.shape)


def _pass_on(options: _Options, tree):
  """Sends what this device holds to the next device of the ring."""
  n = jax.lax.axis_size(options.ring)
  return jax.lax.ppermute(tree, options.ring, [(i, (i + 1) % n) for i in range(n)])


def _fold(options: _Options, state: _Softmax, q: jax.Array, held: _Held, queries: Keys, table, which) -> _Softmax:
  """Adds all blocks of keys that this device holds to the softmax of every block of queries."""

  def fold_queries(_, turn):
    state, q, queries = turn

    def step(state, turn):
      i, keys = turn

      def work(state, seen):
        k, v = held.k[i], held.v[i]  # indexed here and not scanned over, so that skipped blocks are not copied
        scores, _ = _products(options, q, k)
        if options.bias is not None:
          scores += _biases(options, queries, keys, scores.shape)(table)
        scores = _masked(scores, seen)
        top = jnp.maximum(state.top, jnp.max(scores, axis=-1, keepdims=True))
        finite = jnp.where(top == -jnp.inf, 0.0, top)
        weights, shrink = jnp.exp(scores - finite), jnp.exp(state.top - finite)
        more = jnp.einsum("bkrc,bkch->bkrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        total = state.total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        mean = state.mean
        if options.entropy:
          products = jnp.where(weights > 0, weights * scores, 0.0)
          mean = mean * shrink + jnp.sum(products, axis=-1, keepdims=True)
        return _Softmax(state.out * shrink + more, top, total, mean)

      return _where_seen(options, queries, keys, which, held.k.shape[2], work, state), None

    return None, jax.lax.scan(step, state, (np.arange(len(held.k)), held.keys))[0]

  return jax.lax.scan(fold_queries, None, (state, q, queries))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q, held: _Held, queries: Keys, sinks, table, which):
  """-> out [blocks, B, K, R, H']; log-sum-exp f32 [blocks, B, K, R, 1], 0 if no key is seen; entropy of that shape."""
  rows = q.shape[:-1]
  # The sink counts as a key with the value zero that every query saw before all others.
  top = jnp.broadcast_to(sinks, (*rows, 1))
  seen = top > -jnp.inf
  mean = jnp.where(seen, top, 0.0) if options.entropy else None
  state = _Softmax(jnp.zeros((*rows, held.v.shape[-1]), jnp.float32), top, seen.astype(jnp.float32), mean)

  def turn(carry, _):
    state, held = carry
    following = _pass_on(options, held)  # these keys travel while the device works on those it holds
    return (_fold(options, state, q, held, queries, table, which), following), None

  if options.ring is not None:
    (state, held), _ = jax.lax.scan(turn, (state, held), None, length=jax.lax.axis_size(options.ring) - 1)
  state = _fold(options, state, q, held, queries, table, which)
  total = jnp.where(state.total > 0, state.total, 1.0)
  lse = jnp.where(state.top == -jnp.inf, 0.0, state.top) + jnp.log(total)
  return (state.out / total).astype(held.v.dtype), lse, lse - state.mean / total if options.entropy else None


def _forward(options, q, held, queries, sinks, table, which):
  out, lse, entropy = _attend(options, q, held, queries, sinks, table, which)
  return (out, lse, entropy), (q, held, queries, sinks, table, which, out, lse)


def _backward(options, kept, gradient):
  """Gradients by algorithm 2 of 2307.08691, with P the weights, O the output and L the log-sum-exp.

  dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = dS K, dK = dS^T Q. A sink's weight is exp(sink - L), and its value
  is zero. In a ring, the gradients of keys and values travel together with the keys and values.
  """
  q, held, queries, sinks, table, which, out, lse = kept
  grad, *_ = gradient  # the log-sum-exp and the entropy have no gradient
  own = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

  def fold(carry, held: _Held):
    dq, dtable, dk, dv = carry

    def fold_keys(carry, turn):
      dq, dtable = carry
      k, v, keys, dk, dv = turn

      def step(carry, turn):
        q, queries, grad, lse, own, dq = turn

        def work(carry, seen):
          dk, dv, dtable, dq = carry
          scores, slope = _products(options, q, k)
          if options.bias is not None:
            bias, of_bias = jax.vjp(_biases(options, queries, keys, scores.shape), table)
            scores += bias
          weights = jnp.exp(_masked(scores, seen) - lse)
          dv += jnp.einsum("bkrc,bkrh->bkch", weights.astype(grad.dtype), grad, preferred_element_type=jnp.float32)
          dp = jnp.einsum("bkrh,bkch->bkrc", grad, v, preferred_element_type=jnp.float32)
          ds = weights * (dp - own)
          if options.bias is not None:
            dtable = jax.tree.map(jnp.add, dtable, of_bias(ds)[0])
          ds = (ds * slope).astype(q.dtype)
          dq += jnp.einsum("bkrc,bkch->bkrh", ds, k, preferred_element_type=jnp.float32)
          dk += jnp.einsum("bkrc,bkrh->bkch", ds, q, preferred_element_type=jnp.float32)
          return dk, dv, dtable, dq

        *carry, dq = _where_seen(options, queries, keys, which, k.shape[1], work, (*carry, dq))
        return tuple(carry), dq

      (dk, dv, dtable), dq = jax.lax.scan(step, (dk, dv, dtable), (q, queries, grad, lse, own, dq))
      return (dq, dtable), (dk, dv)

    (dq, dtable), (dk, dv) = jax.lax.scan(fold_keys, (dq, dtable), (*held, dk, dv))
    return dq, dtable, dk, dv

  def turn(carry, _):
    *mine, dk, dv, held = carry
    following = _pass_on(options, held)
    *mine, dk, dv = fold((*mine, dk, dv), held)
    return (*mine, *_pass_on(options, (dk, dv)), following), None

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  carry = zeros(q), jax.tree.map(zeros, table), zeros(held.k), zeros(held.v)
  if options.ring is not None:
    n = jax.lax.axis_size(options.ring)
    (*carry, last), _ = jax.lax.scan(turn, (*carry, held), None, length=n - 1)
    dq, dtable, *dkv = fold(tuple(carry), last)
    dk, dv = _pass_on(options, tuple(dkv))  # the last step brings the gradients to the device that owns the keys
  else:
    dq, dtable, dk, dv = fold(carry, held)
  dsinks = -jnp.sum(jnp.exp(sinks - lse) * own, axis=(0, 1))
  cast_like = lambda g, x: g.astype(x.dtype)
  dheld = _Held(cast_like(dk, held.k), cast_like(dv, held.v), None)
  return cast_like(dq, q), dheld, None, dsinks, jax.tree.map(cast_like, dtable, table), None


_attend.defvjp(_forward, _backward)
