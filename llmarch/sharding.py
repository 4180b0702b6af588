"""Layouts: tables from logical axis names to mesh axes, and everything that reads them.

Parameters carry names (`axes` of an `nnx.Param`), states carry them in their specs, and the layers name an
activation wherever its place changes (`move`). Nothing else in the code knows a mesh.

The same tables are read in two modes. Automatic: `move` is a sharding constraint and XLA places the
collectives. Manual: inside a `jax.shard_map`, arrays are what one device holds, and `move`, `reduce` and
`ops.einsum` place the collectives that the table implies, in the order of "Efficiently Scaling Transformer
Inference" (2211.05102), because XLA does not find them from constraints. For inference a whole step is manual;
training is automatic, but for its products and its attention, each of which is manual by itself (`local`).
"""

import contextlib
import contextvars
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmarch.errors import UserError, check
from llmarch.mesh import BATCH, HEADS, LENGTH
from llmarch.mesh import parse_mesh as parse_mesh

Layout = Mapping[str, tuple[str, ...]]
# What a dimension is called: a name, (name, size over all devices) where the size decides how far the
# dimension can be split (see CUT_SHORT), or None for a dimension that is never split.
Axis = str | tuple[str, int] | None
ANY = PartitionSpec.UNCONSTRAINED  # to `shard`: this dimension may lie anywhere

# ------------------------------------------------------------------------------------------------ the table

# Names:  parameters   vocab embed heads kv_heads head_dim mlp rank latent experts expert_mlp layers
#         residual     batch length act_embed
#         after norms  act_length post_norm_embed           (what a branch starts from)
#         inside       act_length act_heads act_kv_heads act_mlp act_vocab
#         attention    attn_batch attn_length attn_heads attn_kv_heads
#         state        cache_batch cache_heads cache_length
#         output       sample_batch
# A name that a row does not list is not split. The order of mesh axes counts: the first is the major one.
# Where an activation is split further than the weight it meets, the weight's axes come first.


def _inference(embed: str, hidden: str, batch: str, act_embed: str, act_hidden: str, moved: str) -> Layout:
  """A row after 2211.05102, each argument a string of mesh axes, major first.

  embed, hidden: of the stored weights; batch, act_embed: of the residual stream; act_hidden: of the
  activations inside a branch; moved: those that attention takes from the heads and gives to the batch.
  """
  kept = "".join(a for a in embed if a not in batch)  # of the weights, once gathered over the batch's axes
  left = "".join(a for a in act_hidden if a not in moved)
  taken = batch + "".join(a for a in act_hidden if a in moved)
  row = {
    "embed": embed, "vocab": hidden, "heads": hidden, "kv_heads": hidden, "mlp": hidden, "rank": hidden,
    "experts": hidden, "expert_mlp": hidden,
    "batch": batch, "act_embed": act_embed, "post_norm_embed": kept,
    "act_heads": act_hidden, "act_kv_heads": act_hidden, "act_mlp": act_hidden, "act_vocab": act_hidden,
    "attn_batch": taken, "attn_heads": left, "attn_kv_heads": left,
    "cache_batch": taken, "cache_heads": left,
    "sample_batch": batch + "".join(a for a in "zyx" if a not in batch),
  }  # fmt: skip
  return {name: tuple(axes) for name, axes in row.items()}


# Section 3.2 of the paper. Weights are stored E_x F_zy in all but the first, so a prefill and a decode may
# use different rows over the same weights.
FEED_FORWARD = {
  "ws_1d": dict(embed="", hidden="zyx", batch="", act_embed="xzy", act_hidden="zyx"),
  "ws_2d": dict(embed="x", hidden="zy", batch="", act_embed="xzy", act_hidden="zyx"),
  "wg_x": dict(embed="x", hidden="zy", batch="x", act_embed="zy", act_hidden="zy"),
  "wg_xy": dict(embed="x", hidden="zy", batch="xy", act_embed="z", act_hidden="z"),
  "wg_xyz": dict(embed="x", hidden="zy", batch="xyz", act_embed="", act_hidden=""),
}
# Section 3.3: attention over heads, or over the batch to a degree.
ATTENTION = {"heads": "", "batch_z": "z", "batch_yz": "zy", "batch_xyz": "zyx"}

