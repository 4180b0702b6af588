"""Runs that go on: with more steps, as branches with another config, after Ctrl-C, a stop, and with a full disk."""

import dataclasses
import gzip
import io
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainee
from trainee import B, T, experiment, no_file_above

from llmarch.build import build, override, to_dict
from llmarch.commands.common import load_config, parse_flags, parse_words
from llmarch.commands.train import main as train_command
from llmarch.data import sources
from llmarch.data.pipeline import make_pipeline
from llmarch.errors import UserError
from llmarch.files import absolute_path, local_path
from llmarch.ops.quant import rounded_at_random
from llmarch.run import check_settings, train_run, with_absolute_paths
from llmarch.run_config import (
  JSONL,
  SGD,
  WSD,
  AdamW,
  CheckpointConfig,
  Constant,
  Copy,
  DataConfig,
  EvalConfig,
  LogConfig,
  OptimizerConfig,
  RunConfig,
  SpikeConfig,
  TextFiles,
  TrainConfig,
)
from llmarch.train import checkpoint, guard, loop, watch
from llmarch.train.branch import Branch, parse_branch
from llmarch.train.faults import Interrupted
from llmarch.train.journal import Journal
from llmarch.train.metrics import LiveLine, MetricsWriter
from llmarch.train.step import make_train_step

_steps = {}


def _made(config, mesh=None):
  """A step compiles once for all tests, and does not depend on where a run is saved or told of."""
  key = dataclasses.replace(config, checkpoint=trainee.CheckpointConfig(), log=LogConfig(), eval=trainee.EvalConfig())
  steps = 99 if config.optimizer.schedule == Constant() else config.train.steps
  key = dataclasses.replace(key, train=dataclasses.replace(key.train, log_every=1, steps=steps, spike=None))
  if key not in _steps:
    _steps[key] = make_train_step(key)
  return _steps[key]


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
  monkeypatch.setattr(loop, "make_train_step", _made)


class Data(trainee.Data):
  """Rows of an endless table: a batch of another size goes on where this one ends."""

  def __init__(self, batch_size=B, name="rows"):
    super().__init__()
    self.size, self.name = batch_size, name
    self.hash = self.hash_of(batch_size=batch_size, seq_len=T)

  def hash_of(self, batch_size, seq_len):
    return f"{self.name} {batch_size} x {seq_len}"

  def batch(self, index):
    rows = [_row(i) for i in range(index * self.size, (index + 1) * self.size)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _row(index):
  return {name: value[:1] for name, value in trainee.Data().batch(index).items()}


def config_of(schedule=None, learning_rate=3e-3, **kw):
  config = experiment(**{"every": 4, "keep": 9, "steps": 8} | kw)
  optimizer = OptimizerConfig(algorithm=AdamW(), learning_rate=learning_rate, schedule=schedule or Constant())
  return dataclasses.replace(config, optimizer=optimizer)


def run(config, workdir, data=None, branch=None):
  data = data or Data(config.train.batch_size)
  if branch:
    branch.check(str(workdir), config)
  return loop.train(
    config, str(workdir), data, Data(), mesh=None, sample=None, flops_per_token=1.0, peak_flops=None, branch=branch
  )


def arrays(workdir, step):
  """{name: (dtype, shape, fingerprint)} of a checkpoint."""
  folder = pathlib.Path(workdir) / "checkpoints"
  record = checkpoint._open(folder, checkpoint._load(folder / str(step), {"meta": None}, "record")["meta"])
  return record["arrays"]


def rows(workdir):
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  clock = ("tokens_per_second", "mfu", "seconds")
  return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run of 8 steps at a constant rate, with checkpoints of 4 and 8."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_train_step", _made)
    run(config_of(), workdir)
  return workdir


@pytest.fixture(scope="module")
def annealed(tmp_path_factory):
  """The uninterrupted run whose rate is that of `finished` for 8 steps, and falls to a tenth in 4 more."""
  workdir = tmp_path_factory.mktemp("annealed") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_train_step", _made)
    run(config_of(WSD(decay=4, final=0.1), steps=12), workdir)
  return workdir


