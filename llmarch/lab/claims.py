"""The registry of claims: each statement of a paper or a survey, the rule that decides it, and what came out.

`experiments/claims.py` is the data, `get_claims()` its door. A claim is checked in one of four ways: a Fact is computed
by a function of the `facts.py` beside it, a Test is a unit test, Measured is a comparison of an ablation, and Cited is
all that is left where nothing can be computed here. What ran is appended to `claims.jsonl` beside them.

A run counts for a claim as it stands: if its statement, rule or check has changed since, or its fact's code, it has not
run.
"""

import ast
import dataclasses
import functools
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from llmarch import files
from llmarch.build import config_dataclass, execute
from llmarch.errors import UserError, check, nearest
from llmarch.lab import records, trial

FACTS, RECORDS = "facts.py", "claims.jsonl"  # beside the file of claims
KINDS = ("exact", "cost", "direction")
BUDGETS = ("none", "tiny", "gpu")  # an instant, minutes on a CPU, a GPU
STATUSES = (
  "holds",
  "refuted",
  "passes",
  "fails",
  "supported",
  "not supported",
  "opposite",
  "inconclusive at this scale",
  "undecidable here",
  "not run",
)
HOLDS, REFUTED, PASSES, FAILS, *_, UNDECIDABLE, NOT_RUN = STATUSES


@dataclasses.dataclass(frozen=True)
class Evidence:
  """The result of a fact's function: whether the claim's statement holds, and the numbers that show it."""

  holds: bool
  text: str


# ------------------------------------------------------------------------------------------ the ways to check


@dataclasses.dataclass(frozen=True)
class Fact:
  """Computed from presets, cost model, ops or planner, or by a few lines of NumPy, in an instant."""

  function: str  # of facts.py


@dataclasses.dataclass(frozen=True)
class Test:
  """Held by unit tests, all of which must pass."""

  nodeids: tuple[str, ...]  # "tests/test_ops.py::test_name", relative to the repository
  __test__ = False  # to pytest, which would collect it by its name


@dataclasses.dataclass(frozen=True)
class Measured:
  """Decided by a comparison of an ablation, from its records as they are."""

  ablation: str  # experiments/ABLATION
  comparison: str


@dataclasses.dataclass(frozen=True)
class Cited:
  """Nothing is computable here; the claim's `evidence` says why, and what the source says. None: undecided."""

  holds: bool | None


@config_dataclass
class Claim:
  """One statement. Raises UserError for a kind or budget that is not there, and for Cited without evidence."""

  id: str  # short, kebab-case, stable
  statement: str
  source: str  # paper and place
  stated_by: tuple[str, ...]  # "survey 0, line 73"; () where only the paper says it
  kind: Literal["exact", "cost", "direction"]
  check: Fact | Test | Measured | Cited
  budget: Literal["none", "tiny", "gpu"]
  rule: str  # written before the run that it decides; of Measured the comparison's, and "" here
  expected: str  # what the source reports, or a first calculation by hand gave
  evidence: str = ""  # of Cited
  sheet: Literal["holds", "refuted"] | None = None  # what the reading of the sources said before anything ran

  def __post_init__(self):
    for name, known in (("kind", KINDS), ("budget", BUDGETS), ("sheet", (HOLDS, REFUTED, None))):
      check(getattr(self, name) in known, f"claim {self.id!r}: {name}={getattr(self, name)!r} is not one of {known}")
    for name in ("statement", "source", *(["rule"] * (not isinstance(self.check, Measured)))):
      check(bool(getattr(self, name).strip()), f"claim {self.id!r} has no {name}; write one sentence")
    check(
      not isinstance(self.check, Cited) or bool(self.evidence),
      f"claim {self.id!r} is Cited without evidence; say what the source says, and why nothing is computed",
    )

  @property
  def how(self) -> str:
    """The check in a few words."""
    match self.check:
      case Fact(function):
        return f"fact {function}"
      case Test(nodeids):
        return "test " + ", ".join(nodeid.rpartition("::")[2] for nodeid in nodeids)
      case Measured(ablation, comparison):
        return f"{ablation}: {comparison}"
    return "cited"


# -------------------------------------------------------------------------------------------------- reading


def load_claims(path: str | Path) -> tuple[Claim, ...]:
  """The claims of a file, all of them checked against what they name.

  Raises UserError for two claims of one id, a fact, test or ablation that is not there, and a file that fails.
  """
  path = Path(path)
  found = execute(path, "get_claims", flag="--file")
  check(
    isinstance(found, tuple) and all(isinstance(c, Claim) for c in found),
    f"--file: {path}: get_claims must return a tuple of Claim, got {found!r:.80}",
  )
  seen = set()
  for claim in found:
    check(claim.id not in seen, f"{path}: two claims have the id {claim.id!r}; give each its own")
    seen.add(claim.id)
    _check_target(claim, path.parent)
  return found


