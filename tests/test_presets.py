"""Presets at full size against the published counts, cost formulas against the model, and the two commands."""

import dataclasses
import functools
import glob
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest
import spaces
from flax import nnx
from tiers import plain_if

from llmarch.__main__ import main
from llmarch.adapt.padding import block_of
from llmarch.analysis import cost, hardware
from llmarch.build import differences, number_with_unit, to_dict
from llmarch.commands.common import load_config, table_lines
from llmarch.config import ModelConfig
from llmarch.layers.mask import Bidirectional, Causal, Prefix
from llmarch.layers.moe import MoEConfig
from llmarch.layers.param import flatten
from llmarch.models import decoder
from llmarch.ops import attention as ops
from llmarch.ops import cache
from llmarch.presets import PRESETS, shrink
from llmarch.run_config import SGD, Adafactor, AdamW, Lion, Muon, OptimizerConfig, RunConfig, TrainConfig

# Sums of the leaves of the released checkpoints, buffers apart; of PaLM, GPT-3, MT-NLG and Nemotron-4 the
# sums that the published sizes give, within the papers' rounding.
PUBLISHED = {
  "gpt_2_small": 124_439_808,
  "gpt_2_medium": 354_823_168,
  "gpt_2_large": 774_030_080,
  "gpt_2_xl": 1_557_611_200,
  "gpt_3_175b": 174_604_259_328,
  "gpt_j_6b": 6_050_882_784,
  "mt_nlg_530b": 529_600_819_200,
  "palm_8b": 8_632_012_800,
  "palm_62b": 62_495_662_080,
  "palm_540b": 540_356_474_880,
  "palm_540b_padded": 558_173_878_272,
  "llama_7b": 6_738_415_616,
  "llama_13b": 13_015_864_320,
  "llama_33b": 32_528_943_616,
  "llama_65b": 65_285_660_672,
  "llama_2_7b": 6_738_415_616,
  "llama_2_13b": 13_015_864_320,
  "llama_2_70b": 68_976_648_192,
  "llama_3_8b": 8_030_261_248,
  "llama_3_70b": 70_553_706_496,
  "llama_3_1_405b": 405_853_388_800,
  "llama_3_2_1b": 1_235_814_400,
  "llama_3_2_3b": 3_212_749_824,
  "mistral_7b": 7_241_732_096,
  "qwen_1_5_0_5b": 463_987_712,
  "qwen_1_5_1_8b": 1_836_828_672,
  "qwen_1_5_4b": 3_950_369_280,
  "qwen_1_5_7b": 7_721_324_544,
  "qwen_1_5_14b": 14_167_290_880,
  "qwen_1_5_32b": 32_512_218_112,
  "qwen_1_5_72b": 72_287_920_128,
  "qwen_2_5_0_5b": 494_032_768,
  "qwen_2_5_1_5b": 1_543_714_304,
  "qwen_2_5_3b": 3_085_938_688,
  "qwen_2_5_7b": 7_615_616_512,
  "qwen_2_5_14b": 14_770_033_664,
  "qwen_2_5_32b": 32_763_876_352,
  "qwen_2_5_72b": 72_706_203_648,
  "qwen_3_0_6b": 596_049_920,
  "qwen_3_1_7b": 1_720_574_976,
  "qwen_3_4b": 4_022_468_096,
  "qwen_3_8b": 8_190_735_360,
  "qwen_3_14b": 14_768_307_200,
  "qwen_3_32b": 32_762_123_264,
  "gemma_2b": 2_506_172_416,
  "gemma_7b": 8_537_680_896,
  "gemma_2_2b": 2_614_341_888,
  "gemma_2_9b": 9_241_705_984,
  "gemma_2_27b": 27_227_128_320,
  "gemma_3_1b": 999_885_952,
  "gemma_3_4b": 3_880_263_168,
  "gemma_3_12b": 11_766_034_176,
  "gemma_3_27b": 27_009_346_304,
  "deepseek_v2_lite": 15_706_484_224,
  "deepseek_v2": 235_741_434_880,
  "deepseek_v3": 671_026_419_200,
  "mixtral_8x7b": 46_702_792_704,
  "mixtral_8x22b": 140_630_071_296,
  "qwen_1_5_moe_a2_7b": 14_315_784_192,
  "qwen_2_57b_a14b": 57_408_658_944,
  "qwen_3_30b_a3b": 30_532_122_624,
  "qwen_3_235b_a22b": 235_093_634_560,
  "deepseek_moe_16b": 16_375_728_128,
  "olmoe_1b_7b": 6_919_161_856,
  "dbrx": 131_596_523_520,
  "grok_1": 315_684_820_992,
  "gpt_oss_20b": 20_914_757_184,
  "gpt_oss_120b": 116_829_156_672,
  "glam_64b_64e": 1_161_755_099_136 + 129 * 8192 + 2 * 32 * 128,  # its matrices; the norms, and two tables of T5's
  "falcon_7b": 6_921_720_704,
  "falcon_40b": 41_303_293_952,
  "falcon_180b": 179_522_565_120,
  "mpt_7b": 6_649_286_656,
  "mpt_30b": 29_957_200_896,
  "bloom_560m": 559_214_592,
  "bloom_7b1": 7_069_016_064,
  "bloom_176b": 176_247_271_424,
  "nemotron_4_15b": 15_628_775_424,
  "nemotron_4_340b": 341_029_195_776,
}

