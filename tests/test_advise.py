"""Advice and single-chip rooflines against closed forms, brute force, the planner and their own identities."""

import dataclasses
import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from llmarch.analysis import advise, cost, planner, roofline
from llmarch.analysis.advise import Request
from llmarch.analysis.hardware import CHIPS
from llmarch.build import FrozenDict
from llmarch.commands.advise import main, parse_bytes
from llmarch.errors import UserError
from llmarch.lab import ablation as ablations
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.mask import Causal, Prefix
from llmarch.layers.moe import MoEConfig, TopK
from llmarch.models.decoder import abstract
from llmarch.ops import quant
from llmarch.presets import PRESETS, llama

GIB = 2**30
H200 = CHIPS["h200"]
# L layers, D, F, N, K, H, V, all unequal.
L, D, F, N, K, H, V = 3, 48, 112, 6, 2, 10, 77
TOY = llama(L, D, F, N, K, head_dim=H, context=64, vocab_size=V)
MATRICES = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + V * D
NORMS = (2 * L + 1) * D


def names(options):
  return {option.name for option in options}


def windowed(*widths):
  """TOY with a layer for each width."""
  block = TOY.blocks["layer"]
  one = lambda w: dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, window=w))
  blocks = FrozenDict({f"w{w}": one(w) for w in widths})
  return dataclasses.replace(TOY, blocks=blocks, stack=" ".join(f"w{w}" for w in widths))


# ----------------------------------------------------------------------------------------------- one decode step


@pytest.mark.parametrize("batch, bound", [(1, "memory"), (40, "memory"), (100_000, "compute")])
def test_a_decode_step_of_a_dense_model_is_its_closed_form(batch, bound):
  M = 1 if bound == "compute" else 50  # of a long context, a step is bound by its keys and values at any batch
  flops = batch * 2 * (MATRICES + L * 2 * N * H * M)
  moved = 2 * (MATRICES + NORMS) + 2 * batch * L * 2 * K * H * M
  expected = {"memory": moved / H200.hbm_bandwidth, "compute": flops / H200.flops}
  assert max(expected, key=expected.get) == bound
  assert math.isclose(roofline.decode_seconds(TOY, H200, batch=batch, context=M), expected[bound], rel_tol=1e-12)


def test_formats_count_by_their_bits():
  step = lambda **given: roofline.decode_seconds(TOY, H200, batch=2, context=50, **given) * H200.hbm_bandwidth
  weights, state = MATRICES + NORMS, 2 * L * 2 * K * 50
  assert math.isclose(step(), 2 * weights + 2 * H * state)
  assert math.isclose(step(weights="int4"), (4.25 / 8) * weights + 2 * H * state)
  assert math.isclose(step(weights="int8", kv="int8"), weights + (H + 4) * state)  # a scale for each vector


def test_a_tied_table_is_read_by_the_logits_and_another_is_looked_up_in():
  tied = dataclasses.replace(TOY, head=dataclasses.replace(TOY.head, tied=True))
  assert cost.params(TOY)["total"] - cost.params(tied)["total"] == V * D
  assert roofline.weight_bytes_read(tied, 3) == roofline.weight_bytes_read(TOY, 3) == 2 * (MATRICES + NORMS)


def test_a_learned_table_is_looked_up_in():
  config = PRESETS["gpt_2_small"]()
  assert roofline.weight_bytes_read(config, 1) == 2 * (cost.params(config)["total"] - 1024 * 768)


def test_a_window_sees_no_more_than_it_has():
  flops = lambda context: roofline.decode_flops(windowed(7, 20), context)
  for context in (1, 7, 8, 20, 21, 60):
    keys = min(context, 7) + min(context, 20)
    assert math.isclose(flops(context) - flops(1), 2 * 2 * N * H * (keys - 2))


