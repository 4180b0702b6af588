"""`llmarch claims`: what papers and surveys say of architectures, how it is checked, and what came of it."""

import json
import sys
import textwrap

from absl import flags

from llmarch.commands.common import parse_words, print_table, terminal_width
from llmarch.errors import UserError, check, nearest

USAGE = """llmarch claims [--kind=KIND] [--status=STATUS] [--json]     the table, with what came of the last runs
       llmarch claims show ID                                      one claim whole
       llmarch claims run ID|facts|tests|measured|all [...]        checks it, and records what came out

  llmarch claims run facts                    all that formulas decide, in seconds
  llmarch claims run rmsnorm-same-quality     runs what its experiment has not recorded yet
  llmarch claims --status=refuted"""


def _define(values: flags.FlagValues) -> None:
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=values)
  text("file", "experiments/claims.py", "the registry; what came out lies beside it")
  text("kind", None, "exact, cost or direction")
  text("status", None, "holds, refuted, supported, 'not run' ...")
  text("budget", None, "of experiments: tiny, small or gpu (default: the claim's)")
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """1 if a test that was run fails; Raises UserError for an unknown claim, kind or status."""
  args, words = parse_words(argv, _define, USAGE)
  from llmarch.lab import claims

  if args.budget not in (None, "tiny", "small", "gpu"):
    raise UserError(f"--budget: there is no {args.budget!r}; give tiny, small or gpu")
  verb, *ids = words or ["table"]
  check(verb in ("table", "show", "run"), f"llmarch claims: {verb!r} is no verb{nearest(verb, ('show', 'run'))}")
  for name, known in (("kind", claims.KINDS), ("status", claims.STATUSES)):
    value = args[name].value
    check(value is None or value in known, f"--{name}: there is no {value!r}{nearest(str(value), known)}")
  found = claims.load_claims(args.file)
  if verb == "run":
    return _run(claims, found, ids, args)
  if verb == "show":
    return _show(claims, found, ids, args)
  rows = claims.status(found, _folder(args.file), budget=args.budget)
  rows = [r for r in rows if args.kind in (None, r["kind"]) and args.status in (None, r["status"])]
  if args.json:
    print(json.dumps(rows, indent=1))
  elif rows:
    print_table([{k: r[k] for k in ("id", "status", "statement", "kind", "check")} for r in rows], False)
  if not args.json:
    _print_counts(rows)
  return 0


def _folder(file: str):
  from pathlib import Path

  return Path(file).parent


def _print_counts(rows: list[dict]) -> None:
  from llmarch.lab.statistics import tally

  words = f"{len(rows)} claims: {tally(r['status'] for r in rows)}"
  print("\n" + "\n".join(textwrap.wrap(words, max(terminal_width(), 20))))


def _run(claims, found, ids: list[str], args) -> int:
  check(bool(ids), "llmarch claims run what? Give ids, or facts, tests, measured or all")
  rows = []
  for claim in claims.select(found, ids):
    row = claims.run(claim, _folder(args.file), budget=args.budget)
    rows.append({"id": claim.id, "status": row["status"], "evidence": row["evidence"], "seconds": row["seconds"]})
    if not args.json:
      print(f"{claim.id}: {row['status']} ({row['evidence']})", flush=True)
  if args.json:
    print(json.dumps(rows, indent=1))
  else:
    _print_counts(rows)
  return int(any(r["status"] == claims.FAILS for r in rows))


def _show(claims, found, ids: list[str], args) -> int:
  if len(ids) != 1:
    raise UserError("llmarch claims show which one? Give one id")
  claim = claims.find(found, ids[0])
  (row,) = claims.status([claim], _folder(args.file), budget=args.budget)
  what = {
    "claim": claim.id,
    "statement": claim.statement,
    "source": claim.source,
    "stated by": "; ".join(claim.stated_by) or "-",
    "kind": claim.kind,
    "check": claim.how,
    "rule": claims.rule(claim, _folder(args.file)),
    "expected": claim.expected or "-",
    "status": row["status"],
    "evidence": row["evidence"] or "-",
    "command": f"llmarch claims run {claim.id}",
  }
  print(json.dumps(what, indent=1) if args.json else "\n".join(f"{k:10} {v}" for k, v in what.items()))
  return 0


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["claims", *sys.argv[1:]]))
