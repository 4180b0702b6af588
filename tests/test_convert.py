"""Checkpoints of transformers: the same function, the same gradient, the same text, the same file back."""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import plain_if, three

import llmarch
from llmarch import sharding
from llmarch.__main__ import main
from llmarch.analysis import cost
from llmarch.build import build
from llmarch.config import ModelConfig, Precision, parse_stack
from llmarch.convert import hf
from llmarch.convert.fields import Rearrange, name_blocks
from llmarch.convert.tables import FAMILIES
from llmarch.errors import UserError
from llmarch.layers.param import flatten
from llmarch.models.decoder import abstract
from llmarch.presets import PRESETS, shrink

HAVE_PEER = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None
needs_peer = pytest.mark.skipif(
  not HAVE_PEER, reason="torch or transformers is absent: no family was compared with its peer"
)

V, NEW = 53, 32  # vocabulary, tokens to generate
LENGTHS = (13, 7, 10)  # of the rows of a batch, padded on the left
NO_IDS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
SIZES = dict(
  vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
  num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
GPT = dict(vocab_size=V, n_embd=24, n_layer=2, n_head=3, n_positions=64)


def rope(kind: str, **more) -> dict:
  return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


LONG = dict(long_factor=[1.0, 3.0], short_factor=[1.0, 1.1], original_max_position_embeddings=16)
YARN = dict(factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LOCAL, GLOBAL = "sliding_attention", "full_attention"

QWEN_MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20)

DEEPSEEK = dict(
  num_key_value_heads=6, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8,
  n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
)  # fmt: skip

GLM_MOE = dict(
  n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, n_shared_experts=2, num_hidden_layers=3,
)  # fmt: skip

# Each family: variants of its config. A variant with "long" is compared without the cache beyond the original length,
# where transformers turns new keys, but not those in its cache, by the new angles.
VARIANTS: dict[str, list[dict]] = {
  "llama": [
    {},
    dict(tie_word_embeddings=True, num_key_value_heads=6, attention_bias=True, mlp_bias=True),
    dict(num_key_value_heads=1, head_dim=10, rms_norm_eps=1e-3, **rope("linear", factor=2.5)),
    dict(**rope("yarn", **YARN)),
    dict(**rope("yarn", **YARN, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3)),
    dict(**rope("llama3", **LLAMA3)),
    dict(max_position_embeddings=48, **rope("dynamic", factor=3.0)),
    dict(long=True, max_position_embeddings=8, **rope("dynamic", factor=9.0)),
  ],
  "ministral": [
    dict(sliding_window=5, head_dim=10, layer_types=[LOCAL, GLOBAL]), dict(sliding_window=None, head_dim=4),
  ],
  "ministral3": [
    dict(head_dim=10, rope_parameters=dict(rope_type="yarn", **YARN | dict(original_max_position_embeddings=4),
         rope_theta=500.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3)),
    dict(head_dim=4, sliding_window=5, tie_word_embeddings=True, rope_parameters=dict(
      rope_type="default", rope_theta=500.0, llama_4_scaling_beta=0.7, original_max_position_embeddings=3)),
  ],
  "mistral": [dict(sliding_window=5, head_dim=10), dict(sliding_window=None, tie_word_embeddings=True)],
  "qwen2": [
    {},
    dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=3, tie_word_embeddings=True),
  ],
  "qwen3": [
    dict(head_dim=10),
    dict(head_dim=4, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=0),
  ],
  "gemma": [dict(head_dim=10), dict(head_dim=4, num_key_value_heads=1, attention_bias=True)],
  "gemma2": [
    dict(head_dim=10, sliding_window=5, query_pre_attn_scalar=7, num_hidden_layers=4),
    dict(head_dim=4, layer_types=[GLOBAL, LOCAL], final_logit_softcapping=3.0, attn_logit_softcapping=None),
  ],
  "gemma3_text": [
    dict(head_dim=10, sliding_window=5, query_pre_attn_scalar=9, num_hidden_layers=8),
    dict(
      head_dim=4, sliding_window=3, layer_types=[LOCAL, GLOBAL], final_logit_softcapping=4.0,
      rope_parameters={
        LOCAL: {"rope_type": "default", "rope_theta": 300.0},
        GLOBAL: {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0},
      },
    ),
  ],
  "gpt2": [{}, dict(n_inner=40, tie_word_embeddings=False, scale_attn_weights=False, activation_function="relu")],
  "gpt_bigcode": [{}, dict(multi_query=False, n_inner=40, scale_attn_weights=False, tie_word_embeddings=False)],
  "codegen": [dict(n_head=4, rotary_dim=4), dict(n_embd=32, n_head=8, rotary_dim=2, n_inner=40)],
  "gpt_neox": [
    dict(num_attention_heads=3),
    dict(
      num_attention_heads=2, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True,
      rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0, "partial_rotary_factor": 0.5},
    ),
  ],
  "gptj": [dict(rotary_dim=4), dict(rotary_dim=8, n_inner=40, activation_function="gelu")],
  "gpt_neo": [
    dict(num_heads=3, attention_types=[[["global", "local"], 1]], window_size=5, num_layers=2),
    dict(num_heads=2, attention_types=[[["local"], 2], [["global"], 1]], window_size=3, num_layers=3,
         intermediate_size=40, tie_word_embeddings=False),
  ],
  "olmo": [dict(clip_qkv=0.7), dict(num_key_value_heads=6, attention_bias=True, tie_word_embeddings=True)],
  "olmo2": [{}, dict(num_key_value_heads=6, attention_bias=True, tie_word_embeddings=True)],
  "olmo3": [
    dict(sliding_window=5, num_hidden_layers=4),
    dict(
      sliding_window=3, layer_types=[GLOBAL, LOCAL],
      rope_parameters={
        LOCAL: {"rope_type": "default", "rope_theta": 300.0},
        GLOBAL: {"rope_type": "yarn", "rope_theta": 300.0, **YARN},
      },
    ),
  ],
  "exaone4": [
    dict(head_dim=10, sliding_window=5, num_hidden_layers=4, layer_types=[LOCAL, LOCAL, LOCAL, GLOBAL]),
    dict(head_dim=4, sliding_window=None, layer_types=[GLOBAL] * 2, tie_word_embeddings=True),
  ],
  "phi3": [
    {},
    dict(sliding_window=5, tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=3,
         rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    dict(original_max_position_embeddings=64, max_position_embeddings=256, **rope("longrope", **LONG)),
    dict(long=True, original_max_position_embeddings=8, **rope("longrope", **LONG)),
  ],
  "granitemoe": [
    dict(num_local_experts=5, embedding_multiplier=3.0, logits_scaling=7.0, residual_multiplier=0.3),
    dict(num_local_experts=4, num_experts_per_tok=3, attention_multiplier=0.2, attention_bias=True,
         tie_word_embeddings=True),
  ],
  "mixtral": [
    dict(num_local_experts=5),
    dict(num_local_experts=4, num_experts_per_tok=1, sliding_window=5, head_dim=10, tie_word_embeddings=True),
  ],
  "qwen2_moe": [
    dict(**QWEN_MOE, shared_expert_intermediate_size=28),
    dict(**QWEN_MOE, shared_expert_intermediate_size=12, norm_topk_prob=True, num_hidden_layers=4, qkv_bias=False,
         decoder_sparse_step=2, use_sliding_window=True, sliding_window=4, tie_word_embeddings=True),
    dict(**QWEN_MOE, shared_expert_intermediate_size=20, mlp_only_layers=[1]),
  ],
  "qwen3_moe": [
    dict(**QWEN_MOE, head_dim=10, norm_topk_prob=True),
    dict(**QWEN_MOE, head_dim=4, attention_bias=True, use_sliding_window=True, sliding_window=6, mlp_only_layers=[0]),
  ],
  "olmoe": [
    dict(num_experts=5, num_experts_per_tok=2, clip_qkv=0.9),
    dict(num_experts=4, num_experts_per_tok=3, norm_topk_prob=True, attention_bias=True, num_key_value_heads=6,
         tie_word_embeddings=True),
  ],
  "gpt_oss": [
    dict(num_local_experts=5, num_experts_per_tok=2, head_dim=10, sliding_window=5, num_hidden_layers=4,
         **rope("yarn", **YARN, truncate=False, rope_theta=20.0)),
    dict(num_local_experts=4, num_experts_per_tok=3, head_dim=4, layer_types=[GLOBAL, LOCAL], sliding_window=3,
         attention_bias=False, tie_word_embeddings=True, **rope("default")),
  ],
  "dbrx": [
    dict(d_model=24, n_heads=6, n_layers=2, max_seq_len=64,
         attn_config=dict(kv_n_heads=2, clip_qkv=0.7, rope_theta=500.0),
         ffn_config=dict(ffn_hidden_size=20, moe_num_experts=5, moe_top_k=2), **rope("default")),
    dict(d_model=24, n_heads=3, n_layers=2, max_seq_len=64,
         attn_config=dict(kv_n_heads=3, clip_qkv=8.0, rope_theta=500.0),
         ffn_config=dict(ffn_hidden_size=36, moe_num_experts=4, moe_top_k=3, moe_normalize_expert_weights=None),
         **rope("default")),
  ],
  "deepseek_v2": [
    dict(**DEEPSEEK, q_lora_rank=None, n_shared_experts=2, first_k_dense_replace=1, num_hidden_layers=3,
         **rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.7)),
    dict(**DEEPSEEK, q_lora_rank=14, topk_method="group_limited_greedy", n_group=3, topk_group=2,
         routed_scaling_factor=1.7, tie_word_embeddings=True),
  ],
  "deepseek_v3": [
    dict(**DEEPSEEK, q_lora_rank=14, n_shared_experts=1, n_group=3, topk_group=2, first_k_dense_replace=2,
         num_hidden_layers=4, rms_norm_eps=1e-3, **rope("yarn", **YARN, mscale=1.0, mscale_all_dim=1.0)),
    dict(**DEEPSEEK, q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1, norm_topk_prob=False,
         first_k_dense_replace=0, rope_interleave=False, tie_word_embeddings=True),
    dict(**DEEPSEEK, q_lora_rank=10, n_group=2, topk_group=1, first_k_dense_replace=1,
         **rope("yarn", **YARN, mscale=0.5, mscale_all_dim=1.2)),
  ],
  "glm4_moe": [
    dict(**GLM_MOE, head_dim=8, attention_bias=True, use_qk_norm=True, first_k_dense_replace=1,
         routed_scaling_factor=1.7),
    dict(**GLM_MOE, n_group=3, topk_group=2, first_k_dense_replace=0, norm_topk_prob=False, tie_word_embeddings=True,
         rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}),
  ],
  "minimax_m2": [
    dict(num_local_experts=5, num_experts_per_tok=2, head_dim=8,
         rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    dict(num_local_experts=4, num_experts_per_tok=3, head_dim=10, num_key_value_heads=6, tie_word_embeddings=True,
         **rope("default")),
  ],
  "granite": [
    dict(embedding_multiplier=3.0, logits_scaling=7.0, residual_multiplier=0.3, attention_multiplier=0.2),
    dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, logits_scaling=0.5),
  ],
  "starcoder2": [dict(sliding_window=5), dict(use_bias=False, tie_word_embeddings=False, num_key_value_heads=6)],
  "stablelm": [
    dict(num_attention_heads=3, num_key_value_heads=1),
    dict(num_attention_heads=2, use_qkv_bias=True, use_parallel_residual=True, tie_word_embeddings=True,
         rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    dict(qk_layernorm=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0,
         "partial_rotary_factor": 0.5}),
  ],
  "falcon": [
    dict(num_attention_heads=3),  # 7B
    dict(new_decoder_architecture=True, num_kv_heads=2),  # 40B
    dict(new_decoder_architecture=True, num_kv_heads=3, tie_word_embeddings=False, bias=True),  # 180B
    dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=40),  # 11B
    dict(multi_query=False, parallel_attn=False, num_attention_heads=3, bias=True),
  ],
  "mpt": [
    dict(d_model=24, n_heads=4, n_layers=2, max_seq_len=64),
    dict(d_model=24, n_heads=3, n_layers=2, max_seq_len=64,
         attn_config={"softmax_scale": 0.3, "clip_qkv": 0.8}),  # transformers does not read alibi_bias_max
  ],
  "opt": [
    dict(ffn_dim=40),
    dict(ffn_dim=40, word_embed_proj_dim=10, do_layer_norm_before=False, num_attention_heads=3),  # 350M
    dict(ffn_dim=36, word_embed_proj_dim=14, enable_bias=False, layer_norm_elementwise_affine=False,
         tie_word_embeddings=False),
    dict(ffn_dim=36, _remove_final_layer_norm=True, activation_function="gelu"),
  ],
  "bloom": [
    dict(hidden_size=24, n_head=4, n_layer=2),
    dict(hidden_size=24, n_head=3, n_layer=2, tie_word_embeddings=False),
  ],
  "phi": [
    dict(num_attention_heads=3, num_key_value_heads=1),
    dict(qk_layernorm=True, num_key_value_heads=6, rope_parameters={"rope_type": "linear", "rope_theta": 500.0,
         "factor": 2.0, "partial_rotary_factor": 0.5}),
  ],
  "cohere": [
    dict(logit_scale=0.3),
    dict(attention_bias=True, tie_word_embeddings=False),
    dict(use_qk_norm=True, num_key_value_heads=3),
  ],
  "cohere2": [
    dict(sliding_window=5, num_hidden_layers=4),
    dict(sliding_window=3, layer_types=[GLOBAL, LOCAL], attention_bias=True, logit_scale=2.0),
  ],
  "nemotron": [dict(head_dim=8), dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=4)],
  "smollm3": [
    dict(num_hidden_layers=4),
    dict(no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=4, attention_bias=True, mlp_bias=True,
         tie_word_embeddings=False),
  ],
  "glm4": [dict(head_dim=8), dict(head_dim=4, attention_bias=False, tie_word_embeddings=True)],
  "glm": [dict(head_dim=8), dict(head_dim=4, attention_bias=False, tie_word_embeddings=True)],
  "arcee": [dict(head_dim=10), dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)],
  "seed_oss": [dict(head_dim=10), dict(head_dim=4, attention_bias=False, attention_out_bias=True, mlp_bias=True)],
  "ernie4_5": [dict(head_dim=10), dict(head_dim=4, use_bias=True, tie_word_embeddings=False)],
  "palm": [
    {},
    dict(heads=4, dim_head=6, ff_mult=1.5, norm="rmsnorm", norm_eps=1e-6, logit_scale=0.3),
  ],
  "orion": [dict(num_key_value_heads=6), dict(num_key_value_heads=2, rms_norm_eps=1e-3, tie_word_embeddings=True)],
  "minicpm": [
    dict(num_key_value_heads=6, scale_emb=12, scale_depth=1.4, dim_model_base=8, tie_word_embeddings=True),
    dict(num_key_value_heads=2, scale_emb=3, scale_depth=0.7, dim_model_base=48, num_hidden_layers=3),
  ],
  "internlm": [dict(num_key_value_heads=6, bias=True), dict(num_key_value_heads=6, bias=False)],
  "internlm2": [dict(num_key_value_heads=2, bias=False), dict(num_key_value_heads=3, bias=False, rope_theta=500.0)],
  "grok-1": [
    {},
    dict(num_local_experts=4, num_experts_per_tok=3, num_key_value_heads=6, rope_theta=300.0),
  ],
}  # fmt: skip

