"""The facts behind claims.py: each computes, from presets, cost model, ops or planner, whether a statement holds.

A function returns an Evidence of its statement, true or not, with the numbers. Units: GiB is 2^30 bytes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llmarch.analysis import cost, planner, roofline
from llmarch.config import ModelConfig
from llmarch.lab.claims import Evidence
from llmarch.layers.ffn import MLPConfig
from llmarch.ops import attention, norm, quant, rope
from llmarch.ops.activation import ACTIVATIONS
from llmarch.ops.attention import Keys
from llmarch.ops.loss import token_losses
from llmarch.presets import PRESETS

GiB = 2**30


def preset(name: str) -> ModelConfig:
  return PRESETS[name]()


def total(name: str) -> int:
  return cost.params(preset(name))["total"]


def mixers(config: ModelConfig) -> list:
  return [block.mixer for block in config.blocks.values()]


def kv_gib(name: str, tokens: int) -> float:
  """GiB of keys and values of one row of so many tokens, 16 bits, windows not respected."""
  return cost.kv_bytes_per_token(preset(name), 2) * tokens / GiB


def weights_gib(name: str, bits: float = 16) -> float:
  return total(name) * bits / 8 / GiB


def count(name: str, published: int) -> Evidence:
  return Evidence(total(name) == published, f"{name}: {total(name):,} parameters, published {published:,}")


# ------------------------------------------------------------------------------------------ published models


def llama_7b_count() -> Evidence:
  """Parameters of LLaMA 7B, with RMSNorm, RoPE and SwiGLU."""
  c, found = preset("llama_7b"), count("llama_7b", 6_738_415_616)
  block = c.blocks["layer"] if "layer" in c.blocks else next(iter(c.blocks.values()))
  parts = (block.norm.kind, block.mixer.position.kind, block.ffn.activation, block.ffn.gated)
  return Evidence(found.holds and parts == ("rmsnorm", "rope", "silu", True), f"{found.text}; {parts}")


def gpt_3_count() -> Evidence:
  c = preset("gpt_3_175b")
  n = total("gpt_3_175b")
  return Evidence(
    len(c.layers) == 96 and c.d_model == 12288 and abs(n / 175e9 - 1) < 0.005,
    f"{len(c.layers)} layers, d_model {c.d_model}, {n:,} parameters",
  )


def llama_2_70b_gqa() -> Evidence:
  """Grouped queries of Llama 2: 8 key-value heads in the 70B alone."""
  heads = {
    n: (mixers(preset(n))[0].num_heads, mixers(preset(n))[0].kv_heads)
    for n in ("llama_2_7b", "llama_2_13b", "llama_2_70b")
  }
  return Evidence(
    heads["llama_2_70b"] == (64, 8) and total("llama_2_70b") == 68_976_648_192,
    f"query and key-value heads {heads}; 70B has {total('llama_2_70b'):,} parameters",
  )


def all_llama_2_gqa() -> Evidence:
  heads = {n: mixers(preset(n))[0] for n in ("llama_2_7b", "llama_2_13b", "llama_2_70b")}
  grouped = {n: m.kv_heads < m.num_heads for n, m in heads.items()}
  return Evidence(all(grouped.values()), f"fewer key-value heads than heads: {grouped}")


def mixtral_counts() -> Evidence:
  n, active = total("mixtral_8x7b"), cost.active_params(preset("mixtral_8x7b"))
  ffn = next(iter(preset("mixtral_8x7b").blocks.values())).ffn
  return Evidence(
    (ffn.num_experts, ffn.router.k, n, active) == (8, 2, 46_702_792_704, 12_879_925_248),
    f"{ffn.num_experts} experts, top {ffn.router.k}, {n:,} parameters, {active:,} active",
  )


def mixtral_shared_expert() -> Evidence:
  ffn = next(iter(preset("mixtral_8x7b").blocks.values())).ffn
  return Evidence(ffn.shared is not None, f"shared expert: {ffn.shared}; each layer has a router of its own")


def mixtral_8x22b_counts() -> Evidence:
  n, active = total("mixtral_8x22b"), cost.active_params(preset("mixtral_8x22b"))
  return Evidence(round(n / 1e9) == 141 and round(active / 1e9) == 39, f"{n / 1e9:.1f}B, {active / 1e9:.1f}B active")


def glam_counts() -> Evidence:
  n, active = total("glam_64b_64e"), cost.active_params(preset("glam_64b_64e"))
  return Evidence(
    1e12 < n < 1.3e12 and 9e10 < active < 1.1e11, f"{n / 1e12:.3f}T parameters, {active / 1e9:.1f}B active"
  )


def deepseek_v3_count() -> Evidence:
  return count("deepseek_v3", 671_026_419_200)


def moe_capacity() -> Evidence:
  """Parameters over active parameters."""
  ratios = {n: total(n) / cost.active_params(preset(n)) for n in ("mixtral_8x7b", "glam_64b_64e", "deepseek_v3")}
  return Evidence(
    all(5 <= r <= 10 for r in ratios.values()),
    "total / active: " + ", ".join(f"{n} {r:.1f}" for n, r in ratios.items()),
  )


def deepseek_moe_compute() -> Evidence:
  """DeepSeekMoE 16B's active parameters against LLaMA 2 7B's: about 40 % of the compute, not 40 % more efficiency."""
  share = cost.active_params(preset("deepseek_moe_16b")) / total("llama_2_7b")
  return Evidence(
    share > 1.2,
    f"active parameters are {share:.0%} of Llama 2 7B's: 40 % of the compute, which is no gain of 40 % in"
    " expert parallelism",
  )


def mistral_window() -> Evidence:
  windows = {getattr(m, "window", None) for m in mixers(preset("mistral_7b"))}
  return Evidence(len(windows) > 1, f"windows of Mistral 7B's layers: {windows}; a mix of local and global is Gemma's")


def mistral_heads() -> Evidence:
  heads = {(m.num_heads, m.kv_heads) for m in mixers(preset("mistral_7b"))}
  return Evidence(len(heads) > 1, f"query and key-value heads of all layers: {heads}")


def gemma_2_alternates() -> Evidence:
  c = preset("gemma_2_2b")
  seen = [c.blocks[name].mixer.window for name in c.layers]
  return Evidence(
    seen[0] is not None and seen[1] is None and seen == seen[:2] * (len(seen) // 2),
    f"windows of the first layers: {seen[:4]}, {len(seen)} layers",
  )


def gemma_2_norms() -> Evidence:
  c = preset("gemma_2_2b")
  norms = {cost.block_norms(b) for b in c.blocks.values()}
  return Evidence(
    norms == {4} and total("gemma_2_2b") == 2_614_341_888,
    f"norms of a layer: {norms}; {total('gemma_2_2b'):,} parameters",
  )


def gemma_2_qk_norm() -> Evidence:
  norms = {n: [m.qk_norm is not None for m in mixers(preset(n))] for n in ("gemma_2_2b", "gemma_3_1b", "qwen_3_0_6b")}
  caps = [m.softcap for m in mixers(preset("gemma_2_2b"))]
  return Evidence(
    all(norms["gemma_2_2b"]),
    f"QK-norm: {norms}; Gemma 2 caps its scores at {caps} and its logits at {preset('gemma_2_2b').head.softcap}",
  )


def soft_cap_values() -> Evidence:
  c = preset("gemma_2_2b")
  return Evidence(
    {m.softcap for m in mixers(c)} == {50.0} and c.head.softcap == 30.0,
    f"attention {[m.softcap for m in mixers(c)]}, logits {c.head.softcap}",
  )


def qwen_vocabulary() -> Evidence:
  rows = {n: preset(n).vocab_size for n in ("qwen_1_5_0_5b", "qwen_2_5_7b", "qwen_3_8b")}
  return Evidence(any(v > 1e6 for v in rows.values()), f"rows of the table: {rows}")


def vocabularies() -> Evidence:
  rows = {n: preset(n).vocab_size for n in ("gpt_2_small", "llama_7b", "llama_3_8b", "qwen_2_5_0_5b")}
  return Evidence(list(rows.values()) == [50257, 32000, 128256, 151936], f"{rows}")


def palm_activation() -> Evidence:
  """Gated GELU in PaLM?"""
  block = next(iter(preset("palm_540b").blocks.values()))
  return Evidence(
    (block.ffn.activation, block.ffn.gated) in (("gelu", True), ("gelu_tanh", True)),
    f"PaLM: {block.ffn.activation}, gated {block.ffn.gated}; Gemma:"
    f" {next(iter(preset('gemma_2b').blocks.values())).ffn.activation}",
  )


def no_bias_in_llama() -> Evidence:
  """Parameters that are vectors but no norms."""
  c = preset("llama_7b")
  vectors = sum(n * (mixer.vectors + ffn.vectors) for n, _, mixer, ffn in cost.layers(c))
  return Evidence(vectors == 0 and not c.head.bias, f"{vectors} biases in {len(c.layers)} layers")


def parallel_presets() -> Evidence:
  kinds = {n: next(iter(preset(n).blocks.values())).residual for n in ("gpt_j_6b", "palm_540b", "llama_7b")}
  return Evidence(list(kinds.values()) == ["parallel", "parallel", "pre"], f"{kinds}")


MODERN = (
  "llama_3_8b",
  "llama_3_1_405b",
  "mistral_7b",
  "mixtral_8x7b",
  "qwen_2_5_7b",
  "qwen_3_8b",
  "gemma_2b",
  "gemma_2_9b",
  "gemma_3_4b",
  "deepseek_v3",
  "olmoe_1b_7b",
  "dbrx",
  "grok_1",
  "gpt_oss_20b",
  "falcon_180b",
  "nemotron_4_15b",
  "mpt_7b",
)


def architectures_converge() -> Evidence:
  """Share of decoders of 2023 to 2025 that have pre-norm (or a sandwich), RMSNorm, RoPE and a gate."""

  def modern(c: ModelConfig) -> bool:
    b = next(iter(c.blocks.values()))
    expert = getattr(b.ffn, "expert", b.ffn)
    position = getattr(b.mixer, "position", None)
    return (
      b.residual in ("pre", "sandwich")
      and b.norm.kind == "rmsnorm"
      and position is not None
      and position.kind == "rope"
      and expert.gated
    )

  share = np.mean([modern(preset(n)) for n in MODERN])
  return Evidence(
    bool(share >= 0.7),
    f"{share:.0%} of {len(MODERN)} families: {', '.join(n for n in MODERN if not modern(preset(n)))} differ",
  )


def head_dims() -> Evidence:
  dims = {
    n: mixers(preset(n))[0].dim(preset(n).d_model)
    for n in ("gpt_2_small", "palm_540b", "llama_7b", "gemma_7b", "nemotron_4_340b", "gpt_3_175b")
  }
  return Evidence(set(dims.values()) == {128}, f"{dims}")


def fewer_than_100_layers() -> Evidence:
  layers = {n: len(preset(n).layers) for n in ("gpt_3_175b", "palm_540b", "llama_3_1_405b", "llama_3_70b")}
  return Evidence(max(layers.values()) < 100, f"{layers}")


def feed_forward_ratios() -> Evidence:
  ratio = lambda n: next(iter(preset(n).blocks.values())).ffn.d_ff / preset(n).d_model
  found = {n: round(ratio(n), 2) for n in ("gpt_3_175b", "llama_7b", "llama_3_8b", "palm_540b")}
  return Evidence(found["gpt_3_175b"] == 4 and abs(found["llama_7b"] - 8 / 3) < 0.05, f"d_ff / d_model: {found}")


def longformer_is_tokens() -> Evidence:
  """Parameters of longformer-base: RoBERTa-base with 4098 positions and a second set of projections (2004.05150)."""
  D, L, V, T = 768, 12, 50265, 4098
  layer = 7 * (D * D + D) + 2 * (2 * D) + (D * 3072 + 3072) + (3072 * D + D)
  n = V * D + T * D + D + 2 * D + L * layer + D * D + D
  return Evidence(n > 4e12, f"longformer-base-4096 has {n:,} parameters; 4096 is its number of tokens")


# ------------------------------------------------------------------------------------------------ memory


def kv_of_opt_13b() -> Evidence:
  """2 * 40 layers * 5120 * 2 bytes a token; what 40 GB then holds (2309.06180, section 1 and figure 1)."""
  per_token = 2 * 40 * 5120 * 2
  weights, memory = 26e9, 40e9
  share = 0.95 - weights / memory
  return Evidence(
    per_token == 819_200 and share >= 0.3 - 1e-9,
    f"{per_token / 1024:.0f} KiB a token; of 40 GB, 26 are weights and about {share:.0%} is left for the cache:"
    " the number is of vLLM's set-up",
  )


def mqa_shrinks_kv_per_layer() -> Evidence:
  """Bytes a token with one key-value head against as many as heads, in every layer."""
  heads = mixers(preset("llama_7b"))[0].num_heads
  from llmarch.analysis.advise import share_heads

  ratio = cost.kv_bytes_per_token(preset("llama_7b"), 2) / cost.kv_bytes_per_token(
    share_heads(preset("llama_7b"), 1), 2
  )
  return Evidence(
    ratio == heads,
    f"{ratio:.0f} times fewer bytes with {heads} heads, layer by layer; the model still has"
    f" {len(preset('llama_7b').layers)} of them",
  )


def kv_saved_by_llama_3() -> Evidence:
  saved = {n: 1 - mixers(preset(n))[0].kv_heads / mixers(preset(n))[0].num_heads for n in ("llama_3_8b", "llama_3_70b")}
  return Evidence(
    all(s >= 0.5 for s in saved.values()),
    ", ".join(f"{n} {-s:.1%}" for n, s in saved.items()) + " against as many key-value heads as heads",
  )


def llama_3_70b_at_16k() -> Evidence:
  w, kv = weights_gib("llama_3_70b"), kv_gib("llama_3_70b", 16384)
  return Evidence(
    w + kv <= 48e9 / GiB,
    f"{w:.1f} GiB of weights and {kv:.1f} of cache in 16 bits; {weights_gib('llama_3_70b', 4):.1f} + {kv:.1f}"
    " with 4-bit codes",
  )


def mixtral_8x22b_at_16k() -> Evidence:
  w, kv = weights_gib("mixtral_8x22b", 4), kv_gib("mixtral_8x22b", 16384)
  return Evidence(
    w + kv <= 32e9 / GiB, f"{w:.1f} GiB of 4-bit codes and {kv:.1f} of cache, in the smallest form there is"
  )


def seven_billion_in_6_gb() -> Evidence:
  """Weights alone of 7e9 parameters, in 16 bits."""
  return Evidence(
    7e9 * 2 <= 6e9, f"{7e9 * 2 / GiB:.1f} GiB in 16 bits; 6 GB takes {6e9 * 8 / 7e9:.1f} bits a weight or fewer"
  )


def int4_saves_three_quarters() -> Evidence:
  bits = 8 * roofline.WEIGHTS["int4"]
  return Evidence(
    bits <= 4,
    f"{bits:.2f} bits with the scale of each group of 64, {1 - bits / 16:.0%} less than 16; the cache is not touched",
  )


def cache_of_100k_tokens() -> Evidence:
  gib = kv_gib("llama_3_8b", 100_000)
  return Evidence(abs(gib - 12.2) < 0.1, f"{gib:.1f} GiB for one row of Llama 3 8B in 16 bits")


def window_stops_the_cache() -> Evidence:
  c = preset("mistral_7b")
  sizes = [cost.state_bytes(c, 1, n) for n in (4096, 8192, 32768)]
  return Evidence(
    len(set(sizes)) == 1, f"Mistral 7B at 4k, 8k and 32k tokens: {[round(s / GiB, 2) for s in sizes]} GiB"
  )


def local_scores() -> Evidence:
  """Scores that a window computes of those that full causal attention does."""
  T, W = 8192, 512
  share = cost.mean_keys(T, "causal", W) / cost.mean_keys(T, "causal", None)
  return Evidence(
    0.3 <= 1 - share <= 0.7,
    f"{1 - share:.0%} fewer scores at {T} tokens and a window of {W}; it depends on W/T, and the weights do not shrink",
  )


def paged_blocks() -> Evidence:
  """Use of a cache by rows of random lengths: reserved whole at 2048 tokens, or in blocks of 16 (2309.06180)."""
  lengths = np.minimum(np.random.default_rng(0).lognormal(5.6, 0.9, 4000).astype(int) + 1, 2048)
  whole, paged = lengths.mean() / 2048, lengths.sum() / (np.ceil(lengths / 16) * 16).sum()
  return Evidence(
    bool(whole < 0.4 and paged > 0.96),
    f"of what is reserved, rows of 2048 use {whole:.0%}, blocks of 16 use {paged:.1%} (lognormal lengths, mean"
    f" {lengths.mean():.0f})",
  )


def batch_grows_with_paging() -> Evidence:
  lengths = np.minimum(np.random.default_rng(0).lognormal(5.6, 0.9, 4000).astype(int) + 1, 2048)
  ratio = 2048 / (np.ceil(lengths / 16) * 16).mean()
  return Evidence(
    bool(ratio >= 2),
    f"{ratio:.1f} times as many rows in the same memory, by these lengths; throughput grows with them while"
    " decoding is bound by weights",
  )


# ------------------------------------------------------------------------------------------ matrices and FLOPs


def heads_cost_the_same() -> Evidence:
  """4 D^2 parameters and equal FLOPs, whatever the number of heads."""
  from llmarch.layers.attention import AttentionConfig

  costs = {h: cost.attention(AttentionConfig(num_heads=h), 512) for h in (1, 8, 64)}
  found = {(c.matrices, c.mixing(1024, True)) for c in costs.values()}
  return Evidence(
    len(found) == 1 and costs[1].matrices == 4 * 512**2,
    f"matrices {[c.matrices for c in costs.values()]} for 1, 8 and 64 heads of 512 / n",
  )


def projection_blocks() -> Evidence:
  """Blocks of D x H in queries, keys and values of 8 heads: MHA 24, two key-value heads 12, one 10."""
  from llmarch.layers.attention import AttentionConfig

  D, H = 512, 64
  blocks = [
    (cost.attention(AttentionConfig(num_heads=8, num_kv_heads=k), D).matrices - D * D) // (D * H) for k in (8, 2, 1)
  ]
  return Evidence(blocks == [24, 12, 10], f"{blocks} for 8, 2 and 1 key-value heads")


def feed_forward(width: float, gated: bool, d_model: int = 768) -> int:
  """Parameters of a feed-forward of width * d_model, without biases; each is a multiply-add a token."""
  return cost.mlp(MLPConfig(d_ff=int(width * d_model), gated=gated), d_model).matrices


def eight_thirds() -> Evidence:
  """3 D (8/3 D) = 2 D (4 D): a gate at equal parameters needs a narrower hidden layer."""
  gated, plain = feed_forward(8 / 3, True), feed_forward(4, False)
  return Evidence(gated == plain, f"gated at 8/3 d: {gated:,} parameters; ungated at 4 d: {plain:,}")


def wider_keeps_parameters() -> Evidence:
  wide, plain = feed_forward(4, True), feed_forward(4, False)
  return Evidence(
    wide <= plain, f"as wide, a gated layer has {wide / plain:.2f} times the parameters: it must be narrower"
  )


def gates_cost_half_more() -> Evidence:
  ratio = feed_forward(4, True) / feed_forward(4, False)
  return Evidence(ratio == 1.5, f"{ratio} times the FLOPs at the same width; equal at 8/3 d")


def quadratic_attention() -> Evidence:
  """Multiply-adds between tokens of a whole sequence, exponent between 1k and 8k tokens."""
  mixing = lambda T: T * cost.mean_keys(T, "causal", None)
  slope = math.log(mixing(8192) / mixing(1024)) / math.log(8)
  return Evidence(abs(slope - 2) < 0.01, f"exponent {slope:.4f}")


def encoder_decoder_cross_term() -> Evidence:
  """Scores of an encoder of n tokens, a decoder of m, and the decoder's attention to the encoder."""
  grid = [(n, m) for n in (64, 128, 512) for m in (32, 96, 256)]
  rows = [(n * n, m * m, n * m) for n, m in grid]
  y = [n * n + m * (m + 1) / 2 + n * m for n, m in grid]
  a, b, c = np.linalg.lstsq(np.array(rows, float), np.array(y), rcond=None)[0]
  return Evidence(bool(abs(c) < 1e-6), f"{a:.2f} n^2 + {b:.2f} m^2 + {c:.2f} n m: the decoder reads the encoder")


