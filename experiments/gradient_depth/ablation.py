"""Gradients at initialisation, layer by layer and against depth: post-norm and pre-norm, decoders and an encoder."""

import math

from llmarch.lab.ablation import ZERO, Ablation, Arm, Budget, Comparison
from llmarch.lab.measures import initial_gradients

LAYER = "model.blocks.layer"
POST = {f"{LAYER}.residual": "post", "model.final_norm": None}
BASE = {
  "model.init": {"kind": "xavier"},
  f"{LAYER}.norm": {"kind": "layernorm"},
  f"{LAYER}.ffn": {"kind": "mlp", "d_ff": 512, "activation": "relu", "gated": False, "bias": True},
  "model.final_norm": {"kind": "layernorm"},
  "train.batch_size": 8,
  "train.seq_len": 64,
}
CLOSE = math.log(1.15)


def get_ablation() -> Ablation:
  places = (("pre", {}), ("post", POST))
  arms = [
    Arm(f"{place}_{depth}", {**change, "model.stack": f"{depth}*layer"})
    for place, change in places
    for depth in (6, 12, 24)
  ]
  encoder = {f"{LAYER}.mixer.mask": "bidirectional", "model.stack": "12*layer"}
  arms += [Arm(f"encoder_{place}_12", {**change, **encoder}) for place, change in places]
  root = -math.log(4) / 2  # of a gradient that falls as 1/sqrt(L), from 6 to 24 layers
  last = {"metric": "log_last_gradient"}
  profile = {"metric": "log_up_last_over_first", "baseline_metric": ZERO}

  def over(id: str, statement: str, arm: str, expect: str) -> Comparison:
    return Comparison(id, statement, arm, expect, math.log(2), baseline=arm, **profile)

  return Ablation(
    title="Gradients, depth and layers",
    question="How do gradients at initialisation change with depth, and from layer to layer (2002.04745)?",
    config="../byte_lm.py",
    arms=tuple(arms),
    comparisons=(
      Comparison(
        "post-constant-in-depth",
        "Post-norm: from 6 to 24 layers the same, within 15 %",
        "post_24",
        "equal",
        CLOSE,
        baseline="post_6",
        **last,
      ),
      Comparison(
        "pre-falls-with-root-depth",
        "Pre-norm: from 6 to 24 layers half, within 15 %",
        "pre_24",
        "equal",
        CLOSE,
        root,
        baseline="pre_6",
        **last,
      ),
      over(
        "encoder-post-vanishes",
        "An encoder, post-norm: the last layer has more than twice the first's",
        "encoder_post_12",
        "greater",
      ),
      over(
        "encoder-pre-uniform",
        "An encoder, pre-norm: the first and the last layer are alike, within a factor of 2",
        "encoder_pre_12",
        "equal",
      ),
      over(
        "decoder-post-vanishes",
        "A decoder, post-norm: the last layer has more than twice the first's",
        "post_12",
        "greater",
      ),
    ),
    budgets={"tiny": Budget(seeds=4, overrides=BASE)},
    trial=initial_gradients,
    metric="last_gradient",
    notes="Norms of gradients of feed-forwards: over depth that of the last layer's second matrix (down), over layers"
    " that of the first (up). An encoder sees both ways. Nothing is trained.",
  )
