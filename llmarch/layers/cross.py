"""Cross-attention: queries of the residual stream, keys and values of an encoder's output (1706.03762, section 3.2.3).

B batch, T length, S source length, D model, N query heads, K key-value heads, H head dim.
"""

import jax
from flax import nnx

from llmarch.branches import CrossConfig
from llmarch.build import config_dataclass
from llmarch.config import NormConfig
from llmarch.errors import check, check_above, check_at_least, check_rate
from llmarch.layers.attention import BY_CHANNEL, KeysAndValues, attend
from llmarch.layers.mask import Bidirectional
from llmarch.layers.norm import Norm
from llmarch.layers.param import Maker
from llmarch.layers.site import Out, Site
from llmarch.ops import cache
from llmarch.ops.einsum import einsum, einsums
from llmarch.ops.matmul import Product
from llmarch.ops.quant import FORMATS
from llmarch.sharding import ATTENDING, ATTENDING_HEADS, KV, PROJECTED, kv_heads, move


@config_dataclass
class CrossAttentionConfig(CrossConfig, kind="cross_attention"):
  """Fields of softmax(scale q k^T) v over all real tokens of the source that have the query's segment."""

  num_heads: int
  memory_dim: int  # width of the encoder's output
  num_kv_heads: int | None = None  # None: num_heads
  head_dim: int | None = None  # None: d_model / num_heads
  max_source_len: int = 4096  # the decoding state has room for a source of this many tokens
  bias: bool = False  # queries, keys and values have a bias
  out_bias: bool = False
  qk_norm: NormConfig | None = None  # norm over each head of queries and keys; None: no norm
  query_scale: float | None = None  # None: head_dim^-0.5
  dropout: float = 0.0  # dropout rate of the attention weights

  mask, window, position = Bidirectional(), None, None

  def __post_init__(self):
    check_at_least(self, 1, "num_heads", "num_kv_heads", "head_dim", "memory_dim", "max_source_len")
    check_above(self, 0, "query_scale")
    check_rate(self, "dropout")
    check(
      self.num_heads % self.kv_heads == 0,
      f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.kv_heads}",
    )

  def check_against(self, d_model: int, max_seq_len: int) -> None:
    check(
      self.head_dim is not None or d_model % self.num_heads == 0,
      f"num_heads={self.num_heads} does not divide d_model={d_model}; give head_dim",
    )

  def check_memory(self, memory_dim: int) -> None:
    mine = self.memory_dim
    check(mine == memory_dim, f"memory_dim={mine} is not the encoder's d_model={memory_dim}; set it to that")

  def check_state(self, dtype: str) -> None:
    quantised = dtype in FORMATS or dtype.endswith(BY_CHANNEL)
    check(not quantised, f"precision.state={dtype} is not for the keys and values of a memory; use bfloat16")

  @property
  def heads(self) -> int:
    return self.num_heads

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  def dim(self, d_model: int) -> int:
    """Width of a head."""
    return d_model // self.num_heads if self.head_dim is None else self.head_dim

  @property
  def in_order(self) -> bool:
    return self.dropout > 0

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    return (("num_heads", "heads", self.num_heads),)

  def summed(self, d_model: int) -> list[tuple[int, ...]]:
    return [(d_model,), (self.memory_dim,), (self.num_heads, self.dim(d_model))]

  def buffer(self, max_len: int, chunk: int, dtype: str) -> cache.Memory:
    return cache.Memory(self.max_source_len)

  def state_spec(self, d_model: int, batch: int, max_len: int, chunk: int, dtype: str) -> cache.Held:
    """Specs of the source's keys and values, which the call that brings a memory fills and later calls read."""
    memory = self.buffer(max_len, chunk, dtype)
    shape = batch, self.kv_heads, memory.capacity, self.dim(d_model)
    kv = cache.Spec(shape, ("cache_batch", "cache_heads", "cache_length", "head_dim"), dtype)
    return cache.Held(memory.name, {"k": kv, "v": kv})


class CrossAttention(nnx.Module):
  """Cross-attention as a branch: out = cross(h, site)."""

  def __init__(self, config: CrossAttentionConfig, d_model: int, make: Maker, init_scale: float, output_scale: float):
    self.config = config
    D, M, N, K, H = d_model, config.memory_dim, config.num_heads, config.kv_heads, config.dim(d_model)
    self.q = make.weight("q", "embed heads head_dim", (D, N, H), fan_in="embed")
    self.k = make.weight("k", "embed kv_heads head_dim", (M, K, H), fan_in="embed")
    self.v = make.weight("v", "embed kv_heads head_dim", (M, K, H), fan_in="embed", scale=init_scale)
    self.o = make.weight("o", "heads head_dim embed", (N, H, D), "heads head_dim", init_scale * output_scale)
    if config.bias:
      self.q_bias = make.constant("heads head_dim", (N, H), 0.0)
      self.k_bias = make.constant("kv_heads head_dim", (K, H), 0.0)
      self.v_bias = make.constant("kv_heads head_dim", (K, H), 0.0)
    if config.out_bias:
      self.o_bias = make.constant("embed", (D,), 0.0)
    if config.qk_norm:
      self.q_norm, self.k_norm = Norm(config.qk_norm, H, make), Norm(config.qk_norm, H, make)

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """Maps x [B, T, D] to an Out whose y is the Partial of a [B, T, D]."""
    c = self.config
    q = einsum("btd,dnh->btnh", x, self.q, bias=getattr(self, "q_bias", None), to=PROJECTED)
    q = move(q, PROJECTED, ATTENDING)
    if c.qk_norm:
      q = self.q_norm(q, None, *ATTENDING_HEADS)
    kv, state = self.memory(q.dtype, site)
    scale = q.shape[-1] ** -0.5 if c.query_scale is None else c.query_scale
    out, stats = attend(c, q, kv, site, None, scale=scale, softcap=None)
    out = move(out, ATTENDING, PROJECTED)
    y = einsum("btnh,nhd->btd", out, self.o, bias=getattr(self, "o_bias", None), partial=True)
    return Out(y, state, stats={f"cross_{name}": value for name, value in stats.items()})

  def memory(self, dtype, site: Site) -> tuple[KeysAndValues, cache.Held | None]:
    """Keys and values of the source, from the memory that this call brings or else from the decoding state."""
    memory = site.context.memory
    k = v = None
    if memory is not None:
      place = KV(self.config.kv_heads)
      project = lambda w: Product("btd,dnh->btnh", getattr(self, w), getattr(self, f"{w}_bias", None), to=place)
      k, v = einsums(memory.hidden, project("k"), project("v"))  # [B, S, K, H]
      k = self.k_norm(k, None, kv_heads(self.config.kv_heads)) if self.config.qk_norm else k
    if site.state is None:
      check(memory is not None, "this model reads an encoder's output; call it with memory=model.encode(...)")
      return KeysAndValues(k.swapaxes(1, 2), v.swapaxes(1, 2), memory.keys, None), None
    buffer = site.context.buffers[site.state.buffer]
    leaves = {name: buffer.write(site.state.leaves[name], new) for name, new in (("k", k), ("v", v))}
    k, v = (buffer.read(leaves[name], dtype) for name in ("k", "v"))
    return KeysAndValues(k, v, buffer.keys, None), cache.Held(site.state.buffer, leaves)
