"""Ablations: sweeps, matching, statistics and records against oracles; sweeps that are killed, and trials that fail."""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from tiers import three

import llmarch.layers.registry  # noqa: F401
from llmarch.__main__ import main as llmarch_main
from llmarch.analysis import cost
from llmarch.build import assign, build, to_dict
from llmarch.errors import UserError
from llmarch.lab import ablation as ab
from llmarch.lab import records, results, runner
from llmarch.lab import sweep as sweeps
from llmarch.lab.ablation import Match
from llmarch.lab.match import matched
from llmarch.lab.statistics import (
  INCONCLUSIVE,
  NOT_SUPPORTED,
  OPPOSITE,
  SUPPORTED,
  different,
  noise_floor,
  paired,
  verdict,
)
from llmarch.report import page
from llmarch.run_config import RunConfig

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.py"

# ------------------------------------------------------------------------------------------------ sweeps, arms


def test_grid_zip_and_chain_are_products_rows_and_sums():
  values = {"a": [1, 2, 3], "b.c": ["x", "y"]}
  assert ab.grid(values) == [{"a": a, "b.c": b} for a, b in itertools.product(*values.values())]
  assert ab.zipped({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
  assert ab.chain(ab.grid(values), ab.zipped({"d": [5]})) == [*ab.grid(values), {"d": 5}]
  assert [arm.name for arm in ab.arms(ab.grid(values))][:2] == ["a=1 c=x", "a=1 c=y"]
  with pytest.raises(UserError, match="one length"):
    ab.zipped({"a": [1, 2], "b": [3]})


def base(**changes) -> RunConfig:
  from llmarch.commands.common import load_config

  return build(RunConfig, assign(to_dict(load_config(str(TINY))), changes.items()))


FFN = "model.blocks.layer.ffn"


@pytest.mark.parametrize("quantity", ["params", "flops"])
@pytest.mark.parametrize(
  "change", [{f"{FFN}.gated": False}, {"model.d_model": 96}, {"model.blocks.layer.mixer.num_kv_heads": 1}]
)
def test_the_matched_width_is_the_nearest_of_all(quantity, change, cases):
  target, config = base(), base(**change)
  of = {
    "params": lambda c: cost.params(c.model)["total"],
    "flops": lambda c: (
      c.train.steps * c.train.batch_size * c.train.seq_len * cost.train_flops_per_token(c.model, c.train.seq_len)
    ),
  }[quantity]
  found, sizes, report = matched(Match(quantity, multiple=8, tolerance=0.5), config, target)
  widths = range(8, 2048, 8)
  errors = {n: abs(of(base(**change, **{f"{FFN}.d_ff": n})) - of(target)) for n in widths}
  best = min(errors.values())
  assert errors[sizes[f"{FFN}.d_ff"]] == best and found.model.blocks["layer"].ffn.d_ff == sizes[f"{FFN}.d_ff"]
  assert report["residual"] == pytest.approx(of(found) / of(target) - 1) and report["value"] == of(found)
  cases("matched widths are the nearest of all", len(errors))


def test_depth_and_steps_are_matched_too():
  narrow, target = base(**{"model.d_model": 64}), base()
  found, sizes, _ = matched(Match("params", by="depth", tolerance=0.3), narrow, target)
  of = lambda n: abs(
    cost.params(base(**{"model.d_model": 64, "model.stack": f"{n}*layer"}).model)["total"]
    - cost.params(target.model)["total"]
  )
  assert sizes == {"model.stack": f"{min(range(1, 200), key=of)}*layer"} == {"model.stack": found.model.stack}
  found, sizes, report = matched(Match("tokens", by="steps"), base(**{"train.batch_size": 16}), target)
  assert sizes == {"train.steps": target.train.steps // 2} and report["residual"] == 0


@pytest.mark.parametrize(
  ("match", "change", "sentence"),
  [
    (Match("params"), {"model.d_model": 512}, "cannot match .* params by d_ff: the nearest"),
    (Match("params", by="depth"), {"model.stack": "1*layer 2*layer"}, "more than one term"),
    (Match("params"), {f"{FFN}": None}, "no block has a d_ff"),
  ],
)
def test_impossible_matches_are_refused(match, change, sentence):
  with pytest.raises(UserError, match=sentence):
    matched(match, base(**change), base())


def test_quantities_and_knobs_that_do_not_go_together_are_refused():
  for bad in ({"quantity": "tokens"}, {"quantity": "params", "by": "steps"}, {"quantity": "weight"}):
    with pytest.raises(UserError):
      Match(**bad)


# ------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_paired_intervals_are_those_of_scipy(n, cases):
  rng = np.random.default_rng(n)
  a, b = rng.normal(size=n), rng.normal(size=n)
  effect = paired(dict(enumerate(a)), dict(enumerate(b)) | {99: 5.0})
  theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
  assert effect.n == n and np.allclose([effect.low, effect.high], theirs, rtol=1e-12)
  cases("paired intervals against scipy")


def test_intervals_cover_the_true_effect_as_often_as_they_say(cases):
  rng, trials, hits = np.random.default_rng(7), 4000, 0
  for values in rng.normal(0.3, 1.0, size=(trials, 4)):
    e = paired(dict(enumerate(values)), dict.fromkeys(range(4), 0.0))
    hits += e.low <= 0.3 <= e.high
  assert abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)
  cases("coverage of the interval", trials)


def effect_of(*values):
  return paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


@pytest.mark.parametrize(
  ("values", "floor", "rule", "expected"),
  [
    ((-0.10, -0.11, -0.12), 0.04, ("less", 0.03), SUPPORTED),
    ((-0.10, -0.11, -0.12), 0.04, ("greater", 0.0), OPPOSITE),
    ((-0.10, -0.11, -0.12), 0.20, ("less", 0.03), INCONCLUSIVE),  # below the noise floor
    ((-0.10, -0.11, -0.12), math.inf, ("less", 0.0), INCONCLUSIVE),  # whose size is not known
    ((-0.10, 0.11, -0.12), 0.04, ("less", 0.0), INCONCLUSIVE),  # the interval contains zero
    ((-0.010, -0.011, -0.012), 0.001, ("less", 0.03), NOT_SUPPORTED),  # there, and smaller than claimed
    ((0.001, -0.001, 0.0005), 0.04, ("less", 0.03), NOT_SUPPORTED),
    ((0.001, -0.001, 0.0005), 0.04, ("equal", 0.03), SUPPORTED),
    ((0.101, 0.099, 0.1005), 0.04, ("equal", 0.03), NOT_SUPPORTED),
    ((0.101, 0.099, 0.1005), 0.04, ("equal", 0.03, 0.1), SUPPORTED),
    ((0.101, 0.039, 0.0105), 0.04, ("equal", 0.03), INCONCLUSIVE),
    ((-5.0,), 0.01, ("less", 0.0), INCONCLUSIVE),  # one seed is no verdict
    ((-5.0, -5.0), 0.01, ("less", 0.0), INCONCLUSIVE),
    ((math.nan, 1.0, 1.0), 0.01, ("less", 0.0), INCONCLUSIVE),
  ],
)
def test_the_rule(values, floor, rule, expected):
  assert verdict(effect_of(*values), floor, *rule) == expected


def test_less_is_greater_turned_round(cases):
  rng = np.random.default_rng(3)
  for _ in range(300):
    values, floor, by = (
      rng.normal(rng.normal(), 0.3, size=rng.integers(2, 7)),
      abs(rng.normal()) / 3,
      abs(rng.normal()) / 3,
    )
    flipped = verdict(effect_of(*(-values)), floor, "greater", by)
    assert verdict(effect_of(*values), floor, "less", by) == flipped
  cases("the rule is symmetric", 300)


def recorded_noise() -> list[float]:
  rows = records.latest(records.read(ROOT / "experiments" / "noise")).values()
  return [row["metrics"]["loss"] for row in rows if row["budget"] == "tiny" and row["status"] == "ok"]


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("of", ["recorded", "drawn"])
def test_identical_arms_are_never_called_different(of, n, cases):
  """100 pairs of arms of the same config, other seeds each: those recorded in experiments/noise, or drawn. An effect of
  twice the floor is seen in all of them (else the rule would only be blind)."""
  rng, told, seen = np.random.default_rng(11), 0, 0
  for _ in range(100):
    runs = np.array(recorded_noise()) if of == "recorded" else rng.normal(1.8, 0.015, size=16)
    chosen = rng.permutation(len(runs))[: 2 * n]
    a, b = runs[chosen[:n]], runs[chosen[n:]]
    floor = noise_floor(list(runs))
    told += different(paired(dict(enumerate(a)), dict(enumerate(b))), floor)
    shifted = paired(dict(enumerate(b + 2 * floor)), dict(enumerate(b + rng.normal(0, floor / 20, size=n))))
    seen += different(shifted, floor)
  assert (told, seen) == (0, 100)
  cases("identical arms are not different", 100)


def test_the_noise_floor_is_two_deviations_of_a_difference():
  values = [1.0, 1.1, 0.95, 1.02]
  assert noise_floor(values) == pytest.approx(2 * np.sqrt(2) * np.std(values, ddof=1))
  assert noise_floor(values[:2]) == math.inf


# ---------------------------------------------------------------------------------------------------- records


def row(key: str, **fields) -> dict:
  return {"key": key, "arm": "a", "seed": 0, "budget": "tiny", "phase": "main", "status": "ok", "metrics": {},
          "overrides": {}} | fields  # fmt: skip


def test_a_trial_is_recorded_once_by_any_number_of_writers(tmp_path, cases):
  code = (
    "import sys; from llmarch.lab import records\n"
    f"for i in range(20): records.add(sys.argv[1], {row('')} | {{'key': str(i), 'by': sys.argv[2]}})"
  )
  writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], cwd=ROOT) for i in range(3)]
  assert [w.wait() for w in writers] == [0, 0, 0]
  assert sorted(int(r["key"]) for r in records.read(tmp_path)) == list(range(20))
  cases("records are written once", 60)


