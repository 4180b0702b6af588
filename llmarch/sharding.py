"""Layouts: tables from logical axis names to mesh axes, and everything that reads them.

Parameters carry names (`axes` of an `nnx.Param`), activations are named at a few fixed points by `shard`,
and states by their spec. Nothing else in the code knows a mesh.
"""

import contextlib
import contextvars
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmarch.config import UserError, check

Layout = Mapping[str, str | tuple[str, ...] | None]

# Names:  parameters   vocab embed heads kv_heads head_dim mlp layers
#         residual     batch length act_embed
#         inside       act_heads act_kv_heads act_mlp
#         state        cache_batch cache_heads cache_length
#         output       act_vocab
# A name that a row does not list is replicated.
LAYOUTS: dict[str, Layout] = {
  # Batch over `data`; Megatron tensor parallelism over `tensor`: heads, mlp and vocab are split, the
  # residual stream is replicated over `tensor`, and each branch ends in one all-reduce (1909.08053).
  "megatron": {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "batch": "data",
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "cache_batch": "data",
    "cache_heads": "tensor",
    "act_vocab": "tensor",
  },
}

# Multi-query attention has fewer key-value heads than a tensor axis has devices; Megatron-style systems
# replicate them there. Every other indivisible axis is an error.
REPLICATE_IF_INDIVISIBLE = {"kv_heads", "act_kv_heads", "cache_heads"}

MESH_AXES = ("data", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
  """'data=2,tensor=4' -> {'data': 2, 'tensor': 4}; '' is one device. Raises UserError."""
  sizes = dict.fromkeys(MESH_AXES, 1)
  for part in filter(None, text.split(",")):
    name, _, size = part.partition("=")
    if name.strip() not in sizes or not size.strip().isdigit() or int(size) < 1:
      raise UserError(f"mesh: cannot read {part!r}; write it as 'data=2,tensor=4' (axes: {', '.join(sizes)})")
    sizes[name.strip()] = int(size)
  return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
  """A mesh of exactly these devices (None: all there are). Raises UserError unless the sizes multiply to them."""
  need = math.prod(sizes.values())
  devices = jax.devices() if devices is None else devices
  # jax.make_mesh would leave the rest idle without a word.
  count = len(devices)
  check(need == count, f"mesh {dict(sizes)} covers {need} devices of {count}; make the sizes multiply to {count}")
  # Auto: GSPMD places the collectives (jax.make_mesh would make the axes Explicit).
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def spec(axes: Sequence[str | None], shape: Sequence[int], layout: Layout, mesh: Mesh) -> PartitionSpec:
  """The PartitionSpec of an array of this shape whose dimensions bear these logical names.

  A rank above len(axes) means stacked layers: the names are padded on the left with "layers".
  Raises UserError where one mesh axis would be used twice or does not divide its dimension.
  """
  axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
  entries, used = [], {}
  for name, size in zip(axes, shape, strict=True):
    target = layout.get(name) if name else None
    names = (target,) if isinstance(target, str) else (target or ())
    parts = math.prod(mesh.shape[n] for n in names)
    if size % parts:
      if name not in REPLICATE_IF_INDIVISIBLE:
        raise UserError(f"axis {name!r} of size {size} is not divisible by mesh axis {'*'.join(names)}={parts}")
      names = ()
    for n in names:
      if n in used:
        raise UserError(f"mesh axis {n!r} would shard both {used[n]!r} and {name!r} of one array")
      used[n] = name
    entries.append(names if len(names) > 1 else names[0] if names else None)
  return PartitionSpec(*entries)


_active: contextvars.ContextVar = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout, mesh: Mesh | None):
  """Makes `shard` act. Enter it inside the jitted function: a context outside is not in jit's cache key."""
  token = _active.set((layout, mesh) if mesh is not None else None)
  try:
    yield
  finally:
    _active.reset(token)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation to the active layout; the identity where there is none."""
  active = _active.get()
  if active is None:
    return x
  layout, mesh = active
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, layout, mesh)))


def shardings(tree, layout: Layout, mesh: Mesh):
  """The NamedSharding of every named leaf: a Param, or a state Spec. Unnamed leaves are replicated.

  One function serves parameters, optimizer moments (they are Params too) and decoding state.
  """
  named = lambda leaf: hasattr(leaf, "axes")

  def one(leaf):
    axes = leaf.axes if named(leaf) else (None,) * len(leaf.shape)
    sharding = NamedSharding(mesh, spec(axes, leaf.shape, layout, mesh))
    return leaf.replace(sharding) if hasattr(leaf, "replace") and named(leaf) else sharding

  return jax.tree.map(one, tree, is_leaf=named)
