"""Llama 3 8B from nothing, on 64 TPU v5p chips or on eight H100: 8,030,261,248 parameters, rows of 8192 tokens.

The argument names the machine, which decides the mesh and how many rows go through at once: "v5p_64" or "h100_8". Both
compute the same run.

Expected: no number yet (compiled, not executed).
Cost: 40,000 steps of 512 x 8192 tokens (168 B, 20 a parameter), 8.6e21 FLOPs; at 40 % of the
      peak, 8.5 days on 64 v5p or a month on eight H100.
Memory: 32.4 GiB of 95.7 on each v5p, and 38.7 GiB of 79.1 on each H100 (compiled).
Command: llmarch train --config=configs/llama_3_8b.py:v5p_64 --workdir=runs/llama_3_8b --config.data.tokenizer=FOLDER
         llmarch compile --config=configs/llama_3_8b.py:v5p_64 --topology=v5p:4x4x4 --phase=train
         llmarch compile --config=configs/llama_3_8b.py:h100_8 --topology=h100:8 --phase=train
Needs the package `datasets`, and a FOLDER with the tokenizer.json of Llama 3.
On several hosts: docs/train_on_a_mesh.md.
"""

from ml_collections import ConfigDict

from llmarch.build import to_dict
from llmarch.errors import pick
from llmarch.presets import PRESETS

# name: mesh, and the parts that a batch is cut into
MACHINES = {"v5p_64": ("fsdp=64", 2), "h100_8": ("fsdp=8", 16)}


def get_config(machine: str = "v5p_64") -> ConfigDict:
  mesh, grad_accum = pick(MACHINES, machine, "machine")
  model = to_dict(PRESETS["llama_3_8b"]())
  model["precision"]["compute"] = "bfloat16"
  return ConfigDict(
    {
      "model": model,
      "data": {
        "source": {"kind": "hf", "path": "HuggingFaceFW/fineweb-edu", "name": "sample-350BT"},
        "tokenizer": "runs/llama_3_tokenizer",
        "packing": "documents",
        "validation_fraction": 0.0002,
      },
      "optimizer": {"schedule": {"kind": "cosine", "warmup": 2000}, "learning_rate": 3e-4},
      "train": {
        "steps": 40_000,
        "batch_size": 512,
        "seq_len": 8192,
        "grad_accum": grad_accum,
        "remat": "full",
        "z_loss": 1e-4,
      },
      "eval": {"every": 1000, "batches": 2, "sample_tokens": 0},
      "checkpoint": {"every": 500},
      "mesh": mesh,
    }
  )
