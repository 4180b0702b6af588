"""The journal of a run: WORKDIR/journal.jsonl, one JSON line for each thing that happened to it.

A line is on the disk when `add` returns, and carries its own checksum. Standard library only: the supervisor,
which reads it, has no use for JAX.

event          fields besides time (seconds since 1970) and pid
start          step: that the process goes on from; began: when the process did
stepping       step: the first that it has done
saved          step, metrics; at: when its state was taken; stall: seconds that training stood still for it
quarantined    step, why, to: the folder's new place
rollback       step, loss, to: the step gone back to; skip: [to, number of batches left out from there on]
skipped        step: its loss or gradient was not finite, its update is left out
stuck, preempted, failed, done                what ended the process, and at which step
death          child, code: of the supervisor, whose child has ended
"""

import json
import os
import time
import zlib
from pathlib import Path

NAME = "journal.jsonl"
BEGAN = time.time()  # of this process, near enough


class Journal:
  """Reads what there is, and appends (writes=False: nothing, in a process that only follows)."""

  def __init__(self, workdir: str | os.PathLike, *, writes: bool = True):
    self.path, self._writes = Path(workdir) / NAME, writes
    self.events = read(self.path)

  def add(self, event: str, **fields) -> dict:
    """Appends an event. It is durable on return. Raises OSError where it cannot be written."""
    row = {"event": event, "time": time.time(), "pid": os.getpid(), **fields}
    if self._writes:
      append(self.path, row)
    self.events.append(row)
    return row

  def saved(self) -> dict[int, dict]:
    """{step: metrics} of the checkpoints that were finished, and neither quarantined nor taken back."""
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
    """[(step, batches)]: after `step` steps, so many batches of the data are left out. See `batch_index`."""
    return [tuple(row["skip"]) for row in self.events if row["event"] == "rollback"]


def batch_index(step: int, skips: list[tuple[int, int]]) -> int:
  """The index of the batch that the run reads after `step` steps."""
  return step + sum(count for at, count in skips if at <= step)


def append(path: Path, row: dict) -> None:
  text = json.dumps(row)
  line = f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}\n'.encode()
  new = not path.exists()
  file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
  try:
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":  # a line that a crash cut off stays a line of its own
      line = b"\n" + line
    if os.write(file, line) != len(line):
      raise OSError(28, "no space left on device")
    os.fsync(file)
  finally:
    os.close(file)
  if new:
    sync_folder(path.parent)


def read(path: Path) -> list[dict]:
  """The whole lines of a journal; what a crash cut off, or damage changed, is left out."""
  try:
    lines = path.read_bytes().split(b"\n")
  except FileNotFoundError:
    return []
  return [row for line in lines if (row := parse(line)) is not None]


def parse(line: bytes) -> dict | None:
  """A line of a journal; None if it is not whole."""
  text, mark, crc = line.rpartition(b', "crc32": ')
  if not mark or crc != f"{zlib.crc32(text + b'}')}}}".encode():
    return None
  return json.loads(text + b"}")


def sync_folder(folder: Path) -> None:
  """Waits until the names in a folder are on the disk."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def sync_tree(folder: Path) -> None:
  """Waits until a folder, all that it holds, and its own name are on the disk."""
  for root, _, files in os.walk(folder):
    for name in files:
      sync_folder(Path(root) / name)  # a file is opened for it in the same way
    sync_folder(Path(root))
  sync_folder(folder.parent)
