"""The equations of the house, over every option by hand, every pair of options, and every preset made small.

(1) oracle  (2) causality  (3) prefill + decode  (4) padding and packing  (5) chunk sizes  (6) scan, unstack,
remat  (7) layouts  (8) live knobs  (10) parameter counts.  (11) is in tests of training.
"""

import dataclasses
import functools
import hashlib
import itertools
import re

import covering
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import spaces
from flax import nnx
from tiers import plain_if, three

from llmarch.analysis import cost
from llmarch.branches import CrossConfig, FFNConfig, MixerConfig
from llmarch.config import (
  EmbedConfig,
  HeadConfig,
  InitConfig,
  ModelConfig,
  NormConfig,
  PositionConfig,
  Precision,
  ScalingConfig,
)
from llmarch.errors import UserError
from llmarch.layers.attention import QKNorm
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.mask import MaskConfig, Prefix
from llmarch.layers.norm import LayerNorm, RMSNorm
from llmarch.layers.position import ALiBi, Learned, T5Bias
from llmarch.layers.stack import REMAT_POLICIES
from llmarch.models.decoder import Decoder, abstract, restack, unstack
from llmarch.ops import cache
from llmarch.ops.loss import chunked_loss
from llmarch.residual import Output, Parallel, Pre, ResidualConfig, Sandwich
from llmarch.sharding import LAYOUTS, make_mesh, shardings, use_layout

TOLERANCE = 1e-5  # of the spread of the logits, f32 against float64

# ------------------------------------------------------------------- a batch that holds every kind of row

T = 12
# Documents of each row, by length; how many tokens are prefilled before decoding; where padding goes.
ROWS = [([12], 7, "none"), ([9], 3, "left"), ([8], 8, "right"), ([5, 4], 6, "between"), ([1], 1, "both")]
B = len(ROWS)


@dataclasses.dataclass(frozen=True)
class Batch:
  tokens: np.ndarray  # int32 [B, T]; a valid token at padding too
  positions: np.ndarray  # int32 [B, T], -1 at padding
  segments: np.ndarray  # int32 [B, T]
  prefix: np.ndarray  # bool [B, T]

  def arrays(self):
    return self.tokens, self.positions, self.segments, self.prefix

  def at(self, row: int) -> np.ndarray:
    """Where the real tokens of a row are, in order."""
    return np.flatnonzero(self.positions[row] >= 0)


