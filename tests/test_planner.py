"""The planner against the published tables and closed forms of 2211.05102, and against its own identities."""

import dataclasses
import json
import math
import sys

import pytest
from tiers import three

from llmarch.__main__ import main
from llmarch.analysis import comm, cost, hardware, planner
from llmarch.build import FrozenDict, build
from llmarch.config import ModelConfig
from llmarch.errors import UserError
from llmarch.presets import PRESETS
from llmarch.residual import ResidualConfig

PALM = PRESETS["palm_540b"]()
E, F = 18432, 73728
CUBE = {"x": 4, "y": 4, "z": 4}
GIB = 2**30


def with_mixer(config, **changes):
  (name, block), *_ = config.blocks.items()
  mixer = dataclasses.replace(block.mixer, **changes)
  return dataclasses.replace(config, blocks=FrozenDict({name: dataclasses.replace(block, mixer=mixer)}))


MULTIHEAD = with_mixer(PALM, num_kv_heads=None, head_dim=128)  # as many parameters with half the head dim


# ------------------------------------------------------------------------------------------- the paper's tables


@pytest.mark.parametrize(
  "config, attention, batch, context",
  [
    (MULTIHEAD, "heads", 128, 1320),
    (MULTIHEAD, "heads", 512, 330),
    (PALM, "heads", 128, 660),
    (PALM, "heads", 512, 165),
    (PALM, "batch_xyz", 128, 43000),
    (PALM, "batch_xyz", 512, 10700),
  ],
)
def test_table_1_longest_context_in_30_percent_of_64_chips(config, attention, batch, context):
  config = planner.pad_heads(config, 64)
  kv = lambda tokens: planner.kv_bytes(config, "ws_2d", attention, CUBE, batch, tokens, 2)
  assert planner.longest_context(config, kv, 0.3 * 32 * GIB) == pytest.approx(context, rel=0.011)


@pytest.mark.parametrize("row", planner.PUBLISHED, ids=lambda r: f"{r.model}-{r.phase}-{r.batch}")
def test_tables_2_and_3_mfu_follows_from_the_latency(row):
  params = cost.params(PRESETS[row.model]())["total"]
  mfu = planner.mfu(params, row.batch * row.length, row.chips, 275e12, row.seconds)
  assert mfu == pytest.approx(row.mfu, abs=0.008)


# Appendix D: (chips, peak, model): {tokens of a sequence: {batch: (milliseconds, MFU in percent)}}. The A100
# columns are Megatron-530B as FasterTransformer measured it.
APPENDIX_D = {
  (64, "tpu_v4", "palm_540b"): {
    80: {4: (690, 3), 8: (654, 6), 16: (755, 10), 32: (896, 18), 64: (1218, 26), 128: (1814, 35),
         256: (3155, 40), 512: (5910, 43), 1024: (11608, 43)},
    28: {4: (289, 2), 8: (265, 5), 16: (292, 9), 32: (334, 16), 64: (451, 24), 128: (668, 33), 256: (1083, 41),
         512: (2037, 43), 1024: (4041, 44)},
    136: {128: (2343, 46)},
  },
  (64, "tpu_v4", "mt_nlg_530b"): {
    80: {4: (678, 3), 8: (728, 5), 16: (838, 9), 32: (1058, 15), 64: (1275, 24), 128: (1902, 32), 256: (3189, 39),
         512: (6210, 40), 1024: (12390, 40)},
  },
  (16, "a100", "mt_nlg_530b"): {
    80: {1: (1379, 1), 2: (1515, 2), 4: (1512, 4), 8: (1631, 8), 16: (1868, 15), 32: (2361, 23), 64: (3383, 32),
         128: (5406, 40)},
    28: {256: (3341, 46)},
    136: {64: (4002, 46)},
  },
  (32, "a100", "mt_nlg_530b"): {
    80: {1: (1037, 1), 2: (1110, 2), 4: (1198, 3), 8: (1295, 5), 16: (1454, 9), 32: (1804, 15), 64: (2646, 21),
         128: (4099, 27), 256: (7203, 30)},
    28: {256: (2483, 31)},
    136: {64: (3114, 30), 256: (11232, 33)},
  },
  (24, "a100", "mt_nlg_530b"): {
    80: {1: (2085, 1), 2: (2122, 1), 4: (2184, 2), 8: (2367, 4), 16: (2753, 7), 32: (3543, 10), 64: (4117, 18),
         128: (5319, 27), 256: (8318, 35)},
    28: {256: (3140, 32)},
    136: {64: (3578, 34), 256: (9614, 51)},
  },
}  # fmt: skip


