"""No fault loses a step or changes a bit: kills, damage, full disks, stuck steps, bad numbers, spikes, wrong devices.

Every test prints its count (`cases`), so that a skipped one cannot pass for a passed one. Plain `pytest` has what needs
no other process, `--full` has every fault, and `--nightly` multiplies the counts. Seeds are fixed; REPRODUCE=n draws
others.
"""
# ruff: noqa: B023  what a turn of a loop defines is used in that turn

import collections
import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainee
from tiers import plain_if, three
from trainee import Data, experiment, no_file_above, run

from llmarch import files
from llmarch.build import to_dict
from llmarch.errors import UserError
from llmarch.run_config import Copy, DataConfig, SpikeConfig
from llmarch.sharding import make_mesh, parse_mesh
from llmarch.train import checkpoint, journal, loop, supervise, watch
from llmarch.train.checkpoint import Checkpoints, Damaged, fingerprints, flatten_state, load_step
from llmarch.train.faults import Fault, StorageFault
from llmarch.train.journal import Journal, batch_index
from llmarch.train.step import make_train_step

SEED = int(os.environ.get("REPRODUCE", 0))


@pytest.fixture
def times(request):
  """times(pr, nightly) -> the count of this session."""
  return lambda pr, nightly: nightly if request.config.getoption("--nightly") else pr


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
  monkeypatch.setattr(loop, "make_train_step", _made)


_steps = {}


def _made(config, mesh=None):
  """What the step is made of does not change with where and how often it is saved or logged."""
  same = dataclasses.replace(
    config,
    checkpoint=dataclasses.replace(config.checkpoint, every=1, max_to_keep=1),
    train=dataclasses.replace(config.train, on_nonfinite="stop", spike=None, replay_every=0, watchdog=None),
  )
  key = same, mesh
  if key not in _steps:
    _steps[key] = make_train_step(same, mesh)
  return _steps[key]


def rows(workdir):
  """The metrics, without what depends on the clock, floats to the last bit."""
  clock = ("tokens_per_second", "mfu", "seconds")
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def whole_rows(workdir):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  found = []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):  # the line that a kill cut off
      found.append({k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "mfu", "seconds")})
  return found


def fingerprints_of(workdir, step):
  """{leaf: fingerprint} of a checkpoint, from its record."""
  folder = pathlib.Path(workdir) / "checkpoints"
  record = checkpoint._open(folder, checkpoint._load(folder / str(step), {"meta": None}, "record")["meta"])
  return {name: entry[2] for name, entry in record["arrays"].items()}


def verified(config, workdir, step):
  flat, _ = load_step(
    pathlib.Path(workdir).absolute() / "checkpoints", step, flatten_state(_made(config).abstract_state)
  )
  return jax.device_get(flat)


def same_bits(a, b):
  return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def files_of(folder):
  return {p.relative_to(folder): p.read_bytes() for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()}


# ----------------------------------------------------------------------------------------- separate processes


class Server:
  """Forks trainees (tests/trainee.py)."""

  def __init__(self, cache):
    env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    env["PYTHONPATH"] = os.pathsep.join([str(pathlib.Path(__file__).parent.parent), env.get("PYTHONPATH", "")])
    env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    self.process = subprocess.Popen(
      [sys.executable, trainee.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )

  def _ask(self, **order):
    self.process.stdin.write(json.dumps(order) + "\n")
    self.process.stdin.flush()
    return json.loads(self.process.stdout.readline())

  def start(self, workdir, **order) -> int:
    return self._ask(run=str(workdir), **order)["pid"]

  def wait(self, pid) -> int:
    return self._ask(wait=pid)["code"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  made = Server(tmp_path_factory.mktemp("programs"))
  yield made
  made.process.stdin.close()
  made.process.wait()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
  """An uninterrupted run of a process of its own: its workdir, and how many seconds a run takes."""
  folder = tmp_path_factory.mktemp("whole")
  assert server.wait(server.start(folder / "first")) == 0  # compiles
  began = time.monotonic()
  assert server.wait(server.start(folder / "run")) == 0
  assert rows(folder / "first") == rows(folder / "run")
  return folder / "run", time.monotonic() - began


# ------------------------------------------------------------------------------------------------- R1, R2


@pytest.mark.nightly
def test_r1_the_same_run_again_gives_the_same_bits(tmp_path, server, whole, cases, times):
  for axes in ("", "data=2", "data=2,fsdp=2"):
    sizes = parse_mesh(axes)
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]) if axes else None
    config = dataclasses.replace(experiment(), mesh=axes)
    for i in range(times(2, 6)):
      workdir = tmp_path / f"{axes}-{i}"
      run(config, workdir, mesh=mesh)
      assert rows(workdir) == rows(tmp_path / f"{axes}-0")
      assert fingerprints_of(workdir, 20) == fingerprints_of(tmp_path / f"{axes}-0", 20)
      cases("R1 runs again")
  for cores in (1, 2):
    assert server.wait(server.start(tmp_path / f"on-{cores}", cores=cores)) == 0
    assert rows(tmp_path / f"on-{cores}") == rows(whole[0])
    assert fingerprints_of(tmp_path / f"on-{cores}", 20) == fingerprints_of(whole[0], 20)
    cases("R1 runs again")


@pytest.fixture(scope="module")
def every_step(tmp_path_factory):
  """A run that keeps all its steps: micro-batches, a moving average, evaluations, dropout, a schedule."""
  config = experiment(every=1, keep=1000, eval_every=3, ema=0.9, grad_accum=2)
  workdir = tmp_path_factory.mktemp("every_step") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_train_step", _made)
    run(config, workdir)
  return config, workdir


def stopped_after(workdir, step, target):
  """A copy of a run as it was after a step."""
  (target / "checkpoints").mkdir(parents=True)
  for name in ("config.json", "metrics.jsonl"):
    shutil.copy(workdir / name, target / name)
  shutil.copytree(workdir / "checkpoints" / str(step), target / "checkpoints" / str(step))
  for row in files.read_lines(workdir / "journal.jsonl"):
    if row["event"] != "saved" or row["step"] <= step:
      files.append_line(target / "journal.jsonl", row)
    if (row["event"], row["step"]) == ("saved", step):
      return


FEW = (1, 7, 18, 19)  # the first step, one in the middle, and the last two


STEPS = [
  pytest.param(step, marks=[] if step == 7 else pytest.mark.full if step in FEW else pytest.mark.nightly)
  for step in range(1, 20)
]


@pytest.mark.parametrize("step", STEPS)
def test_r2_a_run_resumed_after_any_step_ends_in_the_same_bits(every_step, tmp_path, cases, step):
  config, workdir = every_step
  stopped_after(workdir, step, tmp_path / "run")
  run(config, tmp_path / "run")
  assert rows(tmp_path / "run") == rows(workdir)
  assert fingerprints_of(tmp_path / "run", 20) == fingerprints_of(workdir, 20)
  cases("R2 resumed after a step")