@pytest.mark.parametrize("name", ["llama_3_70b", "gemma_2_27b", "mistral_7b", "palm_62b", "falcon_40b"])
def test_compute_and_state_agree_with_the_planner_on_one_chip(name):
  config, batch, context = PRESETS[name](), 16, 6000
  request = planner.Request(config, "h200", 1, batch, context - 1, 1)
  option = planner.evaluate(request, "decode", "ws_1d", "heads", {"x": 1, "y": 1, "z": 1})
  assert math.isclose(batch * roofline.decode_flops(config, context) / H200.flops, option.compute_s, rel_tol=1e-9)
  read = roofline.weight_bytes_read(config, batch) + cost.state_bytes(roofline.hold(config, "bfloat16"), batch, context)
  tables = 0 if config.head.tied else 2 * config.vocab_size * config.d_model  # the planner reads them whole
  assert math.isclose(read + tables, (option.weights_s + option.kv_s) * H200.hbm_bandwidth, rel_tol=1e-3)


@pytest.mark.parametrize("E, k, tokens", [(5, 2, 1), (5, 2, 3), (4, 3, 4), (6, 1, 4), (3, 3, 2)])
def test_distinct_experts_are_the_mean_over_all_choices(E, k, tokens):
  choices = itertools.product(itertools.combinations(range(E), k), repeat=tokens)
  brute = np.mean([len(set().union(*choice)) for choice in choices])
  moe = MoEConfig(num_experts=E, expert=MLPConfig(d_ff=8), router=TopK(k=k))
  assert math.isclose(roofline.distinct_experts(moe, tokens), brute)


def test_experts_that_no_row_reaches_are_not_read():
  E, k, shared, expert = 5, 2, 24, 3 * D * 16
  config = llama(L, D, 16, N, K, head_dim=H, context=64, vocab_size=V, num_experts=E, router=TopK(k=k), shared=shared)
  rest = L * (2 * D * N * H + 2 * D * K * H + D * E + 3 * D * shared) + V * D + NORMS
  for batch, distinct in [(1, k), (2, E * (1 - 0.6**2)), (10**4, E)]:
    assert math.isclose(roofline.weight_bytes_read(config, batch), 2 * (rest + L * distinct * expert))


def test_latent_attention_decodes_absorbed():
  config, M = PRESETS["deepseek_v3"](), 5000
  assert cost.state_bytes(roofline.hold(config, "bfloat16"), 1, 1) == 61 * 576 * 2
  each_key = (roofline.decode_flops(config, M + 1) - roofline.decode_flops(config, M)) / 2
  assert math.isclose(each_key, 61 * 128 * (512 + 64 + 512), rel_tol=1e-6)
  moved = roofline.weight_bytes_read(config, 4) + 4 * M * 61 * 576 * 2
  assert math.isclose(roofline.decode_seconds(config, H200, batch=4, context=M), moved / H200.hbm_bandwidth)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_bound_that_grows_with_batch_and_context(name):
  config = PRESETS[name]()
  ms = [roofline.decode_ms_at(config, batch=b, context=c) for b, c in [(1, 1), (1, 500), (8, 500), (8, 1000)]]
  for chip in roofline.POINTS:
    assert 0 < ms[0][chip] <= ms[1][chip] < ms[2][chip] <= ms[3][chip]


def test_reading_whole_texts_multiplies_what_the_mask_shows_and_has_no_logits():
  batch, M = 6, 40
  both = advise.with_mask(TOY, "bidirectional")
  body = MATRICES - V * D
  flops = batch * M * 2 * (body + L * 2 * N * H * M)
  expected = max(flops / H200.flops, 2 * (body + NORMS) / H200.hbm_bandwidth)
  assert math.isclose(roofline.read_seconds(both, H200, batch=batch, context=M), expected)
  few = roofline.read_seconds(both, H200, batch=1, context=2)  # bound by the weights
  assert math.isclose(few, 2 * (body + NORMS) / H200.hbm_bandwidth)
  assert math.isclose(roofline.read_seconds(both, H200, batch=10**4, context=M), 10**4 / batch * flops / H200.flops)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"context": 0}, {"weights": "int3"}, {"kv": "int3"}])
def test_a_roofline_refuses_what_it_does_not_know(wrong):
  with pytest.raises(UserError, match=next(iter(wrong))):
    roofline.decode_seconds(TOY, H200, **{"batch": 1, "context": 5} | wrong)


# ------------------------------------------------------------------------------------------------------- advice


