"""The matmul of every layer, and the look-up of every table; the one place where weights meet activations.

In manual mode (see sharding.py) this device holds a part of each operand, and what the layout's row says of
their logical axes decides the collectives: weights are gathered over the mesh axes that split the batch,
activations over those by which they are split further than the weight they meet, and partial sums are
scattered into the place that the result is to have.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmarch import sharding
from llmarch.config import check
from llmarch.ops import quant
from llmarch.ops.collective_einsum import all_gather_einsum, einsum_reduce_scatter
from llmarch.ops.quant import QTensor
from llmarch.sharding import Axis

# What the dimensions of weights are called in the activations that leave them, and that enter them.
LEAVES = {name: f"act_{name}" for name in ("embed", "heads", "kv_heads", "mlp", "vocab")}
ENTERS = LEAVES | {"embed": "post_norm_embed"}
RESIDUAL = ("batch", "length", "act_embed")


class Product(NamedTuple):
  """One einsum of activations and a weight; see `einsum`."""

  subscripts: str
  w: object
  bias: object = None
  to: Sequence[Axis] | None = None
  partial: bool = False
  out_dtype: str | None = None


def einsum(subscripts: str, x: jax.Array, w, **options) -> jax.Array:
  """`jnp.einsum` of activations x [B, T, ...] and a weight, plus a bias; accumulated in f32 at least.

  Subscripts name batch and length "bt" first in x and in the result: "btd,dnh->btnh". The weight (a Param,
  or an array where there is no layout) is cast to x's dtype. The result has that dtype, or `out_dtype`
  without a rounding in between (logits are f32). Its place is `to`, by default after the weight's axes;
  `partial` leaves the sum over the mesh to `finish`, so that branches can be added before they are summed.
  """
  return einsums(x, Product(subscripts, w, **options))[0]


def einsums(x: jax.Array, *products: Product) -> list[jax.Array]:
  """Several einsums of the same dimensions of one x, which is gathered once for them all."""
  if not sharding.manual():
    return [_automatic(x, p) for p in products]
  lhs, rhs, _ = _letters(products[0].subscripts)
  names = {"b": "batch", "t": "length"} | {
    c: ENTERS.get(name, name) for c, name in zip(rhs, products[0].w.axes, strict=True)
  }
  weights = [_unsplit_batch(p.w) for p in products]
  have = [sharding.mesh_axes(names[c]) for c in lhs]
  summed = dict(zip(rhs, weights[0][1], strict=True))
  want = [summed.get(c, axes) for c, axes in zip(lhs, have, strict=True)]
  rings = [(d, a[len(b)]) for d, (a, b) in enumerate(zip(have, want, strict=True)) if len(a) > len(b)]
  if not rings or not sharding.loop():
    x = sharding.relay(x, have, want)
    return [_scattered(x, have[:2], p, *weight) for p, weight in zip(products, weights, strict=True)]

  d, axis = rings[0]
  x = sharding.relay(x, have, [axes + (axis,) * (i == d) for i, axes in enumerate(want)])
  flat = [_with_one_sum(p.subscripts, x, w) for p, (w, _) in zip(products, weights, strict=True)]

  def product(part, start):
    cut = lambda s, w: _cut(w, _letters(s)[1].index(lhs[2]), start, part.shape[2])
    return [_matmul(s, part, cut(s, w), jnp.float32) for s, _, w in flat]

  ys = all_gather_einsum(product, flat[0][1], axis, 2, sharding.loop())
  return [
    _reduced(y.astype(p.out_dtype or x.dtype), *_sums(have[:2], p, axes), p)
    for y, p, (_, axes) in zip(ys, products, weights, strict=True)
  ]


def _automatic(x: jax.Array, p: Product) -> jax.Array:
  y = _matmul(p.subscripts, x, _value(p.w), p.out_dtype)
  y = y if p.bias is None else y + _value(p.bias).astype(y.dtype)
  return y if p.partial or not hasattr(p.w, "axes") else sharding.shard(y, *(p.to or _leaving(p)))


def _scattered(x: jax.Array, tokens: list, p: Product, w, w_axes: list) -> jax.Array:
  """A product whose x is gathered, in its place. The first scatter may be a ring."""
  pending, have = _sums(tokens, p, w_axes)
  _, rhs, out = _letters(p.subscripts)
  scatters = [(d, a) for d, axes in enumerate(_want(p)) for a in axes if a in pending]
  if not scatters or not sharding.loop() or out[scatters[0][0]] not in rhs:
    return _reduced(_matmul(p.subscripts, x, w, p.out_dtype), pending, have, p)
  d, axis = scatters[0]
  dim = rhs.index(out[d])
  product = lambda start, n: _matmul(p.subscripts, x, _cut(w, dim, start, n), jnp.float32)
  y = einsum_reduce_scatter(product, w.shape[dim], axis, d, sharding.loop()).astype(p.out_dtype or x.dtype)
  have[d] += (axis,)
  return _reduced(y, tuple(a for a in pending if a != axis), have, p)


def _sums(tokens: list, p: Product, w_axes: list) -> tuple[tuple[str, ...], list]:
  """The mesh axes over which a local product is still to be summed, and those that split its dimensions."""
  lhs, rhs, out = _letters(p.subscripts)
  axes = dict(zip(rhs, w_axes, strict=True)) | dict(zip("bt", tokens, strict=True))
  return tuple(a for c in rhs if c in lhs for a in axes[c]), [axes[c] for c in out]


def _want(p: Product) -> list[tuple[str, ...]]:
  return [sharding.mesh_axes(a) for a in p.to or _leaving(p)]


def _reduced(y: jax.Array, pending: tuple[str, ...], have: list, p: Product) -> jax.Array:
  """A local product summed, in its place, with its bias."""
  leave = p.partial and not sharding.loop()
  want = have if leave else _want(p)
  if not leave:
    y = sharding.reduce(y, pending, have, want)
  if p.bias is None:
    return y
  stored = [sharding.mesh_axes(a) for a in _stored(p.bias)]
  bias = sharding.relay(_value(p.bias), stored, want[-len(stored) :]).astype(y.dtype)
  return y + (jnp.where(sharding.index(pending) == 0, bias, 0) if leave else bias)  # one of the summands has it


def finish(y: jax.Array, inner: str) -> jax.Array:
  """Sums what `einsum(..., partial=True)` left, over the mesh axes of the weight's summed dimension `inner`.

  y [B, T, D] -> the same in the residual stream's place.
  """
  if not sharding.manual() or sharding.loop():  # a ring has summed already
    return y
  keep = lambda name: tuple(a for a in sharding.mesh_axes(name) if a not in _busy())
  have = [sharding.mesh_axes("batch"), sharding.mesh_axes("length"), keep("embed")]
  return sharding.reduce(y, keep(inner), have, [sharding.mesh_axes(a) for a in RESIDUAL])


def lookup(table, ids: jax.Array, dtype) -> jax.Array:
  """Rows of a table [V, D] at int32 ids [B, T] -> [B, T, D] in the residual stream's place, cast to dtype."""
  if not sharding.manual():
    return sharding.shard(_value(table)[ids].astype(dtype), *RESIDUAL)
  value, (rows, columns) = _unsplit_batch(table)
  # Each device looks up the ids that it holds; the others' rows are zero in its part of the sum.
  ids = ids - sharding.index(rows) * value.shape[0]
  mine = (ids >= 0) & (ids < value.shape[0])
  y = jnp.where(mine[..., None], value[jnp.where(mine, ids, 0)].astype(dtype), 0)
  have = [sharding.mesh_axes("batch"), sharding.mesh_axes("length"), columns]
  return sharding.reduce(y, rows, have, [sharding.mesh_axes(a) for a in RESIDUAL])


