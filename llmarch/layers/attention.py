"""Softmax attention: MHA, GQA and MQA, with every norm, bias, cap and position scheme of the space.

B batch, T length, D model, N query heads, K key-value heads, H head dim, S cache length.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.config import (
  MixerConfig,
  NormConfig,
  PositionConfig,
  check,
  check_above,
  check_at_least,
  check_rate,
  config_dataclass,
)
from llmarch.layers.context import Context
from llmarch.layers.norm import Norm
from llmarch.layers.param import Maker
from llmarch.layers.position import LogitBias, Mask, Rotary
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

BY_BLOCKS = 512  # from this many queries on, scores are computed block by block
BY_CHANNEL = "_channel"  # of a state's format: keys share a scale by channel


@config_dataclass
class QKNorm:
  """Normalises queries and keys before the positions: over each head (Qwen 3), or all heads at once (OLMo 2)."""

  norm: NormConfig
  whole: bool = False
  per_head: bool = False  # each head has parameters of its own (Cohere); `whole` has them anyway

  def __post_init__(self):
    check(not (self.whole and self.per_head), "whole already has parameters for each head; set per_head=false")


@config_dataclass
class AttentionConfig(MixerConfig, kind="attention"):
  num_heads: int
  num_kv_heads: int | None = None  # None: num_heads (MHA); 1: MQA
  head_dim: int | None = None  # None: d_model / num_heads
  position: PositionConfig | None = None
  mask: Mask = "causal"
  window: int | None = None  # sees keys at a distance below it
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: QKNorm | None = None
  qkv_clip: float | None = None  # queries, keys and values are cut to [-c, c] before the positions (DBRX, OLMo)
  query_scale: float | None = None  # None: head_dim^-0.5
  softcap: float | None = None  # cap on the logits: c tanh(logits / c)
  sinks: bool = False  # a trained logit a head that joins the softmax and attends to nothing
  dropout: float = 0.0  # on the attention weights

  def __post_init__(self):
    check_at_least(self, 1, "num_heads", "num_kv_heads", "head_dim", "window")
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

  def check_against(self, d_model: int, max_seq_len: int):
    check(
      self.head_dim is not None or d_model % self.num_heads == 0,
      f"num_heads={self.num_heads} does not divide d_model={d_model}; give head_dim",
    )
    if isinstance(self.position, Rotary):
      self.position.check_against(self.dim(d_model))

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  def dim(self, d_model: int) -> int:
    return d_model // self.num_heads if self.head_dim is None else self.head_dim

  def capacity(self, max_len: int, chunk: int, dtype: str) -> int:
    """Slots of the cache. A chunk is written before it is read, so a window needs chunk - 1 more."""
    slots = max_len if self.window is None else min(max_len, self.window + chunk - 1)
    return kivi.capacity(slots) if dtype.endswith(BY_CHANNEL) else slots

  def state_spec(self, d_model: int, batch: int, max_len: int, chunk: int, dtype: str) -> dict[str, cache.Spec]:
    """Keys and values, quantised where dtype is a format; see config.Precision."""
    shape = (batch, self.kv_heads, self.capacity(max_len, chunk, dtype), self.dim(d_model))
    kv = cache.Spec(shape, ("cache_batch", "cache_heads", "cache_length", "head_dim"), dtype)
    if dtype.endswith(BY_CHANNEL):
      return kivi.specs(kv._replace(dtype="bfloat16"), dtype.removesuffix(BY_CHANNEL), chunk)
    kv = cache.quantised_spec(kv, dtype) if dtype in FORMATS else kv
    return {"k": kv, "v": kv}


class Attention(nnx.Module):
  """y, state, aux = attention(x, context, state, shared, key)."""

  def __init__(self, config: AttentionConfig, d_model: int, make: Maker, init_scale: float, output_scale: float):
    self.config = config
    D, N, K, H = d_model, config.num_heads, config.kv_heads, config.dim(d_model)
    self.q = make.weight("q", "embed heads head_dim", (D, N, H), fan_in="embed")
    self.k = make.weight("k", "embed kv_heads head_dim", (D, K, H), fan_in="embed")
    self.v = make.weight("v", "embed kv_heads head_dim", (D, K, H), fan_in="embed", scale=init_scale)
    self.o = make.weight("o", "heads head_dim embed", (N, H, D), "heads head_dim", init_scale * output_scale)
    if config.qkv_bias:
      self.q_bias = make.constant("heads head_dim", (N, H), 0.0)
      self.k_bias = make.constant("kv_heads head_dim", (K, H), 0.0)
      self.v_bias = make.constant("kv_heads head_dim", (K, H), 0.0)
    if config.out_bias:
      self.o_bias = make.constant("embed", (D,), 0.0)
    if config.qk_norm:
      c = config.qk_norm
      self.q_norm = Norm(c.norm, N * H if c.whole else H, make, N if c.per_head else None)
      self.k_norm = Norm(c.norm, K * H if c.whole else H, make, K if c.per_head else None)
    if config.sinks:
      self.sinks = make.constant("heads", (N,), 0.0)

  def __call__(self, x: jax.Array, context: Context, state: dict | None, shared, key: jax.Array | None):
    """x [B, T, D]; state {"k", "v"} [B, K, S, H]; shared: the block's T5 table or None.

    -> y, the Partial of a [B, T, D], the new state, aux.
    """
    # Under ws_2d+batch_xyz, where q is still to move from the heads to the batch, and k and v go there at once:
    # q     [batch, length, embed.x] @ [embed.x, heads.zy, head_dim]    -> partial over x -> heads.zyx
    # k, v  [batch, length, embed.x] @ [embed.x, kv_heads.zy, head_dim] -> partial over x -> batch.zyx
    project = lambda name, to: Product("btd,dnh->btnh", getattr(self, name), getattr(self, f"{name}_bias", None), to)
    q, k, v = einsums(x, project("q", PROJECTED), project("k", self.kv_place), project("v", self.kv_place))
    out, state, aux = self.mix(q, k, v, context, state, shared, key)
    # [batch, length, heads.zyx, head_dim], gathered over x, @ [heads.zy, head_dim, embed.x] -> partial over z, y
    return einsum("btnh,nhd->btd", out, self.o, bias=getattr(self, "o_bias", None), partial=True), state, aux

  @property
  def kv_place(self) -> tuple[Axis, ...]:
    return KV(self.config.kv_heads)

  def mix(self, q, k, v, context: Context, state: dict | None, shared, key: jax.Array | None):
    """What lies between the projections: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H], state, aux."""
    c = self.config
    q = move(q, PROJECTED, ATTENDING)
    if c.qk_norm:
      q, k = self._normalise(self.q_norm, q, *ATTENDING_HEADS), self._normalise(self.k_norm, k, kv_heads(c.kv_heads))
    if c.qkv_clip is not None:
      q, k, v = (jnp.clip(a, -c.qkv_clip, c.qkv_clip) for a in (q, k, v))
    if isinstance(c.position, Rotary):
      q, k = c.position.turn(q, k, context.queries.positions, context.length)

    readable = None
    if state is None:
      keys = context.queries
      k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    else:
      buffer = context.buffers[state["k"].shape[2]]
      keys = buffer.keys
      if "recent_k" in state:
        state, k, v, keys, readable = kivi.update(state, context.cursor, context.queries, keys, k, v)
      else:
        state = {name: cache.write(state[name], buffer.slots, kv) for name, kv in (("k", k), ("v", v))}
        k, v = (state[name].astype(q.dtype) for name in ("k", "v"))  # [B, K, S, H]
    sinks = move(self.sinks[...], self.sinks.axes, ATTENDING_HEADS) if c.sinks else None
    scale = q.shape[-1] ** -0.5 if c.query_scale is None else c.query_scale
    out, aux = attend(c, q, k, v, context, keys, readable, shared, sinks, key, scale=scale, softcap=c.softcap)
    return move(out, ATTENDING, PROJECTED), state, aux

  def _normalise(self, norm: Norm, x: jax.Array, heads: Axis) -> jax.Array:
    if self.config.qk_norm.whole:
      return norm(x.reshape(*x.shape[:2], -1), heads).reshape(x.shape)
    return norm(x, None, heads)


def attend(
  c, q, k, v, context: Context, keys: Keys, readable, table, sinks, key, *, scale: float, softcap: float | None
) -> tuple[jax.Array, dict]:
  """q [B, T, N, H], k [B, K, S, H], v [B, K, S, H'] in the place of attention -> [B, T, N, H'], aux.

  c: a config with num_heads, kv_heads, position, mask, window and dropout. Over a mesh every device attends by
  itself: to the keys of its own part of the length, and to others' as they come round (ops/blockwise.py).
  """
  key = key if c.dropout else None
  entropy = context.telemetry

  def here(q, k, v, queries, keys, readable, table, sinks):
    k, v = (_of_these_queries(a, c.num_heads, c.kv_heads) for a in (k, v))
    ring, bias = mesh_axes("attn_length"), None
    if isinstance(c.position, LogitBias):

      def bias(table, distance):
        logits = c.position.bias(table, distance, c.num_heads, c.mask == "bidirectional")
        return move(logits, SCORES_OF_ALL_HEADS, SCORES)

    options = dict(scale=scale, softcap=softcap, entropy=entropy)
    if ring or (q.shape[1] >= BY_BLOCKS and readable is None and key is None):
      options |= dict(mask=c.mask, window=c.window, bias=bias, ring=ring[0] if ring else None)
      return blockwise.attend(
        q, k, v, queries, keys, sinks, table, block=blockwise.block_length(q.shape[1]), **options
      )
    seen = ops.visible(queries, keys, mask=c.mask, window=c.window)
    seen = seen if readable is None else seen & readable
    if bias:
      bias = bias(table, keys.positions[:, None, :] - queries.positions[:, :, None])
    return ops.attend(q, k, v, seen, bias, sinks, dropout=c.dropout, key=key, **options)

  # Not with dropout (one draw covers the global batch) nor with a decoding state (the decoder's shard_map has placed
  # it).
  if key is None and context.cursor is None:
    kv, tokens = KEYS(c.kv_heads), ATTENDING_TOKENS
    have = ATTENDING, kv, kv, tokens, tokens, (), (), ATTENDING_HEADS
    here = local(here, have, (ATTENDING, WEIGHTS_OF_HEADS))
  out, h = here(q, k, v, context.queries, keys, readable, table, sinks)
  return out, {"attention_entropy": mean_over(h, context)} if entropy else {}


def _of_these_queries(kv: jax.Array, num_heads: int, num_kv_heads: int) -> jax.Array:
  """The key-value heads [B, K', S, H] that this device's query heads use, of those [B, K, S, H] that it holds.

  Where the mesh has more devices than there are key-value heads, devices hold the same ones.
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
  """Mean over heads and real tokens of [B, T, N]."""
  real = (context.queries.positions >= 0)[..., None]
  return jnp.sum(entropy * real) / jnp.maximum(jnp.sum(real) * entropy.shape[-1], 1)
