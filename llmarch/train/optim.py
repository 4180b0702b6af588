"""Optimizers and schedules: configs turned into optax. Parameters are a flat dict {name: array} here."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from llmarch.errors import check
from llmarch.run_config import (
  SGD,
  WSD,
  Adafactor,
  AdamW,
  Constant,
  Cosine,
  InverseSqrt,
  Linear,
  Lion,
  Muon,
  OptimizerConfig,
  ScheduleConfig,
)


def make_schedule(config: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
  """The learning rate of steps 0 .. steps-1: a linear warm-up, then the config's curve.

  Warm-up reaches the peak at step `warmup` and starts above zero, so that step 0 is not wasted. A decay reaches its end
  at the last step, steps-1. Raises UserError if warm-up and decay do not fit into the steps.
  """
  warmup, decay = config.warmup, getattr(config, "decay", 0)
  check(
    warmup + decay <= steps,
    f"optimizer.schedule: warmup={warmup} and decay={decay} do not fit into train.steps={steps}; lower them",
  )
  after = max(steps - warmup - 1, 1)  # steps from the peak to the last step
  match config:
    case Constant():
      curve = optax.constant_schedule(peak)
    case Linear():
      curve = optax.linear_schedule(peak, config.final * peak, after)
    case Cosine():
      curve = optax.cosine_decay_schedule(peak, after, alpha=config.final)
    case InverseSqrt():
      curve = lambda step: peak * jnp.sqrt(warmup / jnp.maximum(step + warmup, warmup))
    case WSD():
      stable = optax.constant_schedule(peak)
      curve = stable
      if decay:  # the last `decay` steps lie below the peak
        curve = optax.join_schedules(
          [stable, optax.linear_schedule(peak, config.final * peak, decay)], [after - decay]
        )
  if not warmup:
    return curve
  return optax.join_schedules([lambda step: peak * (step + 1) / (warmup + 1), curve], [warmup])


def rates_agree(config: OptimizerConfig, steps: int, other: int, done: int) -> bool:
  """True if a run of `steps` steps and one of `other` steps have the same learning rates in the first `done` steps."""
  schedules = (make_schedule(config.schedule, config.learning_rate, n) for n in (steps, other))
  a, b = (np.broadcast_to(np.asarray(schedule(np.arange(done))), done) for schedule in schedules)
  return np.array_equal(a, b)


SCHEDULE_COUNT = "opt_state/3/count"  # name, in a flat train state, of the number of steps that the schedule has done


def make_optimizer(config: OptimizerConfig, steps: int, params: dict[str, nnx.Param]) -> optax.GradientTransformation:
  """Chains clipping, the algorithm's direction, decoupled weight decay and the learning rate.

  params are the model's parameters by name (abstract ones suffice); their metadata says which of them decay and which
  dimensions a matrix sums over.
  """
  direction = _direction(config.algorithm, params)
  decays = {name: p.decay for name, p in params.items()}
  schedule = make_schedule(config.schedule, config.learning_rate, steps)
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    direction,
    optax.add_decayed_weights(config.weight_decay, mask=decays) if config.weight_decay else optax.identity(),
    optax.scale_by_learning_rate(schedule),
  )


def _direction(config, params) -> optax.GradientTransformation:
  match config:
    case AdamW():
      return optax.scale_by_adam(config.b1, config.b2, config.eps)
    case Lion():
      return optax.scale_by_lion(config.b1, config.b2)
    case SGD():
      return optax.trace(config.momentum) if config.momentum else optax.identity()
    case Adafactor():
      # Adafactor (1804.04235) is used without its own step sizes: the learning rate and its schedule are ours.
      return optax.chain(
        optax.scale_by_factored_rms(
          decay_rate=config.decay_rate, min_dim_size_to_factor=config.min_dim_size_to_factor
        ),
        optax.clip_by_block_rms(1.0),
      )
    case Muon():
      dims = {name: _muon_dims(name, p) for name, p in params.items()}
      return contrib.muon(
        learning_rate=-1.0,  # negative, because scale_by_learning_rate flips the sign again
        ns_steps=config.ns_steps,
        beta=config.beta,
        adam_b1=config.adam_b1,
        adam_b2=config.adam_b2,
        adam_learning_rate=-config.adam_learning_rate_ratio,
        muon_weight_dimension_numbers=dims,
      )


def _muon_dims(name: str, p: nnx.Param) -> contrib.MuonDimensionNumbers | None:
  """The dimensions that form the matrix; those of stacked layers and experts are a batch. None: Adam trains it."""
  if not p.fan_in or not name.startswith("stack/segments"):
    return None
  offset = len(p.shape) - len(p.axes)
  summed = tuple(offset + i for i, axis in enumerate(p.axes) if axis in p.fan_in)
  output_dims = tuple(offset + i for i, axis in enumerate(p.axes) if axis not in (*p.fan_in, "experts"))
  return contrib.MuonDimensionNumbers(summed, output_dims)
