"""The configs that the invariants range over: a list by hand, hypothesis draws, and the presets made small.

Sizes are tiny and unequal, so that a transposed axis cannot pass.
"""

import contextlib
import dataclasses
import functools
import typing
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from llmarch.build import to_dict
from llmarch.config import BlockConfig, EmbedConfig, FanIn, HeadConfig, ModelConfig, Normal, Xavier
from llmarch.layers.attention import AttentionConfig, QKNorm
from llmarch.layers.context import make_context
from llmarch.layers.cross import CrossAttentionConfig
from llmarch.layers.ffn import Activation, MLPConfig
from llmarch.layers.linear import LinearConfig
from llmarch.layers.mask import Bidirectional, Causal, Prefix
from llmarch.layers.mla import MLAConfig
from llmarch.layers.moe import ExpertChoice, Groups, MoEConfig, TopK
from llmarch.layers.norm import LayerNorm, RMSNorm, ScaleNorm
from llmarch.layers.position import (
  NTK,
  ALiBi,
  DynamicNTK,
  Interpolation,
  Learned,
  Llama3Scaling,
  LongRoPE,
  RoPE,
  Sinusoidal,
  T5Bias,
  XPos,
  YaRN,
)
from llmarch.layers.site import Site
from llmarch.presets import PRESETS, shrink
from llmarch.residual import Output, Parallel, ParallelTwoNorms, Post, Pre, Sandwich

MAX_LEN = 24  # of every config here

# ----------------------------------------------------------------------------------------- a list by hand


def attention(**changes) -> AttentionConfig:
  return AttentionConfig(**{"num_heads": 6, "num_kv_heads": 2, "head_dim": 10, "position": RoPE()} | changes)


def mla(**changes) -> MLAConfig:
  sizes = dict(num_heads=3, q_lora_rank=14, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8)
  return MLAConfig(**sizes | changes)


def moe(num_experts: int = 5, router=None, expert: dict | None = None, **changes) -> MoEConfig:
  expert = MLPConfig(**{"d_ff": 14} | (expert or {}))
  return MoEConfig(num_experts=num_experts, expert=expert, router=router or TopK(), **changes)


def block(mixer=None, **changes) -> BlockConfig:
  return BlockConfig(**{"mixer": mixer or attention(), "ffn": MLPConfig(d_ff=28), "norm": RMSNorm()} | changes)


def model(*blocks: BlockConfig, **changes) -> ModelConfig:
  """Blocks a, b, c ... in one segment, run twice where there is but one."""
  names = "abcdef"[: len(blocks)]
  sizes = {"d_model": 18, "vocab_size": 40, "max_seq_len": MAX_LEN, "final_norm": RMSNorm()}
  stack = {"stack": "2*a" if len(blocks) == 1 else " ".join(names)}
  return ModelConfig(blocks=dict(zip(names, blocks, strict=True)), **sizes | stack | changes)


def encoder(**changes) -> ModelConfig:
  """What the cross-attentions of these configs read: of another width than the decoders."""
  return ModelConfig(
    d_model=14,
    vocab_size=30,
    max_seq_len=MAX_LEN,
    stack="2*e",
    blocks={"e": block(attention(num_heads=4, mask=Bidirectional()), ffn=MLPConfig(d_ff=20))},
    final_norm=RMSNorm(),
    **changes,
  )


def _rope(**kwargs) -> BlockConfig:
  return block(attention(position=RoPE(**kwargs)))


