"""The decoders of DeepSeek: latent attention, and a mixture of experts above the first layers."""

from llmarch.convert.fields import Choice, Family, Key, Pair, Rope, Row, Size, Writer, fill, match, rope_options
from llmarch.convert.tables.moe import SHARED, SHARED_AND_SPARSE, balanced, first_dense, mixture
from llmarch.convert.tables.parts import ENDS, PRE, L, model, norm, output, rms
from llmarch.errors import check


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
  ffn = first_dense(mixture("n_routed_experts", "moe_intermediate_size", router=router, shared=SHARED))
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
      *SHARED_AND_SPARSE,
    ),
    only={"attention_bias": (False,), "moe_layer_freq": (1,)} | only,
    more_layers="num_nextn_predict_layers",
    **more,
    moot=frozenset({"aux_loss_alpha", "ep_size", "head_dim", "num_nextn_predict_layers"})
    | {"qk_head_dim", "seq_aux", "n_group", "topk_group"},  # groups where topk_method does not ask for them
  )


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
    balanced(scale=2.5),
    {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    also=("kimi_k2",),
  ),
)