ITEMS = ["params", "batch", "skips", "opt_state", "step", "ema"]  # the last three: test_training.py, too


@pytest.mark.parametrize("lost", plain_if(ITEMS[:3].count, ITEMS, "nightly"))
@pytest.mark.full
def test_r2_a_run_resumed_without_any_one_item_does_not(every_step, tmp_path, lost, monkeypatch, cases):
  """The negative control: the comparison above notices whatever is lost."""
  config, workdir = every_step
  stopped_after(workdir, 9, tmp_path / "run")
  restore = Checkpoints.restore

  def forgetful(self, abstract_state, step):
    state, record = restore(self, abstract_state, step)
    return state | ({lost: _made(config).init()[lost]} if lost in state else {}), record

  monkeypatch.setattr(Checkpoints, "restore", forgetful)
  if lost in ("batch", "skips"):
    monkeypatch.setattr(loop, "batch_index", lambda step, skips: step + 1 if lost == "batch" else step % 7)
  run(config, tmp_path / "run")
  assert fingerprints_of(tmp_path / "run", 20) != fingerprints_of(workdir, 20)
  cases("R2 items whose loss shows")


# ------------------------------------------------------------------------------------------------------ R3


@pytest.mark.full
def test_r3_kill_9_at_any_time_tears_nothing_and_changes_nothing(tmp_path, server, whole, cases, times):
  reference, seconds = whole
  by_step = {row["step"]: row for row in rows(reference)}
  rng, kills, runs, replayed = random.Random(SEED), 0, 0, []
  while kills < times(10, 300):
    workdir, last, known = tmp_path / f"run-{runs}", 0, 0
    runs += 1
    while True:
      pid = server.start(workdir)
      killer = threading.Timer(rng.uniform(0, 1.1 * seconds), os.kill, (pid, signal.SIGKILL))
      killer.start()
      code = server.wait(pid)
      killer.cancel()
      if code == 0:
        break
      assert code == -signal.SIGKILL
      kills += 1
      # No step has two values, whenever it was done.
      seen = whole_rows(workdir)
      assert all(row == by_step[row["step"]] for row in seen)
      events = files.read_lines(workdir / "journal.jsonl")
      at = [row["step"] for row in events if row["event"] == "start"]
      if len(at) > known:  # it got as far as its first step
        replayed.append(max(last - at[-1], 0))
        last, known = max((row["step"] for row in seen), default=0), len(at)
      # What is listed is whole, whether the journal knows it yet or not; what the journal names is there or pruned.
      folder = workdir / "checkpoints"
      for step in checkpoint.steps_of(folder):
        assert fingerprints_of(workdir, step) == {
          name: int(print_[0]) for name, print_ in fingerprints(_load(folder, step)).items()
        }
      shutil.rmtree(f"{workdir}.log", ignore_errors=True)
    assert rows(workdir) == rows(reference)
    assert fingerprints_of(workdir, 20) == fingerprints_of(reference, 20)
    assert not (workdir / "quarantine").exists()
    assert not [p for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]
    shutil.rmtree(workdir)
  # One save is on its way while the next interval runs.
  assert max(replayed, default=0) <= 2 * 2
  cases("R3 kill -9", kills)
  cases("R3 steps done again after them", sum(replayed))


def _load(folder, step):
  return load_step(folder.absolute(), step, flatten_state(_made(experiment()).abstract_state))[0]


# ------------------------------------------------------------------------------------------------------ R5


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """A run with the checkpoints of two steps, and what they hold."""
  config, workdir = experiment(keep=2), tmp_path_factory.mktemp("two_steps") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_train_step", _made)
    run(config, workdir)
  return config, workdir, {step: verified(config, workdir, step) for step in (18, 20)}


def damage(rng, newest, older) -> str:
  """Does one thing to the files of a checkpoint."""
  files = sorted(p for p in newest.rglob("*") if p.is_file())
  path = rng.choice(files)
  data = bytearray(path.read_bytes())
  kind = rng.choice(
    ["flip", "flip", "flips", "truncate", "empty", "zero", "delete", "swap", "swap all", "{}", "folder"]
  )
  if kind.startswith("flip"):
    for _ in range(1 if kind == "flip" else rng.randrange(2, 9)):
      if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
  elif kind == "truncate":
    path.write_bytes(data[: rng.randrange(len(data) + 1)])
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "zero":
    at = rng.randrange(len(data) + 1)
    path.write_bytes(data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :])
  elif kind == "delete":
    path.unlink()
  elif kind == "swap":  # the file of this name, or of this size, of the older step
    other = older / path.relative_to(newest)
    twins = [p for p in older.rglob("*") if p.is_file() and p.parent.name == path.parent.name] or [path]
    path.write_bytes((other if other.exists() else rng.choice(twins)).read_bytes())
  elif kind == "swap all":
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
  elif kind == "{}":
    path.write_bytes(b"{}")
  elif kind == "folder":
    shutil.rmtree(rng.choice([p for p in newest.rglob("*") if p.is_dir()]), ignore_errors=True)
  return f"{kind} {path.name}"


def test_r5_a_damaged_checkpoint_is_never_restored_wrongly(two_steps, tmp_path, cases, times):
  config, workdir, sound = two_steps
  shutil.copytree(workdir, tmp_path / "run")
  newest, older = (tmp_path / "run" / "checkpoints" / str(step) for step in (20, 18))
  abstract_state, seen = _made(config).abstract_state, collections.Counter()
  for case in range(times(60, 5000)):
    what = damage(random.Random(f"{SEED} {case}"), newest, older)
    said = []
    with Checkpoints(str(tmp_path / "run"), config.checkpoint) as saved:
      step, state, _ = saved.latest_good(abstract_state, say=said.append)
    assert same_bits(jax.device_get(flatten_state(state)), sound[step]), (case, what)
    seen[step] += 1
    if step == 18:  # the sentence names the step, what is wrong with it, and what was done
      assert len(said) == 1 and said[0].startswith("step 20: ") and "moved to" in said[0], (case, what, said)
      assert any(word in said[0] for word in ("cannot be read", "was not read", "checksum", "record")), said
    shutil.rmtree(tmp_path / "run" / "quarantine", ignore_errors=True)
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(workdir / "checkpoints" / "20", newest)
    shutil.copy(workdir / "journal.jsonl", tmp_path / "run" / "journal.jsonl")
  assert seen[18] and seen[20]
  cases("R5 damaged checkpoints, refused and the one before restored", seen[18])
  cases("R5 damaged checkpoints, damage in what is not read", seen[20])