def make_batch(vocab_size: int, prefix_lengths: list[list[int]], seed: int) -> Batch:
  """The rows of ROWS; `prefix_lengths` for each document of each row."""
  draws = np.random.default_rng(seed)
  tokens = draws.integers(0, vocab_size, (B, T)).astype(np.int32)
  positions = np.full((B, T), -1, np.int32)
  segments = draws.integers(0, 3, (B, T)).astype(np.int32)  # at padding: anything
  prefix = draws.integers(0, 2, (B, T)).astype(bool)
  for row, (documents, _, where) in enumerate(ROWS):
    n, room = sum(documents), T - sum(documents)
    starts = {"none": 0, "left": room, "right": 0, "both": room // 2, "between": 1}
    at = starts[where] + np.arange(n)
    if where == "between":
      at[documents[0] :] += room - 1  # and one place of padding before the first document
    positions[row, at] = np.concatenate([np.arange(d) for d in documents])
    segments[row, at] = np.repeat(np.arange(1, len(documents) + 1), documents)
    marks = [np.arange(d) < p for d, p in zip(documents, prefix_lengths[row], strict=True)]
    prefix[row, at] = np.concatenate(marks)
  return Batch(tokens, positions, segments, prefix)


def plan(chunk: int, step: int, seed: int) -> list[np.ndarray]:
  """Calls of a decoder: prefill by at most `chunk` tokens, then one token in each call of width `step`.

  Returns index arrays [calls, B, width] of the tokens of a row, -1 for padding, which falls anywhere. The first row has
  12 tokens, of which 7 are prefilled. With chunk=3 and step=1 its calls hold (the short one first, then full ones)

      prefill: [0] [1 2 3] [4 5 6], e.g. as the rows [-1 0 -1], [1 2 3], [4 5 6]     decode: [7] [8] [9] [10] [11]

  The last row has one token; it sits out two of these prefill calls (all -1) and all of the decode calls.
  """
  draws = np.random.default_rng(seed)
  prefill, decode = [], []
  for documents, k, _ in ROWS:
    first = k % chunk or chunk
    prefill.append([[*range(first)]] + [[*range(i, i + chunk)] for i in range(first, k, chunk)])
    decode.append([[i] for i in range(k, sum(documents))])
  groups = []
  for calls, width in ((prefill, chunk), (decode, step)):
    grid = np.full((max(map(len, calls)), B, width), -1)
    for row, pieces in enumerate(calls):
      # A row with fewer calls than others sits some out.
      turns = sorted(draws.choice(len(grid), len(pieces), replace=False))
      for turn, piece in zip(turns, pieces, strict=True):
        at = sorted(draws.choice(width, len(piece), replace=False))
        grid[turn, row, at] = piece
    groups.append(grid)
  return [np.concatenate(groups)] if chunk == step else groups


def prefix_lengths(chunk: int) -> list[list[int]]:
  """The longest prefixes of at most 3 tokens that lie in one call of `plan(chunk)`, for each document of each row.

  Tokens of a prefix see each other both ways, so that a call must hold all of them. With chunk=3 the first row is
  prefilled by [0] [1 2 3] [4 5 6]: its prefix has 1 token. With chunk=4 by [0 1 2] [3 4 5 6]: 3 tokens.
  """
  lengths = []
  for documents, k, _ in ROWS:
    first = k % chunk or chunk
    bounds = {0, *range(first, k, chunk), *range(k, sum(documents) + 1)}  # where calls begin
    starts = np.cumsum([0, *documents])
    lengths.append([min(3, d, min(b for b in bounds if b > s) - s) for s, d in zip(starts, documents, strict=False)])
  return lengths


# ------------------------------------------------------------------------------------------- toy decoders


class Toy:
  """A decoder with random parameters, stacked and unstacked, and the oracle's logits for its batch."""

  def __init__(self, config: ModelConfig, seed: int, chunk: int):
    self.config, self.chunk = config, chunk
    self.batch = make_batch(config.vocab_size, prefix_lengths(chunk), seed)
    self.graph, params = nnx.split(abstract(config))
    self.params = spaces.random_params(params, seed)
    self.model = nnx.merge(self.graph, self.params)
    self.unstacked = unstack(self.model)

  @functools.cached_property
  def oracle_params(self) -> dict:
    return nnx.to_pure_dict(nnx.state(self.unstacked))

  def alone(self, row: int, params: dict | None = None) -> np.ndarray:
    """The oracle's logits [n, V] of each document of a row by itself, one after the other."""
    params = params or self.oracle_params
    at = self.batch.at(row)
    tokens, prefix = self.batch.tokens[row, at], self.batch.prefix[row, at]
    ends = np.cumsum(ROWS[row][0])
    pieces = zip(np.split(tokens, ends)[:-1], np.split(prefix, ends)[:-1], strict=True)
    sources = source_batch().of(row)
    return np.concatenate(
      [oracle.logits(self.config, params, t, prefix=p, source=s) for (t, p), s in zip(pieces, sources, strict=True)]
    )

  @functools.cached_property
  def expected(self) -> list[np.ndarray]:
    return [self.alone(row) for row in range(B)]

  def masks(self) -> set[str]:
    causal = all(block.ffn is None or block.ffn.causal for block in self.config.blocks.values())
    masks = {block.mixer.mask.kind for block in self.config.blocks.values() if block.mixer.mask}
    return masks | (set() if causal else {"bidirectional"})

  def depends_on_length(self) -> bool:
    return any(c.__class__.__name__ in ("DynamicNTK", "LongRoPE") for c in spaces.components(self.config))


class SourceBatch:
  """What an encoder reads for the documents of ROWS: 3 tokens for the first of a row, 2 for the second; S = 7."""

  def __init__(self):
    draws = np.random.default_rng(11)
    self.tokens = draws.integers(0, 30, (B, 7)).astype(np.int32)
    self.positions, self.segments = np.full((B, 7), -1, np.int32), np.zeros((B, 7), np.int32)
    self.at = []
    for row, (documents, *_) in enumerate(ROWS):
      self.at.append([np.arange(3) + row % 3, np.array([5, 6])][: len(documents)])
      for i, at in enumerate(self.at[-1]):
        self.positions[row, at], self.segments[row, at] = np.arange(len(at)), i + 1

  def of(self, row: int) -> list[np.ndarray]:
    """The tokens of each document's source."""
    return [self.tokens[row, at] for at in self.at[row]]


@functools.cache
def source_batch() -> SourceBatch:
  return SourceBatch()


def memory_of(model, rows=slice(None)) -> dict:
  """The `memory` option of a call of a model that has an encoder, for these rows of the sources."""
  source = source_batch()
  arrays = (a[rows] for a in (source.tokens, source.positions, source.segments))
  return {"memory": model.encode(*arrays)} if model.config.encoder else {}


def forward(model):
  """The jitted forward of a model: (tokens, positions, segments, prefix) -> logits."""
  graph = nnx.graphdef(model)

  @jax.jit
  def run(params, tokens, positions, segments, prefix):
    model = nnx.merge(graph, params)
    return model(tokens, positions, segments, prefix=prefix, **memory_of(model))[0]

  return lambda *arrays: np.asarray(run(nnx.state(model), *arrays))


def decode(model, batch: Batch, groups: list[np.ndarray], chunk: int) -> list[np.ndarray]:
  """Logits [n, V] of the real tokens of each row, fed through a decoding state in the calls of a plan.

  A row with padding on the left, tokens [? ? ? a b c ...], and the call [-1 0 1] of its plan: its real tokens are at
  3, 4, ..., so that the call gets the tokens [? a b] at positions [-1 0 1], and the logits of its last two places are
  written to rows 0 and 1 of the result.
  """
  graph = nnx.graphdef(model)
  inputs = []
  for group in groups:
    real = [np.append(batch.at(row), 0) for row in range(B)]  # index -1, padding, is any place
    at = np.stack([real[row][group[:, row]] for row in range(B)], axis=1)
    take = lambda x, at=at: np.stack([x[row][at[:, row]] for row in range(B)], axis=1)
    tokens, positions, segments, prefix = map(take, batch.arrays())
    inputs.append((tokens, np.where(group < 0, -1, positions).astype(np.int32), segments, prefix))
  lengths = np.array([max(documents) for documents, *_ in ROWS], np.int32)

  @jax.jit
  def run(params, inputs):
    model = nnx.merge(graph, params)
    state = cache.allocate(model.state_spec(B, T, chunk))
    state["length"] = jnp.asarray(lengths)
    if model.config.encoder:  # the source comes first, beside nothing but padding
      nothing = jnp.full((B, chunk), -1)
      state = model(jnp.zeros_like(nothing), nothing, state=state, **memory_of(model))[1]

    def call(state, x):
      tokens, positions, segments, prefix = x
      logits, state, _ = model(tokens, positions, segments, state, prefix=prefix)
      return state, logits

    logits = []
    for group in inputs:
      state, out = jax.lax.scan(call, state, group)
      logits.append(out)
    return logits

  rows = [np.zeros((len(batch.at(row)), model.config.vocab_size)) for row in range(B)]
  for group, logits in zip(groups, run(nnx.state(model), inputs), strict=True):
    for turn, row, slot in zip(*np.nonzero(group >= 0), strict=True):
      rows[row][group[turn, row, slot]] = logits[turn, row, slot]
  return rows


def assert_close(actual, expected, what: str, tolerance: float = TOLERANCE):
  spread = np.ptp(expected)
  error = np.max(np.abs(np.asarray(actual, np.float64) - expected))
  assert error <= tolerance * spread, f"{what}: off by {error / spread:.1e} of the spread {spread:.2g}"


# ------------------------------------------------------------------------------------------ the equations


def check_oracle_and_padding(toy: Toy, logits: np.ndarray, cases):
  for row, expected in enumerate(toy.expected):
    assert_close(logits[row, toy.batch.at(row)], expected, f"row {row} ({ROWS[row]}) against the oracle alone")
  cases("1 forward == float64 oracle")
  cases("4 padded, ragged and packed == each document alone", B)


def check_causality(toy: Toy, run, cases):
  """A change of token j reaches logits i exactly as far as the masks of the layers, composed, allow.

  `reach[i, j]` says whether token j can reach place i. It begins as the identity; a layer multiplies it by what that
  layer lets i see, and by the identity, which is the residual stream. Two causal layers with a window of 2: after the
  first, place 5 is reached by tokens 4 and 5, after the second by 3, 4 and 5. A change of token 3 may move logits 3 to
  5 and no others, must move logits 3, and must move some logits besides its own.
  """
  tokens = np.tile(toy.batch.tokens[0], (B, 1))
  changed, at = tokens.copy(), [0, 3, 6, T - 2, T - 1]
  changed[np.arange(B), at] = (changed[np.arange(B), at] + 1) % toy.config.vocab_size
  marks = toy.batch.prefix[0]
  rest = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.zeros((B, T), np.int32), np.tile(marks, (B, 1))
  moved = np.any(run(tokens, *rest) != run(changed, *rest), axis=-1)

  reach = np.eye(T, dtype=bool)
  for name in toy.config.layers:
    mixer = toy.config.blocks[name].mixer
    ffn = toy.config.blocks[name].ffn
    causal = ffn is None or ffn.causal
    layer = [[oracle.sees(mixer, i, j, True, marks[j]) or not causal for j in range(T)] for i in range(T)]
    reach = (np.array(layer) | np.eye(T, dtype=bool)) @ reach
  for row, j in enumerate(at):
    leaks = np.flatnonzero(moved[row] & ~reach[:, j])
    assert not len(leaks), f"token {j} reaches logits {leaks}"
    assert moved[row, j], f"token {j} does not reach its own logits"
  others = [reach[i, j] for j in at for i in range(T) if i != j]
  assert not any(others) or any(moved[r, i] for r, j in enumerate(at) for i in range(T) if i != j), "tokens do not mix"
  cases("2 a change reaches what the masks allow, bit for bit", B)


def check_decoding(toy: Toy, model, chunk: int, step: int, seed: int, what: str, cases) -> bool:
  """Returns whether these calls are defined for the model: tokens that see later ones must all be in one call."""
  if "bidirectional" in toy.masks() and chunk < T:
    return False
  groups = plan(chunk, step, seed)
  if "bidirectional" in toy.masks():
    groups = [np.stack([np.where(np.arange(T) < sum(d), np.arange(T), -1) for d, *_ in ROWS])[None]]
  rows = decode(model, toy.batch, groups, chunk)
  for row, expected in enumerate(toy.expected):
    if len(ROWS[row][0]) > 1 and toy.depends_on_length():
      continue  # a state has one length a row, two documents have two
    assert_close(rows[row], expected, f"{what}, row {row}: prefill({ROWS[row][1]}) by {chunk}, then decode")
    cases("3 prefill(k) + decode == full forward")
  return True


def check_restack(toy: Toy, cases):
  graph, params = nnx.split(toy.unstacked)
  graphs = []

  @jax.jit
  def back(params):
    model = restack(nnx.merge(graph, params))
    graphs.append(nnx.graphdef(model))
    return nnx.state(model)

  same = jax.tree.map(np.array_equal, back(params), toy.params)
  assert jax.tree.all(same) and graphs == [toy.graph]
  cases("6 restack(unstack(model)) == model, bit for bit")


def check_count(config: ModelConfig, params, cases):
  assert cost.params(config)["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))
  cases("10 cost.params == sum of leaves")


# ------------------------------------------------------------------------- every config, every kind of call


def check_one_forward(config: ModelConfig, seed: int, chunk: int, step: int, cases, checked):
  """(1) (2) (3) (4) (6) of one config: the stacked model computes, the unstacked one decodes."""
  try:
    toy = Toy(config, seed, chunk)
    run = forward(toy.model)
    check_oracle_and_padding(toy, run(*toy.batch.arrays()), cases)
    check_causality(toy, run, cases)
    decodes = check_decoding(toy, toy.unstacked, chunk, step, seed, "unstacked", cases)
  except Exception as e:
    e.add_note(repr(config))
    raise
  checked("1 2", config)
  checked("4", config, "packing='documents'")
  if decodes:
    checked("3 6", config, "state='float32'")
  return toy


SHARES = 64  # tests between which the covering choice is divided: about one config each
PLAIN, FULL = 6, 36  # of them are in these tiers: the configs that bring most pairs come first


@pytest.mark.parametrize("share", three(range(PLAIN).count, range(FULL).count, range(SHARES)))
def test_one_forward_serves_all_for_every_pair_of_options(share, cases, checked):
  """And (5): the prefill goes by 1, 3 or 4 tokens."""
  for i in range(share, len(covering.choice().configs), SHARES):
    chunk = (1, 3, 4)[i % 3]
    check_one_forward(covering.choice().configs[i], i, chunk, chunk, cases, checked)
    cases("all of the above for configs that together hold every pair of options")


def test_every_pair_of_options_meets_in_a_chosen_config_or_is_refused(cases):
  """Two option values that no chosen config holds are two values of one place, or a sentence refuses them.

  The list by hand holds every option (the test below), so that its option values are all there are."""
  choice = covering.choice()
  every = sorted({value for config in spaces.HAND.values() for site in covering.sites(config) for value in site})
  held = set().union(*map(covering.pairs, choice.configs))
  parts = covering.Parts([single for config in spaces.HAND.values() for single in covering.singles(config)])
  missing = [pair for pair in itertools.combinations(every, 2) if pair not in held and pair not in choice.refused]
  apart = [pair for pair in missing if not any(parts.places(*pair))]
  assert missing == apart, sorted(set(missing) - set(apart))[:10]
  assert all(choice.refused.values()) and not held & choice.refused.keys()
  assert len(held) > 9000 and len(choice.refused) < 30, (len(held), choice.refused)
  for number, share in ((PLAIN, 0.6), (FULL, 0.95)):
    assert len(set().union(*map(covering.pairs, choice.configs[:number]))) > share * len(held)
  cases("pairs of option values that meet", len(held))
  cases("pairs of option values that are refused", len(choice.refused))


def pytest_generate_tests(metafunc):
  if "drawn_index" in metafunc.fixturenames:
    metafunc.parametrize("drawn_index", range(metafunc.config.getoption("--cases")))


@pytest.mark.nightly
def test_one_forward_serves_all_for_drawn_configs(drawn_index, cases, checked):
  chunk = (1, 3, 4)[drawn_index % 3]
  toy = check_one_forward(spaces.drawn(drawn_index), drawn_index, chunk, chunk, cases, checked)
  check_restack(toy, cases)
  check_count(toy.config, toy.params, cases)


PRESETS_BY_SHAPE = spaces.distinct_presets()


@pytest.mark.parametrize("name", PRESETS_BY_SHAPE)
def test_formula_counts_the_parameters_of_shrunk_presets(name, cases):
  check_count(spaces.preset(name), nnx.state(abstract(spaces.preset(name))), cases)
  cases("count for presets, counted by name", len(PRESETS_BY_SHAPE[name]))


@pytest.mark.full
@pytest.mark.parametrize("name", plain_if(list(PRESETS_BY_SHAPE)[::2].count, PRESETS_BY_SHAPE, "nightly"))
def test_shrunk_presets_compute_what_the_oracle_does(name, cases):
  toy = Toy(spaces.preset(name), 1, 3)
  check_oracle_and_padding(toy, forward(toy.model)(*toy.batch.arrays()), cases)
  cases("oracle for presets, counted by name", len(PRESETS_BY_SHAPE[name]))


@pytest.mark.nightly
@pytest.mark.parametrize("name", PRESETS_BY_SHAPE)
def test_one_forward_serves_all_for_shrunk_presets(name, cases, checked):
  check_restack(check_one_forward(spaces.preset(name), 1, 3, 1, cases, checked), cases)


@pytest.mark.parametrize("name", plain_if(covering.widest(8).__contains__, spaces.HAND))
def test_layers_apart_can_be_stacked_again_and_are_as_many_parameters_as_the_formula_says(name, cases):
  """Of every option. This depends on the stack alone, so that it is not done again for each pair of options."""
  toy = Toy(spaces.HAND[name], 2, 3)
  check_restack(toy, cases)
  check_count(toy.config, toy.params, cases)


@pytest.mark.nightly
@pytest.mark.parametrize("name", spaces.HAND)
def test_one_forward_serves_all_for_every_option(name, cases, checked):
  """The choice that holds every pair of options holds every option too: these are other combinations."""
  check_one_forward(spaces.HAND[name], 2, 3, 1, cases, checked)


@pytest.mark.parametrize("name", three(lambda name: False, covering.widest(4).__contains__, spaces.HAND))
def test_chunks_of_any_size_and_both_forms_of_the_stack_agree(name, cases, checked):
  """(5): a prefill in one call gives what chunks give; (6): the stacked model decodes as the unstacked one computes."""
  toy = Toy(spaces.HAND[name], 2, T)
  check_decoding(toy, toy.unstacked, T, 1, T, "unstacked", cases)
  check_decoding(toy, toy.model, T, 1, 5, "stacked", cases)
  cases("5 chunks of 3 and T agree")
  check_oracle_and_padding(toy, forward(toy.unstacked)(*toy.batch.arrays()), cases)
  cases("6 scanned == unstacked")
  checked("5 6", toy.config, "state='float32'")


@pytest.mark.nightly
@pytest.mark.parametrize("name", spaces.HAND)
def test_a_prefill_of_one_token_at_a_time_agrees(name, cases):
  toy = Toy(spaces.HAND[name], 2, 1)
  check_decoding(toy, toy.unstacked, 1, 1, 1, "unstacked", cases)
  cases("5 chunks of 1 agree")


def test_the_list_by_hand_holds_every_option():
  """Each value of each bool and Literal, each kind of each family, None and not None where there may be None."""
  seen = {}
  for config in spaces.HAND.values():
    for component in spaces.components(config):
      for name, annotation in spaces.field_types(type(component)).items():
        seen.setdefault((type(component), name, annotation), []).append(getattr(component, name))
  missing = [
    (owner.__name__, name, option)
    for (owner, name, annotation), values in seen.items()
    for option, holds in spaces.options(annotation).items()
    if owner is not Precision and not any(map(holds, values))
  ]
  assert not missing
  kinds = {type(c) for config in spaces.HAND.values() for c in spaces.components(config)}
  parts = (NormConfig, PositionConfig, ScalingConfig, InitConfig, MaskConfig, ResidualConfig)
  families = (*parts, MixerConfig, CrossConfig, FFNConfig)
  # Other tests of this process may have registered kinds of their own.
  ours = {kind for family in families for kind in family.variants.values() if kind.__module__.startswith("llmarch.")}
  assert ours <= kinds


@pytest.mark.full
@pytest.mark.parametrize("name", plain_if(["gemma2"].count, ["llama", "gemma2", "prefix", "deepnorm"], "nightly"))
def test_low_precision_follows_the_oracle_and_its_own_decoding(name, cases):
  """bfloat16 parameters, stream and state: logits in f32, within bfloat16's three digits."""
  bf16 = Precision(param="bfloat16", compute="bfloat16", state="bfloat16")
  toy = Toy(dataclasses.replace(spaces.HAND[name], precision=bf16), 3, 3)
  logits = forward(toy.model)(*toy.batch.arrays())
  rows = decode(toy.unstacked, toy.batch, plan(3, 1, 3), 3)
  assert logits.dtype == np.float32 and all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(toy.params))
  for row, expected in enumerate(toy.expected):
    assert_close(logits[row, toy.batch.at(row)], expected, f"row {row}", 0.03)
    assert_close(rows[row], expected, f"decoding, row {row}", 0.03)
  gradients = jax.jit(value_and_grad(toy.model, toy.batch, 3))(toy.params)[1]
  assert all(jnp.isfinite(g).all() and g.dtype == jnp.bfloat16 for g in jax.tree.leaves(gradients))
  cases("1 forward in bfloat16 == float64 oracle, to 3 %")


# ---------------------------------------------------------------------- (5) (6) gradients, remat and depth


def losses(model, batch: Batch, chunk: int, **options):
  """The mean next-token loss, its logits made `chunk` tokens at a time."""
  tokens, positions, segments, prefix = batch.arrays()
  hidden, _, _ = model.trunk(tokens, positions, segments, prefix=prefix, **memory_of(model), **options)
  weights = jnp.asarray(positions >= 0, jnp.float32)
  total, _ = chunked_loss(
    model.unembed, hidden, jnp.roll(tokens, -1, 1), weights, chunk=chunk, label_smoothing=0.1, z_loss=1e-2
  )
  return total / weights.sum()


def value_and_grad(model, *args, **kwargs):
  graph = nnx.graphdef(model)
  return jax.value_and_grad(lambda params: losses(nnx.merge(graph, params), *args, **kwargs))


def assert_same_gradients(actual, expected, what: str, tolerance: float = 1e-5):
  assert abs(actual[0] - expected[0]) <= tolerance * abs(expected[0]), what
  largest = max(np.max(np.abs(g)) for g in jax.tree.leaves(expected[1]))
  error = max(np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (actual[1], expected[1])), strict=True))
  assert largest > 0 and error <= tolerance * largest, f"{what}: gradients off by {error / largest:.1e} of the largest"


