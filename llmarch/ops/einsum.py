"""The matmul of every layer, and the look-up of every table; the one place where weights meet activations.

Without a layout a product is an einsum, a bias and a cast. With one, the weight's axes and the layout's row decide
where the result lies and what the devices say to each other; ops/placed.py has the rule and an example with sizes.
"""

import dataclasses
from collections.abc import Sequence

import jax
from jax.typing import DTypeLike

from llmarch import sharding
from llmarch.ops import placed
from llmarch.ops.lora import Adapted
from llmarch.ops.matmul import Product, Weight, letters, multiply, place_of_result, stored_at, value_of
from llmarch.ops.quant import QTensor
from llmarch.sharding import ANY, GATHERED_EMBED, RESIDUAL, TOKENS, Axis, Partial


def einsum(subscripts: str, x: jax.Array, w, **options) -> jax.Array | Partial:
  """`jnp.einsum` of activations x [B, T, ...] and a weight, plus a bias; accumulated in f32 at least.

  Subscripts name batch and length "bt" first in x and in the result: "btd,dnh->btnh". The weight (a Param,
  or an array where there is no layout) is cast to x's dtype. The result has that dtype, or `out_dtype`
  without a rounding in between (logits are f32). Its place is `to`, by default after the weight's axes;
  `partial` leaves the sum over the mesh to `sum_over_mesh`, so that branches can be added before they are summed.
  A dimension of the weight may be in x and in the result too, as the heads in "btnc,cnh->btnh". The options are the
  fields of `Product`.
  """
  return einsums(x, Product(subscripts, w, **options))[0]


def einsums(x: jax.Array, *products: Product) -> list[jax.Array | Partial]:
  """Several einsums of the same dimensions of one x, which is gathered once for them all."""
  match sharding.mode():
    case None:
      return [_on_one_device(x, p) for p in products]
    case "constraints":
      return [_constrained(x, p) for p in products]
    case "local":
      return _locally(x, products) if _runs_locally(products) else [_constrained(x, p) for p in products]
    case "manual":
      return placed.products(x, products)
    case "rings":
      return placed.products_in_rings(x, products, sharding.ring_form())


def lookup(table, ids: jax.Array, dtype: DTypeLike, to: Sequence[Axis] = RESIDUAL) -> jax.Array:
  """Rows of a table [V, D] at int32 ids [B, T] -> [B, T, D] in the place `to`, cast to dtype."""
  if sharding.is_manual():
    return placed.lookup(table, ids, dtype, to)
  if sharding.is_automatic() and _is_plain(table):
    # A manual program of its own: XLA would bring the gradients of all tokens to the rows of the table. The table goes
    # in its own dtype, in which the gradients of its rows are summed.
    run = lambda ids, value: (placed.lookup(table.replace(value), ids, dtype, to),)
    return sharding.local(run, [TOKENS, stored_at(table)], [to])(ids, table.get_value())[0]
  return sharding.shard(_at_use(table, dtype)[ids].astype(dtype), *to)


def gathered(w):
  """The weight all-gathered once per step, not once per loss chunk; its gradient is summed over the chunks, in the
  weight's own dtype, before it is reduce-scattered. A weight to which that does not apply is returned as it is."""
  if sharding.mode() != "local" or not _is_plain(w):
    return w
  axes = tuple(GATHERED_EMBED if name == "embed" else name for name in w.axes)
  return w.replace(sharding.at_use(w.get_value(), w.axes), axes=axes)


def _on_one_device(x: jax.Array, p: Product) -> jax.Array | Partial:
  y = multiply(p.subscripts, x, _cast(value_of(p.w), x.dtype), p.out_dtype)
  y = y if p.bias is None else y + _cast(value_of(p.bias), y.dtype)
  return Partial(y) if p.partial else y


def _constrained(x: jax.Array, p: Product) -> jax.Array | Partial:
  """A product whose collectives XLA chooses: the weight is gathered over the mesh axes that split the tokens, and the
  result is constrained to its place."""
  length_is_split = sharding.is_split("length")
  if length_is_split:  # outside of a branch further than inside
    lhs, rhs, _ = letters(p.subscripts)
    names = dict(zip(rhs, getattr(p.w, "axes", ()), strict=False))
    known = lambda c: sharding.has_name_in_inputs(names.get(c))
    x = sharding.shard(x, *p.tokens, *(sharding.name_in_input(names[c]) if known(c) else ANY for c in lhs[2:]))
  y = multiply(p.subscripts, x, _at_use(p.w, x.dtype), p.out_dtype, tokens_as_rows=not length_is_split)
  y = y if p.bias is None else y + _at_use(p.bias, y.dtype)
  if p.partial:
    return Partial(y)
  return sharding.shard(y, *place_of_result(p)) if hasattr(p.w, "axes") else y


def _locally(x: jax.Array, products: Sequence[Product]) -> list[jax.Array | Partial]:
  """These products as one `shard_map` of their own, in manual mode. What is partial is summed at once."""
  source = placed.source_of(placed.input_place(products[0]))
  whole = [p._replace(to=RESIDUAL if p.partial else place_of_result(p), partial=False) for p in products]
  # Weights and biases are cast before anything is sent.
  params = [
    (param, dtype)
    for p in products
    for param, dtype in ((p.w, x.dtype), (p.bias, p.out_dtype or x.dtype))
    if param is not None
  ]

  def run(x, *values):
    given = iter(values)
    held = lambda param: None if param is None else param.replace(next(given))
    return tuple(placed.products(x, [p._replace(w=held(p.w), bias=held(p.bias)) for p in whole]))

  have = [source, *(stored_at(param) for param, _ in params)]
  values = (param.get_value().astype(dtype) for param, dtype in params)
  ys = sharding.local(run, have, [p.to for p in whole])(x, *values)
  return [Partial(y) if p.partial else y for p, y in zip(products, ys, strict=True)]


def _runs_locally(products: Sequence[Product]) -> bool:
  """True if each product may be a shard_map of its own: unquantised weights whose summed axis is named in activations.

  One gather of x then serves them all, and its gradient is reduce-scattered once; XLA would do each apart.
  """
  lhs, rhs, _ = letters(products[0].subscripts)
  return all(_is_plain(p.w) for p in products) and all(
    sharding.has_name_in_inputs(name) for c, name in zip(rhs, products[0].w.axes, strict=True) if c in lhs
  )


def _is_plain(w) -> bool:
  """Tells whether w is a Param with names that holds one array, neither quantised nor with an adapter."""
  return bool(getattr(w, "axes", None)) and isinstance(w.get_value(), jax.Array)


def _at_use(w, dtype: DTypeLike) -> Weight:
  """A weight where it meets activations of this dtype, to which it is cast before anything is sent."""
  value = value_of(w)
  if not hasattr(w, "axes") or isinstance(value, QTensor):
    return value
  if isinstance(value, Adapted):
    return dataclasses.replace(value, base=_at_use(w.replace(value.base), dtype))
  return sharding.at_use(value.astype(dtype), w.axes)


def _cast(value: Weight, dtype: DTypeLike) -> Weight:
  if isinstance(value, QTensor):
    return value
  if isinstance(value, Adapted):
    return dataclasses.replace(value, base=_cast(value.base, dtype))
  return value.astype(dtype)
