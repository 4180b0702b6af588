"""What the papers and five surveys of LLM architecture say, and how each statement is checked here (see README.md).

Surveys: 0, a summary of six papers; 1, architecture and system optimisation; 2, a survey with tables; 3, improvements of
the Transformer; 4, lecture 3 of CS336, by page. `sheet` is what a reading of the sources said before anything ran.
"""
# ruff: noqa: E501  a claim a line, as a table

import ast
from pathlib import Path

from llmarch.lab.claims import Cited, Claim, Fact, Measured, Test

HOLDS, REFUTED = "holds", "refuted"
FUNCTIONS = [
  n for n in ast.parse(Path(__file__).with_name("facts.py").read_text()).body if isinstance(n, ast.FunctionDef)
]
RULES = {n.name: " ".join((ast.get_docstring(n) or "").split()) for n in FUNCTIONS}


def fact(
  id: str, statement: str, source: str, stated_by: tuple, function: str, sheet, expected="", kind="exact"
) -> Claim:
  """Computed; the rule is the function's docstring, which ends in "Holds if ..."."""
  return Claim(
    id=id, statement=statement, source=source, stated_by=stated_by, kind=kind, check=Fact(function), budget="none",
    rule=RULES.get(function, "none"), expected=expected, sheet=sheet,
  )  # fmt: skip


def held(id: str, statement: str, source: str, stated_by: tuple, *nodeids: str, kind="exact") -> Claim:
  """By unit tests, all of which must pass."""
  return Claim(
    id=id, statement=statement, source=source, stated_by=stated_by, kind=kind,
    check=Test(tuple(f"tests/{n}" for n in nodeids)), budget="tiny", rule="the tests pass", expected="", sheet=HOLDS,
  )  # fmt: skip


def measured(
  id: str, statement: str, source: str, stated_by: tuple, target: str, expected="", kind="direction"
) -> Claim:
  """By a comparison of an experiment, "glu/swiglu-below-relu", whose rule it is."""
  ablation, comparison = target.split("/")
  return Claim(
    id=id, statement=statement, source=source, stated_by=stated_by, kind=kind, check=Measured(ablation, comparison),
    budget="tiny", rule="", expected=expected,
  )  # fmt: skip


def cited(
  id: str, statement: str, source: str, stated_by: tuple, holds, evidence: str, kind="exact", budget="none"
) -> Claim:
  sheet = None if holds is None else HOLDS if holds else REFUTED
  return Claim(
    id=id, statement=statement, source=source, stated_by=stated_by, kind=kind, check=Cited(holds), budget=budget,
    rule="nothing is computed here", expected="", evidence=evidence, sheet=sheet,
  )  # fmt: skip


