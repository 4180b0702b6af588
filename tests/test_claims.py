"""The registry of claims: every check exists, and every fact comes out as the reading of its sources says."""

import json
import pathlib

import pytest
from tiers import plain_if

from llmarch import files
from llmarch.__main__ import main as llmarch
from llmarch.errors import UserError
from llmarch.lab import ablation, claims
from llmarch.lab.claims import Cited, Fact, Measured, Test

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "experiments"
CLAIMS = claims.load_claims(FOLDER / "claims.py")
FACTS = [c for c in CLAIMS if isinstance(c.check, Fact)]


def test_the_registry_covers_all_surveys_and_ways_to_check(cases):
  for survey in range(5):
    assert sum(any(s.startswith(f"survey {survey}") for s in c.stated_by) for c in CLAIMS) >= 5
  for way in (Fact, Test, Measured, Cited):
    assert any(isinstance(c.check, way) for c in CLAIMS)
  cases("claims in the registry", len(CLAIMS))


@pytest.mark.parametrize("claim", plain_if(FACTS[::4].count, FACTS), ids=lambda c: c.id)
def test_facts_come_out_as_the_sources_read(claim, tmp_path, cases):
  """The sheet's verdict was written by reading; the fact computes. (None: the sheet gives none.)"""
  (tmp_path / "facts.py").symlink_to(FOLDER / "facts.py")
  row = claims.run(claim, tmp_path)
  assert row["status"] in ("holds", "refuted") and row["evidence"]
  assert claim.sheet in (None, row["status"]), row["evidence"]
  cases("facts against the sources", 1)


def test_every_fact_says_when_it_holds():
  assert [c.id for c in FACTS if "Holds if " not in c.rule] == []


def test_measured_claims_name_comparisons_that_exist(cases):
  for claim in CLAIMS:
    if isinstance(claim.check, Measured):
      known = {c.id for c in ablation.load_ablation(FOLDER / claim.check.ablation).comparisons}
      assert claim.check.comparison in known, claim.id
      cases("claims bound to comparisons", 1)


def test_the_recorded_runs_are_of_the_claims_as_they_stand():
  rows = {row["id"]: row for row in claims.status(CLAIMS, FOLDER)}
  not_run = [id for id, row in rows.items() if row["status"] == "not run"]
  expected = [c.id for c in CLAIMS if c.budget == "gpu" or isinstance(c.check, Test)]
  assert set(not_run) <= set(expected), not_run


def test_statuses_are_those_of_the_experiments_records():
  from llmarch.lab import results

  rows = {row["id"]: row for row in claims.status(CLAIMS, FOLDER)}
  some = [c for c in CLAIMS if isinstance(c.check, Measured)][:4]
  for claim in some:
    found = results.comparison(FOLDER / claim.check.ablation, claim.check.comparison, "tiny")
    assert rows[claim.id]["status"] == found["verdict"] and f"{found['n']} pairs" in rows[claim.id]["evidence"]


# --------------------------------------------------------------------------------------- a registry of two claims

REGISTRY = """
from llmarch.lab.claims import *
def claim(id, check, **more):
  fields = dict(statement="s", source="p", stated_by=(), kind="exact", budget="none", rule="r", expected="")
  return Claim(id=id, check=check, **(fields | more))
def get_claims():
  return ({claims},)
"""
FACTS_FILE = """from llmarch.lab.claims import Evidence
def yes(): return Evidence(True, '1 = 1')
def no(): return Evidence(False, '1 < 2')
"""


def registry(folder: pathlib.Path, *texts: str) -> pathlib.Path:
  (folder / "experiments").mkdir(exist_ok=True)
  (folder / "experiments" / "facts.py").write_text(FACTS_FILE)
  path = folder / "experiments" / "claims.py"
  path.write_text(REGISTRY.format(claims=", ".join(texts)))
  return path


