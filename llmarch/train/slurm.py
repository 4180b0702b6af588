"""Runs a command in every task of a Slurm job, in a process of its own.

submitit, in the process around it, holds SIGTERM and the signal that Slurm sends before a job's time is over; the
command needs SIGTERM for itself (train/distributed.py).
"""

import os
import signal
import subprocess
import sys
import time

from llmarch.train.faults import PREEMPTED


class CommandTask:
  """Runs `command` in `folder`; pickled by submitit, and called in every task."""

  def __init__(self, command: list[str], folder: str):
    self.command, self.folder = command, folder

  def __call__(self) -> None:
    """Exits with the command's code, if that is not 0.

    A task but the first whose run was told to stop, and has saved, ends well: a bad exit would have srun end the
    first before that has asked for the job to be queued again.
    """
    early = f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"
    # Slurm signals every process of a task; what is ignored stays so over exec.
    before = signal.signal(getattr(signal, early), signal.SIG_IGN)
    self.child = subprocess.Popen(self.command, cwd=self.folder)
    signal.signal(getattr(signal, early), before)
    code = self._wait()
    if code and not (code == PREEMPTED and os.environ["SLURM_PROCID"] != "0"):
      sys.exit(code if code > 0 else 128 - code)

  def checkpoint(self):
    """Called by submitit, on task 0, when the time is nearly over: saves, and has the job queued again."""
    import submitit

    self.child.send_signal(signal.SIGTERM)  # and all processes save the same step
    self._wait()
    return submitit.helpers.DelayedSubmission(CommandTask(self.command, self.folder))

  def _wait(self) -> int:
    while self.child.poll() is None:  # and not `wait`, which holds a lock that a signal's handler would want
      time.sleep(0.1)
    return self.child.returncode
