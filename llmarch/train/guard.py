"""Ends a process whose interpreter is stuck: `python guard.py PID SIGNAL`, which is a child of that process.

It needs the standard library alone. A thread of the process cannot do this, because it needs the interpreter's lock. A
timer of the C library cannot do it either, because it runs on while the process is stopped (Ctrl-Z, Slurm's suspend)
and fires as soon as it goes on.
"""

import math
import os
import select
import signal
import sys
import time

TICK = 0.5  # seconds between two looks at the process
END = 2.0  # seconds from the signal, on which the process writes its stacks and ends, to SIGKILL


def main(pid: int, number: int) -> None:
  """Reads signs of life from stdin, each a line with the seconds of silence that are allowed after it.

  Time in which the process or this one is stopped does not count as silence. Returns when the process has ended.
  """
  for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal sends them to all of its processes
    signal.signal(ignored, signal.SIG_IGN)
  silent, allowed, before = 0.0, math.inf, time.monotonic()
  while os.getppid() == pid:
    ready = select.select([0], [], [], TICK)[0]
    now = time.monotonic()
    if ready:
      text = os.read(0, 1 << 16)
      if not text:
        return
      silent, allowed = 0.0, float(text.split()[-1])
    elif not is_stopped(pid):
      silent += min(now - before, 2 * TICK)
    before = now
    if silent > allowed:
      os.kill(pid, number)
      time.sleep(END)
      if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)
      return


def is_stopped(pid: int) -> bool:
  """True if a process is stopped by a signal or a debugger; False on systems without /proc."""
  try:
    with open(f"/proc/{pid}/stat", "rb") as f:
      return f.read().rpartition(b") ")[2][:1] in b"Tt"
  except OSError:
    return False


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]))