PUBLISHED = (
  fact("llama-is-rmsnorm-rope-swiglu", "LLaMA joins RMSNorm, RoPE and SwiGLU", "2302.13971, section 2.2", ("survey 0, line 107", "survey 0, line 35", "survey 0, line 49", "survey 0, line 77", "survey 4, page 70"), "llama_7b_count", HOLDS, "6,738,415,616 parameters"),
  fact("gpt-3-is-96-by-12288", "GPT-3 175B has 96 layers of width 12288", "2005.14165, table 2.1", ("survey 1, line 13", "survey 1, line 11"), "gpt_3_count", HOLDS, "174,604,259,328 parameters"),
  fact("gqa-came-with-llama-2-70b", "LLaMA 2 70B has 8 key-value heads", "2307.09288, table 1", ("survey 1, line 25",), "llama_2_70b_gqa", HOLDS, "68,976,648,192 parameters"),
  fact("gqa-is-standard-in-llama-2", "All of LLaMA 2 uses grouped queries", "2307.09288, table 1", ("survey 4, page 334",), "all_llama_2_gqa", REFUTED),
  fact("mixtral-is-8-experts-top-2", "Mixtral 8x7B has 8 experts, top 2, 46.7B parameters and 12.9B active", "2401.04088, section 2", ("survey 1, line 45",), "mixtral_counts", HOLDS),
  fact("mixtral-shares-an-expert", "Mixtral's gating is shared", "2401.04088, section 2", ("survey 1, line 45",), "mixtral_shared_expert", REFUTED),
  fact("mixtral-8x22b-is-141b", "Mixtral 8x22B has 141B parameters, 39B of them active", "mistral.ai, 2024-04-17", ("survey 2, line 75",), "mixtral_8x22b_counts", HOLDS),
  fact("glam-is-a-trillion", "GLaM has about a trillion parameters and 100B active", "2112.06905, table 4", ("survey 2, line 61", "survey 2, line 76"), "glam_counts", HOLDS, "1.162T and 96.6B"),
  fact("deepseek-r1-is-671b", "DeepSeek R1 is a decoder, of V3's mixture of experts", "2412.19437, table 1", ("survey 2, line 33",), "deepseek_v3_count", HOLDS),
  fact("experts-give-5-to-10-times", "Mixtures of experts give 5 to 10 times the capacity at equal compute", "no source", ("survey 2, line 78",), "moe_capacity", REFUTED, "3.6, 12 and 18"),
  fact("deepseek-moe-40-percent", "DeepSeekMoE is 40 % more efficient", "2401.06066, abstract", ("survey 2, line 74",), "deepseek_moe_compute", REFUTED, "about 40 % of the compute of a dense 7B"),
  fact("mistral-mixes-attention", "Mistral 7B mixes short and long attention", "2310.06825, section 2", ("survey 1, line 43",), "mistral_window", REFUTED),
  fact("mistral-mixes-mqa-and-mha", "Mistral 7B is a hybrid of MQA and MHA", "2310.06825, table 1", ("survey 1, line 44",), "mistral_heads", REFUTED),
  fact("gemma-2-alternates", "Gemma 2 alternates local and global layers, the first one local", "2408.00118, section 2", ("survey 4, page 350", "survey 4, page 351"), "gemma_2_alternates", HOLDS),
  fact("gemma-2-norms-twice", "Gemma 2 norms before and after each branch", "2408.00118, table 1", ("survey 4, page 101", "survey 4, page 102"), "gemma_2_norms", HOLDS),
  fact("gemma-2-has-qk-norm", "Gemma 2 uses QK-norm", "2408.00118, section 2", ("survey 4, page 312",), "gemma_2_qk_norm", REFUTED),
  fact("soft-caps-of-50-and-30", "Soft-capping is c tanh(x / c), with 50 for scores and 30 for logits", "2408.00118, section 2", ("survey 4, page 319", "survey 4, page 320"), "soft_cap_values", HOLDS),
  fact("qwen-vocabulary-1512m", "Qwen's vocabulary has 1512M entries", "2309.16609, section 2.2", ("survey 1, line 33",), "qwen_vocabulary", REFUTED, "151,643, padded to 151,936 or 152,064"),
  fact("vocabularies-grow", "Vocabularies: 50k (GPT-2), 32k (LLaMA), 128k (LLaMA 3), 150k (Qwen)", "their papers", ("survey 4, page 264", "survey 4, page 269"), "vocabularies", HOLDS),
  fact("palm-uses-geglu", "PaLM uses GEGLU", "2204.02311, section 2", ("survey 4, page 158",), "palm_activation", REFUTED),
  fact("modern-models-have-no-bias", "The modern recipe has no biases", "2302.13971", ("survey 4, page 50", "survey 4, page 54"), "no_bias_in_llama", HOLDS),
  fact("parallel-blocks-of-gpt-j-and-palm", "GPT-J and PaLM run attention and feed-forward in parallel, LLaMA does not", "2204.02311, section 2", ("survey 4, page 186", "survey 4, page 194"), "parallel_presets", HOLDS),
  fact("architectures-converge", "Decoders of 2023 to 2025 converge to pre-norm, RMSNorm, RoPE and gates", "their papers", ("survey 4, page 59", "survey 4, page 64", "survey 4, page 72"), "architectures_converge", HOLDS, "at least 70 %"),
  fact("head-dim-128-everywhere", "All models have heads of 128 dimensions", "their papers", ("survey 4, page 243", "survey 4, page 244"), "head_dims", REFUTED, "64, 160, 192 and 256 exist"),
  fact("fewer-than-100-layers", "Models have fewer than 100 layers", "their papers", ("survey 4, page 260",), "fewer_than_100_layers", REFUTED, "126 and 118 exist"),
  fact("feed-forward-4-or-8-thirds", "Feed-forwards are 4 d wide, gated ones 8/3 d", "2002.05202", ("survey 4, page 238", "survey 4, page 239"), "feed_forward_ratios", HOLDS),
  fact("longformer-has-4096b", "Longformer has 4096B parameters", "2004.05150", ("survey 2, line 163",), "longformer_is_tokens", REFUTED, "148,659,456; 4096 tokens"),
  fact("transformer-needs-no-recurrence", "The base Transformer's 65M parameters hold neither recurrence nor convolution", "1706.03762, table 3", ("survey 0, line 12", "survey 4, page 41", "survey 4, page 44"), "transformer_base_count", HOLDS, "63,045,632"),
  fact("gpt-3-alternates", "GPT-3 alternates dense and banded layers", "2005.14165, section 2.1", ("survey 3, line 41",), "gpt_3_alternates", HOLDS),
  fact("rope-is-inside-attention", "RoPE turns queries and keys in every layer, not the input", "2104.09864, section 3.2", ("survey 3, line 171", "survey 3, line 177", "survey 4, page 72", "survey 4, page 225"), "rope_is_inside_attention", HOLDS),
  fact("position-families", "GPT-3 has learned positions, BLOOM and MPT ALiBi, T5 a bias, LLaMA and PaLM RoPE", "their papers", ("survey 4, page 204", "survey 4, page 206", "survey 4, page 207"), "position_families", HOLDS),
  fact("llama-norms-before-branches", "LLaMA norms before each branch, by RMSNorm", "2302.13971, section 2.2", ("survey 1, line 73", "survey 4, page 112", "survey 4, page 114"), "llama_norms_before_branches", HOLDS),
  fact("swiglu-users", "LLaMA, PaLM and Mistral use SwiGLU", "their papers", ("survey 4, page 71", "survey 0, line 77"), "gated_silu_users", HOLDS),
  held("experts-are-sparse", "A token costs the experts that it goes to and no others", "2101.03961", ("survey 2, line 60",), "test_moe.py::test_a_token_costs_the_experts_it_goes_to"),
)  # fmt: skip

