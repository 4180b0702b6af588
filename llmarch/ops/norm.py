"""Normalisations over the last dimension, with f32 statistics and a result in the dtype of x.

`axis` is the logical name of that dimension, of which a device may hold only a part in manual mode (sharding/).
"""

import jax
import jax.numpy as jnp

from llmarch.sharding import Axis, mean_over_mesh, size_over_mesh


def rms(x: jax.Array) -> jax.Array:
  """The root mean square of all of x, an f32 scalar."""
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, axis: Axis = None) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale  (1910.07467, eq. 4).  x [..., D], scale [D] or [1]."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(mean_over_mesh(y * y, axis) + eps)
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(
  x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, *, eps: float, axis: Axis = None
) -> jax.Array:
  """(x - mean) / sqrt(var + eps) * scale + bias  (1607.06450).  x [..., D], scale and bias [D]."""
  y = x.astype(jnp.float32)
  # x is centred first, because E[x^2] - E[x]^2 cancels if the mean is large.
  y = y - mean_over_mesh(y, axis)
  y = y * jax.lax.rsqrt(mean_over_mesh(y * y, axis) + eps)
  if scale is not None:
    y = y * scale.astype(jnp.float32)
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return y.astype(x.dtype)


def scale_norm(x: jax.Array, scale: jax.Array, *, eps: float, axis: Axis = None) -> jax.Array:
  """g x / |x| with one scalar g  (1910.05895).  x [..., D], scale [1]."""
  y = x.astype(jnp.float32)
  norm = jnp.sqrt(size_over_mesh(y, axis) * mean_over_mesh(y * y, axis) + eps)
  return (scale.astype(jnp.float32) * y / norm).astype(x.dtype)