def test_a_run_is_recorded_and_a_changed_rule_makes_it_not_run(tmp_path):
  path = registry(tmp_path, "claim('a', Fact('yes'))", "claim('b', Fact('no'))")
  for claim in claims.load_claims(path):
    claims.run(claim, path.parent)
  state = lambda: {r["id"]: r["status"] for r in claims.status(claims.load_claims(path), path.parent)}
  assert state() == {"a": "holds", "b": "refuted"}
  registry(tmp_path, "claim('a', Fact('yes'), rule='another')", "claim('b', Fact('no'))")
  assert state() == {"a": "not run", "b": "refuted"}
  facts = path.parent / claims.FACTS
  facts.write_text(facts.read_text().replace("1 < 2", "1 < 3"))
  assert state() == {"a": "not run", "b": "not run"}
  assert len(files.read_lines(path.parent / claims.RECORDS)) == 2


def test_a_damaged_line_is_said_and_a_full_disk_is_a_sentence(tmp_path, capsys, monkeypatch):
  path = registry(tmp_path, "claim('a', Fact('yes'))", "claim('b', Fact('no'))")
  for claim in claims.load_claims(path):
    claims.run(claim, path.parent)
  file = path.parent / claims.RECORDS
  first, second = file.read_text().splitlines()
  file.write_text(f"{first[:-9]}\n{second}\n")
  found = claims.status(claims.load_claims(path), path.parent)
  assert [r["status"] for r in found] == ["not run", "refuted"]
  assert "claims.jsonl: half-written or damaged, and left out: line 1" in capsys.readouterr().err

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files, "append_line", full)
  with pytest.raises(UserError, match="cannot write .*claims.jsonl .No space left"):
    claims.run(claims.load_claims(path)[0], path.parent)


def test_tests_pass_fail_and_are_not_there(tmp_path):
  (tmp_path / "tests").mkdir()
  (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")  # as this project's own
  (tmp_path / "tests" / "test_x.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
  path = registry(tmp_path, *(f"claim('{n}', Test(('tests/test_x.py::test_{n}',)))" for n in "ab"))
  assert [claims.run(c, path.parent)["status"] for c in claims.load_claims(path)] == ["passes", "fails"]
  with pytest.raises(UserError, match="test_x.py has no test 'test_c'"):
    claims.load_claims(registry(tmp_path, "claim('c', Test(('tests/test_x.py::test_c',)))"))


@pytest.mark.parametrize(
  ("texts", "sentence"),
  [
    (("claim('a', Fact('yes'))", "claim('a', Fact('no'))"), "two claims have the id 'a'"),
    (("claim('a', Fact('yess'))",), "has no function 'yess'; did you mean 'yes'"),
    (("claim('a', Measured('glue', 'x'))",), "there is no experiment 'glue'"),
    (("claim('a', Cited(True))",), "Cited without evidence"),
    (("claim('a', Fact('yes'), kind='cots')",), "kind='cots' is not one of"),
    (("claim('a', Fact('yes'), statement=' ')",), "has no statement"),
    (("1 / 0",), "failed with ZeroDivisionError"),
    (("'a'",), "must return a tuple of Claim"),
  ],
)
def test_bad_registries_are_refused_in_one_sentence(texts, sentence, tmp_path):
  with pytest.raises(UserError, match=sentence):
    claims.load_claims(registry(tmp_path, *texts))


def test_the_command(tmp_path, capsys):
  path = registry(tmp_path, "claim('a', Fact('yes'))", "claim('b', Fact('no'), kind='cost')")
  assert llmarch(["claims", "run", "facts", f"--file={path}"]) == 0
  assert "a: holds (1 = 1)" in capsys.readouterr().out
  assert llmarch(["claims", f"--file={path}", "--json", "--kind=cost"]) == 0
  assert [r["status"] for r in json.loads(capsys.readouterr().out)] == ["refuted"]
  assert llmarch(["claims", "show", "b", f"--file={path}"]) == 0
  assert "1 < 2" in capsys.readouterr().out
  for words, sentence in (
    (["run"], "run what"),
    (["run", "c"], "there is no claim 'c'"),
    (["sow", "a"], "did you mean 'show'"),
    (["--kind=costs"], "did you mean 'cost'"),
    (["show"], "which one"),
    (["--file=nowhere.py"], "there is no file nowhere.py"),
  ):
    assert llmarch(["claims", f"--file={path}", *words]) == 2
    assert sentence in capsys.readouterr().err