# Of mixtures of experts, those that one token uses; the routers' biases among them.
ACTIVE = {
  "mixtral_8x7b": 12_879_925_248,
  "mixtral_8x22b": 39_161_468_928,
  "qwen_1_5_moe_a2_7b": 2_689_173_504,
  "qwen_2_57b_a14b": 14_249_270_784,
  "qwen_3_30b_a3b": 3_353_032_704,
  "qwen_3_235b_a22b": 22_190_763_520,
  "deepseek_moe_16b": 2_828_650_496,
  "olmoe_1b_7b": 1_282_017_280,
  "dbrx": 36_469_708_800,
  "grok_1": 83_756_587_008,
  "gpt_oss_20b": 4_187_440_704,
  "gpt_oss_120b": 5_711_982_912,
  "glam_64b_64e": 96_603_209_728 + 129 * 8192 + 2 * 32 * 128,
  "deepseek_v2_lite": 2_661_150_208,
  "deepseek_v2": 21_375_800_320,
  "deepseek_v3": 37_552_297_472,
}

TOYS = {name: shrink(make()) for name, make in PRESETS.items()} | spaces.HAND
DISTINCT = list({config: name for name, config in TOYS.items()}.values())  # members of a family may shrink to one
abstract = functools.cache(decoder.abstract)


# ---------------------------------------------------------------------------------------------- parameters


def component(path: str, config: ModelConfig) -> str:
  """Which row of cost.params a parameter belongs to."""
  if path.startswith("encoder/"):
    return "encoder"
  if "/cross/" in path:
    return block_of(path, config).cross.kind
  if "norm" in path and "/mixer/" not in path:
    return "norms"
  if "/mixer/" in path:
    return block_of(path, config).mixer.kind
  if "/ffn/" in path:
    return "ffn"
  return "head" if path.startswith("head") else "embed" if path.startswith("embed") else "position"


def leaves_by_component(config: ModelConfig) -> dict[str, int]:
  found = dict.fromkeys(cost.params(config), 0)
  for path, leaf in flatten(nnx.state(abstract(config))).items():
    found[component(path, config)] += math.prod(leaf.shape)
    found["total"] += math.prod(leaf.shape)
  return found


def test_every_published_count_has_a_preset():
  assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_formula_and_abstract_model_and_published_count_agree(name):
  config = PRESETS[name]()
  assert cost.params(config) == leaves_by_component(config)
  assert cost.params(config)["total"] == PUBLISHED[name]
  assert cost.active_params(config) == ACTIVE.get(name, PUBLISHED[name])


@pytest.mark.parametrize("name", DISTINCT)
def test_formula_gives_the_parameters_of_every_component(name):
  assert cost.params(TOYS[name]) == leaves_by_component(TOYS[name])


# --------------------------------------------------------------------------------------------------- toys

