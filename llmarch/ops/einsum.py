"""The matmul of every layer."""

import jax
import jax.numpy as jnp


def einsum(subscripts: str, x: jax.Array, w: jax.Array, *, out_dtype=None) -> jax.Array:
  """`jnp.einsum` with the weight cast to the activation's dtype, accumulated in at least f32.

  The result has x's dtype, or `out_dtype` without a rounding in between (logits are f32).
  """
  accumulate = jnp.promote_types(x.dtype, jnp.float32)
  y = jnp.einsum(subscripts, x, w.astype(x.dtype), preferred_element_type=accumulate)
  return y.astype(out_dtype or x.dtype)
