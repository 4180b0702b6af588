"""Pipeline parallelism: the layers of every segment lie over the mesh axis `stage`, and microbatches pass through.

Between the stages goes one microbatch's residual stream a tick, by `ppermute`; the backward pipeline is the
derivative of that. Outside of the stack a stage is one part more of the batch: it embeds its microbatches, and takes
the loss of them. In the stack `stage` is manual (`jax.shard_map`), and the layout places everything else, as ever.

GPipe is 1811.06965. With V circuits a stage holds V runs of layers, each microbatch goes round the stages V times,
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
from llmarch.experiment_checks import plan_pipeline
from llmarch.layers import stack as stacks
from llmarch.layers.context import make_context
from llmarch.layers.site import Out, Site
from llmarch.models.decoder import Decoder
from llmarch.run_config import RunConfig
from llmarch.sharding import RESIDUAL, Layout

STAGE = "stage"
CONTEXT = ("positions", "segment_ids", "prefix")  # what the layers ask of tokens
VIEWS = {  # primitives that a backward pass repeats rather than keep their results, which may be weights
  "broadcast_in_dim", "convert_element_type", "dynamic_slice", "reshape", "sharding_constraint", "squeeze", "transpose",
}  # fmt: skip


class Schedule(NamedTuple):
  """Who works on what, and when. Microbatches go in groups of S: circuit after circuit, then the next group, so
  that what leaves the last stage is what the first one needs at the next tick."""

  stages: int
  microbatches: int  # a multiple of the stages
  circuits: int

  @property
  def ticks(self) -> int:
    """A stage works in V M of these; the bubble is the other S - 1."""
    return self.circuits * self.microbatches + self.stages - 1

  def work(self, tick, stage):
    """-> the microbatch and the circuit of a stage at a tick (some that exist where it idles), and whether it works."""
    turn = tick - stage
    busy = (turn >= 0) & (turn < self.circuits * self.microbatches)
    group, turn = jnp.divmod(jnp.clip(turn, 0, self.circuits * self.microbatches - 1), self.stages * self.circuits)
    return group * self.stages + turn % self.stages, turn // self.stages, busy


def microbatches(x: jax.Array, count: int) -> jax.Array:
  """[B, ...] -> [count, B / count, ...]: the i-th takes rows i, i + count, ..., some of every device of the batch."""
  return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


class Pipeline(NamedTuple):
  """The stages of a mesh under a layout."""

  schedule: Schedule
  layout: Layout
  mesh: Mesh

  @property
  def parts(self) -> int:
    return math.prod(self.mesh.shape.get(axis, 1) for axis in self.layout.mesh_axes("batch") if axis != STAGE)

  def arrange(self, batch: dict) -> dict:
    """Arrays [B, T] with their rows by part, microbatch (those of `microbatches`), row: then the devices' pieces,
    the stage as the last axis of the batch, are the rows of whole microbatches of a part."""
    swap = lambda x: x.reshape(self.parts, -1, self.schedule.microbatches, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    return {name: swap(x) for name, x in batch.items()}

  def by_microbatch(self, x: jax.Array) -> jax.Array:
    """Arranged rows [B, ...] -> [M, b, ...]."""
    return _join(self._cut(x))

  def _cut(self, x: jax.Array) -> jax.Array:
    return x.reshape(self.parts, self.schedule.microbatches, -1, *x.shape[1:])  # [D, M, b/D, ...]

  def trunk(self, model: Decoder, batch: dict, *, key, remat: str, telemetry: bool) -> tuple[jax.Array, dict]:
    """`Decoder.trunk` of an arranged batch -> hidden [B, T, E], Aux of f32 [M, L].

    With a key, microbatch i draws what the i-th of M micro-batches of an unpipelined step does (train.grad_accum).
    """
    keys = None if key is None else jax.random.split(key, self.schedule.microbatches)
    context = {name: self.by_microbatch(batch[name]) for name in CONTEXT if name in batch}
    graph, stack = nnx.split(model.stack)
    inside = self.layout.without(STAGE)

    def part(stack, x, context, keys):
      D, *_ = x.shape
      with sharding.use_layout(inside, jax.sharding.get_abstract_mesh()):
        run = _Run(self.schedule, context, remat, telemetry)
        x, aux = run.stack(nnx.merge(graph, stack), model.drop, _join(x), keys)
      return x.reshape(x.shape[0], D, -1, *x.shape[2:]).swapaxes(0, 1), aux

    same, rows = PartitionSpec(), PartitionSpec(None, STAGE)
    layers = lambda path, _: PartitionSpec(STAGE) if path[0].key == "segments" else same
    specs = jax.tree_util.tree_map_with_path(layers, stack)
    hidden, aux = jax.shard_map(
      part, mesh=self.mesh, axis_names={STAGE}, check_vma=False,
      in_specs=(specs, rows, same, same), out_specs=(rows, same),
    )(stack, self._cut(model.enter(batch["tokens"], batch["positions"])), context, keys)  # fmt: skip
    return sharding.shard(hidden.reshape(-1, *hidden.shape[3:]), *RESIDUAL), aux


def plan(config: RunConfig, layout: Layout, mesh: Mesh | None) -> Pipeline | None:
  """The pipeline of a config; None where the mesh has no stages. Raises UserError for what they cannot share."""
  planned = mesh and plan_pipeline(mesh.shape, config.model, config.train)
  return planned and Pipeline(Schedule(*planned), layout, mesh)


def _join(x: jax.Array) -> jax.Array:
  """[D, M, b/D, ...] -> [M, b, ...]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _place(x: jax.Array) -> jax.Array:
  """The residual stream of microbatches, where a branch leaves it. GSPMD would leave it whole in the loop."""
  return sharding.shard(x, *(None,) * (x.ndim - 3), *RESIDUAL)