@pytest.mark.parametrize("weights, width", [("bfloat16", 2), ("int8", 1), ("int4", 4.25 / 8)])
@pytest.mark.parametrize("task", advise.TASKS)
def test_memory_is_all_parameters_and_the_state(task, weights, width):
  found = advise.advise(Request(task, 1000, 100 * GIB, batch=3, weights=weights))
  assert len(found.options) > 20
  for option in found.options:
    config = PRESETS[option.name]()
    state = 0 if task == "understand" else cost.state_bytes(roofline.hold(config, "bfloat16"), 3, 1000)
    assert option.bytes == cost.params(config)["total"] * width + state


@pytest.mark.parametrize("task", advise.TASKS)
def test_what_is_advised_fits_and_what_is_refused_for_memory_does_not(task):
  request = Request(task, 4096, hardware="a100", chips=2)
  found = advise.advise(request)
  assert request.budget == planner.USABLE * 2 * 80e9
  assert all(option.bytes <= request.budget for option in found.options)
  large = [r for r in found.refused if r.why == "memory"]
  assert large and all(r.bytes > request.budget for r in large) and large == sorted(large, key=lambda r: r.bytes)
  assert sorted([o.name for o in found.options] + [r.name for r in found.refused]) == sorted(PRESETS)
  # The budget decides alone: the next larger one fits as soon as its bytes are there, and not one byte before.
  edge = lambda memory: names(advise.advise(Request(task, 4096, memory)).options)
  assert large[0].name in edge(large[0].bytes) and large[0].name not in edge(large[0].bytes - 1)


@pytest.mark.parametrize("task", advise.TASKS)
def test_more_memory_removes_nothing_and_a_longer_context_adds_nothing(task):
  fit = lambda context, gib: names(advise.advise(Request(task, context, gib * GIB)).options)
  by_memory = [fit(3000, gib) for gib in (1, 5, 30, 200)]
  by_context = [fit(context, 30) for context in (100, 2000, 9000, 140_000)]
  assert all(a < b for a, b in itertools.pairwise(by_memory))
  assert all(a >= b for a, b in itertools.pairwise(by_context)) and by_context[0] > by_context[-1]


def test_the_published_context_goes_before_size():
  found = advise.advise(Request("generate", 20_000, 60 * GIB)).options
  assert [o.beyond for o in found] == sorted(o.beyond for o in found)
  within = [o.active_params for o in found if not o.beyond]
  assert within == sorted(within, reverse=True) and 0 < len(within) < len(found)
  for option in found:
    published = PRESETS[option.name]().max_seq_len
    assert (
      option.beyond == (published < 20_000) == any(f"published for {published:,}" in loss.what for loss in option.loses)
    )
  shown = advise.best_of_each_kind(found)
  assert len({o.kind for o in shown}) == len(shown) == len({o.kind for o in found}) and shown[0] == found[0]


def test_sizes_that_surveys_print_without_source_are_not_advised():
  fit = lambda memory, weights: names(advise.advise(Request("generate", 16384, memory, weights=weights)).options)
  assert "llama_3_70b" not in fit(48e9, "bfloat16")
  assert "llama_3_70b" in fit(48e9, "int4")
  assert "mixtral_8x22b" not in fit(32e9, "int4")
  size = lambda name, **given: next(
    o for o in advise.advise(Request("generate", 16384, 1e12, **given)).options if o.name == name
  )
  llama_70b = size("llama_3_70b")
  assert round(llama_70b.weight_bytes / GIB, 1) == 131.4 and round(llama_70b.state_bytes / GIB, 1) == 5.0
  # 37.9 GiB are the codes and the state; the scales of groups of 64 take another 1/16 of the codes.
  assert round((llama_70b.params / 2 + llama_70b.state_bytes) / GIB, 1) == 37.9
  int4 = size("llama_3_70b", weights="int4")
  assert math.isclose(int4.weight_bytes, llama_70b.params / 2 * 17 / 16) and int4.bytes < 48e9
  mixtral = size("mixtral_8x22b", weights="int4")
  assert round(mixtral.params / 2 / GIB, 1) == 65.5 and round(mixtral.state_bytes / GIB, 1) == 3.5