def window_scores_linear() -> Evidence:
  W = 4096
  pairs = {T: T * cost.mean_keys(T, "causal", W) for T in (16384, 65536)}
  slope = math.log(pairs[65536] / pairs[16384]) / math.log(4)
  return Evidence(
    abs(slope - 1) < 0.1,
    f"pairs seen grow as T^{slope:.2f} from 16k to 64k tokens at W = {W}; a mask over dense scores would still"
    " compute T^2",
  )


def receptive_field() -> Evidence:
  """L layers of window W reach L (W - 1) + 1 tokens: the Jacobian's support, by powers of the visible pairs."""
  T, W, L = 64, 8, 3
  keys = Keys(jnp.arange(T)[None], jnp.zeros((1, T), jnp.int32), None)
  seen = np.asarray(attention.visible(keys, keys, mask="causal", window=W))[0]
  reach = int((np.linalg.matrix_power(seen.astype(int), L)[-1] > 0).sum())
  return Evidence(reach == L * (W - 1) + 1, f"{L} layers of window {W} reach {reach} tokens")


def causal_mask() -> Evidence:
  T = 7
  keys = Keys(jnp.arange(T)[None], jnp.zeros((1, T), jnp.int32), None)
  causal = np.asarray(attention.visible(keys, keys, mask="causal", window=None))[0]
  both = np.asarray(attention.visible(keys, keys, mask="bidirectional", window=None))[0]
  return Evidence(
    bool((causal == np.tril(np.ones((T, T), bool))).all() and both.all()),
    f"causal: lower triangle of {causal.sum()} pairs; bidirectional: all {both.sum()}",
  )


