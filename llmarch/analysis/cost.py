"""The cost of a config by formula: parameters, FLOPs, bytes of state and of training. No model is built.

D d_model, N query heads, K kv heads, H head dim, F mlp hidden, V vocabulary, L layers.
The formulas do not read the model's code, so that each checks the other (tests/test_presets.py). A new mixer,
feed-forward, norm or position with parameters adds one row to a table here.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from llmarch.branches import BranchConfig
from llmarch.config import BlockConfig, ModelConfig, NormConfig
from llmarch.errors import check
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.cross import CrossAttentionConfig
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.linear import LinearConfig
from llmarch.layers.mla import MLAConfig
from llmarch.layers.moe import MoEConfig
from llmarch.layers.norm import LayerNorm, RMSNorm, ScaleNorm
from llmarch.layers.position import Learned, Sinusoidal
from llmarch.run_config import SGD, Adafactor, AdamW, Lion, Muon, RunConfig

# Bytes of an element by its type or format; the scales of formats are counted by `kv_state`.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2} | dict.fromkeys(("int8", "fp8", "int8_channel", "fp8_channel"), 1)


class Cost(NamedTuple):
  """The cost of one layer's branch."""

  matrices: int  # parameters that multiply activations, each with one multiply-add per token
  vectors: int  # the other parameters: biases, norms of queries and keys
  mixing: Callable[[int, bool], float] = lambda length, dense: 0.0  # multiply-adds between tokens, per token
  state: Callable[[int, int, str], int] = lambda max_len, chunk, dtype: 0  # bytes of decoding state per row
  growth: int = 0  # elements by which one more token lengthens the state
  idle: int = 0  # parameters among `matrices` that a token does not use
  idle_vectors: int = 0
  expert: int = 0  # parameters of one expert, of which a token uses some
  decoding: float = 0.0  # multiply-adds per key that a decode step takes beyond those of `mixing`; may be negative


# ------------------------------------------------------------------------------------- one row a component


def attention(c: AttentionConfig, d_model: int) -> Cost:
  """The cost of softmax attention (2211.05102, section 3.3).

  Parameters 2 D N H + 2 D K H and the biases; 2 N H multiply-adds for each key a query sees (scores, and their mix);
  2 K H elements of state per token, at most window + chunk - 1 tokens. If keys and values are another layer's
  (2405.12981), the terms with K are left out.
  """
  D, N, H = d_model, c.num_heads, c.dim(d_model)
  K = c.kv_heads if c.kv_from is None else 0
  vectors = c.qkv_bias * (N + 2 * K) * H + c.out_bias * D + c.sinks * N
  if c.qk_norm:
    dims = (N * H, K * H) if c.qk_norm.whole else (H, H)
    times = (N, K) if c.qk_norm.per_head else (1, 1 if K else 0)
    vectors += sum(n * norm(c.qk_norm.norm, dim) for n, dim in zip(times, dims) if dim)
  return Cost(
    matrices=2 * D * N * H + 2 * D * K * H,
    vectors=vectors,
    mixing=lambda length, dense: 2 * N * H * (length if dense else c.mask.mean_keys(length, c.window)),
    state=lambda *sizes: K * kv_state(H, c.window, *sizes),
    growth=2 * K * H,
  )


def cross_attention(c: CrossAttentionConfig, d_model: int) -> Cost:
  """The cost of cross-attention to a memory of width M.

  D N H for queries and as many for the output, 2 M K H for keys and values, and biases; 2 K H elements of state for
  each token of a source, with room for max_source_len. The length of sources is not known here, so the multiply-adds
  between tokens, and those of a source's keys and values, are not counted.
  """
  D, M, N, K, H = d_model, c.memory_dim, c.num_heads, c.kv_heads, c.dim(d_model)
  return Cost(
    matrices=2 * D * N * H + 2 * M * K * H,
    vectors=c.bias * (N + 2 * K) * H + c.out_bias * D + 2 * norm(c.qk_norm, H),
    state=lambda max_len, chunk, dtype: 2 * K * H * c.max_source_len * BYTES[dtype],
    idle=2 * M * K * H,
  )


