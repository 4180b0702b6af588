"""Rotary positions: frequencies and their context extensions, exact phases, rotation.

A frequency theta_i is the angle in radians by which pair i turns per position. With R rotated dimensions, a table of
frequencies is a numpy float64 array [R/2]; one that depends on the length of the context is f32 [B, T or 1, R/2].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(dims: int, theta: float) -> np.ndarray:
  """Frequencies theta_i = theta^(-2i / R), i = 0 .. R/2 - 1  (2104.09864, section 3.2.2).  [R/2]."""
  return theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def ntk_base(dims: int, theta, factor):
  """The NTK-aware base theta s^(R / (R - 2)): it divides the lowest frequency by exactly s and keeps the highest."""
  return theta * factor ** (dims / (dims - 2))


def dynamic_ntk_frequencies(dims: int, theta: float, factor: float, original: int, length: jax.Array) -> jax.Array:
  """NTK-aware frequencies with s = max(1, factor length / original - (factor - 1)).  length [B, T] -> [B, T, R/2]."""
  scale = jnp.maximum(factor * length.astype(jnp.float32) / original - (factor - 1), 1.0)
  base = ntk_base(dims, theta, scale)
  return base[..., None] ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)


def yarn_frequencies(
  dims: int, theta: float, factor: float, original: int, beta_fast: float, beta_slow: float, truncate: bool = True
) -> np.ndarray:
  """Frequencies of YaRN (2309.00071, eq. 17-23).

  Those that turn less than beta_slow times in `original` positions are divided by the factor, those that turn more than
  beta_fast times are kept, and a ramp lies between. The ramp is linear in the index i and, with `truncate`, begins and
  ends at whole indices, as in the authors' code.
  """

  def index_of(turns):
    return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low, high = index_of(beta_fast), index_of(beta_slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dims - 1)
  ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 1e-3), 0, 1)
  table = frequencies(dims, theta)
  return table * (1 - ramp) + table / factor * ramp


def llama3_frequencies(
  dims: int, theta: float, factor: float, original: int, low_factor: float, high_factor: float
) -> np.ndarray:
  """Frequencies of Llama 3.1.

  Wavelengths above original/low_factor are stretched by the factor, those below original/high_factor are kept, and a
  ramp between them is linear in the number of turns.
  """
  table = frequencies(dims, theta)
  turns = original * table / (2 * math.pi)
  keep = np.clip((turns - low_factor) / (high_factor - low_factor), 0, 1)
  return keep * table + (1 - keep) * table / factor


def xpos_decay(dims: int) -> np.ndarray:
  """Decays zeta_i = (2i/R + 0.4) / 1.4  (2212.10554, eq. 14 with gamma = 0.4).  [R/2]."""
  return (np.arange(0, dims, 2) / dims + 0.4) / 1.4


def xpos_gains(positions: jax.Array, length: jax.Array, dims: int, scale_base: float) -> tuple[jax.Array, jax.Array]:
  """Factors zeta_i^(m / scale_base) for a query at position m, and their inverses for keys (2212.10554).

  int32 [B, T] and [B, T or 1] -> f32 [B, T, 1, R/2] each.
  """
  # Positions are centred at half the context: only their differences count, and both powers stay small.
  power = (positions - length // 2).astype(jnp.float32)[..., None, None] / scale_base
  log_gain = power * jnp.asarray(np.log(xpos_decay(dims)), jnp.float32)
  return jnp.exp(log_gain), jnp.exp(-log_gain)


def phases(positions: jax.Array, freqs: np.ndarray | jax.Array) -> jax.Array:
  """The angle positions * freqs reduced to [-pi, pi).  int32 [B, T], [R/2] or [B, T or 1, R/2] -> f32 [B, T, R/2].

  The f32 product loses all phase beyond 1e5 positions. Here a frequency is a 64-bit fraction of a turn, and whole turns
  fall off the top of an integer product, so the phase is good to 1e-6 at any int32 position. Traced frequencies have
  32 bits, which is the precision of the f32 frequencies themselves.
  """
  turn = 2.0**32
  if isinstance(freqs, np.ndarray):
    fraction = np.floor((freqs / (2 * np.pi)) % 1.0 * 2.0**64).astype(np.uint64)
    high = jnp.asarray((fraction >> np.uint64(32)).astype(np.uint32))
    low = jnp.asarray((fraction & np.uint64(0xFFFFFFFF)).astype(np.uint32))
  else:
    high = (freqs / (2 * jnp.pi) % 1.0 * turn).astype(jnp.uint32)
    low = jnp.zeros_like(high)
  p = positions.astype(jnp.uint32)[..., None]  # [B, T, 1]; negative positions wrap around, as the product does
  # The high word of p * low is computed from 16-bit halves, since uint32 has no wide product.
  p0, p1, l0, l1 = p & 0xFFFF, p >> 16, low & 0xFFFF, low >> 16
  middle = p1 * l0 + ((p0 * l0) >> 16)
  carry = p1 * l1 + (middle >> 16) + ((p0 * l1 + (middle & 0xFFFF)) >> 16)
  fixed = p * high + carry  # [B, T, R/2], in units of 2^-32 turns
  return jax.lax.bitcast_convert_type(fixed, jnp.int32).astype(jnp.float32) * (2 * jnp.pi / turn)


def rotate(x: jax.Array, phase: jax.Array, *, interleaved: bool, gain=1.0) -> jax.Array:
  """Rotates the first R dimensions of x by `phase`, in f32.  x [B, T, N, H], phase [B, T, R/2] -> like x.

  Pair i is (2i, 2i+1) if interleaved (RoFormer, GPT-J), and (i, i + R/2) otherwise (GPT-NeoX, LLaMA).
  `gain`, broadcastable to [B, T, 1, R/2], multiplies the rotated part (YaRN's and xPos's factors).
  """
  half = phase.shape[-1]
  rotated, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
  if interleaved:
    a, b = rotated[..., 0::2], rotated[..., 1::2]
  else:
    a, b = rotated[..., :half], rotated[..., half:]
  cos, sin = jnp.cos(phase)[..., None, :] * gain, jnp.sin(phase)[..., None, :] * gain  # [B, T, 1, R/2]
  a, b = a * cos - b * sin, b * cos + a * sin
  if interleaved:
    rotated = jnp.stack([a, b], axis=-1).reshape(rotated.shape)
  else:
    rotated = jnp.concatenate([a, b], axis=-1)
  return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def sinusoids(positions: jax.Array, dims: int) -> jax.Array:
  """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos  (1706.03762, section 3.5).  [B, T] -> f32 [B, T, D]."""
  phase = phases(positions, frequencies(dims, 10000.0))
  return jnp.stack([jnp.sin(phase), jnp.cos(phase)], axis=-1).reshape(*positions.shape, dims)
