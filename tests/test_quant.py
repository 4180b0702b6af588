"""Quantised weights and caches: errors against the published table, and exactness in everything but the rounding."""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spaces
import test_layouts
from flax import nnx
from tiers import plain_if

import llmarch
from llmarch.__main__ import main
from llmarch.analysis import cost
from llmarch.build import build
from llmarch.config import ModelConfig, Precision
from llmarch.errors import UserError
from llmarch.infer.decoder import decoding_params, make_decoder
from llmarch.infer.lm import LM
from llmarch.infer.quantize import quantize_params
from llmarch.layers.mask import Causal, Prefix
from llmarch.models.decoder import abstract
from llmarch.ops import attention, cache, kivi, quant
from llmarch.ops.attention import Keys
from llmarch.ops.quant import FORMATS, NF4, QTensor, quantize
from llmarch.ops.sampling import Sampling
from llmarch.presets import PRESETS
from llmarch.residual import Parallel
from llmarch.sharding import find_layout, make_mesh, shardings

compiled = jax.jit(quantize, static_argnums=(1, 2))


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def error(w, *args) -> float:
  """Root of the mean squared error, relative to that of w."""
  off = compiled(w, *args).astype(jnp.float32) - w
  return float(jnp.sqrt(jnp.mean(off**2) / jnp.mean(w**2)))


# ---------------------------------------------------------------------------------------- arrays by themselves


@pytest.mark.parametrize(
  "format, summed, published",
  [
    ("int8", (0,), 0.0079),
    ("int8", (0, 1), 0.0122),  # one scale for all of a matrix
    ("int4_32", (0,), 0.097),
    ("int4", (0,), 0.108),
    ("int4_128", (0,), 0.117),
    ("nf4", (0,), 0.0919),
  ],
)
def test_relative_error_on_normal_weights_is_the_published_one(format, summed, published):
  assert error(normal(1024, 1024 if len(summed) == 1 else 8192), summed, format) == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
  "format, bits", [("int8", 8 + 32 / 1024), ("int4_32", 4.5), ("int4", 4.25), ("int4_128", 4.125), ("nf4", 4.25)]
)
def test_bits_of_a_weight_count_its_scale(format, bits):
  w = jax.ShapeDtypeStruct((1024, 384), jnp.float32)
  assert quant.nbytes(jax.eval_shape(lambda w: quantize(w, (0,), format), w)) * 8 == bits * 1024 * 384


def naive(w: np.ndarray, groups: list, format: str) -> np.ndarray:
  """One group of indices after another: the largest magnitude is the format's largest number."""
  f, out = FORMATS[format], np.zeros(w.shape)
  levels = np.array(NF4) if f.levels else np.arange(-f.top, f.top + 1)
  for group in groups:
    values = np.array([w[i] for i in group], np.float64)
    scale = float(jnp.asarray(np.float32(abs(values).max()) / np.float32(f.top), f.scale_dtype))
    for i, value in zip(group, values):
      out[i] = scale * levels[abs(levels - value / scale).argmin()]
  return out


SUMMED = [((0, 1), (6, 64, 2)), ((0,), (128, 3, 2)), ((1, 2), (2, 4, 16)), ((2,), (3, 2, 64))]


@pytest.mark.parametrize("format", ["int8", "int4_32", "nf4"])
@pytest.mark.parametrize("summed, shape", plain_if(SUMMED[:1].count, SUMMED))
def test_quantisation_is_the_nearest_level_of_each_group(format, summed, shape):
  w = np.asarray(normal(*shape))
  free = [range(n) if i not in summed else [None] for i, n in enumerate(shape)]
  inner = [range(n) if i in summed else [None] for i, n in enumerate(shape)]
  merge = lambda a, b: tuple(x if y is None else y for x, y in zip(a, b))
  group, groups = FORMATS[format].group, []
  for outside in itertools.product(*free):
    all_of_them = [merge(outside, inside) for inside in itertools.product(*inner)]  # the last one fastest
    size = group or len(all_of_them)
    groups += [all_of_them[i : i + size] for i in range(0, len(all_of_them), size)]
  np.testing.assert_allclose(quantize(w, summed, format).astype(jnp.float32), naive(w, groups, format), atol=1e-6)


