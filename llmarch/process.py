"""How this project's processes start (standard library only)."""

import ctypes
import os
import signal
import sys

ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
TUNABLES = "GLIBC_TUNABLES"


def huge_pages() -> dict[str, str]:
  """The environment in which glibc asks Linux for huge pages; {} where that does nothing, or the user has a say.

  XLA's CPU backend takes fresh pages for the temporaries of every step, and their faults cost a third of a small one:
  experiments/byte_lm.py on one core takes 47 ms a step with huge pages, 74 without.
  """
  try:
    with open(ENABLED) as f:
      useful = "[madvise]" in f.read()  # [always] gives them anyway, [never] not at all
  except OSError:
    return {}
  return {TUNABLES: "glibc.malloc.hugetlb=1"} if useful and TUNABLES not in os.environ else {}


def restart_with_huge_pages() -> None:
  """Becomes the same command in that environment, which glibc reads at the start of a process alone."""
  found = huge_pages()
  if found:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | found)


def dies_with(parent: int):
  """What a child does before it becomes the command: it asks the kernel to be killed when its parent is gone."""
  libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

  def ask():
    if libc is not None:
      libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
      os._exit(1)

  return ask
