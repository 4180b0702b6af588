"""The documentation is true: its snippets run, its commands and flags exist, and so do the files and tests it names."""

import ast
import importlib
import os
import pathlib
import re
import shlex

import pytest

import llmarch
import llmarch.layers.registry  # whose kinds join their families before a page adds to them
from llmarch.__main__ import COMMANDS
from llmarch.build import Variant
from llmarch.commands.common import load_config, split_overrides
from llmarch.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "LOG.md", ROOT / "experiments/README.md", ROOT / "configs/README.md"]
SCRIPTS = [path for folder in ("configs", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
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


def families(root: type = Variant) -> list[type]:
  """All families of alternative configs."""
  return [family for one in root.__subclasses__() for family in ([one] if not one.kind else []) + families(one)]


@pytest.fixture
def no_new_kinds():
  """A page may define alternatives of its own, which leave their families when the page is over."""
  before = {family: dict(family.variants) for family in families()}
  yield
  for family, variants in before.items():
    family.variants.clear()
    family.variants.update(variants)


@pytest.mark.usefixtures("no_new_kinds")
@pytest.mark.parametrize("path", [path for path in PAGES if cells(path)], ids=name_of)
def test_python_snippets_run_in_order(path, tmp_path, monkeypatch, cases):
  monkeypatch.setattr(os, "environ", os.environ.copy())  # a page may set flags for its reader
  monkeypatch.chdir(tmp_path)
  namespace = {}
  cases("a value that the documentation prints", sum(run_cell(cell, namespace) for cell in cells(path)))


# ------------------------------------------------------------------------------------------------- commands


def commands(path: pathlib.Path) -> list[str]:
  """Every command line of llmarch in a text: in fenced blocks, and in inline code; in a script's docstring."""
  text = path.read_text()
  if path.suffix == ".py":
    return re.findall(r"(?:^ +|^Command: )(llmarch .*)$", ast.get_docstring(ast.parse(text)), re.M)
  found = []
  for language, content in fences(text):
    if language in ("", "console"):
      found += content.replace("\\\n", " ").splitlines()
  found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences(text))]
  lines = [re.sub(r"^pip install [^&]*&& ", "", line.split("  #")[0].strip()) for line in found]
  return [line for line in lines if line.startswith("llmarch ")]


def is_placeholder(value: str) -> bool:
  """A value that a reader replaces: N, DIR, HOST:PORT, NEW ...

  >>> is_placeholder("HOST:PORT"), is_placeholder("runs/tiny"), is_placeholder("...")
  (True, False, True)
  """
  return bool(re.fullmatch(r"[A-Z_:]+|\.\.\.", value))


def check_command(line: str) -> None:
  """Raises AssertionError or UserError unless a command and all of its flags exist, and take the values given."""
  from absl import flags

  name, *words = shlex.split(line)[1:]
  assert name in {*COMMANDS, "COMMAND"}, f"there is no command {name!r}"
  if name == "COMMAND":
    return
  if "--" in words:
    inner = words[words.index("--") + 1 :]
    words = words[: words.index("--")]
    check_command(shlex.join(["llmarch", *inner]))
  module = importlib.import_module(f"llmarch.commands.{name}")
  values = flags.FlagValues()
  module._define(values)
  words, overrides = split_overrides([word for word in words if word != "..."])
  given = {}
  for word in words:
    if not word.startswith("--"):
      assert word in ("show", "run", "ID", "facts") or is_placeholder(word) or name in ("ablate", "report", "claims")
      continue
    flag, equals, value = word.removeprefix("--").partition("=")
    if flag == "help":
      continue
    known = flag if flag in values else flag.removeprefix("no")
    assert known in values, f"llmarch {name} has no flag --{flag}"
    if equals and not is_placeholder(value):
      given[flag] = values[known].parser.parse(value)
      if flag in FILES:
        assert (ROOT / value).exists() or value.startswith(OUTPUTS), f"--{flag}={value} is not there"
  if "config" in dir(values) or overrides:
    config = given.get("config") or "configs/tiny.py"
    config = "configs/tiny.py" if config.startswith(OUTPUTS) else re.sub(r",runs/\w+$", "", config)
    load_config(str(ROOT / config) if config.split(".py")[0] + ".py" in CONFIGS else config, overrides)


FILES = {"text", "peer", "suite", "file"}  # flags whose value must be there
OUTPUTS = ("runs/", "/shared/runs/")  # what commands of the documentation write
CONFIGS = {name_of(path) for path in SCRIPTS}


@pytest.mark.parametrize("path", [path for path in TEXTS + SCRIPTS if commands(path)], ids=name_of)
def test_commands_and_their_flags_exist(path, cases):
  wrong = []
  for line in commands(path):
    try:
      check_command(line)
    except (AssertionError, UserError, ValueError) as e:
      wrong.append(f"{line}: {e}")
  assert not wrong, "\n".join(wrong)
  cases("a command line of the documentation", len(commands(path)))


