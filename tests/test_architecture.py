"""Who may import whom, held by reading the imports; and what a quick command may not load."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted((ROOT / "llmarch").rglob("*.py"))

# A room may import itself and these rooms. run_config.py, mesh.py and process.py are parts of config.
GROUND = {"errors", "files", "locks", "build", "config"}  # the standard library alone
BELOW_MODELS = GROUND | {"sharding", "ops", "layers", "models"}
ARROWS = {
  "errors": set(),
  "files": {"errors"},
  "locks": set(),
  "build": {"errors"},
  "config": {"build", "errors"},
  "sharding": {"errors", "config"},  # the text of a mesh, mesh.py
  "ops": {"sharding", "errors", "build"},  # ops/sampling.py has a config
  "layers": GROUND | {"ops", "sharding"},
  "models": GROUND | {"layers", "ops", "sharding"},
  "adapt": BELOW_MODELS,
  "presets": GROUND | {"layers"},
  "data": GROUND,
  "train": BELOW_MODELS | {"adapt", "data", "analysis"},
  "infer": BELOW_MODELS | {"data"},
  "convert": BELOW_MODELS | {"adapt", "presets"},
  "analysis": BELOW_MODELS | {"adapt", "presets", "train", "infer"},  # analysis/compile.py compiles their programs
  "run": BELOW_MODELS | {"adapt", "data", "train", "infer", "convert", "analysis", "__init__"},
  "lab": BELOW_MODELS | {"adapt", "presets", "data", "train", "infer", "convert", "analysis", "run", "__init__"},
  "report": BELOW_MODELS | {"analysis", "lab"},
  "commands": BELOW_MODELS
  | {"adapt", "presets", "data", "train", "infer", "convert", "analysis", "run", "lab", "report"}
  | {"__main__", "__init__"},
  "__main__": {"errors", "config", "commands"},
  "__init__": {"data", "train", "infer", "convert"},
}
LIBRARIES = {  # outside the standard library
  "errors": set(),
  "build": set(),
  "files": set(),
  "locks": set(),
  "config": set(),
  "sharding": {"jax", "numpy"},
  "ops": {"jax", "numpy"},
  "layers": {"jax", "numpy", "flax"},
  "models": {"jax", "numpy", "flax", "chex"},
  "adapt": {"jax", "numpy", "flax"},
  "presets": set(),
  "__main__": set(),
  "__init__": set(),
}


def room(module: str) -> str:
  """llmarch.layers.attention -> layers; llmarch.run_config -> config."""
  parts = module.split(".")
  name = parts[1] if len(parts) > 1 else "__init__"
  return {"run_config": "config", "mesh": "config", "process": "config"}.get(name, name)


def imports(path: pathlib.Path) -> set[str]:
  """The full names of the modules that a file imports, at the top or inside functions."""
  found = set()
  package = ["llmarch", *path.relative_to(ROOT / "llmarch").parts[:-1]]
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      source = ".".join([*base, *([node.module] if node.module else [])])
      found |= {f"{source}.{alias.name}" for alias in node.names} if source in ("llmarch", "") else {source}
  return found


def name_of(path: pathlib.Path) -> str:
  return ".".join(["llmarch", *path.relative_to(ROOT / "llmarch").with_suffix("").parts])


def test_there_are_modules_to_check():
  assert len(MODULES) > 25 and {room(name_of(path)) for path in MODULES} <= set(ARROWS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_arrows(path):
  here = room(name_of(path))
  for module in imports(path):
    top = module.split(".")[0]
    assert top not in ("configs", "experiments", "tests", "torch"), f"imports {module}"
    if top == "llmarch":
      assert room(module) in ARROWS[here] | {here}, f"{here} may not import {module}"
    elif here in LIBRARIES:
      assert top in LIBRARIES[here] or top in sys.stdlib_module_names, f"{here} may not import {module}"


def loaded_by(code: str) -> set[str]:
  code = f"{code}\nimport sys; print(*sys.modules)"
  run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  return {name.split(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize(
  "code",
  ["from llmarch.__main__ import main\nassert main(['--help']) == 0", "import llmarch", "import llmarch.run_config"],
)
def test_help_loads_no_heavy_library(code):
  heavy = {"jax", "jaxlib", "flax", "numpy", "optax", "orbax", "grain", "tokenizers", "datasets", "torch", "rich"}
  assert not loaded_by(code) & heavy


def test_the_forward_loads_no_torch():
  assert not loaded_by("import llmarch.models.decoder, llmarch.presets") & {"torch", "transformers", "orbax", "grain"}