def sequential_depth() -> Evidence:
  """Steps that wait for another along the sequence: a scan of T, and an attention of one."""
  T = 64
  scan = jax.make_jaxpr(lambda x: jax.lax.scan(lambda h, x: (jnp.tanh(h + x), h), x[0], x))(jnp.ones((T, 4)))
  lengths = [e.params["length"] for e in scan.eqns if e.primitive.name == "scan"]
  attend = jax.make_jaxpr(lambda x: jax.nn.softmax(x @ x.T) @ x)(jnp.ones((T, 4)))
  loops = [e for e in attend.eqns if e.primitive.name in ("scan", "while")]
  return Evidence(
    lengths == [T] and not loops,
    f"a recurrence has {lengths[0]} steps in a row for {T} tokens; attention's program has no loop",
  )


# -------------------------------------------------------------------------------------------------- numerics


def rms_norm_is_rescaling_invariant() -> Evidence:
  x = jax.random.normal(jax.random.key(0), (5, 64))
  f = lambda x: norm.rms_norm(x, jnp.ones(64), eps=0.0)
  scaled, shifted = (float(jnp.max(jnp.abs(f(y) - f(x)))) for y in (8 * x, x + 3))
  return Evidence(
    scaled < 1e-5 and shifted > 0.1, f"largest change: {scaled:.1e} when scaled by 8, {shifted:.2f} when shifted by 3"
  )


