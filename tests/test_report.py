"""Reports: what a summary says is in the page and the README, escaped, whatever is missing; and a browser agrees."""

import html.parser
import itertools
import json
import math
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from test_lab import ROOT, row, write_ablation

from llmarch.__main__ import main as llmarch
from llmarch.commands import report
from llmarch.lab import ablation as ablations
from llmarch.lab import records, results
from llmarch.report import charts, page, readme, runs

pytest.importorskip("altair", reason="ALTAIR IS NOT INSTALLED (pip install 'llmarch[report]')")

NASTY = '<b>&"</script>'


def summary(tmp_path, *, failed=(), seeds=3, curves=True, name="made_up") -> dict:
  """Of an ablation with recorded trials, made up: loss = (1, 2, 3 ...)[arm] + seed / 8."""
  folder = write_ablation(tmp_path / name, widths=[32, 64], seeds=seeds)
  path = pathlib.Path(folder) / "ablation.py"
  path.write_text(path.read_text().replace('Arm("first")', f"Arm({NASTY!r})").replace('"Widths"', f"{NASTY!r}"))
  one = ablations.load_ablation(folder)
  names = [arm.name for arm in one.arms]
  for t in ablations.trials(one, folder, "tiny"):
    loss = 1.0 + names.index(t.arm) + t.seed / 8
    more = {"curve": [[1, 9.0], [2, loss]], "eval_curve": [[1, 8.0], [2, loss]]} if curves else {}
    more |= {"sample": f"text {NASTY}", "step_ms": {"median": 5.0 + loss, "low": 4.0, "high": 9.0}}
    metrics = {"loss": loss, "loss_1x": loss, "loss_4x": loss + 1, "norm[1]": 2.0, "norm[10]": 0.5}
    if t.arm in failed:
      more, metrics = {"status": "failed", "failure": "numbers", "reason": f"a NaN {NASTY} in /home/me/x.py"}, {}
    fields = {"arm": t.arm, "seed": t.seed, "overrides": t.overrides, "match": None, "metrics": metrics, "workers": 2}
    where = {"hardware": "a machine", "versions": {"jax": "1.2.3"}, "seconds": 7.5}
    records.add(folder, row(t.key, **fields, **where, **more))
  return results.summarize(folder)


class Reader(html.parser.HTMLParser):
  """The text of a page, its attributes, and whether its tags are balanced."""

  VOID = {"meta", "input", "br", "link", "img"}

  def __init__(self, text: str):
    super().__init__()
    self.open, self.text, self.attributes, self.tags = [], [], [], []
    self.feed(text)
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("script", "style"):
      self.text.append(data)


CASES = {
  "whole": {},
  "one arm failed": {"failed": ("d_ff=64",)},
  "all failed": {"failed": (NASTY, "d_ff=32", "d_ff=64")},
  "one seed": {"seeds": 1},
  "no curves": {"curves": False},
}


@pytest.mark.parametrize("how", CASES)
def test_all_that_a_summary_says_is_on_the_page(how, tmp_path, cases):
  s = summary(tmp_path, **CASES[how])
  text = page.page("t", [page.ablation(s)], page.index([s]))
  seen = "\n".join(Reader(text).text)
  for arm in s["arms"]:
    assert arm["arm"] in seen and all(page.public(why) in seen for why in arm["failures"])
    assert all(page.public(line) in seen for line in arm["differences"])
    for name in page.metrics(s):
      assert not arm["metrics"] or page.number(arm["metrics"][name]["mean"]) in seen
    assert page.number(arm["cost"]["params"]) in seen
  for c in s["comparisons"]:
    assert c["statement"] in seen and c["verdict"] in seen and c["rule"] in seen and page.interval(c) in seen
  assert s["title"] in seen and "a machine" in seen and "llmarch ablate made_up --budget=tiny" in seen
  assert ("a NaN" in seen) == bool(CASES[how].get("failed")) and "/home" not in text and str(tmp_path) not in text
  said = readme.readme(s, [])
  assert ("a NaN" in said) == ("a NaN" in seen) and "/home" not in said and str(tmp_path) not in said
  cases("pages that say what a summary says")


