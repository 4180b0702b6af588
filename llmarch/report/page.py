"""A page that compares ablations, or runs: one HTML file that needs no network and runs no chart library."""

import html
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources

from llmarch.lab.statistics import OPPOSITE, SUPPORTED, tally
from llmarch.report import charts

esc = lambda value: html.escape(str(value), quote=True)
FOLDERS = re.compile(r"(?<![\w.:/<-])/(?:[\w.+-]+/)+")  # of an absolute path


def page(title: str, sections: Sequence[str], index: str = "") -> str:
  """The document around sections of HTML; what they show of users' text is escaped by then."""
  read = lambda name: resources.files("llmarch.report").joinpath(name).read_text()
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<style>\n{read('page.css')}</style></head>\n<body><main><h1>{esc(title)}</h1>\n{index}"
    + "\n".join(sections)
    + f"\n</main><script>\n{read('page.js')}</script></body></html>\n"
  )


def index(summaries: Sequence[Mapping]) -> str:
  """A row for each ablation: its question, and how its comparisons came out."""
  rows = []
  for s in summaries:
    rows.append(
      {
        "experiment": _Raw(f'<a href="#{esc(s["name"])}">{esc(s["title"])}</a>'),
        "verdicts": tally(c["verdict"] for c in s["comparisons"]) or "-",
        "question": s["question"],
        "trials": s["trials"],
      }
    )
  return f"<section><h2>Questions and verdicts</h2>{table(rows)}</section>\n"


MORE = '<p class="more">more columns to the right: scroll the table</p>'


class _Raw(str):
  """Text that is HTML already."""


def table(rows: Sequence[Mapping], *, sortable: bool = False, caption: str = "") -> str:
  """Rows of equal keys. Numbers are right-aligned and sort as numbers; sortable ones get a filter box."""
  if not rows:
    return ""
  keys = list(rows[0])
  head = "".join(_head(key, sortable, any(_is_number(row[key]) for row in rows)) for key in keys)
  body = "\n".join("<tr>" + "".join(_cell(row[key]) for key in keys) + "</tr>" for row in rows)
  box = '<label class="filter">filter <input type="search"></label>' if sortable and len(rows) > 3 else ""
  title = f"<caption><span>{esc(caption)}</span></caption>" if caption else ""
  inner = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
  region = f'role="region" tabindex="0" aria-label="{esc(caption or "table")}"'  # so that the keyboard scrolls it
  return f'<div class="tablebox">{box}<div class="scroll" {region}>{inner}</div>{MORE}</div>'


def _head(key: str, sortable: bool, number: bool) -> str:
  name = f'<button type="button">{esc(key)}</button>' if sortable else esc(key)
  look = " ".join(["number"] * number + ["long"] * (len(key) > 16))
  return f'<th scope="col" class="{look}"{" aria-sort=none" if sortable else ""}>{name}</th>'


def _is_number(value) -> bool:
  return isinstance(value, (int, float, tuple)) and not isinstance(value, bool)


def _cell(value) -> str:
  if isinstance(value, _Raw):
    return f"<td>{value}</td>"
  if isinstance(value, tuple):  # (number to sort by, what is shown)
    return f'<td class="number" data-value="{esc(_script(value[0]))}">{esc(value[1])}</td>'
  if value is None:
    return '<td class="number">-</td>'
  if _is_number(value):
    return f'<td class="number" data-value="{esc(_script(value))}">{esc(number(value))}</td>'
  return f'<td class="{"long" if len(str(value)) > 24 else ""}">{esc(value)}</td>'


def _script(value: float) -> str:
  """A number as JavaScript reads it."""
  return str(value).replace("inf", "Infinity") if math.isinf(value) else str(value)


def number(value: float | None) -> str:
  """Four digits; whole numbers in full."""
  if value is None:
    return "-"
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def interval(c: Mapping) -> str:
  """Returns the confidence interval of a comparison as text, "-" where there is none."""
  return "-" if c["low"] is None else f"[{c['low']:.3g}, {c['high']:.3g}]"


def public(text: str) -> str:
  """Without the folders of absolute paths, which are nobody's business."""
  return FOLDERS.sub("", text)


def failures(s: Mapping) -> list[str]:
  """A line for each trial that failed."""
  return [public(f"{arm['arm']}, {why}") for arm in s["arms"] for why in arm["failures"]]


def ablation(summary: Mapping, *, alone: bool = False) -> str:
  """The section of one ablation. alone: the page's title is its own."""
  s, id = summary, esc(summary["name"])
  drawn = {name: chart for name, make in charts.CHARTS.items() if (chart := make(s)) is not None}
  figures = "".join(
    f"<figure>{charts.svg(chart, f'{id}-{name}')}<figcaption>{CAPTIONS[name]}</figcaption></figure>"
    for name, chart in drawn.items()
  )
  samples = "".join(
    f"<details><summary>{esc(arm['arm'])}, seed {esc(seed)}</summary><pre>{esc(text)}</pre></details>"
    for arm in s["arms"]
    for seed, text in arm["samples"].items()
  )
  parts = [
    f'<section id="{id}">' + ("" if alone else f"<h2>{esc(s['title'])}</h2>"),
    f'<p class="question">{esc(s["question"])}</p>',
    f"<p>{esc(s['notes'])}</p>" if s["notes"] else "",
    _loud("trials that failed", failures(s)),
    _loud("what is missing", _missing(s)),
    table([_comparison(c) for c in s["comparisons"]], caption="comparisons, and the rules that were written before"),
    f'<div class="figures">{figures}</div>',
    table(arms(s), sortable=True, caption="arms: means over seeds, ± one deviation; costs by formula"),
    table(differences(s["arms"], "arm"), caption=f"what differs from the config of {s['baseline']}"),
    table(s["tuning"], caption="learning rates that were tried"),
    f"<h3>Samples</h3>{samples}" if samples else "",
    f"<p class=where>{esc(where(s))}</p>",
    f"<pre class=command>{esc(commands(s))}</pre></section>",
  ]
  return "\n".join(part for part in parts if part)