def test_damaged_lines_are_left_out_and_said_and_nothing_else_is_lost(tmp_path, cases):
  for i in range(4):
    assert records.add(tmp_path, row(str(i)))
  assert not records.add(tmp_path, row("2")) and records.add(tmp_path, row("2", attempt=2))
  whole, said = (tmp_path / records.NAME).read_bytes(), []
  lines = whole.split(b"\n")
  rng = random.Random(5)
  for _ in range(60):
    which = rng.randrange(5)
    line = bytearray(lines[which])
    line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
    damaged = [*lines[:which], bytes(line), *lines[which + 1 :]]
    (tmp_path / records.NAME).write_bytes(b"\n".join(damaged))
    kept = records.read(tmp_path, say=said.append)
    assert len(kept) == 4 and "half-written or damaged" in said[-1]
  for cut in range(1, len(lines[4])):
    (tmp_path / records.NAME).write_bytes(whole[:-1][:-cut])
    assert len(records.read(tmp_path, say=said.append)) == 4
  assert records.add(tmp_path, row("new")) and [r["key"] for r in records.read(tmp_path)][-1] == "new"
  cases("damaged records are left out", 60 + len(lines[4]) - 1)


def test_records_of_another_version_are_refused_and_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "VERSION", 99)
  records.add(tmp_path, row("0"))
  before = (tmp_path / records.NAME).read_bytes()
  monkeypatch.undo()
  with pytest.raises(UserError, match="has records of version 99"):
    records.read(tmp_path)
  assert (tmp_path / records.NAME).read_bytes() == before


