"""Places: the logical names of an array's dimensions, and where a layout puts an array with such names.

A place is a tuple with one name for each dimension. Layers use the named places below; the table's row turns a place
into a `PartitionSpec`.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmarch.errors import UserError, check
from llmarch.sharding.table import SPLIT_IF_DIVIDES, SPLIT_OVER_FREE_AXES, Layout

# What a dimension is called: a name, (name, size over all devices) where the size decides how far the
# dimension can be split (see SPLIT_IF_DIVIDES), or None for a dimension that is never split.
Axis = str | tuple[str, int] | None
Place = tuple[Axis, ...]
ANY = PartitionSpec.UNCONSTRAINED  # to `shard`: this dimension may lie anywhere

# --------------------------------------------------------------------------------------------- named places

# The comments show each place under three rows, in the notation of 2211.05102: "embed.xzy" is split over x, z and y,
# the major axis first. A test holds them. (A mesh axis of size 1 splits nothing. Names are without act_ and attn_.)

RESIDUAL: Place = ("batch", "length", "act_embed")
# ws_2d+batch_xyz: [batch, length, embed.xzy]
# megatron:        [batch.data, length, embed]
# train:           [batch.data*fsdp*expert*stage, length.context*sequence*tensor, embed]

NORMED: Place = ("batch", "length", "post_norm_embed")  # where a branch's norm reads the residual stream
# ws_2d+batch_xyz: [batch, length, embed.x]
# megatron:        [batch.data, length, embed]
# train:           [batch.data*fsdp*expert*stage, length.context*sequence*tensor, embed]

NARROW: Place = ("batch", "length", "factor")  # an embedding table narrower than the residual stream
# ws_2d+batch_xyz: [batch, length, factor]
# megatron:        [batch.data, length, factor]
# train:           [batch.data*fsdp*expert*stage, length.context*sequence*tensor, factor]

TOKENS: Place = ("batch", "act_length")  # the dimensions "bt" of whatever is inside a branch
# ws_2d+batch_xyz: [batch, length]
# megatron:        [batch.data, length]
# train:           [batch.data*fsdp*expert*stage, length.context*sequence]

BRANCH: Place = (*TOKENS, "post_norm_embed")  # what the first products of a branch read
# ws_2d+batch_xyz: [batch, length, embed.x]
# megatron:        [batch.data, length, embed]
# train:           [batch.data*fsdp*expert*stage, length.context*sequence, embed]

PROJECTED: Place = (*TOKENS, "act_heads", "head_dim")  # heads as the projections leave them, and as `o` reads them
# ws_2d+batch_xyz: [batch, length, heads.zyx, head_dim]
# megatron:        [batch.data, length, heads.tensor, head_dim]
# train:           [batch.data*fsdp*expert*stage, length.context*sequence, heads.tensor, head_dim]

ROWS: Place = (*TOKENS, None)  # vectors of tokens that only the tokens split, such as the latent of MLA's queries
# ws_2d+batch_xyz: [batch, length, -]
# megatron:        [batch.data, length, -]
# train:           [batch.data*fsdp*expert*stage, length.context*sequence, -]

ATTENDING: Place = ("attn_batch", "attn_length", "attn_heads", "head_dim")  # queries in attention
# ws_2d+batch_xyz: [batch.zyx, length, heads, head_dim]
# megatron:        [batch.data, length, heads.tensor, head_dim]
# train:           [batch.data*fsdp*expert, length.context, heads.tensor*sequence, head_dim]

ATTENDING_TOKENS: Place = ("attn_batch", "attn_length")  # their positions
# ws_2d+batch_xyz: [batch.zyx, length]
# megatron:        [batch.data, length]
# train:           [batch.data*fsdp*expert, length.context]

ATTENDING_HEADS: Place = ("attn_heads",)  # a number for each head
# ws_2d+batch_xyz: [heads]
# megatron:        [heads.tensor]
# train:           [heads.tensor*sequence]

WEIGHTS_OF_HEADS: Place = ("attn_batch", "attn_length", "attn_heads")  # a number for each query and head
# ws_2d+batch_xyz: [batch.zyx, length, heads]
# megatron:        [batch.data, length, heads.tensor]
# train:           [batch.data*fsdp*expert, length.context, heads.tensor*sequence]

SCORES: Place = ("attn_batch", "attn_heads", "attn_length", None)  # [B, N, T, S]
# ws_2d+batch_xyz: [batch.zyx, heads, length, -]
# megatron:        [batch.data, heads.tensor, length, -]
# train:           [batch.data*fsdp*expert, heads.tensor*sequence, length.context, -]

SCORES_OF_ALL_HEADS: Place = ("attn_batch", None, "attn_length", None)  # biases, which every device makes for all heads
# ws_2d+batch_xyz: [batch.zyx, -, length, -]
# megatron:        [batch.data, -, length, -]
# train:           [batch.data*fsdp*expert, -, length.context, -]

RECURRING: Place = ("attn_batch", None, "attn_heads", "head_dim")  # heads of a recurrence, which reads whole rows
# ws_2d+batch_xyz: [batch.zyx, -, heads, head_dim]
# megatron:        [batch.data, -, heads.tensor, head_dim]
# train:           [batch.data*fsdp*expert, -, heads.tensor*sequence, head_dim]

LATENT: Place = ("attn_batch", "attn_length", None)  # MLA's keys and values: of no head, so only tokens split them
# ws_2d+batch_xyz: [batch.zyx, length, -]
# megatron:        [batch.data, length, -]
# train:           [batch.data*fsdp*expert, length.context, -]


def kv_heads(num: int) -> Axis:
  """The name of the dimension of `num` key-value heads, in attention."""
  return ("attn_kv_heads", num)


def KV(num: int) -> Place:
  """Keys and values of `num` heads as the projections leave them, [B, T, K, H], for attention."""
  return ("attn_batch", "attn_length", kv_heads(num), "head_dim")


# KV(16)
# ws_2d+batch_xyz: [batch.zyx, length, kv_heads, head_dim]
# megatron:        [batch.data, length, kv_heads.tensor, head_dim]
# train:           [batch.data*fsdp*expert, length.context, kv_heads.tensor*sequence, head_dim]


def KEYS(num: int) -> Place:
  """Keys and values as attention reads them, [B, K, S, H]."""
  return ("attn_batch", kv_heads(num), "attn_length", None)


# KEYS(16)
# ws_2d+batch_xyz: [batch.zyx, kv_heads, length, -]
# megatron:        [batch.data, kv_heads.tensor, length, -]
# train:           [batch.data*fsdp*expert, kv_heads.tensor*sequence, length.context, -]


def NEXT_LOGITS(vocab_size: int) -> Place:
  """The logits [B, V] of every row's next token, as the head leaves them."""
  return ("batch", ("act_vocab", vocab_size))