def test_what_users_write_is_text_and_never_markup(tmp_path):
  s = summary(tmp_path)
  reader = Reader(page.page(NASTY, [page.ablation(s)]))
  assert "\n".join(reader.text).count(NASTY) >= 4 and "b" not in reader.tags
  assert reader.tags.count("script") == 1


def test_a_page_needs_no_network(tmp_path):
  text = page.page("t", [page.ablation(summary(tmp_path))])
  links = set(re.findall(r"https?://[^\s\"'<)]+", text))
  assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
  names = {name for name, _ in Reader(text).attributes}
  assert "src" not in names and "@import" not in text
  ids = [value for name, value in Reader(text).attributes if name == "id"]
  assert len(ids) == len(set(ids))


def test_readme_numbers_are_the_means_of_the_records(tmp_path):
  s = summary(tmp_path)
  text = readme.readme(s, ["curves"])
  rows = [line for line in text.splitlines() if line.startswith("|")]
  names = [cell.strip() for cell in rows[0].strip("|").split("|")]
  for arm, line in zip(s["arms"], rows[2:], strict=True):
    cells = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|"))))
    values = list(arm["metrics"]["loss"]["values"].values())
    assert cells["arm"] == readme.md(arm["arm"]) and cells["seeds"] == str(len(values))
    assert float(cells["loss"].split(" ± ")[0]) == pytest.approx(sum(values) / len(values), rel=1e-3)
  for c in s["comparisons"]:
    assert f"**{c['verdict']}** ({c['effect']:+.3g}" in text


def test_charts_show_the_numbers_of_the_summary(tmp_path, cases):
  s = summary(tmp_path)
  last = {r["arm"]: r for r in charts.curve_rows(s, "eval_curves") if r["step"] == 2}
  for arm in s["arms"]:
    m = arm["metrics"]["loss"]
    values = list(m["values"].values())
    assert (last[arm["arm"]]["mean"], last[arm["arm"]]["low"]) == (pytest.approx(m["mean"]), min(values))
  assert [r["effect"] for r in charts.effect_rows(s)] == [c["effect"] for c in s["comparisons"]]
  series = lambda pattern: {(r["metric"], r["at"], r["mean"]) for r in charts.series_rows(s, pattern)}
  assert series(charts.LENGTHS) >= {("loss", 1, 1.125), ("loss", 4, 2.125)}
  assert series(charts.LAYERS) >= {("norm", 1, 2.0), ("norm", 10, 0.5)} and "norm[1]" not in page.metrics(s)
  points = [r for r in charts.quality_rows(s) if r["cost"] == "parameters"]
  assert {r["arm"]: r["value"] for r in points} == {a["arm"]: a["cost"]["params"] for a in s["arms"]}
  # No arm that is beaten in both is on the front, and every other is.
  for p in points:
    beaten = any(q["value"] <= p["value"] and q["mean"] < p["mean"] for q in points if q is not p)
    assert p["front"] != beaten
  drawn = [charts.svg(make(s), name) for name, make in charts.CHARTS.items()]
  for text in drawn:  # every arm or comparison is named in its chart
    words = html.unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", text)))
    assert all(a["arm"] in words for a in s["arms"]) or all(f"{c['id']}: " in words for c in s["comparisons"])
  assert all(text.startswith("<svg") and "<path" in text and 'width="100%"' in text for text in drawn)
  cases("charts that show a summary's numbers", len(drawn))


def test_numbers_that_are_none_are_not_drawn(tmp_path):
  s = summary(tmp_path)
  arm = s["arms"][1]
  arm["eval_curves"] = {0: [[1, 2.0], [2, math.nan]], 1: [[1, 4.0], [2, math.inf], [1, 6.0]]}
  rows = [r for r in charts.curve_rows(s, "eval_curves") if r["arm"] == arm["arm"]]
  assert rows == [{"arm": arm["arm"], "step": 1, "mean": 4.0, "low": 2.0, "high": 6.0}]  # a step done twice: the last
  arm["metrics"]["loss"]["mean"] = s["comparisons"][0]["effect"] = math.nan
  assert not [r for r in charts.quality_rows(s) + charts.series_rows(s, charts.LENGTHS) if math.isnan(r["mean"])]
  assert len(charts.effect_rows(s)) == len(s["comparisons"]) - 1
  assert all(charts.svg(make(s), name) for name, make in charts.CHARTS.items() if make(s) is not None)


