"""Losses that leap: what counts as one. What is done about it is the loop's."""

import math
import statistics
from collections import deque

from llmarch.run_config import SpikeConfig


class Spikes:
  """Tells a loss far above the last ones. Its memory is `losses`, which a checkpoint keeps: a resumed run decides
  as an uninterrupted one."""

  def __init__(self, config: SpikeConfig | None, losses=()):
    self._config = config
    self.losses = deque(losses, maxlen=config.window if config else 0)

  def leaps(self, loss: float) -> bool:
    """Whether this loss is a spike; if it is none, it joins the window. Never before the window is full."""
    if self._config is None or not math.isfinite(loss):
      return False
    if len(self.losses) == self._config.window:
      mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
      if loss > mean + self._config.sigma * deviation:
        return True
    self.losses.append(loss)
    return False
