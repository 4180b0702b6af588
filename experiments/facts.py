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
from llmarch.layers.mask import Bidirectional, Causal
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
  """Parameters of LLaMA 7B, with RMSNorm, RoPE and SwiGLU.

  Holds if the count is 6,738,415,616 and the block has RMSNorm, RoPE and gated SiLU.
  """
  c, found = preset("llama_7b"), count("llama_7b", 6_738_415_616)
  block = c.blocks["layer"] if "layer" in c.blocks else next(iter(c.blocks.values()))
  parts = (block.norm.kind, block.mixer.position.kind, block.ffn.activation, block.ffn.gated)
  return Evidence(found.holds and parts == ("rmsnorm", "rope", "silu", True), f"{found.text}; {parts}")


def gpt_3_count() -> Evidence:
  """Holds if there are 96 layers of width 12288, and the count is within 0.5 % of 175B."""
  c = preset("gpt_3_175b")
  n = total("gpt_3_175b")
  return Evidence(
    len(c.layers) == 96 and c.d_model == 12288 and abs(n / 175e9 - 1) < 0.005,
    f"{len(c.layers)} layers, d_model {c.d_model}, {n:,} parameters",
  )


def llama_2_70b_gqa() -> Evidence:
  """Grouped queries of Llama 2: 8 key-value heads in the 70B alone.

  Holds if the 70B has 64 heads, 8 key-value heads and 68,976,648,192 parameters.
  """
  heads = {
    n: (mixers(preset(n))[0].num_heads, mixers(preset(n))[0].kv_heads)
    for n in ("llama_2_7b", "llama_2_13b", "llama_2_70b")
  }
  return Evidence(
    heads["llama_2_70b"] == (64, 8) and total("llama_2_70b") == 68_976_648_192,
    f"query and key-value heads {heads}; 70B has {total('llama_2_70b'):,} parameters",
  )


def all_llama_2_gqa() -> Evidence:
  """Holds if all three sizes have fewer key-value heads than heads."""
  heads = {n: mixers(preset(n))[0] for n in ("llama_2_7b", "llama_2_13b", "llama_2_70b")}
  grouped = {n: m.kv_heads < m.num_heads for n, m in heads.items()}
  return Evidence(all(grouped.values()), f"fewer key-value heads than heads: {grouped}")


def mixtral_counts() -> Evidence:
  """Holds if experts, top k, parameters and active parameters are the published ones, to the last digit."""
  n, active = total("mixtral_8x7b"), cost.active_params(preset("mixtral_8x7b"))
  ffn = next(iter(preset("mixtral_8x7b").blocks.values())).ffn
  return Evidence(
    (ffn.num_experts, ffn.router.k, n, active) == (8, 2, 46_702_792_704, 12_879_925_248),
    f"{ffn.num_experts} experts, top {ffn.router.k}, {n:,} parameters, {active:,} active",
  )


def mixtral_shared_expert() -> Evidence:
  """Holds if the layers have an expert that every token passes."""
  ffn = next(iter(preset("mixtral_8x7b").blocks.values())).ffn
  return Evidence(ffn.shared is not None, f"shared expert: {ffn.shared}; each layer has a router of its own")


def mixtral_8x22b_counts() -> Evidence:
  """Holds if they round to 141B and 39B."""
  n, active = total("mixtral_8x22b"), cost.active_params(preset("mixtral_8x22b"))
  return Evidence(round(n / 1e9) == 141 and round(active / 1e9) == 39, f"{n / 1e9:.1f}B, {active / 1e9:.1f}B active")


def glam_counts() -> Evidence:
  """Holds if there are 1.0T to 1.3T parameters, 90B to 110B of them active."""
  n, active = total("glam_64b_64e"), cost.active_params(preset("glam_64b_64e"))
  return Evidence(
    1e12 < n < 1.3e12 and 9e10 < active < 1.1e11, f"{n / 1e12:.3f}T parameters, {active / 1e9:.1f}B active"
  )


def deepseek_v3_count() -> Evidence:
  """Holds if the count is 671,026,419,200, and every layer's mask is causal."""
  return count("deepseek_v3", 671_026_419_200)


def moe_capacity() -> Evidence:
  """Parameters over active parameters.

  Holds if the ratio lies between 5 and 10 for Mixtral 8x7B, GLaM and DeepSeek-V3 alike.
  """
  ratios = {n: total(n) / cost.active_params(preset(n)) for n in ("mixtral_8x7b", "glam_64b_64e", "deepseek_v3")}
  return Evidence(
    all(5 <= r <= 10 for r in ratios.values()),
    "total / active: " + ", ".join(f"{n} {r:.1f}" for n, r in ratios.items()),
  )


def deepseek_moe_compute() -> Evidence:
  """DeepSeekMoE 16B's active parameters over LLaMA 2 7B's, which it is compared with.

  Holds if the share is within 0.05 of 1 / 1.4, what 40 % more efficiency would be.
  """
  share = cost.active_params(preset("deepseek_moe_16b")) / total("llama_2_7b")
  return Evidence(
    abs(share - 1 / 1.4) < 0.05, f"{share:.0%} of the compute of LLaMA 2 7B, which is what the paper's 40 % is of"
  )


def mistral_window() -> Evidence:
  """Holds if its layers have more than one window."""
  windows = {getattr(m, "window", None) for m in mixers(preset("mistral_7b"))}
  return Evidence(len(windows) > 1, f"windows of Mistral 7B's layers: {windows}; a mix of local and global is Gemma's")


def mistral_heads() -> Evidence:
  """Holds if its layers have more than one pair of head counts."""
  heads = {(m.num_heads, m.kv_heads) for m in mixers(preset("mistral_7b"))}
  return Evidence(len(heads) > 1, f"query and key-value heads of all layers: {heads}")


