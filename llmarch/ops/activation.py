"""Pointwise activations of feed-forward networks, by name."""

import functools

import jax
import jax.numpy as jnp

ACTIVATIONS = {
  "identity": lambda x: x,  # called Bilinear when gated
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # squared ReLU (2109.08668)
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "silu": jax.nn.silu,
  "sigmoid": jax.nn.sigmoid,  # called GLU when gated
}


def _swiglu_oss(gate: jax.Array, up: jax.Array) -> jax.Array:
  """(up + 1) gate sigmoid(1.702 gate), with gate clamped to at most 7 and up to [-7, 7] (gpt-oss's model.py)."""
  gate, up = jnp.minimum(gate, 7), jnp.clip(up, -7, 7)
  return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


JOINT = {"swiglu_oss": _swiglu_oss}  # activations that take gate and up together


def activate(name: str, gate: jax.Array, up: jax.Array | None = None) -> jax.Array:
  """act(gate), times `up` if it is given; an activation of JOINT takes both together.

  The backward pass recomputes the activation from its arguments, because pointwise work is cheaper than keeping a
  [B, T, F] array for every factor of a derivative.
  """
  f = JOINT.get(name) or (lambda g, u: ACTIVATIONS[name](g) if u is None else ACTIVATIONS[name](g) * u)
  return jax.checkpoint(f, prevent_cse=False)(gate, up)
