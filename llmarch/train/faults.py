"""The ways in which a training process ends, with their exit codes (standard library only).

exit code   the run                                                           --supervise
0           is done                                                           ends
2, 78       was refused: the config, a flag, the data, the workdir            ends
70          cannot go on: numbers that are not finite, a step that gave
            other bits when done again, no whole checkpoint                   ends
74          could not write a checkpoint or the journal (disk full, folder
            gone)                                                            starts it again
75          was stuck, and the watchdog ended it (154 where the interpreter
            itself was stuck)                                                 starts it again
130         was interrupted from the keyboard: its last step is saved         ends
143         was told to stop (SIGTERM): its last step is saved                starts it again, unless told too
others      died: 137 or -9 killed, 134 or -6 aborted, 1 an uncaught error    starts it again

It waits 1, 2, 4 ... 60 s in between, and ends after three deaths in a row without a new step on disk.
"""

from llmarch.errors import UserError

CONFIG, NUMBERS, STORAGE, WATCHDOG, INTERRUPTED, PREEMPTED = 2, 70, 74, 75, 130, 143
FINAL = {0, CONFIG, 78, NUMBERS, INTERRUPTED}


class Fault(UserError):
  """Raised by a run that cannot go on; its last good checkpoint is kept."""

  exit_code = NUMBERS


class StorageFault(Fault):
  """Raised if a checkpoint, or the journal, could not be written."""

  exit_code = STORAGE


class Preempted(UserError):
  """Raised by a run that was told to stop, after it has saved its state."""

  exit_code = PREEMPTED


class Interrupted(Preempted):
  """Raised by a run that was told to stop from the keyboard (Ctrl-C), after it has saved its state."""

  exit_code = INTERRUPTED
