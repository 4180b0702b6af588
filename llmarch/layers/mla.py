"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): the cache holds one small latent per token.

Keys and values of every head n are projections of a token's latent c, which has C numbers: k_n = c W^UK_n and
v_n = c W^UV_n. Only R dimensions of the keys are not made of it: these rotate with the position, and all heads
share them.

B batch, T length, D model, N heads, S cache length, C width of the key-value latent, P and R dimensions of a query
and key without and with positions, V dimensions of a value.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.branches import MixerConfig
from llmarch.build import config_dataclass
from llmarch.config import NormConfig, PositionConfig
from llmarch.errors import check, check_above, check_at_least, check_rate
from llmarch.layers.attention import BY_CHANNEL, KeysAndValues, attend, mean_over
from llmarch.layers.mask import Causal
from llmarch.layers.norm import Norm, RMSNorm
from llmarch.layers.param import Maker
from llmarch.layers.position import RoPE, Rotary, YaRN
from llmarch.layers.site import Out, Site
from llmarch.ops import attention as ops
from llmarch.ops import cache
from llmarch.ops.einsum import einsum, einsums
from llmarch.ops.matmul import Product
from llmarch.ops.quant import FORMATS
from llmarch.sharding import ATTENDING, ATTENDING_TOKENS, LATENT, PROJECTED, ROWS, move