@pytest.mark.parametrize(
  "line",
  [
    {"key": "1", "note": "by hand"},
    row("1", metrics=None),
    row("1", metrics={"loss": "low"}),
    row("1", metrics={"loss": math.nan}),
    row("1", seed="zero"),
    row("1", status="good"),
    row("1", status="failed"),
  ],
)
def test_a_line_that_is_no_record_is_refused_and_kept(line, tmp_path):
  records.add(tmp_path, row("0"))
  records.add(tmp_path, row("2", status="failed", reason="a NaN", metrics={"loss": math.nan}))
  assert len(records.read(tmp_path)) == 2
  records.add(tmp_path, line)
  before = (tmp_path / records.NAME).read_bytes()
  with pytest.raises(UserError, match="holds a line that is no record .*take it out"):
    records.read(tmp_path)
  assert (tmp_path / records.NAME).read_bytes() == before


def test_records_that_cannot_be_read_or_written_are_a_sentence(tmp_path):
  (tmp_path / "a" / records.NAME).mkdir(parents=True)
  with pytest.raises(UserError, match="records.jsonl cannot be read"):
    records.read(tmp_path / "a")
  sweep = sweeps.Sweep(write_ablation(tmp_path / "b" / "widths", widths=[32]), str(tmp_path / "c"), "tiny", None,
                       retry_failed=False, say=print)  # fmt: skip
  (tmp_path / "c").write_text("a file where the folder should be")
  with pytest.raises(UserError, match="cannot write .*records.jsonl"):
    sweep.record(sweep.plan()[0], {"status": "ok", "metrics": {}})


# ----------------------------------------------------------------------------------------------- whole sweeps

ABLATION = """
import os, signal, time
from llmarch.lab.ablation import Ablation, Arm, Budget, Comparison, grid, arms
from llmarch.train.faults import Fault

def play(config, workdir):
  width = config.model.blocks["layer"].ffn.d_ff
  if os.path.exists(os.path.join(os.path.dirname(__file__), "mended")): return {{"loss": 1 / width}}
  if width == {nan}: raise Fault("the loss is nan at step 3")
  if width == {memory}: os.kill(os.getpid(), signal.SIGKILL)
  if width == {slow}: time.sleep(60)
  if width == {broken}: raise RuntimeError("a bug")
  time.sleep({seconds})
  return {{"loss": 1 / width + 0.001 * ((config.seed * 7919 + width) % 13), "width": float(width)}}

def get_ablation():
  return Ablation(
    title="Widths", question="Does width help?", config={config!r},
    arms=(Arm("first"), *arms(grid({{"model.blocks.layer.ffn.d_ff": {widths}}}))),
    comparisons=(Comparison("wider", "Wider is lower", "d_ff={widths[0]}", "less", 0.001),),
    budgets={{"tiny": Budget(seeds={seeds}, limit={limit})}},
    trial=play, learning_rates={rates},
  )
"""


def write_ablation(folder: pathlib.Path, **fields) -> str:
  defaults = dict(nan=0, memory=0, slow=0, broken=0, seconds=0, widths=[32, 64], seeds=3, limit=50.0, rates=())
  folder.mkdir(parents=True)
  (folder / "ablation.py").write_text(ABLATION.format(**(defaults | fields), config=str(TINY)))
  return str(folder)


def test_a_plan_says_what_is_recorded_and_that_two_seeds_give_no_verdict(tmp_path, capsys, monkeypatch):
  folder = write_ablation(tmp_path / "made_up", widths=[32])
  one = ab.load_ablation(folder)
  for t in ab.trials(one, folder, "tiny")[:2]:
    records.add(folder, row(t.key, arm=t.arm, seed=t.seed))
  assert llmarch_main(["ablate", folder, "--list", "--seeds=2", "--json"]) == 0
  said = capsys.readouterr()
  assert [r["recorded"] for r in json.loads(said.out)] == ["yes", "yes", "-", "-"]
  assert "no verdict can come of 2 seeds" in said.err
  assert ab.too_few_seeds(one, folder, "tiny", 3) == ab.too_few_seeds(one, folder, "tiny", None) == ""
  heard = []
  monkeypatch.setattr(runner, "_run_local", lambda *args, **kw: heard.append("runs"))
  runner.run_all([folder], budget="tiny", seeds=2, say=heard.append)
  assert "no verdict can come of 2 seeds" in heard[0] and heard[1:] == ["runs"]


VOLATILE = ("seconds", "workers", "crc32", "hardware")


