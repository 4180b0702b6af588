"""The decoder, from tokens to logits. Training, prefill, a chunk and a decode step are all this one forward.

B batch, T tokens of this call, D model, V vocabulary.
"""

from collections.abc import Callable, Iterable

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from llmarch.config import ModelConfig
from llmarch.layers import fused
from llmarch.layers import stack as stacks
from llmarch.layers.context import Memory, make_context
from llmarch.layers.norm import Norm
from llmarch.layers.param import Maker
from llmarch.ops import cache
from llmarch.ops.attention import Keys
from llmarch.ops.einsum import einsum, lookup
from llmarch.sharding import NARROW, RESIDUAL, move


class Decoder(nnx.Module):
  """A decoder: logits, state, aux = model(tokens, positions).

  With an encoder it is called as model(tokens, positions, memory=model.encode(source, source_positions)).
  """

  def __init__(self, config: ModelConfig, key: jax.Array):
    self.config = config
    c, make = config, Maker(key, config.init, config.precision.param)
    at_embedding = make.child("embed", c.embed_init)
    width, dim = ("embed", c.d_model) if c.embed.dim is None else ("factor", c.embed.dim)
    # `fan_in` names the dimension that is summed over when the table serves as the head.
    self.embed = at_embedding.weight("tokens", f"vocab {width}", (c.vocab_size, dim), fan_in=width)
    if c.embed.dim is not None:
      self.embed_in = make.weight("embed_in", "factor embed", (dim, c.d_model), fan_in="factor")
      self.embed_out = make.weight("embed_out", "embed factor", (c.d_model, dim), fan_in="embed")
    if c.embed.position:
      self.position = c.embed.position.make(c.d_model, at_embedding)
    if c.embed.norm:
      self.embed_norm = Norm(c.embed.norm, c.d_model, make)
    self.stack = stacks.Stack(c, make.child("stack"))
    if c.final_norm:
      self.final_norm = Norm(c.final_norm, c.d_model, make)
    if not c.head.tied:
      self.head = make.weight("head", f"vocab {width}", (c.vocab_size, dim), fan_in=width)
    if c.head.bias:
      self.head_bias = make.constant("vocab", (c.vocab_size,), 0.0)
    if c.encoder:
      self.encoder = Decoder(c.encoder, make.child("encoder").key)

  def __call__(self, tokens, positions, segment_ids=None, state=None, **options):
    """Maps tokens and positions int32 [B, T] to logits f32 [B, T, V], the new state (None without one) and Aux.

    A negative position is padding. `segment_ids` int32 [B, T] keeps packed documents apart. `options` are those of
    `trunk`. The caller checks that tokens and positions are in range: this function cannot, and JAX would clamp them.
    """
    hidden, state, aux = self.trunk(tokens, positions, segment_ids, state, **options)
    return self.unembed(hidden), state, aux

  def trunk(
    self, tokens, positions, segment_ids=None, state=None, *,
    prefix=None, memory=None, key=None, remat="none", telemetry=False,
  ):  # fmt: skip
    """Computes everything below the final norm: hidden [B, T, D], the new state, and Aux (layers/stack.py).

    prefix: bool [B, T], the tokens that their whole segment sees if a mixer's mask is "prefix"; a prefix must lie in
    one call. memory: the result of `encode`; with a decoding state, only the call that brings a source passes it.
    key: random key of dropout; None: no dropout. remat: a name of REMAT_POLICIES, or "none".
    """
    # JAX would silently broadcast a [T] or a [B, 1] here.
    chex.assert_rank(tokens, 2)
    chex.assert_equal_shape([a for a in (tokens, positions, segment_ids, prefix) if a is not None])
    context, shared_state = make_context(positions, segment_ids, prefix, state, memory, telemetry)
    keys = [None, None] if key is None else jax.random.split(key)
    x = self.drop(self.enter(tokens, positions), keys[0])
    x, layers, aux = self.stack(x, context, None if state is None else state["layers"], keys[1], remat)
    return x, None if state is None else {**shared_state, "layers": layers}, aux

  def encode(self, tokens, positions, segment_ids=None, **options) -> Memory:
    """Encodes a source, int32 [B, S] each, for the argument `memory`; options are those of `trunk`."""
    hidden, _, _ = self.encoder.trunk(tokens, positions, segment_ids, **options)
    segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
    place = ("attn_batch", "attn_length")
    keys = Keys(move(positions, RESIDUAL[:2], place), move(segments, RESIDUAL[:2], place), None)
    return Memory(self.encoder.finish(hidden), keys)

  def finish(self, hidden: jax.Array) -> jax.Array:
    """The final norm: hidden [B, T, D] -> [B, T, D], sharded as the head's matrix needs it."""
    hidden = move(hidden, RESIDUAL, (*RESIDUAL[:2], "post_norm_embed"))
    return self.final_norm(hidden, "post_norm_embed") if self.config.final_norm else hidden

  def enter(self, tokens, positions) -> jax.Array:
    """Embeds tokens at positions, int32 [B, T] each -> [B, T, D], before the embedding's dropout."""
    c = self.config
    narrow = c.embed.dim is not None
    x = lookup(self.embed, tokens, c.precision.compute, NARROW if narrow else RESIDUAL)  # [B, T, D]
    if narrow:
      # Under ws_2d: [batch, length, factor] @ [factor, embed.xzy] -> [batch, length, embed.xzy]
      x = einsum("bte,ed->btd", x, self.embed_in)
    if c.embed.scale != 1:
      x = x * c.embed.scale
    if c.embed.position:
      x = x + c.embed.position.vectors(self.position, positions, c.d_model).astype(x.dtype)
    if c.embed.norm:
      x = self.embed_norm(x, RESIDUAL[-1])
    return x

  def drop(self, x: jax.Array, key) -> jax.Array:
    """Applies the embedding's dropout if there is a key."""
    kept = 1 - self.config.embed.dropout
    return x if key is None or kept == 1 else x * (jax.random.bernoulli(key, kept, x.shape) / kept).astype(x.dtype)

  @property
  def table(self) -> nnx.Param:
    """The head's table [V, D], which is the embedding table if the head is tied."""
    return self.embed if self.config.head.tied else self.head

  def unembed(self, hidden: jax.Array, table: nnx.Param | None = None) -> jax.Array:
    """Applies the final norm and the head: hidden [B, T, D] -> logits f32 [B, T, V].

    table: `self.table` in another place or gathered already; None: `self.table` itself.
    """
    c = self.config.head
    hidden = self.finish(hidden)
    if self.config.embed.dim is not None:
      # Under ws_2d: [batch, length, embed.x] @ [embed.x, factor] -> partial over x, summed -> [batch, length, factor]
      hidden = einsum("btd,de->bte", hidden, self.embed_out)
    table = self.table if table is None else table
    bias = self.head_bias if c.bias else None
    # Under ws_2d: [batch, length, embed.x] @ [vocab.zy, embed.x] -> partial over x -> [batch, length, vocab.zyx]
    logits = einsum("btd,vd->btv", hidden, table, bias=bias, out_dtype=jnp.float32)
    if c.scale != 1:
      logits *= c.scale
    if c.softcap:
      logits = c.softcap * jnp.tanh(logits / c.softcap)
    return logits

  def state_spec(self, batch: int, max_len: int, chunk: int):
    """Specs of a decoding state for `max_len` tokens per row, written at most `chunk` at a time."""
    c = self.config
    size = max_len, chunk, c.precision.state
    branches = [branch for block in c.blocks.values() for branch in block.branches.values()]
    buffers = {b.name: b for branch in branches if (b := branch.buffer(*size)) is not None}
    row = cache.Spec((batch,), ("cache_batch",), "int32", 0)
    return {
      "cursor": row,
      "length": row._replace(fill=max_len),
      "ledger": {name: buffer.ledger(batch) for name, buffer in sorted(buffers.items())},
      "layers": stacks.state_specs(self.stack, c, batch, max_len, chunk),
    }


