"""The decoders whose feed-forward is a mixture of experts."""

import reprlib

from llmarch.convert.fields import Choice, Family, Key, Pair, Rope, Row, Size, Window, fill, match, rope_options, when
from llmarch.convert.tables.llama import granite
from llmarch.convert.tables.parts import (
  ATTENTION_BIAS,
  ENDS,
  HEAD_DIM,
  LLAMA,
  PRE,
  QK,
  QK_NORM,
  WHOLE_QK,
  L,
  activation,
  ends,
  fused,
  fused_experts,
  gated,
  llama_like,
  mlp,
  model,
  norm,
  output,
  projections,
  rms,
  sparse,
)
from llmarch.errors import check

DBRX = "transformer.blocks.{}"
DBRX_NAMES = {
  "num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers",
  "max_position_embeddings": "max_seq_len",
}  # fmt: skip


def _qwen2_moe_slides(h, i) -> bool:
  return i % 2 == 0 and i < h.get("max_window_layers", 28) and bool(h.get("use_sliding_window", False))


def mixture(num: str, d_ff: str, expert: dict | None = None, router: dict | None = None, **more) -> dict:
  """Experts of one width d_ff; every token goes to num_experts_per_tok of them."""
  expert = {"d_ff": Size(d_ff), "activation": activation("hidden_act", "silu")} | (expert or {})
  router = {"kind": "top_k", "k": Size("num_experts_per_tok")} | (router or {})
  return {"kind": "moe", "num_experts": Size(num), "expert": expert, "router": router} | more


def _is_sparse(h, i) -> bool:
  dense, step = h.get("mlp_only_layers", None) or [], h.get("decoder_sparse_step", 1)
  check(isinstance(dense, list), f"mlp_only_layers={dense!r} must be a list")
  check(type(step) is int and step > 0, f"decoder_sparse_step={step!r} must be a whole number above 0")
  return i not in dense and (i + 1) % step == 0


def some_sparse(moe: dict) -> Pair:
  """A mixture, or in mlp_only_layers (and but for each decoder_sparse_step-th) one feed-forward."""
  dense = mlp(d_ff=Size("intermediate_size", None))

  def read(h, i):
    both = fill(moe, h, i), fill(dense, h, i)
    return both[0] if _is_sparse(h, i) else both[1]

  def write(value, w, i):
    is_sparse = value is not None and value["kind"] == "moe"
    lone = w.options.setdefault("mlp_only_layers", [])
    lone += [] if is_sparse else [i]
    match(moe if is_sparse else dense, value, w, i)

  return Pair(read, write)


def first_dense(moe: dict) -> Pair:
  """A mixture above the first first_k_dense_replace layers, which have one feed-forward."""
  dense = mlp(d_ff=Size("intermediate_size", None))

  def read(h, i):
    first, both = h.get("first_k_dense_replace"), (fill(dense, h, i), fill(moe, h, i))
    check(type(first) is int and first >= 0, f"first_k_dense_replace={first!r} must be a whole number from 0")
    return both[i >= first]

  def write(value, w, i):
    is_sparse = value is not None and value["kind"] == "moe"
    w.options["first_k_dense_replace"] = w.options.get("first_k_dense_replace", 0) if is_sparse else i + 1
    match(moe if is_sparse else dense, value, w, i)

  return Pair(read, write)


def _shared_width(h, i):
  return h.size("n_shared_experts") * h.size("moe_intermediate_size")


def _say_shared_width(value, w, i):
  check(value is not None, "there must be a shared expert")
  number, rest = divmod(value, w.options["moe_intermediate_size"])
  check(rest == 0, "the shared expert must be as wide as a number of the others")
  w.set("n_shared_experts", number)


SHARED = {"d_ff": Pair(_shared_width, _say_shared_width), "activation": activation("hidden_act", "silu")}
SHARED_AND_SPARSE = (
  *gated(f"{L}.mlp"),
  *sparse(f"{L}.mlp"),
  Row(f"{L}.mlp.gate.e_score_correction_bias", "ffn/selection_bias"),
  *gated(f"{L}.mlp.shared_experts", path="ffn/shared"),
)


