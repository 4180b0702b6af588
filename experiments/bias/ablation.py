"""Biases in every projection against none."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets

LAYER = "model.blocks.layer"


def get_ablation() -> Ablation:
  return Ablation(
    title="Biases",
    question="Does a model lose anything without biases (2204.02311, section 2)?",
    config="../byte_lm.py",
    arms=(
      Arm("none"),
      Arm("biases", {f"{LAYER}.mixer.qkv_bias": True, f"{LAYER}.mixer.out_bias": True, f"{LAYER}.ffn.bias": True}),
    ),
    comparisons=(Comparison("no-bias-ties-bias", "The losses are within 0.03 nats", "biases", "equal", 0.03),),
    budgets=budgets(seeds=3, noise_seeds=8),
  )
