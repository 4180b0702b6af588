"""The decoders with LayerNorm whose weights have the names of Llama's."""

from llmarch.convert.fields import Choice, Family, Key, Rope, Row, SomeRope, Window, every, slides, when
from llmarch.convert.tables.parts import (
  ATTENTION_BIAS,
  ENDS,
  HEAD_DIM,
  LLAMA,
  PRE,
  QK_NORM,
  L,
  activation,
  attention,
  ends,
  gated,
  layer_norm,
  mlp,
  model,
  norm,
  projections,
)


def per_head(key: str, norm: dict) -> Choice:
  """A norm of queries and keys with parameters for each head."""
  return when(key, False, {"norm": norm, "per_head": True})


def cohere(model_type: str, architecture: str, **mixer) -> Family:
  """Parallel under one LayerNorm without bias, SwiGLU, scaled logits."""
  norm = layer_norm(bias=False)
  return Family(
    model_type,
    architecture,
    model(norm, tied=True, head={"scale": Key("logit_scale", 0.0625)}),
    {
      "mixer": attention(**mixer, **ATTENTION_BIAS),
      "ffn": mlp(),
      "norm": norm,
      "residual": "parallel",
    },
    (*LLAMA, *QK_NORM),
    only={"use_gated_activation": (True,), "use_parallel_block": (True,), "rotary_pct": (1.0,)}
    | ({} if "qk_norm" in mixer else {"use_qk_norm": (False,)}),
    moot=frozenset({"order_of_interleaved_layers", "position_embedding_type", "use_embedding_sharing"})
    | {"use_parallel_embedding"},
    aliases={"_sliding_window_pattern": "sliding_window_pattern"},
  )


FAMILIES = (
  Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    model(layer_norm("norm_epsilon"), tied=True, embed={"dropout": Key("embedding_dropout", 0.0)}),
    {
      "mixer": attention(
        **HEAD_DIM, window=Window(), position=Rope(), qkv_bias=Key("use_bias", True), out_bias=Key("use_bias", True)
      ),
      "ffn": mlp(activation=activation("hidden_act", "gelu_pytorch_tanh"), gated=False, bias=Key("use_bias", True)),
      "norm": layer_norm("norm_epsilon"),
      "dropout": Key("residual_dropout", 0.0),
    },
    (*ENDS, *PRE, *projections(f"{L}.self_attn"), *gated(f"{L}.mlp", "c_fc", "c_proj")),
    only={"mlp_type": ("default",), "norm_type": ("layer_norm",), "scale_attn_weights": (True,)},
    moot=frozenset({"activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon"})
    | {"scale_attention_softmax_in_fp32"},
  ),
  Family(
    "stablelm",
    "StableLmForCausalLM",
    model(layer_norm()),
    {
      "mixer": attention(
        position=Rope(partial=0.25),
        qkv_bias=Key("use_qkv_bias", False),
        qk_norm=per_head("qk_layernorm", layer_norm(bias=False)),
      ),
      "ffn": mlp(),
      "norm": layer_norm(),
      "residual": when("use_parallel_residual", False, "parallel", "pre"),
      "dropout": Key("hidden_dropout", 0.0),
    },
    (
      *LLAMA,
      Row(f"{L}.self_attn.q_layernorm.norms.{{}}.weight", "mixer/q_norm/scale"),
      Row(f"{L}.self_attn.k_layernorm.norms.{{}}.weight", "mixer/k_norm/scale"),
    ),
  ),
  Family(
    "phi",
    "PhiForCausalLM",
    model(layer_norm(), head={"bias": True}, embed={"dropout": Key("embd_pdrop", 0.0)}),
    {
      "mixer": attention(
        **HEAD_DIM,
        position=Rope(partial=0.5),
        qkv_bias=True,
        out_bias=True,
        qk_norm=when("qk_layernorm", False, {"norm": layer_norm()}),
      ),
      "ffn": mlp(activation=activation("hidden_act", "gelu_new"), gated=False, bias=True),
      "norm": layer_norm(),
      "residual": "parallel",
      "dropout": Key("resid_pdrop", 0.0),
    },
    (
      *ends("model.embed_tokens", "model.final_layernorm"),
      *PRE,
      *projections(f"{L}.self_attn", "dense"),
      *norm(f"{L}.self_attn.q_layernorm", "mixer/q_norm"),
      *norm(f"{L}.self_attn.k_layernorm", "mixer/k_norm"),
      *gated(f"{L}.mlp", "fc1", "fc2"),
    ),
  ),
  cohere(
    "cohere",
    "CohereForCausalLM",
    position=Rope(theta=5e5, interleaved=True),
    qk_norm=per_head("use_qk_norm", layer_norm(bias=False)),
  ),
  cohere(
    "cohere2",
    "Cohere2ForCausalLM",
    **HEAD_DIM,
    window=Window(4096, types=every(4)),
    position=SomeRope(Rope(interleaved=True), lambda h, i: slides(h, i, every(4))),
  ),
  Family(
    "nemotron",
    "NemotronForCausalLM",
    model(layer_norm("norm_eps", zero_centered=True)),
    {
      "mixer": attention(**HEAD_DIM, position=Rope(partial=0.5), **ATTENTION_BIAS),
      "ffn": mlp(activation=activation("hidden_act", "relu2"), gated=False, bias=Key("mlp_bias", False)),
      "norm": layer_norm("norm_eps", zero_centered=True),
    },
    LLAMA,
  ),
)
