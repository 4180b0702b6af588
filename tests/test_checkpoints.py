"""Checkpoints as people find them: a config alone, files in other shapes, notes and adapters beside the weights."""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
from flax import nnx
from test_convert import GPT, SIZES, TINY, VARIANTS, drawn, edit_json

import llmarch
from llmarch.__main__ import main
from llmarch.analysis import cost
from llmarch.build import build
from llmarch.config import ModelConfig
from llmarch.convert import hf
from llmarch.convert.tables import FAMILIES
from llmarch.convert.tables.defaults import DEFAULTS
from llmarch.convert.tables.lacking import LACKING
from llmarch.errors import UserError
from llmarch.layers.param import flatten
from llmarch.models.decoder import abstract

needs_peer = pytest.mark.skipif(
  importlib.util.find_spec("transformers") is None, reason="transformers is absent: no default was compared"
)
MOE = TINY | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
DEEPSEEK = TINY | dict(
  model_type="deepseek_v3", num_key_value_heads=6, kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=6,
  qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=20,
  n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip


def read(options: dict) -> ModelConfig:
  return build(ModelConfig, FAMILIES[options["model_type"]].read(options), "model")


def written(folder: pathlib.Path, options: dict) -> dict[str, np.ndarray]:
  """Writes a folder of transformers with drawn weights, and returns them."""
  config = read(options)
  shapes = {path: a.shape for path, a in flatten(nnx.state(abstract(config))).items()}
  draw = lambda path, index: drawn(f"{path}{index}", shapes[path][len(index) :]).astype(np.float32)
  folder.mkdir()
  hf.write_checkpoint(folder, config, draw, model_type=options["model_type"])
  (folder / "config.json").write_text(json.dumps(options))
  return {name: tensor.read() for name, tensor in hf.read_header(folder / hf.SINGLE)[0].items()}


def put(path: pathlib.Path, values: dict[str, np.ndarray]) -> None:
  hf.write_safetensors(path, {n: (v.dtype, v.shape) for n, v in values.items()}, values.__getitem__)


def params_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  checkpoint = hf.Checkpoint(folder)
  return {path: checkpoint.param(path) for path in checkpoint.entries}


def assert_same(one: dict, other: dict) -> None:
  assert one.keys() == other.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, other[name], name)


# ------------------------------------------------------------------------------------------------ a config alone


