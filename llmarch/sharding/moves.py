"""The face of the package for layers and ops: where an activation goes, and how parts of a sum are summed.

Each function acts by the active layout, and is the identity (or the plain sum) where there is none. In automatic mode
a move is a sharding constraint, and XLA places the collectives. In manual mode, inside a `jax.shard_map`, the moves
themselves are the collectives that the row implies, in the order of "Efficiently Scaling Transformer Inference"
(2211.05102), because XLA does not find them from constraints.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llmarch.sharding.active import (
  active_layout,
  automatic_axes,
  is_automatic,
  is_manual,
  mesh_axes,
  mesh_axes_of,
  mesh_sizes,
  num_parts,
  use_layout,
)
from llmarch.sharding.collectives import redistribute, reduce
from llmarch.sharding.places import ANY, RESIDUAL, TOKENS, Axis, axes_of, name_of, spec, split_of

# ------------------------------------------------------------------------------------------------ activations


def shard(x: jax.Array, *axes: Axis) -> jax.Array:
  """Constrains an activation to the place `axes`, in automatic mode. Otherwise it is the identity."""
  if not is_automatic():
    return x
  layout, mesh = active_layout()
  axes = ("layers",) * (x.ndim - len(axes)) + axes
  names = [None if axis is ANY else name_of(axis) for axis in axes]
  entries = spec(names, x.shape, layout, mesh)
  place = PartitionSpec(*(ANY if axis is ANY else entry for axis, entry in zip(axes, entries, strict=True)))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, place))


def move(x: jax.Array, have: Sequence[Axis], want: Sequence[Axis]) -> jax.Array:
  """The same array in another place: its dimensions lie as `have` names them, and then as `want` does."""
  if not is_manual():
    return shard(x, *want)
  return redistribute(x, [mesh_axes(a) for a in have], [mesh_axes(a) for a in want], mesh_sizes())


def replicated(param) -> jax.Array:
  """All of a (small) parameter, on every device."""
  if not is_manual():
    return param.get_value()
  return move(param.get_value(), param.axes, (None,) * len(param.axes))


def local(f: Callable, have: Sequence[Sequence[Axis]], want: Sequence[Sequence[Axis]]) -> Callable:
  """`f` in manual mode: each device runs it on its parts of the arguments, which lie as `have` names them, and holds
  its parts of the results, a tuple, which lie as `want` does. It is `f` itself where there is no automatic layout.

  Names of an argument that is a tree are those of all its leaves.
  """
  if not is_automatic():
    return f
  layout, mesh = active_layout()
  place = lambda axes: PartitionSpec(*(split_of(axis, layout, mesh) for axis in axes))

  def run(*args):
    with use_layout(layout, mesh, manual=True):
      return f(*args)

  return jax.shard_map(
    run, mesh=mesh, axis_names=automatic_axes(mesh), check_vma=False,
    in_specs=tuple(map(place, have)), out_specs=tuple(map(place, want)),
  )  # fmt: skip


# ---------------------------------------------------------------------------------------------- parts of sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partial:
  """What a branch returns, [B, T, D]: each device holds one summand of the sum over the mesh axes `over`.

  `over` is () where nothing is left to sum: without a layout, in automatic mode (where XLA sums) and in rings (which
  have summed already). Only what is linear may be done to it before `sum_over_mesh`: a norm, a gate of its own values
  or dropout must come after.
  """

  value: jax.Array
  over: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

  def __add__(self, other: "Partial") -> "Partial":
    """Equal `over`: the summands are added, and summed over the mesh once. Otherwise each is summed by itself."""
    if self.over == other.over:
      return Partial(self.value + other.value, self.over)
    return Partial(sum_over_mesh(self) + sum_over_mesh(other))

  def scaled(self, factor: jax.Array) -> "Partial":
    """The product with a factor that all devices of `over` have alike, such as a gate for each token [B, T, 1]."""
    return Partial(self.value * factor, self.over)


def sum_over_mesh(y: Partial) -> jax.Array:
  """The whole sum [B, T, D], in the residual stream's place.

  For example [batch, length, embed.x] partial over z, y -> [batch, length, embed.xzy], by two reduce-scatters.
  """
  if not y.over:
    return shard(y.value, *RESIDUAL)
  tokens = [mesh_axes(axis) for axis in TOKENS]
  embed = tuple(a for a in mesh_axes("embed") if a not in (*tokens[0], *tokens[1]))  # of a weight where it is used
  return reduce(y.value, y.over, [*tokens, embed], mesh_axes_of(RESIDUAL), mesh_sizes())


def mean_over_mesh(x: jax.Array, axis: Axis) -> jax.Array:
  """The mean over the last dimension, which is called `axis`, kept as 1."""
  here, axes = jnp.mean(x, axis=-1, keepdims=True), mesh_axes(axis)
  return jax.lax.pmean(here, axes) if axes else here


def any_over_mesh(x: jax.Array, axis: Axis) -> jax.Array:
  """Whether a bool scalar is true on any device, where each saw its own part of the dimension `axis`."""
  axes = mesh_axes(axis)
  return jax.lax.pmax(x.astype(jnp.int32), axes) > 0 if axes else x


def size_over_mesh(x: jax.Array, axis: Axis) -> int:
  """The size of the last dimension, which is called `axis`, over all devices."""
  return x.shape[-1] * num_parts(mesh_axes(axis))


# ------------------------------------------------------------------------------------------------- parameters


def at_use(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """A parameter where it meets activations: gathered over the mesh axes that split these (ZeRO-3).

  Its gradient is reduce-scattered at once: no device holds the full gradient. It is the identity without a layout,
  and in manual mode, where `ops.einsum` does the same.
  """
  if not is_automatic():
    return x
  layout, mesh = active_layout()
  busy = {a for axis in TOKENS for a in layout.mesh_axes(axis)}
  stored = axes_of(spec(axes, x.shape, layout, mesh))
  used = [tuple(a for a in names if a not in busy) for names in stored]
  if used == stored:
    return x
  return _gathered_for_use(x, *(NamedSharding(mesh, PartitionSpec(*names)) for names in (used, stored)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered_for_use(x: jax.Array, use: NamedSharding, stored: NamedSharding) -> jax.Array:
  """Constrains x to `use`, and its cotangent to `stored`."""
  return jax.lax.with_sharding_constraint(x, use)


_gathered_for_use.defvjp(
  lambda x, use, stored: (_gathered_for_use(x, use, stored), None),
  lambda use, stored, _, g: (jax.lax.with_sharding_constraint(g, stored),),
)