def rms_norm_scales_learning() -> Evidence:
  """The gradient by W of f(norm(W x)) is divided by s where W is multiplied by s: an implicit learning rate."""
  W, x = jax.random.normal(jax.random.key(0), (16, 16)), jax.random.normal(jax.random.key(1), (16,))
  g = jax.grad(lambda W: jnp.sum(jnp.sin(norm.rms_norm(W @ x, jnp.ones(16), eps=0.0))))
  ratio = float(jnp.linalg.norm(g(4 * W)) / jnp.linalg.norm(g(W)))
  return Evidence(abs(ratio - 0.25) < 1e-4, f"gradient at 4 W over that at W: {ratio:.5f}")


def rms_uses_only_variance() -> Evidence:
  x = jax.random.normal(jax.random.key(0), (64,)) + 2.0
  mean_square, var = float(jnp.mean(x**2)), float(jnp.var(x))
  return Evidence(
    abs(mean_square - var) < 1e-3,
    f"mean square {mean_square:.3f} = variance {var:.3f} + mean^2 {float(jnp.mean(x)) ** 2:.3f}",
  )


def layer_norm_needs_zero_mean() -> Evidence:
  """Whether a shift of its input changes LayerNorm."""
  x = jax.random.normal(jax.random.key(0), (5, 64))
  f = lambda x: norm.layer_norm(x, jnp.ones(64), jnp.zeros(64), eps=1e-6)
  change = float(jnp.max(jnp.abs(f(x + 3) - f(x))))
  return Evidence(
    change > 1e-3,
    f"LayerNorm changes by {change:.1e} when all its input is shifted by 3: it is RMSNorm that is sensitive to"
    " the mean",
  )


