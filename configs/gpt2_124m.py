"""GPT-2 small on OpenWebText, on one GPU or eight: the reproduction that others publish, for comparison.

124,475,904 parameters, with the vocabulary padded to 50,304.

Expected: 2.85 nats a token on held-out OpenWebText after 600,000 steps (nanoGPT's figure for this recipe;
the released weights give 3.11 there, a domain gap). Not run by this project yet: compiled, not executed.
Cost: 295 B tokens, 2.4e20 FLOPs; nanoGPT took about 4 days on 8 A100.
Memory: 6.5 GiB of 79.1 on an H100, with 12 rows at a time (compiled).
Command: llmarch train --config=configs/gpt2_124m.py:FOLDER --workdir=runs/gpt2
         llmarch compile --config=configs/gpt2_124m.py --topology=h100:1 --phase=train
         on 8 devices: --config.mesh=data=8 --config.train.grad_accum=5
Needs the package `datasets`, and GPT-2's tokenizer.json in the folder given after the colon.
"""

from ml_collections import ConfigDict

from llmarch.build import to_dict
from llmarch.presets import PRESETS


def get_config(tokenizer: str = "gpt2") -> ConfigDict:
  model = to_dict(PRESETS["gpt_2_small"]())
  model["vocab_size"] = 50304  # 50257 up to a multiple of 64, as nanoGPT
  model["precision"]["compute"] = "bfloat16"
  return ConfigDict(
    {
      "model": model,
      "data": {
        "source": {"kind": "hf", "path": "Skylion007/openwebtext"},
        "tokenizer": tokenizer,
        "validation_fraction": 0.0005,
      },
      "optimizer": {
        "algorithm": {"kind": "adamw", "b1": 0.9, "b2": 0.95},
        "schedule": {"kind": "cosine", "warmup": 2000, "final": 0.1},
        "learning_rate": 6e-4,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
      },
      "train": {"steps": 600_000, "batch_size": 480, "seq_len": 1024, "grad_accum": 40, "log_every": 100},
      "eval": {"every": 2000, "batches": 20},
      "checkpoint": {"every": 5000},
    }
  )