def test_effects_of_different_metrics_have_panels_of_their_own(tmp_path):
  s = summary(tmp_path)
  first = s["comparisons"][0]
  s["comparisons"] = [dict(first, id=m, metric=m, baseline_metric=m) for m in ("loss", "loss_4x", "rate")]
  assert [r["of"] for r in charts.effect_rows(s)] == [f"difference in {m}" for m in ("loss", "loss", "rate")]
  # "equal" is about `to`: margins and noise lie around it.
  s["comparisons"] = [first | {"expect": "equal", "to": 2.0, "by": 0.5, "floor": 0.25}]
  (row,) = charts.effect_rows(s)
  assert (row["margins"], row["floor_low"], row["floor_high"]) == ([1.5, 2.5], 1.75, 2.25)


def test_costs_in_proportion_share_a_panel():
  costs = {"a": (1, 2, 3), "twice": (2, 4, 6), "almost": (1, 2, 3.03), "other": (3, 2, 1)}
  rows = [{"arm": i, "cost": name, "value": v} for name, values in costs.items() for i, v in enumerate(values)]
  assert charts.alike(rows) == [["a", "twice", "almost"], ["other"]]


def test_names_keep_a_line_apart_and_their_order(cases):
  rng = random.Random(0)
  for _ in range(100):
    values = [rng.choice([rng.random(), 0.5]) for _ in range(rng.randint(1, 12))]
    placed = charts._apart(values, [0.0, 1.0], 230)
    line = charts.LINE / 230
    order = sorted(zip(placed, values))
    assert [v for _, v in order] == sorted(values) and min(placed) >= 0 and max(placed) <= 1
    assert all(b[0] - a[0] >= line * (1 - 1e-9) for a, b in itertools.pairwise(order))
    assert charts._apart(placed, [0.0, 1.0], 230) == pytest.approx(placed)  # nothing moves without need
  cases("names placed", 100)


def test_names_beside_points_do_not_overlap():
  points, widths = [(50.0, 50.0)] * 6 + [(300.0, 60.0), (310.0, 62.0)], [80.0] * 8
  placed = charts._beside(points, widths, 330, 190)
  boxes = []
  for (x, _), (left, y), w in zip(points, placed, widths, strict=True):
    begin = x - charts.DOT - w if left else x + charts.DOT
    boxes.append((begin, y - charts.LINE / 2, begin + w, y + charts.LINE / 2))
    assert 0 <= begin and begin + w <= 330
  for i, a in enumerate(boxes):
    assert all(a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3] for b in boxes[:i])


def test_long_names_are_short_in_charts_while_they_differ():
  named = lambda *names: charts.labels({"arms": [{"arm": name} for name in names]})
  assert named("relu", "activation=silu d_ff=64") == {"relu": "relu", "activation=silu d_ff=64": "silu 64"}
  both = ("activation=silu d_ff=64", "activation=silu d_model=64")
  assert named(*both) == dict(zip(both, both))


@pytest.mark.parametrize(
  ("text", "left"),
  [
    ("no /home/me/a b/x.py", "no a b/x.py"),
    ("'/tmp/x-1/y.json' here", "'y.json' here"),
    ("of http://a/b/c, tokens/s/x", "of http://a/b/c, tokens/s/x"),
    ("experiments/glu/ablation.py", "experiments/glu/ablation.py"),
  ],
)
def test_folders_of_absolute_paths_are_left_out(text, left):
  assert page.public(text) == left


def test_verdicts_of_all_experiments_in_one_table(tmp_path):
  s = summary(tmp_path)
  text = readme.write_verdicts([s, s], tmp_path).read_text()
  assert text.count(s["comparisons"][0]["statement"]) == 2 and "2 comparisons" in text and "18 trials" in text


