"""Eight fake CPU devices, quick compilation, three tiers of tests, and a count of the cases behind each equation."""

import collections
import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

# Before the first import of jax. Most of the suite's time is the compiler's, so it optimises nothing here. The newer
# emitters of fusions take three times as long to compile; jaxlib 0.11 and newer have no others.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
  ]
)

import pytest

# One folder of compiled programs for all workers and for processes that tests start: references are compiled once, not
# once a worker. The first process of a session makes it, the others find its name in their environment.
MADE_HERE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if MADE_HERE:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="llmarch-programs-")
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def pytest_unconfigure(config):
  if MADE_HERE:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def compile_anew():
  """Keeps the programs of a test out of the shared folder: the compiler says nothing of a program found there."""
  import jax

  before = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
  yield
  jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def pytest_addoption(parser):
  tiers = parser.getgroup(
    "tiers",
    "Plain `pytest` runs every equation over a covering choice of configs, in about twelve minutes on two cores. Tests"
    " and cases marked `full` come with --full, those marked `nightly` with --nightly. A test that is named by its id"
    " (tests/test_x.py::test_y) runs whatever its tier.",
  )
  tiers.addoption("--full", action="store_true", help="plain pytest and the cases marked `full`: what a change passes")
  tiers.addoption(
    "--rest",
    action="store_true",
    help="the cases marked `full` alone: `pytest && pytest --rest` runs each case of `pytest --full` once",
  )
  tiers.addoption("--nightly", action="store_true", help="everything, with long counts: hours, and gigabytes")
  tiers.addoption(
    "--composability",
    metavar="PATH",
    help="run the tests that check pairs of features, of whatever tier, and write the page of pairs from what the"
    " passed ones checked (--nightly writes docs/composability.md); what earlier runs over the same sources checked is"
    " kept beside it, so that a page can be made of several runs",
  )
  tiers.addoption("--cases", type=int, default=200, help="configs that hypothesis draws for --nightly (default: 200)")


def tier_of(item) -> str:
  return next((tier for tier in ("nightly", "full") if item.get_closest_marker(tier)), "plain")


def pytest_collection_modifyitems(config, items):
  """Leaves out the cases of other tiers, but for tests that the command line names by their ids; for the page of pairs,
  whatever checks none."""
  if config.getoption("--nightly"):
    return
  if config.getoption("--composability"):
    config.hook.pytest_deselected(items=[item for item in items if "checked" not in item.fixturenames])
    items[:] = [item for item in items if "checked" in item.fixturenames]
    return
  tiers = {"full"} if config.getoption("--rest") else {"plain", "full"} if config.getoption("--full") else {"plain"}
  ids = [arg.partition("::") for arg in config.args if "::" in arg]
  named = [f"/{pathlib.Path(path).name}::{name}" for path, _, name in ids]
  chosen = lambda item: tier_of(item) in tiers or any(name in f"/{item.nodeid}" for name in named)
  left_out = [item for item in items if not chosen(item)]
  if left_out:
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if chosen(item)]


MAPS = pathlib.Path("/proc/self/maps")  # of Linux
most_maps = 25_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
  """Drops compiled programs before there are too many: Linux gives a process 65,530 memory maps, each program takes
  some, and XLA's compiler dies of a segmentation fault where it gets none."""
  global most_maps
  count = lambda: MAPS.read_bytes().count(b"\n")
  if "jax" in sys.modules and MAPS.exists() and count() > most_maps:
    sys.modules["jax"].clear_caches()
    gc.collect()
    most_maps = count() + 20_000  # what somebody holds on to is not dropped


@pytest.fixture
def cases(request):
  """`cases(equation, n=1)` notes n checked cases; the summary adds them up, over xdist's workers too."""

  def count(equation: str, n: int = 1):
    request.node.user_properties.append((f"cases {equation}", n))

  return count


@pytest.fixture
def checked(request):
  """`checked("1 2", config, "remat=full")` notes that these equations hold for a config with these features, if the
  test passes; see composability.py."""

  def note(equations: str, config, *features: str):
    import composability

    request.node.user_properties.append(("checked", composability.record(equations, config, features)))

  return note


def page_of(config) -> pathlib.Path | None:
  """Where this run writes the page of pairs; None on xdist's workers and where nobody asked."""
  given = config.getoption("--composability")
  if hasattr(config, "workerinput") or not (given or config.getoption("--nightly")):
    return None
  return pathlib.Path(given) if given else config.rootpath / "docs/composability.md"


def pytest_configure(config):
  page = page_of(config)
  if page is None:
    return

  class Collector:
    """Keeps the records of passed tests as they come, and writes the page when the run ends."""

    def pytest_runtest_logreport(self, report):
      import composability

      records = [record for name, record in report.user_properties if name == "checked"]
      if report.when == "call" and report.passed and records:
        composability.keep(page, report.nodeid, records)

    def pytest_terminal_summary(self, terminalreporter):
      import composability

      terminalreporter.section("pairs of features")
      terminalreporter.write_line(composability.write(page))

  config.pluginmanager.register(Collector())


def pytest_terminal_summary(terminalreporter):
  for reason in sorted({report.longrepr[2] for report in terminalreporter.getreports("skipped")}):
    terminalreporter.write_line(reason.upper() if len(reason) < 100 else reason, yellow=True)
  counts = collections.Counter()
  for report in terminalreporter.getreports("passed"):
    for name, n in report.user_properties:
      if name.startswith("cases "):
        counts[name.removeprefix("cases ")] += n
  if counts:
    terminalreporter.section("cases checked")
    for name, n in sorted(counts.items()):
      terminalreporter.write_line(f"{n:7d}  {name}")