@pytest.mark.parametrize("name", three(covering.widest(2).__contains__, covering.widest(12).__contains__, spaces.HAND))
def test_gradients_equal_the_slope_of_the_oracle(name, cases, checked):
  """In a direction in which each parameter's gradient foretells its own share: none can hide behind another."""
  toy, draws = Toy(spaces.HAND[name], 8, 3), np.random.default_rng(8)
  batch = toy.batch
  pull = draws.normal(size=(B, T, toy.config.vocab_size)) * (batch.positions >= 0)[..., None]

  @jax.jit
  def gradient(params):
    tokens, positions, segments, prefix = batch.arrays()

    def run(p):
      model = nnx.merge(toy.graph, p)
      return jnp.sum(model(tokens, positions, segments, prefix=prefix, **memory_of(model))[0] * pull)

    return jax.grad(run)(params)

  gradients = nnx.state(unstack(nnx.merge(toy.graph, jax.device_get(gradient(toy.params)))))
  largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients))

  def towards(g):
    g = np.asarray(g, np.float64)
    if np.linalg.norm(g) < 1e-3 * largest:  # as a bias of keys, which the softmax does not see
      return draws.normal(size=g.shape) / largest
    return draws.uniform(0.5, 1) * g / np.sum(g * g)

  direction = jax.tree.map(towards, gradients)
  foretold = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
  base = nnx.to_pure_dict(nnx.state(toy.unstacked))
  step = 1e-5

  def value(sign):
    moved = jax.tree.map(lambda p, d: p + sign * step * d, base, nnx.to_pure_dict(direction))
    return sum(np.sum(pull[row, batch.at(row)] * toy.alone(row, moved)) for row in range(B))

  slope = (value(1) - value(-1)) / (2 * step)
  assert abs(slope - foretold) < 1e-3 * abs(foretold), (slope, foretold)
  cases("1 gradients == slope of the oracle")
  checked("1", toy.config, "remat='none'", "packing='documents'")


