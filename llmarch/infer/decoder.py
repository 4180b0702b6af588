"""Prefill and decoding as three pure jitted functions around one carry.

B batch, T tokens of a call, V vocabulary. A row is a sequence, and no row depends on another.

  carry = start(keys, lengths)
  for each chunk of the prompts, padded on the left:   carry = prefill(params, carry, tokens, positions)
  carry = switch(carry)
  until no row is alive or there is enough text:       carry, tokens, steps = decode(params, carry, n)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmarch import sharding
from llmarch.config import ModelConfig
from llmarch.errors import check
from llmarch.infer.quantize import quantize_params
from llmarch.models.decoder import Decoder, abstract, unstack
from llmarch.ops import cache
from llmarch.ops.sampling import Numbers, Sampling, sample
from llmarch.sharding import NEXT_LOGITS, SAMPLED, Layout, any_over_mesh, move


class Programs(NamedTuple):
  """The compiled functions of one model at one batch size and capacity. `params` is `decoding_params(...)`.

  The carry is donated, which means that it is updated in place and the one passed in can no longer be used.
  """

  start: Callable  # keys [B], lengths int32 [B] (of the rows' texts, as RoPE scalings by length take them) -> carry
  prefill: Callable  # params, carry, tokens [B, chunk], positions [B, chunk] -> carry with the next token
  switch: Callable  # carry -> carry, from prefill's layout to decode's; the parameters are sharded alike in both
  decode: Callable  # params, carry, n -> carry, tokens int32 [B, max_len], steps (at most n, early if all end)
  carry: dict  # Specs: "token" int32 [B], -1 if the row has ended; "position" int32 [B] of that token; "bad" bool [B],
  # true if the row's logits were not finite; "seen" bool [B, V] or None; "state", the model's; "keys" [B]; "stop_ids"
  # int32 [any number], -1 for none; and "sampling", the numbers of ops.sampling (None: the most likely token)


Form = Callable[[Decoder], Decoder]  # a function such as unstack or models.decoder.fuse, which rearranges parameters


def decoding_params(config: ModelConfig, params: nnx.State, form: Form = unstack) -> nnx.State:
  """Parameters in a form of the model; by default the layers are apart, so that each cache is updated in place."""
  return nnx.state(form(nnx.merge(nnx.graphdef(abstract(config)), params)))


def check_generates(config: ModelConfig, prefix: bool = False) -> None:
  """Raises UserError for a model that cannot decode, or (with prefix) not from a prefix."""
  check(config.encoder is None, "this model reads a source, and generation has none; call the model with memory")
  for name, block in config.blocks.items():
    for part, branch in block.branches.items():
      check(branch.causal, f"blocks.{name}.{part}.{branch.sees_ahead}: it sees the future and cannot generate")
  reads = any(block.mixer.reads_prefix for block in config.blocks.values())
  check(not prefix or reads, "prefix=True needs a mixer with mask='prefix'; leave it out")


def make_decoder(
  config: ModelConfig,
  *,
  batch: int,
  max_len: int,  # tokens that the state can hold: the prompt and all that is fed back
  chunk: int,  # prompt tokens a call
  sampling: Sampling,
  stop_ids: tuple[int, ...] = (),
  prefix: bool = False,  # the prompt sees itself both ways (prefix-LM); it must then be one chunk
  mesh: Mesh | None = None,
  prefill_layout: str = "ws_2d",  # rows of sharding.LAYOUTS, which must store the weights alike
  decode_layout: str = "ws_2d",
  form: Form = unstack,  # of the parameters; stacked, as they are, compile time does not grow with depth
  weights: str | None = None,  # format of the parameters' matrices (see infer/quantize.py)
  manual: bool = True,  # one shard_map a program (see sharding/); False leaves the collectives to XLA
) -> Programs:
  """Builds the programs; nothing is compiled before it is called.

  Raises UserError for a model that cannot decode, and for sizes that cannot be.

  The numbers of `sampling` and the stop ids go into the carry, so that other values need no other program. Tokens and
  positions must be in range (JAX clamps them silently): `LM.generate` checks them on the host.
  """
  check_generates(config, prefix)
  check(batch >= 1, f"batch must be at least 1, got {batch}")
  check(1 <= chunk <= max_len, f"chunk={chunk} must lie between 1 and max_len={max_len}")
  check(sampling.top_k <= config.vocab_size, f"top_k={sampling.top_k} exceeds the vocabulary of {config.vocab_size}")
  for i in stop_ids:
    check(0 <= i < config.vocab_size, f"stop: {i} is not a token id; ids are below vocab_size={config.vocab_size}")
  room = -(-len(stop_ids) // STOPS) * STOPS
  kind = _Kind(sampling.temperature > 0, sampling.penalises, room)
  programs = _programs(
    config, batch, max_len, chunk, kind, prefix, mesh, prefill_layout, decode_layout, form, weights, manual
  )
  numbers = sampling.numbers()._asdict() if kind.has_numbers else None
  stops = np.array([*stop_ids, *[-1] * (room - len(stop_ids))], np.int32)
  return programs._replace(start=lambda keys, lengths: programs.start(keys, lengths, numbers, stops))


STOPS = 8  # numbers of stop ids are rounded up to a multiple of it, so that few programs are compiled


class _Kind(NamedTuple):
  """The facts of sampling and stops that a program is compiled for."""

  draws: bool  # a temperature above 0
  penalises: bool
  stops: int

  @property
  def has_numbers(self) -> bool:
    return self.draws or self.penalises


@functools.lru_cache(maxsize=64)  # the same programs for the same arguments, whoever asks
def _programs(
  config, batch, max_len, chunk, kind: _Kind, prefix, mesh, prefill_layout, decode_layout, form, weights, manual
) -> Programs:
  """The programs of `make_decoder`, whose `start` takes the numbers of sampling and the stop ids too."""
  model = nnx.eval_shape(lambda: form(Decoder(config, jax.random.key(0))))
  specs = _carry_specs(model, batch, max_len, chunk, kind)
  loop = _Loop(config, nnx.graphdef(model), specs, batch, max_len, kind, prefix)
  if mesh is None:
    jitted = functools.partial(jax.jit, donate_argnums=1)
    return Programs(jax.jit(loop.start), jitted(loop.advance), _unchanged, jitted(loop.decode), specs)
  params = nnx.state(model)
  if weights:
    params = jax.eval_shape(lambda p: quantize_params(p, weights), params)
  prefills, decodes = (sharding.find_layout(name, mesh) for name in (prefill_layout, decode_layout))
  for layout in (prefills, decodes):
    check_sizes(config, layout, mesh)
  places = _Places(mesh, specs, params, batch, prefills, decodes, manual)
  check(
    places.params == sharding.shardings(params, decodes, mesh),
    f"prefill layout {prefill_layout!r} and decode layout {decode_layout!r} store weights in different places;"
    " ws_1d goes with ws_1d alone",
  )
  return Programs(
    jax.jit(loop.start, out_shardings=places.carry(prefills)),
    places.jit(loop.advance, prefills, ("params", "carry", "rows", "rows"), ("carry",)),
    places.switch(),
    places.jit(loop.decode, decodes, ("params", "carry", "one"), ("carry", "rows", "one")),
    specs,
  )


def _unchanged(carry: dict) -> dict:
  """The carry where it is: prefill and decode have one layout."""
  return carry


@dataclasses.dataclass(frozen=True, eq=False)  # jax.jit hashes its methods
class _Loop:
  """The functions of arrays that `make_decoder` jits. Their arguments and results are those of `Programs`."""

  config: ModelConfig
  graph: nnx.GraphDef
  specs: dict
  batch: int
  max_len: int
  kind: _Kind
  prefix: bool

  def start(self, keys: jax.Array, lengths: jax.Array, numbers: dict | None, stop_ids: jax.Array) -> dict:
    """An empty carry."""
    given = {"keys": keys, "sampling": numbers, "stop_ids": stop_ids}
    carry = cache.allocate({name: spec for name, spec in self.specs.items() if name not in given})
    return {**carry, **given, "state": {**carry["state"], "length": lengths}}

  def advance(self, params, carry: dict, tokens: jax.Array, positions: jax.Array) -> dict:
    """Feeds a chunk whose last column holds the newest token of every row; chooses the token after it."""
    model = nnx.merge(self.graph, params)
    both_ways = positions >= 0 if self.prefix and positions.shape[1] > 1 else None
    hidden, state, _ = model.trunk(tokens, positions, state=carry["state"], prefix=both_ways)
    logits = model.unembed(hidden[:, -1:])[:, 0]  # [B, V]
    return {**carry, **self.choose(carry, logits, tokens, positions), "state": state}

  def choose(self, carry: dict, logits: jax.Array, tokens: jax.Array, positions: jax.Array) -> dict:
    """The next token of every row, and what the carry knows of the rows. Sampling deals the rows out to all devices."""
    rows = SAMPLED(self.batch)
    logits = move(logits, NEXT_LOGITS(self.config.vocab_size), (rows, None))
    tokens, positions = (move(a, ("batch", "length"), (rows, None)) for a in (tokens, positions))
    seen = None if carry["seen"] is None else self.mark_seen(carry["seen"], tokens, positions)
    alive, position = positions[:, -1] >= 0, positions[:, -1] + 1
    bad = move(carry["bad"], ("batch",), (rows,)) | (alive & ~jnp.isfinite(logits).all(axis=-1))
    # Keys depend on row and position alone: neighbours, padding and slices of the loop do not change a row's draws.
    keys = jax.vmap(jax.random.fold_in)(carry["keys"], position) if self.kind.draws else None
    token = sample(logits, seen, keys, sampling=Numbers(**carry["sampling"]) if self.kind.has_numbers else None)
    ended = ~alive | bad | (token[:, None] == carry["stop_ids"]).any(axis=-1)
    token = jnp.where(ended, -1, token)
    token, position, bad = (move(a, (rows,), ("batch",)) for a in (token, position, bad))
    return {"token": token, "position": position, "bad": bad, "seen": seen}

  def mark_seen(self, seen: jax.Array, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Marks the real tokens of a chunk as seen, bool [B, V]."""
    tokens = jnp.where(positions >= 0, tokens, self.config.vocab_size)
    return seen.at[jnp.arange(seen.shape[0])[:, None], tokens].set(True, mode="drop")

  def decode(self, params, carry: dict, n: jax.Array) -> tuple[dict, jax.Array, jax.Array]:
    """Feeds each row its newest token, n times at most."""

    def running(loop):
      step, carry, _ = loop
      alive = (carry["token"] >= 0).any()
      # Every device must run the same number of steps, although each knows only its own rows.
      return (step < jnp.minimum(n, self.max_len)) & any_over_mesh(alive, "batch")

    def body(loop):
      step, carry, out = loop
      token, alive = carry["token"][:, None], carry["token"][:, None] >= 0
      position = jnp.where(alive, carry["position"][:, None], -1)
      carry = self.advance(params, carry, jnp.maximum(token, 0), position)
      return step + 1, carry, jax.lax.dynamic_update_slice(out, carry["token"][:, None], (0, step))

    out = jnp.full((carry["token"].shape[0], self.max_len), -1, jnp.int32)
    steps, carry, out = jax.lax.while_loop(running, body, (jnp.int32(0), carry, out))
    return carry, out, steps


