"""Every feature with every other: the runs that fill docs/composability.md, and what holds the page against the code.

Pairs of two options of a config are in test_invariants.py. Here a few models that together hold every option value meet
the choices of programs: mesh axes, remat policies, objectives, packings, layouts, formats of the state.
"""

import functools
import itertools

import composability
import covering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spaces
from flax import nnx

from llmarch.config import ModelConfig
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.param import flatten
from llmarch.models.decoder import abstract
from llmarch.ops import cache
from llmarch.run_config import SGD, Constant, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from llmarch.sharding import (
  ATTENTION,
  FEED_FORWARD,
  RING_FORMS,
  find_layout,
  make_mesh,
  parse_mesh,
  shardings,
  use_layout,
)
from llmarch.train.step import make_train_step

MODELS, BLOCKS = 4, 4  # about as many blocks a model


@functools.cache
def models(*features: str) -> tuple[ModelConfig, ...]:
  """Models which together hold every option value that the code does not refuse with these features."""
  found = [
    single for config in (*spaces.HAND.values(), *covering.draws(covering.DRAWS)) for single in covering.singles(config)
  ]
  return covering.few(found, lambda config: composability.program(config, features), MODELS, BLOCKS)


@functools.cache
def params_of(config: ModelConfig) -> nnx.State:
  return spaces.random_params(nnx.state(abstract(config)), 3)


def is_param(x) -> bool:
  return isinstance(x, nnx.Variable)


# ------------------------------------------------------------------------------------------------- training

B, T = 16, 16

# Model, mesh, remat, objective, packing. Each model meets every axis and every policy; each two axes, each axis and
# policy, and each of these with each objective and packing are together somewhere, but for the pairs that are refused.
STEPS = [
  (0, "fsdp=2,expert=2,sequence=2", "offload", "causal", "chunks"),
  (0, "data=2,context=2,sequence=2", "none", "prefix", "documents"),
  (0, "stage=2,sequence=2,tensor=2", "full", "prefix", "chunks"),
  (0, "data=2,fsdp=2,tensor=2", "dots_no_batch", "prefix", "chunks"),
  (0, "expert=2,context=2,tensor=2", "dots", "causal", "chunks"),
  (1, "data=2,stage=2,expert=2", "full", "prefix", "chunks"),
  (1, "expert=2,context=2,tensor=2", "dots_no_batch", "causal", "chunks"),
  (1, "fsdp=2,expert=2,sequence=2", "offload", "causal", "documents"),
  (1, "stage=2,fsdp=2,context=2", "dots", "prefix", "chunks"),
  (1, "stage=2,sequence=2,tensor=2", "none", "causal", "chunks"),
  (2, "data=2,stage=2,expert=2", "dots_no_batch", "prefix", "documents"),
  (2, "fsdp=2,expert=2,sequence=2", "dots", "causal", "chunks"),
  (2, "data=2,fsdp=2,tensor=2", "full", "prefix", "chunks"),
  (2, "stage=2,fsdp=2,context=2", "none", "causal", "chunks"),
  (2, "expert=2,context=2,tensor=2", "offload", "causal", "chunks"),
  (3, "data=2,fsdp=2,tensor=2", "dots", "causal", "documents"),
  (3, "data=2,context=2,sequence=2", "offload", "prefix", "documents"),
  (3, "expert=2,context=2,tensor=2", "full", "causal", "documents"),
  (3, "stage=2,sequence=2,tensor=2", "dots_no_batch", "causal", "chunks"),
  (3, "data=2,stage=2,expert=2", "none", "causal", "documents"),
]


