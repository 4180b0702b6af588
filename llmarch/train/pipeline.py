"""Pipeline parallelism: each segment's layers are split over the mesh axis `stage`, and microbatches pass through.

In every tick, the stages pass the residual stream of one microbatch on, by `ppermute`; the backward pipeline is the
derivative of that. Outside of the stack, `stage` only splits the batch further: a stage embeds its microbatches and
computes their loss. In the stack `stage` is manual (`jax.shard_map`), and the layout shards everything else as usual.

GPipe is 1811.06965. With V circuits a stage holds V runs of layers, each microbatch passes through all stages V times,
and the bubble is V times smaller (the interleaved schedule of 2104.04473, section 2.2).

S stages, M microbatches, V circuits, D parts of the batch within a stage, b rows of a microbatch, T tokens, E the
model's width, R repeats of a segment's pattern, L layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from llmarch import sharding
from llmarch.layers import stack as stacks
from llmarch.layers.context import make_context
from llmarch.layers.site import Out, Site
from llmarch.mesh_checks import plan_pipeline
from llmarch.models.decoder import Decoder
from llmarch.run_config import RunConfig
from llmarch.sharding import RESIDUAL, Layout

STAGE = "stage"
CONTEXT = ("positions", "segment_ids", "prefix")  # arrays of a batch that describe its tokens to the layers
VIEWS = {  # primitives that a backward pass repeats instead of keeping their results, which may be copies of weights
  "broadcast_in_dim", "convert_element_type", "dynamic_slice", "reshape", "sharding_constraint", "squeeze", "transpose",
}  # fmt: skip


class Schedule(NamedTuple):
  """The work of each stage at each tick.

  Microbatches pass in groups of S, first through all circuits of one group, then the next group, so that what leaves
  the last stage is what the first stage needs at the next tick.
  """

  stages: int
  microbatches: int  # a multiple of the number of stages
  circuits: int

  @property
  def ticks(self) -> int:
    """Number of ticks of a step. A stage works in V M of them; the bubble is the other S - 1."""
    return self.circuits * self.microbatches + self.stages - 1

  def work(self, tick, stage):
    """-> the microbatch and the circuit of a stage at a tick (arbitrary ones if it idles), and whether it works."""
    turn = tick - stage
    busy = (turn >= 0) & (turn < self.circuits * self.microbatches)
    group, turn = jnp.divmod(jnp.clip(turn, 0, self.circuits * self.microbatches - 1), self.stages * self.circuits)
    return group * self.stages + turn % self.stages, turn // self.stages, busy


def microbatches(x: jax.Array, count: int) -> jax.Array:
  """[B, ...] -> [count, B / count, ...]: the i-th takes rows i, i + count, ..., so each device has a part of each."""
  return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


class Pipeline(NamedTuple):
  """The stages of a mesh, with the schedule and the layout under which they work."""

  schedule: Schedule
  layout: Layout
  mesh: Mesh

  @property
  def parts(self) -> int:
    """Number of parts into which the mesh splits the batch within a stage."""
    return math.prod(self.mesh.shape.get(axis, 1) for axis in self.layout.mesh_axes("batch") if axis != STAGE)

  def arrange(self, batch: dict) -> dict:
    """Reorders rows of [B, T] arrays from (part, row, microbatch) to (part, microbatch, row).

    Splitting the batch over `stage` as its last mesh axis then gives each stage whole microbatches of each part.
    """
    by_part = lambda x: x.reshape(self.parts, -1, self.schedule.microbatches, *x.shape[1:])
    reorder = lambda x: by_part(x).swapaxes(1, 2).reshape(x.shape)
    return {name: reorder(x) for name, x in batch.items()}

  def by_microbatch(self, x: jax.Array) -> jax.Array:
    """Splits arranged rows [B, ...] into microbatches [M, b, ...]."""
    return _join(self._cut(x))

  def _cut(self, x: jax.Array) -> jax.Array:
    return x.reshape(self.parts, self.schedule.microbatches, -1, *x.shape[1:])  # [D, M, b/D, ...]

  def trunk(self, model: Decoder, batch: dict, *, key, remat: str, telemetry: bool) -> tuple[jax.Array, dict]:
    """Computes `Decoder.trunk` for an arranged batch -> hidden [B, T, E], Aux of f32 [M, L].

    With a key, microbatch i draws the numbers of the i-th of M micro-batches of an unpipelined step (train.grad_accum).
    """
    keys = None if key is None else jax.random.split(key, self.schedule.microbatches)
    context = {name: self.by_microbatch(batch[name]) for name in CONTEXT if name in batch}
    graph, stack = nnx.split(model.stack)
    inside = self.layout.without(STAGE)

    def run_stage(stack, x, context, keys):
      D, *_ = x.shape
      with sharding.use_layout(inside, jax.sharding.get_abstract_mesh()):
        run = _Run(self.schedule, context, remat, telemetry)
        x, aux = run.stack(nnx.merge(graph, stack), model.drop, _join(x), keys)
      return x.reshape(x.shape[0], D, -1, *x.shape[2:]).swapaxes(0, 1), aux

    replicated, rows = PartitionSpec(), PartitionSpec(None, STAGE)
    layer_specs = lambda path, _: PartitionSpec(STAGE) if path[0].key == "segments" else replicated
    specs = jax.tree_util.tree_map_with_path(layer_specs, stack)
    hidden, aux = jax.shard_map(
      run_stage, mesh=self.mesh, axis_names={STAGE}, check_vma=False,
      in_specs=(specs, rows, replicated, replicated), out_specs=(rows, replicated),
    )(stack, self._cut(model.enter(batch["tokens"], batch["positions"])), context, keys)  # fmt: skip
    return sharding.shard(hidden.reshape(-1, *hidden.shape[3:]), *RESIDUAL), aux


def plan(config: RunConfig, layout: Layout, mesh: Mesh | None) -> Pipeline | None:
  """The pipeline of a config; None if the mesh has no stages. Raises UserError if the stages cannot share the work."""
  planned = mesh and plan_pipeline(mesh.shape, config.model, config.train)
  return planned and Pipeline(Schedule(*planned), layout, mesh)


def _join(x: jax.Array) -> jax.Array:
  """Merges the parts of each microbatch: [D, M, b/D, ...] -> [M, b, ...]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _shard_stream(x: jax.Array) -> jax.Array:
  """Shards microbatches of the residual stream as a branch leaves it; GSPMD would replicate it inside the scan."""
  return sharding.shard(x, *(None,) * (x.ndim - 3), *RESIDUAL)