# --------------------------------------------------------------------------------------------- the same folder


def test_a_finished_run_extends_to_more_steps_as_if_it_had_never_stopped(finished, tmp_path, capsys):
  shutil.copytree(finished, tmp_path / "run")
  changed = dataclasses.replace(config_of(steps=12), log=LogConfig(name="longer", tags=("a",)))
  run(dataclasses.replace(changed, checkpoint=trainee.CheckpointConfig(every=4, max_to_keep=3)), tmp_path / "run")
  run(config_of(steps=12), tmp_path / "whole")
  assert arrays(tmp_path / "run", 12) == arrays(tmp_path / "whole", 12)
  assert rows(tmp_path / "run") == rows(tmp_path / "whole")
  assert json.loads((tmp_path / "run" / "config.json").read_text())["log"]["name"] == "longer"
  capsys.readouterr()
  last = run(config_of(steps=12), tmp_path / "run")
  assert last == {} and "is finished, with 12 steps" in capsys.readouterr().err


def test_what_would_change_numbers_is_refused_and_the_way_named(finished, tmp_path):
  shutil.copytree(finished, tmp_path / "run")
  for other, sentence in (
    (config_of(steps=6), "train.steps=6 is less than the 8 steps"),
    (config_of(learning_rate=1e-3), r"config.optimizer.learning_rate: 0.001 here.*llmarch train --from="),
    (config_of(z_loss=1e-4), r"config.train.z_loss.*llmarch train --from="),
  ):
    with pytest.raises(UserError, match=sentence):
      run(other, tmp_path / "run")
  run(config_of(WSD(decay=4), steps=8), tmp_path / "decayed")
  with pytest.raises(UserError, match=r"a wsd schedule over 8 steps.*--from="):
    run(config_of(WSD(decay=4), steps=12), tmp_path / "decayed")
  shutil.rmtree(tmp_path / "decayed" / "checkpoints" / "8")
  (tmp_path / "decayed" / "journal.jsonl").unlink()
  run(config_of(WSD(decay=4), steps=12), tmp_path / "decayed")  # at step 4 both schedules were still the same
  run(config_of(WSD(decay=4), steps=12), tmp_path / "whole")
  assert arrays(tmp_path / "decayed", 12) == arrays(tmp_path / "whole", 12)


def test_checkpoints_to_which_spikes_go_back_are_part_of_a_run(tmp_path):
  run(config_of(spike=SpikeConfig()), tmp_path / "run")
  with pytest.raises(UserError, match=r"checkpoint\.every: 2 here, 4 there"):
    run(config_of(spike=SpikeConfig(), every=2), tmp_path / "run")


# --------------------------------------------------------------------------------------------------- branches


def test_a_branch_equals_the_uninterrupted_run_of_its_config(finished, annealed, tmp_path):
  config = config_of(WSD(decay=4, final=0.1), steps=12)
  for step in (4, None):
    workdir = tmp_path / str(step)
    run(config, workdir, branch=Branch(str(finished), step))
    assert arrays(workdir, 12) == arrays(annealed, 12)
    assert rows(workdir) == rows(annealed)
  assert checkpoint.steps_of(tmp_path / "4" / "checkpoints") == [4, 8, 12]


def test_a_branch_goes_on_alone_after_its_first_checkpoint(finished, annealed, tmp_path):
  shutil.copytree(finished, tmp_path / "source")
  config = config_of(WSD(decay=4, final=0.1), steps=12)

  class Stops(Data):
    def iterate(self, index):
      for i, batch in enumerate(super().iterate(index), index):
        if i == 6:
          raise RuntimeError("the loader broke")
        yield batch

  with pytest.raises(RuntimeError):
    run(config, tmp_path / "run", Stops(), branch=Branch(str(tmp_path / "source"), 4))
  shutil.rmtree(tmp_path / "source")
  run(config, tmp_path / "run")
  assert arrays(tmp_path / "run", 12) == arrays(annealed, 12)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_branch_with_another_batch_goes_on_at_the_next_row(finished, tmp_path, batch_size):
  data = Data(batch_size)
  config = config_of(steps=10, batch_size=batch_size)
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))
  run(config, tmp_path / "run", data, branch=Branch(str(finished), 8))
  assert data.read[0] * batch_size == 8 * B  # the first row that the other run has not read
  assert rows(tmp_path / "run")[-1]["tokens"] == 8 * B * T + 2 * batch_size * T
  again = Data(batch_size)
  run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=11)), tmp_path / "run", again)
  assert again.read[0] == data.read[0] + 2