def test_r5_a_placeholder_in_the_place_of_an_array_is_damage(two_steps, tmp_path, monkeypatch, cases):
  """orbax gives one, without a word, where damage to its metadata says so (a case of the nightly run)."""
  config, workdir, sound = two_steps
  shutil.copytree(workdir, tmp_path / "run")
  real, said = checkpoint._load, []

  def load(path, items, what):
    loaded = real(path, items, what)
    if (path.name, what) == ("20", "its arrays"):
      name = sorted(items["state"])[3]
      loaded = {"state": dict(loaded["state"]) | {name: items["state"][name]}}
    return loaded

  monkeypatch.setattr(checkpoint, "_load", load)
  with Checkpoints(str(tmp_path / "run"), config.checkpoint) as saved:
    step, state, _ = saved.latest_good(_made(config).abstract_state, say=said.append)
  assert step == 18 and same_bits(jax.device_get(flatten_state(state)), sound[18]) and "was not read" in said[0]
  cases("R5 damaged checkpoints, refused and the one before restored")


@pytest.mark.full
def test_r5_without_fingerprints_damage_would_be_restored(two_steps, tmp_path, monkeypatch, cases):
  """The negative control: orbax gives changed bits back as numbers."""
  config, workdir, sound = two_steps
  shutil.copytree(workdir, tmp_path / "run")
  believe = lambda arrays: {name: np.array([sound_prints[name], 1]) for name in arrays}
  sound_prints = fingerprints_of(workdir, 20)
  monkeypatch.setattr(checkpoint, "fingerprints", believe)
  wrong = 0
  largest = max((tmp_path / "run" / "checkpoints" / "20").rglob("d/*"), key=lambda p: p.stat().st_size)
  data = largest.read_bytes()
  for case in range(40):
    changed = bytearray(data)
    changed[random.Random(f"{SEED} {case}").randrange(len(data))] ^= 4
    largest.write_bytes(changed)
    with contextlib.suppress(Damaged):
      wrong += not same_bits(verified(config, tmp_path / "run", 20), sound[20])
  assert wrong
  cases("R5 wrong restores that only the fingerprint prevents, of 40 flips", wrong)


@pytest.mark.full
def test_r5_where_all_checkpoints_are_damaged_the_run_ends_and_nothing_is_moved(two_steps, tmp_path, cases):
  config, workdir, _ = two_steps
  for case in range(6):
    target = tmp_path / str(case)
    shutil.copytree(workdir, target)
    for folder in (target / "checkpoints").iterdir():
      path = folder / ("meta/_strings.json", "state/manifest.ocdbt", "meta/manifest.ocdbt")[case % 3]
      path.write_bytes(b"" if case % 2 else b"\xff" * 9)
    before = files_of(target / "checkpoints")
    with pytest.raises(Fault, match=r"step 20: .*; step 18: .*all are left as they are") as e:
      run(config, target)
    assert e.value.exit_code == 70 and files_of(target / "checkpoints") == before
    cases("R5 runs whose checkpoints are all damaged")