def layer_norm_slow_by_root() -> Evidence:
  """Square roots a row: both norms take one."""
  roots = lambda f: sum(e.primitive.name in ("rsqrt", "sqrt") for e in jax.make_jaxpr(f)(jnp.ones((4, 8))).eqns)
  ln = roots(lambda x: norm.layer_norm(x, None, None, eps=1e-6))
  rms = roots(lambda x: norm.rms_norm(x, jnp.ones(8), eps=1e-6))
  return Evidence(
    ln > rms, f"roots in the program: LayerNorm {ln}, RMSNorm {rms}; what differs is a pass over the data for the mean"
  )


def norm_parameters() -> Evidence:
  from llmarch.layers.norm import LayerNorm, RMSNorm

  D = 96
  sizes = cost.norm(LayerNorm(), D), cost.norm(RMSNorm(), D)
  return Evidence(sizes == (2 * D, D), f"LayerNorm {sizes[0]}, RMSNorm {sizes[1]} parameters for {D} features")


def half_precision_norms() -> Evidence:
  """x^2 overflows float16 beyond sqrt(65504), for either norm; ours take statistics in f32."""
  x = np.full(64, 300, np.float16)
  with np.errstate(over="ignore"):
    naive = float(np.mean(x * x))
  ours = float(norm.rms_norm(jnp.asarray(x), jnp.ones(64), eps=1e-6)[0])
  return Evidence(
    not math.isfinite(naive) and abs(ours - 1) < 1e-2,
    f"mean of squares of 300 in float16: {naive}; limit {65504**0.5:.1f}; with f32 statistics {ours:.3f}",
  )


