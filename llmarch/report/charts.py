"""Charts of an ablation's summary (lab/results.py): curves, effects, quality against cost, loss against length.

Each function gives an altair chart, or None where the summary has nothing for it. The same charts become the SVG of a
page and the PNG of a README.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path

from llmarch.report.plots import need_altair

# Okabe and Ito's colours, which colour-blind readers tell apart (black last).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A00", "#000000")
VERDICTS = {
  "supported": ("#009E73", "circle"),
  "not supported": ("#D55E00", "square"),
  "opposite": ("#CC79A7", "triangle-down"),
  "inconclusive at this scale": ("#777777", "diamond"),
}
WIDTH = 420  # pixels at scale 1; a page stretches it
LENGTHS = re.compile(r"^(.*)_(\d+)x$")


def curves(summary: Mapping):
  """The metric over steps on held-out text (or the training loss): the mean over seeds, and their range as a band."""
  alt = need_altair()
  which = "eval_curves" if any(arm["eval_curves"] for arm in summary["arms"]) else "curves"
  rows = curve_rows(summary, which)
  if len({row["step"] for row in rows}) < 2:
    return None
  base = alt.Chart(alt.Data(values=rows)).encode(x=alt.X("step:Q", title="step"), color=_by_arm(alt, summary))
  y = alt.Y("mean:Q", title="validation loss (nats)" if which == "eval_curves" else "training loss", scale=_tight(alt))
  band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", scale=_tight(alt), title=""), y2="high:Q")
  line = base.mark_line(strokeWidth=2).encode(y=y)
  return _finish(alt, band + line, height=260)


def curve_rows(summary: Mapping, which: str) -> list[dict]:
  """{arm, step, mean, low, high} over the seeds that have the step."""
  rows = []
  for arm in summary["arms"]:
    at: dict[int, list[float]] = {}
    for points in arm[which].values():
      for step, value in points:
        at.setdefault(step, []).append(value)
    for step, values in sorted(at.items()):
      mean = sum(values) / len(values)
      rows.append({"arm": arm["arm"], "step": step, "mean": mean, "low": min(values), "high": max(values)})
  return rows


def effects(summary: Mapping):
  """Each comparison's effect with its interval, the noise floor in grey, the rule's margin as a tick."""
  alt = need_altair()
  rows = effect_rows(summary)
  if not rows:
    return None
  y = alt.Y("id:N", title=None, sort=None, axis=alt.Axis(labelLimit=200))
  base = alt.Chart(alt.Data(values=rows)).encode(y=y)
  colour = alt.Color(
    "verdict:N",
    scale=alt.Scale(domain=list(VERDICTS), range=[c for c, _ in VERDICTS.values()]),
    legend=alt.Legend(orient="bottom", title=None, columns=2),
  )
  shape = alt.Shape("verdict:N", scale=alt.Scale(domain=list(VERDICTS), range=[s for _, s in VERDICTS.values()]))
  x = lambda name, title="": alt.X(f"{name}:Q", title=title)
  floor = base.transform_filter("isValid(datum.floor)").mark_bar(color="#999999", opacity=0.25, height=18)
  layers = [
    floor.encode(x=x("minus_floor"), x2="floor:Q"),
    alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color="#555555").encode(x=x("zero")),
    alt.Chart(alt.Data(values=[{"id": r["id"], "margin": m} for r in rows for m in r["margins"]]))
    .mark_tick(color="black", thickness=2, height=16)
    .encode(x=x("margin"), y=y),
    base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2).encode(x=x("low"), x2="high:Q", color=colour),
    base.mark_point(filled=True, size=90, opacity=1).encode(
      x=x("effect", "effect, with its 95 % interval (grey: noise; black: the rule's margin)"), color=colour, shape=shape
    ),
  ]
  return _finish(alt, alt.layer(*layers), height=alt.Step(34))


def effect_rows(summary: Mapping) -> list[dict]:
  """Of the comparisons with numbers: what they are, and margins, the ends of what the rule speaks of."""
  rows = []
  for c in summary["comparisons"]:
    if c["effect"] is not None:
      ends = {"less": (-c["by"],), "greater": (c["by"],), "equal": (c["to"] - c["by"], c["to"] + c["by"])}[c["expect"]]
      found = {name: c[name] for name in ("id", "effect", "low", "high", "verdict", "floor")}
      rows.append(found | {"minus_floor": c["floor"] and -c["floor"], "margins": [x for x in ends if x]})
  return rows


COSTS = {
  "parameters": lambda arm: arm["cost"]["params"],
  "training FLOPs a token": lambda arm: arm["cost"]["train_flops_per_token"],
  "bytes of state a token": lambda arm: arm["cost"]["state_bytes_per_token"],
  "ms a step, measured": lambda arm: arm["step_ms"] and arm["step_ms"]["median"],
}


def quality_cost(summary: Mapping):
  """The metric against each cost that differs between arms, a panel each; what no arm beats in both is filled."""
  alt = need_altair()
  rows = quality_rows(summary)
  panels = dict.fromkeys(row["cost"] for row in rows)
  if not panels:
    return None
  charts = []
  for name in panels:
    data = alt.Data(values=[row for row in rows if row["cost"] == name])
    form = ".3~g" if name.startswith("ms") else "~s"
    base = alt.Chart(data).encode(
      x=alt.X("value:Q", title=name, scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(format=form, tickCount=4)),
      y=alt.Y("mean:Q", title=summary["metric"], scale=_tight(alt)),
      color=_by_arm(alt, summary, legend=False),
    )
    dots = base.mark_point(size=70, strokeWidth=2).encode(
      fill=alt.condition("datum.front", _by_arm(alt, summary, alt.Fill, legend=False), alt.value("transparent"))
    )
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title=summary["metric"], scale=_tight(alt)), y2="high:Q")
    names = base.mark_text(dy=-11, fontSize=11).encode(text="arm:N")
    charts.append((bars + dots + names).properties(width=WIDTH // 2 - 45, height=180))
  return _finish(alt, alt.concat(*charts, columns=2), sized=True)


def quality_rows(summary: Mapping) -> list[dict]:
  """{arm, cost, value, mean, low, high (one deviation), front} for each cost in which arms differ."""
  metric, rows = summary["metric"], []
  arms = [arm for arm in summary["arms"] if metric in arm["metrics"]]
  decode = {
    f"ms a token on {chip}, at least": lambda arm, chip=chip: arm["cost"]["decode_ms"][chip]
    for chip in (arms[0]["cost"]["decode_ms"] if arms else ())
  }
  for name, of in (COSTS | decode).items():
    points = [(arm, of(arm)) for arm in arms]
    values = [value for _, value in points if value is not None]
    if len(values) < 2 or max(values) <= min(values) * 1.001:
      continue
    for arm, value in points:
      if value is None:
        continue
      m = arm["metrics"][metric]
      beaten = any(
        v is not None and v <= value and a["metrics"][metric]["mean"] < m["mean"] for a, v in points if a is not arm
      )
      spread = m["sd"] or 0.0
      row = {"arm": arm["arm"], "cost": name, "value": value, "mean": m["mean"], "front": not beaten}
      rows.append(row | {"low": m["mean"] - spread, "high": m["mean"] + spread})
  return rows


def lengths(summary: Mapping):
  """A metric measured at multiples of the trained length, a line an arm."""
  alt = need_altair()
  rows = length_rows(summary)
  if not rows:
    return None
  base = alt.Chart(alt.Data(values=rows)).encode(
    x=alt.X(
      "multiple:Q",
      title="times the trained length",
      scale=alt.Scale(type="log", base=2),
      axis=alt.Axis(values=sorted({r["multiple"] for r in rows})),
    ),
    y=alt.Y("mean:Q", title="loss (nats)", scale=_tight(alt)),
    color=_by_arm(alt, summary),
  )
  bars = base.mark_rule().encode(y=alt.Y("low:Q", scale=_tight(alt), title="loss (nats)"), y2="high:Q")
  return _finish(alt, base.mark_line(point=True, strokeWidth=2) + bars, height=260)


def length_rows(summary: Mapping, name: str = "loss") -> list[dict]:
  rows = []
  for arm in summary["arms"]:
    for metric, m in arm["metrics"].items():
      match = LENGTHS.match(metric)
      if match and match[1] == name:
        spread = m["sd"] or 0.0
        row = {"arm": arm["arm"], "multiple": int(match[2]), "mean": m["mean"]}
        rows.append(row | {"low": m["mean"] - spread, "high": m["mean"] + spread})
  return rows if len({row["multiple"] for row in rows}) > 1 else []


CHARTS = {"curves": curves, "effects": effects, "lengths": lengths, "costs": quality_cost}


def _by_arm(alt, summary: Mapping, channel=None, legend: bool = True):
  names = [arm["arm"] for arm in summary["arms"]]
  colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
  shown = alt.Legend(orient="bottom", title=None, columns=3, labelLimit=150) if legend else None
  return (channel or alt.Color)("arm:N", sort=names, scale=alt.Scale(domain=names, range=colours), legend=shown)


def _tight(alt):
  return alt.Scale(zero=False, nice=True)


def _finish(alt, chart, height=None, sized: bool = False):
  chart = chart if sized else chart.properties(width=WIDTH, height=height)
  font = {"labelFontSize": 13, "titleFontSize": 13, "labelColor": "#222222", "titleColor": "#222222"}
  return (
    chart.configure(font="sans-serif", background="white", padding=8)
    .configure_axis(**font, grid=True, gridColor="#E6E6E6", titleFontWeight="normal")
    .configure_legend(**font, symbolSize=90)
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