def test_r5_a_fingerprint_changes_with_every_change_and_with_no_mesh(cases, times):
  rng = np.random.default_rng(SEED)
  for case in range(times(300, 3000)):
    dtype = [np.float32, np.int32, jnp.bfloat16, np.uint8][case % 4]
    x = rng.integers(-9, 9, (5, 8, 3)).astype(dtype)
    y = x.copy()
    bits = y.reshape(-1).view(np.uint8)
    match case % 5:
      case 0:
        bits[rng.integers(bits.size)] ^= 1 << rng.integers(8)
      case 1:  # the same bit of two elements: sums with odd weights alone would not notice
        at = rng.choice(bits.size // x.itemsize, 2, replace=False) * x.itemsize + x.itemsize - 1
        bits[at] ^= 128
      case 2:
        y[[0, 1]] = y[[1, 0]]
      case 3:
        y = np.ascontiguousarray(y.transpose(0, 2, 1)).reshape(x.shape)
      case 4:
        y = np.where(y == 0, -y, y) if dtype == np.float32 else y + np.ones((), dtype)
        y = np.copysign(y, -1) if np.array_equal(x.view(np.uint8), y.view(np.uint8)) else y
    a, b = (int(fingerprints({"x": v})["x"][0]) for v in (x, y))
    assert (a == b) == (x.tobytes() == y.tobytes()), case
    cases("R5 fingerprints of changed arrays")
  x = rng.standard_normal((8, 4, 6)).astype(np.float32)
  for shape in ({}, {"data": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}):
    spec = jax.sharding.PartitionSpec(*shape) if shape else None
    placed = jax.device_put(x, jax.sharding.NamedSharding(make_mesh(shape), spec)) if shape else x
    assert int(fingerprints({"x": placed})["x"][0]) == int(fingerprints({"x": x})["x"][0])
    cases("R5 meshes with one fingerprint")


def test_checkpoints_of_format_2_and_of_other_arrays_are_refused_in_a_sentence_and_left(two_steps, tmp_path):
  config, workdir, _ = two_steps
  shutil.copytree(workdir, tmp_path / "run")
  for value, sentence in (({"format": 2, "step": 20, "checksums": "{}"}, "format 2, not 3"),):
    from orbax.checkpoint import v1 as ocp

    for step in (18, 20):
      shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
      ocp.save_checkpointables(
        tmp_path / "run" / "checkpoints" / str(step), {"state": {"x": np.zeros(3)}, "meta": value}
      )
    before = files_of(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=sentence):
      run(config, tmp_path / "run")
    assert files_of(tmp_path / "run" / "checkpoints") == before
  want = flatten_state(_made(config).abstract_state)
  name = next(iter(want))
  for other in (
    want | {name: jax.ShapeDtypeStruct(want[name].shape, jnp.bfloat16)},  # orbax would cast it
    want | {name: jax.ShapeDtypeStruct((*want[name].shape, 1), want[name].dtype)},
    {k: v for k, v in want.items() if k != name},
    want | {"new": want[name]},
  ):
    with pytest.raises(UserError, match="holds other arrays"):
      load_step(workdir.absolute() / "checkpoints", 20, other)


# -------------------------------------------------------------------------------------------------- R6, R7


@pytest.mark.full
def test_r6_a_full_disk_leaves_the_last_good_step_and_says_so_within_a_step(tmp_path, cases, times):
  config = experiment(every=1, keep=3)
  state, abstract_state = _made(config).init(), _made(config).abstract_state
  sound = jax.device_get(flatten_state(state))
  failed = 0
  largest = 0
  with Checkpoints(str(tmp_path / "run"), config.checkpoint) as saved:
    saved.save(1, state, {}, None)
    saved.wait()
    largest = max(p.stat().st_size for p in saved.folder.rglob("*") if p.is_file())
    sizes = np.linspace(0, 1.1 * largest, times(30, 300)).astype(int)
    for step, size in enumerate(sizes, 2):
      try:
        with no_file_above(int(size) + saved.journal.path.stat().st_size * (step % 3 > 0)):
          saved.save(step, state, {}, None)
          saved.wait()
      except StorageFault as e:
        failed += 1
        assert f"cannot save step {step} in {saved.folder}" in str(e) and "is kept" in str(e) and "bytes" in str(e)
      at, restored, _ = saved.latest_good(abstract_state)
      assert same_bits(jax.device_get(flatten_state(restored)), sound) and at in (step, max(saved.journal.saved()))
      cases("R6 sizes of a full disk")
    saved.save(1000, state, {}, None)
    saved.wait()
    assert [p.name for p in sorted(saved.folder.iterdir())][:1] == ["1000"] and len(list(saved.folder.iterdir())) == 3
  assert not (tmp_path / "run" / "quarantine").exists() or os.listdir(tmp_path / "run" / "quarantine") == []
  assert 0 < failed < len(sizes)
  cases("R6 saves that failed and said so", failed)


def test_r6_a_folder_that_is_gone_or_no_folder_is_a_sentence(tmp_path, cases):
  config = experiment(every=1, keep=3)
  for break_it in (
    lambda folder: folder.rename(folder.parent / "elsewhere"),
    lambda folder: (folder.rename(folder.parent / "elsewhere"), folder.write_text("no folder")),
  ):

    class Breaks(Data):
      def iterate(self, index):
        for i, batch in enumerate(super().iterate(index), index):
          if i == 3:
            for thread in [t for t in threading.enumerate() if t.name.startswith("save-")]:
              thread.join()
            break_it(workdir / "checkpoints")
          yield batch

    workdir = tmp_path / str(break_it.__code__.co_firstlineno)
    with pytest.raises(StorageFault, match="cannot save step [34567] in"):
      run(config, workdir, Breaks())
    cases("R6 folders that are gone")
  blocked = tmp_path / "file"
  blocked.write_text("")
  with pytest.raises(UserError, match="cannot write"):
    run(config, blocked / "run")
  cases("R6 folders that are gone")


@pytest.mark.parametrize("where", ["writer", "disk", "journal"])
@pytest.mark.full
def test_r7_a_failed_background_save_ends_the_run_within_one_step_of_it(tmp_path, where, monkeypatch, cases, times):
  for case in range(times(2, 17)):
    workdir, at = tmp_path / str(case), 2 * (case % 4) + 4
    data = Data()
    with monkeypatch.context() as patch:
      done = []

      def breaks(real, *, is_it=lambda *_: True):
        def call(*args, **kw):
          if is_it(*args, **kw):
            done.append(len(data.read))
            raise OSError(28, "No space left on device")
          return real(*args, **kw)

        return call

      match where:
        case "writer":
          real = checkpoint.ocp.save_checkpointables_async

          def save(path, *args, **kw):
            response = real(path, *args, **kw)
            if path.name != str(at):
              return response
            response.result()
            shutil.rmtree(path)
            return types.SimpleNamespace(result=breaks(None))

          patch.setattr(checkpoint.ocp, "save_checkpointables_async", save)
        case "disk":
          patch.setattr(checkpoint, "sync_tree", breaks(checkpoint.sync_tree, is_it=lambda p: p.name == str(at)))
        case "journal":
          is_it = lambda self, event, **row: event == "saved" and row["step"] == at
          patch.setattr(Journal, "add", breaks(Journal.add, is_it=is_it))
      with pytest.raises(StorageFault, match=f"cannot save step {at} in .*checkpoints .*step {at - 2} is kept"):
        run(experiment(keep=5), workdir, data)
      assert len(done) == 1 and len(data.read) <= max(done[0], at) + 2  # one in flight, one read ahead
    assert at not in Journal(workdir).saved()
    with Checkpoints(str(workdir), experiment().checkpoint) as saved:
      step, _, _ = saved.latest_good(_made(experiment()).abstract_state)
    assert step == (at - 2 if where == "writer" else at)  # a step that is whole on the disk may be adopted
    cases("R7 failed background saves")


def test_r7_a_slow_save_is_waited_for_and_a_second_save_of_a_step_is_an_error(tmp_path, monkeypatch, cases):
  config = experiment(every=1)
  real = checkpoint.sync_tree
  monkeypatch.setattr(checkpoint, "sync_tree", lambda path: (time.sleep(0.3), real(path)))
  state = _made(config).init()
  with Checkpoints(str(tmp_path), config.checkpoint) as saved:
    saved.save(1, state, {}, None)
    assert not saved.journal.saved()  # a step that is not on the disk is not named
    saved.save(2, state, {}, None)
    assert list(saved.journal.saved()) == [1]
    saved.wait()
    with pytest.raises(StorageFault, match="cannot save step 2"):
      saved.save(2, state, {}, None)
    assert saved.latest_good(_made(config).abstract_state)[0] == 2
  cases("R7 failed background saves", 2)


# -------------------------------------------------------------------------------------------------- R8, R9


@pytest.mark.full
def test_r8_sigterm_saves_the_step_it_comes_in_and_loses_none(tmp_path, server, whole, cases, times):
  reference, _ = whole
  rng = random.Random(SEED)
  for case in range(times(4, 40)):
    workdir = tmp_path / str(case)
    pid = server.start(workdir, fault={"what": "", "at": -1, "pace": 0.05}, config={"every": 1000})
    _until(lambda: any(row["event"] == "stepping" for row in files.read_lines(workdir / "journal.jsonl")))
    time.sleep(rng.uniform(0, 0.5))
    asked = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    code = server.wait(pid)
    assert time.monotonic() - asked < 10
    steps = checkpoint.steps_of(workdir / "checkpoints")
    assert code == 143 and steps == [max(row["step"] for row in whole_rows(workdir))]  # the last it has done
    cases("R8 SIGTERM")
    assert server.wait(server.start(workdir, config={"every": 1000})) == 0
    assert rows(workdir) == rows(reference)
    assert fingerprints_of(workdir, 20) == fingerprints_of(reference, 20)


@pytest.mark.full
def test_r8_a_second_sigterm_or_the_end_of_the_grace_ends_it_at_once(tmp_path, server, cases):
  workdir = tmp_path / "run"
  pid = server.start(workdir, fault={"what": "stuck", "at": 5})
  _until(lambda: len(whole_rows(workdir)) >= 4)
  os.kill(pid, signal.SIGTERM)
  time.sleep(0.3)
  os.kill(pid, signal.SIGTERM)
  assert server.wait(pid) == 143
  cases("R8 SIGTERM")
  code = (
    "import time, llmarch.train.watch as w\n"
    "w.GRACE = 0.2\n"
    "with w.Preemption():\n  print(1, flush=True)\n  time.sleep(60)\n  time.sleep(60)"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parent.parent
  ) as p:
    p.stdout.readline()
    p.send_signal(signal.SIGTERM)
    assert p.wait(20) == 143
  cases("R8 SIGTERM")


def _until(true, seconds=60):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, "it never came"
    time.sleep(0.02)


@pytest.mark.parametrize("what, code", [("stuck", 75), ("gil", -watch.STACKS)])
@pytest.mark.full
def test_r9_a_stuck_process_ends_with_its_stacks_in_the_workdir(tmp_path, server, what, code, cases, times):
  for case in range(times(2, 10)):
    workdir, limit = tmp_path / str(case), 2.0
    pid = server.start(workdir, fault={"what": what, "at": 6}, config={"watchdog": limit})
    _until(lambda: len(whole_rows(workdir)) >= 4)
    began = time.monotonic()
    assert server.wait(pid) == code
    assert time.monotonic() - began < limit + 5
    (stacks,) = workdir.glob("stacks-*.txt")
    assert "trainee.py" in stacks.read_text() and "in fault" in stacks.read_text()
    if code == 75:
      assert any(row["event"] == "stuck" and row["step"] == 6 for row in files.read_lines(workdir / "journal.jsonl"))
    assert server.wait(server.start(workdir)) == 0  # and goes on
    assert [row["step"] for row in rows(workdir)] == list(range(1, 21))
    cases("R9 stuck processes")


@pytest.mark.full
def test_r9_an_error_in_the_loader_ends_the_run_and_names_it(tmp_path, server, cases):
  assert server.wait(server.start(tmp_path / "run", fault={"what": "error", "at": 6})) == 1
  assert "the loader broke" in (tmp_path / "run.log").read_text()
  assert checkpoint.steps_of(tmp_path / "run" / "checkpoints") == [4, 6]
  cases("R9 stuck processes")


def test_stacks_that_orbax_logs_are_not_printed_and_those_of_others_are():
  error = (ValueError, ValueError("no room"), None)
  for path, printed in (("/lib/orbax/checkpoint/futures.py", False), ("/home/own.py", True)):
    record = logging.LogRecord("absl", logging.ERROR, path, 1, "it failed", (), error)
    assert bool(logging.getLogger("absl").filter(record)) == printed


def test_the_guard_is_told_at_once_when_the_time_that_work_may_take_changes(tmp_path):
  dog = watch.Watchdog(str(tmp_path), 7.0)
  dog._guard = types.SimpleNamespace(stdin=io.BytesIO())
  for what in ("step", "step", "step", "evaluation"):  # the first of a kind may take long
    dog.begin(what)
  assert [float(line) for line in dog._guard.stdin.getvalue().split()] == [7 + watch.LATER, watch.SLOW + watch.LATER]


def test_the_limit_of_a_step_follows_the_median_and_the_first_of_a_kind_may_compile(tmp_path):
  dog = watch.Watchdog(str(tmp_path), None)
  assert dog.limit == watch.SLOW
  dog._times.extend([0.1, 0.1, 50.0])
  assert dog.limit == watch.FLOOR
  dog._times.extend([10.0] * 9)
  assert dog.limit == 200
  with watch.Watchdog(str(tmp_path), 7.0) as dog:
    dog.begin("step")
    assert dog._allowed == watch.SLOW
    dog.begin("step")
    assert dog._allowed == 7.0
    dog.begin("save", slow=True)
    assert dog._allowed == watch.SLOW


# -------------------------------------------------------------------------------------------- R16, R17, R18


def poisoned(config, place, at, value):
  """The functions of a config whose step finds a bad number in its batch, parameters, moments or average."""
  real = _made(config)

  def step(state, batch, *, telemetry=False):
    if int(state["step"]) in at:
      if place == "batch":
        batch = batch | {"loss_weights": batch["loss_weights"].at[1, 2].set(value)}
      else:
        flat, _ = jax.tree_util.tree_flatten_with_path(state)
        names = list(flatten_state(state))
        (index,) = [i for i, name in enumerate(names) if name.startswith(place) and name.endswith("embed")]
        leaf = flat[index][1]
        leaves = [x for _, x in flat]
        leaves[index] = leaf.at[(1,) * leaf.ndim].set(value)
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return real.step(state, batch, telemetry=telemetry)

  return dataclasses.replace(real, step=step)


MU, NU = "opt_state/1/mu", "opt_state/1/nu"


BAD_NUMBERS = [(place, how) for place in ("batch", "params", MU, NU, "ema") for how in ("stop", "skip")]


@pytest.mark.parametrize(
  "place, on_nonfinite", three([("params", "stop")].count, BAD_NUMBERS[3::2].count, BAD_NUMBERS)
)
def test_r16_a_bad_number_is_noticed_in_its_step_and_never_saved(
  tmp_path, place, on_nonfinite, monkeypatch, cases, times
):
  config = experiment(every=1, keep=50, ema=0.9, on_nonfinite=on_nonfinite, steps=12)
  rng = random.Random(f"{SEED} {place} {on_nonfinite}")
  for case in range(times(2, 40)):
    at, value, workdir = rng.randrange(1, 10), rng.choice([np.nan, np.inf, -np.inf]), tmp_path / str(case)
    monkeypatch.setattr(loop, "make_train_step", lambda *_: poisoned(config, place, {at}, value))
    if place == "batch" and on_nonfinite == "skip":
      run(config, workdir)
      skipped = [row["step"] for row in Journal(workdir).events if row["event"] == "skipped"]
      assert skipped == [at + 1]
      before, after = verified(config, workdir, at), verified(config, workdir, at + 1)
      floats = [name for name in before if before[name].dtype.kind == "f"]
      assert all(before[name].tobytes() == after[name].tobytes() for name in floats)
      assert after["step"] == at + 1
    else:
      match = r"is (nan|inf|-inf) at step|is not finite at step"
      with pytest.raises(Fault, match=f"({match}) {at + 1} .*the checkpoint of step {at} is kept") as e:
        run(config, workdir)
      assert e.value.exit_code == 70
      assert checkpoint.steps_of(workdir / "checkpoints") == list(range(1, at + 1))
    for step in checkpoint.steps_of(workdir / "checkpoints"):  # `verified` refuses what is not finite
      assert all(np.isfinite(x).all() for x in verified(config, workdir, step).values() if x.dtype.kind == "f")
    cases(f"R16 bad numbers, {on_nonfinite}")


@pytest.mark.full
def test_r16_three_in_a_row_end_the_run_and_two_do_not(tmp_path, monkeypatch, cases):
  config = experiment(every=1, keep=50, on_nonfinite="skip", steps=12)
  for at, ends in (({3, 4}, False), ({3, 4, 6, 7}, False), ({3, 4, 5}, True)):
    workdir = tmp_path / "".join(map(str, sorted(at)))
    monkeypatch.setattr(loop, "make_train_step", lambda *_, at=at: poisoned(config, "batch", at, np.nan))
    if ends:
      with pytest.raises(Fault, match="at step 6 .*as at the 2 before"):
        run(config, workdir)
      with pytest.raises(Fault, match="at step 6 .*as at the 2 before"):  # nor does starting again get past it
        run(config, workdir)
    else:
      run(config, workdir)
    cases("R16 bad numbers in a row")


@pytest.mark.full
def test_r16_a_gradient_that_is_not_finite_under_a_finite_loss_is_left_out(tmp_path, monkeypatch, cases):
  from llmarch.train import step as step_module

  @jax.custom_vjp
  def spoil(x, bad):
    return x

  spoil.defvjp(lambda x, bad: (x, bad), lambda bad, g: (jnp.where(bad, jnp.nan, g), None))
  real = step_module.chunked_loss
  broken = lambda unembed, hidden, targets, *rest, **kw: real(
    unembed, spoil(hidden, targets[0, 0] == targets[0, 0] * 0 + 5), targets, *rest, **kw
  )
  monkeypatch.setattr(step_module, "chunked_loss", broken)
  functions = make_train_step(experiment())
  for first, finite in ((4, False), (7, True)):
    batch = Data().batch(0)
    targets = batch["targets"].copy()
    targets[0, 0] = first + 1
    before = functions.init()
    old = jax.device_get(before["params"])
    state, metrics = functions.step(before, batch | {"targets": targets})
    assert np.isfinite(metrics["loss"]) and bool(metrics["finite"]["update"]) == finite == bool(
      np.isfinite(metrics["grad_norm"])
    )
    assert bool(metrics["finite"]["state"])
    assert finite != all(np.array_equal(old[name], state["params"][name]) for name in old)
    cases("R16 bad gradients")


SPIKE = SpikeConfig(window=6, sigma=6.0, back=2, skip=5)


def spiking(**more):
  return experiment(steps=40, every=4, keep=50, learning_rate=2e-2, spike=SPIKE, **more)


class Skipped(Data):
  """The data without the batches that a run has skipped."""

  def __init__(self, skips):
    super().__init__()
    self.skips = skips

  def iterate(self, index):
    while True:
      yield self.batch(batch_index(index, self.skips))
      index += 1


@pytest.fixture(scope="module")
def spike_case(tmp_path_factory):
  """A run with noise from batch 25 to 27: its workdir and its data."""
  workdir, data = tmp_path_factory.mktemp("spike") / "run", Data(bad=(25, 26, 27))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_train_step", _made)
    run(spiking(), workdir, data)
  return workdir, data


@pytest.mark.full
def test_r17_a_spike_takes_the_run_back_and_past_its_batches(spike_case, tmp_path, cases):
  workdir, data = spike_case
  (event,) = [row for row in Journal(workdir).events if row["event"] == "rollback"]
  assert event["step"] == 26 and event["to"] == 24 and event["skip"] == [24, 5]
  # Read on to 26, went back to 24, left out 24 to 28.
  back = data.read.index(29)
  assert data.read[back - 1] in (25, 26, 27) and data.read[back:][:3] == [29, 30, 31]
  assert [row["step"] for row in rows(workdir)] == list(range(1, 41))
  # The same as a run that never saw them.
  run(experiment(steps=40, every=4, keep=50, learning_rate=2e-2), tmp_path / "clean", Skipped([(24, 5)]))
  assert rows(tmp_path / "clean") == rows(workdir)
  assert fingerprints_of(tmp_path / "clean", 40) == fingerprints_of(workdir, 40)
  cases("R17 rollbacks")


@pytest.fixture(scope="module")
def spike_far_back(tmp_path_factory):
  """A run with a checkpoint of every step, which goes back four: three checkpoints are taken back."""
  config = spiking()
  config = dataclasses.replace(
    config,
    checkpoint=dataclasses.replace(config.checkpoint, every=1),
    train=dataclasses.replace(config.train, spike=dataclasses.replace(SPIKE, back=4)),
  )
  workdir = tmp_path_factory.mktemp("spike") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_train_step", _made)
    run(config, workdir, Data(bad=(25, 26)))
  return config, workdir


class Killed(BaseException):
  pass


KILLS = ["decided", "moved", "never", "half moved", "later"]


@pytest.mark.parametrize("at", plain_if(KILLS[:2].count, KILLS, "nightly"))
@pytest.mark.full
def test_r17_a_rollback_survives_a_kill_at_any_moment(spike_far_back, tmp_path, at, monkeypatch, cases):
  """Killed right after the decision, between the moves, after them, and some steps after."""
  config, reference = spike_far_back
  quarantine, start_from, judge, moves, starts = Checkpoints.quarantine, loop._Run.start_from, loop._Run.judge, [], []

  def moving(self, step, why):
    if at == "decided" or (at == "half moved" and moves):
      raise Killed
    moves.append(step)
    return quarantine(self, step, why)

  def starting(self, found):
    starts.append(found)
    if at == "moved" and len(starts) == 2:
      raise Killed
    start_from(self, found)

  def judging(self):
    if at == "later" and self.skips and self.step == 28:
      raise Killed
    judge(self)

  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "quarantine", moving)
    patch.setattr(loop._Run, "start_from", starting)
    patch.setattr(loop._Run, "judge", judging)
    with contextlib.nullcontext() if at == "never" else pytest.raises(Killed):
      run(config, workdir, Data(bad=(25, 26)))
  run(config, workdir, Data(bad=(25, 26)))
  assert rows(workdir) == rows(reference) and fingerprints_of(workdir, 40) == fingerprints_of(reference, 40)
  (event,) = [row for row in Journal(workdir).events if row["event"] == "rollback"]
  assert (event["step"], event["to"], event["skip"]) == (26, 22, [22, 5])
  assert sorted(path.name for path in (workdir / "quarantine").iterdir()) == ["23-1", "24-1", "25-1"]
  cases("R17 rollbacks")


