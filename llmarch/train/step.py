"""The train step: a pure jitted function closed over a config and a mesh.

A train state is a plain dict {"params", "opt_state", "step"} (and "ema"): parameters by name, the optax
state, the number of steps done. A batch is a dict of [B, T] arrays; see data/pipeline.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llmarch import sharding
from llmarch.experiment import ExperimentConfig
from llmarch.layers.param import flatten, unflatten
from llmarch.models.decoder import Decoder, abstract
from llmarch.ops.loss import chunked_loss
from llmarch.train.optim import make_optimizer, make_schedule

LAYOUT = sharding.LAYOUTS["megatron"]


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """What `make_train_step` returns. All functions are jitted; `step` donates its state."""

  init: Callable[[], dict]
  step: Callable[..., tuple[dict, dict]]  # (state, batch, *, telemetry=False) -> state, metrics
  evaluate: Callable[[dict, dict], dict]  # (state, batch) -> {"loss", "weight"} sums
  abstract_state: dict  # shapes, dtypes and shardings, for restoring
  batch_sharding: Any  # for jax.device_put of a batch; None on one device


def make_train_step(config: ExperimentConfig, mesh: Mesh | None = None) -> TrainStep:
  """Builds init, step and evaluate for this config, sharded over the mesh (None: one device)."""
  c = config.train
  graph, abstract_params = nnx.split(abstract(config.model))
  named = flatten(abstract_params, variables=True)
  optimizer = make_optimizer(config.optimizer, c.steps, named)
  schedule = make_schedule(config.optimizer.schedule, config.optimizer.learning_rate, c.steps)

  def model_of(params: dict) -> Decoder:
    return nnx.merge(graph, unflatten(abstract_params, params))

  def init() -> dict:
    params = flatten(nnx.state(Decoder(config.model, jax.random.key(config.seed))))
    state = {"params": params, "opt_state": optimizer.init(_f32(params)), "step": jnp.zeros((), jnp.int32)}
    return state | ({"ema": _f32(params)} if c.ema else {})

  def loss_sum(params, batch, key, telemetry):
    """The sum of weighted token losses, and what the metrics need."""
    model = model_of(params)
    hidden, _, aux = model.trunk(
      batch["tokens"], batch["positions"], batch["segment_ids"],
      prefix=batch.get("prefix"), key=key, remat=c.remat, telemetry=telemetry,
    )  # fmt: skip
    total, sums = chunked_loss(
      model.unembed, hidden, batch["targets"], batch["loss_weights"],
      chunk=c.loss_chunk, label_smoothing=c.label_smoothing, z_loss=c.z_loss,
    )  # fmt: skip
    return total, (sums, aux)

  def accumulate(params, batch, key, telemetry):
    """Gradients (f32, of the sum), sums and aux over `grad_accum` micro-batches."""
    grad = jax.grad(loss_sum, has_aux=True)
    if c.grad_accum == 1:
      grads, (sums, aux) = grad(params, batch, key, telemetry)
      return _f32(grads), sums, aux
    # Micro-batch i takes rows i, i + A, ...: each has rows of every device of a data axis.
    micro = jax.tree.map(lambda x: x.reshape(-1, c.grad_accum, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total, piece):
      batch, key = piece
      grads, (sums, aux) = grad(params, batch, key, telemetry)
      return jax.tree.map(jnp.add, total, (_f32(grads), sums)), aux

    one = jax.tree.map(lambda x: x[0], micro)
    like = jax.eval_shape(lambda: grad(params, one, key, telemetry))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (like[0], like[1][0]))
    (grads, sums), aux = jax.lax.scan(body, zeros, (micro, jax.random.split(key, c.grad_accum)))
    return grads, sums, jax.tree.map(lambda x: jnp.mean(x, axis=0), aux)

  def step(state: dict, batch: dict, *, telemetry: bool = False) -> tuple[dict, dict]:
    with sharding.use_layout(LAYOUT, mesh):
      params = state["params"]
      key = jax.random.fold_in(jax.random.key(config.seed), state["step"])  # nothing to restore on resume
      grads, sums, aux = accumulate(params, batch, key, telemetry)
      weight = jnp.maximum(sums["weight"], 1.0)
      grads = jax.tree.map(lambda g: g / weight, grads)
      updates, opt_state = optimizer.update(grads, state["opt_state"], _f32(params))
      new = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
      metrics = {
        "loss": sums["plain_loss"] / weight,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(state["step"]),
      }
      if c.z_loss:
        metrics["z"] = sums["z"] / weight
      if telemetry:
        ratio = lambda u, p: jnp.linalg.norm(u) / jnp.maximum(jnp.linalg.norm(p.astype(jnp.float32)), 1e-12)
        metrics["telemetry"] = aux | {
          "logit_rms": sums["logit_rms"] / weight,
          "update_ratio": jax.tree.map(ratio, updates, params),
        }
      out = {"params": new, "opt_state": opt_state, "step": state["step"] + 1}
      if c.ema:
        out["ema"] = jax.tree.map(lambda e, p: c.ema * e + (1 - c.ema) * p.astype(jnp.float32), state["ema"], new)
      return out, metrics

  def evaluate(state: dict, batch: dict) -> dict:
    with sharding.use_layout(LAYOUT, mesh):
      _, (sums, _) = loss_sum(eval_params(state), batch, None, False)
      return {"loss": sums["plain_loss"], "weight": sums["weight"]}

  shapes = jax.eval_shape(init)
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed, batch_sharding = jax.tree.map(lambda _: device, shapes), None
  else:
    sharding.find_layout("megatron", mesh)  # refuses a mesh of other axes
    placed = _state_shardings(shapes, named, mesh)
    batch_sharding = NamedSharding(
      mesh, sharding.spec(("batch", "length"), (c.batch_size // c.grad_accum, c.seq_len), LAYOUT, mesh)
    )
  return TrainStep(
    init=jax.jit(init, out_shardings=placed),
    step=jax.jit(step, donate_argnums=0, static_argnames="telemetry", out_shardings=(placed, None)),
    evaluate=jax.jit(evaluate),
    abstract_state=jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed),
    batch_sharding=batch_sharding,
  )


def eval_params(state: dict) -> dict:
  """The parameters to evaluate, sample from and export: the moving average where there is one."""
  return state.get("ema", state["params"])


def _f32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _state_shardings(shapes: dict, named: dict, mesh: Mesh):
  """A parameter's sharding for it and for every moment of its name and shape; all else is replicated."""
  params = {
    name: NamedSharding(mesh, sharding.spec(p.axes, p.shape, LAYOUT, mesh)) for name, p in named.items()
  }

  def one(path, leaf):
    name = next((k.key for k in reversed(path) if getattr(k, "key", None) in params), None)
    if name is not None and leaf.shape == tuple(named[name].shape):
      return params[name]
    return NamedSharding(mesh, jax.sharding.PartitionSpec())

  return jax.tree_util.tree_map_with_path(one, shapes)