def test_a_config_alone_is_described_as_folder_and_as_file(tmp_path, capsys):
  (tmp_path / "config.json").write_text(json.dumps(TINY | {"torch_dtype": "bfloat16"}))
  D, F, V, N, K, layers = 24, 40, 31, 6, 2, 3
  head_dim = D // N
  by_hand = 2 * V * D + D + layers * (2 * D * N * head_dim + 2 * D * K * head_dim + 3 * D * F + 2 * D)
  for source in (tmp_path, tmp_path / "config.json"):
    assert main(["describe", f"--config={source}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["params"]["total"] == by_hand and said["model"]["precision"]["param"] == "bfloat16"


def test_a_quantised_folder_is_described_and_its_weights_are_refused(tmp_path, capsys):
  options = TINY | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
  (tmp_path / "config.json").write_text(json.dumps(options))
  (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
  assert main(["describe", f"--config={tmp_path}", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["params"]["total"] == cost.params(read(TINY))["total"]
  with pytest.raises(UserError, match="quant_method='bitsandbytes' is not among"):
    hf.Checkpoint(tmp_path)


def test_the_family_is_looked_at_before_a_weight_is_opened(tmp_path, capsys):
  (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
  (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
  assert main(["convert", f"--from={tmp_path}", f"--to={tmp_path / 'out'}"]) == 2
  said = capsys.readouterr().err
  assert "'unheard_of' is unknown" in said and "safetensors" not in said and "did you mean" not in said


# ------------------------------------------------------------------------------------- what a config.json says


# transformers forgets the base of DBRX's rotary positions, attn_config.rope_theta, where a file has no rope_parameters.
NOT_COMPARED = {("dbrx", "rope_parameters")}


@needs_peer
@pytest.mark.parametrize("family", [name for name in FAMILIES if name in DEFAULTS])
def test_an_absent_option_has_the_default_of_transformers(family):
  """Each option of a sound file is left out in turn; transformers' own class then says which value it has."""
  from transformers.models.auto.configuration_auto import CONFIG_MAPPING

  kind = CONFIG_MAPPING[family]
  said = lambda options: json.loads(json.dumps(kind(**options).to_dict()))
  meant = lambda options: hf.canonical(read(options))
  sizes = {k: v for k, v in (SIZES | GPT).items() if k in kind.__dataclass_fields__}
  variant = sizes | {k: v for k, v in VARIANTS[family][0].items() if k not in ("long", "layer_types")}
  sound = {k: v for k, v in said(variant).items() if k != "layer_types"}
  assert meant(sound) == meant(said(sound))
  compared = 0
  for name in kind.__dataclass_fields__.keys() & FAMILIES[family]._keys & sound.keys():
    less = {k: v for k, v in sound.items() if k != name}
    try:
      want = meant(said(less))
    except Exception:  # without this option, the others are of no use to transformers either
      continue
    if (family, name) not in NOT_COMPARED:
      assert meant(less) == want, name
      compared += 1
  assert compared >= 5


def test_all_that_is_refused_is_named_at_once_in_order():
  options = TINY | dict(zeta=1, alpha=[2], hidden_act="swoosh", num_hidden_layers=0, is_encoder_decoder=True)
  with pytest.raises(UserError) as e:
    read(options)
  found = [str(e.value).find(word) for word in ("hidden_act='swoosh'", "is_encoder_decoder", "num_hidden_layers=0")]
  assert -1 not in found and found == sorted(found)
  assert "the options alpha=[2], zeta=1 are not in the table" in str(e.value)


IDLE = [
  dict(max_length=20, do_sample=True, temperature=0.6, bad_words_ids=None, forced_eos_token_id=7),
  dict(torchscript=False, pruned_heads={}, use_bfloat16=True, tie_encoder_decoder=False, num_labels=2),
  dict(unsloth_fixed=True, _attn_implementation_autoset=True, is_llama_config=True, rope_interleaved=False),
  dict(auto_map={"AutoConfig": "x.Y"}, norm_eps=1e-6, rms_norm_eps=1e-6),
  dict(use_qk_norm=False, qk_layernorm=False, attention_bias=False, final_logit_softcapping=None),
  dict(partial_rotary_factor=1.0, shared_expert_intermediate_size=0, n_shared_experts=0, is_causal=True),
  {"transformers.js_config": {"dtype": "q4"}, "sequence_parallel_enabled": False, "lm_head_bias": False},
  dict(output_past=True, prefill_chunk_size=128, context_window_size=64, max_window_layers=2),
  dict(mystery=None, time_step_limit=None, rope_scaling=None),
]


@pytest.mark.parametrize("idle", IDLE, ids=lambda idle: next(iter(idle)))
def test_an_option_without_effect_refuses_nothing(idle):
  assert read(TINY | idle) == read(TINY | {k: v for k, v in idle.items() if k == "rms_norm_eps"})


@pytest.mark.parametrize("option", ["use_qk_norm", "rope_interleaved", "lm_head_bias", "is_encoder_decoder", "alibi"])
def test_an_option_that_would_change_the_numbers_is_refused(option):
  with pytest.raises(UserError, match=option):
    read(TINY | {option: True})


def test_a_known_model_type_is_refused_with_what_it_has(tmp_path):
  """And none of those stands in the tables."""
  read_as = {name for family in FAMILIES.values() for name in (family.model_type, *family.also)}
  assert not read_as & LACKING.keys()
  for name, why in LACKING.items():
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "text_config": {"hidden_size": 8}}))
    with pytest.raises(UserError) as e:
      hf.Described.of(tmp_path)
    assert str(e.value) == f"{tmp_path / 'config.json'}: the model_type {name!r} is not read: {why}"
    assert why.startswith(("it has ", "it is ", "its "))


EXAONE = TINY | dict(model_type="exaone4", num_hidden_layers=5, sliding_window=3)
SPELT = {  # name: two ways of saying one thing
  "letters": (
    EXAONE | dict(sliding_window_pattern="LLG"),
    EXAONE | dict(layer_types=["sliding_attention" if c == "L" else "full_attention" for c in "LLGLL"]),
  ),
  "a number": (EXAONE | dict(sliding_window_pattern=3), EXAONE | dict(sliding_window_pattern="LLG")),
  "rotary_dim": (
    MOE | dict(model_type="minimax_m2", head_dim=8, rotary_dim=4, attn_type_list=[1, 1, 1]),
    MOE | dict(model_type="minimax_m2", head_dim=8, rope_parameters=dict(partial_rotary_factor=0.5)),
  ),
  "sections": (
    TINY | dict(model_type="qwen2", rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2])),
    TINY | dict(model_type="qwen2"),
  ),
  "no growth": (
    TINY | dict(model_type="ministral3", rope_parameters=dict(rope_type="default", llama_4_scaling_beta=0)),
    TINY | dict(model_type="ministral3", rope_parameters=dict(rope_type="default")),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELT)
def test_two_ways_of_saying_one_thing_are_one_config(name):
  one, other = SPELT[name]
  assert hf.canonical(read(one)) == hf.canonical(read(other))


def test_layers_of_another_kind_of_attention_are_refused():
  with pytest.raises(UserError, match="attn_type_list"):
    read(MOE | dict(model_type="minimax_m2", head_dim=8, attn_type_list=[1, 0, 1]))


def test_infinity_is_a_number_where_nothing_reads_it(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(TINY | {"max_length": float("inf")}))
  assert hf.read_config(tmp_path) == read(TINY)
  (tmp_path / "config.json").write_text(json.dumps(TINY | {"rms_norm_eps": float("inf")}))
  with pytest.raises(UserError, match="eps"):
    hf.read_config(tmp_path)


def test_a_known_class_stands_in_for_an_absent_type(tmp_path):
  for name in ("LlamaForCausalLM", "LlamaModel"):
    options = {k: v for k, v in TINY.items() if k != "model_type"} | {"architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert hf.read_config(tmp_path) == read(TINY)


def test_rope_scaling_replaces_rope_parameters():
  scaling = {"type": "linear", "factor": 4.0}
  both = read(TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_scaling": scaling})
  assert both == read(TINY | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}})


@pytest.mark.parametrize(
  "rope, longest",
  [
    ({"rope_type": "linear", "factor": 4.0}, 256),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64),
    ({"rope_type": "dynamic", "factor": 2.0}, 128),
    ({"rope_type": "default"}, 64),
  ],
)
def test_a_scaling_makes_room(rope, longest):
  config = read(TINY | {"rope_parameters": rope})
  assert config.max_seq_len == longest
  _, options = hf.express(config, "llama")
  assert build(ModelConfig, FAMILIES["llama"].read(options), "model").max_seq_len == longest


def test_gelu_means_its_tanh_form_in_the_first_gemma():
  gemma = {k: v for k, v in TINY.items() if k != "tie_word_embeddings"} | dict(model_type="gemma", head_dim=4)
  assert read(gemma | {"hidden_act": "gelu"}) == read(gemma | {"hidden_act": "gelu_pytorch_tanh"})
  assert read(TINY | {"hidden_act": "gelu"}) != read(TINY | {"hidden_act": "gelu_pytorch_tanh"})


# ------------------------------------------------------------------------------------------ files in other shapes


def test_names_without_the_base_prefix_are_the_same_weights(tmp_path):
  theirs = written(tmp_path / "hf", TINY)
  want = params_of(tmp_path / "hf")
  put(tmp_path / "hf" / hf.SINGLE, {name.removeprefix("model."): value for name, value in theirs.items()})
  assert_same(params_of(tmp_path / "hf"), want)


def test_experts_in_one_tensor_are_the_same_weights(tmp_path):
  theirs = written(tmp_path / "hf", MOE)
  want, fused = params_of(tmp_path / "hf"), {}
  for name, value in theirs.items():
    if "experts" not in name:
      fused[name.replace("block_sparse_moe", "mlp")] = value
  for layer in range(3):
    one, all_of = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
    gate, down, up = (np.stack([theirs[f"{one}.{e}.{w}.weight"] for e in range(4)]) for w in ("w1", "w2", "w3"))
    fused |= {f"{all_of}.gate_up_proj": np.concatenate([gate, up], 1), f"{all_of}.down_proj": down}
  put(tmp_path / "hf" / hf.SINGLE, fused)
  assert_same(params_of(tmp_path / "hf"), want)


def test_layers_that_predict_further_ahead_are_left_out(tmp_path):
  theirs = written(tmp_path / "hf", DEEPSEEK)
  want = params_of(tmp_path / "hf")
  more = {name.replace("layers.2.", "layers.3."): 2 * value for name, value in theirs.items() if "layers.2." in name}
  put(tmp_path / "hf" / hf.SINGLE, theirs | more | {"model.layers.3.eh_proj.weight": np.ones((24, 48), np.float32)})
  with pytest.raises(UserError, match=r"layers\.3"):
    hf.Checkpoint(tmp_path / "hf")
  edit_json(tmp_path / "hf" / "config.json", lambda data: data.update(num_nextn_predict_layers=1))
  assert_same(params_of(tmp_path / "hf"), want)
  assert hf.Checkpoint(tmp_path / "hf").notes == {"left out": "layers.3"}


def test_layers_that_predict_further_ahead_have_names_of_their_own(tmp_path):
  """Those of MiMo, whose decoder is a Qwen2."""
  theirs = written(tmp_path / "hf", TINY | dict(model_type="qwen2"))
  want = params_of(tmp_path / "hf")
  put(tmp_path / "hf" / hf.SINGLE, theirs | {"model.mtp_layers.0.input_proj.weight": np.ones((24, 48), np.float32)})
  edit_json(tmp_path / "hf" / "config.json", lambda data: data.update(model_type="mimo", num_nextn_predict_layers=1))
  assert_same(params_of(tmp_path / "hf"), want)
  assert hf.Checkpoint(tmp_path / "hf").notes == {"left out": "mtp_layers"}


def test_a_tensor_of_another_dtype_is_cast_to_that_of_the_rest(tmp_path):
  theirs = written(tmp_path / "hf", TINY)
  wide = {n: v if "norm" in n else v.astype(hf.DTYPES["BF16"]) for n, v in theirs.items()}
  put(tmp_path / "hf" / hf.SINGLE, wide)
  checkpoint = hf.Checkpoint(tmp_path / "hf")
  assert checkpoint.config.precision.param == "bfloat16"
  assert checkpoint.notes == {"cast": "7 tensors of F32 to bfloat16"}
  want = theirs["model.norm.weight"].astype(hf.DTYPES["BF16"])
  np.testing.assert_array_equal(checkpoint.param("final_norm/scale"), want)
  narrow = {n: v.astype(np.float16) for n, v in theirs.items()} | {"model.norm.weight": np.full(24, 1e6, np.float32)}
  put(tmp_path / "hf" / hf.SINGLE, narrow)
  with pytest.raises(UserError, match="model.norm.weight holds values beyond float16"):
    params_of(tmp_path / "hf")


def test_the_makers_own_names_are_the_same_weights(tmp_path):
  """In consolidated.safetensors the two halves of a rotated pair stand side by side: rows 0, 2, 1, 3 of a head of 4."""
  theirs = written(tmp_path / "hf", TINY | {"model_type": "mistral", "sliding_window": None})
  want, own = params_of(tmp_path / "hf"), {}
  names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3"}
  names |= {"down_proj": "w2", "self_attn": "attention", "mlp": "feed_forward", "input_layernorm": "attention_norm"}
  names |= {"post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output"}
  for name, value in theirs.items():
    new = ".".join(names.get(word, word) for word in name.removeprefix("model.").split("."))
    if new.endswith(("wq.weight", "wk.weight")):
      value = value.reshape(-1, 4, 24)[:, [0, 2, 1, 3]].reshape(value.shape)
    own[new] = value
  (tmp_path / "hf" / hf.SINGLE).unlink()
  put(tmp_path / "hf" / hf.ORIGINAL, own)
  assert_same(params_of(tmp_path / "hf"), want)


def test_the_decoder_of_a_wrapper_is_read_alone(tmp_path):
  theirs = written(tmp_path / "hf", TINY)
  want = params_of(tmp_path / "hf")
  outer = {"model_type": "llava", "text_config": TINY, "vision_config": {}, "image_token_index": 5}
  (tmp_path / "hf" / "config.json").write_text(json.dumps(outer))
  eye = {"vision_tower.patch.weight": np.ones((3, 4), np.float32), "multi_modal_projector.bias": np.ones(3, np.float32)}
  newer = {
    name if name.startswith("lm_head") else name.replace("model.", "model.language_model."): value
    for name, value in theirs.items()
  }
  for inside in ({f"language_model.{name}": value for name, value in theirs.items()}, newer):
    put(tmp_path / "hf" / hf.SINGLE, inside | eye)
    assert_same(params_of(tmp_path / "hf"), want)
    assert hf.Checkpoint(tmp_path / "hf").notes == {"left out": "multi_modal_projector, vision_tower"}


def test_a_wrapper_may_have_its_decoder_beside_its_own_parts(tmp_path):
  """Older files of Qwen2-VL have one level of options and of names, newer ones two."""
  theirs = written(tmp_path / "hf", TINY | dict(model_type="qwen2"))
  want = params_of(tmp_path / "hf")
  eye = {"visual.patch_embed.proj.weight": np.ones((3, 4), np.float32)}
  rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
  put(tmp_path / "hf" / hf.SINGLE, theirs | eye)
  flat = TINY | rope | dict(model_type="qwen2_vl", vision_config={}, image_token_id=5)
  nested = dict(model_type="qwen2_vl", vision_config={}, tie_word_embeddings=False)
  nested["text_config"] = {k: v for k, v in TINY.items() if k != "model_type"} | rope
  for outer in (flat, nested):
    (tmp_path / "hf" / "config.json").write_text(json.dumps(outer))
    assert_same(params_of(tmp_path / "hf"), want)
    assert hf.Checkpoint(tmp_path / "hf").notes == {"left out": "visual"}


def test_a_wrapper_may_have_the_type_of_its_decoder(tmp_path):
  text = TINY | dict(model_type="ministral3", rope_parameters=dict(rope_type="default", rope_theta=500.0))
  outer = dict(model_type="ministral3", text_config=text, vision_config={}, image_token_index=10)
  (tmp_path / "config.json").write_text(json.dumps(outer))
  assert hf.read_config(tmp_path) == read(text)


def test_a_tokenizer_may_have_ids_beyond_the_table(tmp_path):
  """The bytes have 257 ids, the table 31 rows: a text within them is continued, and one beyond them is refused."""
  written(tmp_path / "hf", TINY)
  (tmp_path / "hf" / "tokenizer.json").write_text('{"kind": "bytes"}\n')
  lm = llmarch.load(tmp_path / "hf")
  assert lm.logits([[1, 30]]).shape == (1, 2, 31)
  with pytest.raises(UserError, match="ids run from 0 to 30"):
    lm.generate("text", max_new_tokens=1)
  assert len(lm.generate([1, 30], max_new_tokens=2)) <= 2


# ------------------------------------------------------------------------------------------------------ adapters


def with_adapter(folder: pathlib.Path, **options) -> tuple[dict, dict]:
  """Writes a base and an adapter of rank 2 for all v_proj; returns the weights of the base and the adapter's."""
  theirs = written(folder / "base", TINY)
  shapes = {name: value.shape for name, value in theirs.items() if "v_proj" in name}
  pairs = {}
  for name, (out, into) in shapes.items():
    module = f"base_model.model.{name.removesuffix('.weight')}"
    pairs[f"{module}.lora_A.weight"] = drawn(name + "A", (2, into)).astype(np.float32)
    pairs[f"{module}.lora_B.weight"] = drawn(name + "B", (out, 2)).astype(np.float32)
  (folder / "adapter").mkdir()
  put(folder / "adapter" / "adapter_model.safetensors", pairs)
  said = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(folder / "base")} | options
  (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
  return theirs, pairs


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
  "options, scale", [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5), ({"alpha_pattern": {"v_proj": 4}}, 2.0)]
)
def test_an_adapter_is_added_to_its_base(tmp_path, options, scale, beside):
  theirs, pairs = with_adapter(tmp_path, **options)
  folder = tmp_path / "adapter"
  if beside:
    folder = tmp_path / "base"
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
  got = params_of(folder)
  merged = {}
  for name, value in theirs.items():
    module = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{module}.lora_A.weight" in pairs:
      value = value + np.float32(scale) * (pairs[f"{module}.lora_B.weight"] @ pairs[f"{module}.lora_A.weight"])
    merged[name] = value
  (tmp_path / "merged").mkdir()
  (tmp_path / "merged" / "config.json").write_text(json.dumps(TINY))
  put(tmp_path / "merged" / hf.SINGLE, merged)
  for path, value in params_of(tmp_path / "merged").items():
    np.testing.assert_allclose(got[path], value, rtol=1e-6, atol=1e-6)
  assert hf.Checkpoint(folder).notes == {"adapters": "added to 3 matrices"}