def test_zeros_stay_zero_and_a_scale_that_rounds_down_clips_no_further_than_it_must():
  assert not np.any(quantize(jnp.zeros((64, 2)), (0,), "int4").astype(jnp.float32))
  for format, f in FORMATS.items():
    got = quantize(normal(128, 50), (0,), format).codes.astype(jnp.float32)
    assert abs(got).max() == (15 if f.levels else f.top) and jnp.isfinite(got).all(), format


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(format, bad):
  w = quantize(jnp.ones((128, 2)).at[3, 1].set(bad), (0,), format).astype(jnp.float32)
  assert jnp.isfinite(w[:, 0]).all() and not jnp.isfinite(w[:32, 1]).any()


PRODUCTS = [("rd,dnh->rnh", (256, 6, 100)), ("rd,vd->rv", (999, 256)), ("rf,fd->rd", (256, 70))]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("equation, shape", plain_if(PRODUCTS[:1].count, PRODUCTS))
@pytest.mark.parametrize("rows", [3, quant.FEW_ROWS + 1])
def test_a_product_with_codes_is_the_product_with_the_decoded_matrix(format, equation, shape, rows, monkeypatch):
  monkeypatch.setattr(quant, "BLOCK", 4096)  # several blocks
  summed = next(i for i, n in enumerate(shape) if n == 256)
  w, x = compiled(normal(*shape), (summed,), format), normal(rows, 256, seed=1)
  got = jax.jit(quant.matmul, static_argnums=0)(equation, x, w)
  want = np.einsum(equation, np.asarray(x, np.float64), np.asarray(w.astype(jnp.float32), np.float64))
  np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def test_blocks_are_for_cpus_alone():
  w = jax.eval_shape(lambda w: quantize(w, (0,), "int8"), jax.ShapeDtypeStruct((4096, 512), jnp.float32))
  traced = jax.jit(lambda x, w: quant.matmul("rd,df->rf", x, w)).trace(jnp.ones((2, 4096)), w)
  loops = {p: "while" in traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
  assert loops == {"cpu": True, "cuda": False, "tpu": False}


def test_rows_of_a_table_are_rows_of_the_decoded_table():
  table, ids = compiled(normal(40, 64), (1,), "int4"), jnp.array([[3, 39], [0, 3]])
  np.testing.assert_array_equal(table[ids].astype(jnp.float32), table.astype(jnp.float32)[ids])


def test_a_sum_that_is_no_whole_number_of_groups_is_refused():
  with pytest.raises(UserError, match="48 summed elements are no whole number of groups of 64"):
    quantize(normal(48, 5), (0,), "int4")
  with pytest.raises(UserError, match="3 x 32 summed elements"):
    quantize(normal(3, 32, 5), (0, 1), "int4")


# --------------------------------------------------------------------------------------------------- the cache


def test_keys_with_outlier_channels_lose_three_times_as_much_by_token_as_by_channel():
  keys = normal(4096, 128).at[:, :2].multiply(10)
  by_token, by_channel = error(keys, (1,), "int8"), error(keys.reshape(-1, kivi.GROUP, 128), (1,), "int8")
  assert by_token > 3 * by_channel and by_channel < 0.0056


B, K, G, H, WIDTH = 2, 2, 3, 8, 3 * kivi.GROUP + 9
LENGTHS = (WIDTH, 2 * kivi.GROUP + 1)  # the second row is padded on the left


def attend_in_chunks(widths, window, q, k, v):
  """Outputs [B, WIDTH, K * G, H] of a KIVI cache fed with chunks of these widths."""
  chunk, full = max(widths), WIDTH if window is None else window + max(widths) - 1
  S = kivi.capacity(min(full, WIDTH))
  spec = cache.Spec((B, K, S, H), ("",) * 4, "float32")
  state, ledger = cache.allocate((kivi.specs(spec, "int8", chunk), cache.Ring(S).ledger(B)))
  cursor, out, at = jnp.zeros(B, jnp.int32), [], 0
  step = jax.jit(lambda *a: _one_chunk(*a, window))
  for width in widths:
    here = slice(at, at + width)
    y, state, ledger, cursor = step(state, ledger, cursor, q[:, here], k[:, here], v[:, here], at)
    out, at = [*out, y], at + width
  return np.concatenate(out, axis=1)


def _one_chunk(state, ledger, cursor, q, k, v, at, window):
  positions = at + jnp.arange(q.shape[1]) - (WIDTH - jnp.array(LENGTHS)[:, None])
  queries = Keys(jnp.maximum(positions, -1), jnp.zeros_like(positions), None)
  ledger, buffer = ledger.enter(cursor, queries, None)
  state, k, v, keys, readable = kivi.update(state, cursor, queries, buffer.keys, k, v)
  seen = attention.visible(queries, keys, mask=Causal(), window=window) & readable[:, None]
  out, _ = attention.attend(q, k, v, seen, None, None, scale=0.5, softcap=None, dropout=0.0, key=None)
  return out, state, ledger, cursor + (queries.positions >= 0).sum(axis=1, dtype=jnp.int32)


def naive_kivi(window, q, k, v):
  """Each query by itself: its own group of 32 tokens as it is, the earlier groups in codes."""
  out = np.zeros((B, WIDTH, K * G, H))
  coded = lambda a, summed: np.asarray(quantize(jnp.asarray(a), (summed,), "int8").astype(jnp.float32), np.float64)
  for b, n in enumerate(LENGTHS):
    qs, ks, vs = (np.asarray(a[b, WIDTH - n :], np.float64) for a in (q, k, v))
    for t in range(n):
      own = t // kivi.GROUP * kivi.GROUP
      kt, vt = ks.copy(), vs.copy()
      for first in range(0, own, kivi.GROUP):
        kt[first : first + kivi.GROUP] = coded(ks[first : first + kivi.GROUP], 0)
      vt[:own] = coded(vs[:own], -1) if own else vt[:own]
      low = 0 if window is None else max(0, t - window + 1)
      for head in range(K * G):
        logits = 0.5 * kt[low : t + 1, head // G] @ qs[t, head]
        weights = np.exp(logits - logits.max())
        out[b, WIDTH - n + t, head] = weights / weights.sum() @ vt[low : t + 1, head // G]
  return out


@pytest.mark.full
@pytest.mark.parametrize("window", plain_if([40].count, [None, 40]))
def test_keys_by_channel_are_read_alike_in_any_chunks_and_beside_any_padding(window):
  q, k, v = (normal(B, WIDTH, n, H, seed=i) for i, n in enumerate((K * G, K, K)))
  want = naive_kivi(window, q, k, v)
  for widths in ([WIDTH], [5] * 21, [40, 1, 31, 33], [1] * WIDTH):
    np.testing.assert_allclose(attend_in_chunks(widths, window, q, k, v), want, atol=2e-6)


# -------------------------------------------------------------------------------------------------- whole models

WIDE = spaces.model(  # sizes of whole groups; both ways to sum over two dimensions of the output projection
  spaces.block(spaces.attention(num_heads=8, num_kv_heads=4, head_dim=64), ffn=spaces.MLPConfig(d_ff=512)),
  spaces.block(
    spaces.attention(num_heads=16, num_kv_heads=1, head_dim=16, window=6),
    ffn=spaces.MLPConfig(d_ff=256, gated=False, bias=True),
    residual=Parallel(),
  ),
  d_model=256,
  stack="2*(a b)",
)
PROMPTS = [[7], [3, 11, 3, 25], [5, 1, 38, 2, 2, 19, 30, 4, 9, 6, 12, 17]]


def drawn(config):
  return spaces.random_params(nnx.state(abstract(config)), seed=1)


def is_param(x) -> bool:
  return isinstance(x, nnx.Variable)


def decoded(params):
  """The same numbers in plain arrays."""
  return jax.tree.map(lambda p: p.replace(p.get_value().astype(jnp.float32)), params, is_leaf=is_param)


QUANTISED = [("wide", "int8"), ("wide", "nf4"), ("gpt2", "int8"), ("t5", "int8")]


@pytest.mark.parametrize("name, format", plain_if([("wide", "int8")].count, QUANTISED))
def test_a_quantised_model_is_the_model_of_its_decoded_weights(name, format):
  config = WIDE if name == "wide" else spaces.HAND[name]
  params = quantize_params(drawn(config), format)
  kinds = [isinstance(p.get_value(), QTensor) for p in jax.tree.leaves(params, is_leaf=is_param)]
  assert any(kinds) and not all(kinds)
  tokens = [PROMPTS[2], PROMPTS[2][::-1]]
  got, want = (LM(config, p).logits(tokens) for p in (params, decoded(params)))
  np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def test_layers_apart_or_stacked_have_the_same_codes():
  apart = quantize_params(decoding_params(WIDE, drawn(WIDE)), "int4")
  stacked = decoding_params(WIDE, quantize_params(drawn(WIDE), "int4"))
  jax.tree.map(np.testing.assert_array_equal, apart, stacked)


def test_a_giant_in_a_format_needs_its_bits_and_nothing_is_allocated():
  config = build(ModelConfig, PRESETS["palm_540b"](), "model")
  params = nnx.state(abstract(config))
  total = cost.params(config)["total"]
  size = lambda format: 8 * quant.nbytes(jax.eval_shape(lambda p: quantize_params(p, format), params)) / total
  assert size("int8") == pytest.approx(8, rel=1e-3)
  assert size("int4_32") == pytest.approx(4.5, rel=1e-3)  # 72 % less than bf16


def with_state(state, **changes):
  """WIDE, or its first two layers, with another state."""
  return dataclasses.replace(WIDE, **{"precision": Precision(state=state), "max_seq_len": 64} | changes)


@pytest.mark.parametrize("state", plain_if(["int8_channel"].count, ["fp8", "int8_channel"]))
def test_text_from_a_quantised_state_is_blind_to_chunks_batches_and_padding(state):
  config = with_state(state, stack="a b")
  lm = LM(config, drawn(config))
  prompts = [*PROMPTS, (PROMPTS[2] * 4)[:43]]  # beyond one group of keys
  want = lm.generate(prompts, max_new_tokens=6, chunk=64)
  assert want == lm.generate(prompts, max_new_tokens=6, chunk=8, batch=2)


@pytest.mark.parametrize("state, error", [("int8", 0.02), ("fp8", 0.06), ("int8_channel", 0.01)])
def test_logits_from_a_quantised_state_are_near_with_a_prefix_that_sees_itself_both_ways(state, error):
  length = kivi.GROUP + 9
  tokens, positions = (jnp.arange(length)[None] * 7 + 3) % 40, jnp.arange(length)[None]

  def logits(state):
    block = WIDE.blocks["a"]
    block = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, mask=Prefix()))
    config = with_state(state, stack="a", blocks={"a": block})
    graph, state = nnx.graphdef(abstract(config)), cache.allocate(abstract(config).state_spec(1, 64, length))
    forward = jax.jit(lambda p: nnx.merge(graph, p)(tokens, positions, state=state, prefix=positions >= 0)[0])
    return forward(drawn(config))

  off, want = logits(state) - logits("float32"), logits("float32")
  assert 0 < float(jnp.sqrt(jnp.mean(off**2) / jnp.mean(want**2))) < error


@pytest.mark.parametrize("state", ["int8", "fp8", "int8_channel", "fp8_channel"])
def test_bytes_of_a_quantised_state_are_the_formulas(state):
  config = with_state(state)
  for batch, max_len, chunk in [(3, 20, 1), (2, 33, 7), (1, 64, 64)]:
    specs = jax.tree.leaves(abstract(config).state_spec(batch, max_len, chunk)["layers"], is_leaf=cache.is_spec)
    sizes = [math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in specs]
    assert cost.state_bytes(config, batch, max_len, chunk) == sum(sizes)


@pytest.mark.parametrize(
  "weights, layout",
  [("int8", "ws_2d+batch_xyz"), ("int4", "wg_xy+heads")],
)
@pytest.mark.full
def test_a_format_over_a_mesh_equals_it_on_one_device(weights, layout, monkeypatch):
  config = dataclasses.replace(WIDE, stack="a b")
  params = quantize_params(decoding_params(config, drawn(config)), weights)
  graph, _, tokens, positions = test_layouts.toy(config)
  monkeypatch.setattr(test_layouts, "toy", lambda config: (graph, params, tokens, positions))
  mesh = make_mesh({"x": 2, "y": 2, "z": 2})
  got, want = test_layouts.outcomes(config, find_layout(layout, mesh), mesh), test_layouts.outcomes(config)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * abs(np.asarray(b)).max())
  jax.tree.map(close, got, want)


