"""The signature that mixers, cross-attentions and feed-forwards share: `out = branch(h, site)`.

B batch, T length, D model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from llmarch.layers.context import Context


@dataclasses.dataclass(frozen=True)
class Site:
  """Everything that a branch may know besides its input h [B, T, D]."""

  context: Context  # the tokens of this call, and an encoder's output
  layer: Any  # int32 scalar, traced or not: the number of this layer, counted from 0 at the bottom
  state: Any  # this branch's decoding state, in the form of its config's `state_spec`; None where there is none
  shared: jax.Array | None  # the parameter that all layers of this block's name share; None where there is none
  kept: Mapping[str, Any]  # values that earlier layers left, by name
  key: jax.Array | None  # random key; None switches all randomness off


@dataclasses.dataclass(frozen=True)
class Out:
  """The results of a branch or of a block."""

  y: Any  # of a branch: the Partial of a [B, T, D], which the block sums over the mesh; of a block: the new stream
  state: Any = None  # the new decoding state, in the form of the one that came in
  keep: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # values for later layers, by name
  stats: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)  # f32 scalars, for telemetry
  loss: jax.Array | None = None  # f32 scalar, a mean over this call's real tokens that includes its coefficient