def table(folder) -> dict:
  """The records without what differs from run to run, by trial."""
  rows = records.read(folder)
  counts = collections.Counter(r["key"] for r in rows)
  assert set(counts.values()) == {1}, "a trial is there twice"
  return {r["key"]: {k: v for k, v in r.items() if k not in VOLATILE} for r in rows}


@pytest.mark.nightly
def test_r21_a_sweep_killed_at_random_ends_with_the_same_table(request, tmp_path, cases):
  kills = 10 if request.config.getoption("--nightly") else 3
  fields = dict(widths=[32, 48, 64], seeds=3, seconds=0.2)
  whole = write_ablation(tmp_path / "whole" / "widths", **fields)
  runner.run_all([whole], budget="tiny", workers=2, say=lambda text: None)
  killed = write_ablation(tmp_path / "killed" / "widths", **fields)
  command = [sys.executable, "-m", "llmarch", "ablate", killed, "--workers=2"]
  rng, done = random.Random(21), 0
  for _ in range(kills):
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = len(records.read(killed, say=lambda text: None))
    time.sleep(rng.uniform(2.0, 7.0))
    done += driver.poll() is None
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert len(records.read(killed, say=lambda text: None)) >= before
  assert done >= 2, "the sweep ended before it was killed"
  assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
  strip = lambda t: sorted((r["arm"], r["seed"], json.dumps(r["metrics"])) for r in t.values())
  assert strip(table(killed)) == strip(table(whole)) and len(table(killed)) == 12
  a, b = (results.summarize(folder) for folder in (killed, whole))
  assert a["comparisons"] == b["comparisons"] and a["missing"] == b["missing"] == 0
  left = [p for p in pathlib.Path("/proc").glob("[0-9]*/cmdline") if killed.encode() in _read(p)]
  assert not left, "a trial outlived its driver"
  cases("R21: kills of a sweep", done)


def _read(path) -> bytes:
  try:
    return path.read_bytes()
  except OSError:
    return b""


@pytest.mark.full
def test_failed_trials_are_recorded_and_the_others_go_on(tmp_path, capsys):
  folder = write_ablation(
    tmp_path / "widths", widths=[32, 40, 48, 56, 64], nan=32, memory=40, slow=48, broken=56, seeds=1, limit=30.0
  )
  (sweep,) = runner.run_all([folder], budget="tiny", workers=2, say=lambda text: None)
  rows = {r["arm"]: r for r in records.read(folder)}
  kinds = {arm: r.get("failure", r["status"]) for arm, r in rows.items()}
  assert kinds == {
    "first": "ok", "d_ff=32": "numbers", "d_ff=40": "memory", "d_ff=48": "time", "d_ff=56": "died", "d_ff=64": "ok",
  }  # fmt: skip
  assert "the loss is nan at step 3" in rows["d_ff=32"]["reason"] and "a bug" in rows["d_ff=56"]["reason"]
  assert not sweep.pending()
  found = results.summarize(folder)
  assert [c["verdict"] for c in found["comparisons"]] == [INCONCLUSIVE] and "failed" in found["comparisons"][0]["why"]
  assert [len(a["failures"]) for a in found["arms"]] == [0, 1, 1, 1, 1, 0]
  # Again, in vain, then what was in the way is gone: the failure stays in the book, the last attempt counts.
  assert llmarch_main(["ablate", folder, "--seeds=1"]) == 1
  said = capsys.readouterr().err
  assert "widths: d_ff=32, seed 0: the loss is nan" in said and "4 trials failed; --retry_failed" in said
  assert len(records.read(folder)) == 6
  (tmp_path / "widths" / "mended").touch()
  runner.run_all([folder], budget="tiny", workers=2, retry_failed=True, say=lambda text: None)
  rows = records.read(folder)
  assert len(rows) == 10 and {r["status"] for r in records.latest(rows).values()} == {"ok"}
  assert sorted(r["attempt"] for r in rows) == [1] * 6 + [2] * 4


@pytest.mark.parametrize(
  ("metrics", "kind", "sentence"),
  three(
    lambda case: case[0] in ("{'loss': float('nan')}", "{'loss': None}"),
    lambda case: case[0] in ("[1.0]", "{1: 1.0}") or case[1] is None,
    [
      ("{'loss': float('nan')}", "numbers", "the metric 'loss' is nan"),
      ("{'loss': float('inf'), 'other': 1.0}", "numbers", "the metric 'loss' is inf"),
      ("{'loss': None}", "refused", "the metric 'loss' of a trial must be a number, got None"),
      ("{'loss': '1.0'}", "refused", "must be a number, got '1.0'"),
      ("{'loss': {'a': 1.0}}", "refused", "must be a number"),
      ("[1.0]", "refused", "a trial must give {metric: number}"),
      ("{}", "refused", "a trial must give {metric: number}"),
      ("{'loss': True}", "refused", "must be a number, got True"),
      ("{'loss': 10**400}", "numbers", "the metric 'loss' is 1000"),
      ("{1: 1.0}", "refused", "the name of a metric must be a text, got 1"),
      ("{'loss': __import__('numpy').float32(0.5), 'n': 2}", None, ""),
    ],
  ),
)
def test_metrics_that_are_no_numbers_are_a_failure_with_a_reason(metrics, kind, sentence, tmp_path):
  folder = write_ablation(tmp_path / "widths", widths=[32], seeds=1)
  path = tmp_path / "widths" / "ablation.py"
  path.write_text(path.read_text().replace("  time.sleep(", f"  return {metrics}\n  time.sleep("))
  runner.run_all([folder], budget="tiny", workers=2, say=lambda text: None)
  rows = records.read(folder)
  assert len(rows) == 2 and {r.get("failure") for r in rows} == {kind}
  assert all(sentence in r.get("reason", "") for r in rows)
  assert (kind is None) == (rows[0]["metrics"] == {"loss": 0.5, "n": 2.0})
  assert results.summarize(folder)["trials"] == 2