@pytest.mark.parametrize(
  "options, named",
  [
    ({"use_dora": True}, "use_dora"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"base_model_name_or_path": "someone/else"}, "someone/else"),
    ({"bias": "all", "modules_to_save": ["lm_head"]}, "bias='all', modules_to_save"),
  ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, options, named):
  with_adapter(tmp_path, **options)
  with pytest.raises(UserError, match=named):
    llmarch.load(tmp_path / "adapter")


# ------------------------------------------------------------------------------------- what stands beside the weights

BESIDE = {
  "tokenizer_config.json": {"chat_template": "{{ messages }}", "eos_token": "<end>"},
  "generation_config.json": {"eos_token_id": [3, 4], "repetition_penalty": 1.05},
  "special_tokens_map.json": {"pad_token": "<pad>"},
}


def test_what_stands_beside_the_weights_travels_there_and_back(tmp_path):
  written(tmp_path / "hf", TINY | {"eos_token_id": [3, 4], "temperature": 0.6})
  for name, data in BESIDE.items():
    (tmp_path / "hf" / name).write_text(json.dumps(data))
  (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
  assert main(["convert", f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'ours'}"]) == 0
  assert main(["convert", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--format=hf"]) == 0
  for name in (*BESIDE, "chat_template.jinja"):
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
  back = json.loads((tmp_path / "back" / "config.json").read_text())
  assert back["eos_token_id"] == [3, 4] and back["temperature"] == 0.6
