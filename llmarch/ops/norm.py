"""Normalisations over the last axis, statistics in f32, result in the dtype of x."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale  (1910.07467, eq. 4).  x [..., D], scale [D] or [1]."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, *, eps: float) -> jax.Array:
  """(x - mean) / sqrt(var + eps) * scale + bias  (1607.06450).  x [..., D], scale and bias [D]."""
  y = x.astype(jnp.float32)
  # Centred first: E[x^2] - E[x]^2 cancels where the mean is large.
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return y.astype(x.dtype)


def scale_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
  """g x / |x| with one scalar g  (1910.05895).  x [..., D], scale [1]."""
  y = x.astype(jnp.float32)
  norm = jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True) + eps)
  return (scale.astype(jnp.float32) * y / norm).astype(x.dtype)
