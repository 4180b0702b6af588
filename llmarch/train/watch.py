"""What watches a run from its side: a watchdog for steps that are stuck, and the wish of others that it stop."""

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

FLOOR, MEDIANS = 60.0, 20  # a step may take so many seconds, or so many times the median of the last ones
SLOW = 1800.0  # seconds for what compiles, reads or writes much
LATER = 3.0  # after the limit, when the interpreter itself is stuck and no thread of its own can say so
GRACE = 25.0  # seconds from SIGTERM to the end, whatever is not saved then; schedulers wait 30 before they kill


class Watchdog:
  """Ends the process, with the stacks of all its threads in WORKDIR/stacks-PID.txt, when it is stuck.

  `begin(what)` at every change of work starts the clock anew. A kind of work that was done before may take `limit`
  seconds (None: what MEDIANS and FLOOR say of the steps), the first of a kind and slow work SLOW. Exit code 75; a
  thread without the GIL comes LATER for an interpreter that does not let go of it, with exit code 1.
  """

  def __init__(self, workdir: str, limit: float | None, *, on_stuck: Callable[[str, float], None] = lambda *_: None):
    self._path, self._limit, self._on_stuck = Path(workdir) / f"stacks-{os.getpid()}.txt", limit, on_stuck
    self._seen, self._times = set(), deque(maxlen=31)
    self._what, self._began, self._allowed, self._armed = "start", time.monotonic(), SLOW, 0.0
    self._over = threading.Event()

  def __enter__(self):
    self._file = open(self._path, "w")  # beforehand: a full disk or too many files must not stand in the way
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
    """The process now does `what`; the time of "step"s is what the limit is measured by."""
    now = time.monotonic()
    if self._what == what == "step":
      self._times.append(now - self._began)
    limit = self.limit
    allowed = max(limit, SLOW) if slow or what not in self._seen else limit
    self._seen.add(what)
    late = allowed != self._allowed or now - self._armed > 1.0  # arming starts a thread: once a second is enough
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
  """Removes the empty files of stacks that killed processes left in a workdir that is ours alone."""
  for path in Path(workdir).glob("stacks-*.txt"):
    if path.stat().st_size == 0:
      path.unlink()


class Preemption:
  """Notes SIGTERM. The first asks for a save and an end, a second, or GRACE seconds, end the process at once.

  In the main thread of a process alone; with several, `distributed.preempted` knows of all.
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
