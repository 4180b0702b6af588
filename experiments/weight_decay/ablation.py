"""Weight decay 0, 0.1 and 0.3 with a cosine schedule."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets

KEY = "optimizer.weight_decay"


def get_ablation() -> Ablation:
  return Ablation(
    title="Weight decay",
    question="Does weight decay lower the loss of a short run (2310.04415 saw it in long ones)?",
    config="../byte_lm.py",
    arms=(Arm("0.1"), Arm("0", {KEY: 0.0}), Arm("0.3", {KEY: 0.3})),
    comparisons=(
      Comparison("decay-lowers-loss", "Decay of 0.1 is below none", "0.1", "less", baseline="0"),
      Comparison("more-decay-ties", "Decay of 0.3 is within 0.03 nats of 0.1", "0.3", "equal", 0.03),
    ),
    budgets=budgets(seeds=3, noise_seeds=8),
    notes="The effect in the literature is of long runs; hundreds of steps can at most show that it does no harm.",
  )
