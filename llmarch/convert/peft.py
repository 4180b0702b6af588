"""Adapters in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

A tensor of theirs may hold several matrices of ours (fused queries, keys and values), each of which has its own
adapter. It gets one adapter whose rank is the sum of theirs, with A stacked and B block-diagonal.
"""

import json
import math
from pathlib import Path

import numpy as np
from flax import nnx

from llmarch.adapt.lora import A, Adapters, B
from llmarch.config import ModelConfig
from llmarch.convert import hf
from llmarch.convert.adapters import CONFIG, WEIGHTS
from llmarch.convert.safetensors import write_safetensors
from llmarch.errors import check
from llmarch.layers.param import flatten
from llmarch.models.decoder import abstract
from llmarch.run_config import LoRAConfig


def write_adapters(
  directory: Path, config: ModelConfig, lora: LoRAConfig, params: dict, base: str, model_type: str | None = None
) -> str:
  """Writes the adapters `params` of a model for transformers' folder `base`, and returns the model_type of the names.

  params: those of adapt.lora.Adapters, by name. Raises UserError if no family can express what the model computes.
  """
  family, _ = hf.express(config, model_type)
  named = flatten(nnx.state(abstract(config)), variables=True)
  targets = set(Adapters(lora, config).targets)
  tensors, ranks, turned = {}, {}, set()
  for slot in hf.tensor_slots(family, config).values():
    if not any(path in targets for path, _ in slot.parts):
      continue
    module = slot.key.removesuffix(".weight")
    a, b, conv = _factors(slot, named, params, targets, lora.rank)
    prefix = f"base_model.model.{module}"
    tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    ranks[module] = a.shape[0]
    turned |= {conv}
  other = {module: rank for module, rank in ranks.items() if rank != lora.rank}
  options = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "rank_pattern": other,
    "alpha_pattern": {module: lora.alpha / lora.rank * rank for module, rank in other.items()},
    "target_modules": list(ranks),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": turned == {True},
    "inference_mode": True,
  }
  (directory / CONFIG).write_text(json.dumps(options, indent=2) + "\n")
  entries = {name: (value.dtype, value.shape) for name, value in tensors.items()}
  write_safetensors(directory / WEIGHTS, entries, tensors.__getitem__, metadata={"format": "pt"})
  return family.model_type


def _factors(slot: hf.Slot, named: dict, params: dict, targets: set[str], rank: int):
  """(A [R, in], B [out, R], true if their tensor is [in, out]) of one tensor, which changes by B A or its transpose.

  The places of its inputs and outputs are found by sending numbered entries through its rearrangement.
  """
  check(len(slot.rearrange.shape) == 2, f"{slot.key} is no matrix; PEFT has no adapter for it")
  inputs, outputs, left, right, offset = [], [], [], [], 0
  for path, index in slot.parts:
    p = named[path]
    inputs.append(_numbered(p, [axis in p.fan_in for axis in p.axes]))
    outputs.append(offset + _numbered(p, [axis not in p.fan_in for axis in p.axes]))
    if path in targets:
      left.append(np.asarray(params[f"{path}/{A}"][index], np.float32).reshape(-1, rank).T)
      right.append((offset, np.asarray(params[f"{path}/{B}"][index], np.float32).reshape(rank, -1).T))
    offset = outputs[-1].max() + 1
  inputs, outputs = slot.rearrange.join(inputs), slot.rearrange.join(outputs)
  conv = not (inputs == inputs[:1]).all()
  if conv:
    inputs, outputs = inputs.T, outputs.T
  apart = (inputs == inputs[:1]).all() and (outputs == outputs[:, :1]).all()
  check(bool(apart), f"{slot.key} mixes inputs with outputs; PEFT has no adapter for it")
  b = np.zeros((offset, rank * len(right)), np.float32)
  for i, (start, value) in enumerate(right):
    b[start : start + len(value), i * rank : (i + 1) * rank] = value
  return np.ascontiguousarray(np.concatenate(left)[:, inputs[0]]), b[outputs[:, 0]], conv


def _numbered(p: nnx.Param, counted: list[bool]) -> np.ndarray:
  """An array of one layer's shape in which the counted dimensions together run through 0, 1, 2 ..."""
  sizes = [n if one else 1 for n, one in zip(p.sizes, counted, strict=True)]
  return np.broadcast_to(np.arange(math.prod(sizes)).reshape(sizes), p.sizes)
