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


def _swiglu_oss(gate: jax.Array, up: jax.Array) -> jax.Array:
  """(up + 1) gate sigmoid(1.702 gate), both clamped at 7, the gate from above alone (gpt-oss's model.py)."""
  gate, up = jnp.minimum(gate, 7), jnp.clip(up, -7, 7)
  return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


JOINT = {"swiglu_oss": _swiglu_oss}  # of gate and up


def activate(name: str, gate: jax.Array, up: jax.Array | None = None) -> jax.Array:
  """act(gate), times `up` where there is one; or what JOINT makes of both.

  The backward pass recomputes it from its arguments: pointwise work is cheaper than keeping [B, T, F]
  arrays for every factor of a derivative.
  """
  f = JOINT.get(name) or (lambda g, u: ACTIVATIONS[name](g) if u is None else ACTIVATIONS[name](g) * u)
  return jax.checkpoint(f, prevent_cse=False)(gate, up)
