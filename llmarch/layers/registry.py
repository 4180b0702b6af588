"""The table that says which module builds which config. A new mixer, cross-attention or feed-forward adds one line."""

from llmarch.branches import BranchConfig
from llmarch.errors import check
from llmarch.layers.attention import Attention, AttentionConfig
from llmarch.layers.cross import CrossAttention, CrossAttentionConfig
from llmarch.layers.ffn import MLP, MLPConfig
from llmarch.layers.linear import Linear, LinearConfig
from llmarch.layers.mla import MLA, MLAConfig
from llmarch.layers.moe import MoE, MoEConfig

MODULES = {
  AttentionConfig: Attention,
  MLAConfig: MLA,
  LinearConfig: Linear,
  CrossAttentionConfig: CrossAttention,
  MLPConfig: MLP,
  MoEConfig: MoE,
}


def module_of(config: BranchConfig) -> type:
  """The module class that a branch's config describes. Raises UserError if this table lacks it."""
  kind = type(config)
  check(kind in MODULES, f"{config.kind}: no module is registered for {kind.__name__}; add it to registry.MODULES")
  return MODULES[kind]
