"""Results of an ablation from its records: its arms, the cost of each, and the verdict of every comparison.

Everything is computed from the records and the ablation's file; nothing is stored that could go stale beside them.
"""

import statistics as stats
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmarch.analysis import cost, roofline
from llmarch.build import build
from llmarch.errors import UserError, check
from llmarch.lab import records
from llmarch.lab.ablation import (
  ZERO,
  Ablation,
  Comparison,
  Trial,
  chosen_rates,
  config_differences,
  load_ablation,
  recorded,
  resolve,
  trials,
  tuning,
)
from llmarch.lab.statistics import INCONCLUSIVE, noise_floor, paired, verdict
from llmarch.run_config import RunConfig


def summarize(
  folder: str | Path, *, budget: str | None = None, out: str | Path | None = None, seeds: int | None = None
) -> dict | None:
  """The results of the ablation of `folder`, from the records of `out` (None: its own); None without any.

  budget: None is that of the newest record. seeds: None is the budget's, and no more count, however many are recorded:
  seeds cannot be added until a rule is met. Plain data: name, title, question, notes, budget, seeds, metric, baseline;
  arms: a row each (see `_arm`); comparisons: a row each (see `_compare`); hardware, versions, seconds, trials;
  stale: this budget's records of trials that the file, as it is, does not have; missing: trials without a record.
  """
  ablation, out = load_ablation(folder), out or folder
  rows = records.read(out)
  budget = budget or (rows[-1]["budget"] if rows else None)
  if not rows or budget not in {*ablation.budgets, *(row["budget"] for row in rows)}:
    return None
  current = records.latest(rows)
  plan = _plan(ablation, folder, budget, current, seeds)
  mine = recorded(plan, current)  # of any budget: trials of one config are one trial
  others = {key for key, row in current.items() if row["budget"] == budget} - {trial.key for trial in plan}
  if not mine and not others:
    return None
  main = [row for row in mine if row["phase"] == "main"]
  by_arm = {arm.name: [row for row in main if row["arm"] == arm.name] for arm in ablation.arms}
  differ = config_differences(ablation, folder, budget)
  return {
    "name": Path(folder).resolve().name,
    "folder": typed(folder),  # for commands in what is published, as `records` and `elsewhere`
    "records": typed(Path(out).parent) if Path(out).resolve() != Path(folder).resolve() else None,
    "elsewhere": is_elsewhere(folder),
    "title": ablation.title,
    "question": ablation.question,
    "notes": ablation.notes,
    "budget": budget,
    "seeds": seeds,
    "metric": ablation.metric,
    "baseline": ablation.baseline.name,
    "arms": [
      _arm(ablation, folder, budget, arm, by_arm[arm.name]) | {"differences": differ.get(arm.name, [])}
      for arm in ablation.arms
    ],
    "comparisons": [_compare(ablation, c, by_arm) for c in ablation.comparisons],
    "tuning": [
      {
        "arm": row["arm"],
        "learning_rate": row["overrides"]["optimizer.learning_rate"],
        "status": row["status"],
        ablation.metric: row["metrics"].get(ablation.metric),
      }
      for row in mine
      if row["phase"] == "tune"
    ],
    "hardware": sorted({row["hardware"] for row in main if "hardware" in row}),
    "workers": sorted({row["workers"] for row in main if "workers" in row}),
    "versions": next((row["versions"] for row in main if "versions" in row), {}),
    "seconds": sum(row.get("seconds", 0) for row in mine if "from" not in row),
    "trials": len(mine),
    "stale": len(others),
    "missing": len(plan) - len(mine),
  }


def is_elsewhere(folder: str | Path) -> bool:
  """True for an absolute path that does not lie in the working directory."""
  return Path(folder).is_absolute() and not Path(folder).resolve().is_relative_to(Path.cwd())


def typed(folder: str | Path) -> str:
  """A folder as one types it in the working directory; of an absolute one that lies elsewhere, no more than its name,
  because the folders above it are nobody's business."""
  if is_elsewhere(folder):
    return Path(folder).name
  return str(Path(folder).resolve().relative_to(Path.cwd())) if Path(folder).is_absolute() else str(folder)


def comparison(folder: str | Path, id: str, budget: str | None = None) -> dict | None:
  """One comparison of the ablation of `folder` (see `_compare`); None without records.

  Raises UserError for a comparison that is not there.
  """
  declared(folder, id)
  found = summarize(folder, budget=budget)
  return found and next(c for c in found["comparisons"] if c["id"] == id)


def declared(folder: str | Path, id: str) -> Comparison:
  """A comparison as its ablation's file has it. Raises UserError if it is not there."""
  known = {c.id: c for c in load_ablation(folder).comparisons}
  check(id in known, f"{folder} has no comparison {id!r} (known: {', '.join(known)})")
  return known[id]


