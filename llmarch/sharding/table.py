"""Layouts: a named row says, for each logical axis, over which mesh axes it is split (standard library only).

Logical axes are the names of dimensions. Parameters carry them (`axes` of an `nnx.Param`), decoding states carry
them in their specs, and activations have the named places of places.py. Different stages of one activation have
different names ("act_embed", "post_norm_embed"), so that a row can place each independently. `AXES` lists them.

An axis that a row does not list is not split. The order of mesh axes counts: the first is the major one. Where an
activation is split further than the weight it meets, the weight's mesh axes come first.

The row "ws_2d+batch_xyz" in full, on a mesh of the axes x, y, z ("mlp.zy": mlp is split over z and then over y):

  parameters   embed.x  heads.zy  kv_heads.zy  mlp.zy  vocab.zy  rank.zy  experts.zy  expert_mlp.zy
  residual     act_embed.xzy
  after norms  post_norm_embed.x
  inside       act_heads.zyx  act_kv_heads.zyx  act_mlp.zyx  act_vocab.zyx
  attention    attn_batch.zyx
  state        cache_batch.zyx
  output       sample_batch.zyx

A feed-forward under it. Arrays stand still on the left, and the collectives that the row implies are on the right:

  residual stream  [batch, length, embed.xzy]
        |                                                    all-gather over y and z
  after the norm   [batch, length, embed.x]
        | @ up     [embed.x, mlp.zy] -> partial over x       reduce-scatter over x
  inside           [batch, length, mlp.zyx]
        |                                                    all-gather over x
                   [batch, length, mlp.zy]
        | @ down   [mlp.zy, embed.x] -> partial over z, y    reduce-scatter over z, then y
  residual stream  [batch, length, embed.xzy]

`llmarch describe --layout=NAME` prints any row in this notation, with the collectives of one layer.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

from llmarch.errors import check
from llmarch.sharding.mesh_text import BATCH, HEADS, LENGTH

AXES = {
  "parameters": "vocab embed heads kv_heads head_dim mlp rank latent experts expert_mlp layers",
  "residual": "batch length act_embed",
  "after norms": "post_norm_embed",  # what the first products of a branch read
  "inside": "act_length act_heads act_kv_heads act_mlp act_vocab",
  "attention": "attn_batch attn_length attn_heads attn_kv_heads",
  "state": "cache_batch cache_heads cache_length",
  "output": "sample_batch",
}

# How a gather or a scatter of activations is taken apart into hops; see ops/collective_einsum.py.
RING_FORMS = ("one_way", "throughput", "latency")


@dataclasses.dataclass(frozen=True)
class Layout:
  """One row of the table. It can be compared and hashed."""

  name: str
  axes: Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes, the major one first
  # How XLA's automatic mode places a product of activations and a weight. "constraints": the result is constrained to
  # its place, and XLA chooses the collectives. "local": each product is a shard_map of its own, whose collectives are
  # those of the manual mode. (In manual mode there is one way, and this field is not read.)
  products: Literal["constraints", "local"] = "constraints"
  ring: Literal["one_way", "throughput", "latency"] | None = None  # the form of looped collective einsums, if wanted

  def __post_init__(self):
    object.__setattr__(self, "axes", types.MappingProxyType(dict(self.axes)))

  def __hash__(self):
    return hash((self.name, tuple(self.axes.items()), self.products, self.ring))

  def mesh_axes(self, name: str | None) -> tuple[str, ...]:
    """The mesh axes over which a row splits the logical axis `name`; () for None and for an unlisted axis."""
    return self.axes.get(name, ())

  def mentioned(self) -> list[str]:
    """All mesh axes of which the row speaks, sorted."""
    return sorted({a for axes in self.axes.values() for a in axes})

  def without(self, mesh_axis: str) -> "Layout":
    """The same row for code to which one mesh axis is already manual (train/pipeline.py)."""
    axes = {name: tuple(a for a in axes if a != mesh_axis) for name, axes in self.axes.items()}
    return dataclasses.replace(self, axes=axes)


def _inference(name: str, embed: str, hidden: str, batch: str, act_embed: str, act_hidden: str, moved: str) -> Layout:
  """A row of 2211.05102. Each argument but the name is a string of mesh axes, the major one first.

  embed, hidden: of the stored weights; batch, act_embed: of the residual stream; act_hidden: of the activations
  inside a branch; moved: the mesh axes that attention takes from the heads and gives to the batch.
  """
  post_norm_embed = "".join(a for a in embed if a not in batch)  # of a weight that is gathered over the batch's axes
  attn_heads = "".join(a for a in act_hidden if a not in moved)
  attn_batch = batch + "".join(a for a in act_hidden if a in moved)
  axes = {
    "embed": embed, "vocab": hidden, "heads": hidden, "kv_heads": hidden, "mlp": hidden, "rank": hidden,
    "experts": hidden, "expert_mlp": hidden,
    "batch": batch, "act_embed": act_embed, "post_norm_embed": post_norm_embed,
    "act_heads": act_hidden, "act_kv_heads": act_hidden, "act_mlp": act_hidden, "act_vocab": act_hidden,
    "attn_batch": attn_batch, "attn_heads": attn_heads, "attn_kv_heads": attn_heads,
    "cache_batch": attn_batch, "cache_heads": attn_heads,
    "sample_batch": batch + "".join(a for a in "zyx" if a not in batch),
  }  # fmt: skip
  return Layout(name, {logical: tuple(mesh_axes) for logical, mesh_axes in axes.items()})


# Section 3.2 of the paper. Weights are stored E_x F_zy in all but the first, so a prefill and a decode may
# use different rows over the same weights.
FEED_FORWARD = {
  "ws_1d": dict(embed="", hidden="zyx", batch="", act_embed="xzy", act_hidden="zyx"),
  "ws_2d": dict(embed="x", hidden="zy", batch="", act_embed="xzy", act_hidden="zyx"),
  "wg_x": dict(embed="x", hidden="zy", batch="x", act_embed="zy", act_hidden="zy"),
  "wg_xy": dict(embed="x", hidden="zy", batch="xy", act_embed="z", act_hidden="z"),
  "wg_xyz": dict(embed="x", hidden="zy", batch="xyz", act_embed="", act_hidden=""),
}
# Section 3.3: attention splits the heads, or gives these mesh axes to the batch.
ATTENTION = {"heads": "", "batch_z": "z", "batch_yz": "zy", "batch_xyz": "zyx"}

# Training, over any product of the axes. The batch is split over data, fsdp and expert; weights at rest over
# fsdp too, and gathered where they are used (ZeRO-3, 1910.02054). Over tensor, heads, mlp and vocab are split
# inside a branch and the length outside, so that a branch begins with a gather and ends in a reduce-scatter
# (2205.05198). The length is split over context throughout, and attention is a ring (2310.01889); over
# sequence, all but attention splits the length, and attention the heads (Ulysses, 2309.14509).
TRAIN = Layout(
  "train",
  {
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("tensor",)),
    **dict.fromkeys(("act_heads", "act_kv_heads", "act_mlp", "act_vocab"), ("tensor",)),
    **dict.fromkeys(("attn_heads", "attn_kv_heads"), HEADS),
    "batch": (*BATCH, "stage"),  # outside of the layers, the stages split the batch too (train/pipeline.py)
    "attn_batch": BATCH,
    **dict.fromkeys(("embed", "latent"), ("fsdp",)),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    "layers": ("stage",),
    "length": LENGTH,
    "act_length": ("context", "sequence"),
    "attn_length": ("context",),
  },
  products="local",
)

# Batch over `data`; Megatron tensor parallelism over `tensor`: heads, mlp and vocab are split, the
# residual stream is replicated over `tensor`, and each branch ends in one all-reduce (1909.08053).
MEGATRON = Layout(
  "megatron",
  {
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "expert_mlp"), ("tensor",)),
    **dict.fromkeys(("act_heads", "act_kv_heads", "act_mlp", "act_vocab"), ("tensor",)),
    **dict.fromkeys(("attn_heads", "attn_kv_heads", "cache_heads"), ("tensor",)),
    **dict.fromkeys(("batch", "attn_batch", "cache_batch"), ("data",)),
    "sample_batch": ("data", "tensor"),
  },
)

LAYOUTS: dict[str, Layout] = {
  "train": TRAIN,
  "megatron": MEGATRON,
  **{
    (name := f"{ffn}+{attention}"): _inference(name, **row, moved=moved)
    for ffn, row in FEED_FORWARD.items()
    for attention, moved in ATTENTION.items()
  },
}

# Logical axes that are split only as far as their size divides: over as many of their mesh axes, from the first, as
# divide it. Key-value heads are fewer than a large mesh has devices (MQA has one), few vocabularies are round, and few
# rows may be sampled. For every other logical axis a size that does not divide is an error.
SPLIT_IF_DIVIDES = {
  "kv_heads", "act_kv_heads", "attn_kv_heads", "cache_heads", "vocab", "act_vocab", "rank", "experts", "sample_batch",
}  # fmt: skip
# Logical axes that use only those of their mesh axes that earlier dimensions of the same array did not: experts are
# split first, and their hidden units over what is left.
SPLIT_OVER_FREE_AXES = {"expert_mlp"}


def find_layout(name: str, mesh) -> Layout:
  """The row for inference that a name such as "ws_2d+batch_xyz+throughput" means.

  The parts are a feed-forward, an attention ("heads" if there is none) and a form of ring, if wanted: the last one
  takes each gather or scatter of activations apart into hops, each beside a piece of a matmul
  (ops/collective_einsum.py), over the first of its mesh axes; norms then work on the fully split residual stream.
  mesh: a jax Mesh, or anything with its `shape`.
  Raises UserError for an unknown name, and for a mesh with axes of which the row does not speak.
  """
  base, plus, ring = name.rpartition("+")
  base, ring = (base, ring) if plus and ring in RING_FORMS else (name, None)
  row = None if base == "train" else LAYOUTS.get(base) or LAYOUTS.get(f"{base}+heads")
  check(
    row is not None,
    f"layout: there is no {name!r}; give megatron or one of {', '.join(FEED_FORWARD)}, alone or with"
    f" +{', +'.join(ATTENTION)}, and then with +{', +'.join(RING_FORMS)} or not",
  )
  check_axes(row, mesh)
  if ring is None:
    return row
  stream = row.mesh_axes("act_embed")
  check(row is not MEGATRON, f"layout: {base!r} has no gathers of activations to loop; leave +{ring} out of {name!r}")
  return Layout(f"{row.name}+{ring}", {**row.axes, "post_norm_embed": stream}, row.products, ring)


def check_axes(layout: Layout, mesh) -> None:
  """Raises UserError for a mesh with axes (of more than one device) of which the layout does not speak."""
  axes = layout.mentioned()
  unread = [a for a in mesh.shape if a not in axes and (mesh.shape[a] > 1 or not set(axes) & set(mesh.shape))]
  check(
    not unread,
    f"layout {layout.name!r} splits over {', '.join(axes)}, but the mesh has {', '.join(unread)}; change either",
  )
