"""The communication of the inference layouts by formula: 2211.05102, sections 3.2 to 3.4 and appendix A.

E d_model, F d_ff, N query heads, K kv heads, H head dim, B*L tokens of a pass, mesh X*Y*Z = n chips.

There are two models. `paper_elements` is the volume column of the paper: feed-forwards of two matrices (or three, when
gated), with each collective over several axes as one. `block` predicts the collectives of this code's manual mode for a
whole block, one mesh axis at a time; compiled programs are compared with it. The formulas do not read sharding/, whose
rows they name, so that each checks the other. Left out are the embedding and the head (together below 1 % in PaLM), and
parameters and indices that are vectors of heads or of nothing.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from llmarch.config import BlockConfig
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.norm import LayerNorm

AXES = ("x", "y", "z")


class Row(NamedTuple):
  """A feed-forward layout; each field has mesh axes, major first."""

  batch: str  # axes that split the tokens; weights are gathered over them
  embed: str  # axes that split E where weights are applied; products over E are partial over them
  hidden: str  # axes that split F and the heads where weights are applied
  stored_embed: str  # axes that split E, and F and the heads, of the weights at rest
  stored_hidden: str


FEED_FORWARD = {
  "ws_2d": Row("", "x", "zy", "x", "zy"),
  "ws_1d": Row("", "", "zyx", "", "zyx"),
  "wg_x": Row("x", "", "zy", "x", "zy"),
  "wg_xy": Row("xy", "", "z", "x", "zy"),
  "wg_xyz": Row("xyz", "", "", "x", "zy"),
}
ATTENTION = {"heads": "", "batch_z": "z", "batch_yz": "zy", "batch_xyz": "zyx"}  # axes that split attention's batch


class Collective(NamedTuple):
  """Collectives of one kind over the same axes, for the same reason.

  `bytes` are those of one chip, for all executions together: of the output of an all-gather, of the input of a
  reduce-scatter or an all-reduce, of the local array of an all-to-all or a permutation.
  """

  kind: str  # a kind as in HLO
  axes: tuple[str, ...]  # mesh axes in the order of the mesh
  group: int  # number of chips along the axes
  count: int
  bytes: float
  what: str

  @property
  def sent(self) -> float:
    """Bytes that leave a chip: (K-1)/K of `bytes` over K chips, twice that for an all-reduce (appendix A.1)."""
    if self.kind == "collective-permute":
      return self.bytes
    return self.bytes * (1 - 1 / self.group) * (2 if self.kind == "all-reduce" else 1)


Mesh = Mapping[str, int]


KNOWN = {AttentionConfig, MLPConfig}  # kinds of branches that these formulas describe


def knows(block: BlockConfig) -> bool:
  """True if the formulas of this module hold for a block."""
  branches = block.branches.values()
  return all(type(branch) in KNOWN and not branch.reads_kept for branch in branches)


def chips(mesh: Mesh, axes: str = "xyz") -> int:
  """Number of chips along these axes."""
  return math.prod(mesh[a] for a in axes)


# --------------------------------------------------------------------------------------------- as in the paper


def paper_elements(ffn: str, tokens: float, d_model: int, d_ff: int, mesh: Mesh, *, matrices=2, ring=False) -> float:
  """Elements that a chip moves for one feed-forward.  2BLE, 2BL(E/X + F/YZ), 2EF/YZ + 2BLE/X ...

  A gated one has `matrices` 3: m BLF/YZ and m EF in place of 2 BLF/YZ and 2 EF. `ring` keeps the factor (K-1)/K that
  the paper drops.
  """
  row = FEED_FORWARD[ffn]
  share = lambda axes: (1 - 1 / chips(mesh, axes)) if ring else float(bool(axes))
  local = tokens / chips(mesh, row.batch)
  weights = matrices * d_model * d_ff / chips(mesh, row.hidden) * share(row.batch)
  stream = 2 * local * d_model / chips(mesh, row.embed) * share(row.hidden)
  inside = matrices * local * d_ff / chips(mesh, row.hidden) * share(row.embed)
  return weights + stream + inside


# -------------------------------------------------------------------------------------- as this code places them


class Weight(NamedTuple):
  """A matrix or a bias at rest: (size, mesh axes) of each dimension."""

  what: str
  dims: tuple[tuple[int, str], ...]

  def local(self, mesh: Mesh, without: str = "") -> float:
    """Elements on a chip, after gathering over the axes `without`."""
    return math.prod(size / chips(mesh, _minus(axes, without)) for size, axes in self.dims)


def weights(config: BlockConfig, d_model: int, ffn: str, mesh: Mesh) -> list[Weight]:
  """The matrices of a block's attention and feed-forward, and the biases."""
  row, a, f = FEED_FORWARD[ffn], config.mixer, config.ffn
  N, K, H = a.num_heads, a.kv_heads, a.dim(d_model)
  E, heads, head_dim = (d_model, row.stored_embed), (N, row.stored_hidden), (H, "")
  kv_heads = (K, _cut_short(row.stored_hidden, K, mesh))
  found = [Weight("q", (E, heads, head_dim))]
  found += [Weight(name, (E, kv_heads, head_dim)) for name in "kv"]
  found += [Weight("o", (heads, head_dim, E))]
  if a.qkv_bias:
    found += [Weight("q", (heads, head_dim))] + [Weight(name, (kv_heads, head_dim)) for name in "kv"]
  if a.out_bias:
    found += [Weight("o", (E,))]
  if f is not None:
    F = (f.d_ff, row.stored_hidden)
    into = ("gate", "up") if f.gated else ("up",)
    found += [Weight(name, (E, F)) for name in into] + [Weight("down", (F, E))]
    if f.bias:
      found += [Weight(name, (F,)) for name in into] + [Weight("down", (E,))]
  return found


