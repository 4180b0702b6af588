"""The decoders of OLMo: a LayerNorm without parameters, or RMSNorm after each branch."""

from llmarch.convert.fields import Family, Key, Rope, Window, every
from llmarch.convert.tables.parts import (
  ATTENTION_BIAS,
  ENDS,
  HEAD_DIM,
  QK_NORM,
  WHOLE_QK,
  L,
  attention,
  gated,
  llama_like,
  model,
  norm,
  projections,
  rms,
)

OLMO = (
  *ENDS,
  *norm(f"{L}.post_attention_layernorm", "mixer_norm"),
  *norm(f"{L}.post_feedforward_layernorm", "ffn_norm"),
  *projections(f"{L}.self_attn"),
  *QK_NORM,
  *gated(f"{L}.mlp"),
)
NO_PARAMETERS = {"kind": "layernorm", "eps": 1e-5, "scale": False, "bias": False}


def olmo2(model_type: str, architecture: str, **mixer) -> Family:
  """Norms after each branch, and of all queries or keys at once."""
  norm = rms(default=1e-5)
  block = {"mixer": attention(**HEAD_DIM, **mixer, **WHOLE_QK, **ATTENTION_BIAS), "norm": norm, "residual": "output"}
  return llama_like(model_type, architecture, {}, block=block, model=model(norm), rows=OLMO)


FAMILIES = (
  llama_like(
    "olmo",
    "OlmoForCausalLM",
    {**HEAD_DIM, "position": Rope(), "qkv_clip": Key("clip_qkv", None), **ATTENTION_BIAS},
    model=model(NO_PARAMETERS),
    block={"norm": NO_PARAMETERS},
  ),
  olmo2("olmo2", "Olmo2ForCausalLM", position=Rope()),
  olmo2(
    "olmo3",
    "Olmo3ForCausalLM",
    window=Window(4096, types=every(4)),
    position=Rope(theta=5e5, by_type=True, types=every(4)),
  ),
)