@pytest.mark.full
def test_r17_a_spike_that_three_rollbacks_do_not_get_past_ends_the_run(tmp_path, cases):
  with pytest.raises(Fault, match="a spike, as at 3 tries before"):
    run(spiking(), tmp_path / "run", Data(bad=range(25, 200)))
  assert [row["step"] for row in Journal(tmp_path / "run").events if row["event"] == "rollback"] == [26, 25, 21]
  cases("R17 rollbacks")


@pytest.mark.full
def test_r17_a_spike_before_any_checkpoint_starts_the_run_anew(tmp_path, cases):
  config = dataclasses.replace(spiking(), checkpoint=dataclasses.replace(spiking().checkpoint, every=40))
  run(config, tmp_path / "run", Data(bad=(25,)))
  (event,) = [row for row in Journal(tmp_path / "run").events if row["event"] == "rollback"]
  assert event["to"] == 0 and event["skip"] == [0, 26]
  run(experiment(steps=40, every=40, keep=50, learning_rate=2e-2), tmp_path / "clean", Skipped([(0, 26)]))
  assert fingerprints_of(tmp_path / "clean", 40) == fingerprints_of(tmp_path / "run", 40)
  cases("R17 rollbacks")


def flipped(x, rng):
  """x with one bit changed."""
  data = np.array(x)
  bits = data.reshape(-1).view(np.uint8)
  bits[rng.integers(bits.size)] ^= 1 << rng.integers(8)
  return jax.device_put(data, x.sharding)


