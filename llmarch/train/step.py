"""The train step: a pure jitted function made for one config and one mesh.

A train state is a plain dict {"params", "opt_state", "step"} (and "ema"): the parameters by name, the optax state,
and the number of steps done. With adapters (train.lora), "params" has the adapters alone, and "base" has the frozen
rest, which is not saved, because `init` makes it again from the same weights. A batch is a dict of [B, T] arrays; see
data/pipeline.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llmarch import sharding
from llmarch.adapt.lora import Adapters
from llmarch.config import ModelConfig
from llmarch.layers.param import flatten, unflatten
from llmarch.models.decoder import Decoder, abstract
from llmarch.ops.einsum import gathered
from llmarch.ops.loss import chunked_loss
from llmarch.run_config import RunConfig
from llmarch.sharding import TOKENS
from llmarch.train import pipeline
from llmarch.train.optim import make_optimizer, make_schedule

LAYOUT = sharding.TRAIN


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """The functions that `make_train_step` returns. All are jitted; `step` donates its state."""

  init: Callable[..., dict]  # (params=None) -> state; params: the whole model's by name, drawn if not given
  step: Callable[..., tuple[dict, dict]]  # (state, batch, *, telemetry=False) -> state, metrics
  evaluate: Callable[[dict, dict], dict]  # (state, batch) -> {"loss", "weight"} sums
  export: Callable[[dict], dict]  # state -> all parameters of the model, averaged and merged, for sampling
  abstract_state: dict  # shapes, dtypes and shardings, for restoring
  batch_sharding: Any  # for jax.device_put of a batch; None on one device


def make_train_step(config: RunConfig, mesh: Mesh | None = None) -> TrainStep:
  """Builds init, step and evaluate for this config, sharded over the mesh (None: one device)."""
  c = config.train
  graph, abstract_params = nnx.split(abstract(config.model))
  named = flatten(abstract_params, variables=True)
  lora = Adapters(c.lora, config.model) if c.lora else None
  trained = lora.params if lora else named
  # A router's bias bypasses the optimizer: it steps against the sign of its gradient (layers/moe.py).
  rates = {name: p.balance_rate for name, p in trained.items() if hasattr(p, "balance_rate")}
  optimizer = make_optimizer(config.optimizer, c.steps, trained)
  stages = pipeline.plan(config, LAYOUT, mesh)
  # Each chunk of the loss has tokens on every device, so that a device has as many logits at a time as without a mesh.
  parts = 1 if mesh is None else sharding.ways("length", LAYOUT, mesh)
  loss_chunk = min(c.loss_chunk, math.ceil(c.seq_len / parts)) * parts
  ring = 1 if mesh is None or _in_order(config.model) else sharding.ways("attn_length", LAYOUT, mesh)
  deal = functools.partial(jax.tree.map, functools.partial(_dealt, ring=ring))
  schedule = make_schedule(config.optimizer.schedule, config.optimizer.learning_rate, c.steps)

  def model_of(params: dict, base: dict | None) -> Decoder:
    return nnx.merge(graph, unflatten(abstract_params, lora.attach(base, params) if lora else params))

  def init(seed: jax.Array, params: dict | None = None) -> dict:
    key = jax.random.key(seed)
    params = flatten(nnx.state(Decoder(config.model, key))) if params is None else params
    base = {}
    if lora:
      base, params = {"base": lora.freeze(params)}, lora.draw(key)
    state = {"params": params, "opt_state": optimizer.init(_f32(params)), "step": jnp.zeros((), jnp.int32)}
    return state | base | ({"ema": _f32(params)} if c.ema else {})

  def loss_sum(params, base, batch, key, telemetry):
    """The sum of weighted token losses, and the sums and statistics that the metrics need."""
    model = model_of(params, base)
    how = {"key": key, "remat": c.remat, "telemetry": telemetry}
    if stages:
      batch = stages.arrange(batch)
      hidden, aux = stages.trunk(model, batch, **how)
    else:
      hidden, _, aux = model.trunk(
        batch["tokens"], batch["positions"], batch["segment_ids"], prefix=batch.get("prefix"), **how
      )
      aux = jax.tree.map(lambda x: x[None], aux)
    total, sums = chunked_loss(
      functools.partial(model.unembed, table=gathered(model.table)), hidden, batch["targets"], batch["loss_weights"],
      chunk=loss_chunk, label_smoothing=c.label_smoothing, z_loss=c.z_loss,
    )  # fmt: skip
    if aux.loss is not None:
      # A branch's loss is a mean over a microbatch's tokens; times their weight, it can join the sum.
      weights = stages.by_microbatch(batch["loss_weights"]) if stages else batch["loss_weights"][None]
      total += jnp.sum(aux.loss.T * jnp.sum(weights, axis=(1, 2)))
    return total, (sums, jax.tree.map(lambda x: jnp.mean(x, axis=0), aux))

  def accumulate(params, base, batch, key, telemetry):
    """Gradients (f32, of the sum of losses), sums and aux over `grad_accum` micro-batches."""

    def grad(params, base, batch, key, telemetry):
      """Gradients of one micro-batch in f32, sharded as their parameters are."""
      grads, sums = jax.grad(loss_sum, has_aux=True)(params, base, batch, key, telemetry)
      return {name: sharding.shard(g, *trained[name].axes) for name, g in _f32(grads).items()}, sums

    if c.grad_accum == 1:
      grads, (sums, aux) = grad(params, base, batch, key, telemetry)
      return grads, sums, aux
    micro = {name: pipeline.microbatches(x, c.grad_accum) for name, x in batch.items()}

    def body(total, piece):
      batch, key = piece
      grads, (sums, aux) = grad(params, base, batch, key, telemetry)
      return jax.tree.map(jnp.add, total, (grads, sums)), aux

    first_micro = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(lambda: grad(params, base, first_micro, key, telemetry))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (shapes[0], shapes[1][0]))
    (grads, sums), aux = jax.lax.scan(body, zeros, (micro, jax.random.split(key, c.grad_accum)))
    return grads, sums, jax.tree.map(lambda x: jnp.mean(x, axis=0), aux)

  def step(state: dict, batch: dict, *, telemetry: bool = False) -> tuple[dict, dict]:
    with sharding.use_layout(LAYOUT, mesh):
      params, batch = state["params"], deal(batch)
      # The key is a function of seed and step, so that resuming has none to restore.
      key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
      grads, sums, aux = accumulate(params, state.get("base"), batch, key, telemetry)
      weight = jnp.maximum(sums["weight"], 1.0)
      grads = jax.tree.map(lambda g: g / weight, grads)
      errors = {name: grads[name] for name in rates}
      grads |= {name: jnp.zeros_like(error) for name, error in errors.items()}
      updates, opt_state = optimizer.update(grads, state["opt_state"], _f32(params))
      new = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
      new |= {name: params[name] - rate * jnp.sign(errors[name]) for name, rate in rates.items()}
      metrics = {
        "loss": sums["plain_loss"] / weight,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(state["step"]),
      }
      if c.z_loss:
        metrics["z"] = sums["z"] / weight
      if aux.loss is not None:
        metrics["branch_loss"] = jnp.sum(aux.loss)
      if telemetry:
        norm_ratio = lambda u, p: jnp.linalg.norm(u) / jnp.maximum(jnp.linalg.norm(p.astype(jnp.float32)), 1e-12)
        losses = {} if aux.loss is None else {"branch_loss": aux.loss}
        metrics["telemetry"] = aux.stats | losses | {
          "logit_rms": sums["logit_rms"] / weight,
          "update_ratio": jax.tree.map(norm_ratio, updates, params),
        }
      out = {"params": new, "opt_state": opt_state, "step": state["step"] + 1}
      if lora:
        out["base"] = state["base"]
      if c.ema:
        out["ema"] = jax.tree.map(lambda e, p: c.ema * e + (1 - c.ema) * p.astype(jnp.float32), state["ema"], new)
      sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
      out |= {name: _where(sound, out[name], state[name]) for name in ("params", "opt_state", "ema") if name in out}
      # This checks the incoming state: a check of the new one makes XLA compute the update twice (5.7 % slower).
      # Checkpoints.save checks the state that it writes.
      is_finite = _finite({name: state[name] for name in state if name != "base"})
      metrics["finite"] = {"update": sound, "state": is_finite}
      return out, metrics

  def evaluate(state: dict, batch: dict) -> dict:
    with sharding.use_layout(LAYOUT, mesh):
      _, (sums, _) = loss_sum(eval_params(state), state.get("base"), deal(batch), None, False)
      return {"loss": sums["plain_loss"], "weight": sums["weight"]}

  def export(state: dict) -> dict:
    return lora.merge(state["base"], eval_params(state)) if lora else eval_params(state)

  seed = np.uint32(config.seed)  # an argument and no constant, so that one compiled program serves every seed
  shapes = jax.eval_shape(init, seed)
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed, batch_sharding = jax.tree.map(lambda _: device, shapes), None
  else:
    sharding.check_axes(LAYOUT, mesh)
    placed = _state_shardings(shapes, named | trained, mesh)
    batch_sharding = NamedSharding(
      mesh, sharding.spec(TOKENS, (c.batch_size // c.grad_accum, c.seq_len), LAYOUT, mesh)
    )
  return TrainStep(
    init=functools.partial(jax.jit(init, out_shardings=placed), seed),
    step=jax.jit(step, donate_argnums=0, static_argnames="telemetry", out_shardings=(placed, None)),
    evaluate=jax.jit(evaluate),
    export=jax.jit(export) if lora else export,
    abstract_state=jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed),
    batch_sharding=batch_sharding,
  )


def _dealt(x: jax.Array, ring: int) -> jax.Array:
  """Reorders the tokens of rows [B, T] so that each device of a ring has the same number of causal pairs.

  Of 2 `ring` pieces, device i gets the i-th from the start and the i-th from the end (2407.21783, section 3.3.2).
  Positions move along with the tokens, and nothing else says where a token stands.
  """
  if ring == 1:
    return x
  order = np.stack([np.arange(ring), 2 * ring - 1 - np.arange(ring)], axis=1).ravel()
  return sharding.shard(x.reshape(x.shape[0], 2 * ring, -1)[:, order].reshape(x.shape), *TOKENS)


def _in_order(model: ModelConfig) -> bool:
  """True if the order of a row's tokens matters besides their positions: a branch draws, recurs, or takes the first."""
  blocks = model.blocks.values()
  branches = [branch for block in blocks for branch in block.branches.values()]
  return any(part.dropout for part in (model.embed, *blocks)) or any(branch.in_order for branch in branches)


