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
from llmarch.errors import check
from llmarch.layers.param import flatten, unflatten
from llmarch.layers.stack import Aux
from llmarch.models.decoder import Decoder, abstract
from llmarch.ops.einsum import gathered
from llmarch.ops.loss import chunked_loss
from llmarch.ops.quant import rounded_at_random
from llmarch.run_config import RunConfig
from llmarch.sharding import TOKENS
from llmarch.train import pipeline
from llmarch.train.optim import make_optimizer, make_schedule

LAYOUT = sharding.TRAIN
ROUNDING = 0x7FFFFFFF  # number of the step's key from which random rounding draws; micro-batches split the key itself


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """The functions that `make_train_step` returns. Those of arrays are jitted; `step` donates its state."""

  init: Callable[..., dict]  # (params=None) -> state; params: the whole model's by name, drawn if not given
  step: Callable[..., tuple[dict, dict]]  # (state, batch, *, telemetry=False) -> state, metrics
  compile: Callable[..., None]  # (state, batch, *, telemetry=False): compiles `step` for them, and runs nothing
  evaluate: Callable[[dict, dict], dict]  # (state, batch) -> {"loss", "weight"} sums
  export: Callable[[dict], dict]  # state -> all parameters of the model, averaged and merged, for sampling
  abstract_state: dict  # shapes, dtypes and shardings, for restoring
  batch_sharding: Any  # for jax.device_put of a batch; None on one device


def make_train_step(config: RunConfig, mesh: Mesh | None = None) -> TrainStep:
  """Builds init, step and evaluate for this config, sharded over the mesh (None: one device)."""
  program = _Program(config, mesh)
  seed = np.uint32(config.seed)  # an argument, so that one compiled program draws the parameters of every seed
  shapes = jax.eval_shape(program.init, seed)
  placed, batch_sharding = program.places(shapes)
  step = jax.jit(program.step, donate_argnums=0, static_argnames="telemetry", out_shardings=(placed, None))
  return TrainStep(
    init=functools.partial(jax.jit(program.init, out_shardings=placed), seed),
    step=step,
    compile=lambda *args, **kw: step.lower(*args, **kw).compile(),
    evaluate=jax.jit(program.evaluate),
    export=jax.jit(program.export) if program.lora else program.export,
    abstract_state=jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed),
    batch_sharding=batch_sharding,
  )


def check_trains(config: RunConfig, mesh: Mesh | None) -> None:
  """Raises UserError for a config that `make_train_step` refuses; no array is made and nothing is compiled."""
  _Program(config, mesh)


