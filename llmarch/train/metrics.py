"""Writers of metrics: metrics.jsonl, TensorBoard, Weights & Biases, and a live line on the terminal."""

import collections
import contextlib
import errno
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from llmarch.errors import UserError
from llmarch.files import write_text
from llmarch.run_config import LogConfig
from llmarch.train.faults import StorageFault


class MetricsWriter:
  """Writes rows {"step": int, name: number or nested dict} to WORKDIR/metrics.jsonl and the loggers of `log`.

  A resumed run continues the file: rows after `resume_step` are dropped, because the run repeats those steps. Each row
  gets "seconds", the time that the run has taken so far, over all its processes. No logger ever stops a run: one that
  cannot write says so once, by `say`. Rows wait for room in metrics.jsonl; another logger is given up.
  """

  def __init__(
    self, workdir: str, resume_step: int, log: LogConfig | None = None, *,
    config: dict | None = None, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
  ):  # fmt: skip
    self._say, log = say, log or LogConfig()
    self._lines = _Lines(Path(workdir) / "metrics.jsonl", resume_step, self._say)
    self.last_eval = self._lines.last_eval
    self._before, self._began = self._lines.seconds, time.monotonic()
    self._loggers = {}
    for name, make in (("tensorboard", _TensorBoard), ("wandb", _WandB)):
      if getattr(log, name):
        with self._given_up(name):
          self._loggers[name] = make(workdir, resume_step, log, config or {})

  def write(self, row: dict) -> None:
    row = row | {"seconds": row.get("seconds", self._before + time.monotonic() - self._began)}
    self._lines.write(row)
    self._all("write", row)

  def sync(self) -> None:
    """Waits until the rows are on the disk."""
    self._lines.sync()
    self._all("sync")

  def close(self) -> None:
    self._lines.close()
    self._all("close")

  def _all(self, method: str, *args) -> None:
    for name, logger in list(self._loggers.items()):
      with self._given_up(name):
        getattr(logger, method)(*args)

  @contextlib.contextmanager
  def _given_up(self, name: str):
    """Gives a logger up, and says so, if the block fails, whatever its package raises."""
    try:
      yield
    except UserError:
      raise
    except Exception as e:
      logger = self._loggers.pop(name, None)
      with contextlib.suppress(Exception):
        logger.close()
      why = getattr(e, "strerror", None) or f"{type(e).__name__}: {str(e).strip()[:200]}"
      self._say(f"llmarch: log.{name} cannot write ({why}); the run goes on without it")