def _with_one_sum(subscripts: str, x: jax.Array, w: jax.Array | QTensor):
  """The same einsum with the dimensions that it sums over as one: XLA would transpose the matrix to sum over two."""
  lhs, rhs, out = _letters(subscripts)
  n = len(lhs) - 2
  if n > 1:
    x = x.reshape(*x.shape[:2], -1)
    w = jax.tree.map(lambda a: a.reshape(-1, *a.shape[n:]), w)
    subscripts = f"{lhs[:3]},{rhs[0] + rhs[n:]}->{out}"
  return subscripts, x, w


def _matmul(subscripts: str, x: jax.Array, w: jax.Array | QTensor, out_dtype) -> jax.Array:
  subscripts, x, w = _with_one_sum(subscripts, x, w)
  lhs, rhs, out = _letters(subscripts)
  # Tokens are rows of one matrix. With two batch dimensions XLA's CPU backend transposes the cotangent for
  # the weight gradient, and the pointwise work fused into that copy runs across rows: a third of a train step.
  rows = x.reshape(-1, *x.shape[2:])
  equation = f"r{lhs[2:]},{rhs}->r{out[2:]}"
  if isinstance(w, QTensor):
    y = quant.matmul(equation, rows, w)
  else:
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum(equation, rows, w.astype(x.dtype), preferred_element_type=accumulate)
  return y.astype(out_dtype or x.dtype).reshape(*x.shape[:2], *y.shape[1:])


