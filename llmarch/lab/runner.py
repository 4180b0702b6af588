"""Runs the trials of ablations: one process each, several at a time on this machine, or as arrays of Slurm.

A sweep that is killed goes on where its records end. A trial that fails is recorded with its reason, and the others go
on. A trial whose key is in the records of a sibling folder is not computed again: its numbers are the same.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llmarch.lab.ablation import Trial, find_ablations, too_few_seeds
from llmarch.lab.slurm import run_array
from llmarch.lab.sweep import TRIALS, Progress, Sweep, command, finished, only_sweep, prepare
from llmarch.lab.trial import LOG
from llmarch.process import dies_with, huge_pages

MOST_WORKERS = 8  # by default; each needs a gigabyte or so


def run_path(folder: str, *, budget: str = "tiny", **options) -> list[Sweep]:
  """Runs the ablation, or all ablations, of a folder, and records them there. See `run_all`."""
  return run_all(find_ablations([folder]), budget=budget, **options)


def run_all(
  folders: Sequence[str],
  *,
  budget: str,
  out: str | None = None,
  seeds: int | None = None,
  workers: int | None = None,
  backend: str = "local",
  retry_failed: bool = False,
  keep: bool = False,
  slurm: dict | None = None,
  say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
  on_record: Callable[[Sweep, dict], None] = lambda sweep, row: None,
) -> list[Sweep]:
  """Runs what is not recorded yet. out: a folder of folders for the records (None: each ablation's own).

  workers: trials at a time (None: one a GPU, else one a core, at most MOST_WORKERS). keep: the folders of finished
  trials. slurm: submitit's parameters. Raises UserError for what cannot be run; what is recorded is never lost.
  """
  sweeps = [
    Sweep(f, str(Path(out) / Path(f).resolve().name) if out else f, budget, seeds, retry_failed=retry_failed, say=say)
    for f in folders
  ]
  for sweep in sweeps:
    if few := too_few_seeds(sweep.ablation, sweep.folder, budget, seeds):
      say(few)
  with contextlib.ExitStack() as held:
    for sweep in sweeps:
      held.enter_context(only_sweep(sweep.out))
      sweep.refresh()  # what another sweep recorded before it let go
    if backend == "slurm":
      run_array(sweeps, slurm or {}, say=say, on_record=on_record)
    else:
      _run_local(sweeps, workers or default_workers(), keep=keep, say=say, on_record=on_record)
  return sweeps


def default_workers() -> int:
  """One a GPU, one on a TPU, else one a core, at most MOST_WORKERS."""
  gpus = gpu_count()
  if gpus or any(Path("/dev").glob("accel*")):
    return max(gpus, 1)
  return min(os.cpu_count() or 1, MOST_WORKERS)


def gpu_count() -> int:
  """Counts the NVIDIA devices of this machine, without jax; 0 where the system has no /dev."""
  return len(list(Path("/dev").glob("nvidia[0-9]*")))


# ---------------------------------------------------------------------------------------------- this machine


@dataclasses.dataclass
class Running:
  """A trial's process."""

  sweep: Sweep
  trial: Trial
  folder: Path
  process: subprocess.Popen
  began: float

  def late(self) -> bool:
    return time.monotonic() - self.began > self.trial.limit


def _run_local(sweeps: list[Sweep], workers: int, *, keep: bool, say, on_record) -> None:
  running: dict[int, Running] = {}
  progress = Progress(sweeps, say)

  def tell(sweep: Sweep, row: dict, folder: Path | None = None) -> None:
    progress.show(row, folder)
    on_record(sweep, row)

  try:
    while True:
      for slot in sorted(set(range(workers)) - running.keys()):
        found = _next(sweeps, [r.trial.key for r in running.values()], tell)
        if found is None:
          break
        running[slot] = _start(*found, slot, workers)
        progress.began(found[1])
      if not running:
        break
      time.sleep(0.05)
      for slot, one in list(running.items()):
        late = one.late()
        if late:
          _end(one.process)
        if one.process.poll() is None:
          continue
        del running[slot]
        row = one.sweep.record(
          one.trial, finished(one.folder, one.process.returncode, one.trial, late, one.began) | {"workers": workers}
        )
        if row["status"] == "ok" and not keep:
          shutil.rmtree(one.folder, ignore_errors=True)
        tell(one.sweep, row, one.folder)
        one.sweep.check_metrics(row)
  finally:
    for one in running.values():
      _end(one.process)
    progress.close()


def _next(sweeps: list[Sweep], busy: list[str], on_record) -> tuple[Sweep, Trial] | None:
  """The next trial to run, not one that runs already for another sweep. What a sibling has recorded is taken over."""
  for sweep in sweeps:
    for trial in sweep.pending():
      if trial.key in busy:
        continue
      known = _known(sweep, trial, sweeps)
      if known is None:
        return sweep, trial
      on_record(sweep, sweep.record(trial, known))
  return None


SHARED = ("status", "metrics", "curve", "eval_curve", "step_ms", "sample", "seconds", "hardware", "versions", "workers")


def _known(sweep: Sweep, trial: Trial, sweeps: list[Sweep]) -> dict | None:
  """The row of the trial in a sibling's records, if it went well there."""
  for other in sweeps:
    row = other.rows.get(trial.key) if other is not sweep else None
    if row and row["status"] == "ok":
      return {name: row[name] for name in SHARED if name in row} | {"from": row.get("from", other.name)}
  return None


def _start(sweep: Sweep, trial: Trial, slot: int, workers: int) -> Running:
  folder = sweep.out / TRIALS / trial.key
  prepare(folder, trial)
  cores, gpus = sorted(os.sched_getaffinity(0)), gpu_count()
  mine = cores[slot::workers] if workers <= len(cores) else cores
  environment = (
    {"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ else {}
  )
  with (folder / LOG).open("wb") as log:
    process = subprocess.Popen(
      command(folder, mine),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      env=os.environ | huge_pages() | environment,
      start_new_session=True,
      preexec_fn=dies_with(os.getpid()),
    )
  return Running(sweep, trial, folder, process, time.monotonic())


def _end(process: subprocess.Popen) -> None:
  if process.poll() is None:
    try:
      os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    process.wait()
