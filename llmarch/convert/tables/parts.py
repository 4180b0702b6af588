"""Parts that the families of several kinds share: templates of config fields, and rows of weights.

A template is a dict in the shape of a config, whose leaves say which option of the file holds the value (fields.py).
"""

import math

from llmarch.convert.fields import Family, Key, MaxLength, Row, Size

_DECODE = {
  "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2", "sigmoid": "sigmoid",
}  # fmt: skip
_ENCODE = {ours: theirs for theirs, ours in reversed(_DECODE.items())}


# ------------------------------------------------------------------------------------------ config fields


def activation(key: str, default: str) -> Key:
  return Key(key, default, _DECODE.__getitem__, lambda ours: _ENCODE.get(ours, ours))


def inverse(key: str, default: float) -> Key:
  return Key(key, default, lambda x: 1 / x, lambda x: 1 / x)


def whole(x: float) -> float:
  """An integer where it is one but for rounding."""
  return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x


def rms(key: str = "rms_norm_eps", default: float = 1e-6, **more) -> dict:
  return {"kind": "rmsnorm", "eps": Key(key, default), **more}


def layer_norm(key: str = "layer_norm_eps", default: float = 1e-5, **more) -> dict:
  return {"kind": "layernorm", "eps": Key(key, default), **more}


def attention(**more) -> dict:
  """The fields by their most common names; a name of more takes the place of one of these, in order."""
  return {
    "kind": "attention",
    "num_heads": Size("num_attention_heads"),
    "num_kv_heads": Size("num_key_value_heads", None),
    "dropout": Key("attention_dropout", 0.0),
  } | more


def mlp(**more) -> dict:
  return {"kind": "mlp", "d_ff": Size("intermediate_size"), "activation": activation("hidden_act", "silu")} | more


def model(norm: dict | None, tied: bool = False, head: dict | None = None, embed: dict | None = None, **more) -> dict:
  """The decoder around its blocks. tied: the family's default."""
  return {
    "d_model": Size("hidden_size"),
    "vocab_size": Size("vocab_size"),
    "max_seq_len": MaxLength(),
    "embed": embed or {},
    "head": {"tied": Key("tie_word_embeddings", tied)} | (head or {}),
    "final_norm": norm,
  } | more


# ------------------------------------------------------------------------------------------------ weights


def linear(key: str, path: str, bias: str | None, pattern: str) -> tuple[Row, ...]:
  """A torch Linear [out, in] and its bias [out], whose pattern is that of the outputs alone."""
  rows = (Row(f"{key}.weight", path, pattern),)
  if bias:
    outputs = {"q": "(n h) -> n h", "k": "(k h) -> k h", "v": "(k h) -> k h"}.get(path[-1])
    rows += (Row(f"{key}.bias", bias, outputs if path.startswith("mixer") else None),)
  return rows


def projections(attn: str, out: str = "o_proj") -> tuple[Row, ...]:
  """q, k, v and the output, apart."""
  return (
    *linear(f"{attn}.q_proj", "mixer/q", "mixer/q_bias", "(n h) d -> d n h"),
    *linear(f"{attn}.k_proj", "mixer/k", "mixer/k_bias", "(k h) d -> d k h"),
    *linear(f"{attn}.v_proj", "mixer/v", "mixer/v_bias", "(k h) d -> d k h"),
    *output(f"{attn}.{out}"),
  )


def output(key: str) -> tuple[Row, ...]:
  return linear(key, "mixer/o", "mixer/o_bias", "d (n h) -> n h d")


QKV = ("mixer/q", "mixer/k", "mixer/v")


def fused(key: str, interleaved: bool = False) -> tuple[Row, ...]:
  """q, k and v in one Linear: one after another, or (interleaved) the queries of a group, its key, its value."""
  apart, among = ("(c h) d -> d c h", "(c h) -> c h"), ("(k c h) d -> d (k c) h", "(k c h) -> (k c) h")
  weight, bias = among if interleaved else apart
  return Row(f"{key}.weight", QKV, weight), Row(f"{key}.bias", tuple(f"{path}_bias" for path in QKV), bias)


def gated(
  ffn: str, up: str = "up_proj", down: str = "down_proj", gate: str = "gate_proj", path: str = "ffn"
) -> tuple[Row, ...]:
  """A feed-forward; `gate` is of no effect where there is none."""
  return (
    *linear(f"{ffn}.{gate}", f"{path}/gate", f"{path}/gate_bias", "f d -> d f"),
    *linear(f"{ffn}.{up}", f"{path}/up", f"{path}/up_bias", "f d -> d f"),
    *linear(f"{ffn}.{down}", f"{path}/down", f"{path}/down_bias", "d f -> f d"),
  )


