"""The decoders of Gemma: zero-centred RMSNorm before and after each branch, a gated feed-forward with GELU."""

import dataclasses
import math

from llmarch.convert.fields import Derived, Family, Key, MaxLength, Rope, Size, Window, every
from llmarch.convert.tables.parts import (
  ATTENTION_BIAS,
  ENDS,
  LLAMA,
  QK_NORM,
  L,
  activation,
  attention,
  gated,
  mlp,
  model,
  norm,
  projections,
  rms,
  whole,
)

SANDWICH = (
  *norm(f"{L}.input_layernorm", "mixer_norm"),
  *norm(f"{L}.post_attention_layernorm", "mixer_out_norm"),
  *norm(f"{L}.pre_feedforward_layernorm", "ffn_norm"),
  *norm(f"{L}.post_feedforward_layernorm", "ffn_out_norm"),
)
GEMMA = (*ENDS, *SANDWICH, *projections(f"{L}.self_attn"), *gated(f"{L}.mlp"), *QK_NORM)


def gemma(model_type: str, architecture: str, mixer: dict, **more) -> Family:
  """Zero-centred RMSNorm, GEGLU (tanh), embeddings times sqrt(d)."""
  norm = rms(zero_centered=True)
  return Family(
    model_type,
    architecture,
    model(
      norm,
      tied=True,
      embed={"scale": Derived(lambda h: math.sqrt(h.size("hidden_size")))},
      head={"softcap": Key("final_logit_softcapping", None)} if "softcap" in mixer else {},
      **more.pop("model", {}),
    ),
    {
      "mixer": attention(head_dim=Size("head_dim", 256), **mixer, **ATTENTION_BIAS),
      "ffn": mlp(activation=more.pop("activation", activation("hidden_activation", "gelu_pytorch_tanh"))),
      "norm": norm,
      "residual": more.pop("residual", "sandwich"),
    },
    only={"use_bidirectional_attention": (False, None)} | more.pop("only", {}),
    aliases={"_sliding_window_pattern": "sliding_window_pattern"},
    **more,
  )


def _legacy_activation() -> Key:
  """The activation of the first Gemma, whose published files say "gelu" and mean its tanh form."""
  key = activation("hidden_act", "gelu_pytorch_tanh")
  return dataclasses.replace(key, decode=lambda theirs: "gelu_tanh" if theirs == "gelu" else key.decode(theirs))


def _query_scale(key: str) -> Key:
  return Key(key, 256, lambda x: x**-0.5, lambda x: whole(x**-2))


FAMILIES = (
  gemma(
    "gemma",
    "GemmaForCausalLM",
    {"position": Rope()},
    activation=_legacy_activation(),
    residual="pre",
    rows=LLAMA,
    only={"hidden_activation": (None, "gelu_pytorch_tanh")},
  ),
  gemma(
    "gemma2",
    "Gemma2ForCausalLM",
    {
      "window": Window(4096, types=every(2)),
      "position": Rope(),
      "query_scale": _query_scale("query_pre_attn_scalar"),
      "softcap": Key("attn_logit_softcapping", 50.0),
    },
    rows=GEMMA,
    only={"hidden_act": (None, "gelu_pytorch_tanh")},
    moot=frozenset({"sliding_window_size"}),
  ),
  gemma(
    "gemma3_text",
    "Gemma3ForCausalLM",
    {
      "window": Window(4096, types=every(6)),
      "position": Rope(theta=1e6, by_type=True, local_theta=("rope_local_base_freq", 1e4), types=every(6)),
      "query_scale": _query_scale("query_pre_attn_scalar"),
      "softcap": Key("attn_logit_softcapping", None),
      "qk_norm": {"norm": {"kind": "rmsnorm", "eps": Key("rms_norm_eps", 1e-6), "zero_centered": True}},
    },
    rows=GEMMA,
    model={"max_seq_len": MaxLength(extended=True)},
  ),
)
