"""A small model that transformers trained is taken through everything here, and back to transformers."""

import argparse
import inspect
import json
import math

import numpy as np
import pytest

import llmarch
from llmarch.__main__ import main

torch = pytest.importorskip("torch", reason="torch is absent: no model of transformers was trained")
transformers = pytest.importorskip("transformers")

TEXT = inspect.getsource(argparse)[:60_000]
LENGTH = 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A Llama of two layers after 80 steps on one module of the standard library, saved by transformers."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator([TEXT], trainer)
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=len(fast), hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96, eos_token_id=fast.eos_token_id, bos_token_id=None,
  )  # fmt: skip
  model = transformers.LlamaForCausalLM(config)
  ids = torch.tensor(fast(TEXT)["input_ids"])
  optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
  for step in range(80):
    starts = torch.randint(0, len(ids) - LENGTH, (8,), generator=torch.Generator().manual_seed(step))
    batch = torch.stack([ids[i : i + LENGTH] for i in starts])
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
  folder = tmp_path_factory.mktemp("trained") / "hf"
  model.eval().save_pretrained(folder)
  fast.save_pretrained(folder)
  return folder, model, fast


def nats_of(model, ids: list[int], first: int) -> float:
  """The sum of -log p of all ids after `first`, in windows of LENGTH inputs; the last one ends with the text."""
  inputs, total = [first, *ids[:-1]], 0.0
  with torch.no_grad():
    for done in range(0, len(ids), LENGTH):
      start = min(done, len(ids) - LENGTH)
      logits = model(torch.tensor([inputs[start : start + LENGTH]])).logits[0].double()
      new, wanted = logits[done - start :], torch.tensor(ids[done : done + LENGTH])
      total += torch.nn.functional.cross_entropy(new, wanted, reduction="sum").item()
  return total


def same_logits(folder, ours: str) -> None:
  ids = np.arange(1, 41)[None] % 400
  with torch.no_grad():
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(torch.tensor(ids)).logits
  mine = llmarch.load(ours).logits(ids.tolist())
  assert np.abs(theirs.numpy() - mine).max() < 1e-5 * theirs.numpy().std()


@pytest.mark.full
def test_a_model_of_transformers_goes_through_every_command_and_back(trained, tmp_path, monkeypatch, capsys):
  hf, model, tokenizer = trained
  monkeypatch.chdir(tmp_path)
  assert main(["convert", f"--from={hf}", "--to=model"]) == 0
  prompt = tokenizer("def add", return_tensors="pt")
  told = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
  capsys.readouterr()
  assert main(["generate", "--from=model", "--prompt=def add", "--max_new_tokens=24"]) == 0
  assert capsys.readouterr().out.strip() == tokenizer.decode(told, skip_special_tokens=True).strip()

  (tmp_path / "held.txt").write_text(text := TEXT[20_000:23_000])
  assert main(["evaluate", "--from=model", "--text=held.txt", f"--length={LENGTH}", "--json"]) == 0
  (row,) = json.loads(capsys.readouterr().out)
  ids = tokenizer(text)["input_ids"]
  nats = nats_of(model, ids, tokenizer.eos_token_id)
  assert row["tokens"] == len(ids) and math.isclose(row["loss"], nats / len(ids), rel_tol=1e-5)
  assert math.isclose(row["bits_per_byte"], nats / math.log(2) / len(text.encode()), rel_tol=1e-5)

  (tmp_path / "more.txt").write_text(TEXT)
  tune = ["train", "--config=model", "--config.train.init_from=model", "--config.train.steps=3"]
  tune += ["--config.train.batch_size=2", "--config.train.seq_len=32", "--config.eval.every=0"]
  tune += ['--config.data.source={"kind": "text", "paths": ["more.txt"]}', "--config.data.validation_fraction=0.0"]
  assert main([*tune, "--workdir=tuned"]) == 0
  assert main(["convert", "--from=tuned", "--to=tuned_hf", "--format=hf"]) == 0
  same_logits("tuned_hf", "tuned")
  again = transformers.AutoTokenizer.from_pretrained("tuned_hf")
  assert again(text)["input_ids"] == ids and again.eos_token == tokenizer.eos_token

  # A base in float32, whose frozen weights training holds in bfloat16: the adapters are still those of this base.
  half = ["--config.model.precision.param=bfloat16", '--config.train.lora={"rank": 2, "targets": ["mixer/*"]}']
  assert main([*tune, *half, "--workdir=adapters"]) == 0
  assert main(["convert", "--from=adapters", "--to=merged", "--format=hf"]) == 0