@pytest.mark.full
@pytest.mark.parametrize("name", plain_if(lambda name: name == "t5", ["gemma2", "t5", "hybrid"]))
def test_loss_in_chunks_of_1_3_and_all_agree_in_value_and_gradient(name, cases):
  toy = Toy(spaces.HAND[name], 4, 3)
  run = jax.jit(lambda params: [value_and_grad(toy.model, toy.batch, chunk)(params) for chunk in (T, 1, 3, 5)])
  whole, *others = run(toy.params)
  for other in others:
    assert_same_gradients(other, whole, name)
    cases("5 loss in chunks == whole, values and gradients")


REMAT = ["gpt2", "shared_kv", "t5", "hybrid"]


@pytest.mark.full
@pytest.mark.parametrize("name", plain_if(REMAT[:1].count, REMAT, "nightly"))
def test_rematerialised_and_unstacked_gradients_agree(name, cases, checked):
  toy, key = Toy(spaces.HAND[name], 5, 3), jax.random.key(0)

  @jax.jit
  def run(params, unstacked):
    remats = [value_and_grad(toy.model, toy.batch, T, key=key, remat=r)(params) for r in ("none", *REMAT_POLICIES)]
    plain = value_and_grad(toy.model, toy.batch, T)(params)
    return remats, plain, value_and_grad(toy.unstacked, toy.batch, T)(unstacked)

  (kept, *remats), plain, apart = run(toy.params, nnx.state(toy.unstacked))
  for policy, remat in zip(REMAT_POLICIES, remats, strict=True):
    assert_same_gradients(remat, kept, f"{name} {policy}")
    cases("6 remat on == off, values and gradients (with dropout)")
    checked("6", toy.config, f"remat='{policy}'", "packing='documents'")
  gradients = nnx.merge(nnx.graphdef(toy.unstacked), apart[1])
  assert_same_gradients((apart[0], nnx.state(restack(gradients))), plain, name)
  cases("6 scanned == unstacked, gradients")