MEMORY = (
  fact("kv-is-30-percent", "Keys and values take 30 % of a GPU's memory: those of a 13B on 40 GB", "2309.06180, figure 1", ("survey 0, line 59",), "kv_of_opt_13b", HOLDS, "OPT-13B on 40 GB: 26 GB of weights, 12 of cache", "cost"),
  fact("mqa-divides-the-cache-by-heads", "One key-value head a layer makes the cache smaller by the number of heads", "1911.02150", ("survey 4, page 328", "survey 4, page 330", "survey 1, line 140", "survey 0, line 91", "survey 3, line 50"), "mqa_shrinks_kv_per_layer", HOLDS, kind="cost"),
  fact("gqa-halves-the-cache", "Grouped queries save half of the cache and more", "2407.21783, table 3", ("survey 3, line 191",), "kv_saved_by_llama_3", HOLDS, "-75 %, -87.5 %", "cost"),
  fact("llama-3-70b-in-48-gb", "LLaMA 3 70B with 16k tokens takes 48 GB", "no source", ("survey 2, line 161",), "llama_3_70b_at_16k", REFUTED, "131.4 + 5.0 GiB", "cost"),
  fact("mixtral-8x22b-in-32-gb", "Mixtral 8x22B with 16k tokens takes 32 GB", "no source", ("survey 2, line 162",), "mixtral_8x22b_at_16k", REFUTED, "65.5 + 3.5 GiB in 4 bits", "cost"),
  fact("mamba-7b-in-6-gb", "A Mamba of 7B takes 6 GB", "no source; 2312.00752 has none of 7B", ("survey 2, line 164",), "seven_billion_in_6_gb", REFUTED, "13 GiB in 16 bits", "cost"),
  fact("mamba-saves-60-percent", "Mamba takes 60 % less memory than a Transformer of 7B at 16k tokens", "no source", ("survey 2, line 111",), "a_cache_is_not_60_percent", REFUTED, "weights 13.5 GiB, cache 2 to 8", "cost"),
  fact("transformer-16k-in-24-gb", "A Transformer takes 24 GB at 16k tokens", "no source, and no size", ("survey 2, line 91", "survey 2, line 97"), "transformers_at_16k", REFUTED, kind="cost"),
  fact("latent-cache-is-576", "Latent attention keeps 576 elements a token and layer, as 2.25 groups would", "2405.04434, table 1", (), "latent_cache", HOLDS, "512 + 64 = 4.5 x 128", "cost"),
  fact("latent-attention-saves-93-percent", "Latent attention alone makes DeepSeek-V2's cache 93.3 % smaller than DeepSeek 67B's", "2405.04434, abstract", (), "deepseek_v2_cache", REFUTED, "82.2 %, and 6 bits for 16", "cost"),
  fact("int4-saves-75-percent", "INT4 saves 75 % of the memory", "no source", ("survey 2, line 126",), "int4_saves_three_quarters", REFUTED, "72 to 73 %, of weights alone", "cost"),
  fact("cache-of-100k-tokens", "100k tokens need more than one technique: LLaMA 3 8B's cache is 12 GiB then", "2407.21783", ("survey 1, line 145", "survey 1, line 153"), "cache_of_100k_tokens", HOLDS, "12.2 GiB", "cost"),
  fact("a-window-bounds-the-cache", "A sliding window need not store all tokens", "2310.06825, figure 2", ("survey 1, line 150",), "window_stops_the_cache", HOLDS, kind="cost"),
  fact("sparse-attention-saves-30-to-70", "Sparse attention saves 30 to 70 % of memory at 8k tokens", "no source", ("survey 2, line 53",), "local_scores", REFUTED, "94 % of the dense square's scores at 8k and a window of 512", "cost"),
  fact("paged-blocks-cut-waste", "Paged blocks cut fragmentation", "2309.06180, figure 2", ("survey 1, line 139",), "paged_blocks", HOLDS, "20 to 38 % against 96 %", "cost"),
  fact("paging-doubles-the-batch", "Better use of the cache gives 2 to 4 times the throughput", "2309.06180, abstract", ("survey 1, line 143",), "batch_grows_with_paging", HOLDS, "2 to 4 times", "cost"),
  fact("decoding-is-memory-bound", "Multi-head decoding is bound by memory traffic", "1911.02150, section 2.4", ("survey 4, page 324",), "decode_is_bound_by_memory", HOLDS, kind="cost"),
  fact("mqa-speeds-long-decoding", "Fewer key-value heads decode faster where the cache is large", "2305.13245, figure 3", ("survey 0, line 88", "survey 4, page 340"), "mqa_speeds_long_decoding", HOLDS, "by the bytes of keys and values", "cost"),
  fact("int8-weights-lose-little", "Weights in int8 lose little", "2208.07339", (), "int8_weights", HOLDS, "0.785 % relative error", "cost"),
  held("int8-cache-loses-little", "Keys and values in 8 bits lose little: keys least with a scale for each channel", "2402.02750, section 3", ("survey 1, line 141",), "test_quant.py::test_logits_from_a_quantised_state_are_near_with_a_prefix_that_sees_itself_both_ways", "test_quant.py::test_keys_with_outlier_channels_lose_three_times_as_much_by_token_as_by_channel"),
  fact("latency-grows-with-layers", "More layers are a longer chain: each costs a decode step time that no roofline knows", "2211.05102", ("survey 4, page 260",), "latency_grows_with_layers", HOLDS, kind="cost"),
  fact("palm-540b-at-29-ms", "PaLM 540B decodes a token in 29 ms on 64 chips", "2211.05102, table 2", ("survey 0, line 60", "survey 0, line 54"), "decode_bound_540b", HOLDS, "28.5 ms measured there; a bound here", "cost"),
  fact("palm-540b-at-76-percent", "PaLM 540B's prefill runs at 76 % of peak", "2211.05102, table 2", ("survey 0, line 63",), "palm_mfu", HOLDS, "75.6 %", "cost"),
  fact("decoding-needs-hundreds-of-tokens", "A decode step is bound by weights below a batch of peak FLOP/s over bytes/s", "2211.05102, section 2", (), "balance_of_chips", HOLDS, "229 and 206", "cost"),
  held("table-1-of-pope", "Multi-query attention over the batch holds 32 times the context", "2211.05102, table 1", ("survey 0, line 54",), "test_planner.py::test_table_1_longest_context_in_30_percent_of_64_chips", kind="cost"),
  held("mfu-follows-from-latency", "The published MFUs follow from the published latencies", "2211.05102, tables 2, 3 and D.2 to D.4", ("survey 0, line 54", "survey 0, line 63"), "test_planner.py::test_tables_2_and_3_mfu_follows_from_the_latency", "test_planner.py::test_tables_d2_to_d4_mfu_follows_from_the_latency", kind="cost"),
  held("layouts-have-crossovers", "2D layouts, and then gathered weights, win as chips and tokens grow", "2211.05102, section 3.2", ("survey 0, line 54",), "test_planner.py::test_2d_moves_a_quarter_root_n_less_than_1d", "test_planner.py::test_brute_force_finds_the_optimal_2d_mesh", "test_planner.py::test_crossovers_of_the_layouts_on_64_chips", kind="cost"),
  held("parallel-blocks-halve-collectives", "A parallel block enters and leaves the stream once, a serial one twice", "2211.05102, section 3.4", ("survey 4, page 188",), "test_planner.py::test_a_serial_block_enters_and_leaves_the_stream_twice", kind="cost"),
  cited("palm-used-pipelines", "The 76 % came from tensor and pipeline parallelism", "2211.05102, section 3", ("survey 0, line 63",), False, "the paper partitions tensors alone, and has no pipeline stages", "cost"),
  held("cached-equals-uncached", "A cache avoids recomputation and changes nothing", "2211.05102", ("survey 0, line 57", "survey 0, line 58", "survey 1, line 15"), "test_decoding.py::test_cached_greedy_over_ragged_prompts_equals_uncached_greedy_of_each"),
  held("cache-bytes-are-the-formula", "The cache is 2 L K H elements a token", "2211.05102, section 2", ("survey 3, line 17",), "test_presets.py::test_state_bytes_are_those_of_the_models_state", "test_presets.py::test_kv_cache_of_16k_tokens_in_16_bits_has_the_known_size"),
  measured("caching-is-linear", "With a cache, generating T tokens takes time linear in T", "2211.05102", ("survey 0, line 57",), "decoding_cost/cached-linear", "1", "cost"),
  measured("recomputing-is-quadratic", "Without a cache, generating T tokens takes time quadratic in T", "2211.05102", ("survey 0, line 58",), "decoding_cost/recomputed-quadratic", "2", "cost"),
)  # fmt: skip