@pytest.mark.nightly
def test_a_sibling_s_trial_is_not_computed_again(tmp_path):
  first, second = (write_ablation(tmp_path / name, widths=[32], seeds=1) for name in ("one", "two"))
  runner.run_all([first, second], budget="tiny", workers=2, say=lambda text: None)
  ones, twos = table(first), table(second)
  assert ones.keys() == twos.keys() and len(ones) == 2
  metrics = lambda t: {key: row["metrics"] for key, row in t.items()}
  assert metrics(ones) == metrics(twos)
  sources = [r["from"] for r in (*ones.values(), *twos.values()) if "from" in r]
  assert len(sources) == 2 and set(sources) <= {"one", "two"}


def test_a_function_whose_code_changed_has_no_records_yet(tmp_path):
  """Neither a sibling's of the same name, nor its own from before the edit, counts."""
  first, second = (write_ablation(tmp_path / name, widths=[32], seeds=1) for name in ("one", "two"))
  path = tmp_path / "two" / "ablation.py"
  text = path.read_text()
  path.write_text(text.replace('"loss": 1 / width', '"loss": 100 + 1 / width'))
  runner.run_all([first, second], budget="tiny", workers=2, say=lambda text: None)
  loss = lambda folder: [r["metrics"]["loss"] for r in records.read(folder)]
  assert max(loss(first)) < 100 < min(loss(second)) and not any("from" in r for r in records.read(second))
  path.write_text(text)
  found = results.summarize(second)
  assert (found["trials"], found["missing"], found["stale"]) == (0, 2, 2)
  runner.run_all([first, second], budget="tiny", workers=2, say=lambda text: None)
  assert max(loss(second)[2:]) < 100 and {r.get("from") for r in records.read(second)[2:]} == {"one"}


def test_a_line_that_is_moved_out_of_a_block_is_an_edit(tmp_path):
  folder = write_ablation(tmp_path / "widths", widths=[32], seeds=1)
  path = tmp_path / "widths" / "ablation.py"
  before = {t.key for t in ab.trials(ab.load_ablation(folder), folder, "tiny")}
  text = path.read_text()
  path.write_text(text.replace("  time.sleep(", "  if width:\n    time.sleep("))
  inside = {t.key for t in ab.trials(ab.load_ablation(folder), folder, "tiny")}
  path.write_text(text.replace("  time.sleep(", "  if width:\n    pass\n  time.sleep("))
  after = {t.key for t in ab.trials(ab.load_ablation(folder), folder, "tiny")}
  assert not before & inside and not inside & after


@pytest.mark.nightly
def test_arms_are_called_what_the_file_calls_them(tmp_path):
  """A trial is its config: names may be exchanged or new, and what was recorded goes with the config."""
  folder = write_ablation(tmp_path / "widths", widths=[32, 64], rates=(1e-3, 2e-3))
  runner.run_all([folder], budget="tiny", workers=2, say=lambda text: None)
  before = results.summarize(folder)
  path = tmp_path / "widths" / "ablation.py"
  exchanged = 'Arm("d_ff=32", {"model.blocks.layer.ffn.d_ff": 64}), Arm("d_ff=64", {"model.blocks.layer.ffn.d_ff": 32})'
  text = path.read_text()
  path.write_text(text.replace('*arms(grid({"model.blocks.layer.ffn.d_ff": [32, 64]}))', exchanged))
  after = results.summarize(folder)
  numbers = lambda s: {arm["arm"]: (arm["metrics"]["width"]["mean"], arm["cost"]["params"]) for arm in s["arms"]}
  old, new = numbers(before), numbers(after)
  assert new == {"first": old["first"], "d_ff=32": old["d_ff=64"], "d_ff=64": old["d_ff=32"]}
  effect = lambda s: s["comparisons"][0]["effect"]
  assert after["missing"] == after["stale"] == 0 and effect(after) != effect(before)
  assert {(row["arm"], row["learning_rate"]) for row in after["tuning"]} == {
    (arm, rate) for arm in new for rate in (1e-3, 2e-3)
  }


@pytest.mark.nightly
def test_trials_of_two_budgets_that_are_one_config_are_one_trial(tmp_path):
  folder = write_ablation(tmp_path / "widths", widths=[32], rates=(1e-3, 2e-3))
  path = tmp_path / "widths" / "ablation.py"
  path.write_text(path.read_text().replace("budgets={", 'budgets={"more": Budget(seeds=5), '))
  pairs = lambda budget: results.summarize(folder, budget=budget)["comparisons"][0]["n"]
  runner.run_all([folder], budget="tiny", workers=2, say=lambda text: None)
  assert len(records.read(folder)) == 10 and (pairs("tiny"), pairs("more")) == (3, 3)
  runner.run_all([folder], budget="more", workers=2, say=lambda text: None)
  assert len(records.read(folder)) == 14 and (pairs("tiny"), pairs("more")) == (3, 5)
  assert {results.summarize(folder, budget=b)["stale"] for b in ("tiny", "more")} == {0}


