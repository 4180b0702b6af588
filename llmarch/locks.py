"""Holds a folder or a file for one process at a time, by a lock of the system on a file beside it (flock)."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO


class Taken(Exception):
  """Raised if another process holds the lock; the message names it and its host, or is "" if it has just started."""


def take(path: str | os.PathLike, *, wait: bool = False) -> IO[str]:
  """Takes the lock of the file `path`, which is made if it does not exist. Closing the returned file gives it back.

  The lock ends with the process, however that ends, so the text that a dead process left in the file blocks nobody. On
  a file system without locks, nobody is kept out. Raises Taken if another process holds the lock, unless `wait`, and
  OSError if the file cannot be opened.
  """
  file = Path(path).open("a+")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    file.seek(0)
    holder = file.read().strip()
    file.close()
    raise Taken(holder) from None
  except OSError:
    pass  # the file system has no locks
  file.truncate(0)
  file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
  file.flush()
  return file
