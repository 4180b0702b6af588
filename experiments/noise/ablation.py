"""How far two runs lie apart that differ in their seed alone: the noise that every other experiment is judged by."""

from llmarch.lab.ablation import Ablation, Arm, budgets


def get_ablation() -> Ablation:
  return Ablation(
    title="The noise floor",
    question="How far apart do runs of the same config end that differ in their seed alone?",
    config="../byte_lm.py",
    arms=(Arm("baseline"),),
    comparisons=(),
    budgets=budgets(seeds=8),
  )