CASES = {f"{family}-{i}": (family, one) for family, variants in VARIANTS.items() for i, one in enumerate(variants)}


def test_every_family_has_variants():
  assert VARIANTS.keys() == FAMILIES.keys()


# ------------------------------------------------------------------------------------------------- the peer


def peer(family: str, variant: dict):
  """A model of transformers, or of peers.py, with all parameters random."""
  import peers
  import torch

  torch.set_num_threads(1)
  torch.manual_seed(0)
  options = {k: v for k, v in variant.items() if k != "long"}
  model = peers.MODELS[family](**options) if family in peers.MODELS else of_transformers(family, options)
  with torch.no_grad():
    for name, p in model.named_parameters():
      scale = 0.3 if p.ndim == 1 else 1.0 if "emb" in name or "wte" in name else p.shape[-1] ** -0.5
      p.add_(torch.randn(p.shape) * scale)
    for _, b in buffers(model):
      b.add_(torch.randn(b.shape) * 0.3)
  return model


def buffers(model):
  """What is trained, but not by a gradient: the biases that balance DeepSeek-V3's experts."""
  return [(name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def of_transformers(family: str, options: dict):
  from transformers import AutoModelForCausalLM
  from transformers.models.auto.configuration_auto import CONFIG_MAPPING

  kind = CONFIG_MAPPING[family]
  known = set(kind.__dataclass_fields__)
  sizes = {k: v for k, v in (SIZES | GPT | NO_IDS).items() if k in known}
  if "n_embd" in known:
    sizes = {k: v for k, v in sizes.items() if k not in SIZES or k == "vocab_size"}
  return AutoModelForCausalLM.from_config(kind(**sizes | options), attn_implementation="eager").eval()


def reopened(folder: pathlib.Path):
  """The peer's model of a folder that has all its tensors and no other."""
  import peers
  from transformers import AutoModelForCausalLM

  family = json.loads((folder / "config.json").read_text())["model_type"]
  if family in peers.MODELS:
    return peers.MODELS[family].from_pretrained(folder)
  model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  return model


def batch(lengths=LENGTHS):
  """tokens and mask [B, T], padded on the left."""
  width = max(lengths)
  rng = np.random.default_rng(1)
  mask = np.arange(width) >= width - np.array(lengths)[:, None]
  return np.where(mask, rng.integers(0, V, mask.shape), 0), mask


def peer_pass(model, tokens, mask):
  """The logits. Its parameters keep the gradients of the mean loss of the next token, over what is no padding."""
  import torch

  ids, attention = torch.tensor(tokens), torch.tensor(mask.astype(int))
  more = {}
  if "position_ids" in inspect.signature(model.forward).parameters:
    more["position_ids"] = torch.clamp(attention.cumsum(-1) - 1, min=0)
  logits = model(input_ids=ids, attention_mask=attention, use_cache=False, **more).logits
  real = torch.tensor(mask[:, 1:] & mask[:, :-1])
  chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
  loss = -(chosen * real).sum() / real.sum()
  loss.backward()
  return logits.detach().numpy()


def in_our_names(model, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The gradients of a transformers model, written as its weights are, read as we read them."""
  import torch

  other = copy.deepcopy(model)
  with torch.no_grad():
    for name, p in other.named_parameters():
      p.copy_(model.get_parameter(name).grad)
    for _, b in buffers(other):
      b.zero_()
  other.save_pretrained(folder)
  checkpoint = hf.Checkpoint(folder)
  return {path: checkpoint.param(path) for path in checkpoint.entries}


def our_pass(config, params, tokens, mask):
  graph = nnx.graphdef(abstract(config))
  positions = np.where(mask, np.cumsum(mask, 1) - 1, -1).astype(np.int32)
  real = mask[:, 1:] & mask[:, :-1]

  def loss(params):
    logits, _, _ = nnx.merge(graph, params)(jnp.asarray(tokens, jnp.int32), jnp.asarray(positions))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
    return -jnp.sum(chosen * real) / real.sum(), logits

  grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
  return np.asarray(logits), flatten(grads)


# Plain `pytest` compares the logits of these and the rest of the first three; --full the logits of all, and the rest of
# these; --nightly the rest of all.
DOZEN = (
  "deepseek_v3-0", "gemma2-0", "gpt2-0", "llama-0", "gpt_oss-0", "falcon-1", "opt-1", "cohere-2", "mpt-0", "bloom-0",
  "gpt_neo-0", "stablelm-2",
)  # fmt: skip


def variants(plain: tuple, full=lambda case: True) -> list:
  """All cases, marked by tier."""
  marks = lambda case: [] if case in plain else [pytest.mark.full if full(case) else pytest.mark.nightly]
  return [pytest.param(case, marks=marks(case)) for case in CASES]


# Of these families --full has the golden file, which is of variant 0, and these variants; --nightly has the rest.
BRIEF = {
  "arcee": (), "codegen": (), "ernie4_5": (), "exaone4": (1,), "glm": (), "glm4_moe": (1,), "gpt_bigcode": (1,),
  "internlm": (), "internlm2": (1,), "minicpm": (1,), "minimax_m2": (1,), "ministral": (), "ministral3": (1,),
  "orion": (), "seed_oss": (),
}  # fmt: skip


def in_full(case: str) -> bool:
  family = CASES[case][0]
  return family not in BRIEF or int(case.removeprefix(f"{family}-")) in BRIEF[family]


each_logits = pytest.mark.parametrize("case", variants(DOZEN, in_full))
each_first = pytest.mark.parametrize("case", variants(DOZEN[:3], DOZEN.__contains__))


@functools.cache
def saved_peer(case: str, folder: pathlib.Path):
  """The model of a case, written as transformers writes it, and ours read from there."""
  model = peer(*CASES[case])
  model.save_pretrained(folder / case)
  return model, folder / case, llmarch.load(folder / case)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("peers")
  return lambda case: saved_peer(case, folder)


def batch_of(case: str):
  return batch((13,)) if CASES[case][1].get("long") else batch()


@needs_peer
@each_logits
def test_family_computes_the_logits_of_its_peer(case, saved, cases):
  model, _, lm = saved(case)
  tokens, mask = batch_of(case)
  want = peer_pass(model, tokens, mask)
  positions = np.where(mask, np.cumsum(mask, 1) - 1, -1).astype(np.int32)
  graph = nnx.graphdef(abstract(lm.config))
  got = jax.jit(lambda params: nnx.merge(graph, params)(jnp.asarray(tokens, jnp.int32), jnp.asarray(positions))[0])
  assert np.abs(np.asarray(got(lm.params)) - want)[mask].max() <= 1e-5 * np.std(want[mask])
  cases("family x variant equals its peer: logits")


@needs_peer
@each_first
def test_family_has_the_gradients_of_its_peer(case, saved, tmp_path, cases):
  """Of every parameter, in the names of ours."""
  model, _, lm = saved(case)
  tokens, mask = batch_of(case)
  model.zero_grad()
  want = peer_pass(model, tokens, mask)
  got, our_grads = our_pass(lm.config, lm.params, tokens, mask)
  assert np.abs(got - want)[mask].max() <= 1e-5 * np.std(want[mask])
  wanted = in_our_names(model, tmp_path / "grads")
  assert wanted.keys() == our_grads.keys()
  # Of a key's bias without rotary positions it is 0: softmax does not see it. Hence the floor.
  floor = 1e-3 * max(np.abs(g).max() for g in wanted.values())
  for path, want_grad in wanted.items():
    error = np.abs(np.asarray(our_grads[path]) - want_grad).max() / max(np.abs(want_grad).max(), floor)
    assert error <= 1e-4, f"gradient of {path}: {error}"
  cases("family x variant equals its peer: gradients")


@needs_peer
@each_first
def test_family_writes_the_text_of_its_peer(case, saved, cases):
  """32 greedy tokens from the cache. (A variant with "long" has none: see VARIANTS.)"""
  import torch

  model, _, lm = saved(case)
  tokens, mask = batch_of(case)
  if CASES[case][1].get("long"):
    return
  ids, attention = torch.tensor(tokens), torch.tensor(mask.astype(int))
  greedy = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
  out = model.generate(ids, attention_mask=attention, **greedy)
  text = lm.generate([list(map(int, row[m])) for row, m in zip(tokens, mask)], max_new_tokens=NEW)
  assert text == out[:, tokens.shape[1] :].tolist()
  cases("family x variant equals its peer: greedy tokens")


@needs_peer
@each_first
def test_family_is_written_back_as_its_peer_wrote_it(case, saved, tmp_path, cases):
  import torch
  from safetensors.numpy import load_file

  _, theirs, lm = saved(case)
  tokens = batch_of(case)[0]
  assert main(["convert", f"--from={theirs}", f"--to={tmp_path / 'ours'}"]) == 0
  ours = flatten(llmarch.load(tmp_path / "ours").params)
  assert all(np.array_equal(value, ours[name]) for name, value in flatten(lm.params).items())
  assert main(["convert", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--format=hf"]) == 0
  back = tmp_path / "back"
  before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
  assert before.keys() == after.keys()
  for name, value in before.items():
    assert value.dtype == after[name].dtype and np.array_equal(value, after[name]), name
  with torch.no_grad():
    same = [reopened(folder)(torch.tensor(tokens[:, -7:])).logits for folder in (theirs, back)]
  assert torch.abs(same[0] - same[1]).max() <= 1e-5 * same[0].std()
  cases("family x variant equals its peer: files")


# --------------------------------------------------------------------------------- without the peer: golden files

FILE = pathlib.Path(__file__).parent / "golden" / "families.json"
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}


def drawn(name: str, shape) -> np.ndarray:
  """A tensor that depends on its name alone: 1 or 0, and noise."""
  rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
  noise = rng.standard_normal(shape, np.float32)
  if len(shape) == 1:
    return 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
  return noise * np.float32(1.0 if "emb" in name or "wte" in name else shape[-1] ** -0.5)


def write_drawn(folder: pathlib.Path, config: dict, shapes: dict) -> None:
  """A folder of transformers with drawn tensors. tests/golden/make.py has its peer compute the logits."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  entries = {name: (np.dtype(np.float32), tuple(shape)) for name, shape in shapes.items()}
  array = lambda name: drawn(name, entries[name][1]).astype(np.float32)
  hf.write_safetensors(folder / "model.safetensors", entries, array, metadata={"format": "pt"})


def test_every_family_has_a_golden_file():
  assert GOLDEN.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", plain_if(("llama", "gpt2", "deepseek_v3").__contains__, GOLDEN))
def test_logits_equal_those_that_transformers_computed_once(family, tmp_path):
  golden = GOLDEN[family]
  write_drawn(tmp_path / family, golden["config"], golden["shapes"])
  lm = llmarch.load(tmp_path / family)
  logits = lm.logits(batch((13,))[0].tolist())[0, -1]
  want = np.array(golden["logits"], np.float32)
  assert np.abs(logits - want).max() <= 1e-5 * want.std()


# ------------------------------------------------------------------------------------------------ bad input

TINY = dict(
  model_type="llama", vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
  num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """A sound llama checkpoint in several shards, written without transformers."""
  folder = tmp_path_factory.mktemp("sound")
  config = build(ModelConfig, FAMILIES["llama"].read(TINY), "model")
  shapes = {path: a.shape for path, a in flatten(nnx.state(abstract(config))).items()}

  def read(path, index):
    return drawn(f"{path}{index}", shapes[path][len(index) :]).astype(np.float32)

  hf.write_checkpoint(folder, config, read, model_type="llama", shard_bytes=20_000)
  return folder


@pytest.fixture
def folder(sound, tmp_path):
  return pathlib.Path(shutil.copytree(sound, tmp_path / "hf"))


def shards(folder):
  return sorted(folder.glob("model-*.safetensors"))


def edit_json(path, change):
  data = json.loads(path.read_text())
  change(data)
  path.write_text(json.dumps(data))


def edit_header(path, change):
  raw = path.read_bytes()
  n = int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8 : 8 + n])
  text = change(header)
  text = (text if isinstance(text, str) else json.dumps(header)).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])