class _Program:
  """What a config and a mesh fix, and the functions of arrays that `make_train_step` jits."""

  def __init__(self, config: RunConfig, mesh: Mesh | None):
    c = config.train
    self.config, self.train, self.mesh = config, c, mesh
    self.graph, self.abstract_params = nnx.split(abstract(config.model))
    self.named = flatten(self.abstract_params, variables=True)
    self.lora = Adapters(c.lora, config.model) if c.lora else None
    self.trained = self.lora.params if self.lora else self.named
    check(
      all(p.dtype != jnp.float16 for p in self.trained.values()),
      "model.precision.param=float16 has too few exponents for parameters that are trained, whose small updates would"
      " be lost; take float32, or bfloat16, which is rounded at random (model.precision.compute may stay)",
    )
    # Biases of routers go against the sign of their gradient, and past the optimizer (layers/moe.py).
    self.rates = {name: p.balance_rate for name, p in self.trained.items() if hasattr(p, "balance_rate")}
    self.optimizer = make_optimizer(config.optimizer, c.steps, self.trained)
    self.schedule = make_schedule(config.optimizer.schedule, config.optimizer.learning_rate, c.steps)
    self.stages = pipeline.plan(config, LAYOUT, mesh)
    # Each chunk of the loss has tokens of every device, and as many logits on each as without a mesh.
    parts = 1 if mesh is None else sharding.ways("length", LAYOUT, mesh)
    self.loss_chunk = min(c.loss_chunk, math.ceil(c.seq_len / parts)) * parts
    self.ring = 1 if mesh is None or _in_order(config.model) else sharding.ways("attn_length", LAYOUT, mesh)

  # ------------------------------------------------------------------------------------------------ the functions

  def init(self, seed: jax.Array, params: dict | None = None) -> dict:
    """A train state. params: all of the model's by name; None draws them from the seed."""
    key = jax.random.key(seed)
    params = flatten(nnx.state(Decoder(self.config.model, key))) if params is None else params
    base = {}
    if self.lora:
      base, params = {"base": self.lora.freeze(params)}, self.lora.draw(key)
    state = {"params": params, "opt_state": self.optimizer.init(_f32(params)), "step": jnp.zeros((), jnp.int32)}
    return state | base | ({"ema": _f32(params)} if self.train.ema else {})

  def step(self, state: dict, batch: dict, *, telemetry: bool = False) -> tuple[dict, dict]:
    """One update: gradients, the optimizer, metrics, and the old state again where the update is not finite."""
    with sharding.use_layout(LAYOUT, self.mesh):
      key = jax.random.fold_in(jax.random.key(self.config.seed), state["step"])  # nothing to restore on resume
      grads, sums, aux = self.gradients(state["params"], state.get("base"), self.dealt(batch), key, telemetry)
      weight = jnp.maximum(sums["weight"], 1.0)
      grads, errors = self.mean_gradients(grads, weight)
      updates, opt_state = self.optimizer.update(grads, state["opt_state"], _f32(state["params"]))
      params = self.updated(state["params"], updates, errors, jax.random.fold_in(key, ROUNDING))
      metrics = self.metrics(state, grads, sums, aux, weight)
      if telemetry:
        metrics["telemetry"] = self.telemetry(state, sums, aux, weight, updates)
      new = self.new_state(state, params, opt_state)
      sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
      new |= {name: _where(sound, new[name], state[name]) for name in ("params", "opt_state", "ema") if name in new}
      # The incoming state is checked: a check of the new one makes XLA compute the update twice (5.7 % slower).
      # Checkpoints.save checks what it writes.
      whole = _finite({name: state[name] for name in state if name != "base"})
      metrics["finite"] = {"update": sound, "state": whole}
      return new, metrics

  def evaluate(self, state: dict, batch: dict) -> dict:
    """{"loss", "weight"}: the sums of weighted token losses and of their weights, without dropout."""
    with sharding.use_layout(LAYOUT, self.mesh):
      _, (sums, _) = self.loss_sum(eval_params(state), state.get("base"), self.dealt(batch), None, False)
      return {"loss": sums["plain_loss"], "weight": sums["weight"]}

  def export(self, state: dict) -> dict:
    """All parameters of the model by name, averaged and with adapters merged."""
    return self.lora.merge(state["base"], eval_params(state)) if self.lora else eval_params(state)

  # ------------------------------------------------------------------------------------------- loss and gradients

  def dealt(self, batch: dict) -> dict:
    """The batch with the tokens of each row in the order in which the devices of a ring hold them."""
    return jax.tree.map(functools.partial(_dealt, ring=self.ring), batch)

  def loss_sum(self, params: dict, base: dict | None, batch: dict, key, telemetry: bool):
    """The sum of weighted token losses, and what the metrics need: sums, and an Aux of means over microbatches."""
    c, stages = self.train, self.stages
    model = self.model_of(params, base)
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
      chunk=self.loss_chunk, label_smoothing=c.label_smoothing, z_loss=c.z_loss,
    )  # fmt: skip
    if aux.loss is not None:
      # A branch's loss is a mean over a microbatch's tokens, as the loss is once it is divided by their weight.
      weights = stages.by_microbatch(batch["loss_weights"]) if stages else batch["loss_weights"][None]
      total += jnp.sum(aux.loss.T * jnp.sum(weights, axis=(1, 2)))
    return total, (sums, jax.tree.map(lambda x: jnp.mean(x, axis=0), aux))

  def model_of(self, params: dict, base: dict | None) -> Decoder:
    """The model of these parameters by name, adapters attached to their base."""
    params = self.lora.attach(base, params) if self.lora else params
    return nnx.merge(self.graph, unflatten(self.abstract_params, params))

  def gradients(self, params: dict, base: dict | None, batch: dict, key, telemetry: bool):
    """Gradients (f32, of the sum), sums and Aux over `grad_accum` micro-batches."""

    def grad(params, base, batch, key, telemetry):
      """Gradients in f32 that lie as their parameters, for every micro-batch."""
      grads, sums = jax.grad(self.loss_sum, has_aux=True)(params, base, batch, key, telemetry)
      return {name: sharding.shard(g, *self.trained[name].axes) for name, g in _f32(grads).items()}, sums

    count = self.train.grad_accum
    if count == 1:
      grads, (sums, aux) = grad(params, base, batch, key, telemetry)
      return grads, sums, aux
    micro = {name: pipeline.microbatches(x, count) for name, x in batch.items()}

    def add_one(total, piece):
      batch, key = piece
      grads, (sums, aux) = grad(params, base, batch, key, telemetry)
      return jax.tree.map(jnp.add, total, (grads, sums)), aux

    first = jax.tree.map(lambda x: x[0], micro)
    like = jax.eval_shape(lambda: grad(params, base, first, key, telemetry))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (like[0], like[1][0]))
    (grads, sums), aux = jax.lax.scan(add_one, zeros, (micro, jax.random.split(key, count)))
    return grads, sums, jax.tree.map(lambda x: jnp.mean(x, axis=0), aux)

  # ------------------------------------------------------------------------------------------------- the update

  def mean_gradients(self, grads: dict, weight: jax.Array) -> tuple[dict, dict]:
    """Gradients of the mean loss, and those of routers' biases apart: the optimizer sees zeros for them."""
    grads = jax.tree.map(lambda g: g / weight, grads)
    errors = {name: grads[name] for name in self.rates}
    return grads | {name: jnp.zeros_like(error) for name, error in errors.items()}, errors

  def updated(self, params: dict, updates: dict, errors: dict, key: jax.Array) -> dict:
    """The parameters after an update, and routers' biases a step of their rate against their load's error."""
    updates = updates | {name: -rate * jnp.sign(errors[name]) for name, rate in self.rates.items()}
    keys = dict(zip(sorted(params), jax.random.split(key, len(params))))
    add = lambda name, p: rounded_at_random(p.astype(jnp.float32) + updates[name], p.dtype, keys[name])
    return {name: add(name, p) for name, p in params.items()}

  def new_state(self, state: dict, params: dict, opt_state) -> dict:
    """The train state after the update."""
    new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
    if self.lora:
      new["base"] = state["base"]
    if self.train.ema:
      decay = self.train.ema
      new["ema"] = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(jnp.float32), state["ema"], params)
    return new

  def metrics(self, state: dict, grads: dict, sums: dict, aux: Aux, weight: jax.Array) -> dict:
    """What each step reports, f32 scalars."""
    found = {
      "loss": sums["plain_loss"] / weight,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": self.schedule(state["step"]),
    }
    if self.train.z_loss:
      found["z"] = sums["z"] / weight
    if aux.loss is not None:
      found["branch_loss"] = jnp.sum(aux.loss)
    return found

  def telemetry(self, state: dict, sums: dict, aux: Aux, weight: jax.Array, updates: dict) -> dict:
    """Statistics by layer and by parameter."""
    size = lambda x: jnp.linalg.norm(x.astype(jnp.float32))
    ratio = lambda u, p: jnp.linalg.norm(u) / jnp.maximum(size(p), 1e-12)
    losses = {} if aux.loss is None else {"branch_loss": aux.loss}
    return aux.stats | losses | {
      "logit_rms": sums["logit_rms"] / weight,
      "update_ratio": jax.tree.map(ratio, updates, state["params"]),
    }

  # --------------------------------------------------------------------------------------------------- the mesh

  def places(self, shapes: dict) -> tuple[Any, Any]:
    """The shardings of a train state of these shapes, and that of a batch (None on one device)."""
    if self.mesh is None:
      device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      return jax.tree.map(lambda _: device, shapes), None
    sharding.check_axes(LAYOUT, self.mesh)
    rows = self.train.batch_size // self.train.grad_accum, self.train.seq_len
    batch = NamedSharding(self.mesh, sharding.spec(TOKENS, rows, LAYOUT, self.mesh))
    return _state_shardings(shapes, self.named | self.trained, self.mesh), batch


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
