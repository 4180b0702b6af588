"""Training over meshes: every product of axes gives one device's numbers, and what it cannot do is refused.

Eight fake devices. Rows are packed documents with padding; sizes are unequal. (Products with `stage` are in
test_pipeline.py.)
"""

import functools
import itertools
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spaces
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from tiers import plain_if

from llmarch.build import build, override, to_dict
from llmarch.config import EmbedConfig, HeadConfig
from llmarch.errors import UserError
from llmarch.layers.attention import QKNorm
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.mask import Bidirectional, Causal, Prefix
from llmarch.layers.moe import TopK
from llmarch.layers.norm import LayerNorm, RMSNorm
from llmarch.layers.param import flatten
from llmarch.layers.position import ALiBi, Learned, T5Bias
from llmarch.models.decoder import abstract
from llmarch.ops import attention, blockwise
from llmarch.ops.attention import Keys
from llmarch.residual import ResidualConfig
from llmarch.run_config import AdamW, Constant, OptimizerConfig, RunConfig, TrainConfig
from llmarch.sharding import TRAINING as AXES
from llmarch.sharding import across_granules, make_mesh, parse_mesh
from llmarch.train import step
from llmarch.train.step import make_train_step

B, T, V = 8, 32, 42


def block(kv_heads: int, *, form="pre", ffn=None, norm=None, **mixer):
  mixer = spaces.attention(**{"num_heads": 8, "num_kv_heads": kv_heads, "head_dim": 6} | mixer)
  form = build(ResidualConfig, form, "residual")
  return spaces.block(mixer, ffn=ffn or MLPConfig(d_ff=40), residual=form, norm=norm or RMSNorm())


def model(block, **changes):
  return spaces.model(block, **{"d_model": 24, "vocab_size": V, "max_seq_len": T} | changes)  # two layers


PLAIN = dict(bias=True, gated=False, activation="gelu")
EXPERTS = dict(expert={"d_ff": 16})
MODELS = {
  "gqa_window": model(block(4, window=9)),
  "mha_sandwich": model(block(8, form="sandwich", softcap=4.0), head=HeadConfig(tied=False, bias=True)),
  "mqa_parallel": model(
    block(1, form="parallel", norm=LayerNorm(), ffn=MLPConfig(d_ff=40, **PLAIN), qkv_bias=True, out_bias=True),
    embed=EmbedConfig(position=Learned(length=T), norm=LayerNorm()),
  ),
  "gqa_parallel": model(block(2, form="parallel_two_norms", qk_norm=QKNorm(norm=RMSNorm(), whole=True))),
  "alibi_sinks": model(block(8, position=ALiBi(), sinks=True, form="output")),
  "t5_prefix": model(block(2, position=T5Bias(num_buckets=6, max_distance=7), mask=Prefix())),
  "latent": model(
    spaces.block(spaces.mla(num_heads=8, q_lora_rank=16, kv_lora_rank=16), ffn=MLPConfig(d_ff=40)),
  ),
  "experts": model(block(4, ffn=spaces.moe(8, router=TopK(k=2, aux_loss=0.1), **EXPERTS))),
  "experts_full": model(block(1, ffn=spaces.moe(8, router=TopK(k=1, capacity_factor=1.5), **EXPERTS))),
}
OPTIONS = {"": {}, "accum": {"grad_accum": 2}, "remat": {"remat": "full"}, "dots": {"remat": "dots", "z_loss": 1e-3}}