def mla(c: MLAConfig, d_model: int) -> Cost:
  """The cost of latent attention (2405.04434, table 1).

  Queries D N (P + R), or D Q + Q N (P + R) with a latent; D (C + R) + C N (P + V) for keys and values, N V D for the
  output; N (P + R + V) multiply-adds for each key a query sees; C + R elements of state per token.
  """
  D, N, C, Q = d_model, c.num_heads, c.kv_lora_rank, c.q_lora_rank
  P, R, V = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
  queries = D * N * (P + R) if Q is None else D * Q + Q * N * (P + R)

  def state(max_len: int, chunk: int, dtype: str) -> int:
    scale = 4 if BYTES[dtype] == 1 else 0  # a format has one f32 scale per token for each of the two vectors
    return max_len * ((C + R) * BYTES[dtype] + 2 * scale)

  return Cost(
    matrices=queries + D * (C + R) + C * N * (P + V) + N * V * D,
    vectors=norm(c.latent_norm, C) + (0 if Q is None else norm(c.latent_norm, Q)),
    mixing=lambda length, dense: N * (P + R + V) * (length if dense else c.mask.mean_keys(length, c.window)),
    state=state,
    growth=C + R,
    # A decode step absorbs keys and values: N (2 C + R) multiply-adds per key (section 2.1.2).
    decoding=N * (2 * C + R) - N * (P + R + V),
  )