def softmax_overflow() -> Evidence:
  """exp overflows float16 above ln 65504; with the maximum subtracted it never does."""
  limit = math.log(65504)
  x = np.array([12.0, 0.0], np.float16)
  with np.errstate(over="ignore", invalid="ignore"):
    naive = np.exp(x) / np.exp(x).sum()
  safe = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
  return Evidence(
    bool(np.isnan(naive).any() and np.isfinite(safe).all()),
    f"limit {limit:.2f}; naive softmax of 12 in float16 {naive.tolist()}, with the maximum subtracted {safe.tolist()}",
  )


def swiglu_overflow() -> Evidence:
  """A product of two finite float16 numbers."""
  with np.errstate(over="ignore"):
    product = float(np.float16(300) * np.float16(300))
  return Evidence(not math.isfinite(product), f"300 x 300 in float16 = {product}")


def gelu_tanh_error() -> Evidence:
  x = np.linspace(-6, 6, 240_001)
  exact = np.array(jax.scipy.stats.norm.cdf(jnp.asarray(x))) * x
  tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  at = int(np.argmax(np.abs(exact - tanh)))
  return Evidence(
    abs(np.abs(exact - tanh)[at] - 4.73e-4) < 2e-5, f"largest error {np.abs(exact - tanh)[at]:.2e} at {abs(x[at]):.2f}"
  )


def silu_is_smooth() -> Evidence:
  second = jax.vmap(jax.grad(jax.grad(ACTIVATIONS["silu"])))(jnp.linspace(-8.0, 8.0, 2001))
  at_zero = float(jax.grad(ACTIVATIONS["silu"])(0.0))
  return Evidence(
    bool(jnp.isfinite(second).all()) and abs(at_zero - 0.5) < 1e-6,
    f"SiLU's slope at 0 is {at_zero}, its second derivative at most {float(jnp.max(jnp.abs(second))):.2f};"
    " ReLU's slope jumps from 0 to 1",
  )


