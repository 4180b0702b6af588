"""Mixtures of experts: identities of routing, dispatch, losses and balancing; over a mesh; and what is refused."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import spaces
from flax import nnx
from test_invariants import assert_close, assert_same_gradients, decode, forward, make_batch, plan, prefix_lengths
from tiers import plain_if

from llmarch.analysis import cost
from llmarch.branches import FFNConfig
from llmarch.build import build
from llmarch.config import FanIn, Xavier
from llmarch.errors import UserError
from llmarch.infer.decoder import check_generates
from llmarch.layers.ffn import MLP, MLPConfig
from llmarch.layers.moe import ExpertChoice, Groups, MoE, MoEConfig, TopK
from llmarch.layers.param import Maker, flatten, unflatten
from llmarch.models.decoder import abstract, unstack
from llmarch.ops import moe as ops
from llmarch.ops import quant
from llmarch.run_config import OptimizerConfig, RunConfig, TrainConfig
from llmarch.sharding import LAYOUTS, make_mesh, parse_mesh, shardings, sum_over_mesh, use_layout
from llmarch.train.step import make_train_step

B, T, D, E, F = 3, 7, 12, 5, 10


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weights(experts: int = E, seed: int = 1) -> ops.Experts:
  """Gated, with biases."""
  shapes = [(D, F), (F, D), (D, F), (F,), (F,), (D,)]
  return ops.Experts(*(normal(experts, *s, seed=seed + i) / 3 for i, s in enumerate(shapes)))


def route(logits, k=2, real=None, **options) -> ops.Routes:
  scores = ops.scores(logits, "softmax")
  real = jnp.ones(scores.shape[:2], bool) if real is None else real
  return ops.top_k(scores, jax.lax.stop_gradient(scores), real, k, **{"renormalize": True, "scale": 1.0} | options)


def site(positions, segments=None):
  return spaces.site(positions, segments, telemetry=True)


def layer(config: MoEConfig, seed: int = 3) -> MoE:
  """With parameters none of which is at its initial value."""
  graph, params = nnx.split(nnx.eval_shape(lambda: MoE(config, D, Maker(jax.random.key(0), FanIn(), "float32"), 1, 1)))
  return nnx.merge(graph, jax.tree.map(jnp.asarray, spaces.random_params(params, seed)))


def loads(skew: float, rows: int = B, tokens: int = T, experts: int = E):
  """Router logits; with skew, most tokens want the first experts."""
  return normal(rows, tokens, experts, seed=7) - skew * jnp.arange(experts)


# -------------------------------------------------------------------------------------------------- dispatch


ROUTED = [(7, 2, 0.0), (1, 3, 0.0), (7, 5, 1.0), (150, 1, 9.0), (150, 2, 0.5)]


@pytest.mark.parametrize("tokens, k, skew", plain_if(ROUTED[2:4].count, ROUTED))
def test_grouped_and_buffered_experts_equal_every_expert_on_every_token(tokens, k, skew):
  """T-30, values and gradients: empty experts, padding, groups of many blocks and of none."""
  x, w, logits = normal(B, tokens, D), weights(), loads(skew, tokens=tokens)
  real = jnp.arange(tokens) < jnp.array([tokens, tokens // 2, 1])[:, None]
  pull = normal(B, tokens, D, seed=9)

  def run(how, x, w, logits):
    routes = route(logits, k, real, scale=1.3, renormalize=k > 1)  # one renormalised gate has no slope
    if how == "buffered":
      y = ops.buffered(x, ops.limit_capacity(routes, E, float(E))[1], w, "silu")
    else:
      y = getattr(ops, how)(x, routes, w, "silu")
    return jnp.sum(y * pull), y

  grad = jax.jit(jax.value_and_grad(run, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
  (_, expected), slopes = grad("dense", x, w, logits)
  assert not np.asarray(expected)[~np.asarray(real)].any()
  for how in ("grouped", "buffered"):
    (_, y), g = grad(how, x, w, logits)
    assert_close(y, np.asarray(expected), how)
    for actual, slope in zip(jax.tree.leaves(g), jax.tree.leaves(slopes), strict=True):
      assert_close(actual, np.asarray(slope), f"gradient of {how}")


@pytest.mark.parametrize("capacity_factor, skew", [(0.5, 0.0), (1.0, 1.0), (1.25, 0.3), (2.0, 2.0)])
def test_what_capacity_drops_is_what_the_loop_drops_and_no_expert_has_more(capacity_factor, skew):
  logits, lengths = loads(skew, tokens=20), np.array([20, 13, 1])
  real = np.arange(20) < lengths[:, None]
  routes, buffers = ops.limit_capacity(route(logits, 2, jnp.asarray(real)), E, capacity_factor)
  r = TopK(k=2, capacity_factor=capacity_factor)
  for row, n in enumerate(lengths):
    positions = np.where(real[row], np.arange(20), -1)
    xs, of = list(np.asarray(logits[row], float)), types.SimpleNamespace(positions=positions)
    kept = oracle.tokens_choose(r, {"router": np.eye(E)}, xs, of)
    taken = [{int(e) for e, t in zip(routes.expert[row, i], routes.taken[row, i]) if t} for i in range(n)]
    assert taken == [set(k) for k in kept[:n]]
    held = (np.asarray(buffers.token[row]) < 20).sum(axis=1)
    assert held.max() <= math.ceil(capacity_factor * n / E) and held.sum() == sum(map(len, taken))
  assert not routes.taken[~real].any()
  dropped = ops.dense(normal(B, 20, D), routes, weights(), "silu")
  assert_close(ops.buffered(normal(B, 20, D), buffers, weights(), "silu"), np.asarray(dropped), "buffers")


@pytest.mark.full
def test_padding_takes_no_place_from_real_tokens():
  config = MoEConfig(num_experts=E, expert=MLPConfig(d_ff=F), router=TopK(k=2, capacity_factor=0.8))
  moe, x = layer(config), normal(1, 6, D)
  out = moe(x, site([np.arange(6)]))
  alone, aux = sum_over_mesh(out.y), out.stats
  at = np.array([1, 2, 5, 6, 8, 9])
  padded = normal(1, 11, D, seed=5).at[:, at].set(x)
  positions = np.full((1, 11), -1)
  positions[0, at] = np.arange(6)
  out = moe(padded, site(positions))
  y, padded_aux = sum_over_mesh(out.y), out.stats
  np.testing.assert_allclose(y[:, at], alone, atol=1e-6)
  assert aux["router_dropped"] > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), padded_aux, aux)


def test_identical_experts_with_renormalised_gates_are_one_dense_mlp():
  """T-32."""
  for expert in (MLPConfig(d_ff=F), MLPConfig(d_ff=F, activation="relu2", gated=False, bias=True)):
    moe = layer(MoEConfig(num_experts=E, expert=expert, router=TopK(k=3)))
    mlp = MLP(expert, D, Maker(jax.random.key(0), FanIn(), "float32"), 1, 1)
    for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
      if hasattr(mlp, name):
        one = getattr(moe, name)[0]
        getattr(mlp, name).set_value(one)
        getattr(moe, name).set_value(jnp.broadcast_to(one, (E, *one.shape)))
    x, here = normal(B, T, D), site(np.tile(np.arange(T), (B, 1)))
    many, dense = (sum_over_mesh(branch(x, here).y) for branch in (moe, mlp))
    assert_close(many, np.asarray(dense), str(expert))


@pytest.mark.parametrize("format", ["int8", "fp8", "int4_32"])
@pytest.mark.parametrize("rows", [9, 200])
def test_quantised_experts_are_their_decoded_matrices(format, rows):
  x, w, sizes = normal(rows, 32), normal(4, 32, F, seed=2), jnp.array([3, 0, rows - 6, 2])
  q = quant.quantize(w, (1,), format)
  assert_close(
    ops.grouped_matmul(x, q, sizes), np.asarray(ops.grouped_matmul(x, q.astype(jnp.float32), sizes)), format
  )
  assert not np.asarray(ops.grouped_matmul(x, q, sizes))[-1].any()  # of no expert


# --------------------------------------------------------------------------------------------------- routing


def test_gates_sum_to_the_scale_and_are_a_softmax_over_the_chosen_logits():
  logits = loads(0.4)
  routes = route(logits, 3, scale=2.5)
  np.testing.assert_allclose(jnp.sum(routes.gate, -1), 2.5, rtol=1e-6)
  chosen = jnp.take_along_axis(logits, routes.expert, -1)
  np.testing.assert_allclose(routes.gate, 2.5 * jax.nn.softmax(chosen, -1), rtol=1e-5)
  raw = route(logits, 3, renormalize=False)
  np.testing.assert_allclose(raw.gate, jnp.take_along_axis(jax.nn.softmax(logits, -1), raw.expert, -1), rtol=1e-6)
  assert (jnp.sum(raw.gate, -1) < 1).all() and (raw.gate[..., 0] >= raw.gate[..., 1]).all()


@pytest.mark.parametrize("score", ["max", "top2"])
@pytest.mark.parametrize("num, top, k", [(4, 2, 5), (2, 1, 3), (3, 3, 4), (4, 1, 3)])
def test_group_limited_choice_is_the_loop_of_the_paper(num, top, k, score):
  experts = 12
  logits, bias = np.array(loads(0.1, 4, 30, experts), float), np.random.default_rng(4).normal(size=experts) / 4
  r = TopK(k=k, scores="sigmoid", renormalize=False, groups=Groups(num=num, top=top, score=score), balance_rate=0.0)
  scores = ops.scores(jnp.asarray(logits, jnp.float32), "sigmoid")
  choice = ops.limit_to_groups(scores + jnp.asarray(bias, jnp.float32), num, top, score)
  routes = ops.top_k(scores, choice, jnp.ones((4, 30), bool), k, renormalize=False, scale=1.0)
  for row in range(4):
    p = {"router": np.eye(experts), "selection_bias": bias}
    for t, expected in enumerate(oracle.tokens_choose(r, p, list(logits[row]), None)):
      assert routes.expert[row, t].tolist() == list(expected)
      np.testing.assert_allclose(routes.gate[row, t], list(expected.values()), rtol=1e-5)
  assert (np.asarray(jnp.isfinite(choice).sum(-1)) == experts // num * top).all()


def test_each_expert_chooses_its_share_of_each_document():
  scores, c = ops.scores(loads(0.3, 2, 20), "softmax"), 1.7
  segments = np.array([[0] * 9 + [1] * 11, [2] * 20])
  real = np.arange(20) < np.array([20, 13])[:, None]
  buffers = ops.expert_choice(scores, jnp.asarray(real), jnp.asarray(segments), c)
  for row, documents in enumerate([(range(9), range(9, 20)), (range(13),)]):
    for document in documents:
      at = list(document)
      for e in range(E):
        best = {at[i] for i in oracle.largest(np.asarray(scores[row, at, e]), math.floor(c * len(at) / E))}
        assert {int(t) for t in buffers.token[row, e]} & set(at) == best
  held = buffers.token < 20
  np.testing.assert_array_equal(
    buffers.gate[held], np.asarray(scores)[np.nonzero(held)[0], np.asarray(buffers.token)[held], np.nonzero(held)[1]]
  )
  assert held.sum() == E * (math.floor(c * 9 / E) + math.floor(c * 11 / E) + math.floor(c * 13 / E))


# ------------------------------------------------------------------------------------- losses and statistics


def test_balance_loss_is_1_where_loads_are_uniform_and_the_number_of_experts_at_collapse():
  """T-31, of batches and of rows."""
  real, uniform = jnp.ones((B, T), bool), jnp.full((B, T, E), 1 / E)
  one = jnp.zeros((B, T, E)).at[..., 2].set(1)
  for by_row in (False, True):
    loss = functools.partial(ops.balance_loss, real=real, by_row=by_row)
    assert loss(uniform, uniform * 2) == pytest.approx(1)
    assert loss(one, one) == pytest.approx(E)
  # Each row wants another expert: balanced over the batch, collapsed in each row. Padding counts for nothing.
  rows = jax.nn.one_hot(jnp.arange(E)[:, None], E) * jnp.ones((E, T, 1))
  real = jnp.arange(T) < 4
  choices = rows * real[:, None]
  p, real = jnp.where(real[:, None], rows, uniform[0, 0]), jnp.broadcast_to(real, (E, T))
  assert ops.balance_loss(p, choices, real, by_row=False) == pytest.approx(1)
  assert ops.balance_loss(p, choices, real, by_row=True) == pytest.approx(E)


def test_z_loss_and_statistics_have_their_closed_forms():
  real = jnp.arange(T)[None] < jnp.array([[T], [3], [1]])
  logits = jnp.broadcast_to(jnp.where(real[..., None], 1.7, 99.0), (B, T, E))
  assert ops.z_loss(logits, real) == pytest.approx((1.7 + math.log(E)) ** 2, rel=1e-6)
  stats = ops.statistics(jnp.array([6.0, 2.0, 0.0, 0.0]), 6, 8)
  entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
  expected = {"router_entropy": entropy, "router_max_violation": 2.0, "router_dropped": 0.25}
  assert {k: float(v) for k, v in stats.items()} == pytest.approx(expected)
  assert ops.statistics(jnp.ones(4), 4, 4)["router_entropy"] == pytest.approx(1)


LOSSY = spaces.model(
  spaces.block(
    ffn=spaces.moe(4, TopK(scores="sigmoid", aux_loss=0.3, sequence_loss=0.7, z_loss=0.01, balance_rate=0.02))
  )
)


def experiment(model, rows=4, tokens=16, steps=10) -> RunConfig:
  train = TrainConfig(steps=steps, batch_size=rows, seq_len=tokens)
  return RunConfig(model=model, optimizer=OptimizerConfig(learning_rate=1e-3), train=train)


def train_batch(model, rows=4, tokens=16, seed=0):
  draws = np.random.default_rng(seed)
  ids = draws.integers(0, model.vocab_size, (rows, tokens + 1)).astype(np.int32)
  positions = np.tile(np.arange(tokens, dtype=np.int32), (rows, 1))
  return {
    "tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions,
    "segment_ids": np.zeros_like(positions), "loss_weights": np.ones((rows, tokens), np.float32),
  }  # fmt: skip


@pytest.mark.full
def test_router_losses_are_trained_and_a_bias_steps_against_its_load_past_the_optimizer():
  batch = train_batch(LOSSY)

  def after(model):
    steps = make_train_step(experiment(model))
    state = steps.init()
    before = jax.device_get(state["params"])
    new, metrics = steps.step(state, batch, telemetry=True)
    return before, jax.device_get(new["params"]), metrics

  before, new, metrics = after(LOSSY)
  aux = metrics["telemetry"]
  assert metrics["branch_loss"] == pytest.approx(float(jnp.sum(aux["branch_loss"])))
  assert (aux["branch_loss"] > 0.9).all() and (aux["router_dropped"] == 0).all()

  graph, params = nnx.split(abstract(LOSSY))
  trunk = lambda p: nnx.merge(graph, unflatten(params, p)).trunk(batch["tokens"], batch["positions"])[2]
  pull = jax.jit(jax.grad(lambda p: jnp.sum(trunk(p).loss)))(before)
  bias, router = (f"stack/segments/0/blocks/0/ffn/{name}" for name in ("selection_bias", "router"))
  assert np.abs(pull[bias]).max() > 0.1
  np.testing.assert_allclose(new[bias], before[bias] - 0.02 * np.sign(pull[bias]), rtol=1e-6)

  quiet = dataclasses.replace(LOSSY.blocks["a"].ffn.router, aux_loss=0.0, sequence_loss=0.0, z_loss=0.0)
  ffn = dataclasses.replace(LOSSY.blocks["a"].ffn, router=quiet)
  _, without, _ = after(spaces.model(spaces.block(ffn=ffn)))
  assert np.abs(new[router] - without[router]).max() > 1e-5


def test_the_pull_on_a_bias_is_its_loads_error_and_adds_nothing():
  bias, load = normal(E), jnp.array([9.0, 1.0, 5.0, 5.0, 5.0])
  value, slope = jax.value_and_grad(ops.pull_to_balance)(bias, load)
  assert value == 0
  np.testing.assert_allclose(slope, load / 5 - 1, rtol=1e-6)


@pytest.mark.nightly
def test_balancing_without_a_loss_evens_the_load():
  """D-14: MaxVio below 0.1 on text that was not trained on, where the same run without biases is far above."""
  draws, rows, tokens, vocab = np.random.default_rng(0), 16, 24, 500
  p = 1 / (np.arange(vocab) + 30)
  text = draws.choice(vocab, p=p / p.sum(), size=(260, rows, tokens)).astype(np.int32)
  target, fixed = draws.permutation(vocab).astype(np.int32), train_batch(LOSSY, rows, tokens)

  def violation(rate, steps):
    ffn = spaces.moe(8, TopK(scores="sigmoid", balance_rate=rate), {"d_ff": 8})
    model = spaces.model(spaces.block(ffn=ffn), stack="2*a", d_model=32, vocab_size=vocab)
    functions = make_train_step(experiment(model, rows, tokens, 200))
    state = functions.init()
    for ids in text[:steps]:
      state, _ = functions.step(state, fixed | {"tokens": ids, "targets": target[ids]})
    graph, params = nnx.split(abstract(model))
    held_out = text[200:].reshape(-1, tokens)
    everywhere = np.tile(np.arange(tokens, dtype=np.int32), (len(held_out), 1))
    run = jax.jit(lambda p: nnx.merge(graph, unflatten(params, p)).trunk(held_out, everywhere, telemetry=True)[2].stats)
    return np.asarray(run(state["params"])["router_max_violation"])

  assert violation(0.001, 200).max() < 0.1
  assert violation(None, 60).max() > 0.4


# --------------------------------------------------------------------------------------------------- decoding


def test_a_decoding_state_drops_nothing_so_that_chunks_agree():
  tight, roomy = (spaces.model(spaces.block(ffn=spaces.moe(4, TopK(capacity_factor=c)))) for c in (0.5, None))
  batch = make_batch(tight.vocab_size, prefix_lengths(3), 1)
  params = spaces.random_params(nnx.state(abstract(tight)), 1)
  of = lambda config: unstack(nnx.merge(nnx.graphdef(abstract(config)), params))
  expected = forward(of(roomy))(*batch.arrays())
  dropping = forward(of(tight))(*batch.arrays())
  assert np.abs(dropping - expected).max() > 0.1
  for chunk in (1, 5):
    rows = decode(of(tight), batch, plan(chunk, 1, 0), chunk)
    for row, logits in enumerate(rows):
      assert_close(logits, expected[row, batch.at(row)], f"chunk {chunk}, row {row}")


def test_a_model_whose_experts_choose_cannot_generate():
  with pytest.raises(UserError, match="router='expert_choice': it sees the future and cannot generate"):
    check_generates(spaces.HAND["expert_choice"])
  check_generates(spaces.HAND["deepseek"])


# ------------------------------------------------------------------------------------------------- over a mesh

SPREAD = {
  "dropless": spaces.moe(
    8, TopK(k=3, scores="sigmoid", balance_rate=0.01, bias=True, aux_loss=0.1), {"d_ff": 16, "bias": True},
    shared=MLPConfig(d_ff=24), shared_gate=True,
  ),
  "capacity": spaces.moe(16, TopK(capacity_factor=1.0, sequence_loss=0.1), {"d_ff": 16, "bias": True}),
  "expert_choice": spaces.moe(8, ExpertChoice(), {"d_ff": 16}),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", plain_if(lambda name: name != "dropless", SPREAD, "nightly"))
def test_experts_over_eight_devices_equal_one_device(name, cases):
  """Forward and gradients, with tokens and experts split over the same axes; capacity's in all-to-alls."""
  config = spaces.model(
    spaces.block(spaces.attention(num_heads=8), ffn=SPREAD[name]), d_model=24, stack="2*a", vocab_size=48
  )
  graph, params = nnx.split(abstract(config))
  params = jax.tree.map(jnp.asarray, spaces.random_params(params, 6))
  draws, layout = np.random.default_rng(2), LAYOUTS["train"]
  # No token twice in a row: equal ones would tie.
  tokens = draws.permuted(np.tile(np.arange(48, dtype=np.int32), (8, 1)), axis=1)[:, :12]
  positions = np.maximum(np.arange(12) - draws.integers(0, 4, 8)[:, None], -1).astype(np.int32)
  pull = normal(8, 12, 48) * (positions >= 0)[..., None]

  def loss(params, mesh):
    with use_layout(layout, mesh):
      logits, _, aux = nnx.merge(graph, params)(tokens, positions)
      return jnp.sum(logits * pull) + (0.0 if aux.loss is None else jnp.sum(aux.loss)), logits

  def run(mesh):
    return jax.value_and_grad(functools.partial(loss, mesh=mesh), has_aux=True)

  (_, expected), slopes = jax.jit(run(None))(params)
  real = positions >= 0
  for text in ("expert=8", "fsdp=2,expert=2,tensor=2", "data=2,expert=2,context=2"):
    mesh = make_mesh(parse_mesh(text))
    placed = shardings(params, layout, mesh)
    step = jax.jit(run(mesh), in_shardings=(placed,)).lower(params).compile()
    (_, logits), g = step(jax.device_put(params, placed))
    assert_close(np.asarray(logits)[real], np.asarray(expected)[real], text)
    assert_same_gradients((0, jax.device_get(g)), (0, jax.device_get(slopes)), text)
    if text == "expert=8":
      assert (" all-to-all(" in step.as_text()) == (name != "dropless")
      held = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, jax.device_put(params, placed))
      assert flatten(held)["stack/segments/0/blocks/0/ffn/up"][1] == SPREAD[name].num_experts // 8
    cases("7 experts over a mesh == one device: forward, gradients")


