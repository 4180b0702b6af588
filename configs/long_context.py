"""Rows of 131,072 tokens: a Llama of 3.21 B parameters trained on, its length split over devices (ring attention).

The sizes are those of Llama 3.2 3B (3,212,749,824 parameters). The mesh axis `context` splits each row, so that a chip
holds 32,768 or 16,384 tokens of it; `fsdp` splits rows, parameters and moments. The argument names the machine:
"h100_8" or "v5p_64". Both compute the same run.

Expected: no number yet (planned; neither compiled nor executed).
Cost: 1,000 steps of 8 x 131,072 tokens (1 B), 9.1e19 FLOPs, most of them of attention; at 40 %
      of the peak, 8 hours on eight H100 or 2 on 64 v5p.
Memory: parameters, gradients and moments are 24 GiB on each H100 and 6 on each v5p, by formula; not compiled yet.
Command: llmarch convert --from=HF_FOLDER --to=runs/llama_3_2_3b
         llmarch train --config=configs/long_context.py:h100_8 --workdir=runs/long --config.train.init_from=FOLDER
         llmarch compile --config=configs/long_context.py:h100_8 --topology=h100:8 --phase=train
         llmarch compile --config=configs/long_context.py:v5p_64 --topology=v5p:4x4x4 --phase=train
Your own long documents: --config.data.source='{"kind": "jsonl", "paths": ["books/*.jsonl"]}'
"""

from ml_collections import ConfigDict

from llmarch.build import to_dict
from llmarch.errors import pick
from llmarch.presets import PRESETS

# name: mesh, and the parts that a batch is cut into
MACHINES = {"h100_8": ("fsdp=2,context=4", 4), "v5p_64": ("fsdp=8,context=8", 1)}


def get_config(machine: str = "h100_8") -> ConfigDict:
  mesh, grad_accum = pick(MACHINES, machine, "machine")
  model = to_dict(PRESETS["llama_3_2_3b"]())
  model["precision"]["compute"] = "bfloat16"
  return ConfigDict(
    {
      "model": model,
      "data": {
        "source": {"kind": "hf", "path": "emozilla/pg19"},
        "tokenizer": "runs/llama_3_2_3b",
      },
      "optimizer": {"schedule": {"kind": "cosine", "warmup": 50}, "learning_rate": 2e-5},
      "train": {
        "steps": 1000,
        "batch_size": 8,
        "seq_len": 131_072,
        "grad_accum": grad_accum,
        "remat": "full",
        "log_every": 1,
      },
      "eval": {"every": 100, "batches": 2, "sample_tokens": 0},
      "checkpoint": {"every": 100},
      "mesh": mesh,
    }
  )