def test_speeds_are_the_rooflines_shared_by_the_chips():
  one, four = (advise.advise(Request("generate", 3000, 60e9, "h200", n, batch=5)).options for n in (1, 4))
  assert names(one) == names(four)
  for a, b in zip(one, four, strict=True):
    assert a.seconds == roofline.decode_seconds(PRESETS[a.name](), H200, batch=5, context=3000)
    assert math.isclose(a.seconds, 4 * b.seconds) and math.isclose(b.tokens_per_s, 5 / b.seconds)
  (option, *_) = advise.advise(Request("understand", 3000, 60e9, "h200", 4, batch=5)).options
  both = advise.with_mask(PRESETS[option.name](), "bidirectional")
  assert math.isclose(option.seconds, roofline.read_seconds(both, H200, batch=5, context=3000) / 4)
  assert math.isclose(option.tokens_per_s, 15_000 / option.seconds)
  assert all(o.seconds is None for o in advise.advise(Request("generate", 3000, 60e9)).options)


@pytest.mark.parametrize("widths", [(3, 5, 4), (7, 2), (1, 6), (4,)])
def test_reach_through_windows_is_that_of_their_masks(widths):
  size, steps = 30, np.arange(30)
  behind = steps[:, None] - steps[None]
  seen = np.eye(size, dtype=int)
  for w in widths:
    seen = (((behind >= 0) & (behind < w)).astype(int) @ seen > 0).astype(int)
  config = windowed(*widths)
  assert advise.reach(config) == seen[-1].sum()
  assert advise.reach(TOY) is None and advise.reach(windowed(3, None)) is None
  says = lambda context: [loss.what for loss in advise.losses(Request("generate", context, 1e9), config)]
  assert not any("through all windows" in what for what in says(int(seen[-1].sum())))
  assert any(f"reaches {seen[-1].sum()} tokens" in what for what in says(int(seen[-1].sum()) + 1))


def test_a_learned_table_ends_where_its_rows_do():
  why = lambda context: {r.name: r.why for r in advise.advise(Request("generate", context, 1e12)).refused}
  assert "gpt_2_xl" not in why(1024) and why(1025)["gpt_2_xl"] == "positions"


def divides(params, format):
  """Whether the real quantisation finds whole groups in every matrix of an abstract model."""
  for param in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
    if param.fan_in and not {"buckets", "router"} & set(param.axes):
      try:
        quant.scale_shape(
          param.get_value().shape, [param.axes.index(a) - len(param.axes) for a in param.fan_in], format
        )
      except UserError:
        return False
  return True


@pytest.mark.full
def test_groups_divide_the_matrices_that_quantisation_divides():
  found = {}
  for name, make in PRESETS.items():
    params = nnx.state(abstract(make()), nnx.Param)
    for format in quant.FORMATS:
      found[name, format] = divides(params, format)
      assert advise.groups_fit(make(), format) == found[name, format], (name, format)
  assert not found["mpt_30b", "int4"] and found["mpt_30b", "int8"] and found["llama_7b", "int4"]
  why = {r.name: r.why for r in advise.advise(Request("generate", 100, 1e12, weights="int4")).refused}
  assert why["mpt_30b"] == "groups"
  forks = lambda name: {b.change for b in advise.branches(Request("generate", 100, 1e12), name)}
  assert "int4 weights" in forks("llama_7b") and "int4 weights" not in forks("mpt_30b")


def test_latent_attention_has_the_causal_mask_alone():
  for task, refused in [("generate", None), ("understand", "mask"), ("transform", "mask")]:
    why = {r.name: r.why for r in advise.advise(Request(task, 100, 4e12)).refused}
    assert why.get("deepseek_v3") == refused
  masks = {b.mixer.mask for name in ("llama_7b", "gemma_3_1b") for b in PRESETS[name]().blocks.values()}
  assert masks == {Causal()}
  assert advise.with_mask(PRESETS["gemma_3_1b"](), "prefix").blocks["local"].mixer.mask == Prefix()


def test_losses_name_what_a_choice_gives_up():
  request = Request("transform", 20_000, 1e12, weights="int4", kv="int8")
  say = lambda name: " | ".join(loss.what for loss in advise.losses(request, PRESETS[name]()))
  assert "48 query heads share one head" in say("palm_540b") and "share one head" not in say("llama_3_70b")
  assert "52 of 62 layers see 1,024 tokens" in say("gemma_3_27b") and "published for" not in say("gemma_3_27b")
  assert "made of 512 numbers" in say("deepseek_v3") and "uses 6% of the parameters" in say("deepseek_v3")
  assert "int4 weights: 10.76 %" in say("llama_7b") and "int8 state" in say("llama_7b") and "mask" in say("llama_7b")