ATTENTION = (
  fact("heads-cost-nothing", "Several heads cost what one costs", "1706.03762, section 3.2.2", ("survey 0, line 16",), "heads_cost_the_same", HOLDS, "4 d^2"),
  measured("one-head-is-worse", "Several heads see different subspaces: one alone is worse", "1706.03762, table 3 (A)", ("survey 0, line 16",), "heads/single-head-worse", "-0.9 BLEU for one head"),
  fact("attention-is-parallel", "Attention is parallel over a sequence, a recurrence is not", "1706.03762, table 1", ("survey 0, line 18", "survey 0, line 12"), "sequential_depth", HOLDS),
  fact("masks-are-triangles", "A decoder's mask is a lower triangle, an encoder's is full", "1706.03762", ("survey 2, line 13", "survey 0, line 15", "survey 3, line 25"), "causal_mask", HOLDS),
  fact("projection-blocks", "8 heads have 24 projections, with one key-value head 10", "1911.02150", ("survey 3, line 61", "survey 3, line 80"), "projection_blocks", HOLDS, "24, 12, 10"),
  held("gqa-interpolates", "GQA with all heads is MHA, with one it is MQA", "2305.13245, section 2.2", ("survey 0, line 85", "survey 0, line 86"), "test_ops.py::test_grouped_attention_is_multi_head_attention_with_repeated_keys_and_values"),
  measured("gqa-ties-mha", "GQA has nearly MHA's quality", "2305.13245, table 1", ("survey 0, line 88", "survey 3, line 88", "survey 4, page 340"), "heads/gqa-ties-mha", "a tiny gap"),
  measured("mqa-loses-quality", "MQA loses quality", "2305.13245, table 1", ("survey 0, line 82",), "heads/mqa-not-better-than-mha", "46.6 against 47.1 points (GQA)"),
  measured("uptraining-5-percent", "5 % of the compute turns MHA into GQA", "2305.13245, section 2.1", ("survey 0, line 87",), "uptraining/recovers-at-5-percent", "most of it"),
  measured("mean-pooling-beats-random", "Mean-pooled heads are better than random ones", "2305.13245, figure 4", ("survey 0, line 87",), "uptraining/mean-beats-random"),
  measured("mean-pooling-beats-first", "Mean-pooled heads are better than the first of each group", "2305.13245, figure 4", ("survey 0, line 87",), "uptraining/mean-beats-first"),
  held("pooling-identical-heads-is-lossless", "Mean-pooling identical heads changes nothing", "2305.13245", ("survey 0, line 87",), "test_adapt.py::test_pooled_heads_repeated_for_each_group_compute_the_same"),
  fact("attention-is-quadratic", "Attention costs the square of the length", "1706.03762, table 1", ("survey 3, line 16", "survey 2, line 37"), "quadratic_attention", HOLDS, "exponent 2", "cost"),
  measured("attention-time-is-quadratic", "The time of full attention is quadratic in the length", "1706.03762", ("survey 3, line 16",), "attention_cost/dense-quadratic", "1.9 to 2.1", "cost"),
  fact("encoder-decoder-n2-plus-m2", "An encoder-decoder costs O(n^2 + m^2)", "1706.03762", ("survey 2, line 39",), "encoder_decoder_cross_term", REFUTED, "and n m", "cost"),
  fact("windows-are-linear", "A window of 4096 makes attention linear", "2310.06825", ("survey 4, page 344", "survey 2, line 49"), "window_scores_linear", HOLDS, kind="cost"),
  measured("window-time-is-linear", "The time of a window is linear in the length, where unseen blocks are skipped", "2310.06825", ("survey 4, page 346",), "attention_cost/blockwise-window-linear", "1", "cost"),
  fact("windows-reach-l-times-w", "L layers of window W reach L (W - 1) + 1 tokens", "2310.06825, section 2", ("survey 2, line 54", "survey 2, line 55"), "receptive_field", HOLDS),
  measured("windows-forget", "What is further away than the windows reach is lost", "2310.06825", ("survey 2, line 54",), "recall/window-at-chance", "chance"),
  measured("local-and-global-layers-recall", "Local layers with some global ones recall like global ones", "2408.00118", ("survey 3, line 38",), "recall/local-global-ties-full"),
  measured("latent-attention-recalls", "Latent attention recalls like full attention", "2405.04434", (), "recall/latent-ties-full"),
  held("flash-is-exact", "FlashAttention is exact attention", "2205.14135", ("survey 1, line 127", "survey 1, line 129"), "test_blockwise.py::test_blockwise_attention_is_attention", "test_blockwise.py::test_no_array_of_all_scores_is_held"),
  cited("flash-trains-2-2-times", "FlashAttention trains 2.2 times as fast", "2205.14135", ("survey 2, line 125",), False, "the paper has 15 % for BERT, 3 times for GPT-2, 2.4 times for LRA; its second version about twice the first", "cost"),
  cited("flash-is-2-to-4-times-faster", "FlashAttention is 2 to 4 times faster and takes less memory", "2205.14135", ("survey 3, line 101",), None, "a GPU's timing: not run here", "cost", "gpu"),
  cited("flash-2-is-triton", "FlashAttention 2 is autotuned Triton", "2307.08691", ("survey 1, line 133",), False, "it is CUTLASS; block sizes are chosen by hand", "cost"),
  cited("bigbird-is-axial", "BigBird attends along rows and columns", "2007.14062", ("survey 2, line 50",), False, "its pattern is a window, global tokens and random blocks"),
  fact("switch-is-top-2", "Switch routes to two experts", "2101.03961, section 2.1 and table 1", ("survey 2, line 65", "survey 2, line 71"), "switch_of_two_matches_t5", REFUTED, "224,083,200 active with one; the code shown is GShard's"),
  fact("flash-is-io-aware", "FlashAttention moves less through HBM", "2205.14135, theorem 2", ("survey 3, line 92", "survey 3, line 99"), "flash_io", HOLDS, "40.3 to 4.4 GB", "cost"),
  fact("strided-reaches-all", "Strided sparse attention reaches all earlier tokens in two steps", "1904.10509, section 4.2", ("survey 3, line 30", "survey 3, line 35"), "strided_attention", HOLDS, "density 9.2 % at 1,024 tokens", "cost"),
  cited("bigbird-has-random-blocks", "BigBird attends to random tokens", "2007.14062", ("survey 2, line 51",), True, "three random blocks of 64, beside window and global ones"),
  cited("gqa-gains-much-over-mqa", "GQA gains much quality over MQA", "2305.13245, table 1", ("survey 3, line 88",), None, "T5-XXL: 46.6 to 47.1 points on average; whether that is much is a word"),
  held("latent-forms-agree", "The absorbed form of latent attention is the naive one", "2405.04434", (), "test_mla.py::test_the_absorbed_form_equals_the_naive_one_in_values_and_gradients"),
  held("sinks-and-caps", "A soft-cap bounds scores, QK-norm bounds them by sqrt(d)", "2408.00118; 2302.05442", ("survey 4, page 312", "survey 4, page 314"), "test_ops.py::test_softcap_bounds_the_logits_and_leaves_small_ones", "test_ops.py::test_query_key_norm_bounds_the_logits_by_sqrt_of_the_head_dim"),
)  # fmt: skip

