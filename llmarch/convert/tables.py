"""The families of decoders, by the model_type of transformers: config fields and weights, each read both ways.

A new family is one entry of FAMILIES. Nothing else in the project knows a family's name.
"""

import math

from llmarch.convert.fields import (
  Choice,
  Derived,
  Family,
  Key,
  MaxLength,
  Pair,
  Rope,
  Row,
  Size,
  SomeRope,
  Window,
  Writer,
  every,
  fill,
  match,
  rope_options,
  slides,
  when,
)
from llmarch.errors import UserError, check

_DECODE = {
  "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2", "sigmoid": "sigmoid",
}  # fmt: skip
_ENCODE = {ours: theirs for theirs, ours in reversed(_DECODE.items())}


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
PALM, GROK = "layers.{}.fn", "layers.{}"


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
  """A router, and a tensor for each expert; names: of up, down and gate."""
  return Row(f"{ffn}.{router}.weight", "ffn/router", "e d -> d e"), *gated(f"{ffn}.experts.{{}}", *names)


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
  """What lies around the blocks."""
  rows = *(Row(key, path) for path, key in more.items()), Row(f"{embed}.weight", "embed"), *norm(final, "final_norm")
  return *rows, Row("lm_head.weight", "head"), Row("lm_head.bias", "head_bias")


L = "model.layers.{}"
ENDS = ends("model.embed_tokens", "model.norm")
PRE = (*norm(f"{L}.input_layernorm", "mixer_norm"), *norm(f"{L}.post_attention_layernorm", "ffn_norm"))
QK_NORM = (*norm(f"{L}.self_attn.q_norm", "mixer/q_norm"), *norm(f"{L}.self_attn.k_norm", "mixer/k_norm"))
LLAMA = (*ENDS, *PRE, *projections(f"{L}.self_attn"), *gated(f"{L}.mlp"))
SANDWICH = (
  *norm(f"{L}.input_layernorm", "mixer_norm"),
  *norm(f"{L}.post_attention_layernorm", "mixer_out_norm"),
  *norm(f"{L}.pre_feedforward_layernorm", "ffn_norm"),
  *norm(f"{L}.post_feedforward_layernorm", "ffn_out_norm"),
)
GEMMA = (*ENDS, *SANDWICH, *projections(f"{L}.self_attn"), *gated(f"{L}.mlp"), *QK_NORM)
OLMO = (
  *ENDS,
  *norm(f"{L}.post_attention_layernorm", "mixer_norm"),
  *norm(f"{L}.post_feedforward_layernorm", "ffn_norm"),
  *projections(f"{L}.self_attn"),
  *QK_NORM,
  *gated(f"{L}.mlp"),
)
OPT = "model.decoder"
DBRX = "transformer.blocks.{}"
H = "transformer.h.{}"
GPT_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
GPT_ENDS = ends("transformer.wte", "transformer.ln_f", position="transformer.wpe.weight")
GPT_NORMS = (*norm(f"{H}.ln_1", "mixer_norm"), *norm(f"{H}.ln_2", "ffn_norm"))


# ----------------------------------------------------------------------------------------------- families

ATTENTION_BIAS = {"qkv_bias": Key("attention_bias", False), "out_bias": Key("attention_bias", False)}
HEAD_DIM = {"head_dim": Size("head_dim", None)}
NO_PARAMETERS = {"kind": "layernorm", "eps": 1e-5, "scale": False, "bias": False}
QK = {"kind": "rmsnorm", "eps": Key("rms_norm_eps", 1e-6)}
PARALLEL = {True: "parallel", False: "pre"}


def llama_like(model_type: str, architecture: str, mixer: dict, **more) -> Family:
  """RMSNorm before, SwiGLU."""
  block = {"mixer": attention(**mixer), "ffn": mlp(), "norm": rms()} | more.pop("block", {})
  return Family(model_type, architecture, more.pop("model", model(rms())), block, more.pop("rows", LLAMA), **more)


