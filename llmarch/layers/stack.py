"""The stack of blocks: one scan a segment in training, one block after another in decoding.

Stacked, the parameters and states of a segment's repeats lie along a leading axis "layers" and the segment
is one `lax.scan`: compile time does not grow with depth. Unstacked, every layer has arrays of its own: a
decode step then updates each cache in place, where a scan would copy all of them every step.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmarch.config import ModelConfig
from llmarch.layers.block import Block
from llmarch.layers.context import Context
from llmarch.layers.param import Maker
from llmarch.ops import cache
from llmarch.sharding import replicated

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # As "full", and what each turn starts from waits in the memory of the host.
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(), names_which_can_be_offloaded=("start of a turn",),
    offload_src="device", offload_dst="pinned_host",
  ),
}  # fmt: skip

BETWEEN = "between layers"  # what a remat policy may call the residual stream


class Segment(nnx.Module):
  """`repeat` turns of a pattern of named blocks. Unstacked, `blocks` lists every layer and repeat is None."""

  def __init__(self, blocks: list[Block], names: tuple[str, ...], repeat: int | None):
    self.blocks = nnx.List(blocks)
    self.names = names
    self.repeat = repeat

  def __call__(self, x, context: Context, states, shared: dict, key, remat: str):
    """x [B, T, D]; states: a list over blocks, or None -> x, states, a list over blocks of aux."""
    if self.repeat is None:
      return self._turn(self.blocks, x, context, states, shared, key)
    keys = None if key is None else jax.random.split(key, self.repeat)
    return self.turns(x, context, states, shared, keys, remat)

  def turns(self, x, context: Context, states, shared: dict, keys, remat: str):
    """The turns that the blocks hold arrays of, a key for each: all, or those of a pipeline's stage."""
    graph, params = nnx.split(self.blocks)

    def body(x, layer):
      params, states, key = layer
      x = checkpoint_name(x, "start of a turn")
      x, states, auxes = self._turn(nnx.merge(graph, params), x, context, states, shared, key)
      return x, (states, auxes)

    if remat != "none":
      body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    named = lambda x, layer: body(checkpoint_name(x, BETWEEN), layer)
    x, (states, auxes) = jax.lax.scan(named, x, (params, states, keys))
    return x, states, auxes

  def _turn(self, blocks, x, context: Context, states, shared: dict, key):
    keys = [None] * len(blocks) if key is None else jax.random.split(key, len(blocks))
    states = [None] * len(blocks) if states is None else list(states)
    auxes = []
    for i, (block, name) in enumerate(zip(blocks, self.names, strict=True)):
      x, states[i], aux = block(x, context, states[i], shared.get(name), keys[i])
      auxes.append(aux)
    return x, states, auxes


class Stack(nnx.Module):
  """All segments, and the parameters that layers of one name share (T5's bias tables)."""

  def __init__(self, config: ModelConfig, make: Maker):
    def layers(pattern, repeat, make):
      def one(key):
        here = Maker(key, make.init, make.dtype)
        return nnx.List(
          Block(config.blocks[name], config.d_model, here.child(f"{i}")) for i, name in enumerate(pattern)
        )

      # Only the arrays are drawn `repeat` times; the modules around them are the same for all.
      keys = jax.random.split(make.key, repeat)
      graph = nnx.graphdef(nnx.eval_shape(lambda: one(keys[0])))
      return list(nnx.merge(graph, jax.vmap(lambda key: nnx.state(one(key)))(keys)))

    self.segments = nnx.List(
      Segment(layers(pattern, repeat, make.child(f"segment{i}")), pattern, repeat)
      for i, (pattern, repeat) in enumerate(config.segments)
    )
    self.shared = nnx.Dict(
      {
        name: block.mixer.position.make_shared(block.mixer.num_heads, make.child(f"shared_{name}"))
        for name, block in config.blocks.items()
        if hasattr(getattr(block.mixer, "position", None), "make_shared")
      }
    )

  def __call__(self, x, context: Context, states, key, remat: str):
    """-> x [B, T, D], states (a list over segments), aux: {name: f32 [L]} from the bottom to the top."""
    shared = {name: replicated(param) for name, param in self.shared.items()}
    keys = [None] * len(self.segments) if key is None else jax.random.split(key, len(self.segments))
    states = [None] * len(self.segments) if states is None else list(states)
    auxes = []
    for i, segment in enumerate(self.segments):
      x, states[i], aux = segment(x, context, states[i], shared, keys[i], remat)
      auxes += by_layer(aux, segment.repeat)
    return x, states, by_name(auxes)


def by_name(layers: list[dict]) -> dict:
  """The aux of all layers in order -> {name: f32 [L]}, of the layers that have it."""
  names = {name for layer in layers for name in layer}
  return {name: jnp.stack([layer[name] for layer in layers if name in layer]) for name in sorted(names)}


def by_layer(auxes: list[dict], repeat: int | None) -> list[dict]:
  """A list over layers in order, from a list over blocks (each with a leading axis of repeats if stacked)."""
  if repeat is None:
    return auxes
  return [jax.tree.map(lambda a, r=r: a[r], aux) for r in range(repeat) for aux in auxes]


def state_specs(stack: Stack, config: ModelConfig, batch: int, max_len: int, chunk: int) -> list:
  """Specs of the mixers' states in the stack's own form."""

  def of(segment, name):
    specs = config.blocks[name].mixer.state_spec(config.d_model, batch, max_len, chunk, config.precision.state)
    if segment.repeat is None:
      return specs
    stacked = lambda s: s._replace(shape=(segment.repeat, *s.shape), axes=("layers", *s.axes))
    return jax.tree.map(stacked, specs, is_leaf=cache.is_spec)

  return [[of(segment, name) for name in segment.names] for segment in stack.segments]


def with_blocks(segment: Segment, blocks) -> Segment:
  """The same segment of other blocks."""
  return Segment(list(blocks), segment.names, segment.repeat)


def unstack(segment: Segment) -> Segment:
  """The same layers, each with arrays of its own."""
  if segment.repeat is None:
    return segment
  graph, params = nnx.split(segment.blocks)
  turns = [nnx.merge(graph, jax.tree.map(lambda a, r=r: a[r], params)) for r in range(segment.repeat)]
  return Segment([block for blocks in turns for block in blocks], segment.names * segment.repeat, None)


def restack(segment: Segment, pattern: tuple[str, ...], repeat: int) -> Segment:
  """The inverse of `unstack`."""
  if segment.repeat is not None:
    return segment
  blocks = []
  for i in range(len(pattern)):
    turns = [nnx.split(block) for block in list(segment.blocks)[i :: len(pattern)]]
    blocks.append(nnx.merge(turns[0][0], jax.tree.map(lambda *a: jnp.stack(a), *(params for _, params in turns))))
  return Segment(blocks, pattern, repeat)
