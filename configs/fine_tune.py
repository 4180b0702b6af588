"""Fine-tuning of a checkpoint: all parameters, LoRA adapters, or QLoRA (adapters on a frozen base in nf4).

The argument is "full", "lora" or "qlora", and after a comma the folder of the model (of transformers, of
`llmarch convert`, or a run): its architecture, weights and tokenizer are used. Without a folder it is Llama 3 8B
(8,030,261,248 parameters), for which the figures below are. `full` wants eight H100 for that size, the others one.

Expected: no number yet (planned; neither compiled nor executed).
Cost: 500 steps of 16 x 2048 tokens (16 M), 7.6e17 FLOPs in full and 5.2e17 with adapters: at 40 %
      of the peak, 4 minutes on eight H100, or 22 on one with adapters.
Memory: by formula, not compiled yet: all parameters with gradients and moments 15 GiB on each of eight H100; a frozen
        base 15 GiB (lora) or 5.6 GiB (qlora) on one. Activations come on top.
Command: llmarch convert --from=HF_FOLDER --to=runs/model
         llmarch train --config=configs/fine_tune.py:qlora,runs/model --workdir=runs/qlora
         llmarch train --config=configs/fine_tune.py:lora,runs/model --workdir=runs/lora
         llmarch train --config=configs/fine_tune.py:full,runs/model --workdir=runs/tuned --config.mesh=fsdp=8
         llmarch compile --config=configs/fine_tune.py:qlora --topology=h100:1 --phase=train
         llmarch compile --config=configs/fine_tune.py:lora --topology=h100:1 --phase=train
         llmarch compile --config=configs/fine_tune.py:full --topology=h100:8 --phase=train --mesh=fsdp=8
Your own text: --config.data.source='{"kind": "jsonl", "paths": ["text/*.jsonl"]}'. The result for others:
         llmarch convert --from=runs/qlora --to=runs/qlora_hf --format=hf
"""

from ml_collections import ConfigDict

from llmarch.build import to_dict
from llmarch.commands.common import load_config
from llmarch.errors import pick

ADAPTERS = {
  "full": None,
  "lora": {"rank": 16, "alpha": 32.0},
  "qlora": {"rank": 16, "alpha": 32.0, "weights": "nf4"},
}


def get_config(how: str = "lora") -> ConfigDict:
  method, _, folder = how.partition(",")
  lora = pick(ADAPTERS, method, "way of fine-tuning")
  base = to_dict(load_config(folder or "llama_3_8b"))
  model = base["model"]
  model["precision"] |= {"param": "float32" if lora is None else "bfloat16", "compute": "bfloat16"}
  return ConfigDict(
    {
      "model": model,
      "data": {"source": {"kind": "stdlib"}, "tokenizer": base["data"]["tokenizer"], "packing": "documents"},
      "optimizer": {
        "schedule": {"kind": "cosine", "warmup": 20},
        "learning_rate": 1e-5 if lora is None else 2e-4,
        "weight_decay": 0.0,
      },
      "train": {
        "steps": 500,
        "batch_size": 16,
        "seq_len": min(2048, model["max_seq_len"]),
        "grad_accum": 2,
        "remat": "full",
        "init_from": folder or "runs/model",
        "lora": lora,
      },
      "eval": {"every": 100, "batches": 8},
      "checkpoint": {"every": 100},
    }
  )