NORMS = (
  held("rmsnorm-drops-the-mean", "RMSNorm is LayerNorm without the mean", "1910.07467, eq. 4", ("survey 0, line 29", "survey 1, line 67", "survey 4, page 107"), "test_ops.py::test_layer_norm_of_centred_vectors_is_rms_norm"),
  fact("rmsnorm-keeps-rescaling-invariance", "RMSNorm keeps invariance to scale and loses that to shifts", "1910.07467, table 1", ("survey 0, line 31",), "rms_norm_is_rescaling_invariant", HOLDS),
  fact("rmsnorm-adapts-the-rate", "RMSNorm adapts the learning rate: larger weights have smaller gradients", "1910.07467, section 4", ("survey 0, line 31",), "rms_norm_scales_learning", HOLDS),
  fact("rmsnorm-uses-the-variance", "RMSNorm uses only the variance", "1910.07467", ("survey 3, line 142",), "rms_uses_only_variance", REFUTED, "mean square = variance + mean^2"),
  fact("layernorm-needs-zero-mean", "LayerNorm is sensitive to the mean of its input", "1607.06450", ("survey 1, line 60",), "layer_norm_needs_zero_mean", REFUTED),
  fact("layernorm-is-slow-by-its-root", "LayerNorm is slow because of the square root", "1910.07467", ("survey 1, line 59",), "layer_norm_slow_by_root", REFUTED, kind="cost"),
  fact("layernorm-formula", "LayerNorm centres and scales: (x - mean) / sqrt(var + eps) gain + bias", "1607.06450", ("survey 1, line 55", "survey 1, line 57", "survey 4, page 107", "survey 4, page 108"), "layer_norm_formula", HOLDS),
  fact("rmsnorm-is-more-stable", "RMSNorm is numerically more stable in half precision", "no source", ("survey 1, line 23", "survey 1, line 72"), "rmsnorm_is_more_stable", None),
  fact("rmsnorm-saves-10-percent", "RMSNorm makes a Transformer at least 10 % faster (7 to 64 %, 10 to 40 %)", "1910.07467, tables 2 to 7", ("survey 4, page 124",), "published_speeds_of_rmsnorm", REFUTED, "6.9 % for its Transformer", "cost"),
  fact("norms-are-cheap-at-width", "Norms take less than 5 % of a layer at a width of 4096 on an H200", "a roofline", ("survey 0, line 26 (says that they are costly)",), "norms_share", HOLDS, "25.5 % of the time for tiny matrices (2007.00072)", "cost"),
  fact("deepnorm-bounds-updates", "DeepNorm's constants bound the update at any depth", "2203.00555, figure 2", ("survey 1, line 79",), "deepnorm_constants", HOLDS),
  held("scalenorm-is-rmsnorm", "ScaleNorm is RMSNorm with one gain", "1910.05895", ("survey 1, line 79",), "test_ops.py::test_scale_norm_is_rms_norm_times_g_over_sqrt_d"),
  cited("experts-normalization", "Mixtures of experts use Experts Normalization", "no source", ("survey 1, line 79",), None, "no paper of that name is known"),
  fact("rmsnorm-has-half-the-parameters", "RMSNorm has no bias: d parameters against 2 d", "1910.07467", ("survey 1, line 71",), "norm_parameters", HOLDS),
  fact("norms-need-f32-statistics", "In half precision the variance of large inputs overflows unless statistics are in f32", "1910.07467", ("survey 1, line 61", "survey 1, line 72"), "half_precision_norms", HOLDS, "sqrt(65504) = 255.9"),
  measured("rmsnorm-same-quality", "RMSNorm has LayerNorm's quality", "1910.07467, table 2", ("survey 0, line 32", "survey 3, line 140", "survey 4, page 119"), "norms/rmsnorm-ties-layernorm", "below 0.01"),
  measured("rmsnorm-kernel-is-faster", "RMSNorm's forward kernel is faster than LayerNorm's", "1910.07467, tables 2 to 7", ("survey 0, line 32", "survey 3, line 140"), "norm_cost/rmsnorm-faster-forward", "12 to 49 % of the forward kernel on a CPU", "cost"),
  cited("bjorck-showed-scaling", "Bjorck et al. 2018 show that LayerNorm works by its scale", "1806.02375", ("survey 4, page 118",), False, "that paper is about batch normalisation"),
  fact("pre-norm-has-a-clean-stream", "Pre-norm leaves the residual stream clean", "2002.04745", ("survey 4, page 80", "survey 4, page 82", "survey 3, line 113"), "pre_norm_keeps_the_stream", HOLDS),
  measured("post-norm-needs-warmup", "Post-norm fails without warm-up where pre-norm trains", "2002.04745, figure 1", ("survey 4, page 92", "survey 3, line 131"), "norm_placement/post-fails-without-warmup", "3.40 against 2.15"),
  measured("warmup-rescues-post-norm", "Warm-up lets post-norm train", "2002.04745, figure 2", ("survey 4, page 92",), "norm_placement/warmup-helps-post"),
  measured("pre-norm-needs-no-warmup", "Pre-norm needs no warm-up", "2002.04745", ("survey 4, page 87",), "norm_placement/pre-needs-no-warmup"),
  measured("deepnorm-trains", "DeepNorm makes post-norm train", "2203.00555", ("survey 1, line 79",), "norm_placement/deepnorm-trains"),
  measured("post-norm-gradient-constant", "The last layer's gradient does not fall with depth for post-norm", "2002.04745, theorem 1", ("survey 4, page 87",), "gradient_depth/post-constant-in-depth", "0.748, 0.727, 0.726"),
  measured("pre-norm-gradient-falls", "The last layer's gradient falls as 1/sqrt(L) for pre-norm", "2002.04745, theorem 1", ("survey 4, page 87",), "gradient_depth/pre-falls-with-root-depth", "0.326, 0.227, 0.152"),
  measured("post-norm-gradients-vanish", "At initialisation an encoder's gradients shrink towards the lowest layer with post-norm", "2002.04745, figure 3", ("survey 4, page 95",), "gradient_depth/encoder-post-vanishes", "the last layer has 3.5 to 4.6 times the first's, of W1"),
  measured("pre-norm-gradients-alike", "At initialisation an encoder's gradients are alike in all layers with pre-norm", "2002.04745, figure 3", ("survey 4, page 95",), "gradient_depth/encoder-pre-uniform", "0.64 to 0.68 of the first's"),
  measured("decoder-post-norm-vanishes", "At initialisation a decoder's gradients shrink towards the lowest layer with post-norm", "2002.04745, figure 3", ("survey 4, page 95",), "gradient_depth/decoder-post-vanishes", "1.2 to 1.9 times"),
  measured("no-bias-same-quality", "Without biases the perplexity is the same", "2204.02311, section 2", ("survey 4, page 128", "survey 4, page 132"), "bias/no-bias-ties-bias", "below 0.01"),
  measured("parallel-slightly-worse", "Parallel blocks are hardly worse", "2204.02311, section 2", ("survey 4, page 193",), "parallel/parallel-ties-serial", "0.003 to 0.014"),
  cited("parallel-15-percent-faster", "Parallel blocks are 15 % faster", "2204.02311, section 2", ("survey 4, page 192",), None, "of large matrices on accelerators; a CPU step shows nothing of it", "cost", "gpu"),
)  # fmt: skip

