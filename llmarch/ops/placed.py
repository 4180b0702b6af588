"""Products of activations and weights in manual mode: from what lies where, to the collectives.

Inside a `jax.shard_map` this device holds a part of the input x and of the weight w. Three rules, in order:

1. The weight is gathered over the mesh axes that split the tokens: all tokens meet the same weight. (If the result is
   to be split over a free mesh axis, the weight's output dimension is sliced first.)
2. The input is gathered over the mesh axes by which a summed dimension is split further in x than in w.
3. The local product is then partial over the mesh axes that split the summed dimensions. It is summed into the place
   of the result: a reduce-scatter over each axis that splits the result there, an all-reduce over the others.

An example: the two products of a feed-forward with d_model 16, mlp 64 and 8 tokens, on a mesh x=2, y=2, z=2.

  ws_2d, where no mesh axis splits the tokens and rule 1 has nothing to do:
    x    [batch, length, embed.x]      8 x  8
    up   [embed.x, mlp.zy]             8 x 16   -> 8 x 16, partial over x
    rule 3: reduce-scatter over x               -> [batch, length, mlp.zyx]   8 x 8
    down [mlp.zy, embed.x]            16 x  8   mlp is split further in the input than here
    rule 2: all-gather the input over x         -> [batch, length, mlp.zy]    8 x 16
    the product                                 -> 8 x 8, partial over z, y
    rule 3: reduce-scatter over z, then y       -> [batch, length, embed.xzy] 8 x 2

  wg_xy, where x and y split the batch:
    x    [batch.xy, length, embed]     2 x 16
    up   [embed.x, mlp.zy]             8 x 16
    rule 1: all-gather the weight over x, y     -> [embed, mlp.z]            16 x 32
    the product is complete                     -> [batch.xy, length, mlp.z]  2 x 32
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from llmarch import sharding
from llmarch.ops import quant
from llmarch.ops.collective_einsum import all_gather_einsum, einsum_reduce_scatter
from llmarch.ops.matmul import (
  Product,
  Weight,
  letters,
  multiply,
  place_of_result,
  rows_of,
  stored_at,
  value_of,
  with_one_sum,
)
from llmarch.ops.quant import QTensor
from llmarch.sharding import BRANCH, NORMED, RESIDUAL, TOKENS, Axis, Partial

Axes = tuple[str, ...]  # the mesh axes of one dimension, the major one first


def products(x: jax.Array, ps: Sequence[Product]) -> list[jax.Array | Partial]:
  """Products of one x, in manual mode without rings. x is gathered once for them all."""
  operands = _Operands(x, ps)
  x = operands.gathered()
  return [_scattered(x, *operands.of(i)) for i in range(len(ps))]


def products_in_rings(x: jax.Array, ps: Sequence[Product], form: str) -> list[jax.Array | Partial]:
  """`products` with rings: the first gather of x, or else the first scatter of a result, goes hop by hop, each hop
  beside a piece of the matmul. What a product leaves partial is summed at once."""
  operands = _Operands(x, ps)
  if not operands.gathers:
    x = operands.gathered()
    return [_scattered_in_ring(x, *operands.of(i), form) for i in range(len(ps))]
  d, axis = operands.gathers[0]
  x = operands.gathered(but=(d, axis))
  flat = [with_one_sum(p.subscripts, x, w) for p, w, *_ in map(operands.of, range(len(ps)))]

  def piece(part, start):
    cut = lambda subscripts, w: rows_of(w, letters(subscripts)[1].index(operands.lhs[2]), start, part.shape[2])
    return [multiply(subscripts, part, cut(subscripts, w), jnp.float32) for subscripts, _, w in flat]

  ys = all_gather_einsum(piece, flat[0][1], axis, 2, form)
  dtype = operands.x.dtype
  return [
    _summed(y.astype(p.out_dtype or dtype), *_sums(p, w_axes, tokens), p, at_once=True)
    for y, (p, _, w_axes, tokens) in zip(ys, map(operands.of, range(len(ps))), strict=True)
  ]


class _Operands:
  """The operands of products of one x: where x lies, the weights after rule 1, and where rule 2 wants x."""

  def __init__(self, x: jax.Array, ps: Sequence[Product]):
    self.ps = ps
    self.lhs, rhs, _ = letters(ps[0].subscripts)
    place = input_place(ps[0])
    self.have = [sharding.mesh_axes(a) for a in place]
    # The input of a branch comes from the residual stream, whose length may be split further than a branch's.
    source = [sharding.mesh_axes(a) for a in source_of(place)]
    self.x = sharding.redistribute(x, source, self.have, sharding.mesh_sizes())
    self.weights = [_weight_for(p, dict(zip(self.lhs, self.have, strict=True))) for p in ps]
    summed = dict(zip(rhs, self.weights[0][1], strict=True))
    self.want = [summed.get(c, axes) for c, axes in zip(self.lhs, self.have, strict=True)]
    # The gathers of rule 2: (dimension, the first of the mesh axes that it gathers).
    self.gathers = [
      (d, a[len(b)]) for d, (a, b) in enumerate(zip(self.have, self.want, strict=True)) if len(a) > len(b)
    ]

  def of(self, i: int) -> tuple[Product, Weight, list[Axes], list[Axes]]:
    """The i-th product, its weight, the mesh axes of the weight's dimensions, and those of the tokens."""
    return self.ps[i], *self.weights[i], self.have[:2]

  def gathered(self, but: tuple[int, str] | None = None) -> jax.Array:
    """x after rule 2. but: a (dimension, mesh axis) that is not gathered."""
    left = lambda d: (but[1],) if but and but[0] == d else ()
    want = [axes + left(d) for d, axes in enumerate(self.want)]
    return sharding.redistribute(self.x, self.have, want, sharding.mesh_sizes())


