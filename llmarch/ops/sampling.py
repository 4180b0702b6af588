"""Sampling of a token from logits: filters in the order of `transformers`, which remove tokens by setting -inf.

B batch, V vocabulary. Logits are f32 [B, V]; no row depends on another. The numbers of a filter may be traced arrays,
so that one compiled program serves them all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmarch.build import config_dataclass
from llmarch.errors import check, check_at_least


@config_dataclass
class Sampling:
  """The rule by which the next token is chosen. The defaults are greedy."""

  temperature: float = 0.0  # 0: the most likely token
  top_k: int = 0  # 0: no limit
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    check_at_least(self, 0, "temperature", "top_k")
    check(
      self.temperature == 0 or self.temperature >= 1e-4,
      f"temperature={self.temperature} overflows the logits; give 0 for the most likely token, or at least 1e-4",
    )
    check(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}")
    check(0 <= self.min_p <= 1, f"min_p must lie between 0 and 1, got {self.min_p}")
    check(
      1e-4 <= self.repetition_penalty <= 1e4,
      f"repetition_penalty must lie between 1e-4 and 1e4 (1 is none), got {self.repetition_penalty}",
    )

  @property
  def penalises(self) -> bool:
    return self.repetition_penalty != 1

  def numbers(self) -> "Numbers":
    """The fields as arguments of a program."""
    f32 = lambda x: np.float32(x)
    top = f32(self.temperature), np.int32(self.top_k), f32(self.top_p), f32(self.min_p)
    return Numbers(*top, f32(self.repetition_penalty))


class Numbers(NamedTuple):
  """The fields of `Sampling` as scalars, f32 and (top_k) int32."""

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  repetition_penalty: jax.Array


def penalise_repetition(logits: jax.Array, seen: jax.Array, *, penalty) -> jax.Array:
  """Divides positive logits of tokens in `seen` bool [B, V] by the penalty and multiplies others by it (1909.05858)."""
  penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(seen, penalised, logits)


def top_k_and_p(logits: jax.Array, *, k, p) -> jax.Array:
  """Keeps the k largest logits (1805.04833; 0: all), then the most likely, up to the probability p  (1904.09751).

  Logits that equal the smallest one kept are kept too, so that the result does not depend on a sorting order.
  """
  V = logits.shape[-1]
  descending = jnp.sort(logits, axis=-1, descending=True)
  last = jnp.where(k > 0, k, V) - 1
  descending = jnp.where(descending < jnp.take(descending, last, axis=-1)[:, None], -jnp.inf, descending)
  probability = jax.nn.softmax(descending, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  kept = jnp.isfinite(descending) & ((before < p) | (jnp.float32(p) >= 1))  # the sum of all may round to 1 too early
  smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits < smallest, -jnp.inf, logits)


def min_p(logits: jax.Array, *, p) -> jax.Array:
  """Keeps the tokens whose probability is at least p times the largest probability  (2407.01082)."""
  probability = jax.nn.softmax(logits, axis=-1)
  keep = probability >= p * jnp.max(probability, axis=-1, keepdims=True)
  return jnp.where(keep, logits, -jnp.inf)


def filtered(logits: jax.Array, seen: jax.Array | None, *, sampling: Sampling | Numbers) -> jax.Array:
  """The logits from which a temperature above 0 samples. `seen` may be None if there is no repetition penalty."""
  s = sampling
  if seen is not None:
    logits = penalise_repetition(logits, seen, penalty=s.repetition_penalty)
  logits = logits / s.temperature
  sorts = (jnp.int32(s.top_k) > 0) | (jnp.float32(s.top_p) < 1)  # a sort of the vocabulary may cost more than a layer
  logits = jax.lax.cond(sorts, lambda x: top_k_and_p(x, k=s.top_k, p=s.top_p), lambda x: x, logits)
  return min_p(logits, p=s.min_p)


def sample(logits: jax.Array, seen: jax.Array | None, keys: jax.Array | None, *, sampling: Sampling | Numbers):
  """Draws a token for each row: f32 [B, V], bool [B, V] or None, keys [B] -> int32 [B].

  Without keys it takes the most likely one, whatever the temperature. The caller refuses logits that are not finite.
  """
  if keys is None:
    if seen is not None:
      logits = penalise_repetition(logits, seen, penalty=sampling.repetition_penalty)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = filtered(logits, seen, sampling=sampling)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
