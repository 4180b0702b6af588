"""Parallel blocks against serial ones."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets


def get_ablation() -> Ablation:
  return Ablation(
    title="Parallel blocks",
    question="What does it cost to run attention and feed-forward side by side (2204.02311, section 2)?",
    config="../byte_lm.py",
    arms=(
      Arm("serial"),
      Arm("parallel", {"model.blocks.layer.residual": "parallel"}),
      Arm("parallel_two_norms", {"model.blocks.layer.residual": "parallel_two_norms"}),
    ),
    comparisons=(
      Comparison("parallel-ties-serial", "The losses are within 0.03 nats", "parallel", "equal", 0.03),
      Comparison(
        "two-norms-tie-one",
        "A second norm changes less than 0.03 nats",
        "parallel_two_norms",
        "equal",
        0.03,
        baseline="parallel",
      ),
    ),
    budgets=budgets(seeds=3, noise_seeds=8),
    notes="PaLM's 15 % of speed is of large matrices fused over a mesh; a CPU step shows none of it.",
  )