CAPTIONS = {
  "curves": "The mean over seeds, and their range.",
  "effects": "Paired differences, with 95 % intervals; grey: what noise may reach; black: the rule's margin.",
  "layers": "Layer by layer: the mean, and one deviation over seeds.",
  "lengths": "Rows of more tokens than were trained on: the mean, and one deviation over seeds.",
  "costs": "Quality, one deviation over seeds, against each cost in which arms differ (times with quartiles); filled:"
  " no other arm is better and no dearer.",
}


def _loud(what: str, lines: Sequence[str]) -> str:
  if not lines:
    return ""
  items = "".join(f"<li>{esc(x)}</li>" for x in lines)
  return f'<div class="loud" role="note"><strong>{esc(what)}</strong><ul>{items}</ul></div>'


def _missing(s: Mapping) -> list[str]:
  found = [f"{s['missing']} trials have not run"] if s["missing"] else []
  stale = f"{s['stale']} records are of trials that the experiment, as it is, does not have; they do not count"
  return found + ([stale] if s["stale"] else [])


def _comparison(c: Mapping) -> dict:
  good = {SUPPORTED: "good", OPPOSITE: "bad"}.get(c["verdict"], "open")
  why = f" ({c['why']})" if c["why"] else ""
  return {
    "statement": c["statement"],
    "verdict": _Raw(f'<span class="verdict {good}">{esc(c["verdict"])}</span>{esc(why)}'),
    "effect": c["effect"],
    "95 % interval": None if c["low"] is None else (c["low"], interval(c)),
    "pairs": c["n"],
    "noise floor": c["floor"],
    "rule": c["rule"],
  }


def arms(s: Mapping) -> list[dict]:
  """A row an arm: seeds, each metric (the ablation's first), each cost."""
  names = metrics(s)
  rows = []
  for arm in s["arms"]:
    row = {"arm": arm["arm"], "seeds": arm["n"]}
    for name in names:
      m = arm["metrics"].get(name)
      row[name] = m and (m["mean"], number(m["mean"]) + ("" if m["sd"] is None else f" ± {m['sd']:.2g}"))
    cost, step = arm["cost"], arm["step_ms"]
    row |= {
      "parameters": cost["params"],
      "training FLOPs a token": int(cost["train_flops_per_token"]),
      "bytes of state a token": int(cost["state_bytes_per_token"]),
      "ms a step [quartiles]": step
      and (step["median"], f"{step['median']:.3g} [{step['low']:.3g}, {step['high']:.3g}]"),
    }
    row |= {f"ms a token on {chip}, at least": ms for chip, ms in cost["decode_ms"].items()}
    row["mismatch"] = arm["match"] and (
      arm["match"]["residual"],
      f"{arm['match']['residual']:+.2%} {arm['match']['quantity']}",
    )
    rows.append(row)
  return rows


def metrics(s: Mapping) -> list[str]:
  """The names of what was measured, the ablation's metric first; what was layer by layer has a chart instead."""
  names = dict.fromkeys(name for arm in s["arms"] for name in arm["metrics"] if not charts.LAYERS.match(name))
  return sorted(names, key=lambda name: name != s["metric"])


def differences(rows: Sequence[Mapping], key: str) -> list[dict]:
  """A row for each that differs: its name under `key`, and a list of how."""
  items = lambda lines: _Raw(f"<ul>{''.join(f'<li>{esc(public(line))}</li>' for line in lines)}</ul>")
  return [{key: row[key], "difference": items(row["differences"])} for row in rows if row["differences"]]


def where(s: Mapping) -> str:
  """Hardware, versions and cost of a sweep, in a line."""
  versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
  workers = "/".join(map(str, s["workers"])) or "?"
  hardware = "; ".join(s["hardware"]) or "unknown hardware"
  work = f"{s['trials']} trials, {s['seconds'] / 60:.1f} minutes of them together"
  above = f"; the commands are for the folder that holds {s['folder']}" if s["elsewhere"] else ""
  return f"{hardware}, {workers} trials at a time; {versions}; {work}; budget {s['budget']}{above}"


def commands(s: Mapping) -> str:
  """Returns the two commands that run an experiment and write its report, a line each."""
  what = f"{shlex.quote(s['folder'])} --budget={s['budget']}" + (f" --seeds={s['seeds']}" if s["seeds"] else "")
  place = lambda flag: f" --{flag}={shlex.quote(s['records'])}" if s["records"] else ""
  return f"llmarch ablate {what}{place('out')}\nllmarch report {what}{place('records')}"