def eval_params(state: dict) -> dict:
  """The trained parameters to evaluate, sample from and export: the moving average if there is one."""
  return state.get("ema", state["params"])


def _where(sound: jax.Array, new, old):
  """Selects the new floats if the update is sound, else the old ones; integers are always new, as the step is."""
  return jax.tree.map(lambda n, o: jnp.where(sound, n, o) if jnp.issubdtype(n.dtype, jnp.inexact) else n, new, old)


def _finite(tree) -> jax.Array:
  """True if all numbers are finite.

  A maximum keeps a NaN, and on a CPU it runs at the speed of memory, `isfinite(x).all()` at a third of it.
  """
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.stack([jnp.max(jnp.abs(x)) < jnp.inf for x in floats]).all()


def _f32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _state_shardings(shapes: dict, named: dict, mesh: Mesh):
  """Gives a parameter, and each moment of its name and shape, that parameter's sharding; all else is replicated."""
  params = {
    name: NamedSharding(mesh, sharding.spec(p.axes, p.shape, LAYOUT, mesh)) for name, p in named.items()
  }

  def sharding_of(path, leaf):
    name = next((k.key for k in reversed(path) if getattr(k, "key", None) in params), None)
    if name is not None and leaf.shape == tuple(named[name].shape):
      return params[name]
    return NamedSharding(mesh, jax.sharding.PartitionSpec())

  return jax.tree_util.tree_map_with_path(sharding_of, shapes)
