"""Runs a command in every task of a Slurm job, in a process of its own.

submitit, in the process around it, handles SIGTERM and the signal that Slurm sends before a job's time is over; the
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
    """Runs the command, and exits with its code if that is not 0.

    A task other than the first exits with 0 if its run was told to stop and has saved. Otherwise srun would end the
    first task before that one has asked Slurm to queue the job again.
    """
    early = f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"
    # Slurm signals every process of a task, and an ignored signal stays ignored after exec.
    before = signal.signal(getattr(signal, early), signal.SIG_IGN)
    self.child = subprocess.Popen(self.command, cwd=self.folder)
    signal.signal(getattr(signal, early), before)
    code = self._wait()
    if code and not (code == PREEMPTED and os.environ["SLURM_PROCID"] != "0"):
      sys.exit(code if code > 0 else 128 - code)

  def checkpoint(self):
    """Saves, and queues the job again; submitit calls this on task 0 shortly before the job's time is over."""
    import submitit

    self.child.send_signal(signal.SIGTERM)  # all processes of the run then save the same step
    self._wait()
    return submitit.helpers.DelayedSubmission(CommandTask(self.command, self.folder))

  def _wait(self) -> int:
    while self.child.poll() is None:  # `wait` would hold a lock that the handler of a signal needs
      time.sleep(0.1)
    return self.child.returncode