@pytest.mark.full
def test_r18_a_flipped_bit_in_a_step_is_found_by_doing_it_again(tmp_path, monkeypatch, cases, times):
  config = experiment(replay_every=2, steps=6)
  real = _made(config)
  rng = np.random.default_rng(SEED)
  for case in range(times(12, 200)):
    calls, on = [], 1 + 3 * int(rng.integers(2)) + int(rng.integers(2))  # either of the two times, of step 2 or 4

    def step(state, batch, *, telemetry=False, calls=calls, on=on):
      calls.append(0)
      state, metrics = real.step(state, batch, telemetry=telemetry)
      if len(calls) - 1 == on:
        leaves, tree = jax.tree.flatten(state)
        index = rng.integers(len(leaves))
        leaves[index] = flipped(leaves[index], rng)
        state = jax.tree.unflatten(tree, leaves)
      return state, metrics

    monkeypatch.setattr(loop, "make_train_step", lambda *_: dataclasses.replace(real, step=step))
    with pytest.raises(Fault, match=r"step [24], done twice, gave other bits in|is not finite after step [24]"):
      run(config, tmp_path / str(case))
    cases("R18 flipped bits found")


@pytest.mark.full
def test_r18_sound_steps_raise_no_alarm(tmp_path, cases, times):
  steps = times(30, 500)
  run(experiment(replay_every=1, steps=steps, every=0), tmp_path / "run")
  run(experiment(replay_every=0, steps=steps, every=0), tmp_path / "plain")
  assert rows(tmp_path / "run") == rows(tmp_path / "plain")
  cases("R18 sound steps done twice", steps)