@pytest.mark.full
def test_decoding_with_codes_over_a_mesh_writes_the_text_of_one_device():
  config = dataclasses.replace(WIDE, stack="a b", precision=Precision(state="int8_channel"))
  params = quantize_params(decoding_params(config, drawn(config)), "int8")
  tokens = np.random.default_rng(0).integers(0, 40, (8, 40)).astype(np.int32)
  positions = np.maximum(np.arange(40) - np.arange(8)[:, None], -1).astype(np.int32)

  def text(mesh):
    place = dict(mesh=mesh, prefill_layout="wg_xyz+heads", decode_layout="ws_2d+batch_xyz", weights="int8")
    programs = make_decoder(config, batch=8, max_len=64, chunk=40, sampling=Sampling(temperature=0.0), **place)
    here = jax.device_put(params, shardings(params, find_layout("ws_2d", mesh), mesh)) if mesh else params
    carry = programs.start(jax.random.split(jax.random.key(0), 8), np.full(8, 64, np.int32))
    carry = programs.switch(programs.prefill(here, carry, tokens, positions))
    return np.asarray(programs.decode(here, carry, 6)[1])[:, :6]

  np.testing.assert_array_equal(text(make_mesh({"x": 2, "y": 2, "z": 2})), text(None))


# ----------------------------------------------------------------------------------------------- a trained model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
  """A small decoder after 100 steps on the standard library's bytes."""
  folder = str(tmp_path_factory.mktemp("run"))
  changes = {
    "model.d_model": 64, "model.stack": "2*layer", "model.blocks.layer.ffn.d_ff": 192, "model.max_seq_len": 128,
    "train.steps": 100, "train.seq_len": 128, "eval.every": 0, "checkpoint.every": 100,
    "optimizer.schedule.warmup": 10,
  }  # fmt: skip
  flags = [f"--config.{key}={value}" for key, value in changes.items()]
  tiny = pathlib.Path(__file__).parents[1] / "configs/tiny.py"
  assert main(["train", f"--config={tiny}", f"--workdir={folder}", *flags]) == 0
  return folder


