"""Pre-norm against post-norm, 12 layers, with and without warm-up."""

from llmarch.lab.ablation import Ablation, Arm, Comparison, budgets

LAYER = "model.blocks.layer"
POST = {f"{LAYER}.residual": "post", "model.final_norm": None}
WARMUP = {"optimizer.schedule": {"kind": "constant", "warmup": 60}}
LAYERS = 12
# 2203.00555, table 2, decoder: alpha = (2 L)^(1/4), beta = (8 L)^(-1/4).
DEEPNORM = {f"{LAYER}.skip_scale": (2 * LAYERS) ** 0.25, f"{LAYER}.init_scale": (8 * LAYERS) ** -0.25}


def get_ablation() -> Ablation:
  base = {
    "model.stack": f"{LAYERS}*layer",
    "model.init": {"kind": "xavier"},
    f"{LAYER}.norm": {"kind": "layernorm"},
    f"{LAYER}.ffn": {"kind": "mlp", "d_ff": 512, "activation": "relu", "gated": False, "bias": True},
    "model.final_norm": {"kind": "layernorm"},
    "optimizer.schedule": {"kind": "constant"},
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": None,
    "train.steps": 150,
    "train.seq_len": 64,
    "train.log_every": 5,
    "eval.every": 50,
  }
  return Ablation(
    title="Where the norm stands",
    question="Does a post-norm decoder of 12 layers train without warm-up, as a pre-norm one does (2002.04745)?",
    config="../byte_lm.py",
    arms=(
      Arm("pre"),
      Arm("post", POST),
      Arm("pre_warmup", WARMUP),
      Arm("post_warmup", POST | WARMUP),
      Arm("deepnorm", POST | DEEPNORM),
    ),
    comparisons=(
      Comparison(
        "post-fails-without-warmup", "Post-norm ends at least 0.5 nats above pre-norm", "post", "greater", 0.5
      ),
      Comparison("warmup-helps-post", "Warm-up lowers post-norm's loss", "post_warmup", "less", baseline="post"),
      Comparison("pre-needs-no-warmup", "Pre-norm without warm-up is within 0.1 of with", "pre_warmup", "equal", 0.1),
      Comparison(
        "deepnorm-trains", "DeepNorm is at least 0.5 nats below post-norm", "deepnorm", "less", 0.5, baseline="post"
      ),
    ),
    budgets=budgets(seeds=3, noise_seeds=4, **base),
    notes="Adam, no decay, no clipping, constant rate 1e-3, Xavier initialisation, LayerNorm, ReLU with biases.",
  )
