"""Charts of an ablation's summary (lab/results.py): curves, effects, quality against cost, what was measured by length
or by layer.

Each function gives an altair chart, or None where the summary has nothing for it. The same charts become the SVG of a
page and the PNG of a README. A chart is about 400 pixels wide, so that its letters are of 11 pixels on a phone; arms
are named beside their marks, and verdicts in words, so that nothing is told by colour alone.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.optimize import isotonic_regression

from llmarch.lab.ablation import ZERO
from llmarch.report.plots import need_altair

# Okabe and Ito's colours, which colour-blind readers tell apart (black last).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A00", "#000000")
VERDICTS = {
  "supported": ("#009E73", "circle"),
  "not supported": ("#D55E00", "square"),
  "opposite": ("#CC79A7", "triangle-down"),
  "inconclusive at this scale": ("#777777", "diamond"),
}
INK = "#222222"
WIDTH = 330  # pixels of a plot and of the names beside it, at scale 1
LETTER, LINE, LIMIT = 6.9, 15, 140  # pixels, of names: an average letter's width, a line's height, the longest
DOT = 9  # pixels from a point to its name
LENGTHS, LAYERS = re.compile(r"^(.*)_(\d+)x(.*)$"), re.compile(r"^(.*)\[(\d+)\](.*)$")  # of metrics' names
MATCHED = 0.02  # costs closer than this are called equal, as Match does


# ---------------------------------------------------------------------------------------------------- curves


def curves(summary: Mapping):
  """The metric over steps on held-out text (or the training loss): the mean over seeds, and their range as a band."""
  which = "eval_curves" if any(arm["eval_curves"] for arm in summary["arms"]) else "curves"
  rows = curve_rows(summary, which)
  if len({row["step"] for row in rows}) < 2:
    return None
  alt = need_altair()
  title = "validation loss (nats)" if which == "eval_curves" else "training loss (nats)"
  return finish(lines(summary, rows, alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4)), title))


def curve_rows(summary: Mapping, which: str) -> list[dict]:
  """{arm, step, mean, low, high} over the seeds that have the step with a finite number; of a step that a run did
  twice, the last counts."""
  rows = []
  for arm in summary["arms"]:
    at: dict[int, list[float]] = {}
    for points in arm[which].values():
      for step, value in dict(map(tuple, points)).items():
        if math.isfinite(value):
          at.setdefault(step, []).append(value)
    for step, values in sorted(at.items()):
      mean = sum(values) / len(values)
      rows.append({"arm": arm["arm"], "step": step, "mean": mean, "low": min(values), "high": max(values)})
  return rows


def lengths(summary: Mapping):
  """Metrics measured at multiples of the trained length, a panel each: a line an arm, over the multiple."""
  return _series(summary, LENGTHS, "times the trained length", {"type": "log", "base": 2})


def layers(summary: Mapping):
  """Metrics measured layer by layer, a panel each: a line an arm, over the layer."""
  return _series(summary, LAYERS, "layer", {"nice": False})


def _series(summary: Mapping, pattern: re.Pattern, title: str, scale: dict):
  rows = series_rows(summary, pattern)
  if not rows:
    return None
  alt = need_altair()
  charts = []
  for name in dict.fromkeys(row["metric"] for row in rows):
    own = [row for row in rows if row["metric"] == name]
    ticks = sorted({row["at"] for row in own})
    axis = alt.Axis(values=ticks if len(ticks) < 10 else ticks[3::4])
    x = alt.X("at:Q", title=title, scale=alt.Scale(**scale), axis=axis)
    charts.append(lines(summary, own, x, name, points=True))
  return finish(alt.vconcat(*charts))


def series_rows(summary: Mapping, pattern: re.Pattern) -> list[dict]:
  """{arm, metric, at, mean, low, high (one deviation)} of metrics such as loss_4x, loss_8x (or loss_4x_ntk), or
  gradient[1], gradient[2]: those at two places or more."""
  rows = []
  for arm in summary["arms"]:
    for name, m in arm["metrics"].items():
      match = pattern.match(name)
      if match and math.isfinite(m["mean"]):
        spread = m["sd"] or 0.0
        row = {"arm": arm["arm"], "metric": match[1] + match[3], "at": int(match[2]), "mean": m["mean"]}
        rows.append(row | {"low": m["mean"] - spread, "high": m["mean"] + spread})
  places = {name: {r["at"] for r in rows if r["metric"] == name} for name in {r["metric"] for r in rows}}
  return [row for row in rows if len(places[row["metric"]]) > 1]


def lines(summary: Mapping, rows: Sequence[dict], x, title: str, *, points: bool = False):
  """A line an arm, of the mean over `x`, from low to high a band (or bars, with points); its name at its end."""
  alt = need_altair()
  names = [arm["arm"] for arm in summary["arms"] if any(row["arm"] == arm["arm"] for row in rows)]
  label = labels(summary)
  beside = max(_wide(label[name]) for name in names) + 18
  width, height = WIDTH - beside, max(230, LINE * len(names))
  scale = _room(rows)
  last = [next(row for row in reversed(rows) if row["arm"] == name) for name in names]
  places = _apart([row["mean"] for row in last], scale, height)
  ends = [{"arm": name, "label": label[name], "at": at} for name, at in zip(names, places)]
  y = lambda name: alt.Y(f"{name}:Q", title=title, scale=alt.Scale(domain=scale, nice=False))
  colour = _by_arm(alt, summary)
  base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=colour)
  band = base.mark_rule() if points else base.mark_area(opacity=0.2)
  end = alt.Chart(alt.Data(values=ends)).encode(y=y("at"))
  parts = [
    band.encode(y=y("low"), y2="high:Q"),
    base.mark_line(point=points, strokeWidth=2).encode(y=y("mean")),
    end.mark_point(filled=True, size=45, opacity=1).encode(x=alt.value(width + 9), color=colour),
    _words(end.encode(x=alt.value(width + 17)), "label"),
  ]
  return alt.layer(*parts).properties(width=width, height=height)


# --------------------------------------------------------------------------------------------------- effects


def effects(summary: Mapping):
  """Each comparison's effect with its interval, the noise floor in grey, the rule's margins as ticks; a panel for each
  metric, since each has a unit of its own."""
  rows = effect_rows(summary)
  if not rows:
    return None
  alt = need_altair()
  panels = [[row for row in rows if row["of"] == of] for of in dict.fromkeys(row["of"] for row in rows)]
  return finish(alt.vconcat(*(_effects(alt, panel) for panel in panels), spacing=12))


def effect_rows(summary: Mapping) -> list[dict]:
  """Rows of the comparisons with numbers: what they are, margins, the ends of what the rule speaks of, floor_low and
  floor_high, what noise may reach, and `of`: the metric, without the length or share it was measured at."""
  rows = []
  for c in summary["comparisons"]:
    if c["effect"] is None or not math.isfinite(c["effect"]):
      continue
    ends = {"less": (-c["by"],), "greater": (c["by"],), "equal": (c["to"] - c["by"], c["to"] + c["by"])}[c["expect"]]
    floor = {} if c["floor"] is None else {"floor_low": c["to"] - c["floor"], "floor_high": c["to"] + c["floor"]}
    found = {name: c[name] for name in ("id", "effect", "low", "high", "verdict", "to")}
    label = f"{c['id']}: {c['verdict'].removesuffix(' at this scale')}"
    of = ("" if c["baseline_metric"] == ZERO else "difference in ") + re.sub(r"_\d.*$", "", c["metric"])
    rows.append(found | floor | {"label": label, "of": of, "margins": [x for x in ends if x]})
  return rows


def _effects(alt, rows: Sequence[dict]):
  y = alt.Y("id:N", title=None, sort=None, axis=None)
  base = alt.Chart(alt.Data(values=rows)).encode(y=y)
  of_verdicts = lambda i: alt.Scale(domain=list(VERDICTS), range=[look[i] for look in VERDICTS.values()])
  colour = alt.Color("verdict:N", scale=of_verdicts(0), legend=None)
  shape = alt.Shape("verdict:N", scale=of_verdicts(1), legend=None)
  x = lambda name: alt.X(
    f"{name}:Q", title=rows[0]["of"], scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5, labelFlush=False)
  )
  below = 9  # pixels: the marks, so that the words have room above them
  zero = [{"zero": 0}] if any(not row["to"] for row in rows) else []
  margins = [{"id": row["id"], "margin": m} for row in rows for m in row["margins"]]
  band = base.transform_filter("isValid(datum.floor_low)").mark_bar(
    color="#999999", opacity=0.25, height=18, yOffset=below
  )
  interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, yOffset=below)
  parts = [
    band.encode(x=x("floor_low"), x2="floor_high:Q"),
    alt.Chart(alt.Data(values=zero)).mark_rule(color="#555555").encode(x=x("zero")),
    alt.Chart(alt.Data(values=margins))
    .mark_tick(color="black", thickness=2, height=16, yOffset=below)
    .encode(x=x("margin"), y=y),
    interval.encode(x=x("low"), x2="high:Q", color=colour),
    base.mark_point(filled=True, size=90, opacity=1, yOffset=below).encode(x=x("effect"), color=colour, shape=shape),
    _words(base.encode(x=alt.value(4)), "label", limit=WIDTH + 30, dy=-12),
  ]
  return alt.layer(*parts).properties(width=WIDTH + 40, height=alt.Step(46))


# ------------------------------------------------------------------------------------------- quality and cost

MEASURED = "ms a step, measured"
COSTS = {
  "parameters": lambda arm: arm["cost"]["params"],
  "training FLOPs a token": lambda arm: arm["cost"]["train_flops_per_token"],
  "bytes of state a token": lambda arm: arm["cost"]["state_bytes_per_token"],
  MEASURED: lambda arm: arm["step_ms"] and arm["step_ms"]["median"],
}


def quality_cost(summary: Mapping):
  """The metric against each cost in which arms differ, a panel each; what no arm beats in both is filled, and joined.

  Costs in proportion to each other share a panel, and the axis names them all.
  """
  rows = quality_rows(summary)
  if not rows:
    return None
  alt = need_altair()
  panels = [_quality(alt, summary, [row for row in rows if row["cost"] == names[0]], names) for names in alike(rows)]
  return finish(alt.vconcat(*panels))


def quality_rows(summary: Mapping) -> list[dict]:
  """{arm, cost, value, mean, low, high (one deviation), front} for each cost in which arms differ; value_low and
  value_high are the quartiles of a measured time, and the value itself where a formula gives it."""
  metric, rows = summary["metric"], []
  arms = [arm for arm in summary["arms"] if metric in arm["metrics"] and math.isfinite(arm["metrics"][metric]["mean"])]
  decode = {
    f"ms a token on {chip}, at least": lambda arm, chip=chip: arm["cost"]["decode_ms"][chip]
    for chip in (arms[0]["cost"]["decode_ms"] if arms else ())
  }
  for name, of in (COSTS | decode).items():
    points = [(arm, of(arm)) for arm in arms]
    ends = lambda arm, value, name=name: (arm["step_ms"]["low"], arm["step_ms"]["high"]) if name == MEASURED else (
      value, value)  # fmt: skip
    points = [(arm, value) for arm, value in points if value is not None]
    values = [value for _, value in points]
    if len(values) < 2 or max(values) <= min(values) * (1 + MATCHED):
      continue
    for arm, value in points:
      m = arm["metrics"][metric]
      front = not any(v <= value and a["metrics"][metric]["mean"] < m["mean"] for a, v in points)
      spread = m["sd"] or 0.0
      row = {"arm": arm["arm"], "cost": name, "value": value, "mean": m["mean"], "front": front}
      row |= dict(zip(("value_low", "value_high"), ends(arm, value)))
      rows.append(row | {"low": m["mean"] - spread, "high": m["mean"] + spread})
  return rows


def alike(rows: Sequence[dict]) -> list[list[str]]:
  """The names of the costs, those together that are in proportion to each other over the arms."""
  groups: list[list[str]] = []
  of = lambda name: {row["arm"]: row["value"] for row in rows if row["cost"] == name}
  for name in dict.fromkeys(row["cost"] for row in rows):
    for group in groups:
      a, b = of(name), of(group[0])
      ratios = [a[arm] / b[arm] for arm in a if b.get(arm)]
      if len(ratios) == len(a) == len(b) and max(ratios) <= min(ratios) * (1 + MATCHED):
        group.append(name)
        break
    else:
      groups.append([name])
  return groups


def _quality(alt, summary: Mapping, rows: Sequence[dict], names: Sequence[str]):
  """One panel."""
  height = 190
  x_scale = _room([{"low": r["value_low"], "high": r["value_high"]} for r in rows])
  y_scale = _room(rows)
  pixel = lambda value, scale, size: (value - scale[0]) / (scale[1] - scale[0]) * size
  points = [(pixel(r["value"], x_scale, WIDTH), height - pixel(r["mean"], y_scale, height)) for r in rows]
  label = labels(summary)
  places = _beside(points, [_wide(label[r["arm"]]) for r in rows], WIDTH, height)
  rows = [r | {"label": label[r["arm"]], "left": left, "at": at} for r, (left, at) in zip(rows, places)]
  y = lambda name: alt.Y(f"{name}:Q", title=summary["metric"], scale=alt.Scale(domain=y_scale, nice=False))
  title = [names[0], *(f"(and in proportion {name})" for name in names[1:])]
  axis = alt.Axis(format=".3~g" if names[0].startswith("ms") else "~s", tickCount=4)
  x = lambda name: alt.X(f"{name}:Q", title=title, scale=alt.Scale(domain=x_scale, nice=False), axis=axis)
  base = alt.Chart(alt.Data(values=rows)).encode(x=x("value"))
  colour = _by_arm(alt, summary)
  front = base.transform_filter("datum.front")
  words = base.encode(y=alt.Y("at:Q", scale=None))
  parts = [
    front.mark_line(color="#BBBBBB", strokeDash=[3, 3], interpolate="step-after").encode(y=y("mean")),
    base.mark_rule().encode(y=y("low"), y2="high:Q", color=colour),
    base.mark_rule().encode(x=x("value_low"), x2="value_high:Q", y=y("mean"), color=colour),
    base.mark_point(size=70, strokeWidth=2, fill="white", opacity=1).encode(y=y("mean"), color=colour),
    front.mark_point(size=70, strokeWidth=2, filled=True, opacity=1).encode(y=y("mean"), color=colour),
    _words(words.transform_filter("!datum.left"), "label", dx=DOT),
    _words(words.transform_filter("datum.left"), "label", dx=-DOT, align="right"),
  ]
  return alt.layer(*parts).properties(width=WIDTH, height=height)


def _beside(points: Sequence[tuple], widths: Sequence[float], width: float, height: float) -> list[tuple[bool, float]]:
  """Places names of these widths beside points (x, y), all in pixels of a plot: (left of it?, y).

  One after the other takes the nearest place that no point and no name before has, right of its point where it can.
  """
  boxes = [(x - DOT / 2, y - DOT / 2, x + DOT / 2, y + DOT / 2) for x, y in points]
  free = lambda b: all(b[0] >= o[2] or o[0] >= b[2] or b[1] >= o[3] or o[1] >= b[3] for o in boxes)
  inside = lambda b: b[0] >= 0 and b[2] <= width and b[1] >= 0 and b[3] <= height
  places: dict[int, tuple[bool, float]] = {}
  for i in sorted(range(len(points)), key=lambda i: points[i][1]):
    x, y = points[i]
    for shift, left in sorted(itertools.product(range(-12, 13), (False, True)), key=lambda o: (abs(o[0]), o[1])):
      at = y + shift * LINE / 2
      begin = x - DOT - widths[i] if left else x + DOT
      box = (begin, at - LINE / 2, begin + widths[i], at + LINE / 2)
      if free(box) and inside(box):
        break
    else:  # too many for the plot
      at, left = y, x > width / 2
    boxes.append(box)
    places[i] = left, at
  return [places[i] for i in range(len(points))]


CHARTS = {"curves": curves, "effects": effects, "lengths": lengths, "layers": layers, "costs": quality_cost}


# ------------------------------------------------------------------------------------------------------ parts


def _by_arm(alt, summary: Mapping):
  names = [arm["arm"] for arm in summary["arms"]]
  colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
  return alt.Color("arm:N", sort=names, scale=alt.Scale(domain=names, range=colours), legend=None)


def _words(base, field: str, *, align: str = "left", limit: int = LIMIT, **place):
  """Text in ink upon a white edge, so that lines below it do not cross it."""
  words = {"align": align, "fontSize": 13, "limit": limit, "aria": False, **place}  # the marks say it to a reader
  edge = base.mark_text(stroke="white", strokeWidth=3, **words)
  return edge.encode(text=f"{field}:N") + base.mark_text(color=INK, **words).encode(text=f"{field}:N")


def labels(summary: Mapping) -> dict[str, str]:
  """{arm: what charts call it}: its name; of long ones such as "activation=silu d_ff=64" the values, "silu 64"."""
  names = [arm["arm"] for arm in summary["arms"]]
  short = {name: re.sub(r"\S+=", "", name) if len(name) > 16 else name for name in names}
  return short if len(set(short.values())) == len(names) else dict(zip(names, names))


def _wide(label: str) -> float:
  """Pixels that a label takes, about."""
  return min(len(label) * LETTER, LIMIT)


def _room(rows: Sequence[dict]) -> list[float]:
  """The range of a vertical axis: from the least low to the greatest high, and a little more."""
  low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
  more = (high - low or abs(high) or 1.0) * 0.05
  return [low - more, high + more]


def _apart(values: Sequence[float], scale: Sequence[float], height: float) -> list[float]:
  """Places names beside `values`, moved as little as possible in squares, until they are a line apart."""
  if not values:
    return []
  low, high = scale
  line = (high - low) / height * LINE
  order = sorted(range(len(values)), key=values.__getitem__)
  shifted = isotonic_regression([values[i] - k * line for k, i in enumerate(order)]).x
  top = max(high - line / 2 - (len(order) - 1) * line, low + line / 2)
  places = dict(zip(order, (min(max(x, low + line / 2), top) + k * line for k, x in enumerate(shifted))))
  return [float(places[i]) for i in range(len(values))]


def finish(chart):
  font = {"labelFontSize": 13, "titleFontSize": 13, "labelColor": INK, "titleColor": INK}
  return (
    chart.configure(font="sans-serif", background="white", padding=8)
    .configure_axis(**font, grid=True, gridColor="#E6E6E6", titleFontWeight="normal")
    .configure_view(stroke="#CCCCCC")
  )


def svg(chart, prefix: str) -> str:
  """The chart as an <svg> that fills its place; ids begin with `prefix`, so that several fit in one page."""
  import vl_convert

  text = vl_convert.vegalite_to_svg(chart.to_json())
  text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
  return re.sub(r"<svg([^>]*?) width=\"[\d.]+\" height=\"[\d.]+\"", r'<svg\1 width="100%"', text, count=1)


def png(chart, path: Path) -> None:
  """Writes the chart at twice its size, in 64 colours: a fifth of the bytes."""
  import vl_convert
  from PIL import Image

  image = Image.open(io.BytesIO(vl_convert.vegalite_to_png(chart.to_json(), scale=2)))
  image.convert("RGB").quantize(64).save(path, optimize=True)
