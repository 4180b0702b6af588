"""Decoders that are not in transformers.

PaLM's weights were never published; the names are those of a public implementation, for weights of one's own. Grok-1
is the function of its authors' code (raw gates, GELU by tanh), under the names of its port to torch. The others have
code of their own beside their weights, whose function a class of transformers has under other names: Orion is a
StableLM, MiniCPM a Granite, InternLM a Llama.
"""

import math

from llmarch.convert.fields import Choice, Family, Key, Pair, Rope, Row, Size
from llmarch.convert.tables.moe import mixture
from llmarch.convert.tables.parts import (
  QKV,
  attention,
  ends,
  fused,
  gated,
  layer_norm,
  linear,
  llama_like,
  model,
  norm,
  output,
  projections,
  rms,
  sparse,
  whole,
)
from llmarch.errors import check

PALM, GROK = "layers.{}.fn", "layers.{}"
# LayerNorm is what PaLM's public implementation in PyTorch has; RMSNorm is what the authors' inference code has.
PALM_NORM = Choice(
  (("norm", "layernorm"),),
  {
    ("layernorm",): {"kind": "layernorm", "eps": Key("norm_eps", 1e-5), "bias": False},
    ("rmsnorm",): {"kind": "rmsnorm", "eps": Key("norm_eps", 1e-5), "zero_centered": True},
  },
)


def _palm_width(h, i) -> int:
  mult, given = h.get("ff_mult", 4), Size("ff_inner_dim", None).read(h, i)
  check(isinstance(mult, (int, float)) and 0 < mult < 1e3, f"ff_mult={mult!r} must lie in (0, 1000)")
  return given or int(h.size("dim") * mult)


def _depth_scale(h, i) -> float:
  """MiniCPM divides the scale of its branches by the root of the number of layers."""
  scale = h.get("scale_depth", 1.0)
  check(isinstance(scale, (int, float)), f"scale_depth={scale!r} must be a number")
  return scale / math.sqrt(h.size("num_hidden_layers"))


def _say_depth_scale(value, w, i) -> None:
  w.options["scale_depth"] = whole(value * math.sqrt(i + 1))  # the last layer has the last word


MINICPM_HEAD = Pair(
  lambda h, i: h.size("dim_model_base", 1) / h.size("hidden_size"),
  lambda value, w, i: w.set("dim_model_base", whole(value * w.options["hidden_size"])),
)
INTERN = "model.layers.{}"
GROK_NORM = {"kind": "rmsnorm", "eps": 1e-5}

FAMILIES = (
  Family(
    "palm",
    "PaLM",
    model(
      PALM_NORM,
      head={"tied": True, "scale": Key("logit_scale", 1.0)},
      d_model=Size("dim"),
      vocab_size=Size("num_tokens"),
      max_seq_len=Size("max_seq_len", 2048),
    ),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("heads", 8),
        "num_kv_heads": 1,
        "head_dim": Size("dim_head", 64),
        "position": {"kind": "rope"},
      },
      "ffn": {
        "kind": "mlp",
        "d_ff": Pair(_palm_width, Size("ff_inner_dim").write),
      },
      "norm": PALM_NORM,
      "residual": "parallel",
    },
    (
      Row("token_emb.weight", "embed"),
      Row("norm.gamma", "final_norm/scale"),
      Row(f"{PALM}.norm.gamma", "mixer_norm/scale"),
      Row(f"{PALM}.fused_attn_ff_proj.weight", (*QKV, "ffn/up", "ffn/gate"), "c d -> d c ..."),
      *linear(f"{PALM}.attn_out", "mixer/o", None, "d (n h) -> n h d"),
      *linear(f"{PALM}.ff_out.1", "ffn/down", None, "d f -> f d"),
    ),
    num_layers="depth",
    buffers=(".beta", ".inv_freq"),
  ),
  Family(
    "grok-1",
    "Grok1ForCausalLM",
    model(
      GROK_NORM,
      embed={"scale": Key("embedding_multiplier_scale", 78.38367176906169)},
      head={"tied": True, "scale": Key("output_multiplier_scale", 0.5773502691896257)},
    ),
    {
      "mixer": attention(
        position={"kind": "rope", "theta": Key("rope_theta", 1e4)},
        query_scale=Key("attn_output_multiplier", 0.08838834764831845),
        softcap=30.0,
      ),
      "ffn": mixture("num_local_experts", "intermediate_size", {"activation": "gelu_tanh"}, {"renormalize": False}),
      "norm": GROK_NORM,
      "residual": "sandwich",
    },
    (
      Row("embedding.weight", "embed"),
      *norm("norm", "final_norm"),
      *norm(f"{GROK}.norm1", "mixer_norm"),
      *norm(f"{GROK}.norm2", "mixer_out_norm"),
      *norm(f"{GROK}.norm3", "ffn_norm"),
      *norm(f"{GROK}.norm4", "ffn_out_norm"),
      *projections(f"{GROK}.attention", "out_proj"),
      *sparse(f"{GROK}.mlp", "v", "dense", "w1", router="gating.router_weights"),
    ),
    only={"rms_norm_eps": (1e-5,), "hidden_act": ("gelu",)},
    moot=frozenset({"tie_word_embeddings"}),
  ),
  llama_like(
    "orion",
    "OrionForCausalLM",
    {"position": Rope(older=True)},
    block={"norm": layer_norm("rms_norm_eps")},
    model=model(layer_norm("rms_norm_eps")),
  ),
  llama_like(
    "minicpm",
    "MiniCPMForCausalLM",
    {"position": Rope(older=True)},
    block={"branch_scale": Pair(_depth_scale, _say_depth_scale)},
    model=model(rms(), tied=True, embed={"scale": Key("scale_emb", 1)}, head={"scale": MINICPM_HEAD}),
  ),
  llama_like(
    "internlm",
    "InternLMForCausalLM",
    {"position": Rope(older=True), "qkv_bias": Key("bias", True), "out_bias": Key("bias", True)},
  ),
  llama_like(
    "internlm2",
    "InternLM2ForCausalLM",
    {"position": Rope(older=True), "qkv_bias": Key("bias", True), "out_bias": Key("bias", True)},
    rows=(
      *ends("model.tok_embeddings", "model.norm", head="output.weight"),
      *norm(f"{INTERN}.attention_norm", "mixer_norm"),
      *norm(f"{INTERN}.ffn_norm", "ffn_norm"),
      *fused(f"{INTERN}.attention.wqkv", interleaved=True),
      *output(f"{INTERN}.attention.wo"),
      *gated(f"{INTERN}.feed_forward", "w3", "w2", "w1"),
    ),
  ),
)