def _check_target(claim: Claim, folder: Path) -> None:
  """Raises UserError where what the claim names is not there."""
  match claim.check:
    case Fact(function):
      known = _functions(folder / FACTS)
      sentence = f"claim {claim.id!r}: {folder / FACTS} has no function {function!r}{nearest(function, known)}"
      check(function in known, sentence)
    case Test(nodeids):
      check(bool(nodeids), f"claim {claim.id!r} names no test; give tests/FILE.py::test_name")
      for nodeid in nodeids:
        file, _, name = nodeid.partition("::")
        there = (folder.parent / file).is_file()
        check(there, f"claim {claim.id!r}: there is no {file} beside {folder}; mend the claim, or put the file there")
        known = _functions(folder.parent / file)
        name = name.partition("[")[0]
        check(name in known, f"claim {claim.id!r}: {file} has no test {name!r}{nearest(name, known)}")
    case Measured(ablation):
      there = sorted(p.parent.name for p in folder.glob("*/ablation.py"))
      check(ablation in there, f"claim {claim.id!r}: there is no experiment {ablation!r}{nearest(ablation, there)}")


def _functions(path: Path) -> dict[str, str]:
  """{name: source} of the functions at the top of a file; none where there is no file."""
  return _functions_at(path, path.stat().st_mtime_ns) if path.is_file() else {}


@functools.lru_cache(maxsize=100)
def _functions_at(path: Path, time_ns: int) -> dict[str, str]:
  text = path.read_text()
  nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
  lines = text.splitlines()
  return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


def fingerprint(claim: Claim, folder: Path) -> str:
  """A fingerprint of everything that decides a claim's run."""
  what = claim.statement, claim.rule, claim.check
  if isinstance(claim.check, Fact):
    what += (_functions(folder / FACTS).get(claim.check.function),)
  return f"{zlib.crc32(repr(what).encode()):08x}"


def find(claims: Sequence[Claim], id: str) -> Claim:
  """The claim of that id. Raises UserError with the nearest one."""
  known = {claim.id: claim for claim in claims}
  if id not in known:
    near = nearest(id, known)
    raise UserError(f"there is no claim {id!r}{near if near.startswith(';') else '; `llmarch claims` lists them'}")
  return known[id]


# -------------------------------------------------------------------------------------------------- running


def run(claim: Claim, folder: str | Path, *, budget: str | None = None) -> dict:
  """Runs a claim's check, and appends a row to the folder's records: id, of, status, evidence, time, seconds, versions.

  budget: of an ablation, "tiny" where it is neither given nor the claim's. Raises UserError for what cannot be run.
  """
  folder, began = Path(folder), time.time()
  match claim.check:
    case Fact(function):
      found: Evidence = execute(folder / FACTS, function, flag=f"claim {claim.id!r}")
      status, text = (HOLDS if found.holds else REFUTED), found.text
    case Test(nodeids):
      status, text = _run_tests(nodeids, folder.parent)
    case Measured(ablation):
      from llmarch.lab import runner

      budget = budget or _budget(claim) or "tiny"
      runner.run_path(str(folder / ablation), budget=budget)
      status, text = _measured(claim, budget, _summaries(folder))
    case Cited():
      status, text = _cited(claim)
  row = {
    "id": claim.id,
    "of": fingerprint(claim, folder),
    "status": status,
    "evidence": text,
    "time": began,
    "seconds": round(time.time() - began, 3),
    "versions": trial.versions(),
  }
  before = _last(folder).get(claim.id, {})
  if any(row[name] != before.get(name) for name in ("of", "status", "evidence")):  # the same again is no news
    with files.or_refuse(f"cannot write {folder / RECORDS}", "make room, and run it again"):
      files.append_line(folder / RECORDS, row)
  return row