# -------------------------------------------------------------------------------------------- forks and changes


def test_forks_of_the_architecture_change_the_state_by_their_formulas():
  config, M = PRESETS["llama_7b"](), 2000
  state = lambda c: cost.state_bytes(roofline.hold(c, "bfloat16"), 1, M)
  per_layer = 2 * 2 * 128 * M
  assert state(config) == 32 * 32 * per_layer
  assert state(advise.share_heads(config, 8)) == 32 * 8 * per_layer
  assert state(advise.share_heads(config, 1)) == 32 * 1 * per_layer
  assert state(advise.latent(config)) == 32 * 2 * 576 * M
  assert state(advise.see_locally(config)) == 32 * 2 * 2 * 128 * (5 * M + 27 * 1024)
  assert advise.share_heads(config, 5) == config  # 5 does not divide 32
  for name in ("gemma_3_4b", "mistral_7b"):  # has windows
    assert advise.see_locally(PRESETS[name]()) == advise.latent(PRESETS[name]()) == PRESETS[name]()


@pytest.mark.parametrize("task", advise.TASKS)
def test_branches_are_one_change_each_and_lower_something(task):
  request = Request(task, 8000, 60e9, "h100", batch=4)
  first, *others = advise.branches(request, "qwen_1_5_14b")
  assert first.option == next(o for o in advise.advise(request).options if o.name == "qwen_1_5_14b")
  assert all(b.option.bytes < first.option.bytes or b.option.seconds < first.option.seconds for b in others)
  heads = advise.branches(request, "palm_62b")[1:]  # one head already: nothing to share
  assert heads and not any("key-value head" in b.change for b in heads)
  changes = {b.change for b in others}
  assert {"8 key-value heads", "1 key-value head", "int8 weights", "int4 weights"} <= changes
  assert ("int8 state" in changes) == (task != "understand")
  assert ("latent attention, 512 + 64" in changes) == (task == "generate")  # it has no other mask
  int8 = next(b.option for b in others if b.change == "int8 weights")
  assert int8.weight_bytes == first.option.weight_bytes / 2 and int8.state_bytes == first.option.state_bytes


def test_where_nothing_fits_the_changes_do_and_the_memory_is_the_least():
  request = Request("generate", 10_000, 1 * GIB)
  found = advise.advise(request)
  assert not found.options and found.changes[0].flags == "--kv=int8"
  for change in found.changes:
    given = dict(part.removeprefix("--").split("=") for part in change.flags.split())
    given = {k: int(v) if v.isdigit() else v for k, v in given.items()}
    assert change.option in advise.advise(dataclasses.replace(request, **given)).options and not change.option.beyond
  least = int(found.changes[-1].flags.removeprefix("--memory="))
  assert not advise.advise(dataclasses.replace(request, memory=least - 1)).options
  chips = Request("generate", 100_000, hardware="l40s", batch=64)
  flags = advise.advise(chips).changes[-1].flags
  assert flags == "--chips=4"
  within = lambda n: [o for o in advise.advise(dataclasses.replace(chips, chips=n)).options if not o.beyond]
  assert within(4) and not within(3)


def test_no_change_helps_beyond_every_published_context():
  longest = max(make().max_seq_len for make in PRESETS.values())
  assert advise.advise(Request("generate", longest + 1, 1e12)).changes == []
  assert all(o.beyond for o in advise.advise(Request("generate", longest + 1, 1e12)).options)
  tried = lambda **given: advise._fewer_bits(Request("generate", 9, 1e6, **given))
  assert tried(weights="int8", kv="int8") == [{"weights": "int4"}]
  assert tried(kv="int8") == [{"weights": "int8"}, {"weights": "int4"}] and not tried(weights="int4", kv="int8")
  request = Request("generate", longest, 1e6, weights="int4", kv="int8")
  assert [c.flags.split("=")[0] for c in advise.advise(request).changes] == ["--memory"]  # fewer bits there are not


