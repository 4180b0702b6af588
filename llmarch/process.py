"""The start of processes: huge pages, and children that die with their parent (standard library only)."""

import ctypes
import os
import signal
import sys

ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
TUNABLES = "GLIBC_TUNABLES"


def huge_pages() -> dict[str, str]:
  """The environment in which glibc asks Linux for huge pages; {} if that has no effect or the user has set it.

  XLA's CPU backend takes fresh pages for the temporaries of every step, and their page faults cost a third of a small
  step: experiments/byte_lm.py on one core takes 47 ms a step with huge pages, and 74 without.
  """
  try:
    with open(ENABLED) as f:
      useful = "[madvise]" in f.read()  # with [always] every process has huge pages, with [never] none can
  except OSError:
    return {}
  return {TUNABLES: "glibc.malloc.hugetlb=1"} if useful and TUNABLES not in os.environ else {}


def restart_with_huge_pages() -> None:
  """Re-executes this command with huge pages on, since glibc reads the variable only at process start."""
  found = huge_pages()
  if found:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | found)


def dies_with(parent: int):
  """Makes a function for a child to call before it runs its command: the kernel then kills it if its parent is gone."""
  libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

  def follow_parent():
    if libc is not None:
      libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
      os._exit(1)

  return follow_parent