def inner(jaxpr) -> list:
  """The jaxprs that the equations of a jaxpr hold: of scans, conditions, calls."""
  equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
  values = [v for e in equations for p in e.params.values() for v in (p if isinstance(p, tuple | list) else [p])]
  return [v for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]


def count_equations(jaxpr) -> int:
  """The number of equations of a jaxpr and of all jaxprs inside it."""
  return len(getattr(jaxpr, "jaxpr", jaxpr).eqns) + sum(map(count_equations, inner(jaxpr)))


def constants(jaxpr) -> list:
  """The arrays that a jaxpr and all jaxprs inside it were closed over, which their text does not show."""
  return [*getattr(jaxpr, "consts", ()), *(c for v in inner(jaxpr) for c in constants(v))]


@pytest.mark.parametrize("stack", ["{}*a", "{}*(a b)"])
def test_compile_cost_does_not_grow_with_depth(stack, cases):
  def equations(depth):
    blocks = {name: block for name, block in spaces.HAND["gemma2"].blocks.items() if name in stack}
    config = dataclasses.replace(spaces.HAND["gemma2"], stack=stack.format(depth), blocks=blocks)
    graph, params = nnx.split(abstract(config))
    batch = make_batch(config.vocab_size, prefix_lengths(3), 0)
    init = jax.make_jaxpr(lambda: nnx.state(Decoder(config, jax.random.key(0))))()
    for_model = nnx.merge(graph, params)
    grads = [jax.make_jaxpr(value_and_grad(for_model, batch, 3, remat=remat))(params) for remat in ("none", "full")]
    return [count_equations(jaxpr) for jaxpr in (init, *grads)]

  for shallow, deep in zip(equations(8), equations(64), strict=True):
    assert shallow > 50 and deep <= 1.1 * shallow, (shallow, deep)
    cases("6 equations of 64 layers <= 1.1 x those of 8")


