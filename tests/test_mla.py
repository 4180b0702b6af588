"""Latent attention: its two forms agree, the cheaper one runs, and the cache is as small as the formula says.

That either is the equation of the paper, causal, and the same in any chunks is in test_invariants.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spaces
from flax import nnx
from test_invariants import T, Toy, assert_close, assert_same_gradients, check_decoding
from test_presets import dot_flops
from tiers import plain_if, three

from llmarch.analysis import cost
from llmarch.build import build, to_dict
from llmarch.config import MixerConfig, Precision
from llmarch.errors import UserError
from llmarch.infer.quantize import quantize_params
from llmarch.layers import mla
from llmarch.layers.position import Interpolation, RoPE
from llmarch.models.decoder import abstract
from llmarch.ops import cache
from llmarch.ops.quant import FORMATS

CONFIG = spaces.model(spaces.block(spaces.mla()), spaces.block(spaces.mla(q_lora_rank=None, kv_lora_rank=9)))


def with_state(config, state: str):
  return dataclasses.replace(config, precision=Precision(state=state))


def logits_of(toy: Toy, chunks: int):
  """params -> the logits [B, T, V] of the toy's batch, fed through a decoding state in so many equal chunks."""
  tokens, positions, segments, _ = toy.batch.arrays()
  graph = nnx.graphdef(toy.model)

  def run(params):
    model, logits = nnx.merge(graph, params), []
    state = cache.allocate(model.state_spec(len(tokens), T, T // chunks))
    for part in zip(*(np.split(a, chunks, axis=1) for a in (tokens, positions, segments)), strict=True):
      out, state, _ = model(*part, state)
      logits.append(out)
    return jnp.concatenate(logits, axis=1)

  return run


@pytest.mark.parametrize("chunks", three([1].count, [3].count, [1, 3, T]))
def test_the_absorbed_form_equals_the_naive_one_in_values_and_gradients(chunks, monkeypatch, cases):
  toy = Toy(CONFIG, 3, 3)
  real = toy.batch.positions >= 0
  pull = np.random.default_rng(0).normal(size=(*real.shape, CONFIG.vocab_size)) * real[..., None]
  found = []
  for absorb in (False, True):
    monkeypatch.setattr(mla, "absorbing_is_cheaper", lambda *sizes, absorb=absorb: absorb)
    run = logits_of(toy, chunks)

    def pulled(params, run=run):
      logits = run(params)
      return jnp.sum(logits * pull), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(pulled, has_aux=True))(toy.params)
    found.append((logits[real], (value, gradients)))
  (naive, naive_gradients), (absorbed, absorbed_gradients) = found
  assert_close(absorbed, np.asarray(naive), f"absorbed, {chunks} chunks")
  assert_same_gradients(absorbed_gradients, naive_gradients, f"absorbed, {chunks} chunks")
  cases("MLA absorbed == naive, values and gradients")


@pytest.mark.parametrize("absorb", [False, True])
def test_either_form_decodes_as_the_oracle_computes(absorb, monkeypatch, cases):
  monkeypatch.setattr(mla, "absorbing_is_cheaper", lambda *sizes: absorb)
  toy = Toy(CONFIG, 4, 3)
  check_decoding(toy, toy.unstacked, 3, 1, 4, f"absorb={absorb}", cases)


@pytest.mark.parametrize("T, S", [(1, 12), (3, 12), (5, 12), (8, 12), (12, 12), (1, 1), (7, 50)])
@pytest.mark.parametrize("C", [4, 6, 12, 30])
def test_the_form_of_fewer_flops_runs(T, S, C, monkeypatch):
  config = spaces.model(spaces.block(spaces.mla(kv_lora_rank=C)), stack="a")
  graph, params = nnx.split(abstract(config))
  model = nnx.merge(graph, params)
  state = jax.eval_shape(lambda: cache.allocate(model.state_spec(2, S, T)))

  def flops():
    run = lambda params, state, tokens: nnx.merge(graph, params)(tokens, tokens, state=state)[0]
    return dot_flops(jax.make_jaxpr(run)(params, state, jax.ShapeDtypeStruct((2, T), jnp.int32)).jaxpr)

  chosen, both = flops(), []
  for absorb in (False, True):
    monkeypatch.setattr(mla, "absorbing_is_cheaper", lambda *sizes, absorb=absorb: absorb)
    both.append(flops())
  assert chosen == min(both)


def test_deepseek_v3_absorbs_a_decode_step_and_not_a_long_prompt():
  cheaper = lambda T: mla.absorbing_is_cheaper(T, 4096, 512, 256)
  assert cheaper(1) and cheaper(100) and not cheaper(256) and not cheaper(4096)


@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8", "fp8"])
def test_cache_bytes_are_the_formula_and_no_head_adds_to_them(state):
  """C + R elements a token and layer (2405.04434, table 1), and in a format one f32 for each of the two vectors."""
  for heads in (2, 8):
    blocks = spaces.block(spaces.mla(num_heads=heads)), spaces.block(spaces.mla(kv_lora_rank=9))
    config = with_state(spaces.model(*blocks, stack="3*(a b)"), state)
    for batch, max_len, chunk in [(3, 20, 1), (2, 7, 7)]:
      specs = abstract(config).state_spec(batch, max_len, chunk)
      arrays = jax.eval_shape(functools.partial(cache.allocate, specs))
      held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays["layers"]))
      of_a_token = ((12 + 4) + (9 + 4)) * cost.BYTES[state] + (16 if state in FORMATS else 0)
      assert held == cost.state_bytes(config, batch, max_len, chunk) == 3 * batch * max_len * of_a_token


