"""What is measured of a trained model beside its validation loss, and the trials that measure without training.

A measure takes a trial.Trained and gives {metric: number}; a trial of an ablation takes (config, workdir).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmarch.build import FrozenDict
from llmarch.config import ModelConfig, ScalingConfig
from llmarch.data.pipeline import make_pipeline
from llmarch.lab.trial import Trained
from llmarch.models.decoder import abstract
from llmarch.ops.loss import token_losses
from llmarch.run_config import RunConfig

# The key of a recorded trial is a hash of its functions' source text, in which initial_gradients names RunConfig so.
ExperimentConfig = RunConfig


def validation(config: RunConfig, params: nnx.State, model: ModelConfig, *, seq_len: int) -> dict[str, float]:
  """Means over the counted targets of the validation split, in rows of `seq_len` tokens: loss, accuracy (the target is
  the most likely token), log_z_squared. model: config.model, or another of the same parameters. As many tokens as
  `eval.batches` holds at train.seq_len, so that lengths are judged on equal amounts of text."""
  c = config.train
  rows = max(c.batch_size * c.seq_len // seq_len, 1)
  data = make_pipeline(
    config.data, batch_size=rows, seq_len=seq_len, seed=0, vocab_size=model.vocab_size, split="validation"
  )
  sums = [jax.device_get(_score(model, params, data.batch(i))) for i in range(config.eval.batches)]
  total = {name: float(sum(s[name] for s in sums)) for name in sums[0]}
  weight = total.pop("weight")
  return {name: value / weight for name, value in total.items()}


@functools.partial(jax.jit, static_argnums=0)
def _score(model: ModelConfig, params: nnx.State, batch: dict) -> dict:
  logits, _, _ = nnx.merge(nnx.graphdef(abstract(model)), params)(
    batch["tokens"], batch["positions"], batch["segment_ids"]
  )
  losses, log_z = token_losses(logits, batch["targets"])
  w = batch["loss_weights"]
  hit = jnp.argmax(logits, axis=-1) == batch["targets"]
  return {
    "loss": jnp.sum(w * losses),
    "accuracy": jnp.sum(w * hit),
    "log_z_squared": jnp.sum(w * log_z**2),
    "weight": jnp.sum(w),
  }


def as_trained(trained: Trained) -> dict[str, float]:
  """`validation` of the model in rows of the trained length."""
  return validation(trained.config, trained.lm.params, trained.config.model, seq_len=trained.config.train.seq_len)


def accuracy(trained: Trained) -> dict[str, float]:
  """The share of answers of a synthetic task that are right."""
  return {"accuracy": as_trained(trained)["accuracy"]}


def partition(trained: Trained) -> dict[str, float]:
  """The mean of log Z^2, Z the softmax's denominator (2204.02311, section 5: what z-loss holds near zero)."""
  return {"log_z_squared": as_trained(trained)["log_z_squared"]}


def spike(trained: Trained) -> dict[str, float]:
  """The largest rise of the training loss above the lowest before it, in nats, of the steps that were logged."""
  losses = np.array([row["loss"] for row in trained.rows if "loss" in row])
  return {"spike": float(np.max(losses - np.minimum.accumulate(losses)))}


def losses_at_lengths(*multiples: int) -> Callable[[Trained], dict[str, float]]:
  """A measure: the loss in rows of so many times the trained length, "loss_4x" and so on; and what it is above that
  at the trained length, "rise_4x"."""

  def measure(trained: Trained) -> dict[str, float]:
    length, params = trained.config.train.seq_len, trained.lm.params
    at = lambda n: validation(trained.config, params, trained.config.model, seq_len=n * length)["loss"]
    found = {n: at(n) for n in (1, *multiples)}
    return {f"loss_{n}x": x for n, x in found.items()} | {f"rise_{n}x": found[n] - found[1] for n in multiples}

  measure.__name__ = f"losses_at_lengths{multiples}"  # a trial's key has names and code, not what is closed over
  return measure


def rescaled(scalings: dict[str, ScalingConfig | None], multiple: int) -> Callable[[Trained], dict[str, float]]:
  """A measure: the loss at `multiple` times the trained length, the frequencies of RoPE scaled after training."""

  def measure(trained: Trained) -> dict[str, float]:
    config = trained.config
    at = lambda scaling: validation(
      config, trained.lm.params, with_scaling(config.model, scaling), seq_len=multiple * config.train.seq_len
    )["loss"]
    return {f"loss_{multiple}x_{name}": at(scaling) for name, scaling in scalings.items()}

  measure.__name__ = f"rescaled({scalings}, {multiple})"
  return measure


def with_scaling(model: ModelConfig, scaling: ScalingConfig | None) -> ModelConfig:
  """The config with another scaling of RoPE in every block."""

  def change(block):
    position = dataclasses.replace(block.mixer.position, scaling=scaling)
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, position=position))

  return dataclasses.replace(model, blocks=FrozenDict({name: change(b) for name, b in model.blocks.items()}))


# ----------------------------------------------------------------------------------------------- without training

DRAWS = 8  # of the initial parameters, in one trial


def initial_gradients(config: ExperimentConfig, workdir: str) -> dict[str, float]:
  """Norms of the loss's gradient at initialisation for both matrices of every feed-forward, geometric means over DRAWS
  draws of the parameters: last_gradient of the last `down` (2002.04745, theorem 1: it does not fall with depth for
  post-norm, and as 1/sqrt(L) for pre-norm), and the logarithms of all, such as log_up[1] to log_up[L]."""
  from llmarch.layers.param import flatten
  from llmarch.models.decoder import Decoder

  c = config.train
  data = make_pipeline(
    config.data,
    batch_size=c.batch_size,
    seq_len=c.seq_len,
    seed=config.seed,
    vocab_size=config.model.vocab_size,
    split="train",
  )

  @jax.jit
  def norms(seed, batch):
    graph, params = nnx.split(Decoder(config.model, jax.random.key(seed)))

    def loss(params):
      logits, _, _ = nnx.merge(graph, params)(batch["tokens"], batch["positions"], batch["segment_ids"])
      return jnp.mean(token_losses(logits, batch["targets"])[0])

    grads = {name.split("/")[-1]: g for name, g in flatten(jax.grad(loss)(params)).items() if "ffn/" in name}
    of = lambda g: jnp.log(jnp.linalg.norm(g.reshape(g.shape[0], -1), axis=-1))  # [layers]
    return {name: of(grads[name]) for name in ("up", "down")}

  draws = [norms(np.uint32(DRAWS * config.seed + i), data.batch(i)) for i in range(DRAWS)]
  logs = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *jax.device_get(draws))
  found = {"last_gradient": float(np.exp(logs["down"][-1])), "log_last_gradient": float(logs["down"][-1])}
  for name, layers in logs.items():
    found[f"log_{name}_last_over_first"] = float(layers[-1] - layers[0])
    found |= {f"log_{name}[{i}]": float(x) for i, x in enumerate(layers, 1)}
  return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
  """The slope of log(value) over log(size): values grow as size ** slope."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def best_time(f: Callable, *args, repeats: int = 5) -> float:
  """Seconds of the fastest of several calls, compiled before: what the machine does when nothing disturbs it."""
  jax.block_until_ready(f(*args))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(f(*args))
    times.append(time.perf_counter() - began)
  return min(times)