HAND: dict[str, ModelConfig] = {
  "llama": model(block()),
  "ministral3": model(block(attention(query_growth=0.4, growth_every=4))),
  "gpt2": model(
    block(
      AttentionConfig(num_heads=3, qkv_bias=True, out_bias=True),
      norm=LayerNorm(),
      ffn=MLPConfig(d_ff=20, activation="gelu_tanh", gated=False, bias=True),
      output_init_scale=0.5,
      dropout=0.1,
    ),
    embed=EmbedConfig(position=Learned(length=MAX_LEN + 2), dropout=0.1),
    init=Normal(),
    final_norm=LayerNorm(),
  ),
  "the_original": model(
    block(
      AttentionConfig(num_heads=3, num_kv_heads=3, dropout=0.1),
      norm=LayerNorm(),
      ffn=MLPConfig(d_ff=20, activation="relu", gated=False),
      residual=Post(),
    ),
    embed=EmbedConfig(position=Sinusoidal(), scale=18**0.5),
    init=Xavier(),
    final_norm=None,
  ),
  "deepnorm": model(
    block(residual=Post(), skip_scale=1.7, init_scale=0.4, norm=LayerNorm(zero_centered=True, bias=False)),
    init=Xavier(gain=1.2),
    final_norm=None,
  ),
  "gemma2": model(
    block(
      attention(window=5, softcap=5.0, query_scale=0.3),
      norm=RMSNorm(zero_centered=True),
      residual=Sandwich(),
      ffn=MLPConfig(d_ff=22, activation="gelu_tanh"),
    ),
    block(attention(softcap=5.0, position=None), residual=Sandwich(), ffn=MLPConfig(d_ff=22, activation="gelu")),
    stack="2*(a b)",
    embed=EmbedConfig(scale=18**0.5),
    head=HeadConfig(softcap=3.0),
  ),
  "olmo": model(
    block(attention(qkv_clip=0.4), norm=LayerNorm(scale=False, bias=False)), final_norm=LayerNorm(bias=False)
  ),
  "opt_350m": model(
    block(
      AttentionConfig(num_heads=3, qkv_bias=True, out_bias=True),
      norm=LayerNorm(scale=False),
      ffn=MLPConfig(d_ff=20, activation="relu", gated=False, bias=True),
      residual=Post(),
    ),
    embed=EmbedConfig(dim=10, scale=1.3, position=Learned(length=MAX_LEN, offset=2)),
    head=HeadConfig(tied=False),
    final_norm=None,
  ),
  "cohere": model(
    block(attention(qk_norm=QKNorm(norm=LayerNorm(bias=False), per_head=True)), residual=Parallel()),
    block(attention(qk_norm=QKNorm(norm=ScaleNorm(), per_head=True), qkv_clip=0.6)),
    embed=EmbedConfig(dim=22),
  ),
  "olmo2": model(block(attention(qk_norm=QKNorm(norm=RMSNorm(), whole=True)), residual=Output())),
  "qwen3": model(block(attention(qk_norm=QKNorm(norm=RMSNorm()))), head=HeadConfig(tied=False)),
  "gptj": model(
    block(
      attention(num_kv_heads=None, position=RoPE(dims=4, interleaved=True)),
      residual=Parallel(),
      norm=LayerNorm(),
      ffn=MLPConfig(d_ff=20, activation="gelu_tanh", gated=False, bias=True),
    ),
    head=HeadConfig(tied=False, bias=True),
  ),
  "palm": model(block(attention(num_kv_heads=1), residual=Parallel(), norm=LayerNorm(bias=False), dropout=0.1)),
  "neox": model(
    block(
      attention(qkv_bias=True, position=RoPE(dims=6)),
      residual=ParallelTwoNorms(),
      norm=LayerNorm(),
      ffn=MLPConfig(d_ff=20, activation="relu2", gated=False),
    )
  ),
  "granite": model(
    block(branch_scale=0.22, norm=RMSNorm(eps=1e-3)), embed=EmbedConfig(scale=12.0), head=HeadConfig(scale=0.125)
  ),
  "bloom": model(
    block(attention(num_kv_heads=None, position=ALiBi()), norm=LayerNorm()), embed=EmbedConfig(norm=LayerNorm())
  ),
  "alibi_windows": model(
    block(attention(position=ALiBi(max_bias=4.0), window=3), ffn=MLPConfig(d_ff=22, activation="identity")),
    block(attention(num_heads=3, num_kv_heads=1, position=ALiBi()), ffn=MLPConfig(d_ff=26, activation="relu")),
    stack="a 2*b",
    init=FanIn(gain=0.7),
  ),
  "t5": model(
    block(attention(num_kv_heads=None, position=T5Bias(num_buckets=8, max_distance=10), query_scale=1.0)),
    block(attention(position=T5Bias(num_buckets=6, max_distance=7)), norm=ScaleNorm()),
    stack="2*a b",
  ),
  "encoder": model(
    block(attention(mask=Bidirectional(), position=T5Bias(num_buckets=8, max_distance=10))),
    block(attention(mask=Bidirectional(), window=4, sinks=True), ffn=MLPConfig(d_ff=22, activation="sigmoid")),
  ),
  "prefix": model(
    block(attention(mask=Prefix())), block(attention(mask=Prefix(), window=4, position=ALiBi())), block(ffn=None)
  ),
  "sinks": model(block(attention(sinks=True, window=4)), block(attention(sinks=True, position=None), ffn=None)),
  "scalenorm": model(block(attention(qk_norm=QKNorm(norm=ScaleNorm())), norm=ScaleNorm()), final_norm=ScaleNorm()),
  "xpos": model(
    block(attention(position=XPos(scale_base=8.0))),
    block(attention(position=XPos(dims=6, interleaved=False, theta=100.0))),
  ),
  "linear": model(_rope(scaling=Interpolation(factor=4.0))),
  "ntk": model(_rope(scaling=NTK(factor=4.0), theta=500.0)),
  "dynamic_ntk": model(_rope(scaling=DynamicNTK(factor=4.0, original=4))),
  "yarn": model(
    _rope(scaling=YaRN(factor=4.0, original=64, beta_fast=8.0), theta=100.0),
    _rope(scaling=YaRN(factor=8.0, original=200, beta_slow=2.0, attention_factor=0.9, truncate=False)),
  ),
  "llama3": model(
    _rope(scaling=Llama3Scaling(factor=8.0), theta=5e5),
    _rope(scaling=Llama3Scaling(factor=8.0, original=100, low_factor=2.0, high_factor=9.0)),
  ),
  "longrope": model(
    _rope(
      scaling=LongRoPE(
        short_factors=(1.0, 1.1, 1.3, 1.5, 1.6), long_factors=(1.0, 1.5, 2.5, 4.0, 8.0), original=4, factor=8.0
      )
    ),
    _rope(
      dims=4,
      interleaved=True,
      scaling=LongRoPE(
        short_factors=(1.0, 1.0), long_factors=(2.0, 3.0), original=16, factor=2.0, attention_factor=1.2
      ),
    ),
  ),
  "mla": model(
    block(
      mla(
        position=RoPE(interleaved=True, scaling=YaRN(factor=8.0, original=16, attention_factor=1.0)),
        mscale_all_dim=0.7,
        dropout=0.1,
      )
    ),
    block(mla(q_lora_rank=None, query_scale=0.5, position=RoPE(), latent_norm=LayerNorm()), ffn=None),
    block(attention(window=3), residual=Parallel()),
    stack="2*(a b) c",
  ),
  "linear_attention": model(
    block(LinearConfig(num_heads=3, head_dim=10, chunk=5)), block(LinearConfig(num_heads=2), ffn=None), block()
  ),
  "shared_kv": model(
    block(attention(keep_kv="low", qk_norm=QKNorm(norm=RMSNorm(), per_head=True), qkv_bias=True)),
    block(attention(kv_from="low", window=4, num_heads=4, qk_norm=QKNorm(norm=RMSNorm(), per_head=True))),
    block(attention(keep_kv="high", window=6, position=ALiBi()), ffn=None),
    block(attention(kv_from="high", window=3, position=ALiBi(), qkv_bias=True)),
    stack="2*(a b) c 2*(d b)",
  ),
  "encoder_decoder": model(
    block(cross=CrossAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, memory_dim=14, max_source_len=9)),
    block(
      cross=CrossAttentionConfig(
        num_heads=2, memory_dim=14, bias=True, out_bias=True, qk_norm=RMSNorm(), query_scale=0.3, max_source_len=8
      ),
      residual=Post(),
      dropout=0.1,
      ffn=None,
    ),
    block(cross=CrossAttentionConfig(num_heads=3, memory_dim=14, max_source_len=9, dropout=0.1), residual=Parallel()),
    encoder=encoder(),
    stack="2*(a b) c",
  ),
  "mixtral": model(block(ffn=moe()), stack="3*a"),
  # No expert runs out of places: that a state drops nothing makes no difference. tests/test_moe.py has what is dropped.
  "switch": model(
    block(ffn=MLPConfig(d_ff=22, activation="relu", gated=False)),
    block(
      ffn=moe(
        4,
        TopK(k=1, renormalize=False, capacity_factor=4.0, jitter=0.1, aux_loss=0.01, z_loss=0.001),
        {"activation": "relu", "gated": False},
      )
    ),
    stack="2*(a b)",
  ),
  "qwen2_moe": model(
    block(
      ffn=moe(6, TopK(k=3, renormalize=False), {"d_ff": 10}, shared=MLPConfig(d_ff=26), shared_gate=True),
      residual=Parallel(),
    )
  ),
  "deepseek": model(
    block(),
    block(
      ffn=moe(
        8,
        TopK(
          k=3, scores="sigmoid", scale=2.5, groups=Groups(num=4, top=2), balance_rate=0.001, sequence_loss=0.1
        ),
        {"d_ff": 10},
        shared=MLPConfig(d_ff=12),
      )
    ),
    block(
      ffn=moe(
        12, TopK(k=3, renormalize=False, scale=1.5, groups=Groups(num=3, top=2, score="max")), shared=MLPConfig(d_ff=12)
      ),
      init_scale=0.8,
      output_init_scale=0.6,
    ),
    stack="a 2*b c",
    init=Xavier(),
  ),
  "gpt_oss": model(
    block(
      attention(sinks=True, window=4), ffn=moe(7, TopK(k=4, bias=True), {"activation": "swiglu_oss", "bias": True})
    ),
    block(ffn=MLPConfig(d_ff=22, activation="swiglu_oss")),
  ),
  "expert_choice": model(block(ffn=moe(4, ExpertChoice(capacity_factor=1.7))), block()),
  "hybrid": model(
    block(attention(window=3, position=RoPE(theta=100.0))),
    block(AttentionConfig(num_heads=2, position=ALiBi()), residual=Parallel(), norm=LayerNorm()),
    block(AttentionConfig(num_heads=6, num_kv_heads=3, position=T5Bias(num_buckets=4, max_distance=6)), ffn=None),
    stack="2*(a a b) c",
  ),
}



