"""The cost of attention against the length of a row: dense scores, and a window whose unseen blocks are skipped."""

import jax
import jax.numpy as jnp

from llmarch.lab.ablation import ZERO, Ablation, Arm, Budget, Comparison
from llmarch.lab.measures import best_time, exponent
from llmarch.layers.mask import Causal
from llmarch.ops import attention, blockwise
from llmarch.ops.attention import Keys

LENGTHS = (1024, 2048, 4096)
HEADS, DIM, WINDOW = 2, 64, 256


def attention_time(config, workdir: str) -> dict[str, float]:
  """Milliseconds of one causal attention of 2 heads of 64, batch 1, forward; and the exponents of the length."""
  window = config.model.blocks["layer"].mixer.window
  times = []
  for length in LENGTHS:
    shape = 1, length, HEADS, DIM
    q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(config.seed), 3))
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    times.append(best_time(ATTEND["window" if window else "dense"], q, k, v, positions, repeats=5))
  return {"exponent": exponent(LENGTHS, times)} | {f"ms_{n}": 1e3 * t for n, t in zip(LENGTHS, times)}


def _tokens(positions) -> Keys:
  return Keys(positions, jnp.zeros_like(positions), None)


@jax.jit
def dense(q, k, v, positions):
  seen = attention.visible(_tokens(positions), _tokens(positions), mask=Causal(), window=None)
  by_head = lambda x: x.swapaxes(1, 2)
  return attention.attend(
    q, by_head(k), by_head(v), seen, None, None, scale=DIM**-0.5, softcap=None, dropout=0.0, key=None
  )[0]


@jax.jit
def windowed(q, k, v, positions):
  by_head = lambda x: x.swapaxes(1, 2)
  here = _tokens(positions)
  options = {"mask": Causal(), "window": WINDOW, "scale": DIM**-0.5, "softcap": None}
  return blockwise.attend(q, by_head(k), by_head(v), here, here, None, block=WINDOW // 2, **options)[0]


ATTEND = {"dense": dense, "window": windowed}


def get_ablation() -> Ablation:
  grows = lambda id, what, arm, to: Comparison(
    id, what, arm, "equal", 0.35, to, metric="exponent", baseline=arm, baseline_metric=ZERO
  )
  return Ablation(
    title="Attention and length",
    question="How does the time of attention grow with the length of a row?",
    config="../byte_lm.py",
    arms=(Arm("dense"), Arm("window", {"model.blocks.layer.mixer.window": WINDOW})),
    comparisons=(
      grows("dense-quadratic", "Dense: as the length to a power within 0.35 of 2", "dense", 2.0),
      grows("blockwise-window-linear", "A window, its unseen blocks skipped: within 0.35 of 1", "window", 1.0),
    ),
    budgets={"tiny": Budget(seeds=3), "gpu": Budget(seeds=5)},
    trial=attention_time,
    metric="exponent",
    notes=f"{', '.join(map(str, LENGTHS))} tokens; a window of {WINDOW}; the fastest of five calls.",
  )