def rope_decays() -> Evidence:
  """The bound |sum of partial rotations| of 2104.09864, section 3.4.3, for 128 dimensions: an upper bound alone."""
  theta = 10000.0 ** (-np.arange(64) / 64)
  bound = lambda s: np.mean([abs(np.exp(1j * s * theta[:i]).sum()) for i in range(1, 65)])
  at = {s: round(float(bound(s)), 1) for s in (0, 10, 100, 1000, 2000)}
  falls = [at[s] for s in (0, 10, 100, 1000)]
  return Evidence(
    falls == sorted(falls, reverse=True) and at[1000] < at[0] / 5,
    f"mean bound at distances {at}: it falls, and not always (2000)",
  )


def rope_pairs_are_rotations() -> Evidence:
  """The element-wise form is the block-diagonal rotation matrix."""
  H, p = 8, 5
  freqs = np.asarray(rope.frequencies(H, 10000.0), np.float64)
  x = np.random.default_rng(0).normal(size=H)
  c, s = np.cos(p * freqs), np.sin(p * freqs)
  a, b = x[: H // 2], x[H // 2 :]
  fast = np.concatenate([a * c - b * s, b * c + a * s])
  R = np.block([[np.diag(c), -np.diag(s)], [np.diag(s), np.diag(c)]])
  return Evidence(
    bool(np.allclose(R @ x, fast) and np.allclose(R @ R.T, np.eye(H))),
    f"largest difference {np.abs(R @ x - fast).max():.1e}; R R^T = 1",
  )


def xpos_keeps_high_frequencies() -> Evidence:
  """xPos's zeta of the highest and the lowest frequency (2212.10554): it damps the high ones."""
  H, gamma = 64, 0.4
  zeta = (np.arange(0, H, 2) / H + gamma) / (1 + gamma)
  return Evidence(zeta[0] >= 1, f"zeta is {zeta[0]:.3f} for the highest frequency and {zeta[-1]:.2f} for the lowest")


def learned_positions_end() -> Evidence:
  """A table of 512 rows has none for token 800: refused by our config."""
  from llmarch.config import UserError
  from llmarch.layers.position import Learned

  try:
    Learned(length=512).check_against(64, 800)
  except UserError as e:
    return Evidence(True, str(e))
  return Evidence(False, "a table of 512 rows was accepted for 800 tokens")


def packing_is_neutral() -> Evidence:
  """With documents kept apart, a shift of one document's positions changes nothing for RoPE."""
  keys = jax.random.split(jax.random.key(0), 2)
  q, k = (jax.random.normal(key, (1, 6, 1, 16)) for key in keys)
  freqs = rope.frequencies(16, 10000.0)
  scores = lambda shift: _turned_scores(q, k, jnp.arange(6)[None] + shift, freqs)
  change = float(jnp.max(jnp.abs(scores(0) - scores(100))))
  return Evidence(change < 1e-4, f"scores change by {change:.1e} when positions start at 100")


def _turned_scores(q, k, positions, freqs):
  angle = positions[..., None, None] * jnp.asarray(freqs, jnp.float32)
  c, s = jnp.cos(angle), jnp.sin(angle)
  turn = lambda x: jnp.concatenate([x[..., :8] * c - x[..., 8:] * s, x[..., 8:] * c + x[..., :8] * s], -1)
  return jnp.einsum("btnh,bsnh->bnts", turn(q), turn(k))


def z_loss_gradient() -> Evidence:
  logits = jax.random.normal(jax.random.key(0), (7,)) + 3
  g = jax.grad(lambda x: token_losses(x, jnp.int32(0))[1] ** 2)(logits)
  want = 2 * jax.nn.logsumexp(logits) * jax.nn.softmax(logits)
  error = float(jnp.max(jnp.abs(g - want)))
  return Evidence(error < 1e-5, f"gradient of log^2 Z is 2 log Z softmax, within {error:.1e}")


def pre_norm_keeps_the_stream() -> Evidence:
  """d x_L / d x_0 of a pre-norm stack is 1 plus what the branches add; of a post-norm one it is not."""
  W = 0.3 * jax.random.normal(jax.random.key(0), (4, 8, 8))
  x = jax.random.normal(jax.random.key(1), (8,))
  n = lambda x: norm.rms_norm(x, jnp.ones(8), eps=1e-6)

  def pre(x, on):
    for w in W:
      x = x + on * jnp.tanh(w @ n(x))
    return x

  identity = jax.jacobian(lambda x: pre(x, 0.0))(x)
  post = jax.jacobian(lambda x: n(x))(x)
  return Evidence(
    bool(jnp.allclose(identity, jnp.eye(8)) and not jnp.allclose(post, jnp.eye(8), atol=0.1)),
    "with silent branches the Jacobian of a pre-norm stack is the identity, of a post-norm one that of its norms",
  )


def linear_attention_reorders() -> Evidence:
  """phi(Q) (phi(K)^T V) over its normaliser equals the quadratic form (2006.16236, eq. 4 to 6), elu + 1."""
  q, k, v = np.random.default_rng(0).normal(size=(3, 10, 4))
  phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  w = phi(q) @ phi(k).T
  quadratic = (w / w.sum(1, keepdims=True)) @ v
  linear = phi(q) @ (phi(k).T @ v) / (phi(q) @ phi(k).sum(0))[:, None]
  return Evidence(
    bool(np.allclose(quadratic, linear)),
    f"the two orders differ by {np.abs(quadratic - linear).max():.1e}; the second is linear in the length",
  )


def zero_order_hold() -> Evidence:
  """A state space x' = A x + B u with u held for a step: exp(dA), and A^-1 (exp(dA) - 1) B (2312.00752, eq. 4)."""
  A, B, d = -0.7, 1.3, 0.25
  exact = math.exp(d * A), (math.exp(d * A) - 1) / A * B
  n, x, y = 100_000, 1.0, 0.0
  for _ in range(n):
    x, y = x + d / n * A * x, y + d / n * (A * y + B)
  return Evidence(
    abs(x - exact[0]) < 1e-5 and abs(y - exact[1]) < 1e-5,
    f"A: {exact[0]:.5f}, B: {exact[1]:.5f}; {n} Euler steps give {x:.5f}, {y:.5f}",
  )


def compressive_range() -> Evidence:
  """Layers times memory plus c times the compressed memory (1911.05507, section 3)."""
  L, n, c = 12, 512, 3
  txl, compressive = L * n, L * (n // 2 + c * n // 2)
  return Evidence(
    compressive == 2 * txl, f"{txl:,} tokens against {compressive:,} with half of the slots compressed {c} times"
  )


def int8_weights() -> Evidence:
  """Relative RMS error of int8 by channel on normal weights."""
  w = jax.random.normal(jax.random.key(0), (256, 256))
  coded = quant.quantize(w, (0,), "int8")
  decoded = quant.decode(coded.codes, "int8") * quant.spread(coded.scale, w.shape)
  error = float(jnp.sqrt(jnp.mean((decoded - w) ** 2) / jnp.mean(w**2)))
  return Evidence(error < 0.01, f"{error:.3%} relative RMS error, {8 * roofline.WEIGHTS['int8']:.2f} bits a weight")


# -------------------------------------------------------------------------------------------------- inference


def decode_bound_540b() -> Evidence:
  """The published decode step of PaLM 540B, 64 rows in int8 (2211.05102, table 2), beside our roofline of it."""
  row = next(r for r in planner.PUBLISHED if (r.model, r.phase, r.batch) == ("palm_540b", "decode", 64))
  step, bound = 1e3 * row.seconds / row.length, 1e3 * planner.published(row).latency_s / row.length
  return Evidence(
    bound < step,
    f"published {step:.1f} ms a step; our bound for the layout is {bound:.1f} ms. Nothing was executed here",
  )


def palm_mfu() -> Evidence:
  """2 N tokens/s over peak: 76 % of 64 TPU v4 at 2048 tokens in the prefill of PaLM 540B (2211.05102, table 2)."""
  row = next(r for r in planner.PUBLISHED if (r.model, r.phase, r.batch) == ("palm_540b", "prefill", 512))
  N, tokens, seconds, chips, peak = total("palm_540b"), row.batch * row.length, row.seconds, row.chips, 275e12
  mfu = 2 * N * tokens / seconds / (chips * peak)
  return Evidence(
    abs(mfu - 0.76) < 0.01, f"2 N tokens / (chips x peak x {seconds} s) = {mfu:.1%}, with tensor partitioning alone"
  )


def mqa_speeds_long_decoding() -> Evidence:
  """Bytes that a decode step reads, 64 rows at 16k tokens: heads, 8 and 1 key-value heads (LLaMA 7B on an H200)."""
  from llmarch.analysis.advise import share_heads
  from llmarch.analysis.hardware import CHIPS

  c = preset("llama_7b")
  ms = {k: 1e3 * roofline.decode_seconds(share_heads(c, k), CHIPS["h200"], batch=64, context=16384) for k in (32, 8, 1)}
  return Evidence(
    ms[32] > 3 * ms[8] > 3 * ms[1],
    "least ms a step: " + ", ".join(f"{k} key-value heads {t:.1f}" for k, t in ms.items()),
  )


def decode_is_bound_by_memory() -> Evidence:
  """FLOPs a byte of a decode step at batch 1, against what a chip needs to be busy."""
  c = preset("llama_7b")
  intensity = roofline.decode_flops(c, 2048) / (roofline.weight_bytes_read(c, 1) + cost.state_bytes(c, 1, 2048))
  return Evidence(intensity < 10, f"{intensity:.2f} FLOPs a byte; an H200 needs 206")


def latency_grows_with_layers() -> Evidence:
  """Steps of the decode path that wait for each other: layers."""
  layers = {n: len(preset(n).layers) for n in ("llama_3_1_405b", "palm_540b")}
  return Evidence(
    layers["llama_3_1_405b"] > layers["palm_540b"], f"{layers}: a smaller model with more layers has the longer chain"
  )