# NEXT_LOGITS(256)
# ws_2d+batch_xyz: [batch, vocab.zyx]
# megatron:        [batch.data, vocab.tensor]
# train:           [batch.data*fsdp*expert*stage, vocab.tensor]


def SAMPLED(batch: int) -> Axis:
  """The dimension of `batch` rows while their next tokens are sampled: they are dealt out to all devices."""
  return ("sample_batch", batch)


# SAMPLED(64)
# ws_2d+batch_xyz: [sample_batch.zyx]
# megatron:        [sample_batch.data*tensor]
# train:           [sample_batch]

# --------------------------------------------------------------------- names of weights, names of activations

# What a dimension of a weight is called in the activations that a product with it gives, and in those that it reads.
# (A name that is not listed is the same in both.)
_IN_RESULTS = {name: f"act_{name}" for name in ("embed", "heads", "kv_heads", "mlp", "vocab")}
GATHERED_EMBED = "embed_gathered"  # "embed" of a weight that a train step has gathered beforehand (ops.einsum.gathered)
_IN_INPUTS = _IN_RESULTS | dict.fromkeys(("embed", GATHERED_EMBED), "post_norm_embed")


def name_in_result(axis: str) -> str:
  """The name in a product's result of a weight's dimension: "mlp" -> "act_mlp"."""
  return _IN_RESULTS.get(axis, axis)


def name_in_input(axis: str) -> str:
  """The name in a product's input of a weight's dimension: "embed" -> "post_norm_embed"."""
  return _IN_INPUTS.get(axis, axis)


