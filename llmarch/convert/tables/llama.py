"""The decoders in the manner of Llama: RMSNorm before each branch, a gated feed-forward, rotary positions."""

from llmarch.convert.fields import Family, Key, Rope, Row, Size, SomeRope, Window
from llmarch.convert.tables.parts import (
  ATTENTION_BIAS,
  ENDS,
  HEAD_DIM,
  LLAMA,
  ORIGINAL,
  PRE,
  QK,
  QK_NORM,
  L,
  attention,
  fused,
  fused_gate,
  inverse,
  llama_like,
  mlp,
  model,
  norm,
  output,
  projections,
  rms,
)
from llmarch.errors import check


def granite(model_type: str, architecture: str, ffn: dict, **more) -> Family:
  """A llama with four multipliers."""
  return llama_like(
    model_type,
    architecture,
    {**HEAD_DIM, "position": Rope(), "query_scale": Key("attention_multiplier", 1.0), **ATTENTION_BIAS},
    model=model(
      rms(),
      embed={"scale": Key("embedding_multiplier", 1.0)},
      head={"scale": inverse("logits_scaling", 1.0)},
    ),
    block={"ffn": ffn, "branch_scale": Key("residual_multiplier", 1.0)},
    **more,
  )


def _after_max_window_layers(h, i) -> bool:
  return i >= h.get("max_window_layers", 28)


def _qwen(model_type: str, architecture: str, rows: tuple[Row, ...], also: tuple = (), **mixer) -> Family:
  window = Window(types=_after_max_window_layers, switch="use_sliding_window")
  mixer = {**HEAD_DIM, "window": window, "position": Rope()} | mixer
  moot = frozenset() if "out_bias" in mixer else frozenset({"attention_bias"})
  only = {"use_mrope": (False,), "use_qk_norm": ("qk_norm" in mixer,)}
  return llama_like(model_type, architecture, mixer, rows=rows, only=only, moot=moot, also=also)


def _has_rope(h, i) -> bool:
  interval, layers = h.get("no_rope_layer_interval", 4), h.get("no_rope_layers", None)
  check(layers is None or (isinstance(layers, list) and i < len(layers)), "no_rope_layers must name each layer")
  return bool((i + 1) % interval if layers is None else layers[i])


def _smollm_slides(h, i) -> bool:
  return bool(h.get("use_sliding_window", False)) and not _has_rope(h, i)


FAMILIES = (
  llama_like(
    "llama",
    "LlamaForCausalLM",
    {**HEAD_DIM, "position": Rope(), **ATTENTION_BIAS},
    block={"ffn": mlp(bias=Key("mlp_bias", False))},
    rows=(*LLAMA, *ORIGINAL),
  ),
  llama_like(
    "mistral",
    "MistralForCausalLM",
    {**HEAD_DIM, "window": Window(4096), "position": Rope()},
    rows=(*LLAMA, *ORIGINAL),
  ),
  _qwen("qwen2", "Qwen2ForCausalLM", LLAMA, qkv_bias=True),
  _qwen(
    "qwen3",
    "Qwen3ForCausalLM",
    (*LLAMA, *QK_NORM),
    head_dim=Size("head_dim", 128),
    qk_norm={"norm": QK},
    also=("qwen3_vl_text",),
    **ATTENTION_BIAS,
  ),
  Family(
    "phi3",
    "Phi3ForCausalLM",
    model(rms(default=1e-5), embed={"dropout": Key("embd_pdrop", 0.0)}),
    {
      "mixer": attention(**HEAD_DIM, window=Window(), position=Rope(original_beside=True)),
      "ffn": mlp(),
      "norm": rms(default=1e-5),
      "dropout": Key("resid_pdrop", 0.0),
    },
    (*ENDS, *PRE, *fused(f"{L}.self_attn.qkv_proj"), *output(f"{L}.self_attn.o_proj"), *fused_gate(f"{L}.mlp")),
    only={"attention_bias": (False,)},
  ),
  granite("granite", "GraniteForCausalLM", mlp(bias=Key("mlp_bias", False))),
  llama_like(
    "smollm3",
    "SmolLM3ForCausalLM",
    {
      **HEAD_DIM,
      "window": Window(types=_smollm_slides, switch="use_sliding_window"),
      "position": SomeRope(Rope(theta=2e6), _has_rope, lambda w, i, has: w.append("no_rope_layers", i, int(has))),
      **ATTENTION_BIAS,
    },
    model=model(rms(), tied=True),
    block={"ffn": mlp(bias=Key("mlp_bias", False))},
    moot=frozenset({"max_window_layers"}),
  ),
  Family(
    "glm4",
    "Glm4ForCausalLM",
    model(rms(default=1.5625e-7)),
    {
      "mixer": attention(
        **HEAD_DIM,
        position=Rope(partial=0.5, interleaved=True),
        qkv_bias=Key("attention_bias", True),
      ),
      "ffn": mlp(),
      "norm": rms(default=1.5625e-7),
      "residual": "sandwich",
    },
    (
      *ENDS,
      *norm(f"{L}.input_layernorm", "mixer_norm"),
      *norm(f"{L}.post_self_attn_layernorm", "mixer_out_norm"),
      *norm(f"{L}.post_attention_layernorm", "ffn_norm"),
      *norm(f"{L}.post_mlp_layernorm", "ffn_out_norm"),
      *projections(f"{L}.self_attn"),
      *fused_gate(f"{L}.mlp"),
    ),
  ),
)
