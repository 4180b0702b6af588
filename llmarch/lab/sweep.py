"""A sweep: the trials of one ablation and budget, which of them are recorded, how one starts, and what its end means.

runner.py runs sweeps on this machine, and slurm.py on a cluster; both keep what runs in the folder `trials` beside the
records.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llmarch import locks
from llmarch.errors import UserError, check
from llmarch.files import or_refuse
from llmarch.lab import records
from llmarch.lab.ablation import ZERO, Ablation, Trial, chosen_rates, load_ablation, recorded, trials, tuning
from llmarch.lab.trial import LOG, RESULT, RUN, TRIAL, read_rows, summary
from llmarch.train.faults import CONFIG, NUMBERS

TRIALS = "trials"  # the folder of what runs, and of what failed
EXCEPTION = re.compile(r"(llmarch: |[\w.]+(Error|Exception|Interrupt|Exit)\b)")  # how the last words of a log begin


class Sweep:
  """The trials of one ablation and budget, and which of them are recorded in `out`."""

  def __init__(self, folder: str, out: str, budget: str, seeds: int | None, *, retry_failed: bool, say: Callable):
    self.folder, self.out, self.budget, self.seeds = folder, Path(out), budget, seeds
    self.name = Path(folder).resolve().name
    self.ablation: Ablation = load_ablation(folder)
    self.rows = records.latest(records.read(out, say=say))
    self.failed_before = {key for key, row in self.rows.items() if row["status"] == "failed"} if retry_failed else set()
    self.tuning = tuning(self.ablation, folder, budget)
    self._main: list[Trial] | None = None
    if not self.tuning:
      self.plan()  # refuses a bad arm before anything runs

  def done(self, trial: Trial) -> bool:
    return trial.key in self.rows and trial.key not in self.failed_before

  def plan(self) -> list[Trial]:
    """All trials known so far: those of the main phase once every learning rate has been tried."""
    if not all(map(self.done, self.tuning)):
      return self.tuning
    if self._main is None:
      rates = chosen_rates(self.ablation, recorded(self.tuning, self.rows))
      self._main = trials(self.ablation, self.folder, self.budget, seeds=self.seeds, rates=rates)
    return self.tuning + self._main

  def total(self) -> int:
    """Trials of this sweep, those that cannot be planned yet included."""
    if self._main is None:
      return len(self.tuning) + len(trials(self.ablation, self.folder, self.budget, seeds=self.seeds))
    return len(self.plan())

  def pending(self) -> list[Trial]:
    return [t for t in self.plan() if not self.done(t)]

  def record(self, trial: Trial, row: dict) -> dict:
    """Appends the row of a trial, once."""
    before = self.rows.get(trial.key)
    attempt = before.get("attempt", 1) + 1 if before and trial.key in self.failed_before else 1
    row = header(trial, self.name) | row | {"attempt": attempt}
    with or_refuse(f"cannot write {self.out / records.NAME}", "make room, and start again: what it holds is kept"):
      records.add(self.out, row)
    self.rows[trial.key] = row
    self.failed_before.discard(trial.key)
    return row

  def check_metrics(self, row: dict) -> None:
    """Raises UserError where the ablation wants a metric that the row's arm does not record."""
    if row["status"] != "ok":
      return
    wanted = [("the ablation", row["arm"], self.ablation.metric)]
    for c in self.ablation.comparisons if row["phase"] == "main" else ():
      other = c.baseline or self.ablation.baseline.name
      wanted += [(f"comparison {c.id}", c.arm, c.metric), (f"comparison {c.id}", other, c.baseline_metric or c.metric)]
    for what, arm, metric in wanted:
      check(
        arm != row["arm"] or metric in (ZERO, *row["metrics"]),
        f"{what} wants the metric {metric!r}, which arm {arm!r} does not record; add a measure, or name one of"
        f" {', '.join(sorted(row['metrics']))}",
      )

  def refresh(self) -> None:
    """Takes in what other processes have recorded."""
    fresh = records.latest(records.read(self.out, say=lambda text: None))
    for key in self.failed_before & fresh.keys():
      if fresh[key].get("attempt", 1) > self.rows[key].get("attempt", 1):
        self.failed_before.discard(key)
    self.rows = fresh


def header(trial: Trial, name: str) -> dict:
  """The part of a row that identifies its trial."""
  fields = {f: getattr(trial, f) for f in ("key", "arm", "seed", "budget", "phase", "overrides", "match")}
  return {"ablation": name, **fields}


@contextlib.contextmanager
def only_sweep(out: Path):
  """Holds a folder of records: a second sweep would run the same trials in the same folders, over the first one's.

  Raises UserError if another process has it.
  """
  try:
    with or_refuse(f"--out: cannot write {out}", "give a folder that can be written"):
      out.mkdir(parents=True, exist_ok=True)
      lock = locks.take(out / ".sweep.lock")
  except locks.Taken:
    raise UserError(f"another sweep runs in {out}; wait for it to end, or give another --out") from None
  with lock:
    yield