def batch(loss: str, packing: str) -> dict:
  """Rows of one piece, or of two documents cut at another place in each and some padding; the start of each piece is
  marked for "prefix"."""
  draws = np.random.default_rng(3)
  at = np.broadcast_to(np.arange(T), (B, T))
  cut, end = (
    (draws.integers(5, T - 4, (B, 1)), draws.integers(T - 2, T + 1, (B, 1))) if packing == "documents" else (T, T)
  )
  positions = np.where(at < end, np.where(at < cut, at, at - cut), -1).astype(np.int32)
  segments = np.where(at < end, np.where(at < cut, 1, 2), 0).astype(np.int32)
  rows = {
    "tokens": draws.integers(0, 40, (B, T)).astype(np.int32),
    "targets": draws.integers(0, 40, (B, T)).astype(np.int32),
    "positions": positions,
    "segment_ids": segments if packing == "documents" else np.zeros((B, T), np.int32),
    "loss_weights": (positions >= 0).astype(np.float32),
  }
  if loss == "prefix":
    rows["prefix"] = (positions >= 0) & (positions < 3)
    rows["loss_weights"] *= ~((positions >= 0) & (positions < 2))
  return rows


def step_of(config: ModelConfig, mesh: str, remat: str, loss: str, packing: str) -> tuple[dict, dict]:
  """The metrics of a step of plain gradient descent, and what it adds to each parameter."""
  train = TrainConfig(batch_size=B, seq_len=T, loss_chunk=4, remat=remat, loss=loss, z_loss=0.01, label_smoothing=0.1)
  optimizer = OptimizerConfig(algorithm=SGD(), schedule=Constant(), learning_rate=1.0, weight_decay=0.0, clip_norm=None)
  run = RunConfig(model=config, train=train, optimizer=optimizer, data=DataConfig(packing=packing), mesh=mesh)
  functions = make_train_step(run, make_mesh(parse_mesh(mesh)) if mesh else None)
  params = flatten(params_of(config))
  zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), functions.abstract_state)
  placed = jax.tree.map(lambda s: s.sharding, functions.abstract_state)
  state = jax.device_put({**zeros, "params": params}, placed)
  before = jax.device_get(params)
  after, metrics = functions.step(state, jax.device_put(batch(loss, packing), functions.batch_sharding))
  return jax.device_get(metrics), jax.tree.map(np.subtract, jax.device_get(after["params"]), before)


@functools.cache
def alone(model: int, loss: str, packing: str):
  return step_of(models("remat='none'")[model], "", "none", loss, packing)


@pytest.mark.nightly
@pytest.mark.parametrize("model, mesh, remat, loss, packing", STEPS)
def test_a_train_step_over_a_mesh_equals_one_device(model, mesh, remat, loss, packing, cases, checked):
  config = models("remat='none'")[model]
  metrics, change = step_of(config, mesh, remat, loss, packing)
  expected, plain = alone(model, loss, packing)
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, err_msg=name)
  rates = {
    name for name, p in flatten(nnx.state(abstract(config)), variables=True).items() if hasattr(p, "balance_rate")
  }
  largest = max(np.abs(change).max() for name, change in plain.items() if name not in rates)
  for name, want in plain.items():
    error = np.abs(change[name] - want).max()
    assert name in rates or error <= 1e-4 * largest, (name, error / largest)
  cases("7 a train step over a mesh == one device, for models that together hold every option")
  axes = [f"mesh.{axis}=given" for axis in parse_mesh(mesh) if f"{axis}=" in mesh]
  choices = [f"remat='{remat}'", f"loss='{loss}'", f"packing='{packing}'", "z_loss=given", "label_smoothing=given"]
  checked("6 7" if remat != "none" else "7", config, *axes, *choices)


# ------------------------------------------------------------------------------------------------- decoding

SOURCE = 6  # tokens that an encoder reads
RINGS = (None, *RING_FORMS)
LAYOUTS = [  # of each model; each meets every row of the feed-forward, of attention, and every form of ring
  (model, f"{ffn}+{[*ATTENTION][(model + i) % 4]}" + (f"+{ring}" if (ring := RINGS[(model + i) % 4]) else ""))
  for model in range(MODELS)
  for i, ffn in enumerate(FEED_FORWARD)
] + [(model, "megatron") for model in range(MODELS)]


