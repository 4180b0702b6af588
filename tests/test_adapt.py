"""What is done to a trained model: regrouped key-value heads, low-rank adapters, evaluation."""

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import plain_if

import llmarch
from llmarch.__main__ import main
from llmarch.adapt.lora import Adapters, product
from llmarch.adapt.regroup import regroup_config, regroup_params
from llmarch.analysis import cost
from llmarch.build import build
from llmarch.commands.common import load_config
from llmarch.config import BlockConfig, ModelConfig
from llmarch.convert import hf, peft
from llmarch.convert.tables import FAMILIES
from llmarch.data.tokenizers import ByteTokenizer, train_bpe
from llmarch.errors import UserError
from llmarch.infer.lm import LM
from llmarch.infer.scoring import perplexity, score
from llmarch.layers.attention import AttentionConfig, QKNorm
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.norm import LayerNorm, RMSNorm
from llmarch.layers.param import flatten, unflatten
from llmarch.layers.position import ALiBi, RoPE
from llmarch.models.decoder import Decoder, abstract
from llmarch.ops import quant
from llmarch.residual import Sandwich
from llmarch.run import train_run as train_command
from llmarch.run_config import (
  CheckpointConfig,
  Constant,
  DataConfig,
  EvalConfig,
  LoRAConfig,
  OptimizerConfig,
  RunConfig,
  TextFiles,
  TrainConfig,
)
from llmarch.sharding import make_mesh, parse_mesh
from llmarch.train.step import make_train_step

T = 20
PROSE = "the quick brown fox jumps over the lazy dog, and the dog is asked by the fox to jump. "


def model(**more) -> ModelConfig:
  """Two kinds of blocks, stacked; what a matrix sums over is a multiple of NF4's groups of 64."""
  wide = dict(num_heads=8, head_dim=16, qkv_bias=True, out_bias=True)
  blocks = {
    "local": BlockConfig(
      mixer=AttentionConfig(**wide, position=RoPE(), window=7, qk_norm=QKNorm(norm=RMSNorm(), whole=True)),
      ffn=MLPConfig(d_ff=192, bias=True),
      norm=LayerNorm(),
      residual=Sandwich(),
    ),
    "full": BlockConfig(
      mixer=AttentionConfig(**wide | {"num_heads": 4}, position=ALiBi(), qk_norm=QKNorm(norm=RMSNorm())),
      ffn=MLPConfig(d_ff=128, activation="gelu", gated=False),
      norm=RMSNorm(),
    ),
  }
  sizes = dict(d_model=64, vocab_size=259, max_seq_len=48, stack="2*(local full)", final_norm=RMSNorm())
  return ModelConfig(**{**sizes, "blocks": blocks, **more})


MODEL = model()


def drawn(config: ModelConfig, seed: int = 3) -> dict[str, np.ndarray]:
  """Parameters by name, all random: norms and biases too."""
  flat = flatten(nnx.state(Decoder(config, jax.random.key(seed))))
  noise = np.random.default_rng(seed)
  return {n: np.asarray(v) + 0.2 * noise.standard_normal(v.shape, np.float32) * (v.ndim < 4) for n, v in flat.items()}


def lm_of(config: ModelConfig, flat: dict, tokenizer=None) -> LM:
  return LM(config, unflatten(nnx.state(abstract(config)), flat), tokenizer)


def ids(batch: int = 3, seed: int = 0, vocab: int = 256) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, vocab, (batch, T), np.int32)


def close(a, b, tolerance=1e-5):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert np.abs(a - b).max() <= tolerance * b.std(), np.abs(a - b).max() / b.std()


# ------------------------------------------------------------------------------------------- fewer kv heads


def heads(num_kv_heads: int, blocks=()) -> ModelConfig:
  return regroup_config(MODEL, num_kv_heads, blocks)


def regrouped(num_kv_heads: int, how: str, blocks=(), seed: int = 0):
  config, flat = heads(num_kv_heads, blocks), drawn(MODEL)
  params = regroup_params(unflatten(nnx.state(abstract(MODEL)), flat), MODEL, config, how, jax.random.key(seed))
  return config, flat, {name: np.asarray(value) for name, value in flatten(params).items()}


