"""What the papers state of the ops: identities, bounds, tables and worked numbers."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import spaces
from flax import nnx

from llmarch.config import FanIn, HeadConfig, Normal, Xavier
from llmarch.layers.attention import QKNorm
from llmarch.layers.block import Block
from llmarch.layers.ffn import MLP, MLPConfig
from llmarch.layers.mask import Bidirectional
from llmarch.layers.norm import LayerNorm, RMSNorm
from llmarch.layers.param import Maker, flatten
from llmarch.layers.position import (
  NTK,
  ALiBi,
  DynamicNTK,
  Interpolation,
  Llama3Scaling,
  LongRoPE,
  RoPE,
  T5Bias,
  XPos,
  YaRN,
)
from llmarch.models.decoder import Decoder, abstract
from llmarch.ops import attention, cache, norm, rope
from llmarch.ops.activation import ACTIVATIONS
from llmarch.ops.einsum import einsum
from llmarch.ops.loss import chunked_loss


def normal(*shape, seed=0, scale=1.0):
  return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ------------------------------------------------------------------------------------------------- norms


def test_layer_norm_of_centred_vectors_is_rms_norm():
  x = normal(5, 33)
  x -= x.mean(-1, keepdims=True)
  scale = normal(33, seed=1)
  np.testing.assert_allclose(
    norm.layer_norm(x, scale, None, eps=1e-6), norm.rms_norm(x, scale, eps=1e-6), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("f", [norm.rms_norm, functools.partial(norm.layer_norm, bias=None), norm.scale_norm])
def test_norms_do_not_see_the_scale_of_their_input(f):
  x, scale = normal(5, 32), jnp.ones(32 if f is not norm.scale_norm else 1)
  np.testing.assert_allclose(f(1000 * x, scale, eps=1e-12), f(x, scale, eps=1e-12), rtol=1e-6, atol=1e-6)


def test_only_layer_norm_does_not_see_a_shift_of_its_input():
  x, ones = normal(5, 32), jnp.ones(32)
  layer, rms = functools.partial(norm.layer_norm, bias=None, eps=1e-6), functools.partial(norm.rms_norm, eps=1e-6)
  np.testing.assert_allclose(layer(x + 3, ones), layer(x, ones), atol=1e-5)
  assert jnp.abs(rms(x + 3, ones) - rms(x, ones)).max() > 0.1


def test_scale_norm_is_rms_norm_times_g_over_sqrt_d():
  x, g, d = normal(5, 24), 1.7, 24
  expected = g / math.sqrt(d) * norm.rms_norm(x, jnp.ones(d), eps=1e-12)
  np.testing.assert_allclose(norm.scale_norm(x, jnp.array([g]), eps=d * 1e-12), expected, rtol=1e-6)


def test_layer_norm_keeps_its_digits_where_the_mean_is_large():
  noise = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
  x = jnp.asarray(noise + 3000)
  exact = np.asarray(x, np.float64)
  exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
  np.testing.assert_allclose(norm.layer_norm(x, jnp.ones(256), None, eps=1e-12), exact, atol=1e-3)


@pytest.mark.parametrize("f", [norm.rms_norm, functools.partial(norm.layer_norm, bias=None), norm.scale_norm])
def test_norm_statistics_are_f32_for_bfloat16(f):
  x = normal(3, 4096, scale=30.0).astype(jnp.bfloat16)
  scale = jnp.ones(4096 if f is not norm.scale_norm else 1)
  y = f(x, scale, eps=1e-6)
  exact = f(x.astype(jnp.float32), scale, eps=1e-6)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("config", [RMSNorm(zero_centered=True), LayerNorm(zero_centered=True, bias=False)])
def test_a_small_zero_centred_scale_is_not_lost_in_bfloat16(config):
  x, small = normal(4, 16), jnp.full(16, 1 / 512, jnp.bfloat16)
  ratio = config.apply(x, None, small) / config.apply(x, None, jnp.zeros(16, jnp.bfloat16))
  np.testing.assert_allclose(ratio, 1 + 1 / 512, rtol=1e-6)


# ------------------------------------------------------------------------------------------- exact phases

TWO_PI = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")


def exact_phase(position: int, frequency: float) -> float:
  """position * frequency modulo 2 pi, in [-pi, pi), in rational arithmetic."""
  turns = Fraction(frequency) * position / TWO_PI
  return float((turns - math.floor(turns + Fraction(1, 2))) * TWO_PI)


def circular(a, b):
  return np.abs((np.asarray(a, np.float64) - b + np.pi) % (2 * np.pi) - np.pi)


@pytest.mark.parametrize("theta, divisor", [(10000.0, 1.0), (500000.0, 1.0), (10000.0, 7.3), (100.0, 0.9)])
def test_phases_are_exact_to_the_last_int32_position(theta, divisor):
  freqs = rope.frequencies(64, theta) / divisor
  positions = [0, 1, 2, 1000, 99_999, 100_000, 2**24 + 1, 2**30 + 12345, 2**31 - 2, 2**31 - 1]
  phase = rope.phases(jnp.asarray([positions], jnp.int32), freqs)[0]
  expected = np.array([[exact_phase(p, f) for f in freqs] for p in positions])
  assert phase.dtype == jnp.float32 and np.all(np.abs(phase) <= np.float32(np.pi))
  assert circular(phase, expected).max() < 1e-6


def test_phases_of_traced_frequencies_are_as_good_as_f32_frequencies():
  freqs = jnp.asarray(rope.frequencies(64, 10000.0), jnp.float32)
  positions = jnp.asarray([[0, 1, 77, 4095, 100_000], [3, 5, 9, 2**20, 2]], jnp.int32)
  phase = rope.phases(positions, jnp.broadcast_to(freqs, (2, 1, 32)))
  per_token = rope.phases(positions, jnp.broadcast_to(freqs, (2, 5, 32)))
  expected = np.array([[[exact_phase(int(p), float(f)) for f in freqs] for p in row] for row in positions])
  slack = np.asarray(positions)[..., None] * (np.asarray(freqs) * 2.0**-23 + 2.0**-29) + 1e-6
  assert np.all(circular(phase, expected) <= slack)
  np.testing.assert_array_equal(phase, per_token)


def test_an_f32_product_would_not_do():
  """The trap that `phases` avoids: at position 2^24 + 1 an f32 angle knows nothing."""
  position, frequency = 2**24 + 1, rope.frequencies(64, 10000.0)[1]
  naive = np.float32(position) * np.float32(frequency)
  assert circular(naive, exact_phase(position, frequency)) > 0.01


# ------------------------------------------------------------------------------------------------- rotary


def turned(position, q, k, at):
  """q, k [H] each put at the positions `at` [n] -> [n, H] each."""
  at = jnp.asarray(at, jnp.int32)[None]
  copies = [jnp.broadcast_to(x, (1, at.shape[1], 1, x.shape[-1])) for x in (q, k)]
  q, k = position.turn(*copies, at, jnp.max(at, axis=1, keepdims=True) + 1)
  return q[0, :, 0], k[0, :, 0]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [None, Interpolation(factor=8.0), YaRN(factor=8.0, original=64)])
def test_rope_scores_depend_on_the_distance_alone_up_to_100000(interleaved, scaling):
  q, k = normal(64, seed=1, scale=0.5), normal(64, seed=2, scale=0.5)
  position = RoPE(interleaved=interleaved, scaling=scaling)
  m, n = 57, 13
  shifts = np.array([0, 1, 10, 999, 10_000, 65_537, 100_000])
  qs, _ = turned(position, q, k, m + shifts)
  _, ks = turned(position, q, k, n + shifts)
  scores = np.sum(np.asarray(qs, np.float64) * np.asarray(ks, np.float64), axis=-1)
  assert np.abs(scores - scores[0]).max() < 1e-4
  direct = oracle.rotary_score(position, np.asarray(q, np.float64), np.asarray(k, np.float64), m - n, 1)
  assert abs(scores[0] - direct) < 1e-4


@pytest.mark.parametrize("position", [RoPE(), RoPE(interleaved=True, dims=10), RoPE(scaling=NTK(factor=4.0))])
def test_rope_keeps_norms(position):
  q = normal(16)
  qs, ks = turned(position, q, q, [0, 1, 5, 100, 99_999])
  for x in (qs, ks):
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(q), rtol=1e-6)


def test_rope_leaves_the_dimensions_beyond_dims_and_position_0_alone():
  q = normal(16)
  qs, _ = turned(RoPE(dims=6), q, q, [0, 3, 1000])
  np.testing.assert_array_equal(qs[:, 6:], jnp.broadcast_to(q[6:], (3, 10)))
  np.testing.assert_array_equal(qs[0], q)


def test_both_pairings_of_rope_are_one_up_to_a_fixed_permutation():
  q, R = normal(12), 12
  to_half = np.concatenate([np.arange(0, R, 2), np.arange(1, R, 2)])
  interleaved, _ = turned(RoPE(interleaved=True), q, q, [0, 4, 77])
  half, _ = turned(RoPE(), q[to_half], q, [0, 4, 77])
  np.testing.assert_allclose(interleaved[:, to_half], half, atol=1e-6)


@pytest.mark.parametrize("position", [XPos(scale_base=16.0), XPos(interleaved=False, dims=6, scale_base=16.0)])
def test_xpos_scores_depend_on_the_distance_alone(position):
  q, k = normal(10, seed=1), normal(10, seed=2)
  score = lambda m, n, length: jnp.sum(
    position.turn(q[None, None, None], k[None, None, None], jnp.array([[m]]), jnp.array([[length]]))[0]
    * position.turn(q[None, None, None], k[None, None, None], jnp.array([[n]]), jnp.array([[length]]))[1]
  )
  exact = oracle.rotary_score(position, np.asarray(q, np.float64), np.asarray(k, np.float64), 9, 1)
  for m, length in ((9, 10), (20, 40), (120, 200), (120, 130)):
    np.testing.assert_allclose(score(m, m - 9, length), exact, rtol=1e-4, atol=1e-4)


def test_xpos_damps_high_frequencies_most():
  zeta = rope.xpos_decay(128)
  assert abs(zeta[0] - 0.4 / 1.4) < 1e-12 and 0.98 < zeta[-1] < 1 and np.all(np.diff(zeta) > 0)


def test_sinusoids_at_p_plus_k_are_a_rotation_of_those_at_p_whatever_p_is():
  dims, k = 16, 7
  table = np.asarray(rope.sinusoids(jnp.arange(200)[None], dims)[0], np.float64)
  angle = k * rope.frequencies(dims, 10000.0)
  sin, cos = table[:, 0::2], table[:, 1::2]
  moved_sin, moved_cos = sin * np.cos(angle) + cos * np.sin(angle), cos * np.cos(angle) - sin * np.sin(angle)
  np.testing.assert_allclose(table[k:, 0::2], moved_sin[:-k], atol=2e-6)
  np.testing.assert_allclose(table[k:, 1::2], moved_cos[:-k], atol=2e-6)


# ------------------------------------------------------------------------------------- extensions of RoPE


def test_ntk_divides_the_lowest_frequency_by_the_factor_and_keeps_the_highest():
  plain = rope.frequencies(128, 10000.0)
  for s in (2.0, 4.0, 32.0):
    scaled = NTK(factor=s).frequencies(128, 10000.0, None)
    np.testing.assert_allclose(scaled[-1], plain[-1] / s, rtol=1e-12)
    assert scaled[0] == plain[0] == 1.0


@pytest.mark.parametrize("s, base", [(2, 20221), (4, 40890), (8, 82685), (16, 167199), (32, 338097)])
def test_ntk_bases_for_128_dimensions(s, base):
  assert round(rope.ntk_base(128, 10000.0, s)) == base


@pytest.mark.parametrize("s, gain", [(2, 1.069), (4, 1.139), (8, 1.208), (16, 1.277), (32, 1.347)])
def test_yarn_gains(s, gain):
  assert round(YaRN(factor=float(s), original=4096).gain(), 3) == gain


@pytest.mark.parametrize("original, last_kept, first_divided", [(2048, 16, 41), (4096, 20, 46)])
def test_yarn_keeps_and_divides_the_published_dimensions(original, last_kept, first_divided):
  ratio = rope.frequencies(128, 1e4) / YaRN(factor=16.0, original=original).frequencies(128, 1e4, None)
  assert np.flatnonzero(ratio < 1 + 1e-9)[-1] == last_kept
  assert np.flatnonzero(ratio > 16 - 1e-9)[0] == first_divided
  assert np.all(np.diff(ratio) >= -1e-9)


def test_llama_3_keeps_29_frequencies_smooths_6_and_divides_29():
  ratio = rope.frequencies(128, 5e5) / Llama3Scaling(factor=8.0).frequencies(128, 5e5, None)
  kept, divided = np.sum(ratio < 1 + 1e-9), np.sum(ratio > 8 - 1e-9)
  assert (kept, len(ratio) - kept - divided, divided) == (29, 6, 29)


def test_dynamic_ntk_is_plain_up_to_the_original_length_and_ntk_beyond():
  plain = rope.frequencies(64, 1e4)
  scaled = DynamicNTK(factor=4.0, original=100).frequencies(64, 1e4, jnp.array([[1, 100, 200]]))[0]
  np.testing.assert_allclose(scaled[:2], np.tile(plain, (2, 1)), rtol=1e-5)
  np.testing.assert_allclose(scaled[2], rope.frequencies(64, rope.ntk_base(64, 1e4, 4 * 2 - 3)), rtol=1e-5)


# Each of ours, and how transformers says it. Both for head_dim 16, base 10000, trained to length 64.
SCALINGS = {
  "linear": (Interpolation(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
  "dynamic": (DynamicNTK(factor=4.0, original=64), {"rope_type": "dynamic", "factor": 4.0}),
  "yarn": (
    YaRN(factor=8.0, original=64, beta_fast=8.0),
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 8.0},
  ),
  "llama3": (
    Llama3Scaling(factor=8.0, original=64, low_factor=1.0, high_factor=4.0),
    {
      "rope_type": "llama3",
      "factor": 8.0,
      "original_max_position_embeddings": 64,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
    },
  ),
  "longrope": (
    LongRoPE(
      short_factors=(1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6),
      long_factors=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
      original=64,
      factor=4.0,
    ),
    {
      "rope_type": "longrope",
      "factor": 4.0,
      "original_max_position_embeddings": 64,
      "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
      "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    },
  ),
}

# What transformers 5.23 computes of them, for a context length.
GOLDEN = {
  ("linear", 20): [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
  ("dynamic", 20): [1, 0.3162278, 0.1, 0.03162278, 0.01, 0.003162278, 0.001, 0.0003162278],
  ("dynamic", 200): [1, 0.2292584, 0.0525594, 0.01204968, 0.002762491, 0.0006333241, 0.0001451948, 3.328714e-05],
  ("yarn", 20): [1, 0.2239947, 0.04166666, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05],
  ("llama3", 20): [1, 0.2443846, 0.01304226, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05],
  ("longrope", 20): [1, 0.3162278, 0.09090909, 0.02635231, 0.007692308, 0.00225877, 0.0006666667, 0.0001976424],
  ("longrope", 200): [1, 0.2108185, 0.05, 0.01054092, 0.0025, 0.0006324556, 0.0001666667, 3.952847e-05],
}
GAINS = {"linear": 1, "dynamic": 1, "yarn": 1.2079441541679836, "llama3": 1, "longrope": 1.1547005383792517}


def our_table(scaling, length):
  table = scaling.frequencies(16, 10000.0, jnp.array([[length]]))
  return np.asarray(table, np.float64).reshape(-1), scaling.gain()


@pytest.mark.parametrize("name, length", GOLDEN)
def test_scaling_tables_equal_the_golden_numbers(name, length):
  ours, gain = our_table(SCALINGS[name][0], length)
  np.testing.assert_allclose(ours, GOLDEN[name, length], rtol=2e-6)
  assert gain == pytest.approx(GAINS[name], rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [20, 64, 200])
def test_scaling_tables_equal_those_of_transformers(name, length):
  transformers = pytest.importorskip("transformers", reason="no transformers: its RoPE tables were not compared")
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  scaling, theirs = SCALINGS[name]
  config = transformers.LlamaConfig(
    head_dim=16, max_position_embeddings=64, rope_parameters=theirs | {"rope_theta": 10000.0}
  )
  table, factor = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=length)
  ours, gain = our_table(scaling, length)
  np.testing.assert_allclose(ours, table.numpy(), rtol=2e-6)
  assert gain == pytest.approx(factor, rel=1e-12)


# --------------------------------------------------------------------------------- biases on the logits


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7, 8, 12, 16, 20, 25, 32, 40, 71, 112])
@pytest.mark.parametrize("max_bias", [8.0, 4.0])
def test_alibi_slopes_follow_the_published_rule(n, max_bias):
  distance = jnp.array([[[0, -1]]])
  slopes = -ALiBi(max_bias=max_bias).bias(None, distance, n, False)[0, :, 0, 1]
  np.testing.assert_allclose(slopes, oracle.alibi_slopes(n, max_bias), rtol=1e-6)


def test_sixteen_alibi_heads_start_at_two_to_the_minus_a_half():
  np.testing.assert_allclose(attention.alibi_slopes(16)[:2], [2**-0.5, 0.5], rtol=1e-12)
  np.testing.assert_allclose(attention.alibi_slopes(8), [2.0**-h for h in range(1, 9)], rtol=1e-12)


@pytest.mark.parametrize("n", [4, 6, 12, 32, 112])
def test_alibi_slopes_equal_those_of_bloom_and_mpt(n):
  pytest.importorskip("transformers", reason="no transformers: its ALiBi slopes were not compared")
  import torch
  from transformers.models.bloom import modeling_bloom
  from transformers.models.mpt import modeling_mpt

  bloom = modeling_bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), n, torch.float32)[:, 0, 1]
  np.testing.assert_allclose(attention.alibi_slopes(n), bloom.numpy(), rtol=1e-6)
  for max_bias in (8, 16):
    mpt = -modeling_mpt.build_mpt_alibi_tensor(n, 2, max_bias)[:, 0, 0]
    ours = -ALiBi(max_bias=float(max_bias)).bias(None, jnp.array([[[-1]]]), n, False)[0, :, 0, 0]
    np.testing.assert_allclose(ours, mpt.numpy(), rtol=1e-6)


def test_alibi_is_adding_slope_times_key_position():
  """A row-constant shift leaves the softmax alone."""
  q, k, v, seen = attention_inputs(N=6, K=3)
  T = q.shape[1]
  distance = jnp.arange(T)[None, None, :] - jnp.arange(T)[None, :, None]
  shifted = jnp.asarray(attention.alibi_slopes(6), jnp.float32)[:, None, None] * jnp.arange(T, dtype=jnp.float32)
  ours = run_attend(q, k, v, seen, ALiBi().bias(None, distance, 6, False))
  np.testing.assert_allclose(ours, run_attend(q, k, v, seen, jnp.broadcast_to(shifted, (1, 6, T, T))), atol=2e-6)


# the last two: a floor of 1 and 12 minus a rounding
BUCKETS = [(32, 128), (8, 10), (6, 7), (64, 200), (4, 3), (16, 20), (10, 160), (54, 125)]


@pytest.mark.parametrize("buckets, reach", BUCKETS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets_equal_the_formula_decided_in_integers(buckets, reach, bidirectional):
  distances = np.arange(-300, 301)
  ours = attention.t5_bucket(
    jnp.asarray(distances), num_buckets=buckets, max_distance=reach, bidirectional=bidirectional
  )
  expected = [oracle.t5_bucket(int(d), buckets, reach, bidirectional) for d in distances]
  np.testing.assert_array_equal(ours, expected)
  assert max(expected) < buckets


@pytest.mark.parametrize("buckets, reach", [(32, 128), (8, 10), (64, 200)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets_equal_those_of_transformers(buckets, reach, bidirectional):
  pytest.importorskip("transformers", reason="no transformers: its T5 buckets were not compared")
  import torch
  from transformers.models.t5.modeling_t5 import T5Attention

  distances = np.arange(-300, 301)
  theirs = T5Attention._relative_position_bucket(torch.from_numpy(distances), bidirectional, buckets, reach)
  ours = attention.t5_bucket(
    jnp.asarray(distances), num_buckets=buckets, max_distance=reach, bidirectional=bidirectional
  )
  np.testing.assert_array_equal(ours, theirs.numpy())


def test_t5_buckets_of_the_paper():
  """32 buckets to 128: 16 exact, then logarithmic, one for all beyond."""
  bucket = lambda d: int(attention.t5_bucket(jnp.array(-d), num_buckets=32, max_distance=128, bidirectional=False))
  assert [bucket(d) for d in (0, 1, 15, 16, 18, 19, 31, 32, 64, 127, 128, 10**6)] == [
    0, 1, 15, 16, 16, 17, 21, 21, 26, 31, 31, 31
  ]  # fmt: skip


def test_t5_bias_is_one_table_for_all_layers_of_a_block():
  config = spaces.model(spaces.block(spaces.attention(position=T5Bias(num_buckets=8, max_distance=9))), stack="3*a")
  params = flatten(nnx.state(abstract(config)))
  assert [name for name, p in params.items() if p.shape == (8, 6)] == ["stack/shared/a"]


# -------------------------------------------------------------------------------------------- attention


def attention_inputs(B=2, T=7, N=6, K=2, H=8, seed=0):
  q, k, v = normal(B, T, N, H, seed=seed), normal(B, K, T, H, seed=seed + 1), normal(B, K, T, H, seed=seed + 2)
  return q, k, v, jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))


def run_attend(q, k, v, seen, bias=None, sinks=None, **options):
  options = {"scale": q.shape[-1] ** -0.5, "softcap": None, "dropout": 0.0, "key": None} | options
  out, entropy = attention.attend(q, k, v, seen[:, None], bias, sinks, **options)  # one mask for all heads
  return (out, entropy) if options.get("entropy") else out


def attention_weights(q, k, seen, **options):
  """[B, T, N, S]: `attend` with the unit vectors for values."""
  B, K, S, _ = k.shape
  return run_attend(q, k, jnp.broadcast_to(jnp.eye(S, dtype=k.dtype), (B, K, S, S)), seen, **options)


def test_grouped_attention_is_multi_head_attention_with_repeated_keys_and_values():
  q, k, v, seen = attention_inputs(N=6, K=2)
  repeated = [jnp.repeat(x, 3, axis=1) for x in (k, v)]
  np.testing.assert_array_equal(run_attend(q, k, v, seen), run_attend(q, *repeated, seen))
  q, k, v, seen = attention_inputs(N=5, K=1)
  repeated = [jnp.repeat(x, 5, axis=1) for x in (k, v)]
  np.testing.assert_array_equal(run_attend(q, k, v, seen), run_attend(q, *repeated, seen))


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
  q, k, v, seen = attention_inputs()
  seen = seen.at[0, 3].set(False).at[1].set(False)
  for sinks in (None, normal(6)):
    run = functools.partial(run_attend, seen=seen, sinks=sinks)
    out = run(q, k, v)
    assert jnp.all(out[0, 3] == 0) and jnp.all(out[1] == 0) and jnp.all(jnp.any(out[0, :3] != 0, axis=-1))
    gradients = jax.grad(lambda *x, run=run: jnp.sum(jnp.sin(run(*x, softcap=3.0))), (0, 1, 2))(q, k, v)
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert jnp.all(gradients[0][1] == 0) and jnp.any(gradients[0][0] != 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [10.0, 100.0, 60000.0])
def test_softmax_never_overflows(dtype, size):
  """A softmax without its maximum taken off overflows above 88.7 in f32 and bf16, above 11.09 in f16."""
  q, k, v, seen = (x.astype(dtype) if x.dtype != bool else x for x in attention_inputs(H=4))
  q = jnp.clip(q * size, -6e4, 6e4)
  for scale, sinks in ((1.0, None), (-1.0, None), (1.0, jnp.full(6, size)), (1.0, jnp.full(6, -size))):
    run = functools.partial(run_attend, v=v, seen=seen, scale=scale, sinks=sinks)
    grads = jax.grad(lambda *x, run=run: run(*x).astype(jnp.float32).sum(), (0, 1))(q, k)
    assert jnp.isfinite(run(q, k)).all()
    if dtype != "float16":  # f16 gradients of a score of 1e5 do not fit into f16
      assert all(jnp.isfinite(g).all() for g in grads)


def test_logits_of_1e30_pick_the_largest():
  q, k, v, seen = attention_inputs(N=2, K=2)
  out = run_attend(q * 1e15, k * 1e15, v, seen, scale=1.0)
  best = jnp.argmax(jnp.where(seen[:, None], jnp.einsum("btnh,bnsh->bnts", q, k), -jnp.inf), axis=-1)  # [B, N, T]
  expected = jnp.take_along_axis(v, best[..., None], axis=2).swapaxes(1, 2)
  np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_a_sink_is_a_key_with_no_value():
  q, k, v, seen = attention_inputs(N=6, K=2)
  sinks = normal(6, seed=9)
  key = lambda x: jnp.concatenate([x, jnp.zeros_like(x[:, :, :1])], axis=2)
  bias = jnp.zeros((1, 6, 7, 8)).at[..., -1].set(sinks[:, None])
  with_key = run_attend(q, key(k), key(v), jnp.pad(seen, ((0, 0), (0, 0), (0, 1)), constant_values=True), bias)
  np.testing.assert_allclose(run_attend(q, k, v, seen, sinks=sinks), with_key, atol=1e-6)
  gradient = jax.grad(lambda s: jnp.sum(run_attend(q, k, v, seen, sinks=s) ** 2))(sinks)
  weights = attention_weights(q, k, seen, sinks=sinks)
  assert jnp.all(weights.sum(-1) < 1) and jnp.all(gradient < 0)  # a larger sink takes attention away


def test_softcap_bounds_the_logits_and_leaves_small_ones():
  c = 4.0
  q, k, _, seen = attention_inputs(N=2, K=2, H=8)
  raw = 3 * jnp.einsum("btnh,bnsh->btns", q, k)
  logits = jnp.log(attention_weights(q, k, seen, scale=3.0, softcap=c))
  exact = jax.nn.log_softmax(jnp.where(seen[:, :, None], c * jnp.tanh(raw / c), -jnp.inf))
  real = jnp.broadcast_to(seen[:, :, None], raw.shape)
  assert jnp.abs(raw).max() > 3 * c
  np.testing.assert_allclose(logits[real], exact[real], atol=1e-5)
  spread = jnp.max(jnp.where(real, logits, -jnp.inf), -1) - jnp.min(jnp.where(real, logits, jnp.inf), -1)
  assert spread.max() <= 2 * c
  tiny = run_attend(q, k, normal(2, 2, 7, 8), seen, scale=1e-3, softcap=c)
  np.testing.assert_allclose(tiny, run_attend(q, k, normal(2, 2, 7, 8), seen, scale=1e-3), atol=1e-6)


def test_query_key_norm_bounds_the_logits_by_sqrt_of_the_head_dim():
  block = spaces.block(spaces.attention(qk_norm=QKNorm(norm=RMSNorm()), position=RoPE()))
  H, seen = 10, []
  mixer = Block(block, 18, Maker(jax.random.key(0), Normal(stddev=30.0), "float32")).mixer
  real = attention.attend
  spy = lambda q, k, *args, **kwargs: seen.append((q, k)) or real(q, k, *args, **kwargs)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention, "attend", spy)
    positions = jnp.arange(9)[None]
    mixer(normal(1, 9, 18, scale=100.0), spaces.site(positions))
  q, k = seen[0]
  scores = jnp.einsum("btkgh,bksh->bkgts", q.reshape(1, 9, 2, 3, H), k) / math.sqrt(H)
  assert jnp.abs(scores).max() <= math.sqrt(H) * (1 + 1e-5)
  np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), math.sqrt(H), rtol=1e-4)


def test_entropy_is_that_of_the_weights_and_the_sink():
  q, k, v, seen = attention_inputs()
  seen = seen.at[0, 3].set(False)
  for sinks in (None, normal(6, seed=5, scale=2.0)):
    _, entropy = run_attend(q, k, v, seen, sinks=sinks, entropy=True)
    p = np.asarray(attention_weights(q, k, seen, sinks=sinks), np.float64)
    if sinks is not None:
      p = np.concatenate([p, 1 - p.sum(-1, keepdims=True)], axis=-1)
    expected = -np.sum(np.where(p > 1e-12, p * np.log(np.maximum(p, 1e-12)), 0.0), axis=-1)
    np.testing.assert_allclose(entropy, expected, atol=1e-5)
  assert jnp.all(run_attend(q, k, v, seen, entropy=True)[1][:, 0] == 0)  # one key seen: certain


def test_attention_dropout_zeroes_or_rescales_each_weight():
  q, k, _, seen = attention_inputs(B=4, T=16)
  kept = attention_weights(q, k, seen)
  dropped = attention_weights(q, k, seen, dropout=0.25, key=jax.random.key(0))
  zero = dropped == 0
  np.testing.assert_allclose(jnp.where(zero, 0, dropped), jnp.where(zero, 0, kept / 0.75), rtol=1e-5)
  rate = jnp.mean(zero[jnp.broadcast_to(seen[:, :, None], zero.shape)])
  assert abs(rate - 0.25) < 0.03


def test_dropout_of_a_block_zeroes_or_rescales_each_branch():
  config = spaces.block(ffn=None, dropout=0.25)
  x, block = normal(3, 8, 18), Block(config, 18, Maker(jax.random.key(0), FanIn(), "float32"))
  at = lambda key: spaces.site(jnp.tile(jnp.arange(8), (3, 1)), key=key)
  branch, dropped = jax.jit(lambda: [block(x, at(k)).y - x for k in (None, jax.random.key(1))])()
  zero = jnp.abs(dropped) < 1e-6
  np.testing.assert_allclose(jnp.where(zero, 0, dropped), jnp.where(zero, 0, branch / 0.75), rtol=1e-3, atol=1e-5)
  assert abs(zero.mean() - 0.25) < 0.06


def test_without_positions_a_bidirectional_decoder_is_equivariant_to_permutations():
  block = spaces.block(spaces.attention(position=None, mask=Bidirectional()))
  model = Decoder(spaces.model(block), jax.random.key(0))
  tokens, order = jnp.array([[3, 1, 4, 15, 9, 2, 6]]), jnp.array([4, 0, 6, 2, 1, 5, 3])
  positions = jnp.arange(7)[None]
  run = jax.jit(lambda tokens: model(tokens, positions)[0])
  np.testing.assert_allclose(run(tokens[:, order]), run(tokens)[:, order], atol=1e-5)


# ------------------------------------------------------------------------------------------ cache, einsum


def test_a_ring_buffer_holds_the_last_tokens_and_no_padding():
  """Against a list that is appended to, row by row."""
  draws, capacity = np.random.default_rng(0), 5
  buffer, ledger = jnp.full((3, 2, capacity, 4), -7.0), jnp.full((3, capacity), -1)
  cursor, text = jnp.zeros(3, jnp.int32), [[], [], []]
  for width in (4, 1, 4, 1, 1, 5, 4, 1):
    real = draws.random((3, width)) < 0.6
    positions = np.full((3, width), -1)
    for row in range(3):
      count = real[row].sum()
      positions[row, real[row]] = len(text[row]) + np.arange(count)
      text[row] += range(len(text[row]), len(text[row]) + count)
    slot = cache.slots(cursor, jnp.asarray(positions), capacity)
    values = jnp.broadcast_to(jnp.asarray(positions, jnp.float32)[:, :, None, None], (3, width, 2, 4))
    buffer, ledger = cache.write(buffer, slot, values), cache.write(ledger, slot, jnp.asarray(positions))
    cursor += jnp.sum(positions >= 0, axis=1)
    for row in range(3):
      held = text[row][-capacity:]
      assert sorted(ledger[row].tolist()) == sorted(held + [-1] * (capacity - len(held)))
      expected = np.where(ledger[row] < 0, -7.0, ledger[row])[None, :, None]
      np.testing.assert_array_equal(buffer[row], np.broadcast_to(expected, (2, capacity, 4)))


def test_one_token_of_one_row_is_written_once():
  buffer = cache.write(jnp.zeros((1, 2, 4, 3)), jnp.array([[2]]), jnp.ones((1, 1, 2, 3)))
  np.testing.assert_array_equal(buffer.sum((0, 1, 3)), [0, 0, 6, 0])
  np.testing.assert_array_equal(cache.write(jnp.zeros((1, 4)), jnp.array([[4]]), jnp.ones((1, 1))), jnp.zeros((1, 4)))


def test_einsum_accumulates_bfloat16_in_f32():
  """512 ones and a 256: bfloat16 sums stop at 256 + 1 = 256."""
  x = jnp.ones((1, 1, 513), jnp.bfloat16).at[..., 0].set(256)
  assert einsum("btd,df->btf", x, jnp.ones((513, 1)))[0, 0, 0] == 768
  third = float(jnp.bfloat16(1 / 3))  # 1 + third has one digit too many for bfloat16
  y = einsum("btd,df->btf", jnp.array([[[third, 1]]], jnp.bfloat16), jnp.ones((2, 1)), out_dtype=jnp.float32)
  assert y.dtype == jnp.float32 and y[0, 0, 0] == 1 + third


# ------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formulas(name):
  x = np.linspace(-6, 6, 241)
  expected = [oracle.ACTIVATIONS[name](float(v)) for v in x]
  np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_published_numbers_of_gelu_and_silu():
  x = jnp.linspace(-5, 5, 100_001)
  gap = jnp.abs(ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_tanh"](x))
  assert gap.max() == pytest.approx(4.73e-4, abs=2e-6) and abs(x[gap.argmax()]) == pytest.approx(2.70, abs=0.02)
  for name, low, at in (("gelu", -0.1700, -0.752), ("silu", -0.2785, -1.278)):
    y = ACTIVATIONS[name](x)
    assert y.min() == pytest.approx(low, abs=5e-5) and x[y.argmin()] == pytest.approx(at, abs=2e-3)


# ------------------------------------------------------------------------------------------------- losses


def loss_inputs(B=3, T=10, D=6, V=13):
  draws = np.random.default_rng(0)
  hidden, table = normal(B, T, D), normal(V, D, seed=1)
  targets = jnp.asarray(draws.integers(0, V, (B, T)))
  weights = jnp.asarray(draws.random((B, T)) * (draws.random((B, T)) < 0.7), jnp.float32)
  return hidden, table, targets, weights


def direct_loss(hidden, table, *, targets, weights, smoothing, z_loss):
  """From the definitions: cross-entropy against explicit soft targets, and z_loss log^2 Z (2204.02311, section 5)."""
  logits = hidden @ table.T
  V = logits.shape[-1]
  soft = (1 - smoothing) * jax.nn.one_hot(targets, V) + smoothing / V
  loss = -jnp.sum(soft * jax.nn.log_softmax(logits), axis=-1)
  return jnp.sum(weights * (loss + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2))


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.2, 1e-2)])
def test_chunked_loss_is_the_direct_loss_in_value_and_gradient(smoothing, z_loss):
  """For chunks that divide the length and chunks that do not."""
  hidden, table, targets, weights = loss_inputs()

  def chunked(chunk):
    loss = lambda h, w: chunked_loss(
      lambda x: x @ w.T, h, targets, weights, chunk=chunk, label_smoothing=smoothing, z_loss=z_loss
    )
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, table)

  direct = functools.partial(direct_loss, targets=targets, weights=weights)
  expected, wanted = jax.value_and_grad(direct, (0, 1))(hidden, table, smoothing=smoothing, z_loss=z_loss)
  rms = jnp.sqrt(jnp.mean((hidden @ table.T) ** 2, axis=-1))
  for (value, sums), gradients in jax.jit(lambda: [chunked(n) for n in (1, 2, 3, 5, 7, 10, 64)])():
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums["loss"], direct(hidden, table, smoothing=smoothing, z_loss=0.0), rtol=1e-5)
    np.testing.assert_allclose(sums["plain_loss"], direct(hidden, table, smoothing=0.0, z_loss=0.0), rtol=1e-5)
    np.testing.assert_allclose(sums["weight"], weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["logit_rms"], jnp.sum(weights * rms), rtol=1e-5)


def test_the_gradient_of_the_z_loss_is_2_log_z_times_the_softmax():
  logits = normal(1, 1, 9, scale=3.0)
  loss = lambda x, z: chunked_loss(
    lambda h: h, x, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), chunk=1, label_smoothing=0.0, z_loss=z
  )[0]
  gradient = jax.grad(loss)(logits, 1e-2) - jax.grad(loss)(logits, 0.0)
  expected = 2 * 1e-2 * jax.nn.logsumexp(logits) * jax.nn.softmax(logits)
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_chunked_loss_never_holds_all_logits():
  hidden, table, targets, weights = loss_inputs(T=12, V=13)
  run = lambda h: chunked_loss(lambda x: x @ table.T, h, targets, weights, chunk=3, label_smoothing=0.1, z_loss=1e-3)[0]
  text = str(jax.make_jaxpr(jax.grad(run))(hidden))
  assert "[3,3,13]" in text and "[3,12,13]" not in text and "[4,3,3,13]" not in text


# -------------------------------------------------------------------------------------- initialisation


def test_an_eight_thirds_gated_mlp_has_the_parameters_of_a_plain_one_of_four():
  """3 d (8/3) d = 2 d (4 d)."""
  make = Maker(jax.random.key(0), FanIn(), "float32")
  size = lambda config: sum(x.size for x in jax.tree.leaves(nnx.state(MLP(config, 24, make, 1.0, 1.0))))
  assert size(MLPConfig(d_ff=64)) == size(MLPConfig(d_ff=96, gated=False)) == 2 * 24 * 96


@pytest.mark.parametrize("init", [FanIn(gain=0.5), Normal(stddev=0.03), Xavier(gain=1.5)])
def test_matrices_are_drawn_with_the_declared_deviation(init):
  """By fan-in and fan-out; DeepNorm's beta on v, o and the feed-forward alone, GPT-2's factor on what writes
  the stream alone."""
  D, N, K, H, F, beta, out = 96, 8, 2, 20, 130, 0.5, 0.25
  block = spaces.block(
    spaces.attention(num_heads=N, num_kv_heads=K, head_dim=H),
    ffn=MLPConfig(d_ff=F),
    init_scale=beta,
    output_init_scale=out,
  )
  config = spaces.model(
    block, stack="4*a", d_model=D, vocab_size=500, init=init, embed_init=Normal(stddev=0.7), head=HeadConfig(tied=False)
  )
  params = flatten(jax.jit(lambda: nnx.state(Decoder(config, jax.random.key(3))))())
  fans = {
    "mixer/q": (D, N * H, 1), "mixer/k": (D, K * H, 1), "mixer/v": (D, K * H, beta), "mixer/o": (N * H, D, beta * out),
    "ffn/gate": (D, F, beta), "ffn/up": (D, F, beta), "ffn/down": (F, D, beta * out),
  }  # fmt: skip
  expected = {f"stack/segments/0/blocks/0/{n}": scale * init.std(i, o) for n, (i, o, scale) in fans.items()}
  expected |= {"embed": 0.7, "head": init.std(D, 500)}
  for name, std in expected.items():
    assert float(jnp.std(params[name])) == pytest.approx(std, rel=0.04), name
    assert jnp.abs(params[name]).max() < 2.3 * std, name  # truncated at two deviations of the untruncated
    assert abs(jnp.mean(params[name])) < 0.05 * std, name
  others = {n: p for n, p in params.items() if n not in expected}
  assert others and all(jnp.all(p == 1) for p in others.values())


def test_no_two_matrices_are_drawn_alike():
  params = flatten(jax.jit(lambda: nnx.state(Decoder(spaces.HAND["hybrid"], jax.random.key(0))))())
  firsts = []
  for name, p in params.items():
    if p.std() > 0:
      layers = p.reshape(p.shape[0], -1) if "blocks" in name else p.reshape(1, -1)
      firsts += [tuple(np.round(layer[:5] / p.std(), 4).tolist()) for layer in np.asarray(layers)]
  assert len(firsts) == len(set(firsts)) > 20