def linear(c: LinearConfig, d_model: int) -> Cost:
  """4 D N H parameters. A token spends 2 N H (H + 1) multiply-adds on the state, which it reads and adds to, and
  N (2 H + 1) on each token of its chunk of C (a masked half of them in vain; the last chunk is filled up). The state is
  N H (H + 1) numbers in f32, and the segment that they belong to (2006.16236, section 3.2)."""
  D, N, H = d_model, c.num_heads, c.dim(d_model)

  def mixing(length: int, dense: bool) -> float:
    C = min(c.chunk, length)
    filled = -(-length // C) * C / length
    return filled * N * (2 * H * (H + 1) + (2 * H + 1) * C)

  return Cost(
    matrices=4 * D * N * H,
    vectors=0,
    mixing=mixing,
    state=lambda max_len, chunk, dtype: 4 * (N * H * (H + 1) + 1),
  )


def kv_state(dim: int, window: int | None, max_len: int, chunk: int, dtype: str) -> int:
  """Bytes of the keys and values of one row and head of dim H in S slots, 2 H S elements.

  In a format, each token has one f32 scale for its value and one for its key. With "_channel", the keys of each 32
  tokens have H scales instead, S is a multiple of 32, and 31 + chunk tokens are kept in 16 bits as well.
  """
  slots = max_len if window is None else min(max_len, window + chunk - 1)
  if BYTES[dtype] > 1:
    return 2 * dim * slots * BYTES[dtype]
  if not dtype.endswith("_channel"):
    return 2 * slots * (dim + 4)
  slots = -(-slots // 32) * 32
  return slots * (2 * dim + 4) + slots // 32 * dim * 4 + 2 * min(slots, 31 + chunk) * dim * 2


def mlp(c: MLPConfig, d_model: int) -> Cost:
  """The cost of a feed-forward: 2 D F parameters, or 3 D F gated, and biases of F for each matrix in and D out."""
  into = 2 if c.gated else 1
  return Cost(matrices=(into + 1) * d_model * c.d_ff, vectors=c.bias * (into * c.d_ff + d_model))


def moe(c: MoEConfig, d_model: int) -> Cost:
  """The cost of a mixture of E experts and a shared one; a token uses K experts (on average, if experts choose).

  The router has D E parameters, and E for each of its biases; the gate of the shared expert has D.
  """
  D, E, router = d_model, c.num_experts, c.router
  expert, shared = mlp(c.expert, D), mlp(c.shared, D) if c.shared else Cost(0, 0)
  biases = router.bias + (router.balance_rate is not None)
  idle = E - router.chosen(E)
  return Cost(
    matrices=E * expert.matrices + shared.matrices + D * E + c.shared_gate * D,
    vectors=E * expert.vectors + shared.vectors + biases * E,
    idle=int(idle * expert.matrices),
    idle_vectors=int(idle * expert.vectors),
    expert=expert.matrices + expert.vectors,
  )


COMPONENTS = {
  AttentionConfig: attention,
  MLAConfig: mla,
  LinearConfig: linear,
  CrossAttentionConfig: cross_attention,
  MLPConfig: mlp,
  MoEConfig: moe,
}

NORMS = {
  RMSNorm: lambda c, dim: dim,
  LayerNorm: lambda c, dim: dim * (c.scale + c.bias),
  ScaleNorm: lambda c, dim: 1,
}

AT_EMBEDDING = {Learned: lambda c, d_model: (c.offset + c.length) * d_model, Sinusoidal: lambda c, d_model: 0}


def norm(config: NormConfig | None, dim: int) -> int:
  """Parameters of a norm over `dim` features."""
  return NORMS[type(config)](config, dim) if config else 0


def of(branch: BranchConfig, d_model: int) -> Cost:
  """The cost of one layer's branch. Raises UserError if the tables have no row for it."""
  row = COMPONENTS.get(type(branch))
  known = row is not None
  check(known, f"{branch.kind}: the cost of {type(branch).__name__} is not known; add a row to cost.COMPONENTS")
  return row(branch, d_model)


# ------------------------------------------------------------------------------------------- whole models


def layers(config: ModelConfig) -> list[tuple[int, BlockConfig, dict[str, Cost]]]:
  """(number of layers, block, costs of its branches by name) for each named block."""
  counts = Counter(config.layers)
  costs_of = lambda block: {name: of(branch, config.d_model) for name, branch in block.branches.items()}
  return [(counts[name], block, costs_of(block)) for name, block in config.blocks.items()]


def total(config: ModelConfig, field: Callable[[Cost], float]) -> float:
  """The sum of a figure over all branches of all layers."""
  return sum(count * field(cost) for count, _, costs in layers(config) for cost in costs.values())


def params(config: ModelConfig) -> dict[str, int]:
  """Parameters by component and in "total": embed, position, a row for each kind of mixer, ffn, norms, head.

  A tied table counts as embed. As an example, LLaMA has L (2 D N H + 2 D K H + 3 D F + 2 D) + 2 V D + D.
  """
  D, V = config.d_model, config.vocab_size
  at_embedding, width = config.embed.position, config.embed.dim
  found = Counter(
    embed=V * D if width is None else V * width + 2 * width * D,
    position=AT_EMBEDDING[type(at_embedding)](at_embedding, D) if at_embedding else 0,
  )
  for count, block, costs in layers(config):
    for name, cost in costs.items():
      found["ffn" if name == "ffn" else block.branches[name].kind] += count * (cost.matrices + cost.vectors)
    found["norms"] += count * len(block.norms) * norm(block.norm, D)
    found["position"] += block.mixer.shared_size()  # one parameter for all layers of this name
  found["norms"] += norm(config.embed.norm, D) + norm(config.final_norm, D)
  found["head"] = (not config.head.tied) * V * (width or D) + config.head.bias * V
  if config.encoder:
    found["encoder"] = params(config.encoder)["total"]
  return {**found, "total": sum(found.values())}


def active_params(config: ModelConfig) -> int:
  """Parameters that one token uses: all but those of the experts that it is not sent to."""
  return params(config)["total"] - int(total(config, lambda c: c.idle + c.idle_vectors))


def head_macs(config: ModelConfig) -> int:
  """Multiply-adds of a token's logits."""
  width = config.embed.dim or config.d_model
  return width * config.vocab_size + (config.embed.dim or 0) * config.d_model


def flops_per_token(config: ModelConfig, length: int, *, dense: bool = False) -> float:
  """Forward FLOPs of a token, averaged over a sequence of `length` tokens, two for each multiply-add.

  They are those of the matrices in use and the head (tied or not), plus the tokens' mixing: 4 N H per layer for each
  key seen (Kaplan 2001.08361, table 1: 2 N + 2 L ctx D, whose ctx is 2 x the mean keys of a causal mask). Norms,
  activations and the look-up of embeddings are not counted. `dense` also counts the scores that a mask discards, which
  a kernel computes that skips none; PaLM's MFU counts so (2204.02311, appendix B: 12 L N H T per training token).
  """
  macs = head_macs(config) + (config.embed.dim or 0) * config.d_model
  return 2 * (macs + total(config, lambda c: c.matrices - c.idle + c.mixing(length, dense)))


def train_flops_per_token(config: ModelConfig, length: int, *, dense: bool = False, frozen: bool = False) -> float:
  """FLOPs of a training token: 3 x forward, as each matmul has two gradients (6 N and the mixing). No recomputation.

  If weights are `frozen` they have no gradient: 4 N and the mixing. Their adapters are small and not counted.
  """
  forward = flops_per_token(config, length, dense=dense)
  mixing = 2 * total(config, lambda c: c.mixing(length, dense))
  return 2 * forward + mixing if frozen else 3 * forward


def kv_bytes_per_token(config: ModelConfig, bytes_per_element: float) -> float:
  """Bytes by which one more token lengthens the decoding state: 2 K H summed over layers.

  By the published convention, layers with a window count too, although they stop growing there (`state_bytes`).
  """
  return bytes_per_element * total(config, lambda c: c.growth)


def state_bytes(config: ModelConfig, batch: int, max_len: int, chunk: int = 1) -> int:
  """Bytes of the mixers' decoding state for `batch` rows of `max_len` tokens, written `chunk` at a time.

  Windows are respected. The ledger of positions (8 bytes per slot for each capacity, not for each layer) is not
  counted.
  """
  dtype = config.precision.state
  return batch * int(total(config, lambda c: c.state(max_len, chunk, dtype)))


MOMENTS = {  # elements of optimizer state from (config, parameters of the layers' matrices, all parameters)
  AdamW: lambda c, matrices, total: 2 * total,
  Lion: lambda c, matrices, total: total,
  SGD: lambda c, matrices, total: total if c.momentum else 0,
  Muon: lambda c, matrices, total: matrices + 2 * (total - matrices),
  # Adafactor keeps a row and a column for each matrix that is large enough, below 1 % of the parameters at the sizes
  # for which it is used; they are not counted.
  Adafactor: lambda c, matrices, total: 0,
}


def training_bytes(config: RunConfig) -> dict[str, int]:
  """Bytes that a train step holds for its parameters, over all devices: params, gradients, optimizer, ema, total.

  Gradients, moments and the average are f32 whatever the parameters are. With adapters, params counts them and all
  frozen weights, and the rest counts only adapters. Activations are left out: they depend on batch, length and remat
  (`llmarch bench` measures the peak).
  """
  trained = params(config.model)["total"]
  matrices = int(total(config.model, lambda c: c.matrices))
  stored = trained * BYTES[config.model.precision.param]
  if config.train.lora:
    from llmarch.adapt.lora import Adapters

    adapters = Adapters(config.train.lora, config.model)
    matrices = trained = adapters.size
    stored = 4 * trained + adapters.frozen_bytes
  algorithm = config.optimizer.algorithm
  found = {
    "params": stored,
    "gradients": 4 * trained,
    "optimizer": 4 * MOMENTS[type(algorithm)](algorithm, matrices, trained),
    "ema": 4 * trained if config.train.ema else 0,
  }
  return {**found, "total": sum(found.values())}