# --------------------------------------------------------------------------------------- costs and parameters


def test_a_token_costs_the_experts_it_goes_to():
  c = MoEConfig(
    num_experts=6, expert=MLPConfig(d_ff=F, bias=True), router=TopK(k=2, bias=True, balance_rate=0.0),
    shared=MLPConfig(d_ff=7), shared_gate=True,
  )  # fmt: skip
  of = cost.moe(c, D)
  assert of.matrices - of.idle == 2 * 3 * D * F + 3 * D * 7 + 6 * D + D
  assert of.vectors - of.idle_vectors == 2 * (2 * F + D) + 2 * 6
  assert cost.moe(dataclasses.replace(c, router=ExpertChoice(capacity_factor=1.5)), D).idle == 4.5 * 3 * D * F


def test_each_expert_is_a_matrix_to_initialisers_and_to_muon():
  from llmarch.train.optim import _muon_dims

  config = spaces.HAND["mixtral"]
  wide = dataclasses.replace(config, d_model=60, init=FanIn())
  named = flatten(nnx.state(abstract(wide)), variables=True)
  up = next(p for name, p in named.items() if name.endswith("ffn/up"))
  assert _muon_dims("stack/segments/0/blocks/0/ffn/up", up) == ((2,), (3,))
  make = Maker(jax.random.key(1), FanIn(), "float32")
  one, many = (make.weight("w", axes, shape, fan_in="embed") for axes, shape in [
    ("embed mlp", (64, 96)), ("experts embed expert_mlp", (5, 64, 96))])  # fmt: skip
  np.testing.assert_allclose(np.std(many[...]), np.std(one[...]), rtol=0.02)
  xavier = dataclasses.replace(make, init=Xavier())
  one, many = (xavier.weight("w", axes, shape, fan_in="embed") for axes, shape in [
    ("embed mlp", (64, 96)), ("experts embed expert_mlp", (5, 64, 96))])  # fmt: skip
  np.testing.assert_allclose(np.std(many[...]), np.std(one[...]), rtol=0.02)


