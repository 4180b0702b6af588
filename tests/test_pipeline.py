"""Pipelines: whatever the schedule and the other axes, one device's numbers; and a bubble no larger than its formula.

Eight fake devices; the rows are those of test_train_layouts.py, packed documents with padding.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spaces
from jax.sharding import PartitionSpec as P
from test_train_layouts import B, T, assert_near, axes_of, batch, block, in_tiers, optax_moments
from tiers import plain_if

from llmarch.analysis import hlo
from llmarch.config import EmbedConfig
from llmarch.errors import UserError
from llmarch.layers.mask import Prefix
from llmarch.layers.moe import TopK
from llmarch.layers.norm import LayerNorm, ScaleNorm
from llmarch.layers.position import T5Bias
from llmarch.run_config import AdamW, Constant, OptimizerConfig, RunConfig, TrainConfig
from llmarch.sharding import TRAINING as AXES
from llmarch.sharding import make_mesh, parse_mesh
from llmarch.train.pipeline import STAGE, Schedule, deal, exchanges, plan
from llmarch.train.step import LAYOUT, make_train_step

SIZES = {"d_model": 24, "vocab_size": 42, "max_seq_len": T}
DROPS = dataclasses.replace(block(4, dropout=0.1), dropout=0.1)
MODELS = {
  "hybrid": spaces.model(block(4, window=9), block(8, norm=LayerNorm()), stack="4*(a b)", **SIZES),
  "parallel": spaces.model(block(1, form="parallel", norm=ScaleNorm()), stack="4*a", **SIZES),
  # Two terms, and a table that all layers of a name share.
  "terms": spaces.model(
    block(2, position=T5Bias(num_buckets=6, max_distance=7), mask=Prefix()), block(4), stack="4*a 2*(b a)", **SIZES
  ),
  "drops": spaces.model(DROPS, stack="4*a", embed=EmbedConfig(dropout=0.1), **SIZES),
  "experts": spaces.model(
    block(4, ffn=spaces.moe(4, router=TopK(k=2, aux_loss=0.1), expert={"d_ff": 16})), stack="2*a", **SIZES
  ),
}
CASES = [  # mesh, model, options of training
  ("stage=2", "hybrid", {}),
  ("stage=4", "parallel", {"remat": "full"}),
  ("data=2,stage=2", "hybrid", {"grad_accum": 2}),
  ("stage=2,tensor=2", "parallel", {"remat": "full"}),
  ("fsdp=2,stage=2,tensor=2", "hybrid", {"remat": "full"}),
  ("stage=2,context=2", "hybrid", {}),
  ("stage=2,sequence=2,tensor=2", "parallel", {"remat": "dots"}),
  ("data=2,stage=2", "hybrid", {"circuits": 2}),
  ("data=2,stage=2,context=2", "parallel", {"circuits": 2, "remat": "full"}),
  ("fsdp=2,stage=2", "terms", {"microbatches": 2}),
]
MICRO = {"drops": "data=2,stage=2", "experts": "stage=2,expert=2"}  # models with statistics by microbatch
PLAIN_MESHES = {"stage=2,sequence=2,tensor=2"}
# Their pairs of axes are in other products too.
NIGHTLY_MESHES = {"stage=2", "data=2,stage=2", "stage=2,tensor=2", "stage=2,context=2"}


def mesh_of(text: str):
  sizes = parse_mesh(text)
  return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def experiment(name: str, mesh: str, options: dict) -> RunConfig:
  # An eps near the size of gradients: else Adam's update is the sign of those that are zero but for rounding.
  optimizer = OptimizerConfig(algorithm=AdamW(eps=1e-3), schedule=Constant(), clip_norm=0.5)
  train = TrainConfig(batch_size=B, seq_len=T, loss_chunk=8, **options)
  return RunConfig(model=MODELS[name], train=train, optimizer=optimizer, mesh=mesh)


@functools.cache
def outcome(name: str, mesh: str, options: tuple, telemetry: bool = False):
  """Parameters at the start and after a step, gradients, metrics, and the program."""
  functions = make_train_step(experiment(name, mesh, dict(options)), mesh_of(mesh) if mesh else None)
  state, rows = functions.init(), jax.device_put(batch(), functions.batch_sharding)
  start = jax.device_get(state["params"])
  step = functions.step.lower(state, rows, telemetry=telemetry).compile()
  state, metrics = step(state, rows)
  grads = optax_moments(state["opt_state"])["mu"]
  return *jax.device_get((start, state["params"], grads, metrics)), step


def alone(name: str, options: dict, telemetry: bool = False):
  """The same on one device."""
  unread = ("microbatches", "circuits")
  return outcome(name, "", tuple((k, v) for k, v in options.items() if k not in unread), telemetry)


def assert_equal_steps(one, other):
  start, end, grads, metrics, _ = one
  start_alone, end_alone, grads_alone, metrics_alone, _ = other
  jax.tree.map(np.testing.assert_array_equal, start, start_alone)
  for key in ("loss", "grad_norm"):
    np.testing.assert_allclose(metrics[key], metrics_alone[key], rtol=1e-5, err_msg=key)
  assert_near(grads, grads_alone, "gradient")
  for key in end:
    update, want = end[key] - start[key], end_alone[key] - start[key]
    # An update is the difference of parameters of size 1: their rounding, 6e-8, is 1e-4 of it.
    np.testing.assert_allclose(update, want, rtol=0, atol=1e-5 * np.abs(want).max() + 2.5e-7, err_msg=key)


@pytest.mark.parametrize("mesh, name, options", in_tiers(CASES, PLAIN_MESHES, NIGHTLY_MESHES))
def test_a_pipelined_step_equals_one_device(mesh, name, options, cases, checked):
  assert_equal_steps(outcome(name, mesh, tuple(options.items())), alone(name, options))
  cases("pipelined mesh == one device: start (bitwise), loss, gradients, update")
  axes = [f"mesh.{part.partition('=')[0]}=given" for part in mesh.split(",")]
  checked("7", MODELS[name], *axes, f"remat='{options.get('remat', 'none')}'", "packing='documents'")


@pytest.mark.full
def test_an_evaluation_is_pipelined_too_and_equals_one_device():
  def evaluated(mesh):
    functions = make_train_step(experiment("terms", mesh, {}), mesh_of(mesh) if mesh else None)
    state, rows = functions.init(), jax.device_put(batch(), functions.batch_sharding)
    evaluate = functions.evaluate.lower(state, rows).compile()
    return evaluate(state, rows), evaluate.as_text()

  (sums, _), (staged, program) = evaluated(""), evaluated("stage=2")
  np.testing.assert_allclose(staged["loss"], sums["loss"], rtol=1e-5)
  np.testing.assert_array_equal(staged["weight"], sums["weight"])
  permutes = [c for c in hlo.count(program, parse_mesh("stage=2")).collectives if c.kind == "collective-permute"]
  assert sum(c.count for c in permutes) == 2 * (Schedule(2, 8, 1).ticks + 2)  # two terms of the stack


def test_stages_and_each_other_axis_are_in_a_mesh_of_the_tiers():
  meshes = [axes_of(mesh) for mesh in (*(mesh for mesh, *_ in CASES), *MICRO.values()) if mesh not in NIGHTLY_MESHES]
  assert {"stage"} in meshes and set(AXES) == set().union(*meshes)


@pytest.mark.parametrize(
  "mesh, name, options", in_tiers([c for c in CASES if "context" not in c[0]], PLAIN_MESHES, NIGHTLY_MESHES)
)
def test_only_the_stage_axis_carries_permutations(mesh, name, options):
  """One a tick, and S - 1 to bring microbatches in and out; as many backward. (Rings have others, circuits more.)"""
  program = outcome(name, mesh, tuple(options.items()))[-1]
  found = hlo.count(program.as_text(), parse_mesh(mesh)).collectives
  found = {c.axes: c.count for c in found if c.kind == "collective-permute"}
  assert set(found) == {(STAGE,)}
  schedule = plan(experiment(name, mesh, options), LAYOUT, mesh_of(mesh)).schedule
  if schedule.circuits == 1:
    times = 2 * len(MODELS[name].segments) * options.get("grad_accum", 1)
    assert found[STAGE,] == times * (schedule.ticks + 2 * (schedule.stages - 1))


# ------------------------------------------------------------------------------- draws and statistics by microbatch


@pytest.mark.full
@pytest.mark.parametrize("name, mesh", [*MICRO.items(), pytest.param("experts", "stage=2", marks=pytest.mark.nightly)])
def test_microbatches_are_the_micro_batches_of_one_device(name, mesh, cases):
  """Dropout's draws, routers' losses and the layers' statistics, which whole batches would have others of."""
  M = 4
  one = outcome(name, mesh, (("microbatches", M),), telemetry=True)
  other = alone(name, {"grad_accum": M}, telemetry=True)
  assert_equal_steps(one, other)
  assert set(one[3]["telemetry"]) == set(other[3]["telemetry"]) > {"residual_rms", "attention_entropy"}
  for key in set(one[3]["telemetry"]) - {"update_ratio"}:
    np.testing.assert_allclose(one[3]["telemetry"][key], other[3]["telemetry"][key], rtol=1e-5, err_msg=key)
  cases("pipelined microbatches == micro-batches of one device: draws, router losses, statistics of layers")