# ----------------------------------------------------------------------------------------- (7) layouts

MESHES = [{"data": d, "tensor": t} for d, t in ((8, 1), (2, 4), (4, 2), (1, 8))]



def wide(*blocks: tuple, **changes) -> ModelConfig:
  """A config all of whose axes every mesh divides. Blocks are (changes to attention, changes to the block)."""
  made = [
    spaces.block(spaces.attention(**{"num_heads": 8} | mixer), **{"ffn": MLPConfig(d_ff=24)} | block)
    for mixer, block in blocks
  ]
  return spaces.model(*made, **changes)


WIDE: dict[str, ModelConfig] = {
  "gqa": wide(
    (
      {"qkv_bias": True, "out_bias": True, "window": 3},
      {"ffn": MLPConfig(d_ff=32, activation="gelu", gated=False, bias=True), "norm": LayerNorm()},
    ),
    head=HeadConfig(tied=False, bias=True),
    embed=EmbedConfig(position=Learned(length=spaces.MAX_LEN)),
  ),
  "mqa_parallel": wide(({"num_kv_heads": 1}, {"residual": Parallel()})),
  "biases_by_distance": wide(
    ({"num_kv_heads": 8, "position": T5Bias(num_buckets=6, max_distance=7), "sinks": True}, {}),
    (
      {"num_heads": 16, "num_kv_heads": 8, "position": ALiBi(), "mask": Prefix(), "softcap": 4.0},
      {"residual": Sandwich()},
    ),
    stack="2*(a b)",
  ),
  "qk_norm": wide(
    ({"num_kv_heads": 4, "qk_norm": QKNorm(norm=RMSNorm(), whole=True)}, {"residual": Output()}),
    ({"num_kv_heads": 4, "position": None, "qk_norm": QKNorm(norm=RMSNorm())}, {"ffn": None}),
    stack="a 2*b",
  ),
}


