"""The stack of blocks: one scan per segment in training, one block after another in decoding.

In the stacked form, the parameters and states of a segment's repeats lie along a leading axis "layers" and the
segment is one `lax.scan`, so compile time does not grow with depth. In the unstacked form, every layer has its own
arrays, so a decode step updates each cache in place, where a scan would copy all caches in every step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmarch.config import ModelConfig
from llmarch.layers.block import Block
from llmarch.layers.context import Context
from llmarch.layers.param import Maker
from llmarch.layers.site import Out, Site
from llmarch.ops import cache
from llmarch.sharding import replicated

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # "offload" recomputes as much as "full", and keeps the input of each turn in the host's memory.
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(), names_which_can_be_offloaded=("start of a turn",),
    offload_src="device", offload_dst="pinned_host",
  ),
}  # fmt: skip

BETWEEN = "between layers"  # name of the residual stream between layers, for remat policies


class Segment(nnx.Module):
  """A term of the stack: `repeat` turns of a pattern of named blocks.

  In the unstacked form, `blocks` lists every layer and `repeat` is None.
  """

  def __init__(self, blocks: list[Block], names: tuple[str, ...], repeat: int | None):
    self.blocks = nnx.List(blocks)
    self.names = names
    self.repeat = repeat

  def __call__(self, x, site: Site, shared: dict, hand_on: frozenset, remat: str) -> Out:
    """Maps x [B, T, D] to an Out whose state, stats and loss are lists over blocks.

    site: its layer is the segment's first layer, its state is a list over blocks or None, and its kept values are
    those of earlier segments. shared: {block: its shared parameter}. hand_on: names of the kept values that later
    segments read; the Out's `keep` has these alone.
    """
    if self.repeat is None:
      out = self._turn(self.blocks, x, site, shared)
      return dataclasses.replace(out, keep={name: out.keep[name] for name in hand_on})
    keys = None if site.key is None else jax.random.split(site.key, self.repeat)
    layers = site.layer + len(self.names) * jnp.arange(self.repeat)
    return self.turns(x, dataclasses.replace(site, layer=layers, key=keys), shared, hand_on, remat)

  def turns(self, x, site: Site, shared: dict, hand_on: frozenset, remat: str) -> Out:
    """Runs the turns whose arrays the blocks hold: all of them, or those of one pipeline stage.

    site.layer is int32 [R], the first layer of each turn; site.key is [R] or None.
    """
    graph, params = nnx.split(self.blocks)

    def body(carry, turn):
      x, _ = carry
      params, layer, states, key = turn
      x = checkpoint_name(x, "start of a turn")
      site_of_turn = dataclasses.replace(site, layer=layer, state=states, key=key)
      out = self._turn(nnx.merge(graph, params), x, site_of_turn, shared)
      return (out.y, {name: out.keep[name] for name in hand_on}), (out.state, out.stats, out.loss)

    inputs = params, site.layer, site.state, site.key
    no_values = {}
    if hand_on:  # the carry needs arrays of the right shape at the start; no turn reads them before it writes its own
      first_turn = lambda x, inputs: body((x, {}), jax.tree.map(lambda a: a[0], inputs))
      kept_shapes = jax.eval_shape(lambda x, inputs: first_turn(x, inputs)[0][1], x, inputs)
      no_values = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), kept_shapes)
    if remat != "none":
      body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    with_name = lambda carry, turn: body((checkpoint_name(carry[0], BETWEEN), carry[1]), turn)
    (x, keep), (states, stats, loss) = jax.lax.scan(with_name, (x, no_values), inputs)
    return Out(x, states, keep, stats, loss)

  def _turn(self, blocks, x, site: Site, shared: dict) -> Out:
    """Runs one layer after another; the Out keeps all values that these layers keep."""
    n = len(blocks)
    keys = [None] * n if site.key is None else jax.random.split(site.key, n)
    states = [None] * n if site.state is None else site.state
    outs, keep = [], {}
    for i, (block, name) in enumerate(zip(blocks, self.names, strict=True)):
      site_of_layer = Site(site.context, site.layer + i, states[i], shared.get(name), {**site.kept, **keep}, keys[i])
      outs.append(block(x, site_of_layer))
      x, keep = outs[-1].y, {**keep, **outs[-1].keep}
    return Out(x, [out.state for out in outs], keep, [out.stats for out in outs], [out.loss for out in outs])


class Aux(NamedTuple):
  """The results of the layers besides the residual stream."""

  stats: dict[str, jax.Array]  # f32 [L'] each, over the layers that have this statistic, from the bottom up
  loss: jax.Array | None  # f32 [L'] over the layers that have a loss; None where none has


class Stack(nnx.Module):
  """All segments, and the parameters that the layers of one block name share (T5's bias tables)."""

  def __init__(self, config: ModelConfig, make: Maker):
    def make_blocks(pattern, repeat, make):
      def make_turn(key):
        turn_maker = Maker(key, make.init, make.dtype)
        return nnx.List(
          Block(config.blocks[name], config.d_model, turn_maker.child(f"{i}")) for i, name in enumerate(pattern)
        )

      # Only the arrays are drawn `repeat` times; one set of modules serves all repeats.
      keys = jax.random.split(make.key, repeat)
      graph = nnx.graphdef(nnx.eval_shape(lambda: make_turn(keys[0])))
      return list(nnx.merge(graph, jax.vmap(lambda key: nnx.state(make_turn(key)))(keys)))

    self.segments = nnx.List(
      Segment(make_blocks(pattern, repeat, make.child(f"segment{i}")), pattern, repeat)
      for i, (pattern, repeat) in enumerate(config.segments)
    )
    shared = {name: block.mixer.make_shared(make.child(f"shared_{name}")) for name, block in config.blocks.items()}
    self.shared = nnx.Dict({name: param for name, param in shared.items() if param is not None})
    self.handed_on = config.handed_on

  def __call__(self, x, context: Context, states, key, remat: str) -> tuple[jax.Array, list, Aux]:
    """Maps x [B, T, D] and states (a list over segments, or None) to the new x, the new states and Aux."""
    shared = {name: replicated(param) for name, param in self.shared.items()}
    keys = [None] * len(self.segments) if key is None else jax.random.split(key, len(self.segments))
    states = [None] * len(self.segments) if states is None else list(states)
    layer, kept, outs = 0, {}, []
    for i, segment in enumerate(self.segments):
      site = Site(context, layer, states[i], None, kept, keys[i])
      out = segment(x, site, shared, self.handed_on[i], remat)
      x, states[i], kept = out.y, out.state, {**kept, **out.keep}
      layer += len(segment.names) * (segment.repeat or 1)
      outs.append((out, segment.repeat))
    return x, states, joined(outs)


def joined(outs: list[tuple[Out, int | None]]) -> Aux:
  """Joins the Outs of all segments, each given with its number of repeats, to the Aux of a model."""
  stats = [layer for out, repeat in outs for layer in by_layer(out.stats, repeat)]
  losses = [loss for out, repeat in outs for loss in by_layer(out.loss, repeat) if loss is not None]
  names = sorted({name for layer in stats for name in layer})
  found = {name: jnp.stack([layer[name] for layer in stats if name in layer]) for name in names}
  return Aux(found, jnp.stack(losses) if losses else None)


def by_layer(blocks: list, repeat: int | None) -> list:
  """Turns a list over blocks (each with a leading axis of repeats if stacked) into a list over layers, in order."""
  if repeat is None:
    return blocks
  return [jax.tree.map(lambda a, r=r: a[r], block) for r in range(repeat) for block in blocks]


def state_specs(stack: Stack, config: ModelConfig, batch: int, max_len: int, chunk: int) -> list:
  """Specs of the branches' states as {branch: spec} for each block, stacked as the stack is."""

  def block_specs(segment, name):
    size = config.d_model, batch, max_len, chunk, config.precision.state
    specs = {part: branch.state_spec(*size) for part, branch in config.blocks[name].branches.items()}
    specs = {part: spec for part, spec in specs.items() if spec}
    if segment.repeat is None:
      return specs
    add_layers = lambda s: s._replace(shape=(segment.repeat, *s.shape), axes=("layers", *s.axes))
    return jax.tree.map(add_layers, specs, is_leaf=cache.is_spec)

  return [[block_specs(segment, name) for name in segment.names] for segment in stack.segments]


def with_blocks(segment: Segment, blocks) -> Segment:
  """Makes the same segment of other blocks."""
  return Segment(list(blocks), segment.names, segment.repeat)


def unstack(segment: Segment) -> Segment:
  """Gives each layer of a stacked segment its own arrays."""
  if segment.repeat is None:
    return segment
  graph, params = nnx.split(segment.blocks)
  turns = [nnx.merge(graph, jax.tree.map(lambda a, r=r: a[r], params)) for r in range(segment.repeat)]
  return Segment([block for blocks in turns for block in blocks], segment.names * segment.repeat, None)


def restack(segment: Segment, pattern: tuple[str, ...], repeat: int) -> Segment:
  """Stacks the layers of a segment again: the inverse of `unstack`."""
  if segment.repeat is not None:
    return segment
  blocks = []
  for i in range(len(pattern)):
    turns = [nnx.split(block) for block in list(segment.blocks)[i :: len(pattern)]]
    blocks.append(nnx.merge(turns[0][0], jax.tree.map(lambda *a: jnp.stack(a), *(params for _, params in turns))))
  return Segment(blocks, pattern, repeat)