CASES = [  # each axis alone, and products; the models and options in turn, each pair of these on several meshes
  ("data=8", "mqa_parallel", "remat"),
  ("fsdp=8", "gqa_window", ""),
  ("tensor=8", "alibi_sinks", ""),
  ("sequence=8", "mha_sandwich", "dots"),
  ("context=8", "gqa_window", ""),
  ("expert=8", "experts", ""),
  ("data=2,fsdp=2,tensor=2", "gqa_parallel", "accum"),
  ("data=2,context=2,tensor=2", "mqa_parallel", "remat"),
  ("fsdp=2,tensor=2,sequence=2", "t5_prefix", ""),
  ("data=2,fsdp=2,context=2", "alibi_sinks", ""),
  ("fsdp=2,context=2,sequence=2", "mha_sandwich", "dots"),
  ("context=2,sequence=2,tensor=2", "latent", ""),
  ("context=4,tensor=2", "t5_prefix", ""),
  ("sequence=4,tensor=2", "mqa_parallel", "remat"),
  ("fsdp=4,tensor=2", "latent", ""),
  ("fsdp=2,context=4", "gqa_parallel", "accum"),
  ("data=4,sequence=2", "gqa_window", ""),
  ("data=2,tensor=4", "mha_sandwich", "dots"),
  ("expert=2,fsdp=2,tensor=2", "experts", ""),
  ("data=2,expert=2,context=2", "experts_full", ""),
  ("data=2,expert=2,sequence=2", "experts", ""),
]
PLAIN_MESHES = {"context=2,sequence=2,tensor=2"}
# Their pairs of axes are in other products too.
NIGHTLY_MESHES = {
  "context=4,tensor=2", "sequence=4,tensor=2", "fsdp=4,tensor=2", "fsdp=2,context=4", "data=4,sequence=2",
  "data=2,tensor=4", "data=2,fsdp=2,context=2",
}  # fmt: skip


def axes_of(text: str) -> set[str]:
  """The axes that a mesh splits anything over."""
  return {axis for axis, size in parse_mesh(text).items() if size > 1}


def in_tiers(cases: list, plain: set[str], nightly: set[str]) -> list:
  """Marks cases that begin with a mesh: none of `plain`, those of `nightly` as nightly, the others as full."""
  tier = lambda mesh: [] if mesh in plain else [pytest.mark.nightly if mesh in nightly else pytest.mark.full]
  return [pytest.param(*case, marks=tier(case[0])) for case in cases]


def experiment(name: str, option: str = "", mesh: str = "", **changes) -> RunConfig:
  train = TrainConfig(batch_size=B, seq_len=T, loss_chunk=8, **OPTIONS[option])
  # An eps near the size of gradients: else Adam's update is the sign of those that are zero but for rounding.
  optimizer = OptimizerConfig(algorithm=AdamW(eps=1e-3), schedule=Constant(), clip_norm=0.5)
  return RunConfig(**dict(model=MODELS[name], train=train, optimizer=optimizer, mesh=mesh) | changes)


def batch():
  """Two documents a row, cut at another place in each, and padding at the end of some."""
  draws = np.random.default_rng(3)
  ids = lambda: draws.integers(0, V, (B, T)).astype(np.int32)
  at, cut, end = np.arange(T), draws.integers(5, T - 8, (B, 1)), draws.integers(T - 5, T + 1, (B, 1))
  positions = np.where(at < end, np.where(at < cut, at, at - cut), -1).astype(np.int32)
  segments = np.where(at < end, np.where(at < cut, 1, 2), 0).astype(np.int32)
  weights, prefix = (positions >= 0).astype(np.float32), (positions >= 0) & (positions < 3)
  rows = dict(tokens=ids(), targets=ids(), positions=positions, segment_ids=segments)
  return rows | dict(loss_weights=weights, prefix=prefix)


def mesh_of(text: str) -> Mesh:
  sizes = parse_mesh(text)
  return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@functools.cache
def outcome(name: str, option: str = "", text: str = ""):
  """The parameters at the start, the state after a step, its metrics, the functions, and the program's text."""
  mesh = mesh_of(text) if text else None
  functions = make_train_step(experiment(name, option, text), mesh)
  state = functions.init()
  start = jax.device_get(state["params"])
  rows = batch() if mesh is None else jax.device_put(batch(), functions.batch_sharding)
  program = functions.step.lower(state, rows).compile()
  state, metrics = program(state, rows)
  return start, state, jax.device_get(metrics), functions, program.as_text()


def assert_near(actual, expected, what: str):
  """Within 1e-5 of a tensor's largest number; where that is rounding itself (a key's bias has no gradient), of all."""
  most = max(float(np.abs(e).max()) for e in jax.tree.leaves(expected))
  for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    bound = 1e-5 * max(float(np.abs(e).max()), 1e-3 * most)
    np.testing.assert_allclose(a, e, rtol=0, atol=bound, err_msg=f"{what} {jax.tree_util.keystr(path)}")


