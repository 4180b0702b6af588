"""Adapters in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

A tensor of theirs may hold several matrices of ours (fused queries, keys and values), each of which has its own
adapter. It gets one adapter whose rank is the sum of theirs, with A stacked and B block-diagonal.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
from flax import nnx

from llmarch.adapt.lora import A, Adapters, B
from llmarch.config import ModelConfig
from llmarch.convert import hf
from llmarch.errors import check
from llmarch.layers.param import flatten
from llmarch.models.decoder import abstract
from llmarch.run_config import LoRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# Options of adapter_config.json that change the result in ways that are not known here, unless they are empty.
NOT_KNOWN = (
  "use_dora", "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices", "lora_bias",
  "use_qalora", "alora_invocation_tokens", "arrow_config", "megatron_config",
)  # fmt: skip
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The matrices A [R, in] and B [out, R] of one Linear, whose weight [out, in] they change by scale B A.

  turned: the weight is [in, out], as in a Conv1D of GPT-2.
  """

  a: hf.Tensor
  b: hf.Tensor
  scale: float
  turned: bool

  def __str__(self) -> str:
    return str(self.a)

  def added_to(self, values: np.ndarray, tensor: hf.Tensor) -> np.ndarray:
    """The weight with the adapter's product added in f32. Raises UserError if their shapes differ."""
    change = np.float32(self.scale) * (self.b.read().astype(np.float32) @ self.a.read().astype(np.float32))
    change = change.T if self.turned else change
    check(change.shape == values.shape, f"{self} changes a matrix {list(change.shape)}, not {list(values.shape)}")
    return (values.astype(np.float32) + change).astype(values.dtype)


def read_adapters(folder: Path) -> dict[str, Adapter]:
  """The LoRA adapters of a folder, by the name of the weight that each of them changes.

  Raises UserError for adapters of another kind, and for all that is not A and B of a matrix.
  """
  path = folder / CONFIG
  options = hf.read_json(path)
  kind = options.get("peft_type")
  check(kind == "LORA", f"{path}: peft_type={kind!r} is not known; merge the adapter with its base")
  unknown = [f"{key}={options[key]!r}" for key in NOT_KNOWN if options.get(key)]
  unknown += [f"bias={options['bias']!r}"] if options.get("bias", "none") != "none" else []
  check(not unknown, f"{path}: {', '.join(sorted(unknown))} is not known; merge the adapter with its base")
  check((folder / WEIGHTS).exists(), f"{folder / WEIGHTS} is missing; restore it, or save the adapter as safetensors")
  pairs: dict[str, dict[str, hf.Tensor]] = {}
  for name, tensor in hf.read_header(folder / WEIGHTS)[0].items():
    found = NAME.fullmatch(name)
    check(found is not None, f"{tensor} is not A or B of a matrix; merge the adapter with its base")
    check(tensor.dtype in hf.DTYPES and len(tensor.shape) == 2, f"{tensor} is no matrix of {', '.join(hf.DTYPES)}")
    pairs.setdefault(found[1], {})[found[2]] = tensor
  adapters = {}
  for module, pair in pairs.items():
    check(pair.keys() == {"A", "B"}, f"{folder / WEIGHTS}: {module} has {' '.join(pair)} alone; restore the file")
    rank = pair["A"].shape[0]
    check(pair["B"].shape[1] == rank > 0, f"{pair['B']} does not fit {pair['A'].name}; restore the file")
    alpha = _for_module(options, "alpha_pattern", "lora_alpha", module)
    check(
      isinstance(alpha, (int, float)) and math.isfinite(alpha), f"{path}: lora_alpha={alpha!r} must be a number"
    )
    scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
    adapters[f"{module}.weight"] = Adapter(pair["A"], pair["B"], scale, bool(options.get("fan_in_fan_out")))
  return adapters


def _for_module(options: dict, patterns: str, key: str, module: str):
  """The value of the first pattern that a module's name ends with, as PEFT matches them, or that of the key."""
  for pattern, value in (options.get(patterns) or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return options.get(key, 8)


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
  hf.write_safetensors(directory / WEIGHTS, entries, tensors.__getitem__, metadata={"format": "pt"})
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