def test_switch_base_128_has_its_published_numbers_of_parameters():
  """C-7: 12 + 12 layers of T5 base, every second one with experts (2101.03961)."""
  D, dense = 768, MLPConfig(d_ff=3072, activation="relu", gated=False)
  router = TopK(k=1, renormalize=False, capacity_factor=1.25, aux_loss=0.01)
  moe = cost.moe(MoEConfig(num_experts=128, expert=dense, router=router), D)
  attention = cost.attention(spaces.AttentionConfig(num_heads=12, head_dim=64), D)
  norms, tables = 12 * 2 * D + 12 * 3 * D + 2 * D, 2 * 32 * 12
  total = 32128 * D + 36 * attention.matrices + 12 * cost.mlp(dense, D).matrices + 12 * moe.matrices + norms + tables
  assert (total, total - 12 * moe.idle) == (7_415_217_408, 224_083_200)


# ------------------------------------------------------------------------------------------------- bad configs


@pytest.mark.parametrize(
  "changes, sentence",
  [
    ({"num_experts": 0}, "ffn.num_experts must be at least 1, got 0"),
    ({"router": {"kind": "top_k", "k": 9}}, "ffn.router.k=9 is more than the 8 experts to choose from"),
    ({"router": {"kind": "top_k", "k": 0}}, "ffn.router.k must be at least 1"),
    ({"router": {"kind": "top_k", "groups": {"num": 3, "top": 1}}}, "groups.num=3 must divide num_experts=8"),
    ({"router": {"kind": "top_k", "groups": {"num": 2, "top": 3}}}, "groups.top=3 groups are more than num=2"),
    ({"router": {"kind": "top_k", "k": 3, "groups": {"num": 4, "top": 1}}}, "k=3 is more than the 2 experts"),
    ({"router": {"kind": "top_k", "groups": {"num": 8, "top": 3}}}, "score='top2' needs two experts a group"),
    ({"router": {"kind": "top_k", "capacity_factor": 0.0}}, "ffn.router.capacity_factor must be greater than 0"),
    ({"router": {"kind": "top_k", "balance_rate": -0.1}}, "ffn.router.balance_rate must be at least 0"),
    ({"router": {"kind": "top_k", "jitter": 1.0}}, "ffn.router.jitter must be at least 0 and below 1"),
    ({"router": {"kind": "expert_choice", "capacity_factor": 9.0}}, "capacity_factor=9.0 is more than num_experts=8"),
    ({"router": {"kind": "expert_choice", "k": 2}}, "ffn.router.k: no such key"),
    ({"shared_gate": True}, "ffn.shared_gate=True needs a shared expert"),
    ({"expert": {"d_ff": 8, "activation": "swiglu_oss", "gated": False}}, "activation='swiglu_oss' is of a gate"),
  ],
)
def test_a_combination_that_makes_no_sense_is_refused(changes, sentence):
  data = {"kind": "moe", "num_experts": 8, "expert": {"d_ff": 8}} | changes
  with pytest.raises(UserError, match=sentence):
    build(FFNConfig, data, "ffn")