# ---------------------------------------------------------------------------------------------------- the schedule

SCHEDULES = [(S, k * S, V) for S in (2, 3, 4, 8) for k in (1, 2, 5) for V in (1, 2, 3, 4)]


@pytest.mark.parametrize("S, M, V", plain_if(SCHEDULES[::5].count, SCHEDULES))
def test_every_microbatch_passes_every_run_in_order_a_tick_apart(S, M, V):
  schedule = Schedule(S, M, V)
  m, v, busy = jax.device_get(schedule.work(np.arange(schedule.ticks)[:, None], np.arange(S)[None]))
  done = {}  # (microbatch, run of layers) -> tick
  for tick, stage in np.argwhere(busy):
    assert done.setdefault((m[tick, stage], v[tick, stage] * S + stage), tick) == tick
  assert len(done) == M * V * S
  assert all(done[a, run] == done[a, run - 1] + 1 for a, run in done if run)
  assert Fraction(int((~busy).sum()), busy.size) == Fraction(S - 1, V * M + S - 1)


BUBBLES = [("stage=2", 2, 1), ("stage=4", 8, 1), ("stage=2", 4, 2)]


@pytest.mark.parametrize("mesh, M, V", plain_if(lambda case: case == BUBBLES[0], BUBBLES))
def test_the_compiled_bubble_is_that_of_the_formula(mesh, M, V):
  """From the FLOPs of the compiled evaluations: those of idle stages are all that a pipeline adds."""
  S = parse_mesh(mesh)[STAGE]

  def flops(mesh, **options):
    functions = make_train_step(experiment("parallel", mesh, options), mesh_of(mesh) if mesh else None)
    rows = {k: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=functions.batch_sharding) for k, a in batch().items()}
    text = functions.evaluate.lower(functions.abstract_state, rows).compile().as_text()
    return hlo.count(text, parse_mesh(mesh)).flops

  head = 2 * B * T * SIZES["d_model"] * SIZES["vocab_size"]
  stack = flops("") - head
  worked = flops(mesh, microbatches=M, circuits=V) * S - head
  assert 1 - Fraction(stack, worked) == Fraction(S - 1, V * M + S - 1)