def has_name_in_inputs(axis: str) -> bool:
  """Whether activations that a product reads have a name of their own for this dimension of a weight."""
  return axis in _IN_INPUTS


# ------------------------------------------------------------------------------------- from names to mesh axes


def name_of(axis: Axis) -> str | None:
  """The name of a dimension without its size."""
  return axis[0] if isinstance(axis, tuple) else axis


def split_of(axis: Axis, layout: Layout, mesh: Mesh, taken: Sequence[str] = ()) -> tuple[str, ...]:
  """The mesh axes over which a dimension lies; those of size 1 are left out. Raises UserError.

  taken: the mesh axes that split earlier dimensions of the same array.
  """
  name, size = axis if isinstance(axis, tuple) else (axis, None)
  names = tuple(a for a in layout.mesh_axes(name) if mesh.shape.get(a, 1) > 1)
  if name in SPLIT_OVER_FREE_AXES:
    names = tuple(a for a in names if a not in taken)
  if name in SPLIT_IF_DIVIDES:
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
  return math.prod(mesh.shape.get(a, 1) for a in layout.mesh_axes(name))


def spec(axes: Sequence[str | None], shape: Sequence[int], layout: Layout, mesh: Mesh) -> PartitionSpec:
  """The PartitionSpec of an array of this shape whose dimensions bear these logical names.

  A rank above len(axes) means stacked layers: the names are padded on the left with "layers".
  Raises UserError where one mesh axis would be used twice or does not divide its dimension.
  """
  axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
  entries, used = [], {}
  for name, size in zip(axes, shape, strict=True):
    names = split_of((name, size), layout, mesh, used)
    for n in names:
      if n in used:
        raise UserError(f"mesh axis {n!r} would shard both {used[n]!r} and {name!r} of one array")
      used[n] = name
    entries.append(names if len(names) > 1 else names[0] if names else None)
  return PartitionSpec(*entries)


def axes_of(spec: PartitionSpec) -> list[tuple[str, ...]]:
  """The mesh axes of each dimension that a PartitionSpec has an entry for."""
  return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]


def shardings(tree, layout: Layout, mesh: Mesh):
  """The NamedSharding of every named leaf: a Param, or a state Spec. Unnamed leaves are replicated.

  One function serves parameters, optimizer moments (they are Params too) and decoding state. A Param may
  hold a tree of arrays of its rank (codes and scales): where such a part has 1 for a dimension, it is not split.
  """

  def is_named(leaf):
    return hasattr(leaf, "axes")

  def place(array, axes):
    return NamedSharding(mesh, spec(axes, array.shape, layout, mesh))

  def place_leaf(leaf):
    axes = leaf.axes if is_named(leaf) else (None,) * len(leaf.shape)
    if not hasattr(leaf, "get_value"):
      return place(leaf, axes)
    stacked = len(leaf.shape) - len(axes)

    def place_part(part):
      if part.shape == leaf.shape:
        return place(part, axes)
      return place(part, tuple(a if n > 1 else None for a, n in zip(axes, part.shape[stacked:], strict=True)))

    return leaf.replace(jax.tree.map(place_part, leaf.get_value()))

  return jax.tree.map(place_leaf, tree, is_leaf=is_named)


# ------------------------------------------------------------------------------------------------- notation


def split_text(mesh_axes: Sequence[str]) -> str:
  """How a dimension is split, in the notation of 2211.05102: ".xzy", "" where it is not. Longer names of mesh axes are
  joined by "*": ".data*fsdp"."""
  return "." * bool(mesh_axes) + ("" if all(len(a) == 1 for a in mesh_axes) else "*").join(mesh_axes)


def notation(place: Sequence[Axis], layout: Layout, sizes: Mapping[str, int] | None = None) -> str:
  """A place under a layout: "[batch, length, embed.xzy]", with "-" for a dimension without a name. sizes: of a mesh,
  whose axes of size 1 are left out."""

  def dimension(axis):
    name = name_of(axis) or "-"
    split = [a for a in layout.mesh_axes(name) if sizes is None or sizes.get(a, 1) > 1]
    return name.removeprefix("act_").removeprefix("attn_").removeprefix("post_norm_") + split_text(split)

  return f"[{', '.join(map(dimension, place))}]"