def test_what_a_branch_resets_starts_anew_and_nothing_else_does(finished, tmp_path):
  def first(*reset, data=None, config=None):
    workdir, data = tmp_path / "-".join(("reset", *reset, str(time.monotonic_ns()))), data or Data()
    config = config or config_of(steps=9)
    run(config, workdir, data, branch=Branch(str(finished), 8, reset))
    step = 0 if "step" in reset else 8
    return arrays(workdir, step), data.read[0], Journal(str(workdir)).branched()["step"]

  old = arrays(finished, 8)
  zeros = lambda found: [name for name in found if found[name] != old[name]]
  found, index, step = first()
  assert zeros(found) == [] and (index, step) == (8, 8)
  found, index, step = first("data")
  assert zeros(found) == [] and (index, step) == (0, 8)
  found, index, step = first("moments")
  assert {name.split("/")[0] for name in zeros(found)} == {"opt_state"} and (index, step) == (8, 8)
  assert found["opt_state/3/count"] == old["opt_state/3/count"]  # the schedule's place is that of the step
  found, index, step = first("step", config=config_of(steps=4))
  assert zeros(found) == ["opt_state/3/count", "step"] and (index, step) == (8, 0)
  _, index, _ = first(data=Data(name="other text"))
  assert index == 0


def test_a_branch_that_cannot_be_is_refused_in_a_sentence(finished, tmp_path):
  other = dataclasses.replace(config_of(steps=12), optimizer=OptimizerConfig(algorithm=SGD(), schedule=Constant()))
  for config, branch, sentence in (
    (config_of(steps=8), Branch(str(finished)), "train.steps=8 leaves nothing to do after step 8"),
    (config_of(steps=12), Branch(str(finished), 5), "there is no step 5; .* has the checkpoints 4, 8"),
    (other, Branch(str(finished)), "has the moments of adamw, which sgd cannot use; give --reset=moments"),
  ):
    with pytest.raises(UserError, match=sentence):
      run(config, tmp_path / "run", branch=branch)
    assert not (tmp_path / "run").exists()
  with pytest.raises(UserError, match="is --from"):
    run(config_of(steps=12), finished, branch=Branch(str(finished)))
  for text, reset, sentence in (
    (str(tmp_path / "nothing"), [], "is no run"),
    (str(finished), ["moment"], "unknown name 'moment'; did you mean 'moments'"),
  ):
    with pytest.raises(UserError, match=sentence):
      parse_branch(text, reset)
  assert parse_branch(f"{finished}@4", ["data", "step"]) == Branch(str(finished), 4, ("step", "data"))
  with pytest.raises(UserError, match="--reset is of a branch"):
    train_command([f"--workdir={tmp_path / 'run'}", "--reset=data"])


def test_the_place_in_a_real_pipeline_is_kept_over_batch_sizes():
  make = lambda batch_size, **kw: make_pipeline(
    DataConfig(source=Copy(length=3, num_symbols=5)), batch_size=batch_size, seq_len=8, seed=0, vocab_size=16,
    split="train", **kw,
  )  # fmt: skip
  four, six = make(4), make(6)
  assert six.hash_of(batch_size=4) == four.hash != six.hash
  assert six.hash_of(batch_size=4, seed=1) != four.hash


# --------------------------------------------------------------------------------------- Ctrl-C, stops, full disks


class AtRow(Data):
  """Data whose reader calls a function before it gives the batch of an index."""

  def __init__(self, at, call):
    super().__init__()
    self.at, self.call = at, call

  def iterate(self, index):
    for i, batch in enumerate(super().iterate(index), index):
      if i == self.at:
        self.call()
      yield batch


