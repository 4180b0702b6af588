"""Attention masks as data: functions of tokens' positions and marks, never of the slots in which a buffer holds them.

`ops.attention.visible` asks a mask about pairs of tokens after it has excluded padding and other segments. A window
composes with every mask: keys at that distance or farther are not seen.

B batch, T queries, S keys, N heads of this device.
"""

from typing import ClassVar, NamedTuple

import jax

from llmarch.build import Variant, config_dataclass
from llmarch.ops.attention import Extent, Keys


class Heads(NamedTuple):
  """The heads and the layer that ask, for masks that differ between them."""

  heads: jax.Array  # int32 [N]
  layer: jax.Array  # int32 scalar


class MaskConfig(Variant):
  """A mask. Each member defines `sees` and `mean_keys`; the defaults here fit masks of the distance alone."""

  by_name = True

  # What `sees` depends on: "distance", "position", "marks", "head", "layer". A kernel may support only some of these.
  reads: ClassVar[frozenset[str]] = frozenset({"distance"})
  ahead: ClassVar[bool] = False  # a token sees later, unmarked tokens, so a model with this mask cannot decode

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    """Says which keys each query sees, as bool [B, 1 or N, T, S] or what broadcasts to it.

    Each array of q is [B, 1, T, 1], and each array of k is [B, 1, 1, S].
    """
    raise NotImplementedError  # each member says

  def may_see(self, q: Extent, k: Extent) -> jax.Array:
    """Says, as bool [B], whether any query of one block of tokens may see any key of another, from their extents."""
    return q.high >= 0

  def mean_keys(self, length: int, window: int | None) -> float:
    """Number of keys that a query sees, averaged over one document of `length` tokens."""
    raise NotImplementedError  # each member says

  def slot(self, index: jax.Array, capacity: int) -> jax.Array:
    """The slot, of `capacity` slots, that caches a row's token number `index`; by default that of a ring buffer."""
    return index % capacity

  def order(self, position: jax.Array) -> jax.Array | None:
    """A sort key that brings the keys which a query sees together; None if they are contiguous unsorted."""
    return None


def _causal_keys(length: int, window: int | None) -> float:
  """Mean number of keys under a causal mask: (length + 1) / 2, or sum_t min(t, w) / length with a window of w."""
  w = length if window is None else min(window, length)
  return (w * (w + 1) / 2 + (length - w) * w) / length


@config_dataclass
class Causal(MaskConfig, kind="causal"):
  """The causal mask: a token sees itself and earlier tokens."""

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    return k.positions <= q.positions

  def may_see(self, q: Extent, k: Extent) -> jax.Array:
    return k.low <= q.high

  def mean_keys(self, length: int, window: int | None) -> float:
    return _causal_keys(length, window)


@config_dataclass
class Bidirectional(MaskConfig, kind="bidirectional"):
  """The bidirectional mask: a token sees its whole document."""

  ahead = True

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    return q.positions == q.positions

  def mean_keys(self, length: int, window: int | None) -> float:
    """A query sees as many keys on each side as causally on one, and itself once."""
    return 2 * _causal_keys(length, window) - 1


@config_dataclass
class Prefix(MaskConfig, kind="prefix"):
  """The prefix-LM mask: causal, but the whole document sees every token marked as prefix (1910.10683)."""

  reads = frozenset({"distance", "marks"})

  def sees(self, q: Keys, k: Keys, which: Heads | None) -> jax.Array:
    past = k.positions <= q.positions
    return past if k.prefix is None else past | k.prefix

  def may_see(self, q: Extent, k: Extent) -> jax.Array:
    return (k.low <= q.high) | k.marked

  def mean_keys(self, length: int, window: int | None) -> float:
    """Counts as the causal mask does, since the length of the prefix is not known here."""
    return _causal_keys(length, window)
