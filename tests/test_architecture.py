"""Who may import whom, held by reading the imports; and what a quick command may not load."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted((ROOT / "llmarch").rglob("*.py"))

# A room may import itself and these rooms. experiment.py, experiment_checks.py and process.py are parts of config.
# experiment_checks.py reads the text of a mesh; no other part of config may import sharding.
BELOW_MODELS = {"config", "sharding", "ops", "layers", "models"}
ARROWS = {
  "config": set(),
  "sharding": {"config"},  # its UserError
  "ops": {"sharding", "config"},  # config is the standard library alone; ops/sampling.py has a config
  "layers": {"ops", "config", "sharding"},
  "models": {"layers", "ops", "config", "sharding"},
  "presets": {"config", "layers"},
  "data": {"config"},
  "train": BELOW_MODELS | {"data", "analysis"},
  "infer": BELOW_MODELS | {"data"},
  "convert": BELOW_MODELS | {"presets"},
  "analysis": BELOW_MODELS | {"presets", "train", "infer"},  # analysis/compile.py compiles their programs
  "lab": BELOW_MODELS | {"presets", "data", "train", "infer", "convert", "analysis", "__init__"},
  "report": BELOW_MODELS | {"analysis", "lab"},
  "commands": BELOW_MODELS
  | {"presets", "data", "train", "infer", "convert", "analysis", "lab", "report", "__main__", "__init__"},
  "__main__": {"config", "commands"},
  "__init__": {"data", "train", "infer", "convert"},
}
EXCEPTIONS = {("llmarch.experiment_checks", "llmarch.sharding.mesh_text"): {"sharding"}}  # which is without jax
# The modules of sharding/, each of which may import those before it; meshes.py stands apart.
SHARDING = ("mesh_text", "table", "places", "active", "collectives", "moves")
LIBRARIES = {  # outside the standard library
  "config": set(),
  "sharding": {"jax", "numpy"},
  "ops": {"jax", "numpy"},
  "layers": {"jax", "numpy", "flax"},
  "models": {"jax", "numpy", "flax", "chex"},
  "presets": set(),
  "__main__": set(),
  "__init__": set(),
}


def room(module: str) -> str:
  """llmarch.layers.attention -> layers; llmarch.experiment -> config."""
  parts = module.split(".")
  name = parts[1] if len(parts) > 1 else "__init__"
  return {"experiment": "config", "experiment_checks": "config", "process": "config"}.get(name, name)


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
      allowed = ARROWS[here] | {here} | EXCEPTIONS.get((name_of(path), module), set())
      assert room(module) in allowed, f"{here} may not import {module}"
    elif here in LIBRARIES:
      assert top in LIBRARIES[here] or top in sys.stdlib_module_names, f"{here} may not import {module}"


def test_sharding_is_a_package_in_one_direction():
  modules = {path.stem: path for path in MODULES if path.parent.name == "sharding"}
  assert set(modules) == {"__init__", "meshes", *SHARDING}
  within = lambda name: {m.split(".")[2] for m in imports(modules[name]) if m.startswith("llmarch.sharding.")}
  for i, name in enumerate(SHARDING):
    assert within(name) <= set(SHARDING[:i]), name
    assert "llmarch.sharding" not in imports(modules[name]), name
  assert within("meshes") <= {"mesh_text"} and not within("collectives")
  # Below the places there is no jax, so that a config's mesh is checked without it.
  assert not {m for name in ("mesh_text", "table") for m in imports(modules[name]) if m.split(".")[0] == "jax"}


def test_every_public_name_of_sharding_is_where_its_table_says():
  from llmarch import sharding

  for name in sharding.__all__:
    value = getattr(sharding, name)
    home = getattr(value, "__module__", None)  # constants have none
    assert home is None or not home.startswith("llmarch") or home == f"llmarch.sharding.{sharding._MODULE_OF[name]}"


def loaded_by(code: str) -> set[str]:
  code = f"{code}\nimport sys; print(*sys.modules)"
  run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  return {name.split(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize(
  "code",
  ["from llmarch.__main__ import main\nassert main(['--help']) == 0", "import llmarch", "import llmarch.experiment"],
)
def test_help_loads_no_heavy_library(code):
  heavy = {"jax", "jaxlib", "flax", "numpy", "optax", "orbax", "grain", "tokenizers", "datasets", "torch", "rich"}
  assert not loaded_by(code) & heavy


def test_the_forward_loads_no_torch():
  assert not loaded_by("import llmarch.models.decoder, llmarch.presets") & {"torch", "transformers", "orbax", "grain"}
