"""`llmarch report`: experiments or runs as one page without network, and as the READMEs of their folders."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from llmarch.commands.common import parse_words
from llmarch.errors import UserError, check

USAGE = """llmarch report FOLDER [FOLDER ...] [--flags]

  llmarch report experiments --out=runs/report.html       all experiments
  llmarch report experiments --readme                     and a README with figures in each folder
  llmarch report runs/tiny runs/mqa                       runs of llmarch train, side by side"""


def _define(values: flags.FlagValues) -> None:
  text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=values)
  text("out", "report.html", "the page")
  text("png", None, "folder for the charts as PNG too")
  text("budget", None, "of experiments (default: that of the newest record)")
  flags.DEFINE_integer("seeds", None, "of every arm, in place of the budget's", lower_bound=1, flag_values=values)
  text("records", None, "folder of folders with the records, in place of the experiments' own")
  what = "of runs: what their curves are drawn over, first on the page (which offers all) and in the PNG"
  flags.DEFINE_enum("x", "step", ["step", "tokens", "time"], what, flag_values=values)
  flags.DEFINE_bool("readme", False, "write README.md and figures beside the records, and VERDICTS.md", values)
  flags.DEFINE_bool("json", False, "print what the page shows as JSON, and write nothing", values)


def main(argv: list[str]) -> int:
  """Runs `llmarch report`; returns its exit code."""
  args, folders = parse_words(argv, _define, USAGE)
  check(bool(folders), "report on what? Give experiments/NAME, experiments, or folders of runs")
  runs = [folder for folder in folders if _is_run(folder)]
  if runs:
    other = next((folder for folder in folders if folder not in runs), None)
    check(other is None, f"{other} is no run, and {runs[0]} is one; report on either")
    return _runs(list({Path(folder).resolve(): folder for folder in runs}.values()), args)
  check(not args["x"].present, "--x is of runs of llmarch train, and these are experiments; leave it out")
  return _ablations(folders, args)


def _is_run(folder: str) -> bool:
  """Whether `llmarch train` has begun there."""
  from llmarch.lab.ablation import FILE

  here = Path(folder)
  return not (here / FILE).exists() and any((here / name).is_file() for name in ("metrics.jsonl", "config.json"))


def _ablations(folders: list[str], args) -> int:
  from llmarch.lab import results
  from llmarch.lab.ablation import find_ablations
  from llmarch.report import charts, page, readme

  below = {folder: _below(folder, find_ablations) for folder in folders}
  every, found = list(dict.fromkeys(f for inside in below.values() for f in inside)), {}
  for folder in every:
    name = Path(folder).resolve().name
    out = Path(args.records) / name if args.records else Path(folder)
    summary = results.summarize(folder, budget=args.budget, out=out, seeds=args.seeds)
    if summary:
      twice = next((f for f, s in found.items() if s["name"] == name), None)
      check(twice is None, f"{twice} and {folder} are both named {name}; report on one of them at a time")
      found[folder] = summary
  if not found:
    which = f" of budget {args.budget}" if args.budget else ""
    raise UserError(f"{folders[0]} has no records{which}; run llmarch ablate {folders[0]} first")
  for folder in every if args.budget else ():
    if folder not in found:
      print(f"llmarch: {folder} has no records of budget {args.budget}, and is left out", file=sys.stderr)
  summaries = list(found.values())
  if args.json:
    print(json.dumps(summaries, indent=1))
    return 0
  _need_charts()
  if args.readme:
    for folder, summary in found.items():
      print(readme.write_readme(summary, Path(args.records) / summary["name"] if args.records else folder))
    for parent, inside in below.items():
      if inside != [parent]:
        print(readme.write_verdicts([found[f] for f in inside if f in found], args.records or parent))
  if args.png:
    drawn = {f"{s['name']}-{name}": make(s) for s in summaries for name, make in charts.CHARTS.items()}
    _draw(drawn, args.png)
  alone = len(found) == 1
  sections = [page.ablation(summary, alone=alone) for summary in summaries]
  title = summaries[0]["title"] if alone else "Experiments"
  _write(args.out, page.page(title, sections, "" if alone else page.index(summaries)))
  return 0


def _below(folder: str, find) -> list[str]:
  """The ablations of a folder. Raises UserError for what is neither an experiment nor a run."""
  try:
    return find([folder])
  except UserError as e:
    raise UserError(f"{e}; or the folder of a run, which has a config.json") from None


def _runs(folders: list[str], args) -> int:
  from llmarch.build import differences, to_dict
  from llmarch.lab.results import typed
  from llmarch.lab.trial import read_rows, summary
  from llmarch.report import page
  from llmarch.report.runs import command, figure, moments, section
  from llmarch.train.workdir import read_config

  configs = [read_config(folder) for folder in folders]
  found = []
  for folder, name, config in zip(folders, distinct(folders), configs):
    rows = read_rows(Path(folder) / "metrics.jsonl")
    per_step = config.train.batch_size * config.train.seq_len
    check(bool(rows), f"{folder}/metrics.jsonl has no rows yet; train on, or leave the run out")
    s, points = summary(rows, per_step), moments(rows, per_step)
    check(bool(points), f"{folder}/metrics.jsonl has no loss yet; train on, or leave the run out")
    last = {name: points[-1][name] for name in ("step", "tokens", "time")}
    found.append(
      {
        "run": name,
        "rows": points,
        "last": last | s["metrics"] | ({"step_ms": s["step_ms"]} if "step_ms" in s else {}),
        "differences": differences(to_dict(config), to_dict(configs[0])),
      }
    )
  if args.json:
    print(json.dumps(found, indent=1))
    return 0
  _need_charts()
  if args.png:
    _draw({"runs-curves": figure(found, args.x)}, args.png)
  again = command([typed(folder) for folder in folders], args.x)
  _write(args.out, page.page("Runs", [section(found, args.x, again)]))
  return 0


def distinct(folders: list[str]) -> list[str]:
  """Shortens the names of different folders to as many of their last parts as tell them apart."""
  parts = [Path(folder).resolve().parts for folder in folders]
  depth = [1] * len(folders)
  name = lambda i: "/".join(parts[i][-depth[i] :])
  names = [name(i) for i in range(len(parts))]
  while len(set(names)) < len(names):
    counts = Counter(names)
    depth = [d + (counts[n] > 1) for d, n in zip(depth, names)]
    names = [name(i) for i in range(len(parts))]
  return names


def _need_charts() -> None:
  from llmarch.report.plots import need_altair

  need_altair()  # before anything is written


def _draw(drawn: Mapping, folder: str) -> None:
  from llmarch.report import charts

  try:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, chart in drawn.items():
      if chart is not None:
        charts.png(chart, Path(folder) / f"{name}.png")
        print(Path(folder) / f"{name}.png")
  except OSError as e:
    raise UserError(f"--png: cannot write {folder} ({e.strerror}); give a folder that can be written") from None


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
