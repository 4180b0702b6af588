"""One table for embedding and head against two."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets


def get_ablation() -> Ablation:
  return Ablation(
    title="Tied embeddings",
    question="Does a model lose anything when its embedding is its head?",
    config="../byte_lm.py",
    arms=(Arm("untied"), Arm("tied", {"model.head.tied": True})),
    comparisons=(Comparison("tied-ties-untied", "The losses are within 0.03 nats", "tied", "equal", 0.03),),
    budgets=budgets(seeds=3, noise_seeds=8),
    notes="With bytes the table is 4 % of the parameters; with 128k tokens it would be most of them.",
  )