def _plan(ablation: Ablation, folder, budget: str, current: Mapping[str, dict], seeds: int | None) -> list[Trial]:
  """The trials that the ablation describes: those of the tuning alone, while these are not done."""
  first = tuning(ablation, folder, budget)
  tried = recorded(first, current)
  if len(tried) < len(first):
    return first
  try:
    rates = chosen_rates(ablation, tried)
  except UserError:
    return first
  return first + trials(ablation, folder, budget, seeds=seeds, rates=rates)


def values(rows: Iterable[Mapping], metric: str) -> dict[int, float]:
  """{seed: value} of a metric, of the trials that have it; ZERO is the number for every seed."""
  if metric == ZERO:
    return {row["seed"]: 0.0 for row in rows}
  return {row["seed"]: float(row["metrics"][metric]) for row in rows if metric in row["metrics"]}


def _arm(ablation: Ablation, folder, budget: str, arm, rows: list[dict]) -> dict:
  """arm, n and failures (reasons), metrics {name: {mean, sd (None of one), n, values {seed: value}}}, curves and
  eval_curves {seed: [[step, loss], ...]}, step_ms {median, low, high} (of the seeds' medians, and the widest
  quartiles), cost (see `costs`), match, overrides, samples."""
  good = [row for row in rows if row["status"] == "ok"]
  names = dict.fromkeys(name for row in good for name in row["metrics"])
  config, overrides, match = resolve(ablation, folder, budget, arm)
  times = [row["step_ms"] for row in good if "step_ms" in row]
  overrides = good[0]["overrides"] if good else overrides  # the learning rate too, where it was chosen
  return {
    "arm": arm.name,
    "n": len(good),
    "failures": [f"seed {row['seed']}: {row['reason']}" for row in rows if row["status"] == "failed"],
    "metrics": {name: _spread(values(good, name)) for name in names},
    "curves": {row["seed"]: row["curve"] for row in rows if row.get("curve")},
    "eval_curves": {row["seed"]: row["eval_curve"] for row in rows if row.get("eval_curve")},
    "step_ms": {
      "median": stats.median(t["median"] for t in times),
      "low": min(t["low"] for t in times),
      "high": max(t["high"] for t in times),
    }
    if times
    else None,
    "cost": costs(build(RunConfig, config, "config")),
    "match": match,
    "overrides": overrides,
    "samples": {row["seed"]: row["sample"] for row in rows if row.get("sample")},
  }


def _spread(found: Mapping[int, float]) -> dict:
  numbers = list(found.values())
  sd = stats.stdev(numbers) if len(numbers) > 1 else None
  return {"mean": stats.fmean(numbers), "sd": sd, "n": len(numbers), "values": dict(found)}


def costs(config: RunConfig) -> dict:
  """Costs of an arm by formula: params, active_params, train_flops_per_token, state_bytes_per_token (by which one
  more token lengthens the decoding state), state_bytes (of a row of train.seq_len), decode_ms {chip: milliseconds of a
  token, batch 1, a lower bound}."""
  model, length = config.model, config.train.seq_len
  return {
    "params": cost.params(model)["total"],
    "active_params": cost.active_params(model),
    "train_flops_per_token": cost.train_flops_per_token(model, length),
    "state_bytes_per_token": cost.kv_bytes_per_token(model, cost.BYTES[model.precision.state]),
    "state_bytes": cost.state_bytes(model, 1, length),
    "decode_ms": roofline.decode_ms_at(model, batch=1, context=length),
  }


def _compare(ablation: Ablation, c: Comparison, by_arm: Mapping[str, list[dict]]) -> dict:
  """id, statement, rule, arm, baseline, metric, baseline_metric; n pairs, effect, low, high; floor; verdict, and why
  where numbers are missing."""
  other, side = c.baseline or ablation.baseline.name, c.baseline_metric or c.metric
  good = lambda name: [row for row in by_arm[name] if row["status"] == "ok"]
  effect = paired(values(good(c.arm), c.metric), values(good(other), side))
  # Two metrics of the same weights: the noise is that arm's own.
  runs = values(good(c.arm if c.arm == other else ablation.baseline.name), c.metric)
  floor = noise_floor(list(runs.values()))
  rows = [*by_arm[c.arm], *by_arm[other]]
  failed = list(dict.fromkeys(row["arm"] for row in rows if row["status"] == "failed"))
  unknown = [m for name, m in ((c.arm, c.metric), (other, side)) if good(name) and not values(good(name), m)]
  why = f"trials of {' and '.join(failed)} failed" if failed else "" if effect.n else "not run"
  why = f"{unknown[0]} is not recorded" if unknown else why
  return {
    "id": c.id,
    "statement": c.statement,
    "rule": c.rule,
    "arm": c.arm,
    "baseline": other,
    "metric": c.metric,
    "baseline_metric": side,
    "expect": c.expect,
    "by": c.by,
    "to": c.to,
    "n": effect.n,
    "effect": effect.mean if effect.n else None,
    "low": effect.low,
    "high": effect.high,
    "values": list(effect.values),
    "floor": floor if floor != float("inf") else None,
    "verdict": verdict(effect, floor, c.expect, c.by, c.to) if effect.n else INCONCLUSIVE,
    "why": why,
  }