def _granite(model_type: str, architecture: str, ffn: dict, **more) -> Family:
  """A llama with four multipliers."""
  return llama_like(
    model_type,
    architecture,
    {"position": Rope(), "query_scale": Key("attention_multiplier", 1.0), **ATTENTION_BIAS},
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


def _qwen2_moe_slides(h, i) -> bool:
  return i % 2 == 0 and i < h.get("max_window_layers", 28) and bool(h.get("use_sliding_window", False))


def _qwen(model_type: str, architecture: str, rows: tuple[Row, ...], **mixer) -> Family:
  window = Window(types=_after_max_window_layers, switch="use_sliding_window")
  mixer = {"window": window, "position": Rope()} | mixer
  return llama_like(model_type, architecture, mixer, rows=rows, only={"use_mrope": (False,)})


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
    ),
    {
      "mixer": attention(head_dim=Size("head_dim", 256), **mixer, **ATTENTION_BIAS),
      "ffn": mlp(activation=activation(more.pop("activation", "hidden_activation"), "gelu_pytorch_tanh")),
      "norm": norm,
      "residual": more.pop("residual", "sandwich"),
    },
    only={"use_bidirectional_attention": (None, False)} | more.pop("only", {}),
    aliases={"_sliding_window_pattern": "sliding_window_pattern"},
    **more,
  )


WHOLE_QK = {"qk_norm": {"norm": {"kind": "rmsnorm", "eps": Key("rms_norm_eps", 1e-5)}, "whole": True}}


def olmo2(model_type: str, architecture: str, **mixer) -> Family:
  """Norms after each branch, and of all queries or keys at once."""
  norm = rms(default=1e-5)
  block = {"mixer": attention(**mixer, **WHOLE_QK, **ATTENTION_BIAS), "norm": norm, "residual": "output"}
  return llama_like(model_type, architecture, {}, block=block, model=model(norm), rows=OLMO)


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


def deepseek(model_type: str, architecture: str, interleaved, router: dict, only: dict) -> Family:
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
    moot=frozenset({"aux_loss_alpha", "ep_size", "head_dim", "num_mtp_layers", "num_nextn_predict_layers"})
    | {"qk_head_dim", "seq_aux", "n_group", "topk_group"},  # groups where topk_method does not ask for them
  )


def _groups(h, i):
  groups = {"num": h.size("n_group"), "top": h.size("topk_group"), "score": "top2"}
  return None if groups["num"] == groups["top"] else groups


def _say_groups(value, w, i):
  w.set("n_group", value["num"] if value else 1)
  w.set("topk_group", value["top"] if value else 1)


def _oss_slides(h, i) -> bool:
  return i % 2 == 0


def _given_rope(rope: Rope) -> Pair:
  """A rope whose options the file must have."""

  def read(h, i):
    check(bool(rope_options(h)[0][1]), "the option rope_parameters is missing")
    return rope.read(h, i)

  return Pair(read, rope.write)


def _dbrx_theta(h) -> float:
  """rope_parameters decide where a file has them; older ones have attn_config.rope_theta alone."""
  theta = h.get("attn_config.rope_theta", 10000.0)
  return rope_options(h)[0][1].get("rope_theta", theta)


def _say_dbrx_rope(value, w, i):
  Rope().write(value, w, i)
  w.set("attn_config.rope_theta", value["theta"])


def _query_scale(key: str) -> Key:
  return Key(key, 256, lambda x: x**-0.5, lambda x: whole(x**-2))


def _gpt(d_ff, **more) -> dict:
  return {"kind": "mlp", "d_ff": d_ff, "gated": False, "bias": True} | more


def _inner(key: str, width: str) -> Pair:
  """A hidden size; null is 4 d."""
  size = Size(key, None)
  return Pair(lambda h, i: size.read(h, i) or 4 * h.size(width), size.write)


def _gpt2_scale(h) -> float:
  return (h.size("n_embd") / h.size("n_head")) ** -0.5