def test_r18_copies_that_differ_between_devices_are_found(cases, times):
  mesh = make_mesh({"data": 4, "tensor": 2})
  sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
  x = np.random.default_rng(SEED).standard_normal((3, 4)).astype(np.float32)
  rng = np.random.default_rng(SEED)
  assert loop.diverging({"x": jax.device_put(x, sharded)}) == []
  for _ in range(times(16, 100)):
    parts = [shard.data for shard in jax.device_put(x, sharded).addressable_shards]
    at = rng.integers(len(parts))
    parts[at] = flipped(parts[at], rng)
    bad = jax.make_array_from_single_device_arrays(x.shape, sharded, parts)
    assert loop.diverging({"good": jax.device_put(x, sharded), "x": bad}) == ["x"]
    cases("R18 copies that differ")


# ----------------------------------------------------------------------------------------------------- R19


@pytest.mark.full
def test_r19_a_second_process_is_refused_with_the_first_ones_number_and_a_dead_ones_lock_is_taken(
  tmp_path, server, cases, times
):
  for case in range(times(2, 8)):
    workdir = tmp_path / str(case)
    first = server.start(workdir, fault={"what": "stuck", "at": 5})
    _until(lambda: len(whole_rows(workdir)) >= 4)
    assert server.wait(server.start(workdir)) == 2
    said = pathlib.Path(f"{workdir}.log").read_text().splitlines()[-1]
    assert f"another process is training in {workdir} (pid {first} on " in said
    os.kill(first, signal.SIGKILL)
    assert server.wait(first) == -9
    assert f"pid {first}" in (workdir / "lock").read_text()
    assert server.wait(server.start(workdir)) == 0
    assert [row["step"] for row in rows(workdir)] == list(range(1, 21))
    cases("R19 second and next processes", 2)


@pytest.mark.full
def test_r19_a_clock_that_jumps_changes_nothing_but_the_account(tmp_path, monkeypatch, cases):
  real = time.time
  for jump in (-1e6, 1e6):
    run(experiment(steps=6), tmp_path / str(jump))
    monkeypatch.setattr(journal.time, "time", lambda jump=jump: real() + jump)
    monkeypatch.setattr(watch.time, "time", lambda jump=jump: real() + jump)
    with pytest.raises(UserError, match="has done 6 steps"):
      run(experiment(steps=7), tmp_path / str(jump))
    run(experiment(steps=6), tmp_path / str(jump))
    account = supervise.goodput(Journal(tmp_path / str(jump)).events)
    assert all(value >= 0 for value in account.values())
    cases("R19 second and next processes")


# ----------------------------------------------------------------------------------------------------- R22