def input_place(p: Product) -> list[Axis]:
  """The place in which a product reads its input, after the weight's axes: "btd,df->btf" reads at BRANCH."""
  lhs, rhs, _ = letters(p.subscripts)
  names = dict(zip("bt", p.tokens)) | {
    c: sharding.name_in_input(name) for c, name in zip(rhs, p.w.axes, strict=True)
  }
  return [names[c] for c in lhs]


def source_of(place: Sequence[Axis]) -> Sequence[Axis]:
  """Returns where an input lies before its products read it at `place`: a branch's at NORMED, others are there."""
  return NORMED if tuple(place) == BRANCH else place


# --------------------------------------------------------------------------------------------- rule 1: weights


def weight_at_tokens(w) -> tuple[Weight, list[Axes]]:
  """A weight gathered over the mesh axes that split the tokens, and the axes over which its dimensions then lie."""
  return _moved(w, _at_use(w, TOKENS))


def _at_use(w, tokens: Sequence[Axis]) -> list[Axes]:
  """The mesh axes of a weight's dimensions once it is gathered over those that split these tokens."""
  busy = sharding.mesh_axes(tokens[0]) + sharding.mesh_axes(tokens[1])
  return [tuple(a for a in axes if a not in busy) for axes in sharding.mesh_axes_of(stored_at(w))]


def _weight_for(p: Product, x_axes: Mapping[str, Axes]) -> tuple[Weight, list[Axes]]:
  """A weight where its product wants it, and the axes over which its dimensions then lie.

  Axes that x and the result share lie as in x. An output axis is sliced before the matmul if the result is split that
  way anyway, so no device computes columns it would drop.
  """
  lhs, rhs, out = letters(p.subscripts)
  axes = dict(zip(rhs, _at_use(p.w, p.tokens), strict=True))
  axes |= {c: x_axes[c] for c in rhs if c in lhs and c in out}
  used = {a for c, has in {**x_axes, **axes}.items() for a in has}
  for c, want in zip(out, _result_axes(p), strict=True):
    free = c in rhs and c not in lhs and not p.partial and want[: len(axes[c])] == axes[c]
    if free and not used & set(want[len(axes[c]) :]):
      axes[c] = want
  return _moved(p.w, [axes[c] for c in rhs])


def _moved(w, want: list[Axes]) -> tuple[Weight, list[Axes]]:
  """A weight's value moved from where it is stored to `want`, and `want`."""
  have, sizes = sharding.mesh_axes_of(stored_at(w)), sharding.mesh_sizes()
  value = value_of(w)
  if not isinstance(value, QTensor):
    return sharding.redistribute(value, have, want, sizes), want
  # A scale that serves a whole dimension is on every device that has a part of it.
  summed = [w.axes.index(name) for name in w.fan_in]
  scales = quant.scale_shape(w.sizes, summed, value.format)
  split = lambda axes: [a if size > 1 else () for a, size in zip(axes, scales, strict=True)]
  codes = sharding.redistribute(value.codes, have, want, sizes)
  scale = sharding.redistribute(value.scale, split(have), split(want), sizes)
  return QTensor(codes, scale, value.format), want