FEED_FORWARD = (
  cited("swiglu-is-sigmoid-weighted-linear-units", "SwiGLU is the paper 'Sigmoid-Weighted Linear Units'", "2002.05202", ("survey 0, line 65",), False, "SiLU is Elfwing et al. 2017, GLU Dauphin et al. 2016, SwiGLU Shazeer 2020"),
  held("activations-are-their-formulas", "SwiGLU is Swish(xW) * xV; GELU is x Phi(x)", "2002.05202; 1606.08415", ("survey 0, line 71", "survey 1, line 87", "survey 1, line 103", "survey 4, page 144", "survey 4, page 150"), "test_ops.py::test_activations_equal_their_formulas", "test_ops.py::test_published_numbers_of_gelu_and_silu"),
  fact("silu-is-smoother", "Swish has a smoother gradient than ReLU", "1702.03118", ("survey 0, line 72",), "silu_is_smooth", HOLDS, "slope 0.5 at 0"),
  fact("gelu-tanh-is-close", "GELU can be approximated by tanh", "1606.08415", ("survey 1, line 91", "survey 1, line 96"), "gelu_tanh_error", HOLDS, "4.73e-4 at 2.70"),
  measured("gates-beat-relu", "Gated feed-forwards are better than ReLU at equal parameters", "2002.05202, table 1", ("survey 0, line 73", "survey 3, line 148", "survey 4, page 170"), "glu/swiglu-below-relu", "-0.12, -0.09"),
  measured("swiglu-beats-gelu", "SwiGLU is better than GELU", "2002.05202, table 1", ("survey 1, line 24",), "glu/swiglu-below-gelu", "-0.09, -0.07"),
  measured("geglu-beats-gelu", "GEGLU is better than GELU", "2002.05202, table 1", ("survey 4, page 170",), "glu/geglu-below-gelu"),
  measured("a-gate-alone-helps", "A gate without activation beats GELU", "2002.05202, table 1", (), "glu/bilinear-below-gelu"),
  measured("swiglu-ties-geglu", "SwiGLU and GEGLU tie, neither is best", "2002.05202, table 1 (1.944, 1.942)", ("survey 4, page 174 (says that SwiGLU is best)",), "glu/geglu-ties-swiglu", "a tie"),
  measured("gelu-beats-relu", "GELU is better than ReLU", "1606.08415", ("survey 1, line 95",), "glu/gelu-below-relu", "at most 0.05 either way"),
  fact("gates-keep-parameters-when-wider", "SwiGLU keeps its parameters with a wider hidden layer", "2002.05202, section 2", ("survey 1, line 109",), "wider_keeps_parameters", REFUTED, "narrower: 8/3 d"),
  fact("eight-thirds-rule", "4 d becomes 8/3 d with a gate", "2002.05202, section 2", ("survey 4, page 163", "survey 4, page 165"), "eight_thirds", HOLDS),
  fact("swiglu-costs-more", "SwiGLU costs more compute at the same width", "2002.05202", ("survey 1, line 117", "survey 1, line 111"), "gates_cost_half_more", HOLDS, "1.5 times", "cost"),
  fact("swiglu-overflows", "SwiGLU's product can overflow in half precision", "2002.05202", ("survey 1, line 118",), "swiglu_overflow", HOLDS),
)  # fmt: skip

