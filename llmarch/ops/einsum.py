"""The matmul of every layer, and the look-up of every table; the one place where weights meet activations.

In manual mode (see sharding.py) this device holds a part of each operand, and what the layout's row says of
their logical axes decides the collectives: weights are gathered over the mesh axes that split the batch,
activations over those by which they are split further than the weight they meet, and partial sums are
scattered into the place that the result is to have.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmarch import sharding
from llmarch.errors import check
from llmarch.ops import quant
from llmarch.ops.collective_einsum import all_gather_einsum, einsum_reduce_scatter
from llmarch.ops.lora import Adapted
from llmarch.ops.quant import QTensor
from llmarch.sharding import Axis

# What the dimensions of weights are called in the activations that leave them, and that enter them.
LEAVES = {name: f"act_{name}" for name in ("embed", "heads", "kv_heads", "mlp", "vocab")}
AT_USE = "embed_at_use"  # of a weight that `gathered` has made whole
ENTERS = LEAVES | dict.fromkeys(("embed", AT_USE), "post_norm_embed")
RESIDUAL = ("batch", "length", "act_embed")
TOKENS = ("batch", "act_length")  # inside a branch


class Product(NamedTuple):
  """One einsum of activations and a weight; see `einsum`."""

  subscripts: str
  w: object
  bias: object = None
  to: Sequence[Axis] | None = None
  partial: bool = False
  out_dtype: str | None = None
  tokens: Sequence[Axis] = TOKENS  # the place of the dimensions "bt" of x, and by default of the result


def einsum(subscripts: str, x: jax.Array, w, **options) -> jax.Array:
  """`jnp.einsum` of activations x [B, T, ...] and a weight, plus a bias; accumulated in f32 at least.

  Subscripts name batch and length "bt" first in x and in the result: "btd,dnh->btnh". The weight (a Param,
  or an array where there is no layout) is cast to x's dtype. The result has that dtype, or `out_dtype`
  without a rounding in between (logits are f32). Its place is `to`, by default after the weight's axes;
  `partial` leaves the sum over the mesh to `finish`, so that branches can be added before they are summed.
  A dimension of the weight may be in x and in the result too, as the heads in "btnc,cnh->btnh".
  """
  return einsums(x, Product(subscripts, w, **options))[0]


def einsums(x: jax.Array, *products: Product) -> list[jax.Array]:
  """Several einsums of the same dimensions of one x, which is gathered once for them all."""
  if not sharding.manual():
    return _over_mesh(x, products) if _placed(products) else [_automatic(x, p) for p in products]
  lhs, rhs, _ = _letters(products[0].subscripts)
  names = dict(zip("bt", products[0].tokens)) | {
    c: ENTERS.get(name, name) for c, name in zip(rhs, products[0].w.axes, strict=True)
  }
  have = [sharding.mesh_axes(names[c]) for c in lhs]
  weights = [_weight_of(p, dict(zip(lhs, have, strict=True))) for p in products]
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


def _placed(products: Sequence[Product]) -> bool:
  """Whether the manual rule serves these products of an automatic program: plain matrices, summed over what has a
  name in activations. It gathers x once for them all and scatters its gradient once, and XLA would do each apart."""
  if not sharding.training():
    return False
  plain = all(isinstance(getattr(p.w, "axes", None) and p.w.get_value(), jax.Array) for p in products)
  lhs, rhs, _ = _letters(products[0].subscripts)
  return plain and all(name in ENTERS for c, name in zip(rhs, products[0].w.axes, strict=True) if c in lhs)


def _over_mesh(x: jax.Array, products: Sequence[Product]) -> list[jax.Array]:
  """These products alone in manual mode. What is `partial` is summed at once."""
  lhs, rhs, _ = _letters(products[0].subscripts)
  names = {c: ENTERS.get(name) for c, name in zip(rhs, products[0].w.axes, strict=True)}
  inside = [*products[0].tokens, *(names[c] for c in lhs[2:])]
  outside = [*RESIDUAL[:2], *inside[2:]] if inside == [*TOKENS, "post_norm_embed"] else inside
  products = [p._replace(to=RESIDUAL if p.partial else p.to or _leaving(p), partial=False) for p in products]
  dtypes = lambda p: (x.dtype, p.out_dtype or x.dtype)  # weights are cast before anything is sent
  both = [(param, d) for p in products for param, d in zip((p.w, p.bias), dtypes(p), strict=True) if param is not None]

  def run(x, *values):
    given = iter(values)
    at = lambda param: None if param is None else param.replace(next(given))
    x = sharding.relay(x, *([sharding.mesh_axes(a) for a in place] for place in (outside, inside)))
    return tuple(einsums(x, *(p._replace(w=at(p.w), bias=at(p.bias)) for p in products)))

  have = [outside, *(_stored(param) for param, _ in both)]
  return list(sharding.local(run, have, [p.to for p in products])(x, *(p.get_value().astype(d) for p, d in both)))


def _automatic(x: jax.Array, p: Product) -> jax.Array:
  if sharding.is_split("length"):  # outside of a branch further than inside
    lhs, rhs, _ = _letters(p.subscripts)
    names = dict(zip(rhs, getattr(p.w, "axes", ()), strict=False))
    x = sharding.shard(x, *p.tokens, *(ENTERS.get(names.get(c), sharding.ANY) for c in lhs[2:]))
  y = _matmul(p.subscripts, x, _at_use(p.w, x.dtype), p.out_dtype)
  y = y if p.bias is None else y + _at_use(p.bias, y.dtype)
  return y if p.partial or not hasattr(p.w, "axes") else sharding.shard(y, *(p.to or _leaving(p)))


def _at_use(w, dtype) -> jax.Array | QTensor | Adapted:
  """A weight as it meets activations of this dtype, to which it is cast before anything is sent."""
  value = _value(w)
  if not hasattr(w, "axes") or isinstance(value, QTensor):
    return value
  if isinstance(value, Adapted):
    return dataclasses.replace(value, base=_at_use(w.replace(value.base), dtype))
  return sharding.at_use(value.astype(dtype), w.axes)


def gathered(w):
  """A weight as all its uses of a train step find it, and not each by itself: its gradients, too, are summed before
  they are scattered. In its own dtype, in which they are summed. Any other weight as it is."""
  if not sharding.training() or not isinstance(w.get_value(), jax.Array):
    return w
  axes = tuple(AT_USE if name == "embed" else name for name in w.axes)
  return w.replace(sharding.at_use(w.get_value(), w.axes), axes=axes)


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
  return tuple(a for c in rhs if c in lhs and c not in out for a in axes[c]), [axes[c] for c in out]


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
  if not sharding.manual():
    return sharding.shard(y, *RESIDUAL)
  return y if sharding.loop() else summed(y, inner)  # a ring has summed already


def summed(y: jax.Array, inner: str) -> jax.Array:
  """`finish` in manual mode, of a branch without rings."""
  keep = lambda name: tuple(a for a in sharding.mesh_axes(name) if a not in _busy())
  have = [sharding.mesh_axes("batch"), sharding.mesh_axes("length"), keep("embed")]
  return sharding.reduce(y, keep(inner), have, [sharding.mesh_axes(a) for a in RESIDUAL])


def at_tokens(w) -> tuple[jax.Array | QTensor, list[tuple[str, ...]]]:
  """In manual mode: a weight gathered over the mesh axes that split the tokens, and the axes over which its
  dimensions then lie."""
  return _relaid(w, _unbusy(w, TOKENS))


def lookup(table, ids: jax.Array, dtype, to: Sequence[Axis] = RESIDUAL) -> jax.Array:
  """Rows of a table [V, D] at int32 ids [B, T] -> [B, T, D] in the place `to`, cast to dtype."""
  if sharding.automatic() and isinstance(getattr(table, "axes", None) and table.get_value(), jax.Array):
    # This alone in manual mode: XLA would bring the gradients of all tokens to the rows of the table.
    run = lambda ids, value: (lookup(table.replace(value), ids, dtype, to),)
    # (In the table's own dtype, in which the gradients of its rows are summed.)
    return sharding.local(run, [TOKENS, _stored(table)], [to])(ids, table.get_value())[0]
  if not sharding.manual():
    return sharding.shard(_at_use(table, dtype)[ids].astype(dtype), *to)
  value, (rows, columns) = _relaid(table, _unbusy(table, TOKENS))
  # Each device looks up the ids that it holds; the others' rows are zero in its part of the sum.
  ids = ids - sharding.index(rows) * value.shape[0]
  mine = (ids >= 0) & (ids < value.shape[0])
  y = jnp.where(mine[..., None], value[jnp.where(mine, ids, 0)].astype(dtype), 0)
  have = [*map(sharding.mesh_axes, TOKENS), columns]
  return sharding.reduce(y, rows, have, [sharding.mesh_axes(a) for a in to])


def _with_one_sum(subscripts: str, x: jax.Array, w: jax.Array | QTensor):
  """The same einsum with the dimensions that it sums over as one: XLA would transpose the matrix to sum over two."""
  lhs, rhs, out = _letters(subscripts)
  n = len(lhs) - 2
  if n > 1 and not set(lhs[2:]) & set(out):
    x = x.reshape(*x.shape[:2], -1)
    w = jax.tree.map(lambda a: a.reshape(-1, *a.shape[n:]), w)
    subscripts = f"{lhs[:3]},{rhs[0] + rhs[n:]}->{out}"
  return subscripts, x, w


def _matmul(subscripts: str, x: jax.Array, w: jax.Array | QTensor | Adapted, out_dtype) -> jax.Array:
  if isinstance(w, Adapted):
    return _adapted(subscripts, x, w).astype(out_dtype or x.dtype)
  subscripts, x, w = _with_one_sum(subscripts, x, w)
  lhs, rhs, out = _letters(subscripts)
  # Tokens are rows of one matrix. With two batch dimensions XLA's CPU backend transposes the cotangent for
  # the weight gradient, and the pointwise work fused into that copy runs across rows: a third of a train step.
  # (Not where the length is split: one token after the other is then not one device after the other.)
  rows, equation, tokens = x.reshape(-1, *x.shape[2:]), f"r{lhs[2:]},{rhs}->r{out[2:]}", 1
  if sharding.is_split("length"):
    rows, equation, tokens = x, subscripts, 2
  if isinstance(w, QTensor):
    y = quant.matmul(equation, rows, w)
  else:
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum(equation, rows, w.astype(x.dtype), preferred_element_type=accumulate)
  return y.astype(out_dtype or x.dtype).reshape(*x.shape[:2], *y.shape[tokens:])


def _adapted(subscripts: str, x: jax.Array, w: Adapted) -> jax.Array:
  """x W + scale (x A) B, f32."""
  lhs, rhs, out = _letters(subscripts)
  summed, others = ("".join(c for c in rhs if (c in lhs) == inside) for inside in (True, False))
  # The backward pass decodes W again, rather than keep what it decoded to.
  frozen = jax.checkpoint(lambda x, w: _matmul(subscripts, x, w, jnp.float32), prevent_cse=False)
  inner = _matmul(f"{lhs},{summed}z->{lhs[:2]}z", x, w.a, None)
  return frozen(x, w.base) + w.scale * _matmul(f"{lhs[:2]}z,z{others}->{out}", inner, w.b, jnp.float32)


def _letters(subscripts: str) -> list[str]:
  return subscripts.replace("->", ",").split(",")


def _value(w):
  return w.get_value() if hasattr(w, "get_value") else w


def _stored(w) -> list[Axis]:
  """The names of a Param's dimensions, with their sizes over all devices."""
  return list(zip(w.axes, w.sizes, strict=True))