def _groups(h, i):
  groups = {"num": h.size("n_group"), "top": h.size("topk_group"), "score": "top2"}
  return None if groups["num"] == groups["top"] else groups


def _say_groups(value, w, i):
  w.set("n_group", value["num"] if value else 1)
  w.set("topk_group", value["top"] if value else 1)


def balanced(scale: float) -> dict:
  """The router of DeepSeek-V3: sigmoid scores, a bias on the choice that balances the load, and groups of experts."""
  return {
    "scores": "sigmoid",
    "renormalize": Key("norm_topk_prob", True),
    "scale": Key("routed_scaling_factor", scale),
    "groups": Pair(_groups, _say_groups),
    "balance_rate": 0.0,  # a checkpoint does not tell; 0 keeps its bias as it is
  }


def _partly_rotated(h, i):
  """The rope of MiniMax-M2, whose older files say by rotary_dim how many dimensions of a head rotate."""
  value, dims = Rope(theta=5e6).read(h, i), Size("rotary_dim", None).read(h, i)
  return value | {"dims": dims} if value["dims"] is None else value


def _all_full(h, i) -> str:
  """attn_type_list of MiniMax-M2 is 1 for each layer: softmax attention."""
  kinds = h.get("attn_type_list", None) or [1]
  alike = isinstance(kinds, list) and all(kind == 1 for kind in kinds)
  check(alike, f"attn_type_list={reprlib.repr(kinds)} must be 1 for each layer")
  return "causal"


def _oss_slides(h, i) -> bool:
  return i % 2 == 0


def _dbrx_theta(h) -> float:
  """rope_parameters decide where a file has them; older ones have attn_config.rope_theta alone."""
  theta = h.get("attn_config.rope_theta", 10000.0)
  return rope_options(h)[0][1].get("rope_theta", theta)


def _say_dbrx_rope(value, w, i):
  Rope().write(value, w, i)
  w.set("attn_config.rope_theta", value["theta"])