# --------------------------------------------------------------------------------------------- rule 3: results


def _scattered(x: jax.Array, p: Product, w: Weight, w_axes: list[Axes], tokens: list[Axes]) -> jax.Array | Partial:
  """A product whose x is gathered, in its place."""
  return _summed(multiply(p.subscripts, x, w, p.out_dtype), *_sums(p, w_axes, tokens), p, at_once=False)


def _scattered_in_ring(
  x: jax.Array, p: Product, w: Weight, w_axes: list[Axes], tokens: list[Axes], form: str
) -> jax.Array | Partial:
  """A product whose x is gathered, in its place; the first scatter is a ring, where there is one."""
  pending, have = _sums(p, w_axes, tokens)
  _, rhs, out = letters(p.subscripts)
  scatters = [(d, a) for d, axes in enumerate(_result_axes(p)) for a in axes if a in pending]
  if not scatters or out[scatters[0][0]] not in rhs:
    return _summed(multiply(p.subscripts, x, w, p.out_dtype), pending, have, p, at_once=True)
  d, axis = scatters[0]
  dim = rhs.index(out[d])
  piece = lambda start, n: multiply(p.subscripts, x, rows_of(w, dim, start, n), jnp.float32)
  y = einsum_reduce_scatter(piece, w.shape[dim], axis, d, form).astype(p.out_dtype or x.dtype)
  have[d] += (axis,)
  return _summed(y, tuple(a for a in pending if a != axis), have, p, at_once=True)


def _sums(p: Product, w_axes: list[Axes], tokens: list[Axes]) -> tuple[Axes, list[Axes]]:
  """The mesh axes over which a local product is partial, and those that split its dimensions."""
  lhs, rhs, out = letters(p.subscripts)
  axes = dict(zip(rhs, w_axes, strict=True)) | dict(zip("bt", tokens, strict=True))
  return tuple(a for c in rhs if c in lhs and c not in out for a in axes[c]), [axes[c] for c in out]


def _result_axes(p: Product) -> list[Axes]:
  """The mesh axes of the result's dimensions, in its place."""
  return [sharding.mesh_axes(a) for a in (RESIDUAL if p.partial else place_of_result(p))]


def _summed(y: jax.Array, pending: Axes, have: list[Axes], p: Product, *, at_once: bool) -> jax.Array | Partial:
  """A local product, partial over `pending`, in the place of its result, with its bias. Unless `at_once`, a sum that
  the product leaves partial stays so."""
  left = pending if p.partial and not at_once else ()
  want = have if left else _result_axes(p)
  if not left:
    y = sharding.reduce(y, pending, have, want, sharding.mesh_sizes())
  if p.bias is not None:
    stored = [sharding.mesh_axes(a) for a in stored_at(p.bias)]
    bias = sharding.redistribute(value_of(p.bias), stored, want[-len(stored) :], sharding.mesh_sizes()).astype(y.dtype)
    # One of the devices that hold summands has the bias in its own.
    y = y + (jnp.where(sharding.part_index(left) == 0, bias, 0) if left else bias)
  return Partial(y, left) if p.partial else y


def lookup(table, ids: jax.Array, dtype, to: Sequence[Axis]) -> jax.Array:
  """Rows of a table [V, D] at int32 ids [B, T], in manual mode: each device looks up the ids whose rows it holds, and
  has zeros for the others in its part of the sum."""
  value, (rows, columns) = weight_at_tokens(table)
  ids = ids - sharding.part_index(rows) * value.shape[0]
  mine = (ids >= 0) & (ids < value.shape[0])
  y = jnp.where(mine[..., None], value[jnp.where(mine, ids, 0)].astype(dtype), 0)
  have = [*map(sharding.mesh_axes, TOKENS), columns]
  return sharding.reduce(y, rows, have, [sharding.mesh_axes(a) for a in to], sharding.mesh_sizes())
