"""The inference layouts: every row of the table gives one device's numbers, in manual and in automatic mode.

Eight fake devices; sizes are unequal, and each mesh axis divides what the row splits by it.
"""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spaces
from composability import layout_features
from flax import nnx
from test_invariants import assert_close
from tiers import plain_if, three

from llmarch.adapt.padding import pad_heads, pad_params
from llmarch.analysis import cost
from llmarch.build import build
from llmarch.config import EmbedConfig, HeadConfig, ModelConfig
from llmarch.errors import UserError
from llmarch.infer.decoder import decoding_params, make_decoder
from llmarch.infer.lm import LM
from llmarch.layers.attention import QKNorm
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.moe import TopK
from llmarch.layers.norm import LayerNorm, RMSNorm, ScaleNorm
from llmarch.layers.position import ALiBi, Learned, Sinusoidal, T5Bias, XPos
from llmarch.models.decoder import Decoder, abstract, fuse, separate, stacked, unstack
from llmarch.ops import cache
from llmarch.ops.sampling import Sampling
from llmarch.presets import PRESETS
from llmarch.residual import Parallel, ResidualConfig
from llmarch.sharding import (
  ATTENTION,
  FEED_FORWARD,
  LAYOUTS,
  RING_FORMS,
  find_layout,
  make_mesh,
  parse_mesh,
  shardings,
  use_layout,
)

B, T = 8, 7  # rows, and tokens of the longest
CALLS = (4, 2, 1)  # tokens of a prefill, a chunk (padded to the width of the prefill) and a decode step
INFERENCE = [f"{ffn}+{attention}" for ffn in FEED_FORWARD for attention in ATTENTION]


def block(kv_heads: int, *, d_ff: int = 40, activation="silu", gated=True, bias=False, heads=8, form="pre", **mixer):
  changes = {"norm": mixer.pop("norm")} if "norm" in mixer else {}
  return spaces.block(
    spaces.attention(**{"num_heads": heads, "num_kv_heads": kv_heads} | mixer),
    ffn=MLPConfig(d_ff=d_ff, activation=activation, gated=gated, bias=bias),
    residual=build(ResidualConfig, form),
    **changes,
  )


def model(*blocks, **changes):
  return spaces.model(*blocks, **{"d_model": 24, "stack": " ".join("abcdef"[: len(blocks)])} | changes)


# Every kind of sharing of keys and values, and both forms of a block.
SHARING = model(block(8), block(1, form="parallel"), block(4))
# Whatever else of the space asks where it is: biases, norms over split dimensions, constants a head, tables.
OPTIONS = {
  "biases_and_learned_positions": model(
    block(2, bias=True, gated=False, activation="gelu", qkv_bias=True, out_bias=True, window=3, norm=LayerNorm()),
    block(8, bias=True, qkv_bias=True, out_bias=True, form="parallel_two_norms", norm=ScaleNorm()),
    head=HeadConfig(tied=False, bias=True, softcap=5.0),
    embed=EmbedConfig(position=Learned(length=spaces.MAX_LEN), norm=LayerNorm(), scale=1.7),
  ),
  "norms_over_split_dimensions": model(
    block(4, qk_norm=QKNorm(norm=RMSNorm(), whole=True), form="output"),
    block(4, qk_norm=QKNorm(norm=LayerNorm()), form="sandwich", norm=LayerNorm()),
    block(1, form="post", norm=ScaleNorm(), position=None),
    embed=EmbedConfig(position=Sinusoidal()),
    vocab_size=42,  # which no more than two devices divide
  ),
  "parameters_by_head_and_a_narrow_table": model(
    block(4, qk_norm=QKNorm(norm=LayerNorm(), per_head=True), norm=LayerNorm(scale=False, bias=False), qkv_clip=0.5),
    block(1, qk_norm=QKNorm(norm=ScaleNorm(), per_head=True), form="parallel"),
    embed=EmbedConfig(dim=10, position=Learned(length=spaces.MAX_LEN, offset=2)),
  ),
  # Whole experts to a device, and parts of experts where they are too few.
  "experts": model(
    spaces.block(
      spaces.attention(num_heads=8),
      ffn=spaces.moe(
        4,
        TopK(bias=True, scores="sigmoid", balance_rate=0.1),
        {"d_ff": 16, "bias": True},
        shared=MLPConfig(d_ff=24, bias=True),
        shared_gate=True,
      ),
    ),
    spaces.block(
      spaces.attention(num_heads=8), ffn=spaces.moe(2, TopK(k=1, renormalize=False), {"d_ff": 24}), residual=Parallel()
    ),
  ),
  "biases_by_distance": model(
    block(8, position=ALiBi(), sinks=True),
    block(2, heads=16, position=T5Bias(num_buckets=6, max_distance=7), softcap=4.0),
    block(4, position=XPos(), window=2),
  ),
  # Of the first, a prefill of 4 absorbs; of the second, not; a decode step does of both.
  "latent_attention": model(
    spaces.block(spaces.mla(num_heads=8), ffn=MLPConfig(d_ff=40)),
    spaces.block(
      spaces.mla(num_heads=16, q_lora_rank=None, kv_lora_rank=40, qk_nope_head_dim=5, v_head_dim=6),
      ffn=MLPConfig(d_ff=40),
      residual=Parallel(),
    ),
  ),
}


