"""A supervisor that restarts a run when it dies, and an account of where its time went (standard library only)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from llmarch.files import read_lines
from llmarch.process import dies_with
from llmarch.train.faults import FINAL, StorageFault
from llmarch.train.journal import NAME, Journal

FIRST, LONGEST = 1.0, 60.0  # seconds between a death and the next start; they double as long as no new step is saved
DEATHS = 3  # deaths in a row, without a new step on disk, after which the supervisor gives up


def supervise(command: list[str], workdir: str) -> int:
  """Runs the command, which trains in `workdir`, until it is done or cannot go on; returns its last exit code.

  The table of train/faults.py says after which codes it is restarted. SIGTERM and SIGINT are passed on to the command,
  and end the supervision. The child is a process group of its own that dies with this process, and of which nothing is
  left when it ends. The account goes to stderr and to WORKDIR/goodput.json.
  """
  asked, child = False, None

  def pass_on(*_):
    nonlocal asked
    asked = True
    if child is not None and child.poll() is None:
      child.send_signal(signal.SIGTERM)

  old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
  deaths, delay, newest = 0, FIRST, _newest(workdir)
  try:
    while True:
      child = subprocess.Popen(command, start_new_session=True, preexec_fn=dies_with(os.getpid()))
      if asked:  # the signal came between two children
        child.send_signal(signal.SIGTERM)
      code = child.wait()
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
      if (Path(workdir) / "config.json").exists():  # otherwise the run was refused, and the folder is not its own
        with contextlib.suppress(StorageFault):  # a full disk does not end the supervision
          Journal(workdir).add("death", child=child.pid, code=code)
      if code in FINAL or asked:
        break
      step = _newest(workdir)
      deaths, delay = (0, FIRST) if step > newest else (deaths + 1, min(2 * delay, LONGEST) if deaths else FIRST)
      newest = max(step, newest)
      if deaths == DEATHS:
        _say(f"it died {DEATHS} times without a new step; its last exit code is {code}")
        break
      _say(f"exit code {code}; starting it again in {delay:.0f} s, after step {newest}")
      wake = time.monotonic() + delay
      while not asked and time.monotonic() < wake:
        time.sleep(0.1)
      if asked:
        break
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
  events = read_lines(Path(workdir) / NAME)
  if events:
    account = goodput(events)
    with contextlib.suppress(OSError):
      (Path(workdir) / "goodput.json").write_text(json.dumps(account, indent=1) + "\n")
    _say(describe(account))
  return code if code >= 0 else 128 - code


def _newest(workdir: str) -> int:
  return max((row["step"] for row in read_lines(Path(workdir) / NAME) if row["event"] == "saved"), default=0)


def _say(text: str) -> None:
  print(f"llmarch: {text}", file=sys.stderr, flush=True)


def goodput(events: list[dict]) -> dict:
  """Accounts for the seconds of a journal -> {"wall", "productive", "stall", "lost", "restart", "goodput", ...}.

  productive: steps whose results are in the run, and evaluations. stall: pauses of training for a save. lost: work that
  a death or a rollback undid. restart: from each start to its first step, and from a death to the next start. These
  four add up to wall; goodput = productive / wall.
  """
  out = dict.fromkeys(("productive", "stall", "lost", "restart"), 0.0)
  pieces = []  # (step, productive seconds), which a rollback may still turn into lost ones
  first = mark = None  # every second before `mark` is in the account
  working = False

  def account(kind: str, until: float) -> None:
    nonlocal mark
    out[kind] += max(until - mark, 0.0)
    mark = max(until, mark)

  for row in events:
    kind, now = row["event"], row["time"]
    if kind == "start":
      first, mark = (row["began"], row["began"]) if mark is None else (first, mark)
      if working:  # the process before this one died without a line in the journal
        account("lost", row["began"])
        working = False
    elif mark is None:
      continue
    elif kind == "stepping":
      account("restart", now)
      working = True
    elif kind == "saved" and working:
      pieces.append((row["step"], max(row["at"] - mark, 0.0)))
      mark = max(row["at"], mark)
      account("stall", row["at"] + row["stall"])
    elif kind == "rollback":
      account("lost", now)
      out["lost"] += sum(seconds for step, seconds in pieces if step > row["to"])
      pieces = [piece for piece in pieces if piece[0] <= row["to"]]
      working = False
    elif kind in ("done", "preempted", "failed", "stuck", "death"):
      kept = "productive" if kind in ("done", "preempted") else "lost"
      account(kept if working else "restart", now)
      working = False
  out["productive"] += sum(seconds for _, seconds in pieces)
  out["wall"] = 0.0 if first is None else mark - first
  return out | {
    "goodput": out["productive"] / out["wall"] if out["wall"] else 0.0,
    "starts": len({row["pid"] for row in events if row["event"] == "start"}),
    "deaths": sum(row["event"] == "death" and row["code"] != 0 for row in events),
    "rollbacks": sum(row["event"] == "rollback" for row in events),
  }


def describe(account: dict) -> str:
  """The account of `goodput` in words, for people."""
  parts = ", ".join(f"{name} {account[name]:.1f} s" for name in ("productive", "stall", "lost", "restart"))
  return (
    f"goodput {account['goodput']:.1%} of {account['wall']:.1f} s over {account['starts']} starts and"
    f" {account['deaths']} deaths: {parts}"
  )
