"""Who may import whom, held by reading the imports; and what a quick command may not load."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted((ROOT / "llmarch").rglob("*.py"))

# A part of llmarch, a folder or a file, may import itself and these parts. GROUND and CONFIG need the standard library
# alone.
GROUND = {"errors", "build", "branches", "residual", "files", "locks", "process"}
CONFIG = {"config", "run_config", "mesh_checks"}
BELOW_MODELS = GROUND | CONFIG | {"sharding", "ops", "layers", "models"}
EXCEPTIONS = {"llmarch.mesh_checks": "llmarch.sharding.mesh_text"}  # which is without jax
# The modules of sharding/, each of which may import those before it; meshes.py stands apart.
SHARDING = ("mesh_text", "table", "places", "active", "collectives", "moves")
ARROWS = {
  "errors": set(),
  "files": {"errors"},
  "locks": set(),
  "process": set(),
  "build": {"errors"},
  "branches": {"build", "errors"},
  "residual": {"build", "errors"},
  "config": {"branches", "residual", "build", "errors"},
  "mesh_checks": {"branches", "config", "build", "errors"},
  "run_config": {"mesh_checks", "config", "build", "errors"},
  "sharding": {"errors"},
  "ops": {"sharding", "errors", "build"},  # ops/sampling.py has a config
  "layers": {"ops", "config", "sharding", "branches", "residual", "build", "errors"},
  "models": {"layers", "ops", "config", "sharding", "build", "errors"},
  "presets": {"layers", "config", "branches", "residual", "build", "errors"},
  "adapt": BELOW_MODELS,
  "data": GROUND | CONFIG,
  "train": BELOW_MODELS | {"adapt", "data"},
  "infer": BELOW_MODELS | {"adapt", "data"},
  "convert": BELOW_MODELS | {"adapt", "presets"},
  "analysis": BELOW_MODELS | {"adapt", "presets", "train", "infer"},  # analysis/compile.py compiles their programs
}
ARROWS["run"] = BELOW_MODELS | {"adapt", "data", "train", "infer", "convert", "analysis", "__init__"}
ARROWS["lab"] = ARROWS["run"] | {"presets", "run"}
ARROWS["report"] = BELOW_MODELS | {"analysis", "lab", "train"}  # durations as train writes them
ARROWS["commands"] = ARROWS["lab"] | {"lab", "report", "__main__"}
ARROWS["__main__"] = {"errors", "process", "commands"}
ARROWS["__init__"] = {"data", "train", "infer", "convert"}
LIBRARIES = {part: set() for part in (*GROUND, *CONFIG, "presets", "__main__", "__init__")} | {
  "sharding": {"jax", "numpy"},
  "ops": {"jax", "numpy"},
  "layers": {"jax", "numpy", "flax"},
  "models": {"jax", "numpy", "flax", "chex"},
  "adapt": {"jax", "numpy", "flax"},
}  # outside the standard library


def room(module: str) -> str:
  """llmarch.layers.attention -> layers; llmarch -> __init__."""
  parts = module.split(".")
  return parts[1] if len(parts) > 1 else "__init__"


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
      found |= {f"{source}.{alias.name}" for alias in node.names}  # a module, or a name in one
      found |= {source} - {"llmarch", ""}
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
      excepted = module.startswith(EXCEPTIONS.get(name_of(path), "nothing"))
      assert excepted or room(module) in ARROWS[here] | {here}, f"{here} may not import {module}"
    elif here in LIBRARIES:
      assert top in LIBRARIES[here] or top in sys.stdlib_module_names, f"{here} may not import {module}"


def test_no_two_modules_import_each_other():
  """Nor in a longer circle, at the top or inside functions; llmarch/__init__.py, whose `load` is for users, apart."""
  modules = {name_of(path).removesuffix(".__init__"): imports(path) for path in MODULES}
  del modules["llmarch"]
  state = {}  # module: whether all that it imports has been followed

  def follow(module, above):
    assert state.get(module, True), f"a circle of imports: {' -> '.join([*above[above.index(module) :], module])}"
    if module not in state:
      state[module] = False
      for other in sorted((modules[module] & modules.keys()) - {module}):
        follow(other, [*above, module])
      state[module] = True

  for module in modules:
    follow(module, [])
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
  ["from llmarch.__main__ import main\nassert main(['--help']) == 0", "import llmarch", "import llmarch.run_config"],
)
def test_help_loads_no_heavy_library(code):
  heavy = {"jax", "jaxlib", "flax", "numpy", "optax", "orbax", "grain", "tokenizers", "datasets", "torch", "rich"}
  assert not loaded_by(code) & heavy


def test_the_forward_loads_no_torch():
  assert not loaded_by("import llmarch.models.decoder, llmarch.presets") & {"torch", "transformers", "orbax", "grain"}