KV = ("mixer/k", "mixer/v", "mixer/k_bias", "mixer/v_bias")


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("new", plain_if([2].count, [1, 2]))
def test_a_new_head_is_the_mean_or_the_first_of_its_neighbours(new, how):
  config, before, after = regrouped(new, how)
  checked = 0
  for name, value in before.items():
    block = name.split("/")[4] if name.startswith("stack/segments") else None
    old = {"0": 8, "1": 4}.get(block)  # heads of "local", "full"
    want = value.astype(np.float64)
    if name.endswith(KV):
      groups = np.split(want, new, axis=-2)  # [..., K, H]
      pick = {"mean": lambda g: g.mean(-2), "first": lambda g: g[..., 0, :]}[how]
      want, checked = np.stack([pick(g) for g in groups], -2), checked + 1
    elif name.endswith("mixer/k_norm/scale") and block == "0":  # one norm over all heads
      apart = want.reshape(-1, new, old // new, 16)
      want, checked = (apart.mean(2) if how == "mean" else apart[:, :, 0]).reshape(-1, new * 16), checked + 1
    np.testing.assert_allclose(after[name], want, rtol=1e-6, atol=1e-7, err_msg=name)
  assert checked == 2 * len(KV) + 1
  assert [b.mixer.kv_heads for b in config.blocks.values()] == [new, new]


def test_as_many_heads_as_before_is_the_identity():
  config, before, after = regrouped(4, "mean", ["full"])
  assert all(np.array_equal(before[name], after[name]) for name in before)
  np.testing.assert_array_equal(lm_of(config, after).logits(ids()), lm_of(MODEL, before).logits(ids()))


@pytest.mark.parametrize("new", [1, 2])
def test_pooled_heads_repeated_for_each_group_compute_the_same(new):
  config, _, after = regrouped(new, "mean", ["full"])  # where keys are normalised head by head
  repeat = lambda name, value: np.repeat(value, 4 // new, -2) if "blocks/1/" in name and name.endswith(KV) else value
  close(
    lm_of(MODEL, {name: repeat(name, value) for name, value in after.items()}).logits(ids()),
    lm_of(config, after).logits(ids()),
  )


def test_random_heads_are_new_and_as_training_draws_them():
  config, before, after = regrouped(2, "random", seed=5)
  assert {n: v.shape for n, v in after.items()} == {n: v.shape for n, v in flatten(nnx.state(abstract(config))).items()}
  fresh = flatten(nnx.state(Decoder(config, jax.random.key(5))))
  for name, value in after.items():
    changed = name.endswith(KV) or name.endswith("blocks/0/mixer/k_norm/scale")
    np.testing.assert_array_equal(value, fresh[name] if changed else before[name], err_msg=name)


def test_regroup_refuses_what_it_cannot_do():
  for kv, blocks, why in [(3, (), "does not divide"), (8, (), "does not divide the 4"), (2, ["loca"], "did you mean")]:
    with pytest.raises(UserError, match=why):
      heads(kv, blocks)


@pytest.mark.full
def test_regroup_command_writes_a_model_that_training_starts_from(tmp_path, corpus, capsys):
  lm_of(MODEL, drawn(MODEL), ByteTokenizer()).save(tmp_path / "mha")
  command = ["regroup", f"--from={tmp_path}/mha", f"--to={tmp_path}/gqa", "--num_kv_heads=2"]
  assert main([*command, "--json"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert report["kv_heads_before"] == {"local": 8, "full": 4} and report["kv_heads"] == {"local": 2, "full": 2}
  lm = llmarch.load(tmp_path / "gqa")
  _, _, after = regrouped(2, "mean")
  assert all(np.array_equal(after[name], value) for name, value in flatten(lm.params).items())
  config = experiment(lm.config, corpus, steps=1, init_from=str(tmp_path / "gqa"))
  config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.0))
  train_command(config, str(tmp_path / "run"))
  close(llmarch.load(tmp_path / "run").logits(ids()), lm.logits(ids()))  # a step of rate 0 from there
  assert main([*command, "--num_kv_heads=3"]) == 2
  assert "does not divide" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- init_from


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  for i in range(40):
    (folder / f"{i}.txt").write_text(f"document {i} says: " + PROSE * (i % 5 + 1))
  return folder


def experiment(config: ModelConfig, corpus, *, steps=6, lora=None, **train) -> RunConfig:
  return RunConfig(
    model=config,
    data=DataConfig(source=TextFiles(paths=(f"{corpus}/*.txt",)), cache_dir=f"{corpus}/cache", validation_fraction=0.2),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule=Constant()),
    train=TrainConfig(steps=steps, batch_size=4, seq_len=T, log_every=1, lora=lora, **train),
    eval=EvalConfig(every=3, batches=1, sample_tokens=0),
    checkpoint=CheckpointConfig(every=3),
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base") / "model"
  lm_of(MODEL, drawn(MODEL), ByteTokenizer()).save(folder)
  return folder


def test_init_from_refuses_weights_of_another_shape_in_one_sentence(saved, corpus, tmp_path, capsys):
  with pytest.raises(UserError, match=r"init_from: .*does not fit config.model: .*blocks/1/mixer/k is .*; .*/v is "):
    train_command(experiment(heads(2, ["full"]), corpus, init_from=str(saved)), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_init_from_refuses_another_tokenizer_and_no_folder(saved, corpus, tmp_path):
  train_bpe(["the quick brown fox"], 258).save(tmp_path)
  config = experiment(MODEL, corpus, init_from=str(saved))
  other = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(tmp_path)))
  with pytest.raises(UserError, match="another tokenizer"):
    train_command(other, str(tmp_path / "run"))
  with pytest.raises(UserError, match="there is no .*none"):
    train_command(experiment(MODEL, corpus, init_from=str(tmp_path / "none")), str(tmp_path / "run"))
  with pytest.raises(UserError, match="set init_from"):
    experiment(MODEL, corpus, lora=LoRAConfig())


# ------------------------------------------------------------------------------------------------------ LoRA


def lora_config(**more) -> RunConfig:
  train = TrainConfig(steps=4, batch_size=3, seq_len=T, loss_chunk=8, init_from="-", lora=LoRAConfig(**more))
  return RunConfig(model=MODEL, train=train, optimizer=OptimizerConfig(learning_rate=1e-2, schedule=Constant()))


def batch() -> dict:
  tokens = ids(4)[:3]
  return {
    "tokens": tokens,
    "targets": np.roll(tokens, -1, 1),
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape),
    "segment_ids": np.zeros_like(tokens),
    "loss_weights": np.ones(tokens.shape, np.float32),
  }


