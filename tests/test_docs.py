"""The documentation is true: its snippets run, its commands and flags exist, and so do the files and tests it names."""

import ast
import importlib
import os
import pathlib
import re
import shlex

import pytest

import llmarch
from llmarch.__main__ import COMMANDS
from llmarch.commands.common import load_config, split_overrides
from llmarch.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "LOG.md"]
name_of = lambda path: str(path.relative_to(ROOT))


def fences(text: str) -> list[tuple[str, str]]:
  """(language, content) of each fenced block.

  >>> fences("a\\n```python\\nx = 1\\n```\\nb\\n```\\nls\\n```\\n")
  [('python', 'x = 1\\n'), ('', 'ls\\n')]
  """
  return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def without_fences(text: str) -> str:
  return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)


def run_cell(source: str, namespace: dict) -> int:
  """Executes a cell; compares each expression that ends in `# => repr`. Returns how many it compared."""
  compared = 0
  lines = source.splitlines()
  for node in ast.parse(source).body:
    _, arrow, expected = lines[node.end_lineno - 1].partition("# => ")
    if isinstance(node, ast.Expr) and arrow:
      value = eval(compile(ast.Expression(node.value), "<cell>", "eval"), namespace)
      assert repr(value) == expected.strip(), f"{ast.unparse(node)} is {value!r}, not {expected.strip()}"
      compared += 1
    else:
      exec(compile(ast.Module([node], []), "<cell>", "exec"), namespace)
  return compared


def test_a_cell_is_compared_with_what_it_says():
  assert run_cell("x = 1\nx + 1  # => 2\n", {}) == 1
  with pytest.raises(AssertionError, match="x is 1, not 2"):
    run_cell("x = 1\nx  # => 2\n", {})


def cells(path: pathlib.Path) -> list[str]:
  return [content for language, content in fences(path.read_text()) if language == "python"]


@pytest.mark.parametrize("path", [path for path in PAGES if cells(path)], ids=name_of)
def test_python_snippets_run_in_order(path, tmp_path, monkeypatch, cases):
  monkeypatch.setattr(os, "environ", os.environ.copy())  # a page may set flags for its reader
  monkeypatch.chdir(tmp_path)
  namespace = {}
  cases("a value that the documentation prints", sum(run_cell(cell, namespace) for cell in cells(path)))
