"""Holds a folder or a file for one process at a time, by a lock of the system on a file beside it (flock)."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO


class Taken(Exception):
  """Another process holds the lock; the message is that process and its host, or "" if it has only just started."""


def take(path: str | os.PathLike, *, wait: bool = False) -> IO[str]:
  """Takes the lock of the file `path`, which is made if need be. Returns the open file; closing it gives the lock back.

  The lock goes with the process, however that ends, so that what a dead one wrote in the file holds nobody up. On a
  file system without locks it holds nobody off. Raises Taken if another process has it, unless `wait`; OSError where
  the file cannot be opened.
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
    pass  # a file system without locks
  file.truncate(0)
  file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
  file.flush()
  return file