GPT_MODEL = {"d_model": Size("n_embd"), "max_seq_len": Size("n_positions")}


def _has_rope(h, i) -> bool:
  interval, layers = h.get("no_rope_layer_interval", 4), h.get("no_rope_layers", None)
  check(layers is None or (isinstance(layers, list) and i < len(layers)), "no_rope_layers must name each layer")
  return bool((i + 1) % interval if layers is None else layers[i])


def _smollm_slides(h, i) -> bool:
  return bool(h.get("use_sliding_window", False)) and not _has_rope(h, i)


def _attention_type(h, i):
  """gpt_neo: attention_types [[["global", "local"], 12]] and one window."""
  types, window = h.get("attention_types", [[["global", "local"], 12]]), h.get("window_size", 256)
  try:
    kind = [kind for names, count in types for kind in names * count][i]
    return {"global": None, "local": window}[kind]
  except (TypeError, ValueError, LookupError):
    raise UserError(f"attention_types={types!r} must name each layer global or local") from None


def _say_attention_type(value, w, i):
  kind = "global" if value is None else "local"
  w.append("attention_layers", i, kind)
  w.append("attention_types", i, [[kind], 1])
  if value is not None:
    w.set("window_size", value)


def _falcon_kv_heads(h, i):
  grouped, single = h.get("num_kv_heads", None), h.get("multi_query", True)  # one of them has no effect
  return grouped if h.get("new_decoder_architecture", False) else 1 if single else None


def _say_falcon_kv_heads(value, w, i):
  grouped = value not in (1, w.options["num_attention_heads"])
  w.set("new_decoder_architecture", grouped)
  w.set("multi_query", value == 1)
  w.set("num_kv_heads", value)


def _falcon_residual(h, i):
  new, norms = h.get("new_decoder_architecture", False), h.get("num_ln_in_parallel_attn", None)
  if not h.get("parallel_attn", True):
    check(not new, "parallel_attn must be true where new_decoder_architecture is")
    return "pre"
  check(norms in (None, 1, 2) and (new or norms != 2), f"num_ln_in_parallel_attn={norms!r} has no place here")
  return "parallel_two_norms" if new and norms != 1 else "parallel"


def _say_falcon_residual(value, w, i):
  check(value in ("pre", "parallel", "parallel_two_norms"), f"residual={value!r} is not one of falcon's")
  w.set("parallel_attn", value != "pre")
  w.set("num_ln_in_parallel_attn", {"pre": None, "parallel": 1, "parallel_two_norms": 2}[value])
  if value == "parallel_two_norms":
    w.set("new_decoder_architecture", True)


AFFINE = Key("layer_norm_elementwise_affine", True)
OPT_NORM = {"kind": "layernorm", "eps": 1e-5, "scale": AFFINE, "bias": AFFINE}


def _opt_final_norm(h, i):
  before, removed = h.get("do_layer_norm_before", True), h.get("_remove_final_layer_norm", False)
  return fill(OPT_NORM, h) if before and not removed else None


def _say_opt_final_norm(value, w, i):
  w.set("_remove_final_layer_norm", value is None and w.options["do_layer_norm_before"])
  match(OPT_NORM, value, w)


def _opt_width(h, i):
  width = Size("word_embed_proj_dim", None).read(h, i)
  return None if width == h.size("hidden_size") else width


# Under what PaLM's public implementation in PyTorch does; and under what the authors' inference code does.
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


GROK_NORM = {"kind": "rmsnorm", "eps": 1e-5}


