"""The records of an ablation: FOLDER/records.jsonl, a line for each trial, the only source of truth.

A line is on the disk when `add` returns, and carries its own checksum (files.py). A trial is recorded once:
writers of several processes hold a lock and look first. A trial that failed may be tried again, as another `attempt`;
then the last counts.
"""

import math
import sys
from pathlib import Path

from llmarch import files, locks
from llmarch.errors import UserError

NAME = "records.jsonl"
VERSION = 1  # of a row, and of what a trial's key means
FIELDS = {"key": str, "arm": str, "seed": int, "budget": str, "phase": str, "status": str, "metrics": dict,
          "overrides": dict}  # fmt: skip  # of every row


def read(folder: str | Path, *, say=lambda text: print(text, file=sys.stderr)) -> list[dict]:
  """The records of a folder ([] without any). A half-written or damaged line is left out, and said.

  Raises UserError for records of another version, and for a file that cannot be read.
  """
  path = Path(folder) / NAME
  try:
    rows = files.read_lines(path)
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); mend it, or give another --out") from None
  strange = next((row for row in rows if row.get("version", VERSION) == VERSION and not is_record(row)), None)
  if strange is not None:
    raise UserError(f"{path} holds a line that is no record ({str(strange)[:60]}); take it out, or give another --out")
  other = next((row["version"] for row in rows if row["version"] != VERSION), VERSION)
  if other != VERSION:
    raise UserError(
      f"{path} has records of version {other}, and this llmarch writes version {VERSION}; move the file away, or give"
      " another --out"
    )
  lost = damaged(path)
  if lost:
    say(f"llmarch: {path}: half-written or damaged, and left out: line {', '.join(map(str, lost))}")
  return rows


def is_record(row: dict) -> bool:
  """True if a row has what every record has; a row that somebody wrote by hand may not."""
  if "version" not in row or not all(isinstance(row.get(name), kind) for name, kind in FIELDS.items()):
    return False
  if row["status"] == "failed":
    return isinstance(row.get("reason"), str)
  return row["status"] == "ok" and all(
    isinstance(x, (int, float)) and math.isfinite(x) for x in row["metrics"].values()
  )


def damaged(path: Path) -> list[int]:
  """The numbers, from 1, of the lines that `read` leaves out."""
  lines = path.read_bytes().split(b"\n") if path.exists() else []
  return [i for i, line in enumerate(lines, 1) if line and files.parse_line(line) is None]


def latest(rows: list[dict]) -> dict[str, dict]:
  """{key: row}: the last attempt of each trial."""
  return {row["key"]: row for row in rows}


def add(folder: str | Path, row: dict) -> bool:
  """Appends a record, unless its trial (and attempt) is there: whether it did. Raises OSError where it cannot."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with locks.take(folder / f".{NAME}.lock", wait=True):  # --backend=local, a single writer, can do without
    same = lambda r: (r["key"], r.get("attempt", 1)) == (row["key"], row.get("attempt", 1))
    if any(same(r) for r in files.read_lines(folder / NAME)):
      return False
    files.append_line(folder / NAME, {"version": VERSION, **row})
    return True
