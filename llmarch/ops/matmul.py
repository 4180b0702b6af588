"""One product of activations and a weight on one device: plain, quantised, or with an adapter.

B batch, T length; the letters of subscripts are free.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmarch.errors import check
from llmarch.ops import quant
from llmarch.ops.lora import Adapted
from llmarch.ops.quant import QTensor
from llmarch.sharding import TOKENS, Axis, name_in_result

Weight = jax.Array | QTensor | Adapted  # what a Param may hold


class Product(NamedTuple):
  """One einsum of activations [B, T, ...] and a weight, plus a bias."""

  subscripts: str  # "btd,dnh->btnh": batch and length are "bt", first in the input and in the result
  w: object  # a Param, or an array where there is no layout
  bias: object = None  # likewise
  to: Sequence[Axis] | None = None  # the place of the result; None: as `place_of_result` says
  partial: bool = False  # the sum over the mesh is left to `sum_over_mesh`
  out_dtype: str | None = None  # None: the dtype of the input
  tokens: Sequence[Axis] = TOKENS  # the place of the dimensions "bt" of the input


def letters(subscripts: str) -> list[str]:
  """"btd,dnh->btnh" -> ["btd", "dnh", "btnh"]."""
  return subscripts.replace("->", ",").split(",")


def value_of(w):
  """Returns the value that a Param holds, and an array as it is."""
  return w.get_value() if hasattr(w, "get_value") else w


def stored_at(w) -> list[Axis]:
  """The place of a Param at rest: the names of its dimensions, with their sizes over all devices."""
  return list(zip(w.axes, w.sizes, strict=True))


def place_of_result(p: Product) -> list[Axis]:
  """`p.to`, or by default the tokens, and then the weight's own axes: "btd,df->btf" goes to (*TOKENS, "act_mlp")."""
  if p.to:
    return list(p.to)
  _, rhs, out = letters(p.subscripts)
  named = dict(zip(rhs, stored_at(p.w), strict=True))
  return [*TOKENS, *((name_in_result(named[c][0]), named[c][1]) for c in out[2:])]


def multiply(subscripts: str, x: jax.Array, w: Weight, out_dtype=None, *, tokens_as_rows: bool = True) -> jax.Array:
  """The einsum, accumulated in f32 at least, in `out_dtype` (None: x's) without a rounding in between.

  tokens_as_rows: the dimensions "bt" are multiplied as one. With two batch dimensions XLA's CPU backend transposes the
  cotangent for the weight gradient, and the pointwise work fused into that copy runs across rows: a third of a train
  step. (It must be False where XLA splits the length over devices: neighbouring tokens then lie apart.)
  """
  if isinstance(w, Adapted):
    return _adapted(subscripts, x, w, tokens_as_rows).astype(out_dtype or x.dtype)
  subscripts, x, w = with_one_sum(subscripts, x, w)
  lhs, rhs, out = letters(subscripts)
  rows, equation, kept = x, subscripts, 2
  if tokens_as_rows:
    rows, equation, kept = x.reshape(-1, *x.shape[2:]), f"r{lhs[2:]},{rhs}->r{out[2:]}", 1
  if isinstance(w, QTensor):
    y = quant.matmul(equation, rows, w)
  else:
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum(equation, rows, w.astype(x.dtype), preferred_element_type=accumulate)
  return y.astype(out_dtype or x.dtype).reshape(*x.shape[:2], *y.shape[kept:])


def _adapted(subscripts: str, x: jax.Array, w: Adapted, tokens_as_rows: bool) -> jax.Array:
  """x W + scale (x A) B, f32."""
  lhs, rhs, out = letters(subscripts)
  summed, others = ("".join(c for c in rhs if (c in lhs) == inside) for inside in (True, False))
  product = lambda subscripts, x, w, dtype: multiply(subscripts, x, w, dtype, tokens_as_rows=tokens_as_rows)
  # The backward pass decodes W again, rather than keep what it decoded to.
  frozen = jax.checkpoint(lambda x, w: product(subscripts, x, w, jnp.float32), prevent_cse=False)
  inner = product(f"{lhs},{summed}z->{lhs[:2]}z", x, w.a, None)
  return frozen(x, w.base) + w.scale * product(f"{lhs[:2]}z,z{others}->{out}", inner, w.b, jnp.float32)


def with_one_sum(subscripts: str, x: jax.Array, w: jax.Array | QTensor):
  """Returns the same einsum with its summed dimensions as one: XLA would transpose the matrix to sum over two."""
  lhs, rhs, out = letters(subscripts)
  n = len(lhs) - 2
  if n > 1 and not set(lhs[2:]) & set(out):
    x = x.reshape(*x.shape[:2], -1)
    w = jax.tree.map(lambda a: a.reshape(-1, *a.shape[n:]), w)
    subscripts = f"{lhs[:3]},{rhs[0] + rhs[n:]}->{out}"
  return subscripts, x, w


def rows_of(w: jax.Array | QTensor, dim: int, start: jax.Array, size: int) -> jax.Array | QTensor:
  """`size` rows (or columns) of a dimension of a weight, from `start`."""

  def cut(a):
    rows_per_entry = w.shape[dim] // a.shape[dim]  # a scale may serve several rows, or all of them
    if a.shape[dim] == 1:
      return a
    check(
      size % rows_per_entry == 0,
      f"a ring takes {size} rows at a time, no whole number of groups of {rows_per_entry}; use int8",
    )
    return jax.lax.dynamic_slice_in_dim(a, start // rows_per_entry, size // rows_per_entry, dim)

  return jax.tree.map(cut, w)
