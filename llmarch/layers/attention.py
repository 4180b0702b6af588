"""Softmax attention: multi-head, grouped-query and multi-query, with all norms, biases, caps and position schemes.

B batch, T length, D model, N query heads, K key-value heads, H head dim, S cache length.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.branches import BranchConfig, MixerConfig
from llmarch.build import accept_name, config_dataclass
from llmarch.config import NormConfig, PositionConfig
from llmarch.errors import check, check_above, check_at_least, check_rate
from llmarch.layers.context import Context
from llmarch.layers.mask import Causal, Heads, MaskConfig
from llmarch.layers.norm import Norm
from llmarch.layers.param import Maker
from llmarch.layers.position import LogitBias, Rotary
from llmarch.layers.site import Out, Site
from llmarch.ops import attention as ops
from llmarch.ops import blockwise, cache, kivi
from llmarch.ops.attention import Keys
from llmarch.ops.einsum import einsum, einsums
from llmarch.ops.matmul import Product
from llmarch.ops.quant import FORMATS
from llmarch.sharding import (
  ATTENDING,
  ATTENDING_HEADS,
  ATTENDING_TOKENS,
  KEYS,
  KV,
  PROJECTED,
  SCORES,
  SCORES_OF_ALL_HEADS,
  WEIGHTS_OF_HEADS,
  Axis,
  kv_heads,
  local,
  mesh_axes,
  move,
  num_parts,
  part_index,
)

BY_BLOCKS = 512  # a call with at least this many queries computes its scores block by block
BY_CHANNEL = "_channel"  # suffix of a cache format in which keys have one scale per channel (ops/kivi.py)


@config_dataclass
class QKNorm:
  """Normalises queries and keys before the positions: over each head (Qwen 3), or all heads at once (OLMo 2)."""

  norm: NormConfig
  whole: bool = False
  per_head: bool = False  # each head has its own norm parameters (Cohere); whole=true implies it

  def __post_init__(self):
    check(not (self.whole and self.per_head), "whole already has parameters for each head; set per_head=false")


@config_dataclass
class AttentionConfig(MixerConfig, kind="attention"):
  """Fields of softmax attention; `mask` and `position` are families of their own (layers/mask.py, position.py)."""

  num_heads: int
  num_kv_heads: int | None = None  # None: num_heads (MHA); 1: MQA
  head_dim: int | None = None  # None: d_model / num_heads
  position: PositionConfig | None = None
  mask: MaskConfig = Causal()
  window: int | None = None  # a query sees only keys less than `window` tokens away; None: no limit
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: QKNorm | None = None
  qkv_clip: float | None = None  # clips queries, keys and values to [-c, c] before the positions (DBRX, OLMo)
  query_scale: float | None = None  # None: head_dim^-0.5
  # Queries grow with their position p, by the factor 1 + query_growth ln(1 + floor(p / growth_every)) (Llama 4,
  # Ministral 3; after 2501.19399); 0: they do not.
  query_growth: float = 0.0
  growth_every: int = 8192
  softcap: float | None = None  # c in the cap on logits, c tanh(logits / c); None: no cap
  sinks: bool = False  # each head has a trained logit that joins its softmax and attends to nothing (gpt-oss)
  dropout: float = 0.0  # dropout rate of the attention weights
  # Layers may share keys and values (2405.12981). `keep_kv` gives this layer's keys and values a name, under which
  # later layers find them; a layer with `kv_from` has no key or value projections and no cache, and attends to the
  # keys and values of that name.
  keep_kv: str | None = None
  kv_from: str | None = None

  attends = True
  grows = True

  def __post_init__(self):
    accept_name(self, "mask", MaskConfig)
    check_at_least(self, 1, "num_heads", "num_kv_heads", "head_dim", "window", "growth_every")
    check_at_least(self, 0, "query_growth")
    check_above(self, 0, "query_scale", "softcap", "qkv_clip")
    check_rate(self, "dropout")
    check(
      self.num_heads % self.kv_heads == 0,
      f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.kv_heads}",
    )
    check(
      self.position is None or isinstance(self.position, Rotary | LogitBias),
      f"position={self.position and self.position.kind!r} belongs to the embedding: set model.embed.position",
    )
    check(
      self.kv_from is None or self.keep_kv is None,
      f"kv_from={self.kv_from!r} has no keys and values of its own to keep; leave keep_kv out",
    )

  def check_against(self, d_model: int, max_seq_len: int):
    check(
      self.head_dim is not None or d_model % self.num_heads == 0,
      f"num_heads={self.num_heads} does not divide d_model={d_model}; give head_dim",
    )
    if isinstance(self.position, Rotary):
      self.position.check_against(self.dim(d_model), max_seq_len)

  def check_kept(self, name: str, owner: BranchConfig) -> None:
    """Raises UserError unless the owner's keys and values serve this layer's queries.

    Rotated keys fit only queries that are rotated alike, and a ring buffer holds no more than its owner's window.
    """
    for field in ("kv_heads", "head_dim", "position"):
      mine, theirs = getattr(self, field), getattr(owner, field)
      check(mine == theirs, f"kv_from={name!r}: {field} is {mine} here and {theirs} there; make them equal")
    sees_more = owner.window is not None and (self.window is None or self.window > owner.window)
    check(
      not sees_more,
      f"kv_from={name!r}: the window there, {owner.window}, must not be below the one here, {self.window};"
      " change either",
    )

  @property
  def heads(self) -> int:
    return self.num_heads

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  def dim(self, d_model: int) -> int:
    """Width of a head, as given or d_model / num_heads."""
    return d_model // self.num_heads if self.head_dim is None else self.head_dim

  @property
  def sharing(self) -> str:
    """The name of the scheme in which heads share keys and values."""
    if self.kv_heads == self.num_heads:
      return "multi-head"
    return "multi-query" if self.kv_heads == 1 else "grouped-query"

  @property
  def sees_ahead(self) -> str | None:
    return f"mask={self.mask.kind!r}" if self.mask.ahead else None

  @property
  def reads_prefix(self) -> bool:
    return "marks" in self.mask.reads

  @property
  def in_order(self) -> bool:
    return self.dropout > 0

  @property
  def keeps(self) -> tuple[str, ...]:
    return () if self.keep_kv is None else (self.keep_kv,)

  @property
  def reads_kept(self) -> tuple[str, ...]:
    return () if self.kv_from is None else (self.kv_from,)

  def make_shared(self, make: Maker):
    return self.position.make_shared(self.num_heads, make) if self.position else None

  def shared_size(self) -> int:
    return self.position.shared_size(self.num_heads) if self.position else 0

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    return (("num_heads", "heads", self.num_heads),)

  def summed(self, d_model: int) -> list[tuple[int, ...]]:
    return [(d_model,), (self.num_heads, self.dim(d_model))]

  def toy(self, *, window: int, hidden: Any) -> dict:
    """Keeps the heads multi-head, grouped-query or multi-query, with at most 4 query heads per key-value head."""
    group = self.num_heads // self.kv_heads
    if group == 1 and self.kv_heads > 1:  # multi-head; ALiBi has one rule for powers of two and another for the rest
      kv_heads = 6 if self.num_heads & (self.num_heads - 1) else 4
    else:
      group, kv_heads = group if group <= 4 else 4 - group % 2, min(self.kv_heads, 2)
    return {
      "num_heads": group * kv_heads,
      "num_kv_heads": None if self.num_kv_heads is None else kv_heads,
      "head_dim": None if self.head_dim is None else 10,
      "window": None if self.window is None else window,
    }

  def buffer(self, max_len: int, chunk: int, dtype: str) -> cache.Ring | None:
    """The ring buffer that holds keys and values; None with kv_from.

    A chunk is written before it is read, so a window needs chunk - 1 slots more than its width.
    """
    if self.kv_from is not None:
      return None
    slots = max_len if self.window is None else min(max_len, self.window + chunk - 1)
    return cache.Ring(kivi.capacity(slots) if dtype.endswith(BY_CHANNEL) else slots)

  def state_spec(self, d_model: int, batch: int, max_len: int, chunk: int, dtype: str) -> cache.Held | dict:
    """Specs of the cached keys and values, quantised if dtype is a format (config.Precision)."""
    ring = self.buffer(max_len, chunk, dtype)
    if ring is None:
      return {}
    shape = (batch, self.kv_heads, ring.capacity, self.dim(d_model))
    kv = cache.Spec(shape, ("cache_batch", "cache_heads", "cache_length", "head_dim"), dtype)
    if dtype.endswith(BY_CHANNEL):
      return cache.Held(ring.name, kivi.specs(kv._replace(dtype="bfloat16"), dtype.removesuffix(BY_CHANNEL), chunk))
    kv = cache.quantised_spec(kv, dtype) if dtype in FORMATS else kv
    return cache.Held(ring.name, {"k": kv, "v": kv})


class KeysAndValues(NamedTuple):
  """The keys and values that a layer attends to, from this call or from a cache."""

  k: jax.Array  # [B, K, S, H]
  v: jax.Array  # [B, K, S, H]
  keys: Keys  # [B, S]
  readable: jax.Array | None  # bool [B, T, S]; false where another slot holds the same token (ops/kivi.py); None: all


class Attention(nnx.Module):
  """Attention as a branch: out = attention(h, site)."""

  def __init__(self, config: AttentionConfig, d_model: int, make: Maker, init_scale: float, output_scale: float):
    self.config = config
    D, N, K, H = d_model, config.num_heads, config.kv_heads, config.dim(d_model)
    self.q = make.weight("q", "embed heads head_dim", (D, N, H), fan_in="embed")
    own = config.kv_from is None
    if own:
      self.k = make.weight("k", "embed kv_heads head_dim", (D, K, H), fan_in="embed")
      self.v = make.weight("v", "embed kv_heads head_dim", (D, K, H), fan_in="embed", scale=init_scale)
    self.o = make.weight("o", "heads head_dim embed", (N, H, D), "heads head_dim", init_scale * output_scale)
    if config.qkv_bias:
      self.q_bias = make.constant("heads head_dim", (N, H), 0.0)
      if own:
        self.k_bias = make.constant("kv_heads head_dim", (K, H), 0.0)
        self.v_bias = make.constant("kv_heads head_dim", (K, H), 0.0)
    if config.out_bias:
      self.o_bias = make.constant("embed", (D,), 0.0)
    if config.qk_norm:
      c = config.qk_norm
      self.q_norm = Norm(c.norm, N * H if c.whole else H, make, N if c.per_head else None)
      if own:
        self.k_norm = Norm(c.norm, K * H if c.whole else H, make, K if c.per_head else None)
    if config.sinks:
      self.sinks = make.constant("heads", (N,), 0.0)

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """Maps x [B, T, D] to an Out whose y is the Partial of a [B, T, D]."""
    # Sharded shapes under ws_2d+batch_xyz, where q moves from the heads to the batch later, and k and v at once:
    # q     [batch, length, embed.x] @ [embed.x, heads.zy, head_dim]    -> partial over x -> heads.zyx
    # k, v  [batch, length, embed.x] @ [embed.x, kv_heads.zy, head_dim] -> partial over x -> batch.zyx
    project = lambda name, to: Product("btd,dnh->btnh", getattr(self, name), getattr(self, f"{name}_bias", None), to)
    q = project("q", PROJECTED)
    if self.config.kv_from is None:
      q, k, v = einsums(x, q, project("k", self.kv_place), project("v", self.kv_place))
    else:
      (q,), k, v = einsums(x, q), None, None
    out, rest = self.mix(q, k, v, site)
    # [batch, length, heads.zyx, head_dim], gathered over x, @ [heads.zy, head_dim, embed.x] -> partial over z, y
    y = einsum("btnh,nhd->btd", out, self.o, bias=getattr(self, "o_bias", None), partial=True)
    return dataclasses.replace(rest, y=y)

  @property
  def kv_place(self) -> tuple[Axis, ...]:
    """Logical axes of the keys and values that the projections give."""
    return KV(self.config.kv_heads)

  def mix(self, q, k, v, site: Site) -> tuple[jax.Array, Out]:
    """Does all that lies between the projections.

    Takes q [B, T, N, H] and k, v [B, T, K, H], which are None if another layer's are read. Returns the attention
    output [B, T, N, H], and an Out without y.
    """
    c, context = self.config, site.context
    q = move(q, PROJECTED, ATTENDING)
    if c.qk_norm:
      q = self._normalise(self.q_norm, q, *ATTENDING_HEADS)
      k = k if k is None else self._normalise(self.k_norm, k, kv_heads(c.kv_heads))
    if c.qkv_clip is not None:
      q, k, v = (a if a is None else jnp.clip(a, -c.qkv_clip, c.qkv_clip) for a in (q, k, v))
    if isinstance(c.position, Rotary):
      q, k = c.position.turn(q, k, context.queries.positions, context.length)
    if c.query_growth:
      growth = ops.growth(context.queries.positions, c.query_growth, c.growth_every)
      q = q * growth[..., None, None].astype(q.dtype)

    kv, state = (site.kept[c.kv_from], None) if k is None else self.remember(k, v, q.dtype, site)
    sinks = move(self.sinks[...], self.sinks.axes, ATTENDING_HEADS) if c.sinks else None
    scale = q.shape[-1] ** -0.5 if c.query_scale is None else c.query_scale
    out, stats = attend(c, q, kv, site, sinks, scale=scale, softcap=c.softcap)
    keep = {} if c.keep_kv is None else {c.keep_kv: kv}
    return move(out, ATTENDING, PROJECTED), Out(None, state, keep, stats)

  def remember(self, k, v, dtype, site: Site) -> tuple[KeysAndValues, cache.Held | None]:
    """Adds k and v [B, T, K, H] of this call to those in the state; returns both together, and the new state."""
    if site.state is None:
      return KeysAndValues(k.swapaxes(1, 2), v.swapaxes(1, 2), site.context.queries, None), None
    context, leaves = site.context, site.state.leaves
    buffer = context.buffers[site.state.buffer]
    if "recent_k" in leaves:
      leaves, k, v, keys, readable = kivi.update(leaves, context.cursor, context.queries, buffer.keys, k, v)
      return KeysAndValues(k, v, keys, readable), dataclasses.replace(site.state, leaves=leaves)
    leaves = {name: buffer.write(leaves[name], new) for name, new in (("k", k), ("v", v))}
    k, v = (buffer.read(leaves[name], dtype) for name in ("k", "v"))
    return KeysAndValues(k, v, buffer.keys, None), dataclasses.replace(site.state, leaves=leaves)

  def _normalise(self, norm: Norm, x: jax.Array, heads: Axis) -> jax.Array:
    if self.config.qk_norm.whole:
      return norm(x.reshape(*x.shape[:2], -1), heads).reshape(x.shape)
    return norm(x, None, heads)


def attend(
  c, q: jax.Array, kv: KeysAndValues, site: Site, sinks: jax.Array | None, *, scale: float, softcap: float | None
) -> tuple[jax.Array, dict]:
  """Attends with q [B, T, N, H] to kv, both sharded as attention wants them -> [B, T, N, H'], statistics.

  c is a config with num_heads, kv_heads, position, mask, window and dropout. Over a mesh, every device computes the
  attention of its own queries. If the length is split too, the other devices' keys pass it by in a ring
  (ops/blockwise.py).
  """
  context, key = site.context, site.key if c.dropout else None
  entropy = context.telemetry

  def attend_here(q, k, v, queries, keys, readable, table, sinks, layer):
    k, v = (_of_these_queries(a, c.num_heads, c.kv_heads) for a in (k, v))
    ring, bias = mesh_axes("attn_length"), None
    which = None
    if c.mask.reads & {"head", "layer"}:
      which = Heads(part_index(mesh_axes("attn_heads")) * q.shape[2] + jnp.arange(q.shape[2]), layer)
    if isinstance(c.position, LogitBias):

      def bias(table, distance):
        logits = c.position.bias(table, distance, c.num_heads, c.mask.ahead)
        return move(logits, SCORES_OF_ALL_HEADS, SCORES)

    options = dict(scale=scale, softcap=softcap, entropy=entropy)
    if ring or (q.shape[1] >= BY_BLOCKS and readable is None and key is None):
      options |= dict(mask=c.mask, window=c.window, which=which, bias=bias, ring=ring[0] if ring else None)
      return blockwise.attend(
        q, k, v, queries, keys, sinks, table, block=blockwise.block_length(q.shape[1]), **options
      )
    seen = ops.visible(queries, keys, mask=c.mask, window=c.window, which=which)
    seen = seen if readable is None else seen & readable[:, None]
    if bias:
      bias = bias(table, keys.positions[:, None, :] - queries.positions[:, :, None])
    return ops.attend(q, k, v, seen, bias, sinks, dropout=c.dropout, key=key, **options)

  # Each device attends by itself, except with dropout (one draw covers the global batch) and with a decoding state
  # (the decoder's own shard_map has split everything already).
  if key is None and context.cursor is None:
    tokens = ATTENDING_TOKENS
    have = ATTENDING, KEYS(c.kv_heads), KEYS(c.kv_heads), tokens, tokens, (), (), ATTENDING_HEADS, ()
    attend_here = local(attend_here, have, (ATTENDING, WEIGHTS_OF_HEADS))
  layer = jnp.asarray(site.layer, jnp.int32)
  out, h = attend_here(q, kv.k, kv.v, context.queries, kv.keys, kv.readable, site.shared, sinks, layer)
  return out, {"attention_entropy": mean_over(h, context)} if entropy else {}


def _of_these_queries(kv: jax.Array, num_heads: int, num_kv_heads: int) -> jax.Array:
  """Selects the key-value heads [B, K', S, H] that this device's query heads use from those it holds [B, K, S, H].

  Several devices hold the same heads if the mesh has more devices than there are key-value heads.
  """
  queries, held = mesh_axes("attn_heads"), mesh_axes(kv_heads(num_kv_heads))
  group, mine = num_heads // num_kv_heads, num_heads // num_parts(queries)
  needed = max(1, mine // group)
  if needed == kv.shape[1]:
    return kv
  check(
    mine % group == 0 or group % mine == 0,
    f"num_heads={num_heads} over {num_parts(queries)} devices gives each {mine} heads, which is neither a multiple"
    f" nor a divisor of the {group} that share a key-value head; choose another mesh or layout",
  )
  first = part_index(queries) * mine // group - part_index(held) * kv.shape[1]
  return jax.lax.dynamic_slice_in_dim(kv, first, needed, axis=1)


def mean_over(entropy: jax.Array, context: Context) -> jax.Array:
  """Mean of entropy [B, T, N] over heads and real tokens."""
  real = (context.queries.positions >= 0)[..., None]
  return jnp.sum(entropy * real) / jnp.maximum(jnp.sum(real) * entropy.shape[-1], 1)
