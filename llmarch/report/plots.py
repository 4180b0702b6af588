"""Plots: a PNG, and an HTML page that holds all that it needs."""

from collections.abc import Sequence
from pathlib import Path

from llmarch.errors import UserError


def pareto_chart(points: Sequence[dict], path: str, *, title: str) -> list[Path]:
  """Cost against latency, a panel for each phase, the Pareto front as a line: path.png and path.html.

  points: rows with phase, latency_s, chip_ms_per_token, ffn, attention, mesh, chips, batch, mfu, front (bool).
  Raises UserError where the libraries are not installed or the folder cannot be written.
  """
  alt = need_altair()
  log = alt.Scale(type="log", nice=False, padding=10)
  x = alt.X("latency_s:Q", scale=log, title="latency of the phase (s)")
  y = alt.Y("chip_ms_per_token:Q", scale=log, title="chip-milliseconds per token")
  shown = [alt.Tooltip(f"{name}:N") for name in ("ffn", "attention", "mesh", "chips", "batch")]
  shown += [alt.Tooltip(f"{name}:Q", format=form) for name, form in FORMATS.items()]
  base = alt.Chart().encode(x=x, y=y)
  dots = base.mark_point(filled=True, size=45).encode(
    color=alt.Color("ffn:N", title="feed-forward"),
    shape=alt.Shape("attention:N", title="attention"),
    opacity=alt.condition("datum.front", alt.value(1.0), alt.value(0.35)),
    tooltip=shown,
  )
  line = base.mark_line(color="black", strokeWidth=1).transform_filter("datum.front")
  panels = alt.layer(line, dots).properties(width=420, height=360).interactive()
  phases = alt.Column("phase:N", title=None, sort=["prefill", "decode"])
  chart = alt.layer(panels, data=alt.Data(values=list(points))).facet(column=phases)
  chart = chart.resolve_scale(x="independent", y="independent").properties(title=title)
  png, html = Path(f"{path}.png"), Path(f"{path}.html")
  try:
    png.parent.mkdir(parents=True, exist_ok=True)
    chart.save(png, scale_factor=2)
    chart.save(html, inline=True)
  except OSError as e:
    raise UserError(f"cannot write {png.parent} ({e.strerror}); give another folder") from None
  return [png, html]


def need_altair():
  """The library of all charts. Raises UserError where it, or what renders them, is not installed."""
  try:
    import altair
    import PIL  # noqa: F401  makes small files of PNGs
    import vl_convert  # noqa: F401  renders PNG and SVG, and the libraries inside a page
  except ImportError as e:
    raise UserError(f"plots need the {e.name} package; pip install 'llmarch[report]'") from None
  return altair


FORMATS = {"latency_s": ".4g", "chip_ms_per_token": ".4g", "mfu": ".1%"}