def test_the_command_writes_page_readme_and_figures(tmp_path, capsys):
  summary(tmp_path)
  folder, out = tmp_path / "made_up", tmp_path / "deep" / "r.html"
  (folder / "curves.png").write_text("of an older summary")
  words = [f"--out={out}", "--readme", f"--png={tmp_path / 'png'}"]
  assert llmarch(["report", str(folder), *words]) == 0
  assert out.stat().st_size < 500_000 and not (folder / "VERDICTS.md").exists()
  drawn = {p.name for p in (tmp_path / "png").iterdir()}
  assert drawn == {f"made_up-{name}.png" for name in charts.CHARTS}
  written = {p.name for p in folder.iterdir()}
  assert {"README.md", "curves.png", "effects.png", "lengths.png", "layers.png", "costs.png"} <= written
  assert all(p.stat().st_size < 60_000 for p in folder.glob("*.png"))
  capsys.readouterr()
  assert llmarch(["report", str(folder), "--json"]) == 0
  assert json.loads(capsys.readouterr().out)[0]["name"] == "made_up"


@pytest.mark.nightly
def test_verdicts_go_to_the_parent_folder_alone(tmp_path):
  parent = tmp_path / "experiments"
  for name in ("one", "two"):
    summary(parent, name=name)
  out = f"--out={tmp_path / 'r.html'}"
  assert llmarch(["report", str(parent / "one"), str(parent / "two"), "--readme", out]) == 0
  assert not list(tmp_path.rglob("VERDICTS.md")) and (parent / "two" / "README.md").exists()
  assert llmarch(["report", str(parent), "--readme", out]) == 0
  assert [p.parent for p in tmp_path.rglob("VERDICTS.md")] == [parent]
  text = (parent / "VERDICTS.md").read_text()
  assert "[one](one/README.md)" in text and "[two](two/README.md)" in text and str(tmp_path) not in text


def test_a_readme_has_no_figure_that_is_not_there(tmp_path, monkeypatch):
  s = summary(tmp_path)
  s["comparisons"] = []
  folder = tmp_path / "made_up"
  (folder / "effects.png").write_text("of an older summary")
  figures = lambda: set(re.findall(r"\]\((\w+\.png)\)", readme.write_readme(s, folder).read_text()))
  assert figures() == {p.name for p in folder.glob("*.png")} == {"curves.png", "lengths.png", "layers.png", "costs.png"}
  monkeypatch.setitem(sys.modules, "altair", None)
  assert figures() == set()


def test_runs_are_told_apart_by_as_little_of_a_path_as_needed():
  assert report.distinct(["/x/runs/a", "/x/runs/b"]) == ["a", "b"]
  assert report.distinct(["/x/one/run", "/x/two/run", "/x/c"]) == ["one/run", "two/run", "c"]