@functools.cache
def toy(config):
  """Random parameters of the unstacked decoder, tokens, and ragged positions padded on the left."""
  graph, params = nnx.split(abstract(config))
  graph, params = nnx.split(unstack(nnx.merge(graph, spaces.random_params(params, 3))))
  draws = np.random.default_rng(5)
  tokens = draws.integers(0, config.vocab_size, (B, T)).astype(np.int32)
  lengths = np.array([7, 5, 6, 4, 7, 3, 5, 2])
  return graph, params, tokens, np.maximum(np.arange(T) - (T - lengths[:, None]), -1).astype(np.int32)


def calls(config) -> list[tuple[np.ndarray, np.ndarray]]:
  """Tokens and positions of the calls, by width: [2, B, 4] of prefill and chunk, [1, B, 1] of the decode step."""
  *_, tokens, positions = toy(config)
  groups = []
  for x, padding in ((tokens, 0), (positions, -1)):
    prefill, chunk, step = np.split(x, np.cumsum(CALLS)[:-1], axis=1)
    chunk = np.pad(chunk, ((0, 0), (CALLS[0] - CALLS[1], 0)), constant_values=padding)
    groups.append((np.stack([prefill, chunk]), step[None]))
  return list(zip(*groups, strict=True))


def outcomes(config, layout=None, mesh=None, manual=True, form=lambda model: model, lowered=None):
  """Logits of the calls of each width, and the state after the last. `lowered` gets the program's text."""
  graph, params, *_ = toy(config)
  graph, params = nnx.split(form(nnx.merge(graph, params)))
  specs = nnx.merge(graph, params).state_spec(B, T, max(CALLS))

  def run(params, state, calls):
    with use_layout(layout, mesh, manual=manual):
      model, logits = nnx.merge(graph, params), []

      def call(state, inputs):
        tokens, positions = inputs
        out, state, _ = model(tokens, positions, state=state)
        return state, out

      for group in calls:
        state, out = jax.lax.scan(call, state, group)
        logits.append(out)
      return logits, state

  state = cache.allocate(specs)
  if mesh is None:
    return jax.jit(run)(params, state, calls(config))
  of = lambda shape, axes, dtype: shardings(cache.Spec(shape, (None, *axes), dtype), layout, mesh)
  placed = shardings(params, layout, mesh), shardings(specs, layout, mesh)
  rows = of((1, B, T), ("batch", "length"), "int32")
  logits = of((1, B, T, config.vocab_size), ("batch", "length", "act_vocab"), "float32")
  if manual:
    specs_of = lambda tree: jax.tree.map(lambda s: s.spec, tree)
    run = jax.shard_map(
      run, mesh=mesh, in_specs=(*map(specs_of, placed), rows.spec), out_specs=(logits.spec, specs_of(placed[1])),
      check_vma=False,
    )  # fmt: skip
  run = jax.jit(run, in_shardings=(*placed, rows), out_shardings=(logits, placed[1]))
  arguments = *jax.device_put((params, state), placed), calls(config)
  if lowered is not None:
    lowered.append(run.lower(*arguments).as_text())
  return run(*arguments)


