"""A prefix language model of bytes on two CPU cores: the first part of each piece is seen both ways (1910.10683).

The model is that of tiny.py at 793,728 parameters, with two changes: mask=prefix in the mixer, and train.loss=prefix,
which draws a prefix for each piece and counts the rest alone. Both must be set; without the mask this is a causal model
that is judged on the second parts.

Expected: no number yet (planned, not run). Losses of two runs are comparable if both have the same train.loss.
Cost: 1500 steps of 8 x 256 bytes, 1.7e13 FLOPs; 4 to 6 minutes on 2 CPU cores.
Memory: below 1 GiB.
Command: llmarch train --config=configs/prefix_lm.py --workdir=runs/prefix_lm
         llmarch generate --from=runs/prefix_lm --prefix --prompt='def main('
"""

from pathlib import Path

from ml_collections import ConfigDict

from llmarch.build import to_dict
from llmarch.commands.common import load_config


def get_config() -> ConfigDict:
  config = ConfigDict(to_dict(load_config(str(Path(__file__).with_name("tiny.py")))))
  config.model.blocks.layer.mixer.mask = "prefix"
  config.train.loss = "prefix"
  config.eval.sample_tokens = 0
  return config
