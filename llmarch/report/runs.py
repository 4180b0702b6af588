"""The part of a page that shows runs of `llmarch train` side by side: their curves, their ends, what differs."""

import math
import shlex
from collections.abc import Mapping, Sequence

from llmarch.lab.trial import thinned
from llmarch.report import charts
from llmarch.report.page import differences, esc, table
from llmarch.report.plots import need_altair
from llmarch.train.metrics import clock

AXES = {"step": "steps", "tokens": "tokens", "time": "time"}  # what curves may be drawn over
METRICS = {"loss": "validation loss", "train_loss": "training loss", "bits_per_byte": "bits per byte",
           "max_grad_norm": "largest gradient norm"}  # fmt: skip
LOSSES = {"loss": "training loss (nats)", "eval/loss": "validation loss (nats)"}
POINTS = 200  # of a curve, at most
UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def moments(rows: Sequence[Mapping], tokens_per_step: int) -> list[dict]:
  """A row for each step that a run wrote of, ascending: step, tokens, time (seconds, None if unknown), and the losses.

  Training and evaluation write rows of their own for one step; here they are one. Of a step that was done twice, what
  was written last counts. Numbers that are not finite are left out.
  """
  found: dict[int, dict] = {}
  is_number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
  for row in rows:
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
      continue
    losses = {name: row[name] for name in LOSSES if is_number(row.get(name))}
    if not losses:
      continue
    one = found.setdefault(step, {"step": step, "tokens": step * tokens_per_step, "time": None})
    given = {"tokens": row.get("tokens"), "time": row.get("seconds")}
    one |= {name: value for name, value in given.items() if is_number(value)} | losses
  return [found[step] for step in sorted(found)]


def section(found: Sequence[Mapping], x: str, command: str) -> str:
  """The HTML of runs. found: {"run" (a name), "rows" (moments), "last", "differences"}; x: the axis shown first."""
  drawn = {axis: panels for axis in AXES if (panels := curves(found, axis))}
  x = x if x in drawn else next(iter(drawn), x)
  figures = "".join(
    f'<figure data-x="{axis}"{"" if axis == x else " hidden"}>{charts.svg(charts.finish(panel), f"runs-{axis}-{i}")}'
    "</figure>"
    for axis, panels in drawn.items()
    for i, panel in enumerate(panels)
  )
  return "\n".join(
    [
      "<section>",
      _choice(drawn, x),
      f'<div class="figures">{figures}</div>' if figures else "",
      table([_last(r) for r in found], sortable=True, caption="the end of each"),
      table(differences(found, "run"), caption=f"what differs from the config of {found[0]['run']}"),
      *map(_details, found),
      f"<pre class=command>{esc(command)}</pre></section>",
    ]
  )


def _details(r: Mapping) -> str:
  return f"<details><summary>{esc(r['run'])}, step by step</summary>{table(_shown(r['rows']))}</details>"


def _choice(axes: Mapping, chosen: str) -> str:
  """Radio buttons for the axis that curves are drawn over."""
  if len(axes) < 2:
    return ""
  button = lambda axis: f'<input type="radio" name="x" value="{axis}"{" checked" if axis == chosen else ""}>'
  labels = " ".join(f"<label>{button(axis)} {esc(AXES[axis])}</label>" for axis in axes)
  return f'<fieldset class="choice"><legend>curves over</legend>{labels}</fieldset>'


def _last(r: Mapping) -> dict:
  """A row of the table of ends."""
  last, step, time = r["last"], r["last"].get("step_ms"), r["last"]["time"]
  spread = step and (step["median"], f"{step['median']:.3g} [{step['low']:.3g}, {step['high']:.3g}]")
  metrics = {title: last.get(name) for name, title in METRICS.items()}
  where = {"steps": last["step"], "tokens": last["tokens"], "time": time and (time, clock(time))}
  return {"run": r["run"], **metrics, **where, "ms a step [quartiles]": spread}


def _shown(rows: Sequence[Mapping]) -> list[dict]:
  """At most POINTS rows of the table of a run, with a cell for every column."""
  cell = lambda row, name: row.get(name) if name != "time" or row[name] is None else (row[name], clock(row[name]))
  names = {"step": "step", "loss": "training loss", "eval/loss": "validation loss", "tokens": "tokens", "time": "time"}
  return [{title: cell(row, name) for name, title in names.items()} for row in thinned(list(rows), POINTS)]


def curves(found: Sequence[Mapping], x: str) -> list:
  """The charts of runs over an axis of AXES, one for each loss that has two points."""
  summary = {"arms": [{"arm": r["run"]} for r in found]}
  panels = {name: curve_rows(found, name, x) for name in LOSSES}
  panels = {name: rows for name, rows in panels.items() if len({row["at"] for row in rows}) > 1}
  if not panels:
    return []
  alt = need_altair()
  size, unit = _unit(found) if x == "time" else (1.0, "")
  title = f"{AXES[x]} ({unit})" if unit else AXES[x]
  axis = alt.Axis(tickCount=4, format="~s") if x == "tokens" else alt.Axis(tickCount=4)
  drawn = []
  for name, rows in panels.items():
    rows = [row | {"at": row["at"] / size} for row in rows]
    at = alt.X("at:Q", title=title, axis=axis, scale=alt.Scale(nice=False))
    drawn.append(charts.lines(summary, rows, at, LOSSES[name], points=len(rows) <= 20 * len(found)))
  return drawn


def figure(found: Sequence[Mapping], x: str):
  """The charts of `curves` as one, below each other; None without any."""
  panels = curves(found, x)
  return charts.finish(need_altair().vconcat(*panels)) if panels else None


def curve_rows(found: Sequence[Mapping], name: str, x: str) -> list[dict]:
  """{arm, at, mean, low, high} of a loss over an axis, for each run that has both."""
  rows = []
  for r in found:
    points = [(row[x], row[name]) for row in r["rows"] if name in row and row[x] is not None]
    rows += [{"arm": r["run"], "at": at, "mean": y, "low": y, "high": y} for at, y in thinned(points, POINTS)]
  return rows


def _unit(found: Sequence[Mapping]) -> tuple[float, str]:
  """The largest unit of which the longest run has two."""
  longest = max((row["time"] or 0.0 for r in found for row in r["rows"]), default=0.0)
  return next(((size, unit) for size, unit in UNITS if longest >= 2 * size), UNITS[-1])


def command(folders: Sequence[str], x: str) -> str:
  """The command that makes the page again."""
  return f"llmarch report {shlex.join(folders)}" + (f" --x={x}" if x != "step" else "")