def block(
  config: BlockConfig,
  d_model: int,
  ffn: str,
  attention: str,
  mesh: Mesh,
  tokens: float,
  *,
  activation_bytes: float = 2,
  weight_bytes: float = 2,
) -> list[Collective]:
  """The collectives of one layer in one pass of `tokens` tokens (over the whole batch), without axes of size 1."""
  row, a, f = FEED_FORWARD[ffn], config.mixer, config.ffn
  N, K, H = a.num_heads, a.kv_heads, a.dim(d_model)
  moved = "".join(axis for axis in ATTENTION[attention] if axis in row.hidden or axis in row.embed)
  heads = row.hidden + row.embed  # axes that split the heads, and F, of activations between matrices
  left = _minus(heads, moved)
  t = tokens / chips(mesh, row.batch)
  found: list[Collective] = []

  def add(kind: str, axes: str, elements: float, what: str, count: int = 1, width: float = activation_bytes) -> None:
    if chips(mesh, axes) > 1 and count:
      names = tuple(axis for axis in AXES if axis in axes and mesh[axis] > 1)
      found.append(Collective(kind, names, chips(mesh, axes), count, count * elements * width, what))

  def gather(axes: str, elements: float, what: str, count: int = 1, width: float = activation_bytes) -> None:
    """Adds gathers over the axes, the minor one first; `elements` is the number before."""
    for axis in reversed(axes):
      elements *= mesh[axis]
      add("all-gather", axis, elements, what, count, width)

  def scatter(axes: str, elements: float, what: str, count: int = 1) -> None:
    for axis in axes:
      add("reduce-scatter", axis, elements, what, count)
      elements /= mesh[axis]

  # Weights are gathered over the axes that split the batch; biases of keys and values go where these are.
  cached = _cut_short(left, K, mesh)
  for w in weights(config, d_model, ffn, mesh):
    elements = w.local(mesh)
    for i, (size, axes) in enumerate(w.dims):
      to = cached if w.what in "kv" and len(w.dims) == 2 and i == 0 else _minus(axes, row.batch)
      sliced, going, staying = chips(mesh, _minus(to, axes)), _minus(axes, to), _minus(axes, _minus(axes, to))
      elements /= sliced if size // chips(mesh, axes) % sliced == 0 else 1
      if staying + going != axes and chips(mesh, going) > 1 and chips(mesh, staying) > 1:
        add("collective-permute", axes, elements, w.what, width=weight_bytes)
      gather(going, elements, w.what, width=weight_bytes)
      elements *= chips(mesh, going)

  # The residual stream, with E over embed and hidden, goes in and out, for each branch or once for both. The weight-
  # stationary rows split it over X, Z, Y; of the axes that it gains, the first is the major one.
  branches = len(config.residual.groups(tuple(config.branches)))
  stream = "xzy" if row.embed + row.hidden == "zyx" else row.hidden
  whole = t * d_model / chips(mesh, row.embed)
  gather(stream, whole / chips(mesh, stream), "input", branches)
  scatter(stream, whole, "output", branches)

  # In a norm, a mean over E is one f32 per token, summed over the axes that still split E. LayerNorm has two means.
  means = 2 if isinstance(config.norm, LayerNorm) else 1
  entering, leaving = NORMS[config.residual.kind]
  add("all-reduce", row.embed, t, "norm", means * entering * branches, 4)
  add("all-reduce", row.embed + stream, t, "norm", means * leaving * branches, 4)

  if f is not None:
    hidden = t * f.d_ff / chips(mesh, row.hidden)
    scatter(row.embed, hidden, "gate, up", 1 + f.gated)
    gather(row.embed, hidden / chips(mesh, row.embed), "down")

  # Queries go onto all the heads' axes, then from heads to batch and, after attention, back.
  queries = t * N * H / chips(mesh, row.hidden)
  scatter(row.embed, queries, "q")
  gather(row.embed, queries / chips(mesh, row.embed), "o")
  queries /= chips(mesh, row.embed)
  if chips(mesh, moved) > 1:
    add("all-to-all", moved, queries, "attention", 2)
    if chips(mesh, left) > 1:  # the axes that stay are minor to those that go, so parts of heads change chips
      add("collective-permute", heads, queries, "attention", 2)
  _keys_and_values(add, mesh, row, moved, left, t, K, H)
  if a.qk_norm and a.qk_norm.whole:
    means = 2 if isinstance(a.qk_norm.norm, LayerNorm) else 1
    seen = t / chips(mesh, moved)
    add("all-reduce", left, seen, "qk norm", means, 4)
    add("all-reduce", cached, seen, "qk norm", means, 4)
  return found