@functools.cache
def started(**more):
  functions = make_train_step(lora_config(**more))
  return functions, functions.init(drawn(MODEL))


def noisy(params: dict, seed: int = 1) -> dict:
  """Adapters whose B is not zero."""
  noise = np.random.default_rng(seed)
  return {n: v + 0.1 * noise.standard_normal(v.shape, np.float32) for n, v in params.items()}


def forward(base: dict, params: dict, **lora) -> np.ndarray:
  """Logits with the adapters beside their weights."""
  adapters = Adapters(LoRAConfig(**lora), MODEL)
  graph, shapes = nnx.split(abstract(MODEL))
  tokens, positions = batch()["tokens"], batch()["positions"]
  run = lambda b, p: nnx.merge(graph, unflatten(shapes, adapters.attach(b, p)))(tokens, positions)[0]
  return np.asarray(jax.jit(run)(base, params))


@pytest.mark.parametrize("lora", plain_if(bool, [{}, {"rank": 3, "alpha": 5.0, "targets": ("mixer/[qo]", "ffn/down")}]))
def test_an_adapter_changes_nothing_at_first_and_merging_it_changes_nothing_ever(lora):
  _, state = started(**lora)
  plain = lm_of(MODEL, drawn(MODEL)).logits(batch()["tokens"])
  close(forward(state["base"], state["params"], **lora), plain)
  params = noisy(jax.device_get(state["params"]))
  adapted = forward(state["base"], params, **lora)
  assert np.abs(adapted - plain).max() > 0.1
  merged = Adapters(LoRAConfig(**lora), MODEL).merge(state["base"], params)
  close(lm_of(MODEL, merged).logits(batch()["tokens"]), adapted)