@pytest.mark.parametrize("where", APPENDIX_D, ids=lambda w: f"{w[0]}x{w[1]}-{w[2]}")
def test_tables_d2_to_d4_mfu_follows_from_the_latency(where):
  chips, chip, model = where
  params, peak = cost.params(PRESETS[model]())["total"], hardware.CHIPS[chip].flops
  wrong = {
    (tokens, batch): (mfu, printed)
    for tokens, rows in APPENDIX_D[where].items()
    for batch, (ms, printed) in rows.items()
    if abs((mfu := 100 * planner.mfu(params, batch * tokens, chips, peak, ms / 1e3)) - printed) > 0.8
  }
  assert not wrong


@pytest.mark.parametrize("row", planner.PUBLISHED, ids=lambda r: f"{r.model}-{r.phase}-{r.batch}")
def test_the_chosen_layouts_are_those_of_tables_2_and_3(row):
  """A batch of 1 cannot be split, which leaves heads; otherwise splitting the batch divides the KV cache.

  At 8 chips the chosen 2D mesh has X=1: 2D in name, 1D in what it moves, as the paper's own volumes have it.
  """
  plan = planner.best_plan(planner.options(planner.published_request(row)))
  chosen = getattr(plan, row.phase)
  assert chosen.ffn == row.ffn
  assert chosen.attention.partition("_")[0] == row.attention.partition("_")[0]


def test_attention_over_the_batch_saves_more_loading_than_its_all_to_alls_cost():
  r = planner.Request(PALM, "tpu_v4", 64, 64, 1984, 64, weights="int8")
  heads, batch = (planner.evaluate(r, "decode", "ws_2d", a, CUBE) for a in ("heads", "batch_xyz"))
  assert heads.kv_s == pytest.approx(64 * batch.kv_s)
  assert heads.kv_s - batch.kv_s > 100 * abs(batch.comm_s - heads.comm_s)


def test_cache_of_a_540b_model_multihead_3_tb_multiquery_127_gb():
  one = dict.fromkeys("xyz", 1)
  size = lambda config: planner.kv_bytes(config, "ws_2d", "heads", one, 512, 2048, 2)
  assert size(MULTIHEAD) == pytest.approx(3.04e12, rel=2e-3)
  assert size(PALM) == pytest.approx(126.7e9, rel=1e-3)


# ------------------------------------------------------------------------------------------------ closed forms


def wg_options(n: int, tokens: float):
  """(volume, N) of every weight-gathered row on every mesh of n chips, in the paper's two-matrix count."""
  for mesh in planner.meshes(n):
    for ffn in ("wg_x", "wg_xy", "wg_xyz"):
      gathered = comm.chips(mesh, comm.FEED_FORWARD[ffn].batch)
      if 1 < gathered:
        yield comm.paper_elements(ffn, tokens, E, F, mesh), gathered


@pytest.mark.parametrize("n", [4, 8, 16, 32, 64, 128, 256, 512])
def test_brute_force_finds_the_optimal_2d_mesh(n):
  volume = lambda mesh: comm.paper_elements("ws_2d", 1000, E, F, mesh)
  best = min(planner.meshes(n), key=volume)
  x, bound = 0.5 * math.sqrt(n), 8 * 1000 * E / math.sqrt(n)
  assert abs(math.log2(best["x"] / x)) < 0.51  # the power of two next to it
  assert bound * (1 - 1e-9) <= volume(best) <= bound * 1.061
  if x.is_integer():
    assert best["x"] == x and volume(best) == pytest.approx(bound)


@pytest.mark.parametrize("n", [4, 8, 16, 32, 64, 128, 256, 512])
def test_brute_force_finds_the_optimal_number_of_chips_to_gather_over(n):
  for gathered in (2**i for i in range(1, n.bit_length() - 1)):
    tokens = F * gathered**2 / n  # so that sqrt(BL n / F) is it
    volume, best = min(wg_options(n, tokens))
    assert best == gathered
    assert volume == pytest.approx(4 * E * math.sqrt(tokens * F) / math.sqrt(n))