@pytest.fixture
def interruptible():
  """Ctrl-C as in a terminal: a process that was started in the background ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_the_step_it_comes_in_and_the_run_goes_on_from_it(finished, tmp_path, capfd, interruptible):
  hit = AtRow(5, lambda: os.kill(os.getpid(), signal.SIGINT))
  with pytest.raises(Interrupted, match="interrupted: step 6 is saved") as why:
    run(config_of(), tmp_path / "run", hit)
  assert why.value.exit_code == 130 and "Ctrl-C again quits at once" in capfd.readouterr().err
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  run(config_of(), tmp_path / "run")
  assert arrays(tmp_path / "run", 8) == arrays(finished, 8)


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_quits_at_once(number, code):
  script = (
    "import os, signal, llmarch.train.watch as w\n"
    f"with w.Preemption():\n  for _ in range(2): os.kill(os.getpid(), signal.{number})\n"
  )
  assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == code


STOPPED = """
import sys, time, ctypes
import llmarch.train.watch as w
with w.Watchdog(sys.argv[1], 1.0) as dog:
  for _ in range(2): dog.begin("step")
  print("ready", flush=True)
  for _ in range(10):
    time.sleep(0.1)
    dog.begin("step")
  if sys.argv[2] == "stuck": ctypes.PyDLL(None).sleep(60)  # which keeps the interpreter's lock
