"""The test for a loss that leaps; the training loop decides what to do about one."""

import math
import statistics
from collections import deque

from llmarch.run_config import SpikeConfig


class Spikes:
  """Detects a loss far above the last ones. A checkpoint keeps `losses`, so that a resumed run decides the same."""

  def __init__(self, config: SpikeConfig | None, losses=()):
    self._config = config
    self.losses = deque(losses, maxlen=config.window if config else 0)

  def leaps(self, loss: float) -> bool:
    """True if this loss is a spike, and never before the window is full; a loss that is none joins the window."""
    if self._config is None or not math.isfinite(loss):
      return False
    if len(self.losses) == self._config.window:
      mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
      if loss > mean + self._config.sigma * deviation:
        return True
    self.losses.append(loss)
    return False
