"""`llmarch report`: experiments or runs as one page without network, and as the READMEs of their folders."""

import json
import sys
from pathlib import Path

from absl import flags

from llmarch.commands.common import parse_words
from llmarch.config import UserError, check

USAGE = """llmarch report FOLDER [FOLDER ...] [--flags]

  llmarch report experiments --out=runs/report.html       all experiments
  llmarch report experiments --readme                     and a README with figures in each folder
  llmarch report runs/tiny runs/mqa                       runs of llmarch train, side by side"""


def _define(values: flags.FlagValues) -> None:
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=values)
  text("out", "report.html", "the page")
  text("budget", None, "of experiments (default: that of the newest record)")
  text("records", None, "folder of folders with the records, in place of the experiments' own")
  flags.DEFINE_bool("readme", False, "write README.md and figures beside the records, and VERDICTS.md", values)
  flags.DEFINE_bool("json", False, "print what the page shows as JSON, and write nothing", values)


def main(argv: list[str]) -> int:
  args, folders = parse_words(argv, _define, USAGE)
  check(bool(folders), "report on what? Give experiments/NAME, experiments, or folders of runs")
  runs = [folder for folder in folders if (Path(folder) / "metrics.jsonl").is_file()]
  if runs:
    other = next((folder for folder in folders if folder not in runs), None)
    check(other is None, f"{other} is no run, and {runs[0]} is one; report on either")
    return _runs(runs, args)
  return _ablations(folders, args)


def _ablations(folders: list[str], args) -> int:
  from llmarch.lab import results, runner
  from llmarch.report import page, readme

  found = {}
  for folder in runner.find(folders):
    out = Path(args.records) / Path(folder).name if args.records else Path(folder)
    summary = results.summarize(folder, budget=args.budget, out=out)
    if summary:
      found[out] = summary
  if not found:
    which = f" of budget {args.budget}" if args.budget else ""
    raise UserError(f"{folders[0]} has no records{which}; run llmarch ablate {folders[0]} first")
  summaries = list(found.values())
  if args.json:
    print(json.dumps(summaries, indent=1))
    return 0
  if args.readme:
    for out, summary in found.items():
      print(readme.write_readme(summary, out))
    if len(found) > 1:
      print(readme.write_verdicts(summaries, args.records or folders[0]))
  sections = [page.ablation(summary) for summary in summaries]
  title = summaries[0]["title"] if len(found) == 1 else "Experiments"
  _write(args.out, page.page(title, sections, page.index(summaries) if len(found) > 1 else ""))
  return 0


def _runs(folders: list[str], args) -> int:
  from llmarch.config import differences, to_dict
  from llmarch.lab.trial import read_rows, summary
  from llmarch.report import page
  from llmarch.train.workdir import read_config

  configs = [read_config(folder) for folder in folders]
  found = []
  for folder, config in zip(folders, configs):
    rows = read_rows(Path(folder) / "metrics.jsonl")
    check(bool(rows), f"{folder}/metrics.jsonl has no rows yet; train on, or leave the run out")
    s = summary(rows, config.train.batch_size * config.train.seq_len)
    found.append(
      {
        "name": Path(folder).name if len({Path(f).name for f in folders}) == len(folders) else folder,
        "curve": s["curve"],
        "eval_curve": s["eval_curve"],
        "last": {"step": rows[-1]["step"], **s["metrics"], "ms a step": s.get("step_ms", {}).get("median")},
        "differences": differences(to_dict(config), to_dict(configs[0])),
      }
    )
  if args.json:
    print(json.dumps(found, indent=1))
    return 0
  _write(args.out, page.page("Runs", [page.runs(found)]))
  return 0


def _write(path: str, text: str) -> None:
  try:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
  except OSError as e:
    raise UserError(f"--out: cannot write {path} ({e.strerror}); give a file that can be written") from None
  print(f"{path} ({len(text.encode()) / 1e6:.2f} MB)")


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["report", *sys.argv[1:]]))