class _Run(NamedTuple):
  """One pass through the stack, as one stage does it."""

  schedule: Schedule
  context: dict  # [M, b, T], of all microbatches
  remat: str
  telemetry: bool

  def stack(self, stack: stacks.Stack, drop: Callable, x: jax.Array, keys):
    """x [M/S, b, T, E] of this stage's microbatches, keys [M] of all -> x behind the stack, Aux of f32 [M, L].

    drop(x, key): what becomes of an embedded microbatch.
    """
    segments = list(stack.segments)
    each = [None] * len(segments)
    if keys is not None:  # as Decoder.trunk and Stack split them
      first, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
      mine = jax.lax.dynamic_slice_in_dim(first, jax.lax.axis_index(STAGE) * len(x), len(x))
      x = jax.vmap(drop)(x, mine)
      each = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, len(segments)))(keys), 1, 0)
    shared = {name: sharding.replicated(param) for name, param in stack.shared.items()}
    layer, outs = 0, []
    for segment, keys in zip(segments, each, strict=True):
      out = self.segment(segment, layer, x, shared, keys)
      x, layer = out.y, layer + len(segment.names) * segment.repeat
      outs.append((out, segment.repeat))
    return x, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), stacks.joined(outs))

  def segment(self, segment: stacks.Segment, first: int, x: jax.Array, shared: dict, keys) -> Out:
    """x [M/S, b, T, E], keys [M] -> the same behind the segment, whose first layer is number `first`; in the Out, stats
    and loss are lists over its blocks of [R, M]."""
    (S, _, V), stage = self.schedule, jax.lax.axis_index(STAGE)
    graph, params = nnx.split(segment.blocks)
    params = jax.tree.map(lambda param: deal(param, S, V), params)
    layers = segment.repeat // (S * V)

    def work(x, m, v):
      of = lambda a: None if a is None else jax.lax.dynamic_index_in_dim(a, m, keepdims=False)
      here, _ = make_context(*(of(self.context.get(name)) for name in CONTEXT), None, None, self.telemetry)
      run = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, v, keepdims=False), params)
      draws = None if keys is None else jax.random.split(of(keys), segment.repeat)
      start = (v * S + stage) * layers
      draws = None if keys is None else jax.lax.dynamic_slice_in_dim(draws, start, layers)
      numbers = first + len(segment.names) * (start + jnp.arange(layers))
      site = Site(here, numbers, None, None, {}, draws)
      out = stacks.with_blocks(segment, nnx.merge(graph, run)).turns(x, site, shared, frozenset(), self.remat)
      return out.y, (out.stats, out.loss)

    work = jax.checkpoint(work, policy=_policy(self.remat), prevent_cse=False)

    def tick(carry, t):
      arriving, done = carry
      m, v, _ = self.schedule.work(t, stage)
      enters = (stage == 0) & (v == 0)
      x, aux = work(_place(jnp.where(enters, jax.lax.dynamic_index_in_dim(fresh, m, keepdims=False), arriving)), m, v)
      # Later circuits overwrite earlier ones. What an idle stage leaves here is not read.
      done = _place(jax.lax.dynamic_update_index_in_dim(done, x, m, 0))
      return (_place(jax.lax.ppermute(x, STAGE, [(s, (s + 1) % S) for s in range(S)])), done), aux

    # By permutations, which GSPMD leaves in the place of their operand; it gathers that of an all_gather whole.
    x = _place(x)
    fresh = _place(jnp.concatenate([x, *(jax.lax.ppermute(x, STAGE, [(s, 0)]) for s in range(1, S))]))  # for stage 0
    # An idle stage works on a real microbatch for nothing: on zeros some norms have no derivative.
    (_, done), aux = jax.lax.scan(tick, (x[0], jnp.zeros_like(fresh)), jnp.arange(self.schedule.ticks))
    *others, x = jnp.split(done, S)  # of the last stage
    for s, piece in enumerate(others):
      x = jnp.where(stage == s, _place(jax.lax.ppermute(piece, STAGE, [(S - 1, s)])), x)
    stats, loss = jax.tree.map(lambda a: self.of_all(stage, a), aux)
    return Out(x, stats=stats, loss=loss)

  def of_all(self, stage, aux: jax.Array) -> jax.Array:
    """[ticks, layers of a run] of this stage -> of all layers in order and all microbatches, [R, M], everywhere."""
    S, M, V = self.schedule
    busy = jax.lax.dynamic_slice_in_dim(aux, stage, V * M)  # the other ticks are never read
    mine = busy.reshape(M // S, V, S, *aux.shape[1:]).swapaxes(1, 2).reshape(M, V, *aux.shape[1:])
    runs = jax.lax.all_gather(mine, STAGE, axis=2)  # [M, V, S, layers]
    return jnp.moveaxis(runs.reshape(M, -1, *aux.shape[2:]), 0, 1)


def _policy(remat: str) -> Callable:
  """What a tick keeps for its backward pass: as much as without a pipeline, and never a copy of the weights."""
  if remat == "none":
    return lambda primitive, *_, **__: primitive.name not in VIEWS
  between = jax.checkpoint_policies.save_only_these_names(stacks.BETWEEN)
  return jax.checkpoint_policies.save_from_both_policies(between, stacks.REMAT_POLICIES[remat])


def deal(param: jax.Array, S: int, V: int) -> jax.Array:
  """This stage's parameters at rest, [R/S, ...], layers in order -> those of its runs, [V, R/(S V), ...].

  Run c of a segment, of S V, lies at rest on stage c // V; stage c % S works on it, in circuit c // S.
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
  """V exchanges that deal all runs, all targets of each different. An exchange lists, by source stage, which of its
  V runs goes to which stage, for which circuit there."""
  apart = S // math.gcd(S, V)  # so many neighbours send their k-th runs to different stages

  def one(turn: int, source: int) -> tuple[int, int, int]:
    run = (turn + source // apart) % V
    circuit, target = divmod(source * V + run, S)
    return run, target, circuit

  return [[one(turn, source) for source in range(S)] for turn in range(V)]
