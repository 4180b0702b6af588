"""The layout and the mesh under which code is traced now, and what they say of a logical axis.

Layers and ops do not take a layout as an argument: `use_layout` sets it around the body of a jitted function, and
the functions of moves.py and ops/einsum.py read it.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
from jax.sharding import AxisType, Mesh

from llmarch.sharding.places import Axis, split_of, ways
from llmarch.sharding.table import SPLIT_OVER_FREE_AXES, Layout

# How products are placed. None: there is no layout. "constraints" and "local": XLA's automatic mode, in the two ways
# of Layout.products. "manual": inside a `jax.shard_map` over the mesh, where arrays are what one device holds.
# "rings": the same, with looped collective einsums.
Mode = Literal[None, "constraints", "local", "manual", "rings"]


class _Active(NamedTuple):
  layout: Layout
  mesh: Mesh
  manual: bool


_active: contextvars.ContextVar[_Active | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout | None, mesh: Mesh | None, *, manual: bool = False):
  """Sets the layout for the code inside; without a mesh there is none. manual: the code runs inside a `jax.shard_map`
  over all axes of the mesh.

  Enter it inside the jitted function: a context outside is not in jit's cache key.
  """
  token = _active.set(_Active(layout, mesh, manual) if mesh is not None else None)
  try:
    yield
  finally:
    _active.reset(token)


def with_active_layout(f: Callable) -> Callable:
  """`f`, run under the layout that is active now. JAX calls a custom gradient rule after the `with use_layout` block
  has ended, so the rule must take its layout along."""
  active = _active.get()

  def run(*args):
    token = _active.set(active)
    try:
      return f(*args)
    finally:
      _active.reset(token)

  return run


def mode() -> Mode:
  """Returns how products are placed under the active layout."""
  active = _active.get()
  if active is None:
    return None
  if not active.manual:
    return active.layout.products
  return "rings" if active.layout.ring else "manual"


def is_manual() -> bool:
  """Returns whether an array is the part that one device holds."""
  return mode() in ("manual", "rings")


def is_automatic() -> bool:
  """Tells whether arrays lie over a mesh, and XLA places the collectives."""
  return mode() in ("constraints", "local")


def active_layout() -> tuple[Layout, Mesh]:
  """The layout and the mesh in use; there must be one."""
  return _active.get()[:2]


def mesh_sizes() -> Mapping[str, int]:
  """The mesh in use as {axis: size}, in its own order."""
  return _active.get().mesh.shape


def automatic_axes(mesh: Mesh) -> set[str]:
  """The mesh axes that no `jax.shard_map` around this code has made manual already (train/pipeline.py does)."""
  return {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def mesh_axes(axis: Axis) -> tuple[str, ...]:
  """The mesh axes over which a dimension of this name lies, in manual mode; otherwise none."""
  return split_of(axis, *active_layout()) if is_manual() and axis is not None else ()


def mesh_axes_of(place: Sequence[Axis]) -> list[tuple[str, ...]]:
  """`mesh_axes` of all dimensions of one array."""
  found = []
  for axis in place:
    if is_manual() and isinstance(axis, tuple) and axis[0] in SPLIT_OVER_FREE_AXES:
      found.append(split_of(axis, *active_layout(), [a for names in found for a in names]))
    else:
      found.append(mesh_axes(axis))
  return found


def ring_form() -> str | None:
  """The form in which the active layout takes gathers and scatters of activations apart; see RING_FORMS."""
  return _active.get().layout.ring


def is_split(name: str) -> bool:
  """Whether the active layout splits the dimension of this name, in automatic mode."""
  return is_automatic() and ways(name, *active_layout()) > 1


def num_parts(axes: Sequence[str]) -> int:
  """Into how many parts these mesh axes split a dimension."""
  return math.prod(mesh_sizes()[a] for a in axes) if axes else 1


def part_index(axes: tuple[str, ...]) -> jax.Array | int:
  """Which part this device holds of a dimension that these mesh axes split."""
  return jax.lax.axis_index(axes) if axes else 0
