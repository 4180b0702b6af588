"""A watchdog that ends a stuck process, and the handler of SIGTERM and Ctrl-C."""

import contextlib
import faulthandler
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from llmarch.train import guard
from llmarch.train.faults import INTERRUPTED, PREEMPTED, WATCHDOG, StorageFault

FLOOR, MEDIANS = 60.0, 20  # a step may take this many seconds, or this many times the median of the last ones
SLOW = 1800.0  # seconds that work may take which compiles, reads or writes much
LATER = 3.0  # seconds after the limit at which another process (guard.py) ends one whose interpreter is itself stuck
STACKS = signal.SIGVTALRM  # signal on which the process writes its stacks and ends; the system writes no core for it
GRACE = 25.0  # seconds from SIGTERM to the end, saved or not; schedulers wait 30 before they kill


class Watchdog:
  """Ends the process, with the stacks of all its threads in WORKDIR/stacks-PID.txt, when it is stuck.

  `begin(what)` restarts the clock at every change of work. Work of a kind that was done before may take `limit` seconds
  (None: computed from the steps' times with MEDIANS and FLOOR); the first of its kind, and slow work, may take SLOW.
  The exit code is 75. If the GIL is held, `guard.py` ends the process LATER seconds after the limit by a signal
  (STACKS). Time in which the process is stopped (SIGSTOP, a suspended machine) does not count.
  """

  def __init__(self, workdir: str, limit: float | None, *, on_stuck: Callable[[str, float], None] = lambda *_: None):
    self._path, self._limit, self._on_stuck = Path(workdir) / f"stacks-{os.getpid()}.txt", limit, on_stuck
    self._seen, self._times = set(), deque(maxlen=31)
    self._what, self._began, self._allowed = "start", time.monotonic(), SLOW
    self._over, self._guard = threading.Event(), None

  def __enter__(self):
    try:
      self._file = open(self._path, "w")  # opened now, because the disk or the file table may be full later
    except OSError as e:
      raise StorageFault(f"cannot write {self._path} ({e.strerror}); give a workdir that can be written") from e
    faulthandler.register(STACKS, file=self._file, all_threads=True, chain=True)
    with contextlib.suppress(OSError):  # no more processes are allowed: the run goes on without a guard
      command = [sys.executable, "-E", "-S", guard.__file__, str(os.getpid()), str(int(STACKS))]
      self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
      os.set_blocking(self._guard.stdin.fileno(), False)
    self.begin("start", slow=True)
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exc):
    self._over.set()
    self._thread.join()
    if self._guard:
      self._guard.stdin.close()
      self._guard.wait()
    faulthandler.unregister(STACKS)
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
    changed = allowed != self._allowed
    self._what, self._began, self._allowed = what, now, allowed
    if changed:  # the next tick may never come
      self._tell_guard()

  def _tell_guard(self) -> None:
    """Gives the guard a sign of life, and the seconds that may pass until the next."""
    if self._guard:
      with contextlib.suppress(OSError):  # it is behind, or somebody ended it
        self._guard.stdin.write(b"%.1f\n" % (self._allowed + LATER))

  def _watch(self) -> None:
    before = time.monotonic()
    while not self._over.wait(pause := min(1.0, self._allowed / 10)):
      now = time.monotonic()
      if now - before > 2 * pause and self._began <= before + pause:  # the process stood still, and its work with it
        self._began += now - before - pause
      before = now
      self._tell_guard()
      seconds, allowed = now - self._began, self._allowed
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
  """Notes SIGTERM and Ctrl-C. The first asks for a save and an end; a second one ends the process at once.

  So do GRACE seconds after a SIGTERM; a person at a keyboard has no such limit. It works in the main thread of a
  single process. With several processes, `distributed.preempted` tells all of them about SIGTERM, which a first Ctrl-C
  becomes there.
  """

  def __init__(self, *, several: bool = False):
    self.asked, self.code, self._several = False, PREEMPTED, several
    self._timer, self._old = None, {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
      self._old = {number: signal.signal(number, self._note) for number in numbers}
    return self

  def __exit__(self, *exc):
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if self._timer:
      self._timer.cancel()

  def _note(self, number: int, _) -> None:
    by_hand = number == signal.SIGINT
    if self.asked:
      os._exit(INTERRUPTED if by_hand else self.code)
    self.asked = True
    if by_hand:
      self.code = INTERRUPTED
      with contextlib.suppress(OSError):  # `print` may not be entered twice, and a handler comes at any moment
        os.write(2, b"\nllmarch: stopping after this step, and saving it; Ctrl-C again quits at once\n")
      if self._several:
        os.kill(os.getpid(), signal.SIGTERM)
      return
    self._timer = threading.Timer(GRACE, os._exit, (PREEMPTED,))
    self._timer.daemon = True
    self._timer.start()
