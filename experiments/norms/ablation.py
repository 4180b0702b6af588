"""RMSNorm against LayerNorm: the loss, and what a whole step takes."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets

LAYER_NORM = {"kind": "layernorm"}


def get_ablation() -> Ablation:
  return Ablation(
    title="RMSNorm and LayerNorm",
    question="Does a norm lose anything without the mean (1910.07467)?",
    config="../byte_lm.py",
    arms=(
      Arm("rmsnorm"),
      Arm("layernorm", {"model.blocks.layer.norm": LAYER_NORM, "model.final_norm": LAYER_NORM}),
    ),
    comparisons=(Comparison("rmsnorm-ties-layernorm", "The losses are within 0.03 nats", "layernorm", "equal", 0.03),),
    budgets=budgets(seeds=3, noise_seeds=8),
    notes="The time of a step is in the cost table; the norm by itself is in experiments/norm_cost.",
  )
