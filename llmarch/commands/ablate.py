"""`llmarch ablate`: runs the arms of experiments, records every trial once, and prints the verdicts of their rules."""

import sys
from pathlib import Path

from absl import flags

from llmarch.commands.common import parse_words, print_table
from llmarch.errors import check

USAGE = """llmarch ablate FOLDER [FOLDER ...] [--flags]

  llmarch ablate experiments/glu                          what is not recorded yet, in trials of half a minute
  llmarch ablate experiments --budget=tiny --out=runs/again     all experiments, recorded elsewhere
  llmarch ablate experiments/glu --budget=gpu --backend=slurm --gpus_per_trial=1"""


def _define(values: flags.FlagValues) -> None:
  def number(name, default, help, low=1):
    flags.DEFINE_integer(name, default, help, lower_bound=low, flag_values=values)

  flags.DEFINE_enum(
    "backend", "local", ["local", "slurm"], "this machine, or an array of Slurm jobs", flag_values=values
  )
  flags.DEFINE_string("budget", "tiny", "the sizes and steps, of those in the experiment's file", flag_values=values)
  number("seeds", None, "of every arm, in place of the budget's")
  number("workers", None, "trials at a time on this machine (default: one a GPU, else one a core, at most 8)")
  flags.DEFINE_string("out", None, "a folder for the records, in place of the experiments' own", flag_values=values)
  flags.DEFINE_bool("retry_failed", False, "try the trials again that failed", flag_values=values)
  flags.DEFINE_bool("keep", False, "keep the folders of finished trials (checkpoints, metrics)", flag_values=values)
  flags.DEFINE_bool("list", False, "print the trials and which are recorded, and run nothing", flag_values=values)
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)
  flags.DEFINE_string("partition", None, "Slurm: partition", flag_values=values)
  number("minutes", None, "Slurm: time limit of a trial (default: the budget's)")
  number("gpus_per_trial", None, "Slurm: GPUs of a trial")
  number("cpus_per_trial", 2, "Slurm: cores of a trial")
  number("parallel", 64, "Slurm: trials of an array that run at a time")


def main(argv: list[str]) -> int:
  """Raises UserError for what cannot be run. 1 if the last attempt of a trial failed, else 0."""
  args, folders = parse_words(argv, _define, USAGE)
  check(bool(folders), "which experiment? Give its folder, such as experiments/glu, or experiments for all")
  from llmarch.lab import ablation, results, runner

  found = ablation.find_ablations(folders)
  if args.list:
    rows = [row for folder in found for row in _planned(folder, args)]
    done = sum(row["recorded"] == "yes" for row in rows)
    print_table(rows, args.json, title=f"{len(rows)} trials of budget {args.budget}, {done} of them recorded")
    for folder in found:
      if few := ablation.too_few_seeds(ablation.load_ablation(folder), folder, args.budget, args.seeds):
        print(few, file=sys.stderr)
    return 0
  slurm = {k: args[k].value for k in ("partition", "minutes", "gpus_per_trial", "cpus_per_trial", "parallel")}
  check(args.out != "", "--out is empty; give a folder, or leave it out")
  sweeps = runner.run_all(
    found,
    budget=args.budget,
    out=args.out,
    seeds=args.seeds,
    workers=args.workers,
    backend=args.backend,
    retry_failed=args.retry_failed,
    keep=args.keep,
    slurm=slurm,
  )
  summaries = [results.summarize(s.folder, budget=args.budget, out=s.out, seeds=args.seeds) for s in sweeps]
  rows = [_verdict(s, c) for s in summaries if s for c in s["comparisons"]]
  if rows:
    print_table(rows, args.json)
  elif args.json:
    print("[]")
  failed = [f"{s['name']}: {arm['arm']}, {why}" for s in summaries if s for arm in s["arms"] for why in arm["failures"]]
  if failed:
    print("\n".join(failed), file=sys.stderr)
    print(f"llmarch: {len(failed)} trials failed; --retry_failed tries them again", file=sys.stderr)
  return 1 if failed else 0


def _planned(folder: str, args) -> list[dict]:
  """A row for each trial: what it is, and whether the records have it."""
  from llmarch.lab import ablation as ablations
  from llmarch.lab import records

  one = ablations.load_ablation(folder)
  rows = records.latest(records.read(Path(args.out) / Path(folder).resolve().name if args.out else folder))
  first = ablations.tuning(one, folder, args.budget)
  tried = ablations.recorded(first, rows)
  rates = ablations.chosen_rates(one, tried) if first and len(tried) == len(first) else {}
  plan = first + ablations.trials(one, folder, args.budget, seeds=args.seeds, rates=rates)
  state = lambda t: "-" if t.key not in rows else "yes" if rows[t.key]["status"] == "ok" else "failed"
  return [
    {
      "experiment": folder,
      "arm": t.arm,
      "seed": t.seed,
      "phase": t.phase,
      "recorded": state(t),
      "changes": ", ".join(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in t.overrides.items()) or "-",
      "mismatch": t.match and t.match["residual"],
      "key": t.key,
    }
    for t in plan
  ]


def _verdict(summary: dict, c: dict) -> dict:
  from llmarch.report.page import interval

  return {
    "experiment": summary["name"],
    "statement": c["statement"],
    "verdict": c["verdict"],
    "effect": c["effect"],
    "interval": interval(c),
    "pairs": c["n"],
    "noise floor": c["floor"],
    "why": c["why"] or None,
  }