@pytest.mark.nightly
def test_seeds_beyond_the_budget_s_count_only_where_they_are_asked_for(tmp_path):
  folder = write_ablation(tmp_path / "widths", widths=[32], seeds=3)
  runner.run_all([folder], budget="tiny", seeds=5, workers=2, say=lambda text: None)
  pairs = lambda **more: results.summarize(folder, **more)["comparisons"][0]["n"]
  assert len(records.read(folder)) == 10 and (pairs(), pairs(seeds=4), pairs(seeds=5)) == (3, 4, 5)
  assert "--seeds=5" in page.commands(results.summarize(folder, seeds=5))
  assert "--seeds" not in page.commands(results.summarize(folder))


def test_a_metric_that_no_trial_records_stops_a_sweep_at_its_first(tmp_path):
  folder = write_ablation(tmp_path / "widths", widths=[32, 48, 64])
  path = tmp_path / "widths" / "ablation.py"
  path.write_text(path.read_text().replace('"less", 0.001)', '"less", 0.001, metric="los")'))
  with pytest.raises(UserError, match="comparison wider wants the metric 'los'.*name one of loss, width"):
    runner.run_all([folder], budget="tiny", workers=1, say=lambda text: None)
  rows = records.read(folder)
  assert len(rows) <= 4  # the arm that is compared is the second, of three seeds each
  assert results.summarize(folder)["comparisons"][0]["why"] in ("los is not recorded", "not run")


@pytest.mark.full
def test_a_second_sweep_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
  folder = write_ablation(tmp_path / "widths", widths=[32], seeds=1)
  with sweeps.only_sweep(pathlib.Path(folder)), pytest.raises(UserError, match="another sweep runs in"):
    runner.run_all([folder], budget="tiny", workers=1, say=lambda text: None)
  assert not records.read(folder)
  runner.run_all([folder], budget="tiny", workers=1, say=lambda text: None)
  assert len(records.read(folder)) == 2


def test_arms_of_one_config_and_unknown_rules_are_refused(tmp_path):
  folder = write_ablation(tmp_path / "widths", widths=[344], seeds=1)  # what the baseline has
  with pytest.raises(UserError, match="arms 'first' and 'd_ff=344' are the same config"):
    runner.run_all([folder], budget="tiny", workers=1, say=lambda text: None)
  with pytest.raises(UserError, match="expect='smaller' is not one of"):
    ab.Comparison("x", "s", "a", "smaller")


@pytest.mark.full
def test_every_arm_runs_at_the_best_of_its_own_learning_rates(tmp_path):
  folder = write_ablation(tmp_path / "widths", widths=[32], seeds=1, rates=(1e-3, 2e-3))
  text = (tmp_path / "widths" / "ablation.py").read_text()
  # The loss is lowest at a rate that depends on the arm.
  text = text.replace(
    '"loss": 1 / width', '"loss": abs(config.optimizer.learning_rate - (1e-3 if width == 32 else 2e-3)) + 1 / width'
  )
  (tmp_path / "widths" / "ablation.py").write_text(text)
  runner.run_all([folder], budget="tiny", workers=2, say=lambda text: None)
  rows = records.read(folder)
  rates = {r["arm"]: r["overrides"]["optimizer.learning_rate"] for r in rows if r["phase"] == "main"}
  assert rates == {"first": 2e-3, "d_ff=32": 1e-3}
  assert {r["seed"] for r in rows if r["phase"] == "tune"} == {ab.TUNING_SEED} and len(rows) == 6
  assert len(results.summarize(folder)["tuning"]) == 4


@pytest.mark.full
def test_a_trial_trains_and_its_numbers_are_those_of_the_same_run(tmp_path):
  """The record of a trained trial equals `llmarch train` of the resolved config."""
  from llmarch.run import train_run

  small = {"train.steps": 4, "train.batch_size": 2, "train.seq_len": 16, "train.log_every": 1, "eval.every": 2,
           "eval.batches": 2, "eval.sample_tokens": 4, "model.stack": "1*layer", "checkpoint.every": 0,
           "optimizer.schedule": {"kind": "constant"}}  # fmt: skip
  folder = tmp_path / "trained"
  folder.mkdir()
  (folder / "ablation.py").write_text(
    "from llmarch.lab.ablation import Ablation, Arm, Budget\n"
    "from llmarch.lab.measures import losses_at_lengths, partition\n"
    "def get_ablation():\n"
    f"  return Ablation('t', 'q', {str(TINY)!r}, (Arm('a'),), (), {{'tiny': Budget(1, overrides={small!r})}},"
    " measures=(losses_at_lengths(2), partition))\n"
  )
  said = []
  runner.run_all([str(folder)], budget="tiny", workers=1, say=said.append)
  (record,) = records.read(folder)
  assert record["status"] == "ok", record
  (trial,) = ab.trials(ab.load_ablation(folder), folder, "tiny")
  last = train_run(build(RunConfig, trial.config), str(tmp_path / "run"))
  found = record["metrics"]
  # The process of the trial compiles with all optimisations, this one with none.
  assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-4)
  assert found["loss_1x"] == pytest.approx(found["loss"], rel=1e-4)
  assert found["rise_2x"] == pytest.approx(found["loss_2x"] - found["loss_1x"], abs=1e-9)
  assert [step for step, _ in record["eval_curve"]] == [2, 4] and len(record["curve"]) == 4
  assert record["sample"].startswith("def ") and record["step_ms"]["low"] <= record["step_ms"]["median"]
  assert "1 of 1" in said[-1] or "[1/1]" in said[-1]