SIZES = {
  "d_model", "vocab_size", "max_seq_len", "stack", "num_heads", "num_kv_heads", "head_dim", "dims", "d_ff",
  "window", "original", "length", "scale", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
  "v_head_dim", "num_experts", "k", "num", "top",
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_shrunk_preset_differs_from_it_in_sizes_alone(name):
  config, toy = PRESETS[name](), TOYS[name]
  changed = {line.split(": ")[0].rsplit(".", 1)[1] for line in differences(to_dict(config), to_dict(toy))}
  assert changed <= SIZES
  for block, small in zip(config.blocks.values(), toy.blocks.values(), strict=True):
    big, small = block.mixer, small.mixer
    kind = lambda c: (type(c), c.kv_heads == 1, c.kv_heads == c.num_heads)
    assert kind(big) == kind(small)
    absent = lambda c: [name for name, value in vars(c).items() if value is None]
    assert absent(big) == absent(small)
    if getattr(big.position, "dims", None):
      partial = [c.position.rotated(c.dim(d)) < c.dim(d) for c, d in ((big, config.d_model), (small, toy.d_model))]
      assert partial[0] == partial[1]
  runs = lambda c: [n for i, n in enumerate(c.layers) if i == 0 or c.layers[i - 1] != n]
  assert runs(toy) == runs(config)[: len(runs(toy))] and len(toy.layers) >= 2
  assert cost.params(toy)["total"] < 500_000


def test_shrunk_sizes_are_unequal_and_its_window_shorter_than_its_context():
  for name in PRESETS:
    toy = TOYS[name]
    for block in toy.blocks.values():
      m = block.mixer
      d_ff = getattr(block.ffn, "expert", block.ffn).d_ff
      sizes = [toy.d_model, toy.vocab_size, toy.max_seq_len, d_ff, m.num_heads, m.dim(toy.d_model)]
      sizes += [n for name, n in vars(m).items() if n and (name.endswith("_rank") or name == "v_head_dim")]
      sizes += [m.kv_heads] if m.kv_heads != m.num_heads else []
      assert len(set(sizes)) == len(sizes), (name, sizes)
      assert m.window is None or m.window < toy.max_seq_len / 4


# ------------------------------------------------------------------------------------------ decoding state


@pytest.mark.parametrize("name", DISTINCT)
def test_state_bytes_are_those_of_the_models_state(name):
  precision = dataclasses.replace(TOYS[name].precision, state="bfloat16")
  config = dataclasses.replace(TOYS[name], precision=precision)
  model = abstract(config)
  for batch, max_len, chunk in [(3, 20, 1), (2, 20, 7), (1, 4, 4)]:
    layers = model.state_spec(batch, max_len, chunk)["layers"]
    specs = jax.tree.leaves(layers, is_leaf=cache.is_spec)
    sizes = [math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in specs]
    assert cost.state_bytes(config, batch, max_len, chunk) == sum(sizes)
    is_held = lambda x: isinstance(x, cache.Held)
    held = filter(is_held, jax.tree.leaves(layers, is_leaf=is_held))
    rings = [s for h in held if h.buffer.startswith("ring") for s in jax.tree.leaves(h.leaves, is_leaf=cache.is_spec)]
    one_slot = lambda s: math.prod(s.shape) // s.shape[-2] * jnp.dtype(s.dtype).itemsize  # [..., B, K, S, H]
    assert batch * cost.kv_bytes_per_token(config, 2) == sum(map(one_slot, rings))


@pytest.mark.parametrize("name, gib", [("llama_3_70b", 5.0), ("llama_7b", 8.0), ("mistral_7b", 0.5)])
def test_kv_cache_of_16k_tokens_in_16_bits_has_the_known_size(name, gib):
  assert cost.state_bytes(PRESETS[name](), 1, 16384) / 2 / 2**30 == pytest.approx(gib, rel=0.01)


# -------------------------------------------------------------------------------------------------- FLOPs


def dot_flops(jaxpr) -> int:
  """FLOPs of all matrix products of a jaxpr, a scan's body as often as it runs."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      summed = eqn.params["dimension_numbers"][0][0]
      lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
      total += 2 * math.prod(out) * math.prod(lhs[i] for i in summed)
    inner = [p for p in jax.tree.leaves(list(eqn.params.values())) if hasattr(p, "eqns")]
    total += eqn.params.get("length", 1) * sum(map(dot_flops, inner))
  return total


B, T = 3, 12


def forward_and_gradient_jaxprs(config: ModelConfig):
  graph, state = nnx.split(abstract(config))
  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)

  def logits(state, tokens, positions):
    return nnx.merge(graph, state)(tokens, positions)[0]

  gradient = jax.grad(lambda *args: jnp.sum(logits(*args)))
  return (jax.make_jaxpr(f)(state, tokens, tokens).jaxpr for f in (logits, gradient))


# How many rows an expert multiplies is known when it runs: tests/test_moe.py. How long a source is, no config says.
DENSE = [
  n for n in DISTINCT
  if not TOYS[n].encoder and not any(isinstance(c, MoEConfig) for c in spaces.components(TOYS[n]))
]  # fmt: skip


@pytest.mark.parametrize("name", plain_if(DENSE[::4].count, DENSE))
def test_flops_are_those_of_the_matrix_products_in_the_forward_and_gradient(name):
  forward, gradient = forward_and_gradient_jaxprs(TOYS[name])
  assert cost.flops_per_token(TOYS[name], T, dense=True) * B * T == dot_flops(forward)
  assert cost.train_flops_per_token(TOYS[name], T, dense=True) * B * T == dot_flops(gradient)


@pytest.mark.parametrize("mask", [Causal(), Bidirectional(), Prefix()], ids=lambda mask: mask.kind)
@pytest.mark.parametrize("window", [None, 1, 4, 9, 30])
@pytest.mark.parametrize("length", [1, 4, 9, 13])
def test_mean_keys_count_what_the_mask_lets_see(mask, window, length):
  tokens = ops.Keys(jnp.arange(length)[None], jnp.zeros((1, length), jnp.int32), None)
  seen = ops.visible(tokens, tokens, mask=mask, window=window)
  assert mask.mean_keys(length, window) == pytest.approx(float(jnp.sum(seen)) / length, rel=1e-6)


def test_masked_scores_are_counted_by_dense_alone():
  config = TOYS["gemma_2_2b"]  # 4 heads of 10; two layers see 5 keys, two see all
  heads = 4 * 10
  matrices = cost.flops_per_token(config, T) - 2 * (2 * 2 * heads) * (Causal().mean_keys(T, 5) + (T + 1) / 2)
  assert matrices == pytest.approx(cost.flops_per_token(config, T, dense=True) - 4 * (2 * 2 * heads) * T)


def test_palm_540b_at_its_published_mfu_runs_at_its_published_speed():
  """46.2 % of 6144 TPU v4 is 238.3 thousand tokens a second (2204.02311, appendix B and table 3)."""
  flops = cost.train_flops_per_token(PRESETS["palm_540b"](), 2048, dense=True)
  assert 0.462 * 6144 * 275e12 / flops == pytest.approx(238.3e3, rel=2e-3)


# ------------------------------------------------------------------------------------------------- memory


def experiment(model: ModelConfig, algorithm) -> RunConfig:
  return RunConfig(
    model=model, optimizer=OptimizerConfig(algorithm=algorithm), train=TrainConfig(seq_len=model.max_seq_len)
  )


def optimizer_bytes(config: RunConfig) -> int:
  """Of the arrays that the optimizer's state holds under the name of a parameter."""
  from llmarch.train.optim import make_optimizer

  named = flatten(nnx.state(abstract(config.model)), variables=True)
  init = make_optimizer(config.optimizer, config.train.steps, named).init
  shapes = {name: jax.ShapeDtypeStruct(p.shape, jnp.float32) for name, p in named.items()}
  state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, shapes))
  moments = [s for path, s in state if any(getattr(k, "key", None) in named for k in path)]
  return sum(math.prod(s.shape) * s.dtype.itemsize for s in moments)


