"""The error that a user reads, and the checks that raise it.

Bad input is refused in one sentence that names the field or the file, and the mend. This module imports the standard
library alone, so that every other module may import it.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
  """Bad input. The message is one sentence that names the field or file and the mend."""

  exit_code = 2  # of the command


def check(condition: bool, sentence: str) -> None:
  """Raises UserError(sentence) unless the condition holds; `build` prefixes the path of the config."""
  if not condition:
    raise UserError(sentence)


def check_at_least(config: Any, low: float, *names: str) -> None:
  """Raises UserError unless each named field is None or at least `low`."""
  for name in names:
    value = getattr(config, name)
    check(value is None or value >= low, f"{name} must be at least {low}, got {value}")


def check_above(config: Any, low: float, *names: str) -> None:
  """Raises UserError unless each named field is None or greater than `low`."""
  for name in names:
    value = getattr(config, name)
    check(value is None or value > low, f"{name} must be greater than {low}, got {value}")


def check_rate(config: Any, *names: str) -> None:
  """Raises UserError unless each named field lies in [0, 1)."""
  for name in names:
    value = getattr(config, name)
    check(0 <= value < 1, f"{name} must be at least 0 and below 1, got {value}")


def pick(table: Mapping[str, Any], name: str, what: str) -> Any:
  """The value of a name in a table. Raises UserError, which names the known ones, for another name."""
  check(name in table, f"there is no {what} {name!r}{nearest(name, table)}")
  return table[name]


def nearest(name: str, known: Iterable[str]) -> str:
  """Ends a sentence about an unknown name: "; did you mean 'x'?" where a known name is close, else all of them."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(sorted(known))})"