def _busy(tokens: Sequence[Axis] = RESIDUAL) -> tuple[str, ...]:
  """The mesh axes that split the batch or the length: no weight can be split over them where it is used."""
  return sharding.mesh_axes(tokens[0]) + sharding.mesh_axes(tokens[1])


def _unbusy(w, tokens: Sequence[Axis]) -> list[tuple[str, ...]]:
  """The axes over which the dimensions of a weight lie once it is gathered over the busy ones."""
  return [tuple(a for a in axes if a not in _busy(tokens)) for axes in sharding.weight_axes(_stored(w))]


def _weight_of(p: Product, x_axes: dict) -> tuple[jax.Array | QTensor, list[tuple[str, ...]]]:
  """A weight where its product wants it, and the axes over which its dimensions then lie.

  A dimension that x and the result have too lies as x's does. One that only the result has is cut here as far
  as it would be cut there: what nothing is summed over need not be computed first.
  """
  lhs, rhs, out = _letters(p.subscripts)
  axes = dict(zip(rhs, _unbusy(p.w, p.tokens), strict=True))
  axes |= {c: x_axes[c] for c in rhs if c in lhs and c in out}
  used = {a for c, has in {**x_axes, **axes}.items() for a in has}
  for c, want in zip(out, _want(p), strict=True):
    free = c in rhs and c not in lhs and not p.partial and want[: len(axes[c])] == axes[c]
    if free and not used & set(want[len(axes[c]) :]):
      axes[c] = want
  return _relaid(p.w, [axes[c] for c in rhs])


def _relaid(w, want: list[tuple[str, ...]]) -> tuple[jax.Array | QTensor, list[tuple[str, ...]]]:
  """A weight's value moved from where it is stored, and `want`."""
  have = sharding.weight_axes(_stored(w))
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
  return [*TOKENS] + [(LEAVES.get(named[c][0], named[c][0]), named[c][1]) for c in out[2:]]