@pytest.mark.nightly
def test_r22_a_long_run_grows_neither_in_memory_nor_in_files_threads_or_programs(tmp_path, monkeypatch, cases, times):
  steps = times(2000, 50_000)
  every = steps // 50
  config = experiment(steps=steps, every=every, keep=2, eval_every=steps // 20, log_every=10)
  samples = []
  page = os.sysconf("SC_PAGE_SIZE")

  def quiet(saves):
    """Waits for the save that is under way, which has files and threads of its own."""
    folder, end = tmp_path / "run", time.monotonic() + 60
    while saves and (len(Journal(folder).saved()) < saves or len(os.listdir(folder / "checkpoints")) > 2):
      assert time.monotonic() < end, f"fewer than {saves} saves"
      time.sleep(0.01)

  class Watched(Data):
    def iterate(self, index):
      for i, batch in enumerate(super().iterate(index), index):
        self.read.clear()
        if i % (2 * every) == every // 2:  # between two saves, well behind the first for what is read ahead
          quiet(i // every)
          rss = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * page
          samples.append((i, rss, len(os.listdir("/proc/self/fd")), threading.active_count()))
        yield batch

  compiled = []
  monkeypatch.setattr(jax.monitoring, "record_event_duration_secs", jax.monitoring.record_event_duration_secs)
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **kw: compiled.append(name) if "backend_compile" in name else None
  )
  run(config, tmp_path / "run", Watched())
  late = [s for s in samples if s[0] >= steps // 4]
  slope = np.polyfit([s[0] for s in late], [s[1] for s in late], 1)[0]
  assert slope < 4096 * (4 if steps < 10_000 else 1), slope  # bytes a step; short runs hold arenas that fill once
  half = len(late) // 2
  for column in (2, 3):
    before, after = (min(s[column] for s in part) for part in (late[:half], late[half:]))
    assert after <= before + 2, (column, samples)
  assert checkpoint.steps_of(tmp_path / "run" / "checkpoints") == [steps - steps // 50, steps]
  assert all(f._cache_size() == 1 for f in (_made(config).step, _made(config).evaluate))
  cases("R22 steps of a long run", steps)
  cases("R22 saves of a long run", 50)


# ------------------------------------------------------------------------------------------- the supervisor


CHILD = """
import json, os, sys, time
workdir, codes = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, sys.argv[3])
from llmarch.train.journal import Journal
os.makedirs(workdir, exist_ok=True)
open(workdir + "/config.json", "a").close()
number = len([r for r in Journal(workdir).events if r["event"] == "start"])
j = Journal(workdir)
j.add("start", step=0, began=time.time())
code, saves = codes[min(number, len(codes) - 1)]
if saves:
  j.add("saved", step=number + 1, at=time.time(), stall=0.0)
if code < 0:
  os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.mark.parametrize(
  "codes, starts, code",
  [
    ([(0, True)], 1, 0),
    ([(2, False)], 1, 2),
    ([(78, False)], 1, 78),
    ([(70, True)], 1, 70),
    ([(130, True)], 1, 130),
    ([(75, True), (-9, True), (-6, True), (143, True), (74, True), (1, True), (137, True), (0, True)], 8, 0),
    ([(75, False)], 3, 75),
    ([(-9, False)], 3, 137),
    ([(-9, True), (-9, False), (-9, False)], 4, 137),
    ([(-9, False), (-9, False), (-9, True), (-9, False), (0, False)], 5, 0),
  ],
)
@pytest.mark.full
def test_the_supervisor_starts_again_by_exit_code_and_stops_without_progress(
  tmp_path, monkeypatch, codes, starts, code
):
  monkeypatch.setattr(supervise, "FIRST", 0.01)
  root = str(pathlib.Path(__file__).parent.parent)
  command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), json.dumps(codes), root]
  assert supervise.supervise(command, str(tmp_path / "run")) == code
  events = Journal(tmp_path / "run").events
  assert sum(row["event"] == "start" for row in events) == sum(row["event"] == "death" for row in events) == starts
  assert json.loads((tmp_path / "run" / "goodput.json").read_text())["starts"] == starts


@pytest.mark.nightly
def test_r3_a_supervised_command_that_is_killed_twice_ends_as_one_that_was_not(tmp_path, cases):
  config = dataclasses.replace(
    experiment(steps=400, every=20, log_every=20), data=DataConfig(source=Copy(length=2, num_symbols=9))
  )
  (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
  env = dict(os.environ, XLA_FLAGS="", LLMARCH_CACHE=str(tmp_path / "cache"))

  def command(workdir):
    words = ["train", "--supervise", f"--config={tmp_path / 'config.json'}", f"--workdir={workdir}"]
    return subprocess.Popen(
      [sys.executable, "-m", "llmarch", *words], env=env, cwd=pathlib.Path(__file__).parent.parent
    )

  assert command(tmp_path / "whole").wait() == 0
  with command(tmp_path / "killed") as p:
    events = lambda: files.read_lines(tmp_path / "killed" / "journal.jsonl")
    for kill in (1, 2):
      _until(lambda: sum(row["event"] == "stepping" for row in events()) == kill)
      os.kill([row for row in events() if row["event"] == "start"][-1]["pid"], signal.SIGKILL)
      cases("R3 kill -9")
    assert p.wait() == 0
  assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
  assert fingerprints_of(tmp_path / "killed", 400) == fingerprints_of(tmp_path / "whole", 400)
  account = json.loads((tmp_path / "killed" / "goodput.json").read_text())
  assert (account["starts"], account["deaths"]) == (3, 2)
  parts = [account[name] for name in ("productive", "stall", "lost", "restart")]
  assert min(parts) >= 0 and sum(parts) == pytest.approx(account["wall"])


@pytest.mark.full
def test_nothing_of_a_supervised_run_outlives_its_supervisor(tmp_path):
  child = "import os, sys, time; os.fork(); open(sys.argv[1] + str(os.getpid()), 'w').close(); time.sleep(1000)"
  code = (
    "from llmarch.train.supervise import supervise; import sys;"
    f" supervise([sys.executable, '-c', {child!r}, sys.argv[1]], sys.argv[1])"
  )
  root = pathlib.Path(__file__).parent.parent
  alive = lambda: [p for p in tmp_path.iterdir() if _runs(int(p.name))]
  for number, gone in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
    with subprocess.Popen([sys.executable, "-c", code, f"{tmp_path}/"], cwd=root) as p:
      _until(lambda: len(list(tmp_path.iterdir())) == 2)
      p.send_signal(number)
    _until(lambda gone=gone: len(alive()) <= gone, 5)  # killed itself, it cannot see to its grandchild
    for path in tmp_path.iterdir():
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(path.name), signal.SIGKILL)
      path.unlink()


def _runs(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def test_goodput_accounts_for_every_second():
  saved = lambda time, step, at, stall: dict(event="saved", time=time, pid=1, step=step, at=at, stall=stall)
  event = lambda event, time, pid=1, **more: dict(event=event, time=time, pid=pid, **more)
  events = [
    event("start", 5, step=0, began=0),
    event("stepping", 10, step=1),
    saved(21, 10, 20, 0.5),  # 10 productive, 0.5 stall
    saved(33, 20, 30.5, 0.5),  # 10 more
    event("death", 40, child=1, code=-9),  # 9 lost
    event("start", 45, pid=2, step=20, began=41),
    event("stepping", 50, pid=2, step=21),  # 10 restart
    saved(61, 30, 60, 1),  # 10 productive, 1 stall
    event("rollback", 65, pid=2, step=33, to=20, skip=[20, 20]),  # 4 lost, and those 10
    event("start", 66, pid=2, step=20, began=41),
    event("stepping", 67, pid=2, step=21),  # 2 restart
    saved(78, 30, 77, 1),  # 10 productive, 1 stall
    event("done", 80, pid=2, step=31),  # 2 productive
  ]
  account = supervise.goodput(events)
  assert (account["productive"], account["stall"], account["lost"], account["restart"]) == (32, 3, 23, 22)
  assert account["wall"] == 80 == sum(account[name] for name in ("productive", "stall", "lost", "restart"))
  assert (account["goodput"], account["starts"], account["deaths"], account["rollbacks"]) == (0.4, 2, 1, 1)


def test_a_journal_gives_back_its_whole_lines_whatever_happened_to_the_others(tmp_path, cases):
  path = tmp_path / "journal.jsonl"
  for i in range(5):
    Journal(tmp_path).add("saved", step=i)
  data, rng = path.read_bytes(), random.Random(SEED)
  good = files.read_lines(path)
  for case in range(200):
    changed = bytearray(data[: rng.randrange(1, len(data) + 1)] if case % 2 else data)
    if not case % 2:
      changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    found = files.read_lines(path)
    assert all(row in good for row in found) and len(found) >= (3 if not case % 2 else 0)
    Journal(tmp_path).add("done", step=9)
    assert files.read_lines(path)[: len(found)] == found and files.read_lines(path)[-1]["event"] == "done"
    cases("journals damaged")
