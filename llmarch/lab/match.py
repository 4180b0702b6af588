"""Arms of equal cost: the width, depth or number of steps at which one config costs what another does, by formula."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from llmarch.analysis import cost
from llmarch.build import assign, build, to_dict
from llmarch.errors import UserError, check, check_above, check_at_least
from llmarch.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Match:
  """The cost that is to be equal, and the size that changes for it.

  params: all parameters; flops: of training, over all steps; tokens: trained on. by: d_ff changes every
  feed-forward in proportion, to multiples of `multiple`; depth the repeats of a stack of one term; steps
  train.steps. `tolerance`: the relative mismatch that is refused.
  """

  quantity: Literal["params", "flops", "tokens"]
  by: Literal["d_ff", "depth", "steps"] = "d_ff"
  multiple: int = 8
  tolerance: float = 0.02

  def __post_init__(self):
    for name, known in (("quantity", QUANTITIES), ("by", KNOBS)):
      value = getattr(self, name)
      check(value in known, f"Match.{name}: unknown value {value!r} (known: {', '.join(known)})")
    check_at_least(self, 1, "multiple")
    check_above(self, 0, "tolerance")
    possible = {"params": ("d_ff", "depth"), "flops": ("d_ff", "depth", "steps"), "tokens": ("steps",)}[self.quantity]
    check(self.by in possible, f"{self.quantity} cannot be matched by {self.by}; use {' or '.join(possible)}")


def tokens(config: RunConfig) -> int:
  """Returns the number of tokens that a run trains on."""
  return config.train.steps * config.train.batch_size * config.train.seq_len


QUANTITIES: dict[str, Callable[[RunConfig], float]] = {
  "params": lambda c: cost.params(c.model)["total"],
  "flops": lambda c: tokens(c) * cost.train_flops_per_token(c.model, c.train.seq_len),
  "tokens": tokens,
}


def _d_ff(data: dict, n: int, multiple: int) -> dict[str, Any]:
  """The overrides that make the widest feed-forward n * multiple wide, the others in proportion."""
  found = {}
  for name, block in data["model"]["blocks"].items():
    for part in ("", ".expert", ".shared"):
      at = block["ffn"] if not part or block["ffn"] is None else block["ffn"].get(part[1:])
      if isinstance(at, dict) and "d_ff" in at:
        found[f"model.blocks.{name}.ffn{part}.d_ff"] = at["d_ff"]
  check(bool(found), "no block has a d_ff to change; match by depth or steps")
  widest = max(found.values())
  return {key: max(round(width / widest * n), 1) * multiple for key, width in found.items()}


def _depth(data: dict, n: int, multiple: int) -> dict[str, Any]:
  stack = data["model"]["stack"].strip()
  count, star, body = stack.partition("*")
  simple = star and count.strip().isdigit() and (body.strip().isidentifier() or _one_group(body.strip()))
  check(bool(simple), f"stack={stack!r} has more than one term, so that its depth is no single number; match by d_ff")
  return {"model.stack": f"{n}*{body.strip()}"}


def _one_group(body: str) -> bool:
  return body.startswith("(") and body.endswith(")") and "(" not in body[1:] and ")" not in body[:-1]


KNOBS: dict[str, Callable[[dict, int, int], dict[str, Any]]] = {
  "d_ff": _d_ff,
  "depth": _depth,
  "steps": lambda data, n, multiple: {"train.steps": n},
}


def matched(match: Match, config: RunConfig, target: RunConfig) -> tuple[RunConfig, dict, dict]:
  """`config` with the size at which it costs as `target`: (it, the overrides, a report of what is left).

  The cost grows with the size, so the size is found by bisection. Raises UserError where the nearest one is further
  off than the tolerance.
  """
  data, cost_of = to_dict(config), QUANTITIES[match.quantity]
  want = cost_of(target)
  sizes = lambda n: KNOBS[match.by](data, n, match.multiple)
  sized = lambda n: build(RunConfig, assign(data, sizes(n).items()), "config")

  low, high = 1, 2  # cost(low) <= want < cost(high), unless the smallest is too large
  while cost_of(sized(high)) <= want:
    low, high = high, 2 * high
    check(high < 2**24, f"no {match.by} reaches {want:,.0f} {match.quantity}; match by something else")
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if cost_of(sized(middle)) <= want else (low, middle)
  n = min((low, high), key=lambda n: abs(cost_of(sized(n)) - want))
  have = cost_of(sized(n))
  residual = have / want - 1
  if not math.isfinite(residual) or abs(residual) > match.tolerance:
    raise UserError(
      f"cannot match {want:,.0f} {match.quantity} by {match.by}: the nearest, {sizes(n)}, has {have:,.0f}"
      f" ({residual:+.1%}, of at most {match.tolerance:.1%}); change the arm, or what it is matched by"
    )
  report = {"quantity": match.quantity, "by": match.by, "target": want, "value": have, "residual": residual}
  return sized(n), sizes(n), report
