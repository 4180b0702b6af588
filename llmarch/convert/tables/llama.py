"""The decoders in the manner of Llama: RMSNorm before each branch, a gated feed-forward, rotary positions."""

from llmarch.convert.fields import (
  Family,
  Key,
  Pair,
  Rope,
  Row,
  Size,
  SomeRope,
  Window,
  Writer,
  fill,
  match,
  rope_options,
)
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
  activation,
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


def glm(model_type: str, architecture: str, residual: str, norms: tuple[Row, ...]) -> Family:
  """Half of each head rotates, in pairs of neighbours; gate and up are one matrix."""
  norm = rms(default=1.5625e-7)
  mixer = attention(
    **HEAD_DIM, position=Rope(partial=0.5, interleaved=True), qkv_bias=Key("attention_bias", True)
  )
  block = {"mixer": mixer, "ffn": mlp(), "norm": norm, "residual": residual}
  rows = (*ENDS, *norms, *projections(f"{L}.self_attn"), *fused_gate(f"{L}.mlp"))
  return Family(model_type, architecture, model(norm), block, rows)


def _after_max_window_layers(h, i) -> bool:
  return i >= h.get("max_window_layers", 28)


def _qwen(model_type: str, architecture: str, rows: tuple[Row, ...], **mixer) -> Family:
  more = {key: mixer.pop(key) for key in ("also", "more_layers", "beyond") if key in mixer}
  window = Window(types=_after_max_window_layers, switch="use_sliding_window")
  mixer = {**HEAD_DIM, "window": window, "position": Rope()} | mixer
  moot = frozenset() if "out_bias" in mixer else frozenset({"attention_bias"})
  moot |= {more["more_layers"]} if "more_layers" in more else set()
  only = {"use_mrope": (False,), "use_qk_norm": ("qk_norm" in mixer,)}
  return llama_like(model_type, architecture, mixer, rows=rows, only=only, moot=moot, **more)


def _has_rope(h, i) -> bool:
  interval, layers = h.get("no_rope_layer_interval", 4), h.get("no_rope_layers", None)
  check(layers is None or (isinstance(layers, list) and i < len(layers)), "no_rope_layers must name each layer")
  return bool((i + 1) % interval if layers is None else layers[i])


def _has_window(h, i) -> bool:
  return h.get("sliding_window", 4096) is not None


def _growing_attention(**more) -> Pair:
  """A mixer whose queries grow with their position, which an option among those of its rope says (Ministral 3)."""
  rope = Rope(theta=1e6, apart=frozenset({"llama_4_scaling_beta", "max_position_embeddings"}))
  plain = attention(**more)

  def read(h, i):
    options = rope_options(h)[0][1]
    rate, every = options.get("llama_4_scaling_beta"), options.get("original_max_position_embeddings")
    growth = {"query_growth": rate, "growth_every": every} if rate else {}
    return fill(plain, h, i) | {"position": rope.read(h, i)} | growth

  def write(value, w, i):
    match(plain, value, w, i)
    rate, alone = value["query_growth"], Writer()
    rope.write(value["position"], alone, i)
    said = {"llama_4_scaling_beta": rate, "original_max_position_embeddings": value["growth_every"]} if rate else {}
    w.set("rope_parameters", alone.options["rope_parameters"] | said)

  return Pair(read, write)


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
  llama_like(
    "ministral",
    "MinistralForCausalLM",
    {**HEAD_DIM, "window": Window(4096, types=_has_window), "position": Rope()},
  ),
  llama_like(
    "ministral3",
    "Ministral3ForCausalLM",
    {},
    model=model(rms(default=1e-5)),
    block={"mixer": _growing_attention(head_dim=Size("head_dim", 128), window=Window()), "norm": rms(default=1e-5)},
  ),
  # MiMo is a Qwen2 with one layer more, which predicts further ahead, under names of its own.
  _qwen(
    "qwen2",
    "Qwen2ForCausalLM",
    LLAMA,
    qkv_bias=True,
    also=("qwen2_vl_text", "qwen2_5_vl_text", "mimo"),
    more_layers="num_nextn_predict_layers",
    beyond=("model.mtp_layers.",),
  ),
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
  llama_like(
    "arcee",
    "ArceeForCausalLM",
    {**HEAD_DIM, "position": Rope(), **ATTENTION_BIAS},
    model=model(rms(default=1e-5)),
    block={
      "ffn": mlp(activation=activation("hidden_act", "relu2"), gated=False, bias=Key("mlp_bias", False)),
      "norm": rms(default=1e-5),
    },
  ),
  llama_like(
    "seed_oss",
    "SeedOssForCausalLM",
    {
      **HEAD_DIM,
      "position": Rope(),
      "qkv_bias": Key("attention_bias", True),
      "out_bias": Key("attention_out_bias", False),
      "dropout": Key("attention_dropout", 0.1),
    },
    block={"ffn": mlp(bias=Key("mlp_bias", False)), "dropout": Key("residual_dropout", 0.1)},
  ),
  llama_like(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    {
      **HEAD_DIM,
      "position": Rope(theta=5e5, interleaved=True),
      "qkv_bias": Key("use_bias", False),
      "out_bias": Key("use_bias", False),
    },
    model=model(rms(default=1e-5), tied=True),
    block={"ffn": mlp(bias=Key("use_bias", False)), "norm": rms(default=1e-5)},
  ),
  glm("glm", "GlmForCausalLM", "pre", PRE),
  glm(
    "glm4",
    "Glm4ForCausalLM",
    "sandwich",
    (
      *norm(f"{L}.input_layernorm", "mixer_norm"),
      *norm(f"{L}.post_self_attn_layernorm", "mixer_out_norm"),
      *norm(f"{L}.post_attention_layernorm", "ffn_norm"),
      *norm(f"{L}.post_mlp_layernorm", "ffn_out_norm"),
    ),
  ),
)
