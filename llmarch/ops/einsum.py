"""The matmul of every layer."""

import jax
import jax.numpy as jnp


def einsum(subscripts: str, x: jax.Array, w: jax.Array, *, out_dtype=None) -> jax.Array:
  """`jnp.einsum` of activations x [B, T, ...] and a weight, which is cast to x's dtype; accumulated in f32 at least.

  Subscripts name batch and length "bt" first in x and in the result: "btd,dnh->btnh". The result has x's
  dtype, or `out_dtype` without a rounding in between (logits are f32).
  """
  # Tokens are rows of one matrix. With two batch dimensions XLA's CPU backend transposes the cotangent for
  # the weight gradient, and the pointwise work fused into that copy runs across rows: a third of a train step.
  rows = x.reshape(-1, *x.shape[2:])
  accumulate = jnp.promote_types(x.dtype, jnp.float32)
  y = jnp.einsum(subscripts.replace("bt", "r"), rows, w.astype(x.dtype), preferred_element_type=accumulate)
  return y.astype(out_dtype or x.dtype).reshape(*x.shape[:2], *y.shape[1:])
