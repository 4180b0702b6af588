"""The bench's peer: transformers' LlamaForCausalLM (torch, f32, CPU), the same shapes and the same work.

`python benchmarks/transformers_llama.py SHAPES.json` prints a JSON list of {"phase", "batch", "seconds"}:
the seconds of one repetition each of
  train    forward, backward, global-norm clipping and AdamW on [batch, seq_len] tokens
  prefill  the forward of a prompt into a cache, logits of the last token
  decode   greedy `generate` of `generate` tokens after the prompt, less the time of its prefill
`llmarch bench --peer=...` runs it between its own repetitions. Only this folder and tests import torch.
"""

import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(model: dict) -> LlamaForCausalLM:
  block = model["blocks"]["layer"]
  mixer = block["mixer"]
  layers = int(model["stack"].split("*")[0])
  torch.manual_seed(0)
  return LlamaForCausalLM(
    LlamaConfig(
      hidden_size=model["d_model"],
      num_hidden_layers=layers,
      num_attention_heads=mixer["num_heads"],
      num_key_value_heads=mixer["num_kv_heads"],
      intermediate_size=block["ffn"]["d_ff"],
      vocab_size=model["vocab_size"],
      max_position_embeddings=model["max_seq_len"],
      tie_word_embeddings=model["head"]["tied"],
    )
  )


def timed(f) -> float:
  began = time.perf_counter()
  f()
  return time.perf_counter() - began


def train(model, shape: dict):
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
  ids = torch.randint(0, model.config.vocab_size, (shape["batch"], shape["seq_len"]))

  def step():
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  step()
  return lambda: timed(step)


def _generate(model, ids, n):
  with torch.inference_mode():
    return model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)


def prefill(model, shape: dict):
  ids = torch.randint(1, model.config.vocab_size, (shape["batch"], shape["prompt"]))
  _generate(model, ids, 1)
  return lambda: timed(lambda: _generate(model, ids, 1))


def decode(model, shape: dict):
  ids = torch.randint(1, model.config.vocab_size, (shape["batch"], shape["prompt"]))
  _generate(model, ids, 4)
  n = shape["generate"]
  return lambda: timed(lambda: _generate(model, ids, n + 1)) - timed(lambda: _generate(model, ids, 1))


def main() -> None:
  with open(sys.argv[1]) as f:
    request = json.load(f)
  torch.set_num_threads(request["threads"])
  rows = []
  for shape in request["shapes"]:
    model = build(request["model"])
    model.train(shape["phase"] == "train")
    run = {"train": train, "prefill": prefill, "decode": decode}[shape["phase"]](model, shape)
    seconds = [run() for _ in range(request["repeats"])]
    rows.append({"phase": shape["phase"], "batch": shape["batch"], "seconds": seconds})
  json.dump(rows, sys.stdout)


if __name__ == "__main__":
  main()