@pytest.mark.parametrize("n", [4, 16, 64, 256])
def test_2d_moves_a_quarter_root_n_less_than_1d(n):
  two = min(comm.paper_elements("ws_2d", 7, E, F, mesh) for mesh in planner.meshes(n))
  one = comm.paper_elements("ws_1d", 7, E, F, planner.meshes(n)[0])
  assert one == 2 * 7 * E and one / two == pytest.approx(math.sqrt(n) / 4)


def test_gated_feed_forwards_move_the_optimum_to_smaller_x():
  volume = lambda mesh: comm.paper_elements("ws_2d", 1, E, F, mesh, matrices=3)
  assert math.sqrt(2 * E * 64 / (3 * F)) == pytest.approx(3.27, abs=0.01)
  assert volume(CUBE) == pytest.approx(2 * E / 4 + 3 * F / 16)
  assert min(planner.meshes(64), key=volume)["x"] == 4  # of 2 and 4


@pytest.mark.parametrize(
  "e, f, boundaries", [(E, F, (18432, 73728, 884736)), (16384, 65536, (16384, 65536, 786432))]
)
def test_crossovers_of_the_layouts_on_64_chips(e, f, boundaries):
  rows = ("ws_2d", "wg_x", "wg_xy", "wg_xyz")
  best = lambda tokens: min(rows, key=lambda ffn: comm.paper_elements(ffn, tokens, e, f, CUBE))
  for tokens, before, after in zip(boundaries, rows, rows[1:]):
    assert (best(tokens - 1), best(tokens + 1)) == (before, after)


def test_communication_and_roofline_of_a_decode_step():
  chip, seconds = hardware.CHIPS["tpu_v4"], lambda elements: 118 * 2 * elements / 270e9
  ffn = lambda name, batch: 1e3 * seconds(comm.paper_elements(name, batch, E, F, CUBE))
  assert (ffn("ws_2d", 512), ffn("ws_1d", 512)) == (pytest.approx(8.2, abs=0.1), pytest.approx(16.5, abs=0.1))
  assert (ffn("ws_2d", 64), ffn("ws_1d", 64)) == (pytest.approx(1.03, abs=0.01), pytest.approx(2.06, abs=0.01))
  params, padded = cost.params(PALM)["total"], cost.params(planner.pad_heads(PALM, 64))["total"]
  loading = lambda n: 1e3 * n / (64 * chip.hbm_bandwidth)  # int8
  compute = 1e3 * 2 * params * 64 / (64 * chip.flops)
  kv = 1e3 * planner.kv_bytes(PALM, "ws_2d", "batch_xyz", CUBE, 64, 2048, 2) / chip.hbm_bandwidth
  assert (loading(params), loading(padded)) == (pytest.approx(7.03, abs=0.01), pytest.approx(7.27, abs=0.01))
  assert (compute, kv) == (pytest.approx(3.93, abs=0.01), pytest.approx(0.21, abs=0.01))
  total = loading(padded) + compute + kv + ffn("ws_2d", 64)
  assert total == pytest.approx(12.4, abs=0.05) and 28.5 / total == pytest.approx(2.3, abs=0.05)
  # The planner counts three matrices, attention, padded heads and (K-1)/K as well.
  r = planner.Request(PALM, "tpu_v4", 64, 64, 1984, 64, weights="int8")
  step = 1e3 * planner.evaluate(r, "decode", "ws_2d", "batch_xyz", CUBE).latency_upper_s / 64
  assert total < step < 1.07 * total


# -------------------------------------------------------------------------------------------- collectives


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
  sent = lambda kind: comm.Collective(kind, ("x",), 8, 1, 800.0, "").sent
  assert sent("all-gather") == sent("reduce-scatter") == sent("all-to-all") == 700
  assert sent("all-reduce") == 1400 and sent("collective-permute") == 800


def block_of(kv_heads, residual="pre", gated=True):
  (block,) = PALM.blocks.values()
  return dataclasses.replace(
    block,
    residual=build(ResidualConfig, residual, "residual"),
    mixer=dataclasses.replace(block.mixer, num_heads=64, num_kv_heads=kv_heads),
    ffn=dataclasses.replace(block.ffn, gated=gated),
  )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ffn", comm.FEED_FORWARD)