expected = functools.cache(outcomes)


def check_equal(config, actual, what: str):
  for (_, positions), here, there in zip(calls(config), actual[0], expected(config)[0], strict=True):
    for at, a, e in zip(positions >= 0, np.asarray(here), np.asarray(there), strict=True):
      assert_close(a[at], e[at], f"{what}, call of {at.shape[1]}")
  for here, there in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected(config)[1]), strict=True):
    assert_close(np.asarray(here), np.asarray(there), f"{what}, state")


def mesh_of(text: str):
  return make_mesh(parse_mesh(text))


# Each row of the feed-forward and each of attention once.
DIAGONAL = [f"{ffn}+{attention}" for ffn, attention in zip(FEED_FORWARD, itertools.cycle(ATTENTION))]


@pytest.mark.parametrize("layout", three(DIAGONAL[::2].count, INFERENCE[::2].count, INFERENCE))
def test_every_layout_equals_one_device(layout, cases, checked):
  check_equal(SHARING, outcomes(SHARING, LAYOUTS[layout], mesh_of("x=2,y=2,z=2")), layout)
  cases("7 manual layout == one device: MHA, GQA, parallel MQA x prefill, chunk, decode", 9)
  checked("7", SHARING, "state='float32'", *layout_features(layout))


SIX = model(*(block(kv, form=form) for form in ("pre", "parallel") for kv in (8, 4, 1)))


@pytest.mark.nightly
@pytest.mark.parametrize("layout", INFERENCE)
def test_every_layout_equals_one_device_for_each_form_of_each_sharing(layout, cases):
  check_equal(SIX, outcomes(SIX, LAYOUTS[layout], mesh_of("x=2,y=2,z=2")), layout)
  cases("7 manual layout == one device: MHA, GQA, MQA x serial, parallel x prefill, chunk, decode", 18)


ROWS = ["ws_2d+batch_xyz", "wg_xy+batch_z", "megatron", "ws_1d+heads", "ws_2d+heads"]  # of which the tiers have three
PLACES = [
  pytest.param(layout, name, marks=[pytest.mark.nightly] if i > 1 else [] if i == 0 == j else [pytest.mark.full])
  for i, layout in enumerate(ROWS)
  for j, name in enumerate(OPTIONS)
]


@pytest.mark.parametrize("layout, name", PLACES)
def test_every_option_that_asks_where_it_is_equals_one_device(layout, name, cases, checked):
  mesh = mesh_of("data=2,tensor=4" if layout == "megatron" else "x=2,y=2,z=2")
  check_equal(OPTIONS[name], outcomes(OPTIONS[name], LAYOUTS[layout], mesh), f"{layout} {name}")
  cases("7 manual layout == one device: other options")
  checked("7", OPTIONS[name], "state='float32'", *layout_features(layout))


@pytest.mark.full
@pytest.mark.parametrize(
  "layout, mesh",
  [("ws_2d+batch_yz", "x=4,y=2"), ("ws_2d+batch_z", "y=4,z=2"), ("wg_x+batch_yz", "x=2,y=4"), ("wg_xy", "x=4,z=2")],
)
def test_meshes_of_other_shapes_equal_one_device(layout, mesh, cases):
  check_equal(SHARING, outcomes(SHARING, find_layout(layout, mesh_of(mesh)), mesh_of(mesh)), f"{layout} on {mesh}")
  cases("7 manual layout == one device: other meshes")


@pytest.mark.full
@pytest.mark.parametrize(
  "layout, manual", [("wg_xyz+heads", True), ("wg_x+batch_z+latency", True), ("ws_2d+batch_yz", False)]
)
def test_experts_in_other_rows_and_modes_equal_one_device(layout, manual, cases):
  mesh, config = mesh_of("x=2,y=2,z=2"), OPTIONS["experts"]
  check_equal(config, outcomes(config, find_layout(layout, mesh), mesh, manual), layout)
  cases("7 experts in an inference layout == one device")


PARALLEL = model(
  *(block(kv, form="parallel", gated=gated, qk_norm=qk_norm) for kv, gated, qk_norm in (
    (8, True, None), (1, False, QKNorm(norm=RMSNorm())))),
  block(4),
)  # fmt: skip