@pytest.mark.parametrize("text, name, option", in_tiers(CASES, PLAIN_MESHES, NIGHTLY_MESHES))
def test_a_train_step_equals_one_device(text, name, option, cases, checked):
  start, state, metrics, functions, _ = outcome(name, option, text)
  alone_start, alone, alone_metrics, *_ = outcome(name, option)
  jax.tree.map(np.testing.assert_array_equal, start, alone_start)
  for key in ("loss", "grad_norm"):
    np.testing.assert_allclose(metrics[key], alone_metrics[key], rtol=1e-5, err_msg=key)
  moments = lambda state: optax_moments(jax.device_get(state["opt_state"]))
  assert_near(moments(state)["mu"], moments(alone)["mu"], "gradient")
  update = lambda state, start: jax.tree.map(np.subtract, jax.device_get(state["params"]), start)
  # An update is the difference of parameters of size 1: their rounding, 6e-8, is 1e-4 of it.
  for (path, a), e in zip(
    jax.tree_util.tree_leaves_with_path(update(state, start)), jax.tree.leaves(update(alone, start)), strict=True
  ):
    np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max() + 2.5e-7, err_msg=jax.tree_util.keystr(path))
  same = lambda x, want: x.sharding.is_equivalent_to(want.sharding, x.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, state, functions.abstract_state)))
  cases("training mesh == one device: start (bitwise), loss, gradients, update")
  axes = [f"mesh.{part.partition('=')[0]}=given" for part in text.split(",")]
  remat = OPTIONS[option].get("remat", "none")
  checked("7", MODELS[name], *axes, f"remat='{remat}'", "packing='documents'")


def test_each_axis_alone_and_each_pair_of_axes_is_in_a_mesh_of_the_tiers():
  """Of the axes without `stage`, whose pairs are in test_pipeline.py; plain `pytest` has every axis."""
  axes = [axis for axis in AXES if axis != "stage"]
  meshes = [axes_of(text) for text, *_ in CASES if text not in NIGHTLY_MESHES]
  assert all({axis} in meshes for axis in axes)
  pairs = {frozenset(pair) for pair in itertools.combinations(axes, 2)}
  assert pairs == {frozenset(pair) for mesh in meshes for pair in itertools.combinations(mesh, 2)}


def optax_moments(opt_state) -> dict:
  (found,) = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
  return {"mu": found.mu, "nu": found.nu}


# Where the names of a parameter's dimensions lie, said once more.
DECLARED = {
  **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "expert_mlp"), "tensor"),
  **dict.fromkeys(("embed", "latent"), "fsdp"),
  "experts": "expert",
}
CUT = {"kv_heads", "vocab"}  # whole where they cannot be split


