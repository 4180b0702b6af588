"""Which module builds which config. Adding a mixer or a feed-forward is one line here."""

from llmarch.layers.attention import Attention, AttentionConfig
from llmarch.layers.ffn import MLP, MLPConfig
from llmarch.layers.mla import MLA, MLAConfig
from llmarch.layers.moe import MoE, MoEConfig

MIXERS = {AttentionConfig: Attention, MLAConfig: MLA}
FFNS = {MLPConfig: MLP, MoEConfig: MoE}
