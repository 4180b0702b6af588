"""A Llama of 1.24 B parameters from nothing, on one H100 or on eight TPU v5e chips: 25 B tokens, 20 a parameter.

The sizes are those of Llama 3.2 1B (1,235,814,400 parameters) without its stretched RoPE, since rows have 4096 tokens.
The argument names the machine, which decides the mesh and how many rows go through at once: "h100" or "v5e_8". Both
compute the same run.

Expected: no number yet (compiled, not executed).
Cost: 24,000 steps of 256 x 4096 tokens, 2.1e20 FLOPs; at 40 % of the
      peak, 6 days on one H100 or 4 on eight v5e.
Memory: 27.7 GiB of 79.1 on an H100, and 9.3 GiB of 15.8 on each v5e (compiled).
Command: llmarch train --config=configs/llama_1b.py:h100 --workdir=runs/llama_1b --config.data.tokenizer=FOLDER
         llmarch compile --config=configs/llama_1b.py:h100 --topology=h100:1 --phase=train
         llmarch compile --config=configs/llama_1b.py:v5e_8 --topology=v5e:2x4 --phase=train
Needs the package `datasets`, and a FOLDER with the tokenizer.json of Llama 3.
"""

from ml_collections import ConfigDict

from llmarch.build import to_dict
from llmarch.errors import pick
from llmarch.presets import PRESETS

# name: mesh, and the parts that a batch is cut into
MACHINES = {"h100": ("", 32), "v5e_8": ("fsdp=8", 8)}


def get_config(machine: str = "h100") -> ConfigDict:
  mesh, grad_accum = pick(MACHINES, machine, "machine")
  model = to_dict(PRESETS["llama_3_2_1b"]())
  model["max_seq_len"] = 4096
  model["blocks"]["layer"]["mixer"]["position"]["scaling"] = None
  model["precision"]["compute"] = "bfloat16"
  return ConfigDict(
    {
      "model": model,
      "data": {
        "source": {"kind": "hf", "path": "HuggingFaceFW/fineweb-edu", "name": "sample-100BT"},
        "tokenizer": "runs/llama_3_tokenizer",
        "validation_fraction": 0.0005,
      },
      "optimizer": {"schedule": {"kind": "cosine", "warmup": 1000}, "learning_rate": 6e-4},
      "train": {
        "steps": 24_000,
        "batch_size": 256,
        "seq_len": 4096,
        "grad_accum": grad_accum,
        "remat": "full",
        "z_loss": 1e-4,
      },
      "eval": {"every": 1000, "batches": 8},
      "checkpoint": {"every": 1000},
      "mesh": mesh,
    }
  )
