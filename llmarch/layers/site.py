"""The one signature of mixers, cross-attentions and feed-forwards: `out = branch(h, site)`.

B batch, T length, D model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from llmarch.layers.context import Context


@dataclasses.dataclass(frozen=True)
class Site:
  """Where a branch stands: all that it may know besides its input h [B, T, D]."""

  context: Context  # of the tokens of this call, and of an encoder's output
  layer: Any  # int32 scalar, traced or not: the number of this layer, 0 at the bottom
  state: Any  # this branch's decoding state, in the form of its config's `state_spec`; None where there is none
  shared: jax.Array | None  # the parameter that all layers of this block's name share
  kept: Mapping[str, Any]  # what earlier layers left, by name
  key: jax.Array | None  # randomness happens if it is given


@dataclasses.dataclass(frozen=True)
class Out:
  """What a branch gives back."""

  y: Any  # the Partial (sharding.Partial) of a [B, T, D]: the block sums it over the mesh; of a block, the stream
  state: Any = None  # the new state, in the form of the one that came in
  keep: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # values for later layers, by name
  stats: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)  # f32 scalars, for telemetry
  loss: jax.Array | None = None  # f32 scalar: a mean over this call's real tokens, its coefficient included
