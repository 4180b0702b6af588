"""A parallel block with fewer, larger matrices (2211.05102, section 3.4): the same function, other parameters.

The queries and the inputs of the feed-forward come from one projection, keys and values from a second, and a third
projects both outputs. The hidden units of the feed-forward are divided among the query heads, so that a device that
holds some heads also holds their share of it.

B batch, T length, D model, N query heads, K key-value heads, H head dim, F hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.config import BlockConfig
from llmarch.errors import check
from llmarch.layers.attention import Attention, AttentionConfig
from llmarch.layers.block import Block
from llmarch.layers.ffn import MLP, MLPConfig
from llmarch.layers.site import Out, Site
from llmarch.ops.activation import activate
from llmarch.ops.einsum import einsum, einsums
from llmarch.ops.matmul import Product
from llmarch.residual import Parallel
from llmarch.sharding import PROJECTED

REPLACED = {Attention: ("q", "k", "v", "o"), MLP: ("gate", "up", "down")}


class Fused(nnx.Module):
  """The mixer and the feed-forward of a parallel block as one branch."""

  def __init__(self, mixer: Attention, ffn: MLP):
    """Takes the matrices of both modules over, with the leading dimension of stacked layers if there is one."""
    N = mixer.config.num_heads
    split_by_head = lambda w, dim: w.reshape(*w.shape[:dim], N, w.shape[dim] // N, *w.shape[dim:][1:])
    value = lambda module, name: getattr(module, name).get_value()
    inner = [split_by_head(value(ffn, name), -1) for name in _inner(ffn)]
    self.head_dim = mixer.q.sizes[-1]
    self.into = _param(jnp.concatenate([value(mixer, "q"), *inner], -1), "embed heads fused", "embed")
    self.kv = _param(jnp.concatenate([value(mixer, "k"), value(mixer, "v")], -1), "embed kv_heads fused", "embed")
    out = jnp.concatenate([value(mixer, "o"), split_by_head(value(ffn, "down"), -2)], -2)
    self.out = _param(out, "heads fused embed", "heads fused")
    self.mixer, self.ffn = _without_matrices(mixer), _without_matrices(ffn)

  def __call__(self, x: jax.Array, site: Site) -> Out:
    """Maps x [B, T, D] to an Out whose y is the Partial of both branches' sum; its state is the mixer's."""
    # Sharded shapes under ws_2d+batch_xyz. "fused" is a head's query and its hidden units, or its key and value:
    # [batch, length, embed.x] @ [embed.x, heads.zy, fused]    -> partial over x -> heads.zyx
    # [batch, length, embed.x] @ [embed.x, kv_heads.zy, fused] -> partial over x -> batch.zyx
    into, kv = einsums(
      x,
      Product("btd,dnc->btnc", self.into, to=PROJECTED),
      Product("btd,dnc->btnc", self.kv, to=self.mixer.kv_place),
    )
    q, *inner = self._parts(into)
    out, rest = self.mixer.mix(q, *jnp.split(kv, 2, axis=-1), site)
    h = jnp.concatenate([out, activate(self.ffn.config.activation, *inner)], axis=-1)
    # [batch, length, heads.zyx, fused], gathered over x, @ [heads.zy, fused, embed.x] -> partial over z, y
    return dataclasses.replace(rest, y=einsum("btnc,ncd->btd", h, self.out, partial=True))

  def _parts(self, into: jax.Array) -> list[jax.Array]:
    """Splits each head's columns into its query, then its share of the gate (if there is one), then of up."""
    share = (into.shape[-1] - self.head_dim) // len(_inner(self.ffn))
    return jnp.split(into, list(range(self.head_dim, into.shape[-1], share)), axis=-1)

  def separate(self) -> tuple[Attention, MLP]:
    """Returns the mixer and the feed-forward with their own matrices: the inverse of the constructor."""
    mixer, ffn = _without_matrices(self.mixer), _without_matrices(self.ffn)
    q, *inner = self._parts(self.into.get_value())
    k, v = jnp.split(self.kv.get_value(), 2, axis=-1)
    o, down = jnp.split(self.out.get_value(), [self.head_dim], axis=-2)
    mixer.q = _param(q, "embed heads head_dim", "embed")
    mixer.k, mixer.v = (_param(w, "embed kv_heads head_dim", "embed") for w in (k, v))
    mixer.o = _param(o, "heads head_dim embed", "heads head_dim")
    for name, w in zip(_inner(ffn), inner, strict=True):
      setattr(ffn, name, _param(w.reshape(*w.shape[:-2], -1), "embed mlp", "embed"))
    ffn.down = _param(down.reshape(*down.shape[:-3], -1, down.shape[-1]), "mlp embed", "mlp")
    return mixer, ffn


def fuse(block: Block) -> Block:
  """Fuses the projections of a parallel block; returns any other block as it is.

  Raises UserError if the block's branches cannot be fused, for example because they have biases.
  """
  if block.config.residual != Parallel() or hasattr(block, "fused"):
    return block
  _check_fusible(block.config)
  block = nnx.merge(*nnx.split(block))  # a new object around the same arrays
  block.fused = Fused(block.mixer, block.ffn)
  del block.mixer, block.ffn
  return block


def separate(block: Block) -> Block:
  """Separates fused projections again: the inverse of `fuse`."""
  if not hasattr(block, "fused"):
    return block
  block = nnx.merge(*nnx.split(block))
  block.mixer, block.ffn = block.fused.separate()
  del block.fused
  return block


def _check_fusible(block: BlockConfig) -> None:
  mixer, ffn = block.mixer, block.ffn
  check(
    isinstance(mixer, AttentionConfig) and isinstance(ffn, MLPConfig),
    f"fused projections are for attention beside an mlp, not for {mixer.kind} beside {ffn and ffn.kind}",
  )
  check(mixer.kv_from is None, "fused projections have keys and values of their own; do not fuse layers with kv_from")
  check(block.cross is None, "fused projections are for two branches, and cross is a third; do not fuse")
  check(not (mixer.qkv_bias or mixer.out_bias or ffn.bias), "fused projections have no biases; do not fuse")
  check(ffn.d_ff % mixer.num_heads == 0, f"d_ff={ffn.d_ff} must be a multiple of num_heads={mixer.num_heads} to fuse")


def _inner(ffn: MLP) -> tuple[str, ...]:
  return ("gate", "up") if ffn.config.gated else ("up",)


def _param(w: jax.Array, axes: str, fan_in: str) -> nnx.Param:
  names = tuple(axes.split())
  return nnx.Param(w, axes=names, sizes=w.shape[-len(names) :], fan_in=tuple(fan_in.split()), decay=True)


def _without_matrices(module):
  module = nnx.merge(*nnx.split(module))
  for name in REPLACED[type(module)]:
    if hasattr(module, name):
      delattr(module, name)
  return module
