"""Low-rank adapters as PEFT writes them, read to be added to the weights that they change."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from llmarch.convert.safetensors import DTYPES, Tensor, read_header, read_json
from llmarch.errors import check

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

  a: Tensor
  b: Tensor
  scale: float
  turned: bool

  def __str__(self) -> str:
    return str(self.a)

  def added_to(self, values: np.ndarray, tensor: Tensor) -> np.ndarray:
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
  options = read_json(path)
  kind = options.get("peft_type")
  check(kind == "LORA", f"{path}: peft_type={kind!r} is not known; merge the adapter with its base")
  unknown = [f"{key}={options[key]!r}" for key in NOT_KNOWN if options.get(key)]
  unknown += [f"bias={options['bias']!r}"] if options.get("bias", "none") != "none" else []
  check(not unknown, f"{path}: {', '.join(sorted(unknown))} is not known; merge the adapter with its base")
  check((folder / WEIGHTS).exists(), f"{folder / WEIGHTS} is missing; restore it, or save the adapter as safetensors")
  pairs: dict[str, dict[str, Tensor]] = {}
  for name, tensor in read_header(folder / WEIGHTS)[0].items():
    found = NAME.fullmatch(name)
    check(found is not None, f"{tensor} is not A or B of a matrix; merge the adapter with its base")
    check(tensor.dtype in DTYPES and len(tensor.shape) == 2, f"{tensor} is no matrix of {', '.join(DTYPES)}")
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
