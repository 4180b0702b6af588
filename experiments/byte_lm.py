"""The language model that most experiments here change one thing of: bytes, 4 layers of width 128, 0.85 M parameters.

It reads the source code of the running Python's standard library (held-out files by document). RMSNorm before, RoPE,
SwiGLU, as many key-value heads as heads, untied, AdamW.

Expected: see experiments/noise.
Cost: 400 steps of 8 x 128 bytes, half a minute on one CPU core.
Command: llmarch train --config=experiments/byte_lm.py --workdir=runs/byte_lm
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "model": {
        "d_model": 128,
        "vocab_size": 264,
        "max_seq_len": 128,
        "stack": "4*layer",
        "blocks": {
          "layer": {
            "mixer": {"kind": "attention", "num_heads": 4, "position": {"kind": "rope"}},
            "ffn": {"kind": "mlp", "d_ff": 344, "activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm"},
            "residual": "pre",
          }
        },
        "head": {"tied": False},
        "final_norm": {"kind": "rmsnorm"},
      },
      "data": {"source": {"kind": "stdlib"}, "tokenizer": "bytes"},
      "optimizer": {
        "algorithm": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "warmup": 20},
        "learning_rate": 3e-3,
      },
      "train": {"steps": 400, "batch_size": 8, "seq_len": 128, "log_every": 10},
      "eval": {"every": 100, "batches": 48, "sample_tokens": 0},
      "checkpoint": {"every": 0},
    }
  )