@pytest.mark.parametrize("S, V", [(S, V) for S in (2, 3, 4, 6, 8) for V in (1, 2, 3, 4, 8)])
def test_exchanges_deal_every_run_once_and_each_is_a_permutation(S, V):
  dealt = {}
  for exchange in exchanges(S, V):
    assert sorted(target for _, target, _ in exchange) == list(range(S))
    for source, (run, target, circuit) in enumerate(exchange):
      assert dealt.setdefault((target, circuit), source * V + run) == circuit * S + target
  assert len(dealt) == S * V


@pytest.mark.parametrize("S, V", plain_if([(4, 2)].count, [(4, 2), (2, 4), (4, 4), (8, 3)]))
def test_runs_are_dealt_to_the_stages_that_work_on_them(S, V):
  layers = jnp.arange(S * V * 3)
  dealt = lambda a: deal(a, S, V)
  given = jax.shard_map(dealt, mesh=mesh_of(f"stage={S}"), in_specs=P(STAGE), out_specs=P(None, STAGE), check_vma=False)
  np.testing.assert_array_equal(given(layers), np.asarray(layers).reshape(V, S * 3))


# ----------------------------------------------------------------------------------------------------- memory, refusals


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_the_weights_of_a_run_are_not_kept_for_every_tick(remat):
  """The backward pass of a circular pipeline reads weights where they are, whatever else it keeps."""
  config = experiment("parallel", "stage=2", {"remat": remat, "circuits": 2, "microbatches": 4})
  functions = make_train_step(config, mesh_of("stage=2"))
  step = jax.make_jaxpr(functions.step)(functions.abstract_state, batch())
  kept = [aval.shape for stacked in scans(step.jaxpr, Schedule(2, 4, 2).ticks) for aval in stacked]
  # One layer's residual stream is kept; of weights, and of nothing else, both d_model and d_ff are dimensions.
  assert (9, 1, 2, T, SIZES["d_model"]) in kept and not any({SIZES["d_model"], 40} <= set(shape) for shape in kept)


def scans(jaxpr, length: int) -> list:
  """What each scan of this length stacks."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan" and eqn.params["length"] == length:
      found.append([v.aval for v in eqn.outvars if v.aval.shape[:1] == (length,)])
    for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
      inner = getattr(param, "jaxpr", param)
      found += scans(inner, length) if hasattr(inner, "eqns") else []
  return found


@pytest.mark.parametrize(
  "mesh, name, options, words",
  [
    ("stage=8", "hybrid", {}, r"model\.stack=.4\*\(a b\). repeats .*stage=8.*multiple of 8"),
    ("stage=2", "hybrid", {"circuits": 4}, r"stage=2 with train\.circuits=4 cannot share.*multiple of 8"),
    ("stage=4", "hybrid", {"microbatches": 6}, r"train\.microbatches=6 must be a multiple of the mesh's stage=4"),
    ("data=2,stage=2", "hybrid", {"microbatches": 8}, r"train\.batch_size=8 must be a multiple of 16"),
    ("data=2", "hybrid", {"microbatches": 4}, r"train\.microbatches=4 is of a pipeline, and the mesh has no stages"),
    ("", "hybrid", {"circuits": 2}, r"train\.circuits=2 is of a pipeline, and the mesh has no stages"),
  ],
)
def test_what_stages_cannot_share_is_refused_before_a_device_is_asked(mesh, name, options, words):
  with pytest.raises(UserError, match=words):
    experiment(name, mesh, options)
