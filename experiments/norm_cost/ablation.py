"""The norm by itself: forward time of RMSNorm and LayerNorm on [4096, 1024]."""

import jax
import jax.numpy as jnp

from llmarch.lab.ablation import Ablation, Arm, Budget, Comparison
from llmarch.lab.measures import best_time
from llmarch.ops.norm import layer_norm, rms_norm

ROWS, WIDTH = 4096, 1024


def norm_time(config, workdir: str) -> dict[str, float]:
  """Milliseconds of one norm over [ROWS, WIDTH] f32, forward, and its gradients."""
  keys = jax.random.split(jax.random.key(config.seed), 2)
  x, scale = jax.random.normal(keys[0], (ROWS, WIDTH)), 1 + 0.1 * jax.random.normal(keys[1], (WIDTH,))
  if config.model.blocks["layer"].norm.kind == "rmsnorm":
    norm = lambda x, scale: rms_norm(x, scale, eps=1e-6)
  else:
    norm = lambda x, scale: layer_norm(x, scale, jnp.zeros(WIDTH), eps=1e-6)
  both = jax.jit(lambda x, scale, dy: jax.vjp(norm, x, scale)[1](dy))
  return {
    "forward_ms": 1e3 * best_time(jax.jit(norm), x, scale, repeats=30),
    "backward_ms": 1e3 * best_time(both, x, scale, x, repeats=30),
  }


def get_ablation() -> Ablation:
  layer_norm = {"kind": "layernorm"}
  return Ablation(
    title="The cost of a norm",
    question="Is RMSNorm faster than LayerNorm by itself?",
    config="../byte_lm.py",
    arms=(
      Arm("layernorm", {"model.blocks.layer.norm": layer_norm, "model.final_norm": layer_norm}),
      Arm("rmsnorm"),
    ),
    comparisons=(
      Comparison(
        "rmsnorm-faster-forward", "RMSNorm's forward pass takes less time", "rmsnorm", "less", metric="forward_ms"
      ),
    ),
    budgets={"tiny": Budget(seeds=5), "gpu": Budget(seeds=5)},
    trial=norm_time,
    metric="forward_ms",
    notes="A kernel's time, not a model's: norms are a few percent of a step. The fastest of 30 calls, of each seed.",
  )