def wide_batch(vocab_size: int) -> Batch:
  """Eight rows: those of ROWS, and some again."""
  batch = make_batch(vocab_size, prefix_lengths(3), 7)
  return Batch(*(x[[0, 1, 2, 3, 4, 3, 2, 1]] for x in batch.arrays()))


def declared(param, mesh: dict) -> tuple[int, ...]:
  """The shape on one device under "megatron": heads, mlp and vocab split over `tensor`, kv heads where they can be."""
  split = {"vocab", "heads", "kv_heads", "mlp"}
  names = (None,) * (len(param.get_value().shape) - len(param.axes)) + param.axes
  ways = [mesh["tensor"] if name in split else 1 for name in names]
  shape = param.get_value().shape
  return tuple(n if name == "kv_heads" and n % w else n // w for n, name, w in zip(shape, names, ways, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("name", plain_if(["biases_by_distance"].count, WIDE, "nightly"))
def test_layouts_on_fake_devices_equal_unsharded(name, cases):
  """Logits, gradients and decoding; parameters, gradients and state lie as declared."""
  layout, toy = LAYOUTS["megatron"], Toy(WIDE[name], 6, 3)
  batch = wide_batch(toy.config.vocab_size)

  def run(params, batch, mesh):
    with use_layout(layout, mesh):
      model = nnx.merge(toy.graph, params)
      tokens, positions, segments, prefix = batch
      logits = model(tokens, positions, segments, prefix=prefix)[0]
      state = cache.allocate(model.state_spec(8, T, T))
      decoded, state, _ = model(tokens, positions, segments, state, prefix=prefix)
      return (logits, decoded), value_and_grad(model, Batch(*batch), 5)(params), state

  unsharded = jax.jit(functools.partial(run, mesh=None))(toy.params, batch.arrays())
  real = batch.positions >= 0
  for sizes in MESHES:
    mesh = make_mesh(sizes)
    placed = shardings(toy.params, layout, mesh)
    params = jax.device_put(toy.params, placed)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    states = shardings(toy.model.state_spec(8, T, T), layout, mesh)
    outputs = (None, (None, placed), states)
    sharded = jax.jit(functools.partial(run, mesh=mesh), in_shardings=(placed, rows), out_shardings=outputs)
    logits, gradients, state = sharded(params, jax.device_put(batch.arrays(), rows))
    for actual, what in zip(logits, ("forward", "through a state"), strict=True):
      assert_close(np.asarray(actual)[real], np.asarray(unsharded[0][0])[real], f"{sizes} {what}")
    assert_same_gradients(jax.device_get(gradients), unsharded[1], f"{sizes}")
    is_param = lambda x: isinstance(x, nnx.Variable)
    for tree in (params, gradients[1]):
      for like, leaf in zip(*(jax.tree.leaves(t, is_leaf=is_param) for t in (toy.params, tree)), strict=True):
        shards = leaf.get_value().addressable_shards
        assert len({s.device for s in shards}) == 8 and {s.data.shape for s in shards} == {declared(like, sizes)}
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(states), strict=True):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for layer in jax.tree.leaves(state["layers"]):  # [layers, B, K, S, H]
      heads = layer.shape[2]
      parts = sizes["tensor"] if heads % sizes["tensor"] == 0 else 1
      expected_shape = (layer.shape[0], 8 // sizes["data"], heads // parts, *layer.shape[3:])
      assert layer.addressable_shards[0].data.shape == expected_shape
    cases("7 layouts on fake devices == unsharded: logits, gradients, decoding state")


def test_tensor_parallel_ends_each_branch_in_one_all_reduce():
  """1909.08053: two in a serial layer forward. And without a layout entered inside, no constraint exists."""
  config, mesh = WIDE["mqa_parallel"], make_mesh({"data": 1, "tensor": 8})
  config = dataclasses.replace(
    config, stack="a", blocks={"a": dataclasses.replace(config.blocks["a"], residual=Pre())}
  )
  toy = Toy(config, 0, 3)

  def trunk(params, tokens, positions):
    with use_layout(LAYOUTS["megatron"], mesh):
      return nnx.merge(toy.graph, params).trunk(tokens, positions)[0]

  params = jax.device_put(toy.params, shardings(toy.params, LAYOUTS["megatron"], mesh))
  text = jax.jit(trunk).lower(params, *toy.batch.arrays()[:2]).compile().as_text()
  reduces = len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text))
  assert reduces == 3, text  # and one for the embedding table, which is split by vocabulary


def test_an_axis_that_does_not_divide_is_refused_by_name():
  config = dataclasses.replace(WIDE["mqa_parallel"], blocks={"a": spaces.block()})
  with pytest.raises(UserError, match=r"axis '(heads|mlp)' of size \d+ is not divisible by mesh axis tensor=8"):
    shardings(nnx.state(abstract(config)), LAYOUTS["megatron"], make_mesh({"data": 1, "tensor": 8}))