@pytest.mark.nightly
def test_loss_of_a_trained_model_rises_by_less_than_published(run):
  text = pathlib.Path(argparse.__file__).read_text()[: 32 * 128]

  def loss(weights) -> float:
    lm = llmarch.load(run, weights=weights)
    ids = np.array(lm.tokenizer.encode(text)[: 32 * 128]).reshape(32, 128)
    logits = lm.logits(ids).astype(np.float64)[:, :-1]
    right = np.take_along_axis(logits, ids[:, 1:, None], axis=2)[..., 0]
    return float((np.log(np.exp(logits).sum(axis=-1)) - right).mean())

  plain = loss(None)
  assert plain < 3.2  # it has learned something: log 256 is 5.5
  assert 0 < abs(loss("int8") - plain) < 0.01
  assert 0 < abs(loss("int4") - plain) < 0.1


@pytest.mark.full
def test_generate_takes_formats(run, capsys):
  arguments = ["generate", f"--from={run}", "--prompt=import ", "--max_new_tokens=8", "--json"]
  assert main([*arguments, "--weights=int8", "--kv=int8_channel"]) == 0
  assert len(json.loads(capsys.readouterr().out)[0]["text"]) > 0
  for flag, says in [
    ("--weights=int5", "weights='int5' is not a format (known: int8, "),
    ("--kv=int5", "kv: unknown value 'int5'; did you mean 'int8'?"),
  ]:
    assert main([*arguments, flag]) == 2
    assert says in capsys.readouterr().err


def test_what_does_not_suit_a_format_is_named(tmp_path):
  params = drawn(spaces.HAND["llama"])
  with pytest.raises(UserError, match=r"weights=int4: embed: 18 summed elements are no whole number of groups of 64"):
    LM(spaces.HAND["llama"], params, weights="int4")
  with pytest.raises(UserError, match="weights=int8 cannot be saved"):
    LM(spaces.HAND["llama"], params, weights="int8").save(tmp_path / "model")
  assert not list(tmp_path.iterdir())
