"""Which module builds which config. Adding a mixer or a feed-forward is one line here."""

from llmarch.layers.attention import Attention, AttentionConfig
from llmarch.layers.ffn import MLP, MLPConfig

MIXERS = {AttentionConfig: Attention}
FFNS = {MLPConfig: MLP}
