"""Two processes of four fake devices each train as one of eight does, and end together whatever befalls one of them."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import llmarch.layers.registry  # noqa: F401  the kinds of layers
from llmarch.build import build
from llmarch.commands import launch
from llmarch.data.pipeline import make_pipeline
from llmarch.errors import UserError
from llmarch.files import read_lines
from llmarch.run_config import RunConfig
from llmarch.sharding import make_mesh
from llmarch.train import distributed
from llmarch.train.checkpoint import Checkpoints, fingerprints, flatten_state
from llmarch.train.step import make_train_step

ROOT = Path(__file__).parent.parent
HEARTBEAT = 10  # seconds
GONE = HEARTBEAT + 5  # within which the others of a dead process are gone
MESH = {"data": 4, "tensor": 2}
CONFIG = {
  "model": {
    "d_model": 16, "vocab_size": 32, "max_seq_len": 16, "stack": "2*layer", "final_norm": {"kind": "rmsnorm"},
    "blocks": {
      "layer": {
        "mixer": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "position": {"kind": "rope"},
                  "dropout": 0.1},
        "ffn": {"kind": "mlp", "d_ff": 40}, "norm": {"kind": "rmsnorm"},
      }
    },
  },
  "data": {"source": {"kind": "copy", "length": 6, "num_symbols": 16}},
  "train": {"steps": 10, "batch_size": 8, "seq_len": 12, "loss_chunk": 5, "log_every": 1},
  "eval": {"every": 5, "batches": 2},
  "checkpoint": {"every": 2, "max_to_keep": 100},
  "mesh": ",".join(f"{axis}={size}" for axis, size in MESH.items()),
}  # fmt: skip

# Process 1's data never come: its interpreter sleeps at step 3, and its heart beats on.
STUCK = """
import sys, time
from llmarch.data.pipeline import Pipeline
batch = Pipeline.batch
def sleepy(self, step, rows=None):
  if step == 3:
    time.sleep(1000)
  return batch(self, step, rows)
Pipeline.batch = sleepy
from llmarch.__main__ import main
sys.exit(main(sys.argv[1:]))
"""

# Process 1 cannot read its part of the last checkpoint.
TORN = """
import sys
from llmarch.train import checkpoint
load = checkpoint._load
def torn(path, items, what):
  found = load(path, items, what)
  if path.name == "10" and "state" in items:
    raise checkpoint.Damaged("half of it is missing")
  return found
checkpoint._load = torn
from llmarch.__main__ import main
sys.exit(main(sys.argv[1:]))
"""

# What one of two processes sees of the data, the initial state, and the functions that join them.
WORKER = """
import json, sys, time
import jax
import numpy as np
config, port, i = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
from llmarch.train import distributed
jax.config.update("jax_num_cpu_devices", 4)
distributed.initialize(
  distributed.find_cluster(num_processes=2, process_id=i, coordinator=f"127.0.0.1:{port}"), heartbeat=10, timeout=60
)
with distributed.ends_together():
  sys.path.insert(0, "tests")
  from test_processes import observe
  found = observe(config)
  split = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x"))
  whole = distributed.gather(jax.make_array_from_callback((8,), split, lambda index: np.arange(8.0)[index]))
  found |= {
    "gathered": None if whole is None else whole.tolist(),
    "main's": distributed.from_main([i, 7 + i]),
    "anywhere": [distributed.anywhere(i == 1), distributed.anywhere(False)],
    "preempted": distributed.preempted(1),
  }
  distributed.check_same(config="a", corpus="b")
  try:
    distributed.check_same(config="a", corpus=f"b{i}")
  except ValueError as e:
    found["differ"] = str(e)
  with distributed.main_first("cache"):
    found["main first"] = time.time()
    time.sleep(0.5)
  print("found", json.dumps(found), flush=True)
  if i == 1:
    raise RuntimeError("an error on one process")
  distributed.barrier("the other never comes")