class _Run(NamedTuple):
  """One pass through the stack, as one stage sees it."""

  schedule: Schedule
  context: dict  # arrays [M, b, T] of all microbatches
  remat: str
  telemetry: bool

  def stack(self, stack: stacks.Stack, drop: Callable, x: jax.Array, keys):
    """Passes x [M/S, b, T, E] of this stage's microbatches through the stack -> the new x, Aux of f32 [M, L].

    keys are [M], of all microbatches. drop(x, key) applies the embedding's dropout to a microbatch.
    """
    segments = list(stack.segments)
    segment_keys = [None] * len(segments)
    if keys is not None:  # keys are split as Decoder.trunk and Stack split them
      first, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
      mine = jax.lax.dynamic_slice_in_dim(first, jax.lax.axis_index(STAGE) * len(x), len(x))
      x = jax.vmap(drop)(x, mine)
      segment_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, len(segments)))(keys), 1, 0)
    shared = {name: sharding.replicated(param) for name, param in stack.shared.items()}
    layer, outs = 0, []
    for segment, keys in zip(segments, segment_keys, strict=True):
      out = self.segment(segment, layer, x, shared, keys)
      x, layer = out.y, layer + len(segment.names) * segment.repeat
      outs.append((out, segment.repeat))
    return x, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), stacks.joined(outs))

  def segment(self, segment: stacks.Segment, first: int, x: jax.Array, shared: dict, keys) -> Out:
    """Passes x [M/S, b, T, E] with keys [M] through a segment whose first layer is number `first`.

    In the Out, stats and loss are lists over the segment's blocks of [R, M].
    """
    (S, _, V), stage = self.schedule, jax.lax.axis_index(STAGE)
    graph, params = nnx.split(segment.blocks)
    params = jax.tree.map(lambda param: deal(param, S, V), params)
    layers = segment.repeat // (S * V)

    def work(x, m, v):
      of_microbatch = lambda a: None if a is None else jax.lax.dynamic_index_in_dim(a, m, keepdims=False)
      tokens = (of_microbatch(self.context.get(name)) for name in CONTEXT)
      layer_context, _ = make_context(*tokens, None, None, self.telemetry)
      run = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, v, keepdims=False), params)
      draws = None if keys is None else jax.random.split(of_microbatch(keys), segment.repeat)
      start = (v * S + stage) * layers
      draws = None if keys is None else jax.lax.dynamic_slice_in_dim(draws, start, layers)
      numbers = first + len(segment.names) * (start + jnp.arange(layers))
      site = Site(layer_context, numbers, None, None, {}, draws)
      out = stacks.with_blocks(segment, nnx.merge(graph, run)).turns(x, site, shared, frozenset(), self.remat)
      return out.y, (out.stats, out.loss)

    work = jax.checkpoint(work, policy=_policy(self.remat), prevent_cse=False)

    def run_tick(carry, t):
      arriving, done = carry
      m, v, _ = self.schedule.work(t, stage)
      enters = (stage == 0) & (v == 0)
      x = jnp.where(enters, jax.lax.dynamic_index_in_dim(fresh, m, keepdims=False), arriving)
      x, aux = work(_shard_stream(x), m, v)
      # Later circuits overwrite the results of earlier ones. The result of an idle stage is never read.
      done = _shard_stream(jax.lax.dynamic_update_index_in_dim(done, x, m, 0))
      return (_shard_stream(jax.lax.ppermute(x, STAGE, [(s, (s + 1) % S) for s in range(S)])), done), aux

    # Permutations keep the sharding of their operand under GSPMD; an all_gather would replicate it over all axes.
    x = _shard_stream(x)
    # `fresh` has all microbatches, of which stage 0 reads one as it enters.
    fresh = _shard_stream(jnp.concatenate([x, *(jax.lax.ppermute(x, STAGE, [(s, 0)]) for s in range(1, S))]))
    # An idle stage works on a real microbatch for nothing, because some norms have no derivative at zero.
    (_, done), aux = jax.lax.scan(run_tick, (x[0], jnp.zeros_like(fresh)), jnp.arange(self.schedule.ticks))
    *pieces, x = jnp.split(done, S)  # the results of the last stage, one piece for each stage
    for s, piece in enumerate(pieces):
      x = jnp.where(stage == s, _shard_stream(jax.lax.ppermute(piece, STAGE, [(S - 1, s)])), x)
    stats, loss = jax.tree.map(lambda a: self.gather_layers(stage, a), aux)
    return Out(x, stats=stats, loss=loss)

  def gather_layers(self, stage, aux: jax.Array) -> jax.Array:
    """Gathers [ticks, layers of a run] of each stage to [R, M], all layers in order by microbatch, on every stage."""
    S, M, V = self.schedule
    busy = jax.lax.dynamic_slice_in_dim(aux, stage, V * M)  # the other ticks are never read
    mine = busy.reshape(M // S, V, S, *aux.shape[1:]).swapaxes(1, 2).reshape(M, V, *aux.shape[1:])
    runs = jax.lax.all_gather(mine, STAGE, axis=2)  # [M, V, S, layers]
    return jnp.moveaxis(runs.reshape(M, -1, *aux.shape[2:]), 0, 1)


def _policy(remat: str) -> Callable:
  """The remat policy of a tick: it keeps as much as without a pipeline, and never a copy of the weights."""
  if remat == "none":
    return lambda primitive, *_, **__: primitive.name not in VIEWS
  between = jax.checkpoint_policies.save_only_these_names(stacks.BETWEEN)
  return jax.checkpoint_policies.save_from_both_policies(between, stacks.REMAT_POLICIES[remat])


def deal(param: jax.Array, S: int, V: int) -> jax.Array:
  """Sends this stage's parameters at rest, [R/S, ...] with layers in order, to the stages that work on them.

  Returns the runs of this stage, [V, R/(S V), ...]. Run c of a segment, one of S V, is at rest on stage c // V; stage
  c % S works on it, in circuit c // S.
  """
  held = param.reshape(V, -1, *param.shape[1:])
  if V == 1:
    return held
  stage, got = jax.lax.axis_index(STAGE), jnp.zeros_like(held)
  for exchange in exchanges(S, V):
    runs, targets, circuits = zip(*exchange, strict=True)
    run = jax.lax.dynamic_index_in_dim(held, jnp.asarray(runs)[stage], keepdims=False)
    if targets != tuple(range(S)):
      run = jax.lax.ppermute(run, STAGE, list(enumerate(targets)))
    circuit = [circuits[targets.index(s)] for s in range(S)]
    got = jax.lax.dynamic_update_index_in_dim(got, run, jnp.asarray(circuit)[stage], 0)
  return got


def exchanges(S: int, V: int) -> list[list[tuple[int, int, int]]]:
  """Plans V exchanges that send all runs to their stages; in each exchange, all targets differ.

  An exchange lists for each source stage (which of its V runs it sends, to which stage, for which circuit there).
  """
  apart = S // math.gcd(S, V)  # this many neighbouring stages send their k-th runs to different stages

  def send(turn: int, source: int) -> tuple[int, int, int]:
    run = (turn + source // apart) % V
    circuit, target = divmod(source * V + run, S)
    return run, target, circuit

  return [[send(turn, source) for source in range(S)] for turn in range(V)]