def test_the_adapted_weight_is_w_plus_alpha_over_rank_a_b():
  lora = {"rank": 3, "alpha": 5.0}
  adapters, flat = Adapters(LoRAConfig(**lora), MODEL), drawn(MODEL)
  params = noisy(jax.device_get(started(**lora)[1]["params"]))
  merged = adapters.merge(flat, params)
  name = "stack/segments/0/blocks/1/mixer/"
  for at, equation in (("q", "lda,lanh->ldnh"), ("o", "lnha,lad->lnhd")):
    a, b = (params[f"{name}{at}/lora_{side}"].astype(np.float64) for side in "ab")
    np.testing.assert_allclose(merged[name + at], flat[name + at] + 5 / 3 * np.einsum(equation, a, b), atol=1e-5)


@pytest.mark.full
def test_only_adapters_train_and_only_they_have_moments():
  functions, start = started()
  start = jax.device_get(start)
  state = jax.device_put(start)
  for _ in range(2):
    state, metrics = functions.step(state, batch())
  state = jax.device_get(state)
  assert jax.tree.all(jax.tree.map(np.array_equal, start["base"], state["base"]))
  assert all(not np.array_equal(start["params"][name], value) for name, value in state["params"].items())
  assert len(state["params"]) == 2 * (4 + 3 + 4 + 2)
  moments = [leaf.shape for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
  assert sorted(moments) == sorted(2 * [p.shape for p in state["params"].values()])  # of Adam
  # The gradients are those of the merged weights, by the chain rule: none of a whole weight is needed.
  assert np.isfinite(metrics["grad_norm"])


@pytest.mark.full
def test_adapters_train_on_a_mesh_as_on_one_device():
  lora = {"weights": "nf4"}
  one, start = started(**lora)
  config = dataclasses.replace(lora_config(**lora), train=dataclasses.replace(lora_config(**lora).train, batch_size=4))
  rows = {name: np.concatenate([x, x[:1]]) for name, x in batch().items()}
  many = make_train_step(config, make_mesh(parse_mesh("stage=2,fsdp=2,tensor=2")))
  state = many.init(drawn(MODEL))
  spread = state["base"]["stack/segments/0/blocks/0/mixer/q"].codes.sharding
  assert not spread.is_fully_replicated
  a, b = jax.device_get(start), jax.device_get(state)
  assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
  _, alone = one.step(jax.device_put(a), rows)
  state, metrics = many.step(state, jax.device_put(rows, many.batch_sharding))
  for name in ("loss", "grad_norm"):
    assert math.isclose(metrics[name], alone[name], rel_tol=1e-4)


def gradients(base: dict, params: dict, **lora) -> dict:
  adapters = Adapters(LoRAConfig(**lora), MODEL)
  graph, shapes = nnx.split(abstract(MODEL))
  b = batch()

  def loss(params):
    logits, _, _ = nnx.merge(graph, unflatten(shapes, adapters.attach(base, params)))(b["tokens"], b["positions"])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), b["targets"][..., None], -1))

  return jax.jit(jax.grad(loss))(params)


@pytest.mark.full
def test_qlora_has_the_gradient_of_lora_on_the_decoded_weights():
  _, state = started(weights="nf4")
  q = state["base"]["stack/segments/0/blocks/0/mixer/q"]
  assert q.codes.dtype == jnp.uint4 and q.format == "nf4" and q.shape == (2, 64, 8, 16)
  assert state["base"]["embed"].dtype == jnp.float32  # matrices of the blocks alone
  params = noisy(jax.device_get(state["params"]))
  decoded = {name: value.astype(jnp.float32) for name, value in state["base"].items()}
  close(forward(state["base"], params, weights="nf4"), forward(decoded, params))
  a, b = gradients(state["base"], params), gradients(decoded, params)
  for name in params:
    close(a[name], b[name], 1e-4)


@pytest.mark.full
def test_a_qlora_step_keeps_no_decoded_weights_for_the_backward_pass():
  adapters = Adapters(LoRAConfig(weights="nf4"), MODEL)
  graph, shapes = nnx.split(abstract(MODEL))
  base, params = (started(weights="nf4")[1][name] for name in ("base", "params"))
  tokens, positions = batch()["tokens"], batch()["positions"]
  run = lambda params: nnx.merge(graph, unflatten(shapes, adapters.attach(base, params)))(tokens, positions)[0].sum()
  kept = [(a.dtype, a.shape) for a in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(run, p)[1], params))]
  whole = {v.shape for name, v in base.items() if "/mixer/" in name or "/ffn/" in name if v.ndim > 2}
  assert not [one for one in kept if one[1] in whole and jnp.issubdtype(one[0], jnp.floating)]


