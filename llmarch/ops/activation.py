"""Pointwise activations of the feed-forwards, by name."""

import functools

import jax
import jax.numpy as jnp

ACTIVATIONS = {
  "identity": lambda x: x,  # Bilinear, when gated
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # 2109.08668
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "silu": jax.nn.silu,
  "sigmoid": jax.nn.sigmoid,  # GLU, when gated
}