FAMILIES = (
  granite(
    "granitemoe",
    "GraniteMoeForCausalLM",
    mixture("num_local_experts", "intermediate_size"),
    rows=(
      *ENDS,
      *PRE,
      *projections(f"{L}.self_attn"),
      Row(f"{L}.block_sparse_moe.router.layer.weight", "ffn/router", "e d -> d e"),
      Row(f"{L}.block_sparse_moe.input_linear.weight", ("ffn/gate", "ffn/up"), "e c d -> e d c"),
      Row(f"{L}.block_sparse_moe.output_linear.weight", "ffn/down", "e d f -> e f d"),
      Row(f"{L}.block_sparse_moe.router.weight", "ffn/router", "e d -> d e"),
      *fused_experts(f"{L}.block_sparse_moe.experts"),
    ),
  ),
  llama_like(
    "mixtral",
    "MixtralForCausalLM",
    {**HEAD_DIM, "window": Window(None), "position": Rope(theta=1e6)},
    model=model(rms(default=1e-5)),
    block={
      "norm": rms(default=1e-5),
      "ffn": mixture("num_local_experts", "intermediate_size", router={"jitter": Key("router_jitter_noise", 0.0)}),
    },
    rows=(
      *ENDS,
      *PRE,
      *projections(f"{L}.self_attn"),
      *sparse(f"{L}.block_sparse_moe", "w3", "w2", "w1"),
      Row(f"{L}.mlp.gate.weight", "ffn/router", "e d -> d e"),
      *fused_experts(f"{L}.mlp.experts"),
    ),
    aliases={"num_experts": "num_local_experts"},
  ),
  llama_like(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    {
      **HEAD_DIM,
      "window": Window(types=_qwen2_moe_slides, switch="use_sliding_window"),
      "position": Rope(),
      "qkv_bias": Key("qkv_bias", True),
    },
    block={
      "ffn": some_sparse(
        mixture(
          "num_experts",
          "moe_intermediate_size",
          router={"renormalize": Key("norm_topk_prob", False)},
          shared={"d_ff": Size("shared_expert_intermediate_size"), "activation": activation("hidden_act", "silu")},
          shared_gate=True,
        )
      )
    },
    rows=(
      *LLAMA,
      *sparse(f"{L}.mlp"),
      *gated(f"{L}.mlp.shared_expert", path="ffn/shared"),
      Row(f"{L}.mlp.shared_expert_gate.weight", "ffn/shared_gate", "o d -> d o"),
    ),
    aliases={"num_local_experts": "num_experts"},
  ),
  llama_like(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    {
      "head_dim": Size("head_dim", None),
      "window": Window(4096, switch="use_sliding_window"),
      "position": Rope(),
      "qk_norm": {"norm": QK},
      **ATTENTION_BIAS,
    },
    block={
      "ffn": some_sparse(
        mixture("num_experts", "moe_intermediate_size", router={"renormalize": Key("norm_topk_prob", False)})
      )
    },
    rows=(*LLAMA, *QK_NORM, *sparse(f"{L}.mlp")),
    aliases={"num_local_experts": "num_experts"},
    moot=frozenset({"max_window_layers"}),
    only={"use_qk_norm": (True,)},
    also=("qwen3_vl_moe_text",),
  ),
  llama_like(
    "olmoe",
    "OlmoeForCausalLM",
    {**HEAD_DIM, "position": Rope(), "qkv_clip": Key("clip_qkv", None), **WHOLE_QK, **ATTENTION_BIAS},
    model=model(rms(default=1e-5)),
    block={
      "norm": rms(default=1e-5),
      "ffn": mixture("num_experts", "intermediate_size", router={"renormalize": Key("norm_topk_prob", False)}),
    },
    rows=(*ENDS, *PRE, *projections(f"{L}.self_attn"), *QK_NORM, *sparse(f"{L}.mlp")),
    aliases={"num_local_experts": "num_experts"},
  ),
  llama_like(
    "gpt_oss",
    "GptOssForCausalLM",
    {
      "head_dim": Size("head_dim", 64),
      "window": Window(128, types=_oss_slides),
      "position": Rope(theta=150000.0),
      "sinks": True,
      "qkv_bias": Key("attention_bias", True),
      "out_bias": Key("attention_bias", True),
    },
    model=model(rms(default=1e-5)),
    block={
      "norm": rms(default=1e-5),
      "ffn": mixture(
        "num_local_experts", "intermediate_size", {"activation": "swiglu_oss", "bias": True}, {"bias": True}
      ),
    },
    rows=(
      *ENDS,
      *PRE,
      *projections(f"{L}.self_attn"),
      Row(f"{L}.self_attn.sinks", "mixer/sinks"),
      Row(f"{L}.mlp.router.weight", "ffn/router", "e d -> d e"),
      Row(f"{L}.mlp.router.bias", "ffn/router_bias"),
      Row(f"{L}.mlp.experts.gate_up_proj", ("ffn/gate", "ffn/up"), "e d (f c) -> e d f"),
      Row(f"{L}.mlp.experts.gate_up_proj_bias", ("ffn/gate_bias", "ffn/up_bias"), "e (f c) -> e f"),
      Row(f"{L}.mlp.experts.down_proj", "ffn/down"),
      Row(f"{L}.mlp.experts.down_proj_bias", "ffn/down_bias"),
    ),
    only={"hidden_act": ("silu",), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    moot=frozenset({"experts_per_token", "initial_context_length"}),
    aliases={"num_experts": "num_local_experts"},
  ),
  Family(
    "dbrx",
    "DbrxForCausalLM",
    model(
      {"kind": "layernorm", "eps": 1e-5, "bias": False},
      embed={"dropout": Key("emb_pdrop", 0.0)},
      d_model=Size("d_model"),
      max_seq_len=Size("max_seq_len"),
    ),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("n_heads"),
        "num_kv_heads": Size("attn_config.kv_n_heads", 1),
        "position": Pair(lambda h, i: {"kind": "rope", "theta": _dbrx_theta(h)}, _say_dbrx_rope),
        "qkv_clip": Key("attn_config.clip_qkv", None),
        "dropout": Key("attn_config.attn_pdrop", 0.0),
      },
      "ffn": {
        "kind": "moe",
        "num_experts": Size("ffn_config.moe_num_experts", 4),
        "expert": {"d_ff": Size("ffn_config.ffn_hidden_size", 3584), "activation": "silu"},
        "router": {
          "kind": "top_k",
          "k": Size("ffn_config.moe_top_k", 1),
          "renormalize": Choice((("ffn_config.moe_normalize_expert_weights", 1.0),), {(1.0,): True, (None,): False}),
          "jitter": Pair(
            lambda h, i: h.get("ffn_config.moe_jitter_eps", None) or 0.0,
            lambda value, w, i: w.set("ffn_config.moe_jitter_eps", value or None),
          ),
        },
      },
      "norm": {"kind": "layernorm", "eps": 1e-5, "bias": False},
      "dropout": Key("resid_pdrop", 0.0),
    },
    (
      *ends("transformer.wte", "transformer.norm_f"),
      *norm(f"{DBRX}.norm_attn_norm.norm_1", "mixer_norm"),
      *norm(f"{DBRX}.norm_attn_norm.norm_2", "ffn_norm"),
      *fused(f"{DBRX}.norm_attn_norm.attn.Wqkv"),
      *output(f"{DBRX}.norm_attn_norm.attn.out_proj"),
      Row(f"{DBRX}.ffn.router.layer.weight", "ffn/router", "e d -> d e"),
      Row(f"{DBRX}.ffn.experts.mlp.w1", "ffn/gate", "(e f) d -> e d f"),
      Row(f"{DBRX}.ffn.experts.mlp.v1", "ffn/up", "(e f) d -> e d f"),
      Row(f"{DBRX}.ffn.experts.mlp.w2", "ffn/down", "(e f) d -> e f d"),
    ),
    num_layers="n_layers",
    aliases=DBRX_NAMES,
    only={"ffn_config.ffn_act_fn": (None, {"name": "silu"})},
    moot=frozenset({"ffn_config.moe_loss_weight", "ffn_config.hidden_size", "num_key_value_heads"})
    | {"attn_config.is_encoder_decoder", "ffn_config.is_encoder_decoder"},
    nested=("attn_config", "ffn_config"),
  ),
  llama_like(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    {
      "head_dim": Size("head_dim", None),
      "position": Rope(partial=0.5),
      "qkv_bias": Key("attention_bias", False),
      "qk_norm": when("use_qk_norm", False, {"norm": rms(default=1e-5)}),
    },
    model=model(rms(default=1e-5)),
    block={
      "norm": rms(default=1e-5),
      "ffn": first_dense(
        mixture("n_routed_experts", "moe_intermediate_size", router=balanced(scale=1.0), shared=SHARED)
      ),
    },
    rows=(*ENDS, *PRE, *projections(f"{L}.self_attn"), *QK_NORM, *SHARED_AND_SPARSE),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    more_layers="num_nextn_predict_layers",
    moot=frozenset({"num_nextn_predict_layers"}),
    only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
  ),
  llama_like(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    {
      "head_dim": Size("head_dim", 128),
      "position": Pair(_partly_rotated, Rope(theta=5e6).write),
      "mask": Pair(_all_full, lambda value, w, i: None),
      "qk_norm": {"norm": QK, "whole": True},
    },
    block={
      "ffn": mixture(
        "num_local_experts",
        "intermediate_size",
        router={"scores": "sigmoid", "balance_rate": 0.0, "jitter": Key("router_jitter_noise", 0.0)},
      ),
    },
    rows=(
      *ENDS,
      *PRE,
      *projections(f"{L}.self_attn"),
      *QK_NORM,
      *sparse(f"{L}.block_sparse_moe", "w3", "w2", "w1"),
      Row(f"{L}.block_sparse_moe.e_score_correction_bias", "ffn/selection_bias"),
    ),
    aliases={"num_experts": "num_local_experts"},
    only={"qk_norm_type": ("per_layer",), "use_qk_norm": (True,), "use_routing_bias": (True,)}
    | {"scoring_func": ("sigmoid",), "shared_intermediate_size": (0,)},
    more_layers="num_mtp_modules",
    moot=frozenset({"use_mtp", "mtp_transformer_layers", "num_mtp_modules"}),
  ),
)