def _letters(subscripts: str) -> list[str]:
  return subscripts.replace("->", ",").split(",")


def _value(w):
  return w.get_value() if hasattr(w, "get_value") else w


def _stored(w) -> list[Axis]:
  """The names of a Param's dimensions, with their sizes over all devices."""
  return list(zip(w.axes, w.sizes, strict=True))


def _busy() -> tuple[str, ...]:
  """The mesh axes that split the batch or the length: no weight can be split over them where it is used."""
  return sharding.mesh_axes("batch") + sharding.mesh_axes("length")


def _unsplit_batch(w) -> tuple[jax.Array | QTensor, list[tuple[str, ...]]]:
  """A weight gathered over the busy axes, and the axes over which its dimensions still lie."""
  have = [sharding.mesh_axes(a) for a in _stored(w)]
  want = [tuple(a for a in axes if a not in _busy()) for axes in have]
  value = _value(w)
  if not isinstance(value, QTensor):
    return sharding.relay(value, have, want), want
  # What has one scale for a whole dimension has it on every device.
  summed = [w.axes.index(name) for name in w.fan_in]
  sizes = quant.scale_shape(w.sizes, summed, value.format)
  split = lambda axes: [a if size > 1 else () for a, size in zip(axes, sizes, strict=True)]
  codes, scale = sharding.relay(value.codes, have, want), sharding.relay(value.scale, split(have), split(want))
  return QTensor(codes, scale, value.format), want


def _cut(w: jax.Array | QTensor, dim: int, start: jax.Array, size: int) -> jax.Array | QTensor:
  """`size` rows (columns) of a dimension of a weight, from `start`."""

  def one(a):
    unit = w.shape[dim] // a.shape[dim]  # of a scale, one for several rows, or for all
    if a.shape[dim] == 1:
      return a
    check(size % unit == 0, f"a ring takes {size} rows at a time, no whole number of groups of {unit}; use int8")
    return jax.lax.dynamic_slice_in_dim(a, start // unit, size // unit, dim)

  return jax.tree.map(one, w)


def _leaving(p: Product) -> list[Axis]:
  """The place of a result, after the weight's axes."""
  _, rhs, out = _letters(p.subscripts)
  named = dict(zip(rhs, zip(p.w.axes, p.w.sizes, strict=True), strict=True))
  return ["batch", "length"] + [(LEAVES.get(named[c][0], named[c][0]), named[c][1]) for c in out[2:]]