# --------------------------------------------------------------------------------------- (8) live knobs

# Fields that no program reads, and why.
EXEMPT = {
  ("ModelConfig", "max_seq_len"): "read by guards on the host; test_config.py",
  ("TopK", "balance_rate"): "its value is read by the train step; test_moe.py",
  # Fields that go with another's, and cannot change alone; test_contract.py.
  ("AttentionConfig", "keep_kv"): "a name that another layer reads",
  ("AttentionConfig", "kv_from"): "the name that another layer keeps",
  ("CrossAttentionConfig", "memory_dim"): "the width of the encoder",
}


# Fields of which three numbers are not always three programs: the effect of some is rounded to whole pairs of
# dimensions, and two heads have no divisors but 1 and 2.
FEW = {
  "YaRN.original", "YaRN.beta_fast", "YaRN.beta_slow", "Llama3Scaling.low_factor", "CrossAttentionConfig.num_kv_heads",
}  # fmt: skip


@functools.cache
def program(config: ModelConfig) -> bytes:
  """A digest of the programs of a config: training forward with dropout, initialisation, decoding state."""
  graph, params = nnx.split(abstract(config))
  batch = make_batch(config.vocab_size, prefix_lengths(3), 0)

  def run(params, tokens, positions, segments, prefix, key):
    model = nnx.merge(graph, params)
    logits, _, aux = model(tokens, positions, segments, prefix=prefix, key=key, **memory_of(model))
    return logits, aux

  def init(key):
    return nnx.state(Decoder(config, key))

  key = jax.eval_shape(lambda: jax.random.key(0))
  digest = hashlib.sha256(repr(nnx.merge(graph, params).state_spec(2, T, 3)).encode())
  for jaxpr in (jax.make_jaxpr(run)(params, *batch.arrays(), key), jax.make_jaxpr(init)(key)):
    digest.update(re.sub("0x[0-9a-f]+", "", str(jaxpr)).encode())  # addresses of functions differ from trace to trace
    for constant in constants(jaxpr):
      digest.update(np.asarray(constant).tobytes())
  return digest.digest()


def test_a_program_traced_again_is_the_same_and_one_that_differs_in_an_exempt_field_too():
  """Otherwise every field would count as live."""
  for name in ("mla", "gemma2", "deepseek"):
    base = spaces.HAND[name]
    changes = [
      (field, rebuild(2 * old))
      for owner, field, old, rebuild in spaces.variations(base)
      if (type(owner).__name__, field) in EXEMPT and old is not None
    ]
    assert {"max_seq_len"} <= {field for field, _ in changes}
    for field, config in [("none", base), *changes]:
      assert program.__wrapped__(config) == program(base), (name, field)


def sort_of(new) -> str:
  """What sort of change a new value is: each kind and each choice is one, all numbers are."""
  if isinstance(new, int | float | tuple) and not isinstance(new, bool):
    return "a number"
  return repr(new) if isinstance(new, bool | str | None) else type(new).__name__


@functools.cache
def knobs() -> dict[str, dict]:
  """For each field, by sort of change: the places in the list by hand where it can be made, with the changed configs.

  {"AttentionConfig.mask": {"a value to 'prefix'": {(config "llama", place 7): [config "llama" with a prefix mask]}}}:
  a place is a config and the number of the field in `spaces.variations` of it.
  """
  found = {}
  for base in spaces.HAND.values():
    for i, (owner, field, old, rebuild) in enumerate(spaces.variations(base)):
      if (type(owner).__name__, field) in EXEMPT or isinstance(old, dict):
        continue
      for new in spaces.alternatives(spaces.field_types(type(owner))[field], old):
        try:
          changed = rebuild(new)
        except UserError:
          continue
        sort = f"{'None' if old is None else 'a value'} to {sort_of(new)}"
        places = found.setdefault(f"{type(owner).__name__}.{field}", {}).setdefault(sort, {})
        places.setdefault((base, i), []).append(changed)
  return found


CHANGES = [(field, sort) for field, sorts in sorted(knobs().items()) for sort in sorted(sorts)]


@pytest.mark.parametrize("field, sort", three(CHANGES[::12].count, CHANGES[::2].count, CHANGES))
def test_every_field_of_every_config_is_live(field, sort, cases):
  """Each sort of change to a field changes the program where it can be made first; and of three numbers, each is
  another program (a field that only switches something on is not live)."""
  places = list(knobs()[field][sort].items())
  wanted = 2 if "number" not in sort or field in FEW else 3
  most = 0
  for (base, _), changed in places[: 4 if "number" in sort else 1]:
    most = max(most, len({program(c) for c in (base, *changed[:4])}))
    if most >= wanted:
      break
  assert most >= wanted, f"{field} is dead from {sort}"
  cases("8 a changed field changes the program")


def test_every_field_is_a_knob_or_exempt():
  """The walk above sees every field there is; those of one kind only (mixer, head ...) are walked inside."""
  walked = set(knobs()) | {".".join(pair) for pair in EXEMPT}
  everything = {type(c) for config in spaces.HAND.values() for c in spaces.components(config)}
  fields = {f"{owner.__name__}.{field}" for owner in everything for field in spaces.field_types(owner)}
  assert fields - walked == {"ModelConfig.blocks", "MoEConfig.expert"} | {
    f"ModelConfig.{field}" for field in ("embed", "head", "precision")
  }