@pytest.mark.full
def test_fused_projections_are_the_same_function_and_come_apart_bit_for_bit(cases):
  graph, params, *_ = toy(PARALLEL)
  plain = nnx.merge(graph, params)
  back = separate(fuse(plain))
  jax.tree.map(np.testing.assert_array_equal, nnx.state(back), params)
  assert len(jax.tree.leaves(nnx.state(fuse(plain)))) < len(jax.tree.leaves(params))
  stacked = jax.eval_shape(lambda: nnx.state(separate(fuse(Decoder(PARALLEL, jax.random.key(0))))))
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, nnx.state(abstract(PARALLEL)))
  mesh = mesh_of("x=2,y=2,z=2")
  for layout in (None, "ws_1d", "ws_2d+batch_xyz", "ws_2d+throughput", "wg_xy+batch_z"):
    place = (find_layout(layout, mesh), mesh) if layout else ()
    check_equal(PARALLEL, outcomes(PARALLEL, *place, form=fuse), f"fused, {layout}")
    cases("7 fused projections == separate ones")


# Heads that eight devices do not divide, with every constant of a head that padding must extend.
UNEVEN = model(
  block(1, heads=6, sinks=True, qkv_bias=True),
  block(6, heads=6, position=T5Bias(num_buckets=6, max_distance=7), sinks=True, qkv_bias=True),
  block(2, heads=6, qk_norm=QKNorm(norm=RMSNorm())),
)


def test_padded_heads_leave_the_logits_as_they_are(cases):
  padded = pad_heads(UNEVEN, 8)
  assert [b.mixer.num_heads for b in padded.blocks.values()] == [8, 8, 8]
  assert [b.mixer.kv_heads for b in padded.blocks.values()] == [1, 8, 2]
  assert pad_heads(SHARING, 8) == SHARING
  _, params, tokens, positions = toy(UNEVEN)
  grown = pad_params(params, UNEVEN, padded)

  def run(config, params):
    graph = nnx.graphdef(nnx.eval_shape(lambda: unstack(Decoder(config, jax.random.key(0)))))
    return np.asarray(jax.jit(lambda params: nnx.merge(graph, params)(tokens, positions)[0])(params))

  real = positions >= 0
  assert_close(run(padded, grown)[real], run(UNEVEN, params)[real], "padded heads")
  stacked = nnx.state(abstract(UNEVEN))
  again = jax.eval_shape(lambda p: pad_params(p, UNEVEN, padded), stacked)
  assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, nnx.state(abstract(padded)))
  cases("padded heads == as they were")


def test_palm_540b_is_padded_as_in_the_paper():
  config = PRESETS["palm_540b"]()
  padded = pad_heads(build(ModelConfig, config, "model"), 64)
  assert cost.params(padded)["total"] == 558_173_878_272


@pytest.mark.parametrize("mixer", [{"position": ALiBi()}, {"qk_norm": QKNorm(norm=RMSNorm(), whole=True)}])
def test_heads_that_know_their_number_are_not_padded(mixer):
  with pytest.raises(UserError, match="blocks.a.mixer: heads cannot be padded from 6 to a multiple of 8"):
    pad_heads(model(block(2, heads=6, **mixer)), 8)


LOOPED = [(layout, form) for layout in ("ws_1d+heads", "ws_2d+batch_xyz", "wg_x+batch_z") for form in RING_FORMS]


@pytest.mark.parametrize("layout, form", three([LOOPED[-1]].count, LOOPED[::4].count, LOOPED))
def test_looped_collective_einsum_equals_one_device(layout, form, cases, checked):
  """And there are hops in place of gathers: of all, where one axis gathers each x; of one axis in three in ws_1d."""
  mesh = mesh_of("x=2,y=4" if layout.startswith("ws_2d") else "x=2,y=2,z=2")
  looped, texts = find_layout(f"{layout}+{form}", mesh), []
  for name, config in {"sharing": SHARING, "options": OPTIONS["biases_and_learned_positions"]}.items():
    check_equal(config, outcomes(config, looped, mesh, lowered=texts), f"{layout} {form} {name}")
    cases("7 looped collective einsum == one device")
    checked("7", config, "state='float32'", *layout_features(f"{layout}+{form}"))
  assert "collective_permute" in texts[0]
  assert ("all_gather" in texts[0]) == (layout != "ws_2d+batch_xyz")