def test_the_cost_of_adapters_is_that_of_their_arrays():
  config = lora_config(rank=3, weights="nf4")
  state = jax.eval_shape(make_train_step(config).init)
  found = cost.training_bytes(config)
  size = lambda tree: quant.nbytes([leaf for leaf in jax.tree.leaves(tree) if leaf.ndim])
  assert found["params"] == size([state["params"], state["base"]]) and found["optimizer"] == size(state["opt_state"])
  whole = cost.training_bytes(dataclasses.replace(config, train=TrainConfig(seq_len=T)))
  assert found["gradients"] == size(state["params"]) and found["total"] < whole["total"] / 5
  # 6 a weight become 4; what tokens spend on each other stays.
  flops = [cost.train_flops_per_token(MODEL, T, frozen=frozen) for frozen in (False, True)]
  matrices = sum(math.prod(p.shape) for p in flatten(nnx.state(abstract(MODEL)), variables=True).values() if p.fan_in)
  assert math.isclose(flops[0] - flops[1], 2 * matrices)  # the table is the head, too


def test_targets_that_name_nothing_are_refused():
  with pytest.raises(UserError, match=r"'mixer/w' names no matrix of the blocks \(they are ffn/down, ffn/gate"):
    Adapters(LoRAConfig(targets=("mixer/q", "mixer/w")), MODEL)
  thin = model(d_model=72)
  with pytest.raises(UserError, match="lora.weights=nf4: .*whole number of groups"):
    Adapters(LoRAConfig(weights="nf4"), thin).freeze(drawn(thin))


@pytest.mark.full
@pytest.mark.parametrize("weights", plain_if(["nf4"].count, [None, "nf4"], "nightly"))
def test_an_adapter_run_resumes_bit_for_bit_and_loads_merged(saved, corpus, tmp_path, weights):
  lora = LoRAConfig(rank=4, weights=weights)
  config = lambda steps: experiment(MODEL, corpus, steps=steps, lora=lora, init_from=str(saved), ema=0.5)
  train_command(config(6), str(tmp_path / "whole"))
  rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
  losses = [row["loss"] for row in rows if "loss" in row]
  assert losses[-1] < losses[0] - 0.3, losses
  # Stopped after step 3, and gone on with.
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
  train_command(config(6), str(tmp_path / "cut"))
  whole, cut = (flatten(llmarch.load(tmp_path / name).params) for name in ("whole", "cut"))
  base = drawn(MODEL)
  for name, value in whole.items():
    np.testing.assert_array_equal(value, cut[name], err_msg=name)
    trained = name.startswith("stack") and value.ndim > 2 and "bias" not in name
    assert trained or np.array_equal(value, base[name])
  size = sum(p.stat().st_size for p in (tmp_path / "whole" / "checkpoints" / "6").rglob("*") if p.is_file())
  assert size < 4 * sum(v.size for v in base.values())  # the base is not in it


@pytest.mark.full
def test_adapters_of_a_base_that_changed_are_refused(saved, corpus, tmp_path):
  shutil.copytree(saved, tmp_path / "base")
  config = experiment(MODEL, corpus, steps=3, lora=LoRAConfig(rank=2), init_from=str(tmp_path / "base"))
  train_command(config, str(tmp_path / "run"))
  lm_of(MODEL, drawn(MODEL, seed=4), ByteTokenizer()).save(tmp_path / "base")
  for use in (lambda: llmarch.load(tmp_path / "run"), lambda: train_command(config, str(tmp_path / "run"))):
    with pytest.raises(UserError, match="trained on other weights"):
      use()


# ---------------------------------------------------------------------------------------------- PEFT's format

HAVE_PEER = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft"))
needs_peft = pytest.mark.skipif(not HAVE_PEER, reason="torch, transformers or peft is absent: it loaded no adapter")
# Apart; fused as [in, out]; a group's queries, key and value in turn; one after another; latents; gated experts.
FAMILIES_OF = ("llama", "gpt2", "falcon", "phi3", "qwen2_moe")