@pytest.mark.parametrize("algorithm", [AdamW(), Lion(), SGD(), SGD(momentum=0.9), Muon()], ids=str)
@pytest.mark.parametrize("name", ["llama_3_8b", "gpt_2_small", "t5"])
def test_optimizer_bytes_are_those_of_its_moments(name, algorithm):
  config = experiment(PRESETS[name]() if name in PRESETS else TOYS[name], algorithm)
  assert cost.training_bytes(config)["optimizer"] == optimizer_bytes(config)


def test_adafactor_holds_below_a_hundredth_of_the_parameters():
  config = experiment(PRESETS["llama_3_8b"](), Adafactor())
  assert cost.training_bytes(config)["optimizer"] == 0
  assert 0 < optimizer_bytes(config) < 0.01 * cost.training_bytes(config)["params"]


def test_training_bytes_add_up():
  config = load_config("gpt_2_small", [("model.precision.param", "bfloat16"), ("train.ema", "0.99")])
  n = PUBLISHED["gpt_2_small"]
  assert cost.training_bytes(config) == {
    "params": 2 * n, "gradients": 4 * n, "optimizer": 8 * n, "ema": 4 * n, "total": 18 * n,
  }  # fmt: skip


# ----------------------------------------------------------------------------------------------- hardware


@pytest.mark.parametrize(
  "kind, half, single",
  [("NVIDIA H200", 989e12, 494e12), ("NVIDIA A100-SXM4-80GB", 312e12, 156e12), ("TPU v5 lite", 197e12, 197e12)],
)
def test_peaks_are_found_by_the_kind_of_device(kind, half, single):
  device = types.SimpleNamespace(device_kind=kind)
  assert hardware.peak_flops(device, "bfloat16") == half and hardware.peak_flops(device, "float32") == single


