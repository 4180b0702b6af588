"""A watchdog that ends a stuck process, and the handler of SIGTERM."""

import contextlib
import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from llmarch.train.faults import PREEMPTED, WATCHDOG

FLOOR, MEDIANS = 60.0, 20  # a step may take this many seconds, or this many times the median of the last ones
SLOW = 1800.0  # seconds that work may take which compiles, reads or writes much
LATER = 3.0  # seconds after the limit at which a C thread ends a process whose interpreter is itself stuck
GRACE = 25.0  # seconds from SIGTERM to the end, saved or not; schedulers wait 30 before they kill


class Watchdog:
  """Ends the process, with the stacks of all its threads in WORKDIR/stacks-PID.txt, when it is stuck.

  `begin(what)` restarts the clock at every change of work. Work of a kind that was done before may take `limit` seconds
  (None: computed from the steps' times with MEDIANS and FLOOR); the first of its kind, and slow work, may take SLOW.
  The exit code is 75. If the GIL is held, faulthandler's C thread ends the process LATER seconds after the limit, with
  exit code 1.
  """

  def __init__(self, workdir: str, limit: float | None, *, on_stuck: Callable[[str, float], None] = lambda *_: None):
    self._path, self._limit, self._on_stuck = Path(workdir) / f"stacks-{os.getpid()}.txt", limit, on_stuck
    self._seen, self._times = set(), deque(maxlen=31)
    self._what, self._began, self._allowed, self._armed = "start", time.monotonic(), SLOW, 0.0
    self._over = threading.Event()

  def __enter__(self):
    self._file = open(self._path, "w")  # opened now, because the disk or the file table may be full later
    threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    self.begin("start", slow=True)
    return self

  def __exit__(self, *exc):
    self._over.set()
    faulthandler.cancel_dump_traceback_later()
    self._file.close()
    with contextlib.suppress(OSError):
      self._path.unlink()

  @property
  def limit(self) -> float:
    if self._limit is not None:
      return self._limit
    return max(FLOOR, MEDIANS * statistics.median(self._times)) if self._times else SLOW

  def begin(self, what: str, *, slow: bool = False) -> None:
    """Notes that the process now does `what`; the limit is computed from the durations of "step"."""
    now = time.monotonic()
    if self._what == what == "step":
      self._times.append(now - self._began)
    limit = self.limit
    allowed = max(limit, SLOW) if slow or what not in self._seen else limit
    self._seen.add(what)
    late = allowed != self._allowed or now - self._armed > 1.0  # arming starts a thread, so once a second is enough
    self._what, self._began, self._allowed = what, now, allowed
    if late:
      self._armed = now
      faulthandler.dump_traceback_later(allowed + LATER, exit=True, file=self._file)

  def _watch(self) -> None:
    while not self._over.wait(min(1.0, self._allowed / 10)):
      seconds, allowed = time.monotonic() - self._began, self._allowed
      if seconds > allowed:
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._file.flush()
        print(
          f"llmarch: {self._what} has taken {seconds:.0f} s, more than {allowed:.0f}: the process ends (exit code"
          f" {WATCHDOG}); the stacks are in {self._path}",
          file=sys.stderr, flush=True,
        )  # fmt: skip
        with contextlib.suppress(Exception):
          self._on_stuck(self._what, seconds)
        os._exit(WATCHDOG)


def tidy(workdir: str) -> None:
  """Removes the empty stack files that killed processes left in a workdir, which this process alone must hold."""
  for path in Path(workdir).glob("stacks-*.txt"):
    if path.stat().st_size == 0:
      path.unlink()


class Preemption:
  """Notes SIGTERM. The first asks for a save and an end; a second one, or GRACE seconds, end the process at once.

  It works in the main thread of a single process; with several processes, `distributed.preempted` tells all of them.
  """

  def __init__(self):
    self.asked = False

  def __enter__(self):
    self._here = threading.current_thread() is threading.main_thread()
    if self._here:
      self._old = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *exc):
    if self._here:
      signal.signal(signal.SIGTERM, self._old)
    if self.asked:
      self._timer.cancel()

  def _note(self, *_) -> None:
    if self.asked:
      os._exit(PREEMPTED)
    self.asked = True
    self._timer = threading.Timer(GRACE, os._exit, (PREEMPTED,))
    self._timer.daemon = True
    self._timer.start()
