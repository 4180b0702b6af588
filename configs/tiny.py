"""A modern decoder that learns Python from the standard library's source, byte by byte, on two CPU cores.

RMSNorm before, RoPE, SwiGLU, grouped queries: the diagram of Llama 3 at 793,728 parameters. It needs
no download: the text is the source of the Python that runs it.

Muon, because at this budget it is worth half as many steps again: 1.90 bits per byte against AdamW's 2.09
after 600 steps of 16 x 128.

Expected: 1.65 bits per byte on held-out files (1.649 with jax 0.10.2 and Python 3.11.7; zlib: 1.80 on the corpus).
Cost: 1500 steps of 8 x 256 bytes, 1.7e13 FLOPs; 4 to 6 minutes on 2 CPU cores.
Memory: below 1 GiB.
Command: llmarch train --config=configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "model": {
        "d_model": 128,
        "vocab_size": 264,  # 256 bytes, the end of a document, and padding to a multiple of 8
        "max_seq_len": 256,
        "stack": "4*layer",
        "blocks": {
          "layer": {
            "mixer": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "position": {"kind": "rope"}},
            "ffn": {"kind": "mlp", "d_ff": 344, "activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm"},
            "residual": "pre",
          }
        },
        "head": {"tied": False},
        "embed_init": {"kind": "normal", "stddev": 1.0},  # of the size of what the blocks add to it
        "final_norm": {"kind": "rmsnorm"},
      },
      "data": {"source": {"kind": "stdlib"}, "tokenizer": "bytes"},
      "optimizer": {
        "algorithm": {"kind": "muon", "adam_learning_rate_ratio": 0.2},
        "schedule": {"kind": "cosine", "warmup": 50},
        "learning_rate": 0.02,
      },
      "train": {"steps": 1500, "batch_size": 8, "seq_len": 256, "log_every": 50},
      "eval": {"every": 500, "batches": 32, "sample_tokens": 192, "temperature": 0.5},
      "checkpoint": {"every": 500},
    }
  )
