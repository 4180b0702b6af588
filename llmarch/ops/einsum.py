"""The matmul of every layer, and the look-up of every table; the one place where weights meet activations.

In manual mode (see sharding.py) this device holds a part of each operand, and what the layout's row says of
their logical axes decides the collectives: weights are gathered over the mesh axes that split the batch,
activations over those by which they are split further than the weight they meet, and partial sums are
scattered into the place that the result is to have.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llmarch import sharding
from llmarch.sharding import Axis

# What the dimensions of weights are called in the activations that leave them, and that enter them.
LEAVES = {name: f"act_{name}" for name in ("embed", "heads", "kv_heads", "mlp", "vocab")}
ENTERS = LEAVES | {"embed": "post_norm_embed"}
RESIDUAL = ("batch", "length", "act_embed")


def einsum(
  subscripts: str,
  x: jax.Array,
  w,
  *,
  bias=None,
  to: Sequence[Axis] | None = None,
  partial: bool = False,
  out_dtype=None,
) -> jax.Array:
  """`jnp.einsum` of activations x [B, T, ...] and a weight, plus a bias; accumulated in f32 at least.

  Subscripts name batch and length "bt" first in x and in the result: "btd,dnh->btnh". The weight (a Param,
  or an array where there is no layout) is cast to x's dtype. The result has that dtype, or `out_dtype`
  without a rounding in between (logits are f32). Its place is `to`, by default after the weight's axes;
  `partial` leaves the sum over the mesh to `finish`, so that branches can be added before they are summed.
  """
  if not sharding.manual():
    y = _matmul(subscripts, x, _value(w), out_dtype)
    y = y if bias is None else y + _value(bias).astype(y.dtype)
    return y if partial or not hasattr(w, "axes") else sharding.shard(y, *(to or _leaving(subscripts, w)))

  lhs, rhs, out = _letters(subscripts)
  named = {"b": "batch", "t": "length"} | {c: ENTERS.get(name, name) for c, name in zip(rhs, w.axes, strict=True)}
  x_axes = [sharding.mesh_axes(named[c]) for c in lhs]
  value, w_axes = _unsplit_batch(w)
  axes = dict(zip(lhs, x_axes, strict=True)) | dict(zip(rhs, w_axes, strict=True))
  x = sharding.relay(x, x_axes, [axes[c] for c in lhs])
  y = _matmul(subscripts, x, value, out_dtype)
  pending = tuple(a for c in rhs if c in lhs for a in axes[c])
  have = [axes[c] for c in out]
  if bias is not None:
    b = sharding.relay(_value(bias), [sharding.mesh_axes(a) for a in _stored(bias)], have[-len(bias.axes) :])
    b = b.astype(y.dtype)
    y += b if not pending else jnp.where(sharding.index(pending) == 0, b, 0)  # one of the summands has it
  if partial:
    return y
  want = [sharding.mesh_axes(a) for a in to or _leaving(subscripts, w)]
  return sharding.reduce(y, pending, have, want)


def finish(y: jax.Array, inner: str) -> jax.Array:
  """Sums what `einsum(..., partial=True)` left, over the mesh axes of the weight's summed dimension `inner`.

  y [B, T, D] -> the same in the residual stream's place.
  """
  if not sharding.manual():
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


def _matmul(subscripts: str, x: jax.Array, w: jax.Array, out_dtype) -> jax.Array:
  lhs, rhs, out = _letters(subscripts)
  summed = [c for c in rhs if c in lhs]
  if len(summed) > 1:  # as one dimension: XLA would transpose the matrix to sum over two
    x, w = x.reshape(*x.shape[:2], -1), w.reshape(-1, *w.shape[len(summed) :])
    lhs, rhs = lhs[:2] + summed[0], summed[0] + rhs[len(summed) :]
  # Tokens are rows of one matrix. With two batch dimensions XLA's CPU backend transposes the cotangent for
  # the weight gradient, and the pointwise work fused into that copy runs across rows: a third of a train step.
  rows = x.reshape(-1, *x.shape[2:])
  accumulate = jnp.promote_types(x.dtype, jnp.float32)
  equation = f"r{lhs[2:]},{rhs}->r{out[2:]}"
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


def _unsplit_batch(w) -> tuple[jax.Array, list[tuple[str, ...]]]:
  """A weight gathered over the busy axes, and the axes over which its dimensions still lie."""
  have = [sharding.mesh_axes(a) for a in _stored(w)]
  want = [tuple(a for a in axes if a not in _busy()) for axes in have]
  return sharding.relay(_value(w), have, want), want


def _leaving(subscripts: str, w) -> list[Axis]:
  """The place of a result, after the weight's axes."""
  _, rhs, out = _letters(subscripts)
  named = dict(zip(rhs, w.axes, strict=True))
  sizes = dict(zip(rhs, w.sizes, strict=True))
  return ["batch", "length"] + [(LEAVES.get(named[c], named[c]), sizes[c]) for c in out[2:]]