@pytest.mark.parametrize(
  "line, sentence",
  [
    ("llmarch trian --config=configs/tiny.py", "there is no command 'trian'"),
    ("llmarch train --confg=configs/tiny.py", "llmarch train has no flag --confg"),
    ("llmarch train --config=configs/tiny.py --config.train.step=5", "config.train.step"),
    ("llmarch launch --local=2 -- train --worker=a", "llmarch train has no flag --worker"),
    ("llmarch evaluate --from=runs/tiny --text=notes.txt", "notes.txt is not there"),
  ],
)
def test_a_wrong_command_is_found(line, sentence):
  try:
    check_command(line)
  except (AssertionError, UserError) as e:
    assert sentence in str(e)
  else:
    pytest.fail(f"{line} passed")


# ----------------------------------------------------------------------------------------- links, files, tests


def links(path: pathlib.Path) -> list[str]:
  found = re.findall(r"\]\(([^)\s]+)\)", without_fences(path.read_text()))
  return [link.partition("#")[0] for link in found if not re.match(r"https?:|#", link)]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_lead_to_files(path):
  missing = [link for link in links(path) if not (path.parent / link).exists()]
  assert not missing


def named_files(path: pathlib.Path) -> list[str]:
  """Files of the repository that inline code and tables name: `ops/cache.py`, `configs/tiny.py`, `experiments/`."""
  text = path.read_text()
  spans = re.findall(r"`([^`\n]+)`", without_fences(text))
  named = [word for word in spans if re.fullmatch(r"[\w/-]+(\.py|\.md|\.toml|/)", word)]
  named = [word for word in named if not word.startswith(OUTPUTS)]
  return named + re.findall(r"\b((?:configs|benchmarks|experiments|tests)/[\w/]+\.(?:py|json|md))\b", text)


def exists(name: str, page: pathlib.Path) -> bool:
  """Seen from the page, from the repository, or from the package."""
  return any((folder / name).exists() for folder in (page.parent, ROOT, ROOT / "llmarch"))


# By a reader, or by a command.
WRITTEN = {"ablation.py", "llmarch/layers/mine.py", "quarantine/"}
WRITTEN |= {f"experiments/{name}/ablation.py" for name in ("width", "day")}


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_files_that_are_named_exist(path, cases):
  missing = [name for name in named_files(path) if name not in WRITTEN and not exists(name, path)]
  assert not missing
  cases("a file that the documentation names", len(named_files(path)))


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_tests_that_are_named_exist(path):
  """As tests/test_x.py::test_y, and as `pytest -k word tests/test_x.py`."""
  for file, name in re.findall(r"(tests/test_\w+\.py)::(\w+)", path.read_text()):
    assert re.search(rf"def {name}\(", (ROOT / file).read_text()), f"{file} has no {name}"
  for word, file in re.findall(r"pytest [^`\n]*-k (\w+) (tests/test_\w+\.py)", path.read_text()):
    assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text()), f"{file} has no test of the name {word}"


# -------------------------------------------------------------------------------------- the face of the package


def test_every_public_name_of_the_package_resolves_and_is_in_its_docstring():
  public = [name for name in dir(llmarch) if not name.startswith("_")]
  assert {"load", "LM", "Decoder", "make_decoder", "make_train_step", "PRESETS", "shrink"} <= set(public)
  for name in public:
    assert getattr(llmarch, name) is not None
    assert re.search(rf"^  {name}\b", llmarch.__doc__, re.M), f"{name} is not in the docstring of llmarch"
  described = re.findall(r"^  (\w+)(?:\(\w+\))?  ", llmarch.__doc__, re.M)
  assert sorted(described) == sorted(public)
  with pytest.raises(AttributeError, match="no attribute 'Decodr'"):
    llmarch.Decodr  # noqa: B018


@pytest.mark.parametrize("weights, stored", [(None, "float32"), ("int8", "matrices in int8")])
def test_the_repr_of_an_lm_is_its_size_in_one_line(weights, stored):
  import jax
  from flax import nnx

  from llmarch.analysis import cost

  config = llmarch.shrink(llmarch.PRESETS["gemma_2_2b"]())
  params = jax.jit(lambda key: nnx.state(llmarch.Decoder(config, key)))(jax.random.key(0))
  count = cost.params(config)["total"]
  assert repr(llmarch.LM(config, params, weights=weights)) == (
    f"LM({count:,} parameters, {stored}, {len(config.layers)} layers, d_model {config.d_model},"
    f" vocabulary {config.vocab_size}, on {jax.devices()[0]})"
  )