AUTOMATIC = ["ws_2d+batch_yz", "ws_1d+batch_xyz", "wg_x+heads", "wg_xyz+heads"]


@pytest.mark.parametrize("layout", three(AUTOMATIC[:1].count, AUTOMATIC[-1:].count, AUTOMATIC))
def test_automatic_mode_reads_the_same_table(layout, cases):
  check_equal(SHARING, outcomes(SHARING, LAYOUTS[layout], mesh_of("x=2,y=2,z=2"), manual=False), layout)
  cases("7 automatic layout == one device")


DECODERS = [
  ("wg_xyz", "ws_2d+batch_xyz", unstack),
  ("ws_2d+heads", "ws_2d+batch_xyz", stacked),
  ("wg_xy", "wg_x+batch_z", fuse),
]


@pytest.mark.parametrize("prefill, decode, form", plain_if(lambda case: case == DECODERS[0], DECODERS))
def test_a_decoder_on_a_mesh_writes_the_same_tokens(prefill, decode, form, cases):
  """Sampled, penalised and stopped; prefill in chunks in one layout, decode in another, the weights unmoved."""
  *_, tokens, positions = toy(SHARING)
  made = spaces.random_params(nnx.state(abstract(SHARING)), 3)
  sampling = Sampling(temperature=1.3, top_k=9, repetition_penalty=1.4)
  n, mesh = 9, mesh_of("x=2,y=2,z=2")

  def generate(params, **place):
    programs = make_decoder(SHARING, batch=B, max_len=T + n, chunk=4, sampling=sampling, stop_ids=(3, 4), **place)
    carry = programs.start(jax.random.split(jax.random.key(1), B), jnp.full(B, T + n))
    for at in (slice(0, 3), slice(3, 7)):
      pad = ((0, 0), (4 - len(range(T)[at]), 0))
      carry = programs.prefill(
        params, carry, np.pad(tokens[:, at], pad), np.pad(positions[:, at], pad, constant_values=-1)
      )
    first = np.asarray(carry["token"])
    _, out, steps = programs.decode(params, programs.switch(carry), n)
    return first, np.asarray(out), int(steps)

  alone = generate(decoding_params(SHARING, made))
  assert alone[2] > 2 and (alone[1] >= 0).any(axis=0).sum() > 2  # there is something to compare
  params = decoding_params(SHARING, made, form)
  params = jax.device_put(params, shardings(params, find_layout(decode, mesh), mesh))
  place = dict(mesh=mesh, prefill_layout=prefill, decode_layout=decode, form=form)
  for here, there in zip(generate(params, **place), alone, strict=True):
    np.testing.assert_array_equal(here, there)
  cases("7 decoder on a mesh == one device: tokens")


@pytest.mark.full
def test_a_quantised_model_on_a_mesh_writes_the_same_tokens():
  experts = spaces.moe(4, TopK(), {"d_ff": 16}, shared=MLPConfig(d_ff=24))
  config = model(block(2), block(8, form="parallel"), spaces.block(spaces.attention(num_heads=8), ffn=experts))
  params = spaces.random_params(nnx.state(abstract(config)), 3)
  place = dict(mesh=mesh_of("x=2,y=2,z=2"), prefill_layout="wg_xyz", decode_layout="ws_2d+batch_xyz+latency")
  one, many = (
    LM(config, params, weights="int8", kv="int8", **place).generate([[1, 2, 3], [4]], max_new_tokens=6)
    for place in ({}, place)
  )
  assert many == one and len(set(one[0])) > 1