"""


def test_a_process_that_is_stopped_and_goes_on_is_not_stuck(tmp_path):
  command = [sys.executable, "-c", STOPPED, str(tmp_path), "goes on"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
    p.stdout.readline()
    p.send_signal(signal.SIGSTOP)
    time.sleep(6)  # more than the limit, and than what guard.py gives beyond it
    assert guard.is_stopped(p.pid)
    p.send_signal(signal.SIGCONT)
    assert p.wait(60) == 0, p.stderr.read()


@pytest.mark.full
def test_a_process_whose_interpreter_is_stuck_is_ended_with_its_stacks(tmp_path):
  ended = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path), "stuck"], capture_output=True, timeout=50)
  (stacks,) = tmp_path.glob("stacks-*.txt")
  assert ended.returncode == -watch.STACKS and "<string>" in stacks.read_text()


def test_rows_wait_for_room_on_a_full_disk_and_it_is_said_once(tmp_path):
  said, row = [], lambda step: {"step": step, "loss": 1.0 / step, "text": "x" * 90}
  writer = MetricsWriter(str(tmp_path), 0, LogConfig(tensorboard=False), say=said.append)
  writer.write(row(1))
  with no_file_above(200):
    for step in (2, 3, 4, 5):
      writer.write(row(step))
    whole = (tmp_path / "metrics.jsonl").read_text()  # no part of a row is in it
    assert whole.endswith("}\n") and [json.loads(line)["step"] for line in whole.splitlines()] == [1]
  writer.write(row(6))
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert len(said) == 1 and "cannot write" in said[0] and "rows wait for room" in said[0]


def test_a_logger_that_fails_is_given_up_and_the_rows_go_on(tmp_path):
  said = []
  writer = MetricsWriter(str(tmp_path), 0, say=said.append)
  with no_file_above(2000):
    for step in range(1, 200):
      writer.write({"step": step, "loss": 0.5})
      writer.sync()
  writer.write({"step": 200, "loss": 0.5})
  writer.close()
  assert [s.split(" (")[0] for s in said if "tensorboard" in s] == ["llmarch: log.tensorboard cannot write"]
  assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == list(range(1, 201))


def test_a_log_file_on_a_full_disk_stops_no_run(monkeypatch):
  class Full:
    def isatty(self):
      return False

    def write(self, text):
      raise OSError(28, "No space left on device")

    flush = write

  monkeypatch.setattr(sys, "stderr", Full())
  LiveLine(3).say("a line")


def test_a_journal_that_cannot_be_written_is_a_fault_of_the_disk(tmp_path):
  from llmarch.train.faults import StorageFault

  (tmp_path / "journal.jsonl").mkdir()
  with pytest.raises((StorageFault, IsADirectoryError)):
    Journal(str(tmp_path)).add("start", step=0)


# ------------------------------------------------------------------------------------------- rows and their clock


def test_rows_have_tokens_and_seconds_which_go_on_over_a_resume(finished, tmp_path):
  shutil.copytree(finished, tmp_path / "run")
  run(config_of(steps=10), tmp_path / "run")
  found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  assert [row["tokens"] for row in found] == [row["step"] * B * T for row in found] and len(found) == 10
  seconds = [row["seconds"] for row in found]
  assert seconds == sorted(seconds) and seconds[0] > 0


def test_throughput_leaves_out_the_first_step_and_pauses():
  meter = loop.Meter(tokens_per_step=10, flops_per_token=1.0, peak_flops=None)
  meter.first_step(2.0)
  assert meter.read()["tokens_per_second"] == 5.0  # where there is no other, the first step counts once compiled
  meter.first_step(1e6)
  with meter.paused():
    time.sleep(0.2)
  for _ in range(4):
    time.sleep(0.02)
    meter.step()
  assert 250 < meter.read()["tokens_per_second"] < 500


class Terminal(io.StringIO):
  """A terminal that keeps what was written to it."""

  def isatty(self):
    return True

  def lines(self):
    """The lines as they stand on the screen."""
    return [line.rpartition("\r\033[K")[2] for line in self.getvalue().split("\n")]


ROW = dict(loss=1.5, bits_per_byte=1.25, grad_norm=0.5, learning_rate=1e-3, tokens_per_second=1e4, mfu=0.25)


@pytest.mark.parametrize("width", [8, 30, 60, 80, 200])
def test_the_live_line_fits_the_terminal(width, monkeypatch):
  monkeypatch.setattr(sys, "stderr", terminal := Terminal())
  monkeypatch.setenv("COLUMNS", str(width))
  with LiveLine(90) as line:
    line.status("compiling the step, which may take long")
    line.show(ROW | {"step": 30})
  (text, nothing) = terminal.lines()
  assert len(text) < width and text.startswith("step 30"[: width - 1]) and nothing == ""
  assert ("loss 1.5000" in text) == (width > 20) and ("|g| 0.50" in text) == (width == 200)
  assert ("left" in text) == (width > 30) and "compiling" not in text


def test_whatever_others_write_begins_below_the_live_line(monkeypatch):
  monkeypatch.setattr(sys, "stderr", terminal := Terminal())
  monkeypatch.setenv("COLUMNS", "60")
  with LiveLine(90) as line:
    line.show(ROW | {"step": 1})
    line.say("step 1  eval loss 2")
    line.show(ROW | {"step": 2})
    print("a warning", file=sys.stderr)
    line.status("compiling the evaluation")
    line.say("step 2  eval loss 1")
    line.show(ROW | {"step": 3})
  print("llmarch: an error", file=sys.stderr)
  assert sys.stderr is terminal
  first = [line.partition("  loss")[0] for line in terminal.lines()]
  assert first == ["step 1/90", "step 1  eval loss 2", "step 2/90", "a warning", "step 2  eval loss 1", "step 3/90",
                   "llmarch: an error", ""]  # fmt: skip


def test_a_run_says_that_it_compiles_and_shows_its_first_step_which_is_no_row_of_its_file(tmp_path, capsys):
  config = config_of(steps=3)
  run(dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=3)), tmp_path / "run")
  said = [line.partition("  loss")[0] for line in capsys.readouterr().err.splitlines()]
  assert said == ["compiling the step", "step 1/3", "step 3/3"]
  assert [row["step"] for row in rows(tmp_path / "run")] == [3]


@pytest.mark.parametrize("source", ["stdlib", "copy"])
def test_the_last_lines_of_a_run_name_commands_that_parse(source, capsys):
  from llmarch.commands import generate, report, train

  config = load_config(str(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"), [("data.source", source)])
  train._say_next(config, "runs/a b", {"eval/loss": 1.25})
  first, *commands = capsys.readouterr().err.splitlines()
  assert first == "the model is in runs/a b (step 1500, eval loss 1.2500); next:"
  (*_, last) = parsed = [shlex.split(command) for command in commands]
  assert [words[1] for words in parsed] == ["generate", "report"] if source == "stdlib" else ["report"]
  if source == "stdlib":
    values = parse_flags(parsed[0][2:], generate._define, "")
    assert (values["from"].value, values.prompt) == ("runs/a b", ["def "])
  assert parse_words(last[2:], report._define, "")[1] == ["runs/a b"]


def test_the_time_left_leaves_out_what_happens_once(monkeypatch, capsys):
  clock = [0.0]
  monkeypatch.setattr("llmarch.train.metrics.time.monotonic", lambda: clock[0])
  line, row = LiveLine(101), dict(loss=1.0, bits_per_byte=1.0, grad_norm=1.0, learning_rate=1.0, mfu=None)
  clock[0] = 600.0  # compiling, and the first step
  line.leave_out(600.0, steps=1)
  clock[0] = 610.0
  line.show(row | {"step": 11, "tokens_per_second": 1.0})
  assert "1:30 left" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- precision


def test_rounding_at_random_keeps_the_mean_and_gives_neighbours_only():
  x = jnp.float32(1 + 2**-10)  # an eighth of the way from 1 to the next number of bfloat16
  got = np.asarray(rounded_at_random(jnp.full(40_000, x), jnp.bfloat16, jax.random.key(0)), np.float32)
  assert set(got.tolist()) == {1.0, 1 + 2**-7} and abs(got.mean() - float(x)) < 2e-4
  for special in (np.inf, -np.inf, np.nan, 0.0, -1.5):
    got = np.asarray(rounded_at_random(jnp.full(99, special), jnp.bfloat16, jax.random.key(1)), np.float32)
    np.testing.assert_array_equal(got, special)


def test_bf16_parameters_follow_updates_far_below_their_precision():
  precision = dataclasses.replace(trainee.MODEL.precision, param="bfloat16")
  model = dataclasses.replace(trainee.MODEL, precision=precision)
  decay = dict(learning_rate=1.0, weight_decay=2**-12, clip_norm=None)
  optimizer = OptimizerConfig(algorithm=SGD(), schedule=Constant(), **decay)
  config = dataclasses.replace(config_of(model=model), optimizer=optimizer)
  functions = make_train_step(config)
  state = functions.init()
  name, before = "embed", np.asarray(state["params"]["embed"], np.float32)
  nothing = trainee.Data().batch(0) | {"loss_weights": np.zeros((B, T), np.float32)}
  for _ in range(64):  # each step would round back to where it began
    state, _ = functions.step(state, nothing)
  after = np.asarray(state["params"][name], np.float32)
  assert abs(np.abs(after).sum() / np.abs(before).sum() - (1 - 2**-12) ** 64) < 2e-3
  half = dataclasses.replace(config.model, precision=dataclasses.replace(precision, param="float16"))
  with pytest.raises(UserError, match="model.precision.param=float16 has too few exponents"):
    make_train_step(dataclasses.replace(config, model=half))


def test_a_model_in_bf16_is_trained_in_f32_unless_the_command_says_otherwise(tmp_path):
  model = to_dict(trainee.MODEL)
  model["precision"]["param"] = "bfloat16"
  (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": model}))
  param = lambda *overrides, **kw: load_config(str(tmp_path), overrides, **kw).model.precision.param
  assert (param(), param(trains=True)) == ("bfloat16", "float32")
  assert param(("model.precision.param", "bfloat16"), trains=True) == "bfloat16"


# -------------------------------------------------------------------------------------------- settings and paths


def test_settings_that_cancel_each_other_are_refused():
  config = lambda keep, every, evals: dataclasses.replace(
    experiment(), checkpoint=CheckpointConfig(keep_best=keep, every=every), eval=EvalConfig(every=evals)
  )
  for bad in (config(2, 4, 3), config(2, 4, 0), config(1, 0, 4), config(1, 2, 4)):
    with pytest.raises(UserError, match="checkpoint.keep_best=. keeps checkpoints by their eval/loss"):
      check_settings(bad)
  for good in (config(2, 4, 4), config(2, 8, 4), config(0, 4, 3)):
    check_settings(good)


def test_no_row_counts_twice_in_an_evaluation(tmp_path):
  (tmp_path / "a.txt").write_text("\n\n".join(f"text {i}, and some more of it" for i in range(60)))
  source = TextFiles(paths=(str(tmp_path / "a.txt"),), separator="\n\n")
  data = DataConfig(source=source, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
  pipeline = make_pipeline(data, batch_size=4, seq_len=8, seed=0, vocab_size=264, split="validation")
  batches = [pipeline.batch(i) for i in range(pipeline.num_rows // 4 + 3)]
  assert len({pipeline.rows._order(i) for i in range(100)}) == 100
  assert sum((batch["positions"][:, 0] == 0).sum() for batch in batches) == pipeline.num_rows
  assert sum(batch["loss_weights"].sum() for batch in batches) == pipeline.num_rows * 8
  assert (batches[-1]["positions"] == -1).all()


def test_every_path_expands_home_and_is_absolute_and_addresses_are_refused(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert local_path("~/run", "--workdir") == str(tmp_path / "run")
  config = experiment(init_from="~/model")
  data = DataConfig(source=TextFiles(paths=("~/a*.txt", "b.txt")), tokenizer="~/bpe", cache_dir="~/cache")
  found = with_absolute_paths(dataclasses.replace(config, data=data))
  home = str(tmp_path)
  assert found.data.source.paths == (f"{home}/a*.txt", os.path.abspath("b.txt"))
  assert (found.data.tokenizer, found.train.init_from) == (f"{home}/bpe", f"{home}/model")
  assert with_absolute_paths(experiment()).data == experiment().data
  for address in ("gs://bucket/run", "s3://bucket/run", "hf://x/y"):
    with pytest.raises(UserError, match="--workdir='.*' is an address"):
      train_run(experiment(), address)
    with pytest.raises(UserError, match="data.tokenizer='.*' is an address"):
      with_absolute_paths(dataclasses.replace(config, data=DataConfig(tokenizer=address)))
  assert absolute_path("a", "x") == os.path.abspath("a")


# ----------------------------------------------------------------------------------------------- configs and texts


FILE = """
import numpy as np
from ml_collections import ConfigDict, config_dict