@pytest.mark.full
def test_gradients_by_layer_are_those_of_a_training_step(monkeypatch):
  """A step of plain descent at rate 1 moves the parameters by the gradient."""
  from llmarch.data.pipeline import make_pipeline
  from llmarch.lab import measures
  from llmarch.layers.param import flatten
  from llmarch.models.decoder import Decoder
  from llmarch.train.step import make_train_step

  config = base(**{
    "seed": 3, "model.stack": "3*layer", "model.d_model": 24, "train.batch_size": 2, "train.seq_len": 12,
    "optimizer": {"algorithm": {"kind": "sgd"}, "schedule": {"kind": "constant"}, "learning_rate": 1.0,
                  "weight_decay": 0.0, "clip_norm": None},
  })  # fmt: skip
  data = make_pipeline(config.data, batch_size=2, seq_len=12, seed=3, vocab_size=config.model.vocab_size, split="train")
  step, draws = make_train_step(config), []
  for i in range(2):
    before = flatten(nnx.state(Decoder(config.model, jax.random.key(2 * 3 + i))))
    after, _ = step.step(step.init(before), data.batch(i))
    moved = {name.split("/")[-1]: np.asarray(x) - np.asarray(after["params"][name]) for name, x in before.items()}
    draws.append([[np.log(np.linalg.norm(g)) for g in moved[name]] for name in ("up", "down")])
  monkeypatch.setattr(measures, "DRAWS", 2)
  found = measures.initial_gradients(config, "")
  layers = [[found[f"log_{name}[{i}]"] for i in (1, 2, 3)] for name in ("up", "down")]
  np.testing.assert_allclose(layers, np.mean(draws, axis=0), atol=1e-3)
  assert found["log_last_gradient"] == layers[1][2] and found["last_gradient"] == pytest.approx(np.exp(layers[1][2]))
  assert found["log_up_last_over_first"] == pytest.approx(layers[0][2] - layers[0][0])


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  ("old", "new", "sentence"),
  [
    ('d_ff": [32]', 'dff": [32]', "comparison wider names the arm 'd_ff=32', which is not there"),
    ('Arm("first"),', 'Arm("first"), Arm("d_ff=32"),', "arm 'd_ff=32' is there twice"),
    ('Arm("first")', 'Arm("first", {"model.d_modle": 1})', "arm 'first': config.model.d_modle: no such key;"),
    ('Arm("first")', 'Arm("first", {"seed": 1})', "arm 'first' sets seed, which is the sweep's to set"),
    ('Arm("first")', 'Arm("first", 3)', "arm 'first': overrides must be"),
    ('Arm("first")', '"first"', "arms must hold Arm alone, got 'first'"),
    ("Budget(seeds=1, limit=50.0)", "3", "budgets must hold Budget alone, got 3"),
    ("trial=play", 'trial="play"', "trial and measures must be functions, got 'play'"),
    ("def play", "raise SystemExit(3)\ndef play", "line 6, failed with SystemExit"),
    ('Arm("first")', 'Arm("first", {"model.d_model": -1})', "arm 'first': config.model.d_model must be at least 1"),
    ("return Ablation(", "return dict(", "get_ablation must return an Ablation"),
    ('"less", 0.001)', '"less", 0.001, metric="los")', "wants the metric 'los', which arm 'first' does not record"),
    ("trial=play", "trial=play, metric='los'", "the ablation wants the metric 'los', which arm"),
    ('title="Widths"', "title=3", "title must be a text, got 3"),
    ('Arm("first")', "Arm('a\\nb')", "an arm's name must be a text of one line"),
    ('Arm("first")', "Arm('first', {3: 1})", "arm 'first': the keys of overrides must be texts"),
    ('"less", 0.001)', '"less", float("inf"))', "comparison wider: by must be a finite number, got inf"),
    ('"less", 0.001)', '"equal", 1, "x")', "comparison wider: to must be a finite number, got 'x'"),
    ("comparisons=(", "comparisons=iter(()) or (", "comparisons must be a tuple or a list"),
    ("Budget(seeds=1", "Budget(seeds=1.5", "seeds must be a whole number from 1, got 1.5"),
    ("trial=play", "trial=eval('lambda c, w: {}')", "has no source; define it in a file"),
    ("learning_rates=()", "learning_rates=(1e-3,), metric='los'", "the ablation wants the metric 'los', which arm"),
    ('Arm("first")', 'Arm("first", {}, "params")', "arm 'first': match must be a Match"),
    ("learning_rates=()", "learning_rates=1e-3", "learning_rates must be a tuple or a list"),
    ("Budget(seeds=1", "Budget(seeds=1001", "--seeds must be at least 1 and at most 1000, got 1001"),
    ('"less", 0.001)', '"less", 0.001, baseline="d_ff=32")', "compares d_ff=32 with itself"),
    (str(TINY), "nowhere.py", "widths: config: there is no file .*nowhere.py"),
    ("def play", "1 / 0\ndef play", "failed with ZeroDivisionError"),
    ('"tiny"', '"small"', "has no budget 'tiny'"),
  ],
)
def test_bad_ablations_are_refused_in_one_sentence(tmp_path, old, new, sentence):
  folder = write_ablation(tmp_path / "widths", widths=[32], seeds=1)
  path = tmp_path / "widths" / "ablation.py"
  assert old in path.read_text()
  path.write_text(path.read_text().replace(old, new, 1))
  with pytest.raises(UserError, match=sentence) as error:
    runner.run_all([folder], budget="tiny", workers=1, say=lambda text: None)
    results.summarize(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("words", "sentence"),
  [
    ([], "which experiment"),
    (["nowhere"], "has no ablation.py"),
    (["experiments/glu", "--budget=huge"], "has no budget 'huge'"),
    (["experiments/glu", "--seeds=0"], "seeds"),
    (["experiments/glu", "--backend=slrm"], "backend"),
  ],
)
def test_bad_flags_end_with_2_and_a_sentence(words, sentence, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert llmarch_main(["ablate", *words]) == 2
  assert sentence in capsys.readouterr().err


def test_slurm_that_is_not_there_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
  folder = write_ablation(tmp_path / "widths", widths=[32], seeds=1)
  monkeypatch.setenv("PATH", str(tmp_path))
  assert llmarch_main(["ablate", folder, "--backend=slurm"]) == 2
  error = capsys.readouterr().err
  assert "Slurm" in error or "submitit" in error
  assert not records.read(folder)


EXPERIMENTS = sorted(p.parent.name for p in (ROOT / "experiments").glob("*/ablation.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_planned_and_has_current_records(name, cases):
  """All budgets resolve (matching included); the tiny records are those of the file as it is, at least 3 seeds."""
  folder = ROOT / "experiments" / name
  one = ab.load_ablation(folder)
  for budget in one.budgets:
    plan = ab.trials(one, folder, budget)
    assert len({(t.arm, t.seed) for t in plan}) == len(plan)
    for t in plan:
      assert t.match is None or abs(t.match["residual"]) <= 0.02
    cases("trials planned", len(plan))
  found = results.summarize(folder, budget="tiny")
  assert found["missing"] == 0 and found["stale"] == 0
  assert all(c["verdict"] and (c["n"] >= 3 or c["why"]) for c in found["comparisons"])
  assert dataclasses.asdict(one.arms[0])["name"] == found["baseline"]


@pytest.mark.full
def test_the_example_of_the_documentation_is_an_experiment(tmp_path):
  text = (ROOT / "experiments" / "README.md").read_text().split("```python\n")[1].split("```")[0]
  (tmp_path / "ablation.py").write_text(text.replace("../../configs/tiny.py", str(TINY)))
  plan = ab.trials(ab.load_ablation(tmp_path), tmp_path, "tiny")
  assert {t.arm for t in plan} == {"as it is", "d_ff=172", "d_ff=688"} and len(plan) == 9
  assert {t.config["train"]["steps"] for t in plan} == {60}


# ------------------------------------------------------------------------------------------------------- Slurm


@pytest.mark.full
def test_an_array_of_slurm_records_what_this_machine_does(tmp_path, cases):
  """The same trials through sbatch, a failing one among them; a second call submits nothing."""
  pytest.importorskip("submitit", reason="SUBMITIT IS NOT INSTALLED (pip install 'llmarch[slurm]')")
  try:
    idle = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%n"], capture_output=True, text=True).stdout.strip()
  except OSError:
    idle = ""
  if not idle:
    pytest.skip("THERE IS NO SLURM WITH AN IDLE NODE (tests/slurm.sh)")
  fields = dict(widths=[32, 40, 48], nan=40, seeds=2, seconds=0.1)
  here, there = (write_ablation(tmp_path / name / "widths", **fields) for name in ("local", "slurm"))
  runner.run_all([here], budget="tiny", workers=2, say=lambda text: None)
  command = [sys.executable, "-m", "llmarch", "ablate", there, "--backend=slurm", "--cpus_per_trial=1"]
  assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1  # a trial failed
  outcome = lambda folder: sorted(
    (r["arm"], r["seed"], r["status"], r["metrics"].get("loss")) for r in table(folder).values()
  )
  assert outcome(there) == outcome(here) and len(outcome(there)) == 8
  submitted = (pathlib.Path(there) / "trials" / "submitted.jsonl").read_text()
  assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1  # it still is failed
  assert (pathlib.Path(there) / "trials" / "submitted.jsonl").read_text() == submitted
  cases("trials through Slurm", 8)


def test_a_trial_s_key_is_of_what_it_computes_and_blind_to_new_defaults(cases):
  config, f, g = base(), dataclasses.replace, dataclasses.asdict  # any two functions
  key = ab.trial_key(config, (f,))
  changes = {
    "seed": 1,
    "train.steps": 7,
    f"{FFN}.d_ff": 8,
    "model.blocks.layer.mixer.position": {"kind": "alibi"},
    f"{FFN}.bias": True,
  }
  keys = {ab.trial_key(base(**{k: v}), (f,)) for k, v in changes.items()} | {ab.trial_key(config, (g,))}
  assert len(keys) == len(changes) + 1 and key not in keys
  # A new field with a default: the same data, one more key in it.
  grown = dataclasses.make_dataclass(
    "Grown", [("extra", int, 3)], bases=(type(config.train),), frozen=True, kw_only=True
  )
  train = grown(**{f.name: getattr(config.train, f.name) for f in dataclasses.fields(config.train)})
  assert ab.trial_key(dataclasses.replace(config, train=train), (f,)) == key
  assert ab.trial_key(dataclasses.replace(config, train=dataclasses.replace(train, extra=4)), (f,)) != key
  cases("keys of trials", len(changes) + 3)
