"""The bench's small Llama: d_model 512, 8 layers, 8 heads, 4 key-value heads, d_ff 1536, vocabulary 8192, f32.

Number: the ratio of its tokens/s to transformers' LlamaForCausalLM of the same shape (README, results).
Cost: about 6 minutes on 2 CPU cores.
Command: llmarch bench --config=benchmarks/llama_512.py --peer=benchmarks/transformers_llama.py
"""

from ml_collections import ConfigDict


def get_config():
  block = dict(
    mixer=dict(kind="attention", num_heads=8, num_kv_heads=4, position=dict(kind="rope", theta=10000.0)),
    ffn=dict(kind="mlp", d_ff=1536, activation="silu", gated=True),
    norm=dict(kind="rmsnorm", eps=1e-6),
  )
  return ConfigDict(
    dict(
      model=dict(
        d_model=512,
        vocab_size=8192,
        max_seq_len=1024,
        stack="8*layer",
        blocks=dict(layer=block),
        final_norm=dict(kind="rmsnorm", eps=1e-6),
        head=dict(tied=False),
      ),
      train=dict(batch_size=8, seq_len=512),
    )
  )
