"""The families of decoders, by the model_type of transformers: config fields and weights, each read both ways.

A new family is one entry of FAMILIES in the file of its kind. Nothing else in the project knows a family's name.
"""

import dataclasses

from llmarch.convert.fields import Family
from llmarch.convert.tables import gemma, gpt, layernorm, llama, mla, moe, olmo, ports
from llmarch.convert.tables.defaults import DEFAULTS

_KINDS = (llama, gemma, gpt, olmo, moe, mla, layernorm, ports)

# Some models can be written as checkpoints of several families. The first one here is taken; others come last.
_ORDER = """
  llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gpt2 gpt_neox gptj gpt_neo olmo olmo2 olmo3 phi3 granite
  granitemoe mixtral qwen2_moe qwen3_moe olmoe gpt_oss dbrx deepseek_v2 deepseek_v3 starcoder2 stablelm falcon
  mpt opt bloom phi cohere cohere2 nemotron smollm3 glm4 palm grok-1
""".split()

_ALL = {
  family.model_type: dataclasses.replace(family, defaults=DEFAULTS.get(family.model_type, {}))
  for kind in _KINDS
  for family in kind.FAMILIES
}
FAMILIES: dict[str, Family] = {name: _ALL[name] for name in dict.fromkeys([*_ORDER, *_ALL])}


def find_family(options: dict) -> Family | None:
  """The family of a config.json by its model_type, or by the class that it names if it has no model_type."""
  model_type, classes = options.get("model_type"), options.get("architectures")
  for family in FAMILIES.values():
    names = {family.architecture, family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Model"}
    if model_type in (family.model_type, *family.also):
      return family
    if model_type is None and isinstance(classes, list) and names & set(map(str, classes)):
      return family
  return None