def completed(config: ModelConfig, blocks: dict[str, BlockConfig], stack: str) -> ModelConfig:
  """The config with other blocks, and with what these need of others: an encoder, if there is a cross-attention; and
  for a block that reads kept keys and values, one that keeps them, under it all."""
  made, under = {}, []
  for name, block in blocks.items():
    mixer = block.mixer
    if mixer.keeps:
      mixer = dataclasses.replace(mixer, keep_kv=name)  # two blocks may not keep one name
    if mixer.reads_kept:
      under.append(f"under_{name}")
      keeps = dataclasses.replace(mixer, kv_from=None, keep_kv=under[-1])
      made[under[-1]] = dataclasses.replace(block, mixer=keeps)
      mixer = dataclasses.replace(mixer, kv_from=under[-1])
    made[name] = dataclasses.replace(block, mixer=mixer)
  memory = next((b.cross.memory_dim for b in blocks.values() if b.cross), None)
  reads = None if memory is None else config.encoder or encoder()
  return dataclasses.replace(config, blocks=made, stack=" ".join([*under, stack]), encoder=reads)


# ---------------------------------------------------------------------------------------- hypothesis draws

_maybe = lambda strategy: st.none() | strategy
_scale = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0])
_activation = st.sampled_from(Activation.__args__)
_init = st.one_of(
  st.builds(FanIn, gain=st.sampled_from([0.5, 1.0])),
  st.builds(Normal, stddev=st.sampled_from([0.02, 0.1])),
  st.builds(Xavier, gain=st.sampled_from([0.5, 1.0])),
)
_norm = st.one_of(
  st.builds(RMSNorm, eps=st.sampled_from([1e-6, 1e-3]), zero_centered=st.booleans()),
  st.builds(LayerNorm, eps=st.sampled_from([1e-5, 1e-3]), bias=st.booleans(), zero_centered=st.booleans()),
  st.builds(LayerNorm, scale=st.just(False), bias=st.booleans()),
  st.builds(ScaleNorm, eps=st.sampled_from([1e-6, 1e-3])),
)
_qk_norm = st.one_of(
  st.builds(QKNorm, norm=_norm, whole=st.booleans()), st.builds(QKNorm, norm=_norm, per_head=st.just(True))
)


