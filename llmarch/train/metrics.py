"""Writers of metrics: metrics.jsonl, TensorBoard events and a live line on the terminal."""

import json
import math
import os
import sys
import time
from pathlib import Path

from llmarch.files import write_text


class MetricsWriter:
  """Writes rows {"step": int, name: number or nested dict} to WORKDIR/metrics.jsonl and TensorBoard.

  A resumed run continues the file: rows after `resume_step` are dropped, because the run repeats those steps.
  """

  def __init__(self, workdir: str, resume_step: int):
    from tensorboardX import SummaryWriter

    path = Path(workdir) / "metrics.jsonl"
    if path.exists():
      write_text(path, "".join(f"{line}\n" for line in _rows_until(path, resume_step)))
    self._file = path.open("a", buffering=1)
    self._events = SummaryWriter(workdir, purge_step=resume_step + 1 if resume_step else None)

  def write(self, row: dict) -> None:
    self._file.write(json.dumps(row) + "\n")
    for name, value in _flat(row):
      if name != "step" and value is not None:
        self._events.add_scalar(name, value, row["step"])

  def sync(self) -> None:
    """Waits until the rows are on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()
    self._events.close()


def _rows_until(path: Path, step: int) -> list[str]:
  """The complete lines of a metrics file up to a step; a line that a crash cut off or garbled is dropped."""
  kept = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except (ValueError, KeyError, TypeError):
      continue
  return kept


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
  """A line on a terminal that is rewritten, with the time left; plain lines if there is no terminal."""

  def __init__(self, steps: int, start: int):
    self.steps, self.start, self.began = steps, start, time.monotonic()
    self.live = sys.stderr.isatty()

  def show(self, row: dict) -> None:
    done = row["step"] - self.start
    left = (time.monotonic() - self.began) / max(done, 1) * (self.steps - row["step"])
    mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
    text = (
      f"step {row['step']}/{self.steps}  loss {row['loss']:.4f}  {row['bits_per_byte']:.3f} bits/byte  "
      f"|g| {row['grad_norm']:.2f}  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s{mfu}"
      f"  {clock(left)} left"
    )
    self._print(text, "" if self.live and row["step"] < self.steps else "\n")

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._print(text, "\n")

  def _print(self, text: str, end: str) -> None:
    start = "\r\033[K" if self.live else ""
    print(f"{start}{text}", end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
  """Formats a duration in seconds for people."""
  minutes, seconds = divmod(math.ceil(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