def abstract(config: ModelConfig) -> Decoder:
  """The decoder with shapes in place of arrays; nothing is allocated, however large the model is."""
  return nnx.eval_shape(lambda: Decoder(config, jax.random.key(0)))


def stacked(model: Decoder) -> Decoder:
  """The decoder in the form in which it is made, with each segment's repeats along an axis of their own."""
  return model


def unstack(model: Decoder) -> Decoder:
  """Gives each layer of the decoder its own arrays, for decoding, and for weights that come layer by layer."""
  return _with_segments(model, lambda model: map(stacks.unstack, model.stack.segments))


def restack(model: Decoder) -> Decoder:
  """Stacks the layers of each segment again: the inverse of `unstack`."""
  with_patterns = lambda model: zip(model.stack.segments, model.config.segments, strict=True)
  return _with_segments(model, lambda model: (stacks.restack(s, *pattern) for s, pattern in with_patterns(model)))


def fuse(model: Decoder) -> Decoder:
  """Fuses the projections of the decoder's parallel blocks (layers/fused.py); `separate` undoes it."""
  return _with_segments(
    model, lambda model: (stacks.with_blocks(s, map(fused.fuse, s.blocks)) for s in model.stack.segments)
  )


def separate(model: Decoder) -> Decoder:
  """Separates fused projections: the inverse of `fuse`."""
  return _with_segments(
    model, lambda model: (stacks.with_blocks(s, map(fused.separate, s.blocks)) for s in model.stack.segments)
  )


def _with_segments(model: Decoder, segments: Callable[[Decoder], Iterable]) -> Decoder:
  """Replaces the segments of a decoder, and of its encoder, by what the function `segments` makes of each."""
  model = nnx.merge(*nnx.split(model))  # a new object around the same arrays
  model.stack.segments = nnx.List(segments(model))
  if model.config.encoder:
    model.encoder = _with_segments(model.encoder, segments)
  return model
