"""Position schemes as data; the arithmetic is in ops/rope.py and ops/attention.py.

There are three groups: schemes that add vectors at the embedding (`at_embedding`), schemes that rotate queries and
keys (`Rotary`), and schemes that add a bias to the attention logits (`LogitBias`). A block without positions (NoPE)
has `position=None`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llmarch.build import config_dataclass
from llmarch.config import PositionConfig, ScalingConfig
from llmarch.errors import check, check_above, check_at_least
from llmarch.layers.param import Maker
from llmarch.ops import attention as ops
from llmarch.ops import rope
from llmarch.ops.einsum import lookup
from llmarch.sharding import RESIDUAL, move

# ---------------------------------------------------------------------------------------- at the embedding


@config_dataclass
class Sinusoidal(PositionConfig, kind="sinusoidal"):
  """Sinusoids of the position, added to the embedding (1706.03762, section 3.5)."""

  at_embedding = True

  def check_against(self, d_model: int, max_seq_len: int):
    check(d_model % 2 == 0, f"embed.position=sinusoidal needs an even d_model, got {d_model}")

  def make(self, d_model: int, make: Maker):
    return None

  def vectors(self, table, positions: jax.Array, d_model: int) -> jax.Array:
    return move(rope.sinusoids(positions, d_model), (*RESIDUAL[:2], None), RESIDUAL)


@config_dataclass
class Learned(PositionConfig, kind="learned"):
  """A trained vector for each of `length` positions, added to the embedding (GPT-2)."""

  at_embedding = True
  length: int
  offset: int = 0  # the row of the first position; the rows before it are unused (OPT: 2)

  def __post_init__(self):
    check_at_least(self, 1, "length")
    check_at_least(self, 0, "offset")

  def check_against(self, d_model: int, max_seq_len: int):
    check(
      self.length >= max_seq_len,
      f"embed.position.length={self.length} must reach max_seq_len={max_seq_len}; raise it or lower max_seq_len",
    )

  def make(self, d_model: int, make: Maker):
    return make.weight("position", "positions embed", (self.offset + self.length, d_model), fan_in="embed")

  def vectors(self, table, positions: jax.Array, d_model: int) -> jax.Array:
    # No position lies beyond the table: check_against refuses a model whose context is longer than it.
    return lookup(table, jnp.maximum(positions, 0) + self.offset, table.get_value().dtype)


# ------------------------------------------------------------------------------------- extensions of RoPE


class _NoGain:
  """A base for scalings that leave the length of queries and keys as it is."""

  def gain(self) -> float:
    return 1.0


@config_dataclass
class Interpolation(_NoGain, ScalingConfig, kind="linear"):
  """Position interpolation: divides positions by the factor (2306.15595)."""

  factor: float

  def __post_init__(self):
    check_at_least(self, 1, "factor")

  def frequencies(self, dims: int, theta: float, length: jax.Array | None):
    return rope.frequencies(dims, theta) / self.factor


@config_dataclass
class NTK(_NoGain, ScalingConfig, kind="ntk"):
  """NTK-aware scaling: a larger base, so that only the low frequencies are interpolated."""

  factor: float

  def __post_init__(self):
    check_at_least(self, 1, "factor")

  def frequencies(self, dims: int, theta: float, length: jax.Array | None):
    return rope.frequencies(dims, rope.ntk_base(dims, theta, self.factor))


@config_dataclass
class DynamicNTK(_NoGain, ScalingConfig, kind="dynamic_ntk"):
  """NTK-aware scaling by the length of the context; up to the original length, nothing changes."""

  factor: float
  original: int

  def __post_init__(self):
    check_at_least(self, 1, "factor", "original")

  def frequencies(self, dims: int, theta: float, length: jax.Array | None):
    return rope.dynamic_ntk_frequencies(dims, theta, self.factor, self.original, length)


@config_dataclass
class YaRN(ScalingConfig, kind="yarn"):
  """YaRN (2309.00071). If attention_factor is None, queries and keys are both scaled by 0.1 ln(factor) + 1."""

  factor: float
  original: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True  # rounds the ends of the ramp to whole pairs of dimensions (gpt-oss does not)

  def __post_init__(self):
    check_at_least(self, 1, "factor", "original")
    check(self.beta_fast >= self.beta_slow > 0, "beta_fast must be at least beta_slow, and both above 0")

  def frequencies(self, dims: int, theta: float, length: jax.Array | None):
    betas = self.beta_fast, self.beta_slow
    return rope.yarn_frequencies(dims, theta, self.factor, self.original, *betas, self.truncate)

  def gain(self) -> float:
    return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor


@config_dataclass
class Llama3Scaling(_NoGain, ScalingConfig, kind="llama3"):
  """Llama 3's scaling: divides low frequencies by the factor, keeps high ones, and blends those between."""

  factor: float
  original: int = 8192
  low_factor: float = 1.0
  high_factor: float = 4.0

  def __post_init__(self):
    check_at_least(self, 1, "factor", "original")
    check(self.high_factor > self.low_factor > 0, "high_factor must be above low_factor, and both above 0")

  def frequencies(self, dims: int, theta: float, length: jax.Array | None):
    return rope.llama3_frequencies(dims, theta, self.factor, self.original, self.low_factor, self.high_factor)