class _Lines:
  """The rows of metrics.jsonl. Rows that find no room wait in memory, and are written when there is some."""

  PAUSE, MOST = 10.0, 100_000  # seconds between two tries on a full disk; rows that wait at most, the newest

  def __init__(self, path: Path, resume_step: int, say: Callable[[str], None]):
    self._path, self._say, self._said = path, say, False
    self._waiting, self._next_try = collections.deque(maxlen=self.MOST), 0.0
    kept, whole = _rows_until(path, resume_step) if path.exists() else ([], True)
    rows = [json.loads(line) for line in kept]
    self.seconds = next((row["seconds"] for row in reversed(rows) if "seconds" in row), 0.0)
    self.last_eval = next((row for row in reversed(rows) if "eval/loss" in row), {})
    try:
      if not whole:
        write_text(path, "".join(f"{line}\n" for line in kept))
      self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as e:
      raise StorageFault(f"cannot write {path} ({e.strerror}); make room there, and start the run again") from e

  def write(self, row: dict) -> None:
    self._waiting.append(json.dumps(row))
    if time.monotonic() >= self._next_try:
      self._flush()

  def _flush(self) -> None:
    """Writes the rows that wait, all or none of them."""
    data = "".join(f"{line}\n" for line in self._waiting).encode()
    size = os.fstat(self._file).st_size
    try:
      if os.write(self._file, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      self._waiting.clear()
    except OSError as e:
      with contextlib.suppress(OSError):
        os.ftruncate(self._file, size)  # no part of a row stays
      if not self._said:
        self._say(f"llmarch: cannot write {self._path} ({e.strerror}); the run goes on, and its rows wait for room")
      self._said, self._next_try = True, time.monotonic() + self.PAUSE

  def sync(self) -> None:
    self._flush()
    with contextlib.suppress(OSError):
      os.fsync(self._file)

  def close(self) -> None:
    self._flush()
    os.close(self._file)
    if self._waiting:
      self._say(f"llmarch: {len(self._waiting)} rows found no room in {self._path}, and are lost")


class _TensorBoard:
  """Events of TensorBoard, written in the training thread: tensorboardX's own thread dies with a full disk, unseen."""

  FLUSH = 30.0  # seconds between flushes

  def __init__(self, workdir: str, resume_step: int, log: LogConfig, config: dict):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._file, self._event = EventsWriter(f"{workdir}/events"), Event
    if resume_step:  # TensorBoard then drops what an earlier process wrote of later steps
      log_of = SessionLog(status=SessionLog.START)
      self._file.write_event(Event(step=resume_step + 1, wall_time=time.time(), session_log=log_of))
    self._flushed = time.monotonic()

  def write(self, row: dict) -> None:
    from tensorboardX.summary import scalar

    for name, value in _flat(row):
      if name != "step" and value is not None:
        self._file.write_event(self._event(step=row["step"], wall_time=time.time(), summary=scalar(name, value)))
    if time.monotonic() - self._flushed > self.FLUSH:
      self.sync()

  def sync(self) -> None:
    self._file.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._file._py_recordio_writer.close()  # `EventsWriter.close` leaves the file open where a flush fails


class _WandB:
  """A run of Weights & Biases, one for a workdir however often the run is resumed (`pip install 'llmarch[wandb]'`)."""

  def __init__(self, workdir: str, resume_step: int, log: LogConfig, config: dict):
    try:
      import wandb
    except ImportError:
      raise UserError(
        f"log.wandb={log.wandb!r} needs the package wandb; run pip install 'llmarch[wandb]', or leave log.wandb out"
      ) from None
    self._run = wandb.init(
      project=log.wandb, name=log.name or Path(workdir).absolute().name, notes=log.notes or None,
      tags=list(log.tags) or None, mode=log.wandb_mode, dir=workdir, config=config,
      id=self._id(Path(workdir) / "wandb_id.txt"), resume="allow",
      settings=wandb.Settings(silent=True),
    )  # fmt: skip

  @staticmethod
  def _id(path: Path) -> str:
    """The run's name at Weights & Biases, which its workdir keeps."""
    if not path.exists():
      write_text(path, uuid.uuid4().hex[:12])
    return path.read_text()

  def write(self, row: dict) -> None:
    numbers = {name: value for name, value in _flat(row) if name != "step" and value is not None}
    self._run.log(numbers, step=row["step"])

  def sync(self) -> None:
    pass

  def close(self) -> None:
    self._run.finish()


def read_rows(workdir: str, until: int) -> list[dict]:
  """The rows of a run's metrics.jsonl up to a step; [] if there is no such file."""
  path = Path(workdir) / "metrics.jsonl"
  return [json.loads(line) for line in _rows_until(path, until)[0]] if path.exists() else []


def _rows_until(path: Path, step: int) -> tuple[list[str], bool]:
  """The complete lines of a metrics file up to a step, and whether they are all of it.

  A line that a crash cut off or garbled is dropped.
  """
  kept, text = [], path.read_text(errors="replace")
  for line in text.splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except (ValueError, KeyError, TypeError):
      continue
  return kept, text == "".join(f"{line}\n" for line in kept)


def _flat(row: dict, prefix: str = ""):
  """Yields ('telemetry/residual_rms/3', value) for every number in a nested row."""
  for name, value in row.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{name}/")
    elif isinstance(value, list):
      yield from _flat({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
    else:
      yield f"{prefix}{name}", value


class LiveLine:
  """A line on a terminal that is rewritten, with the time left; plain lines if there is no terminal.

  While it is open (`with`), whatever else is written to sys.stderr begins on a line of its own.
  """

  def __init__(self, steps: int):
    self.steps, self.live = steps, sys.stderr.isatty()
    self._stream = sys.stderr
    self._shown = ""  # what stands on the terminal without an end of line: "", "row" or "status"
    self.begin(0)

  def __enter__(self):
    if self.live:
      sys.stderr = _Others(self._stream, self)
    return self

  def __exit__(self, *exc):
    self.end()
    if isinstance(sys.stderr, _Others):
      sys.stderr = self._stream

  def begin(self, step: int) -> None:
    """Starts the clock of the time left, after `step` steps."""
    self._start, self._began = step, time.monotonic()

  def leave_out(self, seconds: float, steps: int = 0) -> None:
    """Leaves work that happens once, such as compiling, out of the time that a step is taken to need."""
    self._began, self._start = self._began + seconds, self._start + steps

  def show(self, row: dict) -> None:
    """Shows a row of metrics, in place of the row before; that of the last step stays."""
    done = row["step"] - self._start
    left = (time.monotonic() - self._began) / max(done, 1) * (self.steps - row["step"])
    parts = [  # (how soon it goes where the terminal is narrow, text)
      (0, f"step {row['step']}/{self.steps}"),
      (1, f"loss {row['loss']:.4f}"),
      (4, f"{row['bits_per_byte']:.3f} bits/byte"),
      (7, f"|g| {row['grad_norm']:.2f}"),
      (6, f"lr {row['learning_rate']:.2e}"),
      (3, f"{row['tokens_per_second']:,.0f} tok/s"),
      (5, "" if row["mfu"] is None else f"mfu {row['mfu']:.1%}"),
      (2, f"{clock(left)} left" if 0 < done and row["step"] < self.steps else ""),
    ]
    parts = [part for part in parts if part[1]]
    text = lambda: "  ".join(words for _, words in parts)
    while self.live and len(parts) > 1 and len(text()) >= columns():
      parts.remove(max(parts))
    self._replace(text(), "row")
    if row["step"] >= self.steps:
      self.end()

  def status(self, text: str) -> None:
    """Shows what is being done, until something else is shown."""
    self._replace(text, "status")

  def say(self, text: str) -> None:
    """Prints a line that stays, below the last row."""
    if self._shown == "row":
      self.end()
    self._print(f"{text}\n")

  def end(self) -> None:
    """Ends the line that is shown, if there is one, so that another may begin."""
    if self._shown:
      self._shown = ""
      self._write("\n")

  def _replace(self, text: str, what: str) -> None:
    self._print(text[: columns() - 1] if self.live else f"{text}\n")
    self._shown = what if self.live else ""

  def _print(self, text: str) -> None:
    self._shown, start = "", "\r\033[K" if self.live else ""
    self._write(f"{start}{text}")

  def _write(self, text: str) -> None:
    stream = self._stream if isinstance(sys.stderr, _Others) else sys.stderr
    with contextlib.suppress(OSError):  # the disk of a log file is full, or the reader of a pipe has ended
      print(text, end="", file=stream, flush=True)


class _Others:
  """Standard error as everything but the live line sees it: their first word ends that line."""

  def __init__(self, stream, line: LiveLine):
    self._stream, self._line = stream, line

  def write(self, text: str) -> int:
    self._line.end()
    return self._stream.write(text)

  def __getattr__(self, name: str):
    return getattr(self._stream, name)


def columns() -> int:
  """The columns of the terminal that standard error goes to; 80 where nothing says."""
  given = os.environ.get("COLUMNS", "")
  if given.isdigit() and int(given):
    return int(given)
  try:
    return os.get_terminal_size(2).columns or 80
  except OSError:
    return 80


def clock(seconds: float) -> str:
  """Formats a duration in seconds for people."""
  minutes, seconds = divmod(math.ceil(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