def _run_tests(nodeids: Sequence[str], root: Path) -> tuple[str, str]:
  command = [sys.executable, "-m", "pytest", *nodeids, "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
  words = ("passed", "failed", "error", "skipped", "no tests ran")
  text = next((line for line in reversed(lines) if any(word in line for word in words)), lines[-1] if lines else "")
  skipped = done.returncode == 0 and "passed" not in text
  return (PASSES if done.returncode == 0 and not skipped else NOT_RUN if skipped else FAILS), text.strip("= ")


def _budget(claim: Claim) -> str | None:
  return None if claim.budget == "none" else claim.budget


def _measured(claim: Claim, budget: str | None, summarize: Callable[[str, str | None], dict | None]) -> tuple[str, str]:
  summary = summarize(claim.check.ablation, budget)
  if summary is None:
    return NOT_RUN, ""
  found = next((c for c in summary["comparisons"] if c["id"] == claim.check.comparison), None)
  check(found is not None, f"claim {claim.id!r}: {claim.check.ablation} has no comparison {claim.check.comparison!r}")
  number = lambda name: "-" if found.get(name) is None else f"{found[name]:+.4g}"
  text = f"{found['metric']}: {number('effect')} [{number('low')}, {number('high')}], {found['n']} pairs"
  floor = found.get("floor")
  return found["verdict"], text + ("" if floor is None else f", noise floor {floor:.3g}")


def _cited(claim: Claim) -> tuple[str, str]:
  if claim.check.holds is None:
    return (NOT_RUN if claim.budget == "gpu" else UNDECIDABLE), claim.evidence
  return (HOLDS if claim.check.holds else REFUTED), claim.evidence


def rule(claim: Claim, folder: str | Path) -> str:
  """The rule that decides a claim, in words. Raises UserError for a comparison that does not exist."""
  if not isinstance(claim.check, Measured):
    return claim.rule
  from llmarch.lab import results

  return results.declared(Path(folder) / claim.check.ablation, claim.check.comparison).rule


# -------------------------------------------------------------------------------------------------- reporting


def status(claims: Iterable[Claim], folder: str | Path, *, budget: str | None = None) -> list[dict]:
  """A row for each claim: id, kind, budget, check, status, statement, evidence, time.

  Facts and tests have the status of their last run; Measured is computed from its experiment's records (budget: of the
  claim, if not given), and Cited is what it says.
  """
  folder = Path(folder)
  last, summarize = _last(folder), _summaries(folder)
  return [_row(claim, *_state(claim, folder, last.get(claim.id), budget, summarize)) for claim in claims]


def _last(folder: Path) -> dict[str, dict]:
  """{id: its newest row}. Raises UserError where the records cannot be read."""
  try:
    rows, lost = files.read_lines(folder / RECORDS), records.damaged(folder / RECORDS)
    if lost:
      lines = ", ".join(map(str, lost))
      print(f"llmarch: {folder / RECORDS}: half-written or damaged, and left out: line {lines}", file=sys.stderr)
    return {row["id"]: row for row in rows if isinstance(row.get("id"), str)}
  except OSError as e:
    raise UserError(f"{folder / RECORDS} cannot be read ({e.strerror}); mend it, or give another --file") from None


def _summaries(folder: Path) -> Callable[[str, str | None], dict | None]:
  """(ablation, budget) -> its summary, once for all claims of it."""
  from llmarch.lab import results

  return functools.cache(lambda ablation, budget: results.summarize(folder / ablation, budget=budget))


def _state(
  claim: Claim, folder: Path, row: dict | None, budget: str | None, summarize: Callable
) -> tuple[str, str, float | None]:
  if isinstance(claim.check, Measured):
    return *_measured(claim, budget or _budget(claim), summarize), row and row["time"]
  if isinstance(claim.check, Cited):
    return *_cited(claim), None
  if row is None or row.get("of") != fingerprint(claim, folder):
    return NOT_RUN, "", None
  return row["status"], row["evidence"], row["time"]


def _row(claim: Claim, state: str, evidence: str, when: float | None) -> dict:
  return {
    "id": claim.id,
    "kind": claim.kind,
    "budget": claim.budget,
    "check": claim.how,
    "status": state,
    "statement": claim.statement,
    "evidence": evidence,
    "time": when,
  }


def select(claims: Sequence[Claim], words: Sequence[str]) -> list[Claim]:
  """Claims by ids and by groups: all, facts, tests, measured, cited. Raises UserError for an unknown word."""
  groups: dict[str, Callable[[Claim], bool]] = {
    "all": lambda c: not isinstance(c.check, Measured),
    "facts": lambda c: isinstance(c.check, Fact),
    "tests": lambda c: isinstance(c.check, Test),
    "measured": lambda c: isinstance(c.check, Measured),
    "cited": lambda c: isinstance(c.check, Cited),
  }
  found: dict[str, Claim] = {}
  for word in words:
    chosen = filter(groups[word], claims) if word in groups else [find(claims, word)]
    found |= {claim.id: claim for claim in chosen}
  return list(found.values())