@pytest.mark.parametrize("sizes", [(2, 4, 8), (4, 1, 2), (1, 8, 2), (2, 2, 1)])
def test_collectives_axis_by_axis_move_what_the_closed_form_says(ffn, sizes, gated):
  mesh = dict(zip("xyz", sizes))
  found = comm.block(block_of(1, "parallel", gated), E, ffn, "heads", mesh, 1000)
  of = {"input", "output", "gate", "up", "gate, up", "down"}
  moved = sum(c.sent for c in found if c.what in of) / 2
  assert moved == pytest.approx(comm.paper_elements(ffn, 1000, E, F, mesh, matrices=2 + gated, ring=True))


@pytest.mark.parametrize("ffn, once", [("ws_1d", 3), ("ws_2d", 2), ("wg_x", 2), ("wg_xy", 1), ("wg_xyz", 0)])
def test_a_serial_block_enters_and_leaves_the_stream_twice(ffn, once):
  count = lambda block, what: sum(
    c.count for c in comm.block(block, E, ffn, "heads", CUBE, 1000) if c.what == what
  )
  for what in ("input", "output"):
    assert (count(block_of(1, "parallel"), what), count(block_of(1), what)) == (once, 2 * once)


def test_attention_over_the_batch_is_two_all_to_alls_of_a_chips_share_of_the_queries():
  found = comm.block(block_of(1), E, "ws_2d", "batch_xyz", CUBE, 1000)
  (both,) = [c for c in found if c.kind == "all-to-all"]
  assert both == ("all-to-all", ("x", "y", "z"), 64, 2, 2 * 2 * 1000 * 64 * 256 / 64, "attention")
  assert not [c for c in comm.block(block_of(1), E, "ws_2d", "heads", CUBE, 1000) if c.kind == "all-to-all"]


@pytest.mark.parametrize("kv_heads", [64, 4, 1])
@pytest.mark.parametrize(
  "ffn, stored, used",  # copies of keys' and values' matrices with 4 heads, and with 1
  [
    ("ws_1d", (4, 16), (4, 16)),
    ("ws_2d", (2, 8), (2, 8)),
    ("wg_x", (2, 8), (2, 8)),
    ("wg_xy", (2, 8), (1, 4)),
    ("wg_xyz", (2, 8), (1, 1)),
  ],
)
def test_chips_together_hold_and_multiply_the_whole_model_once_but_for_few_kv_heads(ffn, kv_heads, stored, used):
  mesh, block = {"x": 2, "y": 2, "z": 4}, block_of(kv_heads)
  batch, held = comm.FEED_FORWARD[ffn].batch, comm.weights(block, E, ffn, mesh)
  matrices = cost.attention(block.mixer, E).matrices + cost.mlp(block.ffn, E).matrices
  which = {4: 0, 1: 1}.get(kv_heads)
  expected = lambda copies: matrices + (which is not None and (copies[which] - 1) * 2 * E * kv_heads * 256)
  assert 16 * sum(w.local(mesh) for w in held) == expected(stored)
  assert 16 / comm.chips(mesh, batch) * sum(w.local(mesh, batch) for w in held) == expected(used)


@pytest.mark.parametrize("attention", comm.ATTENTION)
@pytest.mark.parametrize("ffn", comm.FEED_FORWARD)
def test_chips_together_hold_the_cache_once_where_heads_are_many(ffn, attention):
  config = with_mixer(planner.pad_heads(PALM, 16), num_kv_heads=None)
  total = 16 * planner.kv_bytes(config, ffn, attention, {"x": 2, "y": 2, "z": 4}, 32, 100, 2)
  assert total == 32 * 100 * cost.kv_bytes_per_token(config, 2)


SMALL = {"x": 2, "y": 2, "z": 2}


def small(layers: int, kv_heads: int, residual: str, norm: str, bias: bool):
  """Sizes that cannot be mistaken for one another."""
  mixer = {"kind": "attention", "num_heads": 8, "num_kv_heads": kv_heads, "head_dim": 16, "position": "rope",
           "qkv_bias": bias, "out_bias": bias}  # fmt: skip
  block = {"mixer": mixer, "ffn": {"kind": "mlp", "d_ff": 96, "bias": bias}, "norm": norm, "residual": residual}
  model = {"d_model": 32, "vocab_size": 64, "max_seq_len": 64, "stack": f"{layers}*layer", "final_norm": norm}
  return build(ModelConfig, model | {"blocks": {"layer": block}})