LAYOUTS: dict[str, Layout] = {
  # Training, over any product of the axes. The batch is split over data, fsdp and expert; weights at rest over
  # fsdp too, and gathered where they are used (ZeRO-3, 1910.02054). Over tensor, heads, mlp and vocab are split
  # inside a branch and the length outside, so that a branch begins with a gather and ends in a reduce-scatter
  # (2205.05198). The length is split over context throughout, and attention is a ring (2310.01889); over
  # sequence, all but attention splits the length, and attention the heads (Ulysses, 2309.14509).
  "train": {
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("tensor",)),
    **dict.fromkeys(("act_heads", "act_kv_heads", "act_mlp", "act_vocab"), ("tensor",)),
    **dict.fromkeys(("attn_heads", "attn_kv_heads"), HEADS),
    "batch": (*BATCH, "stage"),  # a stage is one part more of the batch, but for the layers (train/pipeline.py)
    "attn_batch": BATCH,
    **dict.fromkeys(("embed", "latent"), ("fsdp",)),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    "layers": ("stage",),
    "length": LENGTH,
    "act_length": ("context", "sequence"),
    "attn_length": ("context",),
  },
  # Batch over `data`; Megatron tensor parallelism over `tensor`: heads, mlp and vocab are split, the
  # residual stream is replicated over `tensor`, and each branch ends in one all-reduce (1909.08053).
  "megatron": {
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "expert_mlp"), ("tensor",)),
    **dict.fromkeys(("act_heads", "act_kv_heads", "act_mlp", "act_vocab"), ("tensor",)),
    **dict.fromkeys(("attn_heads", "attn_kv_heads", "cache_heads"), ("tensor",)),
    **dict.fromkeys(("batch", "attn_batch", "cache_batch"), ("data",)),
    "sample_batch": ("data", "tensor"),
  },
  **{
    f"{ffn}+{attention}": _inference(**row, moved=moved)
    for ffn, row in FEED_FORWARD.items()
    for attention, moved in ATTENTION.items()
  },
}

# Looped collective einsum: an entry of a row that is not a dimension, and its forms.
LOOP = "loop"
LOOPS = ("one_way", "throughput", "latency")

# Split over as many of their mesh axes, from the first, as divide them: key-value heads are fewer than a
# large mesh has devices (MQA has one), few vocabularies are round, and few rows may be sampled. Every other
# indivisible dimension is an error.
CUT_SHORT = {
  "kv_heads", "act_kv_heads", "attn_kv_heads", "cache_heads", "vocab", "act_vocab", "rank", "experts", "sample_batch",
}  # fmt: skip
# Split over those of their mesh axes that the dimensions before them have left: a device has whole experts as far as
# their number goes, and parts of experts beyond.
REST = {"expert_mlp"}


def find_layout(name: str, mesh: Mesh) -> Layout:
  """The row of a name for inference, such as "ws_2d+batch_xyz+throughput"; without an attention it is over heads.

  The last part loops a gather or a scatter of activations into each matmul that needs one
  (ops/collective_einsum.py), over the first of its mesh axes; norms then work on the fully split residual
  stream.
  Raises UserError for an unknown name, and for a mesh with axes of which the row does not speak.
  """
  base, plus, form = name.rpartition("+")
  base, form = (base, form) if plus and form in LOOPS else (name, None)
  row = None if base == "train" else LAYOUTS.get(base) or LAYOUTS.get(f"{base}+heads")
  check(
    row is not None,
    f"layout: there is no {name!r}; give megatron or one of {', '.join(FEED_FORWARD)}, alone or with"
    f" +{', +'.join(ATTENTION)}, and then with +{', +'.join(LOOPS)} or not",
  )
  check_axes(name, row, mesh)
  if form is None:
    return row
  check("act_embed" in row, f"layout: {base!r} has no gathers of activations to loop; leave +{form} out of {name!r}")
  return {**row, "post_norm_embed": row["act_embed"], LOOP: (form,)}


def check_axes(name: str, row: Layout, mesh: Mesh) -> None:
  """Raises UserError for a mesh with axes (of more than one device) of which the row of this name does not speak."""
  axes = sorted({a for target in row.values() for a in target})
  unread = [a for a in mesh.shape if a not in axes and (mesh.shape[a] > 1 or not set(axes) & set(mesh.shape))]
  check(
    not unread,
    f"layout {name!r} splits over {', '.join(axes)}, but the mesh has {', '.join(unread)}; change either",
  )


# --------------------------------------------------------------------------------------------------- meshes


