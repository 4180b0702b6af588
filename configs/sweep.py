"""The base of sweeps on a CPU: a decoder of 107,840 parameters on bytes, seconds a run, so that seeds are cheap.

An ablation names it and says what to change (docs/ablations.md). What differs at this size need not differ at another;
the sweep is for trying rules, code and settings before they cost anything.

Expected: 3.05 bits per byte on held-out files (seed 0, jax 0.10.2, Python 3.11.7).
Cost: 300 steps of 16 x 64 bytes, 2.1e11 FLOPs: half a minute on one CPU core.
Memory: below 1 GiB.
Command: llmarch train --config=configs/sweep.py --workdir=runs/sweep
         llmarch train --config=configs/sweep.py --workdir=runs/sweep_lion --config.optimizer.algorithm=lion
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "model": {
        "d_model": 64,
        "vocab_size": 264,
        "max_seq_len": 64,
        "stack": "2*layer",
        "blocks": {
          "layer": {
            "mixer": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "position": {"kind": "rope"}},
            "ffn": {"kind": "mlp", "d_ff": 172},
            "norm": {"kind": "rmsnorm"},
          }
        },
        "final_norm": {"kind": "rmsnorm"},
      },
      "data": {"source": {"kind": "stdlib"}, "tokenizer": "bytes"},
      "optimizer": {"schedule": {"kind": "cosine", "warmup": 20}, "learning_rate": 5e-3},
      "train": {"steps": 300, "batch_size": 16, "seq_len": 64},
      "eval": {"every": 100, "batches": 32, "sample_tokens": 0},
      "checkpoint": {"every": 0},
    }
  )
