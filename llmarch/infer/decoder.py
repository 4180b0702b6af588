"""Prefill and decoding as three pure jitted functions around one carry.

B batch, T tokens of a call, V vocabulary. A row is a sequence; rows never depend on each other.

  carry = start(keys, lengths)
  for each chunk of the prompts, padded on the left:   carry = prefill(params, carry, tokens, positions)
  until no row is alive or there is enough text:       carry, tokens, steps = decode(params, carry, n)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llmarch import sharding
from llmarch.config import ModelConfig, check
from llmarch.models.decoder import Decoder, abstract, unstack
from llmarch.ops import cache
from llmarch.ops.sampling import Sampling, sample


class Programs(NamedTuple):
  """The compiled face of one model at one batch size and capacity. `params` is `decoding_params(...)`.

  The carry is donated: it is updated in place, and the one passed in is gone.
  """

  start: Callable  # keys [B], lengths int32 [B] (of text at most, for scalings that ask) -> carry
  prefill: Callable  # params, carry, tokens [B, chunk], positions [B, chunk] -> carry with the next token
  decode: Callable  # params, carry, n -> carry, tokens int32 [B, max_len], steps (at most n, early if all end)
  carry: dict  # Specs: "token" int32 [B], -1 where the row has ended; "position" int32 [B], where the token
  # belongs; "bad" bool [B], the row's logits were not finite; "seen" bool [B, V] or None; "state", the model's


def decoding_params(config: ModelConfig, params: nnx.State) -> nnx.State:
  """Parameters with the layers apart, so that each cache is updated in place; from either form."""
  return nnx.state(unstack(nnx.merge(nnx.graphdef(abstract(config)), params)))


@functools.lru_cache(maxsize=64)  # the same programs for the same arguments, whoever asks
def make_decoder(
  config: ModelConfig,
  *,
  batch: int,
  max_len: int,  # tokens that the state can hold: the prompt and all that is fed back
  chunk: int,  # prompt tokens a call
  sampling: Sampling,
  stop_ids: tuple[int, ...] = (),
  prefix: bool = False,  # the prompt sees itself both ways (prefix-LM); it must then be one chunk
  layout: str = "megatron",
  mesh: Mesh | None = None,
) -> Programs:
  """Builds the programs; nothing is compiled before it is called. Raises UserError for sizes that cannot be.

  Tokens and positions must be in range (JAX clamps them silently): `LM.generate` checks them on the host.
  """
  check(batch >= 1, f"batch must be at least 1, got {batch}")
  check(1 <= chunk <= max_len, f"chunk={chunk} must lie between 1 and max_len={max_len}")
  check(sampling.top_k <= config.vocab_size, f"top_k={sampling.top_k} exceeds the vocabulary of {config.vocab_size}")
  for i in stop_ids:
    check(0 <= i < config.vocab_size, f"stop: {i} is not a token id; ids are below vocab_size={config.vocab_size}")
  layout = sharding.LAYOUTS[layout]
  model = nnx.eval_shape(lambda: unstack(Decoder(config, jax.random.key(0))))
  graph = nnx.graphdef(model)
  specs = _carry_specs(model, batch, max_len, chunk, sampling)

  def advance(params, carry: dict, tokens: jax.Array, positions: jax.Array) -> dict:
    """Feeds a chunk whose last column holds the newest token of every row; chooses the token after it."""
    model, rows = nnx.merge(graph, params), jnp.arange(batch)[:, None]
    with sharding.use_layout(layout, mesh):
      both_ways = positions >= 0 if prefix and positions.shape[1] > 1 else None
      hidden, state, _ = model.trunk(tokens, positions, state=carry["state"], prefix=both_ways)
      logits = model.unembed(hidden[:, -1:])[:, 0]  # [B, V]
    seen = carry["seen"]
    if seen is not None:
      seen = seen.at[rows, jnp.where(positions >= 0, tokens, config.vocab_size)].set(True, mode="drop")
    alive, position = positions[:, -1] >= 0, positions[:, -1] + 1
    bad = carry["bad"] | (alive & ~jnp.isfinite(logits).all(axis=-1))
    # Keyed by row and position: neither neighbours, nor padding, nor slices of the loop change a row's draws.
    token = sample(logits, seen, jax.vmap(jax.random.fold_in)(carry["keys"], position), sampling=sampling)
    ended = ~alive | bad | (token[:, None] == jnp.asarray(stop_ids, jnp.int32)).any(axis=-1)
    token = jnp.where(ended, -1, token)
    return {**carry, "token": token, "position": position, "bad": bad, "seen": seen, "state": state}

  def start(keys, lengths):
    carry = cache.allocate(specs)
    return {**carry, "keys": keys, "state": {**carry["state"], "length": lengths}}

  def decode(params, carry, n):
    def running(loop):
      step, carry, _ = loop
      return (step < jnp.minimum(n, max_len)) & (carry["token"] >= 0).any()

    def body(loop):
      step, carry, out = loop
      token, alive = carry["token"][:, None], carry["token"][:, None] >= 0
      position = jnp.where(alive, carry["position"][:, None], -1)
      carry = advance(params, carry, jnp.maximum(token, 0), position)
      return step + 1, carry, jax.lax.dynamic_update_slice(out, carry["token"][:, None], (0, step))

    out = jnp.full((batch, max_len), -1, jnp.int32)
    steps, carry, out = jax.lax.while_loop(running, body, (jnp.int32(0), carry, out))
    return carry, out, steps

  placed = None
  if mesh is not None:
    placed = sharding.shardings(specs, layout, mesh)
    placed["keys"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return Programs(
    jax.jit(start, out_shardings=placed),
    jax.jit(advance, donate_argnums=1),
    jax.jit(decode, donate_argnums=1),
    specs,
  )


def _carry_specs(model, batch: int, max_len: int, chunk: int, sampling: Sampling) -> dict:
  row, V = ("cache_batch",), model.config.vocab_size
  penalised = sampling.repetition_penalty != 1
  return {
    "token": cache.Spec((batch,), row, "int32", -1),
    "position": cache.Spec((batch,), row, "int32", -1),
    "bad": cache.Spec((batch,), row, "bool", False),
    "seen": cache.Spec((batch, V), (*row, "act_vocab"), "bool", False) if penalised else None,
    "state": model.state_spec(batch, max_len, chunk),
  }