# Norms of a residual scheme, for each group of branches that reads one x: (of what enters it, of the residual stream).
NORMS = {
  "pre": (1, 0),
  "post": (0, 1),
  "sandwich": (1, 1),
  "output": (0, 1),
  "parallel": (1, 0),
  "parallel_two_norms": (2, 0),
}


def _keys_and_values(add, mesh: Mesh, row: Row, moved: str, left: str, t: float, K: int, H: int) -> None:
  """Moves keys and values, partial over `row.embed`, to the cache: batch over `moved`, heads over `left`.

  They are split over as many of the heads' axes, the major ones first, as divide K. If an axis does not split them yet,
  each chip keeps its part and nothing is sent.
  """
  stored = _minus(_cut_short(row.stored_hidden, K, mesh), row.batch)
  wanted = _cut_short(left, K, mesh)
  cut = _minus(moved, stored + row.embed)  # axes that a slice splits the batch over
  sliced = chips(mesh, _minus(wanted, stored + row.embed))  # parts of the heads, sliced before the move if need be
  elements = t * K * H / chips(mesh, stored) / chips(mesh, cut)
  early = K // chips(mesh, stored) % sliced == 0
  elements /= sliced if early else 1
  going = "".join(axis for axis in stored if axis in moved)
  staying = _minus(stored, going)
  if chips(mesh, going) > 1:
    if chips(mesh, staying) > 1:
      add("collective-permute", stored, elements, "k, v", 2)
    add("all-to-all", going, elements, "k, v", 2)
    if chips(mesh, cut) > 1:  # the slice splits the batch first, although its axes should come last
      add("collective-permute", going + cut, elements, "k, v", 2)
  elements /= 1 if early else sliced
  scattered = row.embed and row.embed in moved + wanted
  add("reduce-scatter" if scattered else "all-reduce", row.embed, elements, "k, v", 2)


def batch_split(ffn: str, attention: str, mesh: Mesh) -> int:
  """Number of parts into which attention splits the batch."""
  return chips(mesh, "".join(set(FEED_FORWARD[ffn].batch + ATTENTION[attention])))


def kv_split(config: BlockConfig, ffn: str, attention: str, mesh: Mesh) -> tuple[int, int]:
  """Numbers of parts into which the cache's batch and its key-value heads are split."""
  row = FEED_FORWARD[ffn]
  left = _minus(row.hidden + row.embed, ATTENTION[attention])
  return batch_split(ffn, attention, mesh), chips(mesh, _cut_short(left, config.mixer.kv_heads, mesh))


def _cut_short(axes: str, size: int, mesh: Mesh) -> str:
  """The longest prefix of the axes (without those of size 1) that divides `size`."""
  axes = "".join(axis for axis in axes if mesh[axis] > 1)
  while size % chips(mesh, axes):
    axes = axes[:-1]
  return axes


def _minus(axes: str, others: str) -> str:
  return "".join(axis for axis in axes if axis not in others)