POSITIONS = (
  held("sinusoids-rotate", "Sinusoids inject order: those at p + k are a rotation of those at p", "1706.03762, section 3.5", ("survey 0, line 17", "survey 3, line 160"), "test_ops.py::test_sinusoids_at_p_plus_k_are_a_rotation_of_those_at_p_whatever_p_is"),
  held("rope-is-relative", "RoPE's scores depend on the distance alone", "2104.09864, section 3.2", ("survey 0, line 43", "survey 0, line 44", "survey 3, line 173"), "test_ops.py::test_rope_scores_depend_on_the_distance_alone_up_to_100000", "test_ops.py::test_rope_keeps_norms"),
  fact("rope-is-block-diagonal", "RoPE is a block-diagonal rotation, computed element by element", "2104.09864, eq. 34", ("survey 4, page 210", "survey 4, page 221"), "rope_pairs_are_rotations", HOLDS),
  fact("rope-decays", "RoPE's upper bound on dependence falls over the first 1000 positions", "2104.09864, section 3.4.3", ("survey 0, line 46",), "rope_decays", HOLDS, "32.5 at 0, 4.5 at 1000"),
  measured("rope-degrades-at-4x", "RoPE does not handle longer unseen sequences: the loss rises at 4 times the length", "2306.15595, table 1", ("survey 0, line 45 (says the opposite)", "survey 4, page 359 (says the opposite)"), "positions/rope-degrades-at-4x", "LLaMA 7B: 7.2 to above 1000 at twice"),
  measured("rope-rises-at-2x", "RoPE's loss rises at twice the trained length", "2306.15595, table 1", ("survey 3, line 174 (says the opposite)",), "positions/rope-rises-at-2x"),
  measured("rope-beats-sinusoids-beyond", "RoPE extrapolates better than sinusoids", "2108.12409, table 2", ("survey 4, page 226",), "positions/rope-below-sinusoidal-at-2x", "21.4 against 43.5"),
  measured("sinusoids-degrade-more", "Sinusoids degrade more than RoPE", "2108.12409, figure 1", ("survey 3, line 165",), "positions/sinusoidal-worse-than-rope-at-4x"),
  measured("learned-degrade-most", "Learned positions degrade most", "2108.12409", ("survey 3, line 165",), "positions/learned-worse-than-sinusoidal-at-4x"),
  measured("alibi-extrapolates", "ALiBi does not degrade at 4 times the length", "2108.12409, figure 1", ("survey 4, page 207",), "positions/alibi-flat-at-4x", "flat"),
  fact("learned-positions-end", "A learned table trained on 512 has nothing for token 800", "1810.04805", ("survey 3, line 165",), "learned_positions_end", HOLDS),
  fact("packing-confuses-absolute-positions", "RoPE does not see where a packed document starts, and absolute positions do", "2104.09864", ("survey 3, line 175", "survey 3, line 166"), "packing_is_neutral", HOLDS),
  held("ntk-keeps-the-highest", "NTK scaling keeps the highest frequency and divides the lowest", "bloc97, 2023", ("survey 1, line 149",), "test_ops.py::test_ntk_divides_the_lowest_frequency_by_the_factor_and_keeps_the_highest"),
  fact("xpos-keeps-the-highest", "xPos keeps high frequencies", "2212.10554", ("survey 1, line 149",), "xpos_keeps_high_frequencies", REFUTED, "zeta 0.286 to 1"),
  held("yarn-tables-are-published", "Dynamic NTK and YaRN extend the context: our tables are those of transformers", "2309.00071", ("survey 1, line 34",), "test_ops.py::test_scaling_tables_equal_the_golden_numbers", "test_ops.py::test_yarn_keeps_and_divides_the_published_dimensions"),
  measured("interpolation-repairs", "Interpolated positions lower the loss at 4 times the length, without training on", "2306.15595", ("survey 1, line 34",), "context_extension/interpolation-repairs", "the paper trains on after it"),
  measured("ntk-repairs", "NTK-aware scaling lowers the loss at 4 times the length, without training on", "bloc97, 2023", ("survey 1, line 34",), "context_extension/ntk-repairs"),
  measured("yarn-repairs", "YaRN lowers the loss at 4 times the length, without training on", "2309.00071", ("survey 1, line 34",), "context_extension/yarn-repairs"),
)  # fmt: skip

