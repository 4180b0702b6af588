"""The journal of a run: WORKDIR/journal.jsonl, one JSON line for each thing that happened to it.

A line is on the disk when `add` returns, and carries its own checksum (files.py). This module needs the standard
library alone, because the supervisor reads the journal without JAX.

event          fields besides time (seconds since 1970) and pid
start          step: that the process goes on from; began: when the process did
stepping       step: the first that it has done
saved          step, metrics; at: when its state was taken; stall: seconds that training stood still for it
quarantined    step, why, to: the folder's new place
rollback       step, loss, to: the step gone back to; skip: [to, number of batches left out from there on]
branched       step: that the run begins with; source: [the other run, its step]; reset; skip: as of a rollback
skipped        step: its loss or gradient was not finite, its update is left out
stuck, preempted, failed, done                what ended the process, and at which step
death          child, code: of the supervisor, whose child has ended
"""

import os
import time
from pathlib import Path

from llmarch.files import append_line, read_lines
from llmarch.train.faults import StorageFault

NAME = "journal.jsonl"
BEGAN = time.time()  # start of this process, to within the time of its imports


class Journal:
  """Reads a run's journal and appends to it; with writes=False, in processes that only follow, `add` does nothing."""

  def __init__(self, workdir: str | os.PathLike, *, writes: bool = True):
    self.path, self._writes = Path(workdir) / NAME, writes
    self.events = read_lines(self.path)

  def add(self, event: str, **fields) -> dict:
    """Appends an event, which is on the disk on return. Raises StorageFault if it cannot be written."""
    row = {"event": event, "time": time.time(), "pid": os.getpid(), **fields}
    if self._writes:
      try:
        append_line(self.path, row)
      except OSError as e:
        raise StorageFault(f"cannot write {self.path} ({e.strerror}); make room there, and start the run again") from e
    self.events.append(row)
    return row

  def saved(self) -> dict[int, dict]:
    """{step: metrics} of the checkpoints that were completed, and neither quarantined nor taken back."""
    found = {}
    for row in self.events:
      if row["event"] == "saved":
        found[row["step"]] = row.get("metrics") or {}
      elif row["event"] == "quarantined":
        found.pop(row["step"], None)
      elif row["event"] == "rollback":
        found = {step: metrics for step, metrics in found.items() if step <= row["to"]}
    return found

  def skips(self) -> list[tuple[int, int]]:
    """[(step, batches)]: after `step` steps, this many batches of the data are skipped. See `batch_index`."""
    found = []
    for row in self.events:
      if row["event"] == "branched":  # nothing before it counts, as a branch that was killed before its first save
        found = []
      if row["event"] in ("rollback", "branched"):
        found.append(tuple(row["skip"]))
    return found

  def branched(self) -> dict | None:
    """The event that began this run as a branch of another; None if it began anew."""
    return next((row for row in reversed(self.events) if row["event"] == "branched"), None)


def batch_index(step: int, skips: list[tuple[int, int]]) -> int:
  """The index of the batch that the run reads after `step` steps, given the skips of `Journal.skips`."""
  return step + sum(count for at, count in skips if at <= step)