@pytest.mark.parametrize("claim", sorted({claim for claims in advise.CLAIMS.values() for claim in claims}))
def test_claims_are_comparisons_of_the_experiments(claim):
  folder, comparison = claim.split("/")
  ablation = ablations.load_ablation(pathlib.Path(__file__).parent.parent / "experiments" / folder)
  assert comparison in [c.id for c in ablation.comparisons]


# -------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
  "text, size", [("1024", 1024), ("80GiB", 80 * GIB), ("48 GB", 48e9), ("1.5tib", 1.5 * 2**40), ("5e9", 5e9), ("7b", 7)]
)
def test_sizes_are_read_with_their_units(text, size):
  assert parse_bytes(text) == size


GOOD = {"task": "generate", "context": "100", "memory": "80GiB"}


@pytest.mark.parametrize(
  "change, words",
  [
    ({"task": "generat"}, "--task: there is no 'generat'; did you mean 'generate'?"),
    ({"task": None}, "--task is missing"),
    ({"context": None}, "--context is missing"),
    ({"context": "-5"}, "--context must be at least 1 and below 2^31, got -5"),
    ({"context": "1e4"}, "--context"),
    ({"context": str(10**20)}, "--context must be at least 1 and below 2^31"),
    ({"experiments": "nowhere"}, "--experiments: there is no folder nowhere"),
    ({"batch": "0"}, "--batch must be at least 1"),
    ({"memory": "ten"}, "--memory: cannot read 'ten'; give bytes, or a number with a unit"),
    ({"memory": "4 zetta"}, "--memory: cannot read"),
    ({"memory": "0"}, "--memory must be above 0"),
    ({"memory": None}, "--memory is missing; give it, such as 80GiB, or --hardware=h100"),
    ({"memory": "90GB", "hardware": "h100"}, "--memory=90000000000 is more than the 80000000000 of 1 h100"),
    ({"hardware": "h10"}, "--hardware: there is no chip 'h10'; did you mean 'h100'?"),
    ({"chips": "4"}, "--chips=4 of what? give --hardware as well"),
    ({"chips": "0", "hardware": "h100"}, "--chips must be at least 1"),
    ({"weights": "int3"}, "--weights: there is no 'int3'; did you mean"),
    ({"kv": "int4"}, "--kv: there is no 'int4'; did you mean"),
    ({"task": "understand", "kv": "int8"}, "--kv=int8 has nothing to act on: --task=understand"),
    ({"top": "0"}, "--top must be at least 1"),
  ],
)
def test_bad_input_is_one_sentence_that_names_the_flag(change, words):
  flags = [f"--{name}={value}" for name, value in (GOOD | change).items() if value is not None]
  with pytest.raises(UserError) as e:
    main(flags)
  assert words in str(e.value) and "\n" not in str(e.value) and e.value.exit_code == 2


def test_the_command_prints_sizes_bounds_losses_and_what_it_does_not_have(capsys):
  assert main("--task=transform --context=16384 --memory=48GB --hardware=l40s --weights=int4 --top=2".split()) == 0
  out = capsys.readouterr().out
  assert "qwen_2_5_72b" in out and "41.0 GiB" in out and "ms/token at least" in out and "tokens/s at most" in out
  assert "there are no encoder-decoders among the presets" in out and "int4 weights: 10.76 %" in out
  assert "roofline's bounds" in out
  assert main("--task=generate --context=10000 --memory=1GiB".split()) == 0
  out = capsys.readouterr().out
  assert "nothing fits within its published context" in out and "--kv=int8: qwen_2_5_0_5b" in out


def test_the_command_prints_json(capsys):
  assert main("--task=generate --context=4096 --hardware=h200 --chips=2 --json".split()) == 0
  found = json.loads(capsys.readouterr().out)
  request = Request("generate", 4096, hardware="h200", chips=2)
  assert found["request"]["budget"] == request.budget
  assert [o["name"] for o in found["options"]] == [o.name for o in advise.advise(request).options]
  assert all(o["bytes"] == o["weight_bytes"] + o["state_bytes"] for o in found["options"])
  named = {c for o in found["options"] for loss in o["loses"] for c in loss["claims"]}
  assert named <= set(found["claims"])
