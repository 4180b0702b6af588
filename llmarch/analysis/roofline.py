"""The least time of a decode step on one chip, for every mixer and feed-forward, from analysis/cost.py alone.

A step does the FLOPs of one token per row, and reads once each weight that these need and the whole decoding state.
With perfect overlap it takes the longer of the two (2211.05102, section 2). This is a lower bound: it knows peaks and
no kernels, and counts neither activations nor writes. The planner estimates layouts of many chips, for attention and
dense feed-forwards; this module estimates a single chip for the whole space.
"""

import dataclasses

from llmarch.analysis import cost, planner
from llmarch.analysis.hardware import CHIPS, Chip
from llmarch.branches import FFNConfig
from llmarch.config import BlockConfig, ModelConfig
from llmarch.errors import UserError, check, nearest

# Bytes of a weight at rest, with the scales of a format's groups; scales of channels are few and not counted.
WEIGHTS = {"bfloat16": 2.0, "float32": 4.0, **planner.BYTES}

# Three chips of different balance: 206, 240 and 419 FLOPs per byte of memory traffic.
POINTS = ("h200", "tpu_v5e", "l40s")


def decode_seconds(
  config: ModelConfig, chip: Chip, *, batch: int, context: int, weights: str | None = None, kv: str = "bfloat16"
) -> float:
  """Seconds that one decode step of `batch` rows takes at least, each row at its token number `context`.

  max(FLOPs / peak, (bytes of weights + bytes of state) / memory bandwidth). Weights take 16 bits unless a format is
  given (a name of WEIGHTS), and are multiplied in 16 bits in any case; `kv` is the format of the state (a name of
  cost.BYTES), whatever config.precision says. Whether it all fits the chip is not checked. Masks count as causal, and
  experts as chosen evenly. Raises UserError for a size below 1 or an unknown format.
  """
  moved = weight_bytes_read(config, batch, weights) + cost.state_bytes(hold(config, kv), batch, context)
  return max(batch * decode_flops(config, context) / chip.flops, moved / chip.hbm_bandwidth)


def read_seconds(config: ModelConfig, chip: Chip, *, batch: int, context: int, weights: str | None = None) -> float:
  """Seconds that one pass over `batch` whole sequences of `context` tokens takes at least.

  It has neither state nor logits, as in an encoder. Bytes and errors are those of `decode_seconds`.
  """
  check(context >= 1, f"context must be at least 1 token, got {context}")
  tokens = batch * context
  flops = tokens * (cost.flops_per_token(config, context) - 2 * cost.head_macs(config))
  read = weight_bytes_read(config, tokens, weights) - cost.head_macs(config) * _width(weights)
  return max(flops / chip.flops, read / chip.hbm_bandwidth)


def decode_ms_at(config: ModelConfig, *, batch: int, context: int) -> dict[str, float]:
  """{chip of POINTS: milliseconds between two tokens of a row}, a lower bound, with weights and state in 16 bits.

  This is the time of one decode step, in which each of the `batch` rows gets a token.
  """
  return {name: 1e3 * decode_seconds(config, CHIPS[name], batch=batch, context=context) for name in POINTS}


def decode_flops(config: ModelConfig, context: int) -> float:
  """FLOPs of a row's token number `context`: those of `context` tokens less those of `context` - 1.

  A latent attention, whose two forms differ in cost, decodes with its keys and values absorbed: N (2 C + R)
  multiply-adds for each key, where whole sequences take N (P + R + V) (2405.04434, section 2.1.2).
  """
  check(context >= 1, f"context must be at least 1 token, got {context}")
  flops_of = lambda length: length * cost.flops_per_token(config, length) if length else 0.0
  flops = flops_of(context) - flops_of(context - 1)
  for count, block, costs in cost.layers(config):
    for name, row in costs.items():
      if row.decoding:
        flops += 2 * count * row.decoding * min(context, block.branches[name].window or context)
  return flops


def weight_bytes(config: ModelConfig, weights: str | None = None) -> float:
  """Bytes of all parameters at rest, in 16 bits or in a format of WEIGHTS. Raises UserError for an unknown format."""
  return cost.params(config)["total"] * _width(weights)


def weight_bytes_read(config: ModelConfig, batch: int, weights: str | None = None) -> float:
  """Bytes of the weights that a decode step of `batch` rows reads.

  Tables of which it looks up rows are left out, and so are the experts to which no row goes, in expectation (see
  `distinct_experts`).
  """
  check(batch >= 1, f"batch must be at least 1, got {batch}")
  count = cost.params(config)
  rows = 0 if config.head.tied else config.vocab_size * (config.embed.dim or config.d_model)
  unread = sum(n * _unread(block, costs, batch) for n, block, costs in cost.layers(config))
  return (count["total"] - count["position"] - rows - unread) * _width(weights)


def _unread(block: BlockConfig, costs: dict[str, cost.Cost], batch: int) -> float:
  """Parameters of a layer's experts to which none of `batch` rows goes."""
  if block.ffn is None or not block.ffn.experts:
    return 0.0
  experts, _ = block.ffn.experts
  return (experts - distinct_experts(block.ffn, batch)) * costs["ffn"].expert


def distinct_experts(config: FFNConfig, tokens: int) -> float:
  """Expected number of experts that `tokens` tokens reach together: E (1 - (1 - k / E)^tokens).

  It assumes that tokens choose independently and every expert is equally likely; no other distribution reaches more
  experts, and training balances towards this one. If experts choose, all of them are reached (such a model cannot
  decode; the number is of one that does the same work).
  """
  E, k = config.experts
  return E * (1 - (1 - k / E) ** tokens) if config.causal else float(E)


def hold(config: ModelConfig, kv: str) -> ModelConfig:
  """Gives a model the format `kv` for its decoding state. Raises UserError for an unknown name."""
  if kv not in cost.BYTES:
    raise UserError(f"kv: there is no {kv!r}{nearest(kv, cost.BYTES)}")
  return dataclasses.replace(config, precision=dataclasses.replace(config.precision, state=kv))


def _width(weights: str | None) -> float:
  name = weights or "bfloat16"
  if name not in WEIGHTS:
    raise UserError(f"weights: there is no {name!r}{nearest(name, WEIGHTS)}")
  return WEIGHTS[name]