def make_mesh(sizes: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
  """A mesh of exactly these devices (None: all there are), the first axis over the slowest network.

  Raises UserError unless the sizes multiply to them.
  """
  need = math.prod(sizes.values())
  devices = jax.devices() if devices is None else devices
  # jax.make_mesh would leave the rest idle without a word.
  count = len(devices)
  check(need == count, f"mesh {dict(sizes)} covers {need} devices of {count}; make the sizes multiply to {count}")
  # Auto: GSPMD places the collectives (jax.make_mesh would make the axes Explicit).
  shape, auto = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
  if (outer := across_granules(sizes, devices)) is not None:
    inner = [n // o for n, o in zip(shape, outer, strict=True)]
    by_slice = len(_slices(devices)) > 1
    arranged = mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, process_is_granule=not by_slice, allow_split_physical_axes=True
    )
    return Mesh(arranged, tuple(sizes), axis_types=auto)
  try:
    return jax.make_mesh(shape, tuple(sizes), axis_types=auto, devices=devices)
  except NotImplementedError:  # jax wants leave to let two mesh axes share a side of a torus
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, tuple(sizes), axis_types=auto)


def device_mesh(text: str, num_processes: int = 1) -> Mesh:
  """A mesh, from "data=2,tensor=4" or "x=2,y=2,z=2", over the devices there are; a machine without accelerators
  gets as many fake ones as it needs, and a line that says so. Before the first use of jax's devices, of which each
  process (train/distributed.py) has as many."""
  sizes = parse_mesh(text)
  need = math.prod(sizes.values())
  check(
    need % num_processes == 0,
    f"{num_processes} processes cannot share devices evenly, of which mesh {text!r} has {need}; make it a multiple of"
    f" {num_processes}",
  )
  # Of the CPU backend alone. (Of more than these, `make_mesh` tells.)
  jax.config.update("jax_num_cpu_devices", min(need // num_processes, 4096))
  if jax.default_backend() == "cpu" and need > 1 and jax.process_index() == 0:
    print(f"no accelerator: {need} fake devices on this CPU", file=sys.stderr)
  return make_mesh(sizes)


def _slices(devices: Sequence) -> set:
  return {getattr(d, "slice_index", 0) for d in devices}


def across_granules(sizes: Mapping[str, int], devices: Sequence) -> list[int] | None:
  """How much of each mesh axis goes between granules, the outermost axis first; None where there is one granule.

  A granule has a fast network of its own: a TPU slice, and elsewhere the devices of one process.
  Raises UserError where the granules do not fit into the leading axes.
  """
  granules, what = len(_slices(devices)), "slices"
  if granules == 1 and devices[0].platform != "tpu":
    granules, what = len({d.process_index for d in devices}), "processes"
  if granules == 1:
    return None
  left, outer = granules, []
  for n in sizes.values():
    outer.append(math.gcd(n, left))
    left //= outer[-1]
    if outer[-1] < n:  # a part of this axis lies inside, and so must all that follow
      break
  outer += [1] * (len(sizes) - len(outer))
  given = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
  check(
    left == 1,
    f"mesh: {given} cannot be cut into {granules} {what}; give its leading axes sizes that multiply to {granules}",
  )
  return outer


def _split(name: str | None, size: int | None, layout: Layout, mesh: Mesh, taken=()) -> tuple[str, ...]:
  """The mesh axes over which a dimension lies; those of size 1 are left out. Raises UserError.

  taken: those of the array's dimensions before.
  """
  names = tuple(a for a in layout.get(name, ()) if mesh.shape.get(a, 1) > 1) if name else ()
  if name in REST:
    names = tuple(a for a in names if a not in taken)
  if name in CUT_SHORT:
    check(size is not None, f"the split of {name!r} depends on its size")
    while size % math.prod(mesh.shape[n] for n in names):
      names = names[:-1]
  parts = math.prod(mesh.shape[n] for n in names)
  if size is not None and size % parts:
    raise UserError(
      f"axis {name!r} of size {size} is not divisible by mesh axis {'*'.join(names)}={parts};"
      f" make it a multiple of {parts}, or choose another mesh or layout"
    )
  return names


def ways(name: str, layout: Layout, mesh: Mesh) -> int:
  """Into how many parts a layout splits the dimension of this name."""
  return math.prod(mesh.shape.get(a, 1) for a in layout.get(name, ()))


def spec(axes: Sequence[str | None], shape: Sequence[int], layout: Layout, mesh: Mesh) -> PartitionSpec:
  """The PartitionSpec of an array of this shape whose dimensions bear these logical names.

  A rank above len(axes) means stacked layers: the names are padded on the left with "layers".
  Raises UserError where one mesh axis would be used twice or does not divide its dimension.
  """
  axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
  entries, used = [], {}
  for name, size in zip(axes, shape, strict=True):
    names = _split(name, size, layout, mesh, used)
    for n in names:
      if n in used:
        raise UserError(f"mesh axis {n!r} would shard both {used[n]!r} and {name!r} of one array")
      used[n] = name
    entries.append(names if len(names) > 1 else names[0] if names else None)
  return PartitionSpec(*entries)


def shardings(tree, layout: Layout, mesh: Mesh):
  """The NamedSharding of every named leaf: a Param, or a state Spec. Unnamed leaves are replicated.

  One function serves parameters, optimizer moments (they are Params too) and decoding state. A Param may
  hold a tree of arrays of its rank (codes and scales): where such a part has 1 for a dimension, it is not split.
  """
  named = lambda leaf: hasattr(leaf, "axes")

  def one(leaf):
    axes = leaf.axes if named(leaf) else (None,) * len(leaf.shape)
    if not hasattr(leaf, "get_value"):
      return place(leaf, axes)
    left = len(leaf.shape) - len(axes)
    reduced = lambda part: tuple(a if n > 1 else None for a, n in zip(axes, part.shape[left:], strict=True))
    whole = lambda part: axes if part.shape == leaf.shape else reduced(part)
    return leaf.replace(jax.tree.map(lambda part: place(part, whole(part)), leaf.get_value()))

  def place(array, axes):
    return NamedSharding(mesh, spec(axes, array.shape, layout, mesh))

  return jax.tree.map(one, tree, is_leaf=named)


# --------------------------------------------------------------------------------------- the active layout


class _Active(NamedTuple):
  layout: Layout
  mesh: Mesh
  manual: bool


_active: contextvars.ContextVar[_Active | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout, mesh: Mesh | None, *, manual: bool = False):
  """Makes the functions below act; manual: inside a `jax.shard_map` over all axes of the mesh.

  Enter it inside the jitted function: a context outside is not in jit's cache key.
  """
  token = _active.set(_Active(layout, mesh, manual) if mesh is not None else None)
  try:
    yield
  finally:
    _active.reset(token)


def manual() -> bool:
  active = _active.get()
  return active is not None and active.manual


def automatic() -> bool:
  """Whether arrays lie over a mesh, and XLA places the collectives."""
  active = _active.get()
  return active is not None and not active.manual


def bound(f: Callable) -> Callable:
  """f under the layout of now, whenever it is called: a rule for gradients runs when its layout has been left."""
  active = _active.get()

  def run(*args):
    token = _active.set(active)
    try:
      return f(*args)
    finally:
      _active.reset(token)

  return run


def loop() -> str | None:
  """The form in which the active layout loops its collective einsums."""
  return _active.get().layout.get(LOOP, (None,))[0]


def mesh_axes(axis: Axis) -> tuple[str, ...]:
  """The mesh axes over which a dimension of this name lies, in manual mode; otherwise none."""
  if not manual() or axis is None:
    return ()
  name, size = axis if isinstance(axis, tuple) else (axis, None)
  return _split(name, size, *_active.get()[:2])


def weight_axes(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
  """`mesh_axes` of all dimensions of one array."""
  found = []
  for axis in axes:
    taken = [a for names in found for a in names]
    rest = isinstance(axis, tuple) and axis[0] in REST and manual()
    found.append(_split(*axis, *_active.get()[:2], taken) if rest else mesh_axes(axis))
  return found


def active() -> tuple[Layout, Mesh]:
  """The layout and mesh in use."""
  return _active.get()[:2]


def shard(x: jax.Array, *axes: Axis) -> jax.Array:
  """Constrains an activation to the active layout; the identity where there is none, and in manual mode."""
  active = _active.get()
  if active is None or active.manual:
    return x
  axes = ("layers",) * (x.ndim - len(axes)) + axes
  names = [axis[0] if isinstance(axis, tuple) else None if axis is ANY else axis for axis in axes]
  entries = spec(names, x.shape, active.layout, active.mesh)
  place = PartitionSpec(*(ANY if axis is ANY else entry for axis, entry in zip(axes, entries, strict=True)))
  return jax.lax.with_sharding_constraint(x, NamedSharding(active.mesh, place))


def at_use(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """A parameter where it meets activations: gathered over the mesh axes that split these (ZeRO-3).

  Its gradient is scattered back at once, so that no device ever holds a sum of which it keeps a part. The
  identity without a layout, and in manual mode, where `ops.einsum` does the same.
  """
  active = _active.get()
  if active is None or active.manual:
    return x
  busy = {a for name in ("batch", "act_length") for a in active.layout.get(name, ())}
  stored = spec(axes, x.shape, *active[:2])
  free = [(e,) if isinstance(e, str) else e or () for e in stored]
  use = PartitionSpec(*(tuple(a for a in e if a not in busy) for e in free))
  if use == PartitionSpec(*free):
    return x
  return _placed(x, NamedSharding(active.mesh, use), NamedSharding(active.mesh, stored))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _placed(x: jax.Array, use: NamedSharding, stored: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, use)


_placed.defvjp(
  lambda x, use, stored: (_placed(x, use, stored), None),
  lambda use, stored, _, g: (jax.lax.with_sharding_constraint(g, stored),),
)


def training() -> bool:
  """Whether the row of training is active: the one that places the tokens inside a branch by themselves."""
  return automatic() and "act_length" in _active.get().layout


def is_split(name: str) -> bool:
  """Whether the active layout splits the dimension of this name, in automatic mode."""
  return automatic() and ways(name, *_active.get()[:2]) > 1


def move(x: jax.Array, have: Sequence[Axis], want: Sequence[Axis]) -> jax.Array:
  """The same array in another place: its dimensions lie as `have` names them, and then as `want` does."""
  if not manual():
    return shard(x, *want)
  return relay(x, [mesh_axes(a) for a in have], [mesh_axes(a) for a in want])


def local(f: Callable, have: Sequence[Sequence[Axis]], want: Sequence[Sequence[Axis]]) -> Callable:
  """f in manual mode: each device runs it on its parts of the arguments, which lie as `have` names them, and holds
  its parts of the results, a tuple, which lie as `want` does. f itself where there is no automatic layout.

  Names of an argument that is a tree are those of all its leaves.
  """
  if not automatic():
    return f
  layout, mesh, _ = _active.get()

  def place(axes: Sequence[Axis]) -> PartitionSpec:
    split = lambda axis: _split(*(axis if isinstance(axis, tuple) else (axis, None)), layout, mesh)
    return PartitionSpec(*map(split, axes))

  def run(*args):
    with use_layout(layout, mesh, manual=True):
      return f(*args)

  # Around this may be the manual mode of another axis (train/pipeline.py).
  free = {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
  return jax.shard_map(
    run, mesh=mesh, axis_names=free, check_vma=False,
    in_specs=tuple(map(place, have)), out_specs=tuple(map(place, want)),
  )  # fmt: skip


def whole(param) -> jax.Array:
  """All of a (small) parameter, on every device."""
  return move(param.get_value(), param.axes, (None,) * len(param.axes)) if manual() else param.get_value()


def mean(x: jax.Array, axis: Axis) -> jax.Array:
  """Mean over the last dimension, which is called `axis`, kept as 1."""
  local, axes = jnp.mean(x, axis=-1, keepdims=True), mesh_axes(axis)
  return jax.lax.pmean(local, axes) if axes else local


def any_of(x: jax.Array, axis: Axis) -> jax.Array:
  """Whether a bool scalar is true on any device, where each saw its own part of the dimension `axis`."""
  axes = mesh_axes(axis)
  return jax.lax.pmax(x.astype(jnp.int32), axes) > 0 if axes else x


def full_size(x: jax.Array, axis: Axis) -> int:
  """The last dimension over all devices."""
  return x.shape[-1] * math.prod(_active.get().mesh.shape[a] for a in mesh_axes(axis))


# -------------------------------------------------------------------------- collectives of the manual mode

Axes = tuple[str, ...]  # mesh axes of one dimension, major first


def relay(x: jax.Array, have: Sequence[Axes], want: Sequence[Axes]) -> jax.Array:
  """Moves this device's part of an array split as `have` (mesh axes for each dimension) to that split as `want`.

  An axis that no dimension had is cut off by a slice; one that goes to another dimension is an all-to-all
  (all that go together in one); one that goes nowhere is an all-gather, the minor axis first; and where only
  the order of axes differs, a permutation.
  """
  have, home = [tuple(h) for h in have], {a: d for d, axes in enumerate(want) for a in axes}
  held = {a for axes in have for a in axes}
  new = [tuple(a for a in axes if a not in held) for axes in want]
  for d in range(x.ndim):  # first, for the less to move
    if x.shape[d] % parts(new[d]) == 0:
      x, have[d], new[d] = _slice(x, d, new[d]), have[d] + new[d], ()
  for d in range(x.ndim):
    stay = tuple(a for a in want[d] if a in have[d])
    leave = [a for a in have[d] if a not in want[d]]
    leave.sort(key=lambda a: home.get(a, -1))  # stable: those with one destination lie together
    x = _reorder(x, d, have[d], stay + tuple(leave))
    while leave:
      to = home.get(leave[-1])
      together = tuple(a for a in leave if home.get(a) == to)
      leave = leave[: -len(together)]
      if to is not None and to > d and have[to] and x.shape[to] % parts(together):
        new[to], to = new[to] + together, None  # it has axes that are yet to leave: gathered, and cut at the end
      if to is None:
        for a in reversed(together):
          x = jax.lax.all_gather(x, a, axis=d, tiled=True)
      else:
        _check_parts(x, to, together)
        x = jax.lax.all_to_all(x, together, split_axis=to, concat_axis=d, tiled=True)
        have[to] += together
    have[d] = stay
  for d in range(x.ndim):
    x = _reorder(_slice(x, d, new[d]), d, have[d] + new[d], tuple(want[d]))
  return x


def reduce(x: jax.Array, pending: Axes, have: Sequence[Axes], want: Sequence[Axes]) -> jax.Array:
  """Sums over the mesh axes `pending`, of which every device holds a part of the sum, and moves to `want`.

  An axis that `want` gives to a dimension is a reduce-scatter into it, one axis at a time (a compiler for
  TPUs keeps no other); the others are one all-reduce.
  """
  have = [tuple(h) for h in have]
  early = [tuple(a for a in axes if a not in pending) for axes in want]
  x = relay(x, have, early)
  have = early
  rest = tuple(a for a in pending if not any(a in axes for axes in want))
  for d, axes in enumerate(want):
    for a in axes:
      if a in pending:
        x = _scatter(x, d, a)
        have[d] += (a,)
  if rest:
    x = jax.lax.psum(x, rest)
  return relay(x, have, want)


def _scatter(x: jax.Array, d: int, axis: str) -> jax.Array:
  _check_parts(x, d, (axis,))
  # The parts in front: a TPU compiler makes an all-reduce, twice the bytes, of a scatter whose parts are not
  # a multiple of 512 bytes in the minor dimension (libtpu 0.0.42, v4 to v6e).
  pieces = x.reshape(*x.shape[:d], parts((axis,)), -1, *x.shape[d + 1 :])
  return jax.lax.psum_scatter(jnp.moveaxis(pieces, d, 0), axis, scatter_dimension=0)


def index(axes: Axes) -> jax.Array | int:
  """Which part of a dimension split over these axes this device holds."""
  return jax.lax.axis_index(axes) if axes else 0


def parts(axes: Axes) -> int:
  """Into how many parts these axes split a dimension."""
  return math.prod(_active.get().mesh.shape[a] for a in axes)


def _check_parts(x: jax.Array, d: int, axes: Axes) -> None:
  n = parts(axes)
  check(
    x.shape[d] % n == 0,
    f"a dimension of {x.shape[d]} (on each device, of {list(x.shape)}) cannot be split over mesh axes"
    f" {'*'.join(axes)}={n}; make the batch, the heads or d_ff a larger multiple, or choose another mesh or layout",
  )


def _slice(x: jax.Array, d: int, axes: Axes) -> jax.Array:
  if not axes:
    return x
  _check_parts(x, d, axes)
  n = x.shape[d] // parts(axes)
  return jax.lax.dynamic_slice_in_dim(x, index(axes) * n, n, axis=d)


def _reorder(x: jax.Array, d: int, have: Axes, want: Axes) -> jax.Array:
  """The same split with another order of axes: each device passes its part on to one other."""
  if have == want:
    return x
  shape = _active.get().mesh.shape
  axes = tuple(a for a in shape if a in want)  # ppermute counts devices in the mesh's order, whatever it is told
  devices = np.arange(parts(want)).reshape([shape[a] for a in axes])
  # The devices in the order of the parts that they hold, and in the order of those that they are to hold.
  holds, gets = (devices.transpose([axes.index(a) for a in order]).ravel().tolist() for order in (have, want))
  return jax.lax.ppermute(x, axes, list(zip(holds, gets, strict=True)))
