"""Sampling of a token from logits: filters in the order of `transformers`, which remove tokens by setting -inf.

B batch, V vocabulary. Logits are f32 [B, V]; no row depends on another.
"""

import jax
import jax.numpy as jnp

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


def penalise_repetition(logits: jax.Array, seen: jax.Array, *, penalty: float) -> jax.Array:
  """Divides positive logits of tokens in `seen` bool [B, V] by the penalty and multiplies others by it (1909.05858)."""
  penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(seen, penalised, logits)


def top_k(logits: jax.Array, *, k: int) -> jax.Array:
  """Keeps the k largest logits, and those that equal the smallest of them  (1805.04833)."""
  smallest = jax.lax.top_k(logits, k)[0][:, -1:]
  return jnp.where(logits < smallest, -jnp.inf, logits)


def top_p(logits: jax.Array, *, p: float) -> jax.Array:
  """Keeps the most likely tokens, up to the one that completes the probability p  (1904.09751).

  Tokens as likely as the last one kept are kept too, so that the result does not depend on a sorting order.
  """
  descending = jnp.sort(logits, axis=-1, descending=True)
  probability = jax.nn.softmax(descending, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  smallest = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits < smallest, -jnp.inf, logits)


def min_p(logits: jax.Array, *, p: float) -> jax.Array:
  """Keeps the tokens whose probability is at least p times the largest probability  (2407.01082)."""
  probability = jax.nn.softmax(logits, axis=-1)
  keep = probability >= p * jnp.max(probability, axis=-1, keepdims=True)
  return jnp.where(keep, logits, -jnp.inf)


def filtered(logits: jax.Array, seen: jax.Array | None, *, sampling: Sampling) -> jax.Array:
  """The logits from which a temperature above 0 samples. `seen` may be None if there is no repetition penalty."""
  s = sampling
  if s.repetition_penalty != 1:
    logits = penalise_repetition(logits, seen, penalty=s.repetition_penalty)
  if s.temperature > 0:
    logits = logits / s.temperature
    logits = top_k(logits, k=s.top_k) if s.top_k else logits
    logits = top_p(logits, p=s.top_p) if s.top_p < 1 else logits
    logits = min_p(logits, p=s.min_p) if s.min_p else logits
  return logits


def sample(logits: jax.Array, seen: jax.Array | None, keys: jax.Array, *, sampling: Sampling) -> jax.Array:
  """Draws a token for each row: f32 [B, V], bool [B, V] or None, keys [B] -> int32 [B].

  The caller refuses logits that are not finite.
  """
  logits = filtered(logits, seen, sampling=sampling)
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