TRAINING = (
  fact("softmax-overflows", "exp overflows half precision above 11.09; with the maximum subtracted it never does", "IEEE 754", ("survey 4, page 302",), "softmax_overflow", HOLDS, "ln 65504"),
  fact("z-loss-gradient", "z-loss is log^2 Z", "2204.02311, section 5", ("survey 4, page 306", "survey 4, page 308"), "z_loss_gradient", HOLDS),
  measured("raised-rates-spike", "Training's loss has spikes where the learning rate is too high", "2309.14322, figure 1", ("survey 4, page 298",), "stability/raised-rate-spikes"),
  measured("z-loss-shrinks-z", "z-loss makes log Z smaller", "2204.02311, section 5", ("survey 4, page 306",), "stability/z-loss-shrinks-log-z", "5 times"),
  measured("z-loss-stabilises", "z-loss keeps a run with ten times the rate going", "2309.14322", ("survey 4, page 306",), "stability/z-loss-survives"),
  measured("qk-norm-stabilises", "QK-norm keeps a run with ten times the rate going", "2302.05442; 2309.14322", ("survey 4, page 312",), "stability/qk-norm-survives"),
  measured("soft-cap-stabilises", "A soft-cap keeps a run with ten times the rate going", "2408.00118", ("survey 4, page 319",), "stability/softcap-survives"),
  measured("aspect-ratio-is-flat", "The ratio of width to depth hardly matters", "2001.08361, figure 5", ("survey 4, page 254", "survey 4, page 256"), "shape/aspect-ratio-flat", "3 %"),
  measured("narrow-heads-are-worse", "Very narrow heads are worse", "2002.07028", ("survey 4, page 249",), "head_dim/narrow-heads-worse"),
  fact("width-is-heads-times-dim", "Heads times their dimension is the width, as best practice", "their papers", ("survey 4, page 249", "survey 4, page 250"), "heads_times_dim_is_width", REFUTED, "0.667 to 2"),
  cited("tensor-cores-want-128", "Heads of 128 dimensions are best because of tensor cores", "2205.14135", ("survey 4, page 245",), None, "a GPU's timing by head dimension: not run here", "cost", "gpu"),
  cited("flat-minima", "Weight decay helps by flatter minima", "2310.04415", ("survey 4, page 283",), False, "that paper finds an interaction with the decay of the learning rate, for language models"),
  cited("heads-times-dim-is-width", "Bhojanapalli et al. 2020 say that heads x dimension should be the width", "2002.07028", ("survey 4, page 250",), False, "that paper argues the opposite: fix the head's dimension, whatever the width"),
  measured("larger-vocabulary-fewer-tokens", "A larger vocabulary needs fewer tokens, and so fewer steps", "2407.21783, section 3.2", ("survey 4, page 269",), "vocabulary/larger-vocabulary-fewer-tokens", kind="cost"),
  measured("dropout-is-not-needed", "Pre-training needs no dropout", "2302.13971; 2204.02311", ("survey 4, page 277", "survey 4, page 278"), "dropout/dropout-worse"),
  measured("weight-decay-lowers-loss", "Weight decay lowers the loss (held-out here; the paper speaks of the training loss)", "2310.04415", ("survey 4, page 282",), "weight_decay/decay-lowers-loss", "an effect of long runs"),
  measured("tied-embeddings-tie", "Tied embeddings lose nothing", "1608.05859", (), "tied/tied-ties-untied"),
  measured("lion-ties-adamw", "Lion does as well as AdamW", "2302.06675", (), "optimizers/lion-ties-adamw"),
  measured("muon-beats-adamw", "Muon gets further than AdamW in as many steps", "2502.16982", (), "optimizers/muon-below-adamw"),
)  # fmt: skip

BEYOND = (
  fact("linear-attention-is-linear", "Linear attention is a kernel with the products reordered", "2006.16236", ("survey 2, line 84", "survey 2, line 86"), "linear_attention_reorders", HOLDS),
  fact("recurrences-are-parallel", "Recurrent models cost time linear in length, with a state that does not grow", "2307.08621; 2405.21060", ("survey 0, line 121", "survey 2, line 110", "survey 2, line 90"), "recurrence_is_parallel", HOLDS),
  fact("a-fixed-state-recalls-less", "State-space models recall less over long range than attention: a state of fixed size holds so many pairs", "2312.04927", ("survey 2, line 112",), "fixed_state_recall", HOLDS),
  held("cached-segments-are-one-text", "Transformer-XL caches previous segments: values are those of one long text", "1901.02860, section 3.2", ("survey 2, line 117",), "test_decoding.py::test_chunks_batches_slices_and_neighbours_change_nothing"),
  fact("zero-order-hold", "A state space is discretised by the matrix exponential", "2312.00752, eq. 4", ("survey 2, line 106", "survey 2, line 108"), "zero_order_hold", HOLDS),
  fact("compressive-doubles-the-range", "Compressive memory doubles the range at 3 times compression", "1911.05507, section 3", ("survey 2, line 118",), "compressive_range", HOLDS, "2 times"),
  cited("transformer-xl-15-percent", "Compressive memory lowers PG-19 perplexity by 15 % against a Transformer", "1911.05507, table 4", ("survey 2, line 120",), False, "36.3 to 33.6 against Transformer-XL, 7.4 %"),
  cited("mamba-is-linear-attention-3x", "Mamba is linear attention with 3 times the inference speed", "2312.00752", ("survey 2, line 89",), False, "a selective state space; the paper has 4 to 5 times", "cost"),
  cited("retnet-memory-linear", "RetNet's memory is linear in length", "2307.08621", ("survey 2, line 90",), None, "in training; a decoding state is constant. No retention in this codebase yet", "cost"),
  cited("table-of-16k-speeds", "At 16k tokens: 120, 380 and 260 tokens a second", "no source", ("survey 2, line 91", "survey 2, line 97"), None, "neither model sizes nor hardware are given, so that nothing can be checked", "cost"),
  cited("transformer-bleu", "The Transformer reaches 28.4 and 41.0 BLEU", "1706.03762, table 2", ("survey 0, line 21",), None, "28.4 in all versions; for French the proceedings of 2017 have 41.0, and table 2 of the last version 41.8; nothing is trained here"),
  cited("gpt-4-is-a-mixture", "GPT-4 is a mixture of experts with grouped queries", "rumour", ("survey 0, line 110", "survey 1, line 13"), None, "nothing is published"),
  cited("swiglu-ablated-in-llama-and-palm", "LLaMA and PaLM show how SwiGLU lowers perplexity", "2302.13971; 2204.02311", ("survey 1, line 108",), None, "neither has the ablation; 2002.05202, table 1: 1.944 against 1.983 of GELU"),
)  # fmt: skip


def get_claims() -> tuple[Claim, ...]:
  return PUBLISHED + MEMORY + ATTENTION + NORMS + FEED_FORWARD + POSITIONS + TRAINING + BEYOND
