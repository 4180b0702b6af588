"""Statistics of differences between arms: paired effects, intervals, the noise floor, and the verdict of a rule."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95  # of intervals
FLOOR = 2.0  # standard deviations of the difference of two runs that differ in their seed alone
MIN_PAIRS = 3

Verdict = Literal["supported", "not supported", "opposite", "inconclusive at this scale"]
SUPPORTED, NOT_SUPPORTED, OPPOSITE, INCONCLUSIVE = Verdict.__args__


class Effect(NamedTuple):
  """A paired difference: mean over pairs, its interval at LEVEL (None for fewer than two pairs), and its values."""

  mean: float
  low: float | None
  high: float | None
  n: int
  values: tuple[float, ...]


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Effect:
  """arm - baseline over the seeds that both have; Student's t interval of the mean, n - 1 degrees of freedom."""
  seeds = sorted(arm.keys() & baseline.keys())
  values = tuple(arm[s] - baseline[s] for s in seeds)
  n, mean = len(values), float(np.mean(values)) if values else math.nan
  if n < 2:
    return Effect(mean, None, None, n, values)
  half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
  return Effect(mean, mean - half, mean + half, n, values)


def noise_floor(values: Sequence[float]) -> float:
  """The size below which a difference is called noise: FLOOR standard deviations of the difference of two runs that
  differ in their seed alone, sqrt(2) times that of one run. From runs of the baseline, at least MIN_PAIRS of them
  (else infinite)."""
  if len(values) < MIN_PAIRS:
    return math.inf
  return FLOOR * math.sqrt(2) * float(np.std(values, ddof=1))


def different(effect: Effect, floor: float) -> bool:
  """True if two arms are called different: the interval excludes zero, and the effect exceeds the noise floor."""
  if effect.n < MIN_PAIRS or not math.isfinite(effect.mean):
    return False
  return abs(effect.mean) > floor and not effect.low <= 0 <= effect.high


def verdict(effect: Effect, floor: float, expect: str, by: float, to: float = 0.0) -> Verdict:
  """The rule, written before any run.

  less     supported: different (see `different`), and the whole interval below -by
           opposite: different, and the effect above zero
           not supported: by > 0, and the whole interval above -by
  greater  the same, turned round
  equal    supported: the whole interval within by of `to`; not supported: all of it outside
  Anything else, and fewer than MIN_PAIRS pairs, is inconclusive at this scale.
  """
  if effect.n < MIN_PAIRS or not math.isfinite(effect.mean):
    return INCONCLUSIVE
  if expect == "equal":
    low, high = effect.low - to, effect.high - to
    if -by < low and high < by:
      return SUPPORTED
    return NOT_SUPPORTED if low > by or high < -by else INCONCLUSIVE
  low, high = (effect.low, effect.high) if expect == "less" else (-effect.high, -effect.low)
  if different(effect, floor):
    if high < -by:
      return SUPPORTED
    if low > 0:
      return OPPOSITE
  return NOT_SUPPORTED if by > 0 and low > -by else INCONCLUSIVE


def tally(verdicts: Iterable[str]) -> str:
  """ "3 supported, 1 opposite"."""
  return ", ".join(f"{n} {verdict}" for verdict, n in Counter(verdicts).most_common())
