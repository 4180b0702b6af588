"""Position schemes trained on 64 tokens and judged on 1, 2, 4 and 8 times as many."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets
from llmarch.lab.measures import losses_at_lengths

TRAINED, LONGEST = 64, 512
MIXER = "model.blocks.layer.mixer"


def at_embedding(position: dict) -> dict:
  return {f"{MIXER}.position": None, "model.embed.position": position}


def get_ablation() -> Ablation:
  learned = {"kind": "learned", "length": LONGEST}
  rises = lambda id, what, arm, by: Comparison(
    id, what, arm, "greater", by, metric=f"loss_{id[-2:]}", baseline=arm, baseline_metric="loss_1x"
  )
  worse = lambda id, what, arm, baseline: Comparison(
    id, what, arm, "greater", metric=f"rise_{id[-2:]}", baseline=baseline
  )
  return Ablation(
    title="Positions beyond the trained length",
    question=f"Trained on {TRAINED} tokens, which position schemes still work on more (2108.12409)?",
    config="../byte_lm.py",
    arms=(
      Arm("rope"),
      Arm("alibi", {f"{MIXER}.position": {"kind": "alibi"}}),
      Arm("t5_bias", {f"{MIXER}.position": {"kind": "t5_bias"}}),
      Arm("sinusoidal", at_embedding({"kind": "sinusoidal"}) | {"model.embed.scale": 128**0.5}),
      Arm("learned", at_embedding(learned)),
      Arm("none", {f"{MIXER}.position": None}),
    ),
    comparisons=(
      Comparison(
        "alibi-flat-at-4x",
        "ALiBi's loss at 4 times the length is below that at the trained one",
        "alibi",
        "less",
        0.0,
        metric="loss_4x",
        baseline_metric="loss_1x",
        baseline="alibi",
      ),
      rises("rope-rises-at-2x", "RoPE's loss rises by 0.03 at 2 times the length", "rope", 0.03),
      rises("rope-degrades-at-4x", "RoPE's loss rises by 0.1 at 4 times the length", "rope", 0.1),
      worse("sinusoidal-worse-than-rope-at-4x", "Sinusoids rise more than RoPE", "sinusoidal", "rope"),
      worse(
        "learned-worse-than-sinusoidal-at-4x", "Learned positions rise more than sinusoids", "learned", "sinusoidal"
      ),
      Comparison(
        "rope-below-sinusoidal-at-2x",
        "At 2 times the length RoPE's loss is below that of sinusoids",
        "rope",
        "less",
        metric="loss_2x",
        baseline="sinusoidal",
      ),
    ),
    budgets=budgets(
      seeds=3, noise_seeds=4, **{"train.seq_len": TRAINED, "train.batch_size": 16, "model.max_seq_len": LONGEST}
    ),
    measures=(losses_at_lengths(2, 4, 8),),
    notes="A learned table has rows for all 512 positions; those above 64 are as they were drawn. Longer rows give each"
    " byte more context, so that a scheme which extrapolates has a lower loss there.",
  )