def test_no_row_of_peaks_hides_a_later_one():
  kinds = list(hardware.PEAKS)
  assert not [(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :] if b.startswith(a)]


def test_an_unlisted_device_is_measured():
  assert 1e8 < hardware.peak_flops(jax.devices("cpu")[0], "float32") < 1e14


# ----------------------------------------------------------------------------------------------- commands


def run(capsys, *argv: str) -> str:
  assert main(list(argv)) == 0
  return capsys.readouterr().out


def test_presets_lists_every_preset_with_its_sizes(capsys):
  rows = {row["name"]: row for row in json.loads(run(capsys, "presets", "--json"))}
  assert {name: row["params"] for name, row in rows.items()} == PUBLISHED
  expected = {
    "active_params": 8_030_261_248, "layers": 32, "d_model": 4096, "d_ff": 14336, "heads": 32, "kv_heads": 8,
    "head_dim": 128, "vocab": 128256, "norm": "rmsnorm", "activation": "gated silu", "position": "rope 500000",
    "context": 8192, "kv_bytes_per_token": 131072,
  }  # fmt: skip
  assert expected.items() <= rows["llama_3_8b"].items()
  text = run(capsys, "presets")
  assert all(name in text for name in PUBLISHED) and "8.03 B" in text


@pytest.mark.parametrize("width", [30, 45, 60, 80, 120, 200])
def test_a_table_fits_its_width_splits_no_number_and_names_what_it_hides(width):
  rows = [
    {"name": "one", "params": "8.03 B (3.1 B)", "words": "rmsnorm at the input, and at the output of each", "n": 10**9,
     "heads": "32/8", "said": None, "last": 0.123456},
    {"name": "another", "params": "124 M", "words": "layernorm", "n": 7, "heads": None, "said": "yes", "last": 1.0},
  ]  # fmt: skip
  lines = table_lines(rows, width, "a title of some words that may be too long for a line")
  assert max(map(len, lines)) <= width
  text = " ".join(" ".join(lines).split())
  hidden = text.partition("hidden for want of room: ")[2].partition(" (")[0]
  hidden = hidden.split(", ") if hidden else []
  head = next(line for line in lines if line.startswith("name")).split()
  assert head + hidden == list(rows[0]) and (width < 80) <= bool(hidden) <= (width < 120)
  cells = {"params": "8.03 B (3.1 B)", "n": "1,000,000,000", "heads": "32/8", "last": "0.1235"}
  for name, cell in cells.items():
    assert any(cell in line for line in lines) == (name in head)
  if "words" in head:
    assert all(word in text for word in rows[0]["words"].split())


def test_a_sentence_that_begins_with_a_digit_is_wrapped():
  rows = [{"id": "a", "statement": "4 bytes of state a token, whatever the length of the row may be", "n": 1}]
  lines = table_lines(rows, 30)
  assert max(map(len, lines)) <= 30 and lines[0].split() == ["id", "statement", "n"]


