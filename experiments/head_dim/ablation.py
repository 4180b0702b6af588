"""The dimension of a head at equal parameters."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets

MIXER = "model.blocks.layer.mixer"


def get_ablation() -> Ablation:
  heads = lambda n: Arm(f"{n}x{128 // n}", {f"{MIXER}.num_heads": n})
  return Ablation(
    title="Head dimension",
    question="Are many narrow heads worse than few wide ones (2002.07028)?",
    config="../byte_lm.py",
    arms=(Arm("4x32"), heads(2), heads(16), heads(32)),
    comparisons=(
      Comparison("narrow-heads-worse", "Heads of 4 dimensions are worse than heads of 32", "32x4", "greater"),
      Comparison("eight-dimensions-worse", "Heads of 8 dimensions are worse than heads of 32", "16x8", "greater"),
      Comparison("wide-heads-tie", "Two heads of 64 are within 0.03 nats of four", "2x64", "equal", 0.03),
    ),
    budgets=budgets(seeds=3, noise_seeds=8),
  )