# ----------------------------------------------------------------------------------------------- the process of a trial


def prepare(folder: Path, trial: Trial) -> None:
  """An empty folder for the trial. What a killed sweep left of one without checkpoints is of no use."""
  if not trial.config["checkpoint"]["every"]:
    shutil.rmtree(folder, ignore_errors=True)
  with or_refuse(f"--out: cannot write {folder}", "give a folder that can be written"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    (folder / TRIAL).write_text(json.dumps(dataclasses.asdict(trial)))


def command(folder: Path, cores: Sequence[int] = ()) -> list[str]:
  """The command line of a trial's process, which is to stay on the given cores of this machine (none: on any)."""
  return [sys.executable, "-m", "llmarch.lab.trial", str(folder), *([",".join(map(str, cores))] if cores else [])]


def finished(folder: Path, code: int, trial: Trial, late: bool, began: float) -> dict:
  """The row of a trial whose process has ended."""
  row = {"seconds": time.monotonic() - began}
  if code == 0 and (folder / RESULT).exists():
    return {"status": "ok", **json.loads((folder / RESULT).read_text()), **row}
  kind, reason = why(folder, code, trial.limit if late else None)
  rows = read_rows(folder / RUN / "metrics.jsonl")
  train = trial.config["train"]
  found = summary(rows, train["batch_size"] * train["seq_len"])
  found["metrics"] = {k: v for k, v in found["metrics"].items() if k not in ("loss", "bits_per_byte")}
  return {"status": "failed", "failure": kind, "reason": reason, **found, **row}


def why(folder: Path, code: int, limit: float | None) -> tuple[str, str]:
  """(kind, sentence) of a failure: "time", "memory", "numbers", "refused" or "died"."""
  lines = (folder / LOG).read_text(errors="replace").split("\n") if (folder / LOG).exists() else []
  named = [i for i, line in enumerate(lines) if EXCEPTION.match(line)]  # the text of an exception may have many lines
  last = " ".join(" ".join(lines[named[-1] if named else -1 :]).split()).removeprefix("llmarch: ")[:500]
  last = last or next((line for line in reversed(lines) if line.strip()), "it said nothing")
  if limit is not None:
    return "time", f"it took longer than the {limit:g} s of its budget"
  if code == 0:
    return "died", "it ended without a result"
  if any(word in last for word in ("RESOURCE_EXHAUSTED", "MemoryError", "bad_alloc")):
    return "memory", f"out of memory: {last}"
  if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
    return "memory", "killed by the system, as it does where memory runs out"
  if code == NUMBERS:
    return "numbers", last
  return ("refused" if code == CONFIG else "died"), f"exit code {code}: {last}"


# -------------------------------------------------------------------------------------------------- progress


class Progress:
  """The messages of a running sweep: a line per trial, and on a terminal a bar with the time left."""

  def __init__(self, sweeps: list[Sweep], say: Callable[[str], None]):
    self.say = say
    self.total = sum(s.total() for s in sweeps)
    self.done = sum(sum(map(s.done, s.plan())) for s in sweeps)
    self.start, self.began_at = self.done, time.monotonic()
    self.bar = self.task = None
    if sys.stderr.isatty():
      from rich.console import Console
      from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
      from rich.progress import Progress as Bar

      self.bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]} left"),
        console=Console(stderr=True),
      )
      self.task = self.bar.add_task("trials", total=self.total, completed=self.done, left="?")
      self.bar.start()
    if self.start:
      say(f"{self.start} of {self.total} trials are recorded already")

  def left(self) -> str:
    """Seconds left, from those of the trials so far."""
    from llmarch.train.metrics import clock

    done = self.done - self.start
    return clock((time.monotonic() - self.began_at) / done * (self.total - self.done)) if done else "?"

  def began(self, trial: Trial) -> None:
    if self.bar:
      self.bar.update(self.task, description=f"{trial.arm} seed {trial.seed}")

  def show(self, row: dict, folder: Path | None = None) -> None:
    self.done += 1
    what = f"{row['ablation']}: {row['arm']} seed {row['seed']}" + (" (tuning)" if row["phase"] == "tune" else "")
    if row["status"] == "failed":
      result = f"failed ({row['reason']}; see {folder})"
    else:
      result = ", ".join(f"{k} {v:.4g}" for k, v in list(row["metrics"].items())[:4] if isinstance(v, (int, float)))
    again = f", recorded in {row['from']}" if "from" in row else f", {row.get('seconds', 0):.0f} s"
    text = f"[{self.done}/{self.total}] {what}: {result}{again}; {self.left()} left"
    if self.bar:
      self.bar.update(self.task, completed=self.done, left=self.left())
      self.bar.console.print(text, markup=False, highlight=False)
    else:
      self.say(text)

  def close(self) -> None:
    if self.bar:
      self.bar.stop()
