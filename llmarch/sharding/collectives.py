"""Collectives inside a `jax.shard_map`, derived from where an array lies and where it is wanted.

Functions take the axes of each dimension, the major axis first, and the mesh as {axis: size} in its own order. They
know nothing of layouts.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmarch.errors import check

Axes = tuple[str, ...]  # mesh axes of one dimension, the major one first
Sizes = Mapping[str, int]


def redistribute(x: jax.Array, have: Sequence[Axes], want: Sequence[Axes], sizes: Sizes) -> jax.Array:
  """Moves this device's part of an array that is split as `have` to that of the array split as `want`.

  For each mesh axis: one that no dimension had is a slice; one that goes to another dimension is an all-to-all (all
  that go together in one); one that goes nowhere is an all-gather, the minor axis first; and where only the order of
  axes differs, it is a permutation of devices. [batch, embed.xzy] -> [batch.z, embed.x]: an all-gather over y, and an
  all-to-all over z.
  """
  have, home = [tuple(h) for h in have], {a: d for d, axes in enumerate(want) for a in axes}
  held = {a for axes in have for a in axes}
  new = [tuple(a for a in axes if a not in held) for axes in want]
  for d in range(x.ndim):  # slices come first: less is left to move
    if x.shape[d] % _parts(new[d], sizes) == 0:
      x, have[d], new[d] = _slice(x, d, new[d], sizes), have[d] + new[d], ()
  for d in range(x.ndim):
    stay = tuple(a for a in want[d] if a in have[d])
    leave = [a for a in have[d] if a not in want[d]]
    leave.sort(key=lambda a: home.get(a, -1))  # a stable sort: axes with one destination lie together
    x = _reorder(x, d, have[d], stay + tuple(leave), sizes)
    while leave:
      to = home.get(leave[-1])
      together = tuple(a for a in leave if home.get(a) == to)
      leave = leave[: -len(together)]
      if to is not None and to > d and have[to] and x.shape[to] % _parts(together, sizes):
        # Dimension `to` has axes that are yet to leave it, so it is too short now: gather, and slice at the end.
        new[to], to = new[to] + together, None
      if to is None:
        for a in reversed(together):
          x = jax.lax.all_gather(x, a, axis=d, tiled=True)
      else:
        _check_divides(x, to, together, sizes)
        x = jax.lax.all_to_all(x, together, split_axis=to, concat_axis=d, tiled=True)
        have[to] += together
    have[d] = stay
  for d in range(x.ndim):
    x = _reorder(_slice(x, d, new[d], sizes), d, have[d] + new[d], tuple(want[d]), sizes)
  return x


def reduce(x: jax.Array, pending: Axes, have: Sequence[Axes], want: Sequence[Axes], sizes: Sizes) -> jax.Array:
  """Sums over the mesh axes `pending`, of which every device holds a part of the sum, and moves to `want`.

  An axis that `want` gives to a dimension is a reduce-scatter into it, one axis at a time (a compiler for
  TPUs keeps no other); the others are one all-reduce.
  """
  early = [tuple(a for a in axes if a not in pending) for axes in want]
  x, have = redistribute(x, have, early, sizes), early
  rest = tuple(a for a in pending if not any(a in axes for axes in want))
  for d, axes in enumerate(want):
    for a in axes:
      if a in pending:
        x = _scatter(x, d, a, sizes)
        have[d] += (a,)
  if rest:
    x = jax.lax.psum(x, rest)
  return redistribute(x, have, want, sizes)


def _scatter(x: jax.Array, d: int, axis: str, sizes: Sizes) -> jax.Array:
  _check_divides(x, d, (axis,), sizes)
  # The parts in front: a TPU compiler makes an all-reduce, twice the bytes, of a scatter whose parts are not
  # a multiple of 512 bytes in the minor dimension (libtpu 0.0.42, v4 to v6e).
  pieces = x.reshape(*x.shape[:d], sizes[axis], -1, *x.shape[d + 1 :])
  return jax.lax.psum_scatter(jnp.moveaxis(pieces, d, 0), axis, scatter_dimension=0)


def _parts(axes: Axes, sizes: Sizes) -> int:
  return math.prod(sizes[a] for a in axes)


def _check_divides(x: jax.Array, d: int, axes: Axes, sizes: Sizes) -> None:
  n = _parts(axes, sizes)
  check(
    x.shape[d] % n == 0,
    f"a dimension of {x.shape[d]} (on each device, of {list(x.shape)}) cannot be split over mesh axes"
    f" {'*'.join(axes)}={n}; make the batch, the heads or d_ff a larger multiple, or choose another mesh or layout",
  )


def _slice(x: jax.Array, d: int, axes: Axes, sizes: Sizes) -> jax.Array:
  if not axes:
    return x
  _check_divides(x, d, axes, sizes)
  n = x.shape[d] // _parts(axes, sizes)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * n, n, axis=d)


def _reorder(x: jax.Array, d: int, have: Axes, want: Axes, sizes: Sizes) -> jax.Array:
  """The same split with another order of axes: each device passes its part on to one other."""
  if have == want:
    return x
  axes = tuple(a for a in sizes if a in want)  # ppermute counts devices in the mesh's order, whatever it is told
  devices = np.arange(_parts(want, sizes)).reshape([sizes[a] for a in axes])
  # The devices in the order of the parts that they hold, and in the order of those that they are to hold.
  holds, gets = (devices.transpose([axes.index(a) for a in order]).ravel().tolist() for order in (have, want))
  return jax.lax.ppermute(x, axes, list(zip(holds, gets, strict=True)))
