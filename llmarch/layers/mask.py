"""Attention masks as data: functions of what tokens are (positions, marks), never of where a buffer holds them.

`ops.attention.visible` asks a mask for pairs of tokens, after it has excluded padding and other segments, and it puts
a window on any mask: keys at that distance or beyond are not seen.

B batch, T queries, S keys, N heads of this device.
"""

from typing import ClassVar, NamedTuple

import jax

from llmarch.build import Variant, config_dataclass
from llmarch.ops.attention import Extent, Keys


class Heads(NamedTuple):
  """Which heads of which layer ask, for masks that differ between them."""

  heads: jax.Array  # int32 [N]
  layer: jax.Array  # int32 scalar


class MaskConfig(Variant):
  """A mask. A member says `sees` and `mean_keys`; the other answers are those of a mask of distances alone."""

  by_name = True

  # What `sees` depends on, of "distance", "position", "marks", "head", "layer": a kernel may serve some of these alone.
  reads: ClassVar[frozenset[str]] = frozenset({"distance"})
  ahead: ClassVar[bool] = False  # a token sees later ones, marked or not: a model with it cannot decode

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    """bool, broadcast to [B, 1 or N, T, S]: the query sees the key. q: [B, 1, T, 1] each; k: [B, 1, 1, S] each."""
    raise NotImplementedError

  def may_see(self, q: Extent, k: Extent) -> jax.Array:
    """bool [B]: true wherever some query of a block of tokens may see some key of another, by their extents."""
    return q.high >= 0

  def mean_keys(self, length: int, window: int | None) -> float:
    """Keys that a query sees, averaged over one document of `length` tokens."""
    raise NotImplementedError

  def slot(self, index: jax.Array, capacity: int) -> jax.Array:
    """Where a row's token number `index` is cached in a buffer of `capacity` slots: a ring."""
    return index % capacity

  def order(self, position: jax.Array) -> jax.Array | None:
    """A sort key of tokens, by which the keys that a query sees lie together; None: they do as they stand."""
    return None


def _causal_keys(length: int, window: int | None) -> float:
  """(length + 1) / 2, or sum_t min(t, w) / length with a window of w."""
  w = length if window is None else min(window, length)
  return (w * (w + 1) / 2 + (length - w) * w) / length


@config_dataclass
class Causal(MaskConfig, kind="causal"):
  """A token sees itself and what lies before it."""

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    return k.positions <= q.positions

  def may_see(self, q: Extent, k: Extent) -> jax.Array:
    return k.low <= q.high

  def mean_keys(self, length: int, window: int | None) -> float:
    return _causal_keys(length, window)


@config_dataclass
class Bidirectional(MaskConfig, kind="bidirectional"):
  """A token sees all of its document."""

  ahead = True

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    return q.positions == q.positions

  def mean_keys(self, length: int, window: int | None) -> float:
    """As many on both sides as causally on one, and itself once."""
    return 2 * _causal_keys(length, window) - 1


@config_dataclass
class Prefix(MaskConfig, kind="prefix"):
  """Causal, and every token that is marked as prefix is seen by its whole document (PrefixLM of 1910.10683)."""

  reads = frozenset({"distance", "marks"})

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    past = k.positions <= q.positions
    return past if k.prefix is None else past | k.prefix

  def may_see(self, q: Extent, k: Extent) -> jax.Array:
    return (k.low <= q.high) | k.marked

  def mean_keys(self, length: int, window: int | None) -> float:
    """As causal: how long the prefix is, is not known here."""
    return _causal_keys(length, window)