class _Places:
  """The places of parameters and carries on a mesh, for prefill and for decode."""

  def __init__(self, mesh: Mesh, specs: dict, params, batch: int, prefills: Layout, decodes: Layout, manual: bool):
    self.mesh, self.specs, self.batch, self.manual = mesh, specs, batch, manual
    self.prefills, self.decodes = prefills, decodes
    self.params = sharding.shardings(params, prefills, mesh)

  def carry(self, layout: Layout) -> dict:
    """The shardings of a carry."""
    return sharding.shardings(self.specs, layout, self.mesh)

  def jit(self, function: Callable, layout: Layout, inputs: tuple[str, ...], outputs: tuple[str, ...]):
    """The function jitted over the mesh in this layout; inputs and outputs by what they are: "params", "carry", "rows"
    (an array [B, ...]) or "one" (a number)."""
    rows = NamedSharding(self.mesh, sharding.spec(("batch",), (self.batch,), layout, self.mesh))
    one = NamedSharding(self.mesh, PartitionSpec())
    what = {"params": self.params, "carry": self.carry(layout), "rows": rows, "one": one}
    get = lambda names: tuple(what[name] for name in names) if len(names) > 1 else what[names[0]]

    def run(*args):
      with sharding.use_layout(layout, self.mesh, manual=self.manual):
        return function(*args)

    if self.manual:
      specs = lambda names: jax.tree.map(lambda s: s.spec, get(names))
      run = jax.shard_map(run, mesh=self.mesh, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)
    return jax.jit(run, in_shardings=get(inputs), out_shardings=get(outputs), donate_argnums=1)

  def switch(self) -> Callable[[dict], dict]:
    """A function from a carry in prefill's layout to the same in decode's."""
    if self.prefills == self.decodes:
      return _unchanged
    return jax.jit(self.redistribute if self.manual else _unchanged, out_shardings=self.carry(self.decodes))

  def redistribute(self, carry: dict) -> dict:
    """Moves a carry by our own collectives: XLA replicates a cache to take it from heads to rows."""
    numbers = lambda tree: {name: value for name, value in tree.items() if name != "keys"}
    before, after = (
      jax.tree.map(lambda s: s.spec, numbers(self.carry(layout))) for layout in (self.prefills, self.decodes)
    )

    def move_leaf(x, have, want):
      return sharding.redistribute(x, sharding.axes_of(have), sharding.axes_of(want), self.mesh.shape)

    def run(arrays):
      return jax.tree.map(move_leaf, arrays, before, after)

    moved = jax.shard_map(run, mesh=self.mesh, in_specs=(before,), out_specs=after, check_vma=False)(numbers(carry))
    return {**moved, "keys": carry["keys"]}