@pytest.mark.parametrize("argv", [["presets"], ["plan", "llama_3_8b", "--hardware=tpu_v5p", "--chips=8", "--batch=16"]])
def test_commands_print_their_tables_as_wide_as_the_terminal(capsys, monkeypatch, argv):
  monkeypatch.setenv("COLUMNS", "80")
  narrow = run(capsys, *argv)
  assert "hidden for want of room" in narrow
  table = [line for line in narrow.splitlines() if not line.startswith(("note", "best", "  "))]
  assert max(map(len, table)) <= 80
  monkeypatch.setenv("COLUMNS", "400")
  assert "hidden for want of room" not in run(capsys, *argv)


def test_every_key_of_a_config_is_listed_with_its_type_default_and_sentence(capsys):
  keys = {key["key"]: key for key in json.loads(run(capsys, "describe", "--keys", "--json"))}

  def leaves(data, path=""):
    for name, value in data.items():
      yield from leaves(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}"]

  for name in ("llama_3_8b", "deepseek_v3"):
    for leaf in leaves(to_dict(load_config(name))):
      plain = re.sub(r"blocks\.\w+", "blocks.NAME", leaf).removesuffix(".kind")
      assert any(key.partition(" (of ")[0] == plain for key in keys), leaf
  assert all(key["sentence"] and key["type"] for key in keys.values())
  assert keys["train.batch_size"] == {
    "key": "train.batch_size", "type": "int", "default": "16",
    "sentence": "sequences per step, over all devices and micro-batches",
  }  # fmt: skip
  assert keys["model.d_model"]["default"] == "required" and keys["train.ema"]["type"] == "float or none"
  below = run(capsys, "describe", "--keys", "config.model.blocks.layer.mixer.position")
  assert "model.blocks.NAME.mixer.position.theta (of rope): float, default 10000.0" in below
  assert "train" not in below.replace("trained", "")


def test_a_word_a_unit_and_a_default_of_zero(capsys):
  by_flag = run(capsys, "describe", "--config=llama_7b", "--config.train.steps=16000", "--json")
  assert run(capsys, "describe", "llama_7b", "--config.train.steps=16k", "--json") == by_flag
  found = [number_with_unit(text) for text in ("16k", "16ki", "1.5M", "2 G", "k", "16", "1.0001k", "16kk")]
  assert found == [16000, 16384, 1_500_000, 2 * 10**9, "k", "16", 1000.1, "16kk"]
  with pytest.raises(SystemExit):
    main(["generate", "--help"])
  shown = capsys.readouterr().out
  assert "--top_k: " in shown and "0 from all (default 0)" in shown and "(default 0.0)" in shown
  with pytest.raises(SystemExit):
    main(["train", "--help"])
  assert "llmarch describe --keys" in capsys.readouterr().out


def test_describe_prints_stack_parameters_flops_and_memory(capsys):
  text = run(capsys, "describe", "--config=gemma_2_2b")
  for words in ("13*(local global)", "window=4096", "2,614,341,888", "100.0%", "sandwich", "training", "decoding"):
    assert words in text


def test_describe_prints_the_same_as_data(capsys):
  half = "--config.model.precision.state=bfloat16"
  facts = json.loads(run(capsys, "describe", "--json", "--config=llama_3_8b", half))
  assert facts["params"]["total"] == facts["active_params"] == PUBLISHED["llama_3_8b"]
  assert facts["state_bytes"] == {"per_token": 131072, "max_seq_len": 131072 * 8192}
  assert [r["length"] for r in facts["flops_per_token"]] == [256, 8192]
  assert facts["model"]["d_model"] == 4096


def test_describe_applies_overrides(capsys):
  one = "--config.model.blocks.layer.mixer.num_kv_heads"
  facts = json.loads(run(capsys, "describe", "--json", "--config=llama_7b", f"{one}=1"))
  assert facts["params"]["attention"] == 32 * (2 * 4096 * 4096 + 2 * 4096 * 128)


LAYER = "--config.model.blocks.layer"