@pytest.mark.parametrize("name", plain_if(lambda name: name == "llama", FAMILIES_OF))
def test_exported_factors_multiply_to_what_ours_add(name, tmp_path):
  golden = json.loads((pathlib.Path(__file__).parent / "golden" / "families.json").read_text())[name]
  config = build(ModelConfig, FAMILIES[name].read(golden["config"]), "model")
  adapters = Adapters(lora := LoRAConfig(rank=2, alpha=3.0), config)
  noise = np.random.default_rng(0)
  params = {n: noise.standard_normal(p.shape, np.float32) for n, p in adapters.params.items()}
  peft.write_adapters(tmp_path, config, lora, params, "base", name)
  options = json.loads((tmp_path / peft.CONFIG).read_text())
  theirs = {n: tensor.read() for n, tensor in hf.read_header(tmp_path / peft.WEIGHTS)[0].items()}
  named, used = flatten(nnx.state(abstract(config)), variables=True), 0
  for key, slot in hf.tensor_slots(FAMILIES[name], config).items():
    if any(path in adapters.targets for path, _ in slot.parts):
      a, b = (theirs[f"base_model.model.{key.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
      ours = [
        np.asarray(product(*(params[f"{path}/lora_{side}"] for side in "ab"), named[path]))[index]
        for path, index in slot.parts
      ]
      found = (b @ a).T if options["fan_in_fan_out"] else b @ a
      np.testing.assert_allclose(found, slot.rearrange.join(ours), atol=1e-5, err_msg=key)
      module = key.removesuffix(".weight")
      rank = options["rank_pattern"].get(module, options["r"])
      alpha = options["alpha_pattern"].get(module, options["lora_alpha"])
      assert (len(a), alpha / rank) == (rank, 1.5) and module in options["target_modules"]
      used += 2
  assert used == len(theirs) > 0


@needs_peft
@pytest.mark.parametrize("name", plain_if(["llama", "gpt2"].count, ["llama", "gpt2", "falcon"], "nightly"))
@pytest.mark.full
def test_a_run_of_adapters_exported_is_loaded_by_peft(name, tmp_path, corpus):
  import torch
  from peft import PeftModel
  from test_convert import VARIANTS, peer
  from transformers import AutoModelForCausalLM

  peer(name, VARIANTS[name][0] | {"vocab_size": 257}).save_pretrained(tmp_path / "hf")
  ByteTokenizer().save(tmp_path / "hf")
  source = str(tmp_path / "hf")
  config = load_config(source)  # what a folder of transformers computes, reads and is told in
  assert (config.train.seq_len, config.data.tokenizer) == (64, source)
  config = experiment(config.model, corpus, steps=2, lora=LoRAConfig(rank=2), init_from=source)
  train_command(dataclasses.replace(config, eval=EvalConfig(every=0)), str(tmp_path / "run"))
  for more, to in (["--format=peft"], "peft"), (["--format=hf"], "merged"), ([], "ours"):
    assert main(["convert", f"--from={tmp_path}/run", f"--to={tmp_path}/{to}", *more]) == 0
  tokens = ids(vocab=257)
  want = llmarch.load(tmp_path / "run").logits(tokens)
  base = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
  run = lambda model: model(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
  before = run(base)
  close(run(PeftModel.from_pretrained(base, tmp_path / "peft").eval()), want)
  close(run(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")), want)
  close(llmarch.load(tmp_path / "ours").logits(tokens), want)
  assert np.abs(before - want).max() > 1e-3 * want.std()


# ------------------------------------------------------------------------------------------------ evaluation

HAVE_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAVE_HARNESS, reason="lm-eval is absent: its tasks were not run")


@functools.cache
def reader(bpe: bool = False) -> LM:
  """A model of random parameters with a tokenizer: of bytes, or of merges that cross words' ends."""
  small = model(d_model=24, vocab_size=300, max_seq_len=32, stack="local full")
  return lm_of(small, drawn(small), train_bpe([PROSE * 3], 300) if bpe else ByteTokenizer())


def log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits.astype(np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def naive(lm: LM, before: list[int], after: list[int]) -> np.ndarray:
  """log p of each token of `after`, by one forward of everything."""
  ids = [*before, *after]
  logprobs = log_softmax(lm.logits([ids[:-1]])[0])
  return np.array([logprobs[len(before) + i - 1, token] for i, token in enumerate(after)])


@pytest.mark.parametrize("batch", plain_if([4].count, [1, 4]))
def test_scores_of_ragged_rows_are_those_of_each_row_alone(batch):
  lm, draw = reader(), np.random.default_rng(0)
  rows = [draw.integers(0, 259, n).tolist() for n in (5, 33, 1, 2, 17, 9)]
  for row, got in zip(rows, score(lm, rows, batch), strict=True):
    assert len(got.logprobs) == len(got.greedy) == len(row) - 1
    if len(row) > 1:
      np.testing.assert_allclose(got.logprobs, naive(lm, row[:1], row[1:]), atol=2e-5)
      np.testing.assert_array_equal(got.greedy, lm.logits([row[:-1]])[0].argmax(-1) == row[1:])
  with pytest.raises(UserError, match="34 tokens, above"):
    score(lm, [[1] * 34])


@pytest.mark.parametrize("length, stride", [(None, None), (12, 5), (7, 7), (6, 1), (32, 31)])
def test_perplexity_is_its_definition(length, stride):
  lm, text = reader(), PROSE[:61] + "\u00e9\n"
  stream = [256, *text.encode()]
  L, S = length or 32, stride or length or 32
  nats = []
  for target in range(1, len(stream)):
    late = max(0, -(-(target - L) // S))  # windows after the first that end before this target is reached
    start = min(late * S, len(stream) - L - 1) if late else 0
    nats.append(-naive(lm, stream[start:target], stream[target : target + 1])[0])
    assert target - start >= min(target, L - S + 1)
  got = perplexity(lm, text, length=length, stride=stride)
  n = len(stream) - 1
  assert (got["tokens"], got["bytes"], got["length"], got["stride"]) == (n, n, L, S)
  assert math.isclose(got["loss"], sum(nats) / n, rel_tol=1e-5)
  assert math.isclose(got["perplexity"], math.exp(sum(nats) / n), rel_tol=1e-4)
  assert math.isclose(got["bits_per_byte"], sum(nats) / math.log(2) / len(text.encode()), rel_tol=1e-5)


def test_perplexity_of_a_short_text_and_what_is_refused():
  assert perplexity(reader(), "a")["windows"] == 1
  for more, why in [({"length": 33}, "max_seq_len=32"), ({"length": 4, "stride": 5}, "between 1 and length=4")]:
    with pytest.raises(UserError, match=why):
      perplexity(reader(), PROSE, **more)
  with pytest.raises(UserError, match="text is empty"):
    perplexity(reader(), "")


def test_evaluate_command(tmp_path, capsys):
  reader().save(tmp_path / "lm")
  (tmp_path / "text").write_text(PROSE)
  command = ["evaluate", f"--from={tmp_path}/lm"]
  assert main([*command, f"--text={tmp_path}/text", "--stride=16", "--json"]) == 0
  (row,) = json.loads(capsys.readouterr().out)
  assert row == perplexity(reader(), PROSE, stride=16) and row["bytes"] == len(PROSE)
  for more, why in [
    ([], "either --text"),
    ([f"--text={tmp_path}/none"], "cannot read"),
    ([f"--text={tmp_path}/text", "--limit=3"], "--limit is of no use"),
  ]:
    assert main([*command, *more]) == 2
    assert why in capsys.readouterr().err


def requests(*pairs):
  from lm_eval.api.instance import Instance

  return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@needs_harness
def test_loglikelihood_is_that_of_the_continuations_tokens():
  from llmarch.infer.harness import Harness

  lm = reader(bpe=True)
  encode = lm.tokenizer.encode
  pairs = [
    ("the quick", " brown fox"),
    ("the quick ", "brown"),  # the space is the continuation's, as its tokens have it
    ("jumps over", " the lazy dog, and"),
    ("", "fox"),
    ("h", "e"),  # one token together: encoded apart
    (PROSE, " to the dog"),  # longer than the model's context
  ]
  harness = Harness(lm, batch=3)
  assert encode("the quick brown") == encode("the quick") + encode(" brown") and len(encode("he")) == 1
  assert harness._encode_pair(*pairs[1]) == (encode("the quick"), encode(" brown"))
  assert harness._encode_pair(*pairs[4]) == (encode("h"), encode("e"))
  for (context, continuation), (logprob, greedy) in zip(pairs, harness.loglikelihood(requests(*pairs)), strict=True):
    if context == "h":
      before, after = encode("h"), encode("e")
    else:
      whole, before = encode(context + continuation), encode(context.rstrip())
      after = whole[len(before) :]
      before = before or [lm.tokenizer.end_id]
    kept = [*before, *after][-33:]
    want = naive(lm, kept[: -len(after)], after)
    assert math.isclose(logprob, want.sum(), rel_tol=1e-5)
    best = lm.logits([kept[:-1]])[0].argmax(-1)[-len(after) :]
    assert greedy == (best.tolist() == after)


@needs_harness
@pytest.mark.full
def test_a_greedy_continuation_is_recognised_and_text_ends_at_a_stop():
  from llmarch.infer.harness import Harness

  lm = reader()
  harness, asked = Harness(lm, batch=2), [PROSE[:9], PROSE[:20], "a"]
  texts = lm.generate(asked, max_new_tokens=9)
  ids = [lm.generate(lm.tokenizer.encode(context), max_new_tokens=9) for context in asked]
  rows = [(None, lm.tokenizer.encode(context), new) for context, new in zip(asked, ids)]
  assert all(greedy for _, greedy in harness._loglikelihood_tokens(rows))
  options = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}
  assert harness.generate_until(requests(*((context, options) for context in asked))) == texts
  stop = texts[1][2:4]  # of two tokens
  cut = [text.split(stop)[0] for text in texts]
  assert harness.generate_until(requests(*((c, options | {"until": [stop]}) for c in asked))) == cut and cut != texts


@needs_harness
def test_rolling_loglikelihood_counts_every_token_once():
  from llmarch.infer.harness import Harness

  lm, texts = reader(), [PROSE[:64], PROSE[:50], "x"]
  got = Harness(lm).loglikelihood_rolling(requests(*((text,) for text in texts)))
  assert math.isclose(got[0], -perplexity(lm, texts[0])["loss"] * 64, rel_tol=1e-5)  # two whole windows
  ids = [256, *texts[1].encode()]
  last = naive(lm, ids[18:33], ids[33:51])  # the last window looks back, so as to be full
  assert math.isclose(got[1], naive(lm, ids[:1], ids[1:33]).sum() + last.sum(), rel_tol=1e-5)


@needs_harness
@pytest.mark.full
def test_a_local_task_runs_offline(tmp_path, capsys, monkeypatch):
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    monkeypatch.setenv(name, "1")
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  lm = reader()
  lm.save(tmp_path / "lm")
  asked = [(f"the dog {i} is", ["asked", "lazy", "by the fox"], i % 3) for i in range(7)]
  lines = [json.dumps({"q": q, "choices": choices, "answer": answer}) for q, choices, answer in asked]
  (tmp_path / "asked.jsonl").write_text("\n".join(lines))
  (tmp_path / "tasks").mkdir()
  (tmp_path / "tasks" / "asked.yaml").write_text(
    f"""
task: asked
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/asked.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
  )
  command = ["evaluate", f"--from={tmp_path}/lm", f"--include_path={tmp_path}/tasks", "--json"]
  assert main([*command, "--tasks=asked"]) == 0
  (row,) = json.loads(capsys.readouterr().out[-2000:].partition("[\n")[2].join(["[", ""]))
  encode = lm.tokenizer.encode
  chosen = [
    int(np.argmax([naive(lm, encode(q), encode(f" {choice}")).sum() for choice in choices])) for q, choices, _ in asked
  ]
  right = sum(a == b for a, (_, _, b) in zip(chosen, asked)) / len(asked)
  assert (row["task"], row["metric"]) == ("asked", "acc") and math.isclose(row["value"], right)
  assert main([*command, "--tasks=other"]) == 2
  assert "there is no task 'other'" in capsys.readouterr().err
  there = tmp_path / "tasks" / "asked.yaml"
  (tmp_path / "tasks" / "afar.yaml").write_text(
    there.read_text().replace("task: asked", "task: afar").replace("dataset_path: json", "dataset_path: nobody/nothing")
  )
  assert main([*command, "--tasks=afar"]) == 2  # without a network
  said = capsys.readouterr().err
  assert "llmarch: --tasks: cannot load afar (" in said and "Traceback" not in said


def test_tasks_without_the_package_are_refused_in_a_sentence(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  assert main(["evaluate", "--from=nowhere", "--tasks=any"]) == 2
  said = capsys.readouterr().err
  assert "--tasks needs lm-eval (" in said and said.count("\n") == 1