def set_value(folder, value):
  path = shards(folder)[1]
  raw = bytearray(path.read_bytes())
  raw[-4:] = np.float32(value).tobytes()
  path.write_bytes(raw)


def retype(folder, dtype):
  def change(header):
    entry = next(e for name, e in header.items() if name != "__metadata__")
    entry["dtype"] = dtype

  edit_header(shards(folder)[0], change)


def reshape(folder, shape):
  def change(header):
    header["model.embed_tokens.weight"]["shape"] = shape

  edit_header(shards(folder)[0], change)


def twin(folder):
  """The same tensor in two shards."""
  tensors, _ = hf.read_header(shards(folder)[0])
  more, _ = hf.read_header(shards(folder)[1])
  both = more | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
  values = {name: t.read() for name, t in both.items()}
  hf.write_safetensors(shards(folder)[1], {n: (v.dtype, v.shape) for n, v in values.items()}, values.__getitem__)


def doubled_key(folder):
  def change(header):
    text = json.dumps(header)
    return text[:-1] + "," + json.dumps({"model.norm.weight": header["model.norm.weight"]})[1:]

  edit_header(next(p for p in shards(folder) if "model.norm.weight" in hf.read_header(p)[0]), change)


def only_pickles(folder):
  for path in [*shards(folder), folder / hf.INDEX]:
    path.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def linked(folder):
  path = shards(folder)[0]
  path.rename(folder.parent / "elsewhere.safetensors")
  path.symlink_to(folder.parent / "elsewhere.safetensors")


