"""The defaults of transformers for options that a config.json leaves out and for which a table names no other.

A file written by hand, or by an old version, may lack any of these; tests/test_checkpoints.py compares them with
transformers.
"""

from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 32000,
  },
  "mistral": {
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000,
  },
  "qwen2": {
    "hidden_size": 4096, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "sliding_window": 4096, "vocab_size": 151936,
  },
  "qwen3": {
    "hidden_size": 4096, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "sliding_window": 4096, "vocab_size": 151936,
  },
  "gemma": {
    "hidden_size": 3072, "intermediate_size": 24576, "max_position_embeddings": 8192, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 16, "vocab_size": 256000,
  },
  "gemma2": {
    "final_logit_softcapping": 30.0, "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192,
    "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "vocab_size": 256000,
  },
  "gemma3_text": {
    "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 131072, "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "use_bidirectional_attention": False, "vocab_size": 262208,
  },
  "gpt2": {
    "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
  },
  "gpt_neox": {
    "hidden_size": 6144, "intermediate_size": 24576, "max_position_embeddings": 2048, "num_attention_heads": 64,
    "num_hidden_layers": 44, "vocab_size": 50432,
  },
  "gptj": {
    "n_embd": 4096, "n_head": 16, "n_layer": 28, "n_positions": 2048, "rotary_dim": 64, "vocab_size": 50400,
  },
  "gpt_neo": {
    "hidden_size": 2048, "max_position_embeddings": 2048, "num_heads": 16, "num_layers": 24, "vocab_size": 50257,
  },
  "olmo": {
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 50304,
  },
  "olmo2": {
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 50304,
  },
  "olmo3": {
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 50304,
  },
  "phi3": {
    "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 32064,
  },
  "granite": {
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 32000,
  },
  "granitemoe": {
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_local_experts": 8, "vocab_size": 32000,
  },
  "mixtral": {
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "vocab_size": 32000,
  },
  "qwen2_moe": {
    "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 32768, "moe_intermediate_size": 1408,
    "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632, "sliding_window": 4096, "vocab_size": 151936,
  },
  "qwen3_moe": {
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 32768, "moe_intermediate_size": 768,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 24,
    "num_key_value_heads": 4, "vocab_size": 151936,
  },
  "olmoe": {
    "hidden_size": 2048, "intermediate_size": 2048, "max_position_embeddings": 4096, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "vocab_size": 50304,
  },
  "gpt_oss": {
    "rope_parameters": {
      "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
      "original_max_position_embeddings": 4096,
    },
    "hidden_size": 2880, "intermediate_size": 2880, "max_position_embeddings": 131072, "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 36, "num_key_value_heads": 8, "num_local_experts": 128,
    "vocab_size": 201088,
  },
  "dbrx": {
    "d_model": 2048, "max_seq_len": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 32000,
  },
  "deepseek_v2": {
    "first_k_dense_replace": 0, "hidden_size": 4096, "intermediate_size": 11008, "kv_lora_rank": 512,
    "max_position_embeddings": 2048, "moe_intermediate_size": 1407, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_attention_heads": 32, "num_hidden_layers": 32, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 102400,
  },
  "deepseek_v3": {
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 4096, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "topk_group": 4, "v_head_dim": 128,
    "vocab_size": 129280,
  },
  "starcoder2": {
    "hidden_size": 3072, "intermediate_size": 12288, "max_position_embeddings": 4096, "num_attention_heads": 24,
    "num_hidden_layers": 30, "num_key_value_heads": 2, "vocab_size": 49152,
  },
  "stablelm": {
    "hidden_size": 2560, "intermediate_size": 6912, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 50304,
  },
  "falcon": {
    "hidden_size": 4544, "max_position_embeddings": 2048, "num_attention_heads": 71, "num_hidden_layers": 32,
    "vocab_size": 65024,
  },
  "mpt": {
    "d_model": 2048, "max_seq_len": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50368,
  },
  "opt": {
    "ffn_dim": 3072, "hidden_size": 768, "max_position_embeddings": 2048, "num_attention_heads": 12,
    "num_hidden_layers": 12, "vocab_size": 50272,
  },
  "bloom": {
    "hidden_size": 64, "n_head": 8, "n_layer": 2, "vocab_size": 250880,
  },
  "phi": {
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 24, "vocab_size": 51200,
  },
  "cohere": {
    "hidden_size": 8192, "intermediate_size": 22528, "max_position_embeddings": 8192, "num_attention_heads": 64,
    "num_hidden_layers": 40, "vocab_size": 256000,
  },
  "cohere2": {
    "hidden_size": 8192, "intermediate_size": 22528, "max_position_embeddings": 8192, "num_attention_heads": 64,
    "num_hidden_layers": 40, "vocab_size": 256000,
  },
  "nemotron": {
    "hidden_size": 6144, "intermediate_size": 24576, "max_position_embeddings": 4096, "num_attention_heads": 48,
    "num_hidden_layers": 32, "vocab_size": 256000,
  },
  "smollm3": {
    "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 32768, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "vocab_size": 128256,
  },
  "glm4": {
    "head_dim": 128, "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 2, "vocab_size": 151552,
  },
  "ministral": {
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000,
  },
  "ministral3": {
    "rope_parameters": {
      "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
      "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 262144, "num_attention_heads": 32,
    "num_hidden_layers": 34, "num_key_value_heads": 8, "vocab_size": 131072,
  },
  "gpt_bigcode": {
    "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
  },
  "codegen": {
    "n_embd": 4096, "n_head": 16, "n_layer": 28, "n_positions": 2048, "rotary_dim": 64, "vocab_size": 50400,
  },
  "exaone4": {
    "hidden_size": 4096, "intermediate_size": 16384, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 102400,
  },
  "glm4_moe": {
    "first_k_dense_replace": 1, "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
    "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8,
    "topk_group": 1, "vocab_size": 151552,
  },
  "minimax_m2": {
    "head_dim": 128, "hidden_size": 3072, "intermediate_size": 1536, "max_position_embeddings": 196608,
    "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
    "num_local_experts": 256, "vocab_size": 200064,
  },
  "glm": {
    "head_dim": 128, "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 131072,
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "vocab_size": 151552,
  },
  "arcee": {
    "hidden_size": 2560, "intermediate_size": 18432, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "vocab_size": 32000,
  },
  "seed_oss": {
    "head_dim": 128, "hidden_size": 4096, "intermediate_size": 27648, "max_position_embeddings": 524288,
    "num_attention_heads": 80, "num_hidden_layers": 64, "num_key_value_heads": 8, "vocab_size": 155136,
  },
  "ernie4_5": {
    "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072,
    "num_attention_heads": 16, "num_hidden_layers": 18, "num_key_value_heads": 2, "vocab_size": 103424,
  },
}  # fmt: skip