_FAMILIES = (
  llama_like(
    "llama",
    "LlamaForCausalLM",
    {**HEAD_DIM, "position": Rope(), **ATTENTION_BIAS},
    block={"ffn": mlp(bias=Key("mlp_bias", False))},
  ),
  llama_like("mistral", "MistralForCausalLM", {**HEAD_DIM, "window": Window(4096), "position": Rope()}),
  _qwen("qwen2", "Qwen2ForCausalLM", LLAMA, qkv_bias=True),
  _qwen(
    "qwen3",
    "Qwen3ForCausalLM",
    (*LLAMA, *QK_NORM),
    head_dim=Size("head_dim", 128),
    qk_norm={"norm": QK},
    **ATTENTION_BIAS,
  ),
  gemma(
    "gemma",
    "GemmaForCausalLM",
    {"position": Rope()},
    activation="hidden_act",
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
  ),
  Family(
    "gpt2",
    "GPT2LMHeadModel",
    model(
      layer_norm("layer_norm_epsilon"),
      tied=True,
      embed={
        "position": {"kind": "learned", "length": Size("n_positions")},
        "dropout": Key("embd_pdrop", 0.1),
      },
      **GPT_MODEL,
    ),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("n_head"),
        "qkv_bias": True,
        "out_bias": True,
        "query_scale": when("scale_attn_weights", True, Derived(_gpt2_scale), 1.0),
        "dropout": Key("attn_pdrop", 0.1),
      },
      "ffn": _gpt(_inner("n_inner", "n_embd"), activation=activation("activation_function", "gelu_new")),
      "norm": layer_norm("layer_norm_epsilon"),
      "dropout": Key("resid_pdrop", 0.1),
    },
    (
      *GPT_ENDS,
      *GPT_NORMS,
      Row(f"{H}.attn.c_attn.weight", QKV, "d (c h) -> d c h"),  # Conv1D: [in, out]
      Row(f"{H}.attn.c_attn.bias", tuple(f"{path}_bias" for path in QKV), "(c h) -> c h"),
      Row(f"{H}.attn.c_proj.weight", "mixer/o", "(n h) d -> n h d"),
      Row(f"{H}.attn.c_proj.bias", "mixer/o_bias"),
      Row(f"{H}.mlp.c_fc.weight", "ffn/up"),
      Row(f"{H}.mlp.c_fc.bias", "ffn/up_bias"),
      Row(f"{H}.mlp.c_proj.weight", "ffn/down"),
      Row(f"{H}.mlp.c_proj.bias", "ffn/down_bias"),
    ),
    num_layers="n_layer",
    only={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "n_ctx": (None, 1024)},
    buffers=GPT_BUFFERS,
    prefix="transformer.",
  ),
  Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    model(layer_norm(), embed={"dropout": Key("hidden_dropout", 0.0)}),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("num_attention_heads"),
        "position": Rope(partial=0.25, old=("rotary_emb_base", "rotary_pct")),
        "dropout": Key("attention_dropout", 0.0),
        **ATTENTION_BIAS,
        "qkv_bias": Key("attention_bias", True),
        "out_bias": Key("attention_bias", True),
      },
      "ffn": _gpt(Size("intermediate_size"), activation=activation("hidden_act", "gelu")),
      "norm": layer_norm(),
      "residual": when("use_parallel_residual", True, "parallel_two_norms", "pre"),
      "dropout": Key("hidden_dropout", 0.0),
    },
    (
      *ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", head="embed_out.weight"),
      *norm("gpt_neox.layers.{}.input_layernorm", "mixer_norm"),
      *norm("gpt_neox.layers.{}.post_attention_layernorm", "ffn_norm"),
      *fused("gpt_neox.layers.{}.attention.query_key_value", interleaved=True),
      *output("gpt_neox.layers.{}.attention.dense"),
      *gated("gpt_neox.layers.{}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    ),
    moot=frozenset({"attention_probs_dropout_prob", "hidden_dropout_prob"}),
    buffers=GPT_BUFFERS,
  ),
  Family(
    "gptj",
    "GPTJForCausalLM",
    model(
      layer_norm("layer_norm_epsilon"),
      head={"bias": True},
      embed={"dropout": Key("embd_pdrop", 0.0)},
      **GPT_MODEL,
    ),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("n_head"),
        "position": {"kind": "rope", "dims": Size("rotary_dim"), "interleaved": True},
        "dropout": Key("attn_pdrop", 0.0),
      },
      "ffn": _gpt(_inner("n_inner", "n_embd"), activation=activation("activation_function", "gelu_new")),
      "norm": layer_norm("layer_norm_epsilon"),
      "residual": "parallel",
      "dropout": Key("resid_pdrop", 0.0),
    },
    (*GPT_ENDS, *GPT_NORMS, *projections(f"{H}.attn", "out_proj"), *gated(f"{H}.mlp", "fc_in", "fc_out")),
    num_layers="n_layer",
    moot=frozenset({"rotary", "scale_attn_weights"}),
    buffers=(*GPT_BUFFERS, ".attn.embed_positions"),
    prefix="transformer.",
  ),
  Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    model(
      layer_norm("layer_norm_epsilon"),
      tied=True,
      embed={
        "position": {"kind": "learned", "length": Size("max_position_embeddings")},
        "dropout": Key("embed_dropout", 0.0),
      },
    ),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("num_heads"),
        "window": Pair(_attention_type, _say_attention_type),
        "out_bias": True,
        "query_scale": 1.0,
        "dropout": Key("attention_dropout", 0.0),
      },
      "ffn": _gpt(
        _inner("intermediate_size", "hidden_size"), activation=activation("activation_function", "gelu_new")
      ),
      "norm": layer_norm("layer_norm_epsilon"),
      "dropout": Key("resid_dropout", 0.0),
    },
    (*GPT_ENDS, *GPT_NORMS, *projections(f"{H}.attn.attention", "out_proj"), *gated(f"{H}.mlp", "c_fc", "c_proj")),
    num_layers="num_layers",
    moot=frozenset({"attention_layers"}),
    buffers=GPT_BUFFERS,
    prefix="transformer.",
  ),
  llama_like(
    "olmo",
    "OlmoForCausalLM",
    {"position": Rope(), "qkv_clip": Key("clip_qkv", None), **ATTENTION_BIAS},
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
  Family(
    "phi3",
    "Phi3ForCausalLM",
    model(rms(default=1e-5), embed={"dropout": Key("embd_pdrop", 0.0)}),
    {
      "mixer": attention(window=Window(), position=Rope(original_beside=True)),
      "ffn": mlp(),
      "norm": rms(default=1e-5),
      "dropout": Key("resid_pdrop", 0.0),
    },
    (*ENDS, *PRE, *fused(f"{L}.self_attn.qkv_proj"), *output(f"{L}.self_attn.o_proj"), *fused_gate(f"{L}.mlp")),
    only={"attention_bias": (False,)},
  ),
  _granite("granite", "GraniteForCausalLM", mlp(bias=Key("mlp_bias", False))),
  _granite(
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
    ),
  ),
  llama_like(
    "mixtral",
    "MixtralForCausalLM",
    {**HEAD_DIM, "window": Window(None), "position": Rope(theta=1e6)},
    model=model(rms(default=1e-5)),
    block={
      "norm": rms(default=1e-5),
      "ffn": mixture(
        "num_local_experts", "intermediate_size", router={"jitter": Key("router_jitter_noise", 0.0)}
      ),
    },
    rows=(
      *ENDS,
      *PRE,
      *projections(f"{L}.self_attn"),
      *sparse(f"{L}.block_sparse_moe", "w3", "w2", "w1"),
    ),
  ),
  llama_like(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    {
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
  ),
  llama_like(
    "olmoe",
    "OlmoeForCausalLM",
    {"position": Rope(), "qkv_clip": Key("clip_qkv", None), **WHOLE_QK, **ATTENTION_BIAS},
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
      "position": _given_rope(Rope(theta=150000.0)),
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
    only={"ffn_config.ffn_act_fn": (None, {"name": "silu"})},
    moot=frozenset({"ffn_config.moe_loss_weight", "ffn_config.hidden_size", "num_key_value_heads"})
    | {"attn_config.is_encoder_decoder", "ffn_config.is_encoder_decoder"},
    nested=("attn_config", "ffn_config"),
  ),
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
  ),
  Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    model(layer_norm("norm_epsilon"), tied=True, embed={"dropout": Key("embedding_dropout", 0.0)}),
    {
      "mixer": attention(
        window=Window(), position=Rope(), qkv_bias=Key("use_bias", True), out_bias=Key("use_bias", True)
      ),
      "ffn": mlp(
        activation=activation("hidden_act", "gelu_pytorch_tanh"), gated=False, bias=Key("use_bias", True)
      ),
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
    "falcon",
    "FalconForCausalLM",
    model(layer_norm("layer_norm_epsilon"), tied=True),
    {
      "mixer": attention(
        num_kv_heads=Pair(_falcon_kv_heads, _say_falcon_kv_heads),
        position=Rope(),
        qkv_bias=Key("bias", False),
        out_bias=Key("bias", False),
      ),
      "ffn": _gpt(
        _inner("ffn_hidden_size", "hidden_size"),
        activation=activation("activation", "gelu"),
        bias=Key("bias", False),
      ),
      "norm": layer_norm("layer_norm_epsilon"),
      "residual": Pair(_falcon_residual, _say_falcon_residual),
      "dropout": Key("hidden_dropout", 0.0),
    },
    (
      *ends("transformer.word_embeddings", "transformer.ln_f"),
      *norm(f"{H}.ln_attn", "mixer_norm", "parallel_two_norms"),
      *norm(f"{H}.ln_mlp", "ffn_norm", "parallel_two_norms"),
      *norm(f"{H}.input_layernorm", "mixer_norm", "parallel"),
      *norm(f"{H}.input_layernorm", "mixer_norm", "pre"),
      *norm(f"{H}.post_attention_layernorm", "ffn_norm", "pre"),
      *fused(f"{H}.self_attention.query_key_value", interleaved=True),
      *output(f"{H}.self_attention.dense"),
      *gated(f"{H}.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    only={"alibi": (False,), "apply_residual_connection_post_layernorm": (False,)},
    aliases={"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embed": "hidden_size"}
    | {"n_head_kv": "num_kv_heads"},
    prefix="transformer.",
  ),
  Family(
    "mpt",
    "MptForCausalLM",
    model(
      layer_norm("layer_norm_epsilon", bias=False),
      tied=True,
      embed={"dropout": Key("emb_pdrop", 0.0)},
      d_model=Size("d_model"),
      max_seq_len=Size("max_seq_len"),
    ),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("n_heads"),
        "position": {"kind": "alibi", "max_bias": Key("attn_config.alibi_bias_max", 8, float, whole)},
        "qkv_clip": Key("attn_config.clip_qkv", None),
        "query_scale": Key("attn_config.softmax_scale", None),
        "dropout": Key("attn_config.attn_pdrop", 0.0, float, whole),
      },
      "ffn": _gpt(Derived(lambda h: 4 * h.size("d_model")), activation="gelu", bias=False),
      "norm": layer_norm("layer_norm_epsilon", bias=False),
      "dropout": Key("resid_pdrop", 0.0),
    },
    (
      *ends("transformer.wte", "transformer.norm_f"),
      *norm("transformer.blocks.{}.norm_1", "mixer_norm"),
      *norm("transformer.blocks.{}.norm_2", "ffn_norm"),
      *fused("transformer.blocks.{}.attn.Wqkv"),
      *output("transformer.blocks.{}.attn.out_proj"),
      *gated("transformer.blocks.{}.ffn"),
    ),
    num_layers="n_layers",
    only={
      "attn_config.alibi": (True,),
      "attn_config.qk_ln": (False,),
      "attn_config.prefix_lm": (False,),
      "attn_config.attn_type": ("multihead_attention",),
      "attn_config.attn_uses_sequence_id": (False,),
      "expansion_ratio": (4,),
      "logit_scale": (None,),
      "no_bias": (True,),
      "embedding_fraction": (1.0,),
      "norm_type": ("low_precision_layernorm", "layernorm"),
    },
    moot=frozenset({"attn_config.attn_impl", "attn_config.is_encoder_decoder", "learned_pos_emb"})
    | {"verbose", "init_config", "tokenizer_name"},
    nested=("attn_config",),
  ),
  Family(
    "opt",
    "OPTForCausalLM",
    model(
      Pair(_opt_final_norm, _say_opt_final_norm),
      tied=True,
      embed={
        "position": {"kind": "learned", "length": Size("max_position_embeddings"), "offset": 2},
        "dim": Pair(_opt_width, Size("word_embed_proj_dim").write),
      },
    ),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("num_attention_heads"),
        "qkv_bias": Key("enable_bias", True),
        "out_bias": Key("enable_bias", True),
        "dropout": Key("attention_dropout", 0.0),
      },
      "ffn": _gpt(Size("ffn_dim"), activation=activation("activation_function", "relu"), bias=Key("enable_bias", True)),
      "norm": OPT_NORM,
      "residual": when("do_layer_norm_before", True, "pre", "post"),
      "dropout": Key("dropout", 0.1),
    },
    (
      *ends(f"{OPT}.embed_tokens", f"{OPT}.final_layer_norm", position=f"{OPT}.embed_positions.weight"),
      Row(f"{OPT}.project_in.weight", "embed_in", "d e -> e d"),
      Row(f"{OPT}.project_out.weight", "embed_out", "e d -> d e"),
      *norm(f"{OPT}.layers.{{}}.self_attn_layer_norm", "mixer_norm"),
      *norm(f"{OPT}.layers.{{}}.final_layer_norm", "ffn_norm"),
      *projections(f"{OPT}.layers.{{}}.self_attn", "out_proj"),
      *gated(f"{OPT}.layers.{{}}", "fc1", "fc2"),
    ),
    only={"layerdrop": (0.0,)},
    moot=frozenset({"activation_dropout"}),
    prefix="model.",
  ),
  Family(
    "bloom",
    "BloomForCausalLM",
    model(
      layer_norm("layer_norm_epsilon"),
      tied=True,
      embed={"norm": layer_norm("layer_norm_epsilon")},
      max_seq_len=Key("seq_length", 2048),
    ),
    {
      "mixer": {
        "kind": "attention",
        "num_heads": Size("n_head"),
        "position": {"kind": "alibi"},
        "qkv_bias": True,
        "out_bias": True,
        "dropout": Key("attention_dropout", 0.0),
      },
      "ffn": _gpt(Derived(lambda h: 4 * h.size("hidden_size")), activation="gelu_tanh"),
      "norm": layer_norm("layer_norm_epsilon"),
      "dropout": Key("hidden_dropout", 0.0),
    },
    (
      *ends("transformer.word_embeddings", "transformer.ln_f"),
      *norm("transformer.word_embeddings_layernorm", "embed_norm"),
      *norm(f"{H}.input_layernorm", "mixer_norm"),
      *norm(f"{H}.post_attention_layernorm", "ffn_norm"),
      *fused(f"{H}.self_attention.query_key_value", interleaved=True),
      *output(f"{H}.self_attention.dense"),
      *gated(f"{H}.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    num_layers="n_layer",
    only={"apply_residual_connection_post_layernorm": (False,), "n_inner": (None,)},
    aliases={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "n_embed": "hidden_size"},
    moot=frozenset({"attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi"})
    | {"skip_bias_add", "skip_bias_add_qkv"},
    prefix="transformer.",
  ),
  Family(
    "phi",
    "PhiForCausalLM",
    model(layer_norm(), head={"bias": True}, embed={"dropout": Key("embd_pdrop", 0.0)}),
    {
      "mixer": attention(
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
  llama_like(
    "smollm3",
    "SmolLM3ForCausalLM",
    {
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
        head_dim=Size("head_dim", 128),
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
  # Not in transformers: PaLM's weights were never published, so that these are the names of others for one's own.
  # Grok-1 is the function of its authors' code (raw gates, GELU by tanh), under the names of its port to torch.
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
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}