def compiled(config, layout: str) -> dict:
  """{(kind, axes): (count, bytes)} of a prefill of 8 x 4 tokens on 8 devices, from its HLO."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from llmarch.analysis import hlo
  from llmarch.infer.decoder import make_decoder
  from llmarch.models.decoder import Decoder, unstack
  from llmarch.ops.sampling import Sampling
  from llmarch.sharding import make_mesh

  programs = make_decoder(config, batch=8, max_len=16, chunk=4, sampling=Sampling(), mesh=make_mesh(SMALL),
                          prefill_layout=layout, decode_layout=layout)  # fmt: skip
  params = nnx.state(nnx.eval_shape(lambda: unstack(Decoder(config, jax.random.key(0)))))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
  carry = jax.eval_shape(programs.start, keys, jnp.zeros(8, jnp.int32))
  tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)
  text = programs.prefill.lower(params, carry, tokens, tokens).compile().as_text()
  return merged(hlo.count(text, SMALL).collectives)


def merged(collectives) -> dict:
  found: dict = {}
  for c in collectives:
    count, size = found.get((c.kind, c.axes), (0, 0))
    found[c.kind, c.axes] = count + c.count, size + c.bytes
  return found


BLOCKS = [
  ("batch_xyz", (1, "parallel", "rmsnorm", False)),
  ("batch_z", (2, "pre", "layernorm", True)),
  ("heads", (8, "sandwich", "rmsnorm", False)),
]
MOVES = [(ffn, *block) for ffn in comm.FEED_FORWARD for block in BLOCKS]


# Plain `pytest` has each row and each block once.
@pytest.mark.parametrize("ffn, attention, block", three(MOVES[::4].count, MOVES[::2].count, MOVES))
def test_a_compiled_layer_moves_what_is_predicted(ffn, attention, block):
  """Every kind, count and byte of one layer: those of two layers less those of one.

  XLA's CPU backend has all-to-all with an operand for each device, so their count says nothing.
  """
  two, one = (compiled(small(layers, *block), f"{ffn}+{attention}") for layers in (2, 1))
  got = {k: tuple(a - b for a, b in zip(two[k], one.get(k, (0, 0)))) for k in two}
  (config,) = small(1, *block).blocks.values()
  expected = merged(
    comm.block(config, 32, ffn, attention, SMALL, 8 * 4, activation_bytes=4, weight_bytes=4)
  )
  known = lambda moves: {k: v[1:] if k[0] == "all-to-all" else v for k, v in moves.items() if any(v)}
  assert known(got) == known(expected)


# ------------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize("row", planner.PUBLISHED, ids=lambda r: f"{r.model}-{r.phase}-{r.batch}")
def test_rooflines_lie_below_what_was_measured_and_bound_each_other(row):
  o = planner.published(row)
  assert o.latency_lower_s <= o.latency_s <= o.latency_upper_s < row.seconds


def test_bounds_hold_on_every_option():
  found = planner.options(planner.Request(PALM, "tpu_v4", 64, 64, 1984, 64))
  assert all(o.latency_lower_s <= o.latency_s <= o.latency_upper_s for o in found)


def test_calibrated_on_62b_the_unseen_540b_rows_are_within_15_percent():
  fit, errors = planner.calibrated()
  assert len(errors) == 4 and all(row.model == "palm_540b" for row in errors)
  assert max(map(abs, errors.values())) < 0.15
  assert 0.5 < fit.matmul < 1 and 0 < fit.layer_s < 2e-4


def test_the_fit_is_a_minimum():
  rows = [row for row in planner.PUBLISHED if row.model == "palm_62b"]
  loss = lambda c: sum((planner.published(row, c).latency_s / row.seconds - 1) ** 2 for row in rows)
  fit = planner.calibrate(rows)
  for factor in (0.98, 1.02):
    assert loss(fit._replace(matmul=fit.matmul * factor)) > loss(fit)
    assert loss(fit._replace(layer_s=fit.layer_s * factor)) > loss(fit)


# --------------------------------------------------------------------------------------------- requests, plans


@pytest.mark.parametrize(
  "chips, torus, shape", [(64, 3, (4, 4, 4)), (32, 3, (2, 4, 4)), (256, 2, (16, 16)), (8, 2, (2, 4))]
)
def test_a_slice_is_the_torus_nearest_to_a_cube(chips, torus, shape):
  assert planner.slice_shape(chips, torus) == shape


def test_meshes_of_a_torus_join_whole_axes():
  sizes = {tuple(mesh.values()) for mesh in planner.meshes(64, 3)}
  assert (4, 4, 4) in sizes and (16, 1, 4) in sizes and (1, 64, 1) in sizes and (2, 8, 4) not in sizes
  assert {(x, y, z) for x, y, z in sizes} <= {tuple(mesh.values()) for mesh in planner.meshes(64)}
  assert len(planner.meshes(64)) == 28


@pytest.mark.parametrize(
  "heads, kv, chips, padded",
  [
    (48, 1, 64, (64, 1)),
    (48, 1, 16, (48, 1)),
    (40, 8, 64, (64, 8)),
    (12, None, 8, (16, 16)),
    (24, 6, 4, (24, 6)),
    (20, 5, 8, (40, 5)),
  ],
)
def test_heads_are_padded_to_the_least_multiple_of_the_chips(heads, kv, chips, padded):
  config = with_mixer(PALM, num_heads=heads, num_kv_heads=kv)
  (block,) = planner.pad_heads(config, chips).blocks.values()
  assert (block.mixer.num_heads, block.mixer.kv_heads) == padded
  assert block.mixer.dim(E) == 256


def stored_alike(a: planner.Option, b: planner.Option) -> bool:
  """Whether two layouts leave the weights in the same places."""
  row = lambda o: comm.FEED_FORWARD[o.ffn]
  return a.mesh == b.mesh and row(a)[3:] == row(b)[3:]


def test_both_phases_of_a_plan_share_the_mesh_and_the_place_of_the_weights():
  found = planner.options(planner.Request(PALM, "tpu_v4", 64, 64, 1984, 64))
  plan = planner.best_plan(found)
  assert stored_alike(plan.prefill, plan.decode)
  pairs = [(a, b) for a in found for b in found if (a.phase, b.phase) == planner.PHASES]
  allowed = [a.latency_s + b.latency_s for a, b in pairs if a.fits and b.fits and stored_alike(a, b)]
  assert plan.latency_s == pytest.approx(min(allowed))


def test_windows_stop_the_cache_from_growing():
  config = with_mixer(PALM, window=4096)
  kv = lambda tokens: planner.kv_bytes(config, "ws_2d", "batch_xyz", CUBE, 64, tokens, 2)
  assert kv(10**6) == kv(4096) == 4096 * kv(1)
  assert planner.longest_context(config, kv, 1e12) is None


def test_the_smallest_number_of_chips_fits_and_none_below_it_does():
  r = planner.Request(PALM, "tpu_v4", 8, 4, 1984, 64)
  sentence = planner.why_it_does_not_fit(r, planner.options(r))
  n = int(sentence.rpartition(" ")[2])
  fits = lambda chips: planner.best_plan(planner.options(dataclasses.replace(r, chips=chips))) is not None
  assert fits(n) and not any(fits(m) for m in planner.chip_counts(PALM) if m < n)


def test_a_front_holds_what_nothing_beats():
  points = [(1, 9), (2, 5), (3, 6), (4, 1), (2, 7), (5, 1)]
  assert planner.pareto(points, lambda p: p[0], lambda p: p[1]) == [(1, 9), (2, 5), (4, 1)]


# ------------------------------------------------------------------------------------------------ the command


ARGS = ("--model=palm_540b", "--hardware=tpu_v4", "--chips=64", "--batch=64", "--weights=int8")


def plan(capsys, *argv: str) -> dict:
  assert main(["plan", *argv, "--json"]) == 0
  return json.loads(capsys.readouterr().out)


def test_json_has_every_layout_of_both_phases(capsys):
  result = plan(capsys, *ARGS)
  fields = {"phase", "ffn", "attention", "mesh", "latency_s", "latency_lower_s", "mfu", "chip_ms_per_token",
            "bytes_per_chip", "max_context"}  # fmt: skip
  assert all(fields <= set(o) for o in result["options"])
  for phase in planner.PHASES:
    mine = [o for o in result["options"] if o["phase"] == phase]
    assert {o["ffn"] for o in mine} == set(comm.FEED_FORWARD) and {o["attention"] for o in mine} == set(comm.ATTENTION)
  decode = result["best"]["latency"]["decode"]
  assert (decode["ffn"], decode["attention"], decode["mesh"]) == ("ws_2d", "batch_xyz", CUBE)
  assert any("lower bound" in note and "2.3" in note for note in result["notes"])
  assert any("padded from 48 to 64" in note for note in result["notes"])


def test_a_sweep_finds_different_plans_for_latency_throughput_and_cost(capsys):
  best = plan(capsys, "--model=palm_62b", "--chips=8,16,64", "--batch=1,32,512")["best"]
  assert best["latency"]["batch"] == 1 and best["latency"]["chips"] == 64
  assert best["throughput"]["chips"] == 64 and best["throughput"]["batch"] == 512
  assert best["cost"]["chips"] < 64
  assert best["cost"]["chip_ms_per_token"] < best["throughput"]["chip_ms_per_token"]


def test_one_layout_one_mesh_and_a_calibrated_figure(capsys):
  argv = (*ARGS, "--layout.decode=ws_2d+batch_yz", "--mesh=x=4,y=4,z=4")
  plain, fitted = plan(capsys, *argv), plan(capsys, *argv, "--calibrated")
  (o,) = [o for o in plain["options"] if o["phase"] == "decode"]
  (c,) = [o for o in fitted["options"] if o["phase"] == "decode"]
  assert o["attention"] == "batch_yz" and c["latency_s"] > o["latency_upper_s"] == pytest.approx(o["latency_s"])
  assert any("unseen PaLM-540B rows" in note for note in fitted["notes"])


def test_the_table_names_the_binding_term_and_the_bound(capsys):
  assert main(["plan", *ARGS]) == 0
  out = capsys.readouterr().out
  assert "weight loading binds" in out and "lower bound" in out and "ws_2d+batch_xyz" in out


@pytest.mark.parametrize(
  "argv, words",
  [
    (["--model=palm_540"], "did you mean 'palm_540b'"),
    (["--hardware=tpu4"], "did you mean 'tpu_v4'"),
    (["--chips=7"], "such as 6 or 8"),
    (["--batch=1", "--layout.decode=ws_2d+batch_xyz"], "too small for --layout.decode=ws_2d+batch_xyz"),
    (["--layout.decode=ws_3d"], "did you mean 'ws_2d'"),
    (["--chips=8"], "the smallest number of chips that fits is"),
    (["--chips=eight"], "--chips: cannot read 'eight'"),
    (["--mesh=x=4,y=4,z=2"], "does not cover --chips=64"),
    (["--weights=int9"], "--weights: unknown 'int9'"),
    (["--kv=int4"], "--kv: unknown 'int4'"),
    (["--layout.prefill=ws_1d", "--layout.decode=ws_2d"], "ws_1d goes with ws_1d alone"),
    (["--layout.prefill=wg_xyz+heads"], "--layout.prefill=wg_xyz+heads is no row of its own on 64 chips"),
    (["--chips=1", "--layout.prefill=wg_x"], "--layout.prefill=wg_x is no row of its own on 1 chips"),
    (["--batch=0"], "--batch must be at least 1"),
    (["--generate=-1"], "--generate must be at least 0"),
  ],
)
def test_bad_input_is_one_sentence(capsys, argv, words):
  assert main(["plan", "--model=palm_540b", "--chips=64", "--batch=64", *argv]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1 and "Traceback" not in error


# ------------------------------------------------------------------------------------------ hardware and plots


@pytest.mark.parametrize("name", ["tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e", "tpu7x", "a100", "h100", "h200"])
def test_every_chip_of_the_table_plans_a_small_model(capsys, name):
  chip = hardware.find_chip(name)
  assert (chip.torus > 0) == name.startswith("tpu")
  result = plan(capsys, "--model=llama_3_8b", f"--hardware={name}", "--chips=8", "--batch=8", "--prompt=512")
  assert all(0 < o["mfu"] < 1 for o in result["options"])


def test_an_unknown_chip_is_refused_with_the_nearest_name():
  with pytest.raises(UserError, match="'h200'"):
    hardware.find_chip("h20")


def test_the_front_is_drawn_as_a_picture_and_a_page_that_needs_nothing_else(tmp_path, capsys):
  pytest.importorskip("vl_convert")
  pytest.importorskip("altair")
  plan(capsys, "--model=palm_62b", "--chips=16,32", "--batch=1,16,64", f"--plot={tmp_path}/new")
  assert (tmp_path / "new/plan.png").read_bytes().startswith(b"\x89PNG")
  page = (tmp_path / "new/plan.html").read_text()
  assert "<script src=" not in page and "chip_ms_per_token" in page


def test_plots_without_their_library_say_what_to_install(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "altair", None)
  assert main(["plan", *ARGS, f"--plot={tmp_path}"]) == 2
  assert "llmarch[report]" in capsys.readouterr().err