@pytest.mark.parametrize(
  "text, name", in_tiers([CASES[6][:2], CASES[18][:2]], PLAIN_MESHES, set()), ids=lambda value: value
)
def test_parameters_and_moments_lie_as_declared(text, name):
  option = next(o for t, n, o in CASES if (t, n) == (text, name))
  state = outcome(name, option, text)[1]
  named, mesh = flatten(nnx.state(abstract(MODELS[name])), variables=True), parse_mesh(text)
  moments = optax_moments(state["opt_state"])
  for key, param in named.items():
    shape = param.get_value().shape
    axes = (None,) * (len(shape) - len(param.axes)) + param.axes
    ways = [mesh[DECLARED[a]] if a in DECLARED else 1 for a in axes]
    local = tuple(n if a in CUT and n % w else n // w for n, a, w in zip(shape, axes, ways, strict=True))
    for array in (state["params"][key], moments["mu"][key], moments["nu"][key]):
      assert {s.data.shape for s in array.addressable_shards} == {local}, key


@pytest.mark.full
def test_fsdp_holds_an_nth_of_every_matrix_and_its_moments():
  state = outcome("gqa_window", "", "fsdp=8")[1]
  moments = optax_moments(state["opt_state"])
  for tree in (state["params"], moments["mu"], moments["nu"]):
    matrices = [a for key, a in tree.items() if "norm" not in key]
    here = sum(a.addressable_shards[0].data.nbytes for a in matrices)
    assert here * 8 == sum(a.nbytes for a in matrices)
    assert sum(a.nbytes for a in tree.values()) - here * 8 < 0.02 * here * 8  # norms, which are whole everywhere


@pytest.mark.full
def test_each_axis_has_its_own_collectives():
  """Data alone reduces; fsdp gathers weights, and no activation; sequence exchanges; context passes on."""
  kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
  seen = {}
  for text, name, option in CASES[:5]:
    program = outcome(name, option, text)[-1]
    seen[text] = {kind for kind in kinds if f" {kind}(" in program or f" {kind}-start(" in program}
  assert seen["data=8"] == {"all-reduce"}
  assert "all-gather" in seen["fsdp=8"] and not seen["fsdp=8"] & {"all-to-all", "collective-permute"}
  assert "all-to-all" in seen["sequence=8"] and "collective-permute" in seen["context=8"]
  assert "collective-permute" not in seen["tensor=8"] | seen["sequence=8"]


# ------------------------------------------------------------------------------------------------- the ring


RINGED = ["causal", "window_cap_sinks", "prefix_bias", "bidirectional"]


@pytest.mark.parametrize("kind", plain_if(["window_cap_sinks"].count, RINGED))
def test_a_ring_is_attention_whatever_the_order_of_tokens(kind, cases):
  """Values, entropies and gradients: tokens dealt to four devices in the order that balances causal work."""
  n, N, K, H, U, length = 4, 4, 2, 6, 5, 24
  draws = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(draws.standard_normal(shape), jnp.float32)
  q, k, v, w = normal(2, length, N, H), normal(2, K, length, H), normal(2, K, length, U), normal(2, length, N, U)
  positions = np.stack([np.r_[np.arange(14), np.arange(8), -1, -1], np.arange(24)]).astype(np.int32)
  segments = np.stack([np.r_[np.ones(14), 2 * np.ones(8), 0, 0], np.ones(24)]).astype(np.int32)
  prefix = jnp.asarray((positions >= 0) & (positions < 3)) if kind == "prefix_bias" else None
  keys = Keys(jnp.asarray(positions), jnp.asarray(segments), prefix)
  sinks = normal(N) if "sinks" in kind else None
  table = normal(30, N) if "bias" in kind else None
  bias = (lambda t, d: jnp.moveaxis(t[jnp.clip(-d, 0, 29)], -1, 1)) if "bias" in kind else None
  mask = {"window_cap_sinks": Causal(), "prefix_bias": Prefix(), "causal": Causal()}.get(kind, Bidirectional())
  window, softcap = (7, 2.0) if "cap" in kind else (None, None)

  def plain(q, k, v, sinks, table):
    seen = attention.visible(keys, keys, mask=mask, window=window)
    added = None if bias is None else bias(table, keys.positions[:, None, :] - keys.positions[:, :, None])
    return attention.attend(
      q, k, v, seen, added, sinks, scale=0.4, softcap=softcap, dropout=0.0, key=None, entropy=True
    )

  piece = length // (2 * n)
  pieces = np.arange(length).reshape(2 * n, piece)
  order = np.concatenate([pieces[[i, -1 - i]].ravel() for i in range(n)])
  options = dict(mask=mask, window=window, scale=0.4, softcap=softcap, bias=bias, entropy=True)
  mesh = Mesh(np.array(jax.devices()[:n]), ("context",), axis_types=(AxisType.Auto,))
  rows, heads = P(None, "context"), P(None, None, "context")

  def ring(q, k, v, sinks, table):
    run = lambda q, k, v, keys, sinks, table: blockwise.attend(
      q, k, v, keys, keys, sinks, table, block=piece, ring="context", **options
    )
    run = jax.shard_map(run, mesh=mesh, in_specs=(rows, heads, heads, rows, P(), P()), out_specs=rows, check_vma=False)
    dealt = lambda x, axis: jnp.take(x, order, axis=axis)
    outs = run(dealt(q, 1), dealt(k, 2), dealt(v, 2), jax.tree.map(lambda a: dealt(a, 1), keys), sinks, table)
    return tuple(x[:, np.argsort(order)] for x in outs)

  def with_gradients(f):
    def total(*args):
      outs = f(*args)
      return jnp.sum(outs[0] * w), outs

    given = tuple(i for i, a in enumerate((q, k, v, sinks, table)) if a is not None)
    return jax.jit(jax.value_and_grad(total, argnums=given, has_aux=True))(q, k, v, sinks, table)

  for a, e in zip(jax.tree.leaves(with_gradients(ring)), jax.tree.leaves(with_gradients(plain)), strict=True):
    np.testing.assert_allclose(a, e, rtol=0, atol=2e-6 * float(jnp.abs(e).max()))
  cases("ring attention == attention: values, entropies, gradients")


@pytest.mark.parametrize("ring", [2, 4])
def test_dealt_tokens_balance_causal_work(ring):
  """In order, the last device of four would have seven times the pairs of the first."""
  at = jnp.broadcast_to(jnp.arange(T), (2, T))
  work = lambda x: [int(part.sum()) + part.size for part in jnp.split(x[0], ring)]
  assert len(set(work(step._dealt(at, ring)))) == 1 < len(set(work(at)))
  assert sorted(step._dealt(at, ring)[0].tolist()) == list(range(T))


def test_what_counts_tokens_keeps_their_order():
  """Experts with a capacity take the first tokens of a row, and dropout draws by place."""
  assert step._in_order(MODELS["experts_full"]) and step._in_order(spaces.HAND["gpt2"])
  assert not any(step._in_order(MODELS[name]) for name in ("gqa_window", "latent", "experts"))


# ------------------------------------------------------------------------------------------------ the machine


def fake(slice_index: int, process: int, platform="tpu"):
  return types.SimpleNamespace(slice_index=slice_index, process_index=process, platform=platform)


def test_the_leading_axes_go_between_slices_and_processes():
  slices = [fake(i // 4, i // 2) for i in range(16)]  # 4 slices of 2 processes of 2 chips
  hosts = [fake(0, i // 8, "gpu") for i in range(16)]
  assert across_granules(parse_mesh("data=2,stage=2,tensor=4"), slices) == [2, 2, 1, 1, 1, 1, 1]
  assert across_granules(parse_mesh("data=8,tensor=2"), slices) == [4, 1, 1, 1, 1, 1, 1]
  assert across_granules(parse_mesh("fsdp=4,tensor=4"), hosts) == [1, 1, 2, 1, 1, 1, 1]
  assert across_granules(parse_mesh("fsdp=16"), [fake(0, i) for i in range(16)]) is None  # one slice: one network
  with pytest.raises(UserError, match=r"data=3,tensor=8 cannot be cut into 4 slices; give its leading axes sizes"):
    across_granules(parse_mesh("data=3,tensor=8"), slices)


# -------------------------------------------------------------------------------------------------- bad input

BLOCK = "model.blocks.a"
# Changes to a good config, and what the sentence names: the field, its value, and what would do.
BAD_MESHES = {
  "dta=2": "names the axis 'dta'; did you mean 'data'",
  "Data=2": "names the axis 'Data'; did you mean 'data'",
  "=2": "names the axis ''",
  "data:2": "names the axis 'data:2'",
  "data=0": "cannot read 'data=0'; write an axis as data=N, with N from 1",
  "data=-1": "cannot read 'data=-1'",
  "data=1.5": "cannot read 'data=1.5'",
  "data=1e3": "cannot read 'data=1e3'",
  "data=": "cannot read 'data='",
  "data": "cannot read 'data'",
  "data=\u0662": "cannot read 'data=\u0662'",
  "data=2;tensor=2": "cannot read 'data=2;tensor=2'",
  "data=99999999999": "cannot read 'data=99999999999'",
  "data=1048577": "covers 1048577 devices, more than the 1048576",
  "data=2,data=4": "gives data twice",
  "x=2": "has the axes x, y, z of inference; training has data, stage, fsdp, expert, context, sequence, tensor",
  "data=2,x=2": "mixes axes; give either data,stage,fsdp,expert,context,sequence,tensor or x,y,z",
  "data=3": "train.batch_size/train.grad_accum=8 is not divisible by mesh data=3, which splits the batch",
  "data=2,fsdp=8": "train.batch_size/train.grad_accum=8 is not divisible by mesh data*fsdp=16",
  "tensor=5": "train.seq_len=32 is not divisible by mesh tensor=5, which splits the length; make it a multiple of 5",
  "context=16,tensor=4": "train.seq_len=32 is not divisible by mesh context*tensor=64",
  "context=32": "train.seq_len=32 is not divisible by mesh context wants 2 pieces each, 64",
  "tensor=16": f"{BLOCK}.mixer.num_heads=8 is not divisible by mesh tensor=16",
  "sequence=16": "num_heads=8 is not divisible by mesh sequence=16, which splits heads in attention (an all-to-all",
  "tensor=4,sequence=4": "num_heads=8 is not divisible by mesh tensor*sequence=16",
  "expert=2": "mesh expert=2 has no experts to split: no block has a moe; use data or fsdp",
  "stage=3": "model.stack='2*a' repeats 'a' 2 times, which mesh stage=3 with train.circuits=1 cannot share",
  "stage=2,data=8": "train.batch_size=8 must be a multiple of 16",
}
BAD = {
  **{f"mesh {text}": ({"mesh": repr(text)}, says) for text, says in BAD_MESHES.items()},
  "mesh, a number": ({"mesh": "4"}, "config.mesh must be of type str, got 4"),
  "mesh, nothing": ({"mesh": "none"}, "config.mesh must be of type str, got None"),
  "micro-batches": ({"mesh": "'data=8'", "train.grad_accum": "2"}, "grad_accum=4 is not divisible by mesh data=8"),
  "width": (
    {"mesh": "'fsdp=16'", "train.batch_size": "16"},
    "model.d_model=24 is not divisible by mesh fsdp=16, which splits the parameters",
  ),
  "hidden": ({"mesh": "'tensor=4'", f"{BLOCK}.ffn.d_ff": "42"}, "ffn.d_ff=42 is not divisible by mesh tensor=4"),
  "shared heads": (
    {"mesh": "'tensor=2'", f"{BLOCK}.mixer.num_heads": "12", f"{BLOCK}.mixer.num_kv_heads": "3"},
    "gives a device 6 heads, neither a multiple nor a divisor of the 4 that share one of num_kv_heads=3",
  ),
  "experts": ({"mesh": "'expert=4'", f"{BLOCK}.ffn": "MOE"}, "num_experts=6 is not divisible by mesh expert=4"),
  "expert width": ({"mesh": "'tensor=8'", f"{BLOCK}.ffn": "MOE"}, "expert.d_ff=20 is not divisible by mesh tensor=8"),
  "ring and dropout": (
    {"mesh": "'context=2'", f"{BLOCK}.mixer.dropout": "0.1"},
    "mixer.dropout=0.1 is not for mesh context=2: a ring keeps no weights to drop; set it to 0",
  ),
  "circuits": ({"mesh": "'stage=2'", "train.circuits": "2"}, "make the repeats of every term a multiple of 4"),
  "no circuits": ({"train.circuits": "2"}, "train.circuits=2 is of a pipeline, and the mesh has no stages"),
  "no microbatches": ({"train.microbatches": "2"}, "train.microbatches=2 is of a pipeline, and the mesh has no stages"),
  "odd microbatches": ({"mesh": "'stage=2'", "train.microbatches": "3"}, "train.microbatches=3 must be a multiple of"),
  "many microbatches": ({"mesh": "'stage=2'", "train.microbatches": "16"}, "batch_size=8 must be a multiple of 16"),
  "offload": ({"mesh": "'stage=2'", "train.remat": "offload"}, "train.remat='offload' is not for a pipeline"),
  "heads % kv": ({f"{BLOCK}.mixer.num_kv_heads": "3"}, "num_heads=8 must be a multiple of num_kv_heads=3"),
  "no heads": ({f"{BLOCK}.mixer.num_heads": "0"}, "num_heads must be at least 1, got 0"),
  "typo": ({"train.bach_size": "8"}, "config.train.bach_size: no such key; did you mean 'batch_size'"),
  "typo in a block": ({f"{BLOCK}.mixer.num_head": "4"}, "num_head: no such key; did you mean 'num_heads'"),
  "typo in a word": ({"train.remat": "ful"}, "config.train.remat: unknown value 'ful'; did you mean 'full'"),
  "other word": ({"train.loss": "mlm"}, "config.train.loss: unknown value 'mlm'"),
  "a half": ({"train.batch_size": "8.5"}, "config.train.batch_size must be of type int, got 8.5"),
  "a word": ({"train.batch_size": "eight"}, "config.train.batch_size must be of type int, got 'eight'"),
  "no steps": ({"train.steps": "0"}, "steps must be at least 1, got 0"),
  "negative": ({"train.seq_len": "-32"}, "seq_len must be at least 1, got -32"),
  "too long": ({"train.seq_len": "64"}, "train.seq_len=64 is longer than model.max_seq_len=32"),
  "accumulation": ({"train.grad_accum": "3"}, "batch_size=8 must be a multiple of grad_accum=3"),
  "nan": ({"optimizer.learning_rate": "nan"}, "config.optimizer.learning_rate must be a finite number, got nan"),
  "inf": ({"train.z_loss": "inf"}, "config.train.z_loss must be a finite number, got inf"),
  "negative rate": ({"optimizer.learning_rate": "-1"}, "learning_rate must be at least 0, got -1"),
  "zero clip": ({"optimizer.clip_norm": "0"}, "clip_norm must be greater than 0, got 0.0"),
  "average": ({"train.ema": "1.5"}, "ema must lie between 0 and 1, got 1.5"),
  "seed": ({"seed": "-1"}, "seed must be at least 0, got -1"),
  "vocabulary": ({"model.vocab_size": "0"}, "vocab_size must be at least 1, got 0"),
  "stack": ({"model.stack": "'2*b'"}, "stack names the block 'b', which is not in blocks"),
  "stack's end": ({"model.stack": "'2*(a'"}, "a '(' is never closed"),
  "kind": ({f"{BLOCK}.norm": "rmsnrm"}, "unknown kind 'rmsnrm'; did you mean 'rmsnorm'"),
}


def test_there_are_60_bad_configs():
  assert len(BAD) >= 60


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_refused_with_its_field_and_value(name, cases):
  """As the config is built: from it alone, before anything asks for a device."""
  changes, says = BAD[name]
  moe = repr({"kind": "moe", "num_experts": 6, "expert": {"d_ff": 20}})
  changes = [(key, moe if value == "MOE" else value) for key, value in changes.items()]
  with pytest.raises(UserError) as refused:
    build(RunConfig, override(to_dict(experiment("gqa_window")), changes), "config")
  assert says in str(refused.value) and "\n" not in str(refused.value), refused.value
  cases("R20 bad configs refused by name")


def test_a_bad_mesh_is_refused_before_jax_has_a_device():
  """By the command itself, whatever else is right; the control is a program that does ask for devices."""
  script = """
import sys
from llmarch.__main__ import main
from jax._src import xla_bridge
for mesh in sys.argv[1:]:
  assert main(["train", "--config=configs/tiny.py", "--workdir=unused", f"--config.mesh={mesh}"]) == 2, mesh
  assert not xla_bridge.backends_are_initialized()
import jax
jax.devices()
assert xla_bridge.backends_are_initialized()
"""
  meshes = "dta=2 data=5 tensor=7 x=2 stage=7 expert=2 data=2,data=2 context=1000 data=1048577".split()
  run = subprocess.run([sys.executable, "-c", script, *meshes], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  lines = run.stderr.splitlines()
  assert len(lines) == len(meshes) and all("mesh" in line for line in lines), run.stderr