@pytest.mark.parametrize("state, error", plain_if([("int8", 0.02)].count, [("int8", 0.02), ("fp8", 0.06)]))
def test_quantised_latents_stay_near_full_precision_and_the_forms_agree_on_them(state, error, monkeypatch):
  toy = Toy(CONFIG, 5, 3)
  exact, found = np.asarray(jax.jit(logits_of(toy, 3))(toy.params)), []
  quantised = Toy(with_state(CONFIG, state), 5, 3)
  for absorb in (False, True):
    monkeypatch.setattr(mla, "absorbing_is_cheaper", lambda *sizes, absorb=absorb: absorb)
    found.append(np.asarray(jax.jit(logits_of(quantised, 3))(toy.params)))
  real = toy.batch.positions >= 0
  off = np.sqrt(np.mean((found[0] - exact)[real] ** 2)) / np.std(exact[real])
  assert 1e-4 < off < error
  assert_close(found[1][real], found[0][real], "absorbed")


@pytest.mark.parametrize("weights", plain_if(["int8"].count, ["int8", "fp8"]))
def test_the_forms_agree_on_quantised_weights(weights, monkeypatch):
  toy, found = Toy(CONFIG, 6, 3), []
  quantised = quantize_params(toy.params, weights)
  for absorb in (False, True):
    monkeypatch.setattr(mla, "absorbing_is_cheaper", lambda *sizes, absorb=absorb: absorb)
    found.append(np.asarray(jax.jit(logits_of(toy, 3))(quantised))[toy.batch.positions >= 0])
  assert_close(found[1], found[0], "absorbed")


GOOD = to_dict(spaces.mla())


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"num_heads": 0}, "mixer.num_heads must be at least 1"),
    ({"q_lora_rank": 0}, "mixer.q_lora_rank must be at least 1"),
    ({"kv_lora_rank": 0}, "mixer.kv_lora_rank must be at least 1"),
    ({"qk_nope_head_dim": 0}, "mixer.qk_nope_head_dim must be at least 1"),
    ({"v_head_dim": -2}, "mixer.v_head_dim must be at least 1"),
    ({"qk_rope_head_dim": 5}, "mixer.qk_rope_head_dim must be even and above 0, got 5"),
    ({"qk_rope_head_dim": 0}, "mixer.qk_rope_head_dim must be even and above 0, got 0"),
    ({"query_scale": 0.0}, "mixer.query_scale must be greater than 0"),
    ({"dropout": 1.0}, "mixer.dropout must be at least 0 and below 1"),
    ({"position": "alibi"}, "mixer.position must be rope or xpos without dims"),
    ({"position": RoPE(dims=2)}, "mixer.position must be rope or xpos without dims"),
    ({"position": None}, "mixer.position must name its kind"),
    ({"mscale_all_dim": 1.0}, "mixer.mscale_all_dim belongs to position.scaling=yarn"),
    (
      {"mscale_all_dim": 1.0, "position": RoPE(scaling=Interpolation(factor=2.0))},
      "mixer.mscale_all_dim belongs to position.scaling=yarn",
    ),
    ({"latent_norm": None}, "mixer.latent_norm must name its kind"),
    ({"num_kv_heads": 2}, "mixer.num_kv_heads: no such key"),
  ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused_in_one_sentence(changes, words):
  with pytest.raises(UserError) as refused:
    build(MixerConfig, GOOD | changes, "mixer")
  assert words in str(refused.value) and "\n" not in str(refused.value)


def test_keys_by_channel_are_refused_with_the_format_that_serves():
  with pytest.raises(UserError, match="precision.state=int8_channel: .*; use int8$"):
    with_state(CONFIG, "int8_channel")
