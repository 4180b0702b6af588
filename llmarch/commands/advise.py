"""`llmarch advise`: which published architecture serves a task in the memory there is, by formula; nothing runs."""

import json
import re
import sys
from pathlib import Path

from absl import flags

from llmarch.commands.common import parse_flags, print_table, short, short_bytes
from llmarch.errors import UserError

USAGE = """llmarch advise --task=generate|understand|transform --context=N (--memory=SIZE | --hardware=CHIP) [--json]

  llmarch advise --task=generate --context=16384 --memory=48GB --weights=int4
  llmarch advise --task=generate --context=32768 --hardware=h100 --chips=2 --batch=8 --kv=int8

  Sizes count weights and decoding state, not activations; of chips, 95 % are usable. Speeds are lower bounds."""

UNITS = {"": 1, "b": 1} | {f"{p}{b}": n**i for b, n in (("b", 1000), ("ib", 1024)) for i, p in enumerate("kmgt", 1)}

NOTES = (
  "one row for each kind of architecture, the first of it by the ranking; --json has all that fit",
  "sizes are weights and decoding state; activations and the workspace of programs come on top",
)
SPEED_NOTE = (
  "ms and tokens/s are a roofline's bounds: peaks, no kernels, work split evenly over the chips, links free; for dense"
  " attention models llmarch plan prices layouts"
)


def _define(values: flags.FlagValues) -> None:
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=values)
  number = lambda name, default, help: flags.DEFINE_integer(name, default, help, flag_values=values)
  text("task", None, "generate, understand or transform")
  number("context", None, "tokens of a sequence, read and written together")
  text("memory", None, "bytes for weights and state: 48GB, 80GiB or a number (default: 95 % of the chips')")
  text("hardware", None, "chip of the hardware table; without it there are no speeds")
  number("chips", 1, "number of chips")
  number("batch", 1, "sequences at a time")
  text("weights", "bfloat16", "bfloat16, or a format such as int8 or int4")
  text("kv", "bfloat16", "keys and values: bfloat16, int8 or fp8")
  number("top", 5, "kinds of architecture to show")
  text("experiments", "experiments", "folder of the claims and their records")
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """Runs `llmarch advise`; returns its exit code."""
  args = parse_flags(argv, _define, USAGE)
  for name, example in (("task", "generate"), ("context", "8192")):
    if args[name].value is None:
      raise UserError(f"--{name} is missing; give it, such as --{name}={example}")
  if args.top < 1:
    raise UserError(f"--top must be at least 1, got {args.top}")
  if args["experiments"].present and not Path(args.experiments).is_dir():
    raise UserError(f"--experiments: there is no folder {args.experiments}; give one with experiments, or leave it out")
  from llmarch.analysis import advise

  memory = None if args.memory is None else parse_bytes(args.memory)
  request = advise.Request(
    args.task, args.context, memory, args.hardware, args.chips, args.batch, args.weights, args.kv
  )
  advice = advise.advise(request)
  verdicts = _verdicts(args.experiments, _claims(advice))
  notes = [
    advise.TASKS[request.task].note,
    f"ranked: {advise.RANKING}",
    *NOTES,
    *([SPEED_NOTE] if args.hardware else []),
  ]
  if args.json:
    print(json.dumps(_as_dict(request, advice, verdicts, notes), indent=1))
  else:
    _print(request, advice, advise.best_of_each_kind(advice.options)[: args.top], verdicts, notes)
  return 0


def parse_bytes(text: str) -> float:
  """ "80GiB" is 80 * 2^30, "48 GB" 48 * 10^9, "1024" as it is. Raises UserError for anything else."""
  number = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
  if number is None or number[2] not in UNITS:
    raise UserError(f"--memory: cannot read {text!r}; give bytes, or a number with a unit such as 80GiB or 48GB")
  return float(number[1]) * UNITS[number[2]]


def _claims(advice) -> list[str]:
  """The names of all claims that the answer mentions."""
  losses = [loss for option in advice.options for loss in option.loses] + [branch.loses for branch in advice.branches]
  return sorted({claim for loss in losses for claim in loss.claims})


def _print(request, advice, shown, verdicts, notes) -> None:
  if shown:
    title = f"{request.task}, {request.context:,} tokens x {request.batch} in {short_bytes(request.budget)}"
    print_table(
      [_row(option, request) for option in shown], False, title=f"{title}: presets that fit: {len(advice.options)}"
    )
    common = [loss for loss in shown[0].loses if all(loss in option.loses for option in shown)]
    for name, lost in [("all of them lose", common)] + [(f"{o.name} loses", _without(o.loses, common)) for o in shown]:
      if lost:
        print("\n  ".join([f"\n{name}", *(_sentence(loss, verdicts) for loss in lost)]))
    print()
    rows = [
      {"change": b.change, **_sizes(b.option, request), "loses": _sentence(b.loses, verdicts)} for b in advice.branches
    ]
    print_table(rows, False, title=f"the forks of {shown[0].name}, each alone (of the architecture: to be trained)")
  if advice.changes:
    print("\nnothing fits within its published context; the least change first:")
    for change in advice.changes:
      o = change.option
      print(f"  {change.flags}: {o.name}, {short_bytes(o.weight_bytes)} + {short_bytes(o.state_bytes)}")
  elif not any(not option.beyond for option in advice.options):
    print(f"\nno preset was published for {request.context:,} tokens; give a smaller --context")
  print()
  for note in notes:
    print(f"note: {note}")


def _without(losses, others) -> list:
  return [loss for loss in losses if loss not in others]


def _row(option, request) -> dict:
  params = short(option.params)
  if option.active_params < option.params:
    params += f" ({short(option.active_params)} active)"
  return {"preset": option.name, "kind": option.kind, "params": params, **_sizes(option, request)}


def _sizes(option, request) -> dict:
  found = {
    "weights": short_bytes(option.weight_bytes),
    "state": short_bytes(option.state_bytes),
    "together": short_bytes(option.bytes),
  }
  if option.seconds is None:
    return found
  each = "ms/token at least" if option.state_bytes else "ms/text at least"
  return found | {each: f"{1e3 * option.seconds:.3g}", "tokens/s at most": f"{option.tokens_per_s:,.0f}"}


def _sentence(loss, verdicts) -> str:
  claims = ", ".join(f"{claim}: {verdicts[claim]}" for claim in loss.claims)
  return loss.what + (f" ({claims})" if claims else "")


def _as_dict(request, advice, verdicts, notes) -> dict:
  option = lambda o: {**o._asdict(), "bytes": o.bytes, "loses": [loss._asdict() for loss in o.loses]}
  return {
    "request": {**vars(request), "budget": request.budget},
    "options": [option(o) for o in advice.options],
    "refused": [r._asdict() for r in advice.refused],
    "branches": [{"change": b.change, "option": option(b.option), "loses": b.loses._asdict()} for b in advice.branches],
    "changes": [{"flags": c.flags, "option": option(c.option)} for c in advice.changes],
    "claims": verdicts,
    "notes": notes,
  }


def _verdicts(folder: str, names: list[str]) -> dict[str, str]:
  """The verdict on each claim by the records under a folder of experiments; "no record" if there are none."""
  found = {}
  for name in names:
    ablation, _, comparison = name.partition("/")
    found[name] = "no record"
    if (Path(folder) / ablation / "records.jsonl").is_file():
      from llmarch.lab import results

      row = results.comparison(Path(folder) / ablation, comparison)
      found[name] = row["verdict"] if row else found[name]
  return found


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["advise", *sys.argv[1:]]))
