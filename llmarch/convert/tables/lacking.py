"""Why a model_type that is known is not read: the end of the sentence that refuses it.

An entry goes when its family gets a table.
"""

_DELTA = "layers of the gated delta rule, and attention whose output is gated"
_SSM = "state-space layers (Mamba)"
_SPARSE = "attention to a part of the keys, which an indexer chooses"
_ENCODER = "it is an encoder, and only decoders are read"
_BOTH = "it is an encoder with a decoder, and only decoders alone are read"
_CODE = "its options and weights are those of its own code, which transformers has not, and no table has them"
_LLAMA4 = (
  "attention in chunks, norms of queries and keys without a scale, and experts whose input is scaled by their gate"
)
_GEMMA4 = "norms of values, a scale of each layer, rotary positions of type proportional, and keys that are values too"
_GEMMA3N = "embeddings for each layer, several residual streams (AltUp) and low-rank residual branches (LAuReL)"

_HAS = {
  **dict.fromkeys(("llama4", "llama4_text"), _LLAMA4),
  **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _GEMMA4),
  **dict.fromkeys(("gemma3n", "gemma3n_text"), _GEMMA3N),
  **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), "norms of queries and keys after the rotary positions"),
  "phimoe": "SparseMixer's choice of experts (2409.12136)",
  **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _DELTA),
  **dict.fromkeys(("kimi_linear", "kimi_k3", "olmo_hybrid"), "layers of the delta rule"),
  **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba", "nemotron_h", "zamba"), _SSM),
  **dict.fromkeys(("zamba2", "granitemoehybrid", "plamo2"), _SSM),
  **dict.fromkeys(("rwkv", "rwkv5", "rwkv6", "rwkv7"), "layers of RWKV"),
  "xlstm": "layers of xLSTM",
  "recurrent_gemma": "recurrences of type RG-LRU, with a convolution",
  **dict.fromkeys(("lfm2", "lfm2_moe"), "gated convolutions in the place of attention"),
  "minimax": "linear attention with a decay for each head (Lightning)",
  **dict.fromkeys(("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text", "deepseek_v32", "glm_moe_dsa"), _SPARSE),
  **dict.fromkeys(("deepseek_v4", "deepseek_ref"), "compressed keys (CSA, HCA) and several residual streams"),
  "mllama": "layers that attend to an image alone",
  "mimo_v2_flash": "values of another width than keys, and sinks in a part of the layers",
  "step3p7": "a gate for each head of attention, and other numbers of heads in layers with a window",
  "nemotron-nas": "blocks without attention or without a feed-forward, each of its own shape (block_configs)",
  "baichuan": "a head whose rows are normalised from its second release on, of which its files say nothing",
  "yuan": "a convolution before attention",
  "bitnet": "ternary weights and norms inside of the branches",
  "diffllama": "differences of two attentions",
  "apertus": "the activation xIELU",
  "afmoe": "a gate on the output of attention",
  "qwen3_omni_moe": "three decoders at once",
}
LACKING: dict[str, str] = {
  **{name: f"it has {part}, which no config here can say" for name, part in _HAS.items()},
  **dict.fromkeys(("chatglm", "deepseek", "phi-msft", "phi3_v", "qwen"), _CODE),
  **dict.fromkeys(("aquila", "skywork", "xverse", "Yi"), _CODE),
  **dict.fromkeys(("albert", "bert", "clip", "clip_text_model", "deberta", "deberta-v2", "distilbert"), _ENCODER),
  **dict.fromkeys(("electra", "modernbert", "mpnet", "nomic_bert", "roberta", "siglip", "xlm-roberta"), _ENCODER),
  **dict.fromkeys(("bart", "blenderbot", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "pegasus"), _BOTH),
  **dict.fromkeys(("switch_transformers", "t5", "t5gemma", "umt5", "whisper"), _BOTH),
}
