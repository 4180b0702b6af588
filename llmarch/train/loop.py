"""The training loop: batches in, metrics, samples and checkpoints out."""

import contextlib
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmarch.config import UserError, to_dict
from llmarch.experiment import ExperimentConfig
from llmarch.train.checkpoint import Checkpoints, claim_workdir, only_process
from llmarch.train.metrics import LiveLine, MetricsWriter
from llmarch.train.step import eval_params, make_train_step


def train(
  config: ExperimentConfig,
  workdir: str,
  train_data,
  eval_data,
  *,
  mesh: Mesh | None,
  sample: Callable[[dict], str] | None,
  flops_per_token: float,
  peak_flops: float | None,
  tokenizer=None,
) -> dict:
  """Trains from the newest checkpoint of `workdir`, or from the start, to config.train.steps.

  train_data, eval_data (unused if eval.every is 0): see data.pipeline.Pipeline. sample(params) gives text.
  flops_per_token: of a train step, per token of it; peak_flops: of all devices together, None if unknown
  (mfu is then null). tokenizer: kept in the workdir.
  Returns the last evaluation row ({} if eval.every is 0). Raises UserError for a workdir that belongs to
  another run or is in use by another process, a checkpoint of other data, or numbers that are not finite.
  """
  c = config.train
  functions = make_train_step(config, mesh)
  claim_workdir(workdir, config, tokenizer)  # after all that may be refused: a mended config may use the folder
  meta = {"config": to_dict(config), "pipeline_hash": train_data.hash}
  with contextlib.ExitStack() as stack:
    stack.enter_context(only_process(workdir))
    checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
    start = checkpoints.latest() or 0
    if start:
      state, saved = checkpoints.restore(functions.abstract_state)
      if saved["pipeline_hash"] != train_data.hash:
        raise UserError(
          f"{workdir} was trained on other data (its corpus, tokenizer or batch shape has changed); give another"
          " --workdir, or restore the corpus"
        )
    else:
      state = functions.init()
    writer = MetricsWriter(workdir, start)
    stack.callback(writer.close)
    line = LiveLine(c.steps, start)
    if start:
      line.say(f"resuming {workdir} after step {start}")
    place = lambda batch: jax.device_put(batch, functions.batch_sharding)
    batches = train_data.iterate(start)
    if hasattr(batches, "close"):
      stack.callback(batches.close)
    meter = Meter(c.batch_size * c.seq_len, flops_per_token, peak_flops)
    last_eval = {}

    for step in range(start + 1, c.steps + 1):
      due = lambda every: every and step % every == 0  # noqa: B023
      telemetry = bool(due(c.telemetry_every))
      state, metrics = functions.step(state, place(next(batches)), telemetry=telemetry)
      meter.step()
      if due(c.log_every) or telemetry or step == c.steps:
        row = {"step": step, **jax.tree.map(_plain, jax.device_get(metrics))}
        _refuse_divergence(row, workdir, checkpoints.latest())
        row |= {"bits_per_byte": _bits_per_byte(row["loss"], train_data), **meter.read()}
        writer.write(row)
        line.show(row)
      if due(config.eval.every) or (config.eval.every and step == c.steps):
        with meter.paused():
          last_eval = {"step": step, **evaluate(functions.evaluate, state, eval_data, config.eval.batches, place)}
          _refuse_divergence(last_eval, workdir, checkpoints.latest())
          writer.write(last_eval)
          line.say(
            f"step {step}  eval loss {last_eval['eval/loss']:.4f}  {last_eval['eval/bits_per_byte']:.3f} bits/byte"
          )
          if sample:
            text = sample(eval_params(state))
            line.say(f"--- sample after step {step} ---\n{text}\n---")
      if due(config.checkpoint.every) or step == c.steps:
        with meter.paused():
          # The loss was that of the parameters before this step; those after it are what is saved.
          largest = float(_largest(state["params"]))
          _refuse_divergence({"step": step, "largest parameter": largest}, workdir, checkpoints.latest())
          known = last_eval if last_eval.get("step") == step else {}
          checkpoints.save(step, state, meta, {k: v for k, v in known.items() if k != "step"} or None)
    checkpoints.wait()
  return last_eval


def evaluate(evaluate_step, state: dict, data, batches: int, place) -> dict:
  """Mean loss over the first `batches` batches of the validation split: the same ones each time."""
  sums = [jax.device_get(evaluate_step(state, place(data.batch(i)))) for i in range(batches)]
  loss = float(sum(s["loss"] for s in sums) / max(sum(s["weight"] for s in sums), 1.0))
  return {"eval/loss": loss, "eval/bits_per_byte": _bits_per_byte(loss, data)}


def _bits_per_byte(loss: float, data) -> float:
  """Nats a token -> bits a byte of text."""
  return loss / math.log(2) / data.bytes_per_token


def _plain(x: np.ndarray) -> float | list:
  return x.tolist()


def _refuse_divergence(row: dict, workdir: str, saved: int | None) -> None:
  """Raises UserError if a number of the row is not finite."""
  for name, value in row.items():
    if isinstance(value, float) and not math.isfinite(value):
      back = "nothing was saved" if saved is None else f"the checkpoint of step {saved} is kept"
      raise UserError(
        f"the {name} is {value} at step {row['step']} in {workdir}; lower optimizer.learning_rate or clip"
        f" gradients ({back})"
      )


@jax.jit
def _largest(params: dict) -> jax.Array:
  """The largest absolute value; NaN if there is one."""
  return jnp.max(jnp.stack([jnp.abs(p).max().astype(jnp.float32) for p in jax.tree.leaves(params)]))


class Meter:
  """Tokens a second and MFU since the last reading, without pauses and without the compiling first step.

  MFU = tokens/s * FLOPs per token of a train step (forward and backward, no recomputation) / peak FLOP/s.
  """

  def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
    self.tokens, self.flops, self.peak = tokens_per_step, flops_per_token, peak_flops
    self.began, self.steps, self.first = time.monotonic(), 0, True

  def step(self) -> None:
    self.steps += 1

  def read(self) -> dict:
    now = time.monotonic()
    rate = self.steps * self.tokens / max(now - self.began, 1e-9)
    self.began, self.steps = now, 0
    return {
      "tokens_per_second": rate,
      "mfu": None if self.peak is None else rate * self.flops / self.peak,
    }

  @contextlib.contextmanager
  def paused(self):
    began = time.monotonic()
    yield
    self.began += time.monotonic() - began