@pytest.mark.parametrize(
  "prefill, decode, gathers",
  [
    ("ws_2d+batch_z", "ws_2d+batch_xyz", False),
    ("wg_x", "ws_2d+batch_z", True),  # x goes to heads that it does not divide before z has left them
  ],
)
def test_a_state_goes_to_another_layout_unchanged_and_is_not_replicated(prefill, decode, gathers):
  place = dict(mesh=mesh_of("x=2,y=2,z=2"), prefill_layout=prefill, decode_layout=decode)
  programs = make_decoder(model(block(4)), batch=B, max_len=T, chunk=4, sampling=Sampling(), **place)
  carry = programs.start(jax.random.split(jax.random.key(1), B), jnp.full(B, T))
  numbered = lambda a: jax.device_put(jnp.arange(a.size).reshape(a.shape).astype(a.dtype), a.sharding)
  carry = {**carry, "state": jax.tree.map(numbered, carry["state"])}
  jax.tree.map(np.testing.assert_array_equal, programs.switch(carry)["state"], carry["state"])
  text = programs.switch.lower(carry).compile().as_text()
  assert " all-to-all(" in text and (" all-gather(" in text) == gathers


@pytest.mark.full
def test_64_devices_equal_one():
  """A sample of rows on the mesh of the paper, 4 x 4 x 4; in a process of its own, for this one has 8 devices."""
  script = "import test_layouts; test_layouts.on_64_devices()"
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=64")
  path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
  subprocess.run([sys.executable, "-c", script], env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}, check=True)


def on_64_devices():
  blocks = block(1, heads=64, d_ff=128, form="parallel"), block(8, heads=64, d_ff=192)
  config = model(*blocks, d_model=64, vocab_size=128)
  tokens = np.random.default_rng(0).integers(0, 128, (64, 3)).astype(np.int32)
  positions = np.broadcast_to(np.arange(3, dtype=np.int32), (64, 3))
  graph, params = nnx.split(abstract(config))
  params, mesh = spaces.random_params(params, 3), mesh_of("x=4,y=4,z=4")
  run = lambda params, tokens, positions: nnx.merge(graph, params)(tokens, positions)[0]
  alone = np.asarray(jax.jit(run)(params, tokens, positions))
  for name in ("ws_1d", "ws_2d+batch_xyz", "wg_xy+batch_z", "wg_xyz"):
    layout = find_layout(name, mesh)

    def inside(*arguments, layout=layout):
      with use_layout(layout, mesh, manual=True):
        return run(*arguments)

    stored = jax.tree.map(lambda s: s.spec, shardings(params, layout, mesh))
    rows = shardings(cache.Spec((64, 3), ("batch", "length"), "int32"), layout, mesh).spec
    out = shardings(cache.Spec((64, 3, 128), ("batch", "length", "act_vocab"), "float32"), layout, mesh).spec
    inside = jax.shard_map(inside, mesh=mesh, in_specs=(stored, rows, rows), out_specs=out, check_vma=False)
    assert_close(np.asarray(jax.jit(inside)(params, tokens, positions)), alone, f"{name} on 64 devices")


REFUSED = {
  "batch": (dict(batch=4, decode_layout="ws_2d+batch_xyz"), "axis 'cache_batch' of size 4 is not divisible by"),
  "rows": (dict(batch=4, prefill_layout="wg_xyz"), "axis 'batch' of size 4 is not divisible by"),
  "weights": (dict(prefill_layout="ws_1d"), "'ws_1d' and decode layout 'ws_2d' store weights in different places"),
  "axes": (dict(decode_layout="megatron"), "'megatron' splits over data, tensor, but the mesh has x, y, z"),
  "heads": (
    dict(config=model(block(4, heads=4)), decode_layout="ws_2d+batch_xyz"),
    "axis 'act_heads' of size 4 is not divisible by mesh axis z\\*y\\*x=8",
  ),
  "loop": (
    dict(mesh="data=2,tensor=4", prefill_layout="megatron+latency", decode_layout="megatron"),
    "'megatron' has no gathers of activations to loop",
  ),
  "name": (dict(decode_layout="ws_2d+batch_xy"), "layout: there is no 'ws_2d\\+batch_xy'; give megatron or one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_layout_is_refused_before_anything_is_compiled(name):
  changes, message = REFUSED[name]
  place = {"config": SHARING, "batch": B, "mesh": "x=2,y=2,z=2"} | changes
  place["mesh"] = mesh_of(place["mesh"])
  with pytest.raises(UserError, match=message):
    make_decoder(max_len=T, chunk=4, sampling=Sampling(), **place)
