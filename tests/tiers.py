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


def three(plain: Callable[[object], bool], full: Callable[[object], bool], cases: Iterable) -> list:
  """The cases, in order: those that `plain` takes are of plain `pytest`, of the others those that `full` takes are of
  `--full`, and the rest of `--nightly`.

  >>> [[mark.name for mark in getattr(case, "marks", ())] for case in three([1].count, [2].count, [1, 2, 3])]
  [[], ['full'], ['nightly']]
  """
  cases = list(cases)
  later = plain_if(full, cases, "nightly")
  return [case if plain(case) else marked if case is not marked else plain_if(plain, [case])[0]
          for case, marked in zip(cases, later, strict=True)]  # fmt: skip
