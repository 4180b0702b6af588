"""Dropout in less than one epoch."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets

LAYER = "model.blocks.layer"


def get_ablation() -> Ablation:
  return Ablation(
    title="Dropout",
    question="Does dropout help where no text is seen twice?",
    config="../byte_lm.py",
    arms=(Arm("none"), Arm("dropout", {f"{LAYER}.dropout": 0.1, "model.embed.dropout": 0.1})),
    comparisons=(Comparison("dropout-worse", "Dropout of 0.1 raises the validation loss", "dropout", "greater"),),
    budgets=budgets(seeds=3, noise_seeds=8),
  )