def calls_of(config: ModelConfig, rows: int, width: int, calls: int):
  """Tokens, positions and prefix marks of calls [calls, rows, width], ragged and padded on the left; and a source."""
  draws = np.random.default_rng(5)
  tokens = draws.integers(0, config.vocab_size, (rows, width * calls)).astype(np.int32)
  starts = draws.integers(0, width - 1, (rows, 1))
  positions = np.maximum(np.arange(width * calls) - starts, -1).astype(np.int32)
  cut = lambda x: np.stack(np.split(x, calls, axis=1))
  marks = (positions >= 0) & (np.arange(width * calls) < width - 1)
  source = draws.integers(0, 40, (rows, SOURCE)).astype(np.int32)
  places = np.maximum(np.arange(SOURCE) - draws.integers(0, 3, (rows, 1)), -1).astype(np.int32)
  return (cut(tokens), cut(positions), cut(marks)), (source, places)


def decoded(config: ModelConfig, inputs, layout=None, mesh=None) -> np.ndarray:
  """Logits [calls, B, T, V] of the calls, through a decoding state."""
  calls, source = inputs
  (_, rows, width), params = calls[0].shape, params_of(config)
  graph = nnx.graphdef(abstract(config))
  specs = abstract(config).state_spec(rows, covering.EVEN_LENGTH, width)

  def run(params, state, calls, source):
    with use_layout(layout, mesh, manual=True):
      model = nnx.merge(graph, params)
      if config.encoder:  # the source comes first, beside nothing but padding
        nothing = jnp.full(calls[0].shape[1:], -1)
        state = model(jnp.zeros_like(nothing), nothing, state=state, memory=model.encode(*source))[1]

      def call(state, inputs):
        tokens, positions, marks = inputs
        logits, state, _ = model(tokens, positions, state=state, prefix=marks)
        return state, logits

      return jax.lax.scan(call, state, calls)[1]

  state = cache.allocate(specs)
  if mesh is None:
    return np.asarray(jax.jit(run)(params, state, calls, source))
  of = lambda shape, axes: shardings(cache.Spec(shape, (None, *axes), "int32"), layout, mesh)
  placed = shardings(params, layout, mesh), shardings(specs, layout, mesh)
  row, logits = of((1, rows, width), ("batch", "length")), of((1, rows, width, config.vocab_size), OUT)
  specs_of = lambda tree: jax.tree.map(lambda s: s.spec, tree)
  without_calls = jax.sharding.PartitionSpec(*row.spec[1:])
  run = jax.shard_map(
    run, mesh=mesh, in_specs=(*map(specs_of, placed), row.spec, without_calls), out_specs=logits.spec, check_vma=False
  )
  arguments = *jax.device_put((params, state), placed), *inputs
  return np.asarray(jax.jit(run)(*arguments))


OUT = ("batch", "length", "act_vocab")


def errors(actual, expected, inputs) -> np.ndarray:
  """The error of each real token's logits: the root of its mean square, relative to the spread of what is expected."""
  real = inputs[0][1] >= 0
  return np.sqrt(np.mean((actual[real] - expected[real]) ** 2, axis=-1)) / np.std(expected[real])


def off(actual, expected, inputs) -> float:
  """The root of the mean squared error at real tokens, relative to the spread of what is expected there."""
  return float(np.sqrt(np.mean(errors(actual, expected, inputs) ** 2)))


@functools.cache
def on_one_device(config: ModelConfig, rows: int, width: int, calls: int):
  inputs = calls_of(config, rows, width, calls)
  return inputs, decoded(config, inputs)


@pytest.mark.nightly
@pytest.mark.parametrize("model, layout", LAYOUTS)
def test_a_decoder_in_a_layout_equals_one_device(model, layout, cases, checked):
  config = models("layout=ws_2d")[model]
  inputs, expected = on_one_device(config, 8, 3, 2)
  mesh = make_mesh(parse_mesh("data=2,tensor=4" if layout == "megatron" else "x=2,y=2,z=2"))
  actual = decoded(config, inputs, find_layout(layout, mesh), mesh)
  assert off(actual, expected, inputs) < 1e-4
  cases("7 a decoder in a layout == one device, for models that together hold every option")
  checked("7", config, "state='float32'", *composability.layout_features(layout))


# How far logits may be from those of a state in float32.
FORMATS = {"bfloat16": 0.05, "float16": 0.01, "int8": 0.1, "fp8": 0.2, "int8_channel": 0.1, "fp8_channel": 0.2}


