"""Configs as data: there and back, overrides, the notation of stacks, and one sentence for every bad input."""

import copy
import dataclasses
import doctest
import json
import pickle

import hypothesis
import pytest
import spaces
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from llmarch import build as build_module
from llmarch import config as config_module
from llmarch import run_config
from llmarch.build import FrozenDict, build, differences, override, parse_value, to_dict
from llmarch.config import ModelConfig, parse_stack
from llmarch.errors import UserError
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.position import RoPE
from llmarch.presets import PRESETS
from llmarch.run_config import RunConfig

many = hypothesis.settings(
  max_examples=150,
  derandomize=True,
  database=None,
  deadline=None,
  phases=[Phase.explicit, Phase.generate],
  suppress_health_check=list(HealthCheck),
)


# --------------------------------------------------------------------------------------- there and back


@many
@given(spaces.model_configs())
def test_random_configs_survive_dicts_and_json(config):
  back = build(ModelConfig, json.loads(json.dumps(to_dict(config))))
  assert back == config and hash(back) == hash(config) and not differences(to_dict(back), to_dict(config))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_dicts_and_json(name):
  config = RunConfig(model=spaces.preset(name), train=SHORT)
  assert build(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
  full = PRESETS[name]()
  assert build(ModelConfig, json.loads(json.dumps(to_dict(full)))) == full


def test_every_kind_of_source_algorithm_and_schedule_survives_dicts():
  values = {"paths": ["a"], "path": "a"}
  for key, family in (
    ("data.source", run_config.SourceConfig),
    ("optimizer.algorithm", run_config.AlgorithmConfig),
    ("optimizer.schedule", run_config.ScheduleConfig),
  ):
    for kind, cls in family.variants.items():
      given_values = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
      data = override(BASE, [(key, json.dumps({"kind": kind} | given_values))])
      config = build(RunConfig, data)
      assert build(RunConfig, to_dict(config)) == config
      section, name = key.split(".")
      assert type(getattr(getattr(config, section), name)) is cls


def test_defaults_are_written_out_so_that_a_later_default_changes_no_run():
  data = to_dict(RoPE())
  assert data == {"kind": "rope", "theta": 10000.0, "dims": None, "interleaved": False, "scaling": None}


def test_a_variant_may_be_named_by_its_kind_alone():
  assert build(AttentionConfig, {"num_heads": 2, "position": "rope"}).position == RoPE()


def test_integers_become_floats_where_floats_are_meant():
  theta = build(RoPE, {"theta": 500000}).theta
  assert type(theta) is float and theta == 5e5


SHORT = run_config.TrainConfig(seq_len=24)
BASE = to_dict(RunConfig(model=spaces.HAND["yarn"], train=SHORT))  # its blocks are a and b


# ------------------------------------------------------------------------------------------- immutability


def test_configs_never_change_after_they_are_made():
  blocks = {"a": spaces.block()}
  config = spaces.model(spaces.block())
  config = dataclasses.replace(config, blocks=blocks)
  blocks["b"] = spaces.block(ffn=None)
  assert list(config.blocks) == ["a"]
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.d_model = 3
  d, mixer = config.blocks, config.blocks["a"]
  for change in (
    lambda: d.__setitem__("a", mixer), lambda: d.__delitem__("a"), lambda: d.update(a=mixer), lambda: d.pop("a"),
    lambda: d.popitem(), lambda: d.clear(), lambda: d.setdefault("b", mixer), lambda: d.__ior__({"b": mixer}),
  ):  # fmt: skip
    with pytest.raises(TypeError, match="immutable"):
      change()
  assert dict(d) == {"a": mixer}


def test_configs_can_be_copied_pickled_and_hashed():
  config = spaces.HAND["hybrid"]
  for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
    assert other == config and hash(other) == hash(config) and isinstance(other.blocks, FrozenDict)
    assert other.layers == config.layers
  assert hash(config) != hash(dataclasses.replace(config, d_model=24))


def test_overrides_leave_their_input_alone():
  before = copy.deepcopy(BASE)
  changed = override(BASE, [("model.blocks.a.mixer.num_heads", "4"), ("seed", "3")])
  assert BASE == before and changed["seed"] == 3
  changed["model"]["blocks"]["b"]["mixer"]["num_heads"] = 1
  assert BASE == before


# ---------------------------------------------------------------------------------------------- overrides


def test_overrides_apply_in_order_and_reach_every_depth():
  data = override(
    BASE,
    [
      ("model.blocks.a.mixer.position", "alibi"),
      ("model.blocks.b.mixer.position.scaling", "none"),
      ("model.blocks.b.mixer.position.theta", "5e5"),
      ("model.blocks.b.norm", '{"kind": "layernorm", "bias": False}'),
      ("model.blocks.a.mixer.qkv_bias", "true"),
      ("train.steps", "7"),
      ("train.steps", "8"),
    ],
  )
  model = build(RunConfig, data).model
  assert model.blocks["a"].mixer.position.kind == "alibi" and model.blocks["a"].mixer.qkv_bias is True
  assert model.blocks["b"].mixer.position == RoPE(theta=5e5) and model.blocks["b"].norm.bias is False
  assert data["train"]["steps"] == 8


@pytest.mark.parametrize(
  "key, text, sentence",
  [
    ("trian.steps", "5", "config.trian: no such key; did you mean 'train'?"),
    ("train.step", "5", "config.train.step: no such key; did you mean 'steps'?"),
    ("model.blocks.c.ffn", "none", "config.model.blocks.c: no such key"),
    ("seed.x", "5", "config.seed.x: config.seed is 0 and has no keys; set config.seed to a kind first"),
    ("model.blocks.a.mixer.window.size", "5", "config.model.blocks.a.mixer.window must be of type int"),
    ("", "5", "config.: no such key"),
    ("model..d_model", "5", "config.model.: no such key"),
  ],
)
def test_an_override_of_a_key_that_is_not_there_names_the_nearest(key, text, sentence):
  with pytest.raises(UserError) as e:
    build(RunConfig, override(BASE, [(key, text)]))
  assert str(e.value).startswith(sentence) and "\n" not in str(e.value)


def test_a_key_below_a_variant_just_switched_by_name_says_how_to_give_both():
  with pytest.raises(UserError, match=r"has no keys yet; write config\.model\..*\.position='.*kind.*alibi"):
    override(BASE, [("model.blocks.a.mixer.position", "alibi"), ("model.blocks.a.mixer.position.max_bias", "4")])


@pytest.mark.parametrize(
  "text, value",
  [
    ("3", 3), ("-2", -2), ("1e-3", 1e-3), ("true", True), ("False", False), ("none", None), ("null", None),
    ("2*(a b)", "2*(a b)"), ("[1, 2]", [1, 2]), ('{"a": 1}', {"a": 1}), ("'3'", "3"), ("", ""), ("a b", "a b"),
    ("configs/tiny.py", "configs/tiny.py"), ("data=2,tensor=4", "data=2,tensor=4"), ("{[]: 1}", "{[]: 1}"),
  ],
)  # fmt: skip
def test_values_are_python_literals_or_else_text(text, value):
  parsed = parse_value(text)
  assert parsed == value and type(parsed) is type(value)


def test_differences_name_every_key():
  other = override(BASE, [("seed", "1"), ("model.blocks.a.ffn", "none"), ("train.remat", "full")])
  found = differences(BASE, other)
  assert "config.seed: 0 here, 1 there" in found and "config.train.remat: 'none' here, 'full' there" in found
  assert any(d.startswith("config.model.blocks.a.ffn: ") for d in found) and len(found) == 3
  assert differences({"a": 1}, {"b": 1}) == ["config.a: 1 here, absent there", "config.b: absent here, 1 there"]
  assert differences({"a": 1}, {"a": True}) and differences({"a": 1}, {"a": 1.0})


# --------------------------------------------------------------------------------------------- the stack


def test_the_examples_in_the_docstrings_hold():
  for module in (build_module, config_module):
    result = doctest.testmod(module)
    assert result.attempted >= 1 and result.failed == 0


@pytest.mark.parametrize(
  "text, segments",
  [
    ("layer", [("layer", 1)]),
    ("32*layer", [("layer", 32)]),
    ("13*(local global)", [("local global", 13)]),
    ("4*(5*local global) 2*local", [("local local local local local global", 4), ("local", 2)]),
    ("3*dense 58*moe", [("dense", 3), ("moe", 58)]),
    ("2*(a 2*(b c))", [("a b c b c", 2)]),
    ("(a b)", [("a b", 1)]),
    ("2 * a", [("a", 2)]),
    (" a\tb\n", [("a", 1), ("b", 1)]),
    ("x_1 2*X2", [("x_1", 1), ("X2", 2)]),
    ("2*(a)(b)", [("a", 2), ("b", 1)]),
  ],
)
def test_stack_notation(text, segments):
  assert parse_stack(text) == tuple((tuple(names.split()), repeat) for names, repeat in segments)


@pytest.mark.parametrize(
  "text, what",
  [
    ("", "names no block"), ("  ", "names no block"), ("()", "names no block"), ("a ()", "names no block"),
    ("2*", "ends after a count"), ("a 3*", "ends after a count"), ("0*a", "at least 1"), ("2*3*a", "out of place"),
    ("(a b", "never closed"), ("2*(a (b)", "never closed"), ("a)", "no '('"), (")", "no '('"), ("2a", "out of place"),
    ("a-b", "out of place"), ("-1*a", "out of place"), ("2.5*a", "out of place"), ("a, b", "out of place"),
    ("*a", "out of place"), ("2**a", "out of place"), ("2", "out of place"), ("2*)", "out of place"),
    ("é*a", "out of place"),
    ("2000*(100*a)", "more than 100000 layers"), ("9" * 5000 + "*a", "out of place"), ("(" * 5000, "50 deep"),
  ],
)  # fmt: skip
def test_a_stack_that_cannot_be_read_says_why(text, what):
  with pytest.raises(UserError) as e:
    parse_stack(text)
  assert what in str(e.value) and repr(text) in str(e.value)


@given(st.text(alphabet="ab2*() -é", max_size=12))
@many
def test_any_text_is_a_stack_or_a_sentence(text):
  try:
    segments = parse_stack(text)
  except UserError:
    return
  again = " ".join(f"{repeat}*({' '.join(names)})" for names, repeat in segments)
  assert parse_stack(again) == segments


# ------------------------------------------------------------------------------------------- bad inputs


def at(data: dict, path: str, value):
  """A copy of nested data with the value at a dotted path, new or not; `DROP` removes it."""
  data = copy.deepcopy(data)
  *parents, last = path.split(".")
  node = data
  for parent in parents:
    node = node[parent]
  if value is DROP:
    del node[last]
  else:
    node[last] = value
  return data


DROP = object()
A = "model.blocks.a"
nan, inf = float("nan"), float("inf")

BAD = [
  # misspelt and unknown keys, nearest name
  ("sede", 1, "config.sede: no such key; did you mean 'seed'?"),
  ("model.d_modle", 1, "config.model.d_modle: no such key; did you mean 'd_model'?"),
  (f"{A}.mixer.num_head", 1, f"config.{A}.mixer.num_head: no such key; did you mean 'num_heads'?"),
  (f"{A}.mixer.position.base", 1, f"config.{A}.mixer.position.base: no such key (known: "),
  (f"{A}.norm.epsilon", 1, f"config.{A}.norm.epsilon: no such key"),
  ("train.learning_rate", 1.0, "config.train.learning_rate: no such key"),
  # unknown kinds and values
  (f"{A}.mixer.position", "ropee", f"config.{A}.mixer.position.kind: unknown kind 'ropee'; did you mean 'rope'?"),
  (f"{A}.norm", {"kind": "rms"}, f"config.{A}.norm.kind: unknown kind 'rms'; did you mean 'rmsnorm'?"),
  (f"{A}.norm", {"kind": []}, f"config.{A}.norm.kind: unknown kind []"),
  (f"{A}.norm", {"kind": None}, f"config.{A}.norm.kind: unknown kind None"),
  (f"{A}.norm", {"eps": 1.0}, f"config.{A}.norm must name its kind, one of layernorm, rmsnorm, scalenorm"),
  (f"{A}.norm", None, f"config.{A}.norm must name its kind"),
  (f"{A}.mixer", 3, f"config.{A}.mixer must name its kind"),
  (f"{A}.mixer.mask", "casual", f"config.{A}.mixer.mask.kind: unknown kind 'casual'; did you mean 'causal'?"),
  (f"{A}.ffn.activation", "swiglu", f"config.{A}.ffn.activation: unknown value 'swiglu'"),
  (f"{A}.residual", 3, f"config.{A}.residual must name its kind, one of output, parallel"),
  (f"{A}.residual", ["pre"], f"config.{A}.residual must name its kind"),
  ("train.remat", "dot", "config.train.remat: unknown value 'dot'; did you mean 'dots'?"),
  # wrong types
  ("seed", "1", "config.seed must be of type int, got '1'"),
  ("seed", 1.0, "config.seed must be of type int, got 1.0"),
  ("seed", True, "config.seed must be of type int, got True"),
  ("seed", None, "config.seed must be of type int, got None"),
  ("model", None, "config.model must be a dict of ModelConfig, got None"),
  ("model.d_model", 18.0, "config.model.d_model must be of type int, got 18.0"),
  ("model.stack", 3, "config.model.stack must be of type str, got 3"),
  ("model.blocks", [], "config.model.blocks must be a dict, got []"),
  ("model.blocks.a", "llama", "config.model.blocks.a must be a dict of BlockConfig, got 'llama'"),
  (f"{A}.mixer.qkv_bias", 1, f"config.{A}.mixer.qkv_bias must be of type bool, got 1"),
  (f"{A}.mixer.qkv_bias", "yes", f"config.{A}.mixer.qkv_bias must be of type bool, got 'yes'"),
  (f"{A}.norm.eps", "1e-6", f"config.{A}.norm.eps must be of type float, got '1e-6'"),
  ("data.source", {"kind": "text", "paths": "a.txt"}, "config.data.source.paths must be a list, got 'a.txt'"),
  ("data.source", {"kind": "text", "paths": [1]}, "config.data.source.paths[0] must be of type str, got 1"),
  # missing values
  ("model", DROP, "config.model is missing; give it a value"),
  ("model.d_model", DROP, "config.model.d_model is missing; give it a value"),
  (f"{A}.mixer.num_heads", DROP, f"config.{A}.mixer.num_heads is missing"),
  (f"{A}.ffn.d_ff", DROP, f"config.{A}.ffn.d_ff is missing"),
  (f"{A}.mixer.position.scaling.factor", DROP, f"config.{A}.mixer.position.scaling.factor is missing"),
  # numbers that are none, and sizes that cannot be
  (f"{A}.norm.eps", nan, f"config.{A}.norm.eps must be a finite number, got nan"),
  (f"{A}.branch_scale", inf, f"config.{A}.branch_scale must be a finite number, got inf"),
  ("optimizer.learning_rate", nan, "config.optimizer.learning_rate must be a finite number, got nan"),
  ("optimizer.learning_rate", 10**400, "config.optimizer.learning_rate must be a finite number"),
  ("optimizer.learning_rate", -1e-3, "config.optimizer.learning_rate must be at least 0"),
  ("model.d_model", 0, "config.model.d_model must be at least 1, got 0"),
  ("model.d_model", -8, "config.model.d_model must be at least 1, got -8"),
  ("model.vocab_size", 0, "config.model.vocab_size must be at least 1"),
  ("model.max_seq_len", -1, "config.model.max_seq_len must be at least 1"),
  (f"{A}.mixer.num_heads", 0, f"config.{A}.mixer.num_heads must be at least 1"),
  (f"{A}.mixer.num_kv_heads", 0, f"config.{A}.mixer.num_kv_heads must be at least 1"),
  (f"{A}.mixer.head_dim", -2, f"config.{A}.mixer.head_dim must be at least 1"),
  (f"{A}.mixer.window", 0, f"config.{A}.mixer.window must be at least 1"),
  (f"{A}.ffn.d_ff", 0, f"config.{A}.ffn.d_ff must be at least 1"),
  (f"{A}.norm.eps", 0.0, f"config.{A}.norm.eps must be greater than 0"),
  (f"{A}.mixer.softcap", 0, f"config.{A}.mixer.softcap must be greater than 0"),
  (f"{A}.mixer.dropout", 1.0, f"config.{A}.mixer.dropout must be at least 0 and below 1"),
  (f"{A}.dropout", -0.1, f"config.{A}.dropout must be at least 0 and below 1"),
  ("model.head.softcap", -1.0, "config.model.head.softcap must be greater than 0"),
  ("train.steps", 0, "config.train.steps must be at least 1"),
  ("train.batch_size", -4, "config.train.batch_size must be at least 1"),
  ("seed", -1, "config.seed must be at least 0"),
  # what does not go together
  (f"{A}.mixer.num_heads", 5, f"config.{A}.mixer.num_heads=5 must be a multiple of num_kv_heads=2"),
  ("model.d_model", 20, None),  # head_dim is given: fine
  (f"{A}.mixer.position.dims", 5, "config.model.blocks.a.mixer.position.dims must be even, above 0 and at most head"),
  (f"{A}.mixer.position.dims", 12, "config.model.blocks.a.mixer.position.dims must be even"),
  (f"{A}.mixer.position.dims", 0, "config.model.blocks.a.mixer.position.dims must be even"),
  (f"{A}.mixer.head_dim", 9, "config.model.blocks.a.mixer.position.dims must be even"),
  (f"{A}.mixer.position.theta", 1.0, f"config.{A}.mixer.position.theta must be greater than 1"),
  (f"{A}.mixer.position.scaling.factor", 0.5, f"config.{A}.mixer.position.scaling.factor must be at least 1"),
  (f"{A}.mixer.position.scaling.beta_slow", 99.0, f"config.{A}.mixer.position.scaling.beta_fast must be at least"),
  (f"{A}.mixer.position", "sinusoidal", f"config.{A}.mixer.position='sinusoidal' belongs to the embedding: set model"),
  ("model.embed.position", "alibi", "config.model.embed.position must be sinusoidal or learned, got 'alibi'"),
  ("model.embed.position", {"kind": "learned", "length": 8}, "config.model.embed.position.length=8 must reach max_seq"),
  ("model.max_seq_len", 8, "config.train.seq_len=24 is longer than model.max_seq_len=8"),
  ("model.stack", "a b c", "config.model.stack names the block 'c', which is not in blocks (known: a, b)"),
  ("model.stack", "2*a", "config.model.blocks.b is not used by stack='2*a'; add it there or drop it"),
  ("model.stack", "2*(a b", "config.model.stack='2*(a b': a '(' is never closed"),
  ("model.stack", "", "config.model.stack='': it names no block"),
  ("model.stack", "1000000000000*a b", "config.model.stack"),
  ("model.blocks.a.residual", "parallel", None),
  ("train.grad_accum", 3, "config.train.batch_size=16 must be a multiple of grad_accum=3"),
  ("train.ema", 1.0, "config.train.ema must lie between 0 and 1"),
  # what JAX or optax would take in silence, or choke on late
  ("seed", 2**32, "config.seed must be below 2^32"),
  ("train.steps", 2**31, "config.train.steps must be below 2^31"),
  ("train.batch_size", 2**40, "config.train.batch_size and seq_len make"),
  ("model.init", {"kind": "fan_in", "gain": -1.0}, "config.model.init.gain must be at least 0"),
  ("model.init", {"kind": "xavier", "gain": -1.0}, "config.model.init.gain must be at least 0"),
  ("model.embed_init", {"kind": "normal", "stddev": -1.0}, "config.model.embed_init.stddev must be at least 0"),
  *(
    ("optimizer.schedule", {"kind": kind, field: -1}, f"config.optimizer.schedule.{field} must be at least 0")
    for kind, fields in (("constant", "warmup"), ("linear", "warmup final"), ("cosine", "warmup final"),
                         ("wsd", "warmup decay final"))
    for field in fields.split()
  ),
  ("optimizer.algorithm", {"kind": "adafactor", "decay_rate": -1.0}, "config.optimizer.algorithm.decay_rate must be"),
  ("optimizer.algorithm", {"kind": "adafactor", "min_dim_size_to_factor": 0}, "config.optimizer.algorithm.min_dim"),
  ("optimizer.algorithm", {"kind": "muon", "adam_learning_rate_ratio": -1.0}, "config.optimizer.algorithm.adam_learn"),
  # names
  ("model.blocks", {1: {}}, "config.model.blocks has the key 1; give it a name, in quotes"),
  (f"{A}.ffn.d_ff", DROP, f"config.{A}.ffn.d_ff is missing; give it a value of type int"),
]


@pytest.mark.parametrize("path, value, sentence", BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_input_is_one_sentence_that_names_the_field(path, value, sentence):
  data = at(BASE, path, value)
  if sentence is None:
    build(RunConfig, data)
    return
  with pytest.raises(UserError) as e:
    build(RunConfig, data)
  assert str(e.value).startswith(sentence), str(e.value)
  assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_what_only_the_whole_model_can_refuse():
  odd = at(BASE, "model.d_model", 19)
  with pytest.raises(UserError, match=r"config\.model\.embed\.position=sinusoidal needs an even d_model, got 19"):
    build(RunConfig, at(odd, "model.embed.position", "sinusoidal"))
  with pytest.raises(UserError, match=r"mixer\.num_heads=6 does not divide d_model=19; give head_dim"):
    build(RunConfig, at(odd, f"{A}.mixer.head_dim", None))
  data = at(BASE, f"{A}.ffn", None)
  with pytest.raises(UserError, match=r"config\.model\.blocks\.a\.residual='parallel' .*; give ffn"):
    build(RunConfig, at(data, f"{A}.residual", "parallel"))
  scaling = {"kind": "longrope", "short_factors": [1.0], "long_factors": [1.0], "original": 8, "factor": 2.0}
  with pytest.raises(UserError, match=r"position\.scaling\.short_factors has 1 entries; give 5, one a rotated pair"):
    build(RunConfig, at(BASE, f"{A}.mixer.position.scaling", scaling))


_words = st.sampled_from(["rope", "alibi", "pre"]) | st.text(max_size=5)
JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | _words,
  lambda inner: st.lists(inner, max_size=3)
  | st.dictionaries(st.sampled_from(["kind", "eps", "x", "factor"]), inner, max_size=3),
  max_leaves=4,
)


def leaves(data: dict, path: str = ""):
  """The dotted paths of all values, dicts among them."""
  for key, value in data.items():
    yield f"{path}{key}"
    if isinstance(value, dict):
      yield from leaves(value, f"{path}{key}.")


@many
@given(st.sampled_from(sorted(leaves(BASE))), JSON)
def test_any_value_anywhere_builds_or_is_refused_in_one_sentence(path, value):
  """And a value that is accepted is kept."""
  try:
    config = build(RunConfig, at(BASE, path, value))
  except UserError as e:
    assert str(e).startswith("config.") and "\n" not in str(e)
    return
  assert build(RunConfig, to_dict(config)) == config


@many
@given(st.text(max_size=30) | st.text(alphabet="[]{}()'\"1-+:,. eE", max_size=12))
def test_any_text_on_the_command_line_is_a_value(text):
  parse_value(text)


def test_override_values_can_be_as_deep_as_a_shell_lets_them():
  for text in ("(" * 5000, "[" * 5000 + "]" * 5000, "-" * 5000 + "1", "9" * 5000):
    parse_value(text)


def test_none_on_a_command_line_is_a_word_where_the_field_has_it_as_one():
  data = to_dict(build(RunConfig, {"model": PRESETS["gpt_2_small"]()}))
  config = build(RunConfig, override(data, [("train.remat", "full"), ("train.remat", "none")]))
  assert config.train.remat == "none"


def test_a_kind_that_an_override_gives_has_all_its_keys():
  data = {"mixer": {"kind": "attention", "num_heads": 4}, "stack": "2*a"}
  given = [("mixer", '{"kind": "linear", "num_heads": 2}'), ("mixer.chunk", "7"), ("mixer.num_heads", "3")]
  assert override(data, given) == {"mixer": {"kind": "linear", "num_heads": 3, "chunk": 7}, "stack": "2*a"}
  with pytest.raises(UserError, match=r"mixer.chunk: no such key"):
    override(data, given[1:2])
