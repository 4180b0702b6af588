"""Gated feed-forwards against ungated ones, at equal parameters."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, Match, budgets

FFN = "model.blocks.layer.ffn"


def ffn(name: str, activation: str, gated: bool) -> Arm:
  return Arm(name, {f"{FFN}.activation": activation, f"{FFN}.gated": gated}, Match("params"))


def get_ablation() -> Ablation:
  return Ablation(
    title="Gated feed-forwards",
    question="Does a gate lower the loss at equal parameters, and does it matter which (2002.05202)?",
    config="../byte_lm.py",
    arms=(
      Arm("swiglu"),
      ffn("geglu", "gelu", True),
      ffn("bilinear", "identity", True),
      ffn("gelu", "gelu", False),
      ffn("relu", "relu", False),
    ),
    comparisons=(
      Comparison(
        "swiglu-below-relu", "SwiGLU is at least 0.03 nats below ReLU", "swiglu", "less", 0.03, baseline="relu"
      ),
      Comparison(
        "swiglu-below-gelu", "SwiGLU is at least 0.03 nats below GELU", "swiglu", "less", 0.03, baseline="gelu"
      ),
      Comparison("geglu-below-gelu", "GEGLU is at least 0.03 nats below GELU", "geglu", "less", 0.03, baseline="gelu"),
      Comparison(
        "bilinear-below-gelu", "Even a gate without activation beats GELU", "bilinear", "less", baseline="gelu"
      ),
      Comparison("geglu-ties-swiglu", "GEGLU and SwiGLU are within 0.03 nats", "geglu", "equal", 0.03),
      Comparison("gelu-below-relu", "GELU is below ReLU", "gelu", "less", baseline="relu"),
    ),
    budgets=budgets(seeds=4, noise_seeds=8),
  )
