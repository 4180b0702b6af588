"""The decoders of DeepSeek: latent attention, and a mixture of experts above the first layers."""

from llmarch.convert.fields import Choice, Family, Key, Pair, Rope, Row, Size, Writer, fill, match, rope_options
from llmarch.convert.tables.moe import mixture
from llmarch.convert.tables.parts import ENDS, PRE, L, activation, gated, mlp, model, norm, output, rms, sparse
from llmarch.errors import check


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


def latent_attention(interleaved) -> Pair:
  """The mixer of DeepSeek; mscale_all_dim stands among the options of its rope."""
  rope = Rope()
  plain = {
    "kind": "mla",
    **{key: Size(key) for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "num_heads": Size("num_attention_heads"),
    "q_lora_rank": Size("q_lora_rank", 1536),
    "latent_norm": {"kind": "rmsnorm", "eps": 1e-6},
    "position": {"interleaved": interleaved},
    "dropout": Key("attention_dropout", 0.0),
  }

  def read(h, i):
    mixer, heads = fill(plain, h, i), h.get("num_key_value_heads", None)
    check(heads in (None, mixer["num_heads"]), f"num_key_value_heads={heads!r} must be num_attention_heads")
    mixer["position"] = rope.read(h, i) | mixer["position"]
    return mixer | {"mscale_all_dim": rope_options(h)[0][1].get("mscale_all_dim") or None}

  def write(value, w, i):
    check(value["kind"] == "mla", f"the mixer must be mla, not {value['kind']}")
    match(plain, value, w, i)
    w.set("num_key_value_heads", value["num_heads"])
    alone = Writer()
    rope.write(value["position"], alone, i)
    scale = value["mscale_all_dim"]
    w.set("rope_parameters", alone.options["rope_parameters"] | ({"mscale_all_dim": scale} if scale else {}))

  return Pair(read, write)


def deepseek(model_type: str, architecture: str, interleaved, router: dict, only: dict, **more) -> Family:
  """Latent attention, and experts above the first layers."""
  attn = f"{L}.self_attn"
  shared = {"d_ff": Pair(_shared_width, _say_shared_width), "activation": activation("hidden_act", "silu")}
  ffn = first_dense(mixture("n_routed_experts", "moe_intermediate_size", router=router, shared=shared))
  return Family(
    model_type,
    architecture,
    model(rms()),
    {"mixer": latent_attention(interleaved), "ffn": ffn, "norm": rms()},
    (
      *ENDS,
      *PRE,
      Row(f"{attn}.q_proj.weight", "mixer/q", "(n h) d -> d n h"),
      Row(f"{attn}.q_a_proj.weight", "mixer/q_down", "r d -> d r"),
      *norm(f"{attn}.q_a_layernorm", "mixer/q_norm"),
      Row(f"{attn}.q_b_proj.weight", "mixer/q_up", "(n h) r -> r n h"),
      Row(f"{attn}.kv_a_proj_with_mqa.weight", ("mixer/kv_down", "mixer/k_rope"), "c d -> d c"),
      *norm(f"{attn}.kv_a_layernorm", "mixer/kv_norm"),
      Row(f"{attn}.kv_b_proj.weight", ("mixer/k", "mixer/v"), "(n c) r -> r n c"),
      *output(f"{attn}.o_proj"),
      *gated(f"{L}.mlp"),
      *sparse(f"{L}.mlp"),
      Row(f"{L}.mlp.gate.e_score_correction_bias", "ffn/selection_bias"),
      *gated(f"{L}.mlp.shared_experts", path="ffn/shared"),
    ),
    only={"attention_bias": (False,), "moe_layer_freq": (1,)} | only,
    more_layers="num_nextn_predict_layers",
    **more,
    moot=frozenset({"aux_loss_alpha", "ep_size", "head_dim", "num_nextn_predict_layers"})
    | {"qk_head_dim", "seq_aux", "n_group", "topk_group"},  # groups where topk_method does not ask for them
  )


def _groups(h, i):
  groups = {"num": h.size("n_group"), "top": h.size("topk_group"), "score": "top2"}
  return None if groups["num"] == groups["top"] else groups


def _say_groups(value, w, i):
  w.set("n_group", value["num"] if value else 1)
  w.set("topk_group", value["top"] if value else 1)


FAMILIES = (
  deepseek(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    True,
    {
      "renormalize": False,
      "scale": Key("routed_scaling_factor", 1.0),
      "groups": Choice(
        (("topk_method", "greedy"),),
        {
          ("greedy",): None,
          ("group_limited_greedy",): {"num": Size("n_group"), "top": Size("topk_group"), "score": "max"},
        },
      ),
    },
    {"mlp_bias": (False,), "norm_topk_prob": (False,), "scoring_func": ("softmax",)},
    aliases={"num_experts": "n_routed_experts"},
  ),
  deepseek(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    Key("rope_interleave", True),
    {
      "scores": "sigmoid",
      "renormalize": Key("norm_topk_prob", True),
      "scale": Key("routed_scaling_factor", 2.5),
      "groups": Pair(_groups, _say_groups),
      "balance_rate": 0.0,  # a checkpoint does not tell; 0 keeps its bias as it is
    },
    {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    also=("kimi_k2",),
  ),
)
