"""Reports: what a summary says is in the page and the README, escaped, whatever is missing; and a browser agrees."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import pytest
from test_lab import ROOT, row, write_ablation

from llmarch.__main__ import main as llmarch
from llmarch.lab import ablation as ablations
from llmarch.lab import records, results
from llmarch.report import charts, page, readme

pytest.importorskip("altair", reason="ALTAIR IS NOT INSTALLED (pip install 'llmarch[report]')")

NASTY = '<b>&"</script>'


def summary(tmp_path, *, failed=(), seeds=3, curves=True) -> dict:
  """Of an ablation with recorded trials, made up: loss = (1, 2, 3 ...)[arm] + seed / 8."""
  folder = write_ablation(tmp_path / "made_up", widths=[32, 64], seeds=seeds)
  path = pathlib.Path(folder) / "ablation.py"
  path.write_text(path.read_text().replace('Arm("first")', f"Arm({NASTY!r})").replace('"Widths"', f"{NASTY!r}"))
  one = ablations.load(folder)
  names = [arm.name for arm in one.arms]
  for t in ablations.trials(one, folder, "tiny"):
    loss = 1.0 + names.index(t.arm) + t.seed / 8
    more = {"curve": [[1, 9.0], [2, loss]], "eval_curve": [[1, 8.0], [2, loss]]} if curves else {}
    more |= {"sample": f"text {NASTY}", "step_ms": {"median": 5.0 + loss, "low": 4.0, "high": 9.0}}
    metrics = {"loss": loss, "loss_1x": loss, "loss_4x": loss + 1}
    if t.arm in failed:
      more, metrics = {"status": "failed", "failure": "numbers", "reason": f"a NaN {NASTY}"}, {}
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
  "one seed": {"seeds": 1},
  "no curves": {"curves": False},
}


@pytest.mark.parametrize("how", CASES)
def test_all_that_a_summary_says_is_on_the_page(how, tmp_path, cases):
  s = summary(tmp_path, **CASES[how])
  text = page.page("t", [page.ablation(s)], page.index([s]))
  seen = "\n".join(Reader(text).text)
  for arm in s["arms"]:
    assert arm["arm"] in seen and all(why in seen for why in arm["failures"])
    for m in arm["metrics"].values():
      assert page.number(m["mean"]) in seen
    assert page.number(arm["cost"]["params"]) in seen
  for c in s["comparisons"]:
    assert c["statement"] in seen and c["verdict"] in seen and c["rule"] in seen and page.interval(c) in seen
  assert s["title"] in seen and "a machine" in seen and "llmarch ablate experiments/made_up --budget=tiny" in seen
  assert ("a NaN" in seen) == bool(CASES[how].get("failed"))
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
    assert cells["arm"] == arm["arm"] and cells["seeds"] == str(len(values))
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
  assert {(r["multiple"], r["mean"]) for r in charts.length_rows(s)} >= {(1, 1.125), (4, 2.125)}
  points = [r for r in charts.quality_rows(s) if r["cost"] == "parameters"]
  assert {r["arm"]: r["value"] for r in points} == {a["arm"]: a["cost"]["params"] for a in s["arms"]}
  # No arm that is beaten in both is on the front, and every other is.
  for p in points:
    beaten = any(q["value"] <= p["value"] and q["mean"] < p["mean"] for q in points if q is not p)
    assert p["front"] != beaten
  drawn = [charts.svg(make(s), name) for name, make in charts.CHARTS.items()]
  assert all(text.startswith("<svg") and "<path" in text and 'width="100%"' in text for text in drawn)
  cases("charts that show a summary's numbers", len(drawn))


def test_verdicts_of_all_experiments_in_one_table(tmp_path):
  s = summary(tmp_path)
  text = readme.write_verdicts([s, s], tmp_path).read_text()
  assert text.count(s["comparisons"][0]["statement"]) == 2 and "2 comparisons" in text and "18 trials" in text


def test_the_command_writes_page_readme_and_figures(tmp_path, capsys):
  summary(tmp_path)
  folder, out = tmp_path / "made_up", tmp_path / "deep" / "r.html"
  assert llmarch(["report", str(folder), f"--out={out}", "--readme"]) == 0
  assert out.stat().st_size < 500_000
  written = {p.name for p in folder.iterdir()}
  assert {"README.md", "curves.png", "effects.png", "lengths.png", "costs.png"} <= written
  assert all(p.stat().st_size < 60_000 for p in folder.glob("*.png"))
  capsys.readouterr()
  assert llmarch(["report", str(folder), "--json"]) == 0
  assert json.loads(capsys.readouterr().out)[0]["name"] == "made_up"


def test_runs_are_compared(tmp_path):
  from llmarch.commands.common import load_config
  from llmarch.train.workdir import claim_workdir

  for name, seed in (("a", 0), ("b", 7)):
    claim_workdir(str(tmp_path / name), load_config(str(ROOT / "configs" / "tiny.py"), [("seed", str(seed))]))
    more = {"bits_per_byte": 1, "grad_norm": 1, "tokens_per_second": 9}
    rows = [{"step": n, "loss": 4.0 / n, **more} for n in (1, 2, 3)]
    lines = [json.dumps(r) for r in (*rows, {"step": 3, "eval/loss": 1.5, "eval/bits_per_byte": 2.2})]
    (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
  out = tmp_path / "r.html"
  assert llmarch(["report", str(tmp_path / "a"), str(tmp_path / "b"), f"--out={out}"]) == 0
  seen = "\n".join(Reader(out.read_text()).text)
  assert "config.seed: 7 here, 0 there" in seen and "1.5" in seen


@pytest.mark.parametrize(
  ("words", "sentence"),
  [
    (["made_up"], "made_up has no records; run llmarch ablate"),
    (["nowhere"], "nowhere has no ablation.py"),
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
  const height = (t) => t.getBoundingClientRect().height;
  const small = [...document.querySelectorAll('svg text')].map(height).filter((h) => h > 0);
  document.title = JSON.stringify({seen, before, shown, errors, marks: document.querySelectorAll('svg path').length,
    wide: document.documentElement.scrollWidth, window: innerWidth, letters: Math.min(...small)});
});
</script>"""


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
  s["arms"] += [dict(s["arms"][0], arm=f"copy {i}") for i in range(2)]  # more than three have a filter
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
  assert (
    up == sorted(up) and down == sorted(down, reverse=True) and len(set(up)) > 1 and found["before"] == "descending"
  )
  assert found["shown"] == 1 and found["marks"] > 20
  assert found["wide"] <= found["window"] == (390 if phone else width) and found["letters"] >= 8
  cases("pages loaded in a browser")
