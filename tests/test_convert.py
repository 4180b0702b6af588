"""Checkpoints of transformers: the same function, the same gradient, the same text, the same file back."""

import importlib.util
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmarch
from llmarch.__main__ import main
from llmarch.config import UserError
from llmarch.convert import hf
from llmarch.convert.tables import FAMILIES
from llmarch.layers.param import flatten
from llmarch.models.decoder import abstract

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
  "phi3": [
    {},
    dict(sliding_window=5, tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=3,
         rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    dict(original_max_position_embeddings=64, max_position_embeddings=256, **rope("longrope", **LONG)),
    dict(long=True, original_max_position_embeddings=8, **rope("longrope", **LONG)),
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
         attn_config={"alibi_bias_max": 4, "softmax_scale": 0.3}),
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
  "cohere": [dict(logit_scale=0.3), dict(attention_bias=True, tie_word_embeddings=False)],
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
}  # fmt: skip

CASES = {f"{family}-{i}": (family, variant) for family, variants in VARIANTS.items() for i, variant in enumerate(variants)}


def test_every_family_has_variants():
  assert VARIANTS.keys() == FAMILIES.keys()


# ------------------------------------------------------------------------------------------------- the peer


def peer(family: str, variant: dict):
  """A transformers model with all parameters random."""
  import torch
  from transformers import AutoModelForCausalLM
  from transformers.models.auto.configuration_auto import CONFIG_MAPPING

  torch.set_num_threads(1)
  kind = CONFIG_MAPPING[family]
  known = set(kind.__dataclass_fields__)
  sizes = {k: v for k, v in (SIZES | GPT | NO_IDS).items() if k in known}
  if "n_embd" in known:
    sizes = {k: v for k, v in sizes.items() if k not in SIZES or k == "vocab_size"}
  config = kind(**sizes | {k: v for k, v in variant.items() if k != "long"})
  torch.manual_seed(0)
  model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      scale = 0.3 if p.ndim == 1 else 1.0 if "embed" in name or "wte" in name else p.shape[-1] ** -0.5
      p.add_(torch.randn(p.shape) * scale)
  return model


def batch(lengths=LENGTHS):
  """tokens and mask [B, T], padded on the left."""
  width = max(lengths)
  rng = np.random.default_rng(1)
  mask = np.arange(width) >= width - np.array(lengths)[:, None]
  return np.where(mask, rng.integers(0, V, mask.shape), 0), mask


def peer_pass(model, tokens, mask):
  """logits, loss and {name: gradient} of the mean loss of the next token, over what is no padding."""
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
  return logits.detach().numpy(), {n: p.grad.numpy() for n, p in model.named_parameters()}


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


def to_ours(family, config, theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Arrays by the names of transformers -> ours, by the table's rows."""
  found = {path: np.full(a.shape, np.nan) for path, a in flatten(nnx.state(abstract(config))).items()}
  for key, slot in hf.plan(family, config, theirs).items():
    for number, (path, turn) in enumerate(slot.parts):
      found[path][... if turn is None else turn] = slot.layout.split(theirs[key], number)
  return found


@needs_peer
@pytest.mark.parametrize("case", CASES)
def test_family_computes_what_its_peer_does_and_is_written_back(case, tmp_path, cases):
  import torch
  from safetensors.numpy import load_file
  from transformers import AutoModelForCausalLM

  family, variant = CASES[case]
  model = peer(family, variant)
  theirs = tmp_path / "theirs"
  model.save_pretrained(theirs)
  lm = llmarch.load(theirs)

  # The same function.
  tokens, mask = batch((13,)) if variant.get("long") else batch()
  want, grads = peer_pass(model, tokens, mask)
  got, our_grads = our_pass(lm.config, lm.params, tokens, mask)
  spread = np.std(want[mask])
  assert np.abs(got - want)[mask].max() <= 1e-5 * spread

  # The same gradient for every parameter.
  if family == "gpt_neox":
    grads = {re.sub("^lm_head", "embed_out", name): g for name, g in grads.items()}
  wanted = to_ours(FAMILIES[family], lm.config, grads)
  assert wanted.keys() == our_grads.keys()
  # Of a key's bias without rotary positions it is 0: softmax does not see it. Hence the floor.
  floor = 1e-3 * max(np.abs(g).max() for g in wanted.values())
  for path, want_grad in wanted.items():
    error = np.abs(np.asarray(our_grads[path]) - want_grad).max() / max(np.abs(want_grad).max(), floor)
    assert error <= 1e-4, f"gradient of {path}: {error}"

  # The same text from the cache.
  if not variant.get("long"):
    ids, attention = torch.tensor(tokens), torch.tensor(mask.astype(int))
    out = model.generate(ids, attention_mask=attention, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    text = lm.generate([list(map(int, row[m])) for row, m in zip(tokens, mask)], max_new_tokens=NEW)
    assert text == out[:, tokens.shape[1] :].tolist()

  # The same files.
  assert main(["convert", f"--from={theirs}", f"--to={tmp_path / 'ours'}"]) == 0
  assert main(["convert", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--format=hf"]) == 0
  before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
  assert before.keys() == after.keys()
  for name, value in before.items():
    assert value.dtype == after[name].dtype and np.array_equal(value, after[name]), name
  again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  with torch.no_grad():
    fresh = AutoModelForCausalLM.from_pretrained(theirs, attn_implementation="eager")
    same = [m(torch.tensor(tokens[:, -7:])).logits for m in (again, fresh)]
  assert torch.abs(same[0] - same[1]).max() <= 1e-5 * same[0].std()
  cases("family x variant equals its peer: logits, gradients, greedy tokens, files")
