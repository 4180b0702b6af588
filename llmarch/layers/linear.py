"""Causal linear attention (2006.16236), whose state does not grow. docs/add_a_mixer.md walks through this file.

B batch, T length, D model, N heads, H head dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.branches import MixerConfig
from llmarch.build import config_dataclass
from llmarch.errors import check, check_at_least
from llmarch.layers.param import Maker
from llmarch.layers.site import Out, Site
from llmarch.ops import recurrence
from llmarch.ops.cache import Spec
from llmarch.ops.einsum import einsum, einsums
from llmarch.ops.matmul import Product
from llmarch.sharding import PROJECTED, RECURRING, move


@config_dataclass
class LinearConfig(MixerConfig, kind="linear"):
  """Fields of linear attention."""

  num_heads: int
  head_dim: int | None = None  # None: d_model / num_heads
  chunk: int = 128  # tokens whose pairs are all computed at once; between chunks, the state carries the sums

  in_order = True  # the state reads the tokens of a row one after the other
  heads = property(lambda self: self.num_heads)

  def __post_init__(self):
    check_at_least(self, 1, "num_heads", "head_dim", "chunk")

  def check_against(self, d_model: int, max_seq_len: int) -> None:
    fits = self.head_dim is not None or d_model % self.num_heads == 0
    check(fits, f"num_heads={self.num_heads} does not divide d_model={d_model}; give head_dim")

  def dim(self, d_model: int) -> int:
    return d_model // self.num_heads if self.head_dim is None else self.head_dim

  def extents(self) -> tuple[tuple[str, str, int], ...]:
    return (("num_heads", "heads", self.num_heads),)

  def summed(self, d_model: int) -> list[tuple[int, ...]]:
    return [(d_model,), (self.num_heads, self.dim(d_model))]

  def state_spec(self, d_model: int, batch: int, max_len: int, chunk: int, dtype: str) -> dict[str, Spec]:
    """Specs of a row's sums, in f32 whatever dtype is, because they are small and each token adds to them."""
    N, H = self.num_heads, self.dim(d_model)
    sums = Spec((batch, N, H, H + 1), ("cache_batch", "cache_heads", "head_dim", "value_dim"), "float32")
    return {"sums": sums, "segment": Spec((batch,), ("cache_batch",), "int32")}


class Linear(nnx.Module):
  """Linear attention as a branch: out = linear(h, site)."""

  def __init__(self, config: LinearConfig, d_model: int, make: Maker, init_scale: float, output_scale: float):
    self.config = config
    D, N, H = d_model, config.num_heads, config.dim(d_model)
    self.q = make.weight("q", "embed heads head_dim", (D, N, H), fan_in="embed")
    self.k = make.weight("k", "embed heads head_dim", (D, N, H), fan_in="embed")
    self.v = make.weight("v", "embed heads head_dim", (D, N, H), fan_in="embed", scale=init_scale)
    self.o = make.weight("o", "heads head_dim embed", (N, H, D), "heads head_dim", init_scale * output_scale)

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """Maps x [B, T, D] to an Out whose y is the Partial of a [B, T, D]."""
    project = lambda w: Product("btd,dnh->btnh", w, to=PROJECTED)
    q, k, v = (move(a, PROJECTED, RECURRING) for a in einsums(x, *map(project, (self.q, self.k, self.v))))
    tokens = site.context.queries
    state = site.state or {"sums": jnp.zeros((q.shape[0], *q.shape[2:], q.shape[3] + 1), jnp.float32), "segment": None}
    document, segment = recurrence.documents(tokens.positions, tokens.segment_ids, state["segment"])
    y, sums = recurrence.linear_attention(q, k, v, document, state["sums"], chunk=self.config.chunk)
    y = einsum("btnh,nhd->btd", move(y, RECURRING, PROJECTED), self.o, partial=True)
    return Out(y, {"sums": sums, "segment": segment} if site.state else None)
