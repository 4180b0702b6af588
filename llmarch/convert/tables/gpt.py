"""The decoders in the manner of GPT: LayerNorm, and a feed-forward without a gate."""

from llmarch.convert.fields import Derived, Family, Key, Pair, Rope, Row, Size, fill, match, when
from llmarch.convert.tables.parts import (
  ATTENTION_BIAS,
  QKV,
  H,
  activation,
  attention,
  ends,
  fused,
  gated,
  layer_norm,
  model,
  norm,
  output,
  projections,
  whole,
)
from llmarch.errors import UserError, check

OPT = "model.decoder"
GPT_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
GPT_ENDS = ends("transformer.wte", "transformer.ln_f", position="transformer.wpe.weight")
GPT_NORMS = (*norm(f"{H}.ln_1", "mixer_norm"), *norm(f"{H}.ln_2", "ffn_norm"))


def _gpt(d_ff, **more) -> dict:
  return {"kind": "mlp", "d_ff": d_ff, "gated": False, "bias": True} | more


def _inner(key: str, width: str) -> Pair:
  """A hidden size; null is 4 d."""
  size = Size(key, None)
  return Pair(lambda h, i: size.read(h, i) or 4 * h.size(width), size.write)


def _gpt2_scale(h) -> float:
  return (h.size("n_embd") / h.size("n_head")) ** -0.5


GPT_NAMES = {
  "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
  "num_hidden_layers": "n_layer",
}  # fmt: skip
GPT_MODEL = {"d_model": Size("n_embd"), "max_seq_len": Size("n_positions")}


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


def _say_big_code_heads(value, w, i):
  check(value in (1, w.options["n_head"]), "the key-value heads must be one, or as many as the query heads")
  w.set("multi_query", value == 1)


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


GPTJ = {
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
}

GPT2_MODEL = model(
  layer_norm("layer_norm_epsilon"),
  tied=True,
  embed={"position": {"kind": "learned", "length": Size("n_positions")}, "dropout": Key("embd_pdrop", 0.1)},
  **GPT_MODEL,
)


def gpt2_block(default: str, **mixer) -> dict:
  """A block of GPT-2, with more options of its mixer; `default` is the activation where the file names none."""
  attention = {
    "kind": "attention",
    "num_heads": Size("n_head"),
    "qkv_bias": True,
    "out_bias": True,
    "query_scale": when("scale_attn_weights", True, Derived(_gpt2_scale), 1.0),
    "dropout": Key("attn_pdrop", 0.1),
  }
  return {
    "mixer": attention | mixer,
    "ffn": _gpt(_inner("n_inner", "n_embd"), activation=activation("activation_function", default)),
    "norm": layer_norm("layer_norm_epsilon"),
    "dropout": Key("resid_pdrop", 0.1),
  }


FAMILIES = (
  Family(
    "gpt2",
    "GPT2LMHeadModel",
    GPT2_MODEL,
    gpt2_block("gelu_new"),
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
    also=("gpt-sw3",),
    only={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    moot=frozenset({"n_ctx"}),
    aliases=GPT_NAMES,
    buffers=GPT_BUFFERS,
  ),
  Family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    GPT2_MODEL,
    gpt2_block(
      "gelu_pytorch_tanh",
      num_kv_heads=Pair(lambda h, i: 1 if h.get("multi_query", True) else None, _say_big_code_heads),
    ),
    (
      *GPT_ENDS,
      *GPT_NORMS,
      *fused(f"{H}.attn.c_attn", interleaved=True),
      *output(f"{H}.attn.c_proj"),
      *gated(f"{H}.mlp", "c_fc", "c_proj"),
    ),
    num_layers="n_layer",
    aliases=GPT_NAMES,
    moot=frozenset({"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner"})
    | {"max_batch_size", "pad_key_length", "pre_allocate_kv_cache", "runner_max_sequence_length"}
    | {"validate_runner_input", "n_ctx"},
    buffers=GPT_BUFFERS,
  ),
  Family(
    "codegen",
    "CodeGenForCausalLM",
    model(
      layer_norm("layer_norm_epsilon"),
      head={"bias": True},
      embed={"dropout": Key("embd_pdrop", 0.0)},
      **GPT_MODEL,
    ),
    GPTJ,
    (
      *GPT_ENDS,
      *GPT_NORMS,
      # The queries of a quarter of the heads, their values, their keys; then the next quarter.
      Row(f"{H}.attn.qkv_proj.weight", ("mixer/q", "mixer/v", "mixer/k"), "(quarter c l h) d -> d (quarter l) h"),
      *output(f"{H}.attn.out_proj"),
      *gated(f"{H}.mlp", "fc_in", "fc_out"),
    ),
    num_layers="n_layer",
    moot=frozenset({"n_ctx", "rotary", "scale_attn_weights"}),
    aliases=GPT_NAMES,
    buffers=(*GPT_BUFFERS, ".attn.causal_mask", ".attn.embed_positions"),
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
    GPTJ,
    (*GPT_ENDS, *GPT_NORMS, *projections(f"{H}.attn", "out_proj"), *gated(f"{H}.mlp", "fc_in", "fc_out")),
    num_layers="n_layer",
    moot=frozenset({"n_ctx", "rotary", "scale_attn_weights"}),
    aliases=GPT_NAMES,
    buffers=(*GPT_BUFFERS, ".attn.embed_positions"),
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
      "ffn": _gpt(_inner("intermediate_size", "hidden_size"), activation=activation("activation_function", "gelu_new")),
      "norm": layer_norm("layer_norm_epsilon"),
      "dropout": Key("resid_dropout", 0.0),
    },
    (*GPT_ENDS, *GPT_NORMS, *projections(f"{H}.attn.attention", "out_proj"), *gated(f"{H}.mlp", "c_fc", "c_proj")),
    num_layers="num_layers",
    moot=frozenset({"attention_layers"}),
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    buffers=GPT_BUFFERS,
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
    aliases={"num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers"},
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
  ),
)
