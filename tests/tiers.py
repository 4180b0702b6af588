"""Puts cases of a parametrized test into tiers: plain `pytest` runs some, `pytest --full` the others too."""

from collections.abc import Callable, Iterable

import pytest


def plain_if(keep: Callable[[object], bool], cases: Iterable, later: str = "full") -> list:
  """The cases, in order; those that `keep` refuses are marked `later` ("full" or "nightly"). A tuple is the arguments
  of one case.

  >>> [bool(getattr(case, "marks", ())) for case in plain_if(lambda n: n < 2, [1, 2])]
  [False, True]
  """
  mark = getattr(pytest.mark, later)
  arguments = lambda case: case if isinstance(case, tuple) else (case,)
  return [case if keep(case) else pytest.param(*arguments(case), marks=mark) for case in cases]
