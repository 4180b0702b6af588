"""RoPE trained on 64 tokens and read at 256, with its frequencies rescaled: no further training."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets
from llmarch.lab.measures import rescaled
from llmarch.layers.position import NTK, Interpolation, YaRN

TRAINED, TIMES = 64, 4


def get_ablation() -> Ablation:
  at = f"loss_{TIMES}x"
  better = lambda id, name, what: Comparison(
    id, what, "rope", "less", metric=f"{at}_{name}", baseline="rope", baseline_metric=f"{at}_none"
  )
  scalings = {
    "none": None,
    "linear": Interpolation(factor=TIMES),
    "ntk": NTK(factor=TIMES),
    "yarn": YaRN(factor=TIMES, original=TRAINED),
  }
  return Ablation(
    title="Extending the context of RoPE",
    question=f"Do interpolation, NTK and YaRN repair a model read at {TIMES} times its trained length?",
    config="../byte_lm.py",
    arms=(Arm("rope"),),
    comparisons=(
      better("interpolation-repairs", "linear", "Position interpolation (2306.15595) lowers the loss"),
      better("ntk-repairs", "ntk", "NTK-aware scaling lowers the loss"),
      better("yarn-repairs", "yarn", "YaRN (2309.00071) lowers the loss"),
      Comparison(
        "yarn-below-interpolation",
        "YaRN is below interpolation",
        "rope",
        "less",
        metric=f"{at}_yarn",
        baseline="rope",
        baseline_metric=f"{at}_linear",
      ),
    ),
    budgets=budgets(
      seeds=5, **{"train.seq_len": TRAINED, "train.batch_size": 16, "model.max_seq_len": TIMES * TRAINED}
    ),
    measures=(rescaled(scalings, TIMES),),
    notes="All four losses are of the same weights. The papers train on for a while after rescaling; this does not.",
  )
