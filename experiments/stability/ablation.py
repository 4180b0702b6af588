"""Ten times the learning rate: what QK-norm, z-loss and a soft-cap save."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets
from llmarch.lab.measures import partition, spike

MIXER = "model.blocks.layer.mixer"


def get_ablation() -> Ablation:
  base = {
    "optimizer.learning_rate": 3e-2,
    "optimizer.schedule": {"kind": "constant"},
    "optimizer.clip_norm": None,
    "optimizer.weight_decay": 0.0,
    "train.steps": 200,
    "train.log_every": 2,
  }
  usual = {"baseline": "usual rate", "expect": "greater", "by": 0.3}
  below = lambda id, what, arm: Comparison(id, what, arm, "less")
  return Ablation(
    title="Raised learning rates",
    question="At ten times the learning rate, no warm-up and no clipping, which guard keeps a run going?",
    config="../byte_lm.py",
    arms=(
      Arm("bare"),
      Arm("qk_norm", {f"{MIXER}.qk_norm": {"norm": {"kind": "rmsnorm"}}}),
      Arm("z_loss", {"train.z_loss": 1e-4}),
      Arm("softcap", {f"{MIXER}.softcap": 50.0}),
      Arm("clipped", {"optimizer.clip_norm": 1.0}),
      Arm("usual rate", {"optimizer.learning_rate": 3e-3}),
    ),
    comparisons=(
      Comparison(
        "raised-rate-spikes",
        "The bare run's loss spikes higher than at the usual rate",
        "bare",
        metric="spike",
        **usual,
      ),
      Comparison("raised-rate-fails", "The bare run ends above one at the usual rate", "bare", **usual),
      below("qk-norm-survives", "QK-norm ends below the bare run", "qk_norm"),
      below("z-loss-survives", "z-loss ends below the bare run", "z_loss"),
      below("softcap-survives", "A soft-cap of 50 on the scores ends below the bare run", "softcap"),
      Comparison("z-loss-shrinks-log-z", "z-loss makes log^2 Z smaller", "z_loss", "less", metric="log_z_squared"),
    ),
    budgets=budgets(seeds=3, noise_seeds=4, **base),
    measures=(partition, spike),
    notes="A spike is the largest rise of the training loss above its lowest before, of every other step.",
  )
