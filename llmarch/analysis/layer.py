"""A description of a layout: its row, its places, and the collectives of one layer in order.

The collectives come from the layer's traced program; nothing is compiled. A layer is the difference between a model of
two layers and a model of one. In manual mode every collective is in the program. In automatic mode, some are in its
local programs (`sharding.local`), and XLA must add others where a constraint moves an array to another place. The place
of an array is followed through operations that keep its shape, and `sharding.redistribute` says which collectives move
it from there to the next place.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from llmarch import sharding
from llmarch.config import BlockConfig, ModelConfig
from llmarch.infer.decoder import check_sizes
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.norm import RMSNorm
from llmarch.layers.position import RoPE
from llmarch.mesh_checks import check_training, plan_pipeline
from llmarch.models.decoder import Decoder, unstack
from llmarch.run_config import RunConfig
from llmarch.sharding import Layout
from llmarch.sharding.mesh_text import LENGTH

MESHES = {"train": "fsdp=2,sequence=2,tensor=2", "megatron": "data=2,tensor=4"}  # default meshes of rows
MESH = "x=2,y=2,z=2"
PLACES = ("RESIDUAL", "NORMED", "BRANCH", "PROJECTED", "ATTENDING", "SCORES", "LATENT")


KINDS = {  # names of jax's primitives in the words of HLO
  "all_gather": "all-gather",
  "all_to_all": "all-to-all",
  "pmax": "all-reduce",
  "ppermute": "collective-permute",
  "psum": "all-reduce",
  "reduce_scatter": "reduce-scatter",
}


class Collective(NamedTuple):
  """One collective of one device, or `count` of them in a loop."""

  kind: str  # a kind as in HLO
  axes: tuple[str, ...]  # mesh axes within which devices communicate
  shape: tuple[int, ...]  # shape of the array that a device sends
  dtype: str
  count: int
  where: str  # the module of layers/ that asks for it
  implied: bool = False  # XLA adds it, to move an array to another place


def describe_layout(name: str, mesh: str | None = None, config: RunConfig | None = None) -> dict:
  """Describes the row, the places and the collectives of a layout as plain data.

  mesh: None means one of 8 devices. config: its blocks are described; None means one small block that the mesh divides.
  Raises UserError.
  """
  text = MESHES.get(name.split("+")[0], MESH) if mesh is None else mesh
  sizes = sharding.parse_mesh(text)
  devices = abstract_mesh(sizes)
  training = name == sharding.TRAIN.name
  layout = sharding.TRAIN if training else sharding.find_layout(name, devices)
  sharding.check_axes(layout, devices)
  n = math.prod(sizes.values())
  batch, length = n * math.ceil(8 / n), 16
  if training:
    length *= math.prod(sizes[axis] for axis in LENGTH)
    if config is not None:
      check_training(text, config.model, config.train)
      batch, length = config.train.batch_size // config.train.grad_accum, config.train.seq_len
      if stages := plan_pipeline(sizes, config.model, config.train):
        batch //= stages[1]  # a layer works on one microbatch
  model = small_model(n, length) if config is None else config.model
  if not training:
    check_sizes(model, layout, devices)
  split_by = lambda axes: [a for a in axes if sizes[a] > 1]
  collectives = {
    block: layer_collectives(model, block, layout, devices, batch, length) for block in model.blocks
  }
  return {
    "layout": layout.name,
    "mesh": {axis: size for axis, size in sizes.items() if size > 1},
    "products": layout.products if training else ("rings" if layout.ring else "manual"),
    "axes": {
      part: {axis: split_by(layout.mesh_axes(axis)) for axis in names.split()} for part, names in sharding.AXES.items()
    },
    "places": {place: sharding.notation(getattr(sharding, place), layout, sizes) for place in PLACES},
    "tokens": [batch, length],
    "collectives": {block: [c._asdict() for c in found] for block, found in collectives.items()},
  }


def small_model(devices: int, length: int) -> ModelConfig:
  """A model with one block, attention and a gated feed-forward, whose sizes any mesh of `devices` devices divides."""
  heads = devices * math.ceil(8 / devices)
  block = BlockConfig(
    mixer=AttentionConfig(num_heads=heads, head_dim=16, position=RoPE()), ffn=MLPConfig(d_ff=32 * heads), norm=RMSNorm()
  )
  return ModelConfig(
    d_model=8 * heads, vocab_size=8 * heads, max_seq_len=length, blocks={"layer": block}, stack="1*layer"
  )


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
  """A mesh without devices, under which programs can be traced."""
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def layer_collectives(
  config: ModelConfig, name: str, layout: Layout, mesh: AbstractMesh, batch: int, length: int
) -> list[Collective]:
  """The collectives of one layer of the block `name`, on `batch` x `length` tokens without a decoding state.

  An inference row is traced in manual mode, as `make_decoder` runs it; the row of training in automatic mode, within a
  stage. Raises UserError for sizes that the mesh does not divide.
  """
  layout = layout.without("stage")
  one, two = (_trunk_collectives(_stack_of(config, name, n), layout, mesh, batch, length) for n in (1, 2))
  return two[len(one) :]


def program(config: ModelConfig, layout: Layout, mesh, batch: int, length: int) -> tuple[Callable, tuple, tuple]:
  """The model below its head: a function to trace or compile, its abstract arguments, and their PartitionSpecs."""
  model = nnx.eval_shape(lambda: unstack(Decoder(config, jax.random.key(0))))
  graph, params = nnx.split(model)
  manual = layout.products != "local"

  def run_trunk(params, tokens, positions):
    with sharding.use_layout(layout, mesh, manual=manual):
      return nnx.merge(graph, params).trunk(tokens, positions)[0]

  rows = sharding.spec(sharding.TOKENS, (batch, length), layout, mesh)
  specs = jax.tree.map(lambda s: s.spec, sharding.shardings(params, layout, mesh)), rows, rows
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  if manual:
    out = sharding.spec(sharding.RESIDUAL, (batch, length, config.d_model), layout, mesh)
    run_trunk = jax.shard_map(run_trunk, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
  return run_trunk, (params, tokens, tokens), specs


def _stack_of(config: ModelConfig, name: str, layers: int) -> ModelConfig:
  """A model of `layers` layers of one block, on top of the blocks whose kept values that block reads."""
  branches = {block: config.blocks[block].branches.values() for block in config.blocks}
  read = {value for branch in branches[name] for value in branch.reads_kept}
  owners = [block for block in branches if any(read & {*branch.keeps} for branch in branches[block])]
  blocks = {block: config.blocks[block] for block in (*owners, name)}
  return dataclasses.replace(config, blocks=blocks, stack=" ".join([*owners, f"{layers}*{name}"]))


def _trunk_collectives(config: ModelConfig, layout: Layout, mesh, batch: int, length: int) -> list[Collective]:
  run, arguments, specs = program(config, layout, mesh, batch, length)
  traced = jax.make_jaxpr(run)(*arguments)
  specs = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
  known = [Place(_padded(spec, v.aval.ndim)) for spec, v in zip(specs, traced.jaxpr.invars, strict=True)]
  return list(_Reader(mesh).read(traced.jaxpr, known, {}))


class Place(NamedTuple):
  """The place of an array in an automatic program."""

  axes: list[tuple[str, ...]]  # mesh axes of each dimension
  pending: tuple[str, ...] = ()  # mesh axes over which the array is still to be summed


class _Reader:
  """Walks a program in order, and keeps the places of its arrays as far as they are known."""

  def __init__(self, mesh):
    self.mesh = mesh

  def read(
    self, jaxpr, places: list[Place | None], ends: dict, count: int = 1, outer: str = ""
  ) -> Iterator[Collective]:
    """Yields the collectives of a program whose arguments are at `places`; `ends` gets the places of its results.

    outer: the module that asks for the program itself.
    """
    known = dict(zip(jaxpr.invars, places, strict=True))
    place_of = lambda v: known.get(v) if not hasattr(v, "val") else None  # literals have no place
    for eqn in jaxpr.eqns:
      name, inner = eqn.primitive.name, _inner(eqn)
      here, where = [place_of(v) for v in eqn.invars], _asked_in(eqn) or outer
      if name in KINDS:
        axes = eqn.params.get("axes", eqn.params.get("axis_name"))
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        for v in eqn.invars:
          yield Collective(KINDS[name], axes, v.aval.shape, str(v.aval.dtype), count, where)
      elif name == "sharding_constraint":
        want = _place_after(here[0], eqn.params["sharding"].spec, eqn.invars[0].aval.ndim)
        yield from self._implied(eqn.invars[0].aval, here[0], want, count, where)
        known[eqn.outvars[0]] = Place(want)
      elif name == "shard_map":
        for v, place, spec in zip(eqn.invars, here, eqn.params["in_specs"], strict=True):
          yield from self._implied(v.aval, place, _padded(spec, v.aval.ndim), count, where)
        yield from self.read(inner, [None] * len(inner.invars), {}, count, where)
        for v, spec in zip(eqn.outvars, eqn.params["out_specs"], strict=True):
          known[v] = Place(_padded(spec, v.aval.ndim))
      elif name == "scan":  # the inner program sees one slice of each argument
        yield from self.read(inner, [None] * len(inner.invars), {}, count * eqn.params["length"], where)
      elif inner is not None:
        found, same = {}, len(inner.invars) == len(here)
        yield from self.read(inner, here if same else [None] * len(inner.invars), found, count, where)
        known |= {v: found.get(w) for v, w in zip(eqn.outvars, inner.outvars, strict=False)}
      elif name == "dot_general":
        known[eqn.outvars[0]] = _multiplied(*here, eqn)
      elif name == "reshape":
        known[eqn.outvars[0]] = here[0] and _reshaped(here[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)
      else:
        for out in eqn.outvars:
          alike = (p for v, p in zip(eqn.invars, here, strict=True) if getattr(v.aval, "shape", None) == out.aval.shape)
          known[out] = next((place for place in alike if place is not None), None)
    ends |= {v: place_of(v) for v in jaxpr.outvars if not hasattr(v, "val")}

  def _implied(self, aval, have: Place | None, want: list, count: int, where: str) -> Iterator[Collective]:
    """Yields the collectives that sum an array and move it to another place."""
    if have is None or (have.axes == want and not have.pending):
      return
    move_array = lambda x: sharding.reduce(x, have.pending, have.axes, want, self.mesh.shape)
    specs = dict(in_specs=PartitionSpec(*have.axes), out_specs=PartitionSpec(*want))
    moved = jax.make_jaxpr(jax.shard_map(move_array, mesh=self.mesh, check_vma=False, **specs))
    for c in self.read(moved(jax.ShapeDtypeStruct(aval.shape, aval.dtype)).jaxpr, [None], {}, count):
      yield c._replace(where=where, implied=True)


def _padded(spec, ndim: int) -> list[tuple[str, ...]]:
  """The mesh axes of all dimensions of an array with this PartitionSpec."""
  axes = sharding.axes_of(spec)
  return axes + [()] * (ndim - len(axes))


def _place_after(have: Place | None, spec, ndim: int) -> list[tuple[str, ...]]:
  """The place where a constraint puts an array; a dimension that it leaves free stays as it is."""
  free = [entry is PartitionSpec.UNCONSTRAINED for entry in spec]
  want = _padded([None if f else entry for f, entry in zip(free, spec, strict=True)], ndim)
  return [have.axes[d] if have and d < len(free) and free[d] else axes for d, axes in enumerate(want)]


def _multiplied(lhs: Place | None, rhs: Place | None, eqn) -> Place | None:
  """The place of a product: its dimensions are split as its factors' are, and it is partial over the summed ones."""
  (summed, summed_too), (batch, batch_too) = eqn.params["dimension_numbers"]
  if lhs is None or rhs is None or [lhs.axes[d] for d in summed] != [rhs.axes[d] for d in summed_too]:
    return None
  left = [axes for d, axes in enumerate(lhs.axes) if d not in (*summed, *batch)]
  right = [axes for d, axes in enumerate(rhs.axes) if d not in (*summed_too, *batch_too)]
  return Place([*(lhs.axes[d] for d in batch), *left, *right], tuple(a for d in summed for a in lhs.axes[d]))


