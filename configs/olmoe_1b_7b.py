"""A small mixture of experts from nothing, on eight H100 or on 64 TPU v5p chips: OLMoE's diagram (2409.02060).

6,919,161,856 parameters, of which a token meets 1.3 B: 8 of 64 experts a layer. Experts are split over the mesh axis
`expert`, and tokens go to them and back. The argument names the machine: "h100_8" or "v5p_64". Both compute the same
run.

Expected: no number yet (compiled, not executed).
Cost: 25,000 steps of 1024 x 4096 tokens (105 B), 8.3e20 FLOPs; at 40 % of the peak,
      3 days on eight H100 or 20 hours on 64 v5p.
Memory: 57.9 GiB of 79.1 on each H100 (compiled); on each v5p parameters, gradients and moments are 2.4 GiB, by
        formula, and the rest is not compiled yet.
Command: llmarch train --config=configs/olmoe_1b_7b.py:h100_8 --workdir=runs/olmoe --config.data.tokenizer=FOLDER
         llmarch compile --config=configs/olmoe_1b_7b.py:h100_8 --topology=h100:8 --phase=train
         llmarch compile --config=configs/olmoe_1b_7b.py:v5p_64 --topology=v5p:4x4x4 --phase=train
Needs the package `datasets`, and a FOLDER with the tokenizer.json of OLMo.
"""

from ml_collections import ConfigDict

from llmarch.build import to_dict
from llmarch.errors import pick
from llmarch.presets import PRESETS

# name: mesh, and the parts that a batch is cut into
MACHINES = {"h100_8": ("expert=8", 32), "v5p_64": ("fsdp=8,expert=8", 2)}


def get_config(machine: str = "h100_8") -> ConfigDict:
  mesh, grad_accum = pick(MACHINES, machine, "machine")
  model = to_dict(PRESETS["olmoe_1b_7b"]())
  model["precision"]["compute"] = "bfloat16"
  return ConfigDict(
    {
      "model": model,
      "data": {
        "source": {"kind": "hf", "path": "allenai/OLMoE-mix-0924"},
        "tokenizer": "runs/olmo_tokenizer",
        "validation_fraction": 0.0002,
      },
      "optimizer": {"schedule": {"kind": "cosine", "warmup": 2500}, "learning_rate": 4e-4},
      "train": {
        "steps": 25_000,
        "batch_size": 1024,
        "seq_len": 4096,
        "grad_accum": grad_accum,
        "remat": "full",
      },
      "eval": {"every": 1000, "batches": 2, "sample_tokens": 0},
      "checkpoint": {"every": 500},
      "mesh": mesh,
    }
  )
