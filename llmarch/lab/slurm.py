"""Trials as arrays of Slurm jobs, by submitit (pip install 'llmarch[slurm]').

A task runs one trial as this machine would, and appends its record itself, under the records' lock: the folder must
be on a file system that all nodes see. The driver waits; killed and started again, it does not submit what is queued.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from llmarch.errors import UserError
from llmarch.lab import records
from llmarch.lab.ablation import Trial
from llmarch.lab.sweep import TRIALS, Progress, Sweep, command, finished, header, prepare
from llmarch.lab.trial import LOG

SUBMITTED = "submitted.jsonl"  # {key, job}: in the folder of the trials
POLL = 5.0  # seconds


class TrialTask:
  """Runs one trial and records it: the work of a job of an array. submitit pickles it."""

  def __init__(self, out: str, name: str):
    self.out, self.name = out, name

  def __call__(self, trial: Trial, attempt: int) -> None:
    folder = Path(self.out) / TRIALS / trial.key
    prepare(folder, trial)
    began, late = time.monotonic(), False
    with (folder / LOG).open("wb") as log:
      process = subprocess.Popen(command(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
      try:
        process.wait(trial.limit)
      except subprocess.TimeoutExpired:
        late = True
        process.kill()
        process.wait()
    row = finished(folder, process.returncode, trial, late, began)
    records.add(self.out, header(trial, self.name) | row | {"attempt": attempt})

  def checkpoint(self, trial: Trial, attempt: int):
    """Called by submitit where the job is preempted: the same trial again (a run with checkpoints goes on)."""
    import submitit

    return submitit.helpers.DelayedSubmission(self, trial, attempt)


def run_array(sweeps: list[Sweep], options: dict, *, say: Callable, on_record: Callable) -> None:
  """Submits what is pending, and waits until all is recorded. Raises UserError without submitit or Slurm.

  options: partition, minutes, gpus_per_trial, cpus_per_trial, parallel.
  """
  executor_of = _executors(options)
  progress = Progress(sweeps, say)
  seen = {(s.name, key) for s in sweeps for key in s.rows}
  lost: dict[str, int] = {}
  try:
    while True:
      waiting = 0
      for sweep in sweeps:
        sweep.refresh()
        for key, row in sweep.rows.items():
          if (sweep.name, key) not in seen and row["budget"] == sweep.budget:
            seen.add((sweep.name, key))
            progress.show(row, sweep.out / TRIALS / key)
            on_record(sweep, row)
        pending = sweep.pending()
        waiting += len(pending)
        queued = _queued(sweep)
        new = [t for t in pending if t.key not in queued]
        for trial in new:
          lost[trial.key] = lost.get(trial.key, 0) + 1
          if lost[trial.key] > 3:  # gone from the queue without a record
            reason = "its Slurm job left no record, three times"
            sweep.record(trial, {"status": "failed", "failure": "died", "reason": reason, "metrics": {}})
        new = [t for t in new if lost[t.key] <= 3]
        if new:
          _submit(sweep, new, executor_of(sweep, new), say)
      if not waiting:
        return
      time.sleep(POLL)
  finally:
    progress.close()


def _executors(options: dict):
  if shutil.which("sbatch") is None:
    raise UserError("--backend=slurm: there is no Slurm here (no sbatch); use --backend=local, or a login node of one")
  try:
    import submitit
  except ImportError:
    raise UserError("--backend=slurm needs the package submitit; pip install 'llmarch[slurm]'") from None

  def make(sweep: Sweep, trials: list[Trial]):
    executor = submitit.AutoExecutor(folder=str(sweep.out / TRIALS / "slurm"), cluster="slurm")
    minutes = options["minutes"] or max(int(max(t.limit for t in trials) // 60) + 5, 1)
    executor.update_parameters(
      name=f"llmarch-{sweep.name}",
      timeout_min=minutes,
      cpus_per_task=options["cpus_per_trial"],
      slurm_array_parallelism=options["parallel"],
      **({"gpus_per_node": options["gpus_per_trial"]} if options["gpus_per_trial"] else {}),
      **({"slurm_partition": options["partition"]} if options["partition"] else {}),
    )
    return executor

  return make


def _submit(sweep: Sweep, trials: list[Trial], executor, say) -> None:
  attempt = lambda t: sweep.rows[t.key].get("attempt", 1) + 1 if t.key in sweep.failed_before else 1
  out = str(sweep.out.resolve())
  jobs = executor.map_array(TrialTask(out, sweep.name), trials, [attempt(t) for t in trials])
  with (sweep.out / TRIALS / SUBMITTED).open("a") as f:
    for trial, job in zip(trials, jobs, strict=True):
      f.write(json.dumps({"key": trial.key, "job": job.job_id}) + "\n")
  say(f"{sweep.name}: {len(trials)} trials are job array {jobs[0].job_id.partition('_')[0]}")


def _queued(sweep: Sweep) -> set[str]:
  """Keys of the trials whose jobs are pending or running."""
  path = sweep.out / TRIALS / SUBMITTED
  if not path.exists():
    return set()
  listed = subprocess.run(["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True)
  if listed.returncode:
    raise UserError(f"--backend=slurm: squeue failed ({listed.stderr.strip() or listed.returncode}); is Slurm up?")
  active = set(listed.stdout.split())
  rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
  return {row["key"] for row in rows if row["job"] in active}
