"""Generating T tokens with a cache and without: the fitted exponents of T."""

import time

import jax
import numpy as np
from flax import nnx

from llmarch.lab.ablation import ZERO, Ablation, Arm, Budget, Comparison
from llmarch.lab.measures import exponent
from llmarch.models.decoder import Decoder, abstract

LENGTHS = (64, 128, 256, 512)
PIECE = 32  # recomputing, a text's length is rounded up to this, so that few shapes are compiled


def generate_all(config, workdir: str) -> dict[str, float]:
  """Seconds of greedy generation from one token to T, batch 1; exponents by least squares in logarithms."""
  from llmarch.infer.lm import LM

  model = config.model
  params = jax.jit(lambda seed: nnx.state(Decoder(model, jax.random.key(seed))))(np.uint32(config.seed))
  lm = LM(model, params)

  @jax.jit
  def next_token(params, tokens, last):
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits, _, _ = nnx.merge(nnx.graphdef(abstract(model)), params)(tokens, positions)
    return logits[0, last].argmax()

  def recomputed(length: int):
    ids = np.zeros((1, length), np.int32)
    for t in range(1, length):
      ids[0, t] = next_token(params, ids[:, : -(-t // PIECE) * PIECE], t - 1)

  def cached(length: int):
    lm.generate([[0]], max_new_tokens=length - 1)

  def seconds(f, length: int) -> float:
    f(length)  # compiles
    times = []
    for _ in range(2):
      began = time.perf_counter()
      f(length)
      times.append(time.perf_counter() - began)
    return min(times)

  times = {f.__name__: [seconds(f, n) for n in LENGTHS] for f in (cached, recomputed)}
  return {f"{name}_exponent": exponent(LENGTHS, t) for name, t in times.items()} | {
    f"{name}_seconds_{n}": x for name, t in times.items() for n, x in zip(LENGTHS, t)
  }


def get_ablation() -> Ablation:
  within = lambda id, what, metric, to: Comparison(
    id, what, "decoder", "equal", 0.35, to, metric=metric, baseline="decoder", baseline_metric=ZERO
  )
  return Ablation(
    title="Decoding with and without a cache",
    question="How does the time to generate T tokens grow with T?",
    config="../byte_lm.py",
    arms=(Arm("decoder"),),
    comparisons=(
      within("cached-linear", "With a cache, as T to a power within 0.35 of 1", "cached_exponent", 1.0),
      within("recomputed-quadratic", "Without, as T to a power within 0.35 of 2", "recomputed_exponent", 2.0),
    ),
    budgets={
      "tiny": Budget(
        seeds=3, overrides={"model.max_seq_len": max(LENGTHS), "model.d_model": 256, "model.blocks.layer.ffn.d_ff": 688}
      )
    },
    trial=generate_all,
    metric="cached_exponent",
    notes=f"T = {', '.join(map(str, LENGTHS))}; batch 1, greedy, random weights, the faster of two runs.",
  )
