"""Looped collective einsum: a gather or a scatter taken apart into hops, each beside a piece of the matmul.

For use in `jax.shard_map`. Each function is a ring of `ppermute`s over one mesh axis of n devices whose
pieces of matmul do not depend on the hop in flight, so that a compiler can run both at once (2211.05102,
section 3.5, after Wang et al., ASPLOS 2023). Three forms: "one_way", n - 1 hops in one direction of the
ring; "throughput", n - 1 hops of half the size in both directions; "latency", n / 2 hops in both directions,
with two pieces in memory.
"""

from collections.abc import Callable

import jax


def all_gather_einsum(product: Callable, x: jax.Array, axis: str, dim: int, form: str):
  """The einsum of all_gather(x, axis, dim), which sums over that dimension, and a weight that has all of it.

  product(part, start) is the einsum of a part of x and the rows of the weight that begin at `start`; it may
  return a tree of arrays.
  """
  n, me, size = jax.lax.axis_size(axis), jax.lax.axis_index(axis), x.shape[dim]
  add = lambda a, b: jax.tree.map(lambda a, b: a + b, a, b)
  start_of = lambda owner: (owner + n) % n * size  # the first row of the part that a device held in the beginning

  y = product(x, start_of(me))
  if form == "one_way":
    for hop in range(1, n):
      x = _pass_on(x, axis, -1)
      y = add(y, product(x, start_of(me + hop)))
  elif form == "throughput":
    half = size // 2
    left, right = jax.lax.slice_in_dim(x, 0, half, axis=dim), jax.lax.slice_in_dim(x, half, size, axis=dim)
    for hop in range(1, n):
      left, right = _pass_on(left, axis, -1), _pass_on(right, axis, 1)
      y = add(y, add(product(left, start_of(me + hop)), product(right, start_of(me - hop) + half)))
  else:
    left = right = x
    for hop in range(1, n // 2 + 1):
      left = _pass_on(left, axis, -1)
      y = add(y, product(left, start_of(me + hop)))
      if hop != n - hop:
        right = _pass_on(right, axis, 1)
        y = add(y, product(right, start_of(me - hop)))
  return y


def einsum_reduce_scatter(product: Callable, size: int, axis: str, dim: int, form: str) -> jax.Array:
  """psum_scatter over `axis` of an einsum whose result has `size` columns, a multiple of n, in dimension `dim`.

  product(start, length) is this device's summand of those columns.
  """
  n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  size //= n

  def ring(step: int, hops: int, start: int, length: int, add_last: bool = True):
    """Sums that travel `hops` devices in one direction, each to the device that keeps it.

    add_last: whether the receiving device adds its own summand.
    """
    summand = lambda left: product((me + step * left + n) % n * size + start, length)
    total = summand(hops)
    for left in range(hops - 1, -1, -1):
      total = _pass_on(total, axis, step)
      if left or add_last:
        total += summand(left)
    return total

  if form == "one_way":
    return ring(1, n - 1, 0, size)
  if form == "throughput":
    half = size // 2
    return jax.lax.concatenate([ring(1, n - 1, 0, half), ring(-1, n - 1, half, size - half)], dim)
  far = n // 2
  total = ring(1, far, 0, size)
  return total if n - 1 == far else total + ring(-1, n - 1 - far, 0, size, add_last=False)


def _pass_on(x: jax.Array, axis: str, step: int) -> jax.Array:
  """From every device to the one `step` further."""
  n = jax.lax.axis_size(axis)
  return jax.lax.ppermute(x, axis, [(i, (i + step) % n) for i in range(n)])