def config(**options):
  return lambda folder: edit_json(folder / "config.json", lambda data: data.update(options))


def index(change):
  return lambda folder: edit_json(folder / hf.INDEX, change)


def header(change, shard=0):
  return lambda folder: edit_header(shards(folder)[shard], change)


def entry(**fields):
  """The entry of the embedding with other fields."""
  return header(lambda h: h[EMBED].update(fields))


def text(name, what):
  return lambda folder: (folder / name).write_text(what)


def replaced(name, make):
  """A file that has become something else."""

  def spoil(folder):
    (folder / name).unlink()
    make(folder / name)

  return spoil


def stranger(folder):
  """A tensor more, in a shard and in the index."""
  tensors, _ = hf.read_header(shards(folder)[1])
  values = {name: t.read() for name, t in tensors.items()} | {"model.backdoor": np.ones(3, np.float32)}
  hf.write_safetensors(shards(folder)[1], {n: (v.dtype, v.shape) for n, v in values.items()}, values.__getitem__)
  edit_json(folder / hf.INDEX, lambda d: d["weight_map"].update({"model.backdoor": shards(folder)[1].name}))


def renamed(folder):
  """A tensor under another name, in its shard and in the index."""
  edit_header(shards(folder)[0], lambda h: h.update({"model.embed.weight": h.pop(EMBED)}))
  edit_json(folder / hf.INDEX, lambda d: d["weight_map"].update({"model.embed.weight": d["weight_map"].pop(EMBED)}))


