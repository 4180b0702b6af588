"""Prefill and decoding as three pure jitted functions around one carry.

B batch, T tokens of a call, V vocabulary. A row is a sequence, and no row depends on another.

  carry = start(keys, lengths)
  for each chunk of the prompts, padded on the left:   carry = prefill(params, carry, tokens, positions)
  carry = switch(carry)
  until no row is alive or there is enough text:       carry, tokens, steps = decode(params, carry, n)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmarch import sharding
from llmarch.config import ModelConfig
from llmarch.errors import check
from llmarch.infer.quantize import quantize_params
from llmarch.models.decoder import Decoder, abstract, unstack
from llmarch.ops import cache
from llmarch.ops.sampling import Sampling, sample
from llmarch.sharding import NEXT_LOGITS, SAMPLED, any_over_mesh, move


class Programs(NamedTuple):
  """The compiled functions of one model at one batch size and capacity. `params` is `decoding_params(...)`.

  The carry is donated, which means that it is updated in place and the one passed in can no longer be used.
  """

  start: Callable  # keys [B], lengths int32 [B] (upper limits of the rows' texts, for RoPE scalings) -> carry
  prefill: Callable  # params, carry, tokens [B, chunk], positions [B, chunk] -> carry with the next token
  switch: Callable  # carry -> carry, from prefill's layout to decode's; the parameters are sharded alike in both
  decode: Callable  # params, carry, n -> carry, tokens int32 [B, max_len], steps (at most n, early if all end)
  carry: dict  # Specs: "token" int32 [B], -1 if the row has ended; "position" int32 [B] of that token; "bad" bool [B],
  # true if the row's logits were not finite; "seen" bool [B, V] or None; "state", the model's; and "keys" [B]


Form = Callable[[Decoder], Decoder]  # a function such as unstack or models.decoder.fuse, which rearranges parameters


def decoding_params(config: ModelConfig, params: nnx.State, form: Form = unstack) -> nnx.State:
  """Puts parameters into a form; by default every layer has its own arrays, so that each cache is updated in place."""
  return nnx.state(form(nnx.merge(nnx.graphdef(abstract(config)), params)))


@functools.lru_cache(maxsize=64)  # the same arguments give the same compiled programs
def make_decoder(
  config: ModelConfig,
  *,
  batch: int,
  max_len: int,  # number of tokens that the state can hold: the prompt and all that is fed back
  chunk: int,  # prompt tokens of a call
  sampling: Sampling,
  stop_ids: tuple[int, ...] = (),
  prefix: bool = False,  # the prompt's tokens see each other both ways (prefix-LM); it must then be one chunk
  mesh: Mesh | None = None,
  prefill_layout: str = "ws_2d",  # a row of sharding.LAYOUTS; both layouts must store the weights alike
  decode_layout: str = "ws_2d",
  form: Form = unstack,  # form of the parameters; in the stacked one, compile time does not grow with depth
  weights: str | None = None,  # format of the parameters' matrices (see infer/quantize.py)
  manual: bool = True,  # runs each program as one shard_map (see sharding/); False leaves the collectives to XLA
) -> Programs:
  """Builds the programs; each is compiled when it is first called. Raises UserError for impossible sizes.

  The caller checks that tokens and positions are in range, as `LM.generate` does on the host: JAX clamps them silently.
  """
  check(batch >= 1, f"batch must be at least 1, got {batch}")
  check(1 <= chunk <= max_len, f"chunk={chunk} must lie between 1 and max_len={max_len}")
  check(sampling.top_k <= config.vocab_size, f"top_k={sampling.top_k} exceeds the vocabulary of {config.vocab_size}")
  for i in stop_ids:
    check(0 <= i < config.vocab_size, f"stop: {i} is not a token id; ids are below vocab_size={config.vocab_size}")
  model = nnx.eval_shape(lambda: form(Decoder(config, jax.random.key(0))))
  graph = nnx.graphdef(model)
  specs = _carry_specs(model, batch, max_len, chunk, sampling)
  rows = SAMPLED(batch)  # for sampling, the rows are divided among all devices

  def advance(params, carry: dict, tokens: jax.Array, positions: jax.Array) -> dict:
    """Feeds a chunk whose last column holds the newest token of every row, and chooses the token after it."""
    model = nnx.merge(graph, params)
    both_ways = positions >= 0 if prefix and positions.shape[1] > 1 else None
    hidden, state, _ = model.trunk(tokens, positions, state=carry["state"], prefix=both_ways)
    logits = model.unembed(hidden[:, -1:])[:, 0]
    logits = move(logits, NEXT_LOGITS(config.vocab_size), (rows, None))  # [B, V]
    tokens, positions = (move(a, ("batch", "length"), (rows, None)) for a in (tokens, positions))
    seen = carry["seen"]
    if seen is not None:
      seen = mark_seen(seen, tokens, positions)
    alive, position = positions[:, -1] >= 0, positions[:, -1] + 1
    bad = move(carry["bad"], ("batch",), (rows,)) | (alive & ~jnp.isfinite(logits).all(axis=-1))
    # Keys depend on row and position alone: neighbours, padding and slices of the loop do not change a row's draws.
    token = sample(logits, seen, jax.vmap(jax.random.fold_in)(carry["keys"], position), sampling=sampling)
    ended = ~alive | bad | (token[:, None] == jnp.asarray(stop_ids, jnp.int32)).any(axis=-1)
    token = jnp.where(ended, -1, token)
    token, position, bad = (move(a, (rows,), ("batch",)) for a in (token, position, bad))
    return {**carry, "token": token, "position": position, "bad": bad, "seen": seen, "state": state}

  def mark_seen(seen, tokens, positions):
    tokens = jnp.where(positions >= 0, tokens, config.vocab_size)
    return seen.at[jnp.arange(seen.shape[0])[:, None], tokens].set(True, mode="drop")

  def start(keys, lengths):
    carry = cache.allocate({name: spec for name, spec in specs.items() if name != "keys"})
    return {**carry, "keys": keys, "state": {**carry["state"], "length": lengths}}

  def decode(params, carry, n):
    def running(loop):
      step, carry, _ = loop
      alive = (carry["token"] >= 0).any()
      # Every device must run the same number of steps, although each knows only its own rows.
      return (step < jnp.minimum(n, max_len)) & any_over_mesh(alive, "batch")

    def body(loop):
      step, carry, out = loop
      token, alive = carry["token"][:, None], carry["token"][:, None] >= 0
      position = jnp.where(alive, carry["position"][:, None], -1)
      carry = advance(params, carry, jnp.maximum(token, 0), position)
      return step + 1, carry, jax.lax.dynamic_update_slice(out, carry["token"][:, None], (0, step))

    out = jnp.full((carry["token"].shape[0], max_len), -1, jnp.int32)
    steps, carry, out = jax.lax.while_loop(running, body, (jnp.int32(0), carry, out))
    return carry, out, steps

  unchanged = lambda carry: carry
  if mesh is None:
    jitted = functools.partial(jax.jit, donate_argnums=1)
    return Programs(jax.jit(start), jitted(advance), unchanged, jitted(decode), specs)

  prefills, decodes = (sharding.find_layout(name, mesh) for name in (prefill_layout, decode_layout))
  for layout in (prefills, decodes):
    _check_sizes(config, layout, mesh)
  params = nnx.state(model)
  if weights:
    params = jax.eval_shape(lambda p: quantize_params(p, weights), params)
  stored = sharding.shardings(params, prefills, mesh)
  check(
    stored == sharding.shardings(params, decodes, mesh),
    f"prefill layout {prefill_layout!r} and decode layout {decode_layout!r} store weights in different places;"
    " ws_1d goes with ws_1d alone",
  )

  def over_mesh(function, layout, inputs: tuple[str, ...], outputs: tuple[str, ...]):
    """Jits the function over the mesh in this layout; `inputs` and `outputs` are names of kinds of arrays."""
    row = NamedSharding(mesh, sharding.spec(("batch",), (batch,), layout, mesh))
    replicated = NamedSharding(mesh, PartitionSpec())
    carry = sharding.shardings(specs, layout, mesh)
    shardings = {"params": stored, "carry": carry, "rows": row, "replicated": replicated}
    named = lambda names: tuple(shardings[name] for name in names) if len(names) > 1 else shardings[names[0]]

    def run_in_layout(*args):
      with sharding.use_layout(layout, mesh, manual=manual):
        return function(*args)

    if manual:
      named_specs = lambda names: jax.tree.map(lambda s: s.spec, named(names))
      run_in_layout = jax.shard_map(
        run_in_layout, mesh=mesh, in_specs=named_specs(inputs), out_specs=named_specs(outputs), check_vma=False
      )
    return jax.jit(run_in_layout, in_shardings=named(inputs), out_shardings=named(outputs), donate_argnums=1)

  carry_shardings = lambda layout: sharding.shardings(specs, layout, mesh)

  def switch(carry):
    """Moves the carry from prefill's layout to decode's, by our own collectives.

    XLA would replicate a cache to move it from heads to rows.
    """
    without_keys = lambda tree: {name: value for name, value in tree.items() if name != "keys"}
    before, after = (
      jax.tree.map(lambda s: s.spec, without_keys(carry_shardings(layout))) for layout in (prefills, decodes)
    )

    def move_leaf(x, have, want):
      return sharding.redistribute(x, sharding.axes_of(have), sharding.axes_of(want), mesh.shape)

    def move_all(arrays):
      return jax.tree.map(move_leaf, arrays, before, after)

    over_all = jax.shard_map(move_all, mesh=mesh, in_specs=(before,), out_specs=after, check_vma=False)
    moved = over_all(without_keys(carry))
    return {**moved, "keys": carry["keys"]}

  move_carry = switch if manual else unchanged
  return Programs(
    jax.jit(start, out_shardings=carry_shardings(prefills)),
    over_mesh(advance, prefills, ("params", "carry", "rows", "rows"), ("carry",)),
    unchanged if prefills == decodes else jax.jit(move_carry, out_shardings=carry_shardings(decodes)),
    over_mesh(decode, decodes, ("params", "carry", "replicated"), ("carry", "rows", "replicated")),
    specs,
  )


def _check_sizes(config: ModelConfig, layout: sharding.Layout, mesh: Mesh) -> None:
  """Raises UserError, before anything is compiled, for activations that the mesh does not divide."""
  sizes = {("act_embed", config.d_model)}
  for block in config.blocks.values():
    for branch in block.branches.values():
      sizes |= {(f"act_{axis}", size) for _, axis, size in branch.extents() if axis in ("heads", "mlp")}
  for name, size in sizes:
    sharding.spec((name,), (size,), layout, mesh)


def _carry_specs(model, batch: int, max_len: int, chunk: int, sampling: Sampling) -> dict:
  row = cache.Spec((batch,), ("batch",), "int32", -1)
  penalised = sampling.repetition_penalty != 1
  return {
    "token": row,
    "position": row,
    "bad": row._replace(dtype="bool", fill=False),
    "seen": cache.Spec((batch, model.config.vocab_size), ("sample_batch", None), "bool", False) if penalised else None,
    "keys": cache.Spec((batch,), ("sample_batch",), "key<fry>"),  # the caller passes them, so they are not allocated
    "state": model.state_spec(batch, max_len, chunk),
  }