def get_config():
  c = ConfigDict({model!r})
  c.train = ConfigDict(dict(steps=np.int64(40), batch_size=np.array(8), seq_len=config_dict.placeholder(int)))
  c.optimizer = ConfigDict(dict(learning_rate=np.float32(0.5), clip_norm=None))
  c.optimizer.schedule = dict(kind="constant", warmup=c.train.get_oneway_ref("steps") // 4)
  c.eval = dict(every={every})
  return c
"""


def test_configs_may_have_placeholders_references_and_numbers_of_numpy(tmp_path):
  path = tmp_path / "c.py"
  write = lambda every: path.write_text(FILE.format(model={"model": to_dict(trainee.MODEL)}, every=every))
  write("np.bool_(False) and 1 or 5")
  plain = RunConfig(model=dataclasses.replace(trainee.MODEL, max_seq_len=512))
  sized = ("model.max_seq_len", "512")
  config = load_config(str(path), [sized])
  assert config.train == TrainConfig(steps=40, batch_size=8) and config.optimizer.schedule.warmup == 10
  assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (0.5, None)
  assert load_config(str(path), [sized, ("train.steps", "80")]).optimizer.schedule.warmup == 20
  assert load_config(str(path), [sized, ("train.lora.rank", "4"), ("train.init_from", "x")]).train.lora.rank == 4
  write("config_dict.required_placeholder(int)")
  with pytest.raises(UserError, match=r"config.eval.every has no value in .*c.py; give it with --config.eval.every="):
    load_config(str(path), [sized])
  assert load_config(str(path), [sized, ("eval.every", "7")]).eval.every == 7
  with pytest.raises(UserError, match="config.train.lora.rang: no such key; did you mean 'rank'"):
    build(RunConfig, override(to_dict(plain), [("train.lora.rang", "4")]))


PARTS = [f"part {i} " + "x" * (i % 7) for i in range(20)]
PLAIN = "\n\n".join(PARTS).encode()


def documents(path, separator="\n\n", source=TextFiles):
  return list(sources.documents(source(paths=(str(path),), **({"separator": separator} if separator else {}))))


@pytest.mark.parametrize("name", ["a.txt", "data [v1]/a.txt", "[x].txt", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("written", ["plain", "crlf", "bom"])
def test_a_text_file_reads_the_same_however_it_was_written(tmp_path, name, written):
  data = {"plain": PLAIN, "crlf": PLAIN.replace(b"\n", b"\r\n"), "bom": b"\xef\xbb\xbf" + PLAIN}[written]
  if name.endswith(".gz"):
    data = gzip.compress(data)
  if name.endswith(".zst"):
    data = pytest.importorskip("zstandard").compress(data)
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_bytes(data)
  assert documents(tmp_path / name) == documents(tmp_path / name, r"\n\n") == PARTS
  if "/" in name:
    assert documents(tmp_path / "data [v1]" / "*.txt") == PARTS


def test_parquet_files_and_compressed_lines_are_documents(tmp_path):
  lines = "".join(json.dumps({"body": part}) + "\n" for part in PARTS)
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8-sig")))
  body = lambda path: list(sources.documents(JSONL(paths=(str(path),), field="body")))
  assert body(tmp_path / "a.jsonl.gz") == PARTS
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  parquet.write_table(pyarrow.table({"body": PARTS, "text": [*PARTS[1:], None]}), tmp_path / "a.parquet")
  assert body(tmp_path / "a.parquet") == PARTS and documents(tmp_path / "a.parquet", "") == PARTS[1:]


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(PLAIN)[:-9])
  (tmp_path / "b.txt.gz").write_bytes(PLAIN)
  (tmp_path / "c.txt.zst").write_bytes(PLAIN)
  (tmp_path / "d.parquet").write_bytes(PLAIN)
  for name in ("a.txt.gz", "b.txt.gz", "c.txt.zst", "d.parquet"):
    with pytest.raises(UserError, match=f"{name} (cannot be read|is compressed by zstd|is a parquet)"):
      documents(tmp_path / name)
  with pytest.raises(UserError, match="is a folder"):
    documents(tmp_path)
  (tmp_path / "e.txt").write_bytes(PLAIN)
  sources.survey(TextFiles(paths=(str(tmp_path / "e.txt"),), separator="<|end|>"))
  assert "data.source.separator='<|end|>' is in none of the files" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- loggers


def test_weights_and_biases_gets_every_row_name_notes_and_tags(tmp_path, monkeypatch):
  asked, logged = {}, []

  class Run:
    def log(self, numbers, step):
      logged.append((step, numbers))

    def finish(self):
      logged.append("finished")

  class Fake:
    Settings = dict

    @staticmethod
    def init(**given):
      asked.update(given)
      return Run()

  monkeypatch.setitem(sys.modules, "wandb", Fake)
  log = LogConfig(wandb="project", wandb_mode="offline", name="mine", notes="why", tags=("a", "b"), tensorboard=False)
  writer = MetricsWriter(str(tmp_path), 0, log, config={"seed": 1})
  writer.write({"step": 3, "loss": 0.5, "mfu": None, "telemetry": {"rms": [1.0, 2.0]}})
  writer.close()
  assert (asked["project"], asked["mode"], asked["config"]) == ("project", "offline", {"seed": 1})
  assert (asked["name"], asked["notes"], asked["tags"]) == ("mine", "why", ["a", "b"])
  step, numbers = logged[0]
  assert step == 3 and numbers.keys() == {"loss", "telemetry/rms/0", "telemetry/rms/1", "seconds"}
  assert logged[1] == "finished"
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="log.wandb='project' needs the package wandb; run pip install"):
    MetricsWriter(str(tmp_path), 0, log)


@pytest.mark.full
def test_weights_and_biases_writes_a_run_offline(tmp_path):
  pytest.importorskip("wandb")
  writer = MetricsWriter(str(tmp_path), 0, LogConfig(wandb="project", wandb_mode="offline", tensorboard=False))
  writer.write({"step": 1, "loss": 0.5})
  writer.close()
  assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