SHARD = "model-00001-of-00004.safetensors"
EMBED, LAST = "model.embed_tokens.weight", "model.norm.weight"
DAMAGE = {  # name: (what is done, what the sentence names)
  "a missing shard": (lambda f: shards(f)[1].unlink(), "model-00002"),
  "a shard too many": (lambda f: shutil.copy(shards(f)[0], f / "model-00009-of-00009.safetensors"), "model-00009"),
  "a tensor in two shards": (twin, EMBED),
  "a key twice in a header": (doubled_key, LAST),
  "a shard cut off": (lambda f: shards(f)[1].write_bytes(shards(f)[1].read_bytes()[:-4]), "model-00002"),
  "an empty shard": (lambda f: shards(f)[1].write_bytes(b""), "model-00002"),
  "a header longer than its file": (lambda f: shards(f)[0].write_bytes(b"\xff" * 64), "model-00001"),
  "a header that is no JSON": (lambda f: edit_header(shards(f)[0], lambda h: "{["), "model-00001"),
  "a shape of 2^40": (lambda f: reshape(f, [2**40, 2**40]), EMBED),
  "a negative size": (lambda f: reshape(f, [-31, 24]), EMBED),
  "a transposed table": (lambda f: reshape(f, [24, 31]), EMBED),
  "integers": (lambda f: retype(f, "I32"), EMBED),
  "an unknown dtype": (lambda f: retype(f, "F7"), EMBED),
  "NaN": (lambda f: set_value(f, np.nan), "model-00002"),
  "infinity": (lambda f: set_value(f, np.inf), "model-00002"),
  "an index to an absolute path": (index(lambda d: d["weight_map"].update({EMBED: "/etc/passwd"})), "/etc/passwd"),
  "an index out of the folder": (index(lambda d: d["weight_map"].update({EMBED: "../x.safetensors"})), "../x"),
  "an index without a tensor": (index(lambda d: d["weight_map"].pop(EMBED)), EMBED),
  "an index with a shard too many": (index(lambda d: d["weight_map"].update(x="model-9.safetensors")), "model-9"),
  "an index with a tensor too many": (index(lambda d: d["weight_map"].update(x=d["weight_map"][EMBED])), ": x is not"),
  "an index of numbers": (index(lambda d: d["weight_map"].update({EMBED: 3})), "weight_map"),
  "an index without a map": (index(lambda d: d.pop("weight_map")), "weight_map"),
  "no index": (lambda f: (f / hf.INDEX).unlink(), hf.INDEX),
  "a link out of the folder": (linked, "link"),
  "pickles alone": (only_pickles, "pytorch_model.bin"),
  "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
  "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
  "a config of NaN": (lambda f: (f / "config.json").write_text('{"model_type": NaN}'), "nan"),
  "an unknown type": (config(model_type="llamma"), "model_type 'llamma' is unknown; docs"),
  "no type": (config(model_type=None, architectures=["Llama"]), "no model_type"),
  "an unknown option": (config(new_trick=True), "new_trick"),
  "code": (config(model_type="mine", auto_map={"AutoModel": "evil.py"}), "auto_map"),
  "quantised weights": (config(quantization_config={"bits": 4}), "quantization_config"),
  "heads that do not divide": (config(num_attention_heads=7), "num_attention_heads|num_heads"),
  "another vocabulary": (config(vocab_size=32), EMBED),
  "a vocabulary of 1e12": (config(vocab_size=10**12), "vocab_size"),
  "sizes of 2^31": (config(hidden_size=2**31 - 2, intermediate_size=2**31 - 2, head_dim=2**31 - 2), "config|embed"),
  "no layers": (config(num_hidden_layers=0), "num_hidden_layers"),
  "layers without tensors": (config(num_hidden_layers=4), "layers.3"),
  "tensors without layers": (config(num_hidden_layers=2), "layers.2"),
  "layers beyond count": (config(num_hidden_layers=10**9), "num_hidden_layers"),
  "a negative width": (config(hidden_size=-24), "hidden_size"),
  "a width in words": (config(hidden_size="24"), "hidden_size"),
  "a missing width": (lambda f: edit_json(f / "config.json", lambda d: d.pop("hidden_size")), EMBED),
  "an unknown activation": (config(hidden_act="swoosh"), "hidden_act"),
  "an unknown rope": (config(rope_parameters={"rope_type": "spiral"}), "spiral"),
  "an unknown option of rope": (config(rope_parameters={"rope_type": "default", "twist": 1}), "twist"),
  "a rope without its factor": (config(rope_parameters={"rope_type": "linear"}), "factor"),
  "a table tied in words only": (config(tie_word_embeddings=True), "lm_head.weight"),
  "a shard that is a folder": (replaced(SHARD, pathlib.Path.mkdir), SHARD),
  "a shard that is a pipe": (replaced(SHARD, os.mkfifo), SHARD),
  "a shard that is a device": (replaced(SHARD, lambda p: p.symlink_to("/dev/zero")), SHARD),
  "a config that is a pipe": (replaced("config.json", os.mkfifo), "config.json"),
  "a link that leads nowhere": (replaced(SHARD, lambda p: p.symlink_to("gone")), SHARD),
  "a header of nothing": (lambda f: shards(f)[0].write_bytes(bytes(8)), SHARD),
  "a header that is a list": (header(lambda h: "[]"), SHARD),
  "a header too deep": (header(lambda h: "[" * 100_000), SHARD),
  "a header of other bytes": (lambda f: shards(f)[0].write_bytes((4).to_bytes(8, "little") + b"\xff\xfe{}"), SHARD),
  "metadata that is a list": (header(lambda h: h.update(__metadata__=[])), "metadata"),
  "an entry that is a number": (header(lambda h: h.update({EMBED: 7})), EMBED),
  "an entry without a shape": (header(lambda h: h[EMBED].pop("shape")), EMBED),
  "an entry with a field too many": (entry(strides=[1, 1]), EMBED),
  "a shape of fractions": (entry(shape=[31.0, 24]), EMBED),
  "a shape of truth": (entry(shape=[True, 24]), EMBED),
  "offsets the wrong way round": (entry(data_offsets=[2976, 0]), EMBED),
  "offsets past the end": (entry(data_offsets=[2**40, 2**40 + 2976]), SHARD),
  "two tensors in one place": (
    header(lambda h: [e.update(data_offsets=[0, 2304]) for e in h.values() if e.get("shape") == [24, 24]]), SHARD),
  "bytes to spare": (lambda f: shards(f)[0].write_bytes(shards(f)[0].read_bytes() + b"more"), SHARD),
  "double precision": (lambda f: retype(f, "F64"), EMBED),
  "one tensor in half precision": (
    header(lambda h: h[EMBED].update(dtype="BF16", shape=[62, 24])), EMBED),
  "minus infinity": (lambda f: set_value(f, -np.inf), "model-00002"),
  "a tensor more": (stranger, "model.backdoor"),
  "a tensor under another name": (renamed, EMBED),
  "an index into a folder below": (index(lambda d: d["weight_map"].update({EMBED: "sub/x.safetensors"})), "sub/x"),
  "an index to no name": (index(lambda d: d["weight_map"].update({EMBED: ""})), "''"),
  "an index to the folder": (index(lambda d: d["weight_map"].update({EMBED: "."})), "'.'"),
  "an index of nothing": (index(lambda d: d["weight_map"].clear()), "weight_map"),
  "an index that is no JSON": (text(hf.INDEX, "{"), hf.INDEX),
  "an index that is a list": (text(hf.INDEX, "[]"), hf.INDEX),
  "an index with a key twice": (text(hf.INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), "twice"),
  "a config that is a list": (text("config.json", "[]"), "config.json"),
  "a config too deep": (text("config.json", "[" * 100_000), "config.json"),
  "a config with a key twice": (text("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), "twice"),
  "a number of 5000 digits": (text("config.json", '{"hidden_size": 1' + "0" * 5000 + "}"), "config.json"),
  "a type that is a list": (config(model_type=["llama"]), "model_type"),
  "code of the folder": (config(trust_remote_code=True), "trust_remote_code"),
  "no heads": (config(num_attention_heads=0), "num_attention_heads"),
  "heads below zero": (config(num_attention_heads=-6), "num_attention_heads"),
  "key-value heads that do not divide": (config(num_key_value_heads=4), "num_kv_heads|num_heads"),
  "twice the heads": (config(num_attention_heads=12), "q_proj|k_proj"),
  "a width that is true": (config(hidden_size=True), "hidden_size"),
  "a width with a point": (config(hidden_size=24.0), "hidden_size"),
  "a width of 1e12": (config(hidden_size=10**12), "hidden_size"),
  "an odd head": (config(head_dim=3), "dims|head_dim"),
  "an epsilon below zero": (config(rms_norm_eps=-1e-6), "eps"),
  "an epsilon of infinity": (
    lambda f: text("config.json", json.dumps(TINY)[:-1] + ', "rms_norm_eps": 1e400}')(f), "eps"),
  "a theta of zero": (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "theta"),
  "a factor below zero": (config(rope_parameters={"rope_type": "linear", "factor": -2.0}), "factor"),
  "a factor in words": (config(rope_parameters={"rope_type": "linear", "factor": "two"}), "factor"),
  "a rope that is a list": (config(rope_parameters=[1]), "rope_parameters"),
  "ties that are words": (config(tie_word_embeddings="yes"), "tied"),
  "a context of zero": (config(max_position_embeddings=0), "max_position_embeddings"),
  "layers in words": (config(num_hidden_layers="3"), "num_hidden_layers"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_checkpoint_is_one_sentence_before_any_array_is_placed(damage, folder, monkeypatch, cases):
  spoil, named = DAMAGE[damage]
  spoil(folder)
  placed = []
  monkeypatch.setattr(jax, "device_put", lambda *args: placed.append(args))
  with watch() as seen, pytest.raises(UserError, match=named) as e:
    hf.load_checkpoint(folder)
  sentence = str(e.value)
  assert not placed and "\n" not in sentence and str(folder) in sentence and len(sentence) < 500
  assert not [event for event, _ in seen if event.startswith(FORBIDDEN)]
  opened = {pathlib.Path(os.fsdecode(args[0])) for event, args in seen if event == "open" and named_in(folder, args[0])}
  assert all(path.suffix in (".json", ".safetensors") for path in opened)
  assert seen.grown < 200e6  # bytes, over the start
  cases("bad checkpoints refused")


FORBIDDEN = ("socket.", "pickle.", "subprocess.", "os.system", "os.exec", "os.fork", "ctypes.dlopen")
_watching: list[list] = []
sys.addaudithook(lambda event, args: _watching and _watching[-1].append((event, args)))


class Seen(list):
  """Audit events (name, arguments); `grown`: by how many bytes the process was larger at most."""

  grown = 0


@contextlib.contextmanager
def watch():
  """What the interpreter is seen to do meanwhile, and how large it becomes."""
  seen, before = Seen(), resident("VmRSS")
  if before:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
  _watching.append(seen)
  try:
    yield seen
  finally:
    _watching.pop()
    seen.grown = resident("VmHWM") - before


def resident(field: str) -> int:
  """Bytes, of /proc/self/status; 0 where there is no such thing."""
  try:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  except OSError:
    return 0
  return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def named_in(folder: pathlib.Path, name) -> bool:
  return isinstance(name, (str, bytes)) and os.fsdecode(name).startswith(str(folder))


def test_the_watch_sees_a_pickle_and_a_socket(tmp_path):
  (tmp_path / "x.bin").write_bytes(pickle.dumps(pathlib.PurePath("x")))
  with watch() as seen:
    pickle.loads((tmp_path / "x.bin").read_bytes())
    socket.socket().close()
  assert {"pickle.find_class", "socket.__new__"} <= {event for event, _ in seen}
  assert any(event == "open" and named_in(tmp_path, args[0]) for event, args in seen)


def test_what_lies_beside_sound_weights_is_neither_opened_nor_run(folder):
  (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
  (folder / "modeling_llama.py").write_text("raise SystemExit(1)")
  with watch() as seen:
    hf.load_checkpoint(folder)
  assert not [event for event, _ in seen if event.startswith(FORBIDDEN)]
  opened = {pathlib.Path(os.fsdecode(args[0])) for event, args in seen if event == "open" and named_in(folder, args[0])}
  assert opened == {folder / "config.json", folder / hf.INDEX, *shards(folder)}


@pytest.mark.full
def test_sound_checkpoint_loads_onto_a_mesh_one_parameter_at_a_time(folder):
  mesh = sharding.make_mesh(sharding.parse_mesh("x=2"), jax.devices()[:2])
  alone, spread = llmarch.load(folder), llmarch.load(folder, mesh=mesh)
  embed = spread.params["embed"].get_value()
  assert len(embed.sharding.device_set) == 2 and not embed.is_fully_replicated
  assert spread.generate([1, 2, 3], max_new_tokens=5) == alone.generate([1, 2, 3], max_new_tokens=5)


def test_damaged_source_leaves_no_target(folder, tmp_path, capsys):
  set_value(folder, np.nan)
  assert main(["convert", f"--from={folder}", f"--to={tmp_path / 'out'}"]) == 2
  assert "not finite" in capsys.readouterr().err
  assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_nothing_is_overwritten(folder, tmp_path, capsys):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("x")
  assert main(["convert", f"--from={folder}", f"--to={tmp_path / 'out'}"]) == 2
  assert "exists" in capsys.readouterr().err and (tmp_path / "out" / "mine").read_text() == "x"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shards_go_through_bit_for_bit_in_their_dtype(folder, tmp_path, dtype):
  """Also what lies beside the weights: special ids and the tokenizer."""
  old = hf.Checkpoint(folder).tensors
  values = {name: t.read().astype(dtype) for name, t in old.items()}
  entries = {name: (v.dtype, v.shape) for name, v in values.items()}
  for path in [*shards(folder), folder / hf.INDEX]:
    path.unlink()
  hf.write_safetensors(folder / hf.SINGLE, entries, values.__getitem__)
  config(bos_token_id=3)(folder)
  (folder / "tokenizer.json").write_text('{"kind": "bytes"}\n')
  ours, back = tmp_path / "ours", tmp_path / "back"
  assert main(["convert", f"--from={folder}", f"--to={ours}"]) == 0
  assert main(["convert", f"--from={ours}", f"--to={back}", "--format=hf", "--shard_gb=1e-5"]) == 0
  assert len(shards(back)) > 3
  tensors = hf.Checkpoint(back).tensors
  assert tensors.keys() == values.keys()
  for name, tensor in tensors.items():
    assert tensor.read().tobytes() == values[name].tobytes()
  assert json.loads((back / "config.json").read_text())["bos_token_id"] == 3
  assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_is_kept_in_f32_stays_so_beside_bfloat16(tmp_path):
  """The biases that balance DeepSeek-V3's experts."""
  precision = Precision(param="bfloat16", compute="bfloat16", state="bfloat16")
  config = dataclasses.replace(shrink(PRESETS["deepseek_v3"]()), precision=precision)
  wanted = hf.entries(config)
  (tmp_path / "theirs").mkdir()
  read = lambda path, index: drawn(f"{path}{index}", wanted[path][1][len(index) :]).astype(wanted[path][0])
  hf.write_checkpoint(tmp_path / "theirs", config, read)
  assert {t.dtype for t in hf.Checkpoint(tmp_path / "theirs").tensors.values()} == {"BF16", "F32"}
  assert main(["convert", f"--from={tmp_path / 'theirs'}", f"--to={tmp_path / 'ours'}"]) == 0
  for folder in ("theirs", "ours"):
    params = flatten(llmarch.load(tmp_path / folder).params)
    assert {path: value.dtype for path, value in params.items()} == {path: dtype for path, (dtype, _) in wanted.items()}
  assert main(["convert", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--format=hf"]) == 0
  before, after = (hf.Checkpoint(tmp_path / folder).tensors for folder in ("theirs", "back"))
  assert before.keys() == after.keys()
  assert all(t.read().tobytes() == after[name].read().tobytes() for name, t in before.items())


def test_damaged_model_folder_is_not_exported(folder, tmp_path, capsys):
  ours = tmp_path / "ours"
  assert main(["convert", f"--from={folder}", f"--to={ours}"]) == 0
  raw = bytearray((ours / "model.safetensors").read_bytes())
  raw[-1] ^= 1
  (ours / "model.safetensors").write_bytes(raw)
  assert main(["convert", f"--from={ours}", f"--to={tmp_path / 'back'}", "--format=hf"]) == 2
  assert "damaged" in capsys.readouterr().err and not (tmp_path / "back").exists()


def test_a_model_that_no_family_computes_is_refused(folder, tmp_path, capsys):
  lm = llmarch.load(folder)
  block = lm.config.blocks["layer"]
  mixer = dataclasses.replace(block.mixer, softcap=20.0)
  block = dataclasses.replace(block, mixer=mixer)
  odd = llmarch.infer.lm.LM(dataclasses.replace(lm.config, blocks={"layer": block}), lm.params)
  odd.save(tmp_path / "odd")
  args = ["convert", f"--from={tmp_path / 'odd'}", f"--to={tmp_path / 'back'}", "--format=hf"]
  assert main([*args, "--model_type=llama"]) == 2
  assert "blocks" in (err := capsys.readouterr().err) or "softcap" in err
  assert main(args) == 2 and not (tmp_path / "back").exists()


# The presets whose model_type is not among the families.
ELSEWHERE = {"mt_nlg", "gpt_3", "glam", "deepseek_moe"}


SAID = [name for name in PRESETS if not name.startswith(tuple(ELSEWHERE))]


@pytest.mark.parametrize("name", three(SAID[::6].count, SAID[::3].count, SAID))
def test_preset_can_be_said_in_its_family(name):
  family, options = hf.express(PRESETS[name]())
  again = build(ModelConfig, family.read(json.loads(json.dumps(options))), "model")
  slots = hf.tensor_slots(family, again)
  assert sum(math.prod(slot.rearrange.shape) for slot in slots.values()) == cost.params(PRESETS[name]())["total"]


FUSED = {  # pattern: shapes of our parts
  "(k c h) d -> d (k c) h": [(5, 6, 7), (5, 2, 7), (5, 2, 7)],
  "(c h) d -> d c h": [(5, 6, 7), (5, 2, 7), (5, 2, 7)],
  "d (c h) -> d c h": [(5, 6, 7), (5, 2, 7), (5, 2, 7)],
  "c d -> d c ...": [(5, 6, 7), (5, 2, 7), (5, 9)],
  "e d (f c) -> e d f": [(3, 5, 9), (3, 5, 9)],
  "e c d -> e d c": [(3, 5, 9), (3, 5, 9)],
}


@pytest.mark.parametrize("text", FUSED)
def test_fused_rows_are_read_both_ways(text):
  rng = np.random.default_rng(0)
  parts = [rng.standard_normal(shape) for shape in FUSED[text]]
  rearrange = Rearrange.of(text, FUSED[text], {"n": 6, "k": 2, "h": 7, "e": 3})
  whole = rearrange.join(parts)
  assert whole.shape == rearrange.shape and whole.size == sum(p.size for p in parts)
  for number, part in enumerate(parts):
    np.testing.assert_array_equal(rearrange.split(whole, number), part)


@pytest.mark.parametrize(
  "stack", ["2*layer", "2*(3*local global) 2*local", "3*(local global)", "local 4*global", "3*global local"]
)
def test_layers_are_named_and_the_stack_says_their_order(stack):
  layers = [name for pattern, n in parse_stack(stack) for name in pattern * n]
  blocks = [{"mixer": {"window": 3 if name == "local" else None}} for name in layers]
  named = name_blocks(blocks)
  again = [named["blocks"][name] for pattern, n in parse_stack(named["stack"]) for name in pattern * n]
  assert again == blocks


# ------------------------------------------------------------------------------------------ a large checkpoint

MEASURE = """
import pathlib, sys
import jax
from llmarch.__main__ import main
from llmarch.convert import hf
from llmarch import sharding

def grown(start):
  fields = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  return int(fields["VmHWM"].split()[0]) * 1024 - start

theirs, ours, back, shard = sys.argv[1:]
mesh = sharding.make_mesh(sharding.parse_mesh("x=2"), jax.devices()[:2])
start = grown(0)
assert main(["convert", f"--from={theirs}", f"--to={ours}"]) == 0
assert main(["convert", f"--from={ours}", f"--to={back}", "--format=hf", shard]) == 0
converted = grown(start)
kept = hf.load_checkpoint(back, mesh)
print(converted, grown(start))
"""
LARGE = {  # parameters: sizes of a llama
  "100M": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12),
  "1B": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=32),
}


@pytest.mark.skipif(not resident("VmHWM"), reason="no /proc/self/status: the memory of conversions was not measured")
@pytest.mark.parametrize(
  "size", [pytest.param("100M", marks=pytest.mark.full), pytest.param("1B", marks=pytest.mark.nightly)]
)
def test_a_large_checkpoint_goes_both_ways_bit_for_bit_in_little_memory(size, tmp_path, cases):
  """In 4 shards, in bfloat16, all bits random; and onto a mesh without a second copy."""
  options = TINY | LARGE[size] | dict(num_key_value_heads=4, vocab_size=32000)
  precision = dict.fromkeys(("param", "compute", "state"), "bfloat16")
  config = build(ModelConfig, FAMILIES["llama"].read(options) | {"precision": precision}, "model")
  shapes = {path: a.shape for path, a in flatten(nnx.state(abstract(config))).items()}
  total = 2 * sum(map(math.prod, shapes.values()))

  def read(path, index):
    shape = shapes[path][len(index) :]
    bits = np.random.default_rng(zlib.crc32(f"{path}{index}".encode())).bytes(2 * math.prod(shape))
    finite = np.frombuffer(bits, np.uint16) & 0xBFFF  # of any sign and mantissa, below 2
    return finite.view(jnp.bfloat16).reshape(shape)

  theirs, ours, back = (tmp_path / name for name in ("theirs", "ours", "back"))
  theirs.mkdir()
  try:
    hf.write_checkpoint(theirs, config, read, model_type="llama", shard_bytes=total // 4 + total // 50)
    assert len(shards(theirs)) == 4
    arguments = [sys.executable, "-c", MEASURE, theirs, ours, back, f"--shard_gb={total / 3.5e9}"]
    run = subprocess.run(
      arguments, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent.parent
    )
    assert run.returncode == 0, run.stderr
    converted, loaded = map(int, run.stdout.split()[-2:])
    assert converted <= 1.3 * total and loaded <= 1.3 * total, (converted / total, loaded / total)
    before, after = (hf.Checkpoint(folder).tensors for folder in (theirs, back))
    assert before.keys() == after.keys()
    assert all(np.array_equal(*(t.read().view(np.uint16) for t in (before[n], after[n]))) for n in before)
  finally:
    for folder in (theirs, ours, back):
      shutil.rmtree(folder, ignore_errors=True)
  cases(f"{size} parameters, bit for bit; peak {converted / total:.2f} (convert), {loaded / total:.2f} (onto a mesh)")