@config_dataclass
class LongRoPE(ScalingConfig, kind="longrope"):
  """LongRoPE: one divisor per frequency, with one list up to the original length and one beyond it (2402.13753).

  If attention_factor is None, it is sqrt(1 + ln(factor) / ln(original)), as in Phi-3.
  """

  short_factors: tuple[float, ...]
  long_factors: tuple[float, ...]
  original: int
  factor: float
  attention_factor: float | None = None

  def __post_init__(self):
    check_at_least(self, 1, "factor")
    check_at_least(self, 2, "original")
    for name in ("short_factors", "long_factors"):
      check(all(f > 0 for f in getattr(self, name)), f"{name} must all be above 0")

  def frequencies(self, dims: int, theta: float, length: jax.Array | None):
    short, long = (np.asarray(f) for f in (self.short_factors, self.long_factors))
    table = rope.frequencies(dims, theta)
    return jnp.where((length > self.original)[..., None], table / long, table / short)

  def gain(self) -> float:
    if self.attention_factor is not None:
      return self.attention_factor
    return math.sqrt(1 + math.log(self.factor) / math.log(self.original)) if self.factor > 1 else 1.0


# ------------------------------------------------------------------------------------------------- rotary


class Rotary:
  """The part that RoPE and xPos share: which dimensions rotate, and by how much."""

  def check_against(self, head_dim: int, max_seq_len: int):
    dims = self.rotated(head_dim)
    check(
      dims % 2 == 0 and 0 < dims <= head_dim,
      f"position.dims must be even, above 0 and at most head_dim={head_dim}, got {dims}",
    )
    scaling = getattr(self, "scaling", None)
    if isinstance(scaling, (NTK, DynamicNTK)):
      check(dims > 2, f"position.scaling={scaling.kind} needs more than 2 rotated dimensions, got {dims}")
    if isinstance(scaling, LongRoPE):
      for name in ("short_factors", "long_factors"):
        n = len(getattr(scaling, name))
        check(n == dims // 2, f"position.scaling.{name} has {n} entries; give {dims // 2}, one a rotated pair")

  def rotated(self, head_dim: int) -> int:
    """Number of a head's dimensions that rotate."""
    return head_dim if self.dims is None else self.dims


@config_dataclass
class RoPE(Rotary, PositionConfig, kind="rope"):
  """RoPE (2104.09864): rotates the first `dims` dimensions of a head (None: all of them)."""

  theta: float = 10000.0
  dims: int | None = None
  interleaved: bool = False  # rotates the pairs (2i, 2i+1), as GPT-J; false: (i, i + dims/2), as LLaMA
  scaling: ScalingConfig | None = None

  def __post_init__(self):
    check_above(self, 1, "theta")

  def turn(self, q, k, positions: jax.Array, length: jax.Array):
    """Rotates q [B, T, N, H] and k [B, T, K, H] (or None) by their positions [B, T].

    `length` [B, T or 1] is the length of the context, which some scalings read.
    """
    dims = self.rotated(q.shape[-1])
    if self.scaling is None:
      freqs, gain = rope.frequencies(dims, self.theta), 1.0
    else:
      freqs, gain = self.scaling.frequencies(dims, self.theta, length), self.scaling.gain()
    phase = rope.phases(positions, freqs)
    return tuple(x if x is None else rope.rotate(x, phase, interleaved=self.interleaved, gain=gain) for x in (q, k))


@config_dataclass
class XPos(Rotary, PositionConfig, kind="xpos"):
  """RoPE with products that decay with distance: q zeta^(m/scale_base), k zeta^(-n/scale_base) (2212.10554)."""

  theta: float = 10000.0
  dims: int | None = None
  interleaved: bool = True
  scale_base: float = 512.0

  def __post_init__(self):
    check_above(self, 1, "theta")
    check_above(self, 0, "scale_base")

  def turn(self, q, k, positions: jax.Array, length: jax.Array):
    dims = self.rotated(q.shape[-1])
    phase = rope.phases(positions, rope.frequencies(dims, self.theta))
    gains = rope.xpos_gains(positions, length, dims, self.scale_base)
    rotate = lambda x, gain: x if x is None else rope.rotate(x, phase, interleaved=self.interleaved, gain=gain)
    return tuple(rotate(x, gain) for x, gain in zip((q, k), gains))


# -------------------------------------------------------------------------------- biases on attention logits


@config_dataclass
class ALiBi(PositionConfig, kind="alibi"):
  """ALiBi: the bias -m_h |i - j|, with a slope m_h for each head (2108.12409).

  The paper's `max_bias` is 8; MPT calls it alibi_bias_max.
  """

  max_bias: float = 8.0

  def __post_init__(self):
    check_above(self, 0, "max_bias")

  def bias(self, table, distance: jax.Array, num_heads: int, bidirectional: bool) -> jax.Array:
    """Maps distances (key position - query position, int32 [B, T, S]) to the bias f32 [B, N, T, S]."""
    slopes = ops.alibi_slopes(num_heads) ** (self.max_bias / 8.0)
    return -jnp.asarray(slopes, jnp.float32)[:, None, None] * jnp.abs(distance)[:, None].astype(jnp.float32)


@config_dataclass
class T5Bias(PositionConfig, kind="t5_bias"):
  """A trained bias for each head and bucket of distances (1910.10683); all layers of a block's name share its table."""

  num_buckets: int = 32
  max_distance: int = 128

  def __post_init__(self):
    check_at_least(self, 4, "num_buckets")
    check(self.num_buckets % 2 == 0, f"num_buckets must be even, got {self.num_buckets}")
    check(
      self.max_distance > self.num_buckets // 2,
      f"max_distance={self.max_distance} must exceed num_buckets / 2 = {self.num_buckets // 2}",
    )

  def make_shared(self, num_heads: int, make: Maker):
    """The table [num_buckets, N], which the stack owns."""
    return make.weight("bias", "buckets heads", (self.num_buckets, num_heads), fan_in="buckets")

  def shared_size(self, num_heads: int) -> int:
    return self.num_buckets * num_heads

  def bias(self, table, distance: jax.Array, num_heads: int, bidirectional: bool) -> jax.Array:
    bucket = ops.t5_bucket(
      distance, num_buckets=self.num_buckets, max_distance=self.max_distance, bidirectional=bidirectional
    )
    return jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 1)


LogitBias = ALiBi | T5Bias
