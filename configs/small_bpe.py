"""A decoder of 3,926,272 parameters on BPE tokens of the standard library's source: the baseline of small ablations.

One block carries every layer, so an ablation is one flag (all keys can be set, named here or not):
  --config.model.blocks.layer.mixer.num_kv_heads=1            multi-query attention
  --config.model.blocks.layer.mixer.position=alibi            another position scheme, or none
  --config.model.blocks.layer.ffn.gated=false --config.model.blocks.layer.ffn.d_ff=1020   no gate, equal size
  --config.model.blocks.layer.norm=layernorm                  another norm
  --config.model.blocks.layer.residual=parallel               another placement
  --config.optimizer.algorithm=muon                           another optimizer

Expected: no number yet (planned); compare runs of equal steps over three seeds (--config.seed).
Cost: 1000 steps of 16 x 256 tokens, 1.0e14 FLOPs: about half an hour on 2 CPU cores.
Memory: below 1 GiB.
Command: llmarch tokenizer --vocab_size=4096 --out=runs/bpe4096
         llmarch train --config=configs/small_bpe.py --workdir=runs/small
         (another tokenizer: --config=configs/small_bpe.py:DIR; its vocabulary must not exceed 4096)
"""

from ml_collections import ConfigDict


def get_config(tokenizer: str = "runs/bpe4096") -> ConfigDict:
  return ConfigDict(
    {
      "model": {
        "d_model": 256,
        "vocab_size": 4096,
        "max_seq_len": 256,
        "stack": "4*layer",
        "blocks": {
          "layer": {
            "mixer": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "position": {"kind": "rope"}},
            "ffn": {"kind": "mlp", "d_ff": 680},
            "norm": {"kind": "rmsnorm"},
          }
        },
        "final_norm": {"kind": "rmsnorm"},
      },
      "data": {"source": {"kind": "stdlib"}, "tokenizer": tokenizer, "packing": "documents"},
      "optimizer": {"schedule": {"kind": "cosine", "warmup": 100}, "learning_rate": 2e-3},
      "train": {"steps": 1000, "batch_size": 16, "seq_len": 256, "z_loss": 1e-4},
      "eval": {"every": 250},
      "checkpoint": {"every": 250},
    }
  )