"""


def observe(config: dict) -> dict:
  """Checksums of the global batches of 20 steps, and of the initial state, on a mesh of all devices."""
  config = build(RunConfig, config)
  functions = make_train_step(config, make_mesh(MESH))
  shape = config.train.batch_size, config.train.seq_len
  rows = distributed.local_rows(functions.batch_sharding, shape)
  data = pipeline(config)
  place = lambda step: distributed.place(data.batch(step, rows), rows, functions.batch_sharding, shape[0])
  plain = lambda prints: {name: np.asarray(p).tolist() for name, p in sorted(prints.items())}
  return {
    "rows": rows.tolist(),
    "batches": [plain(fingerprints(place(step))) for step in range(20)],
    "state": plain(fingerprints(flatten_state(functions.init()))),
  }


def pipeline(config):
  c = config.train
  return make_pipeline(
    config.data, batch_size=c.batch_size, seq_len=c.seq_len, seed=config.seed,
    vocab_size=config.model.vocab_size, split="train",
  )  # fmt: skip


# ------------------------------------------------------------------------------------------------ processes


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
  """Of children: devices are their own business; they share what they compile."""
  quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
  cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
  return {**cache, **os.environ, "XLA_FLAGS": quick, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def command(*words, environ, within=300):
  """A command to its end."""
  command = [sys.executable, "-m", "llmarch", *words]
  return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=within)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "config.json"
  path.write_text(json.dumps(CONFIG))
  return path


@pytest.fixture
def start(environ, config_file):
  """start(workdir, count=2, flags=(), second="") -> processes of one run, from number 0; all are killed at the end.

  second: a program for process 1 that stands for llmarch.
  """
  running = []

  def start(workdir, count=2, flags=(), second=""):
    port = launch._free_port()
    workdir.mkdir(exist_ok=True)
    (workdir / "logs").mkdir(exist_ok=True)
    for i in range(count):
      program = ["-c", second] if second and i == 1 else ["-m", "llmarch"]
      command = [sys.executable, *program, "train", f"--config={config_file}", f"--workdir={workdir}", *flags]
      command += ["--num_processes=2", f"--process_id={i}", f"--coordinator=127.0.0.1:{port}"]
      with open(workdir / "logs" / f"{i}.log", "ab") as log:
        running.append(
          subprocess.Popen([*command, f"--heartbeat={HEARTBEAT}"], env=environ, stdout=log, stderr=log, cwd=ROOT)
        )
    return running[-count:]

  yield start
  for process in running:
    with contextlib.suppress(ProcessLookupError):
      process.kill()
    process.wait()


def codes(processes, within: float) -> list[int]:
  """Their exit codes; fails unless all end within so many seconds."""
  until = time.monotonic() + within
  while any(p.poll() is None for p in processes):
    assert time.monotonic() < until, f"{[p.poll() for p in processes]} after {within} s"
    time.sleep(0.05)
  return [p.returncode for p in processes]


def wait_for(condition, processes, within=120.0):
  until = time.monotonic() + within
  while not condition():
    assert time.monotonic() < until, "it takes too long"
    assert all(p.poll() is None for p in processes), [p.poll() for p in processes]
    time.sleep(0.05)


def rows(workdir) -> list[dict]:
  """The metrics, without what depends on the clock."""
  clock = ("tokens_per_second", "mfu", "seconds")
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def reached(workdir, step):
  return lambda: any(row["step"] >= step for row in rows(workdir))


@pytest.fixture(scope="module")
def pair(environ, config_file, tmp_path_factory):
  """The workdir of a run by two processes that nothing befell."""
  workdir = tmp_path_factory.mktemp("runs") / "pair"
  words = ["--local=2", f"--workdir={workdir}", "--", "train", f"--config={config_file}"]
  run = command("launch", *words, environ=environ)
  assert run.returncode == 0, run.stderr
  (workdir / "stderr").write_text(run.stderr)
  return workdir


def assert_close(some, others):
  """Losses of the same steps, and of the same data, within what another order of sums makes of them."""
  assert [row["step"] for row in some] == [row["step"] for row in others]
  for a, b in zip(some, others, strict=True):
    for name in a.keys() & {"loss", "eval/loss", "learning_rate"}:
      assert a[name] == pytest.approx(b[name], rel=5e-6), (name, a, b)


# --------------------------------------------------------------------------------------- the same computation


@pytest.mark.full
def test_two_processes_see_the_batches_and_the_initial_state_of_one(environ, cases):
  port = launch._free_port()
  command = [sys.executable, "-c", WORKER, json.dumps(CONFIG), str(port)]
  pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  both = [subprocess.Popen([*command, str(i)], env=environ, cwd=ROOT, **pipe) for i in range(2)]
  outputs = [p.communicate(timeout=240)[0] for p in both]
  lines = [re.search(r"^found (.*)$", text, re.M) for text in outputs]
  assert all(lines), outputs
  first, second = (json.loads(line[1]) for line in lines)
  alone = observe(CONFIG)
  assert first["batches"] == second["batches"] == alone["batches"]
  assert first["state"] == second["state"] == alone["state"]
  assert [f["rows"] for f in (first, second, alone)] == [[0, 1, 2, 3], [4, 5, 6, 7], [*range(8)]]
  # The initial parameters on one device are these too.
  single = make_train_step(build(RunConfig, CONFIG | {"mesh": ""})).init()
  assert {k: np.asarray(v).tolist() for k, v in sorted(fingerprints(flatten_state(single)).items())} == first["state"]
  cases("batches and states the same in 1 and 2 processes", 20 + len(first["state"]))
  assert (first["gathered"], second["gathered"]) == ([*range(8)], None)
  for found in (first, second):
    assert found["main's"] == [0, 7] and found["anywhere"] == [True, False] and found["preempted"] is False
    assert found["differ"] == "process 1 started with another corpus than 0"
  assert second["main first"] - first["main first"] > 0.4
  # An error on one process ended both, without anyone's barrier.
  assert [p.returncode for p in both] == [1, 1] and "an error on one process" in outputs[1]


@pytest.mark.full
def test_two_processes_train_as_one_and_one_of_them_speaks(pair, environ, config_file, tmp_path, cases):
  done = command("train", f"--config={config_file}", f"--workdir={tmp_path / 'one'}", environ=environ)
  assert done.returncode == 0, done.stderr
  two, one = rows(pair), rows(tmp_path / "one")
  assert_close(two, one)
  cases("steps the same in 1 and 2 processes", len(two))
  assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
  assert len(list(pair.glob("events.out.tfevents*"))) == 1
  assert [e["event"] for e in read_lines(pair / "journal.jsonl")].count("start") == 1
  logs = [(pair / "logs" / f"{i}.log").read_text() for i in range(2)]
  assert "step 10/10" in logs[0] and "step" not in logs[1] and "fake devices" not in logs[1]
  assert "step 10/10" in (pair / "stderr").read_text()  # the launcher shows the main process's


SPLITS = [("data", None), ("data", "tensor"), (("data", "tensor"), None), (None, "tensor"), ("tensor", "data")]


@pytest.mark.parametrize("spec", SPLITS)
def test_the_rows_of_a_process_are_those_of_its_devices(spec, cases):
  """Every device's part of the batch can be cut out of the rows that its process makes, on any mesh."""
  whole = np.arange(8 * 16).reshape(8, 16)
  for mesh in ({"data": 4, "tensor": 2}, {"data": 2, "tensor": 4}, {"data": 8, "tensor": 1}, {"tensor": 2, "data": 4}):
    sharding = NamedSharding(make_mesh(mesh), PartitionSpec(*spec))
    indices = list(sharding.devices_indices_map(whole.shape).values())
    for count in (1, 2, 4):
      held = [indices[i * 8 // count : (i + 1) * 8 // count] for i in range(count)]  # by the devices of a process
      made = [distributed.rows_of(some, 8) for some in held]
      assert {int(r) for part in made for r in part} == set(range(8))
      for some, part in zip(held, made, strict=True):
        assert set(part) == {r for index in some for r in range(8)[index[0]]}
        cases("processes that make just their rows")
    local = distributed.local_rows(sharding, whole.shape)
    placed = distributed.place({"x": whole[local]}, local, sharding, 8)["x"]
    assert np.array_equal(placed, whole) and placed.sharding == sharding


@pytest.mark.full
def test_every_row_of_an_epoch_is_read_exactly_once_by_any_number_of_processes(tmp_path, cases):
  """R11: over processes, and from every element of the pipeline on, nothing is lost or read twice."""
  rng = random.Random(5)
  texts = "\n\n".join("".join(rng.choice("abcdefgh ") for _ in range(rng.randrange(5, 90))) for _ in range(300))
  (tmp_path / "a.txt").write_text(texts)
  source = {"kind": "text", "paths": [f"{tmp_path}/a.txt"], "separator": "\n\n"}
  for packing in ("chunks", "documents"):
    data = {"source": source, "packing": packing, "cache_dir": str(tmp_path), "prefetch": 0}
    model = CONFIG["model"] | {"vocab_size": 264}
    made = pipeline(build(RunConfig, CONFIG | {"data": data, "model": model}))
    size, count = made.batch_size, made.rows._plan.num_rows
    assert count > 200
    key = lambda batch, i: b"".join(batch[name][i].tobytes() for name in ("tokens", "positions", "segment_ids"))
    steps = count // size + 1
    whole = [key(batch, i) for batch in map(made.batch, range(steps)) for i in range(size)][:count]
    # Rows of equal text are equal; each comes as often as in the unshuffled epoch.
    plain = pipeline(build(RunConfig, CONFIG | {"data": data | {"shuffle": False}, "model": model}))
    ordered = [key(batch, i) for batch in map(plain.batch, range(steps)) for i in range(size)][:count]
    assert sorted(whole) == sorted(ordered) and whole != ordered
    for processes in (1, 2, 4):
      parts = np.split(np.arange(size), processes)
      read_by = [[made.batch(step, part) for step in range(steps)] for part in parts]
      dealt = [(step, by[step]) for step in range(steps) for by in read_by]
      together = [key(batch, i) for _, batch in dealt for i in range(size // processes)]
      assert together[:count] == whole
      cases("rows read once, over processes", count)
    for first in range(0, steps, 7):  # a resumed pipeline goes on where it was, in any process
      batches = made.iterate(first, [5, 2])
      assert [key(b, i) for b, _ in zip(batches, range(3)) for i in range(2)] == [
        key(made.batch(s), r) for s in range(first, first + 3) for r in (5, 2)
      ]
      batches.close()


# ---------------------------------------------------------------------------------------- faults and resuming


@pytest.mark.full
def test_a_signal_to_one_stops_both_at_one_step_and_any_number_goes_on(
  start, pair, environ, config_file, tmp_path, request, cases
):
  """R8, R10: SIGTERM to one of two; then two resume bit for bit, and one process on other meshes within rounding."""
  rng = random.Random(8)
  for _ in range(20 if request.config.getoption("--nightly") else 1):
    workdir = tmp_path / "run"
    both = start(workdir)
    wait_for(reached(workdir, rng.randrange(1, 8)), both)
    both[rng.randrange(2)].send_signal(signal.SIGTERM)
    assert codes(both, within=30) == [143, 143]
    events = read_lines(workdir / "journal.jsonl")
    last = max(e["step"] for e in events if e["event"] == "saved")
    assert events[-1]["event"] == "preempted" and last == events[-1]["step"] == rows(workdir)[-1]["step"]
    shutil.copytree(workdir, tmp_path / "other")
    assert codes(start(workdir), within=240) == [0, 0]
    assert rows(workdir) == rows(pair)
    cases("R8: SIGTERM to one of two, resumed bit for bit")
    other = tmp_path / "other"
    mesh = rng.choice(["tensor=2,data=2", "data=8", "tensor=4", "fsdp=2,tensor=2", ""])
    words = [f"--config={config_file}", f"--workdir={other}", f"--config.mesh={mesh}"]
    done = command("train", *words, environ=environ)
    assert done.returncode == 0, done.stderr
    assert_close(rows(other), rows(pair))
    cases("R10: saved by two processes, resumed by one on another mesh")
    shutil.rmtree(workdir)
    shutil.rmtree(other)


@pytest.mark.full
def test_a_checkpoint_of_two_processes_is_the_same_bits_on_every_mesh(pair, cases):
  config = build(RunConfig, CONFIG)
  for sizes in ({"data": 8}, {"tensor": 4, "data": 2}, {"fsdp": 4, "tensor": 2}, None):
    mesh = make_mesh({**dict.fromkeys(MESH, 1), **sizes}) if sizes else None
    abstract = make_train_step(config, mesh).abstract_state
    with Checkpoints(str(pair), config.checkpoint) as saved:
      state, record = saved.restore(abstract, 10)
    for name, value in flatten_state(state).items():
      assert int(np.asarray(fingerprints({"": value})[""])[0]) == record["arrays"][name][2], name
    cases("R10: restored on another mesh, bit for bit")


@pytest.mark.full
def test_a_kill_of_one_ends_the_other_and_the_next_run_goes_on_bit_for_bit(start, pair, tmp_path, request, cases):
  """R4: SIGKILL to a random one of two, at a random time."""
  rng, workdir = random.Random(4), tmp_path / "run"
  kills = 40 if request.config.getoption("--nightly") else 2
  for _ in range(kills):
    both = start(workdir, flags=["--start_timeout=20"])
    lock, mine = workdir / "lock", f"pid {both[0].pid} "
    wait_for(lambda: lock.exists() and lock.read_text().startswith(mine), both)  # noqa: B023  they have met
    until = time.monotonic() + rng.uniform(0, 12)
    while time.monotonic() < until and all(p.poll() is None for p in both):
      time.sleep(0.02)
    who = rng.randrange(2)
    if both[who].poll() is None:
      both[who].kill()
      assert codes(both, within=GONE)[who] == -signal.SIGKILL
      cases("R4: SIGKILL of one of two, the other gone in 15 s")
    if any(e["event"] == "done" for e in read_lines(workdir / "journal.jsonl")):
      assert rows(workdir) == rows(pair)
      shutil.rmtree(workdir)
  assert codes(start(workdir), within=240) == [0, 0]
  assert rows(workdir) == rows(pair)
  assert Checkpoints(str(workdir), build(RunConfig, CONFIG).checkpoint).steps() == [2, 4, 6, 8, 10]


@pytest.mark.full
def test_damage_that_one_process_finds_takes_all_back(start, pair, tmp_path, cases):
  """Both go back to the step before, and do the last ones again."""
  workdir = tmp_path / "run"
  shutil.copytree(pair, workdir)
  assert codes(start(workdir, second=TORN), within=240) == [0, 0]
  assert rows(workdir) == rows(pair)
  events = [(e["event"], e["step"]) for e in read_lines(workdir / "journal.jsonl")]
  assert events[events.index(("done", 10)) + 1 :] == [
    ("quarantined", 10), ("start", 8), ("stepping", 9), ("saved", 10), ("done", 10),
  ]  # fmt: skip
  cases("damaged checkpoints that both processes pass over")


@pytest.mark.nightly
def test_a_stopped_process_ends_the_other(start, tmp_path, cases):
  """R9: nothing of it runs, not even its heart."""
  both = start(tmp_path / "run")
  wait_for(reached(tmp_path / "run", 2), both)
  both[1].send_signal(signal.SIGSTOP)
  try:
    assert codes(both[:1], within=GONE)[0] != 0
  finally:
    both[1].send_signal(signal.SIGCONT)
  assert codes(both, within=GONE)[1] != 0
  cases("R9: peers stopped, stuck, never started")


@pytest.mark.full
def test_a_stuck_process_ends_both_and_their_stacks_tell_where(start, tmp_path, cases):
  """R9: alive, and in step with nobody. jax would wait for ever."""
  workdir = tmp_path / "run"
  both = start(workdir, flags=["--config.train.watchdog=6"], second=STUCK)
  wait_for(reached(workdir, 2), both)
  ended = codes(both, within=GONE)
  assert set(ended) <= {75, 1, -signal.SIGABRT} and 75 in ended
  # The one that waits for it may be the first to say so; jax then ends the other.
  stacks = "".join(path.read_text() for path in workdir.glob("stacks-*.txt"))
  assert ("sleepy" if ended[1] == 75 else "loop.py") in stacks
  cases("R9: peers stopped, stuck, never started")


@pytest.mark.full
def test_a_process_whose_others_never_start_says_so(start, tmp_path, cases):
  """R9: jax would abort."""
  [alone] = start(tmp_path / "run", count=1, flags=["--start_timeout=3"])
  assert codes([alone], within=60) == [75]
  text = (tmp_path / "run" / "logs" / "0.log").read_text()
  assert "process 0 of 2 waited 3 s for the others at 127.0.0.1:" in text and "Traceback" not in text
  cases("R9: peers stopped, stuck, never started")


# ------------------------------------------------------------------------------------------------- detection

SLURM = {
  "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
  "SLURM_STEP_NODELIST": "node[007-015],host2", "SLURM_STEP_NUM_NODES": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x8)",
}  # fmt: skip
MPI = {
  "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
GIVEN = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"}
INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
  ("environ", "expected"),
  [
    ({}, None),
    (SLURM, (16, 3, "node007", (1,), False)),
    (SLURM | {"SLURM_STEP_NODELIST": "node7,other"}, (16, 3, "node7", (1,), False)),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, (16, 3, "node007", None, False)),  # all GPUs of the node
    (SLURM | {"CUDA_VISIBLE_DEVICES": "6"}, (16, 3, "node007", None, False)),  # Slurm has bound one
    (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, (16, 3, "127.0.0.1", (1,), True)),
    (SLURM | {"SLURM_NTASKS": "1"}, None),
    (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
    ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # inside salloc, outside srun
    (MPI, (4, 1, "10.96.0.1", (1,), False)),
    (MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::b9b,2620::2]:43370"}, (4, 1, "[fe80::b9b]", (1,), False)),
    (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (4, 1, "127.0.0.1", (1,), True)),
    (INDEXED, None),  # a job of many runs
    (INDEXED | {"JAX_NUM_PROCESSES": "4", "JAX_COORDINATOR_ADDRESS": "a-0.b:9"}, (4, 3, "a-0.b", None, False)),
    (GIVEN, (2, 1, "127.0.0.1", (1,), True)),
  ],
)  # fmt: skip
def test_the_cluster_is_found_in_the_environment(environ, expected):
  found = distributed.find_cluster(environ=environ)
  if expected is None:
    assert found is None
    return
  host, _, port = found.coordinator.rpartition(":")
  assert (found.num_processes, found.process_id, host, found.local_devices, found.one_host) == expected
  assert port == "9" or 61440 <= int(port) < 65536


def test_jobs_and_restarts_differ_in_their_port():
  ports = [
    distributed.find_cluster(environ=SLURM | change).coordinator
    for change in ({}, {"SLURM_JOB_ID": "72"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"})
  ]
  assert len(set(ports)) == 4
  assert distributed.find_cluster(environ=SLURM | {"JAX_COORDINATOR_ADDRESS": "ib0:9"}).coordinator == "ib0:9"


def test_a_pod_knows_the_first_of_its_job():
  assert distributed._first_pod("run-3.svc.ns.svc.cluster.local", 3) == "run-0.svc.ns.svc.cluster.local:8476"
  assert distributed._first_pod("run-3", 3) is None  # no subdomain, no name that resolves


def test_a_tpu_host_of_several_leaves_the_rest_to_jax():
  names = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3"}
  assert distributed._cloud_tpu(names, lambda: True) == distributed.Cluster(4, 0, None)
  assert distributed._cloud_tpu(names | {"MEGASCALE_NUM_SLICES": "2"}, lambda: True).num_processes == 8
  assert distributed._cloud_tpu({"TPU_WORKER_HOSTNAMES": "t0"}, lambda: True).num_processes == 1
  assert distributed._cloud_tpu(names, lambda: False) is None
  assert distributed._cloud_tpu(names | {"JAX_PLATFORMS": "cpu"}, lambda: True) is None


@pytest.mark.parametrize(
  ("given", "environ", "message"),
  [
    (dict(num_processes=0), {}, "--num_processes=0 must be at least 1"),
    (dict(num_processes=2), {}, "--process_id=None must be one of 0 to 1, for --num_processes=2"),
    (dict(num_processes=2, process_id=2), {}, "--process_id=2 must be one of 0 to 1"),
    (dict(num_processes=2, process_id=0), {}, "--coordinator=None must be HOST:PORT of process 0"),
    (dict(num_processes=2, process_id=0, coordinator="host"), {}, "--coordinator=host must be HOST:PORT"),
    (dict(process_id=0), {}, "--process_id (JAX_PROCESS_ID) is given without --num_processes"),
    (dict(coordinator="a:1"), {}, "--coordinator (JAX_COORDINATOR_ADDRESS) is given without --num_processes"),
    ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' in the environment is not a number"),
    ({}, MPI | {"OMPI_MCA_orte_hnp_uri": "x"}, "set JAX_COORDINATOR_ADDRESS to HOST:PORT of rank 0"),
  ],
)
def test_half_a_cluster_is_refused(given, environ, message):
  with pytest.raises(UserError, match=re.escape(message)):
    distributed.find_cluster(**given, environ=environ)


def test_a_port_that_is_taken_is_refused():
  """Before jax is asked, which would crash."""
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=f"process 0 cannot listen at {address} "):
      distributed.initialize(distributed.Cluster(2, 0, address, one_host=True))


# --------------------------------------------------------------------------------------------- the launcher


def run(scripts, logs, hosts=None):
  """Runs shell scripts as the launcher's processes (which get its flags as arguments)."""
  hosts = hosts or [None] * len(scripts)
  return launch._run([["sh", "-c", s] for s in scripts], hosts, "127.0.0.1:1", logs)


@pytest.mark.full
def test_the_first_failure_ends_all_and_is_the_launchers(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(launch, "GRACE", 1)
  assert run(["echo hello; sleep 1000", "sleep 0.3; exit 7"], tmp_path) == 7
  assert run(["exit 0", "sleep 0.5"], tmp_path) == 0
  assert run(["kill -9 $$", "trap '' TERM; while :; do sleep 0.1; done"], tmp_path) == 137  # TERM is not enough
  text = capfd.readouterr().err
  assert "hello" in text and f"llmarch: process 1 ended with code 7; its log is {tmp_path}/1.log" in text


@pytest.mark.full
def test_no_process_outlives_the_launcher(tmp_path):
  """Neither SIGTERM, which it hands on, nor SIGKILL leaves one behind."""
  child = f"echo $$ > {tmp_path}/pid; trap 'exit 143' TERM; sleep 1000 & wait"
  program = "import sys; from pathlib import Path; from test_processes import run; "
  program += "sys.exit(run(sys.argv[1:2], Path(sys.argv[2])))"
  for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
    launcher = subprocess.Popen(
      [sys.executable, "-c", program, child, tmp_path], env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    )
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text().strip(), [launcher])  # noqa: B023
    number_of_child = int(pid.read_text())
    launcher.send_signal(number)
    assert codes([launcher], within=20) == [code]
    until = time.monotonic() + 10
    while Path(f"/proc/{number_of_child}").exists():
      assert time.monotonic() < until
      time.sleep(0.05)
    pid.unlink()


def test_hosts_are_reached_over_ssh_with_every_word_as_it_was(tmp_path, monkeypatch, capfd):
  """ssh hands its words, joined by spaces, to the user's shell on the host; so does this one."""
  (tmp_path / "bin").mkdir()
  ssh = tmp_path / "bin" / "ssh"
  ssh.write_text(f'#!/bin/sh\nshift 2\necho "$1" >> {tmp_path}/asked\nshift\nexec sh -c "$*"\n')
  ssh.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
  folder = tmp_path / "a folder's"
  folder.mkdir()
  monkeypatch.chdir(folder)
  said = "pwd; echo \"it's $0 $1 $2 'a  b'\"; exit 5"
  assert run([said, "sleep 1000"], tmp_path, ["user@a", "b"]) == 5
  assert sorted((tmp_path / "asked").read_text().split()) == ["b", "user@a"]
  flags = "--num_processes=2 --process_id=0 --coordinator=127.0.0.1:1"
  assert (tmp_path / "0.log").read_text() == f"{folder}\nit's {flags} 'a  b'\n"
  assert "process 0 on user@a ended with code 5" in capfd.readouterr().err


@pytest.mark.full
def test_a_refused_config_is_one_sentence_and_code_2(environ, config_file, tmp_path):
  train = ["train", f"--config={config_file}", "--config.mesh=data=1"]
  done = command("launch", "--local=2", f"--workdir={tmp_path / 'run'}", "--", *train, environ=environ)
  assert done.returncode == 2, done.stderr
  assert "2 processes cannot share devices evenly, of which mesh 'data=1' has 1;" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--local=2", "--", "train"], "--workdir is missing"),
    (["--workdir=w", "--", "train"], "launch on one of --local=N, --hosts=A,B or --slurm (given: none)"),
    (["--workdir=w", "--local=2", "--hosts=a,b", "--", "train"], "(given: local, hosts)"),
    (["--workdir=w", "--local=2"], "launch what? Write -- train --config=... at the end"),
    (["--workdir=w", "--local=2", "--", "bench"], "launch runs `train`, not 'bench'"),
    (["--workdir=w", "--local=2", "--", "train", "--workdir=v"], "--workdir=v stands after `--`"),
    (["--workdir=w", "--slurm", "--", "train"], "--slurm needs submitit"),
  ],
)
def test_a_wrong_launch_is_refused(argv, message, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "submitit", None)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=re.escape(message)):
    launch.main(argv)


# --------------------------------------------------------------------------------------------------- Slurm


def task(script, rank, then=""):
  """A task's process, as submitit runs it: a process of its own around the command."""
  code = "import signal\nfrom llmarch.train.slurm import CommandTask\n"
  code += f"task = CommandTask(['sh', '-c', {script!r}], '.')\n"
  code += f"{then}\ntask()"
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  environ = {**os.environ, "PYTHONPATH": path, "SLURM_PROCID": str(rank)}
  return subprocess.Popen([sys.executable, "-c", code], env=environ)


def test_a_task_ends_as_its_command_does():
  # 143, saved and told to stop: but the first is no bad exit, for srun would end the first, which has to requeue.
  tasks = [task("exit 0", 0), task("exit 70", 1), task("kill -9 $$", 1), task("exit 143", 0), task("exit 143", 1)]
  assert codes(tasks, within=30) == [0, 70, 137, 143, 0]


@pytest.mark.full
def test_a_task_whose_time_is_over_saves_first(tmp_path):
  """submitit calls `checkpoint` in its handler of SIGUSR2, which Slurm sends to the command as well."""
  submitit = pytest.importorskip("submitit", reason="SUBMITIT IS NOT INSTALLED")
  script = f"trap 'sleep 0.3; echo saved > {tmp_path}/saved; exit 143' TERM; echo > {tmp_path}/up;"
  script += " while :; do sleep 0.1; done"
  then = f"""
def over(*_):
  again = task.checkpoint()
  assert (again.function.command, again.function.folder) == (task.command, task.folder)
  assert open({str(tmp_path / "saved")!r}).read() == "saved\\n"
  raise SystemExit(9)
signal.signal(signal.SIGUSR2, over)"""
  assert submitit
  running = task(script, 0, then)
  wait_for((tmp_path / "up").exists, [running])
  running.send_signal(signal.SIGUSR2)
  assert codes([running], within=30) == [9]


@pytest.fixture
def slurm(environ, config_file):
  """submit(workdir, launcher's flags, train's flags) -> look; look() gives a job's state and number of restarts."""
  pytest.importorskip("submitit", reason="SUBMITIT IS NOT INSTALLED")
  if not shutil.which("sinfo") or b"idle" not in subprocess.run(["sinfo", "-h"], capture_output=True).stdout:
    pytest.skip("THERE IS NO SLURM WITH AN IDLE NODE (tests/slurm.sh)")
  environ = environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

  def submit(workdir, flags, more=()):
    own = [f"--workdir={workdir}", "--slurm", "--tasks_per_node=2", "--srun=--overcommit", *flags]
    done = command("launch", *own, "--", "train", f"--config={config_file}", *more, environ=environ)
    assert done.returncode == 0, done.stderr
    job = re.search(r"submitted job (\d+)", done.stdout)[1]

    def look():
      shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
      return *re.search(r"JobState=(\w+).*?Restarts=(\d+)", shown, re.S).groups(), job

    return look

  return submit


@pytest.mark.full
def test_a_slurm_job_trains_as_processes_do(slurm, pair, tmp_path, cases):
  """sbatch, srun, two tasks that find each other."""
  look = slurm(tmp_path / "run", ["--minutes=5"])
  wait_for(lambda: look()[0] not in ("PENDING", "RUNNING", "COMPLETING"), [])
  assert look()[0] == "COMPLETED" and rows(tmp_path / "run") == rows(pair)
  cases("jobs of Slurm")


@pytest.mark.full
def test_a_slurm_job_whose_time_is_over_saves_and_goes_on_when_it_is_queued_again(slurm, tmp_path, cases):
  """20 s before the end of its minute; then, told to end by scancel, it saves once more."""
  endless = ["--config.train.steps=1000000", "--config.train.log_every=1000", "--config.eval.every=0"]
  flags = ["--minutes=1", "--save_seconds=20"]
  look = slurm(tmp_path / "run", flags, [*endless, "--config.checkpoint.every=0"])
  events = lambda *kinds: [
    (e["event"], e["step"]) for e in read_lines(tmp_path / "run" / "journal.jsonl") if e["event"] in kinds
  ]
  wait_for(lambda: len(events("stepping")) == 2, [], within=240)
  state, restarts, job = look()
  assert (state, restarts) == ("RUNNING", "1")
  subprocess.run(["scancel", job], check=True)
  wait_for(lambda: look()[0] == "CANCELLED" and len(events("preempted")) == 2, [])
  (_, first), (_, second) = events("preempted")
  assert events("start", "saved") == [("start", 0), ("saved", first), ("start", first), ("saved", second)]
  cases("jobs of Slurm")