@pytest.mark.parametrize(
  "argv, words",
  [
    ([], "--config is missing"),
    (["--config=llama_3_9b"], "did you mean 'llama_3_8b'"),
    (["--config=nowhere.py"], "there is no file nowhere.py"),
    (["--config=llama_7b", "--jsn"], "jsn"),
    (["--config=llama_7b", "here"], "'here' and --config=llama_7b say the same thing"),
    (["llama_7b", "here"], "'here' is not a flag"),
    (["llama_7b", "--train.steps=10"], "there is no flag --train.steps; a key of the config is set as --config.train"),
    (["--keys", "trian"], "--keys: no key begins with 'trian'; did you mean 'train'"),
    (["--config=llama_7b", "--config.model.d_modl=3"], "config.model.d_modl: no such key; did you mean 'd_model'"),
    (["--config=llama_7b", "--config.model.d_model=wide"], "config.model.d_model must be of type int, got 'wide'"),
    (["--config=llama_7b", "--config.model.d_model=4096.0"], "config.model.d_model must be of type int"),
    (["--config=llama_7b", "--config.model.d_model"], "--config.model.d_model has no value"),
    (["--config=llama_7b", "--config.optimizer.learning_rate=nan"], "config.optimizer.learning_rate"),
    (["--config=llama_7b", "--config.optimizer.learning_rate=1e999"], "must be a finite number"),
    (["--config=llama_7b", "--config.model.vocab_size=-5"], "config.model.vocab_size must be at least 1"),
    (["--config=llama_7b", f"{LAYER}.ffn.d_ff=0"], "config.model.blocks.layer.ffn.d_ff must be at least 1"),
    (["--config=llama_7b", f"{LAYER}.mixer.num_kv_heads=5"], "must be a multiple of num_kv_heads=5"),
    (["--config=llama_7b", f"{LAYER}.mixer.num_heads=24"], "num_heads=24 must be a multiple of num_kv_heads=32"),
    (["--config=llama_7b", f"{LAYER}.mixer.position.dims=7"], "position.dims must be even"),
    (["--config=llama_7b", f"{LAYER}.mixer.position=ropes"], "did you mean 'rope'"),
    (["--config=llama_7b", "--config.model.stack=32*layers"], "stack names the block 'layers'"),
    (["--config=llama_7b", "--config.model.stack="], "it names no block"),
    (["--config=llama_7b", "--config.model.stack=0*layer"], "a count must be at least 1"),
    (["--config=gemma_2_2b", "--config.model.stack=26*local"], "blocks.global is not used"),
    (["--config=llama_7b", "--config.train.seq_len=4096"], "is longer than model.max_seq_len=2048"),
  ],
)  # fmt: skip
def test_describe_refuses_bad_input_in_one_sentence(capsys, argv, words):
  assert main(["describe", *argv]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("llmarch: ") and err.count("\n") == 1
  assert words in err


@pytest.mark.parametrize(
  "text, words",
  [
    ("def get_config(): return {'model': {'d_model': 8}}", "config.model.vocab_size is missing"),
    ("def get_config(): return {}", "config.model is missing"),
    ("def get_config(): return {'model': 7}", "config.model must be a dict"),
    ("def get_config(): return 1 / 0", "failed with ZeroDivisionError"),
    ("x = 1", "AttributeError"),
    ("def get_config(): return {'optimizer': {'learning_rate': float('nan')}}", "learning_rate must be a finite"),
  ],
)  # fmt: skip
def test_a_config_file_that_is_wrong_is_refused_in_one_sentence(capsys, tmp_path, text, words):
  path = tmp_path / "wrong.py"
  path.write_text(text)
  assert main(["describe", f"--config={path}"]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and words in err


def test_presets_refuses_an_unknown_flag(capsys):
  assert main(["presets", "--jsn"]) == 2
  assert "jsn" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("path", sorted(glob.glob("configs/*.py")))
def test_every_config_file_builds_and_says_what_it_is(path):
  config = load_config(path)
  assert cost.params(config.model)["total"] == leaves_by_component(config.model)["total"]
  with open(path) as f:
    docstring = f.read().split('"""')[1]
  assert all(word in docstring for word in ("Expected:", "Cost:", "Command:"))


def test_tiny_reads_bytes_and_is_tiny():
  model = load_config("configs/tiny.py").model
  assert model.vocab_size >= 257 and 0.7e6 < cost.params(model)["total"] < 0.9e6
