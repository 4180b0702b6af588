"""Multi-head, grouped-query and multi-query attention at equal parameters; and one head alone."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, Match, budgets

MIXER = "model.blocks.layer.mixer"


def get_ablation() -> Ablation:
  return Ablation(
    title="Key-value heads",
    question="What do fewer key-value heads cost in loss, and save in state (2305.13245)?",
    config="../byte_lm.py",
    arms=(
      Arm("mha"),
      Arm("gqa", {f"{MIXER}.num_kv_heads": 2}, Match("params")),
      Arm("mqa", {f"{MIXER}.num_kv_heads": 1}, Match("params")),
      Arm("one_head", {f"{MIXER}.num_heads": 1}),
    ),
    comparisons=(
      Comparison("gqa-ties-mha", "Two key-value heads for four are within 0.03 nats", "gqa", "equal", 0.03),
      Comparison("mqa-not-better-than-mha", "MQA is above MHA", "mqa", "greater", 0.0),
      Comparison("single-head-worse", "One head of all 128 dimensions is worse than four", "one_head", "greater"),
    ),
    budgets=budgets(seeds=3, noise_seeds=8),
    notes="What fewer heads save is given to the feed-forward. A gap within the noise is expected at this width.",
  )
