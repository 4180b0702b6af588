"""Published decoders as data, and `shrink`, which makes a toy of any of them.

There is one function per family, and PRESETS names the models. A preset is the architecture, its longest published
context, and the way in which its matrices were drawn if that is published (otherwise the defaults of ModelConfig).
Dropout is 0 and precision f32 everywhere, since these are choices of a run.

Sizes are those of the released checkpoints: vocabularies with their padding, d_ff of each matrix (the Gemma papers
print gate and up together). RoPE pairs are those of the Hugging Face checkpoints, (i, i + dims/2).
tests/test_presets.py holds the published counts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

from llmarch.branches import BranchConfig
from llmarch.config import (
  BlockConfig,
  EmbedConfig,
  FanIn,
  HeadConfig,
  ModelConfig,
  Normal,
  ScalingConfig,
)
from llmarch.layers.attention import AttentionConfig, QKNorm
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.mla import MLAConfig
from llmarch.layers.moe import Groups, MoEConfig, TopK
from llmarch.layers.norm import LayerNorm, RMSNorm
from llmarch.layers.position import ALiBi, Interpolation, Learned, Llama3Scaling, RoPE, T5Bias, YaRN
from llmarch.residual import Parallel, ParallelTwoNorms, Pre, Sandwich


def gpt(
  num_layers: int,
  d_model: int,
  num_heads: int,
  *,
  context: int,
  vocab_size: int = 50257,
  init_std: float = 0.02,
  band: int | None = None,
) -> ModelConfig:
  """GPT-2 and its kin: LayerNorm before each branch, biases, GELU (tanh), learned positions.

  Matrices that write to the stream are drawn smaller by 1/sqrt(2 layers). Every second layer sees only `band` tokens.
  """

  def block(window):
    return BlockConfig(
      mixer=AttentionConfig(num_heads=num_heads, window=window, qkv_bias=True, out_bias=True),
      ffn=MLPConfig(d_ff=4 * d_model, activation="gelu_tanh", gated=False, bias=True),
      norm=LayerNorm(),
      output_init_scale=(2 * num_layers) ** -0.5,
    )

  blocks = {"layer": block(None)} if band is None else {"dense": block(None), "banded": block(band)}
  return ModelConfig(
    d_model=d_model,
    vocab_size=vocab_size,
    max_seq_len=context,
    stack=f"{num_layers}*layer" if band is None else f"{num_layers // 2}*(dense banded)",
    blocks=blocks,
    embed=EmbedConfig(position=Learned(length=context)),
    final_norm=LayerNorm(),
    init=Normal(stddev=init_std),
    embed_init=Normal(stddev=init_std),
  )


def gpt_j() -> ModelConfig:
  """GPT-J-6B: attention beside the feed-forward under one norm, and interleaved RoPE on a quarter of the head."""
  return ModelConfig(
    d_model=4096,
    vocab_size=50400,
    max_seq_len=2048,
    stack="28*layer",
    blocks={
      "layer": BlockConfig(
        mixer=AttentionConfig(num_heads=16, position=RoPE(dims=64, interleaved=True)),
        ffn=MLPConfig(d_ff=16384, activation="gelu_tanh", gated=False, bias=True),
        norm=LayerNorm(),
        residual=Parallel(),
      )
    },
    head=HeadConfig(tied=False, bias=True),
    final_norm=LayerNorm(),
  )


def palm(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
  """PaLM (2204.02311): parallel blocks, multi-query attention, SwiGLU with d_ff = 4 d.

  The norm is an RMSNorm with a zero-centred scale (the authors' inference code). The embedding table is N(0, 1), so the
  logits are divided by sqrt(d) (section 5).
  """
  return ModelConfig(
    d_model=d_model,
    vocab_size=256000,
    max_seq_len=2048,
    stack=f"{num_layers}*layer",
    blocks={
      "layer": BlockConfig(
        mixer=AttentionConfig(num_heads=num_heads, num_kv_heads=1, head_dim=256, position=RoPE()),
        ffn=MLPConfig(d_ff=4 * d_model),
        norm=RMSNorm(zero_centered=True),
        residual=Parallel(),
      )
    },
    head=HeadConfig(scale=d_model**-0.5),
    final_norm=RMSNorm(zero_centered=True),
    init=FanIn(),
    embed_init=Normal(stddev=1.0),
  )


def llama(
  num_layers: int,
  d_model: int,
  d_ff: int,
  num_heads: int,
  num_kv_heads: int,
  *,
  context: int,
  vocab_size: int = 32000,
  theta: float = 10000.0,
  scaling: ScalingConfig | None = None,
  window: int | None = None,
  eps: float = 1e-5,
  tied: bool = False,
  qkv_bias: bool = False,
  head_dim: int | None = None,
  qk_norm: bool = False,
  num_experts: int | None = None,
  router: TopK | None = None,
  shared: int | None = None,
  shared_gate: bool = False,
  dense_first: int | None = None,
) -> ModelConfig:
  """LLaMA and its followers (Mistral, Qwen): RMSNorm before each branch, RoPE, SwiGLU, and no biases but Qwen's.

  With experts (Mixtral, Qwen MoE, DeepSeekMoE), d_ff is the width of one expert, `shared` that of the shared expert,
  and `dense_first` that of the first layer's feed-forward if that layer has no experts.
  """
  norm = RMSNorm(eps=eps)
  attention = AttentionConfig(
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    position=RoPE(theta=theta, scaling=scaling),
    window=window,
    qkv_bias=qkv_bias,
    qk_norm=QKNorm(norm=norm) if qk_norm else None,
  )
  block_with = lambda ffn: BlockConfig(mixer=attention, ffn=ffn, norm=norm)
  blocks = {"layer": block_with(MLPConfig(d_ff=d_ff))}
  if num_experts is not None:
    moe = MoEConfig(
      num_experts=num_experts,
      expert=MLPConfig(d_ff=d_ff),
      router=router,
      shared=MLPConfig(d_ff=shared) if shared else None,
      shared_gate=shared_gate,
    )
    dense = {"dense": block_with(MLPConfig(d_ff=dense_first))} if dense_first else {}
    blocks = {**dense, "moe": block_with(moe)}
  *first, last = blocks
  return ModelConfig(
    d_model=d_model,
    vocab_size=vocab_size,
    max_seq_len=context,
    stack=f"{first[0]} {num_layers - 1}*{last}" if first else f"{num_layers}*{last}",
    blocks=blocks,
    head=HeadConfig(tied=tied),
    final_norm=norm,
  )


llama_1 = partial(llama, context=2048, eps=1e-6)
llama_2 = partial(llama, context=4096)
llama_3 = partial(llama, context=8192, vocab_size=128256, theta=5e5)
llama_3_2 = partial(llama_3, context=131072, scaling=Llama3Scaling(factor=32.0), tied=True)
qwen_1_5 = partial(llama, context=32768, theta=1e6, eps=1e-6, qkv_bias=True)
qwen_2_5 = qwen_1_5  # the diagram is the same; its base models of 14B and above have eps 1e-5
mixtral = partial(llama, theta=1e6, num_experts=8, router=TopK(k=2))
qwen_moe = partial(qwen_1_5, vocab_size=151936, shared_gate=True)
qwen_3 = partial(llama, context=40960, vocab_size=151936, theta=1e6, eps=1e-6, head_dim=128, qk_norm=True)


def gemma(
  num_layers: int,
  d_model: int,
  d_ff: int,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int = 256,
  *,
  context: int = 8192,
  vocab_size: int = 256000,
  stack: str = "layer",
  window: int | None = None,
  global_theta: float = 10000.0,
  global_scaling: ScalingConfig | None = None,
  sandwich: bool = True,
  query_scale: float | None = None,
  qk_norm: bool = False,
  attention_softcap: float | None = None,
  logit_softcap: float | None = None,
) -> ModelConfig:
  """Gemma: zero-centred RMSNorm, GEGLU (tanh), embeddings times sqrt(d), free head_dim, tied head.

  The window belongs to the layers that the stack calls local, and the RoPE arguments to the global ones.
  """
  norm = RMSNorm(zero_centered=True)

  def block(window, position):
    return BlockConfig(
      mixer=AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        position=position,
        window=window,
        qk_norm=QKNorm(norm=norm) if qk_norm else None,
        query_scale=query_scale,
        softcap=attention_softcap,
      ),
      ffn=MLPConfig(d_ff=d_ff, activation="gelu_tanh"),
      norm=norm,
      residual=Sandwich() if sandwich else Pre(),
    )

  everywhere = block(None, RoPE(theta=global_theta, scaling=global_scaling))
  return ModelConfig(
    d_model=d_model,
    vocab_size=vocab_size,
    max_seq_len=context,
    stack=stack,
    blocks={"local": block(window, RoPE()), "global": everywhere} if window else {"layer": everywhere},
    embed=EmbedConfig(scale=math.sqrt(d_model)),
    head=HeadConfig(softcap=logit_softcap),
    final_norm=norm,
  )


def gemma_1(num_layers: int, *sizes: int) -> ModelConfig:
  """Gemma 1 (2403.08295): every layer is global, with 8192 tokens of context."""
  return gemma(num_layers, *sizes, stack=f"{num_layers}*layer", sandwich=False)


def gemma_2(num_layers: int, *sizes: int, query_scale: float = 256**-0.5) -> ModelConfig:
  """Gemma 2 (2408.00118): local and global layers in turn, norms on both sides of a branch, soft-caps, no QK-norm."""
  return gemma(
    num_layers,
    *sizes,
    stack=f"{num_layers // 2}*(local global)",
    window=4096,
    query_scale=query_scale,
    attention_softcap=50.0,
    logit_softcap=30.0,
  )


def gemma_3(
  num_layers: int,
  *sizes: int,
  context: int = 131072,
  vocab_size: int = 262208,  # 64 rows above the text vocabulary, for images
  window: int = 1024,
  query_scale: float = 256**-0.5,
  factor: float | None = 8.0,
) -> ModelConfig:
  """Gemma 3 (2503.19786), the text model: five local layers per global one, and QK-norm in place of soft-caps."""
  turns, rest = divmod(num_layers, 6)
  return gemma(
    num_layers,
    *sizes,
    context=context,
    vocab_size=vocab_size,
    stack=f"{turns}*(5*local global)" + (f" {rest}*local" if rest else ""),
    window=window,
    global_theta=1e6,
    global_scaling=Interpolation(factor=factor) if factor else None,
    query_scale=query_scale,
    qk_norm=True,
  )


def falcon(num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, *, tied: bool = True) -> ModelConfig:
  """Falcon (2311.16867): parallel blocks, and no biases but the norms'.

  The multi-query 7B has one norm per layer, and the larger models have a norm for each branch.
  """
  return ModelConfig(
    d_model=d_model,
    vocab_size=65024,
    max_seq_len=2048,
    stack=f"{num_layers}*layer",
    blocks={
      "layer": BlockConfig(
        mixer=AttentionConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, position=RoPE()),
        ffn=MLPConfig(d_ff=4 * d_model, activation="gelu", gated=False),
        norm=LayerNorm(),
        residual=Parallel() if num_kv_heads == 1 else ParallelTwoNorms(),
      )
    },
    head=HeadConfig(tied=tied),
    final_norm=LayerNorm(),
  )


def mpt(num_layers: int, d_model: int, num_heads: int, *, context: int) -> ModelConfig:
  """MPT: ALiBi, LayerNorm without bias, GELU, no biases.

  All matrices are drawn with std sqrt(2 / fan_in), and outputs smaller by 1/sqrt(2 layers) (init_config of the released
  checkpoints).
  """
  return ModelConfig(
    d_model=d_model,
    vocab_size=50432,
    max_seq_len=context,
    stack=f"{num_layers}*layer",
    blocks={
      "layer": BlockConfig(
        mixer=AttentionConfig(num_heads=num_heads, position=ALiBi()),
        ffn=MLPConfig(d_ff=4 * d_model, activation="gelu", gated=False),
        norm=LayerNorm(bias=False),
        output_init_scale=(2 * num_layers) ** -0.5,
      )
    },
    final_norm=LayerNorm(bias=False),
    init=FanIn(gain=2**0.5),
    embed_init=FanIn(gain=2**0.5),
  )


def bloom(num_layers: int, d_model: int, num_heads: int, *, init_std: float = 0.02) -> ModelConfig:
  """BLOOM (2211.05100): ALiBi, a norm on the embeddings, biases everywhere."""
  return ModelConfig(
    d_model=d_model,
    vocab_size=250880,
    max_seq_len=2048,
    stack=f"{num_layers}*layer",
    blocks={
      "layer": BlockConfig(
        mixer=AttentionConfig(num_heads=num_heads, position=ALiBi(), qkv_bias=True, out_bias=True),
        ffn=MLPConfig(d_ff=4 * d_model, activation="gelu_tanh", gated=False, bias=True),
        norm=LayerNorm(),
        output_init_scale=(2 * num_layers) ** -0.5,
      )
    },
    embed=EmbedConfig(norm=LayerNorm()),
    final_norm=LayerNorm(),
    init=Normal(stddev=init_std),
    embed_init=Normal(stddev=init_std),
  )


def nemotron_4(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
  """Nemotron-4 (2402.16819): squared ReLU, zero-centred LayerNorm with bias, RoPE on half of the head."""
  norm = LayerNorm(zero_centered=True)
  return ModelConfig(
    d_model=d_model,
    vocab_size=256000,
    max_seq_len=4096,
    stack=f"{num_layers}*layer",
    blocks={
      "layer": BlockConfig(
        mixer=AttentionConfig(num_heads=num_heads, num_kv_heads=8, position=RoPE(dims=d_model // num_heads // 2)),
        ffn=MLPConfig(d_ff=4 * d_model, activation="relu2", gated=False),
        norm=norm,
      )
    },
    head=HeadConfig(tied=False),
    final_norm=norm,
  )


def deepseek(
  num_layers: int,
  d_model: int,
  num_heads: int,
  dense_layers: int,
  d_ff: int,
  num_experts: int,
  expert_d_ff: int,
  shared_experts: int,
  *,
  router: TopK,
  mscale: float,
  context: int = 131072,
  vocab_size: int = 102400,
  q_lora_rank: int | None = 1536,
) -> ModelConfig:
  """DeepSeek-V2 and V3 (2405.04434, 2412.19437): latent attention, fine-grained and shared experts, YaRN.

  The first layer (V2) or three layers (V3) are dense. YaRN stretches 4096 tokens by 40. V3's module that predicts a
  second token is left out.
  """
  norm = RMSNorm()
  mixer = MLAConfig(
    num_heads=num_heads,
    q_lora_rank=q_lora_rank,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    position=RoPE(interleaved=True, scaling=YaRN(factor=40.0, original=4096, attention_factor=1.0)),
    mscale_all_dim=mscale,
  )
  moe = MoEConfig(
    num_experts=num_experts,
    expert=MLPConfig(d_ff=expert_d_ff),
    router=router,
    shared=MLPConfig(d_ff=shared_experts * expert_d_ff),
  )
  return ModelConfig(
    d_model=d_model,
    vocab_size=vocab_size,
    max_seq_len=context,
    stack=f"{dense_layers}*dense {num_layers - dense_layers}*moe",
    blocks={
      "dense": BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=d_ff), norm=norm),
      "moe": BlockConfig(mixer=mixer, ffn=moe, norm=norm),
    },
    head=HeadConfig(tied=False),
    final_norm=norm,
    init=Normal(stddev=0.006),
    embed_init=Normal(stddev=0.006),
  )


def olmoe() -> ModelConfig:
  """OLMoE-1B-7B (2409.02060): 64 small experts, QK-norm over all heads, an auxiliary and a z loss."""
  router = TopK(k=8, renormalize=False, aux_loss=0.01, z_loss=0.001)
  config = llama(16, 2048, 1024, 16, 16, context=4096, vocab_size=50304, num_experts=64, router=router)
  block = config.blocks["moe"]
  mixer = dataclasses.replace(block.mixer, qk_norm=QKNorm(norm=block.norm, whole=True))
  return dataclasses.replace(config, blocks={"moe": dataclasses.replace(block, mixer=mixer)})


def dbrx() -> ModelConfig:
  """DBRX: 4 of 16 experts, LayerNorm without bias, and queries, keys and values clipped at 8."""
  norm = LayerNorm(bias=False)
  attention = AttentionConfig(num_heads=48, num_kv_heads=8, position=RoPE(theta=5e5), qkv_clip=8.0)
  moe = MoEConfig(num_experts=16, expert=MLPConfig(d_ff=10752), router=TopK(k=4))
  return ModelConfig(
    d_model=6144,
    vocab_size=100352,
    max_seq_len=32768,
    stack="40*moe",
    blocks={"moe": BlockConfig(mixer=attention, ffn=moe, norm=norm)},
    head=HeadConfig(tied=False),
    final_norm=norm,
  )


def grok_1() -> ModelConfig:
  """Grok-1, after its public code: 2 of 8 experts with raw gates, and norms on both sides of a branch.

  Attention logits are capped at 30, embeddings are multiplied by sqrt(d), and logits are divided by sqrt(3).
  """
  norm = RMSNorm(eps=1e-5)
  attention = AttentionConfig(num_heads=48, num_kv_heads=8, head_dim=128, position=RoPE(), softcap=30.0)
  expert = MLPConfig(d_ff=32768, activation="gelu_tanh")
  moe = MoEConfig(num_experts=8, expert=expert, router=TopK(k=2, renormalize=False))
  return ModelConfig(
    d_model=6144,
    vocab_size=131072,
    max_seq_len=8192,
    stack="64*moe",
    blocks={"moe": BlockConfig(mixer=attention, ffn=moe, norm=norm, residual=Sandwich())},
    embed=EmbedConfig(scale=math.sqrt(6144)),
    head=HeadConfig(scale=3**-0.5),
    final_norm=norm,
  )


def gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
  """gpt-oss (2508.10925): 4 experts per token, clamped SwiGLU, biases everywhere, sinks, every other layer a window."""
  norm = RMSNorm(eps=1e-5)
  expert = MLPConfig(d_ff=2880, activation="swiglu_oss", bias=True)
  moe = MoEConfig(num_experts=num_experts, expert=expert, router=TopK(k=4, bias=True))
  position = RoPE(theta=150000.0, scaling=YaRN(factor=32.0, original=4096, truncate=False))

  def block(window):
    attention = AttentionConfig(
      num_heads=64,
      num_kv_heads=8,
      head_dim=64,
      position=position,
      window=window,
      qkv_bias=True,
      out_bias=True,
      sinks=True,
    )
    return BlockConfig(mixer=attention, ffn=moe, norm=norm)

  return ModelConfig(
    d_model=2880,
    vocab_size=201088,
    max_seq_len=131072,
    stack=f"{num_layers // 2}*(local global)",
    blocks={"local": block(128), "global": block(None)},
    head=HeadConfig(tied=False),
    final_norm=norm,
  )


def glam(num_layers: int, d_model: int, d_ff: int, num_heads: int, num_experts: int) -> ModelConfig:
  """GLaM (2112.06905): every second layer has experts without gates (GELU), and the other layers have GEGLU.

  The paper's relative positions are Transformer-XL's; here they are T5's. Its capacity factor, 2, is a run's choice.
  """
  attention = AttentionConfig(num_heads=num_heads, head_dim=128, position=T5Bias(num_buckets=32, max_distance=128))
  expert = MLPConfig(d_ff=d_ff, activation="gelu", gated=False)
  moe = MoEConfig(num_experts=num_experts, expert=expert, router=TopK(k=2, aux_loss=0.01))
  block_with = lambda ffn: BlockConfig(mixer=attention, ffn=ffn, norm=RMSNorm())
  return ModelConfig(
    d_model=d_model,
    vocab_size=256000,
    max_seq_len=1024,
    stack=f"{num_layers // 2}*(dense moe)",
    blocks={"dense": block_with(MLPConfig(d_ff=d_ff, activation="gelu")), "moe": block_with(moe)},
    final_norm=RMSNorm(),
  )


# Losses that balance the load of whole devices are left out, because they belong to a placement of the experts.
deepseek_v2_router = partial(TopK, k=6, renormalize=False, sequence_loss=0.003)
deepseek_v3_router = partial(
  TopK, k=8, scores="sigmoid", scale=2.5, groups=Groups(num=8, top=4), balance_rate=0.001, sequence_loss=1e-4
)


# fmt: off
PRESETS: dict[str, Callable[[], ModelConfig]] = {
  # layers, d_model, heads
  "gpt_2_small": partial(gpt, 12, 768, 12, context=1024),
  "gpt_2_medium": partial(gpt, 24, 1024, 16, context=1024),
  "gpt_2_large": partial(gpt, 36, 1280, 20, context=1024),
  "gpt_2_xl": partial(gpt, 48, 1600, 25, context=1024),
  # 2005.14165: "alternating dense and locally banded sparse attention patterns" of unpublished width; 256 is
  # the larger stride of the Sparse Transformer that it cites, and the window of the replication GPT-Neo.
  "gpt_3_175b": partial(gpt, 96, 12288, 96, context=2048, band=256),
  "gpt_j_6b": gpt_j,
  "mt_nlg_530b": partial(gpt, 105, 20480, 128, context=2048, vocab_size=51200, init_std=4e-3),  # 2201.11990

  "palm_8b": partial(palm, 32, 4096, 16),
  "palm_62b": partial(palm, 64, 8192, 32),
  "palm_540b": partial(palm, 118, 18432, 48),
  "palm_540b_padded": partial(palm, 118, 18432, 64),  # heads padded for 64 chips and more (2211.05102)

  # layers, d_model, d_ff, heads, kv heads
  "llama_7b": partial(llama_1, 32, 4096, 11008, 32, 32),
  "llama_13b": partial(llama_1, 40, 5120, 13824, 40, 40),
  "llama_33b": partial(llama_1, 60, 6656, 17920, 52, 52),
  "llama_65b": partial(llama_1, 80, 8192, 22016, 64, 64, eps=1e-5),  # eps of its params.json
  "llama_2_7b": partial(llama_2, 32, 4096, 11008, 32, 32),
  "llama_2_13b": partial(llama_2, 40, 5120, 13824, 40, 40),
  "llama_2_70b": partial(llama_2, 80, 8192, 28672, 64, 8),
  "llama_3_8b": partial(llama_3, 32, 4096, 14336, 32, 8),
  "llama_3_70b": partial(llama_3, 80, 8192, 28672, 64, 8),
  "llama_3_1_405b": partial(llama_3, 126, 16384, 53248, 128, 8, context=131072, scaling=Llama3Scaling(factor=8.0)),
  "llama_3_2_1b": partial(llama_3_2, 16, 2048, 8192, 32, 8),
  "llama_3_2_3b": partial(llama_3_2, 28, 3072, 8192, 24, 8),
  "mistral_7b": partial(llama, 32, 4096, 14336, 32, 8, context=8192, window=4096),  # v0.1 (2310.06825)

  "qwen_1_5_0_5b": partial(qwen_1_5, 24, 1024, 2816, 16, 16, vocab_size=151936, tied=True),
  "qwen_1_5_1_8b": partial(qwen_1_5, 24, 2048, 5504, 16, 16, vocab_size=151936),
  "qwen_1_5_4b": partial(qwen_1_5, 40, 2560, 6912, 20, 20, vocab_size=151936),
  "qwen_1_5_7b": partial(qwen_1_5, 32, 4096, 11008, 32, 32, vocab_size=151936),
  "qwen_1_5_14b": partial(qwen_1_5, 40, 5120, 13696, 40, 40, vocab_size=152064),
  "qwen_1_5_32b": partial(qwen_1_5, 64, 5120, 27392, 40, 8, vocab_size=152064),
  "qwen_1_5_72b": partial(qwen_1_5, 80, 8192, 24576, 64, 64, vocab_size=152064),
  "qwen_2_5_0_5b": partial(qwen_2_5, 24, 896, 4864, 14, 2, vocab_size=151936, tied=True),
  "qwen_2_5_1_5b": partial(qwen_2_5, 28, 1536, 8960, 12, 2, vocab_size=151936, tied=True),
  "qwen_2_5_3b": partial(qwen_2_5, 36, 2048, 11008, 16, 2, vocab_size=151936, tied=True),
  "qwen_2_5_7b": partial(qwen_2_5, 28, 3584, 18944, 28, 4, vocab_size=152064, context=131072),
  "qwen_2_5_14b": partial(qwen_2_5, 48, 5120, 13824, 40, 8, vocab_size=152064, context=131072, eps=1e-5),
  "qwen_2_5_32b": partial(qwen_2_5, 64, 5120, 27648, 40, 8, vocab_size=152064, context=131072, eps=1e-5),
  "qwen_2_5_72b": partial(qwen_2_5, 80, 8192, 29568, 64, 8, vocab_size=152064, context=131072, eps=1e-5),
  "qwen_3_0_6b": partial(qwen_3, 28, 1024, 3072, 16, 8, tied=True),
  "qwen_3_1_7b": partial(qwen_3, 28, 2048, 6144, 16, 8, tied=True),
  "qwen_3_4b": partial(qwen_3, 36, 2560, 9728, 32, 8, tied=True),
  "qwen_3_8b": partial(qwen_3, 36, 4096, 12288, 32, 8),
  "qwen_3_14b": partial(qwen_3, 40, 5120, 17408, 40, 8),
  "qwen_3_32b": partial(qwen_3, 64, 5120, 25600, 64, 8),

  # layers, d_model, d_ff, heads, kv heads (, head_dim)
  "gemma_2b": partial(gemma_1, 18, 2048, 16384, 8, 1),
  "gemma_7b": partial(gemma_1, 28, 3072, 24576, 16, 16),
  "gemma_2_2b": partial(gemma_2, 26, 2304, 9216, 8, 4),
  "gemma_2_9b": partial(gemma_2, 42, 3584, 14336, 16, 8),
  "gemma_2_27b": partial(gemma_2, 46, 4608, 36864, 32, 16, 128, query_scale=144**-0.5),  # (d_model / heads)^-0.5
  "gemma_3_1b": partial(
    gemma_3, 26, 1152, 6912, 4, 1, context=32768, vocab_size=262144, window=512, factor=None
  ),
  "gemma_3_4b": partial(gemma_3, 34, 2560, 10240, 8, 4),
  "gemma_3_12b": partial(gemma_3, 48, 3840, 15360, 16, 8),
  "gemma_3_27b": partial(gemma_3, 62, 5376, 21504, 32, 16, 128, query_scale=168**-0.5),  # (d_model / heads)^-0.5

  # layers, d_model, d_ff of an expert, heads, kv heads
  "mixtral_8x7b": partial(mixtral, 32, 4096, 14336, 32, 8, context=32768),
  "mixtral_8x22b": partial(mixtral, 56, 6144, 16384, 48, 8, context=65536, vocab_size=32768),  # v0.3's vocabulary
  "qwen_1_5_moe_a2_7b": partial(
    qwen_moe, 24, 2048, 1408, 16, 16, context=8192, num_experts=60, shared=5632,
    router=TopK(k=4, renormalize=False),
  ),
  "qwen_2_57b_a14b": partial(
    qwen_moe, 28, 3584, 2560, 28, 4, num_experts=64, shared=20480, router=TopK(k=8, renormalize=False)
  ),
  "qwen_3_30b_a3b": partial(qwen_3, 48, 2048, 768, 32, 4, num_experts=128, router=TopK(k=8)),
  "qwen_3_235b_a22b": partial(qwen_3, 94, 4096, 1536, 64, 4, num_experts=128, router=TopK(k=8)),
  "deepseek_moe_16b": partial(
    llama, 28, 2048, 1408, 16, 16, context=4096, vocab_size=102400, eps=1e-6, num_experts=64, shared=2816,
    dense_first=10944, router=TopK(k=6, renormalize=False, aux_loss=0.001),
  ),
  "olmoe_1b_7b": olmoe,
  "dbrx": dbrx,
  "grok_1": grok_1,
  "gpt_oss_20b": partial(gpt_oss, 24, 32),
  "gpt_oss_120b": partial(gpt_oss, 36, 128),
  "glam_64b_64e": partial(glam, 64, 8192, 32768, 128, 64),

  # layers, d_model, heads, dense layers, their d_ff, experts, their d_ff, shared experts
  "deepseek_v2_lite": partial(
    deepseek, 27, 2048, 16, 1, 10944, 64, 1408, 2, q_lora_rank=None, context=32768, mscale=0.707,
    router=deepseek_v2_router(),
  ),
  "deepseek_v2": partial(
    deepseek, 60, 5120, 128, 1, 12288, 160, 1536, 2, mscale=0.707,
    router=deepseek_v2_router(groups=Groups(num=8, top=3, score="max"), scale=16.0),
  ),
  "deepseek_v3": partial(
    deepseek, 61, 7168, 128, 3, 18432, 256, 2048, 1, mscale=1.0, vocab_size=129280, router=deepseek_v3_router()
  ),

  # layers, d_model, heads (, kv heads)
  "falcon_7b": partial(falcon, 32, 4544, 71, 1),
  "falcon_40b": partial(falcon, 60, 8192, 128, 8),
  "falcon_180b": partial(falcon, 80, 14848, 232, 8, tied=False),
  "mpt_7b": partial(mpt, 32, 4096, 32, context=2048),
  "mpt_30b": partial(mpt, 48, 7168, 64, context=8192),
  "bloom_560m": partial(bloom, 24, 1024, 16),
  "bloom_7b1": partial(bloom, 30, 4096, 32),
  "bloom_176b": partial(bloom, 70, 14336, 112, init_std=0.0048),  # sqrt(1 / (3 d)), the training script's
  "nemotron_4_15b": partial(nemotron_4, 32, 6144, 48),
  "nemotron_4_340b": partial(nemotron_4, 96, 18432, 96),
}
# fmt: on


# ------------------------------------------------------------------------------------------------- toys


def shrink(
  config: ModelConfig, *, d_model: int = 48, vocab_size: int = 60, max_seq_len: int = 64, window: int = 5
) -> ModelConfig:
  """Shrinks a model to toy size: every component, block name and order of layers stays, with smaller numbers.

  Sizes are unequal, so that a transposed axis cannot pass a test. Attention stays multi-head, grouped-query or
  multi-query, with at most 4 query heads per key-value head; d_ff keeps its ratio to d_model; runs of layers and
  repeats are cut to 2.

  >>> shrink(PRESETS["gemma_3_1b"]()).stack
  '2*(local local global) 2*local'
  """

  def hidden(d_ff: int) -> int:  # keeps d_ff's ratio to d_model, and differs from d_model unless d_ff was equal to it
    return 8 * round(d_ff * d_model / config.d_model / 8) + 8 * (d_ff == config.d_model)

  def scale(c: EmbedConfig | HeadConfig) -> dict:  # a scale of sqrt(d_model) or its inverse follows the new d_model
    power = math.log(c.scale, config.d_model) if c.scale > 0 else 0
    return {"scale": d_model**power} if math.isclose(abs(power), 0.5) else {}

  rules = {
    EmbedConfig: scale,
    HeadConfig: scale,
    RoPE: lambda c: {} if c.dims is None else {"dims": 4},  # partial rotation stays partial
    TopK: lambda c: {"k": min(c.k, 3)},
    Groups: lambda c: {"num": 3, "top": 2},
    Learned: lambda c: {"length": max_seq_len},
    ModelConfig: lambda c: {
      "d_model": d_model,
      "vocab_size": vocab_size,
      "max_seq_len": max_seq_len,
      "stack": _shrink_stack(c.segments),
    },
  }

  def walk(part):
    if isinstance(part, Mapping):
      return {name: walk(value) for name, value in part.items()}
    if not dataclasses.is_dataclass(part):
      return part
    changes = {f.name: walk(getattr(part, f.name)) for f in dataclasses.fields(part)}
    if "original" in changes:  # a toy's context is longer than the original length of its RoPE scaling
      changes["original"] = max_seq_len // 2
    small = part.toy(window=window, hidden=hidden) if isinstance(part, BranchConfig) else {}
    return dataclasses.replace(part, **changes | small | rules.get(type(part), lambda c: {})(part))

  return walk(config)


def _shrink_stack(segments) -> str:
  terms = []
  for pattern, repeat in segments:
    short = [name for i, name in enumerate(pattern) if i < 2 or len({*pattern[i - 2 : i + 1]}) > 1]
    terms.append(f"{min(repeat, 2)}*" + (short[0] if len(short) == 1 else f"({' '.join(short)})"))
  return " ".join(terms)