def check_sizes(config: ModelConfig, layout: Layout, mesh: Mesh) -> None:
  """Raises UserError, before anything is compiled, for activations that the mesh does not divide."""
  sizes = [("act_embed", config.d_model)]
  for block in config.blocks.values():
    for branch in block.branches.values():
      sizes += [(f"act_{axis}", size) for _, axis, size in branch.extents() if axis in ("heads", "mlp")]
  for name, size in dict.fromkeys(sizes):
    sharding.spec((name,), (size,), layout, mesh)


def _carry_specs(model, batch: int, max_len: int, chunk: int, kind: _Kind) -> dict:
  row = cache.Spec((batch,), ("batch",), "int32", -1)
  dtypes = {name: "int32" if name == "top_k" else "float32" for name in Numbers._fields}
  seen = cache.Spec((batch, model.config.vocab_size), ("sample_batch", None), "bool", False)
  return {
    "token": row,
    "position": row,
    "bad": row._replace(dtype="bool", fill=False),
    "seen": seen if kind.penalises else None,
    # These are given, not allocated.
    "keys": cache.Spec((batch,), ("sample_batch",), "key<fry>"),
    "sampling": {name: cache.Spec((), (), of) for name, of in dtypes.items()} if kind.has_numbers else None,
    "stop_ids": cache.Spec((kind.stops,), (None,), "int32"),
    "state": model.state_spec(batch, max_len, chunk),
  }