def test_runs_are_compared(tmp_path, capsys):
  from llmarch.commands.common import load_config
  from llmarch.train.workdir import claim_workdir

  for name, seed in (("a", 0), ("b", 7)):
    claim_workdir(str(tmp_path / name), load_config(str(ROOT / "configs" / "tiny.py"), [("seed", str(seed))]))
    more = {"bits_per_byte": 1, "grad_norm": 1, "tokens_per_second": 9}
    rows = [{"step": n, "loss": 4.0 / n, **more} for n in (1, 2, 3)]
    lines = [json.dumps(r) for r in (*rows, {"step": 3, "eval/loss": 1.5, "eval/bits_per_byte": 2.2})]
    lines += ["[1]", "garbage", json.dumps({"step": "x", "loss": None} | more)]  # another program's, or a hand's
    lines += [json.dumps(r) for r in ({"step": 2, "loss": 7.0} | more, {"step": 2, "loss": 2.0} | more)]  # done again
    (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
  out = tmp_path / "r.html"
  folders = [str(tmp_path / "a"), str(tmp_path / "b")]
  assert llmarch(["report", *folders, f"--out={out}"]) == 0
  reader = Reader(out.read_text())
  seen = "\n".join(reader.text)
  assert "config.seed: 7 here, 0 there" in seen and "1.5" in seen
  shown = [value for name, value in reader.attributes if name == "data-x"]
  assert sorted(set(shown)) == ["step", "tokens"]  # these rows have no clock
  capsys.readouterr()
  assert llmarch(["report", *folders, "--json"]) == 0
  tokens = load_config(str(ROOT / "configs" / "tiny.py")).train
  size = tokens.batch_size * tokens.seq_len
  assert json.loads(capsys.readouterr().out)[0]["rows"] == [
    {"step": n, "tokens": n * size, "time": None, "loss": 4.0 / n} | ({"eval/loss": 1.5} if n == 3 else {})
    for n in (1, 2, 3)
  ]  # one row a moment


def test_curves_are_drawn_over_steps_tokens_or_time():
  rows = [{"step": n, "loss": 4.0 / n, "tokens": 8 * n, "seconds": 3600.0 * n} for n in (1, 2, 3)]
  found = [{"run": "a", "rows": runs.moments([*rows, {"step": 3, "eval/loss": 1.5, "seconds": 1e5}], 5)}]
  at = {x: [(r["at"], r["mean"]) for r in runs.curve_rows(found, "loss", x)] for x in runs.AXES}
  assert at["step"] == [(1, 4.0), (2, 2.0), (3, 4 / 3)] and [x for x, _ in at["tokens"]] == [8, 16, 24]
  assert [x for x, _ in at["time"]] == [3600.0, 7200.0, 1e5] and runs._unit(found) == (3600.0, "hours")
  assert len(runs.curves(found, "time")) == 1  # a single evaluation is no curve


@pytest.mark.parametrize("place", [pytest.param("elsewhere", marks=pytest.mark.full), "records"])
def test_the_commands_on_a_page_run_as_printed(place, tmp_path, monkeypatch, capsys):
  summary(tmp_path / "x", name="made up", curves=False)
  folder, flags = str(tmp_path / "x" / "made up"), []
  (tmp_path / "y").mkdir()
  monkeypatch.chdir(tmp_path / "y" if place == "elsewhere" else tmp_path)
  if place == "records":
    (tmp_path / "again" / "made up").mkdir(parents=True)
    shutil.move(f"{folder}/records.jsonl", tmp_path / "again" / "made up")
    flags = ["--records=again"]
  out = tmp_path / "r.html"
  assert llmarch(["report", folder, f"--out={out}", *flags]) == 0
  (block,) = re.findall(r"<pre class=command>(.*?)</pre>", out.read_text(), re.S)
  monkeypatch.chdir(tmp_path / "x" if place == "elsewhere" else tmp_path)
  assert ("the commands are for the folder that holds made up" in out.read_text()) == (place == "elsewhere")
  ablate, report = (shlex.split(line)[1:] for line in html.unescape(block).splitlines())
  capsys.readouterr()
  assert llmarch([*ablate, "--list"]) == 0
  assert "9 trials of budget tiny, 9 of them recorded" in capsys.readouterr().out
  assert llmarch(report) == 0


@pytest.mark.parametrize(
  ("words", "sentence"),
  [
    (["made_up"], "made_up has no records; run llmarch ablate"),
    (["nowhere"], "or the folder of a run, which has a config.json"),
    ([], "report on what?"),
    (["run", "made_up"], "made_up is no run"),
  ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path, capsys):
  write_ablation(tmp_path / "made_up", widths=[32, 64])
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "metrics.jsonl").write_text("")
  words = [str(tmp_path / w) for w in words]
  assert llmarch(["report", *words]) == 2
  assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
  ("flag", "sentence"),
  [
    ("--out={}/file/r.html", "--out: cannot write"),
    ("--out={}", "--out: cannot write"),
    ("--png={}/file/x", "--png: cannot write"),
    ("--budget=gpu", "made_up has no records of budget gpu"),
    ("--records={}/elsewhere", "made_up has no records"),
  ],
)
def test_what_cannot_be_reported_is_one_sentence(flag, sentence, tmp_path, capsys):
  summary(tmp_path)
  (tmp_path / "file").write_text("")
  capsys.readouterr()
  words = ["report", str(tmp_path / "made_up"), flag.format(tmp_path)]
  assert llmarch(words + ([] if "out" in flag else [f"--out={tmp_path / 'r.html'}"])) == 2
  said = capsys.readouterr().err
  assert sentence in said and said.count("\n") == 1