def gemma_2_alternates() -> Evidence:
  """Holds if windows and none take turns through all layers, a window first."""
  c = preset("gemma_2_2b")
  seen = [c.blocks[name].mixer.window for name in c.layers]
  return Evidence(
    seen[0] is not None and seen[1] is None and seen == seen[:2] * (len(seen) // 2),
    f"windows of the first layers: {seen[:4]}, {len(seen)} layers",
  )


def gemma_2_norms() -> Evidence:
  """Holds if every layer has 4 norms and the 2B has 2,614,341,888 parameters."""
  c = preset("gemma_2_2b")
  norms = {len(b.norms) for b in c.blocks.values()}
  return Evidence(
    norms == {4} and total("gemma_2_2b") == 2_614_341_888,
    f"norms of a layer: {norms}; {total('gemma_2_2b'):,} parameters",
  )


def gemma_2_qk_norm() -> Evidence:
  """Holds if all attention of Gemma 2 2B norms its queries and keys."""
  norms = {n: [m.qk_norm is not None for m in mixers(preset(n))] for n in ("gemma_2_2b", "gemma_3_1b", "qwen_3_0_6b")}
  caps = [m.softcap for m in mixers(preset("gemma_2_2b"))]
  return Evidence(
    all(norms["gemma_2_2b"]),
    f"QK-norm: {norms}; Gemma 2 caps its scores at {caps} and its logits at {preset('gemma_2_2b').head.softcap}",
  )


def soft_cap_values() -> Evidence:
  """Holds if they are 50 in every layer and 30 at the head."""
  c = preset("gemma_2_2b")
  return Evidence(
    {m.softcap for m in mixers(c)} == {50.0} and c.head.softcap == 30.0,
    f"attention {[m.softcap for m in mixers(c)]}, logits {c.head.softcap}",
  )


def qwen_vocabulary() -> Evidence:
  """Holds if a Qwen preset has more than a million rows."""
  rows = {n: preset(n).vocab_size for n in ("qwen_1_5_0_5b", "qwen_2_5_7b", "qwen_3_8b")}
  return Evidence(any(v > 1e6 for v in rows.values()), f"rows of the table: {rows}")


def vocabularies() -> Evidence:
  """Holds if they are 50,257, 32,000, 128,256 and 151,936."""
  rows = {n: preset(n).vocab_size for n in ("gpt_2_small", "llama_7b", "llama_3_8b", "qwen_2_5_0_5b")}
  return Evidence(list(rows.values()) == [50257, 32000, 128256, 151936], f"{rows}")


def palm_activation() -> Evidence:
  """Gated GELU in PaLM?

  Holds if PaLM 540B's feed-forward is a gated GELU.
  """
  block = next(iter(preset("palm_540b").blocks.values()))
  return Evidence(
    (block.ffn.activation, block.ffn.gated) in (("gelu", True), ("gelu_tanh", True)),
    f"PaLM: {block.ffn.activation}, gated {block.ffn.gated}; Gemma:"
    f" {next(iter(preset('gemma_2b').blocks.values())).ffn.activation}",
  )


def no_bias_in_llama() -> Evidence:
  """Parameters that are vectors but no norms.

  Holds if LLaMA 7B has none.
  """
  c = preset("llama_7b")
  vectors = cost.total(c, lambda row: row.vectors)
  return Evidence(vectors == 0 and not c.head.bias, f"{vectors} biases in {len(c.layers)} layers")


def parallel_presets() -> Evidence:
  """Holds if GPT-J and PaLM are parallel and LLaMA is not."""
  kinds = {n: next(iter(preset(n).blocks.values())).residual.kind for n in ("gpt_j_6b", "palm_540b", "llama_7b")}
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
  """Share of decoders of 2023 to 2025 that have pre-norm (or a sandwich), RMSNorm, RoPE and a gate.

  Holds if the share is at least 70 % of one preset a family.
  """

  def modern(c: ModelConfig) -> bool:
    b = next(iter(c.blocks.values()))
    expert = getattr(b.ffn, "expert", b.ffn)
    position = getattr(b.mixer, "position", None)
    return (
      b.residual.kind in ("pre", "sandwich")
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
  """Holds if all of six presets have 128."""
  dims = {
    n: mixers(preset(n))[0].dim(preset(n).d_model)
    for n in ("gpt_2_small", "palm_540b", "llama_7b", "gemma_7b", "nemotron_4_340b", "gpt_3_175b")
  }
  return Evidence(set(dims.values()) == {128}, f"{dims}")


def fewer_than_100_layers() -> Evidence:
  """Holds if the deepest of four presets has fewer."""
  layers = {n: len(preset(n).layers) for n in ("gpt_3_175b", "palm_540b", "llama_3_1_405b", "llama_3_70b")}
  return Evidence(max(layers.values()) < 100, f"{layers}")


def feed_forward_ratios() -> Evidence:
  """Holds if GPT-3 has exactly 4 and LLaMA 7B is within 0.05 of 8/3."""
  ratio = lambda n: next(iter(preset(n).blocks.values())).ffn.d_ff / preset(n).d_model
  found = {n: round(ratio(n), 2) for n in ("gpt_3_175b", "llama_7b", "llama_3_8b", "palm_540b")}
  return Evidence(found["gpt_3_175b"] == 4 and abs(found["llama_7b"] - 8 / 3) < 0.05, f"d_ff / d_model: {found}")


def longformer_is_tokens() -> Evidence:
  """Parameters of longformer-base: RoBERTa-base with 4098 positions and a second set of projections (2004.05150).

  Holds if the count is above 4e12.
  """
  D, L, V, T = 768, 12, 50265, 4098
  layer = 7 * (D * D + D) + 2 * (2 * D) + (D * 3072 + 3072) + (3072 * D + D)
  n = V * D + T * D + D + 2 * D + L * layer + D * D + D
  return Evidence(n > 4e12, f"longformer-base-4096 has {n:,} parameters; 4096 is its number of tokens")


def transformer_base_count() -> Evidence:
  """Parameters of the base Transformer (1706.03762, table 3): 6 + 6 layers of 512, tied embeddings of 37,000.

  Holds if embeddings, attention, feed-forwards and norms alone are within 4 % of the published 65M.
  """
  D, F, V = 512, 2048, 37000
  ffn, norms = 2 * D * F + F + D, 2 * D
  encoder, decoder = 6 * (4 * D * D + ffn + 2 * norms), 6 * (8 * D * D + ffn + 3 * norms)
  n = V * D + encoder + decoder
  return Evidence(abs(n / 65e6 - 1) < 0.04, f"{n:,}, {n / 65e6 - 1:+.1%}: its vocabulary is published in round numbers")


def gpt_3_alternates() -> Evidence:
  """Holds if every second of GPT-3's 96 layers has a band, and the bands save FLOPs at 2,048 tokens."""
  c = preset("gpt_3_175b")
  windows = [c.blocks[name].mixer.window for name in c.layers]
  share = Causal().mean_keys(2048, windows[1]) / Causal().mean_keys(2048, None)
  return Evidence(
    windows == [None, windows[1]] * 48 and share < 1,
    f"48 dense layers and 48 banded, whose queries see {share:.0%} of the keys (band {windows[1]}, unpublished)",
  )


def rope_is_inside_attention() -> Evidence:
  """Holds if all LLaMA and Mistral presets turn queries and keys in every layer and add nothing at the embedding."""
  names = [n for n in PRESETS if n.startswith(("llama", "mistral"))]
  inside = lambda c: all(m.position.kind == "rope" for m in mixers(c)) and c.embed.position is None
  outside = preset("gpt_2_small")
  return Evidence(
    all(inside(preset(n)) for n in names) and outside.embed.position is not None,
    f"{len(names)} presets; GPT-2 adds {outside.embed.position.kind} positions to its input",
  )


def position_families() -> Evidence:
  """Holds if GPT-3 has learned positions, BLOOM and MPT ALiBi, GLaM a bias as T5's, LLaMA, PaLM and Qwen RoPE."""
  kind = lambda c: (c.embed.position or next(iter(mixers(c))).position).kind
  names = ("gpt_3_175b", "bloom_176b", "mpt_7b", "glam_64b_64e", "llama_7b", "palm_540b", "qwen_3_8b")
  found = {n: kind(preset(n)) for n in names}
  return Evidence(list(found.values()) == ["learned", "alibi", "alibi", "t5_bias", "rope", "rope", "rope"], f"{found}")


def llama_norms_before_branches() -> Evidence:
  """Holds if all LLaMA presets norm what enters a branch, and by RMSNorm."""
  names = [n for n in PRESETS if n.startswith("llama")]
  found = {(b.residual.kind, b.norm.kind) for n in names for b in preset(n).blocks.values()}
  return Evidence(found == {("pre", "rmsnorm")}, f"{len(names)} presets: {found}")


def gated_silu_users() -> Evidence:
  """Holds if LLaMA, PaLM and Mistral have gated SiLU in every layer."""
  names = ("llama_7b", "llama_3_8b", "palm_540b", "mistral_7b")
  found = {n: {(b.ffn.activation, b.ffn.gated) for b in preset(n).blocks.values()} for n in names}
  return Evidence(all(kinds == {("silu", True)} for kinds in found.values()), f"{found}")


def heads_times_dim_is_width() -> Evidence:
  """Holds if heads x head dimension is the width in every preset that has plain attention."""
  plain = {n: make() for n, make in PRESETS.items()}
  ratio = {
    n: mixers(c)[0].num_heads * mixers(c)[0].dim(c.d_model) / c.d_model
    for n, c in plain.items()
    if mixers(c)[0].kind == "attention"
  }
  odd = {n: round(r, 3) for n, r in ratio.items() if r != 1}
  return Evidence(not odd, f"{len(odd)} of {len(ratio)} presets have another ratio: {odd}")


def switch_of_two_matches_t5() -> Evidence:
  """Active parameters of Switch-Base, 12 of whose layers have 128 experts, with k of them a token (2101.03961, table 1,
  matches its FLOPs to T5-Base's).

  Holds if two experts leave it within 2 % of T5-Base.
  """
  t5, router, expert = 222_903_552, 12 * 768 * 128, 12 * 2 * 768 * 3072
  active = {k: t5 + router + (k - 1) * expert for k in (1, 2)}
  return Evidence(
    abs(active[2] / t5 - 1) < 0.02,
    f"T5-Base has {t5:,} parameters; with one expert a token uses {active[1] / t5 - 1:+.1%}, with two"
    f" {active[2] / t5 - 1:+.1%}",
  )


# ------------------------------------------------------------------------------------------------ memory


def kv_of_opt_13b() -> Evidence:
  """OPT-13B, 40 layers of 5120, in 16 bits on 40 GB (2309.06180, figure 1): 800 KiB of keys and values a token.

  Holds if rows of its context, 2,048 tokens, fit beside the weights and take at least 30 % of the memory.
  """
  per_token, weights, memory = 2 * 40 * 5120 * 2, 2 * 13e9, 40e9
  rows = int((memory - weights) // (2048 * per_token))
  share = rows * 2048 * per_token / memory
  return Evidence(
    share >= 0.3,
    f"{per_token // 1024} KiB a token: beside {weights / memory:.0%} of weights fit {rows} rows of 2,048 tokens,"
    f" {share:.0%} of the memory. It is of vLLM's set-up, not of 2211.05102, whose 30 % is a reserve",
  )


def mqa_shrinks_kv_per_layer() -> Evidence:
  """Bytes a token with one key-value head against as many as heads, in every layer.

  Holds if the ratio is the number of heads, exactly.
  """
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
  """Holds if both save at least half against as many key-value heads as heads."""
  saved = {n: 1 - mixers(preset(n))[0].kv_heads / mixers(preset(n))[0].num_heads for n in ("llama_3_8b", "llama_3_70b")}
  return Evidence(
    all(s >= 0.5 for s in saved.values()),
    ", ".join(f"{n} {-s:.1%}" for n, s in saved.items()) + " against as many key-value heads as heads",
  )


def llama_3_70b_at_16k() -> Evidence:
  """Weights and 16,384 tokens of cache, nothing else.

  Holds if they fit in 48e9 bytes in 16 bits, the precision of the release.
  """
  w, kv = weights_gib("llama_3_70b"), kv_gib("llama_3_70b", 16384)
  codes = weights_gib("llama_3_70b", 4)
  return Evidence(
    w + kv <= 48e9 / GiB,
    f"{w:.1f} GiB of weights and {kv:.1f} of cache in 16 bits; {codes:.1f} + {kv:.1f} with 4-bit codes, which would"
    f" fit in the {48e9 / GiB:.1f} GiB that are named without a precision",
  )


def mixtral_8x22b_at_16k() -> Evidence:
  """Holds if 4-bit codes and a 16-bit cache of 16,384 tokens fit in 32e9 bytes."""
  w, kv = weights_gib("mixtral_8x22b", 4), kv_gib("mixtral_8x22b", 16384)
  return Evidence(
    w + kv <= 32e9 / GiB, f"{w:.1f} GiB of 4-bit codes and {kv:.1f} of cache, in the smallest form there is"
  )


def seven_billion_in_6_gb() -> Evidence:
  """Weights alone of 7e9 parameters, in 16 bits.

  Holds if they fit in 6e9 bytes.
  """
  return Evidence(
    7e9 * 2 <= 6e9, f"{7e9 * 2 / GiB:.1f} GiB in 16 bits; 6 GB takes {6e9 * 8 / 7e9:.1f} bits a weight or fewer"
  )


def int4_saves_three_quarters() -> Evidence:
  """Holds if a weight takes at most 4 bits, with the scales of groups of 64."""
  bits = 8 * roofline.WEIGHTS["int4"]
  return Evidence(
    bits <= 4,
    f"{bits:.2f} bits with the scale of each group of 64, {1 - bits / 16:.0%} less than 16; the cache is not touched",
  )


def cache_of_100k_tokens() -> Evidence:
  """Holds if it is 12.2 GiB within 0.1."""
  gib = kv_gib("llama_3_8b", 100_000)
  return Evidence(abs(gib - 12.2) < 0.1, f"{gib:.1f} GiB for one row of Llama 3 8B in 16 bits")


def window_stops_the_cache() -> Evidence:
  """Holds if Mistral 7B's state is as large at 32k tokens as at 4k."""
  c = preset("mistral_7b")
  sizes = [cost.state_bytes(c, 1, n) for n in (4096, 8192, 32768)]
  return Evidence(
    len(set(sizes)) == 1, f"Mistral 7B at 4k, 8k and 32k tokens: {[round(s / GiB, 2) for s in sizes]} GiB"
  )


def local_scores() -> Evidence:
  """Scores that a window computes of those that full causal attention does.

  Holds if the saving lies between 30 and 70 % at 8,192 tokens and a window of 512.
  """
  T, W = 8192, 512
  share = Causal().mean_keys(T, W) / Causal().mean_keys(T, None)
  return Evidence(
    0.3 <= 1 - share <= 0.7,
    f"{1 - share:.0%} fewer scores at {T} tokens and a window of {W}; it depends on W/T, and the weights do not shrink",
  )


def paged_blocks() -> Evidence:
  """Use of a cache by rows of random lengths: reserved whole at 2048 tokens, or in blocks of 16 (2309.06180).

  Holds if whole rows use less than 40 % of what is reserved for them, blocks of 16 more than 96 %.
  """
  lengths = np.minimum(np.random.default_rng(0).lognormal(5.6, 0.9, 4000).astype(int) + 1, 2048)
  whole, paged = lengths.mean() / 2048, lengths.sum() / (np.ceil(lengths / 16) * 16).sum()
  return Evidence(
    bool(whole < 0.4 and paged > 0.96),
    f"of what is reserved, rows of 2048 use {whole:.0%}, blocks of 16 use {paged:.1%} (lognormal lengths, mean"
    f" {lengths.mean():.0f})",
  )


def batch_grows_with_paging() -> Evidence:
  """Holds if at least twice as many rows fit."""
  lengths = np.minimum(np.random.default_rng(0).lognormal(5.6, 0.9, 4000).astype(int) + 1, 2048)
  ratio = 2048 / (np.ceil(lengths / 16) * 16).mean()
  return Evidence(
    bool(ratio >= 2),
    f"{ratio:.1f} times as many rows in the same memory, by these lengths; throughput grows with them while"
    " decoding is bound by weights",
  )


def a_cache_is_not_60_percent() -> Evidence:
  """What a model of 7B would save at 16,384 tokens if its cache took nothing at all, as a recurrent state nearly does.

  Holds if that is 60 % of weights and cache for LLaMA 7B or Mistral 7B.
  """
  names = ("llama_7b", "mistral_7b")
  share = {n: kv_gib(n, 16384) / (kv_gib(n, 16384) + weights_gib(n)) for n in names}
  return Evidence(
    max(share.values()) >= 0.6, "all of the cache is " + " and ".join(f"{s:.0%} of {n}" for n, s in share.items())
  )


def transformers_at_16k() -> Evidence:
  """Weights and 16,384 tokens of cache in 16 bits.

  Holds if the smallest and the largest of four presets lie within a factor of 2 of 24 GB.
  """
  names = ("llama_3_2_1b", "llama_7b", "llama_3_8b", "llama_3_70b")
  found = {n: (weights_gib(n) + kv_gib(n, 16384)) * GiB / 1e9 for n in names}
  return Evidence(
    all(12 <= gb <= 48 for gb in found.values()),
    "a figure without a model's size is none: " + ", ".join(f"{n} {gb:.1f} GB" for n, gb in found.items()),
  )


def latent_cache() -> Evidence:
  """Elements a token and layer of DeepSeek-V2's latent attention, beside key-value heads of 128 (2405.04434, table 1).

  Holds if they are those of 2.25 groups.
  """
  c = preset("deepseek_v2")
  elements = cost.kv_bytes_per_token(c, 1) / len(c.layers)
  return Evidence(
    elements == 2.25 * 2 * 128, f"{elements:.0f} elements; multi-head attention of 128 such heads has {2 * 128 * 128:,}"
  )


def deepseek_v2_cache() -> Evidence:
  """Bytes of DeepSeek-V2's cache a token against DeepSeek 67B's, 95 layers of 8 key-value heads of 128 in 16 bits.

  Holds if latent attention alone, both in 16 bits, saves 93.3 %.
  """
  dense, latent = 95 * 2 * 8 * 128, cost.kv_bytes_per_token(preset("deepseek_v2"), 1)
  saved, coded = 1 - latent / dense, 1 - latent * 6 / (dense * 16)
  return Evidence(
    abs(saved - 0.933) < 0.005, f"{saved:.1%} by the architecture; {coded:.1%} with the cache in 6 bits besides"
  )


# ------------------------------------------------------------------------------------------ matrices and FLOPs


def heads_cost_the_same() -> Evidence:
  """4 D^2 parameters and equal FLOPs, whatever the number of heads.

  Holds if 1, 8 and 64 heads have the same matrices, 4 D^2, and the same FLOPs between tokens.
  """
  from llmarch.layers.attention import AttentionConfig

  costs = {h: cost.attention(AttentionConfig(num_heads=h), 512) for h in (1, 8, 64)}
  found = {(c.matrices, c.mixing(1024, True)) for c in costs.values()}
  return Evidence(
    len(found) == 1 and costs[1].matrices == 4 * 512**2,
    f"matrices {[c.matrices for c in costs.values()]} for 1, 8 and 64 heads of 512 / n",
  )


def projection_blocks() -> Evidence:
  """Blocks of D x H in queries, keys and values of 8 heads: MHA 24, two key-value heads 12, one 10.

  Holds if they are 24, 12 and 10.
  """
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
  """3 D (8/3 D) = 2 D (4 D): a gate at equal parameters needs a narrower hidden layer.

  Holds if the two counts are equal.
  """
  gated, plain = feed_forward(8 / 3, True), feed_forward(4, False)
  return Evidence(gated == plain, f"gated at 8/3 d: {gated:,} parameters; ungated at 4 d: {plain:,}")


def wider_keeps_parameters() -> Evidence:
  """Holds if a gated layer as wide has no more parameters than a plain one."""
  wide, plain = feed_forward(4, True), feed_forward(4, False)
  return Evidence(
    wide <= plain, f"as wide, a gated layer has {wide / plain:.2f} times the parameters: it must be narrower"
  )


def gates_cost_half_more() -> Evidence:
  """Holds if the ratio is 1.5 exactly."""
  ratio = feed_forward(4, True) / feed_forward(4, False)
  return Evidence(ratio == 1.5, f"{ratio} times the FLOPs at the same width; equal at 8/3 d")


def quadratic_attention() -> Evidence:
  """Multiply-adds between tokens of a whole sequence, exponent between 1k and 8k tokens.

  Holds if the exponent is within 0.01 of 2.
  """
  mixing = lambda T: T * Causal().mean_keys(T, None)
  slope = math.log(mixing(8192) / mixing(1024)) / math.log(8)
  return Evidence(abs(slope - 2) < 0.01, f"exponent {slope:.4f}")


def encoder_decoder_cross_term() -> Evidence:
  """FLOPs of the products in attention over an encoder's n tokens, a decoder's m, and from these to the encoder's,
  counted in their programs and fitted by a n^2 + b m^2 + c n m.

  Holds if c is 0.
  """

  def flops(T: int, S: int) -> int:
    q, kv, seen = jnp.ones((1, T, 1, 4)), jnp.ones((1, 1, S, 4)), jnp.ones((1, 1, T, S), bool)
    options = {"scale": 0.5, "softcap": None, "dropout": 0.0, "key": None}
    program = jax.make_jaxpr(lambda q, kv, seen: attention.attend(q, kv, kv, seen, None, None, **options)[0])
    dots = [e for e in program(q, kv, seen).eqns if e.primitive.name == "dot_general"]
    contracted = lambda e: math.prod(e.invars[0].aval.shape[i] for i in e.params["dimension_numbers"][0][0])
    return sum(2 * math.prod(e.outvars[0].aval.shape) * contracted(e) for e in dots)

  grid = [(n, m) for n in (8, 24, 40) for m in (6, 18, 30)]
  total = [flops(n, n) + flops(m, m) + flops(m, n) for n, m in grid]
  rows = np.array([(n * n, m * m, n * m) for n, m in grid], float)
  a, b, c = np.linalg.lstsq(rows, np.array(total, float), rcond=None)[0]
  return Evidence(bool(abs(c) < 1e-6), f"{a:.0f} n^2 + {b:.0f} m^2 + {c:.0f} n m: the decoder reads the encoder")


def window_scores_linear() -> Evidence:
  """Holds if the exponent is within 0.1 of 1."""
  W = 4096
  pairs = {T: T * Causal().mean_keys(T, W) for T in (16384, 65536)}
  slope = math.log(pairs[65536] / pairs[16384]) / math.log(4)
  return Evidence(
    abs(slope - 1) < 0.1,
    f"pairs seen grow as T^{slope:.2f} from 16k to 64k tokens at W = {W}; a mask over dense scores would still"
    " compute T^2",
  )


def receptive_field() -> Evidence:
  """L layers of window W reach L (W - 1) + 1 tokens: the Jacobian's support, by powers of the visible pairs.

  Holds if the last token is reached by exactly L (W - 1) + 1.
  """
  T, W, L = 64, 8, 3
  keys = Keys(jnp.arange(T)[None], jnp.zeros((1, T), jnp.int32), None)
  seen = np.asarray(attention.visible(keys, keys, mask=Causal(), window=W))[0, 0]
  reach = int((np.linalg.matrix_power(seen.astype(int), L)[-1] > 0).sum())
  return Evidence(reach == L * (W - 1) + 1, f"{L} layers of window {W} reach {reach} tokens")


def causal_mask() -> Evidence:
  """Holds if the causal mask is the lower triangle and the bidirectional one is full."""
  T = 7
  keys = Keys(jnp.arange(T)[None], jnp.zeros((1, T), jnp.int32), None)
  causal = np.asarray(attention.visible(keys, keys, mask=Causal(), window=None))[0, 0]
  both = np.asarray(attention.visible(keys, keys, mask=Bidirectional(), window=None))[0, 0]
  return Evidence(
    bool((causal == np.tril(np.ones((T, T), bool))).all() and both.all()),
    f"causal: lower triangle of {causal.sum()} pairs; bidirectional: all {both.sum()}",
  )


def sequential_depth() -> Evidence:
  """Steps that wait for another along the sequence: a scan of T, and an attention of one.

  Holds if the recurrence's program has a loop of T steps and attention's has none.
  """
  T = 64
  scan = jax.make_jaxpr(lambda x: jax.lax.scan(lambda h, x: (jnp.tanh(h + x), h), x[0], x))(jnp.ones((T, 4)))
  lengths = [e.params["length"] for e in scan.eqns if e.primitive.name == "scan"]
  attend = jax.make_jaxpr(lambda x: jax.nn.softmax(x @ x.T) @ x)(jnp.ones((T, 4)))
  loops = [e for e in attend.eqns if e.primitive.name in ("scan", "while")]
  return Evidence(
    lengths == [T] and not loops,
    f"a recurrence has {lengths[0]} steps in a row for {T} tokens; attention's program has no loop",
  )


def strided_attention() -> Evidence:
  """Sparse Transformer's strided pattern (1904.10509, section 4.2) on 1,024 tokens with a stride of 32.

  Holds if two steps reach every earlier token, and less than 10 % of the causal pairs are computed.
  """
  T, stride = 1024, 32
  i, j = np.arange(T)[:, None], np.arange(T)[None]
  pattern = (j <= i) & ((i - j < stride) | ((i - j) % stride == 0))
  reached = (pattern.astype(np.float32) @ pattern.astype(np.float32)) > 0
  density = pattern.sum() / (T * (T + 1) / 2)
  return Evidence(
    bool((reached == (j <= i)).all() and density < 0.1),
    f"density {density:.1%} of the causal pairs, all within two steps",
  )


def flash_io() -> Evidence:
  """Elements that cross HBM in one head's forward pass, N = 1024, d = 64 and 192 KiB of SRAM in 16 bits: 4 N d + 4 N^2
  with scores and weights written and read, 2 N d (1 + N / B) with blocks of B = M / 4 d keys (2205.14135, section 3).

  Holds if blocks move less than a fifth.
  """
  N, d, sram = 1024, 64, 192 * 1024 // 2
  plain, blocks = 4 * N * d + 4 * N * N, 2 * N * d * (1 + math.ceil(N / (sram // (4 * d))))
  return Evidence(
    blocks < plain / 5,
    f"{plain:,} against {blocks:,} elements, {plain / blocks:.1f} times; the paper measured 9.2 (40.3 GB, 4.4 GB)",
  )


def norms_share() -> Evidence:
  """Seconds of two norms a layer, each reading and writing the stream in 16 bits, over those of its matrices: LLaMA 7B
  on an H200's peaks.

  Holds if norms take less than 5 % of the sum.
  """
  from llmarch.analysis.hardware import CHIPS

  chip, c = CHIPS["h200"], preset("llama_7b")
  ((_, _, costs),) = cost.layers(c)
  matrices = 2 * sum(row.matrices for row in costs.values()) / chip.flops
  norms = 2 * 2 * 2 * c.d_model / chip.hbm_bandwidth
  share = norms / (norms + matrices)
  return Evidence(share < 0.05, f"{share:.1%} of a layer of width {c.d_model}, if nothing is fused")


# -------------------------------------------------------------------------------------------------- numerics


def rms_norm_is_rescaling_invariant() -> Evidence:
  """Holds if scaling by 8 changes less than 1e-5, and a shift by 3 more than 0.1."""
  x = jax.random.normal(jax.random.key(0), (5, 64))
  f = lambda x: norm.rms_norm(x, jnp.ones(64), eps=0.0)
  scaled, shifted = (float(jnp.max(jnp.abs(f(y) - f(x)))) for y in (8 * x, x + 3))
  return Evidence(
    scaled < 1e-5 and shifted > 0.1, f"largest change: {scaled:.1e} when scaled by 8, {shifted:.2f} when shifted by 3"
  )


def rms_norm_scales_learning() -> Evidence:
  """The gradient by W of f(norm(W x)) is divided by s where W is multiplied by s: an implicit learning rate.

  Holds if the gradient at 4 W is a quarter of that at W, within 1e-4.
  """
  W, x = jax.random.normal(jax.random.key(0), (16, 16)), jax.random.normal(jax.random.key(1), (16,))
  g = jax.grad(lambda W: jnp.sum(jnp.sin(norm.rms_norm(W @ x, jnp.ones(16), eps=0.0))))
  ratio = float(jnp.linalg.norm(g(4 * W)) / jnp.linalg.norm(g(W)))
  return Evidence(abs(ratio - 0.25) < 1e-4, f"gradient at 4 W over that at W: {ratio:.5f}")


def rms_uses_only_variance() -> Evidence:
  """Holds if mean square and variance agree within 1e-3 where the mean is 2."""
  x = jax.random.normal(jax.random.key(0), (64,)) + 2.0
  mean_square, var = float(jnp.mean(x**2)), float(jnp.var(x))
  return Evidence(
    abs(mean_square - var) < 1e-3,
    f"mean square {mean_square:.3f} = variance {var:.3f} + mean^2 {float(jnp.mean(x)) ** 2:.3f}",
  )


def layer_norm_needs_zero_mean() -> Evidence:
  """Whether a shift of its input changes LayerNorm.

  Holds if a shift of 3 changes the output by more than 1e-3.
  """
  x = jax.random.normal(jax.random.key(0), (5, 64))
  f = lambda x: norm.layer_norm(x, jnp.ones(64), jnp.zeros(64), eps=1e-6)
  change = float(jnp.max(jnp.abs(f(x + 3) - f(x))))
  return Evidence(
    change > 1e-3,
    f"LayerNorm changes by {change:.1e} when all its input is shifted by 3: it is RMSNorm that is sensitive to"
    " the mean",
  )


def layer_norm_slow_by_root() -> Evidence:
  """Square roots a row: both norms take one.

  Holds if LayerNorm's program takes more roots than RMSNorm's.
  """
  roots = lambda f: sum(e.primitive.name in ("rsqrt", "sqrt") for e in jax.make_jaxpr(f)(jnp.ones((4, 8))).eqns)
  ln = roots(lambda x: norm.layer_norm(x, None, None, eps=1e-6))
  rms = roots(lambda x: norm.rms_norm(x, jnp.ones(8), eps=1e-6))
  return Evidence(
    ln > rms, f"roots in the program: LayerNorm {ln}, RMSNorm {rms}; what differs is a pass over the data for the mean"
  )


def norm_parameters() -> Evidence:
  """Holds if they are 2 D and D."""
  from llmarch.layers.norm import LayerNorm, RMSNorm

  D = 96
  sizes = cost.norm(LayerNorm(), D), cost.norm(RMSNorm(), D)
  return Evidence(sizes == (2 * D, D), f"LayerNorm {sizes[0]}, RMSNorm {sizes[1]} parameters for {D} features")


def half_precision_norms() -> Evidence:
  """x^2 overflows float16 beyond sqrt(65504), for either norm; ours take statistics in f32.

  Holds if the mean of squares of 300 is not finite in float16, and 1 is within 0.01 of RMSNorm's output with f32
  statistics.
  """
  x = np.full(64, 300, np.float16)
  with np.errstate(over="ignore"):
    naive = float(np.mean(x * x))
  ours = float(norm.rms_norm(jnp.asarray(x), jnp.ones(64), eps=1e-6)[0])
  return Evidence(
    not math.isfinite(naive) and abs(ours - 1) < 1e-2,
    f"mean of squares of 300 in float16: {naive}; limit {65504**0.5:.1f}; with f32 statistics {ours:.3f}",
  )


def softmax_overflow() -> Evidence:
  """exp overflows float16 above ln 65504; with the maximum subtracted it never does.

  Holds if the naive softmax of 12 is NaN in float16, and with the maximum subtracted it is finite.
  """
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
  """SiLU(300) x 300 in float16, and GELU(300), whose argument is as large.

  Holds if the product is not finite and GELU is.
  """
  x = jnp.float16(300)
  product, plain = (float(y) for y in (ACTIVATIONS["silu"](x) * x, ACTIVATIONS["gelu"](x)))
  return Evidence(
    not math.isfinite(product) and math.isfinite(plain), f"SiLU(300) x 300 in float16 = {product}, GELU(300) = {plain}"
  )


def gelu_tanh_error() -> Evidence:
  """Holds if the largest error is 4.73e-4 within 2e-5."""
  x = np.linspace(-6, 6, 240_001)
  exact = np.array(jax.scipy.stats.norm.cdf(jnp.asarray(x))) * x
  tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  at = int(np.argmax(np.abs(exact - tanh)))
  return Evidence(
    abs(np.abs(exact - tanh)[at] - 4.73e-4) < 2e-5, f"largest error {np.abs(exact - tanh)[at]:.2e} at {abs(x[at]):.2f}"
  )


def silu_is_smooth() -> Evidence:
  """Holds if its second derivative is finite on [-8, 8] and its slope at 0 is 0.5."""
  second = jax.vmap(jax.grad(jax.grad(ACTIVATIONS["silu"])))(jnp.linspace(-8.0, 8.0, 2001))
  at_zero = float(jax.grad(ACTIVATIONS["silu"])(0.0))
  return Evidence(
    bool(jnp.isfinite(second).all()) and abs(at_zero - 0.5) < 1e-6,
    f"SiLU's slope at 0 is {at_zero}, its second derivative at most {float(jnp.max(jnp.abs(second))):.2f};"
    " ReLU's slope jumps from 0 to 1",
  )


def rope_decays() -> Evidence:
  """The bound |sum of partial rotations| of 2104.09864, section 3.4.3, for 128 dimensions: an upper bound alone.

  Holds if the bound falls at 0, 10, 100 and 1000, to below a fifth.
  """
  theta = 10000.0 ** (-np.arange(64) / 64)
  bound = lambda s: np.mean([abs(np.exp(1j * s * theta[:i]).sum()) for i in range(1, 65)])
  at = {s: round(float(bound(s)), 1) for s in (0, 10, 100, 1000, 2000)}
  falls = [at[s] for s in (0, 10, 100, 1000)]
  return Evidence(
    falls == sorted(falls, reverse=True) and at[1000] < at[0] / 5,
    f"mean bound at distances {at}: it falls, and not always (2000)",
  )


def rope_pairs_are_rotations() -> Evidence:
  """ops.rope.rotate against the dense rotation matrix in float64, at several positions.

  Holds if they agree within 1e-5 for both pairings, and the matrix is orthogonal.
  """
  H, positions = 8, np.array([0, 5, 1000])
  freqs, x = rope.frequencies(H, 10000.0), np.random.default_rng(0).normal(size=(1, 3, 1, H))
  worst = 0.0
  for interleaved in (True, False):
    at = [(2 * i, 2 * i + 1) if interleaved else (i, i + H // 2) for i in range(H // 2)]
    phase = rope.phases(jnp.asarray(positions[None], jnp.int32), freqs)
    fast = np.asarray(rope.rotate(jnp.asarray(x, jnp.float32), phase, interleaved=interleaved))
    for t, p in enumerate(positions):
      R = np.zeros((H, H))
      for (i, j), angle in zip(at, p * freqs):
        R[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
      worst = max(worst, np.abs(R @ x[0, t, 0] - fast[0, t, 0]).max(), np.abs(R @ R.T - np.eye(H)).max())
  return Evidence(bool(worst < 1e-5), f"largest difference {worst:.1e}; 4 H multiply-adds in place of H^2")


def xpos_keeps_high_frequencies() -> Evidence:
  """ops.rope.xpos_decay (2212.10554): by how much each frequency is damped over 512 positions.

  Holds if the highest frequency is damped least.
  """
  zeta = rope.xpos_decay(64)
  return Evidence(
    bool(zeta[0] == zeta.max()),
    f"zeta is {zeta[0]:.3f} for the highest frequency and {zeta[-1]:.2f} for the lowest: the high ones fade",
  )


def learned_positions_end() -> Evidence:
  """A table of 512 rows has none for token 800: refused by our config.

  Holds if 800 tokens on 512 rows are refused.
  """
  from llmarch.config import UserError
  from llmarch.layers.position import Learned

  try:
    Learned(length=512).check_against(64, 800)
  except UserError as e:
    return Evidence(True, str(e))
  return Evidence(False, "a table of 512 rows was accepted for 800 tokens")


def packing_is_neutral() -> Evidence:
  """Attention over two packed documents that do not see each other, positions going on or restarting at the second;
  and the second alone. With RoPE, and with sinusoids added to what is attended.

  Holds if RoPE's output is the same within 1e-4 in all three.
  """
  x = jax.random.normal(jax.random.key(0), (1, 12, 1, 16))
  segments = jnp.array([[0] * 5 + [1] * 7])
  on, restarted = jnp.arange(12)[None], jnp.array([[*range(5), *range(7)]])

  def attend(x, positions, segments, absolute):
    y = x + rope.sinusoids(positions, 16)[:, :, None] if absolute else x
    phase = rope.phases(positions, rope.frequencies(16, 10000.0))
    q = y if absolute else rope.rotate(y, phase, interleaved=False)
    keys = Keys(positions, segments, None)
    seen = attention.visible(keys, keys, mask=Causal(), window=None)
    heads = lambda a: a.swapaxes(1, 2)
    options = {"scale": 0.25, "softcap": None, "dropout": 0.0, "key": None}
    return attention.attend(q, heads(q), heads(x), seen, None, None, **options)[0][:, -7:]

  changes = {}
  for name, absolute in (("RoPE", False), ("sinusoids", True)):
    alone = attend(x[:, 5:], restarted[:, 5:], segments[:, 5:], absolute)
    changes[name] = [float(jnp.abs(attend(x, p, segments, absolute) - alone).max()) for p in (on, restarted)]
  return Evidence(
    max(changes["RoPE"]) < 1e-4,
    "change of a document's output when packed, positions going on and restarting: "
    + ", ".join(f"{name} {a:.1e} and {b:.1e}" for name, (a, b) in changes.items()),
  )


def z_loss_gradient() -> Evidence:
  """Holds if the two agree within 1e-5."""
  logits = jax.random.normal(jax.random.key(0), (7,)) + 3
  g = jax.grad(lambda x: token_losses(x, jnp.int32(0))[1] ** 2)(logits)
  want = 2 * jax.nn.logsumexp(logits) * jax.nn.softmax(logits)
  error = float(jnp.max(jnp.abs(g - want)))
  return Evidence(error < 1e-5, f"gradient of log^2 Z is 2 log Z softmax, within {error:.1e}")


def pre_norm_keeps_the_stream() -> Evidence:
  """Four blocks of layers/block.py with their branches multiplied by 0: what is left of the stream.

  Holds if pre-norm gives its input back bit for bit and post-norm does not.
  """
  from llmarch.config import BlockConfig, FanIn
  from llmarch.layers.attention import AttentionConfig
  from llmarch.layers.block import Block
  from llmarch.layers.context import make_context
  from llmarch.layers.norm import RMSNorm
  from llmarch.layers.param import Maker
  from llmarch.layers.site import Site
  from llmarch.residual import Post, Pre

  x = jax.random.normal(jax.random.key(1), (1, 3, 8))
  context, _ = make_context(jnp.arange(3)[None], None, None, None, None, False)
  change = {}
  for residual in (Pre(), Post()):
    ffn = MLPConfig(d_ff=8, activation="relu", gated=False)
    c = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=ffn, norm=RMSNorm(), residual=residual, branch_scale=0.0)
    block, y = Block(c, 8, Maker(jax.random.key(0), FanIn(), "float32")), x
    for _ in range(4):
      y = block(y, Site(context, 0, None, None, {}, None)).y
    change[residual.kind] = float(jnp.abs(y - x).max())
  return Evidence(
    change["pre"] == 0 and change["post"] > 0.01,
    f"with silent branches four pre-norm blocks change their input by {change['pre']}, post-norm ones by"
    f" {change['post']:.2f}",
  )


def linear_attention_reorders() -> Evidence:
  """phi(Q) (phi(K)^T V) over its normaliser equals the quadratic form (2006.16236, eq. 4 to 6), elu + 1.

  Holds if the two orders agree.
  """
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
  """A state space x' = A x + B u with u held for a step: exp(dA), and A^-1 (exp(dA) - 1) B (2312.00752, eq. 4).

  Holds if both agree with 100,000 Euler steps within 1e-5.
  """
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
  """Layers times memory plus c times the compressed memory (1911.05507, section 3).

  Holds if the range is exactly twice as long.
  """
  L, n, c = 12, 512, 3
  txl, compressive = L * n, L * (n // 2 + c * n // 2)
  return Evidence(
    compressive == 2 * txl, f"{txl:,} tokens against {compressive:,} with half of the slots compressed {c} times"
  )


def int8_weights() -> Evidence:
  """Relative RMS error of int8 by channel on normal weights.

  Holds if the error is below 1 %.
  """
  w = jax.random.normal(jax.random.key(0), (256, 256))
  coded = quant.quantize(w, (0,), "int8")
  decoded = quant.decode(coded.codes, "int8") * quant.spread(coded.scale, w.shape)
  error = float(jnp.sqrt(jnp.mean((decoded - w) ** 2) / jnp.mean(w**2)))
  return Evidence(error < 0.01, f"{error:.3%} relative RMS error, {8 * roofline.WEIGHTS['int8']:.2f} bits a weight")


def layer_norm_formula() -> Evidence:
  """ops.norm.layer_norm against (x - mean) / sqrt(var + eps) gain + bias in float64.

  Holds if they agree within 1e-5.
  """
  draw = np.random.default_rng(0).normal
  x, gain, bias = 3 + 2 * draw(size=(5, 64)), draw(size=64), draw(size=64)
  exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain + bias
  ours = norm.layer_norm(*(jnp.asarray(a, jnp.float32) for a in (x, gain, bias)), eps=1e-5)
  error = float(np.abs(exact - np.asarray(ours)).max())
  return Evidence(error < 1e-5, f"largest difference {error:.1e}")


def rmsnorm_is_more_stable() -> Evidence:
  """Relative errors of both norms with f32 statistics in bfloat16 and float16, against float64 of the same inputs, at
  means of 0 and 30.

  Holds if RMSNorm's error is at most half of LayerNorm's in all four.
  """
  worst, text = 0.0, []
  for dtype in (jnp.bfloat16, jnp.float16):
    for mean in (0, 30):
      x = (mean + jax.random.normal(jax.random.key(0), (64, 256))).astype(dtype)
      exact = np.asarray(x, np.float64)
      centred = exact - exact.mean(-1, keepdims=True)
      errors = []
      for ours, y in (
        (norm.rms_norm(x, jnp.ones(256), eps=0.0), exact),
        (norm.layer_norm(x, jnp.ones(256), None, eps=0.0), centred),
      ):
        true = y / np.sqrt((y * y).mean(-1, keepdims=True))
        errors.append(np.linalg.norm(np.asarray(ours, np.float64) - true) / np.linalg.norm(true))
      worst = max(worst, errors[0] / errors[1])
      text.append(f"{jnp.dtype(dtype).name}, mean {mean}: {errors[0]:.1e} and {errors[1]:.1e}")
  return Evidence(bool(worst <= 0.5), "RMSNorm and LayerNorm: " + "; ".join(text))


def published_speeds_of_rmsnorm() -> Evidence:
  """Seconds for 1,000 steps with LayerNorm and RMSNorm (pRMSNorm for the last) in 1910.07467, tables 2 to 7.

  Holds if the Transformer, the architecture in question, gained at least 10 %.
  """
  seconds = {"RNNSearch": (665, 501), "reader": (392, 333), "Transformer": (248, 231), "order embedding": (12.02, 4.34)}
  gain = {name: 1 - rms / ln for name, (ln, rms) in seconds.items()}
  return Evidence(gain["Transformer"] >= 0.1, "published: " + ", ".join(f"{name} {g:.1%}" for name, g in gain.items()))


def deepnorm_constants() -> Evidence:
  """alpha = (2 M)^(1/4), beta = (8 M)^(-1/4) of a decoder of M layers (2203.00555, figure 2): what its 2 M branches may
  change the output by is 2 M (2 beta^2) / alpha^2.

  Holds if that is the same at 6, 100 and 1,000 layers.
  """
  bound = {M: 2 * M * 2 * (8 * M) ** -0.5 / (2 * M) ** 0.5 for M in (6, 100, 1000)}
  return Evidence(max(bound.values()) - min(bound.values()) < 1e-9, f"{bound}")


def recurrence_is_parallel() -> Evidence:
  """y_t = q_t S_t, S_t = a_t S_(t-1) + k_t^T v_t, step by step and as (Q K^T * D) V, in float64: linear attention
  (a = 1), retention (a = 1 - 2^-5) and a state-space dual (a of the token).

  Holds if both agree within 1e-9 for all three; the state is [d, d] at any length.
  """
  T, d, rng = 32, 4, np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, T, d))
  worst = 0.0
  for a in (np.ones(T), np.full(T, 1 - 2**-5), rng.uniform(0.5, 1, T)):
    S, steps, log = np.zeros((d, d)), [], np.cumsum(np.log(a))
    for t in range(T):
      S = a[t] * S + np.outer(k[t], v[t])
      steps.append(q[t] @ S)
    decay = np.tril(np.exp(log[:, None] - log[None]))
    worst = max(worst, np.abs((q @ k.T * decay) @ v - np.array(steps)).max())
  return Evidence(
    bool(worst < 1e-9), f"largest difference {worst:.1e}; {d * d} numbers of state after {T} tokens or any"
  )


def fixed_state_recall() -> Evidence:
  """Pairs of random keys and one of 32 values, of 16 dimensions each, recalled from the sum of their outer
  products, and by softmax attention over all pairs.

  Holds if the sum recalls 8 pairs (above 70 %) and not 256 (below 30 %), and softmax recalls both (above 95 %).
  """
  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  found = {}
  for pairs in (8, 256):
    right = np.zeros(2)
    for _ in range(20):
      keys, codes = unit(rng.normal(size=(pairs, 16))), unit(rng.normal(size=(32, 16)))
      value = rng.integers(32, size=pairs)
      weights = np.exp(60 * (keys @ keys.T))
      reads = keys @ (keys.T @ codes[value]), weights / weights.sum(-1, keepdims=True) @ codes[value]
      right += [np.mean((y @ codes.T).argmax(-1) == value) / 20 for y in reads]
    found[pairs] = right
  return Evidence(
    bool(found[8][0] > 0.7 and found[256][0] < 0.3 and min(f[1] for f in found.values()) > 0.95),
    "; ".join(f"{n} pairs: state {a:.0%}, softmax {b:.0%}" for n, (a, b) in found.items()),
  )


# -------------------------------------------------------------------------------------------------- inference


def decode_bound_540b() -> Evidence:
  """The published decode step of PaLM 540B, 64 rows in int8 (2211.05102, table 2), beside our roofline of it.

  Holds if the roofline of the published layout lies below the published step.
  """
  row = next(r for r in planner.PUBLISHED if (r.model, r.phase, r.batch) == ("palm_540b", "decode", 64))
  step, bound = 1e3 * row.seconds / row.length, 1e3 * planner.published(row).latency_s / row.length
  return Evidence(
    bound < step,
    f"published {step:.1f} ms a step; our bound for the layout is {bound:.1f} ms. Nothing was executed here",
  )


def palm_mfu() -> Evidence:
  """2 N tokens/s over peak: 76 % of 64 TPU v4 at 2048 tokens in the prefill of PaLM 540B (2211.05102, table 2).

  Holds if 2 N tokens over what the chips could do in the published time is within 1 point of 76 %.
  """
  row = next(r for r in planner.PUBLISHED if (r.model, r.phase, r.batch) == ("palm_540b", "prefill", 512))
  N, tokens, seconds, chips, peak = total("palm_540b"), row.batch * row.length, row.seconds, row.chips, 275e12
  mfu = 2 * N * tokens / seconds / (chips * peak)
  return Evidence(
    abs(mfu - 0.76) < 0.01, f"2 N tokens / (chips x peak x {seconds} s) = {mfu:.1%}, with tensor partitioning alone"
  )


def mqa_speeds_long_decoding() -> Evidence:
  """Bytes that a decode step reads, 64 rows at 16k tokens: heads, 8 and 1 key-value heads (LLaMA 7B on an H200).

  Holds if 8 key-value heads take less than a third of the time of 32, and 1 takes less than 8.
  """
  from llmarch.analysis.advise import share_heads
  from llmarch.analysis.hardware import CHIPS

  c = preset("llama_7b")
  ms = {k: 1e3 * roofline.decode_seconds(share_heads(c, k), CHIPS["h200"], batch=64, context=16384) for k in (32, 8, 1)}
  return Evidence(
    ms[32] > 3 * ms[8] > 3 * ms[1],
    "least ms a step: " + ", ".join(f"{k} key-value heads {t:.1f}" for k, t in ms.items()),
  )


def decode_is_bound_by_memory() -> Evidence:
  """FLOPs a byte of a decode step at batch 1, against what a chip needs to be busy.

  Holds if it is below 10 FLOPs a byte.
  """
  c = preset("llama_7b")
  intensity = roofline.decode_flops(c, 2048) / (roofline.weight_bytes_read(c, 1) + cost.state_bytes(c, 1, 2048))
  return Evidence(intensity < 10, f"{intensity:.2f} FLOPs a byte; an H200 needs 206")


def latency_grows_with_layers() -> Evidence:
  """Seconds of each layer that no roofline knows, fitted on PaLM 62B's published latencies (planner.calibrate).

  Holds if they are above 0 and take at least 10 % of the published decode step of PaLM 540B.
  """
  fit, _ = planner.calibrated()
  row = next(r for r in planner.PUBLISHED if (r.model, r.phase, r.batch) == ("palm_540b", "decode", 64))
  layers, step = len(preset("palm_540b").layers), row.seconds / row.length
  share = layers * fit.layer_s / step
  return Evidence(
    fit.layer_s > 0 and share >= 0.1,
    f"{1e6 * fit.layer_s:.0f} us a layer x {layers} layers = {1e3 * layers * fit.layer_s:.1f} ms, {share:.0%} of the"
    f" published {1e3 * step:.1f} ms; LLaMA 3.1 405B has {len(preset('llama_3_1_405b').layers)} layers",
  )


def balance_of_chips() -> Evidence:
  """Tokens a decode step needs to be bound by compute: peak FLOP/s over bytes/s, in 16 bits.

  Holds if it is 229 for TPU v4 and 206 for H200, within 1.
  """
  from llmarch.analysis.hardware import CHIPS

  need = {n: CHIPS[n].flops / CHIPS[n].hbm_bandwidth for n in ("tpu_v4", "h200")}
  return Evidence(
    abs(need["tpu_v4"] - 229) < 1 and abs(need["h200"] - 206) < 1, ", ".join(f"{n} {x:.0f}" for n, x in need.items())
  )
