"""The last layer's gradient at initialisation, against depth: post-norm and pre-norm."""

import math

from llmarch.lab.ablation import Ablation, Arm, Budget, Comparison
from llmarch.lab.measures import initial_gradients

LAYER = "model.blocks.layer"
POST = {f"{LAYER}.residual": "post", "model.final_norm": None}


def get_ablation() -> Ablation:
  base = {
    "model.init": {"kind": "xavier"},
    f"{LAYER}.norm": {"kind": "layernorm"},
    f"{LAYER}.ffn": {"kind": "mlp", "d_ff": 512, "activation": "relu", "gated": False, "bias": True},
    "model.final_norm": {"kind": "layernorm"},
    "train.batch_size": 8,
    "train.seq_len": 64,
  }
  arms = [
    Arm(f"{place}_{depth}", {**change, "model.stack": f"{depth}*layer"})
    for place, change in (("pre", {}), ("post", POST))
    for depth in (6, 12, 24)
  ]
  root = -math.log(4) / 2  # of a gradient that falls as 1/sqrt(L), from 6 to 24 layers
  metric = {"metric": "log_last_gradient"}
  return Ablation(
    title="Gradients and depth",
    question="How does the last layer's gradient at initialisation change with depth (2002.04745, theorem 1)?",
    config="../byte_lm.py",
    arms=tuple(arms),
    comparisons=(
      Comparison(
        "post-constant-in-depth",
        "Post-norm: from 6 to 24 layers the same, within 15 %",
        "post_24",
        "equal",
        math.log(1.15),
        baseline="post_6",
        **metric,
      ),
      Comparison(
        "pre-falls-with-root-depth",
        "Pre-norm: from 6 to 24 layers half, within 15 %",
        "pre_24",
        "equal",
        math.log(1.15),
        root,
        baseline="pre_6",
        **metric,
      ),
    ),
    budgets={"tiny": Budget(seeds=4, overrides=base)},
    trial=initial_gradients,
    metric="last_gradient",
    notes="Norm of the gradient of the last feed-forward's second matrix. Nothing is trained.",
  )
