"""AdamW, Lion and Muon, each at the best of its own learning rates."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets

ALGORITHM = "optimizer.algorithm"


def get_ablation() -> Ablation:
  return Ablation(
    title="Optimizers",
    question="Which optimizer gets furthest in the same steps, each with its learning rate chosen by the same grid?",
    config="../byte_lm.py",
    arms=(
      Arm("adamw"),
      Arm("lion", {ALGORITHM: {"kind": "lion"}}),
      Arm("muon", {ALGORITHM: {"kind": "muon", "adam_learning_rate_ratio": 0.2}}),
    ),
    comparisons=(
      Comparison("lion-ties-adamw", "Lion is within 0.05 nats of AdamW", "lion", "equal", 0.05),
      Comparison("muon-below-adamw", "Muon is below AdamW", "muon", "less"),
    ),
    budgets=budgets(seeds=3, noise_seeds=4),
    learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    notes="Rates are tried once each, at a seed that no comparison uses.",
  )