def _reshaped(place: Place, old: tuple[int, ...], new: tuple[int, ...]) -> Place | None:
  """The place of a reshaped array; None if it cannot be known.

  Dimensions that are merged are split as the first of them was, and a dimension that is divided passes its split to the
  first of its parts. None if any other of them was split.
  """
  axes, i, j = [()] * len(new), 0, 0
  while i < len(old) and j < len(new):
    first, size, target = i, old[i], new[j]
    start, i, j = j, i + 1, j + 1
    while size != target:
      if size < target:
        size, i = size * old[i], i + 1
      else:
        target, j = target * new[j], j + 1
    if any(place.axes[first + 1 : i]):
      return None
    axes[start] = place.axes[first]
  return place._replace(axes=axes)


def _inner(eqn):
  """The program inside an operation that has one, such as a jit, a loop or a custom gradient; None if it has none."""
  for name in ("jaxpr", "call_jaxpr", "body_jaxpr"):
    if name in eqn.params:
      return getattr(eqn.params[name], "jaxpr", eqn.params[name])
  return eqn.params["branches"][-1].jaxpr if "branches" in eqn.params else None


def _asked_in(eqn) -> str:
  """The innermost module of layers/ or models/ on the way to an operation, such as "attention"."""
  traceback = eqn.source_info.traceback
  for frame in traceback.frames if traceback else ():
    *_, folder, file = frame.file_name.replace("\\", "/").rsplit("/", 2)
    if folder in ("layers", "models") and "/llmarch/" in frame.file_name:
      return file.removesuffix(".py")
  return ""