def sparse(ffn: str, *names: str, router: str = "gate") -> tuple[Row, ...]:
  """A router, and a tensor for each expert; names: of up, down and gate. Newer files have one tensor for all."""
  return (
    Row(f"{ffn}.{router}.weight", "ffn/router", "e d -> d e"),
    *gated(f"{ffn}.experts.{{}}", *names),
    *fused_experts(f"{ffn}.experts"),
  )


def fused_experts(key: str) -> tuple[Row, ...]:
  """All experts of a layer, in one tensor for gates and ups, and one for downs."""
  return (
    Row(f"{key}.gate_up_proj", ("ffn/gate", "ffn/up"), "e c d -> e d c"),
    Row(f"{key}.down_proj", "ffn/down", "e d f -> e f d"),
  )


def fused_gate(ffn: str) -> tuple[Row, ...]:
  return (
    Row(f"{ffn}.gate_up_proj.weight", ("ffn/gate", "ffn/up"), "c d -> d c"),
    *linear(f"{ffn}.down_proj", "ffn/down", None, "d f -> f d"),
  )


def norm(key: str, path: str, residual: str | None = None) -> tuple[Row, ...]:
  return tuple(
    Row(f"{key}.{name}", f"{path}/{ours}", residual=residual) for name, ours in (("weight", "scale"), ("bias", "bias"))
  )


def ends(embed: str, final: str, **more: str) -> tuple[Row, ...]:
  """The parts around the blocks."""
  rows = *(Row(key, path) for path, key in more.items()), Row(f"{embed}.weight", "embed"), *norm(final, "final_norm")
  return *rows, Row("lm_head.weight", "head"), Row("lm_head.bias", "head_bias")


L = "model.layers.{}"
ENDS = ends("model.embed_tokens", "model.norm")
PRE = (*norm(f"{L}.input_layernorm", "mixer_norm"), *norm(f"{L}.post_attention_layernorm", "ffn_norm"))
QK_NORM = (*norm(f"{L}.self_attn.q_norm", "mixer/q_norm"), *norm(f"{L}.self_attn.k_norm", "mixer/k_norm"))
LLAMA = (*ENDS, *PRE, *projections(f"{L}.self_attn"), *gated(f"{L}.mlp"))
H = "transformer.h.{}"
ATTENTION_BIAS = {"qkv_bias": Key("attention_bias", False), "out_bias": Key("attention_bias", False)}
# The names in consolidated.safetensors, whose queries and keys have the two halves of a rotated pair side by side.
ORIGINAL = (
  Row("model.tok_embeddings.weight", "embed"),
  Row("output.weight", "head"),
  Row(f"{L}.attention_norm.weight", "mixer_norm/scale"),
  Row(f"{L}.ffn_norm.weight", "ffn_norm/scale"),
  Row(f"{L}.attention.wq.weight", "mixer/q", "(n j p) d -> d n (p j)"),
  Row(f"{L}.attention.wk.weight", "mixer/k", "(k j p) d -> d k (p j)"),
  Row(f"{L}.attention.wv.weight", "mixer/v", "(k h) d -> d k h"),
  Row(f"{L}.attention.wo.weight", "mixer/o", "d (n h) -> n h d"),
  *gated(f"{L}.feed_forward", "w3", "w2", "w1"),
)
HEAD_DIM = {"head_dim": Size("head_dim", None)}
WHOLE_QK = {"qk_norm": {"norm": {"kind": "rmsnorm", "eps": Key("rms_norm_eps", 1e-5)}, "whole": True}}
QK = {"kind": "rmsnorm", "eps": Key("rms_norm_eps", 1e-6)}


# ------------------------------------------------------------------------------------- whole families


def llama_like(model_type: str, architecture: str, mixer: dict, **more) -> Family:
  """A family with RMSNorm before each branch, SwiGLU and the names of Llama's weights; `more` changes parts of it."""
  block = {"mixer": attention(**mixer), "ffn": mlp(), "norm": rms()} | more.pop("block", {})
  return Family(model_type, architecture, more.pop("model", model(rms())), block, more.pop("rows", LLAMA), **more)