def test_two_experiments_of_one_name_are_refused(tmp_path, capsys):
  summary(tmp_path / "a"), summary(tmp_path / "b")
  folders = [str(tmp_path / x / "made_up") for x in "ab"]
  assert llmarch(["report", *folders, f"--out={tmp_path / 'r.html'}"]) == 2
  assert "are both named made_up; report on one of them at a time" in capsys.readouterr().err


def test_without_altair_nothing_is_written(tmp_path, capsys, monkeypatch):
  summary(tmp_path)
  monkeypatch.setitem(sys.modules, "altair", None)
  out = tmp_path / "r.html"
  assert llmarch(["report", str(tmp_path / "made_up"), "--readme", f"--out={out}"]) == 2
  assert "pip install 'llmarch[report]'" in capsys.readouterr().err
  assert not out.exists() and not (tmp_path / "made_up" / "README.md").exists()


# --------------------------------------------------------------------------------------------------- a browser

PROBE = """<script>
const errors = []; addEventListener('error', (e) => errors.push(e.message));
addEventListener('load', () => {
  const box = document.querySelector('.tablebox:has(th button)'), heads = [...box.querySelectorAll('th')];
  const at = heads.findIndex((h) => h.textContent.startsWith('loss'));
  const column = () => [...box.querySelectorAll('tbody tr')].map((r) => parseFloat(r.cells[at].dataset.value));
  const seen = [];
  for (let i = 0; i < 2; i++) { heads[at].querySelector('button').click(); seen.push(column()); }
  const before = heads[at].getAttribute('aria-sort');
  const input = box.querySelector('input');
  let shown = null;
  if (input) { input.value = 'd_ff=64'; input.dispatchEvent(new Event('input'));
    shown = [...box.querySelectorAll('tbody tr')].filter((r) => !r.hidden).length; }
  const scale = (svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const letters = (t) => parseFloat(getComputedStyle(t).fontSize) * scale(t.ownerSVGElement);
  const small = [...document.querySelectorAll('svg text')].map(letters);
  const out = [...document.querySelectorAll('svg text')].filter((t) => {
    const [a, b] = [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()];
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1; });
  document.title = JSON.stringify({seen, before, shown, errors, marks: document.querySelectorAll('svg path').length,
    wide: document.documentElement.scrollWidth, window: innerWidth, letters: Math.min(...small),
    clipped: out.map((t) => t.textContent)});
});
</script>"""


@pytest.mark.full
@pytest.mark.parametrize(
  "width", [1280, 500]
)  # the narrowest window of a headless Chromium; inside it, a phone's frame
def test_a_browser_loads_sorts_and_fits_the_page(width, tmp_path, cases):
  browser = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
  )
  if browser is None:
    pytest.skip("THERE IS NO CHROMIUM (apt-get install chromium)")
  s = summary(tmp_path)
  # More than three arms have a filter; one without numbers is last, either way.
  s["arms"][1:1] = [dict(s["arms"][0], arm="copy"), dict(s["arms"][0], arm="empty", metrics={})]
  text = page.page("t", [page.ablation(s)]).replace("<head>", f"<head>{PROBE}")
  phone = width < 600
  (tmp_path / "inner.html").write_text(text)
  frame = (
    '<iframe src="inner.html" width="390" height="2000" onload="document.title = this.contentDocument.title"></iframe>'
  )
  (tmp_path / "page.html").write_text(frame if phone else text)
  done = subprocess.run(
    [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
     "--enable-logging=stderr", f"--window-size={width},2000", "--virtual-time-budget=5000", "--dump-dom",
     (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  title = html.unescape(re.search(r"<title>(\{.*?\})</title>", done.stdout, re.S)[1])
  found = json.loads(title)
  assert found["errors"] == [] and "CONSOLE" not in done.stderr, done.stderr
  up, down = found["seen"]
  assert up.pop() is None and down.pop() is None
  assert up == sorted(up) and down == up[::-1] and len(set(up)) > 1 and found["before"] == "descending"
  assert found["shown"] == 1 and found["marks"] > 20
  assert found["wide"] <= found["window"] == (390 if phone else width) and found["letters"] >= 10
  assert found["clipped"] == []
  cases("pages loaded in a browser")