@st.composite
def _mlp(draw):
  activation, gated = draw(_activation), draw(st.booleans())
  return MLPConfig(
    d_ff=draw(st.integers(8, 40)),
    activation=activation,
    gated=gated or activation == "swiglu_oss",
    bias=draw(st.booleans()),
  )


def with_room(config: ModelConfig) -> ModelConfig:
  """The config with room for every token in every expert: a capacity of c n / E is that of all n tokens where c is E.

  What a decoding state never drops, a whole row may: their results are the same only where nothing is dropped.
  """

  def roomy(block: BlockConfig) -> BlockConfig:
    router = getattr(block.ffn, "router", None)
    if not isinstance(router, TopK) or router.capacity_factor is None:
      return block
    router = dataclasses.replace(router, capacity_factor=max(router.capacity_factor, float(block.ffn.num_experts)))
    return dataclasses.replace(block, ffn=dataclasses.replace(block.ffn, router=router))

  return dataclasses.replace(config, blocks={name: roomy(block) for name, block in config.blocks.items()})


@st.composite
def _moe(draw):
  """No expert runs out of places (see `HAND`)."""
  num = draw(st.integers(1, 4))
  experts = num * draw(st.integers(1, 3))
  top = draw(st.integers(1, num))
  of_groups = st.just("max") if experts == num else st.sampled_from(["max", "top2"])
  groups = draw(_maybe(st.builds(Groups, num=st.just(num), top=st.just(top), score=of_groups)))
  token_choice = st.builds(
    TopK,
    k=st.integers(1, experts // num * top if groups else experts),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    renormalize=st.booleans(),
    scale=_scale,
    bias=st.booleans(),
    groups=st.just(groups),
    balance_rate=_maybe(st.just(0.01)),
    capacity_factor=_maybe(st.just(float(experts))),
  )
  expert_choice = st.builds(ExpertChoice, capacity_factor=st.sampled_from([0.5, 1.0]))
  shared = draw(_maybe(_mlp()))
  return MoEConfig(
    num_experts=experts,
    expert=draw(_mlp()),
    router=draw(st.one_of(*[token_choice] * 5, expert_choice)),
    shared=shared,
    shared_gate=shared is not None and draw(st.booleans()),
  )


_theta = st.sampled_from([10.0, 100.0, 10000.0, 5e5])


@st.composite
def _scaling(draw, dims: int):
  factor = st.sampled_from([1.0, 2.0, 8.0])
  divisors = st.tuples(*[st.sampled_from([0.9, 1.0, 1.5, 4.0])] * (dims // 2))
  gain = _maybe(st.sampled_from([0.8, 1.2]))
  kinds = [
    st.builds(Interpolation, factor=factor),
    st.builds(
      YaRN,
      factor=factor,
      original=st.integers(16, 200),
      beta_fast=st.sampled_from([4.0, 32.0]),
      attention_factor=gain,
      truncate=st.booleans(),
    ),
    st.builds(Llama3Scaling, factor=factor, original=st.integers(8, 100), high_factor=st.sampled_from([2.0, 4.0])),
    st.builds(
      LongRoPE,
      short_factors=divisors,
      long_factors=divisors,
      original=st.integers(2, 16),
      factor=factor,
      attention_factor=gain,
    ),
  ]
  if dims > 2:
    kinds += [
      st.builds(NTK, factor=factor),
      st.builds(DynamicNTK, factor=factor, original=st.integers(2, 16)),
    ]
  return draw(draw(st.sampled_from(kinds)))


@st.composite
def _position(draw, head_dim: int):
  kinds = [
    st.none(),
    st.builds(ALiBi, max_bias=st.sampled_from([4.0, 8.0])),
    st.builds(T5Bias, num_buckets=st.sampled_from([4, 6, 8]), max_distance=st.integers(5, 16)),
  ]
  if head_dim >= 2:
    dims = draw(st.integers(1, head_dim // 2)) * 2
    given_dims = st.none() if head_dim % 2 == 0 and dims == head_dim else st.just(dims)
    rope = st.builds(RoPE, theta=_theta, dims=given_dims, interleaved=st.booleans(), scaling=_maybe(_scaling(dims)))
    kinds += [
      *[rope] * 4,
      st.builds(
        XPos,
        theta=_theta,
        dims=given_dims,
        interleaved=st.booleans(),
        scale_base=st.sampled_from([4.0, 512.0]),
      ),
    ]
  return draw(draw(st.sampled_from(kinds)))


@st.composite
def _attention(draw, d_model: int):
  kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
  heads = kv * group
  head_dim = draw(st.integers(3, 12))
  if d_model % heads == 0 and draw(st.booleans()):
    head_dim = None
  return AttentionConfig(
    num_heads=heads,
    num_kv_heads=None if group == 1 and draw(st.booleans()) else kv,
    head_dim=head_dim,
    position=draw(_position(head_dim or d_model // heads)),
    mask=draw(st.sampled_from([*[Causal()] * 7, *[Prefix()] * 2, Bidirectional()])),
    window=draw(_maybe(st.integers(1, 8))),
    qkv_bias=draw(st.booleans()),
    out_bias=draw(st.booleans()),
    qk_norm=draw(_maybe(_qk_norm)),
    qkv_clip=draw(_maybe(st.sampled_from([0.3, 1.0]))),
    query_scale=draw(_maybe(st.sampled_from([0.1, 0.5]))),
    softcap=draw(_maybe(st.sampled_from([1.0, 10.0]))),
    sinks=draw(st.booleans()),
    dropout=draw(st.sampled_from([0.0, 0.1])),
  )


@st.composite
def _mla(draw):
  dims = 2 * draw(st.integers(1, 4))
  kinds = [RoPE(theta=draw(_theta), interleaved=draw(st.booleans()), scaling=draw(_maybe(_scaling(dims))))] * 4
  position = draw(st.sampled_from([*kinds, XPos(theta=draw(_theta), scale_base=draw(st.sampled_from([4.0, 512.0])))]))
  has_yarn = isinstance(getattr(position, "scaling", None), YaRN)
  return MLAConfig(
    num_heads=draw(st.integers(1, 5)),
    q_lora_rank=draw(_maybe(st.integers(4, 16))),
    kv_lora_rank=draw(st.integers(3, 16)),
    qk_nope_head_dim=draw(st.integers(1, 8)),
    qk_rope_head_dim=dims,
    v_head_dim=draw(st.integers(2, 9)),
    latent_norm=draw(_norm),
    position=position,
    query_scale=draw(_maybe(st.sampled_from([0.1, 0.5]))),
    mscale_all_dim=draw(_maybe(st.sampled_from([0.7, 1.0]))) if has_yarn else None,
    dropout=draw(st.sampled_from([0.0, 0.1])),
  )


@st.composite
def _block(draw, d_model: int):
  ffn = draw(_maybe(st.one_of(_mlp(), _mlp(), _moe())))
  forms = [Pre(), Post(), Sandwich(), Output()] + ([Parallel(), ParallelTwoNorms()] if ffn else [])
  return BlockConfig(
    mixer=draw(st.one_of(*[_attention(d_model)] * 4, _mla())),
    ffn=ffn,
    norm=draw(_norm),
    residual=draw(st.sampled_from(forms)),
    skip_scale=draw(_scale),
    branch_scale=draw(_scale),
    dropout=draw(st.sampled_from([0.0, 0.1])),
    init_scale=draw(_scale),
    output_init_scale=draw(_scale),
  )


STACKS = {
  "a": ["a", "2*a", "3*a"],
  "ab": ["a b", "2*(a b)", "2*a b", "a 2*b", "a b a"],
  "abc": ["a b c", "2*a b c", "c (a b) a", "a 2*(b) c"],
}


@st.composite
def model_configs(draw) -> ModelConfig:
  d_model = draw(st.integers(12, 32))
  names = draw(st.sampled_from(sorted(STACKS)))
  positions = [st.none(), st.builds(Learned, length=st.integers(MAX_LEN, MAX_LEN + 3), offset=st.sampled_from([0, 2]))]
  if d_model % 2 == 0:
    positions.append(st.builds(Sinusoidal))
  return ModelConfig(
    d_model=d_model,
    vocab_size=draw(st.integers(33, 45)),
    max_seq_len=MAX_LEN,
    stack=draw(st.sampled_from(STACKS[names])),
    blocks={name: draw(_block(d_model)) for name in names},
    embed=EmbedConfig(
      scale=draw(_scale),
      norm=draw(_maybe(_norm)),
      position=draw(st.one_of(positions)),
      dropout=0.1,
      dim=draw(_maybe(st.integers(8, 20))),
    ),
    head=HeadConfig(
      tied=draw(st.booleans()),
      bias=draw(st.booleans()),
      scale=draw(_scale),
      softcap=draw(_maybe(st.sampled_from([2.0, 30.0]))),
    ),
    final_norm=draw(_maybe(_norm)),
    init=draw(_init),
    embed_init=draw(_init),
  )


GROUP = 50


@contextlib.contextmanager
def draws_alike():
  """Hypothesis also draws constants that it finds in the loaded modules. Without them, what it draws depends neither on
  the tests that run beside nor on an edit elsewhere."""
  found = providers._get_local_constants
  providers._get_local_constants = providers.Constants
  providers.CONSTANTS_CACHE.cache.clear()
  try:
    yield
  finally:
    providers._get_local_constants = found
    providers.CONSTANTS_CACHE.cache.clear()


@functools.cache
def _drawn(group: int) -> list[ModelConfig]:
  """GROUP configs, the same on every run.

  It begins with the simplest and varies each fresh draw a few times before the next; of such neighbours few
  are kept: a compilation is better spent on a fresh one."""
  found = {}

  @seed(group)
  @settings(
    max_examples=4 * GROUP,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
  )
  @given(model_configs())
  def collect(config):
    found[config] = None

  with draws_alike():
    collect()
  picks = np.linspace(GROUP // 5, len(found) - 1, GROUP).round().astype(int)
  return [list(found)[i] for i in picks]


def drawn(index: int) -> ModelConfig:
  """The index-th config that hypothesis draws."""
  return _drawn(index // GROUP)[index % GROUP]


# ------------------------------------------------------------------------------------------------ presets


def preset(name: str) -> ModelConfig:
  """A preset at toy size."""
  return shrink(PRESETS[name](), max_seq_len=MAX_LEN)


@functools.cache
def distinct_presets() -> dict[str, list[str]]:
  """{a preset: those that differ from it at toy size in d_ff and fractions (base, eps, init) at most}."""

  def shape(data):
    if isinstance(data, dict):
      return tuple((k, shape(v)) for k, v in data.items() if k != "d_ff")
    return "a fraction" if isinstance(data, float) else data

  groups = {}
  for name in PRESETS:
    groups.setdefault(shape(to_dict(preset(name))), []).append(name)
  return {names[0]: names for names in groups.values()}


# --------------------------------------------------------------------------------------------- parameters


def random_params(abstract_params: nnx.State, seed: int) -> nnx.State:
  """Arrays for every parameter, none at its initial value: a bias of zero or a scale of one would hide mistakes.

  Matrices keep a spread of about 1 / sqrt(fan_in) so that f32 against f64 is a fair comparison. Routers have a quarter:
  where a large stream drives scores to one, f32 cannot tell which token an expert should choose.
  """
  draws = np.random.default_rng(seed)

  def draw(path, param):
    shape = param.get_value().shape
    last = getattr(path[-1], "key", path[-1])
    if param.decay:
      stacked = len(shape) - len(param.axes)
      summed = [n for n, name in zip(shape[stacked:], param.axes, strict=True) if name in param.fan_in]
      value = draws.normal(size=shape) / np.sqrt(np.prod(summed)) / (4 if last == "router" else 1)
    else:
      value = (1.0 if last == "scale" else 0.0) + 0.2 * draws.normal(size=shape)
    return param.replace(value.astype(param.get_value().dtype))

  is_param = lambda x: isinstance(x, nnx.Variable)
  return jax.tree_util.tree_map_with_path(draw, abstract_params, is_leaf=is_param)


def site(positions, segments=None, *, state=None, key=None, telemetry=False) -> Site:
  """Where a branch of the lowest layer stands, in a call of tokens at these positions [B, T] and no decoding state."""
  segments = None if segments is None else jnp.asarray(segments, jnp.int32)
  context, _ = make_context(jnp.asarray(positions, jnp.int32), segments, None, None, None, telemetry)
  return Site(context, 0, state, None, {}, key)


# ------------------------------------------------------------------------------------- walking over configs


def components(config) -> list:
  """Every config dataclass in a tree of them."""
  if isinstance(config, dict):
    return [c for value in config.values() for c in components(value)]
  if not dataclasses.is_dataclass(config):
    return []
  return [config] + [c for f in dataclasses.fields(config) for c in components(getattr(config, f.name))]


@functools.cache
def field_types(component) -> dict[str, object]:
  """Field names and annotations of a config dataclass."""
  hints = typing.get_type_hints(component if isinstance(component, type) else type(component))
  return {f.name: hints[f.name] for f in dataclasses.fields(component)}


def _without_none(annotation) -> tuple[object, bool]:
  if type(None) not in typing.get_args(annotation):
    return annotation, False
  (inner,) = [a for a in typing.get_args(annotation) if a is not type(None)]
  return inner, True


def options(annotation) -> dict:
  """{label: predicate} of what a list of examples must hold of a field: see `HAND`."""
  inner, optional = _without_none(annotation)
  found = {"None": lambda v: v is None, "given": lambda v: v is not None} if optional else {}
  choices = (True, False) if inner is bool else typing.get_args(inner) if typing.get_origin(inner) is Literal else ()
  return found | {repr(choice): lambda v, c=choice: v == c for choice in choices}


def alternatives(annotation, value) -> list:
  """Other values for a field, whether valid in their place or not."""
  return [new for new in _alternatives(annotation, value) if new != value or type(new) is not type(value)]


def _alternatives(annotation, value) -> list:
  inner, optional = _without_none(annotation)
  if value is None:
    samples = {int: [1, 2, 4, 6], float: [0.7, 3.0]}
    return samples[inner] if inner in samples else [c for c in _everything() if isinstance(c, inner)]
  rest = [None] if optional else []
  if inner is bool:
    return [not value]
  if inner is str:
    return [f"2*({value})"]  # the only text is a stack
  if inner is int:
    return [value * 2, value + 1, value + 2, value - 1, value // 2, value - 2, *rest]
  if inner is float:
    return [value * 2, value / 2, value + 0.125, *rest]
  if typing.get_origin(inner) is Literal:
    return [choice for choice in typing.get_args(inner) if choice != value]
  if typing.get_origin(inner) is tuple:
    return [tuple(2 * v for v in value), tuple(3 * v for v in value)]
  return [c for c in _everything() if isinstance(c, inner) and type(c) is not type(value)] + rest


@functools.cache
def _everything() -> list:
  return [c for config in HAND.values() for c in components(config)]


def variations(config):
  """Yields (owner, field, old value, a function from a new value to the whole config) for every field below."""
  if isinstance(config, dict):
    for name, value in config.items():
      for owner, field, old, rebuild in variations(value):
        yield owner, field, old, lambda new, n=name, r=rebuild: {**config, n: r(new)}
    return
  for field in field_types(config):
    value = getattr(config, field)
    yield config, field, value, lambda new, f=field: dataclasses.replace(config, **{f: new})
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
      for owner, inner, old, rebuild in variations(value):
        yield owner, inner, old, lambda new, f=field, r=rebuild: dataclasses.replace(config, **{f: r(new)})
