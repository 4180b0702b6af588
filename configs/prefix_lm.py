"""A prefix language model of bytes on two CPU cores: the first part of each piece is seen both ways (1910.10683).

The model is that of tiny.py at 793,728 parameters, with two changes: mask=prefix in the mixer, and train.loss=prefix,
which draws a prefix for each piece and counts the rest alone. Both must be set; without the mask this is a causal model
that is judged on the second parts.

Expected: no number yet (planned, not run). Losses of two runs are comparable if both have the same train.loss.
Cost: 1500 steps of 8 x 256 bytes, 1.7e13 FLOPs; 4 to 6 minutes on 2 CPU cores.
Memory: below 1 GiB.
Command: llmarch train --config=configs/prefix_lm.py --workdir=runs/prefix_lm
         llmarch generate --from=runs/prefix_lm --prefix --prompt='def main('
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "model": {
        "d_model": 128,
        "vocab_size": 264,
        "max_seq_len": 256,
        "stack": "4*layer",
        "blocks": {
          "layer": {
            "mixer": {
              "kind": "attention",
              "num_heads": 4,
              "num_kv_heads": 2,
              "position": {"kind": "rope"},
              "mask": {"kind": "prefix"},
            },
            "ffn": {"kind": "mlp", "d_ff": 344},
            "norm": {"kind": "rmsnorm"},
          }
        },
        "head": {"tied": False},
        "embed_init": {"kind": "normal", "stddev": 1.0},
        "final_norm": {"kind": "rmsnorm"},
      },
      "data": {"source": {"kind": "stdlib"}, "tokenizer": "bytes"},
      "optimizer": {
        "algorithm": {"kind": "muon", "adam_learning_rate_ratio": 0.2},
        "schedule": {"kind": "cosine", "warmup": 50},
        "learning_rate": 0.02,
      },
      "train": {"steps": 1500, "batch_size": 8, "seq_len": 256, "log_every": 50, "loss": "prefix"},
      "eval": {"every": 500, "batches": 32, "sample_tokens": 0},
      "checkpoint": {"every": 500},
    }
  )
