"""Mixtures of experts: the choice of experts for each token, and the matmuls of many experts.

B rows, T tokens per row, D model, E experts, F hidden units of one, K experts per token, C places of an expert.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llmarch import sharding
from llmarch.ops.activation import activate
from llmarch.ops.matmul import value_of
from llmarch.ops.placed import weight_at_tokens
from llmarch.ops.quant import QTensor
from llmarch.sharding import NORMED, TOKENS, Partial, sum_over_mesh

# ------------------------------------------------------------------------------------------------- the choice


class Routes(NamedTuple):
  """The experts of every token, the first choice first."""

  expert: jax.Array  # int32 [B, T, K]
  gate: jax.Array  # f32 [B, T, K]
  taken: jax.Array  # bool [B, T, K], false for padding and where the expert has no place left


class Buffers(NamedTuple):
  """The tokens of every expert, row by row."""

  token: jax.Array  # int32 [B, E, C]: index of the token; T marks an empty place
  gate: jax.Array  # f32 [B, E, C]


def scores(logits: jax.Array, kind: str) -> jax.Array:
  """The scores of router logits, by softmax or sigmoid, in f32."""
  logits = logits.astype(jnp.float32)
  return jax.nn.softmax(logits, axis=-1) if kind == "softmax" else jax.nn.sigmoid(logits)


def limit_to_groups(s: jax.Array, num: int, top: int, score: str) -> jax.Array:
  """Sets to -inf the experts outside of each token's `top` best of `num` groups.  [..., E] -> [..., E].

  The score of a group is its largest (DeepSeek-V2, 2405.04434, section 2.2.2) or the sum of its two largest (V3).
  """
  grouped = s.reshape(*s.shape[:-1], num, -1)
  of_group = jnp.max(grouped, -1) if score == "max" else jnp.sum(jax.lax.top_k(grouped, 2)[0], -1)
  chosen = jax.nn.one_hot(jax.lax.top_k(of_group, top)[1], num, dtype=bool).any(-2)
  return jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(s.shape)


def top_k(s: jax.Array, choice: jax.Array, real: jax.Array, k: int, *, renormalize: bool, scale: float) -> Routes:
  """Tokens choose the `k` experts with the largest `choice`; gates come from the scores s, both f32 [B, T, E].

  real is bool [B, T], false for padding.
  """
  expert = jax.lax.top_k(choice, k)[1]
  gate = jnp.take_along_axis(s, expert, axis=-1)
  if renormalize:
    gate = gate / (jnp.sum(gate, -1, keepdims=True) + 1e-20)
  return Routes(expert, gate * scale, jnp.broadcast_to(real[..., None], expert.shape))


def places(capacity_factor: float, num_experts: int, most: int, rounded: Callable) -> np.ndarray:
  """Places of an expert as a table over the number of tokens n = 0..most: rounded(capacity_factor n / num_experts).

  It is computed in Python floats, so that it is exact inside jit. `rounded` is math.ceil or math.floor.
  """
  return np.array([rounded(capacity_factor * n / num_experts) for n in range(most + 1)], np.int32)


def limit_capacity(routes: Routes, num_experts: int, capacity_factor: float) -> tuple[Routes, Buffers]:
  """Each expert takes the first ceil(c n / E) of a row's n tokens that choose it, first choices before second ones.

  Sources: 2101.03961, equation 3; 2006.16668, algorithm 1, where a group is a row.
  """
  B, T, K = routes.expert.shape
  real = jnp.sum(routes.taken[..., 0], axis=1)  # [B]
  table = places(capacity_factor, num_experts, T, math.ceil)
  C = int(table[-1])
  by_choice = lambda a: a.swapaxes(1, 2).reshape(B, K * T)  # all first choices by token, then all second ones ...
  expert = by_choice(jnp.where(routes.taken, routes.expert, num_experts))
  rank = _ranks(expert)
  taken = (rank < jnp.asarray(table)[real][:, None]) & (expert < num_experts)
  slot = jnp.where(taken, expert * C + rank, num_experts * C)
  rows = jnp.arange(B)[:, None]
  scatter = lambda value, x: (
    jnp.full((B, num_experts * C), value, x.dtype).at[rows, slot].set(x, mode="drop")
  ).reshape(B, num_experts, -1)
  token = jnp.broadcast_to(jnp.tile(jnp.arange(T), K), (B, K * T))
  buffers = Buffers(scatter(T, token), scatter(0, by_choice(routes.gate)))
  return routes._replace(taken=taken.reshape(B, K, T).swapaxes(1, 2)), buffers


def expert_choice(s: jax.Array, real: jax.Array, segments: jax.Array, capacity_factor: float) -> Buffers:
  """Experts choose: each takes the floor(c n / E) tokens with the largest scores of a document's n (2202.09368, 3.2).

  s is f32 [B, T, E], real bool [B, T], segments int32 [B, T]. The gate is the score.
  """
  _, T, E = s.shape
  table = places(capacity_factor, E, T, math.floor)
  same = (segments[:, :, None] == segments[:, None, :]) & real[:, None, :]
  quota = jnp.asarray(table)[jnp.sum(same, axis=2)]  # [B, T]: places in the document of each token
  s = s.swapaxes(1, 2)  # [B, E, T]
  # Padding counts as a document of its own, from which no expert chooses.
  document = jnp.broadcast_to(jnp.where(real, segments, jnp.iinfo(jnp.int32).max)[:, None], s.shape)
  taken = (_ranks(document, -s) < quota[:, None]) & real[:, None]
  gate, token = jax.lax.top_k(jnp.where(taken, s, -1), max(int(table[-1]), 1))
  return Buffers(jnp.where(gate < 0, T, token), jnp.maximum(gate, 0))


def _ranks(key: jax.Array, *then: jax.Array) -> jax.Array:
  """The rank (int32) of each element among those of equal key along the last axis, ordered by `then`, then by index.

  Two sorts do it. With a gather and a scatter in their place, XLA's partitioner aborts in a pipeline whose mesh splits
  the length.
  """
  i = jax.lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 1)
  operands = *map(jax.lax.stop_gradient, (key, *then)), i
  ordered, *_, order = jax.lax.sort(operands, num_keys=len(operands))
  first = jnp.concatenate([jnp.ones_like(i[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], -1)
  rank = i - jax.lax.cummax(jnp.where(first, i, 0), axis=key.ndim - 1)
  return jax.lax.sort((order, rank), num_keys=1)[1]


# ----------------------------------------------------------------------------------------- losses and statistics


def chosen(expert: jax.Array, real: jax.Array, num_experts: int) -> jax.Array:
  """Counts how often each token chooses each expert, f32 [B, T, E], from expert int32 [B, T, K], real bool [B, T]."""
  return jnp.sum(jax.nn.one_hot(expert, num_experts) * real[..., None, None], axis=2)


def balance_loss(p: jax.Array, choices: jax.Array, real: jax.Array, *, by_row: bool) -> jax.Array:
  """E sum_i f_i P_i (2101.03961, eq. 4), which is 1 if both are uniform, and E if one expert gets every token.

  f_i is the share of the choices that fall on expert i, and P_i its mean probability. p [B, T, E] sums to 1 over E;
  choices come from `chosen`. With by_row, the loss is computed for each row that has tokens, then averaged (2412.19437,
  eq. 17).
  """
  axes = 1 if by_row else (0, 1)
  n = jnp.sum(real, axes)[..., None]
  f = jnp.sum(choices, axes) / jnp.maximum(jnp.sum(choices, axes).sum(-1, keepdims=True), 1)
  mean = jnp.sum(p * real[..., None], axes) / jnp.maximum(n, 1)
  loss = p.shape[-1] * jnp.sum(jax.lax.stop_gradient(f) * mean, -1)
  return jnp.sum(loss) / jnp.maximum(jnp.sum(n > 0), 1)


def z_loss(logits: jax.Array, real: jax.Array) -> jax.Array:
  """The mean squared log-sum-exp of the logits of real tokens (2202.08906, eq. 5)."""
  z = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
  return jnp.sum(z * real) / jnp.maximum(jnp.sum(real), 1)


def pull_to_balance(bias: jax.Array, load: jax.Array) -> jax.Array:
  """Returns 0, but with a gradient in each expert's bias: the error of its load, load / mean - 1 (f32 [E]).

  A step against that gradient's sign is the rule of 2408.15664, in which no auxiliary loss reaches the router.
  """
  pull = jnp.sum(bias * jax.lax.stop_gradient(load / jnp.maximum(jnp.mean(load), 1e-9) - 1))
  return pull - jax.lax.stop_gradient(pull)


def statistics(load: jax.Array, taken: jax.Array, wanted: jax.Array) -> dict[str, jax.Array]:
  """Statistics of the choices by expert, `load` f32 [E].

  They are the entropy of the load over log E, MaxVio = max / mean - 1 (2408.15664), and the share of `wanted`
  assignments that were not taken.
  """
  f = load / jnp.maximum(jnp.sum(load), 1)
  entropy = -jnp.sum(jax.scipy.special.xlogy(f, f)) / math.log(max(len(f), 2))
  dropped = 1 - taken / jnp.maximum(wanted, 1)
  return {"router_entropy": entropy, "router_max_violation": jnp.max(f) * len(f) - 1, "router_dropped": dropped}


# -------------------------------------------------------------------------------------------------- the experts


class Experts(NamedTuple):
  """The weights of E experts of the same shape (those that this device holds)."""

  up: jax.Array  # [E, D, F]; a QTensor if quantised, as down and gate
  down: jax.Array  # [E, F, D]
  gate: jax.Array | None = None  # [E, D, F]; None if the experts are not gated
  up_bias: jax.Array | None = None  # [E, F]
  gate_bias: jax.Array | None = None
  down_bias: jax.Array | None = None  # [E, D]


def _feed_forward(x, w: Experts, activation: str, matmul, bias_of, sum_width) -> jax.Array:
  """The outputs of all experts, for rows that the functions below bring to their experts.

  matmul(x, w) multiplies rows by their experts' matrices; bias_of(b) gives the rows of b that belong to their experts;
  sum_width(y) sums y over devices that hold parts of D.
  """
  add_bias = lambda y, b: y if b is None else y + bias_of(b).astype(y.dtype)
  into = [(w.gate, w.gate_bias), (w.up, w.up_bias)]
  inner = [add_bias(sum_width(matmul(x, m)), b) for m, b in into if m is not None]
  return add_bias(matmul(activate(activation, *inner), w.down), w.down_bias)


def experts(x: jax.Array, routes: Routes | Buffers, w: Experts, activation: str) -> Partial:
  """The gated sum of each token's experts.  [B, T, D] -> the Partial of a [B, T, D], yet to be summed over the mesh.

  w holds Params, or arrays if there is no layout.
  """
  match sharding.mode():
    case None:
      return Partial(_apply(x, routes, _map_experts(value_of, w), activation))
    case "constraints" | "local":
      return Partial(_expert_parallel(x, routes, w, activation))
    case "manual":
      return _held_here(x, routes, w, activation)
    case "rings":  # here every branch has summed its output, so that this one must too
      return Partial(sum_over_mesh(_held_here(x, routes, w, activation)))


def _map_experts(f: Callable, w: Experts) -> Experts:
  return Experts(*(None if p is None else f(p) for p in w))


def _apply(x, routes: Routes | Buffers, w: Experts, activation: str, **options) -> jax.Array:
  return (grouped if isinstance(routes, Routes) else buffered)(x, routes, w, activation, **options)


def _once(w: Experts, axes: tuple[str, ...]) -> Experts:
  """Keeps the last bias on only one of the devices whose outputs are summed over these mesh axes."""
  is_first = sharding.part_index(axes) == 0
  return w if w.down_bias is None else w._replace(down_bias=jnp.where(is_first, w.down_bias, 0))


def _held_here(x, routes: Routes | Buffers, w: Experts, activation: str) -> Partial:
  """In manual mode, each device puts all its tokens through the experts (or parts of experts) that it holds.

  Sharded shapes under ws_2d, where a device holds all hidden units of its experts:
    x    [batch, length, embed.x]
    up   [experts.zy, embed.x, expert_mlp]    summed over x at once, because an activation follows
    down [experts.zy, expert_mlp, embed.x] -> [batch, length, embed.x], partial over z, y
  """
  expert_axes, embed, hidden = weight_at_tokens(w.up)[1]
  have = [sharding.mesh_axes(a) for a in NORMED]
  x = sharding.redistribute(x, have, [*map(sharding.mesh_axes, TOKENS), embed], sharding.mesh_sizes())
  weights = _once(_map_experts(lambda p: weight_at_tokens(p)[0], w), hidden)
  sum_width = lambda y: jax.lax.psum(y, embed) if embed else y
  first = sharding.part_index(expert_axes) * weights.up.shape[0]
  y = _apply(x, routes, weights, activation, first=first, sum_width=sum_width)
  return Partial(y, expert_axes + hidden)


def _expert_parallel(x, routes: Routes | Buffers, w: Experts, activation: str) -> jax.Array:
  """Expert parallelism in automatic mode: one `shard_map`, whose oracle is the same function on one device.

  If mesh axes split both the tokens and the experts, buffers go to their experts and back in two all-to-alls
  (2006.16668). Dropless routing has no bound on an expert's tokens, so tokens are gathered over these axes and outputs
  reduce-scattered. Hidden units may be split over other axes; the width of the model is gathered.

  Under "train", with the axis expert E that splits the batch too, on buffers [B, E, C, D]:
    there  [batch.E, experts, places, embed] -> [batch, experts.E, places, embed]             all-to-all
    up     [experts.E, embed, expert_mlp.tensor]
    down   [experts.E, expert_mlp.tensor, embed] -> partial over tensor                       all-reduce at the end
    back   [batch, experts.E, places, embed] -> [batch.E, experts, places, embed]             all-to-all
  """
  layout, mesh = sharding.active_layout()
  length = None if isinstance(routes, Buffers) else TOKENS[1]
  tokens = sharding.spec((TOKENS[0], length, None), x.shape, layout, mesh)
  rows, columns, _ = sharding.axes_of(tokens)
  busy = rows + columns
  stored = dict(zip(w.up.axes, sharding.axes_of(sharding.spec(w.up.axes, w.up.sizes, layout, mesh)), strict=True))
  both = tuple(a for a in stored["experts"] if a in rows)
  expert_axes = both or tuple(a for a in stored["experts"] if a not in busy)
  hidden = tuple(a for a in stored["expert_mlp"] if a not in busy)
  mesh_axes = {"experts": expert_axes, "embed": (), "expert_mlp": hidden}

  def weight_spec(p, value):
    spec_of = lambda a: PartitionSpec(*(mesh_axes[n] if m > 1 else () for n, m in zip(p.axes, a.shape, strict=True)))
    return jax.tree.map(spec_of, value)

  def body(x, routes, w):
    w = _once(w, hidden)
    if isinstance(routes, Buffers) and both:
      there = functools.partial(jax.lax.all_to_all, axis_name=both, split_axis=1, concat_axis=0, tiled=True)
      back = functools.partial(jax.lax.all_to_all, axis_name=both, split_axis=0, concat_axis=1, tiled=True)
      y = buffered(x, routes, w, activation, exchange=(there, back))
    else:
      gather_tokens = lambda a: jax.lax.all_gather(a, both, axis=0, tiled=True) if both else a
      x, routes = jax.tree.map(gather_tokens, (x, routes))
      y = _apply(x, routes, w, activation, first=sharding.part_index(expert_axes) * w.up.shape[0])
      y = jax.lax.psum_scatter(y, both, scatter_dimension=0, tiled=True) if both else y
    pending = hidden if both else expert_axes + hidden
    return jax.lax.psum(y, pending) if pending else y

  # The weights are cast before they are sent.
  cast = lambda value: value if isinstance(value, QTensor) else value.astype(x.dtype)
  values = _map_experts(lambda p: cast(p.get_value()), w)
  route_specs = jax.tree.map(lambda a: PartitionSpec(*tokens[:2], None), routes)
  weight_specs = Experts(*(None if p is None else weight_spec(p, v) for p, v in zip(w, values, strict=True)))
  return jax.shard_map(
    body, mesh=mesh, axis_names=sharding.automatic_axes(mesh), check_vma=False, out_specs=tokens,
    in_specs=(tokens, route_specs, weight_specs),
  )(x, routes, values)  # fmt: skip


def dense(x: jax.Array, routes: Routes, w: Experts, activation: str) -> jax.Array:
  """Puts every token through every expert: the oracle of the functions below.  [B, T, D] -> [B, T, D]."""
  matmul = lambda x, m: jnp.einsum(("btd,edf->btef" if x.ndim == 3 else "btef,efd->bted"), x, m.astype(x.dtype))
  y = _feed_forward(x, w, activation, matmul, lambda b: b, lambda y: y)
  weight = jax.nn.one_hot(routes.expert, y.shape[2]) * (routes.gate * routes.taken)[..., None]
  return jnp.einsum("bted,btke->btd", y.astype(jnp.float32), weight).astype(x.dtype)


def grouped(x, routes: Routes, w: Experts, activation: str, *, first=0, sum_width=lambda y: y) -> jax.Array:
  """Puts each token through those of its experts that w holds, which are numbered from `first`; sorts tokens by expert.

  x [B, T, D] -> [B, T, D], in x's dtype, summed over a token's experts in f32.
  """
  B, T, D = x.shape
  K, E = routes.expert.shape[2], w.up.shape[0]
  mine = routes.taken & (routes.expert >= first) & (routes.expert < first + E)
  expert = jnp.where(mine, routes.expert - first, E).reshape(-1)  # [B T K]; E stands for an expert that w lacks
  order = jnp.argsort(expert, stable=True)
  back = jnp.argsort(order)
  sizes = jnp.sum(jax.nn.one_hot(expert, E, dtype=jnp.int32), axis=0)
  rows = jnp.broadcast_to(x[:, :, None], (B, T, K, D)).reshape(-1, D)
  own = jnp.minimum(expert[order], E - 1)
  matmul = lambda x, m: grouped_matmul(x, m, sizes)
  y = _feed_forward(permute(rows, order, back), w, activation, matmul, lambda b: b[own], sum_width)
  y = permute(y, back, order).reshape(B, T, K, -1)
  gate = jnp.where(mine, routes.gate, 0)[..., None]
  return jnp.sum(y.astype(jnp.float32) * gate, axis=2).astype(x.dtype)


def buffered(
  x, buffers: Buffers, w: Experts, activation: str, *, first=0, sum_width=lambda y: y, exchange=None
) -> jax.Array:
  """Puts each expert's tokens through it, for the experts that w holds, from `first` on.  [B, T, D] -> [B, T, D].

  `exchange` takes the place of `first`: two functions that bring buffers [B, E, C, D] of all experts to the devices
  that hold the experts, and back.
  """
  B, T, _ = x.shape
  there, back = exchange or (lambda y: y, lambda y: y)
  if not exchange:
    buffers = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, w.up.shape[0], 1), buffers)
  rows = jnp.arange(B)[:, None, None]
  padded = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
  matmul = lambda x, m: jnp.einsum(
    "becd,edf->becf", x, m.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
  ).astype(x.dtype)
  y = back(_feed_forward(there(padded[rows, buffers.token]), w, activation, matmul, lambda b: b[:, None], sum_width))
  y = y.astype(jnp.float32) * buffers.gate[..., None]
  out = jnp.zeros((B, T + 1, y.shape[-1]), jnp.float32).at[rows, buffers.token].add(y)
  return out[:, :T].astype(x.dtype)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
  """x[order], where order[back] is 0, 1, 2, ... The gradient is a permutation too, and not a scatter."""
  return x[order]


permute.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))


# ----------------------------------------------------------------------------------------------- grouped matmul


def grouped_matmul(x: jax.Array, w, sizes: jax.Array) -> jax.Array:
  """Multiplies the first sizes[0] rows by w[0], the next sizes[1] by w[1], and so on; the remaining rows give 0.

  x [R, D], w [E, D, F] (or a QTensor, without gradients), sizes int32 [E] -> [R, F] in x's dtype, accumulated in f32.

  `jax.lax.ragged_dot` serves where the compiler skips the products of rows with other groups' matrices: on TPUs, but
  for its weight gradient before jax 0.11. Elsewhere XLA multiplies every row by every matrix, so blocks of rows are
  multiplied one after another.
  """
  return _grouped_matmul(x, w, sizes) if isinstance(w, jax.Array) else _forward(x, w, sizes)


def _forward(x, w, sizes, transposed: bool = False):
  """Multiplies by w, or by its transposes."""
  blocks = functools.partial(_in_blocks, size=_block_size(x, w), transposed=transposed)
  ragged = functools.partial(_ragged, transposed=transposed)
  return jax.lax.platform_dependent(x, w, sizes, tpu=ragged, default=blocks)


def _ragged(x, w, sizes, transposed: bool):
  w = w.astype(x.dtype)
  w = w.swapaxes(1, 2) if transposed else w
  return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def _grouped_matmul(x, w, sizes):
  return _forward(x, w, sizes)


def _backward(saved, g):
  x, w, sizes = saved
  blocks = functools.partial(_outer_in_blocks, size=_block_size(x, w))
  ragged = _ragged_outer if jax.__version_info__ >= (0, 11) else blocks
  dw = jax.lax.platform_dependent(x, g, sizes, tpu=ragged, default=blocks)
  return _forward(g, w, sizes, transposed=True), dw.astype(w.dtype), None


_grouped_matmul.defvjp(lambda x, w, sizes: (_forward(x, w, sizes), (x, w, sizes)), _backward)


def _ragged_outer(x, g, sizes):
  """x^T g of each group of rows: [R, D], [R, F] -> [E, D, F]."""
  dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
  return jax.lax.ragged_dot_general(x, g, sizes, dims, preferred_element_type=jnp.float32)


def _block_size(x, w) -> int:
  """Rows per block, a power of two from 8 to 256 near the mean group, so that few products are wasted."""
  return 1 << max(3, min(8, (x.shape[0] // w.shape[0]).bit_length()))


def _steps(sizes: jax.Array, size: int) -> tuple[jax.Array, Callable]:
  """The number of blocks of `size` rows that cover the groups, and a function from a block to (group, first row)."""
  last = jnp.cumsum(-(-sizes // size))
  start = jnp.cumsum(sizes) - sizes

  def step(i):
    e = jnp.searchsorted(last, i, side="right")
    return e, start[e] + (i - (last[e] - -(-sizes[e] // size))) * size

  return last[-1], step


def _in_blocks(x, w, sizes, size: int, transposed: bool):
  """Multiplies block by block.

  A group's last block may run past its end; the next group overwrites those rows.
  """
  count, step = _steps(sizes, size)
  padded = jnp.pad(x, ((0, size), (0, 0)))

  def body(i, y):
    e, r = step(i)
    block = jax.lax.dynamic_slice_in_dim(padded, r, size)
    matrix = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, e, keepdims=False), w).astype(x.dtype)
    out = jnp.dot(block, matrix.T if transposed else matrix, preferred_element_type=jnp.float32).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(y, out, r, 0)

  y = jnp.zeros((padded.shape[0], w.shape[1 if transposed else 2]), x.dtype)
  y = jax.lax.fori_loop(0, count, body, y)[: x.shape[0]]
  return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), y, 0)


def _outer_in_blocks(x, g, sizes, size: int):
  """x^T g of each group of rows, block by block: [R, D], [R, F] -> [E, D, F]."""
  count, step = _steps(sizes, size)
  end = jnp.cumsum(sizes)
  x, g = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, g))

  def body(i, dw):
    e, r = step(i)
    inside = (r + jnp.arange(size) < end[e])[:, None]
    a, b = (jax.lax.dynamic_slice_in_dim(m, r, size) for m in (x, g))
    more = jnp.dot(jnp.where(inside, a, 0).T, b, preferred_element_type=jnp.float32)
    old = jax.lax.dynamic_index_in_dim(dw, e, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(dw, old + more, e, 0)

  return jax.lax.fori_loop(0, count, body, jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.float32))
