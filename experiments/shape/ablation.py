"""Depth against width at equal parameters."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, Match, budgets


def shape(layers: int, width: int, d_ff: int) -> Arm:
  sizes = {"model.stack": f"{layers}*layer", "model.d_model": width, "model.blocks.layer.ffn.d_ff": d_ff}
  return Arm(f"{layers}x{width}", sizes, Match("params"))


def get_ablation() -> Ablation:
  return Ablation(
    title="Depth and width",
    question="How much does the aspect ratio d_model / layers matter at equal parameters (2001.08361)?",
    config="../byte_lm.py",
    arms=(Arm("4x128"), shape(8, 88, 232), shape(3, 152, 408), shape(2, 184, 488)),
    comparisons=(
      Comparison("aspect-ratio-flat", "Ratio 51 is within 3 % of ratio 32", "3x152", "equal", 0.053),
      Comparison("deep-ties", "Ratio 11 is within 3 % of ratio 32", "8x88", "equal", 0.053),
      Comparison("wide-ties", "Ratio 92 is within 3 % of ratio 32", "2x184", "equal", 0.053),
    ),
    budgets=budgets(seeds=3, noise_seeds=8),
    notes="3 % of the baseline's loss, 1.78 nats, is 0.053. The learning rate is the same for all.",
  )