@config_dataclass
class MLAConfig(MixerConfig, kind="mla"):
  """Fields of multi-head latent attention, named as in DeepSeek's configs."""

  num_heads: int
  kv_lora_rank: int  # C
  qk_nope_head_dim: int  # P
  qk_rope_head_dim: int  # R
  v_head_dim: int  # V
  q_lora_rank: int | None = None  # width of the queries' latent; None: queries are projected from the residual stream
  latent_norm: NormConfig = RMSNorm()  # norm of the queries' and of the key-value latent
  position: PositionConfig = RoPE(interleaved=True)
  query_scale: float | None = None  # None: (P + R)^-0.5
  # With YaRN, scores are also multiplied by (0.1 m ln(factor) + 1)^2, where m is this field. The separate factor on
  # the rotated dimensions is the scaling's attention_factor (DeepSeek: mscale / mscale_all_dim = 1).
  mscale_all_dim: float | None = None
  dropout: float = 0.0  # dropout rate of the attention weights

  mask, window = Causal(), None
  attends = True
  grows = True
  sharing = "latent"

  def __post_init__(self):
    check_at_least(self, 1, "num_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    R = self.qk_rope_head_dim
    check(R > 0 and R % 2 == 0, f"qk_rope_head_dim must be even and above 0, got {R}")
    check_above(self, 0, "query_scale", "mscale_all_dim")
    check_rate(self, "dropout")
    check(
      isinstance(self.position, Rotary) and self.position.dims is None,
      "position must be rope or xpos without dims: qk_rope_head_dim says how many dimensions turn",
    )
    check(
      self.mscale_all_dim is None or isinstance(getattr(self.position, "scaling", None), YaRN),
      "mscale_all_dim belongs to position.scaling=yarn; leave it out or give that scaling",
    )

  def check_against(self, d_model: int, max_seq_len: int):
    self.position.check_against(self.qk_rope_head_dim, max_seq_len)

  def check_state(self, dtype: str) -> None:
    check(
      not dtype.endswith(BY_CHANNEL),
      f"precision.state={dtype}: latents are keys and values at once and have no scales by channel; use"
      f" {dtype.removesuffix(BY_CHANNEL)}",
    )

  @property
  def in_order(self) -> bool:
    return self.dropout > 0

  @property
  def heads(self) -> int:
    return self.num_heads

  @property
  def rank(self) -> int:
    return self.kv_lora_rank

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    ranks = {"q_lora_rank": self.q_lora_rank, "kv_lora_rank": self.kv_lora_rank}
    return (("num_heads", "heads", self.num_heads), *((f, "latent", n) for f, n in ranks.items() if n is not None))

  def summed(self, d_model: int) -> list[tuple[int, ...]]:
    queries = [] if self.q_lora_rank is None else [(self.q_lora_rank,)]
    return [(d_model,), (self.kv_lora_rank,), *queries, (self.num_heads, self.v_head_dim)]

  def toy(self, *, window: int, hidden: Any) -> dict:
    return {
      "num_heads": 4,
      "q_lora_rank": None if self.q_lora_rank is None else 14,
      "kv_lora_rank": 18,
      "qk_nope_head_dim": 6,
      "qk_rope_head_dim": 4,
      "v_head_dim": 9,
    }

  @property
  def kv_heads(self) -> int:
    """Number of heads: each has its own keys and values, projected from the cached latent."""
    return self.num_heads

  def dim(self, d_model: int) -> int:
    """Width of a query and of a key."""
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  def scale(self) -> float:
    """The factor on the scores before the softmax."""
    scale = self.dim(0) ** -0.5 if self.query_scale is None else self.query_scale
    if self.mscale_all_dim is not None:
      scale *= (0.1 * self.mscale_all_dim * math.log(self.position.scaling.factor) + 1) ** 2
    return scale

  def buffer(self, max_len: int, chunk: int, dtype: str) -> cache.Ring:
    return cache.Ring(max_len)

  def state_spec(self, d_model: int, batch: int, max_len: int, chunk: int, dtype: str) -> cache.Held:
    """Specs of the latents and the rotated keys, each cached as one head; quantised if dtype is a format."""
    ring = self.buffer(max_len, chunk, dtype)

    def spec_of_width(dim):
      shape = batch, 1, ring.capacity, dim
      spec = cache.Spec(shape, ("cache_batch", "cache_heads", "cache_length", "head_dim"), dtype)
      return cache.quantised_spec(spec, dtype) if dtype in FORMATS else spec

    latent, rope = spec_of_width(self.kv_lora_rank), spec_of_width(self.qk_rope_head_dim)
    return cache.Held(ring.name, {"latent": latent, "rope": rope})


def absorbing_is_cheaper(T: int, S: int, C: int, inner: int) -> bool:
  """True if T queries on S cached latents of rank C take fewer FLOPs in the latent space; inner = P + V.

  Multiply-adds per row and head, without those of the R rotated dimensions, which both forms share:
    naive     S C inner + T S inner    every latent is expanded to a key and a value, which attention then reads
    absorbed  T C inner + 2 T S C      queries go through W^UK and outputs through W^UV; between, each head
                                       attends to the latents themselves
  A decode step absorbs: one query on a long cache of DeepSeek-V3 (C = 512, inner = 256) saves a factor of 128. A
  prompt of more than about C inner / (2 C - inner) tokens (171 in DeepSeek-V3) does not.
  """
  return T * C * inner + 2 * T * S * C < S * C * inner + T * S * inner


class MLA(nnx.Module):
  """Multi-head latent attention as a branch: out = mla(h, site)."""

  def __init__(self, config: MLAConfig, d_model: int, make: Maker, init_scale: float, output_scale: float):
    self.config = config
    D, N, C, Q = d_model, config.num_heads, config.kv_lora_rank, config.q_lora_rank
    P, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    if Q is None:
      self.q = make.weight("q", "embed heads head_dim", (D, N, P + R), fan_in="embed")
    else:
      self.q_down = make.weight("q_down", "embed rank", (D, Q), fan_in="embed")
      self.q_norm = Norm(config.latent_norm, Q, make)
      self.q_up = make.weight("q_up", "latent heads head_dim", (Q, N, P + R), fan_in="latent")
    self.kv_down = make.weight("kv_down", "embed rank", (D, C), fan_in="embed")
    self.kv_norm = Norm(config.latent_norm, C, make)
    self.k_rope = make.weight("k_rope", "embed rank", (D, R), fan_in="embed")
    self.k = make.weight("k", "latent heads head_dim", (C, N, P), fan_in="latent")
    self.v = make.weight("v", "latent heads head_dim", (C, N, V), fan_in="latent", scale=init_scale)
    self.o = make.weight("o", "heads head_dim embed", (N, V, D), "heads head_dim", init_scale * output_scale)

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """Maps x [B, T, D] to an Out whose y is the Partial of a [B, T, D].

    The leaves of its state are "latent" [B, 1, S, C] and "rope" [B, 1, S, R].
    """
    c, context, state = self.config, site.context, site.state
    # The sharded shapes are those of ws_2d+batch_xyz, where attention splits the batch and the cache over z, y and x.
    if c.q_lora_rank is None:
      # [batch, length, embed.x] @ [embed.x, heads.zy, head_dim] -> partial over x -> heads.zyx
      queries = Product("btd,dnh->btnh", self.q, to=PROJECTED)
    else:
      # [batch, length, embed.x] @ [embed.x, rank.zy] -> partial over x -> [batch, length, rank]
      queries = Product("btd,dc->btc", self.q_down, to=ROWS)
    # [batch, length, embed.x] @ [embed.x, rank.zy] -> partial over x -> [batch.zyx, length, rank]
    into = (Product("btd,dc->btc", w, to=LATENT) for w in (self.kv_down, self.k_rope))
    q, latent, k_rope = einsums(x, queries, *into)
    if c.q_lora_rank is not None:
      # [batch, length, latent] @ [latent, heads.zyx, head_dim] -> [batch, length, heads.zyx, head_dim]
      q = einsum("btc,cnh->btnh", self.q_norm(q, None), self.q_up, to=PROJECTED)
    latent = self.kv_norm(latent, None)

    inner = c.qk_nope_head_dim + c.v_head_dim
    slots = None if state is None else state.leaves["latent"].shape[2]
    # Without a state every latent is new, and each head expands it to a key and a value only once.
    absorb = slots is not None and absorbing_is_cheaper(x.shape[1], slots, c.kv_lora_rank, inner)
    R = c.qk_rope_head_dim
    if absorb:
      # [batch, length, heads.zyx, head_dim] @ [latent, heads.zyx, head_dim] -> [batch, length, heads.zyx, latent]
      nope = einsum("btnh,cnh->btnc", q[..., :-R], self.k, to=PROJECTED)
      q = jnp.concatenate([nope, q[..., -R:]], axis=-1)
    q = move(q, PROJECTED, ATTENDING)
    nope, rope = q[..., :-R], q[..., -R:]
    rope, k_rope = c.position.turn(rope, k_rope[:, :, None], context.queries.positions, context.length)

    keys = context.queries
    if state is None:
      latent, k_rope = latent[:, None], k_rope.swapaxes(1, 2)  # [B, 1, T, C], [B, 1, T, R]
    else:
      buffer = context.buffers[state.buffer]
      keys = buffer.keys
      new = {"latent": latent[:, :, None], "rope": k_rope}
      state = dataclasses.replace(state, leaves={n: buffer.write(state.leaves[n], values) for n, values in new.items()})
      latent, k_rope = (buffer.read(state.leaves[name], x.dtype) for name in ("latent", "rope"))

    options = dict(scale=c.scale(), softcap=None)
    if absorb:
      seen = ops.visible(context.queries, keys, mask=c.mask, window=c.window)
      turned = ops.shared_scores(rope, k_rope[:, 0], scale=c.scale())
      options |= dict(dropout=c.dropout, key=site.key, entropy=context.telemetry)
      out, entropy = ops.attend(nope, latent, latent, seen, turned, None, **options)
      stats = {"attention_entropy": mean_over(entropy, context)} if context.telemetry else {}
      # [batch, length, heads.zyx, latent] @ [latent, heads.zyx, head_dim] -> [batch, length, heads.zyx, head_dim]
      out = einsum("btnc,cnh->btnh", move(out, ATTENDING, PROJECTED), self.v, to=PROJECTED)
    else:
      # [batch.zyx, length, latent] @ [latent, heads, head_dim] -> [batch.zyx, length, heads, head_dim]
      place = dict(tokens=ATTENDING_TOKENS, to=ATTENDING)
      k, v = einsums(latent[:, 0], *(Product("btc,cnh->btnh", w, **place) for w in (self.k, self.v)))
      k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, N, S, P], [B, N, S, V]
      k = jnp.concatenate([k, jnp.broadcast_to(k_rope, (*k.shape[:3], R))], axis=-1)
      q = jnp.concatenate([nope, rope], axis=-1)
      out, stats = attend(c, q, KeysAndValues(k, v, keys, None), site, None, **options)
      out = move(out, ATTENDING, PROJECTED)
    # [batch, length, heads.zyx, head_dim], gathered over x, @ [heads.zy, head_dim, embed.x] -> partial over z, y
    return Out(einsum("btnh,nhd->btd", out, self.o, partial=True), state, stats=stats)