@pytest.mark.nightly
@pytest.mark.parametrize("model, state", [(model, state) for state in FORMATS for model in range(MODELS)])
def test_a_decoder_with_a_format_of_its_state_is_near_full_precision(model, state, cases, checked):
  """Over more tokens than a group of keys that share a scale by channel. Rounding may turn a router's choice for a few
  tokens, which are then others; three quarters of them must be near."""
  config = models(f"state='{state}'")[model]
  inputs, expected = on_one_device(config, 2, 20, 2)
  actual = decoded(covering.with_state(config, state), inputs)
  assert np.quantile(errors(actual, expected, inputs), 0.75) < FORMATS[state]
  cases("3 a decoder with a format of its state is near full precision, for models that together hold every option")
  checked("3", config, f"state='{state}'")


SMALL = spaces.model(
  spaces.block(spaces.attention(num_heads=8, num_kv_heads=4), ffn=MLPConfig(d_ff=24)),
  d_model=24,
  max_seq_len=covering.EVEN_LENGTH,
)


def places(state: int, ffn: int) -> str:
  """A layout: with this, each format of a state, row of attention and form of ring meet (a field of four elements)."""
  twice = (0, 2, 3, 1)
  attention, ring = [*ATTENTION][ffn % 4 ^ state % 4], RINGS[ffn % 4 ^ twice[state % 4]]
  return f"{[*FEED_FORWARD][ffn]}+{attention}" + (f"+{ring}" if ring else "")


STATES = ("float32", *FORMATS)
FORMATS_IN_LAYOUTS = [
  *((state, places(i, ffn)) for i, state in enumerate(STATES) for ffn in range(len(FEED_FORWARD))),
  *((state, "megatron") for state in STATES),
]


@pytest.mark.nightly
@pytest.mark.parametrize("state, layout", FORMATS_IN_LAYOUTS)
def test_a_format_of_the_state_in_a_layout_is_that_of_one_device(state, layout, checked):
  config = covering.with_state(SMALL, state)
  inputs, expected = on_one_device(config, 8, 18, 2)
  mesh = make_mesh(parse_mesh("data=2,tensor=4" if layout == "megatron" else "x=2,y=2,z=2"))
  actual = decoded(config, inputs, find_layout(layout, mesh), mesh)
  assert off(actual, expected, inputs) < (1e-4 if state == "float32" else 1e-3)  # codes may change by one
  checked("7", config, f"state='{state}'", *composability.layout_features(layout))


# ------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page():
  return composability.read(composability.PAGE.read_text())


def test_the_page_has_every_feature_and_every_pair_of_them(page):
  """No pair is left out, and none is there that no layer and no program can hold."""
  known, found = page
  assert not set(composability.space()) - set(known), "refresh the page with the command that it names"
  here = set(composability.space())  # what random configs had when the page was made may be more
  wanted = {p for p in itertools.combinations(sorted(here), 2) if composability.is_pair(*p)}
  assert wanted == {pair for pair in found if set(pair) <= here}


def test_what_the_page_calls_refused_is_refused_with_that_sentence(page):
  _, found = page
  refused = {pair: text for pair, text in found.items() if text[0] not in composability.EQUATIONS}
  assert len(refused) > 20
  for pair, sentence in refused.items():
    assert composability.refusal(*pair) == sentence, pair


def test_the_summary_counts_the_pairs_of_the_chart(page):
  known, found = page
  equal = sum(text[0] in composability.EQUATIONS for text in found.values())
  count = f"- {len(found)} pairs: {equal} equal, {len(found) - equal} refused, 0 not tried."
  assert count in composability.PAGE.read_text().splitlines()
  assert len(set(known)) == len(known)


def test_a_page_is_not_written_while_a_pair_is_neither_equal_nor_refused(tmp_path):
  path = tmp_path / "page.md"
  config = spaces.HAND["llama"]
  composability.keep(path, "a test", [composability.record("1", config, ["remat='full'"])])
  assert "pairs are neither tried nor refused" in composability.write(path) and not path.exists()
  pair = tuple(sorted(("BlockConfig.norm=RMSNorm", "remat='full'")))
  assert composability.equal_pairs(composability.kept(path))[pair] == {"1"}
